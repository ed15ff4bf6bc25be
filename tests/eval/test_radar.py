"""Radar and points: what is drawn lies where its value says, and what is missing is told."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from declip_eval.charts import MAX_SERIES
from declip_eval.radar import MAX_AXES, MIN_AXES, Profile, point_chart, radar_chart

NAMES = ["north", "east", "south", "west"]


def drawings(markup: str) -> list[ElementTree.Element]:
    """The SVGs of a figure, read as XML."""
    return [
        ElementTree.fromstring(svg)
        for svg in re.findall(r'<svg class="(?:wide|narrow)".*?</svg>', markup)
    ]


def circles(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Hover text -> where the point is."""
    return {
        (circle.findtext("title") or ""): (float(circle.get("cx", "")), float(circle.get("cy", "")))
        for circle in svg.iter("circle")
    }


def test_a_point_lies_in_its_axis_direction_as_far_as_its_value() -> None:
    profile = Profile(name="m", values=[10.0, 20.0, 30.0, 40.0])
    for svg in drawings(radar_chart(NAMES, [profile], title="t", unit="percent")):
        points = circles(svg)
        center = {
            (line.get("x1"), line.get("y1")) for line in svg.iter("line") if line.get("class")
        }
        ((x, y),) = center
        steps = [(px - float(x or 0), py - float(y or 0)) for px, py in points.values()]
        scale = math.hypot(*steps[3]) / 40
        for value, step, way in zip(
            profile.values, steps, [(0, -1), (1, 0), (0, 1), (-1, 0)], strict=True
        ):
            assert value is not None
            assert step == pytest.approx((way[0] * value * scale, way[1] * value * scale), abs=0.2)


def test_a_missing_value_breaks_the_outline_and_is_counted() -> None:
    whole = radar_chart(NAMES, [Profile(name="m", values=[1, 2, 3, 4])], title="t", unit="u")
    broken = radar_chart(NAMES, [Profile(name="m", values=[1, None, 3, 4])], title="t", unit="u")
    assert 'Z"' in whole
    assert 'Z"' not in broken
    assert "1 values missing" in broken
    for svg in drawings(broken):
        assert len(circles(svg)) == 3
        (path,) = [p for p in svg.iter("path") if p.get("class") == "series"]
        assert (path.get("d") or "").count("M") == 2
        assert "east missing" in (svg.findtext("desc") or "")


def test_points_and_intervals_lie_on_one_scale() -> None:
    profile = Profile(name="m", values=[-1.0, 0.0, 2.0], intervals=[(-2.0, 0.0), None, (1.0, 4.0)])
    chart = point_chart(NAMES[:3], [profile], title="t", unit="u", reference=("zero", 0.0))
    for svg in drawings(chart):
        xs = [x for x, _ in circles(svg).values()]
        ys = [y for _, y in circles(svg).values()]
        assert ys == sorted(ys)
        assert (xs[1] - xs[0]) * 2 == pytest.approx(xs[2] - xs[1], abs=0.3)
        paths = [p.get("d") or "" for p in svg.iter("path")]
        ends = [tuple(map(float, re.findall(r"^M([\d.]+) [\d.]+H([\d.]+)", d)[0])) for d in paths]
        unit = xs[1] - xs[0]
        assert ends[0] == pytest.approx((xs[0] - unit, xs[0] + unit), abs=0.3)
        assert ends[1] == pytest.approx((xs[2] - unit, xs[2] + 2 * unit), abs=0.3)
        (reference,) = [line for line in svg.iter("line") if line.get("class") == "reference"]
        assert float(reference.get("x1") or 0) == pytest.approx(xs[1], abs=0.1)


def test_a_value_may_lie_outside_its_interval() -> None:
    """A bootstrap's percentiles need not hold what they are about."""
    profile = Profile(name="m", values=[1.0], intervals=[(2.0, 3.0)])
    for svg in drawings(point_chart(NAMES[:1], [profile], title="t", unit="u")):
        assert len(circles(svg)) == 1


def test_a_missing_point_is_told_in_its_row() -> None:
    profiles = [Profile(name="a", values=[1.0, None]), Profile(name="b", values=[2.0, 3.0])]
    for svg in drawings(point_chart(NAMES[:2], profiles, title="t", unit="u")):
        assert "a: missing" in [text.text for text in svg.iter("text")]
        assert len(circles(svg)) == 3


def test_names_are_escaped() -> None:
    name = '<script>"x"</script>'
    for chart in (
        radar_chart([name, "b", "c"], [Profile(name=name, values=[1, 2, 3])], title=name, unit="u"),
        point_chart([name], [Profile(name=name, values=[1.0])], title=name, unit="u"),
    ):
        assert "<script>" not in chart
        assert drawings(chart)


@pytest.mark.parametrize(
    ("names", "profiles", "sentence"),
    [
        (NAMES[:2], [Profile(name="m", values=[1, 2])], f"holds {MIN_AXES} to {MAX_AXES} axes, no"),
        (NAMES, [], f"A chart holds 1 to {MAX_SERIES} models, not 0"),
        (NAMES, [Profile(name="m", values=[1])] * 9, "models, not 9: split it into several"),
        (NAMES, [Profile(name="m", values=[1, 2, 3])], "'m' has 3 values for 4 names"),
        (NAMES, [Profile(name="m", values=[1, 2, 3, -1])], "has -1 on 'west', .* from 0 on"),
        (NAMES, [Profile(name="m", values=[1, 2, 3, math.nan])], "has nan on 'west', but the"),
        (NAMES, [Profile(name="m", values=[None] * 4)], "Every value is missing"),
        (
            NAMES,
            [Profile(name="m", values=[1] * 4, intervals=[(0, 2)])],
            "'m' has 1 intervals for 4 names",
        ),
        (
            NAMES,
            [Profile(name="m", values=[1] * 4, intervals=[(3, 2)] * 4)],
            r"'m' has the interval \(3, 2\) of 1, but it needs",
        ),
    ],
)
def test_faults_of_a_radar_are_told(
    names: list[str], profiles: list[Profile], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        radar_chart(names, profiles, title="t", unit="u")


def test_points_need_a_row() -> None:
    with pytest.raises(ValueError, match="rows is empty: give at least one name"):
        point_chart([], [Profile(name="m", values=[])], title="t", unit="u")
