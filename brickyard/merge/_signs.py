"""Sign election, as TIES has it: where changes disagree, only those of the heavier side are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 2**16  # entries that are worked on at once


def disjoint_mean(taus: Sequence[Tensor]) -> Tensor:
    """Return, entry by entry, the mean of those changes whose sign is that of the sum of all.

    taus: T changes of equal shape. Zeros take no part in a mean; where the sum is 0 no side is heavier, and the result
    is 0.

    Source: Yadav et al., "TIES-Merging", arXiv 2306.01708, section 3, steps 2 and 3.
    """
    merged = torch.empty(taus[0].shape, dtype=taus[0].dtype, device=taus[0].device)
    parts = [tau.reshape(-1).split(_CHUNK) for tau in (merged, *taus)]
    for out, *own in zip(*parts, strict=True):
        _disjoint_mean(own, out)
    return merged


def _disjoint_mean(taus: Sequence[Tensor], out: Tensor) -> None:
    """Fill `out` with the mean of a few entries, so few that all of them stay in a core's cache."""
    total = taus[0].clone()
    for tau in taus[1:]:
        total += tau
    elected = total.sign_()
    # All in float32: on a CPU, comparisons and products with bools take several times as long.
    count = torch.zeros_like(elected)
    out.zero_()
    for tau in taus:
        agrees = tau.sign().mul_(elected).clamp_(min=0)
        out.addcmul_(tau, agrees)
        count += agrees
    out.div_(count.clamp_(min=1))
