"""What a neighbor table is made of: vectors, the keys of their rows, captions, picture hashes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from declip_filter.captions import caption_sha
from declip_filter.embeddings import Part, read_metadata, read_parts
from declip_filter.index_files import Ids, Texts, iter_rows, read_info, rows_path
from declip_filter.neighbor_search import TableRows
from declip_filter.signals import shard_tasks
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError, Store, layout, sidecars

if TYPE_CHECKING:
    from declip_filter.neighbors import BuildNeighbors

HASH_COLUMN = "image_dhash"
_KEY_TYPE = np.dtypes.StringDType()


def read_table_rows(
    settings: "BuildNeighbors", store: Store
) -> tuple[TableRows, Mapping[str, Any]]:
    """The rows that get neighbors, and info.json of their index (empty without one).

    Raises:
        DeclipError: embeddings or index are missing, of each other's samples no more, empty, or
            without what the settings ask for.
    """
    info: Mapping[str, Any] = read_info(store, settings.index) if settings.index else {}
    name = settings.embeddings or str(info["embeddings"])
    if settings.index and name != info["embeddings"]:
        raise DeclipError(
            f"index {settings.index!r} is of embeddings {info['embeddings']!r}, and embeddings is "
            f"{name!r}; leave one of the two empty."
        )
    side = settings.kind or str(info["kind"])
    parts = read_parts(store, name, shard_tasks(settings.root))
    vectors = StoredVectors(store, name, side, parts)
    if not vectors.num_rows:
        selection = parts[0].selection if parts else ""
        raise DeclipError(
            f"embeddings {name!r} hold 0 samples (selection {selection!r}): there are no neighbors "
            "to find; loosen the filter and embed again."
        )
    if settings.index:
        _check_index(settings, info, vectors)
        keys, captions = _names_of_index(store, settings.index)
    else:
        keys, captions = _names_of_embeddings(store, vectors)
    if len(keys) != vectors.num_rows:
        raise DeclipError(
            f"index {settings.index!r} names {len(keys)} rows, the embeddings {name!r} hold "
            f"{vectors.num_rows}: they are of other samples; rerun the stage that indexes."
        )
    hashes, images = None, None
    if settings.max_image_hash_distance is not None:
        hashes = _image_hashes(store, settings.signals, parts, keys)
    if settings.max_image_cosine is not None:
        images = StoredVectors(store, name, "img_emb", parts)
    rows = TableRows(
        vectors=vectors, keys=keys, captions=captions, image_hashes=hashes, images=images
    )
    return rows, info


def _check_index(
    settings: "BuildNeighbors", info: Mapping[str, Any], vectors: StoredVectors
) -> None:
    """Refuse an index of another encoder."""
    part = vectors.parts[0]
    sides = 2 if info["kind"] == "both" else 1
    if (part.encoder_digest, part.dim * sides) != (
        info["encoder_digest"],
        info["vectors dimension"],
    ):
        raise DeclipError(
            f"index {settings.index!r} is of encoder {info['encoder']!r} (dim "
            f"{info['vectors dimension']}), the embeddings {vectors.name!r} of shard {part.shard} "
            f"are by {part.encoder!r} (dim {part.dim}); rerun the stage that indexes."
        )


def own_keys(settings: "BuildNeighbors", store: Store, table: TableRows, number: int) -> list[str]:
    """Keys of the ``number``-th part, whose vectors are checked on the way.

    Raises:
        DeclipError: a vector is not of unit length, or the rows are of other samples than these.
    """
    table.vectors.check_part(number)
    part = table.vectors.parts[number]
    keys = [str(row["key"]) for row in read_metadata(store, table.vectors.name, part)]
    if table.keys[table.of_shard(number)].tolist() != keys:
        raise DeclipError(
            f"index {settings.index!r} holds other samples of shard {part.shard} than the "
            f"embeddings {table.vectors.name!r} do now; rerun the stage that indexes."
        )
    return keys


def _names_of_index(store: Store, name: str) -> tuple[Texts, Ids]:
    """Key and number of the caption of every row of an index."""
    seen: dict[str, int] = {}
    keys: list[Texts] = [np.empty(0, dtype=_KEY_TYPE)]
    numbers: list[Ids] = [np.empty(0, np.int64)]
    for batch in iter_rows(store, rows_path(name), ["key", "caption_sha"]):
        keys.append(np.asarray(batch.column("key").to_pylist(), dtype=_KEY_TYPE))
        shas = batch.column("caption_sha").to_pylist()
        numbers.append(np.asarray([seen.setdefault(s, len(seen)) for s in shas], np.int64))
    return np.concatenate(keys), np.concatenate(numbers)


def _names_of_embeddings(store: Store, vectors: StoredVectors) -> tuple[Texts, Ids]:
    """Key and number of the caption of every stored vector."""
    seen: dict[str, int] = {}
    keys: list[Texts] = [np.empty(0, dtype=_KEY_TYPE)]
    numbers: list[Ids] = [np.empty(0, np.int64)]
    for part in vectors.parts:
        rows = read_metadata(store, vectors.name, part)
        keys.append(np.asarray([str(row["key"]) for row in rows], dtype=_KEY_TYPE))
        shas = [caption_sha(str(row["caption"])) for row in rows]
        numbers.append(np.asarray([seen.setdefault(s, len(seen)) for s in shas], np.int64))
    return np.concatenate(keys), np.concatenate(numbers)


def _image_hashes(
    store: Store, name: str, parts: "list[Part]", keys: Texts
) -> npt.NDArray[np.uint64]:
    """The difference hash of every row's picture.

    Raises:
        DeclipError: the signals lack a shard, the column, or a sample.
    """
    hashes = np.zeros(len(keys), dtype=np.uint64)
    start = 0
    for part in parts:
        if not part.num_rows:
            continue
        path = layout.signals_path(name, part.shard)
        table = sidecars.read_table(store, path, ["key", HASH_COLUMN])
        columns = (table.column(column).to_pylist() for column in ("key", HASH_COLUMN))
        found = dict(zip(*columns, strict=True))
        for row in range(start, start + part.num_rows):
            value = found.get(str(keys[row]))
            if value is None:
                raise DeclipError(
                    f"{path!r} has no {HASH_COLUMN} of sample {str(keys[row])!r}; rerun the stage "
                    "that measures, or unset max_image_hash_distance."
                )
            hashes[row] = int(value, 16)
        start += part.num_rows
    return hashes
