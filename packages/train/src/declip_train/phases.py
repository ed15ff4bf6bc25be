"""Where a training process spends its time: waiting for data, forward, communication, backward, ...

Phases lie one after the other on one line of time: a phase inside another interrupts it, so shares
add up to 1. On a CPU the line is the host's clock. On a GPU it is the device's own: an event is
recorded in its stream at each change, and what lies between two events is the time in which the
device did that phase's work or waited for it. A host that runs ahead of the device is no loss, and
is not counted as one. Nothing here waits for the device.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

__all__ = ["COMMUNICATION", "PHASES", "PhaseTimes", "communication_timed"]

PHASES = (
    "wait",
    "augment",
    "forward",
    "backward",
    "communication",
    "step",
    "save",
    "eval",
    "other",
)
"""Waiting for a batch; taking it to the device and changing colors there; towers, heads and losses;
their gradients; collectives, in whatever phase they come; the optimizer; checkpoints; zero-shot
evaluation; the rest of the loop."""
COMMUNICATION = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
)
"""Functions of ``torch.distributed`` that count as communication."""
_OTHER = "other"
_MOST_CHANGES = 1024
"""Kept before those that are over are added up: nobody may ask for them for a long time."""
_Item = TypeVar("_Item")


class _Moment(Protocol):
    """A point of the line of time."""

    def passed(self) -> bool:
        """Whether it is over, so that a distance from it can be told."""

    def until(self, later: Any) -> float:
        """Seconds from this moment to a later one; both are over."""


class _HostMoment:
    def __init__(self) -> None:
        self.time = time.perf_counter()

    def passed(self) -> bool:
        return True

    def until(self, later: _HostMoment) -> float:
        return later.time - self.time


class _DeviceMoment:
    def __init__(self) -> None:
        self.event = torch.Event("cuda", enable_timing=True)
        self.event.record()

    def passed(self) -> bool:
        return self.event.query()

    def until(self, later: _DeviceMoment) -> float:
        return float(self.event.elapsed_time(later.event)) / 1000


class PhaseTimes:
    """Seconds of each phase of one process.

    The thread that makes it owns it; others count as far as autograd's do, which run while their
    owner waits for them in the backward pass.

    Args:
        device: what computes.
        now: makes a moment of the line of time; None: the host's clock on a CPU, else the
            device's events.
    """

    def __init__(self, device: torch.device, now: Callable[[], _Moment] | None = None) -> None:
        default = _DeviceMoment if device.type == "cuda" else _HostMoment
        self._now: Callable[[], _Moment] = now or default
        self._owner = threading.get_ident()
        self._active = [_OTHER]
        # Changes not yet counted: a moment, and the phase that begins with it.
        self._changes: deque[tuple[_Moment, str]] = deque([(self._now(), _OTHER)])
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @property
    def active(self) -> str:
        """The phase that this process is in."""
        return self._active[-1]

    def _takes_part(self) -> bool:
        return threading.get_ident() == self._owner or "backward" in self._active

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block as phase ``name``, less that of phases within it.

        Raises:
            ValueError: no phase has this name.
        """
        if name not in PHASES:
            raise ValueError(f"no phase is named {name!r}; there are {', '.join(PHASES)}.")
        if not self._takes_part():
            yield
            return
        self._active.append(name)
        self._change()
        try:
            yield
        finally:
            self._active.pop()
            self._change()

    def _change(self) -> None:
        self._changes.append((self._now(), self._active[-1]))
        if len(self._changes) > _MOST_CHANGES:
            self._add_up()

    def _add_up(self) -> None:
        while len(self._changes) > 1 and self._changes[1][0].passed():
            moment, name = self._changes.popleft()
            self._seconds[name] += max(0.0, moment.until(self._changes[0][0]))

    def watched(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The same items; the time until each comes is phase ``wait``, and as long as they last
        collectives are phase ``communication``."""
        iterator = iter(items)
        with communication_timed(self):
            while True:
                with self.phase("wait"):
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                yield item

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last call, as far as the device has come.

        What it has not come to yet is told by the next call.
        """
        self._change()
        self._add_up()
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds


@contextmanager
def communication_timed(phases: PhaseTimes) -> Iterator[None]:
    """Count collectives as phase ``communication``, ours and DeepSpeed's alike.

    Both call the functions of ``torch.distributed`` through their module, and torch has no hook on
    them; so for as long as this lasts, these functions are ones that count and then call torch's.
    """
    originals = MappingProxyType({name: getattr(dist, name) for name in COMMUNICATION})

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with phases.phase("communication"):
                return function(*arguments, **named)

        return call

    for name, function in originals.items():
        setattr(dist, name, timed(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
