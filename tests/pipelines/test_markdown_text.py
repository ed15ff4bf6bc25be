"""Text from outside in Markdown: shown as it is, never obeyed."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.markdown_text import markdown_table, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ViT-B-32 declip_seed_2", "ViT-B-32 declip_seed_2"),
        ("3.9", "3.9"),
        ("a | b", r"a \| b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[click](javascript:x)", r"\[click\](javascript:x)"),
        ("![x](http://e.vil/p.png)", r"\!\[x\](http&#58;//e.vil/p.png)"),
        ("www.e.vil", "www&#46;e.vil"),
        ("# title", r"\# title"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("two\nlines\u2028more", "two lines more"),
        ("`code` *bold* _it_", r"\`code\` \*bold\* \_it\_"),
        ("AT&T &lt;", "AT&amp;T &amp;lt;"),
        ("\u202eright to left", "right to left"),
    ],
)
def test_marks_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(max_size=60))
def test_no_text_opens_markup_or_breaks_a_line(text: str) -> None:
    shown = plain(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]<>|]", shown)
    assert not re.search(r"(?i)\b(https?:|ftp:|www\.)", shown)


@given(st.text(alphabet="a|\\\n<", max_size=12), st.text(alphabet="a|\\\n<", max_size=12))
def test_a_row_keeps_its_number_of_cells(first: str, second: str) -> None:
    text = markdown_table(["x", "y"], [[plain(first), plain(second)]])
    for line in text.splitlines():
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3


def test_long_text_is_cut_with_an_ellipsis() -> None:
    assert plain("a" * 400) == "a" * 299 + "…"
    assert plain("a" * 400, 500) == "a" * 400


def test_numbers_are_aligned_to_the_right() -> None:
    assert markdown_table(["model", "value"], [["a", "1.5"]]).splitlines() == [
        "| model | value |",
        "| ----- | ----: |",
        "| a     |   1.5 |",
    ]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Row 1 has 1 cells, but the table has 2 columns"):
        markdown_table(["x", "y"], [["only"]])
