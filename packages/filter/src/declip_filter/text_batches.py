"""Texts to vectors: distinct texts in batches of like length, tokenized ahead of the model."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from declip_filter.encoder_clock import EncoderClock
from declip_filter.encoders import Encoder, Features, TokenEncoder, Tokens, checked

WINDOW_TEXTS = 4096
"""Distinct texts that are tokenized at once, while the model works on those before them."""


@dataclass(frozen=True, kw_only=True)
class TextVectors:
    """What :func:`embed_texts` gives."""

    vectors: Features
    """float32 (texts, dim), as the encoder gave them."""
    num_cut: int
    """Texts that were longer than the model reads and have lost their end."""


def token_batches(lengths: Sequence[int], most_tokens: int) -> list[slice]:
    """Cut rows into batches that hold at most ``most_tokens`` tokens, padding counted.

    Args:
        lengths: tokens of each row, ascending: the last row of a batch is what others are padded
            to.
        most_tokens: of one batch; a row that is longer alone makes a batch of its own.

    Returns:
        Slices that cover all rows once, in order.
    """
    batches, start = [], 0
    for row, length in enumerate(lengths):
        if row > start and (row - start + 1) * length > most_tokens:
            batches.append(slice(start, row))
            start = row
    if len(lengths):
        batches.append(slice(start, len(lengths)))
    return batches


def embed_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    batch_size: int,
    batch_tokens: int,
    clock: EncoderClock | None = None,
) -> TextVectors:
    """Vectors of ``texts``, in their order.

    Equal texts are encoded once and get equal vectors. The make-up of the batches depends on the
    set of texts alone, neither on their order nor on threads, so the vectors do not either.

    Args:
        encoder: a :class:`TokenEncoder` gets batches by tokens, any other by number.
        texts: any number, in any order.
        batch_size: texts of a batch where the encoder does not tell their tokens.
        batch_tokens: tokens of a batch at most, padding included, where it does.
        clock: told how long the encoder works.
    """
    clock = clock or EncoderClock()
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    row_of = {text: row for row, text in enumerate(distinct)}
    vectors = np.empty((len(distinct), encoder.dim), dtype=np.float32)
    cut = np.zeros(len(distinct), dtype=np.bool_)
    if isinstance(encoder, TokenEncoder) and encoder.reads_tokens:
        for start, tokens in _windows(encoder, distinct):
            cut[start : start + len(tokens.ids)] = tokens.is_cut
            lengths = np.array([len(ids) for ids in tokens.ids])
            order = np.argsort(lengths, kind="stable")
            for batch in token_batches(lengths[order].tolist(), batch_tokens):
                rows = order[batch]
                with clock.encoding():
                    found = encoder.encode_tokens([tokens.ids[row] for row in rows])
                vectors[rows + start] = checked(encoder, found, len(rows))
    else:
        for start in range(0, len(distinct), batch_size):
            batch = slice(start, start + batch_size)
            with clock.encoding():
                found = encoder.encode_text(distinct[batch])
            vectors[batch] = checked(encoder, found, len(distinct[batch]))
    rows_of = np.array([row_of[text] for text in texts], dtype=np.int64)
    return TextVectors(vectors=vectors[rows_of], num_cut=int(cut[rows_of].sum()))


def _windows(encoder: TokenEncoder, distinct: Sequence[str]) -> Iterator[tuple[int, Tokens]]:
    """Tokens of some texts after the other, each with the number of its first text.

    A thread is one window ahead, no more: a shard's tokens need not fit into memory at once.
    """
    starts = range(0, len(distinct), WINDOW_TEXTS)
    with ThreadPoolExecutor(1, "tokenizer") as pool:
        waiting: list[tuple[int, Future[Tokens]]] = []
        for start in starts:
            window = distinct[start : start + WINDOW_TEXTS]
            waiting.append((start, pool.submit(encoder.tokenize, window)))
            if len(waiting) > 1:
                first, future = waiting.pop(0)
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
