"""The Triton kernels against the PyTorch form: under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPARE = """
import sys
import torch
from brickyard.core.errors import UsageError
from brickyard.models._lightning_triton import TritonTiled
from brickyard.models.lightning_attention import Blocks, Tiled

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
slopes = torch.tensor([1.2, 0.1, 1e-4], device=device)
cases = [  # positions, d, e, block, where sequences end, dtype
    (1, 8, 8, 16, None, torch.float32),
    (37, 20, 12, 16, None, torch.float32),
    (64, 16, 80, 32, None, torch.float32),
    (50, 72, 16, 16, (0, 3, 3, 33, 50), torch.float32),
    (48, 16, 16, 16, None, torch.float16),  # products of bfloat16 are wrong in the interpreter
]
for positions, d, e, size, ends, dtype in cases:
    rows, ends = (1 if ends else 2), None if ends is None else torch.tensor(ends)
    sequences = rows if ends is None else len(ends) - 1
    given = [torch.randn(rows, 3, positions, w, device=device).to(dtype).requires_grad_() for w in (d, d, e)]
    first = torch.randn(sequences, 3, d, e, device=device, requires_grad=True)
    blocks = Blocks.of(given[0], ends, size)
    found = []
    for form in (TritonTiled, Tiled):
        o, last = form.apply(*given, slopes, first, blocks)
        seeds = [torch.ones_like(o).cumsum(2) / positions, torch.ones_like(last).cumsum(3) / e]
        found.append((o, last, *torch.autograd.grad((o, last), (*given, first), seeds)))
    for a, b in zip(*found):
        assert a.dtype == b.dtype and a.shape == b.shape
        gap = float((a.float() - b.float()).norm() / b.float().norm())
        assert gap < (1e-5 if dtype == torch.float32 else 5e-3), (positions, d, e, size, gap)
try:
    TritonTiled.apply(*given, slopes, first, Blocks.of(given[0], None, 24))
except UsageError as error:
    assert "power of two" in str(error)
else:
    sys.exit("a block of 24 was not refused")
"""


def test_kernels_compute_what_the_pytorch_form_does() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPARE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
