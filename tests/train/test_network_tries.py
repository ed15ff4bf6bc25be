"""Asking again: where the network fails, as often as is said, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from declip_train import network_tries
from declip_train.network_tries import TRIES, asked_again, is_final, words_of


class HTTPAnswerError(Exception):
    """What aiohttp raises of an answer, as far as it is looked at."""

    def __init__(self, status: int) -> None:
        self.status = status


class ServiceAnswerError(Exception):
    """What other clients raise: no status."""


def not_found(cause: BaseException | None) -> FileNotFoundError:
    error = FileNotFoundError("there")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (not_found(None), True),
        (not_found(KeyError("in memory")), True),
        (not_found(ServiceAnswerError()), True),
        (not_found(HTTPAnswerError(404)), True),
        (not_found(HTTPAnswerError(403)), True),
        (not_found(HTTPAnswerError(429)), False),
        (not_found(HTTPAnswerError(503)), False),
        (not_found(ConnectionRefusedError()), False),
        (not_found(TimeoutError()), False),
        (PermissionError(), True),
        (ImportError(), True),
        (NotADirectoryError(), True),
        (ConnectionResetError(), False),
        (RuntimeError(), False),
    ],
)
def test_what_asking_again_would_mend(
    error: Exception, final: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_final(error) is final
    pauses: list[int] = []
    monkeypatch.setattr(network_tries, "pause", pauses.append)
    asked = []

    def ask() -> None:
        asked.append(1)
        raise error

    with pytest.raises(type(error)):
        asked_again(ask)
    assert len(asked) == (1 if final else TRIES)
    assert pauses == list(range(1, len(asked)))


def test_the_first_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_tries, "pause", lambda attempt: None)
    answers: Iterator[Exception | str] = iter([ConnectionResetError(), "yes", "never asked for"])

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert asked_again(ask) == "yes"
    assert next(answers) == "never asked for"


def test_exceptions_without_words_are_named() -> None:
    assert words_of(ValueError("no")) == "no"
    assert words_of(TimeoutError()) == "TimeoutError"
