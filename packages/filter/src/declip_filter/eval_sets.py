"""Pictures and captions of evaluation sets, as they lie on disk.

A set is a folder, a webdataset tar or a parquet file; a folder may hold any of the three. Of each
picture the digest of its bytes and the looks are kept, of captions their digests: 50,000 pictures
are some 10 MB.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from declip_filter.captions import caption_sha
from declip_filter.duplicate_rungs import Looks
from declip_filter.image_signals import difference_hash
from declip_filter.near_hashes import parse_hashes
from declip_filter.picture_hashes import luma_layout, perceptual_hash
from declip_filter.sample_columns import DIGEST_DIGITS, Bytes, Rows, parse_hex
from declip_shards import DeclipError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences")
AT_ONCE = 256
"""Pictures held in memory at once."""


class EvalItem(NamedTuple):
    """One entry of an evaluation set."""

    key: str
    """Path within the set; for tars and parquet files with the sample's key or row behind it."""
    image: bytes | None
    captions: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """What is compared with the dataset."""

    name: str
    keys: Sequence[str]
    image_digests: Bytes
    """(pictures, 16)."""
    image_owner: Rows
    """(pictures,) place in ``keys``."""
    looks: Looks
    """Up to three a picture: whole, its central square, and laid upon a white square, as ingest's
    resize modes would have stored it."""
    look_owner: Rows
    caption_digests: Bytes
    caption_owner: Rows
    num_undecodable: int
    digest: str
    """sha256 over all keys, picture and caption digests: which content was compared."""


def parse_eval_set(setting: str) -> tuple[str, Path]:
    """``NAME=PATH`` or ``PATH`` (whose last part is then the name).

    Raises:
        DeclipError: the path does not exist, or the name is empty or has a colon.
    """
    name, equals, path = setting.partition("=")
    place = Path(path if equals else setting)
    name = name if equals else place.name.split(".")[0]
    if not name or ":" in name or "/" in name:
        raise DeclipError(
            f"eval_sets has {setting!r}; the name must not be empty nor have a colon or slash. "
            "Give NAME=PATH."
        )
    if not place.exists():
        raise DeclipError(
            f"eval_sets has {setting!r}, and {str(place)!r} does not exist; correct the path (a "
            "folder of pictures, a webdataset tar or a parquet file on this machine)."
        )
    return name, place


def read_items(place: Path) -> Iterator[EvalItem]:
    """Entries of a set, in the order of the files' names.

    Raises:
        DeclipError: a tar or parquet file cannot be read, or has no known column.
    """
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    for file in files:
        inside = file.relative_to(place).as_posix() if place.is_dir() else ""
        suffix = file.suffix.lower()
        if suffix == ".tar":
            yield from _read_tar(file, inside)
        elif suffix == ".parquet":
            yield from _read_parquet(file, inside)
        elif suffix in IMAGE_SUFFIXES:
            beside = file.with_suffix(".txt")
            texts = [beside.read_text("utf-8", "replace")] if beside.is_file() else []
            yield EvalItem(inside or file.name, file.read_bytes(), texts)


def _read_tar(file: Path, inside: str) -> Iterator[EvalItem]:
    """Samples of a webdataset: members in a row with one name up to the first dot."""
    image: bytes | None = None
    texts: list[str] = []
    current = ""
    try:
        with tarfile.open(file) as tar:
            for info in tar:
                stream = tar.extractfile(info) if info.isreg() else None
                if stream is None:
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = "/".join(part for part in (inside, folder, stem) if part)
                if key != current and (image is not None or texts):
                    yield EvalItem(current, image, texts)
                if key != current:
                    current, image, texts = key, None, []
                kind = "." + extension.lower().rpartition(".")[2]
                if kind in IMAGE_SUFFIXES and image is None:
                    image = stream.read()
                elif kind == ".txt":
                    texts.append(stream.read().decode("utf-8", "replace"))
    except (tarfile.TarError, OSError) as error:
        raise DeclipError(
            f"the evaluation set's {str(file)!r} is not a readable tar ({error}); fetch it again."
        ) from error
    if image is not None or texts:
        yield EvalItem(current, image, texts)


def _read_parquet(file: Path, inside: str) -> Iterator[EvalItem]:
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            pictures = [n for n in PICTURE_COLUMNS if n in schema.names and _is_picture(schema, n)]
            texts = [n for n in CAPTION_COLUMNS if n in schema.names and _is_text(schema, n)]
            if not pictures and not texts:
                raise DeclipError(
                    f"the evaluation set's {str(file)!r} has no column of pictures "
                    f"({', '.join(PICTURE_COLUMNS)}: binary, or a struct with bytes) nor of "
                    f"captions ({', '.join(CAPTION_COLUMNS)}); it has: {', '.join(schema.names)}. "
                    "Rename one."
                )
            row = 0
            for batch in table.iter_batches(AT_ONCE, columns=pictures[:1] + texts):
                for values in batch.to_pylist():
                    image = values[pictures[0]] if pictures else None
                    image = image["bytes"] if isinstance(image, dict) else image
                    found = [text for name in texts for text in _texts_of(values[name])]
                    key = f"{inside}/{row}" if inside else str(row)
                    yield EvalItem(key, image, found)
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DeclipError(
            f"the evaluation set's {str(file)!r} is not readable parquet ({error}); fetch it again."
        ) from error


def _is_picture(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _texts_of(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [text for text in value if text]


def stored_forms(picture: Image.Image) -> list[npt.NDArray[np.uint8]]:
    """A picture in gray as ingest's modes would store it: whole, cropped to its central square,
    and laid upon a white square. A square one has one form."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        glass = upright.convert("RGBA")
        ground = Image.new("RGBA", glass.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(ground, glass)
    gray = upright.convert("RGB").convert("L")
    if gray.width == gray.height:
        return [np.asarray(gray)]
    center, around = (0.5, 0.5), max(gray.size)
    square = ImageOps.fit(gray, (min(gray.size),) * 2, Image.Resampling.BOX, centering=center)
    padded = ImageOps.pad(gray, (around,) * 2, Image.Resampling.BOX, color=255, centering=center)
    return [np.asarray(form) for form in (gray, square, padded)]


def _look(image: bytes, is_dhash: bool) -> list[tuple[str, str, float]]:
    """Hash, layout and aspect of each form of a picture; none where it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(image)) as picture:
            forms = stored_forms(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    shape = difference_hash if is_dhash else perceptual_hash
    return [(shape(f), luma_layout(f), f.shape[1] / f.shape[0]) for f in forms]


def load_eval_set(name: str, place: Path, *, is_dhash: bool, num_threads: int = 1) -> EvalSet:
    """Read and measure a whole set.

    Args:
        name: of the set.
        place: folder, tar or parquet file.
        is_dhash: whether the dataset's hashes are difference hashes.
        num_threads: pictures decoded at once; changes no result.

    Raises:
        DeclipError: it holds nothing to compare, or a file cannot be read.
    """
    keys: list[str] = []
    digests: list[str] = []
    image_owner: list[int] = []
    looks: list[tuple[str, str, float]] = []
    look_owner: list[int] = []
    texts: list[str] = []
    text_owner: list[int] = []
    num_undecodable = 0
    content = hashlib.sha256()
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in _batches(read_items(place)):
            images = [item.image for item in batch]
            found = pool.map(lambda data: _look(data, is_dhash) if data else [], images)
            for item, forms in zip(batch, found, strict=True):
                number = len(keys)
                keys.append(item.key)
                content.update(item.key.encode("utf-8", "surrogatepass") + b"\0")
                if item.image:
                    digests.append(hashlib.sha256(item.image).hexdigest())
                    image_owner.append(number)
                    content.update(digests[-1].encode())
                    num_undecodable += not forms
                looks += forms
                look_owner += [number] * len(forms)
                shas = {caption_sha(text) for text in item.captions if text.strip()}
                texts += sorted(shas)
                text_owner += [number] * len(shas)
                content.update("".join(sorted(shas)).encode())
    if not digests and not texts:
        raise DeclipError(
            f"evaluation set {name!r} at {str(place)!r} has no picture and no caption; name a "
            "folder of pictures, a webdataset tar or a parquet file."
        )
    return EvalSet(
        name=name,
        keys=keys,
        image_digests=parse_hex(digests, DIGEST_DIGITS),
        image_owner=np.asarray(image_owner, dtype=np.int64),
        looks=_pack(looks),
        look_owner=np.asarray(look_owner, dtype=np.int64),
        caption_digests=parse_hex(texts, DIGEST_DIGITS),
        caption_owner=np.asarray(text_owner, dtype=np.int64),
        num_undecodable=num_undecodable,
        digest=content.hexdigest(),
    )


def _pack(looks: Sequence[tuple[str, str, float]]) -> Looks:
    return Looks(
        hashes=parse_hashes([look[0] for look in looks]),
        layouts=parse_hex([look[1] for look in looks], 32),
        aspects=np.asarray([look[2] for look in looks], dtype=np.float32),
    )


def _batches(items: Iterator[EvalItem]) -> Iterator[list[EvalItem]]:
    batch: list[EvalItem] = []
    for item in items:
        batch.append(item)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
