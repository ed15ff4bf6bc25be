"""Stop on a signal: in time, with what is done kept, and with a status that says which one."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STOP_SECONDS = 8.0
"""For a run to let go of what it holds; after that the process ends as it is, which loses
nothing: files appear whole or not at all."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a job's stop, a terminal that goes away."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn signals into an orderly stop with status 128 + signal; the second one ends at once.

    SIGINT arrives as the usual KeyboardInterrupt, the others as SystemExit. One that the caller
    ignores (``nohup``) stays ignored. Outside of the main thread nothing changes.

    Raises:
        SystemExit: a signal other than SIGINT came; its code is the status.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timers: list[threading.Timer] = []
    seen: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        timers.append(threading.Timer(STOP_SECONDS, os._exit, (128 + number,)))
        timers[0].daemon = True
        timers[0].start()
        # Of this kind for all: Ray's calls give back no other from within.
        raise KeyboardInterrupt

    before = {s: signal.getsignal(s) for s in SIGNALS}
    taken = [s for s in SIGNALS if before[s] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        if not seen or seen[0] == signal.SIGINT:
            raise
        name = signal.Signals(seen[0]).name
        print(
            f"\ndeclip: stopped by {name}; what is done is kept, run the same command again.",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(128 + seen[0]) from None
    finally:
        for timer in timers:
            timer.cancel()
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)
