"""Where the loader's threads spend their time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PHASES", "PhaseClock"]

PHASES = ("fetch", "decode", "augment", "tokens", "neighbors")
"""Reading tars; decoding, cropping and resizing; drawing views and changing their colors; token
ids of captions; looking neighbors up."""


class PhaseClock:
    """Seconds by phase, summed over the threads that add to it.

    Two threads that decode for a second each make two seconds of decoding: to be compared with the
    time that a step takes, the sum is divided by the number of threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def add(self, name: str, seconds: float) -> None:
        """Count time of a phase; threads may do so at the same time.

        Raises:
            ValueError: no phase has this name.
        """
        if name not in self._seconds:
            raise ValueError(f"no phase is named {name!r}; there are {', '.join(PHASES)}.")
        with self._lock:
            self._seconds[name] += seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time that a block takes, also where it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last call, which begins at 0 again."""
        with self._lock:
            taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken
