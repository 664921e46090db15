"""DP: training whose weights tell almost nothing of any one row, with a proven bound on how much.

    B     each of n rows with probability q = batch/n, anew every step (Poisson; empty batches count too)
    g     = 1/(q n) [ sum over b in B of g_b min(1, C/|g_b|)  +  sigma C N(0, I) ]        g_b: row b's gradient, all
    theta <- AdamW(theta, g)                                                              trainable numbers together

sigma is the least noise whose certified epsilon at `delta` over all planned steps is at most `epsilon` (privacy loss
distributions, `core/privacy.py`). It works beside every tuner and head: `lora + dp:epsilon=8`, `full + dp`,
`linear-probe + dp`. Fewer trainable numbers mean less noise in all, so adapters lose less than full training.

Source: Abadi et al. 2016, arXiv 1607.00133; for language models Li et al. 2022, arXiv 2110.05679, and Yu et al. 2022,
arXiv 2110.06500, whose headline claim is that private LoRA comes within a few points of the non-private one at
epsilon near 6. Gradients of rows without making them: `_per_sample.py`; batches, noise and what the guarantee covers:
`_step.py`. Noise and batches come from the operating system's entropy, not from --seed.

Much of every step is noise and steps are few (batches of 256), so a tuner's learning rates are taken ten times, in a
search too; a rate that the arm names is taken as it is. With LoRA's own 1e-3 and three epochs of SST-2, as with 3e-3,
the majority class is left; with 1e-2 it comes within a few points of training without privacy.

The unit that is protected is one row of train (added or removed). Validation rows decide nothing by default, for the
weights of the last step are kept. Left out: user-level privacy, noise safe against floating-point attacks, and language
models' tasks, whose rows are blocks packed from several documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brickyard.core.attached import Attached
from brickyard.core.loop import Training
from brickyard.core.method import Claim, Record
from brickyard.core.privacy import noise_for
from brickyard.core.task import Task
from brickyard.private._step import PrivateStep, check_budget

RECORD = Record(
    name="dp",
    family="private",
    title="DP-SGD with AdamW: clipped rows, noise, and a certified epsilon",
    paper="Deep Learning with Differential Privacy, arXiv 1607.00133",
    needs=("text-classification", "pair-classification", "regression", "image-classification"),
    because="a row of a language model's data is a block packed from several documents, which is not what to protect",
    slot="step",
    training={"batch": 256},
    times_lr=10.0,
    claims=(
        Claim(
            text="LoRA of the last layer with epsilon 8 comes within 5 points of the same without privacy.",
            inequality="private >= plain - 5.0",
            arms={
                "private": 'lora:target=["*.layer.5.*query","*.layer.5.*value"] + dp:epsilon=8',
                "plain": 'lora:target=["*.layer.5.*query","*.layer.5.*value"]',
            },
            gate="plain >= majority + 20.0",
            control={
                "what": "noise for epsilon 0.02 drowns what the rows say",
                "arm": 'lora:target=["*.layer.5.*query","*.layer.5.*value"] + dp:epsilon=0.02',
                "inequality": "private > control + 10.0",
            },
            control_seeds=1,
            data="sst2|embedded:stdlib-topics",
            epochs=4,
            batch=256,
            train_rows=6000,
            max_length=32,
            lrs=(3e-3, 1e-2),
            full={"arms": {"private": "lora + dp:epsilon=8", "plain": "lora"}, "max_length": 64, "control_seeds": 0},
        ),
        Claim(
            text="A private LoRA step takes at most 1.15 times as long as a plain one (batch 256, 32 tokens).",
            measure="cost",
            part="time",
            batch=256,
        ),
        Claim(
            text="Its peak memory is at most 0.6 of the plain step's, for rows are taken 64 at a time.",
            measure="cost",
            part="memory",
            kind="counted",
            batch=256,
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the private step; UsageError for values out of range."""

    epsilon: float = 8.0
    """budget of one run, certified; sets the noise"""
    delta: float = 1e-5
    """probability with which the bound may fail; below 1/n"""
    clip: float = 1.0
    """C: the norm that no row's gradient exceeds"""
    microbatch: int = 64
    """rows whose gradients are in memory at a time; changes no number but rounding"""
    keep: Literal["last", "best"] = "last"
    """weights kept: of the last step, or the best by validation, which then must be public"""

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta, self.clip, self.microbatch)


def step(config: Config, attached: Attached, training: Training, *, rows: int, task: Task) -> PrivateStep:
    """Return the private step for `rows` rows of train; see `_step.PrivateStep` for its errors."""
    return PrivateStep(
        attached,
        training,
        rows=rows,
        task=task,
        noise_for=lambda rate, steps: noise_for(config.epsilon, config.delta, rate, steps),
        clip=config.clip,
        delta=config.delta,
        microbatch=config.microbatch,
        keep=config.keep,
    )
