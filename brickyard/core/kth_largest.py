"""The k-th largest magnitude of a tensor that is read piece by piece: exact, by two histograms, without a sort.

The bits of non-negative float32 numbers are ordered as the numbers are, so their upper 15 bits name a bin (0.8 % wide)
and their lower 16 bits a place in it:

    pass 1   upper_b = #{i : bits(|x_i|) >> 16 = b}       b* = the bin, counted from the top, in which k is reached
    pass 2   lower_l = #{i : bits(|x_i|) >> 16 = b*, bits(|x_i|) & 65535 = l}             l* likewise
    t = float(b* << 16 | l*)                              |x_i| >= t for k entries, and for more only where some equal t

Counts of pieces add up, over a tensor or a whole model. Shapes: N elements.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

UPPER, LOWER = 2**15, 2**16


def count_upper(x_N: Tensor) -> Tensor:
    """Return how many |x| of float32 numbers fall into each bin: [UPPER], int64."""
    return torch.bincount(torch.from_numpy(_halves(x_N)[1]), minlength=UPPER)


def count_lower(x_N: Tensor, upper: int) -> Tensor:
    """Return how many |x| of the bin `upper` stand at each of its places: [LOWER], int64."""
    lower_N, upper_N = _halves(x_N)
    chosen = lower_N[upper_N == upper]  # several times as fast as torch's own selection
    return torch.bincount(torch.from_numpy(chosen.view(np.uint16).astype(np.int32)), minlength=LOWER)


def locate(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th entry from the top (k >= 1), and which of that bin's entries it is."""
    from_top = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, k))
    found = len(counts) - 1 - index
    return found, k - int(from_top[index] - counts[found])


def magnitude(upper: int, lower: int) -> float:
    """Return the number that stands at the place `lower` of the bin `upper`."""
    return float(torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32))


def kth_largest(x_N: Tensor, k: int) -> float:
    """Return the k-th largest |x| of a float32 tensor, k in [1, N]."""
    upper, left = locate(count_upper(x_N), k)
    lower, _ = locate(count_lower(x_N, upper), left)
    return magnitude(upper, lower)


def _halves(x_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower 16 and the upper 15 bits of |x| as int16 (on a little-endian machine)."""
    bits = x_N.numpy().view(np.int16)
    return bits[::2], bits[1::2] & np.int16(0x7FFF)
