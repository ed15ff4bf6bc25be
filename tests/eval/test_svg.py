"""SVG's elements say what they were given, escaped, and short."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_eval.svg import clip, drawing, line_element, pixels, rect_element, text_element


@given(st.floats(-1e6, 1e6))
def test_pixels_are_read_back_to_a_tenth(value):
    assert float(pixels(value)) == pytest.approx(value, abs=0.051)


@given(st.text(), st.integers(1, 50))
def test_clipping_keeps_the_limit_and_short_text(text, limit):
    short = clip(text, limit)
    assert len(short) <= max(limit, 2)
    assert short == text or (short[-1] == "…" and text.startswith(short[:-1]))


def test_a_drawing_is_well_formed_and_its_text_survives():
    evil = '<b a="1">&</b>'
    body = (
        text_element(1, 2, evil, full=evil + "!")
        + line_element(0, 0, 1, 1, "x")
        + rect_element(0, 0, 5, 5, "bar", evil, opacity=0.5)
    )
    root = ET.fromstring(drawing(evil, evil, 10, 20, body, "wide"))
    assert root.attrib == {"class": "wide", "viewBox": "0 0 10 20", "role": "img"}
    title, description, text, line, rect = root
    assert title.text == description.text == evil
    assert text[0].text == evil + "!"
    assert line.attrib["x2"] == "1"
    assert rect.attrib["fill-opacity"] == "0.50"


def test_wide_characters_take_the_room_of_more():
    assert clip("W" * 20, 20) != "W" * 20
    assert len(clip("猫" * 40, 20)) < len(clip("a" * 40, 20))
