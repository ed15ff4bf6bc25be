"""The report is self-contained, runs nothing it was given, and stays whole whatever is in it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from declip_eval import html
from declip_eval.charts import Series, bar_chart, histogram, line_chart
from declip_eval.heat_map import heat_map

EVIL = (
    "<script>alert('1')</script>\"><img src=x onerror=alert(2)> & \x00\ud800 https://evil.example"
)
VOID = {"meta", "img"}  # HTML's elements without an end; SVG's close themselves.


class Checker(HTMLParser):
    """Collects what a browser would see, and fails where tags do not close in order."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.stack == []
    return checker


def picture(size=(40, 30), mode="RGB", file_format="PNG"):
    rng = np.random.default_rng(0)
    channels = len(mode)
    image = Image.fromarray(
        rng.integers(0, 255, (size[1], size[0], channels), dtype=np.uint8), mode
    )
    file = io.BytesIO()
    image.save(file, file_format)
    return image, file.getvalue()


def full_page(text):
    """A page with every building block, all of them holding `text`."""
    image, data = picture()
    card = html.Card(image=html.image(image, alt=text), caption=text, note=text, tone="bad")
    plain = html.Card(image=None, caption=text)
    return html.page(
        text,
        [
            html.section(
                text,
                text,
                html.heading(text),
                html.paragraph(text),
                html.table([text, "n"], [[text, "1"], [html.code(text), "2"]], caption=text),
                html.callout(text, title=text, tone="warn"),
                html.details(text, text),
                lead=text,
                anchor="one",
            ),
            html.section(
                "Pictures",
                html.image_grid([card, plain], caption=text),
                html.neighbor_row(card, [(card, 0.5), (plain, 0.25)], score=text),
                html.pair_card(html.Card(image=html.image(data, alt=text), caption=text)),
            ),
            html.section(
                "Charts",
                line_chart(
                    [Series(name=text, x=[0, 1], y=[1, 2]), Series(name=text, x=[0, 1], y=[2, 1])],
                    title=text,
                    x_label=text,
                    y_label=text,
                    reference=(text, 1.5),
                ),
                bar_chart([(text, 1), (text, 2)], title=text, unit=text, reference=(text, 1)),
                histogram([1, 2, 3], title=text, x_label=text, reference=(text, 2)),
                heat_map(np.eye(2), [text, text], title=text, row_label=text, column_label=text),
            ),
        ],
        subtitle=text,
        summary=[html.stat_tiles([(text, text, text)]), text],
        footer=text,
    )


def test_hostile_text_is_shown_and_never_run():
    page = full_page(EVIL)
    seen = check(page)
    assert "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.tags.count("img") == len(re.findall(r"<img src=\"data:image/", page))
    assert "<script>alert('1')</script>" in "".join(seen.text)
    page.encode("utf-8")  # Lone surrogates are gone.
    assert "\x00" not in page


def test_hostile_text_changes_no_tag():
    # Of equal length, because a chart adds the whole text to a label that it had to shorten.
    assert check(full_page(EVIL)).tags == check(full_page("x" * len(EVIL))).tags


def test_nothing_is_loaded_from_anywhere():
    page = full_page("a cat")
    without_pictures = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.findall(r"https?://|//\w|@import|url\(|javascript:", without_pictures)
    seen = check(page)
    for name, value in seen.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
            assert value.startswith(("data:image/", "#")), (name, value)
    assert not {"script", "link", "iframe", "object", "base"} & set(seen.tags)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_equal_input_gives_equal_bytes():
    assert full_page("a cat") == full_page("a cat")


def test_every_link_of_the_navigation_has_its_section():
    seen = check(full_page("a cat"))
    links = {value[1:] for name, value in seen.attributes if name == "href"}
    ids = [value for name, value in seen.attributes if name == "id"]
    assert links == set(ids) == {"one", "pictures", "charts"}
    with pytest.raises(ValueError, match="Two sections have the anchor 'a': give one of them"):
        html.page("t", [html.section("A"), html.section("a")])


@given(st.text())
def test_escaping_is_undone_by_a_browser(text):
    clean = "".join(c for c in text if c.isprintable() or c == "\n")
    checker = Checker()
    checker.feed(f'<p title="{html.escape(clean)}">{html.escape(clean)}</p>')
    checker.close()
    assert "".join(checker.text) == clean
    assert checker.attributes == [("title", clean)]


def test_escaping_happens_once():
    assert html.escape(html.escape("<&>")) == "&lt;&amp;&gt;"
    assert html.join(["<", html.Markup("<b>"), "&"]) == "&lt;<b>&amp;"


def embedded(markup):
    ((mime_type, payload),) = re.findall(r'src="data:(image/\w+);base64,([^"]+)"', markup)
    data = base64.b64decode(payload, validate=True)
    return mime_type, data, Image.open(io.BytesIO(data))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_bytes_of_a_small_picture_are_embedded_as_they_are(file_format):
    _, data = picture(file_format=file_format)
    mime_type, got, _ = embedded(html.image(data, alt="x"))
    assert got == data
    assert mime_type == f"image/{file_format.lower()}"


@pytest.mark.parametrize("as_bytes", [True, False])
def test_a_large_picture_is_scaled_down_and_the_callers_is_left_alone(as_bytes):
    image, data = picture((400, 100))
    markup = html.image(data if as_bytes else image, alt="x", max_side=80)
    mime_type, _, got = embedded(markup)
    assert got.size == (80, 20)
    assert 'width="80" height="20"' in markup
    assert mime_type == "image/jpeg"
    assert image.size == (400, 100)


def test_transparency_is_kept():
    image, _ = picture(mode="RGBA")
    mime_type, _, got = embedded(html.image(image, alt="x"))
    assert mime_type == "image/png"
    assert np.array_equal(np.asarray(got), np.asarray(image))


def test_bad_pictures_and_settings_are_refused():
    image, data = picture()
    with pytest.raises(ValueError, match=r"9 bytes are no readable JPEG, PNG, WebP or GIF"):
        html.image(b"<svg/>   ", alt="x")
    with pytest.raises(ValueError, match="no readable"):
        html.image(data[: len(data) // 2], alt="x")
    with pytest.raises(ValueError, match="max_side is 0, but a picture has at least 1 pixel"):
        html.image(image, alt="x", max_side=0)
    with pytest.raises(ValueError, match="quality is 100, but JPEG's goes from 1 to 95"):
        html.image(image, alt="x", quality=100)
    with pytest.raises(ValueError, match="tone is 'great', but must be one of neutral, good"):
        html.callout("x", tone="great")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Row 1 has 1 cells, but the table has 2 columns"):
        html.table(["a", "b"], [["1", "2"], ["3"]])


def test_right_and_wrong_are_told_apart_without_color():
    right = html.pair_card(html.Card(image=None, caption="x", tone="good"))
    wrong = html.pair_card(html.Card(image=None, caption="x", tone="bad"))
    assert "✓" in right
    assert "✕" in wrong


def test_numbers_stand_right_and_text_left():
    markup = html.table(["a", "b", "c"], [["1", "2", "3"]], text_columns=(0, 2))
    assert markup.count('class="number"') == 2  # Head and cell of the middle column.
    assert '<td class="number">2</td>' in markup


def test_a_missing_caption_is_said_to_be_missing():
    picture = html.image(Image.new("RGB", (4, 4)), alt=" ")
    shown = html.pair_card(html.Card(image=picture, caption=" "))
    assert 'alt="a picture without a caption"' in shown
    assert "no caption" in shown
