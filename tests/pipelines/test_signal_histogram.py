"""The histogram draws each bin once, as high as its count, and each threshold in its place."""

import re
from itertools import pairwise

import pytest

from declip_eval.svg import NARROW, WIDE
from pipelines.signal_histogram import ALL_OPACITY, BOX_GAP, LEAST_WIDTH, Limit, binned_histogram


def bars(drawing: str) -> list[tuple[float, float, float, str]]:
    """(x, width, height, told) of each bar."""
    pattern = (
        r'<rect class="bar" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"[^>]*>'
        r"<title>([^<]*)</title>"
    )
    return [(float(x), float(w), float(h), told) for x, w, h, told in re.findall(pattern, drawing)]


def lines(drawing: str) -> list[float]:
    return [float(x) for x in re.findall(r'class="reference" x1="([\d.]+)"', drawing)]


def wide(chart: str) -> str:
    return chart[chart.index('class="wide"') : chart.index('class="narrow"')]


def test_bars_are_as_high_as_their_counts_and_as_wide_as_their_bins():
    chart = binned_histogram([0, 1, 2, 4], [4, 0, 2], title="words")
    found = bars(wide(chart))
    assert [told for *_, told in found] == ["0 to 1: 4", "2 to 4: 2"]
    assert found[0][2] == pytest.approx(2 * found[1][2], abs=0.2)
    assert 2 * (found[0][1] + 1) == pytest.approx(found[1][1] + 1, abs=0.4)
    assert len(bars(chart)) == 2 * len(found), "drawn for one width only"
    assert f"0 0 {WIDE} " in chart
    assert f"0 0 {NARROW} " in chart


def test_tails_stand_apart_and_the_axis_between_them_is_linear():
    edges = [-500.0, 0, 1, 2, 3, 4, 900]
    limits = [Limit("few <", 1.0), Limit("many >", 2.0), Limit("tail >", 450.0)]
    chart = wide(binned_histogram(edges, [1, 5, 5, 5, 5, 1], title="words", limits=limits))
    first, *inner, last = bars(chart)
    assert first[0] + first[1] + BOX_GAP < inner[0][0] + 1
    assert inner[-1][0] + inner[-1][1] + BOX_GAP < last[0] + 1
    steps = [right[0] - left[0] for left, right in pairwise(inner)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    few, many, tail = lines(chart)
    assert many - few == pytest.approx(steps[0], abs=0.2)
    assert last[0] < tail < last[0] + last[1]
    assert "from -500" in chart
    assert "to 900" in chart


def test_a_bin_too_narrow_to_be_seen_is_drawn_all_the_same():
    found = bars(wide(binned_histogram([0, 1e-40, 1], [9, 1], title="share")))
    assert all(width >= LEAST_WIDTH for _, width, *_ in found)


def test_kept_samples_stand_in_front_of_all():
    chart = wide(binned_histogram([0, 1, 2], [4, 3], kept=[1, 3], title="words"))
    found = bars(chart)
    assert [told for *_, told in found] == 2 * ["0 to 1: 4, 1 kept", "1 to 2: 3, 3 kept"]
    assert found[2][2] == pytest.approx(found[0][2] / 4, abs=0.2)
    assert found[3][:3] == found[1][:3]
    assert chart.count(f'fill-opacity="{ALL_OPACITY:.2f}"') == 2


def test_a_threshold_stands_at_its_value_and_one_beyond_at_the_end():
    limits = [Limit("few <", 5.0), Limit("many >", 1e6)]
    chart = wide(binned_histogram([0, 10, 20], [1, 1], title="words", limits=limits))
    found = bars(chart)
    first, last = lines(chart)
    assert found[0][0] < first < found[0][0] + found[0][1]
    assert first == pytest.approx(found[0][0] + found[0][1] / 2, abs=1)
    assert last == pytest.approx(found[1][0] + found[1][1] + 0.5, abs=0.3)
    assert "few &lt; 5" in chart
    assert "many &gt; 1M" in chart


@pytest.mark.parametrize(
    ("edges", "counts", "kept"), [([0], [], None), ([0, 1], [1, 2], None), ([0, 1], [1], [1, 1])]
)
def test_lengths_that_do_not_fit_are_refused(edges, counts, kept):
    with pytest.raises(ValueError, match="give one edge more than counts"):
        binned_histogram(edges, counts, title="words", kept=kept)
