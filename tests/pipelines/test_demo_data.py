"""The demo's data as a whole: table, files, settings, reruns and kills."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq
import pytest
from PIL import Image

from declip_shards.errors import DeclipError
from pipelines.demo_captions import to_phrase
from pipelines.demo_data import (
    SPLITS,
    TABLE_SCHEMA,
    DemoSettings,
    choose_pairs,
    is_prepared,
    plan_rows,
    prepare_demo,
)
from pipelines.demo_fakes import FAKE_SETTINGS, make_fake_packages
from pipelines.demo_packages import default_cache
from pipelines.demo_server import FAILURE_KINDS, DemoServer
from pipelines.demo_sources import VENDORS, read_pictures


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    return folder, *make_fake_packages(folder)


@pytest.fixture(scope="module")
def prepare(origin, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    _, packages, client = origin

    def run(folder, settings=FAKE_SETTINGS, num_processes=1):
        return prepare_demo(
            folder,
            cache,
            settings=settings,
            packages=packages,
            client=client,
            num_processes=num_processes,
        )

    return run


@pytest.fixture(scope="module")
def clean(prepare, tmp_path_factory):
    """A folder that is prepared once; tests copy it and leave it alone."""
    folder = tmp_path_factory.mktemp("clean") / "source"
    return folder, prepare(folder)


@pytest.fixture(scope="module")
def pictures(origin):
    folder, packages, _ = origin
    return read_pictures({name: folder / p.archive for name, p in packages.items()})


@pytest.fixture
def copy(clean, tmp_path):
    return shutil.copytree(clean[0], tmp_path / "copy")


def read_rows(folder):
    table = pq.read_table(folder / "pairs.parquet")
    assert table.schema == TABLE_SCHEMA
    return table.to_pylist()


def digest_tree(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def served_path(row, port):
    url = urlsplit(row["url"])
    return unquote(url.path)[1:] if url.port == port and url.path.startswith("/files/") else None


def test_every_good_row_has_a_file_that_decodes_and_every_file_a_row(clean):
    folder, table = clean
    rows = read_rows(folder)
    paths = [served_path(r, FAKE_SETTINGS.port) for r in rows if not r["expected_status"]]
    on_disk = {p.relative_to(folder).as_posix() for p in (folder / "files").rglob("*.*")}
    assert sorted(paths) == sorted(on_disk)
    for path in paths:
        with Image.open(folder / path) as image:
            image.load()
    assert len(rows) == table.num_rows
    assert {path.rsplit(".", 1)[1] for path in paths} == {"png", "jpg", "webp"}


def test_rows_are_complete(clean):
    rows = read_rows(clean[0])
    assert len({r["url"] for r in rows}) == len(rows)
    assert set(SPLITS) >= {r["split"] for r in rows} >= {"train", "test_vendor", "test_concept"}
    for row in rows:
        is_good = not row["expected_status"] and not row["source"].startswith("junk/")
        assert bool(row["label"] and row["category"]) == is_good
        assert bool(row["license"] and row["kind"]) == (not row["expected_status"])
        assert row["caption"] or row["source"] == "junk/empty_caption"


def test_counts_add_up(clean):
    folder, table = clean
    rows = read_rows(folder)
    assert sum(table.num_rows_by_split.values()) == table.num_rows == len(rows)
    assert table.num_rows_by_source == Counter(r["source"] for r in rows)
    assert table.num_held_out_concepts == 3
    assert sum(bool(r["expected_status"]) for r in rows) == FAKE_SETTINGS.num_failures
    assert sum(r["source"].startswith("junk/") for r in rows) == FAKE_SETTINGS.num_junk
    assert {r["expected_status"] for r in rows} == {"", *FAILURE_KINDS}


def test_training_never_names_what_is_held_out(clean):
    rows = read_rows(clean[0])
    held_out = {r["label"] for r in rows if r["split"] == "test_concept"}
    for row in rows:
        if row["split"] == "train":
            caption = to_phrase(row["caption"])
            assert not any(to_phrase(label) in caption for label in held_out)
        if row["kind"] == "emoji":
            assert (row["label"] in held_out) == (row["split"] == "test_concept")


def test_vendor_split_is_the_one_vendor(clean):
    rows = [r for r in read_rows(clean[0]) if r["kind"] == "emoji"]
    vendors = {r["source"] for r in rows if r["split"] == "test_vendor"}
    assert vendors == {FAKE_SETTINGS.held_out_vendor}
    assert FAKE_SETTINGS.held_out_vendor not in {r["source"] for r in rows if r["split"] == "train"}


def test_sources_are_mixed(clean):
    rows = read_rows(clean[0])
    half = len(rows) // 2
    sources = Counter(r["source"] for r in rows if r["source"] in VENDORS)
    first = Counter(r["source"] for r in rows[:half])
    assert all(0 < first[source] < count for source, count in sources.items())


def test_server_serves_the_table(clean, tmp_path):
    import urllib.request

    folder, _ = clean
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with DemoServer(folder, 0) as server:
        for row in read_rows(folder)[:40]:
            path = served_path(row, FAKE_SETTINGS.port)
            if path is not None:
                with opener.open(f"{server.url}{urlsplit(row['url']).path}", timeout=5) as answer:
                    assert answer.read() == (folder / path).read_bytes()


def test_second_run_touches_nothing(clean, prepare):
    folder, table = clean
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert prepare(folder) == table
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    assert is_prepared(folder, FAKE_SETTINGS)


def test_clean_run_elsewhere_in_two_processes_is_byte_identical(clean, prepare, tmp_path):
    prepare(tmp_path / "other" / "place", num_processes=2)
    assert digest_tree(tmp_path / "other" / "place") == digest_tree(clean[0])


@pytest.mark.parametrize("harm", ["delete", "damage", "truncate", "table", "mark", "stranger"])
def test_rerun_heals(clean, copy, prepare, harm):
    victim = sorted((copy / "files").rglob("*.png"))[5]
    if harm == "delete":
        victim.unlink()
    elif harm == "damage":
        shutil.copy(sorted((copy / "files").rglob("*.png"))[0], victim)
    elif harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:50])
    elif harm == "table":
        (copy / "pairs.parquet").write_bytes(b"PAR1")
    elif harm == "mark":
        (copy / "files.json").write_bytes(b"{")
    else:
        (copy / "files.json").unlink()
        (copy / "files" / "old").mkdir()
        (copy / "files" / "old" / "picture.png").write_bytes(b"x")
        (copy / "files" / "noto" / "1.png.part-9").write_bytes(b"x")
    prepare(copy)
    assert digest_tree(copy) == digest_tree(clean[0])


def test_is_prepared_sees_missing_files_and_other_settings(copy):
    assert is_prepared(copy, FAKE_SETTINGS)
    assert not is_prepared(copy, replace(FAKE_SETTINGS, seed=1))
    next((copy / "files").rglob("*.png")).unlink()
    assert not is_prepared(copy, FAKE_SETTINGS)
    assert not is_prepared(copy / "nowhere", FAKE_SETTINGS)


def test_changed_table_renders_no_icon_again(copy, prepare):
    icons = {p: p.stat().st_ino for p in (copy / "files").rglob("*.png")}
    prepare(copy, replace(FAKE_SETTINGS, seed=3, max_pairs=80))
    left = {p: p.stat().st_ino for p in (copy / "files").rglob("*.png")}
    assert 0 < len(left) < len(icons)
    assert left.items() <= icons.items()


@pytest.mark.parametrize(
    "change",
    [
        {"port": 20000},
        {"max_pairs": 60},
        {"max_pairs": 16},
        {"held_out_vendor": "noto"},
        {"num_held_out_concepts": 1},
        {"num_failures": 3},
        {"num_junk": 0},
        {"image_size": 48},
        {"seed": 7},
    ],
)
def test_every_setting_is_obeyed_and_leads_to_a_clean_runs_bytes(
    clean, copy, prepare, tmp_path, change
):
    settings = replace(FAKE_SETTINGS, **change)
    prepare(copy, settings)
    changed = digest_tree(copy)
    assert changed != digest_tree(clean[0])
    is_same_table = changed["pairs.parquet"] == digest_tree(clean[0])["pairs.parquet"]
    assert is_same_table == ("image_size" in change)
    prepare(tmp_path / "fresh", settings)
    assert digest_tree(tmp_path / "fresh") == changed


def test_seed_changes_the_order_alone(pictures):
    first, tasks = plan_rows(pictures, FAKE_SETTINGS)
    second, others = plan_rows(pictures, replace(FAKE_SETTINGS, seed=1))
    assert first != second
    assert sorted(first, key=lambda r: r["url"]) == sorted(second, key=lambda r: r["url"])
    assert tasks == others


def test_order_of_pictures_does_not_matter(pictures):
    assert plan_rows(pictures, FAKE_SETTINGS) == plan_rows(pictures[::-1], FAKE_SETTINGS)


def test_smaller_max_pairs_takes_a_subset_and_emoji_give_way(pictures):
    num_others = sum(p.kind != "emoji" for p in pictures)
    previous: set[tuple[str, str]] = set()
    for limit in range(1, len(pictures) + 3):
        chosen = choose_pairs(pictures, limit)
        assert len(chosen) == min(limit, len(pictures))
        counts = Counter(p.kind == "emoji" for p in chosen)
        assert counts[False] == min(num_others, limit // 2)
        keys = {(p.source, p.name) for p in chosen}
        assert previous <= keys
        previous = keys


def test_wrong_settings_are_refused_in_one_sentence():
    with pytest.raises(DeclipError, match=r"port is 70000, .* 1 and 65534; .*--prepare\.port"):
        DemoSettings(port=70000)
    with pytest.raises(DeclipError, match=r"--prepare\.image-size"):
        DemoSettings(image_size=4)
    with pytest.raises(DeclipError, match=r"'tweemoji', .* Did you mean 'twemoji'\?"):
        DemoSettings(held_out_vendor="tweemoji")


def test_junk_without_photos_is_refused(pictures):
    emoji = [p for p in pictures if p.kind == "emoji"]
    with pytest.raises(DeclipError, match=r"num_junk is 6, but no photo .*num-junk 0"):
        plan_rows(emoji, FAKE_SETTINGS)
    assert plan_rows(emoji, replace(FAKE_SETTINGS, num_junk=0))


def test_unwritable_folder_is_named(prepare, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DeclipError, match="cannot write to the output folder"):
        prepare(tmp_path / "file")


SCRIPT = """
import sys
from pathlib import Path
from pipelines.demo_data import prepare_demo
from pipelines.demo_fakes import FAKE_SETTINGS, make_fake_packages

if __name__ == "__main__":
    packages, client = make_fake_packages(Path(sys.argv[2]) / "origin")
    prepare_demo(
        Path(sys.argv[1]), Path(sys.argv[2]), settings=FAKE_SETTINGS, packages=packages,
        client=client,
    )
"""


@pytest.mark.parametrize("num_files", [1, 40])
def test_kill_9_then_rerun_equals_a_clean_run(clean, prepare, tmp_path, num_files):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(tmp_path / "cache")],
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while sum(p.is_file() for p in (folder / "files").rglob("*")) < num_files:
        assert time.monotonic() < deadline
        assert process.poll() is None or (folder / "files.json").exists()
        time.sleep(0.002)
    process.kill()
    process.wait()
    wait_until_alone(process.pid)
    prepare(folder)
    assert digest_tree(folder) == digest_tree(clean[0])


def wait_until_alone(session):
    """The killed process's own workers must end by themselves."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("workers outlived the process that was killed")


@pytest.mark.slow
def test_real_packages(tmp_path):
    settings = DemoSettings(max_pairs=1500)
    table = prepare_demo(tmp_path / "source", default_cache(), settings=settings)
    rows = read_rows(tmp_path / "source")
    assert len(rows) == 1500 + settings.num_failures + settings.num_junk
    assert table.num_over_max_pairs > 10_000
    assert set(table.num_rows_by_source) >= {*VENDORS, "grocery", "met", "wallpapers"}
    assert table.num_held_out_concepts > 60
    held_out = {r["label"] for r in rows if r["split"] == "test_concept"}
    captions = "\n".join(to_phrase(r["caption"]) for r in rows if r["split"] == "train")
    assert not [label for label in held_out if to_phrase(label) in captions]
    mark = json.loads((tmp_path / "source" / "files.json").read_text())
    assert len(mark["files"]) == 1500 + settings.num_junk
    for path in mark["files"]:
        with Image.open(tmp_path / "source" / path) as image:
            image.load()
