"""DARE: drop entries of every change at random and rescale the rest, then add them up or elect signs.

    tau_t  = theta_t - theta_0                     theta_0: the base; entries over all parameters
    m_t    ~ Bernoulli(1 - p), entry by entry
    tau'_t = m_t tau_t / (1 - p)                   the expectation of tau'_t is tau_t
    theta  = theta_0 + scale sum_t tau'_t          or scale times TIES' disjoint mean of the tau'_t, with signs=true

The draw follows from (seed, model, tensor, place in the tensor), so it is the same in every run, on any number of
threads and however the tensors are spread over files.

Source: Yu et al., "Language Models are Super Mario", arXiv 2311.03099, equation 2. Headline claim: 90 % of the change
of a fine-tuned language model can go without loss, and merges then interfere less. Left out: mergekit's rescaling to
the former L1 norm.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brickyard.core.errors import UsageError
from brickyard.core.method import Record
from brickyard.merge._signs import disjoint_mean

if TYPE_CHECKING:
    from brickyard.merge._engine import Piece

RECORD = Record(
    name="dare",
    family="merge",
    title="Changes thinned out at random and rescaled",
    paper="arXiv 2311.03099",
    search={"p": (0.5, 0.7, 0.9), "scale": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)},
    part_of="lines",
)
STRENGTH = "scale"  # the option that a search chooses on validation rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DARE."""

    p: float = 0.9
    """probability that an entry is dropped, in [0, 1)"""
    scale: float = 0.3
    """final scale of the merged change; with signs=true, 1 is usual; or search: chosen on validation rows (--data)"""
    signs: bool = False
    """elect signs and average what agrees, as TIES does, in place of the sum"""
    seed: int = 0
    """of the draw"""

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise UsageError(f"dare: p={self.p}; expected at least 0 and below 1.")
        if not math.isfinite(self.scale):
            raise UsageError(f"dare: scale={self.scale}; expected a finite number.")


def thin(tau_N: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Return the change with each entry dropped with probability p, the others divided by 1 - p."""
    if p == 0:
        return tau_N
    kept_N = torch.rand(tau_N.shape, generator=generator) >= p
    return (tau_N * kept_N).div_(1 - p)


def generator_of(seed: int, model: int, piece: Piece) -> torch.Generator:
    """Return the source of a piece's draw; it depends on nothing but what is named."""
    key = hashlib.blake2b(f"{seed}/{model}/{piece.start}/{piece.name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


@dataclass(frozen=True)
class Dare:
    """DARE as the engine runs it; see `_engine.Rule`."""

    config: Config
    weights: bool = False

    @property
    def scale(self) -> float:
        return self.config.scale

    def check(self, models: int) -> None:
        """Any number of models will do."""

    def survey(self) -> None:
        return None

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        config = self.config
        thinned = [thin(tau_n, config.p, generator_of(config.seed, i, piece)) for i, tau_n in enumerate(models)]
        if config.signs:
            return disjoint_mean(thinned)
        out = thinned[0].clone()
        for tau_n in thinned[1:]:
            out += tau_n
        return out

    def coefficients(self, models: int) -> None:
        return None


def rule(config: Config) -> Dare:
    """Return the DARE that a config describes."""
    return Dare(config)
