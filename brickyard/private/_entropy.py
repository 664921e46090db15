"""Randomness that nobody can repeat: from the operating system's entropy, never from a seed, and never stored.

Who knows a step's noise can take it off. So a generator is made anew for each use, from 128 bits that the system gives.
torch's own would not do: on a CPU it looks at 32 bits of its seed, few enough to be tried one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator() -> np.random.Generator:
    """Return a generator that starts where no other one does."""
    return np.random.Generator(np.random.PCG64())


def gaussian(shape: Sequence[int], source: np.random.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Draw N(0, 1) from `source`: float32 of `shape`."""
    return torch.from_numpy(source.standard_normal(tuple(shape), dtype=np.float32)).to(device)
