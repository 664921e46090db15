"""Linear probe: one linear layer on the pooled final state of a frozen base, the baseline of every head and tuner.

    v      = mean over the valid tokens of X, or its first (cls) token          X [B,T,D], v [B,D]
    logits = V v + b                                                            V [K,D]

With hidden=M it is logits = V GELU(U v + c) + b, U [M,D]: a head with as many parameters as you please, for fair
comparisons with heads that have more than a linear layer. Trained by the loop on states that are computed once.

Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", arXiv 1610.01644.
What it claims: what a frozen base already separates, a linear layer finds. Left out: probes on earlier layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from brickyard.core.errors import BadData, UsageError
from brickyard.core.method import Claim, Record

if TYPE_CHECKING:
    from brickyard.core.task import Task

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

    def __post_init__(self) -> None:
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
