"""``declip look``: pages of what the filter, the duplicates and the neighbor table came to."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from declip_shards import DeclipError, Store, layout
from declip_shards.errors import did_you_mean
from pipelines.arguments import ArgumentParser
from pipelines.duplicates_page import duplicates_page, read_duplicate_facts
from pipelines.filter_page import filter_page, read_filter_facts
from pipelines.neighbors_page import neighbors_page, read_table_facts

MAX_SAMPLES = 200
"""Of each kind: every picture is inside the one file."""

Figures = Sequence[tuple[str, str]]
"""(name, value) of what the terminal prints."""


@dataclass(frozen=True)
class Page:
    """One of the pages."""

    folder: str
    """What it looks at lies in this folder, by name."""
    name: str
    """Which one, where none is named."""
    purpose: str
    make: Callable[[Store, str, int, int], tuple[bytes, Figures]]
    """(dataset, name, samples, seed) -> (file, figures)."""


def _filter(store: Store, name: str, num: int, seed: int) -> tuple[bytes, Figures]:
    facts = read_filter_facts(store, name, num, seed)
    return filter_page(store, facts), facts.figures()


def _duplicates(store: Store, name: str, num: int, seed: int) -> tuple[bytes, Figures]:
    facts = read_duplicate_facts(store, name, num, seed)
    return duplicates_page(store, facts), facts.figures()


def _neighbors(store: Store, name: str, num: int, seed: int) -> tuple[bytes, Figures]:
    facts = read_table_facts(store, name, num, seed)
    return neighbors_page(store, facts), facts.figures()


PAGES: Mapping[str, Page] = {
    "filter": Page("selection", "default", "kept and dropped, by rule, with pictures", _filter),
    "duplicates": Page("signals", "duplicates", "pairs of duplicates side by side", _duplicates),
    "neighbors": Page("neighbors", "captions", "samples beside their neighbors", _neighbors),
}
"""What can be looked at."""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip look",
        description="Write a page of what a step came to, with pictures, into report/.",
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, page in PAGES.items():
        command = commands.add_parser(what, help=page.purpose)
        command.add_argument("--out", required=True, metavar="FOLDER", help="the dataset")
        command.add_argument(
            "--name", default=page.name, help=f"which, of {page.folder}/ ({page.name})"
        )
        command.add_argument(
            "--samples", type=int, default=12, metavar="N", help="samples shown of each kind (12)"
        )
        command.add_argument("--seed", type=int, default=0, help="of the drawing of samples (0)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point; returns 0.

    Raises:
        DeclipError: there is no such dataset or step in it, its files are damaged, or an option is
            wrong.
    """
    given = build_parser().parse_args(argv)
    if not 1 <= given.samples <= MAX_SAMPLES:
        raise DeclipError(
            f"--samples is {given.samples}; it must lie between 1 and {MAX_SAMPLES}: every "
            "picture is inside the one file."
        )
    if given.seed < 0:
        raise DeclipError(f"--seed is {given.seed}; it must be 0 or more.")
    store, page = Store(given.out), PAGES[given.what]
    if not layout.list_shards(store):
        raise DeclipError(
            f"there is no complete shard under {store.path('shards')!r}; give the folder of a "
            "dataset with --out."
        )
    names = store.list_folders(page.folder)
    if given.name not in names:
        told = (
            did_you_mean(given.name, names) if names else f" Run the step that writes {given.what}."
        )
        raise DeclipError(f"--name is {given.name!r}, which is not in {page.folder}/.{told}")
    data, figures = page.make(store, given.name, given.samples, given.seed)
    path = f"report/{given.what}.html"
    store.write_bytes(path, data)
    width = max(len(name) for name, _ in figures) + 2
    print("\n".join(f"{name:<{width}}{value}" for name, value in figures))
    print(f"\nPage: {store.path(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
