"""EW-Tune: private tuning whose noise an Edgeworth accountant sets, on low-rank views of the gradients (RGP).

For a matrix W [P, D] that has moved by W - W0 since the start, rank r:

    R    = orth(random [r, D]);   L = orth((W - W0) R'),  R = orth(L' (W - W0))      one power iteration a step
    dL_b = G_b R' [P, r],  dR_b = L' G_b [r, D]           G_b: row b's gradient of W, never made
    (dL, dR) = 1/(q n) [ sum over b in B of (dL_b, dR_b) min(1, C/|.|) + sigma C N(0, I) ]
    dW   = dL R + L dR - L L' dL R                         then AdamW on dW

so the noise falls on r (P + D) numbers in place of P D. The norm |.| is over all views of the row, small matrices,
biases and norms whole. L and R come from W - W0, which is noisy already, and from random numbers: they cost nothing.

sigma is the least noise whose *estimated* epsilon (Edgeworth series of the privacy loss, `_estimates.py`) is at most
`epsilon`; `accountant=pld` takes the certified bound instead, `rdp` the moments accountant's. Every run reports the
certified epsilon of what it did; the estimate stands beside it under its own name, and may lie below it. The certified
bound sets the noise where the series cannot be trusted up to the budget (few steps, a skew loss: then the least noise
at which it can be is more than the budget asks for), and where its noise would cost more than 1.25 times the budget by
the certified bound. Every run says what set its noise.

Source: "Privately Fine-Tuning Large Language Models with Differential Privacy", arXiv 2210.15042; the series: arXiv
2206.04236; RGP: Yu et al. 2021, arXiv 2106.09352. Headline claim: up to 5.6 % less noise and 1.1 % more accuracy than
the moments accountant's at the same (epsilon, delta) on RoBERTa. The release draws batches of fixed size from a shuffle
while its accountant assumes Poisson sampling; here sampling is Poisson. Left out: the accountant paper's uniform error
bounds, which did not converge in any setting that was tried.

Shapes: B rows, P outputs, D inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from brickyard.core.attached import Attached
from brickyard.core.errors import Refused, UsageError
from brickyard.core.loop import Training
from brickyard.core.method import Claim, Record
from brickyard.core.privacy import Mechanism, epsilon_of, least_noise
from brickyard.core.privacy import noise_for as certified_noise
from brickyard.core.task import Task
from brickyard.private._engines import LEFT, RIGHT, Factors
from brickyard.private._entropy import gaussian, generator
from brickyard.private._estimates import edgeworth_epsilon, renyi_epsilon
from brickyard.private._step import PrivateStep, Whole, check_budget

NEAREST = 0.01  # how far below the budget the estimate may lie at the noise that it sets: more is no root
MOST_OVER = 1.25  # times the budget that the certified epsilon may be at the estimate's noise

RECORD = Record(
    name="ew-tune",
    family="private",
    title="DP tuning on low-rank gradients, its noise set by an Edgeworth accountant",
    paper="Privately Fine-Tuning Large Language Models with DP, arXiv 2210.15042",
    needs=("text-classification", "pair-classification", "regression", "image-classification"),
    because="a row of a language model's data is a block packed from several documents, which is not what to protect",
    slot="step",
    training={"batch": 256},
    times_lr=10.0,
    presets={"certified": {"accountant": "pld"}},
    claims=(
        Claim(
            text="At epsilon 3 (q = 0.01, 1,000 steps, delta 1e-5) Edgeworth and PLD need less noise than Rényi.",
            measure="noise",
            part="less",
        ),
        Claim(
            text="The Edgeworth estimate lies within 8 % of the certified bound in five settings.",
            measure="noise",
            part="near",
        ),
        Claim(
            text="Accuracy with Edgeworth's noise is no more than 0.3 points below that with Rényi's noise.",
            inequality="edgeworth >= renyi - 0.3",
            arms={
                "edgeworth": "linear-probe + ew-tune:epsilon=3,rank=0,order=2,clip=1.0",
                "renyi": "linear-probe + ew-tune:epsilon=3,rank=0,accountant=rdp,clip=1.0",
            },
            gate="renyi >= majority + 10.0",
            control={
                "what": "noise for epsilon 0.02 drowns what the rows say",
                "arm": "linear-probe + ew-tune:epsilon=0.02,rank=0,accountant=pld,clip=1.0",
                "inequality": "edgeworth > control + 5.0",
            },
            control_seeds=5,
            data="sst2|embedded:stdlib-topics",
            epochs=6,
            batch=128,
            train_rows=6000,
            lrs=(1e-2,),
            seeds=20,
            full={
                "arms": {
                    "edgeworth": "lora:r=4 + ew-tune:epsilon=3,rank=0,order=2,clip=1.0",
                    "renyi": "lora:r=4 + ew-tune:epsilon=3,rank=0,accountant=rdp,clip=1.0",
                },
                "lrs": (3e-3,),
                "seeds": 3,
                "control_seeds": 3,
            },
        ),
        Claim(
            text="Rank-1 views come within 1.5 points of whole gradients, and take at most 1.2 r(P + D)/(P D) of the "
            "bytes of rows' gradients.",
            measure="low_rank",
            control_seeds=1,
            data="sst2|embedded:stdlib-topics",
            epochs=4,
            batch=256,
            train_rows=6000,
            max_length=32,
            lrs=(3e-3, 1e-2, 3e-2),
            seeds=2,
            full={"epochs": 8, "train_rows": 0, "max_length": 64, "seeds": 3, "control_seeds": 0},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of EW-Tune; UsageError for values out of range."""

    epsilon: float = 8.0
    """budget of one run by `accountant`; sets the noise"""
    delta: float = 1e-5
    """probability with which the bound may fail; below 1/n"""
    clip: float = 10.0
    """C: the norm that no row's view exceeds"""
    rank: int = 1
    """r of the views of matrices; 0: whole gradients"""
    accountant: Literal["edgeworth", "pld", "rdp"] = "edgeworth"
    """what sets the noise: the Edgeworth estimate, the certified bound, or Rényi's (moments accountant)"""
    order: int = 1
    """of the Edgeworth series, 1 (as released) or 2"""
    microbatch: int = 64
    """rows whose gradients are in memory at a time; changes no number but rounding"""
    keep: Literal["last", "best"] = "last"
    """weights kept: of the last step, or the best by validation, which then must be public"""

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta, self.clip, self.microbatch)
        if self.rank < 0:
            raise UsageError(f"rank={self.rank}: give 1 or more, or 0 for whole gradients.")
        if self.order not in (1, 2):
            raise UsageError(f"order={self.order}: the Edgeworth series is written out to order 1 or 2.")


def power_iteration(moved_PD: Tensor, r_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Return (L [P, r], R [r, D]) with orthonormal columns and rows that span most of `moved_PD`.

    r_RD: what to begin with, of full rank. Where `moved_PD` is zero, R is r_RD made orthonormal, and L any basis.
    """
    r_RD = _orthonormal(r_RD.mT).mT
    l_PR = _orthonormal(moved_PD @ r_RD.mT)
    grown_RD = l_PR.mT @ moved_PD
    # Without a movement there is nothing to turn towards.
    return l_PR, _orthonormal(grown_RD.mT).mT if bool(grown_RD.any()) else r_RD


def _orthonormal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q


def rebuilt(l_PR: Tensor, r_RD: Tensor, dl_PR: Tensor, dr_RD: Tensor) -> Tensor:
    """Return dW = dL R + L dR - L L' dL R [P, D].

    With dL = G R' and dR = L' G it is G projected onto matrices whose columns lie in L's span or rows in R's.
    """
    return dl_PR @ r_RD + l_PR @ (dr_RD - (l_PR.mT @ dl_PR) @ r_RD)


class Noise(NamedTuple):
    """A noise multiplier, and in words what set it."""

    multiplier: float
    set_by: str


@cache
def noise_found(config: Config, rate: float, steps: int) -> Noise:
    """Return the noise for the budget by the chosen accountant, or by the certified bound where the series fails."""
    if config.accountant == "rdp":
        renyi = least_noise(lambda s: renyi_epsilon(Mechanism(s, rate, steps), config.delta), config.epsilon)
        return Noise(renyi, "Rényi's bound")
    if config.accountant == "edgeworth":
        sigma, why = _by_estimate(config, rate, steps)
        if not why:
            return Noise(sigma, f"the Edgeworth estimate, order {config.order}")
    certified = certified_noise(config.epsilon, config.delta, rate, steps)
    return Noise(certified, "the certified bound" + (f", for {why}" if config.accountant == "edgeworth" else ""))


def noise_of(config: Config, rate: float, steps: int) -> float:
    """Return the noise multiplier alone; see `noise_found`."""
    return noise_found(config, rate, steps).multiplier


def _by_estimate(config: Config, rate: float, steps: int) -> tuple[float, str]:
    """Return the noise at which the estimate is the budget, or why there is none that may be used ("" where it is)."""

    def at(sigma: float) -> float:
        try:
            return edgeworth_epsilon(Mechanism(sigma, rate, steps), config.delta, config.order)
        except Refused:
            return math.inf

    try:
        sigma = least_noise(at, config.epsilon)
    except UsageError:
        return math.nan, "the Edgeworth series holds at no noise that meets the budget"
    # Where the series is refused just below sigma, the search stopped at the edge, with noise for a smaller budget.
    if at(sigma) < (1 - NEAREST) * config.epsilon:
        return math.nan, "the Edgeworth series does not hold up to the budget"
    cost = epsilon_of([Mechanism(sigma, rate, steps)], config.delta)
    if cost > MOST_OVER * config.epsilon:
        return math.nan, f"the Edgeworth estimate's noise would cost epsilon {cost:.3g}"
    return sigma, ""


class LowRank:
    """Matrices seen through factors of rank r, rebuilt every step from how far they have moved; the rest whole."""

    def __init__(self, rank: int, named: Mapping[str, nn.Parameter]) -> None:
        self.rank = rank
        # Only where factors are fewer numbers than the matrix.
        self.start = {
            name: p.detach().clone()
            for name, p in named.items()
            if p.ndim == 2 and rank * sum(p.shape) < p.numel() and rank <= min(p.shape)
        }
        self.now: Factors = {}

    def factors(self, named: Mapping[str, nn.Parameter]) -> Factors:
        """Return (L, R) of every matrix that is seen through them."""
        made, source = {}, generator()
        for name, start in self.start.items():
            moved = (named[name].detach() - start).float()
            shape = (self.rank, moved.shape[1])
            begin = gaussian(shape, source, moved.device)
            if not bool(moved.any()):
                # Before the first step L is as free as R.
                moved = gaussian(moved.shape, source, moved.device)
            made[name] = power_iteration(moved, begin)
        self.now = made
        return made

    def shapes(self, named: Mapping[str, nn.Parameter]) -> dict[str, torch.Size]:
        """What is summed over rows: name -> shape, two for a matrix seen through factors."""
        found = {}
        for name, p in named.items():
            if name in self.start:
                found[name + LEFT] = torch.Size((p.shape[0], self.rank))
                found[name + RIGHT] = torch.Size((self.rank, p.shape[1]))
            else:
                found[name] = p.shape
        return found

    def gradients(self, noisy: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of every parameter from the noisy sums."""
        found = {name: t for name, t in noisy.items() if not name.endswith((LEFT, RIGHT))}
        for name, (left, right) in self.now.items():
            found[name] = rebuilt(left, right, noisy[name + LEFT], noisy[name + RIGHT])
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return W0 of the matrices: a resumed run must measure how far they moved from the same place."""
        return dict(self.start)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take W0 back."""
        self.start = {name: tensors[name].to(t) for name, t in self.start.items()}


def step(config: Config, attached: Attached, training: Training, *, rows: int, task: Task) -> PrivateStep:
    """Return the private step for `rows` rows of train; see `_step.PrivateStep` for its errors."""
    return PrivateStep(
        attached,
        training,
        rows=rows,
        task=task,
        noise_for=partial(noise_of, config),
        set_by=lambda rate, steps: noise_found(config, rate, steps).set_by,
        clip=config.clip,
        delta=config.delta,
        microbatch=config.microbatch,
        keep=config.keep,
        order=config.order,
        view=partial(LowRank, config.rank) if config.rank else Whole,
    )
