"""The graph of a recipe as a picture: lines of text beside the steps, and layers of boxes as an SVG. Imports no torch.

Both take {name: names that it needs} in an order in which each comes after what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from brickyard.compare.charts import tag
from brickyard.compare.shown import visible

Needs = Mapping[str, Sequence[str]]
_PLAIN = str.maketrans({"●": "*", "│": "|", "─": "-", "├": "+", "╰": "\\", "╮": ".", "┼": "+", "┴": "+", "┬": "+"})

WIDTH, HEIGHT, GAP, RISE, LANE = 172.0, 50.0, 20.0, 44.0, 12.0  # of a box, between boxes, between layers, of a line
_SWEEPS = 8


def rails(needs: Needs, *, ascii_only: bool = False) -> list[str]:
    """Return one line for each step: a dot in its lane, and the lanes of outputs that are read further down.

    A lane begins at the step whose output it carries and ends at the last step that reads it, with `╰` or `┴`; a step
    before that which reads it too branches off with `├` or `┼`. A lane that only passes is `│`, also where a branch
    goes behind it. All lines have the same length.
    """
    names = list(needs)
    last = {need: name for name in names for need in needs[name]}
    lanes: list[str | None] = []
    rows: list[list[str]] = []
    for name in names:
        ending = [i for i, lane in enumerate(lanes) if lane is not None and last[lane] == name]
        feeding = [i for i, lane in enumerate(lanes) if lane is not None and lane in needs[name]]
        # Right of all that feeds it: so every line that arrives comes from the left.
        own = next(
            (i for i in range(len(lanes)) if lanes[i] is None and i > max(feeding, default=-1)),
            len(lanes),
        )
        cells = []
        for i in range(max(len(lanes), own + 1)):
            inside = bool(feeding) and feeding[0] < i < own
            lane = lanes[i] if i < len(lanes) else None
            if i == own:
                mark = "●"
            elif i in feeding:
                mark = ("┴" if inside else "╰") if i in ending else ("┼" if inside else "├")
            else:
                mark = "│" if lane is not None else "─" if inside else " "
            cells.append(mark + ("─" if feeding and feeding[0] <= i < own else " "))
        rows.append(cells)
        for i in ending:
            lanes[i] = None
        if name in last:
            lanes.extend([None] * (own + 1 - len(lanes)))
            lanes[own] = name
        while lanes and lanes[-1] is None:
            lanes.pop()
    width = max(map(len, rows), default=0)
    lines = ["".join(row).ljust(2 * width) for row in rows]
    return [line.translate(_PLAIN) for line in lines] if ascii_only else lines


@dataclass
class _Spot:
    """A place in a layer: a step's box, or where a long line passes (`name` is None)."""

    name: str | None
    layer: int
    x: float = 0.0

    @property
    def width(self) -> float:
        return WIDTH if self.name is not None else LANE


@dataclass(frozen=True)
class Layout:
    """Where everything is drawn: left top corners of boxes, lines as points from top to bottom, and the size."""

    boxes: dict[str, tuple[float, float]]
    lines: list[tuple[str, str, list[tuple[float, float]]]]
    width: float
    height: float


def layout(needs: Needs) -> Layout:
    """Lay the graph out in layers, what is needed above what needs it, and few lines crossing."""
    depth: dict[str, int] = {}
    for name in needs:
        depth[name] = 1 + max((depth[need] for need in needs[name]), default=-1)
    readers = {name: [other for other in needs if name in needs[other]] for name in needs}
    for name in reversed(list(needs)):  # a step that needs little is drawn just above the first that reads it
        if readers[name] and not needs[name]:
            depth[name] = min(depth[other] for other in readers[name]) - 1
    layers: list[list[_Spot]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    spots = {name: _Spot(name, depth[name]) for name in needs}
    for spot in spots.values():
        layers[spot.layer].append(spot)
    chains: list[tuple[str, str, list[_Spot]]] = []
    for name in needs:
        for need in needs[name]:
            passing = [_Spot(None, layer) for layer in range(depth[need] + 1, depth[name])]
            for spot in passing:
                layers[spot.layer].append(spot)
            chains.append((need, name, [spots[need], *passing, spots[name]]))
    _order(layers, chains)
    width = _space(layers, chains)
    rise = HEIGHT + RISE
    lines = []
    for need, name, chain in chains:
        points = [(chain[0].x, chain[0].layer * rise + HEIGHT)]
        for spot in chain[1:-1]:
            points += [(spot.x, spot.layer * rise), (spot.x, spot.layer * rise + HEIGHT)]
        lines.append((need, name, [*points, (chain[-1].x, chain[-1].layer * rise)]))
    boxes = {name: (spot.x - WIDTH / 2, spot.layer * rise) for name, spot in spots.items()}
    return Layout(boxes, lines, width, max(0.0, len(layers) * rise - RISE))


def _neighbours(
    chains: Sequence[tuple[str, str, list[_Spot]]],
) -> tuple[dict[int, list[_Spot]], dict[int, list[_Spot]]]:
    above: dict[int, list[_Spot]] = {}
    below: dict[int, list[_Spot]] = {}
    for _, _, chain in chains:
        for upper, lower in pairwise(chain):
            above.setdefault(id(lower), []).append(upper)
            below.setdefault(id(upper), []).append(lower)
    return above, below


def _order(layers: list[list[_Spot]], chains: Sequence[tuple[str, str, list[_Spot]]]) -> None:
    """Order every layer by the mean place of its neighbours, down and up in turn (the barycentre heuristic)."""
    above, below = _neighbours(chains)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        beside = above if down else below
        for layer in layers if down else reversed(layers):
            own = {id(spot): i for i, spot in enumerate(layer)}
            places = {id(spot): i for other in layers for i, spot in enumerate(other)}

            near = {id(spot): [places[id(other)] for other in beside.get(id(spot), [])] for spot in layer}
            mean = {key: sum(found) / len(found) if found else own[key] for key, found in near.items()}
            layer.sort(key=lambda spot, mean=mean, own=own: (mean[id(spot)], own[id(spot)]))


def _space(layers: list[list[_Spot]], chains: Sequence[tuple[str, str, list[_Spot]]]) -> float:
    """Give every spot its x: near the mean of its neighbours, with room between; return the width of it all."""
    above, below = _neighbours(chains)
    for layer in layers:
        _pack(layer, [0.0] * len(layer))
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = []
            for spot in layer:
                near = [*above.get(id(spot), []), *below.get(id(spot), [])]
                wanted.append(sum(other.x for other in near) / len(near) if near else spot.x)
            _pack(layer, wanted)
    every = [spot for layer in layers for spot in layer]
    left = min((spot.x - spot.width / 2 for spot in every), default=0.0)
    for spot in every:
        spot.x -= left
    return max((spot.x + spot.width / 2 for spot in every), default=0.0)


def _pack(layer: list[_Spot], wanted: Sequence[float]) -> None:
    """Place spots in their order, as near to `wanted` as the room between them allows: what touches shares a mean."""
    blocks: list[tuple[float, int, list[float]]] = []  # sum of (wanted - offset), spots, offsets
    reach: list[float] = []
    for i, spot in enumerate(layer):
        reach.append(0.0 if i == 0 else reach[-1] + (layer[i - 1].width + spot.width) / 2 + GAP)
        blocks.append((wanted[i] - reach[i], 1, [reach[i]]))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count, offsets = blocks.pop()
            before = blocks.pop()
            blocks.append((before[0] + total, before[1] + count, [*before[2], *offsets]))
    placed = [total / count + offset for total, count, offsets in blocks for offset in offsets]
    for spot, x in zip(layer, placed, strict=True):
        spot.x = x


def picture(needs: Needs, words: Mapping[str, tuple[str, str, str]]) -> Markup:
    """Return the graph as an SVG whose colours come from the page's classes.

    words: for each step what stands below its name, its state (kept, done, failed, waiting: a class), and its tooltip.
    """
    found = layout(needs)
    shapes: list[Markup] = []
    for need, name, points in found.lines:
        path = f"M{points[0][0] + 8:.1f} {points[0][1] + 8:.1f}"
        for (x1, y1), (x2, y2) in pairwise(points):
            middle = (y1 + y2) / 2 + 8
            if abs(x1 - x2) < 0.05:
                path += f"V{y2 + 8:.1f}"
            else:
                path += f"C{x1 + 8:.1f} {middle:.1f} {x2 + 8:.1f} {middle:.1f} {x2 + 8:.1f} {y2 + 8:.1f}"
        shapes.append(tag("path", tag("title", f"{need} to {name}"), class_="edge", d=path))
    for name, (x, y) in found.boxes.items():
        below, state, tip = words[name]
        parts = [
            tag("title", tip),
            tag("rect", x=x + 8, y=y + 8, width=WIDTH, height=HEIGHT, rx=7.0),
            tag("text", _cut(name, 22), class_="stepname", x=x + 20, y=y + 29),
            tag("text", _cut(below, 24), class_="stepwhat", x=x + 20, y=y + 46),
        ]
        shapes.append(tag("a", tag("g", *parts, class_=f"step {state}"), href=f"#step-{name}"))
    width, height = found.width + 16, found.height + 16
    return tag(
        "svg",
        *shapes,
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=f"graph of {len(needs)} steps",
        class_="graph",
    )


def _cut(text: str, most: int) -> str:
    text = visible(text)
    return text if len(text) <= most else text[: most - 1] + "…"
