"""``declip card``: a model card, written from a run and its results."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from declip_shards import DeclipError, Store, manifest
from pipelines.arguments import ArgumentParser
from pipelines.card_facts import gather_card_facts
from pipelines.eval_summary import SUMMARY
from pipelines.model_card import model_card
from pipelines.runner import check_location
from pipelines.stored_results import (
    TASK_TITLES,
    StoredResult,
    load_results,
    only_model,
    refuse_doubles,
)
from pipelines.table_command import write_text

CARD = "README.md"
"""As the Hugging Face Hub calls it, beside the weights."""


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip card",
        description="Write a model card from a run's files: data, filter, licenses, settings, "
        "compute, results and limits. What they do not say is called unknown.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the dataset or run that was trained")
    parser.add_argument(
        "--results",
        metavar="FOLDER",
        action="append",
        help="results of declip eval; may be given again (else: the run's eval/, if it is there)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="which model, where the results are of several"
    )
    parser.add_argument("--name", metavar="NAME", help="of the model (architecture and folder)")
    parser.add_argument(
        "--out", metavar="FILE", help=f"write there (else: {CARD} beside the run's exported model)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point; returns 0.

    Raises:
        DeclipError: there is no trained model, its files are damaged, or a wrong option.
    """
    given = build_parser().parse_args(list(argv))
    check_location(given.run)
    store = Store(given.run)
    facts = gather_card_facts(store)
    results = _results(given.run, given.results, given.model)
    unmatched = check_weights(store, results)
    folder = os.path.basename(os.path.normpath(given.run))
    name = given.name or f"{facts.settings.get('model', 'model')} {folder}"
    out = Path(given.out) if given.out else _beside_export(store)
    write_text(out, model_card(name, facts, results, unmatched))
    print(f"Card: {out} ({len(results)} results)", file=sys.stderr)
    return 0


def _results(run: str, places: Sequence[str] | None, model: str | None) -> list[StoredResult]:
    """The model's results, in the order of their tasks and datasets."""
    if places is None:
        folder = Path(run, "eval")
        # An evaluation of which nothing came leaves its summary alone.
        if all(file.name == SUMMARY for file in folder.glob("*.json")):
            return []
        places = [str(folder)]
    found = load_results(places)
    chosen = only_model(found, model, "--model")
    found = [stored for stored in found if stored.model == chosen]
    refuse_doubles(found)
    return in_order(found)


def in_order(results: Iterable[StoredResult]) -> list[StoredResult]:
    """Results by task, as tables have them, then by shots and dataset."""
    tasks = list(TASK_TITLES)
    return sorted(
        results,
        key=lambda stored: (tasks.index(stored.result.task), stored.shots or 0, stored.dataset),
    )


def check_weights(store: Store, results: Sequence[StoredResult]) -> list[str]:
    """Hold the results against the run's weights.

    Returns:
        Datasets of results of which nobody can say whether they are of these weights.

    Raises:
        DeclipError: a result of other weights.
    """
    trained = manifest.manifest_digest(store, "train")
    own: str | None = None
    unmatched: dict[str, None] = {}
    for stored in results:
        known = stored.result.provenance
        hashes = known.hashes if known else {}
        if "train" in hashes and trained is not None:
            is_own = hashes["train"] == trained
        elif "weights" in hashes and store.exists("train/export/open_clip_config.json"):
            own = own or _digest_of(store)
            is_own = hashes["weights"] == own
        else:
            unmatched[stored.dataset] = None
            continue
        if not is_own:
            raise DeclipError(
                f"{str(stored.path)!r} is of other weights than those of {store.url!r}; give the "
                "results of this run with --results, or evaluate it again."
            )
    return list(unmatched)


def _digest_of(store: Store) -> str:
    # Here, for it loads torch, which a card without results need not wait for.
    from pipelines.eval_models import load_eval_model

    return load_eval_model(str(store.local_path("train/export"))).digest


def _beside_export(store: Store) -> Path:
    """Where the card stands beside the weights.

    Raises:
        DeclipError: there is no exported model.
    """
    folder = store.local_path("train/export")
    if not folder.is_dir():
        raise DeclipError(
            f"{str(folder)!r} is not there: the training has not finished; say with --out where "
            "the card goes."
        )
    return folder / CARD


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
