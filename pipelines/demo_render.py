"""Writes the demo's pictures as image files, in a few processes."""

import hashlib
import io
import logging
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

from declip_shards.errors import DeclipError
from declip_shards.store import TEMPORARY_MARK

_LOG = logging.getLogger(__name__)
_CHUNK = 64
_LOG_EVERY_SECONDS = 10.0
_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class RenderTask:
    """One image file to be written."""

    path: str
    """Relative to the folder; its extension chooses the format of a rendered SVG."""
    data: bytes
    """SVG markup, or an encoded image that is written as it is."""
    is_svg: bool
    """Which of the two."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it lies on disk."""

    sha256: str
    """Hex digest of its bytes."""
    size: int
    """Its size in bytes."""


def render_svg(svg: str, size: int, extension: str) -> bytes:
    """Draw an SVG on white, ``size`` pixels square, centered; return PNG or JPEG bytes.

    Raises ValueError where the markup cannot be drawn.
    """
    # Without system fonts, so that no icon looks different from one machine to the next.
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)
    icon = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    icon.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(icon, ((size - icon.width) // 2, (size - icon.height) // 2), icon)
    out = io.BytesIO()
    if extension == "jpg":
        canvas.save(out, "JPEG", quality=_JPEG_QUALITY)
    else:
        canvas.save(out, "PNG")
    return out.getvalue()


def write_images(
    folder: Path, tasks: Sequence[RenderTask], *, size: int, num_processes: int
) -> dict[str, FileRecord]:
    """Write every task's file under ``folder``; return path -> record, sorted by path.

    A file that is there and decodes to its end is kept. Each appears under its name whole or not
    at all. ``size`` is the side of rendered images in pixels. Raises DeclipError naming the first
    picture that cannot be drawn.
    """
    for parent in sorted({(folder / task.path).parent for task in tasks}):
        parent.mkdir(parents=True, exist_ok=True)
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    records: dict[str, FileRecord] = {}
    # Spawned, not forked: the caller may run threads (Ray, a server), and a fork copies their
    # locks. An executor, not a Pool: it notices a killed child, where a Pool waits for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(_write_chunk, folder, chunk, size) for chunk in chunks]
        try:
            done = (future.result() for future in as_completed(futures))
            for written in track_progress(done, len(tasks), "render"):
                records.update(written)
        except BrokenProcessPool as error:
            raise DeclipError(
                "a process that renders the demo's pictures died, most likely killed for lack of "
                "memory; free some and run again (finished pictures are kept)."
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    # One flush for all, because ten thousand would take longer than the rendering: the caller
    # marks the work as done only after this.
    os.sync()
    return dict(sorted(records.items()))


def track_progress(
    batches: Iterable[dict[str, FileRecord]], total: int, what: str
) -> Iterator[dict[str, FileRecord]]:
    """Pass ``batches`` on, with a bar on a terminal and a log line every 10 s elsewhere."""
    start = last = time.monotonic()
    done = 0
    with tqdm(
        total=total, desc=what, unit=" images", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        for batch in batches:
            yield batch
            done += len(batch)
            bar.update(len(batch))
            now = time.monotonic()
            if bar.disable and now - last >= _LOG_EVERY_SECONDS:
                last = now
                rate = done / (now - start)
                left = (total - done) / rate
                _LOG.info("%s: %d of %d images, %.0f/s, %.0f s left", what, done, total, rate, left)


def _write_chunk(folder: Path, tasks: Sequence[RenderTask], size: int) -> dict[str, FileRecord]:
    return {task.path: _write_one(folder / task.path, task, size) for task in tasks}


def _write_one(path: Path, task: RenderTask, size: int) -> FileRecord:
    data = _read_whole_image(path)
    if data is None:
        data = task.data
        if task.is_svg:
            try:
                data = render_svg(task.data.decode(), size, path.suffix[1:])
            except ValueError as error:
                raise DeclipError(
                    f"picture {task.path!r} cannot be drawn: {error}; "
                    "the pinned resvg_py draws all of them, so install that version."
                ) from error
        temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def _read_whole_image(path: Path) -> bytes | None:
    """A file's bytes, or None where there is none or it does not decode to its end."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return None
    return data
