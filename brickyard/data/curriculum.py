"""Competence curricula: the easiest share of the rows, growing with the root of time; baselines for `pudf`.

    c(t) = min(1, sqrt(c0^2 + (1 - c0^2) t / T))       t steps done, T = until * steps of the run
    rows = the c(t) N easiest of N                     at the start of every epoch

by=length: rows with fewer tokens are easier. by=loss: rows with a smaller loss -log p(y_i) under a logistic regression
on the frozen base's mean-pooled states that was not fitted on them (cross-fitting); its seconds are charged to the arm.
by=random: difficulties are drawn; what is left of a gain then is due to the schedule and not to the order. The steps
are those of the arm without it, and so is its learning-rate schedule.

Source: Platanios et al. 2019, "Competence-based Curriculum Learning for Neural Machine Translation", arXiv 1903.09848,
eq. 7 (schedule) and section 3.1 (length); Hacohen and Weinshall 2019, "On the Power of Curriculum Learning in Training
Deep Networks", arXiv 1904.03626 (loss of a transferred classifier). Claims: as good a model from fewer examples.
Left out: drawing each batch anew from the present share (an epoch keeps its rows, as with `pudf`); word rarity.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from brickyard.core.answers import Examples
from brickyard.core.curriculum import Curriculum
from brickyard.core.errors import Refused, UsageError
from brickyard.core.loop import State
from brickyard.core.method import Claim, Record
from brickyard.data._crowd import Design, Material, cross_fitted_losses

if TYPE_CHECKING:
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="curriculum",
    family="data",
    title="Competence curriculum: easy rows first, by length, loss or at random",
    paper="Competence-based Curriculum Learning for Neural Machine Translation, NAACL 2019, arXiv 1903.09848",
    slot="data",
    claims=(
        Claim(
            text="On 0.8 times the examples, rows ordered by loss lose at most 0.5 points to random order.",
            inequality="loss >= plain - 0.5",
            arms={
                "loss": "linear-probe:epochs=8 + curriculum:by=loss",
                "plain": "linear-probe:epochs=10",
            },
            control={
                "what": "random difficulties under the same schedule: no order is left",
                "arm": "linear-probe:epochs=8 + curriculum:by=random",
                "inequality": "loss > control",
            },
            gate="plain > majority + 10.0",
            seeds=5,
        ),
    ),
)

_STEPS = 100  # of L-BFGS; a linear model of a few hundred channels is done in fewer


@dataclass(frozen=True, kw_only=True)
class Config:
    by: Literal["length", "loss", "random"] = "length"
    """what makes a row hard: its tokens, its loss under a cross-fitted linear model, or chance (the control)"""
    start: float = 0.01
    """c0: the share of the rows in the first epoch"""
    until: float = 0.5
    """the share of the steps after which all rows are used"""
    min_size: int = 1
    """rows of an epoch at least"""
    folds: int = 3
    """folds of cross-fitting, for by=loss"""

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1 or not 0 < self.until <= 1:
            raise UsageError(f"curriculum: start={self.start} and until={self.until} must be in (0, 1].")
        if self.min_size < 1 or self.folds < 2:
            raise UsageError(f"curriculum: min_size={self.min_size} must be at least 1 and folds={self.folds} 2.")


def competence(progress: float, start: float) -> float:
    """Return c for `progress` = t / T, from `start` at 0 to 1 at 1 and beyond."""
    return min(1.0, math.sqrt(start**2 + (1 - start**2) * progress))


def easiest(difficulty_N: np.ndarray, share: float, min_size: int) -> np.ndarray:
    """Return the ceil(share N) easiest rows, `min_size` at least, ascending; of equals the first."""
    count = max(math.ceil(share * len(difficulty_N)), min_size)
    return np.sort(np.argsort(difficulty_N, kind="stable")[:count])


class CompetenceSchedule(Curriculum):
    """Chooses the easiest rows for each epoch by the steps done; the model is never asked."""

    def __init__(self, config: Config, difficulty_N: np.ndarray, **about: Any) -> None:
        super().__init__(**about)
        self.config, self.difficulty_N = config, difficulty_N

    def choose(self, state: State) -> tuple[np.ndarray, dict[str, Any]]:
        share = competence(state.step / (self.config.until * state.total), self.config.start)
        return easiest(self.difficulty_N, share, self.config.min_size), {"competence": share}


def curriculum(
    config: Config, ready: Prepared, sets: Mapping[str, Examples], device: torch.device
) -> CompetenceSchedule:
    """Give every training row a difficulty and return the schedule for one run.

    Raises UsageError where min_size exceeds the data, Refused where the task or the rows have no such difficulty.
    """
    train, started, seconds = ready.encoded["train"], time.monotonic(), 0.0
    if config.min_size > len(train):
        raise UsageError(f"curriculum: min_size={config.min_size} exceeds the {len(train)} training rows.")
    if config.by == "length":
        difficulty_N = train.lengths.astype(np.float64)
        if len(train) > 1 and (difficulty_N == difficulty_N[0]).all():
            raise Refused(f"all training rows are {train.lengths[0]} long, so by=length orders nothing; use by=loss.")
    elif config.by == "random":
        difficulty_N = np.random.Generator(np.random.PCG64(ready.setting.seed)).random(len(train))
    else:
        if ready.task.labels is None:
            raise Refused(f"by=loss scores rows by a classifier; this task is {ready.task.kind}. Use by=length.")
        material = Material.of(ready, sets, device, reads=("states",))
        started, seconds = time.monotonic(), material.seconds
        design = Design.cross_fit(len(train), 0, config.folds, 0)
        difficulty_N = cross_fitted_losses(material, ready.task.width, design, _STEPS)[: len(train)]
    return CompetenceSchedule(
        config,
        difficulty_N,
        seconds=seconds + time.monotonic() - started,
        digest=hashlib.sha256(difficulty_N.tobytes()).hexdigest(),
        prepared={"by": config.by},
    )
