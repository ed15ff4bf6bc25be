"""Measure every pair once; the rules then read small tables and no image."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from declip_filter.captions import measure_caption
from declip_filter.limits import require_folder_name
from declip_shards import DeclipError, Sample, Store, TaskStats, layout, read_samples, sidecars

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("aspect", pa.float32()),
        ("num_bytes", pa.int32()),
        ("contrast", pa.float32()),
        ("entropy", pa.float32()),
        ("image_dhash", pa.string()),
        ("caption_chars", pa.int32()),
        ("caption_words", pa.int32()),
        ("caption_letters", pa.float32()),
        ("caption_repetition", pa.float32()),
        ("caption_is_file_name", pa.bool_()),
        ("caption_is_url", pa.bool_()),
        ("caption_sha", pa.string()),
    ]
)
"""Columns of ``signals/NAME/NNNNN.parquet``, one row a success, ordered by key."""

DHASH_SIDE = 8
"""A difference hash compares 8 rows of 8 neighboring pairs: 64 bits."""


def difference_hash(luma: Image.Image) -> str:
    """64-bit difference hash (dHash) of a gray picture, as 16 hex digits.

    The picture is shrunk to 9 x 8 pixels; a bit says whether a pixel is darker than the one to
    its right. Near-copies differ in few bits (Hamming distance).
    """
    small = luma.resize((DHASH_SIDE + 1, DHASH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.int16)
    bits = pixels[:, 1:] > pixels[:, :-1]
    return np.packbits(bits).tobytes().hex()


def luma_entropy(luma: npt.NDArray[np.uint8]) -> float:
    """Shannon entropy of the gray levels, in bits: 0 for one flat color, at most 8."""
    counts = np.bincount(luma.ravel(), minlength=256)
    shares = counts[counts > 0] / luma.size
    # Adding zero turns the -0.0 of a flat picture into 0.0.
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def measure_image(data: bytes) -> Mapping[str, int | float | str]:
    """Signals of one encoded picture.

    Returns:
        ``width`` and ``height`` (pixels, as stored), ``num_bytes``, ``contrast`` (standard
        deviation of the luma, ITU-R 601, black 0 and white 1: 0 to 0.5), ``entropy`` (bits),
        ``image_dhash``.

    Raises:
        OSError: the picture cannot be decoded.
    """
    with Image.open(io.BytesIO(data)) as picture:
        luma = picture.convert("L")
    pixels = np.asarray(luma)
    return {
        "width": luma.width,
        "height": luma.height,
        "num_bytes": len(data),
        "contrast": float(pixels.std()) / 255,
        "entropy": luma_entropy(pixels),
        "image_dhash": difference_hash(luma),
    }


def measure_sample(sample: Sample, row: Mapping[str, Any]) -> dict[str, Any]:
    """All signals of one pair; ``row`` is its row of the shard's parquet.

    ``aspect`` is the longer over the shorter side of the *original* picture (1 or more): the
    resizer may have cropped the stored one.

    Raises:
        DeclipError: the picture cannot be decoded.
    """
    try:
        signals: dict[str, Any] = {"key": sample.key, **measure_image(sample.image)}
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DeclipError(
            f"the picture of sample {sample.key!r} cannot be decoded ({error}); rerun ingest to "
            "fetch its shard again."
        ) from error
    width = row["original_width"] or signals["width"]
    height = row["original_height"] or signals["height"]
    signals |= {
        "original_width": width,
        "original_height": height,
        "aspect": max(width, height) / min(width, height),
    }
    return signals | dict(measure_caption(sample.caption))


def measure_shard(store: Store, shard: str) -> pa.Table:
    """Signals of a shard's successes as a table of :data:`SCHEMA`, ordered by key.

    Raises:
        DeclipError: tar and parquet disagree about which samples there are, or a picture cannot
            be decoded.
    """
    columns = ["key", "original_width", "original_height"]
    rows = {r["key"]: r for r in read_successes(store, shard, columns)}
    measured = []
    for sample in read_samples(store, shard):
        if sample.key not in rows:
            raise DeclipError(
                f"shard {shard}: the tar has sample {sample.key!r}, which its parquet does not "
                "list as a success; rerun ingest to fetch this shard again."
            )
        measured.append(measure_sample(sample, rows[sample.key]))
    if len(measured) != len(rows):
        raise DeclipError(
            f"shard {shard}: the parquet lists {len(rows)} successes, the tar holds "
            f"{len(measured)}; rerun ingest to fetch this shard again."
        )
    return pa.Table.from_pylist(measured, schema=SCHEMA).sort_by("key")


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

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        require_folder_name("name", self.name)

    def tasks(self) -> Sequence[str]:
        return shard_tasks(self.root)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.signals_path(self.name, task))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)

        def run(task: str) -> TaskStats:
            table = measure_shard(store, task)
            path = layout.signals_path(self.name, task)
            sidecars.write_table(store, path, table)
            return TaskStats(num_in=table.num_rows, num_out=table.num_rows, files=[path])

        return run
