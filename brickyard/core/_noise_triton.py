"""`noise.add_` as one Triton kernel: each weight is read and written once, whatever the number of terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brickyard.core.noise import M1, M2

BLOCK = 1024


@triton.jit
def _add(
    theta, table, keys, scales, first, count, M1: tl.constexpr, M2: tl.constexpr, TERMS: tl.constexpr, B: tl.constexpr
):
    """theta[i] += sum_j scale_j z_j(first + i); keys: [TERMS, 2] unsigned 32-bit numbers in int64."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < count
    position = first + i
    pair = (position // 2).to(tl.uint32)
    total = tl.zeros((B,), tl.float32)
    for j in tl.static_range(TERMS):  # pyright: ignore[reportGeneralTypeIssues]
        h = pair + tl.load(keys + 2 * j).to(tl.uint32)
        h = (h ^ (h >> 16)) * tl.full((), M1, tl.uint32)
        h = h ^ (h >> 15)
        h = (h + tl.load(keys + 2 * j + 1).to(tl.uint32)) * tl.full((), M2, tl.uint32)
        h = h ^ (h >> 16)
        half = tl.where(position % 2 == 0, h & 0xFFFF, h >> 16)
        z = tl.load(table + (half ^ 0x8000).to(tl.int32)) * tl.load(scales + j)
        total = z if j == 0 else total + z
    weight = tl.load(theta + i, mask=inside)
    if theta.dtype.element_ty == tl.float64:
        tl.store(theta + i, weight + total.to(tl.float64), mask=inside)
    elif theta.dtype.element_ty == tl.bfloat16:
        # Rounded to the nearest, ties to even, by hand: Triton's interpreter cuts the bits off.
        bits = (weight.to(tl.float32) + total).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(theta + i, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(theta + i, (weight.to(tl.float32) + total).to(theta.dtype.element_ty), mask=inside)


def add_page(
    theta: Tensor, first: int, keys: Sequence[tuple[int, int]], scales: Sequence[float], table: Tensor
) -> None:
    """Add the terms to `theta` [n], whose first element is at position `first` of a page."""
    held = torch.tensor(keys, dtype=torch.int64, device=theta.device)
    factors = torch.tensor(scales, dtype=torch.float32, device=theta.device)
    # No fused multiply-add: the plain form rounds the product first, and the bits must agree.
    launch: Any = _add[(triton.cdiv(len(theta), BLOCK),)]
    launch(theta, table, held, factors, first, len(theta), M1, M2, len(keys), BLOCK, enable_fp_fusion=False)
