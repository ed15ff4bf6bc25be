"""Measure every pair once; the rules then read small tables and no image."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from declip_filter.captions import CaptionMeasurer
from declip_filter.dictionary import Dictionary, Nouns
from declip_filter.image_signals import measure_image, one_core
from declip_filter.languages import LanguageDetector
from declip_filter.limits import require_folder_name
from declip_filter.path_digests import full_path, path_digest
from declip_shards import DeclipError, Sample, Store, TaskStats, layout, read_samples, sidecars
from declip_shards.errors import did_you_mean

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("aspect", pa.float32()),
        ("num_bytes", pa.int32()),
        ("bytes_per_pixel", pa.float32()),
        ("jpeg_quality", pa.int32()),
        ("contrast", pa.float32()),
        ("entropy", pa.float32()),
        ("sharpness", pa.float32()),
        ("image_sha256", pa.string()),
        ("image_dhash", pa.string()),
        ("image_phash", pa.string()),
        ("image_layout", pa.string()),
        ("caption_chars", pa.int32()),
        ("caption_words", pa.int32()),
        ("caption_letters", pa.float32()),
        ("caption_digits", pa.float32()),
        ("caption_upper", pa.float32()),
        ("caption_repetition", pa.float32()),
        ("caption_char_repetition", pa.float32()),
        ("caption_is_file_name", pa.bool_()),
        ("caption_is_url", pa.bool_()),
        ("caption_boilerplate", pa.float32()),
        ("caption_personal_data", pa.string()),
        ("caption_language", pa.string()),
        ("caption_language_confidence", pa.float32()),
        ("caption_dictionary_words", pa.float32()),
        ("caption_nouns", pa.int32()),
        ("caption_sha", pa.string()),
    ]
)
"""Columns of ``signals/NAME/NNNNN.parquet``, one row a success, ordered by key."""

KEY = "key"
BATCH_SAMPLES = 64
"""Samples in memory at a time."""
MAKERS = {
    "clip_score": "ScorePairs (scorer clip)",
    "aesthetics": "ScorePairs (scorer aesthetics)",
    "nsfw": "ScorePairs (scorer nsfw)",
    "watermark": "ScorePairs (scorer watermark)",
    "duplicate_": "FindDuplicates",
    "contaminated_": "FindDuplicates with eval_sets",
}
"""Beginning of a column's name -> the stage that writes it, where that is not MeasureImages."""


def measure_picture(sample: Sample) -> dict[str, Any]:
    """``key`` and the signals of :func:`measure_image`.

    Raises:
        DeclipError: the picture cannot be decoded.
    """
    try:
        return {KEY: sample.key, **measure_image(sample.image)}
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DeclipError(
            f"the picture of sample {sample.key!r} cannot be decoded ({error}); rerun ingest to "
            "fetch its shard again."
        ) from error


def original_size(picture: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Size of the picture before it was stored, from its row of the shard's parquet.

    ``aspect`` is the longer over the shorter side of the *original* picture (1 or more): the
    resizer may have cropped the stored one. Where the row says nothing, the stored size counts.
    """
    width = row["original_width"] or picture["width"]
    height = row["original_height"] or picture["height"]
    return {
        "original_width": width,
        "original_height": height,
        "aspect": max(width, height) / min(width, height),
    }


def measure_shard(store: Store, shard: str, measure_text: CaptionMeasurer) -> pa.Table:
    """Signals of a shard's successes as a table of :data:`SCHEMA`, ordered by key.

    Raises:
        DeclipError: tar and parquet disagree about which samples there are, or a picture cannot
            be decoded.
    """
    columns = ["key", "original_width", "original_height"]
    rows = {r["key"]: r for r in read_successes(store, shard, columns)}
    measured: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    samples = read_samples(store, shard)
    while batch := list(itertools.islice(samples, BATCH_SAMPLES)):
        # One kind of work after the other: taking turns sample by sample costs half as much again.
        pictures = [measure_picture(sample) for sample in batch]
        captions = [measure_text(sample.caption) for sample in batch]
        for sample, picture, caption in zip(batch, pictures, captions, strict=True):
            if sample.key not in rows:
                raise DeclipError(
                    f"shard {shard}: the tar has sample {sample.key!r}, which its parquet does not "
                    "list as a success; rerun ingest to fetch this shard again."
                )
            originals = original_size(picture, rows[sample.key])
            for name, value in (picture | originals | caption).items():
                measured[name].append(value)
    if len(measured[KEY]) != len(rows):
        raise DeclipError(
            f"shard {shard}: the parquet lists {len(rows)} successes, the tar holds "
            f"{len(measured[KEY])}; rerun ingest to fetch this shard again."
        )
    return pa.table(measured, schema=SCHEMA).sort_by(KEY)


def read_successes(store: Store, shard: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The shard parquet's rows whose status is ``success``, ordered by key.

    Raises:
        DeclipError: the parquet is missing or damaged, or lacks one of ``columns``.
    """
    wanted = [*columns, "status"] if "status" not in columns else list(columns)
    rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), wanted)
    return sorted((r for r in rows if r["status"] == "success"), key=lambda r: str(r["key"]))


def read_signals(store: Store, name: str, shard: str) -> pa.Table:
    """The table that :class:`MeasureImages` wrote for a shard.

    Raises:
        DeclipError: it is missing, damaged, or lacks a column.
    """
    return sidecars.read_table(store, layout.signals_path(name, shard), SCHEMA.names)


def signal_columns(store: Store, names: Sequence[str], shard: str) -> dict[str, str]:
    """Which of the named signal sets has which column, ``key`` left out.

    Raises:
        DeclipError: no set is named, a set's table is missing or damaged, or two sets have a column
            of the same name.
    """
    if not names:
        raise DeclipError("no signals are named; name at least one set, such as 'basic'.")
    owner: dict[str, str] = {}
    for name in dict.fromkeys(names):
        for column in _column_names(store, name, shard):
            if column == KEY:
                continue
            if column in owner:
                raise DeclipError(
                    f"signals {owner[column]!r} and {name!r} of shard {shard} both have a column "
                    f"{column!r}; name only one of the two sets."
                )
            owner[column] = name
    return owner


def read_signal_columns(
    store: Store, names: Sequence[str], shard: str, columns: Sequence[str]
) -> pa.Table:
    """``key`` and the wanted columns of a shard, joined by key out of several signal sets.

    Args:
        names: the sets, each a folder of ``signals/``; their columns differ.
        columns: the wanted ones, in the order in which they are to come; nothing else is read.

    Returns:
        One row a success, ordered by key.

    Raises:
        DeclipError: see :func:`signal_columns`; or a column that no set has, or sets that are of
            other samples.
    """
    owner = signal_columns(store, names, shard)
    wanted = [column for column in dict.fromkeys(columns) if column != KEY]
    for column in wanted:
        if column not in owner:
            raise DeclipError(
                f"no signal {column!r} in {_quoted(names)} of shard {shard}{_made_by(column)}."
                f"{did_you_mean(column, owner)}"
            )
    found: dict[str, pa.ChunkedArray] = {}
    for name in dict.fromkeys(names):
        mine = [column for column in wanted if owner[column] == name]
        table = sidecars.read_table(store, layout.signals_path(name, shard), [KEY, *mine])
        if KEY in found and not table.column(KEY).equals(found[KEY]):
            raise DeclipError(
                f"signals {names[0]!r} and {name!r} of shard {shard} are of other samples; rerun "
                "the stages that wrote them."
            )
        found |= {column: table.column(column) for column in table.column_names}
    return pa.table({column: found[column] for column in (KEY, *wanted)})


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _made_by(column: str) -> str:
    """Which stage makes a column that is missing, as half a sentence."""
    if column in SCHEMA.names:
        return "; rerun the stage that measures (MeasureImages)"
    for beginning, stage in MAKERS.items():
        if column.startswith(beginning):
            return f"; {stage} makes it: run that and name its signals too"
    return ""


def _column_names(store: Store, name: str, shard: str) -> list[str]:
    """Columns of a set's table, from its footer."""
    path = layout.signals_path(name, shard)
    try:
        with store.open(path) as f:
            names: list[str] = pq.ParquetFile(f).schema_arrow.names
            return names
    except FileNotFoundError as error:
        known = store.list_folders("signals")
        hint = "" if name in known else did_you_mean(name, known)
        raise DeclipError(
            f"signals {name!r} lack shard {shard}: {path!r} is missing; rerun the stage that "
            f"writes it.{hint}"
        ) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and rerun the stage that writes it."
        ) from error


def shard_tasks(root: str) -> list[str]:
    """The complete shards of a dataset: the tasks of every stage that works shard by shard.

    Raises:
        DeclipError: there is none.
    """
    store = Store(root)
    shards = layout.list_shards(store)
    if not shards:
        raise DeclipError(
            f"there is no complete shard under {store.path('shards')!r}; run ingest first, or "
            "correct the dataset's folder."
        )
    return shards


@dataclass(frozen=True, kw_only=True)
class MeasureImages:
    """Read each tar once and write what the rules need to know about every pair."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    name: str = "basic"
    """Name of the signals: they go to signals/NAME/."""
    detect_language: bool = True
    """Tell each caption's language (CLD2, offline)."""
    dictionary: tuple[str, ...] = ("en",)
    """Languages whose words count as known, such as en or de; none: caption_dictionary_words is
    left empty. A list takes 50 to 400 MB of memory, English 60."""
    wordnet: str | None = field(default=None, metadata={"fingerprint": False})
    """Folder of a WordNet database (index.noun) for caption_nouns; unset: left empty."""
    wordnet_sha256: str = field(init=False, default="")
    """Digest of that database's nouns."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        require_folder_name("name", self.name)
        if self.dictionary:
            Dictionary(self.dictionary)
        if self.wordnet is not None:
            object.__setattr__(self, "wordnet", full_path(self.wordnet))
            nouns = os.path.join(str(self.wordnet), "index.noun")
            object.__setattr__(self, "wordnet_sha256", path_digest(nouns))

    def tasks(self) -> Sequence[str]:
        return shard_tasks(self.root)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.signals_path(self.name, task))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)
        measure_text = CaptionMeasurer(
            detector=LanguageDetector() if self.detect_language else None,
            dictionary=Dictionary(self.dictionary) if self.dictionary else None,
            nouns=Nouns(self.wordnet) if self.wordnet is not None else None,
        )
        nouns = measure_text.nouns
        extra = {} if nouns is None else {"wordnet": nouns.digest}

        def run(task: str) -> TaskStats:
            with one_core():
                table = measure_shard(store, task, measure_text)
            path = layout.signals_path(self.name, task)
            sidecars.write_table(store, path, table)
            return TaskStats(
                num_in=table.num_rows, num_out=table.num_rows, files=[path], extra=extra
            )

        return run
