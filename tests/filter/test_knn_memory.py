"""No huge pages within, and what was before afterwards."""

import sys

import pytest

from declip_filter import knn_memory
from declip_filter.knn_memory import small_pages


def huge_pages_are_off() -> int:
    return knn_memory._prctl(knn_memory._PR_GET_THP_DISABLE, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of Linux")
def test_huge_pages_are_off_within_and_back_afterwards():
    before = huge_pages_are_off()
    with small_pages():
        assert huge_pages_are_off() == 1
        with small_pages():
            assert huge_pages_are_off() == 1
        assert huge_pages_are_off() == 1
    assert huge_pages_are_off() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of Linux")
def test_they_are_back_after_an_error_too():
    before = huge_pages_are_off()
    with pytest.raises(ValueError, match="broken"), small_pages():
        raise ValueError("broken")
    assert huge_pages_are_off() == before


def test_where_there_is_no_such_setting_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    with small_pages():
        assert huge_pages_are_off() == -1
