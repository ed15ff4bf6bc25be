"""Image files: whole or not there, the same bytes every time."""

import hashlib
import io
import logging
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pipelines.demo_render as demo_render
from declip_shards.errors import DeclipError
from pipelines.demo_render import (
    FileRecord,
    RenderTask,
    format_journal,
    read_journal,
    render_svg,
    track_progress,
    write_images,
)

RED_DISC = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}">'
    '<circle cx="{x}" cy="{y}" r="8" fill="#f00"/></svg>'
)


def disc(width=64, height=64):
    return RED_DISC.format(w=width, h=height, x=width / 2, y=height / 2)


def task(path, svg=None):
    return RenderTask(path=path, data=(svg or disc()).encode(), is_svg=True)


def write(folder, tasks, *, size=16, num_processes=1):
    return write_images(
        folder, tasks, size=size, num_processes=num_processes, journal=folder / "journal"
    )


def open_image(data):
    return Image.open(io.BytesIO(data))


@given(width=st.integers(48, 96), height=st.integers(48, 96), size=st.sampled_from([16, 48, 128]))
@settings(max_examples=30, deadline=None)
def test_icon_is_centered_on_a_white_square(width, height, size):
    image = open_image(render_svg(disc(width, height), size, "png"))
    assert (image.size, image.mode) == ((size, size), "RGB")
    red, green, _ = image.getpixel((size // 2, size // 2))
    assert red > 200
    assert green < 150  # the disc is a few pixels wide in the smallest
    assert image.getpixel((0, 0)) == image.getpixel((size - 1, size - 1)) == (255, 255, 255)


@pytest.mark.parametrize(("extension", "form"), [("png", "PNG"), ("jpg", "JPEG")])
def test_extension_chooses_the_format(extension, form):
    data = render_svg(disc(), 32, extension)
    assert open_image(data).format == form
    assert data == render_svg(disc(), 32, extension)


def test_written_files_are_what_the_record_says(tmp_path):
    tasks = [task(f"files/a/{n}.{'jpg' if n % 2 else 'png'}") for n in range(100)]
    tasks.append(RenderTask(path="files/b/raw.webp", data=b"as it is", is_svg=False))
    records = write(tmp_path, tasks, num_processes=2)
    assert list(records) == sorted(t.path for t in tasks)
    on_disk = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert on_disk == {*records, "journal"}
    assert read_journal(tmp_path / "journal") == records
    for path, record in records.items():
        data = (tmp_path / path).read_bytes()
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        assert record.size == len(data)


def test_whole_files_are_kept_and_others_are_written_again(tmp_path):
    tasks = [task(f"{n}.png") for n in range(5)]
    records = write(tmp_path, tasks, size=32)
    whole, half, empty, holed, missing = paths = [tmp_path / f"{n}.png" for n in range(5)]
    data = whole.read_bytes()
    inode = whole.stat().st_ino
    half.write_bytes(data[:-5])  # Pillow decodes even this one
    empty.write_bytes(b"")
    holed.write_bytes(data[:60] + bytes(20) + data[80:])
    missing.unlink()
    assert write(tmp_path, tasks, size=32) == records
    assert whole.stat().st_ino == inode
    assert {path.read_bytes() for path in paths} == {data}


def test_without_a_journal_nothing_is_trusted(tmp_path):
    tasks = [task("0.png")]
    records = write(tmp_path, tasks)
    (tmp_path / "journal").unlink()
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    assert write(tmp_path, tasks) == records


def test_raw_picture_that_changed_under_its_name_is_written_again(tmp_path):
    for data in (b"first", b"other"):
        write(tmp_path, [RenderTask(path="0.jpg", data=data, is_svg=False)])
        assert (tmp_path / "0.jpg").read_bytes() == data


def test_journal_reader_inverts_the_writer_and_survives_torn_lines(tmp_path):
    path = tmp_path / "journal"
    assert read_journal(path) == {}
    first = {"a": FileRecord(sha256="aa", size=1)}
    second = {"b c": FileRecord(sha256="bb", size=2), "d": FileRecord(sha256="dd", size=3)}
    lines = [format_journal(first), format_journal(second)[:-4], format_journal(second)]
    for number in range(4):
        path.write_bytes(b"".join(lines[:number]))
        assert read_journal(path) == [{}, first, first, first | second][number]


def test_picture_that_cannot_be_drawn_is_named(tmp_path):
    tasks = [task("good.png"), task("bad.png", "<svg")]
    with pytest.raises(DeclipError, match=r"picture 'bad\.png' cannot be drawn"):
        write(tmp_path, tasks)
    assert not (tmp_path / "bad.png").exists()


def test_killed_process_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    # A real child process that ends without a word at its first chunk.
    monkeypatch.setattr(demo_render, "_write_chunk", die)
    with pytest.raises(DeclipError, match="died, most likely killed for lack of memory"):
        write(tmp_path, [task("a.png")], num_processes=2)


def die(folder: Path, work: object, size: int) -> dict[str, object]:
    os._exit(9)


def test_nothing_to_write_is_no_error(tmp_path):
    assert write(tmp_path, []) == {}


def test_progress_passes_everything_on_and_logs_without_a_terminal(monkeypatch, caplog):
    monkeypatch.setattr(demo_render, "_LOG_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(time, "monotonic", iter(range(100)).__next__)
    record = FileRecord(sha256="", size=0)
    batches = [{"a": record}, {"b": record, "c": record}]
    with caplog.at_level(logging.INFO):
        assert list(track_progress(iter(batches), 3, "render")) == batches
    assert caplog.messages == [
        "render: 1 of 3 images, 1/s, 2 s left",
        "render: 3 of 3 images, 2/s, 0 s left",
    ]
