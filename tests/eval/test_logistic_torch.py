"""The torch way gives the numpy way's answers; on torch's CPU, as its GPU needs no other code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from declip_eval.linear_probe import fit_probe
from declip_eval.logistic import LogisticProblem
from declip_eval.logistic_torch import TorchLogisticProblem, exact_products


def data(num_rows=700, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % 4
    centers = rng.standard_normal((4, dim))
    return 0.5 * centers[labels] + rng.standard_normal((num_rows, dim)) + 3.0, labels


@pytest.mark.parametrize("kind", ["softmax", "two classes", "several labels"])
def test_all_strengths_at_once_are_the_numpy_ways(kind, monkeypatch):
    features, labels = data()
    targets, num_classes = {
        "softmax": (labels, 4),
        "two classes": (labels // 2, 2),
        "several labels": (np.stack([labels == 0, labels > 1], 1), 2),
    }[kind]
    strengths = [1e3, 10.0, 0.1]
    # Blocks of few rows, so that there are several.
    monkeypatch.setattr("declip_eval.logistic_torch.MAX_SCORES", 1000)
    theirs = TorchLogisticProblem(features, targets, num_classes=num_classes, device="cpu")
    ours = LogisticProblem(features, targets, num_classes=num_classes)
    for a, b in zip(ours.fit(strengths), theirs.fit(strengths), strict=True):
        assert a.converged
        assert b.converged
        assert b.weights.shape == (12, num_classes)
        assert np.allclose(a.weights, b.weights, atol=3e-3 * np.abs(a.weights).max())
        assert np.allclose(a.bias, b.bias, atol=3e-3 * np.abs(a.bias).max() + 1e-4)


def test_a_probe_on_a_torch_device_gives_the_same_metrics():
    features, labels = data()
    parts = (features[:500], labels[:500], features[500:], labels[500:])
    own = fit_probe(*parts, seed=0, sweep="clip").metrics
    # "cpu:0" is torch's own name; plain "cpu" is the numpy way.
    found = fit_probe(*parts, seed=0, sweep="clip", device="cpu:0").metrics
    assert found["lp_acc1"] == pytest.approx(own["lp_acc1"], abs=0.01)
    assert found["validation_acc1"] == pytest.approx(own["validation_acc1"], abs=0.01)


def test_a_device_that_is_not_there_is_refused():
    features, labels = data()
    with pytest.raises(ValueError, match="device is 'tpu9', but torch has no such device"):
        fit_probe(features, labels, features, labels, seed=0, device="tpu9")


def test_the_callers_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
