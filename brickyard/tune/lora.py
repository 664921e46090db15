"""LoRA: a trained low-rank change of chosen linear layers. PEFT's implementation.

    y = W x + b + (alpha / r) B A dropout(x)        A [r, n], B [m, r], W [m, n] frozen; B = 0 at the start

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, section 4.1.
Headline claim: quality of full fine-tuning with a small fraction of its trainable parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import peft
from torch import nn

from brickyard.core.attached import Attached
from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.core.wrap import attach_peft, check_rank, targets

RECORD = Record(
    name="lora",
    family="tune",
    title="Low-rank adaptation (PEFT's LoRA)",
    paper="LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685",
    slot="tuner",
    search={"lr": (3e-4, 1e-3, 3e-3), "r": (8, 16)},
    training={"lr": 1e-3},
    claims=(
        Claim(
            text="LoRA r=8 on query and value comes within 2 points of full tuning with under 2 % of its parameters.",
            inequality="lora >= full - 2.0",
            arms={"lora": "lora", "full": "full"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "lora",
                "labels": "shuffled",
                "inequality": "lora > control + 5.0",
            },
            gate="full > majority + 10.0",
            data="embedded:stdlib-topics",
            epochs=3,
            lr_factors=(1.0, 3.0),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 8
    """rank of the change"""
    alpha: int = 16
    """numerator of the scaling alpha / r"""
    dropout: float = 0.0
    """dropout on the input of A"""
    target: str | tuple[str, ...] = ("query", "value")
    """roles, `blocks`, `all-linear`, or patterns of layer names"""
    rslora: bool = False
    """scale by alpha / sqrt(r) instead"""
    dora: bool = False
    """decompose into magnitude and direction (DoRA)"""

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0:
            raise UsageError(f"lora: r={self.r} and alpha={self.alpha} must be positive.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora: dropout={self.dropout} must be in [0, 1).")


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put LoRA on the target layers of `model` (which carries the task's head)."""
    patterns = (config.target,) if isinstance(config.target, str) else config.target
    matched = targets(model, patterns)
    check_rank(model, matched, config.r, "lora")
    return attach_peft(
        model,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
        ),
        matched,
    )
