"""Named rules over the signals: which pairs are kept, and why the others are not."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.limits import require_between, require_folder_name
from declip_filter.signals import SCHEMA as SIGNALS_SCHEMA
from declip_filter.signals import read_signals, shard_tasks
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.errors import did_you_mean

Columns = Mapping[str, npt.NDArray[Any]]
"""Signals by name, one entry a sample."""
Mask = npt.NDArray[np.bool_]
"""True where a rule drops the sample."""

DEFAULT_SPLIT_COLUMN = "split"
MIN_WORDS_FOR_REPETITION = 4
"""Shorter captions repeat themselves by chance: "bye bye"."""

SCHEMA = pa.schema([("key", pa.string()), ("keep", pa.bool_()), ("reason", pa.string())])
"""Columns of ``selection/NAME/NNNNN.parquet``, one row a success, ordered by key."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A drop reason, and the samples it names."""

    name: str
    """The drop reason as it is written into the selection."""
    drops: Callable[[Columns], Mask]
    """From the signals' columns to one boolean a sample."""


@dataclass(frozen=True, kw_only=True)
class FilterPairs:
    """Write which pairs are kept, with the first failing rule for each other one.

    No picture is read and no shard rewritten, so another threshold costs seconds. A limit that
    is unset (none) is not applied. Rules run in the order of :func:`rules`.
    """

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    signals: str = "basic"
    """Name of the signals to read, from signals/NAME/."""
    name: str = "default"
    """Name of the selection: it goes to selection/NAME/."""
    min_words: int | None = 2
    """Fewest words of a caption."""
    min_chars: int | None = 3
    """Fewest characters of a caption."""
    max_words: int | None = 128
    """Most words of a caption."""
    max_chars: int | None = 1000
    """Most characters of a caption."""
    drop_file_names: bool = True
    """Drop captions that are a file's name, such as IMG_1234.jpg."""
    drop_urls: bool = True
    """Drop captions that are a web address and nothing else."""
    min_letters: float | None = 0.5
    """Least share of letters among a caption's characters, spaces not counted, 0 to 1."""
    max_repetition: float | None = 0.6
    """Most repetition of words: 1 - distinct words / words, 0 to 1; captions of 4 words or more."""
    min_side_pixels: int | None = 32
    """Least shorter side of the original picture, in pixels."""
    max_aspect: float | None = 3.0
    """Most longer side over shorter side of the original picture, 1 or more."""
    min_contrast: float | None = 0.02
    """Least standard deviation of the picture's luma, 0 to 0.5."""
    min_entropy: float | None = 0.2
    """Least entropy of the picture's gray levels, in bits, 0 to 8."""
    keep_splits: tuple[str, ...] = ("train",)
    """Values of the split column to keep, the others are dropped as held_out; none: keep all."""
    split_column: str | None = None
    """Column of the shards with the split; unset: 'split' where there is one, else keep all."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        require_folder_name("signals", self.signals)
        require_folder_name("name", self.name)
        for setting in ("min_words", "min_chars", "min_side_pixels"):
            require_between(setting, getattr(self, setting), 0)
        for setting in ("max_words", "max_chars"):
            require_between(setting, getattr(self, setting), 1)
        for setting in ("min_letters", "max_repetition"):
            require_between(setting, getattr(self, setting), 0, 1)
        require_between("max_aspect", self.max_aspect, 1)
        require_between("min_contrast", self.min_contrast, 0, 0.5)
        require_between("min_entropy", self.min_entropy, 0, 8)
        for unit in ("words", "chars"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise DeclipError(
                    f"min_{unit} is {low} and max_{unit} is {high}: no caption passes; "
                    f"lower min_{unit} or raise max_{unit}."
                )

    def tasks(self) -> Sequence[str]:
        return shard_tasks(self.root)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.selection_path(self.name, task))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)

        def run(task: str) -> TaskStats:
            table = select_pairs(self, _shard_columns(self, store, task))
            path = layout.selection_path(self.name, task)
            sidecars.write_table(store, path, table)
            reasons = Counter(table.column("reason").to_pylist())
            num_kept = reasons.pop("", 0)
            return TaskStats(num_in=table.num_rows, num_out=num_kept, reasons=reasons, files=[path])

        return run


def rules(settings: FilterPairs) -> list[Rule]:
    """The rules that the settings switch on, in the order in which they name a drop.

    A limit itself passes: ``min_words=3`` keeps captions of three words. What the hold-out
    keeps back comes last, so its count says how many good pairs were held out.
    """
    s = settings
    found = [Rule(name="caption_empty", drops=lambda c: c["caption_chars"] == 0)]

    def add(name: str, is_on: bool, drops: Callable[[Columns], Mask]) -> None:
        if is_on:
            found.append(Rule(name=name, drops=drops))

    def below(column: str, limit: float | None) -> Callable[[Columns], Mask]:
        return lambda c: c[column] < _as_stored(limit, c[column])

    def above(column: str, limit: float | None) -> Callable[[Columns], Mask]:
        return lambda c: c[column] > _as_stored(limit, c[column])

    # What a caption *is* comes before how long it is: a file's name is also a short caption,
    # and the more telling reason should be the one that is counted.
    add("caption_is_file_name", s.drop_file_names, lambda c: c["caption_is_file_name"])
    add("caption_is_url", s.drop_urls, lambda c: c["caption_is_url"])
    add("caption_too_short", s.min_words is not None, below("caption_words", s.min_words))
    add("caption_too_short", s.min_chars is not None, below("caption_chars", s.min_chars))
    add("caption_too_long", s.max_words is not None, above("caption_words", s.max_words))
    add("caption_too_long", s.max_chars is not None, above("caption_chars", s.max_chars))
    add("caption_few_letters", s.min_letters is not None, below("caption_letters", s.min_letters))
    repeats = above("caption_repetition", s.max_repetition)
    add(
        "caption_repetitive",
        s.max_repetition is not None,
        lambda c: (c["caption_words"] >= MIN_WORDS_FOR_REPETITION) & repeats(c),
    )
    add(
        "image_too_small",
        s.min_side_pixels is not None,
        lambda c: np.minimum(c["original_width"], c["original_height"]) < (s.min_side_pixels or 0),
    )
    add("image_extreme_aspect", s.max_aspect is not None, above("aspect", s.max_aspect))
    add("image_flat", s.min_contrast is not None, below("contrast", s.min_contrast))
    add("image_low_entropy", s.min_entropy is not None, below("entropy", s.min_entropy))
    add("held_out", bool(s.keep_splits), lambda c: ~np.isin(c["split"], list(s.keep_splits)))
    return found


def _as_stored(limit: float | None, column: npt.NDArray[Any]) -> Any:
    """The limit rounded as the column is, so that a value equal to it passes."""
    return np.float32(limit or 0) if column.dtype == np.float32 else limit


def select_pairs(settings: FilterPairs, columns: Columns) -> pa.Table:
    """Apply the rules to samples' signals.

    Args:
        columns: the signals of :mod:`declip_filter.signals` and, where ``keep_splits`` names
            any, ``split``; all of one length.

    Returns:
        A table of :data:`SCHEMA`; ``reason`` is empty for a kept sample and else the first
        failing rule's name.
    """
    num_samples = len(columns["key"])
    reason = np.full(num_samples, "", dtype=object)
    for rule in rules(settings):
        reason[rule.drops(columns) & (reason == "")] = rule.name
    return pa.table({"key": columns["key"], "keep": reason == "", "reason": reason}, schema=SCHEMA)


def _shard_columns(settings: FilterPairs, store: Store, shard: str) -> Columns:
    """A shard's signals with its split, checked to be of the same samples."""
    table = read_signals(store, settings.signals, shard)
    columns: dict[str, npt.NDArray[Any]] = {
        name: table.column(name).to_numpy() for name in SIGNALS_SCHEMA.names
    }
    path = layout.shard_parquet_path(shard)
    rows = sidecars.read_table(store, path)
    succeeded = np.asarray(rows.column("status").to_pylist(), dtype=object) == "success"
    rows = rows.filter(pa.array(succeeded)).sort_by("key")
    if rows.column("key").to_pylist() != columns["key"].tolist():
        raise DeclipError(
            f"signals {settings.signals!r} of shard {shard} are of other samples than the shard "
            "holds now; rerun the stage that measures."
        )
    wanted = settings.split_column or DEFAULT_SPLIT_COLUMN
    if wanted in rows.column_names:
        values = ["" if value is None else str(value) for value in rows.column(wanted).to_pylist()]
        columns["split"] = np.asarray(values, dtype=object)
    elif settings.split_column is None:
        # A table without a split has no hold-out: every sample counts as of the first kept one.
        kept = settings.keep_splits[0] if settings.keep_splits else ""
        columns["split"] = np.full(len(rows), kept, dtype=object)
    else:
        raise DeclipError(
            f"split_column is {wanted!r}, which {path!r} does not have."
            f"{did_you_mean(wanted, rows.column_names)}"
        )
    return columns
