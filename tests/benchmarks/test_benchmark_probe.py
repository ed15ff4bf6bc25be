"""The probe benchmark's comparison, on a small problem."""

import argparse
import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import probe


def given(**settings):
    known = {"threads": 1, "device": "cpu", "peer_tolerance": 1e-4, "peer_iterations": 1000}
    return argparse.Namespace(**(known | settings))


def test_both_fit_the_same_strengths_and_what_is_told_follows_from_them():
    features, labels = probe.made_up(300, 12, 4, seed=0)
    found = probe.measure("small", features, labels * 7, given())
    assert found["classes"] == 4
    assert found["strengths_tried"] == len(found["strengths"]) > 7
    same = found["strengths_where_scikit_learn_reached_the_optimum"]
    assert same == found["converged"]["strengths"] > 0
    own, other = np.array([s["validation_acc1"] for s in found["strengths"]]).T
    assert found["largest_difference_of_accuracy_anywhere"] == np.abs(own - other).max()
    assert found["largest_excess_of_our_objective"] < 1e-4
    json.dumps(found)


def test_iterations_that_scikit_learn_spent_are_counted():
    found = probe.measure("small", *probe.made_up(200, 12, 3, seed=0), given(peer_iterations=2))
    assert found["strengths_where_scikit_learn_spent_its_iterations"] > 10
    assert found["largest_excess_of_our_objective"] < 1e-6


def test_the_objective_is_what_scikit_learn_minimizes():
    features, labels = probe.made_up(200, 6, 3, seed=0)
    model = LogisticRegression(C=0.5, tol=1e-8, max_iter=5000).fit(
        features.astype(np.float64), labels
    )
    weights, bias = model.coef_.T, model.intercept_
    best = probe.objective(weights, bias, 2.0, features, labels)
    for shift in (1e-2, -1e-2):
        assert probe.objective(weights + shift * weights, bias, 2.0, features, labels) > best
        moved = bias + shift * np.array([1, 0, -1])
        assert probe.objective(weights, moved, 2.0, features, labels) > best


def test_two_classes_are_refused_in_a_sentence():
    features, labels = probe.made_up(100, 4, 2, seed=0)
    with pytest.raises(SystemExit, match="small has fewer than 3 classes"):
        probe.measure("small", features, labels, given())
