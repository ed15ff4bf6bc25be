"""Shared by all tests."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch, and for the processes that tests start: test files run side by side
# on as many cores as there are, and threads that wait for a core by spinning take it from the rest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Modules that tests hand to other processes (stages for Ray, stand-ins) must be importable there.
for folder in ("pipelines", "train"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
# Benchmarks are scripts; what they compute is tested.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


# Whoever starts the tests behind an & has Ctrl-C ignored, here and in all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _ctrl_c_as_before() -> Iterator[None]:
    """A handler that a test leaves behind makes a later one deaf, in whichever worker it falls to.

    SIGTERM's is Ray's from its start on.
    """
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    if after is not before:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        pytest.fail(f"handler of SIGINT left behind: {after}")


LONG_MARKS = ("distributed", "ray", "slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests go first, so that no worker is left with one of them at the end."""
    weight: Counter[Path] = Counter()
    for item in items:
        weight[item.path] += sum(item.get_closest_marker(mark) is not None for mark in LONG_MARKS)
    items.sort(key=lambda item: -weight[item.path])
