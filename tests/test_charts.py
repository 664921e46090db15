"""The report's pictures: scales, the Pareto front, labels that keep clear of each other, thinned curves."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_result import made_up

from brickyard.compare import charts, report, scales, shown
from brickyard.compare.charts import Point
from brickyard.compare.scales import Axis
from brickyard.compare.shown import COSTS, Score

ACCURACY = shown.metric("accuracy")
positive = st.floats(1e-3, 1e15)


def score(mean: float, half: float = 0.01) -> Score:
    return Score(mean, mean - half, mean + half, (mean,))


def point(mean: float | None, cost: float | None, name: str = "x") -> Point:
    return Point(name, name, score(mean) if mean is not None else Score(None, None, None, ()), cost)


@given(st.lists(positive | st.just(0.0), min_size=1, max_size=12))
def test_a_cost_axis_holds_its_values_in_order_and_is_logarithmic_beyond_a_spread_of_20(values: list[float]) -> None:
    axis = scales.cost_axis(values, 60, 700)
    above = [v for v in values if v > 0]
    assert axis.log == bool(above and max(above) / min(above) > 20)
    places = [axis.at(v) for v in sorted(values)]
    assert places == sorted(places) and all(axis.has(v) for v in values) and places[0] >= 60 and places[-1] <= 700
    if axis.log and 0.0 in values:  # zero has a place of its own, clear of everything else
        assert axis.at(0.0) < axis.start <= axis.at(min(above)) - 1e-9


@pytest.mark.parametrize(("spread", "log"), [(19.9, False), (20.1, True)])
def test_a_spread_of_20_is_where_an_axis_turns_logarithmic(spread: float, log: bool) -> None:
    assert scales.cost_axis([3.0, 3.0 * spread], 0, 100).log is log
    assert scales.cost_axis([0.0, 3.0, 3.0 * spread], 0, 100).log is log


@settings(max_examples=60)
@given(st.lists(positive, min_size=2, max_size=6), st.sampled_from(COSTS))
def test_ticks_are_few_on_the_axis_and_written_differently(values: list[float], cost: shown.Cost) -> None:
    axis = scales.cost_axis(values, 0, 500)
    ticks = scales.cost_ticks(axis, cost, 5)
    assert len(ticks) <= 7 and all(axis.low <= t <= axis.high * (1 + 1e-9) for t in ticks)
    assert len({cost.show(t) for t in ticks}) == len(ticks)


def test_an_axis_pins_what_lies_outside() -> None:
    axis = Axis(1, 100, 0, 10, log=True)
    assert axis.at(10) == pytest.approx(5) and axis.at(1e9) == 10 and axis.at(1e-9) == 0 and not axis.has(101)
    assert Axis(3, 3, 0, 10).at(3) == 5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=10), st.booleans())
def test_the_front_is_what_nothing_beats(given_points: list[tuple[int, int]], lower: bool) -> None:
    points = [point(float(q), float(c)) for q, c in given_points]
    sign = -1 if lower else 1
    for i, p in enumerate(charts.with_front(points, lower)):
        quality, cost = given_points[i]
        beaten = any(sign * q >= sign * quality and c <= cost and (q, c) != (quality, cost) for q, c in given_points)
        assert p.front is not beaten


def test_an_arm_without_a_figure_is_on_no_front_and_in_no_picture() -> None:
    points = [point(0.9, 5, "known"), point(0.95, None, "unmeasured"), point(None, 1, "failed")]
    assert [p.front for p in charts.with_front(points)] == [True, False, False]
    picture = charts.quality_cost(points, ACCURACY, COSTS[0])
    assert "known" in picture and "unmeasured" not in picture and "failed" not in picture


def test_the_scale_follows_the_better_half_and_names_the_rest_at_the_edge() -> None:
    scores = [score(m) for m in (0.86, 0.85, 0.84, 0.12)]
    low, high = scales.focus(scores)
    assert 0.80 < low < 0.83 and 0.87 < high < 0.88
    low, high = scales.focus([score(-s.mean) for s in scores if s.mean], lower_is_better=True)
    assert -0.88 < low < -0.87 and -0.83 < high < -0.80
    points = [Point(n, n, s, c) for n, s, c in zip("abcd", scores, (1, 2, 3, 4), strict=True)]
    for picture in (charts.quality_cost(points, ACCURACY, COSTS[2]), charts.strip(points, ACCURACY)):
        assert "12.0\u00a0%" in picture
    assert scales.focus([]) == (0.0, 1.0)


@pytest.mark.parametrize(("width", "height", "limit"), [(860, 440, 26), (340, 380, 17)])
@pytest.mark.parametrize("cost", [COSTS[0], COSTS[1], COSTS[3]])
def test_labels_keep_clear_of_each_other(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int, limit: int, cost: shown.Cost
) -> None:
    boxes: list[charts.Box] = []
    place = charts.place

    def watched(*arguments: object) -> list[charts.Box]:
        boxes.extend(place(*arguments))  # type: ignore[arg-type]
        return boxes

    monkeypatch.setattr(charts, "place", watched)
    points = [p for p in report._points(made_up(failed=False), cost, limit) if p.cost is not None]
    charts.quality_cost(points, ACCURACY, cost, width, height)
    assert len(boxes) == len(points)
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= width and a[1] >= 0 and a[3] <= height
        assert not [b for b in boxes[:i] if charts._overlap(a, b) > 1]


def test_error_bars_reach_from_low_to_high() -> None:
    points = [Point("a", "a", Score(0.5, 0.4, 0.6, ()), 1.0), Point("b", "b", Score(0.7, 0.65, 0.75, ()), 2.0)]
    root = ElementTree.fromstring(charts.quality_cost(points, ACCURACY, COSTS[3]))
    bars = [e.get("d", "") for e in root.iter() if (e.get("class") or "").startswith("bar")]
    axis = Axis(*scales.focus([p.score for p in points]), 440 - 48 - 14, 30)
    for bar, p in zip(bars, points, strict=True):
        assert p.score.low is not None and p.score.high is not None
        assert f" {axis.at(p.score.low):.1f}h8" in bar and f"V{axis.at(p.score.high):.1f}m" in bar


def test_every_seed_is_a_ring() -> None:
    s = Score(0.5, 0.45, 0.55, (0.48, 0.5, 0.52))
    for width in (860, 340):
        root = ElementTree.fromstring(charts.strip([Point("a", "a", s)], ACCURACY, width))
        assert sum((e.get("class") or "").startswith("seed") for e in root.iter()) == 3


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    curve = [(float(i), math.sin(i / 300)) for i in range(1000)]
    shared, panels = charts.curve_panels({"a": [curve], "b": [curve[:2]], "c": [[(5.0, 0.1)]], "d": []}, "g", str, "a")
    assert list(panels) == ["a", "b", "c", "d"] and 'id="g"' in shared and 'href="#g"' in panels["a"]
    line = next(e for e in ElementTree.fromstring(panels["a"]).iter() if e.get("class") == "curve best")
    drawn = line.get("d", "")[1:].replace("L", " ").split()
    assert len(drawn) == 2 * charts.MOST_POINTS and (drawn[0], drawn[-2]) == ("38.0", "170.0")
    assert charts.curve_panels({}, "g", str) == ("", {})


def test_names_are_shortened_to_different_texts() -> None:
    names = [
        "lora:r=8,alpha=16,lr=0.001",
        "lora:r=8,alpha=16,lr=0.002",
        "lora:r=8,alpha=16,lr=0.003",
        "ok",
        "漢字" * 20,
    ]
    shown_names = shown.short_names(names, 14)
    assert len(set(shown_names.values())) == 5 and shown_names["ok"] == "ok"
    assert all(shown.width(text) <= 14 for text in shown_names.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (shown.count(99_999), "99,999"),
        (shown.count(1_234_567), "1.23 M"),
        (shown.size(0), "0 B"),
        (shown.size(1023.9), "1.00 KiB"),
        (shown.size(5 * 2**30), "5.00 GiB"),
        (shown.mebibytes(2**19), "0.500"),
        (shown.mebibytes(2000), "< 0.01"),
        (shown.mebibytes(0), "0"),
        (shown.milliseconds(0.25), "0.250 ms"),
        (shown.duration(0.302), "302 ms"),
        (shown.duration(245), "4 min 5 s"),
        (shown.duration(7260), "2 h 1 min"),
        (shown.digits(99.96), "100"),
        (shown.digits(1234.5), "1,234"),
        (shown.probability(0.00001), "< 0.001"),
        (shown.probability(0.0123), "0.012"),
        (shown.metric("accuracy").show(0.8421), "84.2 %"),
        (shown.metric("matthews").show(-0.25), "−0.250"),
        (shown.metric("accuracy").show(-0.0001, sign=True), "0.0"),
        (shown.metric("accuracy").show(None), "–"),
    ],
)
def test_figures_are_written_with_their_units(text: str, expected: str) -> None:
    assert text.replace("\u00a0", " ") == expected
