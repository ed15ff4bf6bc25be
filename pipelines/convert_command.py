"""``declip convert``: a dataset in another form that users have."""

import argparse
from collections.abc import Sequence
from typing import cast

from declip_shards import DeclipError, Store
from declip_shards.errors import did_you_mean
from declip_shards.export_files import FORMS, Form, export
from pipelines.arguments import ArgumentParser
from pipelines.runner import check_location


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="declip convert",
        description="Write a dataset as img2dataset's files or parquet, or make it readable for "
        "Megatron-Energon and open_clip. A second run writes only what has changed.",
        epilog="energon: name the dataset's own shards/ folder as --target to copy nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the dataset (any fsspec URL)")
    parser.add_argument("--to", required=True, metavar="|".join(FORMS), help="the form")
    parser.add_argument("--target", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--selection",
        metavar="NAME",
        help="energon: leave out what this selection drops (else: every downloaded sample)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip convert``; returns the exit status.

    Raises:
        DeclipError: a wrong form, folder or target.
    """
    arguments = build_parser().parse_args(list(argv))
    if arguments.to not in FORMS:
        raise DeclipError(f"--to is {arguments.to!r}.{did_you_mean(arguments.to, FORMS)}")
    if arguments.selection and arguments.to != "energon":
        raise DeclipError(
            f"--selection is for energon, which can leave samples out; {arguments.to} holds all "
            "of them: leave it out."
        )
    check_location(arguments.folder)
    check_location(arguments.target)
    done = export(
        Store(arguments.folder),
        Store(arguments.target),
        cast(Form, arguments.to),
        selection=arguments.selection,
    )
    print(
        f"{arguments.to}: {done.num_samples:,} samples in {done.num_shards:,} shards; "
        f"{done.num_written:,} written, {done.num_shards - done.num_written:,} as they were, "
        f"{done.num_removed:,} taken away."
    )
    return 0
