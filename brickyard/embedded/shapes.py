"""`embedded:shapes`: point clouds of ten families of solids and furniture, drawn by formula, in memory.

A shape is a union of primitives (boxes, cylinders, cones, ellipsoids, tori) whose sizes are drawn anew for every row.
Its surface is sampled evenly by area, part of it is cut away (what the sensor did not see), the rest is turned about
the vertical axis and put into the unit ball, and each point is displaced by noise:

    points = unit( unit(turn_z(kept(surface))) + noise * normal )      kept: those below a quantile along a random line

Parts of a union may reach into one another, and their inner surfaces are sampled too. The families are meant to be
like those of ModelNet; nothing was fitted to its models. Everything is drawn from one `numpy` generator, so the same
arguments give the same points on the same machine.

Shapes: P points of a cloud; the third coordinate is up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Generator = np.random.Generator
Sample = Callable[[int], Array]
Part = tuple[float, Sample]  # area of a surface, and what draws points [n, 3] on it

FAMILIES = ("ball", "box", "chair", "cone", "cylinder", "lamp", "mug", "plane", "table", "torus")
ROWS = {"train": 1000, "validation": 200, "test": 600}
POINTS = 512
NOISE = 0.02  # standard deviation, of the radius of the unit ball
OCCLUSION = 0.3  # the most of a surface that is cut away


def splits() -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"points": [float32 [512, 3]], "label": [family]}}, always the same."""
    found = {}
    for seed, (split, rows) in enumerate(ROWS.items()):
        clouds, labels = draw(rows, seed=seed)
        found[split] = {"points": list(clouds), "label": [FAMILIES[i] for i in labels]}
    return found


def draw(
    count: int, *, seed: int, points: int = POINTS, noise: float = NOISE, occlusion: float = OCCLUSION
) -> tuple[Array, NDArray[np.int64]]:
    """Return clouds [count, points, 3] float32 in the unit ball and their families [count], equally many of each.

    Args:
        count: number of clouds.
        seed: non-negative.
        points: points of a cloud.
        noise: standard deviation of each coordinate's displacement, in radii of the ball.
        occlusion: of each surface a share drawn evenly from 0 to this is cut away.

    Raises:
        ValueError: an argument out of range.
    """
    if count < 1 or points < 1 or noise < 0 or not 0 <= occlusion < 1:
        raise ValueError(f"count={count}, points={points}, noise={noise}, occlusion={occlusion} are out of range")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(FAMILIES))
    clouds = np.empty((count, points, 3), np.float32)
    for row, label in enumerate(labels):
        parts = _PARTS[FAMILIES[label]](rng)
        drawn = round(points / (1 - occlusion)) + 1
        surface = _surface(rng, parts, drawn)
        along = surface @ _direction(rng)
        kept = surface[np.argsort(along)[: max(points, round(drawn * (1 - occlusion * rng.random())))]]
        kept = rng.permutation(kept)[:points]
        whole = _unit(_turned(kept, rng.uniform(0, 2 * np.pi)))
        clouds[row] = _unit(whole + noise * rng.standard_normal(whole.shape))
    return clouds, labels


def _unit(points: Array) -> Array:
    """Centre points [P, 3] on their mean and scale the farthest to radius 1."""
    points = points - points.mean(axis=0)
    return points / np.linalg.norm(points, axis=1).max()


def _surface(rng: Generator, parts: list[Part], count: int) -> Array:
    """Draw points of a union, from each part as its share of the area says."""
    area = np.array([a for a, _ in parts])
    share = rng.multinomial(count, area / area.sum())
    return np.concatenate([sample(int(n)) for n, (_, sample) in zip(share, parts, strict=True)])


def _direction(rng: Generator) -> Array:
    v = rng.standard_normal(3)
    return v / np.linalg.norm(v)


def _turned(points: Array, angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def _at(part: Part, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Part:
    area, sample = part
    return area, lambda n: sample(n) + np.array([x, y, z])


def _box(rng: Generator, a: float, b: float, c: float) -> Part:
    """A box of sides a, b, c around the origin."""
    sides, faces = np.array([a, b, c]), np.array([b * c, a * c, a * b])

    def sample(n: int) -> Array:
        points = rng.uniform(-0.5, 0.5, (n, 3))
        axis = rng.choice(3, n, p=faces / faces.sum())
        points[np.arange(n), axis] = rng.choice((-0.5, 0.5), n)
        return points * sides

    return 2 * float(faces.sum()), sample


def _cone(rng: Generator, low: float, high: float, height: float, *, bottom: bool = True, top: bool = True) -> Part:
    """A cone cut off at both ends, radius `low` below and `high` above, with its lids; equal radii make a cylinder."""
    slant = float(np.hypot(height, low - high))
    areas = np.pi * np.array([(low + high) * slant, low**2 * bottom, high**2 * top])

    def sample(n: int) -> Array:
        which = rng.choice(3, n, p=areas / areas.sum())
        angle, u = rng.uniform(0, 2 * np.pi, n), rng.random(n)
        # On the mantle the area below a radius grows with its square; on a lid likewise, from the centre.
        mantle = np.sqrt(low**2 + u * (high**2 - low**2))
        up = u if low == high else (mantle - low) / (high - low)
        radius = np.where(which == 0, mantle, np.sqrt(u) * np.where(which == 1, low, high))
        z = np.where(which == 0, up, which == 2) - 0.5
        return np.stack([radius * np.cos(angle), radius * np.sin(angle), height * z], axis=1)

    return float(areas.sum()), sample


def _ball(rng: Generator, a: float, b: float, c: float) -> Part:
    """An ellipsoid with the half axes a, b, c; sampled evenly on the sphere, which for mild ratios is nearly even."""

    def sample(n: int) -> Array:
        v = rng.standard_normal((n, 3))
        return v / np.linalg.norm(v, axis=1, keepdims=True) * np.array([a, b, c])

    p = 1.6075  # Thomsen's approximation of the area
    mean = ((a * b) ** p + (a * c) ** p + (b * c) ** p) / 3
    return 4 * np.pi * float(mean ** (1 / p)), sample


def _torus(rng: Generator, large: float, small: float, *, upright: bool = False) -> Part:
    """A torus of the radii `large` and `small` around the z axis, or around the y axis where it is upright."""

    def sample(n: int) -> Array:
        around = rng.uniform(0, 2 * np.pi, n)
        # The inside of the tube has less area: rejection, with enough draws that n are left.
        across = rng.uniform(0, 2 * np.pi, 8 * n + 32)
        keep = rng.random(len(across)) * (large + small) < large + small * np.cos(across)
        across = across[keep][:n]
        radius, z = large + small * np.cos(across), small * np.sin(across)
        x, y = radius * np.cos(around), radius * np.sin(around)
        return np.stack([x, z, y] if upright else [x, y, z], axis=1)

    return 4 * np.pi**2 * large * small, sample


def _legs(rng: Generator, wide: float, deep: float, height: float, thick: float) -> list[Part]:
    leg = _box(rng, thick, thick, height)
    x, y = (wide - thick) / 2, (deep - thick) / 2
    return [_at(leg, sx * x, sy * y, -height / 2) for sx in (-1, 1) for sy in (-1, 1)]


def _table(rng: Generator) -> list[Part]:
    wide, deep, height = rng.uniform(1.0, 2.0), rng.uniform(0.7, 1.2), rng.uniform(0.5, 1.1)
    top = rng.uniform(0.05, 0.12)
    return [_at(_box(rng, wide, deep, top), z=top / 2), *_legs(rng, wide, deep, height, rng.uniform(0.06, 0.14))]


def _chair(rng: Generator) -> list[Part]:
    wide, deep, height = rng.uniform(0.7, 1.0), rng.uniform(0.7, 1.0), rng.uniform(0.5, 0.9)
    seat, back = rng.uniform(0.05, 0.12), rng.uniform(0.6, 1.1)
    rest = _at(_box(rng, wide, seat, back), y=(seat - deep) / 2, z=seat + back / 2)
    parts = [_at(_box(rng, wide, deep, seat), z=seat / 2), rest]
    return [*parts, *_legs(rng, wide, deep, height, rng.uniform(0.06, 0.14))]


def _lamp(rng: Generator) -> list[Part]:
    height, foot = rng.uniform(1.0, 1.8), rng.uniform(0.25, 0.45)
    shade, low = rng.uniform(0.4, 0.7), rng.uniform(0.35, 0.6)
    return [
        _at(_cone(rng, foot, foot, 0.08), z=0.04),
        _at(_cone(rng, 0.05, 0.05, height), z=height / 2),
        _at(_cone(rng, low, low * rng.uniform(0.3, 0.7), shade, bottom=False), z=height),
    ]


def _mug(rng: Generator) -> list[Part]:
    radius, height = rng.uniform(0.4, 0.6), rng.uniform(0.8, 1.3)
    ring = rng.uniform(0.25, 0.35) * height
    handle = _at(_torus(rng, ring, rng.uniform(0.05, 0.09), upright=True), x=radius + 0.6 * ring)
    return [_cone(rng, radius, radius * rng.uniform(0.9, 1.15), height, top=False), handle]


def _plane(rng: Generator) -> list[Part]:
    length, body, span = rng.uniform(1.6, 2.4), rng.uniform(0.12, 0.2), rng.uniform(1.4, 2.4)
    tail, fin = span * rng.uniform(0.3, 0.45), rng.uniform(0.3, 0.5)
    return [
        _ball(rng, length / 2, body, body),
        _at(_box(rng, rng.uniform(0.3, 0.5), span, 0.05), x=rng.uniform(-0.1, 0.2)),
        _at(_box(rng, 0.2, tail, 0.04), x=0.1 - length / 2),
        _at(_box(rng, 0.22, 0.04, fin), x=0.1 - length / 2, z=fin / 2),
    ]


def _three(rng: Generator, low: float, high: float) -> list[float]:
    return rng.uniform(low, high, 3).tolist()


_PARTS: dict[str, Callable[[Generator], list[Part]]] = {
    "ball": lambda rng: [_ball(rng, *_three(rng, 0.6, 1.0))],
    "box": lambda rng: [_box(rng, *_three(rng, 0.6, 1.4))],
    "chair": _chair,
    "cone": lambda rng: [_cone(rng, rng.uniform(0.5, 0.8), rng.uniform(0.0, 0.15), rng.uniform(0.9, 1.6))],
    "cylinder": lambda rng: [_cone(rng, radius := rng.uniform(0.35, 0.7), radius, rng.uniform(0.8, 1.6))],
    "lamp": _lamp,
    "mug": _mug,
    "plane": _plane,
    "table": _table,
    "torus": lambda rng: [_torus(rng, rng.uniform(0.6, 0.9), rng.uniform(0.15, 0.35))],
}
