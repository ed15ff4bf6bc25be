"""The second view of a caption: one word replaced, two swapped, or some left out.

EDA (arXiv 1901.11196) as DeCLIP (arXiv 2110.05208) uses it for its multi-view supervision: three of
EDA's four operations, one of them drawn for each caption. Words are what white space separates;
punctuation stays on its word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from declip_shards import DeclipError

__all__ = ["Synonyms", "TextView", "random_deletion", "random_swap", "synonym_replacement"]

Synonyms = Callable[[str], Sequence[str]]
"""Other words for a word, in a fixed order, without the word itself; empty when there are none."""

_SWAP_TRIES = 4

# Words that carry grammar and not content: replacing them would only break the sentence.
_FUNCTION_WORD_LIST = """
a an the this that these those some any no each every either neither all both such own same other
i me my mine myself you your yours yourself he him his himself she her hers herself it its itself
we us our ours ourselves they them their theirs themselves who whom whose which what one
and or but nor so yet if then than because as until while though although whether unless
of at by for with without about against between among into through during before after above
below to from up down in out on off over under upon within along across behind beside near toward
am is are was were be been being have has had having do does did doing done
can could will would shall should may might must ought
not only just too very more most again further once here there when where why how few
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


def synonym_replacement(
    words: Sequence[str], synonyms: Synonyms, generator: np.random.Generator
) -> list[str]:
    """Replace one content word, wherever it occurs, by one of its synonyms.

    Function words are left alone. A caption in which no word has a synonym comes back as it is.
    """
    content = sorted({word for word in words if word.lower() not in _FUNCTION_WORDS})
    for place in generator.permutation(len(content)):
        word = content[place]
        others = synonyms(word)
        if others:
            other = others[int(generator.integers(len(others)))]
            return [other if each == word else each for each in words]
    return list(words)


def random_swap(words: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Swap two words at random places; a single word comes back as it is.

    The second place is drawn up to four times; one caption in many keeps its order, as in EDA.
    """
    swapped = list(words)
    if len(swapped) < 2:
        return swapped
    first = int(generator.integers(len(swapped)))
    for _ in range(_SWAP_TRIES):
        second = int(generator.integers(len(swapped)))
        if second != first:
            swapped[first], swapped[second] = swapped[second], swapped[first]
            break
    return swapped


def random_deletion(
    words: Sequence[str], probability: float, generator: np.random.Generator
) -> list[str]:
    """Leave out each word with `probability`; if none were left, one drawn at random stays.

    A single word comes back as it is.
    """
    if len(words) < 2:
        return list(words)
    kept = [
        word
        for word, draw in zip(words, generator.random(len(words)), strict=True)
        if draw >= probability
    ]
    return kept or [words[int(generator.integers(len(words)))]]


class TextView:
    """Draws second views of captions.

    One of the operations is drawn uniformly for each caption: swap, deletion and, given a source of
    synonyms, replacement. DeCLIP draws from all three.

    Args:
        synonyms: a source of synonyms, such as `WordNet`; None leaves replacement out.
        deletion_probability: of leaving out a word, in the deletion; from 0 to 1. DeCLIP has 0.1.

    Raises:
        DeclipError: the probability is outside 0 to 1.
    """

    def __init__(self, synonyms: Synonyms | None = None, deletion_probability: float = 0.1) -> None:
        if not 0.0 <= deletion_probability <= 1.0:
            raise DeclipError(
                f"The probability of leaving out a word is {deletion_probability}, but it must be "
                "from 0 to 1; DeCLIP has 0.1."
            )
        self.synonyms = synonyms
        self.deletion_probability = deletion_probability

    def __call__(self, caption: str, generator: np.random.Generator) -> str:
        """A view of the caption, with single spaces between words.

        A caption of one word without synonyms, or of none, has one view only: itself. No view of a
        caption with words is empty.

        Args:
            caption: any text.
            generator: source of all choices; equal generators make equal views.
        """
        words = caption.split()
        if not words:
            return caption
        operation = int(generator.integers(2 if self.synonyms is None else 3))
        if operation == 0:
            view = random_swap(words, generator)
        elif operation == 1 or self.synonyms is None:
            view = random_deletion(words, self.deletion_probability, generator)
        else:
            view = synonym_replacement(words, self.synonyms, generator)
        return " ".join(view)
