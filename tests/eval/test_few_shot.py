"""The few-shot probe's draws, means and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from declip_eval.few_shot import draw_shots, few_shot
from declip_eval.linear_probe import fit_probe


def classes_of_normals(num_rows, spread=0.5, num_classes=6, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    centers = np.random.default_rng(99).standard_normal((num_classes, dim))
    return spread * centers[labels] + rng.standard_normal((num_rows, dim)), labels


@pytest.fixture(scope="module")
def parts():
    return (*classes_of_normals(240), *classes_of_normals(600, seed=1))


def test_draws_are_nested_balanced_and_by_seed():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    draws = {k: draw_shots(labels, k, seed=4) for k in (1, 2, 4, 8)}
    for k, rows in draws.items():
        assert np.bincount(labels[rows]).tolist() == [k] * 5
        assert len(set(rows)) == len(rows)
    assert set(draws[1]) < set(draws[2]) < set(draws[4]) < set(draws[8])
    assert np.array_equal(draws[4], draw_shots(labels, 4, seed=4))
    assert not np.array_equal(draws[4], draw_shots(labels, 4, seed=5))


def test_a_class_has_its_draw_whatever_other_classes_there_are():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    fewer = np.where(labels == 2, 3, labels)
    both = [set(draw_shots(each, 3, seed=0)) for each in (labels, fewer)]
    ones = [{row for row in rows if labels[row] == 1} for rows in both]
    assert ones[0] == ones[1]


def test_means_are_those_of_the_seeds_own_probes(parts):
    train, train_labels, test, test_labels = parts
    found = few_shot(*parts, k=4, seeds=(3, 8), l2_strengths=(0.5,))
    alone = []
    for seed in (3, 8):
        rows = draw_shots(train_labels, 4, seed)
        alone.append(
            fit_probe(
                train[rows], train_labels[rows], test, test_labels, seed=0, l2_strengths=(0.5,)
            ).metrics
        )
        assert found.by_seed[seed] == alone[-1]
    for name in ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"):
        assert found.metrics[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2)
        low, high = found.intervals[name]
        assert 0 <= low < found.metrics[name] < high <= 1
    assert found.k == 4
    assert sorted(found.probes) == [3, 8]


def test_more_shots_learn_more_and_random_labels_sit_at_chance(parts):
    one, many = (few_shot(*parts, k=k, seeds=range(3)).metrics["lp_acc1"] for k in (1, 32))
    assert many > one + 0.1
    train, train_labels, test, _ = parts
    noise = np.random.default_rng(5).integers(0, 6, len(test))
    found = few_shot(train, train_labels, test, noise, k=8)
    low, high = found.intervals["lp_acc1"]
    assert low < 1 / 6 < high


def test_intervals_cover_the_truth_about_as_often_as_they_say(parts):
    """Over many test sets and draws; the truth is the mean over very many of both."""
    pool, pool_labels = classes_of_normals(3000, seed=7)
    world, world_labels = classes_of_normals(6000, seed=8)
    truth = few_shot(pool, pool_labels, world, world_labels, k=2, seeds=range(100, 120))
    covered = 0
    for trial in range(24):
        test, test_labels = classes_of_normals(120, seed=1000 + trial)
        seeds = range(3 * trial, 3 * trial + 3)
        found = few_shot(pool, pool_labels, test, test_labels, k=2, seeds=seeds)
        low, high = found.intervals["lp_acc1"]
        covered += low <= truth.metrics["lp_acc1"] <= high
    assert covered >= 20


def test_one_seed_gives_the_interval_of_the_test_samples(parts):
    one = few_shot(*parts, k=4, seeds=(0,))
    low, high = one.intervals["lp_acc1"]
    share = one.metrics["lp_acc1"]
    half = 1.96 * np.sqrt(share * (1 - share) / 600)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_where_every_sample_is_right_the_interval_is_not_empty():
    parts = (*classes_of_normals(60, spread=30), *classes_of_normals(60, spread=30, seed=1))
    found = few_shot(*parts, k=2, seeds=(0, 1))
    assert found.metrics["lp_acc1"] == 1
    low, high = found.intervals["lp_acc1"]
    assert 0.9 < low < 1
    assert high == pytest.approx(1)


def test_the_validation_set_chooses_but_is_not_trained_on(parts):
    validation, validation_labels = classes_of_normals(300, seed=2)
    chosen = few_shot(
        *parts,
        k=2,
        seeds=(0,),
        sweep="clip",
        validation_features=validation,
        validation_labels=validation_labels,
    )
    strength = chosen.by_seed[0]["l2_strength"]
    assert len(chosen.probes[0].validation_scores) > 7
    plain = few_shot(*parts, k=2, seeds=(0,), l2_strengths=(strength,))
    assert chosen.metrics["lp_acc1"] == pytest.approx(plain.metrics["lp_acc1"], abs=2 / 600)


def test_wrong_input_is_refused_in_a_sentence(parts):
    with pytest.raises(ValueError, match="k is 0, but a few-shot probe needs at least 1"):
        few_shot(*parts, k=0)
    with pytest.raises(ValueError, match="Class 0 has 40 training samples, but k is 41"):
        few_shot(*parts, k=41)
    with pytest.raises(ValueError, match="seeds is empty"):
        few_shot(*parts, k=1, seeds=())
    with pytest.raises(ValueError, match=r"seeds holds a seed twice \(1, 1\)"):
        few_shot(*parts, k=1, seeds=(1, 1))
    with pytest.raises(ValueError, match="seeds holds -1, but a seed is 0 or more"):
        few_shot(*parts, k=1, seeds=(-1,))
    with pytest.raises(ValueError, match="There are 2 L2 strengths to try, but without a valid"):
        few_shot(*parts, k=1, l2_strengths=(1, 2))
    with pytest.raises(ValueError, match="There are 7 L2 strengths to try, but without a valid"):
        few_shot(*parts, k=1, sweep="clip")
    with pytest.raises(ValueError, match=r"confidence is 1\.0, but it must lie between"):
        few_shot(*parts, k=1, confidence=1.0)
