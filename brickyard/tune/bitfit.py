"""BitFit: only the bias terms (and the task's head) train.

    y = W x + (b + db)        W frozen; db, one value per output, is all that a layer learns

Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
ACL 2022, arXiv 2106.10199. Headline claim: on small to medium data close to full fine-tuning with about 0.1 % of the
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.errors import Refused
from brickyard.core.method import Claim, Record
from brickyard.core.roles import own_head
from brickyard.core.task import Task

RECORD = Record(
    name="bitfit",
    family="tune",
    title="Bias-only fine-tuning",
    paper="BitFit, ACL 2022, arXiv 2106.10199",
    slot="tuner",
    search={"lr": (7e-4, 2e-3, 6e-3)},
    training={"lr": 2e-3},
    claims=(
        Claim(
            text="Training the biases alone beats a linear probe on the frozen states.",
            inequality="bitfit >= probe + 1.0",
            arms={"bitfit": "bitfit", "probe": "linear-probe"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "bitfit",
                "labels": "shuffled",
                "inequality": "bitfit > control + 5.0",
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
    pass


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Train every bias of the backbone and the whole head; Refused for a base without biases."""
    heads = tuple(f"{name}." for name in own_head(model))
    biases = [n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith(heads or ("\0",))]
    if not biases:
        raise Refused("bitfit: this base has no bias terms (Llama-like models have none); use lora or ia3.")
    head = [n for n, _ in model.named_parameters() if n.startswith(heads or ("\0",))]
    return attach_in_place(model, [*biases, *head], matched={"*bias": biases}, no_decay=biases)
