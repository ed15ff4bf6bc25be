"""Reasons are names, and a row's message starts with its reason."""

import re

import pytest

from declip_ingest.failures import (
    DECODE_REASONS,
    FETCH_REASONS,
    DecodeError,
    FetchError,
    RowFailureError,
)


def test_reasons_are_plain_names_and_belong_to_one_status():
    assert not FETCH_REASONS.keys() & DECODE_REASONS.keys()
    for reason in (*FETCH_REASONS, *DECODE_REASONS):
        assert re.fullmatch(r"[a-z0-9_]+", reason)


@pytest.mark.parametrize(
    ("kind", "status"), [(FetchError, "failed_to_download"), (DecodeError, "failed_to_resize")]
)
def test_the_message_starts_with_the_reason(kind, status):
    assert kind("a_reason").message == "a_reason"
    failure = kind("a_reason", "a detail")
    assert failure.message == "a_reason: a detail"
    assert failure.message.partition(":")[0] == failure.reason
    assert failure.status == status
    assert isinstance(failure, RowFailureError)


def test_no_reason_is_listed_that_the_code_never_gives():
    """Every listed name stands in the source beside a raise."""
    from pathlib import Path

    import declip_ingest.failures

    folder = Path(declip_ingest.failures.__file__).parent
    source = "".join(p.read_text() for p in folder.glob("*.py") if p.name != "failures.py")
    for reason in (*FETCH_REASONS, *DECODE_REASONS):
        assert f'"{reason}"' in source, reason
