import pickle

import pytest

from declip_filter.expressions import Limit, WholeFigure, limits, parse
from declip_shards import DeclipError


def test_lines_of_an_expression_are_joined():
    for text in ("\n a < 3\n or b == '#'\n", "a < 3\r\nor b == '#'", "a < 3 or b == '#'"):
        assert parse(text).text == "a < 3 or b == '#'"


def test_whose_values_matter_is_known_beforehand():
    found = parse("missing(a) or not missing(b) and b > 1 or count(c) > 2 or matches(d, 'x') or e")
    assert found.columns == ("a", "b", "c", "d", "e")
    assert found.compared == ("b", "c", "d", "e")


def test_what_is_read_is_known_beforehand():
    found = parse("a < 3 or count(b) > 2 and (c in ['x'] or top_fraction(d, 0.25) and not e)")
    assert found.columns == ("a", "b", "c", "d", "e")
    assert found.figures == (WholeFigure("count", "b"), WholeFigure("top_fraction", "d", 0.25))
    assert [figure.name for figure in found.figures] == ["count(b)", "top_fraction(d, 0.25)"]
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "an expression is empty"),
        ("a <", "not an expression: .*At character 4 of\n  a <\n     \\^"),
        ("a = 3", r"Equality is written ==\. At character 3"),
        ("a is None", "'is' is not allowed; use == or missing"),
        ("a", None),
        ("3 < 4", "no signal is read"),
        ("a + 1", "this is no condition"),
        ("a if b else c", "this is no condition"),
        ("lambda: a", "this is no condition"),
        ("a.b > 1", r"this is not allowed; .*At character 1 of\n  a\.b > 1\n  \^\^\^$"),
        ("a[0] > 1", "this is not allowed"),
        ("[x for x in a] == 3", "this is not allowed"),
        ("f'{a}' == 'x'", "this is not allowed"),
        ("(b := 3) < a", "this is not allowed"),
        ("a ** 2 > 3", "this is not allowed"),
        ("a < (b < 3)", "a condition stands where a value is due"),
        ("__import__('os')", "'__import__' with these arguments is no function here"),
        ("a.system('x')", "'a.system' with these arguments is no function"),
        ("count(a=1)", "no function here"),
        ("missing(1)", r"used so: missing\(signal\)"),
        ("count(a, b) > 1", "it is used so: count"),
        ("a in b", "a list of constants"),
        ("a in []", "a list of constants"),
        ("a in [b]", "may hold constants only"),
        ("a in [1, 'x']", "must be of one kind"),
        ("matches(a, '(')", r"not a regular expression of RE2 .*At character 12"),
        ("matches(a, b)", "it is used so: matches"),
        ("top_fraction(a, 30)", r"above 0 and below 1\. At character 17"),
        ("top_fraction(a, 0)", "above 0 and below 1"),
        ("abs(a, b) > 1", "it is used so: abs"),
        ("min(a) > 1", "it is used so: min"),
        ("balanced_out(0)", "it is used so: balanced_out"),
        ("balanced_out(5) or a > 1", "must be the whole expression"),
        ("not balanced_out(5)", "must be the whole expression"),
        ("abs(balanced_out(5))", "must be the whole expression"),
        ("max(balanced_out(5), 1)", "must be the whole expression"),
        ("a < 1e999", r"a number must be finite and at most 1\.8e\+308; choose a smaller one"),
        ("a > -1e999", "a number must be finite"),
        ("a + 1e999 > 3", "a number must be finite"),
        ("a in [1, 1e999]", "a number must be finite"),
        ("a < 1" + "0" * 400, "a number must be finite"),
        ("a < 3 # few", "has a comment, '# few'; leave it out"),
        ("a < 3 # few\n or b > 2", "has a comment, '# few'; leave it out"),
        ('a == """x\n y"""', r"has a string of several lines, .*; write \\n for"),
        ("é < 3 and a.b > 1", r"At character 11 of\n  é < 3 and a\.b > 1\n {12}\^\^\^$"),
        ("(" * 300 + "a" + ")" * 300, "not an expression"),
        ("a < 1 or " * 3000 + "a < 1", "has 27005 characters; it may have 20000"),
        ("not " * 2000 + "a", "nested too deeply|not an expression"),
        ("a < 9" + "9" * 5000, "not an expression"),
    ],
)
def test_what_is_not_listed_is_refused_and_the_place_shown(text, sentence):
    if sentence is None:
        assert parse(text).columns == ("a",)
        return
    with pytest.raises(DeclipError, match=f"(?s){sentence}"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < 3", [("a", "<", 3, True)]),
        ("3 > a", [("a", "<", 3, True)]),
        ("not a < 3", [("a", ">=", 3, True)]),
        ("a < 3 or b > 1", [("a", "<", 3, True), ("b", ">", 1, True)]),
        ("a >= 4 and b > 1", [("a", ">=", 4, False), ("b", ">", 1, False)]),
        ("not (a >= 4 and b > 1)", [("a", "<", 4, True), ("b", "<=", 1, True)]),
        ("not (a < 3 or b > 1)", [("a", ">=", 3, False), ("b", "<=", 1, False)]),
        ("1 < a <= 4", [("a", ">", 1, False), ("a", "<=", 4, False)]),
        ("not 1 < a <= 4", [("a", "<=", 1, True), ("a", ">", 4, True)]),
        ("min(a, b) < 2", [("a", "<", 2, True), ("b", "<", 2, True)]),
        ("min(a, b) > 2", [("a", ">", 2, False), ("b", ">", 2, False)]),
        ("max(a, b) > 2", [("a", ">", 2, True), ("b", ">", 2, True)]),
        ("not top_fraction(a, 0.5)", [("a", "<", 0.125, True)]),
        ("bottom_fraction(b, 0.5)", []),
        ("s == 'x' or a == 3 or f or missing(a) or a / b > 3", []),
    ],
)
def test_limits_say_on_which_side_samples_are_dropped(text, expected):
    figures = {
        WholeFigure("top_fraction", "a", 0.5): 0.125,
        WholeFigure("bottom_fraction", "b", 0.5): None,
    }
    assert limits(parse(text), figures) == [Limit(*entry) for entry in expected]
