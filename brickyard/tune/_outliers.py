"""Where the sparse part of an update stands: the outliers of a weight beside a low-rank fit of it.

    W ~ Q V + S: V <- Q^T (W - S), Q <- orth((W - S) V^T), S <- W - Q V without its small entries; V grows by a few rows
    of R from the QR of what is left, as long as S has as many entries as are wanted.

Source: the released code of DSEE, arXiv 2111.00160. Legend: W [m, n], Q [m, k], V [k, n].
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 0.01  # outliers below it are none
OUTER, INNER, GROW = 100, 2, 5  # rounds of the decomposition, steps in a round, ranks that a round adds
LARGEST = 0.65  # of the smaller side: the rank of the fit, 500 of 768 in the released code


def greedy_outliers(w_mn: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return S [m, n] of W ~ Q V + S: what a growing low-rank fit leaves over, zero below SMALL.

    The fit grows as long as S keeps at least `count` entries, for one of full rank would leave no outliers at all. A
    weight of which even the first fit leaves fewer is ranked by all that this fit leaves, small entries too.
    """
    low_kn = torch.randn(1, w_mn.shape[1], generator=generator)
    kept_mn: Tensor | None = None
    for _ in range(OUTER):
        sparse_mn = torch.zeros_like(w_mn)
        for _ in range(INNER):
            rest_mn = w_mn - sparse_mn
            q_mk = torch.linalg.qr(rest_mn @ low_kn.t()).Q
            low_kn = q_mk.t() @ rest_mn
            fit_mn = q_mk @ low_kn
            sparse_mn = w_mn - fit_mn
            sparse_mn = torch.where(sparse_mn.abs() >= SMALL, sparse_mn, 0.0)
        if int(sparse_mn.count_nonzero()) < count:
            kept_mn = w_mn - fit_mn if kept_mn is None else kept_mn
            break
        kept_mn = sparse_mn
        if len(low_kn) + GROW > LARGEST * min(w_mn.shape):
            break
        low_kn = torch.cat([low_kn, torch.linalg.qr(w_mn - fit_mn - sparse_mn).R[:GROW]])
    assert kept_mn is not None
    return kept_mn


def positions(w_mn: Tensor, count: int, rule: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows and columns [N] of `count` entries of W, int32; exactly so many whatever ties there are.

    rule: greedy (outliers of the decomposition), magnitude (largest |W|) or random.
    """
    if rule == "random":
        best_N = torch.randperm(w_mn.numel(), generator=generator)[:count]
    else:
        score_mn = w_mn if rule == "magnitude" else greedy_outliers(w_mn, count, generator)
        best_N = torch.sort(score_mn.abs().flatten(), descending=True, stable=True).indices[:count]
    best_N = best_N.sort().values
    return (best_N // w_mn.shape[1]).int(), (best_N % w_mn.shape[1]).int()
