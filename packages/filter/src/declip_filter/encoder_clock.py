"""How long an encoder worked, and how long it had to wait for what it encodes."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class EncoderClock:
    """Started when it is made; what is not spent in :meth:`encoding` is waiting."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.encoding_seconds = 0.0

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """Around each call of the encoder, which returns when its vectors are in memory."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.encoding_seconds += time.perf_counter() - start

    def figures(self, num_rows: int) -> dict[str, Any]:
        """Until now, for a volatile file: times differ from run to run.

        Returns:
            ``rows``, ``seconds``, ``rows_per_second``, ``encoding_seconds`` and
            ``waiting_share``: the part of the time, 0 to 1, in which the encoder had no work,
            because tables were read, pictures decoded, texts tokenized or files written.
        """
        seconds = time.perf_counter() - self._start
        return {
            "rows": num_rows,
            "seconds": round(seconds, 3),
            "rows_per_second": round(num_rows / seconds, 1) if seconds else 0.0,
            "encoding_seconds": round(self.encoding_seconds, 3),
            "waiting_share": round(1 - self.encoding_seconds / seconds, 4) if seconds else 0.0,
        }
