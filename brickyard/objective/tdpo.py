"""TDPO: preference tuning whose margin also pays for the divergence from the base, token by token.

With m(y) as in DPO and, at the same positions, the forward KL divergence (reference first, hence mass-covering)

    k(y)  = sum over the tokens of y of KL( q(.|s_t) || p(.|s_t) )                 p: policy, q: the untouched base
    TDPO1: u = (m_w - m_l) - (k_l - k_w)                                           w: chosen, l: rejected
    TDPO2: u = (m_w - m_l) - alpha (k_l - stopgrad(k_w))
    loss  = mean over pairs of -log sigmoid(beta u)

s_t is the prompt and the answer so far, from the data: nothing is sampled. The reward that is logged, beta (m + k), is
no part of the loss. `alpha=0` is DPO.

Source: Zeng et al., "Token-level Direct Preference Optimization", arXiv 2404.11999, eqs. 15-18.
What it claims: at the same reward it stays closer to the base than DPO (TDPO2 more so than TDPO1), above all on
rejected answers. Left out: the approximation of k by the most probable tokens only.
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
    name="tdpo",
    family="objective",
    title="DPO with a forward KL term at every token of the answers",
    paper="arXiv 2404.11999",
    needs=("preference",),
    slot="objective",
    presets={"paper": {"variant": 2}, "released": {"variant": 1}},
    search={"beta": (0.05, 0.1, 0.3), "alpha": (0.5, 1.0)},
    claims=(
        Claim(
            text="At the largest reward that both reach, TDPO2 is no further from the base than DPO.",
            measure="frontier",
            base="embedded:pylm",
            data="embedded:docstrings",
            train_rows=600,
            batch=8,
            full={"train_rows": 2000, "batch": 16, "seeds": 5},
        ),
        Claim(
            text="TDPO2 diverges less than DPO on rejected answers.",
            measure="rejected",
            base="embedded:pylm",
            data="embedded:docstrings",
            train_rows=600,
            batch=8,
            full={"train_rows": 2000, "batch": 16, "seeds": 5},
        ),
        Claim(
            text="TDPO2 diverges more evenly over chosen and rejected answers than DPO.",
            measure="difference",
            base="embedded:pylm",
            data="embedded:docstrings",
            train_rows=600,
            batch=8,
            full={"train_rows": 2000, "batch": 16, "seeds": 5},
        ),
        Claim(
            text="TDPO2's samples have no less entropy than DPO's, but for 0.02 nats a token.",
            measure="entropy",
            base="embedded:pylm",
            data="embedded:docstrings",
            train_rows=600,
            batch=8,
            full={"train_rows": 2000, "batch": 16, "seeds": 5},
        ),
    ),
)
WITH_REFERENCE = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of TDPO; UsageError for a variant other than 1 and 2, beta <= 0 or alpha < 0."""

    variant: int = 2
    """1 or 2: TDPO2 leaves the divergence on chosen answers alone; the paper finds it better"""
    beta: float = 0.1
    """strength of the pull to the base"""
    alpha: float = 0.5
    """weight of the divergence in TDPO2; 0 is DPO"""

    def __post_init__(self) -> None:
        if self.variant not in (1, 2) or not self.beta > 0 or self.alpha < 0:
            raise UsageError(
                f"tdpo variant={self.variant}, beta={self.beta}, alpha={self.alpha}: expected variant 1 or 2, a "
                "positive beta and an alpha of 0 or more."
            )


def tdpo_loss(m_2B: Tensor, k_2B: Tensor, config: Config) -> Tensor:
    """Return the loss of each pair [B] from the sums m and k [2B], chosen answers first."""
    m_w, m_l = torch.chunk(m_2B, 2)
    k_w, k_l = torch.chunk(k_2B, 2)
    u_B = (m_w - m_l) - (k_l - k_w) if config.variant == 1 else (m_w - m_l) - config.alpha * (k_l - k_w.detach())
    return -F.logsigmoid(config.beta * u_B)


def loss(
    config: Config, hidden: Tensor, head: nn.Linear, batch: dict[str, Tensor], reference: Reference | None
) -> Tensor:
    """Return the mean loss of a batch [2B, T] whose first half are the chosen texts."""
    m_2B, k_2B = pair_terms(hidden, head, batch["labels"], reference, divergence=True)
    return tdpo_loss(m_2B, k_2B, config).mean()
