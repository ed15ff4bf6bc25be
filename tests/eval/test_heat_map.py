"""The heat map shows each row's shares, and refuses what nobody could read."""

from __future__ import annotations

import re

import numpy as np
import pytest

from declip_eval.heat_map import MAX_HEAT_CLASSES, heat_map


def test_every_cell_with_counts_is_drawn_at_its_place():
    matrix = np.array([[3, 1, 0], [0, 4, 0], [2, 0, 2]])
    markup = heat_map(matrix, ["a", "b", "c"], title="t")
    cells = re.findall(
        r'<rect class="heat" x="([\d.]+)" y="([\d.]+)"[^>]*><title>(\w) → (\w): (\d+) \((\d+)%\)',
        markup,
    )
    seen = {(row, column): (int(n), int(share)) for _, _, row, column, n, share in cells}
    assert seen == {
        ("a", "a"): (3, 75), ("a", "b"): (1, 25), ("b", "b"): (4, 100),
        ("c", "a"): (2, 50), ("c", "c"): (2, 50),
    }  # fmt: skip
    place = {(row, column): (float(x), float(y)) for x, y, row, column, *_ in cells}
    assert place["a", "a"][0] < place["a", "b"][0]  # Columns go right,
    assert place["a", "a"][1] < place["c", "a"][1]  # rows go down.
    assert "3 classes, 12 samples, 75.0% on the diagonal" in markup


def test_rows_without_samples_and_empty_matrices_are_drawn():
    assert 'class="heat"' not in heat_map(np.zeros((2, 2)), ["a", "b"], title="t")


def test_scaling_the_counts_changes_no_shade():
    matrix = np.random.default_rng(0).integers(0, 9, (40, 40))
    labels = [f"class {i}" for i in range(40)]
    shades = [
        re.findall(r'fill-opacity="([^"]*)"', heat_map(m, labels, title="t"))
        for m in (matrix, matrix * 10)
    ]
    assert shades[0] == shades[1]
    assert len(shades[0]) > 100


def test_what_cannot_be_read_is_refused():
    many = MAX_HEAT_CLASSES + 1
    with pytest.raises(ValueError, match=r"61 classes are too many .* zeroshot\.group_confusion"):
        heat_map(np.eye(many), ["x"] * many, title="t")
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 3\) for 2 labels"):
        heat_map(np.ones((2, 3)), ["a", "b"], title="t")
    with pytest.raises(ValueError, match="negative or non-finite"):
        heat_map(-np.eye(2), ["a", "b"], title="t")
