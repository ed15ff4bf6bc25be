"""``declip doctor``: say why so many rows failed, and what to do."""

import argparse
import json
from collections.abc import Sequence

from declip_ingest.doctor import diagnose, diagnosis_json, diagnosis_text
from declip_shards import DeclipError
from pipelines.arguments import ArgumentParser
from pipelines.progress import Progress
from pipelines.runner import check_location
from pipelines.train_doctor import main as diagnose_train

MAX_PROBES = 10_000
"""More hosts than that are no sample."""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip doctor",
        description="Say why so many rows failed, ranked, and what to do about each cause.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        metavar="ingest|train",
        choices=["ingest", "train"],
        help="ingest: the ledger of a download; train: the log of a run",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", required=True, help="folder or URL of the dataset"
    )
    parser.add_argument(
        "--probe-urls",
        metavar="N",
        type=int,
        default=200,
        help="failed hosts that are asked once more, politely (200)",
    )
    parser.add_argument(
        "--no-probe", action="store_true", help="read the ledger alone; make no connection"
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 whatever is found: a diagnosis is no failure.

    Raises:
        DeclipError: a wrong option, or no ledger there.
    """
    if argv and argv[0] == "train":
        return diagnose_train(argv[1:])
    arguments = build_parser().parse_args(argv)
    check_location(arguments.out)
    if not 1 <= arguments.probe_urls <= MAX_PROBES:
        raise DeclipError(
            f"--probe-urls is {arguments.probe_urls} but must lie between 1 and {MAX_PROBES:,}; "
            "try 200, or --no-probe for none."
        )
    if arguments.no_probe:
        found = diagnose(arguments.out, num_probes=0)
    else:
        with Progress("probe", arguments.probe_urls) as bar:
            found = diagnose(
                arguments.out,
                num_probes=arguments.probe_urls,
                on_host=lambda: bar.advance(1),
            )
    if arguments.json:
        print(json.dumps(diagnosis_json(found), indent=2, sort_keys=True))
    else:
        print(diagnosis_text(found))
    return 0
