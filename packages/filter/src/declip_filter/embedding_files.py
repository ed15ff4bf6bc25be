"""Files of stored embeddings, in clip-retrieval's layout: what they are called, read and checked.

    embeddings/NAME/text_emb/text_emb_P.npy     float16 (rows, dim), unit length
    embeddings/NAME/img_emb/img_emb_P.npy       the same rows of the pictures
    embeddings/NAME/metadata/metadata_P.parquet image_path (= key), caption, key, shard
    embeddings/NAME/parts/NNNNN.json            which encoder wrote the shard's part: ours
    embeddings/NAME/times/NNNNN.run.json        how long that took: ours, never hashed

``P`` is the shard's number in as many digits as clip-retrieval writes. Its readers pair the
files of the folders by sorted name and skip empty arrays but not empty tables, so a shard
without a selected pair has no file in the three folders (clip-retrieval writes none either);
``parts`` knows of it all the same, and lies where no such reader looks.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_shards import DeclipError, Store, layout, sidecars

Half = npt.NDArray[np.float16]
"""(rows, dim), unit length."""

KINDS = ("text_emb", "img_emb")
UNIT_TOLERANCE = 5e-3
"""How far a vector's length may be from 1: float16 keeps three digits and a bit."""
NOT_FINITE = "embedding_not_finite"
"""Drop reason of samples for which the encoder gave NaN, infinity or zeros."""
FORMAT_VERSION = 2
"""Of the files in ``parts``; a reader refuses a higher one."""

METADATA_SCHEMA = pa.schema(
    [
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one shard's embeddings are."""

    shard: str
    partition: str
    """The number in the file names."""
    num_rows: int
    dim: int
    kinds: tuple[str, ...]
    """``text_emb``, ``img_emb`` or both."""
    encoder: str
    encoder_digest: str
    selection: str
    num_not_finite: int = 0
    """Selected samples that have no row, because the encoder gave no usable vector; 0 in parts of
    format 1, which knew of none."""
    format_version: int = FORMAT_VERSION


def partition_name(shard: str, shards: Sequence[str]) -> str:
    """clip-retrieval's partition number: zero-padded to ``int(log10(count)) + 1`` digits.

    The count is of all shard numbers up to the last one, so that gaps change nothing.
    """
    count = max(int(name) for name in shards) + 1
    return str(int(shard)).zfill(int(math.log10(count)) + 1)


def part_path(name: str, shard: str) -> str:
    return f"embeddings/{name}/parts/{shard}.json"


def times_path(name: str, shard: str) -> str:
    """Speed of a shard's task and the share of it in which the encoder waited; never hashed."""
    return f"embeddings/{name}/times/{shard}.run.json"


def read_part(store: Store, name: str, shard: str) -> Part:
    """What is known of a shard's embeddings.

    Raises:
        DeclipError: the shard has none yet, or they are of a newer format.
    """
    path = part_path(name, shard)
    if not store.exists(path):
        raise DeclipError(
            f"embeddings {name!r} lack shard {shard}: {path!r} is missing; rerun the stage that "
            "embeds."
        )
    try:
        value = json.loads(store.read_bytes(path))
        if value["format_version"] <= FORMAT_VERSION:
            now = {"kinds": tuple(value["kinds"]), "format_version": FORMAT_VERSION}
            return Part(**(value | now))
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and rerun the stage that embeds."
        ) from error
    raise DeclipError(
        f"{path!r} is of format {value['format_version']}, this version reads up to "
        f"{FORMAT_VERSION}; upgrade opendeclip."
    )


def check_vectors(
    vectors: npt.NDArray[Any],
    dim: int,
    keys: Sequence[str],
    source: str,
    remedy: str = "delete it and rerun the stage that embeds",
) -> None:
    """Refuse vectors of another shape, with NaN or infinity, or not of unit length.

    Args:
        vectors: (rows, dim) of any float type.
        keys: sample key of each row, for the message.
        source: who made them, or the file that holds them, for the message.
        remedy: what helps. A file stays done for the runner until it is gone.

    Raises:
        DeclipError: names the first bad row.
    """
    if vectors.shape != (len(keys), dim):
        raise DeclipError(
            f"{source} gave an array of shape {tuple(vectors.shape)} where ({len(keys)}, {dim}) "
            f"is due; it is of another model or shard: {remedy}."
        )
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))
    if bad.size:
        what = "not finite" if not np.isfinite(norms[bad[0]]) else f"of length {norms[bad[0]]:.4g}"
        raise DeclipError(
            f"{source}: the vector of sample {keys[bad[0]]!r} is {what}, where length 1 is due; "
            f"{remedy}."
        )


def read_vectors(store: Store, name: str, kind: str, part: Part) -> tuple[Half, list[str]]:
    """A shard's vectors and keys, row by row the same samples.

    Returns:
        float16 (rows, dim), unit length, and the keys.

    Raises:
        DeclipError: the part has no such kind, a file is missing, cut or of another shape, or a
            vector is not finite.
    """
    if kind not in part.kinds:
        raise DeclipError(
            f"embeddings {name!r} hold {', '.join(part.kinds)}, not {kind!r}; choose one of "
            "those, or embed again with it switched on."
        )
    if part.num_rows == 0:
        return np.empty((0, part.dim), dtype=np.float16), []
    keys = [str(row["key"]) for row in read_metadata(store, name, part)]
    path = layout.embedding_path(name, kind, part.partition)
    try:
        vectors = np.load(io.BytesIO(store.read_bytes(path)), allow_pickle=False)
    except FileNotFoundError as error:
        raise DeclipError(f"{path!r} is missing; rerun the stage that embeds.") from error
    except (ValueError, EOFError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and rerun the stage that embeds."
        ) from error
    check_vectors(vectors, part.dim, keys, repr(path))
    return vectors.astype(np.float16, copy=False), keys


def read_metadata(store: Store, name: str, part: Part) -> list[dict[str, Any]]:
    """``image_path``, ``caption``, ``key`` and ``shard`` of each row of a shard's embeddings.

    Raises:
        DeclipError: the table is missing, damaged or of another length than the vectors.
    """
    if part.num_rows == 0:
        return []
    path = layout.embedding_path(name, "metadata", part.partition)
    rows = sidecars.read_rows(store, path, METADATA_SCHEMA.names)
    if len(rows) != part.num_rows:
        raise DeclipError(
            f"{path!r} has {len(rows)} rows, the vectors have {part.num_rows}; rerun the stage "
            "that embeds."
        )
    return rows


def read_parts(
    store: Store, name: str, shards: Sequence[str], *, selection: str | None = None
) -> list[Part]:
    """The parts of all ``shards``, checked to be by one encoder and of one selection.

    Args:
        store: the dataset.
        name: of the embeddings.
        shards: all that the dataset has.
        selection: which one they must be of; None: any, but the same.

    Raises:
        DeclipError: a part is missing, there is one of a shard that is not in the dataset, two
            are by different encoders or of different selections, or they are of another one than
            ``selection``.
    """
    parts = [read_part(store, name, shard) for shard in shards]
    stray = sorted(
        {n.removesuffix(".json") for n in store.list(f"embeddings/{name}/parts", ".json")}
        - set(shards)
    )
    if stray:
        raise DeclipError(
            f"embeddings {name!r} are of another dataset: they have shard {stray[0]}, which is "
            "not under 'shards'; delete them and rerun the stage that embeds."
        )
    for part in parts:
        first = parts[0]
        if (part.encoder_digest, part.dim) != (first.encoder_digest, first.dim):
            raise DeclipError(
                f"embeddings {name!r} mix encoders: shard {first.shard} is by {first.encoder!r} "
                f"(dim {first.dim}), shard {part.shard} by {part.encoder!r} (dim {part.dim}) with "
                "other weights; delete them and rerun the stage that embeds."
            )
        wanted = first.selection if selection is None else selection
        if part.selection != wanted:
            raise DeclipError(
                f"{part_path(name, part.shard)!r} is of selection {part.selection!r}, where "
                f"{wanted!r} is due; rerun the stage that embeds, or name the selection that the "
                "embeddings are of."
            )
    return parts
