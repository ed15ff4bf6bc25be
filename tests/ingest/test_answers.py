"""What headers and faults mean."""

import email.utils
import errno
import time

import pytest

from declip_ingest.answers import (
    KNOWN_DIRECTIVES,
    check_directives,
    errno_failure,
    is_opted_out,
    network_failure,
    retry_after_seconds,
)
from declip_ingest.failures import FETCH_REASONS
from declip_shards import DeclipError


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        (["noai"], True),
        (["NoIndex, nofollow"], True),
        (["nofollow"], False),
        (["otherbot: noindex, nofollow"], False),
        (["opendeclip: noindex"], True),
        (["none"], True),
        (["otherbot: none"], False),
        (["otherbot: nofollow, OpenDeCLIP: noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noimageai"], True),
        (["otherbot: noai", "noindex"], True),
        ([], False),
    ],
)
def test_opt_outs_are_obeyed_as_far_as_they_reach(values, refused):
    assert is_opted_out(values, ("noai", "noimageai", "noindex")) is refused
    assert not is_opted_out(values, ())


def test_a_misspelt_directive_is_refused_and_every_known_one_taken():
    check_directives([*KNOWN_DIRECTIVES, " NoAI "])
    for wrong in ("noia", "", "noai;noindex"):
        with pytest.raises(DeclipError, match=f"disallowed_header_directives holds '{wrong}'"):
            check_directives(["noai", wrong])
    with pytest.raises(DeclipError, match="Did you mean 'noai'"):
        check_directives(["noia"])


def test_retry_after_reads_numbers_and_dates():
    assert retry_after_seconds("7") == 7
    assert retry_after_seconds(" 0 ") == 0
    for nonsense in ("soon", None, "", "-5", "٣", "1.5"):
        assert retry_after_seconds(nonsense) is None
    assert (retry_after_seconds("9" * 5000) or 0) > 1e9
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < (retry_after_seconds(date) or 0) <= 100
    assert retry_after_seconds("Thu, 01 Jan 1970 00:00:00 GMT") == 0


def test_every_number_of_a_network_fault_has_a_reason_of_the_vocabulary():
    for number, name in errno.errorcode.items():
        if number in (errno.EMFILE, errno.ENFILE):
            with pytest.raises(DeclipError, match="no file descriptor left"):
                errno_failure(OSError(number, "x"))
            continue
        failure = errno_failure(OSError(number, "x"))
        assert failure.reason in FETCH_REASONS
        assert FETCH_REASONS[failure.reason].is_passing
        assert failure.detail in ("", name)


def test_unknown_faults_are_bad_responses():
    assert network_failure(RuntimeError("odd")).message == "bad_response"
    assert network_failure(TimeoutError()).message == "timeout"
    assert network_failure(OSError("no number")).message == "network_error"
