"""A shard's pictures as batches for an encoder: read and decoded ahead of it by threads.

One thread reads the tar in order, several turn pictures into arrays, and whoever iterates gets
whole batches in the tar's order. How many threads there are, and which is faster, changes neither
a batch nor its bytes.
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from declip_filter.encoder_clock import EncoderClock
from declip_filter.encoders import Encoder, Features, PictureEncoder, checked
from declip_shards import DeclipError, Store, read_samples

BATCHES_AHEAD = 2
"""Batches that are prepared while the encoder has one: what a feed holds in memory is three."""
CHUNK_PICTURES = 8
"""Pictures that a thread takes at once: few, so that the first batch is ready soon."""

Pictures = list[bytes] | npt.NDArray[Any]
"""Encoded pictures, or (batch, ...) prepared ones."""


@dataclass(eq=False)
class _Batch:
    """Pictures on their way; the first one that is prepared tells the shape of all."""

    size: int
    keys: list[str] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    futures: list[Future[None]] = field(default_factory=list)
    prepared: npt.NDArray[Any] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, row: int, picture: npt.NDArray[Any]) -> None:
        """Copy a prepared picture into its row.

        Raises:
            ValueError: it has another shape than the first one.
        """
        with self.lock:
            if self.prepared is None:
                self.prepared = np.empty((self.size, *picture.shape), picture.dtype)
        if picture.shape != self.prepared.shape[1:]:
            raise ValueError(
                f"prepared, it has shape {picture.shape}, others have {self.prepared.shape[1:]}"
            )
        self.prepared[row] = picture


class ImageFeed:
    """Iterate over (keys, pictures) of a shard's batches; use it as a context manager.

    Args:
        store: the dataset.
        shard: its number.
        keys: samples whose pictures are wanted.
        batch_size: pictures of a batch; the last one may be smaller.
        prepare: turns an encoded picture into an array, in several threads at once; None hands on
            the encoded pictures.
        num_threads: that prepare pictures.

    Raises (while iterating):
        DeclipError: the tar is damaged or lacks a wanted picture, or one cannot be decoded; names
            the shard and the key.
    """

    def __init__(
        self,
        store: Store,
        shard: str,
        keys: Sequence[str],
        *,
        batch_size: int,
        prepare: Callable[[bytes], npt.NDArray[Any]] | None,
        num_threads: int = 1,
    ) -> None:
        self._store, self._shard, self._wanted = store, shard, set(keys)
        self._batch_size, self._prepare = batch_size, prepare
        self._pool = ThreadPoolExecutor(num_threads, "decode", initializer=_one_torch_thread)
        self._room = threading.Semaphore(BATCHES_AHEAD + 1)
        self._ready: queue.SimpleQueue[_Batch | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read, name="read-shard", daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._room.release()  # the reader may wait for room
        self._reader.join()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[list[str], Pictures]]:
        while (batch := self._ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            for future in batch.futures:
                future.result()
            if self._prepare is None or batch.prepared is None:
                yield batch.keys, batch.images
            else:
                yield batch.keys, batch.prepared[: len(batch.keys)]
            self._room.release()

    def _read(self) -> None:
        """The reader's thread: whatever goes wrong is raised where the batches are taken."""
        try:
            self._read_batches()
            self._ready.put(None)
        except Exception as error:
            self._ready.put(error)

    def _read_batches(self) -> None:
        batch: _Batch | None = None
        for sample in read_samples(self._store, self._shard) if self._wanted else ():
            if sample.key not in self._wanted:
                continue
            self._wanted.remove(sample.key)
            if batch is None:
                self._room.acquire()
                batch = _Batch(self._batch_size)
            if self._stop.is_set():
                return
            batch.keys.append(sample.key)
            batch.images.append(sample.image)
            if len(batch.keys) % CHUNK_PICTURES == 0:
                self._send(batch)
            if len(batch.keys) == self._batch_size:
                self._finish(batch)
                batch = None
        if batch is not None:
            self._finish(batch)
        if self._wanted:
            raise DeclipError(
                f"shard {self._shard}: the tar lacks the picture of sample {min(self._wanted)!r}, "
                "which its parquet lists as a success; rerun ingest to fetch this shard again."
            )

    def _finish(self, batch: _Batch) -> None:
        self._send(batch)
        self._ready.put(batch)

    def _send(self, batch: _Batch) -> None:
        """Have the pictures prepared that were read since the last time."""
        if self._prepare is None:
            return
        start = len(batch.futures) * CHUNK_PICTURES
        if start < len(batch.keys):
            work = self._pool.submit(self._prepare_chunk, batch, start, len(batch.keys))
            batch.futures.append(work)

    def _prepare_chunk(self, batch: _Batch, start: int, stop: int) -> None:
        assert self._prepare is not None
        for row in range(start, stop):
            if self._stop.is_set():
                raise CancelledError
            try:
                batch.put(row, self._prepare(batch.images[row]))
            except Exception as error:  # decoders raise of all kinds
                raise damaged_picture(self._shard, batch.keys[row], error) from error
            batch.images[row] = b""  # its bytes are no longer needed


def _one_torch_thread() -> None:
    """Preprocessing by torch must not start threads of its own beside each of ours."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def damaged_picture(shard: str, key: str, error: Exception) -> DeclipError:
    """The sentence on a picture that an encoder cannot read."""
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return DeclipError(
        f"shard {shard}: the picture of sample {key!r} cannot be read: {reason}. Rerun ingest to "
        "fetch this shard again, or leave the sample out of the selection."
    )


def embed_images(
    encoder: Encoder,
    feed: ImageFeed,
    shard: str,
    keys: Sequence[str],
    clock: EncoderClock,
) -> Features:
    """float32 (len(keys), encoder.dim), as the encoder gave them, of the pictures of ``keys``.

    Args:
        encoder: a :class:`PictureEncoder` gets what ``feed`` has prepared by it.
        feed: of the same keys, entered.
        shard: for the sentence on a damaged picture.
        keys: one a row; the tar may have them in another order.
        clock: told how long the encoder works.
    """
    row_of = {key: row for row, key in enumerate(keys)}
    vectors = np.empty((len(keys), encoder.dim), dtype=np.float32)
    for batch_keys, pictures in feed:
        with clock.encoding():
            if isinstance(pictures, list):
                found = _encode_images(encoder, shard, batch_keys, pictures)
            else:
                assert isinstance(encoder, PictureEncoder)
                found = encoder.encode_prepared(pictures)
        vectors[[row_of[key] for key in batch_keys]] = checked(encoder, found, len(batch_keys))
    return vectors


def _encode_images(
    encoder: Encoder, shard: str, keys: Sequence[str], images: Sequence[bytes]
) -> Features:
    """What the encoder gives; if it fails at one picture alone, the error names that one."""
    try:
        return encoder.encode_image(images)
    except Exception as error:  # encoders are other people's, too
        for key, image in zip(keys, images, strict=True):
            try:
                encoder.encode_image([image])
            except Exception as cause:
                raise damaged_picture(shard, key, cause) from error
        raise


def picture_preparer(encoder: Encoder) -> Callable[[bytes], npt.NDArray[Any]] | None:
    """What a feed does to each picture for this encoder; None: nothing."""
    return encoder.prepare_image if isinstance(encoder, PictureEncoder) else None
