"""Losses and towers against independent implementations: the table of benchmarks/parity.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parity

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The table, made in a process of its own: open_clip may need a stand-in for torchvision."""
    path = tmp_path_factory.mktemp("parity") / "rows.json"
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "parity.py"), "--fast", "--json", str(path)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_loss_and_tower_is_within_the_bar(rows):
    assert {row["name"] for row in rows} == {
        *("contrastive", "sigmoid", "four pairs", "neighbor", "simsiam", "simclr"),
        *("masked language", "token-wise"),
        *(f"towers of {name}" for name in parity.FAST_TOWERS),
        "towers of test-rn, float64",
    }
    for row in rows:
        assert 0 <= row["value"] <= 1e-5, row
        # float32 says little about a ResNet's gradients; float64 does.
        limit = 0.1 if row["name"] == "towers of test-rn" else 1e-5
        assert 0 <= row["gradient"] <= limit, row


def test_a_wrong_loss_would_be_seen():
    inputs = {"x": torch.tensor([1.0, 2.0])}
    good = parity.compare("", "", lambda x: (x * x).sum(), lambda x: (x**2).sum(), inputs)
    assert good.is_good
    bad = parity.compare("", "", lambda x: (x * x).sum() + 1e-3, lambda x: (x**2).sum(), inputs)
    assert not bad.is_good
    assert bad.gradient == 0
    bad = parity.compare("", "", lambda x: (x * x.detach()).sum(), lambda x: (x * x).sum(), inputs)
    assert bad.value == 0
    assert not bad.is_good
