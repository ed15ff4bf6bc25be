"""Texts of a batch: captions, masked captions, second captions and neighbors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip_train.batch_order import BatchShare
from declip_train.column_files import TextColumn, cache_base
from declip_train.epoch_tables import EpochTables
from declip_train.loader_clock import PhaseClock
from declip_train.philox import uniform_numbers
from declip_train.samples import TrainingSamples
from declip_train.settings import TrainSettings
from declip_train.text_views import TextView
from declip_train.token_cache import QuickTokenizer, TokenTable, caption_tokens
from declip_train.tokenizer import Tokenizer, mask_tokens
from declip_train.wordnet import WordNet

__all__ = ["TextMaker"]

_MORE_TOKEN_IDS = ("second_token_ids", "neighbor_token_ids")


def _stream_keys(
    seed: int, epochs: NDArray[np.int64], purpose: str, keys: Sequence[str]
) -> NDArray[np.uint64]:
    """(n, 2) keys of the samples' own random streams: no choice of another sample, process or
    purpose moves them."""
    texts = (
        f"{seed}/{epoch}/{purpose}/{key}".encode("utf-8", "surrogatepass")
        for epoch, key in zip(epochs.tolist(), keys, strict=True)
    )
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


class _Streams(Sequence[np.random.Generator]):
    """Generators of the samples' own random streams, ``Generator(Philox(key=...))`` each.

    It is one generator that begins each stream in turn, which takes an eighth of the time of so
    many: a generator is of use until the next is asked for.
    """

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self._keys = keys
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._zeros = np.zeros(4, np.uint64)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> np.random.Generator: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.random.Generator]: ...
    def __getitem__(self, index: int | slice) -> np.random.Generator | Sequence[Any]:
        if isinstance(index, slice):
            return _Streams(self._keys[index])
        self._bits.state = {
            "bit_generator": "Philox",
            "state": {"counter": self._zeros, "key": self._keys[index]},
            "buffer": self._zeros,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


class TextMaker:
    """Makes the texts of batches.

    Which ones a batch has follows from the method's terms: masked captions and second captions are
    for declip and defilip, which define them; clip, slip and filip read the plain caption.
    (DeCLIP's released code masks FILIP's captions, too, without predicting them; that is a fault
    and not followed.) Token ids of captions come out of the cache (:mod:`token_cache`); second
    captions are other words every time and are tokenized as they are drawn.

    Args:
        samples: whose captions to read.
        settings: method, seed, where neighbors come from.
        tokenizer: of the text tower.
        tables: says which neighbor table an epoch reads; None: always that of ``samples``.
        clock: is told what time was spent on.

    Raises:
        DeclipError: a caption is not text, or the cache cannot be written.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        settings: TrainSettings,
        *,
        tokenizer: Tokenizer,
        tables: EpochTables | None,
        clock: PhaseClock,
    ) -> None:
        self.samples, self.settings, self.tables = samples, settings, tables
        self.tokenizer, self.clock = tokenizer, clock
        self.text_view = TextView(WordNet(settings.wordnet) if settings.wordnet else None)
        self._quick = QuickTokenizer(tokenizer)
        self._reads_neighbors = settings.uses_index and settings.neighbor_feature == "caption"
        self._table = self._open_table()

    def _open_table(self) -> TokenTable | None:
        """Token ids of all captions that may be read: the samples' own, by the sample's number; or,
        where neighbors' are too, all of the pool's, by the caption's number."""
        samples, pool = self.samples, self.samples.pool
        captions: Callable[[NDArray[np.int64]], Sequence[str]] = samples.captions_of
        count, fingerprint = len(samples), f"samples {samples.fingerprint()}"
        if self._reads_neighbors:
            captions = _Numbered(pool.captions, pool.caption_ids)
            count = len(captions)
            fingerprint = f"pool {_digest(pool.captions)}"
        return caption_tokens(
            captions,
            count,
            self.tokenizer,
            fingerprint=fingerprint,
            cache=cache_base(self.settings.cache),
            what="train: token ids of the captions",
        )

    def make(
        self, share: BatchShare, passes: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Texts of some samples. Neighbor tables are read epoch by epoch: batches come in order.

        Args:
            share: the samples, and the pass over the data that each belongs to.
            passes: all passes that the global batch holds samples of, ascending.

        Returns:
            Fields of ``Batch`` by name, and its ``lengths``.
        """
        method, indices, epochs = self.settings.method_parts, share.indices, share.epochs
        keys = share.streams(self.samples.keys_of(indices))
        texts: dict[str, Tensor] = {}
        with self.clock.phase("tokens"):
            if method.has("masked_language_modeling"):
                texts |= self._masked(indices, epochs, keys)
            else:
                texts["token_ids"] = torch.from_numpy(self._own_tokens(indices, trim=True))
            if method.has("multi_view"):
                texts["second_token_ids"] = self._second_captions(indices, epochs, keys)
        if self.settings.uses_index:
            texts |= self._neighbors(indices, epochs, keys, passes)
        # Lengths are of the captions as they are, before words are hidden.
        ids = {"token_ids": texts.get("targets", texts["token_ids"])}
        ids |= {name: texts[name] for name in _MORE_TOKEN_IDS if name in texts}
        lengths = {n: torch.from_numpy(self.tokenizer.lengths(t.numpy())) for n, t in ids.items()}
        return texts, lengths

    def _own_tokens(self, indices: NDArray[np.int64], *, trim: bool) -> NDArray[np.int64]:
        """Token ids of the samples' own captions."""
        if self._table is None:
            return self.tokenizer(self.samples.captions_of(indices), trim=trim)
        rows = self.samples.caption_ids_of(indices) if self._reads_neighbors else indices
        return self._table.rows(rows, trim=trim)

    def _streams(
        self, epochs: NDArray[np.int64], purpose: str, keys: Sequence[str]
    ) -> Sequence[np.random.Generator]:
        return _Streams(_stream_keys(self.settings.seed, epochs, purpose, keys))

    def _masked(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64], keys: Sequence[str]
    ) -> dict[str, Tensor]:
        # At full length, so that a sample's mask does not depend on the longest of its batch.
        masked = mask_tokens(
            self._own_tokens(indices, trim=False),
            self.settings.mask_probability,
            self._streams(epochs, "mask", keys),
            self.tokenizer.mask_rules,
        )
        longest = int(self.tokenizer.lengths(masked.targets).max())
        return {
            name: torch.from_numpy(np.ascontiguousarray(array[:, :longest]))
            for name, array in masked._asdict().items()
        }

    def _second_captions(
        self, indices: NDArray[np.int64], epochs: NDArray[np.int64], keys: Sequence[str]
    ) -> Tensor:
        if not self.settings.eda:
            return torch.from_numpy(self._own_tokens(indices, trim=True))
        streams = self._streams(epochs, "caption", keys)
        captions = self.samples.captions_of(indices)
        views = [self.text_view(*pair) for pair in zip(captions, streams, strict=True)]
        return torch.from_numpy(self._quick(views))

    # Neighbors -----------------------------------------------------------------------------------

    def _neighbors(
        self,
        indices: NDArray[np.int64],
        epochs: NDArray[np.int64],
        keys: Sequence[str],
        passes: Sequence[int],
    ) -> dict[str, Tensor]:
        """One neighbor of each sample: its caption or stored feature, and which caption it is."""
        number = len(indices)
        has = np.zeros(number, np.bool_)
        caption_ids = self.samples.caption_ids_of(indices)
        features: NDArray[np.float32] | None = None
        texts: list[str] | None = None
        if self.settings.neighbor_feature == "stored":
            # Rows without a neighbor neither ask nor answer; they must only be unit vectors.
            features = np.zeros((number, self.settings.model_config.embed_dim), np.float32)
            features[:, 0] = 1
        elif self._table is None:
            texts = self.samples.captions_of(indices)
        with self.clock.phase("neighbors"):
            for epoch in passes:
                rows = np.flatnonzero(epochs == epoch)
                samples = self.samples_of(epoch)
                places = self._places(
                    samples, indices[rows], epoch, [keys[n] for n in rows.tolist()]
                )
                rows, places = rows[places >= 0], places[places >= 0]
                own = indices[rows]
                has[rows] = True
                caption_ids[rows] = samples.neighbor_caption_ids_of(own, places)
                if features is not None:
                    features[rows] = samples.stored_vectors_of(own, places)
                elif texts is not None:
                    near = samples.neighbor_captions_at(own, places)
                    for row, text in zip(rows.tolist(), near, strict=True):
                        texts[row] = text
        found = {
            "has_neighbor": torch.from_numpy(has),
            "neighbor_caption_ids": torch.from_numpy(caption_ids),
        }
        if features is not None:
            return found | {"neighbor_features": torch.from_numpy(features)}
        with self.clock.phase("tokens"):
            if texts is not None:
                ids = self.tokenizer(texts, trim=True)
            else:
                assert self._table is not None
                ids = self._table.rows(caption_ids, trim=True)
        return found | {"neighbor_token_ids": torch.from_numpy(ids)}

    def samples_of(self, epoch: int) -> TrainingSamples:
        """The samples with the neighbors that an epoch reads."""
        return self.samples if self.tables is None else self.tables.samples_of(epoch)

    def _places(
        self,
        samples: TrainingSamples,
        indices: NDArray[np.int64],
        epoch: int,
        keys: Sequence[str],
    ) -> NDArray[np.int64]:
        """(n,): which of its neighbors each sample gets in an epoch, 0 the nearest; -1: none."""
        settings, counts = self.settings, samples.neighbor_counts(indices)
        if settings.neighbor_choice == "rank":
            return np.minimum(settings.neighbor_rank, counts) - 1
        if settings.neighbor_top_k:
            counts = np.minimum(settings.neighbor_top_k, counts)
        epochs = np.full(len(indices), epoch)
        streams = _stream_keys(settings.seed, epochs, "neighbor", keys)
        drawn = (uniform_numbers(streams, 1)[:, 0] * counts).astype(np.int64)
        return np.where(counts > 0, drawn, -1)


class _Numbered:
    """Captions by their number: ``numbered(numbers)`` gives some.

    Args:
        captions: of the pool.
        caption_ids: (pool,) their numbers, from 0 without gaps.
    """

    def __init__(self, captions: TextColumn, caption_ids: NDArray[np.int32]) -> None:
        self._captions, self._ids = captions, caption_ids

    def __len__(self) -> int:
        return int(self._ids.max(initial=-1)) + 1

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """A row of the pool for each number."""
        rows = np.empty(len(self), np.int64)
        # Of equal captions any will do.
        rows[self._ids] = np.arange(len(self._ids))
        return rows

    def __call__(self, numbers: NDArray[np.int64]) -> list[str]:
        return self._captions.take(self._rows[numbers])


def _digest(texts: TextColumn) -> str:
    """sha256 of strings."""
    digest = hashlib.sha256(np.ascontiguousarray(texts.offsets).data)
    digest.update(np.ascontiguousarray(texts.data).data)
    return digest.hexdigest()
