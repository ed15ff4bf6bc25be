"""Progress on long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Tasks done, samples a second, and the time left."""

    def __init__(self, name: str, num_tasks: int, num_done: int = 0) -> None:
        self.name, self.num_tasks, self.num_done = name, num_tasks, num_done
        self.num_samples = 0
        self._first = num_done
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_tasks, initial=num_done, desc=name, unit="task")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def rate(self) -> float:
        """Samples a second so far."""
        return self.num_samples / max(time.monotonic() - self._start, 1e-9)

    def advance(self, num_samples: int) -> None:
        """One task more is done; it read ``num_samples`` samples."""
        self.num_done += 1
        self.num_samples += num_samples
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.rate:,.0f} samples/s", refresh=False)
            self._bar.update()
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_LINE_SECONDS and self.num_done < self.num_tasks:
            self._last_line = now
            each = (now - self._start) / (self.num_done - self._first)
            print(
                f"  {self.name}: {self.num_done}/{self.num_tasks} tasks, "
                f"{self.rate:,.0f} samples/s, {each * (self.num_tasks - self.num_done):.0f} s left",
                file=sys.stderr,
                flush=True,
            )
