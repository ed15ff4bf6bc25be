"""Token ids of captions, made once and then mapped.

Turning a caption into token ids takes up to a tenth of a millisecond of Python, in every epoch and
under a lock that all threads of a process share. Captions do not change, so their ids are kept in
the cache folder: one after the other without padding, two bytes each (four where the vocabulary is
larger), mapped by all processes of a machine. Of 15 million captions of 20 tokens that is 720 MB of
disk, of which memory holds what is being read.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from declip_train.column_files import Chunks, cached_columns, digest_of
from declip_train.tokenizer import (
    EOT_ID,
    PAD_ID,
    SOT_ID,
    CaptionTokenizer,
    Tokenizer,
    require_text,
)

__all__ = ["QuickTokenizer", "TokenTable", "caption_tokens", "tokenizer_digest"]

_KIND = "tokens"
_FORMAT = 1
"""Of the files; counts up when their meaning changes."""
_CHUNK = 8192
"""Captions that are tokenized at once."""
_IN_MEMORY = 4096
"""Captions that are tokenized in less time than it takes to see it: they are written nowhere."""
_SHARED = 1_000_000
"""Captions from which on several processes share the work; fewer take less than half a minute."""
_WORDS = 1 << 17
"""Words whose ids are remembered."""
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Token ids of n captions."""

    offsets: NDArray[np.int64]
    """(n + 1,): where a caption's ids begin, and where the last one's end."""
    ids: NDArray[np.integer]
    """The ids of the first caption, start and end tokens included, of the second, ..."""
    pad_id: int
    """Filler behind the end of a row."""
    context_length: int
    """Length of an uncut row, in tokens."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, captions: NDArray[np.int64], *, trim: bool = False) -> NDArray[np.int64]:
        """Token ids of some captions, as the tokenizer gives them.

        Args:
            captions: (n,) their numbers.
            trim: cut the rows to the longest caption; False gives ``context_length`` columns.

        Returns:
            int64 (n, columns).
        """
        first = self.offsets[captions]
        lengths = self.offsets[captions + 1] - first
        columns = int(lengths.max(initial=2)) if trim else self.context_length
        rows = np.full((len(captions), columns), self.pad_id, np.int64)
        inside = np.arange(columns) < lengths[:, None]
        rows[inside] = self.ids[(first[:, None] + np.arange(columns))[inside]]
        return rows


class QuickTokenizer:
    """Token ids as a tokenizer gives them, cut to the longest caption; most captions sooner.

    No token of the standard vocabulary spans white space, and repairing leaves printable ASCII
    without ``&`` (of HTML entities) as it is. So the ids of such a caption are those of its words,
    and a word that was seen before is a look-up: a tenth of the time. All other captions, and those
    of other tokenizers, are tokenized as ever.

    Args:
        tokenizer: of the text tower.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._encode: Callable[[str], tuple[int, ...]] | None = None
        if type(tokenizer) is CaptionTokenizer:
            self._encode = tokenizer.encode
            self._word = lru_cache(_WORDS)(tokenizer.encode)

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """``tokenizer(captions, trim=True)``: int64 (captions, columns).

        Raises:
            DeclipError: a caption is not text.
        """
        if self._encode is None:
            return self.tokenizer(captions, trim=True)
        room = self.tokenizer.context_length - 2
        rows = [(SOT_ID, *self._ids(caption)[:room], EOT_ID) for caption in captions]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        token_ids = np.full((len(rows), int(lengths.max(initial=2))), PAD_ID, np.int64)
        inside = np.arange(token_ids.shape[1]) < lengths[:, None]
        token_ids[inside] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        return token_ids

    def _ids(self, caption: str) -> Sequence[int]:
        assert self._encode is not None
        require_text(caption)
        if not (caption.isascii() and caption.isprintable()) or "&" in caption:
            return self._encode(caption)
        return list(chain.from_iterable(map(self._word, caption.split())))


def tokenizer_digest(tokenizer: Tokenizer) -> str | None:
    """sha256 of what token ids follow from, beside the caption; None where it is not known.

    Versions of the packages that take captions apart are part of it.
    """
    if type(tokenizer) is CaptionTokenizer:
        packages = {name: version(name) for name in ("ftfy", "regex", "tokenizers")}
        # The vocabulary is one and the same, or the tokenizer would have refused it.
        return digest_of("clip", _FORMAT, tokenizer.context_length, packages)
    from declip_train.hf_text import HFCaptionTokenizer

    if type(tokenizer) is HFCaptionTokenizer:
        from declip_train.hf_clip import text_model_files

        files = {
            name: hashlib.sha256(content).hexdigest()
            for name, content in text_model_files(tokenizer.config).items()
        }
        packages = {name: version(name) for name in ("ftfy", "tokenizers", "transformers")}
        return digest_of("transformers", _FORMAT, tokenizer.context_length, files, packages)
    return None


def caption_tokens(
    captions: Callable[[NDArray[np.int64]], Sequence[str]],
    count: int,
    tokenizer: Tokenizer,
    *,
    fingerprint: str,
    cache: Path,
    what: str = "token ids",
    num_processes: int | None = None,
) -> TokenTable | None:
    """Token ids of all captions, out of the cache or made now; one process makes them, others wait.

    Args:
        captions: gives those of some numbers, 0 to ``count - 1``.
        count: how many there are.
        tokenizer: of the text tower.
        fingerprint: names the captions and their order.
        cache: folder of what is worked out once.
        what: what they are, for the lines about progress (standard error).
        num_processes: that tokenize; None: of many captions as many as this process may use cores.

    Returns:
        The table; None where the tokenizer is one whose ids cannot be named (see
        :func:`tokenizer_digest`), so that they must be made batch by batch.

    Raises:
        DeclipError: a caption is not text, or the cache cannot be written.
    """
    digest = tokenizer_digest(tokenizer)
    if digest is None:
        return None
    starts = range(0, count, _CHUNK)
    pad_id = int(tokenizer([""])[0, -1]) if tokenizer.context_length > 2 else 0

    def build() -> tuple[dict[str, Chunks], dict[str, int]]:
        pieces = (captions(np.arange(first, min(first + _CHUNK, count))) for first in starts)
        processes = _processes(count) if num_processes is None else num_processes
        lengths, ids = [np.empty(0, np.int64)], [np.empty(0, _id_type(tokenizer))]
        done, said = 0, time.monotonic()
        for own_lengths, own_ids in _pieces(pieces, tokenizer, pad_id, processes):
            lengths.append(own_lengths)
            ids.append(own_ids)
            done += len(own_lengths)
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{what}: {done:,} of {count:,}", file=sys.stderr, flush=True)
        offsets = np.concatenate([np.zeros(1, np.int64), np.concatenate(lengths).cumsum()])
        return {"offsets": [offsets], "ids": ids}, {"captions": count}

    if count <= _IN_MEMORY:
        made, _ = build()
        offsets, ids = made["offsets"][0], np.concatenate(made["ids"])
    else:
        key = digest_of("token ids", digest, fingerprint)
        columns = cached_columns(cache, _KIND, key, build, what=what)
        offsets, ids = columns["offsets"], columns["ids"]
    return TokenTable(
        offsets=offsets, ids=ids, pad_id=pad_id, context_length=tokenizer.context_length
    )


def _processes(count: int) -> int:
    """Processes that tokenize so many captions."""
    return len(os.sched_getaffinity(0)) if count >= _SHARED else 1


def _pieces(
    pieces: Iterable[Sequence[str]], tokenizer: Tokenizer, pad_id: int, num_processes: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.integer]]]:
    """Lengths and ids of each piece, in order."""
    if num_processes == 1:
        quick = QuickTokenizer(tokenizer)
        for piece in pieces:
            yield _ragged(quick, pad_id, piece)
        return
    # Started anew: a process that has threads, as a trainer has, cannot be copied safely.
    with ProcessPoolExecutor(
        num_processes, get_context("spawn"), initializer=_keep, initargs=(tokenizer, pad_id)
    ) as processes:
        # No more than two pieces a process at a time, or all captions would lie in memory twice.
        waiting = []
        for piece in pieces:
            waiting.append(processes.submit(_of_kept, piece))
            if len(waiting) > 2 * num_processes:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _id_type(tokenizer: Tokenizer) -> type[np.integer]:
    return np.uint16 if tokenizer.mask_rules.vocab_size <= 1 << 16 else np.int32


def _ragged(
    quick: QuickTokenizer, pad_id: int, captions: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    """Tokens of each caption, and all their ids without padding.

    The end is where padding begins: the last token is never the padding's, though one inside a
    caption may have its id.
    """
    rows = quick(captions)
    lengths = rows.shape[1] - (rows[:, ::-1] != pad_id).argmax(axis=1)
    ids = rows[np.arange(rows.shape[1]) < lengths[:, None]]
    return lengths, ids.astype(_id_type(quick.tokenizer))


_kept: Callable[[Sequence[str]], tuple[NDArray[np.int64], NDArray[np.integer]]] | None = None
"""What a process of its own tokenizes with."""


def _keep(tokenizer: Tokenizer, pad_id: int) -> None:
    global _kept
    _kept = partial(_ragged, QuickTokenizer(tokenizer), pad_id)


def _of_kept(captions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
    assert _kept is not None
    return _kept(captions)
