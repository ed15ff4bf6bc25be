"""Filters by name: each a list of rules, after what its source published.

A recipe's docstring says what it takes from which source and where it differs. None of them changes
a caption or a picture: where a source also rewrote captions, that part is left out and said so.
"""

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from declip_filter.expressions import Expression, parse
from declip_filter.limits import require_reason
from declip_filter.user_files import read_user_file
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

DEFAULT = "default"
"""The recipe that :class:`declip_filter.rules.FilterPairs` makes out of its own settings."""
FILE_ENDING = ".toml"
"""A recipe of this ending is a file of the user's."""
OWN_FILE = "(file)"
"""What stands for the name of a user's file."""
JOIN = "+"
"""Between recipes that must all keep a sample: the intersection of what they keep."""


@dataclass(frozen=True)
class Rule:
    """A drop reason, and the condition under which a sample is dropped for it."""

    reason: str
    """As it is written into the selection."""
    expression: str
    """In the language of :mod:`declip_filter.expressions`, on one line."""

    def __post_init__(self) -> None:
        require_reason(self.reason)
        try:
            # One spelling, whoever writes or reads it: a file's rule may run over several lines.
            object.__setattr__(self, "expression", parse(self.expression).text)
        except DeclipError as error:
            raise DeclipError(f"rule {self.reason!r}: {error}") from None

    @property
    def parsed(self) -> Expression:
        """The checked expression."""
        return parse(self.expression)

    @property
    def draws(self) -> bool:
        """Whether it is the draw of balancing, which needs to know what all other rules keep."""
        return any(figure.function == "balanced_out" for figure in self.parsed.figures)

    @property
    def text(self) -> str:
        """``reason: expression``."""
        return f"{self.reason}: {self.expression}"


NOT_ENGLISH = Rule("caption_not_english", "missing(caption_language) or caption_language != 'en'")
EMPTY = Rule("caption_empty", "caption_chars == 0")
FILE_NAME = Rule("caption_is_file_name", "caption_is_file_name")
URL = Rule("caption_is_url", "caption_is_url")
NO_NOUN = Rule("caption_no_noun", "caption_nouns < 1")
NO_CONCEPT = Rule("no_concept", "num_concepts < 1")
DETERMINERS = (
    "a|an|the|this|that|these|those|my|your|his|her|its|our|their|some|any|each|every|no|another"
    "|both|either|neither|several|many|few|all|one|two|three|four|five|six|seven|eight|nine|ten"
)
"""English is closed here: determiners and small numbers."""
PREPOSITIONS = (
    "aboard|about|above|across|after|against|along|amid|among|around|as|at|atop|before|behind"
    "|below|beneath|beside|between|beyond|by|down|during|for|from|in|inside|into|like|near|of|off"
    "|on|onto|out|outside|over|past|per|through|throughout|to|toward|towards|under|underneath"
    "|until|up|upon|via|with|within|without"
)
"""English prepositions of one word."""


def _lacks_word(words: str) -> str:
    return rf"not matches(caption, r'(?i)\b(?:{words})\b')"


def cc3m() -> list[Rule]:
    """Conceptual Captions' rules of size and text (Sharma et al., ACL 2018, section 3).

    Taken from the paper: both sides above 400 pixels, no side more than twice the other; captions
    without a determiner, a noun or a preposition, whose first word is not capitalized, or with
    boilerplate are dropped, and those with much repetition (the paper gives no number: 0.2, as
    CC12M's authors give it).

    Differs: the paper tags words by Google's language service; here determiners and prepositions
    are looked up in closed lists and nouns in a dictionary, and the ratios of nouns and of
    capitalized words are not judged. Boilerplate anywhere drops; the paper crops some and drops at
    the ends. Half of the words must be in the signal's dictionary, there all in Wikipedia's. Left
    out: polarity and adult content (add a rule over a score of your own), the match of image labels
    with the caption, the replacement of names by their kinds, and JPEG only, for here every picture
    is stored as JPEG.

    Nouns are only known with ``--measure.wordnet``: without it their rule drops nothing, and the
    plan warns.
    """
    return [
        EMPTY,
        NOT_ENGLISH,
        Rule("image_too_small", "min(original_width, original_height) <= 400"),
        Rule("image_extreme_aspect", "aspect > 2"),
        Rule("caption_no_determiner", _lacks_word(DETERMINERS)),
        NO_NOUN,
        Rule("caption_no_preposition", _lacks_word(PREPOSITIONS)),
        Rule("caption_repetitive", "caption_repetition > 0.2"),
        Rule("caption_not_capitalized", r"not matches(caption, r'^\P{L}*\p{Lu}')"),
        Rule("caption_unknown_words", "caption_dictionary_words < 0.5"),
        Rule("caption_boilerplate", "caption_boilerplate > 0"),
    ]


def cc12m() -> list[Rule]:
    """Conceptual 12M's relaxed rules (Changpinyo et al., CVPR 2021; the dataset's card).

    Taken: sides above 400 pixels, longer over shorter side at most 2.5, 3 to 256 words, a
    determiner and a noun, repetition at most 0.2, no boilerplate. Prepositions and capitals are not
    asked for.

    Differs as :func:`cc3m` does; the rare-word limit is the same as there, and names of persons are
    not replaced. Nouns need ``--measure.wordnet`` here, too.
    """
    return [
        EMPTY,
        NOT_ENGLISH,
        Rule("image_too_small", "min(original_width, original_height) <= 400"),
        Rule("image_extreme_aspect", "aspect > 2.5"),
        Rule("caption_too_short", "caption_words < 3"),
        Rule("caption_too_long", "caption_words > 256"),
        Rule("caption_no_determiner", _lacks_word(DETERMINERS)),
        NO_NOUN,
        Rule("caption_repetitive", "caption_repetition > 0.2"),
        Rule("caption_unknown_words", "caption_dictionary_words < 0.5"),
        Rule("caption_boilerplate", "caption_boilerplate > 0"),
    ]


def filip() -> list[Rule]:
    """FILIP's rules for its own 300 million pairs (Yao et al., ICLR 2022, arXiv 2111.07783).

    Taken: shorter side of 200 pixels or more, aspect at most 3, English, no file's name as caption,
    no text that occurs more than 10 times in the dataset.

    Differs: every sample of such a text is dropped (whether FILIP kept ten of them is not known to
    us). Left out: the list of sensitive words, which is not published (add a rule such as
    ``sensitive: matches(caption, '(?i)...')``), and the replacement of persons' names. The facts
    are of a secondary digest of the paper.
    """
    return [
        EMPTY,
        Rule("image_too_small", "min(original_width, original_height) < 200"),
        Rule("image_extreme_aspect", "aspect > 3"),
        NOT_ENGLISH,
        FILE_NAME,
        Rule("caption_repeated", "count(caption_sha) > 10"),
    ]


def yfcc15m_v1() -> list[Rule]:
    """In the manner of OpenAI's subset of YFCC100M (Radford et al. 2021, section 2.2).

    Taken: natural language in English; neither a camera's file name such as 20160716_113957.JPG nor
    camera settings such as "f/2.8, 1/250 s, ISO 400" for a caption.

    Differs: OpenAI's language detector and its threshold are not known, so the outcome is another
    list. For V1 itself use its list of 14,829,396 photo ids; V2 is a fixed list whose rules were
    never published. How title and description become one caption is ingest's matter.
    """
    exposure = r"(?i)(?:\bf\s*/\s*\d|\b1/\d{2,5}\s*s|\biso\s*\d{2,6}\b|\b\d{1,4}\s*mm\b)"
    return [
        EMPTY,
        FILE_NAME,
        Rule("caption_is_digits", r"not matches(caption, r'\p{L}')"),
        URL,
        Rule("caption_is_exposure", f"caption_words < 12 and matches(caption, r'{exposure}')"),
        NOT_ENGLISH,
    ]


def datacomp_basic() -> list[Rule]:
    """DataComp's basic filter (Gadre et al. 2023, arXiv 2304.14108, section 4.1).

    Taken: English, captions of more than two words and more than five characters, smaller dimension
    above 200 pixels, aspect ratio below three.

    Differs: the paper detects the language by fastText or cld3, here it is the signal's detector;
    words are counted by Unicode's letters and digits, not by blanks.
    """
    return [*_datacomp_captions(), *_datacomp_sizes()]


def _datacomp_captions() -> list[Rule]:
    return [
        NOT_ENGLISH,
        Rule("caption_too_short", "caption_words <= 2 or caption_chars <= 5"),
    ]


def _datacomp_sizes() -> list[Rule]:
    return [
        Rule("image_too_small", "min(original_width, original_height) <= 200"),
        Rule("image_extreme_aspect", "aspect >= 3"),
    ]


def datacomp_text() -> list[Rule]:
    """DataComp's text-based filter (arXiv 2304.14108, section 4.1).

    Taken: English captions with a word of the synsets of ImageNet-21K's or ImageNet-1K's classes.

    Differs: the class names come from your file (setting ``concepts``), a name of several words
    must occur whole, and names are compared as they are: no lemmas are formed.
    """
    return [NOT_ENGLISH, NO_CONCEPT]


def datacomp_image() -> list[Rule]:
    """DataComp's image-based filter (arXiv 2304.14108, section 4.1).

    Taken: English and caption length as in the basic filter; then images whose group, of many that
    a clustering of the pool's embeddings makes, is the nearest of at least one reference image.

    Differs: groups, encoder and references are your own. The signal
    ``image_cluster_is_referenced`` comes of the stage ClusterImages, out of stored embeddings and a
    file of reference vectors by the same encoder; the paper has 100,000 groups of OpenAI's
    ViT-L/14 and all of ImageNet's training images.
    """
    return [
        *_datacomp_captions(),
        Rule(
            "image_off_reference",
            "missing(image_cluster_is_referenced) or not image_cluster_is_referenced",
        ),
    ]


def datacomp_clip_threshold(threshold: float = 0.28) -> list[Rule]:
    """DataComp's CLIP score filter by threshold (arXiv 2304.14108, section 4.1).

    Taken: the cosine of image and text embedding must exceed the threshold; 0.28 is LAION-2B's, for
    OpenAI's ViT-B/32. Scores of another encoder want another one: ``datacomp_clip_threshold:0.2``.
    """
    return [_NO_SCORE, Rule("clip_score_low", f"clip_score <= {threshold!r}")]


def datacomp_clip_fraction(fraction: float = 0.3) -> list[Rule]:
    """DataComp's CLIP score filter by fraction (arXiv 2304.14108, sections 4.1 and 5).

    Taken: the highest 30 % of the pool, which served best there; ``datacomp_clip_fraction:0.2``
    for another share. The fraction is of all samples with a score, whatever other rules say, and
    samples that tie with the last one are all kept. Joined with :func:`datacomp_image` it is the
    filter of DataComp-1B.
    """
    return [_NO_SCORE, Rule("clip_score_low", f"not top_fraction(clip_score, {fraction!r})")]


_NO_SCORE = Rule("clip_score_missing", "missing(clip_score)")


def laion2b() -> list[Rule]:
    """LAION-2B's filter as DataComp repeats it (arXiv 2304.14108, section 5.2).

    Taken: English, and a CLIP score above 0.28 by ViT-B/32. Differs: the language detector.
    """
    return [NOT_ENGLISH, *datacomp_clip_threshold(0.28)]


def metaclip(cap: int = 20_000) -> list[Rule]:
    """Balancing over a list of concepts (Xu et al. 2023, arXiv 2309.16671, section 3).

    Taken: captions without any concept are dropped; a concept that occurs in c captions keeps each
    with probability min(1, t / c), t = 20,000 for 400 million pairs; a sample that one of its
    concepts keeps is kept.

    Differs: the concepts are your own (setting ``concepts``; the paper's 500,000 come of WordNet
    and Wikipedia), they match as whole words, and the draw is a hash of the key, so it is the same
    in every run. See :mod:`declip_filter.balance`.
    """
    return [NO_CONCEPT, Rule("concept_too_frequent", f"balanced_out({cap!r})")]


RECIPES: Mapping[str, Callable[..., list[Rule]]] = {
    made.__name__: made
    for made in (
        cc3m,
        cc12m,
        filip,
        yfcc15m_v1,
        datacomp_basic,
        datacomp_text,
        datacomp_image,
        datacomp_clip_threshold,
        datacomp_clip_fraction,
        laion2b,
        metaclip,
    )
}
"""By name; those with a figure take another one after a colon."""


def named_rules(recipe: str, default: Callable[[], list[Rule]]) -> list[Rule]:
    """The rules of one recipe or of several joined by ``+``.

    Args:
        recipe: ``default``, a name of :data:`RECIPES` with or without ``:FIGURE``, or a TOML file.
        default: makes the rules of ``default``.

    Returns:
        The rules in order; one that occurs twice, once.

    Raises:
        DeclipError: an unknown name, a wrong figure, or a faulty file.
    """
    found: list[Rule] = []
    for part in recipe.split(JOIN):
        found += default() if part.strip() == DEFAULT else _one_recipe(part.strip(), default)
    return list(dict.fromkeys(found))


def recipe_name(recipe: str) -> str:
    """A recipe as others may know it: where a file is named, only that there is one."""
    parts = [part.strip() for part in recipe.split(JOIN)]
    return JOIN.join(OWN_FILE if part.endswith(FILE_ENDING) else part for part in parts)


def _one_recipe(part: str, default: Callable[[], list[Rule]]) -> list[Rule]:
    if part.endswith(FILE_ENDING):
        return read_recipe(part, default)
    name, _, figure = part.partition(":")
    if name not in RECIPES:
        known = did_you_mean(name, [DEFAULT, *RECIPES])
        raise DeclipError(f"recipe is {name!r}.{known} Or name a file of yours ({FILE_ENDING}).")
    made = RECIPES[name]
    if not figure:
        return made()
    if not made.__defaults__:
        raise DeclipError(
            f"recipe {name!r} takes no figure, but {figure!r} is given; leave it out."
        )
    kind = type(made.__defaults__[0])
    try:
        value = kind(figure)
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        wanted = "whole number" if kind is int else "number"
        raise DeclipError(
            f"recipe {name!r} wants a {wanted}, not {figure!r}; write for example "
            f"{name}:{made.__defaults__[0]}."
        ) from None
    return made(value)


def read_recipe(path: str, default: Callable[[], list[Rule]]) -> list[Rule]:
    """Rules of a TOML file.

    The file may name other recipes whose rules come first, and its own::

        include = ["datacomp_basic"]
        [[rules]]
        reason = "caption_too_short"
        drop = "caption_words < 5"

    Raises:
        DeclipError: it is missing, is no TOML, or has another key; the file and the key are named.
    """
    data = read_user_file("recipe", path)
    try:
        content: dict[str, Any] = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeclipError(f"recipe {path!r} is no TOML: {error}.") from error
    _only_keys(path, content, ("description", "include", "rules"))
    found: list[Rule] = []
    included = content.get("include", [])
    written = content.get("rules", [])
    if not isinstance(included, list) or not isinstance(written, list):
        raise DeclipError(
            f"recipe {path!r}: 'include' is a list of names and each rule begins with [[rules]]."
        )
    for name in included:
        if str(name).endswith(FILE_ENDING):
            raise DeclipError(
                f"recipe {path!r} includes {name!r}; only named recipes may be "
                f"included. Join files with {JOIN!r} instead."
            )
        found += named_rules(str(name), default)
    for entry in written:
        if not isinstance(entry, dict):
            raise DeclipError(f"recipe {path!r}: each rule begins with [[rules]].")
        _only_keys(path, entry, ("reason", "drop"))
        if not all(isinstance(entry.get(key), str) for key in ("reason", "drop")):
            raise DeclipError(
                f"recipe {path!r}: each of [[rules]] needs a text for 'reason' and for 'drop'."
            )
        found.append(Rule(entry["reason"], entry["drop"]))
    if not found:
        raise DeclipError(f"recipe {path!r} has no rules; write [[rules]] with reason and drop.")
    return found


def _only_keys(path: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise DeclipError(f"recipe {path!r} has a key {key!r}.{did_you_mean(key, known)}")
