"""Write the table that `core.noise` draws from: the upper half of 65,536 Gaussian quantiles.

Entry i is the quantile at (32768 + i + 1/2) / 65536, and all are scaled so that the mean square of the whole table is
1. The file is shipped, never made again on the fly: the last bits of a quantile differ between versions of scipy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtri

from brickyard.core.files import write_tensors

if __name__ == "__main__":
    upper = ndtri((32768 + np.arange(32768) + 0.5) / 65536)
    upper /= np.sqrt(np.mean(upper**2))
    target = Path(__file__).resolve().parents[1] / "brickyard" / "core" / "gaussian_quantiles.safetensors"
    write_tensors(target, {"upper": torch.from_numpy(upper.astype(np.float32))})
    print(target)
