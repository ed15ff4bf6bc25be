"""What a loader costs: processor time, time to the first batch, memory. Of ours and of the peers,
in either environment, so the standard library alone.

Processor time is of the process, its threads and everything below it; memory is the proportional
set size, which counts a page that processes share once. Over time only what was allocated counts:
pages of files and libraries are the kernel's to drop, and their share rises and falls with other
processes that map them.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.process_tree import cpu_seconds, descendants
else:
    from process_tree import cpu_seconds, descendants

MEMORY_SECONDS = 5.0


ALL = ("Pss:",)
ALLOCATED = ("Pss_Anon:", "Pss_Shmem:")


def memory_megabytes(kinds: tuple[str, ...] = ALL) -> list[float]:
    """Of this process, then of each below it; ``kinds`` as the kernel calls them, summed."""
    sizes = []
    for pid in (os.getpid(), *descendants(os.getpid())):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        sizes.append(sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(kinds)))
    return [round(size, 1) for size in sizes]


def measure(
    start: Callable[[], Iterator[int]], *, warm_up: int, samples: int, minutes: float
) -> dict[str, Any]:
    """Run a loader.

    Args:
        start: builds it; iterating then gives the number of samples of each batch, without end.
        warm_up: samples before the clock starts, the first batch among them.
        samples: at least so many are measured.
        minutes: go on until so much time has passed, looking at memory; 0: do not.
    """
    began = time.perf_counter()
    batches = start()
    seen = next(batches)
    first = time.perf_counter() - began
    while seen < warm_up:
        seen += next(batches)
    before, wall, done = cpu_seconds(os.getpid()), time.perf_counter(), 0
    while done < samples:
        done += next(batches)
    used, took = cpu_seconds(os.getpid()) - before, time.perf_counter() - wall
    row: dict[str, Any] = {
        "samples": done,
        "samples_per_core_second": round(done / used, 1),
        "samples_per_second": round(done / took, 1),
        "seconds_to_first_batch": round(first, 2),
        "megabytes": memory_megabytes(),
    }
    if minutes:
        row["memory"] = watch(batches, minutes)
    return row


def watch(batches: Iterator[int], minutes: float) -> dict[str, Any]:
    """Memory over time: megabytes that all processes together have allocated, and what an hour
    would add to them, by a straight line through the second half."""
    began = asked = time.perf_counter()
    series = [(0.0, sum(memory_megabytes(ALLOCATED)))]
    while (now := time.perf_counter()) < began + 60 * minutes:
        next(batches)
        if now - asked >= MEMORY_SECONDS:
            series.append((now - began, sum(memory_megabytes(ALLOCATED))))
            asked = now
    half = series[len(series) // 2 :]
    middle = sum(t for t, _ in half) / len(half)
    spread = sum((t - middle) ** 2 for t, _ in half)
    slope = sum((t - middle) * m for t, m in half) / spread if spread else 0.0
    step = max(1, len(series) // 60)
    return {
        "megabytes_an_hour": round(3600 * slope, 1),
        "peak_megabytes": round(max(m for _, m in series), 1),
        "series": [[round(t), round(m, 1)] for t, m in series[::step]],
    }
