"""FourierFT: a weight change whose Fourier spectrum has a few trained coefficients at random places. PEFT's.

    y = W x + dW x,   dW = scaling Re(F^-1(S))      S [m, n] is zero but for K trained entries at drawn places
                                                    F^-1: the inverse 2-D Fourier transform, divided by m n

Source: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", ICML 2024, arXiv 2405.03003.
Headline claim: LoRA's quality with a small fraction of its parameters. The coefficients start as normal noise, so that
a fresh adapter is not the base; `zero` starts at the base. All layers of one shape share the places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import peft
from torch import nn

from brickyard.core.attached import Attached
from brickyard.core.errors import UsageError
from brickyard.core.method import Record
from brickyard.core.task import Task
from brickyard.core.wrap import attach_peft, targets

RECORD = Record(
    name="fourierft",
    family="tune",
    title="A few Fourier coefficients at random places (PEFT's FourierFT)",
    paper="Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, ICML 2024, arXiv 2405.03003",
    slot="tuner",
    search={"lr": (5e-2, 1.5e-1, 5e-1)},
    training={"lr": 5e-2},
    part_of="loca",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of FourierFT; UsageError for values out of range, Refused by PEFT where a layer has too few entries."""

    n_frequency: int = 1000
    """K, coefficients of each matrix"""
    scaling: float = 150.0
    """scale of the change, before the division by m n"""
    places_seed: int = 777
    """draws the places"""
    zero: bool = False
    """start with zero coefficients, at the base"""
    head_lr: float = 0.1
    """learning rate of the task's head, as a share of that of the coefficients"""
    target: str | tuple[str, ...] = ("query", "value")
    """roles, `blocks`, `all-linear`, or patterns of layer names"""

    def __post_init__(self) -> None:
        if self.n_frequency < 1 or not self.scaling > 0 or not self.head_lr > 0:
            raise UsageError(
                f"fourierft: n_frequency={self.n_frequency} must be at least 1, scaling={self.scaling} and "
                f"head_lr={self.head_lr} positive."
            )


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put FourierFT on the target layers of `model`, which carries the task's head."""
    patterns = (config.target,) if isinstance(config.target, str) else config.target
    made = attach_peft(
        model,
        peft.FourierFTConfig(
            n_frequency=config.n_frequency,
            scaling=config.scaling,
            random_loc_seed=config.places_seed,
            init_weights=config.zero,
        ),
        targets(model, patterns),
    )
    trained = [(name, p) for name, p in made.model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "fourierft_" in name]},
        {"params": [p for name, p in trained if "fourierft_" not in name], "lr_scale": config.head_lr},
    ]
    return replace(made, parameter_groups=[group for group in groups if group["params"]])
