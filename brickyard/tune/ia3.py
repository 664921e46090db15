"""IA3: learned rescaling of keys, values and feed-forward activations. PEFT's implementation.

    k <- l_k * (W_k x),   v <- l_v * (W_v x),   h <- W_down (l_ff * act(W_up x))        each l starts at 1

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
NeurIPS 2022, arXiv 2205.05638, section 3.3. Headline claim: better than larger adapters in the few-shot setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import peft
from torch import nn

from brickyard.core.attached import Attached
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.core.wrap import attach_peft, targets

RECORD = Record(
    name="ia3",
    family="tune",
    title="Rescaling of keys, values and feed-forward activations (PEFT's IA3)",
    paper="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, NeurIPS 2022",
    slot="tuner",
    search={"lr": (2e-3, 5e-3, 2e-2)},
    training={"lr": 5e-3},
    claims=(
        Claim(
            text="Three vectors a layer beat a linear probe on the frozen states.",
            inequality="ia3 >= probe + 1.0",
            arms={"ia3": "ia3", "probe": "linear-probe"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "ia3",
                "labels": "shuffled",
                "inequality": "ia3 > control + 5.0",
            },
            gate="probe > majority + 5.0",
            epochs=4,
            lr_factors=(1.0, 3.0, 10.0),
            data="trec|embedded:stdlib-topics",
            train_rows=2000,
            batch=16,
            full={"train_rows": 0, "batch": 0, "max_length": 0},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    target: tuple[str, ...] = ("key", "value", "down")
    """roles or patterns of the rescaled layers"""
    feedforward: tuple[str, ...] = ("down",)
    """those among the targets whose input, not output, is rescaled"""


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put IA3 vectors on the target layers of `model`."""
    matched = targets(model, config.target)
    fed = targets(model, config.feedforward) if config.feedforward else {}
    inputs = {name for found in fed.values() for name in found}
    known = {name for found in matched.values() for name in found}
    return attach_peft(model, peft.IA3Config(feedforward_modules=sorted(inputs & known), task_type=None), matched)
