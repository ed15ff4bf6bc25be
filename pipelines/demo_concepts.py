"""The demo's concepts: which emoji each vendor's picture shows, under one name for all vendors.

The names, tags and groups are Unicode's, as emojibase-data carries them. A set that says which
code points an icon draws is joined by them; a set that only names its icons is joined by name,
through the labels, the names the other sets use, and the usual chat shortcodes, in this order.
"""

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHORTCODES = ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels")
_COMPONENT_GROUP = 2  # skin tones and hair, which stand in no picture of their own
# Drawn too small, or too much like a kept concept, to be told apart at the demo's 48 pixels:
# gendered and turned variants (the neutral one is kept), groups of people, and digits in a box.
_VARIANT = re.compile(r"-200d-264[02]|-200d-27a1|-20e3$")
_GROUP_OF_PEOPLE = ("family: ", "kiss: ", "couple with heart: ")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One emoji, whoever draws it."""

    code: str
    """Its code points, lower-case hexadecimal joined by ``-``, without the selector FE0F."""
    label: str
    """Its name, such as ``red apple``."""
    category: str
    """Its group, such as ``Food & Drink``."""
    tags: tuple[str, ...]
    """Further words people search it by, in emojibase's order."""


def normalize_code(hexcode: str) -> str:
    """``1F3F3-FE0F-200D`` -> ``1f3f3-200d``: FE0F only asks for the colored form."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def normalize_name(name: str) -> str:
    """A name without case, spaces and signs; ``flag-for-france`` and ``flag: France`` agree."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    return re.sub(r"^flagfor(flag)?", "flag", plain)


class ConceptTable:
    """All concepts of the demo, and the ways by which a vendor's icon finds its own.

    Built from ``entries`` (emojibase's ``en/data.json``), ``groups`` (group number -> name) and
    ``shortcodes`` (emojibase's shortcode files, in order of trust).
    """

    def __init__(
        self,
        entries: Iterable[Mapping[str, Any]],
        groups: Mapping[int, str],
        shortcodes: Iterable[Mapping[str, str | list[str]]] = (),
    ) -> None:
        self._concepts: dict[str, Concept] = {}
        self._labels: dict[str, set[str]] = defaultdict(set)
        self._other_names: dict[str, set[str]] = defaultdict(set)
        self._shortcodes: dict[str, set[str]] = defaultdict(set)
        known = set()
        for entry in entries:
            code = normalize_code(entry["hexcode"])
            known.add(code)
            # Left-out emoji keep their names here: an icon of a left-out one must be left out
            # too, not be taken for the nearest kept one by a looser name.
            self._labels[normalize_name(entry["label"])].add(code)
            if _is_kept(entry, code):
                self._concepts[code] = Concept(
                    code=code,
                    label=tidy_label(entry["label"]),
                    category=groups[entry["group"]].title(),
                    tags=tuple(_tidy(tag) for tag in entry.get("tags", ())),
                )
        for table in shortcodes:
            for hexcode, names in table.items():
                if (code := normalize_code(hexcode)) in known:
                    for name in [names] if isinstance(names, str) else names:
                        self._shortcodes[normalize_name(name)].add(code)

    def __len__(self) -> int:
        return len(self._concepts)

    def add_names(self, names: Mapping[str, str]) -> None:
        """Learn what another set calls its icons; ``names`` is code points -> icon name."""
        for hexcode, name in names.items():
            if (code := normalize_code(hexcode)) in self._concepts:
                self._other_names[normalize_name(name)].add(code)

    def by_code(self, hexcode: str) -> Concept | None:
        """The concept with these code points; None where it is left out or unknown."""
        return self._concepts.get(normalize_code(hexcode))

    def by_name(self, names: Iterable[str]) -> Concept | None:
        """The concept that the first telling name means; None where none does, or two do."""
        keys = [normalize_name(name) for name in names]
        for table in (self._labels, self._other_names, self._shortcodes):
            for key in keys:
                codes = table.get(key, set())
                if len(codes) == 1:
                    return self._concepts.get(next(iter(codes)))
                if codes:
                    return None
        return None


def _is_kept(entry: Mapping[str, Any], code: str) -> bool:
    group = entry.get("group")  # regional indicators have none
    return (
        group is not None
        and group != _COMPONENT_GROUP
        and not _VARIANT.search(code)
        and not entry["label"].startswith(_GROUP_OF_PEOPLE)
    )


def _tidy(text: str) -> str:
    return text.translate(str.maketrans("’“”", '\'""')).strip()


def tidy_label(label: str) -> str:
    """Unicode's name as people say it: ``flag: Chad`` -> ``flag of Chad``."""
    head, colon, tail = _tidy(label).replace(" & ", " and ").partition(": ")
    if not colon:
        return head
    if head == "flag":
        return f"flag of {tail}"
    return f"bald {head}" if tail == "bald" else f"{head} with {tail}"


def read_concepts(emojibase: Path, named_sets: Iterable[Path] = ()) -> ConceptTable:
    """Concepts from emojibase-data's archive; names also from iconify sets with code points."""
    with tarfile.open(emojibase) as archive:
        messages = _read_json(archive, "package/en/messages.json")
        names = {group["key"]: group["message"] for group in messages["groups"]}
        groups = _read_json(archive, "package/meta/groups.json")["groups"]
        table = ConceptTable(
            _read_json(archive, "package/en/data.json"),
            {int(number): names[key] for number, key in groups.items()},
            [_read_json(archive, f"package/en/shortcodes/{name}.json") for name in _SHORTCODES],
        )
    for path in named_sets:
        with tarfile.open(path) as archive:
            table.add_names(_read_json(archive, "package/chars.json"))
    return table


def _read_json(archive: tarfile.TarFile, member: str) -> Any:
    stream = archive.extractfile(member)
    if stream is None:
        raise ValueError(f"{member} is not a file in the archive")
    return json.loads(stream.read())
