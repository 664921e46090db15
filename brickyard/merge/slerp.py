"""SLERP: go from one model to another along the arc between them, tensor by tensor.

    cos w = <a, b> / (|a| |b|)                                  a, b: one tensor of both models, flattened [N]
    theta = (sin((1 - t) w) a + sin(t w) b) / sin w
    theta = (1 - t) a + t b                                     where |cos w| > 0.9995: a straight line

Of two models, a is the first and b the second; of one, a is the base and b the model, which takes back part of a
fine-tuning. Models fine-tuned from one base are nearly parallel, so that the straight line is the usual case; the
report counts the tensors in which it ran.

Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; for models: mergekit. Headline claim: none
of its own. Left out: the arc between changes instead of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brickyard.core.errors import NoEffect, UsageError
from brickyard.core.method import Record
from brickyard.merge._arc import arc, is_straight

if TYPE_CHECKING:
    from brickyard.merge._engine import Piece

RECORD = Record(
    name="slerp",
    family="merge",
    title="A point on the arc between two models",
    search={"t": (0.1, 0.3, 0.5, 0.7, 0.9)},
    part_of="lines",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SLERP."""

    t: float = 0.5
    """where on the arc: 0 is the first model (of one model, the base), 1 the second"""

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise UsageError(f"slerp: t={self.t}; expected 0 to 1.")


def cosine_of(products: Sequence[float]) -> float:
    """Return the cosine from <a, a>, <b, b>, <a, b>; 1 where one of the two is zero."""
    aa, bb, ab = products
    return min(1.0, max(-1.0, ab / math.sqrt(aa * bb))) if aa > 0 and bb > 0 else 1.0


def products_of(a_N: Tensor, b_N: Tensor) -> Tensor:
    """Return <a, a>, <b, b>, <a, b> in float64: [3]."""
    a_N, b_N = a_N.double(), b_N.double()
    return torch.stack([a_N.dot(a_N), b_N.dot(b_N), a_N.dot(b_N)])


def slerp(a_N: Tensor, b_N: Tensor, t: float) -> Tensor:
    """Return the point at t on the arc between two flattened tensors."""
    first, second = arc(cosine_of(products_of(a_N, b_N).tolist()), t)
    return (a_N * first).add_(b_N, alpha=second)


@dataclass(frozen=True)
class Angles:
    """The survey that finds the angle between the two models in every tensor."""

    t: float
    scope: str = "tensor"
    rounds: int = 1

    def count(self, turn: int, base_n: Tensor, models: Sequence[Tensor], known: Any) -> Tensor:
        return products_of(*ends(base_n, models))

    def settle(self, turn: int, total: Tensor, elements: int, known: Any) -> dict[str, Any]:
        cosine = cosine_of(total.tolist())
        return {"cosine": cosine, "straight": is_straight(cosine), "factors": list(arc(cosine, self.t))}


def ends(base_n: Tensor, models: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the two ends of the arc: the two models, or the base and the one model."""
    return (models[0], models[1]) if len(models) == 2 else (base_n, models[0])


@dataclass(frozen=True)
class Slerp:
    """SLERP as the engine runs it; see `_engine.Rule`."""

    t: float
    weights: bool = True
    scale: float = 1.0

    def check(self, models: int) -> None:
        """Raise UsageError unless there are one or two models, NoEffect where the result would be the arc's start."""
        if models > 2:
            raise UsageError(f"slerp: an arc joins two models; {models} were given. Give one or two --bricks.")
        if self.t == 0:
            start = "the base" if models == 1 else "the first model"
            raise NoEffect(f"slerp: at t=0 the merge would be {start} itself; give a t above 0.")

    def survey(self) -> Angles:
        return Angles(self.t)

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        a_n, b_n = ends(base_n, models)
        first, second = known["factors"]
        return (a_n * first).add_(b_n, alpha=second)

    def coefficients(self, models: int) -> None:
        return None


def rule(config: Config) -> Slerp:
    """Return the SLERP that a config describes."""
    return Slerp(config.t)
