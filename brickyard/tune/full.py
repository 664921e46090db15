"""Full fine-tuning: every weight of the base and its head trains.

    theta <- AdamW(theta, grad L(theta))        theta: all parameters; a brick stores their new values

Source: the common baseline. Headline claim: none of its own; every other tuner is measured against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch import nn

from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.method import Claim, Record
from brickyard.core.roles import match, own_head
from brickyard.core.task import Task

RECORD = Record(
    name="full",
    family="tune",
    title="Full fine-tuning: every weight trains",
    slot="tuner",
    search={"lr": (3e-5, 1e-4, 3e-4)},
    training={"lr": 1e-4, "wd": 0.01},
    claims=(
        Claim(
            text="Training the whole base beats a linear probe on its frozen states.",
            inequality="full >= probe + 1.0",
            arms={"full": "full", "probe": "linear-probe"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "full",
                "labels": "shuffled",
                "inequality": "full > control + 5.0",
            },
            gate="probe > majority + 5.0",
            epochs=2,
            lr_factors=(1.0, 3.0),
            data="trec|embedded:stdlib-topics",
            train_rows=2000,
            batch=16,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    target: str | tuple[str, ...] = ()
    """roles, `blocks`, `all-linear`, or patterns of layer names ("*.layer.5.*"); every weight where nothing is given"""


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Train every parameter, or those of the target layers and the head; biases and norms without weight decay."""
    patterns = (config.target,) if isinstance(config.target, str) else config.target
    matched = match(model, patterns)
    inside = tuple(f"{name}." for name in (*own_head(model), *chain.from_iterable(matched.values())))
    names = [name for name, _ in model.named_parameters() if not patterns or name.startswith(inside)]
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    return attach_in_place(model, names, matched=matched or {"all parameters": names}, no_decay=flat)
