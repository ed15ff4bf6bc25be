"""What a benchmark says of its surroundings."""

import pytest

import surroundings


def test_a_machine_without_git_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    about = surroundings.describe(["numpy", "no-such-package"])
    assert (about["commit"], about["has_uncommitted_changes"]) == (None, None)
    assert list(about["versions"]) == ["numpy"]
