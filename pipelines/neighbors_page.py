"""What a neighbor table holds: who has a useful neighbor, how near they are, samples to look at."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_eval import html
from declip_filter.table_versions import USEFUL_SCORE, check_table
from declip_shards import DeclipError, Store, layout
from declip_shards.neighbor_tables import (
    TableVersion,
    missing_shards,
    read_description,
    read_lists,
    resolve_table,
)
from pipelines.sheets import FOOTER, card, cell_of, flat_entries, pictures_of_keys
from pipelines.signal_histogram import binned_histogram

NEIGHBORS_SHOWN = 4
"""Of each sample: what fits into a row at 1,280 pixels."""
BIN = 0.02
"""Width of the histogram's bins, in units of the score."""


@dataclass(frozen=True)
class Example:
    """A sample with what the table has for it."""

    key: str
    neighbors: tuple[tuple[str, float], ...]
    """Key and score, best first."""


@dataclass(frozen=True)
class TableFacts:
    """Figures of a whole table."""

    version: TableVersion
    num_samples: int
    num_with: int
    """Samples that have a neighbor."""
    num_useful: int
    """Those of them whose first neighbor reaches ``useful_score``."""
    useful_score: float
    """Cosine from which a neighbor is of use, as the table was built with it."""
    num_neighbors: int
    score_sum: float
    edges: npt.NDArray[np.float64]
    first_counts: npt.NDArray[np.int64]
    """Scores of each sample's first neighbor, by bin."""
    all_counts: npt.NDArray[np.int64]
    """Scores of all neighbors, by bin."""
    examples: tuple[Example, ...]
    """Samples with a neighbor."""
    lonely: tuple[str, ...]
    """Samples without."""

    @property
    def fraction(self) -> float:
        return self.num_with / self.num_samples if self.num_samples else 0.0

    @property
    def fraction_useful(self) -> float:
        return self.num_useful / self.num_samples if self.num_samples else 0.0

    @property
    def mean_score(self) -> float:
        return self.score_sum / self.num_neighbors if self.num_neighbors else 0.0

    @property
    def useful_means(self) -> str:
        """From which score on a first neighbor counts."""
        return f"have one of {self.useful_score:g} or more"

    def figures(self) -> list[tuple[str, str]]:
        """(name, value) for the terminal."""
        mean = self.num_neighbors / self.num_samples if self.num_samples else 0.0
        return [
            ("table", self.version.folder),
            ("encoder", self.version.encoder or "not recorded"),
            ("samples", f"{self.num_samples:,}"),
            ("with a neighbor", f"{self.num_with:,} ({self.fraction:.2%})"),
            ("useful", f"{self.num_useful:,} ({self.fraction_useful:.2%}) {self.useful_means}"),
            ("neighbors of a sample", f"{mean:.2f}"),
            ("mean score", f"{self.mean_score:.4f}"),
        ]


def read_table_facts(store: Store, name: str, num_samples: int, seed: int) -> TableFacts:
    """Go through a table once, shard by shard, and draw the samples that are shown.

    Args:
        store: the dataset.
        name: of the table; the refreshed one is taken where one is in use.
        num_samples: samples drawn, with a neighbor and without each.
        seed: of the drawing.

    Raises:
        DeclipError: there is no such table, it is damaged, does not cover every shard, or was made
            for other shards.
    """
    shards = layout.list_shards(store)
    version = resolve_table(store, name)
    missing = missing_shards(store, version, shards)
    if missing or not shards:
        told = f"shard {missing[0]}" if missing else "a shard"
        raise DeclipError(
            f"neighbor table {version.folder!r} does not cover {told} in {store.url!r}; run the "
            "neighbors step, or name another table with --name."
        )
    check_table(store, version.folder)
    settings = (read_description(store, version.folder) or {}).get("settings", {})
    useful_score = float(settings.get("useful_score", USEFUL_SCORE))
    edges = np.round(np.arange(-1, 1 + BIN / 2, BIN), 6)
    first_counts, all_counts = np.zeros((2, len(edges) - 1), np.int64)
    num, num_with, num_useful, num_neighbors, total = 0, 0, 0, 0, 0.0
    rng = np.random.default_rng(seed)
    drawn: list[tuple[float, Example]] = []
    lonely: list[tuple[float, str]] = []
    for shard in shards:
        table = read_lists(store, version, shard, ["scores"])
        lists = table.column("scores").combine_chunks()
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
        scores = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        starts = np.cumsum(lengths) - lengths
        all_counts += _binned(scores, edges)
        best = scores[starts[lengths > 0]]
        first_counts += _binned(best, edges)
        num_useful += int((best.astype(np.float32) >= useful_score).sum())
        num, num_with = num + len(lengths), num_with + int((lengths > 0).sum())
        num_neighbors, total = num_neighbors + len(scores), total + float(scores.sum())
        # The smallest of random numbers: a uniform draw of a stream of unknown length.
        luck = rng.random(len(lengths))
        for rows, is_lonely in ((lengths > 0, False), (lengths == 0, True)):
            chosen = np.flatnonzero(rows)
            chosen = chosen[np.argsort(luck[chosen], kind="stable")[:num_samples]]
            taken = table.take(pa.array(chosen)).to_pylist()
            lucks = luck[chosen].tolist()
            if is_lonely:
                lonely += zip(lucks, (str(row["key"]) for row in taken), strict=True)
            else:
                drawn += zip(lucks, map(_example, taken), strict=True)
        drawn = sorted(drawn, key=lambda pair: (pair[0], pair[1].key))[:num_samples]
        lonely = sorted(lonely)[:num_samples]
    return TableFacts(
        version=version,
        num_samples=num,
        num_with=num_with,
        num_useful=num_useful,
        useful_score=useful_score,
        num_neighbors=num_neighbors,
        score_sum=total,
        edges=edges,
        first_counts=first_counts,
        all_counts=all_counts,
        examples=tuple(example for _, example in drawn),
        lonely=tuple(key for _, key in lonely),
    )


def _binned(
    scores: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Scores by bin; rounding takes a cosine a little beyond 1."""
    return np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0].astype(np.int64)


def _example(row: dict[str, object]) -> Example:
    keys, scores = row["neighbor_keys"], row["scores"]
    assert isinstance(keys, list)
    assert isinstance(scores, list)
    return Example(str(row["key"]), tuple(zip(map(str, keys), map(float, scores), strict=True)))


def neighbors_page(store: Store, facts: TableFacts) -> bytes:
    """The page: figures, distribution of scores, samples with their neighbors, samples without."""
    shown = [
        Example(example.key, example.neighbors[:NEIGHBORS_SHOWN]) for example in facts.examples
    ]
    keys = {key for e in shown for key in (e.key, *(k for k, _ in e.neighbors))}
    pictures = pictures_of_keys(store, keys | set(facts.lonely))
    rows = [
        html.neighbor_row(
            card(cell_of(pictures, example.key)),
            [(card(cell_of(pictures, key)), score) for key, score in example.neighbors],
            score="cosine",
        )
        for example in shown
    ]
    sections = [
        _scores_section(facts),
        html.section(
            "Samples with their neighbors",
            *(rows or [html.callout("No sample has a neighbor.", tone="warn")]),
            lead="Drawn by chance among those that have one. The sample is on the left; its "
            "neighbors follow, nearest first, each with its score.",
        ),
        html.section(
            "Samples without a neighbor",
            html.image_grid([card(cell_of(pictures, key)) for key in facts.lonely])
            if facts.lonely
            else html.callout("Every sample has one.", tone="good"),
            lead="Nothing near enough was found for them once their own caption's repeats were "
            "left out."
            if facts.lonely
            else "",
        ),
        _made_section(store, facts),
    ]
    tiles = [
        ("Samples", f"{facts.num_samples:,}", "rows of the table"),
        ("With a neighbor", f"{facts.fraction:.1%}", f"{facts.num_with:,} samples"),
        ("Useful", f"{facts.fraction_useful:.1%}", facts.useful_means),
        ("Mean score", f"{facts.mean_score:.3f}", f"over {facts.num_neighbors:,} neighbors"),
    ]
    page = html.page(
        f"Neighbor table: {facts.version.table}",
        sections,
        subtitle="For each sample, the others nearest to it.",
        summary=[html.stat_tiles(tiles)],
        footer=FOOTER,
    )
    return page.encode()


def _scores_section(facts: TableFacts) -> html.Section:
    used = np.flatnonzero(facts.all_counts)
    if not used.size:
        return html.section("Scores", html.callout("There is no score to draw.", tone="warn"))
    first, last = int(used[0]), int(used[-1]) + 1
    edges = facts.edges[first : last + 1].tolist()
    charts = [
        binned_histogram(edges, counts[first:last].tolist(), title=title, is_closed=True)
        for title, counts in (
            ("Score of the first neighbor", facts.first_counts),
            ("Score of every neighbor", facts.all_counts),
        )
    ]
    return html.section(
        "Scores",
        *charts,
        lead="The inner product of unit vectors. A heap close to 1 is of samples that say the "
        "same; a long tail to the left is of samples whose nearest is not near.",
    )


def _made_section(store: Store, facts: TableFacts) -> html.Section:
    described = read_description(store, facts.version.folder)
    if described is None:
        return html.section("How it was made", "The table has no table.json that says so.")
    rows = [list(pair) for pair in flat_entries(dict(sorted(described.items())))]
    return html.section(
        "How it was made", html.table(["setting", "value"], rows, text_columns=(0, 1))
    )
