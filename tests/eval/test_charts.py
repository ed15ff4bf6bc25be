"""Charts put the data where the axes say, and refuse what they cannot show."""

from __future__ import annotations

import re

import numpy as np
import pytest

from declip_eval.charts import MAX_SERIES, Series, bar_chart, histogram, line_chart
from declip_eval.svg import NARROW, WIDE


def draw_lines(series, **settings):
    return line_chart(series, **{"title": "t", "x_label": "step", "y_label": "nats", **settings})


def drawing_of(markup, kind="wide"):
    found = re.search(rf'<svg class="{kind}".*?</svg>', markup, re.DOTALL)
    assert found is not None
    return found.group()


def paths(markup, kind="series"):
    """The (x, y) points of each piece of each line in the wide drawing."""
    return [
        [
            [tuple(map(float, point.split())) for point in piece.split("L")]
            for piece in data.split("M")[1:]
        ]
        for data in re.findall(rf'<path class="{kind}"[^>]* d="([^"]*)"/>', drawing_of(markup))
    ]


def bars(markup, drawing="wide"):
    pattern = r'<rect class="bar" x="([^"]*)" y="([^"]*)" width="([^"]*)" height="([^"]*)"'
    return [tuple(map(float, match)) for match in re.findall(pattern, drawing_of(markup, drawing))]


def test_a_straight_line_is_drawn_straight_and_up():
    (((*points,),),) = paths(draw_lines([Series(name="a", x=[0, 1, 2], y=[0, 5, 10])]))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert y2 < y1 < y0  # Up is less in SVG.
    assert 0 <= x0 < x2 <= WIDE


def test_a_logarithmic_axis_makes_a_line_of_powers():
    (((*points,),),) = paths(
        draw_lines([Series(name="a", x=[0, 1, 2], y=[0.01, 0.1, 1])], log_y=True)
    )
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.11)


def test_missing_values_are_gaps_and_are_said():
    y = [1, 2, float("nan"), 3, float("inf"), 4]
    markup = draw_lines([Series(name="a", x=range(6), y=y)])
    ((*pieces,),) = paths(markup)
    assert [len(piece) for piece in pieces] == [2, 1 + 1, 1 + 1]  # A lone point gets a length.
    assert "2 values are not finite: gaps" in markup


def test_thinning_keeps_the_extremes():
    y = np.zeros(50_000)
    y[31_415] = 100
    ((line,),) = paths(draw_lines([Series(name="a", x=range(50_000), y=y)]))
    assert len(line) <= 4 * WIDE
    spike = min(line, key=lambda point: point[1])
    left, right = line[0][0], line[-1][0]
    assert spike[0] == pytest.approx(left + 31_415 / 49_999 * (right - left), abs=1)


def test_running_mean_equals_a_plain_loop_and_keeps_the_measured_values():
    y = np.random.default_rng(0).random(60)
    y[17] = np.nan
    plain = [
        float(np.nanmean(y[max(0, i - 4) : i + 1])) if np.isfinite(y[i]) else float("nan")
        for i in range(60)
    ]
    # Lines at 0 and 1 keep the axes equal, so that equal values are equal pixels.
    frame = [Series(name=f"{v}", x=range(60), y=np.full(60, v)) for v in (0, 1)]
    measured = [Series(name="a", x=range(60), y=y), *frame]
    smooth = draw_lines(measured, running_mean=5)
    assert paths(smooth, "series raw") == paths(draw_lines(measured))
    expected = draw_lines([Series(name="a", x=range(60), y=plain), *frame])
    assert paths(smooth) == paths(expected)
    assert "mean of 5 points, measured values faint" in smooth


def test_lines_differ_by_color_and_name():
    many = [Series(name=f"s{i}", x=[0, 1], y=[i, i]) for i in range(MAX_SERIES)]
    markup = draw_lines(many)
    styles = re.findall(r'<path class="series" style="stroke:var\(--(s\d)\)"([^>]*) d=', markup)
    assert len(set(styles)) >= MAX_SERIES
    assert all(f"</svg>s{i}</li>" in markup for i in range(MAX_SERIES))


def test_each_chart_comes_wide_and_narrow_with_a_name_for_those_who_do_not_see_it():
    for markup in (
        draw_lines([Series(name="a", x=[0, 1], y=[1, 2])]),
        bar_chart([("a", 1)], title="t", unit="u"),
        histogram([1, 2], title="t", x_label="x"),
    ):
        for kind, width in (("wide", WIDE), ("narrow", NARROW)):
            assert f'<svg class="{kind}" viewBox="0 0 {width} ' in markup
        assert markup.count('role="img"><title>t</title><desc>') == 2


@pytest.mark.parametrize("drawing", ["wide", "narrow"])
def test_bars_are_as_long_as_their_values(drawing):
    markup = bar_chart([("a", 10), ("b", 5), ("c", 0)], title="t", unit="u")
    widths = [width for _, _, width, _ in bars(markup, drawing)]
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.1)
    assert widths[2] == 0


def test_the_reference_line_stands_at_its_value():
    markup = bar_chart([("a", 10), ("b", 4)], title="t", unit="u", reference=("chance", 4))
    left, _, width, _ = bars(markup)[1]
    x = float(re.findall(r'class="reference" x1="([^"]*)"', markup)[0])
    assert x == pytest.approx(left + width, abs=0.11)
    assert "chance 4" in markup


@pytest.mark.parametrize("drawing", ["wide", "narrow"])
def test_spreads_reach_as_far_to_both_sides_and_never_below_zero(drawing):
    markup = bar_chart([("a", 10), ("b", 2), ("c", 1)], title="t", unit="u", spreads=[2, 4, 0])
    (left, _, of_ten, _), *_ = bars(markup, drawing)
    lines = re.findall(
        r'class="spread" x1="([^"]*)" y1="([^"]*)" x2="([^"]*)" y2="([^"]*)"',
        drawing_of(markup, drawing),
    )
    lines = [[float(number) for number in line] for line in lines]
    ends = [(x1, x2) for x1, y1, x2, y2 in lines if y1 == y2]
    unit = of_ten / 10
    assert len(ends) == 2  # No line where the spread is 0.
    assert len(lines) == 6
    assert ends[0] == pytest.approx((left + 8 * unit, left + 12 * unit), abs=0.11)
    assert ends[1] == pytest.approx((left, left + 6 * unit), abs=0.11)
    assert "10 ± 2" in markup
    assert bar_chart([("a", 1)], title="t", unit="u", spreads=[0]) != bar_chart(
        [("a", 1)], title="t", unit="u"
    )
    with pytest.raises(ValueError, match="spreads has 1 values for 2 bars"):
        bar_chart([("a", 1), ("b", 1)], title="t", unit="u", spreads=[1])
    with pytest.raises(ValueError, match="The spread of 'a' is -1, but it is a distance"):
        bar_chart([("a", 1)], title="t", unit="u", spreads=[-1])


def test_bars_of_nothing_are_drawn():
    assert [width for _, _, width, _ in bars(bar_chart([("a", 0)], title="t", unit="u"))] == [0]


@pytest.mark.parametrize("seed", range(5))
def test_histogram_counts_every_value_once(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(10.0**seed, 3, 500)
    markup = histogram(values, title="t", x_label="x")
    wide = drawing_of(markup)
    counts = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+)</title></rect>", wide)]
    assert sum(counts) == 500
    assert len(counts) <= 32
    heights = [height for *_, height in bars(markup)]
    assert heights == pytest.approx([n / max(counts) * max(heights) for n in counts], abs=0.11)


def test_histogram_of_one_value_and_on_a_logarithmic_axis():
    assert "3 values from 7 to 7, median 7" in histogram([7, 7, 7], title="t", x_label="x")
    heights = [h for *_, h in bars(histogram([1] * 999 + [2], title="t", x_label="x", log_y=True))]
    assert min(heights) > 3  # A count of one can be seen beside a thousand.


def test_what_cannot_be_drawn_is_refused():
    good = Series(name="a", x=[0, 1], y=[1, 2])
    with pytest.raises(ValueError, match="holds 1 to 8 series, not 0"):
        draw_lines([])
    with pytest.raises(ValueError, match="holds 1 to 8 series, not 9: split it"):
        draw_lines([good] * 9)
    with pytest.raises(ValueError, match=r"Series 'a' goes down to 0\.0, which has no logarithm"):
        draw_lines([Series(name="a", x=[0, 1], y=[0, 1])], log_y=True)
    with pytest.raises(ValueError, match="Series 'a' has x that are not finite and ascending"):
        draw_lines([Series(name="a", x=[1, 0], y=[0, 1])])
    with pytest.raises(ValueError, match=r"has x of shape \(2,\) and y of shape \(1,\)"):
        draw_lines([Series(name="a", x=[1, 2], y=[0])])
    with pytest.raises(ValueError, match="Series 'a' has no finite value: leave it out"):
        draw_lines([Series(name="a", x=[1], y=[float("nan")])])
    with pytest.raises(ValueError, match="running_mean is 0"):
        draw_lines([good], running_mean=0)
    with pytest.raises(ValueError, match="The reference line is nan"):
        draw_lines([good], reference=("r", float("nan")))
    with pytest.raises(ValueError, match="bars is empty"):
        bar_chart([], title="t", unit="u")
    with pytest.raises(ValueError, match="The bar 'a' is -1, but bars start at 0"):
        bar_chart([("a", -1)], title="t", unit="u")
    with pytest.raises(ValueError, match="values is empty"):
        histogram([], title="t", x_label="x")
    with pytest.raises(ValueError, match="values holds NaN or infinity"):
        histogram([1, float("nan")], title="t", x_label="x")
    with pytest.raises(ValueError, match="num_bins is 1, but a histogram needs at least 2"):
        histogram([1, 2], title="t", x_label="x", num_bins=1)
