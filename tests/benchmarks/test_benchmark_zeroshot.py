"""The pictures of the zero-shot benchmark, and how its figures are made."""

import numpy as np
import pytest
from PIL import Image

import zeroshot


@pytest.mark.parametrize(
    ("size", "number"), [((255, 900), 0), ((256, 900), 1), ((600, 512), 5), ((800, 1000), 14)]
)
def test_no_picture_is_enlarged(size, number):
    found = list(zeroshot.windows(Image.new("RGB", size)))
    assert len(found) == number
    assert all(min(image.size) == zeroshot.SHORT_SIDE for image in found)


def row(wall, processor, scores):
    return {
        "wall_seconds": wall,
        "processor_seconds": processor,
        "by_part": {"all": processor},
        "acc1": 0.5,
        "scores": np.array(scores, np.float32),
    }


def test_ours_is_compared_with_the_best_round_of_the_better_peer():
    scores = [[0.1, 0.2], [0.4, 0.3]]
    found = zeroshot.summarize(
        {
            "ours, cold": [row(2.0, 3.0, scores), row(4.0, 2.0, scores)],
            "ours, again": [row(1.0, 1.0, [[0.2, 0.1], [0.4, 0.3]])],
            "open_clip": [row(9.0, 8.0, scores), row(10.0, 7.0, scores)],
            "open_clip, 2 worker processes": [row(8.0, 12.0, scores)],
        }
    )
    assert found["times_open_clip"] == {
        "ours, cold": {"wall_seconds": 4.0, "processor_seconds": 3.5},
        "ours, again": {"wall_seconds": 8.0, "processor_seconds": 7.0},
    }
    equality = found["equality"]
    assert equality["ours, cold"]["share_of_equal_predictions"] == 1
    assert equality["ours, cold"]["largest_difference"] == 0
    assert equality["ours, again"]["share_of_equal_predictions"] == 0.5
    assert equality["ours, again"]["largest_difference"] == pytest.approx(0.1)
