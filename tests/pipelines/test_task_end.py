"""Causes of failures in words."""

import errno

import pytest

from declip_shards import DeclipError, Store
from pipelines.task_end import describe, free_bytes, size_text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_what_is_free_and_ends_the_step(tmp_path, number):
    cause, is_hopeless = describe(OSError(number, "No space left"), Store(str(tmp_path)))
    assert is_hopeless
    assert str(tmp_path) in cause
    assert "No space left" in cause
    assert cause.endswith("free)")


def test_a_full_disk_behind_a_sentence_ends_the_step_too(tmp_path):
    error = DeclipError("cannot write")
    error.__cause__ = OSError(errno.ENOSPC, "No space left")
    assert describe(error, Store(str(tmp_path))) == ("cannot write", True)


def test_other_faults_leave_the_others_a_chance(tmp_path):
    store = Store(str(tmp_path))
    assert describe(DeclipError("a sentence"), store) == ("a sentence", False)
    assert describe(FileNotFoundError(2, "gone", "x"), store) == (
        "FileNotFoundError: [Errno 2] gone: 'x'",
        False,
    )
    cause, is_hopeless = describe(ZeroDivisionError("a defect"), store)
    assert cause.startswith("Traceback ") or "ZeroDivisionError: a defect" in cause
    assert not is_hopeless


def test_what_is_free_is_known_of_local_disks_only(tmp_path):
    assert (free_bytes(Store(str(tmp_path))) or 0) > 0
    assert free_bytes(Store("memory://somewhere")) is None


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1536, "1.5 KB"), (5e6, "5.0 MB"), (7.2e12, "7.2 TB")],
)
def test_sizes(size, text):
    assert size_text(size) == text
