"""How far a long list has been read: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from typing import Any, Self

from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0
"""Seconds between two lines where there is no terminal."""


class ListProgress:
    """Rows read, rows a second, and the share of the stored bytes."""

    def __init__(self, name: str, num_bytes: int) -> None:
        self._name, self._num_bytes = name, num_bytes
        self._read_bytes = self._num_rows = 0
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=num_bytes or None, desc=name, unit="B", unit_scale=True, leave=False
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add_bytes(self, count: int) -> None:
        """So many stored bytes more were read."""
        self._read_bytes += count
        if self._bar is not None:
            self._bar.update(count)

    def add_rows(self, count: int) -> None:
        """So many rows more were read."""
        self._num_rows += count
        now = time.monotonic()
        rate = self._num_rows / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._num_rows:,} rows, {rate:,.0f} rows/s", refresh=False)
        elif now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            print(self._line(rate, now), file=sys.stderr, flush=True)

    def _line(self, rate: float, now: float) -> str:
        line = f"  {self._name}: {self._num_rows:,} rows, {rate:,.0f} rows/s"
        if not self._num_bytes or not self._read_bytes:
            return line
        share = min(1.0, self._read_bytes / self._num_bytes)
        left = (now - self._start) * (1 - share) / share
        return f"{line}, {share:.0%} of the bytes, {left:.0f} s left"
