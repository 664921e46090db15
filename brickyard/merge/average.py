"""Average: the (weighted) mean of the models, the plainest of merges and the baseline of all others.

    theta = sum_t w_t theta_t / sum_t w_t          one mean for every parameter; w_t = 1 unless weights are given

Source: Wortsman et al., "Model soups", arXiv 2203.05482 (uniform soup). Headline claim: fine-tuned models of one base
lie in one basin, so their mean is better than most of them on average. Left out: the greedy soup, which picks members
by their validation score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brickyard.core.errors import UsageError
from brickyard.core.method import Record

if TYPE_CHECKING:
    from brickyard.merge._engine import Piece

RECORD = Record(
    name="average",
    family="merge",
    title="Mean of the models' weights",
    paper="arXiv 2203.05482",
    part_of="lines",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the mean."""

    weights: tuple[float, ...] = ()
    """one weight a model, in their order; they need not sum to 1. None given: all alike"""

    def __post_init__(self) -> None:
        if self.weights and (min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf):
            raise UsageError(f"average: weights={list(self.weights)}; expected none below 0, and some above.")


def average(thetas: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return sum_t w_t theta_t / sum_t w_t of T tensors of equal shape."""
    weights = weights or [1.0] * len(thetas)
    out = torch.mul(thetas[0], weights[0])
    for theta, weight in zip(thetas[1:], weights[1:], strict=True):
        out.add_(theta, alpha=weight)
    return out.div_(sum(weights))


@dataclass(frozen=True)
class Mean:
    """The mean as the engine runs it; see `_engine.Rule`."""

    config: Config
    weights: bool = True
    scale: float = 1.0

    def check(self, models: int) -> None:
        """Raise UsageError where the weights are not as many as the models."""
        given = len(self.config.weights)
        if given and given != models:
            raise UsageError(f"average: {given} weights are given for {models} models; give one a model, or none.")

    def survey(self) -> None:
        return None

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        return average(models, self.config.weights)

    def coefficients(self, models: int) -> tuple[float, ...]:
        weights = self.config.weights or (1.0,) * models
        return tuple(weight / sum(weights) for weight in weights)


def rule(config: Config) -> Mean:
    """Return the mean that a config describes."""
    return Mean(config)
