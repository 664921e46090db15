"""DPO: direct preference optimisation, a logistic loss on how much more than the base the model prefers.

    m(y)  = sum over the tokens of y [ log p(y_t | s_t) - log q(y_t | s_t) ]      p: policy, q: the untouched base
    loss  = mean over pairs of -log sigmoid( beta (m(y_chosen) - m(y_rejected)) )

Sums run over the answer's tokens and its end token, never over the prompt. Source: Rafailov et al., "Direct Preference
Optimization: Your Language Model is Secretly a Reward Model", arXiv 2305.18290, eq. 7. What it claims: no reward model
and no sampling are needed to learn a preference. Left out: label smoothing and the later variants of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.objective import Reference
from brickyard.objective._pairs import pair_terms

RECORD = Record(
    name="dpo",
    family="objective",
    title="Logistic loss on preference pairs against the untouched base",
    paper="arXiv 2305.18290",
    needs=("preference",),
    slot="objective",
    search={"beta": (0.05, 0.1, 0.3)},
    claims=(
        Claim(
            text="Without a reward model chosen answers gain on rejected ones, in pairs that training never saw.",
            inequality="dpo > coin + 5.0",
            arms={"dpo": "full + dpo"},
            control={
                "what": "a coin says which answer of a training pair was chosen: nothing is left to learn",
                "arm": "full + dpo",
                "labels": "shuffled",
                "inequality": "dpo > control + 5.0",
            },
            base="embedded:pylm",
            data="embedded:docstring-pairs",
            epochs=1,
            batch=16,
            train_rows=2000,
            max_length=160,
            lr_factors=(1.0, 3.0),
            full={"epochs": 2, "train_rows": 0, "max_length": 0, "seeds": 5},
        ),
    ),
)
WITH_REFERENCE = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DPO; UsageError where beta is not positive."""

    beta: float = 0.1
    """strength of the pull to the base: the smaller, the further the model may go"""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UsageError(f"dpo beta={self.beta}: must be positive; 0.1 is usual.")


def dpo_loss(m_chosen_B: Tensor, m_rejected_B: Tensor, beta: float) -> Tensor:
    """Return the loss of each pair [B] from the log-probability ratios m [B] of its two answers."""
    return -F.logsigmoid(beta * (m_chosen_B - m_rejected_B))


def loss(
    config: Config, hidden: Tensor, head: nn.Linear, batch: dict[str, Tensor], reference: Reference | None
) -> Tensor:
    """Return the mean loss of a batch [2B, T] whose first half are the chosen texts."""
    m_2B, _ = pair_terms(hidden, head, batch["labels"], reference, divergence=False)
    chosen, rejected = torch.chunk(m_2B, 2)
    return dpo_loss(chosen, rejected, config.beta).mean()
