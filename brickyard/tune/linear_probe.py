"""Linear probe: one linear layer on the pooled final state of a frozen base, the baseline of every head and tuner.

    v      = mean over the valid tokens of X, or its first (cls) token          X [B,T,D], v [B,D]
    logits = V v + b                                                            V [K,D]

With hidden=M it is logits = V GELU(U v + c) + b, U [M,D]: a head with as many parameters as you please, for fair
comparisons with heads that have more than a linear layer. Trained by the loop on states that are computed once.
`lora + linear-probe:fitted=true` reads the tuned states through the solution for the untouched base's, which stays as
it is: bricks that are to be merged then have heads that belong to the base, as one merged backbone needs them.

Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", arXiv 1610.01644.
What it claims: what a frozen base already separates, a linear layer finds. Left out: probes on earlier layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.encoded import IGNORED
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.fitted_head import fit_head
from brickyard.core.method import Claim, Record

if TYPE_CHECKING:
    from brickyard.core.attached import Attached
    from brickyard.core.task import Task
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="linear-probe",
    family="tune",
    title="linear layer on the pooled final state of a frozen base",
    paper="arXiv 1610.01644",
    needs=("text-classification", "pair-classification", "regression", "image-classification"),
    slot="head",
    search={"lr": (3e-3, 1e-2, 3e-2)},
    training={"lr": 1e-2, "wd": 0.0, "epochs": 10, "batch": 32},
    claims=(
        Claim(
            text="A linear layer on frozen mean-pooled states beats the majority class by 10 points.",
            inequality="probe > majority + 10.0",
            arms={"probe": "linear-probe"},
            control={
                "what": "shuffled training labels leave nothing to learn",
                "arm": "linear-probe",
                "labels": "shuffled",
                "inequality": "probe > control + 10.0",
            },
            epochs=10,
            train_rows=2000,
            lrs=(3e-3, 1e-2, 3e-2),
            full={"train_rows": 0, "max_length": 0, "seeds": 5},
        ),
    ),
)

Pool = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the linear probe; UsageError for a negative width."""

    pool: Literal["mean", "cls"] = "mean"
    """v is the mean of the valid tokens, or the first token (cls)"""
    hidden: int = 0
    """width of one hidden GELU layer; 0: none, the probe is linear"""
    fitted: bool = False
    """take the best head for the base's own states of the training rows, and train the tuner beside it alone"""

    def __post_init__(self) -> None:
        if self.fitted and (self.hidden or self.pool != "mean"):
            raise UsageError("linear-probe: fitted=true is a linear layer on the mean; leave out pool and hidden.")
        if self.hidden < 0:
            raise UsageError(f"hidden={self.hidden}: give 0 for a linear probe, or the width of its hidden layer.")


_STD = 0.02  # truncated normal, so that the first logits are small beside the trained ones


class Probe(nn.Module):
    """Head on token states [B,T,D] with a mask [B,T] that is true on tokens; returns logits [B,classes].

    Raises BadData where an example has no valid token.
    """

    def __init__(self, in_dim: int, classes: int, *, pool: Pool = "mean", hidden: int = 0) -> None:
        super().__init__()
        # Tells the provider of cached states that one vector per example is all that is needed.
        self.frozen_pool: Pool = pool
        wide = hidden or in_dim
        self.hidden = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU()) if hidden else nn.Identity()
        self.output = nn.Linear(wide, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return self.output(self.hidden(pooled(x_BTD, mask_BT, self.frozen_pool)))


def pooled(x_BTD: Tensor, mask_BT: Tensor | None, pool: Pool) -> Tensor:
    """Return v [B,D]: the first token, or the mean of the valid ones (mask_BT None: all are); BadData if none is."""
    if pool == "cls":
        return x_BTD[:, 0]
    if mask_BT is None:
        return x_BTD.mean(1)
    valid_BT = mask_BT.bool()
    count_B1 = valid_BT.sum(1, keepdim=True)
    if bool((count_B1 == 0).any()):
        raise BadData(f"row {int((count_B1 == 0).nonzero()[0, 0])} of the batch has no valid token; drop such rows.")
    return x_BTD.masked_fill(~valid_BT.unsqueeze(-1), 0).sum(1) / count_B1.to(x_BTD.dtype)


def head(config: Config, task: Task, width: int) -> Probe:
    """Return the head for `task.width` logits on tokens of `width` channels."""
    return Probe(width, task.width, pool=config.pool, hidden=config.hidden)


def initialise(config: Config, ready: Prepared, attached: Attached) -> dict[str, Any] | None:
    """Fit the head on the base's states of the labelled training rows and freeze it; None where it trains.

    Raises Refused where nothing else would train.
    """
    if not config.fitted:
        return None
    if ready.plan.tuner is None:
        raise Refused("linear-probe: with fitted=true the head does not train; give a tuner, as lora + linear-probe.")
    started = time.monotonic()
    rows = ready.encoded["train"]
    rows = rows.take(np.flatnonzero(rows.labels.numpy() != IGNORED))
    fitted = fit_head(ready.base.backbone(attention=ready.setting.attention).to(ready.device), rows, ready.task)
    probes = [module for module in attached.model.modules() if isinstance(module, Probe)]
    with torch.no_grad():
        for probe in probes:  # PEFT keeps the one that it copied
            probe.output.weight.copy_(fitted.weight_KD)
            probe.output.bias.copy_(fitted.bias_K)
    attached.freeze(p for probe in probes for p in probe.parameters())
    return {"seconds": time.monotonic() - started, "rows": len(rows)}
