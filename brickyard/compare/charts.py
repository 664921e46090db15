"""The report's pictures as SVG text: pure functions of numbers and names. Sizes are pixels of the picture's own frame.

Colours come from classes, so that one style sheet serves light, dark and print. A meaning never rests on colour alone:
the recommended arm is a diamond, arms on the front are filled, trivial baselines are squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from brickyard.compare.scales import LOG_SPREAD, Axis, cost_axis, cost_ticks, focus, plain, score_ticks
from brickyard.compare.shown import Cost, Metric, Score, visible, width

MOST_POINTS = 60  # a learning curve is thinned to this many points


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return one element, everything escaped; `class_` is written class, `_` becomes `-`, None is left out."""
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    written = "".join(f' {key}="{escape(_short(value))}"' for key, value in given)
    inner = "".join(child if isinstance(child, Markup) else escape(visible(child)) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>")


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else visible(value)


def _svg(w: float, h: float, label: str, *children: object, look: str = "chart") -> Markup:
    frame = f"0 0 {w:g} {h:g}"
    return tag("svg", *children, viewBox=frame, width=w, height=h, role="img", aria_label=label, class_=look)


def _text(words: str, look: str, x: float, y: float, anchor: str | None = None) -> Markup:
    return tag("text", words, class_=look, x=x, y=y, text_anchor=anchor)


def _line(look: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return tag("path", class_=look, d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")


@dataclass(frozen=True)
class Point:
    """One arm in the pictures; `cost` is None where it was not measured."""

    arm: str
    label: str
    score: Score
    cost: float | None = None
    recommended: bool = False
    trivial: bool = False
    front: bool = False

    @property
    def look(self) -> str:
        """Return the class that gives the marker its colour."""
        return "best" if self.recommended else "front" if self.front else "rest"


def with_front(points: Sequence[Point], lower_is_better: bool = False) -> list[Point]:
    """Mark the Pareto front: no other point is as good and as cheap, and better in one of the two."""
    sign = -1 if lower_is_better else 1
    have = [(sign * p.score.mean, p.cost) for p in points if p.score.mean is not None and p.cost is not None]

    def stands(p: Point) -> bool:
        if p.score.mean is None or p.cost is None:
            return False
        quality, cost = sign * p.score.mean, p.cost
        return not any(q >= quality and c <= cost and (q > quality or c < cost) for q, c in have)

    return [replace(p, front=stands(p)) for p in points]


def marker(x: float, y: float, look: str, shape: str, radius: float = 5) -> Markup:
    """Return a marker: `shape` is diamond (recommended), square (trivial) or circle."""
    classes = f"mark {look}"
    if shape == "diamond":
        r = radius * 1.5
        return tag("path", class_=classes, d=f"M{x:.1f} {y - r:.1f}l{r:g} {r:g}l{-r:g} {r:g}l{-r:g} {-r:g}z")
    if shape == "square":
        side = 2 * radius - 1
        return tag("rect", class_=classes, x=x - side / 2, y=y - side / 2, width=side, height=side)
    return tag("circle", class_=classes, cx=x, cy=y, r=radius)


def shape_of(point: Point) -> str:
    """Return the shape of the marker of `point`."""
    return "diamond" if point.recommended else "square" if point.trivial else "circle"


KEYS = (
    ("best", "diamond", "recommended"),
    ("front", "circle", "on the front: nothing is both better and cheaper"),
    ("rest", "circle", "beaten on both"),
    ("rest", "square", "trivial baseline"),
)


def key_icon(look: str, shape: str) -> Markup:
    """Return the marker alone, for a legend."""
    return tag("svg", marker(8, 8, look, shape), viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _overlap(a: Box, b: Box) -> float:
    if a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]:
        return 0.0
    return (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))


Spot = tuple[float, float]  # x, y


def place(anchors: Sequence[Spot], widths: Sequence[float], frame: Box, bars: Sequence[Box]) -> list[Box]:
    """Return a box for each label near its anchor, in `frame`, clear of markers, labels and, if possible, `bars`."""
    height = 14
    marks = [(x - 8, y - 8, x + 8, y + 8) for x, y in anchors]
    placed: list[Box] = []

    def penalty(spot: Spot, box: Box, distance: float) -> float:
        if box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]:
            return 1e6 + distance
        crossed = 40 * sum(_overlap(box, b) for b in placed) + 20 * sum(_overlap(box, b) for b in marks)
        crossed += 9 * sum(_overlap(box, b) for b in bars)
        return distance + crossed + 30 * _cuts(spot, box, bars)

    for (x, y), w in zip(anchors, widths, strict=True):
        best = (math.inf, (x, y, x + w, y + height))
        for distance, dx, dy in _around(w, height):
            if distance >= best[0]:
                break  # nothing further away can be better
            box = (x + dx, y + dy, x + dx + w, y + dy + height)
            best = min(best, (penalty((x, y), box, distance), box))
        placed.append(best[1])
    return placed


def _nearest(spot: Spot, box: Box) -> Spot:
    return min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1]), box[3])


def _cuts(spot: Spot, box: Box, bars: Sequence[Box]) -> int:
    """Return how many bars the line from `spot` to its label would cut."""
    (x, y), (end_x, end_y) = spot, _nearest(spot, box)
    cut = 0
    for bar in bars:
        middle = (bar[0] + bar[2]) / 2
        if min(x, end_x) < middle < max(x, end_x) and abs(middle - x) > 3:
            cut += bar[1] <= y + (end_y - y) * (middle - x) / (end_x - x) <= bar[3]
    return cut


def _around(w: float, h: float) -> Iterator[tuple[float, float, float]]:
    """Yield (distance, dx, dy) of the places tried for a label's left top corner, nearest first."""
    yield from ((0, 10, -h / 2), (2, -10 - w, -h / 2), (3, -w / 2, -h - 8), (4, -w / 2, 9))
    for radius in range(16, 150, 12):
        for step in range(16):
            dx, dy = radius * math.cos(step * math.pi / 8), radius * math.sin(step * math.pi / 8)
            yield radius, dx + (2 if dx > 1 else -w - 2 if dx < -1 else -w / 2), dy - h / 2


def quality_cost(points: Sequence[Point], metric: Metric, cost: Cost, w: int = 860, h: int = 440) -> Markup:
    """Return quality (up, with 95 % intervals) against `cost` (to the right), the Pareto front as a staircase.

    points: those without a score or without this cost are left out; the caller says so beside the picture.
    """
    points = [p for p in points if p.score.mean is not None and p.cost is not None]
    points = with_front(points, metric.lower_is_better)
    low, high = focus([p.score for p in points], metric.lower_is_better)
    left, right, top, bottom = 52.0, w - 14.0, 30.0, h - 48.0
    y_axis = Axis(low, high, top, bottom - 14) if metric.lower_is_better else Axis(low, high, bottom - 14, top)
    x_axis = cost_axis([p.cost or 0.0 for p in points], left + 8, right - 14)
    shapes = _frame(x_axis, y_axis, (left, top, right, bottom), metric, cost, w, h)
    spots = [(x_axis.at(p.cost or 0.0), y_axis.at(p.score.mean or 0.0)) for p in points]
    stairs = sorted(s for s, p in zip(spots, points, strict=True) if p.front)
    shapes.append(_staircase(stairs, right))
    bars = _steps(stairs, right)
    for (x, _), p in zip(spots, points, strict=True):
        if p.score.low is None or p.score.high is None or not (y_axis.has(p.score.low) or y_axis.has(p.score.high)):
            continue
        y1, y2 = y_axis.at(p.score.low), y_axis.at(p.score.high)
        bars.append((x - 2, min(y1, y2), x + 2, max(y1, y2)))
        shapes.append(tag("path", class_=f"bar {p.look}", d=f"M{x - 4:.1f} {y1:.1f}h8m-4 0V{y2:.1f}m-4 0h8"))
    texts = [p.label if y_axis.has(p.score.mean or 0.0) else f"{p.label} {metric.show(p.score.mean)} ↓" for p in points]
    order = sorted(range(len(points)), key=lambda i: (not points[i].recommended, not points[i].front, spots[i]))
    widths = [(7.4 if points[i].recommended else 6.8) * width(texts[i]) + 2 for i in order]
    boxes = place([spots[i] for i in order], widths, (4, 20, w - 2, bottom), bars)
    drawn = [_labelled(spots[i], points[i], texts[i], box, metric, cost) for i, box in zip(order, boxes, strict=True)]
    shapes += [part for layer in zip(*drawn, strict=True) for part in layer]  # no line over a marker, none over a name
    return _svg(w, h, f"{metric.title} against {cost.phrase} of {len(points)} arms", *shapes)


def _frame(x_axis: Axis, y_axis: Axis, box: Box, metric: Metric, cost: Cost, w: int, h: int) -> list[Markup]:
    """Return grid, ticks and the names of the axes."""
    left, _, right, bottom = box
    shapes = []
    for label, value in score_ticks((y_axis.low, y_axis.high), metric, 6):
        y = y_axis.at(value)
        shapes += [_line("grid", left, y, right, y), _text(label, "tick", left - 8, y + 4, "end")]
    free_from = -math.inf
    for value in cost_ticks(x_axis, cost, max(3, w // 110)):
        x, label = x_axis.at(value), plain(cost.show(value)) if value else "0"
        if x - 3.4 * len(label) < free_from:
            continue
        free_from = x + 3.4 * len(label) + 6
        shapes += [_line("notch", x, bottom, x, bottom + 5), _text(label, "tick", x, bottom + 19, "middle")]
    shapes.append(_line("axis", left, bottom, right, bottom))
    if x_axis.zero is not None:
        shapes.append(tag("path", class_="notch", d=f"M{x_axis.start - 16:.1f} {bottom + 4:g}l4 -8m3 8l4 -8"))
    better = ", lower is better" if metric.lower_is_better else f", {metric.unit}" if metric.unit else ""
    shapes.append(_text(f"{metric.title}{better} ↑", "name", 4, 15))
    scale = " (logarithmic)" if x_axis.log else ""
    return [*shapes, _text(f"{cost.phrase[:1].upper()}{cost.phrase[1:]}{scale} →", "name", right, h - 8, "end")]


def _staircase(steps: list[Spot], right: float) -> Markup:
    if not steps:
        return Markup("")
    path = f"M{steps[0][0]:.1f} {steps[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in steps[1:])
    return tag("path", class_="stairs", d=f"{path}H{right:g}")


def _steps(steps: list[Spot], right: float) -> list[Box]:
    """Return the staircase as thin boxes that labels keep clear of."""
    boxes: list[Box] = []
    for (x, y), (next_x, next_y) in zip(steps, [*steps[1:], (right, steps[-1][1])] if steps else [], strict=True):
        boxes.append((x, y - 3, next_x, y + 3))
        boxes.append((next_x - 3, min(y, next_y), next_x + 3, max(y, next_y)))
    return boxes


def _labelled(spot: Spot, p: Point, text: str, box: Box, metric: Metric, cost: Cost) -> tuple[Markup, ...]:
    """Return a line to the label where it had to move away, the marker, and the label."""
    x, y = spot
    near_x, near_y = _nearest(spot, box)
    lead = _line("lead", x, y, near_x, near_y) if math.hypot(near_x - x, near_y - y) > 15 else Markup("")
    words = f"{p.arm}: {metric.show(p.score.mean)} {metric.interval(p.score.low, p.score.high)}, {cost.show(p.cost)}"
    mark = tag("g", tag("title", words), marker(x, y, p.look, shape_of(p)))
    if box[0] > x:
        label = _text(text, f"label {p.look}", box[0] + 1, box[3] - 3)
    elif box[2] < x:  # drawn towards the marker, so that a font wider than expected grows away from it
        label = _text(text, f"label {p.look}", box[2] - 1, box[3] - 3, "end")
    else:
        label = _text(text, f"label {p.look}", (box[0] + box[2]) / 2, box[3] - 3, "middle")
    return lead, mark, label


def interval_bar(s: Score, reach: tuple[float, float], look: str, w: int = 120, zero: bool = False) -> Markup:
    """Return a score or difference as a dot on its 95 % interval, on the scale `reach` that all rows of a table share.

    A value outside the scale is an arrow at that end; zero: draw a line at zero.
    """
    if s.mean is None:
        return Markup("")
    h, axis = 16, Axis(*reach, 6, w - 6)
    shapes = [_line("axis", axis.at(0), 0, axis.at(0), h)] if zero else []
    if not axis.has(s.mean):
        tip, way = (2, 1) if s.mean < axis.low else (w - 2, -1)
        shapes.append(tag("path", class_=f"mark {look}", d=f"M{tip} {h / 2:g}l{6 * way} -4v8z"))
        return _svg(w, h, "outside the scale", *shapes, look="spark")
    if s.low is not None and s.high is not None:
        shapes.append(_line(f"bar {look}", axis.at(s.low), h / 2, axis.at(s.high), h / 2))
    shapes.append(tag("circle", class_=f"mark {look}", cx=axis.at(s.mean), cy=h / 2, r=3.5))
    return _svg(w, h, "interval", *shapes, look="spark")


def strip(points: Sequence[Point], metric: Metric, w: int = 860) -> Markup:
    """Return one row per arm: a ring per seed, a tick at the mean, the 95 % interval behind them."""
    points = [p for p in points if p.score.mean is not None]
    reach = focus([p.score for p in points], metric.lower_is_better)
    beside = w >= 600
    left, row, head = (240.0, 26.0, 8.0) if beside else (8.0, 40.0, 2.0)
    h = head + row * len(points) + 40
    axis = Axis(*reach, left + 8, w - 14)
    shapes: list[Markup] = []
    for label, value in score_ticks(reach, metric, max(3, int((w - left) // 80))):
        x = axis.at(value)
        shapes += [_line("grid", x, head, x, h - 38), _text(label, "tick", x, h - 22, "middle")]
    name = f"{metric.title}{', ' + metric.unit if metric.unit else ''}"
    shapes.append(_text(name, "name", w - 14, h - 4, "end"))
    for i, p in enumerate(points):
        y = head + row * i + (13 if beside else 28)
        label = (left - 6, y + 4, "end") if beside else (left, y - 12, "start")
        shapes += [_text(p.label, f"label {p.look}", *label), *_seeds(p, axis, y, metric)]
    return _svg(w, h, f"{metric.title} of every seed of {len(points)} arms", *shapes)


def _seeds(p: Point, axis: Axis, y: float, metric: Metric) -> list[Markup]:
    s, look = p.score, p.look
    if s.mean is None:
        return []
    if s.mean < axis.low:
        return [_text(f"◂ {metric.show(s.mean)}", "label rest", axis.start - 6, y + 4)]
    if s.mean > axis.high:
        return [_text(f"{metric.show(s.mean)} ▸", "label rest", axis.end + 6, y + 4, "end")]
    shapes = []
    if s.low is not None and s.high is not None:
        shapes.append(_line(f"range {look}", axis.at(s.low), y, axis.at(s.high), y))
    shapes.append(_line(f"bar {look}", axis.at(s.mean), y - 8, axis.at(s.mean), y + 8))
    rings = [v for v in s.per_seed if axis.has(v)]
    return shapes + [
        tag("circle", tag("title", metric.show(v)), class_=f"seed {look}", cx=axis.at(v), cy=y, r=4) for v in rings
    ]


Curve = Sequence[Spot]


def curve_panels(
    curves: Mapping[str, Sequence[Curve]], name: str, show: Callable[[float], str], best: str | None = None
) -> tuple[Markup, dict[str, Markup]]:
    """Return the shared shapes (every arm's first seed, drawn pale) and one small panel per arm on common axes.

    curves: arm -> its seeds' (examples, value), in order; name: an identifier, unique in the page; best: the arm drawn
    in the accent colour. Curves are thinned to MOST_POINTS points, first and last kept.
    """
    w, h = 176, 124
    xs = [x for seeds in curves.values() for curve in seeds for x, _ in curve]
    ys = [y for seeds in curves.values() for curve in seeds for _, y in curve]
    if not xs:
        return Markup(""), {}
    log = min(ys) > 0 and max(ys) / min(ys) > LOG_SPREAD
    x_axis, y_axis = Axis(min(0.0, *xs), max(xs), 38, w - 6), Axis(min(ys), max(ys), h - 22, 8, log)
    ghosts = [tag("path", d=_curve(seeds[0], x_axis, y_axis)) for seeds in curves.values() if seeds and seeds[0]]
    shared = tag("svg", tag("g", *ghosts, id=name), width=0, height=0, class_="shared", aria_hidden="true")
    frame = [
        _line("grid", 38, 8, w - 6, 8),
        _line("axis", 38, h - 22, w - 6, h - 22),
        _text(show(y_axis.high), "tick", 34, 12, "end"),
        _text(show(y_axis.low), "tick", 34, h - 18, "end"),
        _text(plain(_thousands(x_axis.high)), "tick", w - 6, h - 7, "end"),
        _text("0", "tick", 38, h - 7, "start"),
        tag("use", href=f"#{name}", class_="ghost"),
    ]
    panels = {}
    for arm, seeds in curves.items():
        look = "best" if arm == best else "front"
        lines = [tag("path", class_=f"curve {look}", d=_curve(curve, x_axis, y_axis)) for curve in seeds if curve]
        panels[arm] = _svg(w, h, f"learning curves of {arm}", *frame, *lines, look="panel")
    return shared, panels


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}\u00a0k" if value >= 10_000 else f"{value:.0f}"


def _curve(points: Curve, x_axis: Axis, y_axis: Axis) -> str:
    if len(points) > MOST_POINTS:
        last = len(points) - 1
        points = [points[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
    spots = [f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}" for x, y in points]
    return f"M{spots[0]}L{' '.join(spots[1:])}" if len(spots) > 1 else f"M{spots[0]}h.1"


_PICTURE_STYLE = """
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:#1c2126}
.title{font-size:15px;font-weight:600}.tick,.name,.key{fill:#5a636d}.label.rest{fill:#5a636d}
.label.best{fill:#0060a8;font-weight:600}.label.front{fill:#00694f}
.grid{stroke:#e7e9ec}.axis,.notch{stroke:#8a939c;fill:none}.lead{stroke:#b9c0c7}
.stairs{stroke:#00694f;stroke-width:1.5;stroke-dasharray:5 4;fill:none;opacity:.7}
.bar{stroke-width:1.5;fill:none}.bar.best{stroke:#0060a8}.bar.front{stroke:#00694f}.bar.rest{stroke:#8a939c}
.mark{stroke-width:1.8}.mark.best{fill:#0060a8;stroke:#0060a8}.mark.front{fill:#00694f;stroke:#00694f}
.mark.rest{fill:#fff;stroke:#5a636d}
"""


def picture(chart: Markup, title: str, w: int, h: int) -> str:
    """Return `chart` (its frame is w by h) as an SVG file of its own: white card, title, legend, own colours."""
    full = h + 84
    keys, x = [], 24.0
    for look, shape, words in KEYS:
        words = words.split(":")[0]
        keys += [marker(x + 5, full - 20, look, shape), _text(words, "key", x + 17, full - 16)]
        x += 17 + 7 * len(words) + 26
    inner = Markup(str(chart).replace("<svg", '<svg x="16" y="42"', 1))
    card = tag("rect", x=0.5, y=0.5, width=w + 31, height=full - 1, rx=10, fill="#fff", stroke="#d5d9de")
    style = Markup(f"<style>{_PICTURE_STYLE.strip()}</style>")
    heading = _text(title, "title", 20, 30)
    body = tag(
        "svg",
        style,
        card,
        heading,
        inner,
        *keys,
        viewBox=f"0 0 {w + 32} {full}",
        width=w + 32,
        height=full,
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        aria_label=title,
    )
    return f"{body}\n"
