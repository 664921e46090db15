"""The arc between two flattened tensors: the factors of both ends at a point on it."""

from __future__ import annotations

import math

STRAIGHT = 0.9995  # |cosine| above which the arc is a line: mergekit's and diffusers' value


def is_straight(cosine: float) -> bool:
    """Say whether two tensors are so nearly parallel that the arc between them is taken for a line."""
    return abs(cosine) > STRAIGHT


def arc(cosine: float, t: float) -> tuple[float, float]:
    """Return the factors of a and b at t on the arc from a to b, of which `cosine` tells the angle."""
    if is_straight(cosine):
        return 1 - t, t
    omega = math.acos(cosine)
    return math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
