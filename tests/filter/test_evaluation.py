import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from declip_filter.evaluation import as_column, evaluate
from declip_filter.expressions import WholeFigure, parse
from declip_shards import DeclipError

# A plain loop in Python over one row at a time: what the columns' operations must equal. A value is
# None where it is missing.
KINDS = {"i": pa.int32(), "j": pa.int64(), "f": pa.float32(), "d": pa.float64()}
ROW = st.fixed_dictionaries(
    {
        "i": st.none() | st.integers(-5, 5),
        "j": st.none() | st.integers(-5, 5),
        "f": st.none() | st.sampled_from([-1.5, -0.1, 0.0, 0.1, 3.1, math.nan, math.inf]),
        "d": st.none() | st.sampled_from([-2.0, -0.1, 0.0, 0.1, 3.1, math.nan]),
        "s": st.none() | st.sampled_from(["", "en", "de", "een"]),
        "b": st.none() | st.booleans(),
    }
)


def read(row, name):
    value = row[name]
    if isinstance(value, float):
        return None if math.isnan(value) else float(np.float32(value)) if name == "f" else value
    return value


def both(a, b, work):
    return None if a is None or b is None else work(a, b)


def kleene_and(a, b):
    return False if a is False or b is False else None if a is None or b is None else True


def kleene_or(a, b):
    return True if a is True or b is True else None if a is None or b is None else False


def finite(value):
    return value if value is not None and math.isfinite(value) else None


ARITHMETIC = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan,
}
COMPARE = {
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip
SIGNAL = st.sampled_from("ijfd").map(lambda n: (n, lambda row: read(row, n)))
CONSTANT = st.sampled_from([-2, 0, 1, 3, 0.1, 3.1, -0.5])


def constant_for(name, value):
    """A constant stands against a column of single precision in single precision."""
    return float(np.float32(value)) if name == "f" else value


def number(depth):
    if not depth:
        return SIGNAL
    inner = number(depth - 1)
    computed = st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda t: (
            f"({t[0][0]} {t[1]} {t[2][0]})",
            lambda row: finite(both(t[0][1](row), t[2][1](row), ARITHMETIC[t[1]])),
        )
    )
    extreme = st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
        lambda t: (
            f"{t[0]}({t[1][0]}, {t[2][0]})",
            lambda row: both(t[1][1](row), t[2][1](row), {"min": min, "max": max}[t[0]]),
        )
    )
    return SIGNAL | computed | extreme


def condition(depth):
    against_constant = st.tuples(SIGNAL, st.sampled_from(list(COMPARE)), CONSTANT).map(
        lambda t: (
            f"{t[0][0]} {t[1]} {t[2]}",
            lambda row: both(t[0][1](row), constant_for(t[0][0], t[2]), COMPARE[t[1]]),
        )
    )
    against_number = st.tuples(number(1), st.sampled_from(list(COMPARE)), number(1)).map(
        lambda t: (
            f"{t[0][0]} {t[1]} {t[2][0]}",
            lambda row: both(t[0][1](row), t[2][1](row), COMPARE[t[1]]),
        )
    )
    listed = st.tuples(SIGNAL, st.booleans(), st.lists(CONSTANT, min_size=1, max_size=3)).map(
        lambda t: (
            f"{t[0][0]} {'not ' * t[1]}in {t[2]}",
            lambda row: both(
                t[0][1](row),
                [constant_for(t[0][0], c) for c in t[2]],
                lambda value, wanted: (value in wanted) != t[1],
            ),
        )
    )
    texts = st.sampled_from(
        [
            ("s == 'en'", lambda row: both(row["s"], "en", COMPARE["=="])),
            (
                "s not in ['en', '']",
                lambda row: both(row["s"], 0, lambda s, _: s not in ("en", "")),
            ),
            ("matches(s, '^e+n$')", lambda row: both(row["s"], 0, lambda s, _: s in ("en", "een"))),
            ("missing(s)", lambda row: row["s"] is None),
            ("missing(f)", lambda row: read(row, "f") is None),
            ("b", lambda row: row["b"]),
            ("b == false", lambda row: both(row["b"], False, COMPARE["=="])),
            ("-1 < i <= 3", lambda row: both(row["i"], 0, lambda i, _: -1 < i <= 3)),
            ("abs(-j) > 2", lambda row: both(row["j"], 0, lambda j, _: abs(j) > 2)),
        ]
    )
    plain = against_constant | against_number | listed | texts
    if not depth:
        return plain
    inner = condition(depth - 1)
    negated = inner.map(
        lambda t: (f"not ({t[0]})", lambda row: {True: False, False: True}.get(t[1](row)))
    )
    joined = st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
        lambda t: (
            f"({t[0][0]}) {t[1]} ({t[2][0]})",
            lambda row: (kleene_and if t[1] == "and" else kleene_or)(t[0][1](row), t[2][1](row)),
        )
    )
    return plain | negated | joined


@runs(deadline=None, max_examples=150)
@given(condition(3), st.lists(ROW, min_size=1, max_size=12))
def test_columns_say_what_a_plain_loop_over_rows_says(made, rows):
    text, plain = made
    columns = {
        name: as_column(pa.array([row[name] for row in rows], KINDS.get(name))) for name in "ijfd"
    }
    columns["s"] = as_column(pa.array([row["s"] for row in rows], pa.string()))
    columns["b"] = as_column(pa.array([row["b"] for row in rows], pa.bool_()))
    found = evaluate(parse(text), columns, {}).to_pylist()
    assert found == [plain(row) for row in rows], text


COLUMNS = {
    "caption_words": as_column(pa.array([1, 2, None], pa.int32())),
    "share": as_column(pa.array([0.25, math.nan, 3.1], pa.float32())),
    "big": as_column(pa.array([0, 2**64 - 1, 5], pa.uint64())),
    "language": as_column(pa.chunked_array([["en"], [None, "de"]])),
    "flag": as_column(pa.array([True, False, None])),
    "empty": as_column(pa.nulls(3)),
    "boxes": as_column(pa.array([[1.0], [], None])),
    "when": as_column(pa.array([0, 1, None], pa.timestamp("us"))),
    "half": as_column(pa.array(np.array([1.5, 2, np.nan], np.float16))),
}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("caption_word < 3", r"no signal 'caption_word'\. Did you mean 'caption_words'\?.*\^{12}$"),
        ("language < 3", "a text cannot be compared with a number"),
        ("language == true", "a text cannot be compared with a boolean"),
        ("flag < true", "only be compared by == and !="),
        ("caption_words", "this is a number; compare it"),
        ("language + 1 > 3", "a number is due here, not a text"),
        ("language in [1, 2]", "a list of numbers has no text"),
        ("matches(share, 'x')", r"matches\(\) wants text, not a number"),
        ("top_fraction(language, 0.5)", r"top_fraction\(\) wants a number, not a text"),
        ("boxes == 3", "this is list<.*; only numbers, texts and booleans can be compared"),
        ("boxes == boxes", "this is list<.*name a column of those, or ask for missing"),
        ("when < when", r"this is timestamp\[us\]; only numbers"),
        ("when in ['2020']", r"this is timestamp\[us\]; only numbers"),
        ("count(boxes) > 3", r"this is list<.*\^"),
        ("count(when) > 3", r"this is timestamp"),
    ],
)
def test_values_of_another_kind_are_refused_at_their_place(text, sentence):
    with pytest.raises(DeclipError, match=f"(?s){sentence}"):
        evaluate(parse(text), COLUMNS, {WholeFigure("top_fraction", "language", 0.5): 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("share > 3.1", [False, None, False]),
        ("share >= 3.1", [False, None, True]),
        ("share in [3.1]", [False, None, True]),
        ("-big < 0", [False, True, True]),
        ("big > 9", [False, True, False]),
        ("caption_words < 99999999999999999999999", [True, True, None]),
        ("caption_words > -99999999999999999999999", [True, True, None]),
        ("half > 1.5", [False, True, None]),
        ("1 < 2 and flag", [True, False, None]),
        ("missing(boxes)", [False, False, True]),
        ("empty or empty < 3 or empty in ['x'] or matches(empty, 'x')", [None, None, None]),
        ("missing(empty) and not (min(empty, 3) > 2)", [None, None, None]),
        ("share / (share - share) > 0", [None, None, None]),
    ],
)
def test_limits_are_rounded_as_the_column_and_extremes_do_not_fail(text, expected):
    assert evaluate(parse(text), COLUMNS, {}).to_pylist() == expected


def test_a_fraction_without_any_value_says_nothing():
    figure = WholeFigure("top_fraction", "share", 0.3)
    assert evaluate(parse("top_fraction(share, 0.3)"), COLUMNS, {figure: None}).null_count == 3
    found = evaluate(parse("not top_fraction(share, 0.3)"), COLUMNS, {figure: 0.25})
    assert found.to_pylist() == [False, None, False]


def test_columns_come_in_one_piece_without_nan():
    found = as_column(pa.chunked_array([[1.0, math.nan], [None]]))
    assert found.to_pylist() == [1.0, None, None]
    assert as_column(pa.array(["a", "b"]).dictionary_encode()).type == pa.string()
    assert as_column(pa.chunked_array([], pa.int32())).to_pylist() == []
