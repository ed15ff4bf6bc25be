"""The standard CLIP tokenizer: 49,408 lower-cased byte-level BPE tokens, and the masks of the text
loss.

Token ids are those of OpenAI's and open_clip's tokenizer, string for string, so checkpoints can be
exchanged. The vocabulary file is read out of the installed open_clip_torch distribution, which is
found but never imported: its import needs torchvision, and this file needs neither.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import ftfy
import numpy as np
import regex
from numpy.typing import NDArray
from tokenizers.models import BPE

from declip_shards import DeclipError

__all__ = [
    "CLIP_MASK_RULES",
    "CONTEXT_LENGTH",
    "EOT_ID",
    "PAD_ID",
    "SOT_ID",
    "VOCAB_SIZE",
    "CaptionTokenizer",
    "MaskRules",
    "MaskedTokens",
    "Tokenizer",
    "find_vocabulary",
    "mask_tokens",
]

SOT_ID = 49_406
"""Start of text, the first token of every caption."""
EOT_ID = 49_407
"""End of text, the last token of a caption; being the largest id, the tower finds it by argmax."""
PAD_ID = 0
"""Filler behind the end; also "!" inside a word, so padding is told by position, never by id."""
VOCAB_SIZE = 49_408
CONTEXT_LENGTH = 77

_NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2
_VOCABULARY_NAME = "bpe_simple_vocab_16e6.txt.gz"
# Of the decompressed text: how tightly somebody packed the file is nobody's business.
_VOCABULARY_SHA256 = "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"
_SPECIAL_TOKENS = {"<start_of_text>": SOT_ID, "<end_of_text>": EOT_ID}
_END_OF_WORD = "</w>"
# English clitics, runs of letters, single digits, runs of anything else that is not space.
_WORDS = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_REMEMBERED = 1 << 16


def find_vocabulary() -> Path:
    """Path of the BPE merge list inside the installed open_clip_torch.

    Raises:
        DeclipError: the distribution is not installed, or has no such file.
    """
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / _VOCABULARY_NAME
        if path.is_file():
            return path
    raise DeclipError(
        f"The tokenizer's vocabulary {_VOCABULARY_NAME} was not found: install open_clip_torch, "
        "which ships it, or give its path as `vocabulary`."
    )


def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte, in the order in which the vocabulary numbers them.

    Printable Latin-1 characters stand for themselves; the other bytes take the characters from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + place) for place, byte in enumerate(others)
    }


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Read the merges that make the 49,408 tokens; the file lists more than CLIP uses."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise DeclipError(
            f"The tokenizer's vocabulary {path} does not exist: give the path of "
            f"{_VOCABULARY_NAME}, or none to use the one that open_clip_torch ships."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DeclipError(
            f"The tokenizer's vocabulary {path} cannot be read ({error}): give the path of "
            f"{_VOCABULARY_NAME}."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != _VOCABULARY_SHA256:
        raise DeclipError(
            f"The tokenizer's vocabulary {path} has sha256 {digest[:12]}... instead of "
            f"{_VOCABULARY_SHA256[:12]}..., so its token ids would not be CLIP's: give the "
            f"original {_VOCABULARY_NAME}."
        )
    lines = content.decode("utf-8").split("\n")[1 : 1 + _NUM_MERGES]
    return [cast(tuple[str, str], tuple(line.split())) for line in lines]


@lru_cache(4)
def _load_vocabulary(path: Path) -> tuple[BPE, list[str]]:
    """The merges as an encoder, and the text of each id; built once for all tokenizers."""
    merges = _read_merges(path)
    letters = list(_byte_symbols().values())
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *map("".join, merges)]
    bpe = BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        end_of_word_suffix=_END_OF_WORD,
    )
    return bpe, tokens


def repair_caption(caption: str) -> str:
    """Repair broken Unicode, undo HTML entities twice, and collapse white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())


def require_text(caption: object) -> None:
    """Refuse what is no caption.

    Raises:
        DeclipError: it is not text.
    """
    if not isinstance(caption, str):
        raise DeclipError(
            f"A caption is {caption!r} of type {type(caption).__name__}, but it must be text: drop "
            "the sample, or turn it into a string."
        )


@dataclass(frozen=True, kw_only=True)
class MaskRules:
    """What masking must know of a vocabulary."""

    vocab_size: int
    special_ids: frozenset[int]
    """Ids that are never chosen to be predicted, and never drawn to stand in for another."""
    end_id: int | None
    """What stands behind the first of these in a row is padding; None: padding has an id of its
    own, which is special."""
    hidden_id: int
    """Written where a token is hidden."""

    @cached_property
    def drawable_ids(self) -> NDArray[np.int64]:
        """Ids that may stand in for another, ascending."""
        special = np.fromiter(self.special_ids, np.int64, len(self.special_ids))
        return np.setdiff1d(np.arange(self.vocab_size), special)

    def maskable(self, token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where (batch, length) ids may be chosen.

        Raises:
            ValueError: a row has no end token.
        """
        inside = ~np.isin(token_ids, list(self.special_ids))
        if self.end_id is not None:
            ends_here = token_ids == self.end_id
            if token_ids.ndim != 2 or not ends_here.any(axis=1).all():
                raise ValueError(
                    "A row of token ids has no end token: make them with CaptionTokenizer."
                )
            inside &= np.arange(token_ids.shape[1]) < ends_here.argmax(axis=1)[:, None]
        return inside


CLIP_MASK_RULES = MaskRules(
    vocab_size=VOCAB_SIZE,
    special_ids=frozenset({SOT_ID, EOT_ID}),
    end_id=EOT_ID,
    # The hidden id itself is wiped, so that a caller who forgets the mask embedding cannot leak the
    # answer.
    hidden_id=PAD_ID,
)
"""Of the standard vocabulary, which has no mask token: an embedding of the heads stands in."""


class Tokenizer(Protocol):
    """What the loader asks of a tokenizer."""

    context_length: int
    """Length of an uncut row, in tokens."""
    mask_rules: MaskRules
    """What masking must know of its vocabulary."""

    def __call__(self, captions: str | Sequence[str], trim: bool = False) -> NDArray[np.int64]:
        """int64 ids (number of captions, columns); `trim` cuts them to the longest caption."""

    def lengths(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each row without padding: (batch,)."""

    def decode(self, token_ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text of token ids."""


class CaptionTokenizer:
    """Turns captions into token ids; equal to open_clip's `SimpleTokenizer`, string for string.

    Words and captions that were seen before are remembered (65,536 each), so repeated captions cost
    a look-up. Pickles by its settings, so data-loading processes can be handed one.

    Args:
        context_length: length of a row, in tokens, with start and end; at least 2.
        vocabulary: path of `bpe_simple_vocab_16e6.txt.gz`; None finds the one in open_clip_torch.

    Raises:
        DeclipError: the vocabulary is missing, another one or damaged, or `context_length` is too
            small.

    Source: CLIP (arXiv 2103.00020), section 2.4; byte-level BPE (arXiv 1508.07909).
    """

    mask_rules = CLIP_MASK_RULES

    def __init__(
        self, context_length: int = CONTEXT_LENGTH, vocabulary: Path | str | None = None
    ) -> None:
        if context_length < 2:
            raise DeclipError(
                f"context_length is {context_length}, but a caption needs at least 2 tokens, its "
                f"start and its end: raise it (CLIP has {CONTEXT_LENGTH})."
            )
        self.context_length = context_length
        self._given_vocabulary = vocabulary
        path = Path(vocabulary) if vocabulary is not None else find_vocabulary()
        self._symbols = _byte_symbols()
        self._bpe, self._tokens = _load_vocabulary(path)
        # Bound to the object instead of decorating the methods, or the caches would outlive their
        # tokenizer.
        self._word_ids: Callable[[str], tuple[int, ...]] = lru_cache(_REMEMBERED)(self._encode_word)
        self._caption_ids: Callable[[str], tuple[int, ...]] = lru_cache(_REMEMBERED)(
            self._encode_caption
        )

    def __reduce__(self) -> tuple[type[CaptionTokenizer], tuple[int, Path | str | None]]:
        return type(self), (self.context_length, self._given_vocabulary)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in _SPECIAL_TOKENS:
            return (_SPECIAL_TOKENS[word],)
        spelled = "".join(self._symbols[byte] for byte in word.encode("utf-8"))
        return tuple(token.id for token in self._bpe.tokenize(spelled))

    def _encode_caption(self, caption: str) -> tuple[int, ...]:
        words = _WORDS.findall(repair_caption(caption).lower())
        return tuple(number for word in words for number in self._word_ids(word))

    def encode(self, caption: str) -> tuple[int, ...]:
        """Token ids of a caption, without start and end, however long.

        Raises:
            DeclipError: the caption is not text.
        """
        require_text(caption)
        return self._caption_ids(caption)

    def __call__(self, captions: str | Sequence[str], trim: bool = False) -> NDArray[np.int64]:
        """Tokenize captions.

        A caption that is too long keeps its first `context_length - 2` tokens between start and
        end.

        Args:
            captions: one caption or several.
            trim: cut the rows to the longest caption; False gives `context_length` columns.

        Returns:
            int64 ids (number of captions, columns): start, tokens, end, then 0.

        Raises:
            DeclipError: a caption is not text.
        """
        several = [captions] if isinstance(captions, str) else captions
        room = self.context_length - 2
        rows = [(SOT_ID, *self.encode(caption)[:room], EOT_ID) for caption in several]
        columns = max(map(len, rows), default=2) if trim else self.context_length
        token_ids = np.full((len(rows), columns), PAD_ID, dtype=np.int64)
        for row, numbers in zip(token_ids, rows, strict=True):
            row[: len(numbers)] = numbers
        return token_ids

    def lengths(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each row of (batch, length) ids, start and end included: (batch,)."""
        lengths: NDArray[np.int64] = token_ids.argmax(axis=1) + 1
        return lengths

    def decode(self, token_ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text of token ids, up to the first end token; the start token says nothing.

        Raises:
            DeclipError: an id outside 0 to 49,407.
        """
        pieces: list[str] = []
        for number in map(int, token_ids):
            if not 0 <= number < VOCAB_SIZE:
                raise DeclipError(f"Token id {number} is outside 0 to {VOCAB_SIZE - 1}.")
            if number == EOT_ID:
                break
            if number != SOT_ID:
                pieces.append(self._tokens[number])
        bytes_of = {symbol: byte for byte, symbol in self._symbols.items()}
        words = "".join(pieces).split(_END_OF_WORD)
        return " ".join(
            bytes(bytes_of[symbol] for symbol in word).decode("utf-8", errors="replace")
            for word in words
        ).strip()


class MaskedTokens(NamedTuple):
    """A batch of captions prepared for masked language modeling; every array is (batch, length)."""

    token_ids: NDArray[np.int64]
    """Ids to feed the tower; the rules' hidden id where `replaced` says so."""
    replaced: NDArray[np.bool_]
    """Where the mask embedding, or token, replaces the token's own."""
    mask_positions: NDArray[np.bool_]
    """Where the original token is to be predicted; nowhere, if chance chose none."""
    targets: NDArray[np.int64]
    """The original ids."""


def mask_tokens(
    token_ids: NDArray[np.int64],
    probability: float,
    generator: np.random.Generator | Sequence[np.random.Generator],
    rules: MaskRules = CLIP_MASK_RULES,
) -> MaskedTokens:
    """Choose tokens to predict, and hide most of them.

    Each token between start and end is chosen with `probability`; of those chosen 80 % are replaced
    by the mask embedding, 10 % by a random token, and 10 % stay. Start, end and padding are never
    chosen and never drawn (DeCLIP draws them), so the end token is where it was and the caption's
    feature is still read there. Short batches and low probabilities may choose nothing; that is a
    batch like any other, whose loss has no term.

    Args:
        token_ids: int64 (batch, length), rows of start, tokens, end, padding.
        probability: share of tokens to choose, from 0 to 1; the published models have 0.15.
        generator: source of all choices, equal generators make equal masks; or one for each row,
            which makes a row's mask independent of the batch.
        rules: of the vocabulary; the standard one if not given.

    Raises:
        ValueError: the probability is outside 0 to 1, a row has no end token, or there are more or
            fewer generators than rows.

    Sources: BERT (arXiv 1810.04805), section 3.1; DeCLIP (arXiv 2110.05208), text self-supervision.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(
            f"The mask probability is {probability}, but it must be from 0 to 1: the published "
            "models have 0.15."
        )
    inside = rules.maskable(token_ids)
    rows, length = token_ids.shape
    if isinstance(generator, np.random.Generator):
        draws = generator.random((rows, 3, length))
    elif len(generator) == rows:
        draws = np.array([one.random((3, length)) for one in generator]).reshape(rows, 3, length)
    else:
        raise ValueError(f"There are {len(generator)} generators for {rows} rows: give one each.")
    choice, fate, other = draws[:, 0], draws[:, 1], draws[:, 2]
    chosen = inside & (choice < probability)
    ids = rules.drawable_ids
    replaced = chosen & (fate < 0.8)
    swapped = chosen & (fate >= 0.8) & (fate < 0.9)
    fed = np.where(swapped, ids[(other * len(ids)).astype(np.int64)], token_ids)
    fed = np.where(replaced, rules.hidden_id, fed)
    return MaskedTokens(
        token_ids=fed, replaced=replaced, mask_positions=chosen, targets=token_ids.copy()
    )
