"""Numbers beside the losses, against plain computations."""

import math

import pytest
import torch
import torch.nn.functional as F

from declip_train.batch import Batch
from declip_train.watching import (
    feature_spreads,
    parameter_not_finite,
    rows_not_finite,
    spread,
)


def test_the_spread_is_the_standard_deviation_of_unit_vectors():
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) + 0.3
    unit = F.normalize(features, dim=-1)
    assert float(spread(features)) == pytest.approx(
        math.sqrt(float(unit.var(0, correction=0).sum())), rel=1e-5
    )
    assert float(spread(features)) == pytest.approx(float(spread(7 * features)), rel=1e-5)


def test_the_spread_lies_between_one_point_and_all_directions():
    assert float(spread(torch.ones(8, 4))) == pytest.approx(0, abs=1e-3)
    everywhere = torch.cat([torch.eye(4), -torch.eye(4)])
    assert float(spread(everywhere)) == pytest.approx(1)


def test_spreads_are_of_the_first_views_or_of_real_tokens():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(6, 2, 8, generator=generator) for _ in range(2))
    mask = torch.ones(6, 5, dtype=torch.bool)
    found = feature_spreads({"image_features": images, "text_features": texts}, mask)
    assert float(found["image_feature_spread"]) == float(spread(images[:, 0]))
    assert float(found["text_feature_spread"]) == float(spread(texts[:, 0]))
    patches, words = (torch.randn(6, 4, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([[True, True, False, False, False]]).repeat(6, 1)
    found = feature_spreads({"image_tokens": patches, "text_tokens": words}, mask)
    assert float(found["image_feature_spread"]) == float(spread(patches.mean(1)))
    assert float(found["text_feature_spread"]) == pytest.approx(
        float(spread(words[:, :2].mean(1))), rel=1e-5
    )


def test_one_sample_has_no_spread():
    one = {"image_features": torch.ones(1, 1, 4), "text_features": torch.ones(1, 1, 4)}
    assert feature_spreads(one, torch.ones(1, 3, dtype=torch.bool)) == {}


def test_rows_that_are_not_finite_are_found_also_by_their_masked_words():
    positions = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]).bool()
    batch = Batch(
        step=0,
        epoch=0,
        images=torch.zeros(1, 4, 3, 2, 2),
        token_ids=torch.zeros(4, 3, dtype=torch.long),
        sample_ids=torch.arange(4),
        caption_ids=torch.arange(4),
        mask_positions=positions,
    )
    features = torch.zeros(4, 2, 8)
    states = torch.zeros(4, 8)
    assert rows_not_finite({"image_features": features, "masked_states": states}, batch) == []
    features[3, 1, 2] = float("inf")
    states[2, 0] = float("nan")
    found = rows_not_finite({"image_features": features, "masked_states": states}, batch)
    assert found == [2, 3], "the third masked word is the third caption's"


def test_the_first_bad_parameter_is_named():
    second = torch.nn.Linear(2, 2)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), second)
    assert parameter_not_finite(module) is None
    with torch.no_grad():
        second.weight[0, 0] = float("nan")
        second.bias[0] = float("nan")
    assert parameter_not_finite(module) == "1.weight"
