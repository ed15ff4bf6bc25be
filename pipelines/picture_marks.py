"""What pictures of an evaluation are told by when they are looked for in training data.

The digest of the file, two perceptual hashes of the picture in each form in which ingest may have
stored it, and, where the training data has embeddings of its pictures, the vector that the same
encoder gives.
"""

import functools
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from declip_filter.duplicate_rungs import Looks
from declip_filter.embeddings import read_parts
from declip_filter.encoders import Encoder, PictureEncoder, checked, load_encoder
from declip_filter.eval_sets import EvalSet, stored_forms
from declip_filter.image_signals import difference_hash
from declip_filter.near_hashes import parse_hashes
from declip_filter.picture_hashes import luma_layout, perceptual_hash
from declip_filter.sample_columns import DIGEST_DIGITS, parse_hex
from declip_filter.signals import shard_tasks
from declip_shards import DeclipError, Store

MOST_FORMS = 3
"""Whole, its central square, and laid upon a white square; a square picture has one form."""
ENCODED_AT_ONCE = 64
"""Pictures that an encoder is given at once."""
_LAYOUT_DIGITS = 32

Look = tuple[str, str, str, float]
"""Perceptual hash, difference hash, layout (hex digits), width over height."""


@dataclass(frozen=True)
class Marks:
    """Marks of n pictures, in their order; each array has n rows."""

    sha256: npt.NDArray[np.str_]
    """(n,) hex digest of the file; empty where it could not be read."""
    phashes: npt.NDArray[np.uint64]
    """(n, 3) `declip_filter.picture_hashes.perceptual_hash` of each form."""
    dhashes: npt.NDArray[np.uint64]
    """(n, 3) `declip_filter.image_signals.difference_hash` of each form."""
    layouts: npt.NDArray[np.uint8]
    """(n, 3, 16) mean gray levels, 0 to 255."""
    aspects: npt.NDArray[np.float32]
    """(n, 3) width over height; 0 where there is no such form, as of a file that is no picture."""
    vectors: npt.NDArray[np.float32]
    """(n, dim) of the training data's encoder, unit length, zeros where there is none; dim is 0
    without an encoder."""

    def __len__(self) -> int:
        return len(self.sha256)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name, for a file; `from_arrays` inverts it."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Marks":
        """Marks as `arrays` gave them; other names are passed over."""
        return cls(**{item.name: arrays[item.name] for item in fields(cls)})

    @classmethod
    def join(cls, parts: Sequence["Marks"]) -> "Marks":
        """Marks of all parts, one after the other."""
        names = [item.name for item in fields(cls)]
        return cls(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})

    def as_eval_set(self, name: str, *, is_dhash: bool) -> EvalSet:
        """The marks as the search for contamination takes them; its keys are rows.

        Args:
            name: of the set.
            is_dhash: whether the training data's hashes are difference hashes.
        """
        read = np.flatnonzero(self.sha256 != "")
        owner, form = np.nonzero(self.aspects > 0)
        hashes = (self.dhashes if is_dhash else self.phashes)[owner, form]
        looks = Looks(
            hashes=hashes,
            layouts=np.ascontiguousarray(self.layouts[owner, form]),
            aspects=self.aspects[owner, form],
        )
        return EvalSet(
            name=name,
            keys=[str(row) for row in range(len(self))],
            image_digests=parse_hex(self.sha256[read].tolist(), DIGEST_DIGITS),
            image_owner=read,
            looks=looks,
            look_owner=owner,
            caption_digests=np.empty((0, DIGEST_DIGITS // 2), dtype=np.uint8),
            caption_owner=np.empty(0, dtype=np.int64),
            num_undecodable=int((self.aspects[read, 0] == 0).sum()),
            digest="",
        )


def picture_marks(
    images: Sequence[bytes | str], *, encoder: Encoder | None = None, num_threads: int = 1
) -> Marks:
    """Marks of encoded pictures.

    Args:
        images: files, or why one could not be read.
        encoder: of the training data's embeddings (`training_encoder`); None for no vectors.
        num_threads: pictures decoded at once; changes no result.

    Raises:
        DeclipError: the encoder gives vectors of another shape, or not finite ones.
    """
    count = len(images)
    digests = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else "" for i in images]
    with ThreadPoolExecutor(num_threads, "marks") as pool:
        looks = list(pool.map(lambda i: _looks(i) if isinstance(i, bytes) else [], images))
    shape = (count, MOST_FORMS)
    hashes = np.zeros((2, *shape), dtype=np.uint64)
    layouts = np.zeros((*shape, _LAYOUT_DIGITS // 2), dtype=np.uint8)
    aspects = np.zeros(shape, dtype=np.float32)
    for row, forms in enumerate(looks):
        if forms:
            here = slice(len(forms))
            hashes[0, row, here] = parse_hashes([look[0] for look in forms])
            hashes[1, row, here] = parse_hashes([look[1] for look in forms])
            layouts[row, here] = parse_hex([look[2] for look in forms], _LAYOUT_DIGITS)
            aspects[row, here] = [look[3] for look in forms]
    vectors = np.zeros((count, 0 if encoder is None else encoder.dim), dtype=np.float32)
    if encoder is not None:
        seen = [row for row, forms in enumerate(looks) if forms]
        for start in range(0, len(seen), ENCODED_AT_ONCE):
            some = seen[start : start + ENCODED_AT_ONCE]
            rows, found = _encode(encoder, some, images)
            vectors[rows] = found
    return Marks(np.array(digests, dtype="<U64"), hashes[0], hashes[1], layouts, aspects, vectors)


def _looks(image: bytes) -> list[Look]:
    """Each form of a picture; none where it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(image)) as picture:
            forms = stored_forms(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    return [
        (perceptual_hash(f), difference_hash(f), luma_layout(f), f.shape[1] / f.shape[0])
        for f in forms
    ]


def _encode(
    encoder: Encoder, rows: Sequence[int], images: Sequence[bytes | str]
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Vectors of the rows whose pictures the encoder can read."""
    if not isinstance(encoder, PictureEncoder):
        files = [image for row in rows if isinstance(image := images[row], bytes)]
        return list(rows), _finite(
            encoder, checked(encoder, encoder.encode_image(files), len(rows))
        )
    prepared = dict(_prepared(encoder, rows, images))
    if not prepared:
        return [], np.zeros((0, encoder.dim), dtype=np.float32)
    found = encoder.encode_prepared(np.stack(list(prepared.values())))
    return list(prepared), _finite(encoder, checked(encoder, found, len(prepared)))


def _prepared(
    encoder: PictureEncoder, rows: Sequence[int], images: Sequence[bytes | str]
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    for row in rows:
        image = images[row]
        assert isinstance(image, bytes)
        try:
            yield row, encoder.prepare_image(image)
        except Exception:  # noqa: S112 - it says that the picture is damaged
            continue


def _finite(encoder: Encoder, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not np.isfinite(vectors).all():
        raise DeclipError(
            f"encoder {encoder.name!r} gives vectors that are not finite for pictures of the "
            "evaluation; its weights are broken: leave out --train-embeddings."
        )
    return vectors


@functools.lru_cache(maxsize=1)
def training_encoder(train_root: str, embeddings: str, device: str = "cpu") -> Encoder:
    """The encoder that made a dataset's embeddings, to make vectors that compare with them.

    Args:
        train_root: the dataset's folder, any fsspec URL.
        embeddings: their name.
        device: torch's name of the device.

    Raises:
        DeclipError: there are no such embeddings or none of pictures, or their encoder is not to be
            had or has other weights now.
    """
    parts = read_parts(Store(train_root), embeddings, shard_tasks(train_root))
    part = parts[0]
    if "img_emb" not in part.kinds:
        raise DeclipError(
            f"embeddings {embeddings!r} hold {', '.join(part.kinds)} and none of pictures; name "
            "embeddings with img_emb, or leave out --train-embeddings."
        )
    try:
        encoder = load_encoder(part.encoder, root=train_root, device=device)
    except (DeclipError, OSError) as error:
        raise DeclipError(
            f"embeddings {embeddings!r} were made by {part.encoder!r}, which cannot be loaded here "
            f"({error}); bring it, or leave out --train-embeddings."
        ) from error
    if encoder.digest != part.encoder_digest or not encoder.supports_image:
        raise DeclipError(
            f"embeddings {embeddings!r} were made by {part.encoder!r} with other weights than it "
            "has now, so vectors cannot be compared; embed the training data again, or leave out "
            "--train-embeddings."
        )
    return encoder
