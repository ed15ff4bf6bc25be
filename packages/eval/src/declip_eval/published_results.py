"""Numbers of papers, each with its source, to stand beside measured ones in a table.

They are data, in `tables/published.csv`: percent as printed, one row a number, with what is known
of the protocol. A number whose protocol differs is no target; the notes say how it differs.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources

_PLACE = "tables/published.csv"


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """One published number."""

    model: str
    """Method, such as DeCLIP; a step of an ablation is "CLIP + MVS"."""

    tower: str
    """Image tower, as open_clip names it."""

    data: str
    """What it was trained on."""

    epochs: str
    """Of training; empty where it is not known."""

    task: str
    """As in `results.TASKS`."""

    dataset: str
    """Name of the dataset, as in `dataset_table`."""

    metric: str
    """As in result files, such as acc1 or lp_acc1."""

    percent: float
    """As printed."""

    source: str
    """Where it is printed."""

    notes: str = ""
    """What is known of the protocol, and what is not."""

    @property
    def value(self) -> float:
        """Fraction of 1, as in result files."""
        return self.percent / 100

    @property
    def label(self) -> str:
        """What a table's row is called: everything that tells two models apart."""
        epochs = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.model} {self.tower} ({self.data}{epochs})"


@cache
def published_results() -> tuple[PublishedResult, ...]:
    """Every published number of the table, in its order."""
    text = resources.files("declip_eval").joinpath(_PLACE).read_text(encoding="utf-8")
    return parse_published(text)


def parse_published(text: str) -> tuple[PublishedResult, ...]:
    """Read a table in the form of `tables/published.csv`.

    Raises:
        ValueError: other columns, an empty cell that is needed, a percentage out of range, or one
            number twice; the line is named.
    """
    reader = csv.DictReader(io.StringIO(text), strict=True)
    columns = [item.name for item in fields(PublishedResult)]
    if reader.fieldnames != columns:
        raise ValueError(
            f"The columns are {', '.join(reader.fieldnames or ['none'])}, but published results "
            f"have {', '.join(columns)}."
        )
    found: dict[tuple[str, ...], PublishedResult] = {}
    for row in reader:
        line = f"Line {reader.line_num} of the published results"
        if None in row or None in row.values():
            raise ValueError(f"{line} has not {len(columns)} cells.")
        empty = [name for name in columns if not row[name] and name not in ("epochs", "notes")]
        if empty:
            raise ValueError(f"{line} has no {empty[0]}.")
        texts = {name: row[name] for name in columns if name != "percent"}
        result = PublishedResult(**texts, percent=_percent(row["percent"], line))
        identity = (result.label, result.task, result.dataset, result.metric)
        if identity in found:
            raise ValueError(f"{line} gives {' / '.join(identity)} a second time.")
        found[identity] = result
    return tuple(found.values())


def _percent(text: str, line: str) -> float:
    try:
        percent = float(text)
    except ValueError:
        percent = math.nan
    if not 0 <= percent <= 100:
        raise ValueError(f"{line} has percent {text!r}, which is no number from 0 to 100.")
    return percent
