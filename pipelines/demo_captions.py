"""The demo's captions and splits: what is held out, and what each picture is called.

Every choice is by a hash of names, never by a generator's state, so adding a package or changing
one setting moves no other picture to another split or caption.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from declip_shards.errors import DeclipError
from pipelines.demo_sources import Picture

TEST_PHOTO_FRACTION = 0.15
"""Share of photos and art that is held out (split ``test_photo``)."""
_MIN_VENDORS = 3
_PATTERNS = (
    "{label} emoji",
    "{label}",
    "an emoji of {label}",
    "{label}, {tags}",
    "{label}: {tags}",
    "{category} emoji: {label}",
    "a drawing of {label}, {tags}",
    "{label} ({tags})",
    "a colorful icon of {label}",
    "{label}, an emoji of {category}",
)
"""Ways to say what an emoji shows; ``tags`` are two to four of its search words."""


def stable_hash(*parts: object) -> int:
    """A 64-bit number that depends on ``parts`` alone: the same on every machine and run."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def to_phrase(text: str) -> str:
    """Lower-case words between single spaces, also at both ends, so that ``in`` finds phrases."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "


def choose_held_out(pictures: Iterable[Picture], num_concepts: int) -> frozenset[str]:
    """Labels of the emoji concepts that training never sees, neither drawn nor named.

    Eligible is a label that three vendors or more draw and that occurs in no other text of the
    demo: holding out ``dog`` would forbid ``hot dog``. The first ``num_concepts`` in hash order
    are taken, so a larger number holds out a superset. Raises DeclipError where there are fewer.
    """
    vendors: dict[str, set[str]] = defaultdict(set)
    others: list[str] = [*_PATTERNS]
    for picture in pictures:
        others.extend((*picture.captions, picture.category))
        if picture.kind == "emoji":
            vendors[picture.label].add(picture.source)
    corpus = "\n".join(map(to_phrase, [*vendors, *others]))
    eligible = sorted(
        (
            label
            for label, drawn_by in vendors.items()
            if len(drawn_by) >= _MIN_VENDORS and corpus.count(to_phrase(label)) == 1
        ),
        key=lambda label: (stable_hash("held out", label), label),
    )
    if not 0 <= num_concepts <= len(eligible):
        raise DeclipError(
            f"num_held_out_concepts is {num_concepts}, but it must be between 0 and "
            f"{len(eligible)}, the number of concepts that can be held out here; lower it."
        )
    return frozenset(eligible[:num_concepts])


def choose_split(picture: Picture, held_out: Collection[str], held_out_vendor: str) -> str:
    """``train``, ``test_concept``, ``test_vendor`` or ``test_photo``."""
    if picture.kind != "emoji":
        share = stable_hash("split", picture.split_key) / 2**64
        return "test_photo" if share < TEST_PHOTO_FRACTION else "train"
    if picture.label in held_out:
        return "test_concept"
    return "test_vendor" if picture.source == held_out_vendor else "train"


class CaptionWriter:
    """Writes captions out of the packages' own words; held-out names appear in no other's."""

    def __init__(self, held_out: Collection[str]) -> None:
        self._held_out = [to_phrase(label) for label in held_out]
        self._tags: dict[tuple[str, tuple[str, ...]], list[str]] = {}

    def write(self, picture: Picture) -> str:
        """The caption of ``picture``: always the same one, and silent about who drew it."""
        key = stable_hash("caption", picture.source, picture.name)
        if picture.kind != "emoji":
            return picture.captions[key % len(picture.captions)]
        tags = self._useful_tags(picture.label, picture.tags)
        patterns = [p for p in _PATTERNS if len(tags) >= 2 or "{tags}" not in p]
        # Captions with search words give the text objectives something to work on: twice as many.
        patterns += [p for p in patterns if "{tags}" in p]
        pattern = patterns[key % len(patterns)]
        chosen = self._choose_tags(tags, key // len(patterns))
        return pattern.format(
            label=picture.label,
            tags=" and ".join(part for part in (", ".join(chosen[:-1]), *chosen[-1:]) if part),
            category=picture.category.lower().replace("&", "and"),
        )

    def _choose_tags(self, tags: Sequence[str], key: int) -> list[str]:
        count = min(len(tags), 2 + key % 3)
        return sorted(tags, key=lambda tag: stable_hash(key, tag))[:count]

    def _useful_tags(self, label: str, tags: tuple[str, ...]) -> list[str]:
        found = self._tags.get((label, tags))
        if found is None:
            words = set(to_phrase(label).split())
            # Short ones are codes (``BO``, ``11``); ones of the label's words say nothing new.
            found = [
                tag
                for tag in tags
                if len(tag) > 2
                and not tag.isdigit()
                and not set(to_phrase(tag).split()) <= words
                and not self._names_held_out(tag, label)
            ]
            self._tags[label, tags] = found
        return found

    def _names_held_out(self, tag: str, label: str) -> bool:
        phrase, own = to_phrase(tag), to_phrase(label)
        return any(name in phrase and name != own for name in self._held_out)
