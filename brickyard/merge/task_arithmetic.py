"""Task arithmetic: add up what each model changed, and scale the sum.

    tau_t = theta_t - theta_0                      theta_0: the base; one tau_t for every parameter
    theta = theta_0 + scale sum_t tau_t

Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, section 2. Headline claim: sums of task
vectors give one model that does well on all tasks (69.7 % over 8 image tasks with CLIP ViT-B/32, against 48.0 % of the
untouched base, as later papers measured it). Left out: negation (give a scale below 0) and analogies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from brickyard.core.errors import UsageError
from brickyard.core.method import Record

if TYPE_CHECKING:
    from brickyard.merge._engine import Piece

RECORD = Record(
    name="task-arithmetic",
    family="merge",
    title="Scaled sum of the models' changes",
    paper="arXiv 2212.04089",
    search={"scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)},
    part_of="lines",
)
STRENGTH = "scale"  # the option that a search chooses on validation rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the sum."""

    scale: float = 0.3
    """final scale of the summed change, or search: chosen on validation rows (--data); 0.3 was chosen for 8 tasks"""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UsageError(f"task-arithmetic: scale={self.scale}; expected a finite number.")


def add_up(taus: Sequence[Tensor]) -> Tensor:
    """Return the sum of T changes of equal shape."""
    out = taus[0].clone()
    for tau in taus[1:]:
        out += tau
    return out


@dataclass(frozen=True)
class Sum:
    """The sum as the engine runs it; see `_engine.Rule`."""

    scale: float
    weights: bool = False

    def check(self, models: int) -> None:
        """Any number of models will do."""

    def survey(self) -> None:
        return None

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        return add_up(models)

    def coefficients(self, models: int) -> tuple[float, ...]:
        return (1.0,) * models


def rule(config: Config) -> Sum:
    """Return the sum that a config describes."""
    return Sum(config.scale)
