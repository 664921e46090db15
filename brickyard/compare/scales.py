"""Where a value stands in a picture: axes, round values for their ticks, and the range of scores worth drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from brickyard.compare.shown import Cost, Metric, Score

LOG_SPREAD = 20  # an axis whose largest value is more than this many times its smallest is logarithmic
_DECIMAL = tuple(m * 10.0**e for e in range(-4, 17) for m in (1, 2, 5))
_STEPS = {
    "things": _DECIMAL,
    "ms": _DECIMAL,
    "bytes": tuple(2.0**e for e in range(51)),
    "s": (0.01, 0.1, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18e3, 36e3, 86400, 259200, 864e3),
}


@dataclass(frozen=True)
class Axis:
    """Values `low..high` on pixels `start..end`; a logarithmic one may place zero at `zero`, before `start`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: float | None = None

    def at(self, value: float) -> float:
        """Return the pixel of `value`; values outside are pinned to the nearer end."""
        if self.log and value <= 0:
            return self.start if self.zero is None else self.zero
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def has(self, value: float) -> bool:
        """Say whether `value` lies on the axis."""
        return self.low <= value <= self.high or (self.log and value <= 0 and self.zero is not None)


def cost_axis(values: Iterable[float], start: float, end: float, gap: float = 44) -> Axis:
    """Return the axis of a cost: from zero, or logarithmic where the values spread more than LOG_SPREAD times."""
    values = list(values)
    above = [v for v in values if v > 0]
    if not above:
        return Axis(0, 1, start, end)
    low, high = min(above), max(above)
    if high / low <= LOG_SPREAD:
        return Axis(0, high * 1.08, start, end)
    room = (high / low) ** 0.05
    if len(above) == len(values):
        return Axis(low / room, high * room, start, end, log=True)
    return Axis(low / room, high * room, start + gap, end, log=True, zero=start + 10)


def cost_ticks(axis: Axis, cost: Cost, most: int) -> list[float]:
    """Return about `most` round values on the axis of `cost`, no two written alike, and zero where it has a place."""
    written: dict[str, float] = {}
    for value in _cost_ticks(axis, cost, most):
        written.setdefault(cost.show(value), value)
    return list(written.values())


def _cost_ticks(axis: Axis, cost: Cost, most: int) -> list[float]:
    if not axis.log:
        unit = 1.0
        if cost.unit == "bytes":
            unit = 1024.0 ** max(0, math.floor(math.log(axis.high, 1024)))
        elif cost.unit == "s":
            unit = 3600.0 if axis.high >= 7200 else 60.0 if axis.high >= 120 else 1.0
        return [v * unit for v in round_values(axis.low / unit, axis.high / unit, most)]
    inside = [v for v in _STEPS[cost.unit] if axis.low <= v <= axis.high]
    decades = [v for v in inside if cost.unit in ("things", "ms") and f"{v:e}".startswith("1.")]
    if len(inside) > most and len(decades) >= 2:
        inside = decades
    stride = math.ceil(len(inside) / most) or 1
    return ([0.0] if axis.zero is not None else []) + inside[::stride]


def round_values(low: float, high: float, most: int) -> list[float]:
    """Return at most `most + 1` values within [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def score_ticks(reach: tuple[float, float], metric: Metric, most: int) -> list[tuple[str, float]]:
    """Return (label, value) of round scores; values that would be written alike appear once."""
    values = {plain(metric.show(v, unit=False)): v for v in round_values(*reach, most)}
    return list(values.items())


def focus(scores: Iterable[Score], lower_is_better: bool = False) -> tuple[float, float]:
    """Return the range of scores worth drawing: the better half with its intervals and everything near it.

    A baseline far behind would squeeze the others together; it is drawn at the edge with its value written.
    """
    sign = -1 if lower_is_better else 1
    reach = sorted((_reach(s, sign) for s in scores if s.mean is not None), key=lambda r: -r[1])
    if not reach:
        return 0.0, 1.0
    core = reach[: (len(reach) + 1) // 2]
    bottom, top = min(r[0] for r in core), max(r[2] for r in core)
    limit = bottom - 1.5 * max(top - bottom, 0.02)
    low = min(max(r[0], limit) for r in reach if r[1] >= limit)
    room = max(0.06 * (top - low), 0.004)
    return (low - room, top + room) if sign > 0 else (-top - room, -low + room)


def _reach(s: Score, sign: int) -> tuple[float, float, float]:
    mean = s.mean or 0.0
    values = [sign * v for v in (mean, s.low, s.high, *s.per_seed) if v is not None]
    return min(values), sign * mean, max(values)


def plain(shown: str) -> str:
    """Return a figure with its unit less the zeros behind the decimal point, for ticks."""
    figure, space, unit = shown.partition("\u00a0")
    return (figure.rstrip("0").rstrip(".") if "." in figure else figure) + space + unit
