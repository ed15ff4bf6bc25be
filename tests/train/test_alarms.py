"""Alarms sound when a fault begins, once for each stretch of it, and not on healthy runs."""

import math
import random

import pytest

from declip_train.alarms import LOSS_WINDOW, Alarms
from declip_train.settings import TrainSettings

SETTINGS = TrainSettings(warmup_steps=10)


def sound(alarms, series):
    """(step, sentence) of every alarm of a series of numbers."""
    return [
        (step, sentence)
        for step, numbers in enumerate(series, 1)
        for sentence in alarms.check(step, numbers)
    ]


def losses(values):
    return [{"total": value} for value in values]


def healthy(steps, seed=0):
    generator = random.Random(seed)
    return [8 * math.exp(-step / 200) + 1 + generator.gauss(0, 0.05) for step in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_silent(seed):
    values = healthy(1000, seed)
    series = [
        {
            "total": value,
            "logit_scale": 14 + step / 100,
            "learning_rate": max(0.0, 1e-3 * (1 - (step + 1) / 1000)),
            "gradient_norm": 2 + 0.5 * math.sin(step),
            "image_feature_spread": 0.3 + step / 2000,
            "text_feature_spread": 0.2 + step / 2000,
        }
        for step, value in enumerate(values)
    ]
    assert sound(Alarms(SETTINGS, 1000), series) == []


def test_a_spike_sounds_once_a_stretch():
    values = healthy(400)
    values[200:210] = [20.0] * 10
    values[300] = 20.0
    found = sound(Alarms(SETTINGS, 400), losses(values))
    assert [step for step, _ in found] == [201, 301]
    assert "step 201: the loss jumped to 20, from" in found[0][1]
    assert "standard deviations, loss_spike 6)" in found[0][1]


def test_loss_spike_is_obeyed():
    values = healthy(300)
    values[200] += 4.0
    for sigma, expected in ((3.0, 1), (50.0, 0), (0.0, 0)):
        alarms = Alarms(TrainSettings(loss_spike=sigma), 300)
        found = [step for step, _ in sound(alarms, losses(values)) if step == 201]
        assert len(found) == expected, sigma


def test_a_new_level_is_taken_for_one_after_a_window():
    values = healthy(200) + [30 + x for x in healthy(400)]
    values[-1] = 500.0
    found = [step for step, _ in sound(Alarms(SETTINGS, 600), losses(values))]
    assert found == [201, 600]
    assert LOSS_WINDOW < 600 - 201


def test_a_spike_is_not_told_before_there_is_a_window():
    assert sound(Alarms(SETTINGS, 100), losses([1.0] * 20 + [100.0])) == []


@pytest.mark.parametrize("name", ["logit_scale", "token_logit_scale"])
def test_a_dead_temperature(name):
    settings = TrainSettings(logit_scale_min=0.0, logit_scale_max=math.log(100))
    series = [14.0, 99.9, 100.0, 100.0, 90.0, 100.0, 20.0, 1.0, 1.0]
    found = sound(Alarms(settings, 100), [{name: value} for value in series])
    assert [step for step, _ in found] == [2, 6, 8]
    assert f"{name} is at its upper bound, 100: it learns no more" in found[0][1]
    assert f"{name} fell to its lower bound, 1: pairs are hardly told apart" in found[2][1]


def test_a_temperature_that_is_held_is_no_alarm():
    settings = TrainSettings(logit_scale_min=2.659, logit_scale_max=2.66)
    assert sound(Alarms(settings, 9), [{"logit_scale": math.exp(2.66)}] * 5) == []


def test_no_learning_rate():
    rates = [0.0, 1e-3, 1e-3, 0.0, 0.0, 0.0, 1e-3, 0.0]
    found = sound(Alarms(SETTINGS, 8), [{"learning_rate": rate} for rate in rates])
    assert [step for step, _ in found] == [5], "one step without is what schedules begin with"
    assert "the learning rate is 0 and nothing is learned" in found[0][1]


def test_gradients_that_explode_vanish_or_overflow():
    norms = [2.0] * 10 + [50.0, 50.0, 2.0, 0.0, 0.0, 2.0, math.inf]
    found = sound(Alarms(SETTINGS, 99), [{"gradient_norm": norm} for norm in norms])
    assert [step for step, _ in found] == [11, 14, 17]
    assert "the gradient's norm is 50, 25 times the usual 2" in found[0][1]
    assert "the gradient's norm is 0: no weight is learned" in found[1][1]
    assert "the gradient's norm is inf" in found[2][1]


def test_collapsed_features_after_the_warm_up():
    series = [{"image_feature_spread": 0.001, "text_feature_spread": 0.4}] * 15
    found = sound(Alarms(SETTINGS, 99), series)
    assert [step for step, _ in found] == [11]
    assert "the features of all images are nearly the same (spread 0.001" in found[0][1]


def test_steps_without_a_measurement_do_not_end_a_stretch():
    series = [{"gradient_norm": 0.0}, {}, {"gradient_norm": 0.0}, {"neighbor_table": "captions"}]
    assert len(sound(Alarms(SETTINGS, 99), series)) == 1
