"""Progress on long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""
WINDOW_SECONDS = 60.0
"""What the rate is measured over, and the time left is told by."""
WINDOW_TASKS = 20
"""Tasks that the window holds at least, for tasks that take longer than it."""


def time_text(seconds: float) -> str:
    """``200 -> "3 min 20 s"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Tasks and samples done, samples a second of late, how many came through, the time left.

    Args:
        name: what is done.
        num_tasks: tasks in all.
        num_done: tasks that stood before; they count as done, not as speed.
        num_in: samples of those tasks.
        num_out: samples of those tasks that came through.
        unit: what samples are called.
    """

    def __init__(
        self,
        name: str,
        num_tasks: int,
        num_done: int = 0,
        *,
        num_in: int = 0,
        num_out: int = 0,
        unit: str = "samples",
    ) -> None:
        self.name, self.num_tasks, self.num_done, self.unit = name, num_tasks, num_done, unit
        self.num_samples, self.num_failed = 0, 0
        self._num_in, self._num_out = num_in, num_out
        self._start = self._last_line = time.monotonic()
        # (when, tasks, samples of this run until then)
        self._window = deque([(self._start, 0, 0)])
        self._num_ended = 0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_tasks, initial=num_done, desc=name, unit="task")

    def __enter__(self) -> Self:
        """Tell of it now and then from a thread: a first task may take an hour."""
        threading.Thread(target=self._keep_telling, name="progress", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        with self._lock:
            if self._bar is not None:
                self._bar.close()

    def _keep_telling(self) -> None:
        while not self._over.wait(1.0):
            with self._lock:
                if not self._over.is_set():
                    self._tell()

    @property
    def rate(self) -> float:
        """Samples a second of late."""
        when, _, num_samples = self._window[0]
        return (self.num_samples - num_samples) / max(time.monotonic() - when, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the other tasks take at the present speed; None before a task has ended."""
        when, num_ended, _ = self._window[0]
        if self._num_ended == num_ended:
            return None
        each = (time.monotonic() - when) / (self._num_ended - num_ended)
        return each * (self.num_tasks - self.num_done)

    def advance(self, num_samples: int, num_out: int | None = None) -> None:
        """One task more is done.

        Args:
            num_samples: samples that it read.
            num_out: those that came through; left out where that is no question.
        """
        with self._lock:
            self._num_in += num_samples
            self._num_out += num_samples if num_out is None else num_out
            self._end_task(num_samples)

    def fail(self) -> None:
        """One task more has failed."""
        with self._lock:
            self.num_failed += 1
            self._end_task(0)

    def _end_task(self, num_samples: int) -> None:
        now = time.monotonic()
        self.num_done += 1
        self._num_ended += 1
        self.num_samples += num_samples
        self._window.append((now, self._num_ended, self.num_samples))
        while len(self._window) > WINDOW_TASKS and self._window[1][0] < now - WINDOW_SECONDS:
            self._window.popleft()
        if self._bar is not None:
            self._bar.update()
        self._tell()

    def _figures(self) -> list[str]:
        """What is said beside the number of tasks."""
        figures = [f"{self._num_in:,} {self.unit}", f"{self.rate:,.0f} {self.unit}/s"]
        if self._num_out != self._num_in:
            figures.append(f"{100 * self._num_out / max(self._num_in, 1):.1f} % ok")
        if self.num_failed:
            figures.append(f"{self.num_failed} task{'s' * (self.num_failed > 1)} failed")
        return figures

    def _tell(self) -> None:
        """Bring the bar up to date, or write a line where the last one is old enough."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._figures()), refresh=True)
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_LINE_SECONDS or self.num_done >= self.num_tasks:
            return
        self._last_line = now
        left = self.seconds_left
        figures = [f"{self.num_done}/{self.num_tasks} tasks", *self._figures()]
        figures.append(f"{time_text(left)} left" if left is not None else "no task has ended yet")
        print(f"  {self.name}: {', '.join(figures)}", file=sys.stderr, flush=True)
