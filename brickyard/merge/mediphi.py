"""MediPhi's way from experts to one model: give each back part of the base, trim its change at both ends, add them up.

    w_t    = angle between theta_0 and theta_t                             theta_0: the base; one tensor, flattened [N]
    rho_t  = [sin((1-t) w_t) theta_0 + sin(t w_t) theta_t] / sin w_t - theta_0         repair: SLERP with the base
    rho_t  = t (theta_t - theta_0)                                         where |cos w_t| > 0.9995
    B(rho) = rho where l <= |rho| <= u, else 0           u: the (g+1)-th largest, l: the (g+k)-th largest magnitude
             k = floor(density N), at least 1;  g = floor(gamma N), at most N - k
    theta  = theta_0 + scale sum_t B(rho_t)

B is Model Breadcrumbs: the largest entries of a change are taken for outliers, the smallest for noise. Of equal
magnitudes at a bound all stay, so that a constant tensor is not lost. Experts tuned from one base are nearly parallel
to it: then the repair is the straight line, which is WiSE-FT, and the report counts the tensors in which it was.
`breadcrumbs` is the same without the repair. SLERP acts on whole weights here, as in the paper, not on changes.

This is the merging part. The whole way, with the tuning of experts, the choice of t, density and scale on validation
rows, and the alignment, is the recipe `brickyard run embedded:mediphi`.

Source: Corbeil et al., "A Modular Approach for Clinical SLMs Driven by Synthetic Data with Pre-Instruction Tuning,
Model Merging, and Clinical-Tasks Alignment", arXiv 2505.10717; Davari and Belilovsky, "Model Breadcrumbs", arXiv
2312.06795. Headline claim: the merged model is above its base on clinical tasks, by 64 % at entities and 44 % at
coding. Left out: weights by expert, the evolutionary search, and pre-instruction tuning with a generator model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brickyard.core.errors import UsageError
from brickyard.core.kth_largest import count_lower, count_upper, locate, magnitude
from brickyard.core.method import Claim, Record
from brickyard.merge._arc import arc, is_straight

if TYPE_CHECKING:
    from brickyard.merge._engine import Piece

RECORDS = (
    Record(
        name="mediphi",
        family="merge",
        title="Experts given back part of the base, trimmed at both ends, added up",
        paper="arXiv 2505.10717",
        search={"t": (0.3, 0.5, 0.7, 0.9), "scale": (0.3, 0.6, 1.0)},
        claims=(
            Claim(
                text="Experts of four specialities, repaired and merged into one, are below their base in loss on the "
                "held-out text of every speciality.",
                measure="specialities",
                part="unified",
                base="embedded:pylm-small",
                data="embedded:python-general",
                epochs=3,
                seeds=2,
                lrs=(3e-3,),
                train_rows=320,
                batch=16,
                max_length=256,
                full={"base": "embedded:pylm", "train_rows": 0, "epochs": 5, "max_length": 512},
            ),
            Claim(
                text="An expert that SLERP has given back part of the base keeps 80 % of what it had gained on its "
                "speciality, with at most 30 % of what it had lost on general text.",
                measure="specialities",
                part="repaired",
                base="embedded:pylm-small",
                data="embedded:python-general",
                epochs=3,
                seeds=2,
                lrs=(3e-3,),
                train_rows=320,
                batch=16,
                max_length=256,
                full={"base": "embedded:pylm", "train_rows": 0, "epochs": 5, "max_length": 512},
            ),
            Claim(
                text="A merge of repaired experts is no worse than a merge of the experts as they are, on the average "
                "over the specialities and general text.",
                measure="specialities",
                part="repaired first",
                base="embedded:pylm-small",
                data="embedded:python-general",
                epochs=3,
                seeds=2,
                lrs=(3e-3,),
                train_rows=320,
                batch=16,
                max_length=256,
                full={"base": "embedded:pylm", "train_rows": 0, "epochs": 5, "max_length": 512},
            ),
        ),
    ),
    Record(
        name="breadcrumbs",
        family="merge",
        title="Changes without their largest and smallest entries, added up",
        paper="arXiv 2312.06795",
        fixed={"t": 1.0},
        search={"density": (0.5, 0.7, 0.9), "scale": (0.3, 0.6, 1.0)},
        part_of="mediphi",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the merge."""

    t: float = 0.5
    """how far from the base towards each expert, on the arc: 1 takes the expert as it is"""
    density: float = 0.9
    """share of each tensor's entries that stays, in (0, 1]"""
    gamma: float = 0.01
    """share of each tensor's entries that goes because they are the largest, in [0, 1)"""
    scale: float = 0.5
    """final scale of the summed change"""

    def __post_init__(self) -> None:
        if not 0 < self.t <= 1:
            raise UsageError(f"mediphi: t={self.t}; expected above 0 (the base) and at most 1 (the expert).")
        if not 0 < self.density <= 1:
            raise UsageError(f"mediphi: density={self.density}; expected above 0 and at most 1.")
        if not 0 <= self.gamma < 1:
            raise UsageError(f"mediphi: gamma={self.gamma}; expected at least 0 and below 1.")
        if not math.isfinite(self.scale):
            raise UsageError(f"mediphi: scale={self.scale}; expected a finite number.")


def ranks_kept(elements: int, density: float, gamma: float) -> tuple[int, int]:
    """Return the ranks, by magnitude and from 1, of the largest and of the smallest entry that stays."""
    kept = max(1, int(density * elements))
    largest = min(int(gamma * elements), elements - kept)
    return largest + 1, largest + kept


def crumbs(tau_N: Tensor, low: float, high: float) -> Tensor:
    """Return the change with every entry whose magnitude is outside of [low, high] set to 0."""
    size_N = tau_N.abs()
    return torch.where((size_N >= low) & (size_N <= high), tau_N, 0.0)


def breadcrumbs(tau_N: Tensor, density: float, gamma: float) -> Tensor:
    """Return one tensor's change [N], float32, without its largest and smallest entries."""
    first, last = ranks_kept(tau_N.numel(), density, gamma)
    ordered = tau_N.abs().flatten().sort(descending=True).values
    return crumbs(tau_N, float(ordered[last - 1]), float(ordered[first - 1]))


def products_with_change(base_N: Tensor, tau_N: Tensor) -> Tensor:
    """Return <a, a>, <b, b>, <a, b> of the base a and the model b = a + tau in float64: [3]."""
    a_N, tau_N = base_N.double(), tau_N.double()
    aa, at, tt = a_N.dot(a_N), a_N.dot(tau_N), tau_N.dot(tau_N)
    return torch.stack([aa, aa + 2 * at + tt, aa + at])


def parts(cosine: float, t: float) -> tuple[float, float]:
    """Return how much of the base and of the change makes up SLERP's point less the base: f + g - 1 and g."""
    if is_straight(cosine):
        return 0.0, t
    first, second = arc(cosine, t)
    return first + second - 1, second


def repair(base_N: Tensor, tau_N: Tensor, of_base: float, of_change: float) -> Tensor:
    """Return SLERP's point less the base, from the base and an expert's change; the factors are those of `parts`."""
    out_N = tau_N * of_change
    return out_N.add_(base_N, alpha=of_base) if of_base else out_N


@dataclass(frozen=True)
class Bounds:
    """The survey of one tensor: the angles to the base, then every repaired change's two bounds, in two rounds."""

    config: Config
    scope: str = "tensor"
    rounds: int = 3

    def count(self, turn: int, base_n: Tensor, models: Sequence[Tensor], known: Any) -> Tensor:
        if turn == 0:
            return torch.stack([products_with_change(base_n, tau_n) for tau_n in models])
        changes = [repair(base_n, tau_n, *one["parts"]) for tau_n, one in zip(models, known, strict=True)]
        if turn == 1:
            return torch.stack([count_upper(rho_n) for rho_n in changes])
        return torch.stack(
            [
                torch.stack([count_lower(rho_n, upper) for upper, _ in one["bins"]])
                for rho_n, one in zip(changes, known, strict=True)
            ]
        )

    def settle(self, turn: int, total: Tensor, elements: int, known: Any) -> list[dict[str, Any]]:
        if turn == 0:
            return [self._angle(products) for products in total.tolist()]
        if turn == 1:
            ranks = ranks_kept(elements, self.config.density, self.config.gamma)
            return [
                {**one, "bins": [list(locate(counts, rank)) for rank in ranks]}
                for one, counts in zip(known, total, strict=True)
            ]
        return [self._bounds(one, counts) for one, counts in zip(known, total, strict=True)]

    def _angle(self, products: Sequence[float]) -> dict[str, Any]:
        if self.config.t == 1:
            return {"parts": [0.0, 1.0]}
        aa, bb, ab = products
        cosine = min(1.0, max(-1.0, ab / math.sqrt(aa * bb))) if aa > 0 and bb > 0 else 1.0
        return {"parts": list(parts(cosine, self.config.t)), "cosine": cosine, "straight": is_straight(cosine)}

    def _bounds(self, one: dict[str, Any], counts: Tensor) -> dict[str, Any]:
        found = [magnitude(upper, locate(c, left)[0]) for c, (upper, left) in zip(counts, one["bins"], strict=True)]
        return {**{k: v for k, v in one.items() if k != "bins"}, "high": found[0], "low": found[1]}


@dataclass(frozen=True)
class MediPhi:
    """The merge as the engine runs it; see `_engine.Rule`. What is known of a tensor is one dictionary a model."""

    config: Config
    weights: bool = False

    @property
    def scale(self) -> float:
        return self.config.scale

    def check(self, models: int) -> None:
        """Any number of models will do."""

    def survey(self) -> Bounds:
        return Bounds(self.config)

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        out: Tensor | None = None
        for tau_n, one in zip(models, known, strict=True):
            kept_n = crumbs(repair(base_n, tau_n, *one["parts"]), one["low"], one["high"])
            out = kept_n if out is None else out.add_(kept_n)
        assert out is not None
        return out

    def coefficients(self, models: int) -> None:
        return None


def rule(config: Config) -> MediPhi:
    """Return the merge that a config describes."""
    return MediPhi(config)
