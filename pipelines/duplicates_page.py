"""What the ladder of duplicates found: counts at each rung, and pairs to look at side by side."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_eval import html
from declip_eval.charts import bar_chart
from declip_shards import DeclipError, Store, layout, sidecars
from pipelines.sheets import FOOTER, Cell, cell_of, flat_entries, pictures_of_keys, sheet

CONTAMINATED, CONTAMINATED_RUNG = "contaminated_by", "contaminated_rung"
_OF = re.compile(r"duplicate_(.+)_of")
_LISTS = ("group_sizes", "largest_groups")
"""Entries of the report that are too long for a table of settings."""
_MEASURED: Mapping[str, str] = {"distance": "{} bits apart", "cosine": "cosine {:.3f}"}
"""What a rung measures beside its pairs -> how a pair's note says it."""


@dataclass(frozen=True)
class Pair:
    """A duplicate and what it is one of."""

    key: str
    of: str
    """Key of the sample that stays; of contamination SET:key."""
    note: str
    """How near they are."""


@dataclass(frozen=True)
class Rung:
    """One way to find duplicates, over the whole dataset."""

    name: str
    alone: int
    """Samples that are a duplicate by this rung."""
    added: int
    """Those among them that no rung before it had found."""
    pairs: tuple[Pair, ...]
    """Drawn by chance from the added ones."""


@dataclass(frozen=True)
class DuplicateFacts:
    """The figures of a set of duplicates."""

    name: str
    num_samples: int
    num_dropped: int
    """Samples that are a duplicate by any rung."""
    rungs: tuple[Rung, ...]
    """In the order of the ladder."""
    contaminated: Mapping[str, int]
    """Evaluation set -> samples that are in it."""
    contaminated_pairs: tuple[Pair, ...]
    report: Mapping[str, Any]
    """What the stage says of itself; empty where it left nothing."""

    def figures(self) -> list[tuple[str, str]]:
        """(name, value) for the terminal."""
        share = self.num_dropped / self.num_samples if self.num_samples else 0.0
        return [
            ("duplicates", self.name),
            ("samples", f"{self.num_samples:,}"),
            ("duplicates by any rung", f"{self.num_dropped:,} ({share:.2%})"),
            *(
                (rung.name, f"{rung.alone:,} alone, {rung.added:,} more than the rungs before")
                for rung in self.rungs
            ),
            *((f"in {name}", f"{count:,}") for name, count in self.contaminated.items()),
        ]


class _Draw:
    """A uniform draw of a stream of unknown length: the smallest of random numbers stay."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: list[tuple[float, Pair]] = []

    def add(
        self,
        table: pa.Table,
        of: str,
        rows: npt.NDArray[np.bool_],
        luck: npt.NDArray[np.float64],
        measured: str,
    ) -> None:
        """Offer the ``rows`` of a shard's table; ``of`` is the column of what they are."""
        chosen = np.flatnonzero(rows)
        chosen = chosen[np.argsort(luck[chosen], kind="stable")[: self.most]]
        for row, number in zip(
            table.take(pa.array(chosen)).to_pylist(), luck[chosen].tolist(), strict=True
        ):
            note = ""
            if measured and row[measured] is not None:
                note = _MEASURED[measured.rpartition("_")[2]].format(row[measured])
                note = note.replace("bits", "bit") if note.startswith("1 ") else note
            elif of == CONTAMINATED:
                note = str(row.get(CONTAMINATED_RUNG) or "")
            self.kept.append((number, Pair(str(row["key"]), str(row[of]), note)))
        self.kept = sorted(self.kept, key=lambda pair: (pair[0], pair[1].key))[: self.most]

    def pairs(self) -> tuple[Pair, ...]:
        return tuple(pair for _, pair in self.kept)


def read_duplicate_facts(store: Store, name: str, num_samples: int, seed: int) -> DuplicateFacts:
    """Go through a set of duplicates once, shard by shard.

    Args:
        store: the dataset.
        name: of the set, in signals/.
        num_samples: pairs drawn at each rung.
        seed: of the drawing.

    Raises:
        DeclipError: a table is missing or damaged, or the set holds no duplicates.
    """
    shards = layout.list_shards(store)
    columns = _columns(store, name, shards[0])
    ladder = {column: match[1] for column in columns if (match := _OF.fullmatch(column))}
    if not ladder and CONTAMINATED not in columns:
        raise DeclipError(
            f"signals/{name}/ holds no duplicates (no column duplicate_..._of); name the set that "
            "the duplicates step wrote with --name."
        )
    sources = [*ladder, *([CONTAMINATED] if CONTAMINATED in columns else [])]
    draws = {column: _Draw(num_samples) for column in sources}
    alone: Counter[str] = Counter()
    added: Counter[str] = Counter()
    contaminated: Counter[str] = Counter()
    num, num_dropped = 0, 0
    rng = np.random.default_rng(seed)
    for shard in shards:
        table = sidecars.read_table(store, layout.signals_path(name, shard))
        luck = rng.random(table.num_rows)
        found = np.zeros(table.num_rows, dtype=bool)
        for column in sources:
            here = pc.is_valid(table.column(column)).to_numpy(zero_copy_only=False)
            fresh = here if column == CONTAMINATED else here & ~found
            draws[column].add(table, column, fresh, luck, _measured(columns, column))
            alone[column] += int(here.sum())
            if column != CONTAMINATED:
                added[column] += int(fresh.sum())
                found |= here
        if CONTAMINATED in columns:
            named = table.column(CONTAMINATED).drop_null().to_pylist()
            contaminated.update(str(value).partition(":")[0] for value in named)
        num, num_dropped = num + table.num_rows, num_dropped + int(found.sum())
    return DuplicateFacts(
        name=name,
        num_samples=num,
        num_dropped=num_dropped,
        rungs=tuple(
            Rung(rung, alone[column], added[column], draws[column].pairs())
            for column, rung in ladder.items()
        ),
        contaminated=dict(sorted(contaminated.items())),
        contaminated_pairs=draws[CONTAMINATED].pairs() if CONTAMINATED in draws else (),
        report=_read_report(store, name),
    )


def _columns(store: Store, name: str, shard: str) -> list[str]:
    names: list[str] = sidecars.read_table(store, layout.signals_path(name, shard)).column_names
    return names


def _measured(columns: Sequence[str], column: str) -> str:
    """The column that says how near the pairs of a rung are; empty where there is none."""
    match = _OF.fullmatch(column)
    names = [f"duplicate_{match[1]}_{what}" for what in _MEASURED] if match else []
    return next((name for name in names if name in columns), "")


def _read_report(store: Store, name: str) -> dict[str, Any]:
    path = f"signals/{name}/report.json"
    if not store.exists(path):
        return {}
    try:
        report: dict[str, Any] = json.loads(store.read_bytes(path))
    except ValueError as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and run the duplicates step again."
        ) from error
    return report


def duplicates_page(store: Store, facts: DuplicateFacts) -> bytes:
    """The page: the ladder, pairs of each rung, what is in evaluation sets, the settings."""
    keys = {key for rung in facts.rungs for pair in rung.pairs for key in (pair.key, pair.of)}
    keys |= {pair.key for pair in facts.contaminated_pairs}
    pictures = pictures_of_keys(store, keys)
    share = facts.num_dropped / facts.num_samples if facts.num_samples else 0.0
    tiles = [
        ("Samples", f"{facts.num_samples:,}", "compared"),
        ("Duplicates", f"{facts.num_dropped:,}", f"{share:.1%}, by any rung"),
        *((f"In {name}", f"{count:,}", "samples") for name, count in facts.contaminated.items()),
    ]
    sections = [_ladder_section(facts), *(_rung_section(rung, pictures) for rung in facts.rungs)]
    if facts.contaminated_pairs:
        sections.append(_contamination_section(facts, pictures))
    if facts.report:
        sections.append(_report_section(facts.report))
    page = html.page(
        "Duplicates" if facts.name == "duplicates" else f"Duplicates: {facts.name}",
        sections,
        subtitle="What is in the dataset more than once, and by what it was found.",
        summary=[html.stat_tiles(tiles)],
        footer=FOOTER,
    )
    return page.encode()


def _ladder_section(facts: DuplicateFacts) -> html.Section:
    table = html.table(
        ["rung", "alone", "more than before", "of all", "groups", "largest group"],
        [
            [
                rung.name,
                f"{rung.alone:,}",
                f"{rung.added:,}",
                f"{rung.added / facts.num_samples:.2%}" if facts.num_samples else "",
                *_groups(facts.report, rung.name),
            ]
            for rung in facts.rungs
        ],
        caption="Samples that have a better one beside them",
    )
    bars = [(rung.name, float(rung.added)) for rung in facts.rungs]
    chart = bar_chart(bars, title="What each rung adds", unit="samples") if bars else ""
    return html.section(
        "Ladder",
        table,
        chart,
        lead="The rungs go from equal bytes to equal meaning; of each group one sample stays and "
        "is not counted. More than before: what no rung above had found.",
    )


def _groups(report: Mapping[str, Any], rung: str) -> list[str]:
    """How many groups a rung found, and the size of the largest, as the stage says."""
    said = report.get("rungs", {}).get(rung, {})
    sizes = said.get("largest_groups") or [0]
    return [f"{said['groups']:,}", f"{sizes[0]:,}"] if "groups" in said else ["", ""]


def _rung_section(rung: Rung, pictures: Mapping[str, tuple[bytes, str]]) -> html.Section:
    rows = [
        [
            cell_of(pictures, pair.of, f"stays: {pair.of}"),
            cell_of(pictures, pair.key, f"duplicate: {pair.key}"),
        ]
        for pair in rung.pairs
    ]
    titles = [pair.note for pair in rung.pairs]
    return html.section(
        f"Pairs: {rung.name}",
        sheet(rows, row_titles=titles)
        if rows
        else html.callout("This rung found none that the rungs before it had not."),
        lead="Drawn by chance from what this rung adds: the sample that stays, then its duplicate.",
        anchor=f"pairs-{rung.name}",
    )


def _contamination_section(
    facts: DuplicateFacts, pictures: Mapping[str, tuple[bytes, str]]
) -> html.Section:
    rows: list[list[Cell]] = [[cell_of(pictures, p.key)] for p in facts.contaminated_pairs]
    titles = [f"{pair.of} {pair.note}".strip() for pair in facts.contaminated_pairs]
    return html.section(
        "In evaluation sets",
        sheet(rows, row_titles=titles),
        lead="Samples that an evaluation set holds too, under the set's name and its sample.",
    )


def _report_section(report: Mapping[str, Any]) -> html.Section:
    entries = flat_entries(report, without=_LISTS)
    return html.section(
        "How they were found",
        html.table(["entry", "value"], [list(pair) for pair in entries], text_columns=(0, 1)),
        lead="The stage's own report, as it lies in report.json.",
    )
