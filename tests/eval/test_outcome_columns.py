"""Columns of outcomes: arrow inverts numpy, files have no padding, wrong columns are named."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_eval.outcome_columns import (
    check_columns,
    check_keys,
    columns_equal,
    from_arrow,
    pad_to,
    padding,
    to_arrow,
)

COLUMNS = {
    "label": np.array([0, 1], dtype=np.int32),
    "rank": np.array([0, 1], dtype=np.int32),
    "predicted": np.array([[0], [0]], dtype=np.int32),
    "scores": np.array([[0.5], [0.25]], dtype=np.float32),
}
KEYS = ["a", "b"]

ENTRIES = {
    "int32": st.integers(0, 2**31 - 1),
    "float32": st.floats(width=32, allow_nan=False),
    "object": st.text(min_size=1),
}
NAMES = {"int32": "predicted", "float32": "scores", "object": "best"}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(ENTRIES)))
def test_arrow_inverts_numpy_and_keeps_no_padding(data, dtype):
    rows = data.draw(st.lists(st.lists(ENTRIES[dtype], max_size=4), max_size=6))
    width = max((len(row) for row in rows), default=0)
    table = np.full((len(rows), width), padding(np.dtype(dtype)), dtype=dtype)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    stored = to_arrow(NAMES[dtype], table)
    assert stored.to_pylist() == rows
    again = from_arrow(NAMES[dtype], pa.chunked_array([stored]), None)
    assert again.dtype == table.dtype
    assert columns_equal(again, table)


def test_labels_are_class_numbers_in_the_file():
    labels = np.array([[True, False, True], [False, False, False]])
    stored = to_arrow("labels", labels)
    assert stored.to_pylist() == [[0, 2], []]
    assert columns_equal(from_arrow("labels", pa.chunked_array([stored]), 3), labels)


def test_padding_widens_without_a_new_entry():
    wide = pad_to(np.array([[3]], dtype=np.int32), 3)
    assert to_arrow("predicted", wide).to_pylist() == [[3]]
    assert pad_to(wide, 3) is wide


def check(kind="classification", keys=KEYS, num_classes=2, **changes):
    columns = {**COLUMNS, **changes}
    columns = {name: column for name, column in columns.items() if column is not None}
    check_columns(kind, keys, columns, num_classes)
    check_keys(kind, keys, columns)


def test_right_columns_pass():
    check()
    check(score=np.zeros(2), overlap=np.zeros(2, dtype=bool))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "guess"}, "kind is 'guess', but must be one of classification, multilabel, ret"),
        ({"rank": None}, "classification outcomes lack the column 'rank'"),
        ({"mood": np.zeros(2)}, "classification outcomes do not take the column 'mood'"),
        ({"rank": np.zeros(2)}, r"column 'rank' is float64 of shape \(2,\), but must be int32"),
        ({"rank": np.zeros(3, np.int32)}, "one row for each of the 2 keys"),
        ({"predicted": np.zeros(2, np.int32)}, "must be int32 with 2 dimension"),
        ({"label": np.array([-1, 0], np.int32)}, "'label' and 'rank' must hold numbers from 0 on"),
        ({"num_classes": None}, "num_classes is None, but classification needs at least 1 class"),
        ({"keys": ["a", "a"]}, "The key 'a' is no text or occurs twice"),
        ({"keys": ["a", 3]}, "The key 3 is no text or occurs twice"),
    ],
)
def test_wrong_columns_are_refused_by_name(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(**changes)


def test_multilabel_and_retrieval_have_rules_of_their_own():
    labels, scores = np.zeros((2, 3), dtype=bool), np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="column 'labels' has 3 classes, but num_classes is 4"):
        check_columns("multilabel", KEYS, {"labels": labels, "scores": scores}, 4)
    with pytest.raises(ValueError, match="column 'scores' holds NaN"):
        check_columns("multilabel", KEYS, {"labels": labels, "scores": scores * np.nan}, 3)
    columns = {
        "direction": np.array(["image", "sound"], dtype=object),
        "rank": np.zeros(2, dtype=np.int32),
        "best": np.array([["x"], ["y"]], dtype=object),
        "scores": np.zeros((2, 1), dtype=np.float32),
    }
    with pytest.raises(ValueError, match="direction holds 'sound', but must be image or text"):
        check_columns("retrieval", KEYS, columns, None)
    columns["direction"] = np.array(["image", "text"], dtype=object)
    check_keys("retrieval", ["a", "a"], columns)  # A text and an image may share a name.
