"""Reasons are names, and a row's message starts with its reason."""

import pickle
import re

import pytest

from declip_ingest.failures import (
    DECODE_REASONS,
    FETCH_REASONS,
    GROUPS,
    DecodeError,
    FetchError,
    RowFailureError,
    is_asked,
    match_reasons,
    reason_of,
)
from declip_shards import DeclipError


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


def test_what_passes_has_no_detail_in_the_row_for_that_depends_on_the_moment():
    for reason in ("timeout", "http_429", "robots_unavailable", "network_error"):
        failure = FetchError(reason, "somewhere")
        assert failure.message == reason
        assert failure.detail == "somewhere"
    assert FetchError("bad_url", "length").message == "bad_url: length"


def test_no_reason_is_listed_that_the_code_never_gives():
    """Every listed name stands in the source beside a raise."""
    from pathlib import Path

    import declip_ingest.failures

    folder = Path(declip_ingest.failures.__file__).parent
    source = "".join(p.read_text() for p in folder.glob("*.py") if p.name != "failures.py")
    for reason in (*FETCH_REASONS, *DECODE_REASONS):
        assert f'"{reason}"' in source, reason


def test_families_split_the_reasons_and_passing_ones_are_a_set_of_their_own():
    every = FETCH_REASONS | DECODE_REASONS
    named = [match_reasons([group]) for group in GROUPS if group != "http"]
    assert sorted(reason for family in named for reason in family or ()) == sorted(every)
    passing = match_reasons(["passing"])
    assert passing is not None
    assert {"timeout", "dns_failure", "http_503"} <= passing
    assert not {"http_404", "not_image", "opted_out"} & passing


def test_asked_names_select_rows():
    asked = match_reasons(["timeout", "dns", "http_404"])
    chosen = {r for r in ("timeout", "dns_failure", "http_404", "http_500") if is_asked(r, asked)}
    assert chosen == {"timeout", "dns_failure", "http_404"}
    assert is_asked("http_599", match_reasons(["http"]))
    assert not is_asked("timeout", match_reasons(["http"]))
    assert all(is_asked(r, match_reasons(["all"])) for r in ("http_404", "blocked"))


@pytest.mark.parametrize(
    ("name", "sentence"), [("timeuot", "did you mean 'timeout'"), ("http_999", "http_999")]
)
def test_a_misspelt_reason_is_offered_the_nearest(name, sentence):
    with pytest.raises(DeclipError, match=rf"(?i){sentence}"):
        match_reasons([name])
    with pytest.raises(DeclipError, match="no failure reason is named"):
        match_reasons([])


def test_status_codes_are_reasons_too_and_errors_survive_a_pickle():
    assert reason_of("http_429").is_passing
    assert not reason_of("http_410").is_passing
    assert "410" in reason_of("http_410").meaning
    with pytest.raises(KeyError):
        reason_of("http_999")
    failure = pickle.loads(pickle.dumps(DecodeError("corrupt_image", "why")))
    assert (failure.reason, failure.detail, failure.status) == (
        "corrupt_image",
        "why",
        "failed_to_resize",
    )
