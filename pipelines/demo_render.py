"""Writes the demo's pictures as image files, in a few processes."""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

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


Chunk = Sequence[tuple[RenderTask, FileRecord | None]]
"""Files to write, each with what is known of the file that may be there already."""


def render_svg(svg: str, size: int, extension: str) -> bytes:
    """Draw an SVG on white, ``size`` pixels square, centered; return PNG or JPEG bytes.

    Raises ValueError where the markup cannot be drawn.
    """
    # Here, for a cluster's workers build every recipe and need not have what the demo draws with.
    import resvg_py

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
    folder: Path, tasks: Sequence[RenderTask], *, size: int, num_processes: int, journal: Path
) -> dict[str, FileRecord]:
    """Write every task's file under ``folder``; return path -> record, sorted by path.

    A file that still has the sha256 that ``journal`` names for it is kept; a run that is killed
    leaves its journal for the next one. ``size`` is the side of rendered images in pixels; one
    process means this one, without children. Raises DeclipError naming the first
    picture that cannot be drawn.
    """
    for parent in sorted({(folder / task.path).parent for task in tasks}):
        parent.mkdir(parents=True, exist_ok=True)
    known = read_journal(journal)
    work = [(task, known.get(task.path)) for task in tasks]
    chunks = [work[start : start + _CHUNK] for start in range(0, len(work), _CHUNK)]
    records: dict[str, FileRecord] = {}
    with journal.open("ab") as log:
        done = _run_chunks(folder, chunks, size, num_processes)
        for written in track_progress(done, len(tasks), "render"):
            records.update(written)
            log.write(format_journal(written))
            log.flush()
    # One flush for all, because ten thousand take longer than the rendering: the caller marks
    # the work as done only after this, and until then the journal's digests are the judge.
    os.sync()
    return dict(sorted(records.items()))


def _run_chunks(
    folder: Path, chunks: Sequence[Chunk], size: int, num_processes: int
) -> Iterator[dict[str, FileRecord]]:
    if num_processes == 1:
        for chunk in chunks:
            yield _write_chunk(folder, chunk, size)
        return
    # Spawned, not forked: the caller may run threads (Ray, a server), and a fork copies their
    # locks. An executor, not a Pool: it notices a killed child, where a Pool waits for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_exit_with_parent
    ) as pool:
        futures = [pool.submit(_write_chunk, folder, chunk, size) for chunk in chunks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DeclipError(
                "a process that renders the demo's pictures died, most likely killed for lack of "
                "memory; free some and run again (finished pictures are kept)."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def format_journal(records: Mapping[str, FileRecord]) -> bytes:
    """One line of the journal."""
    # The line break comes first: a line that a power cut left torn then spoils no other.
    line = {path: [record.sha256, record.size] for path, record in records.items()}
    return b"\n" + json.dumps(line).encode()


def read_journal(path: Path) -> dict[str, FileRecord]:
    """What earlier runs wrote: path -> record. Torn lines count for nothing."""
    known: dict[str, FileRecord] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return known
    for line in lines:
        try:
            entries = json.loads(line).items()
            known.update((p, FileRecord(sha256=sha, size=size)) for p, (sha, size) in entries)
        except (ValueError, TypeError, AttributeError):
            continue
    return known


def _exit_with_parent() -> None:
    """End this process when its parent is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.join,), daemon=True).start()


def _wait_and_exit(wait: Callable[[], object]) -> None:
    wait()
    os._exit(1)


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


def _write_chunk(folder: Path, work: Chunk, size: int) -> dict[str, FileRecord]:
    return {task.path: _write_one(folder / task.path, task, size, known) for task, known in work}


def _write_one(path: Path, task: RenderTask, size: int, known: FileRecord | None) -> FileRecord:
    data = task.data
    if not task.is_svg:
        # The journal may speak of another picture that bore this name under other settings.
        known = FileRecord(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    if known is not None and _has_digest(path, known):
        return known
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


def _has_digest(path: Path, known: FileRecord) -> bool:
    # Not "does it decode": Pillow reads a PNG without its last bytes, or a JPEG with a hole.
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) == known.size and hashlib.sha256(data).hexdigest() == known.sha256
