"""Sign election, as TIES has it: where changes disagree, only those of the heavier side are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def disjoint_mean(taus: Sequence[Tensor]) -> Tensor:
    """Return, entry by entry, the mean of those changes whose sign is that of the sum of all.

    taus: T changes of equal shape. Zeros take no part in a mean; where the sum is 0 no side is heavier, and the result
    is 0.

    Source: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 3, steps 2 and 3.
    """
    total = taus[0].clone()
    for tau in taus[1:]:
        total += tau
    elected = total.sign_()
    # All in float32: on a CPU, comparisons and products with bools take several times as long.
    merged, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau in taus:
        agrees = tau.sign().mul_(elected).clamp_(min=0)
        merged.addcmul_(tau, agrees)
        count += agrees
    return merged.div_(count.clamp_(min=1))
