"""A measurement in a forked process."""

import importlib
import os

import pytest

forked = importlib.import_module("forked")


def test_the_result_comes_from_another_process() -> None:
    number, text = forked.call(lambda text: (os.getpid(), text), "given")
    assert (number != os.getpid(), text) == (True, "given")


@pytest.mark.parametrize(("status", "fault"), [(1, ValueError), (7, None)])
def test_a_child_that_fails_is_told(
    status: int, fault: type[Exception] | None, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        if fault is None:
            os._exit(status)
        raise fault("too large")

    with pytest.raises(RuntimeError, match=f"ended with {status}"):
        forked.call(fail, None)
    assert ("too large" in capfd.readouterr().err) == (fault is not None)
