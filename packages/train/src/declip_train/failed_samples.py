"""Samples whose picture could not be read or decoded: what stands in for them, and how many may be.

A failed sample is replaced by another of the data, chosen by its own key, so the replacement is the
same on every rank count and at every restart. It is counted once an epoch. More than the error
budget allows end the run: a training set that falls apart is not what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from declip_shards import DeclipError

__all__ = ["PATH", "FailedSample", "FailedSamples", "failure_lines", "stand_ins"]

PATH = "train/failed_samples.jsonl"
"""Of the dataset folder: every failure of a run, one JSON object a line."""
_LISTED = 1000
"""Failures of one process that are kept until somebody takes them; more are counted alone."""


@dataclass(frozen=True, kw_only=True)
class FailedSample:
    """A sample that another one was trained on in place of."""

    epoch: int
    """Pass over the data, from 0."""
    key: str
    """Of the sample."""
    reason: str
    """Why its picture could not be used."""
    replaced_by: str
    """Key of the sample in its place."""


def stand_ins(num_samples: int, *, seed: int, epoch: int, key: str) -> Iterator[int]:
    """Rows of the samples that may stand in for a failed one, in the order they are tried: a pure
    function of the arguments, endless."""
    text = f"{seed}/{epoch}/stand-in/{key}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=number))
    while True:
        yield int(generator.integers(num_samples))


def failure_lines(failures: Iterable[FailedSample]) -> bytes:
    """Failures as lines of JSON."""
    lines = (json.dumps(asdict(failure), ensure_ascii=False) + "\n" for failure in failures)
    return "".join(lines).encode("utf-8", "surrogatepass")


class FailedSamples:
    """Counts failures against the error budget; any thread may report them.

    Two counts are held against it. A process ends as soon as its own failures alone are too many,
    which needs nobody else. And where the trainer gathers the failures of all processes
    (:meth:`take` here, :meth:`count_all` with the sum), all end together at their sum.

    Args:
        epoch_length: samples of an epoch, over all processes.
        budget: share of them that may fail.
    """

    def __init__(self, epoch_length: int, budget: float) -> None:
        self.epoch_length, self.budget = epoch_length, budget
        self.allowed = int(budget * epoch_length)
        """Failures that an epoch may have."""
        self._lock = threading.Lock()
        self._own: dict[int, set[str]] = {}
        self._all: dict[int, set[str]] = {}
        self._listed: list[FailedSample] = []

    def add(self, failure: FailedSample) -> None:
        """Report a failure of this process; again in the same epoch, it counts once.

        Raises:
            DeclipError: this process alone has more in the epoch than the budget allows.
        """
        with self._lock:
            keys = self._own.setdefault(failure.epoch, set())
            if failure.key in keys:
                return
            keys.add(failure.key)
            if len(self._listed) < _LISTED:
                self._listed.append(failure)
            number = len(keys)
            self._forget(self._own, failure.epoch)
        self._require(number, failure)

    def take(self) -> list[FailedSample]:
        """Failures of this process since the last call, at most 1,000."""
        with self._lock:
            taken, self._listed = self._listed, []
        return taken

    def count_all(self, failures: Iterable[FailedSample]) -> None:
        """Count failures of all processes; every process is given the same.

        Raises:
            DeclipError: the budget of an epoch is exceeded.
        """
        for failure in failures:
            keys = self._all.setdefault(failure.epoch, set())
            keys.add(failure.key)
            self._forget(self._all, failure.epoch)
            self._require(len(keys), failure)

    @staticmethod
    def _forget(counts: dict[int, set[str]], epoch: int) -> None:
        for old in [e for e in counts if e < epoch - 1]:
            del counts[old]

    def _require(self, number: int, last: FailedSample) -> None:
        if number > self.allowed:
            raise DeclipError(
                f"{number} of the {self.epoch_length} samples of epoch {last.epoch} could not be "
                f"read or decoded, but error_budget {self.budget:g} allows {self.allowed}; the "
                f"last is sample {last.key!r}: {last.reason}. Mend the shards (rerun ingest for "
                f"them), or raise error_budget; {PATH} lists what failed before."
            )

    @property
    def counts(self) -> Mapping[int, int]:
        """This process's failures by epoch, of the last two epochs."""
        with self._lock:
            return {epoch: len(keys) for epoch, keys in self._own.items()}
