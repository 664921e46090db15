"""Matrices as codes of one byte with one scale for all of their values, and products of such matrices.

Q(x) = s round(x / s), s = max|x| / 127   (int8; products are summed in int32)
Q(x) = s e4m3(x / s),  s = max|x| / 448   (fp8, rounded by the type itself)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {"int8": 127.0, "fp8": 448.0}
_EXACT_SUM = 1024  # products of two int8 values, 127^2 each, that float32 adds up exactly: fewer than 2^24 / 127^2
_ALIGNED, _FEWEST_ROWS = 16, 32  # what cuBLAS wants of contracted and output dimensions, and of the rows


class Codes(NamedTuple):
    """A tensor as `values * scale`: int8 or float8 values and a float32 scalar (or the tensor itself and 1)."""

    values: Tensor
    scale: Tensor

    def t(self) -> Codes:
        """Return the codes of the transposed matrix."""
        return Codes(self.values.t(), self.scale)


def absolute_maximum(x: Tensor) -> Tensor:
    """Return max|x| as a float32 scalar on the device of `x`; 0 of nothing, NaN where there is one."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def quantise(x: Tensor, dtype: str, largest: Tensor | None = None) -> Codes:
    """Return Q(x) with one scale for the whole tensor, to the nearest; `largest` stands in for max|x|."""
    if dtype == "exact":
        return Codes(x, x.new_ones(()))
    largest = absolute_maximum(x) if largest is None else largest
    # Below the smallest normal number the scale of an all-zero tensor would be flushed to 0, and 0 / 0 is no number.
    scale = (largest / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = x.float() / scale
    return Codes(scaled.round_().to(torch.int8) if dtype == "int8" else scaled.to(torch.float8_e4m3fn), scale)


def multiply(a_MK: Codes, b_KN: Codes, dtype: torch.dtype) -> Tensor:
    """Return the product [M, N] of two coded matrices, rescaled, in `dtype`."""
    if a_MK.values.dtype == torch.int8:
        product = int8_product(a_MK.values, b_KN.values)
    elif a_MK.values.dtype == torch.float8_e4m3fn:
        product = fp8_product(a_MK.values, b_KN.values)
    else:
        return a_MK.values.to(dtype) @ b_KN.values.to(dtype)
    return (product.float() * (a_MK.scale * b_KN.scale)).to(dtype)


def int8_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return the int32 product of two int8 matrices, by int8 instructions where there are any."""
    if _multiplies_int8(a_MK.device):
        return aligned(torch._int_mm, a_MK, b_KN)
    # Each block is a sum of integers below 2^24 in absolute value, on which float32 is exact in any order.
    total = torch.zeros(len(a_MK), b_KN.shape[1], dtype=torch.int32, device=a_MK.device)
    for start in range(0, b_KN.shape[0], _EXACT_SUM):
        block = slice(start, start + _EXACT_SUM)
        total += (a_MK[:, block].float() @ b_KN[block].float()).int()
    return total


def fp8_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return the float32 product of two float8 matrices, by float8 instructions where there are any."""
    if a_MK.is_cuda and torch.cuda.get_device_capability(a_MK.device) >= (8, 9):
        one = torch.ones((), device=a_MK.device)
        return aligned(partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.float32), a_MK, b_KN)
    return a_MK.float() @ b_KN.float()


def aligned(kernel: Callable[[Tensor, Tensor], Tensor], a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return kernel(a, b), with zeros around operands of one byte whose sizes the kernels of accelerators refuse."""
    (rows, inner), columns = a_MK.shape, b_KN.shape[1]
    deep, wide = -inner % _ALIGNED, -columns % _ALIGNED
    a_MK = _filled(a_MK.contiguous(), (0, deep, 0, max(0, _FEWEST_ROWS - rows)))
    b_NK = _filled(b_KN.t().contiguous(), (0, deep, 0, wide))  # the kernels read the second operand by columns
    return kernel(a_MK, b_NK.t())[:rows, :columns]


def _filled(x: Tensor, room: tuple[int, int, int, int]) -> Tensor:
    return F.pad(x.view(torch.int8), room).view(x.dtype) if any(room) else x


def _multiplies_int8(device: torch.device) -> bool:
    if device.type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_vnni") or known.get("amx_int8"))
    return device.type == "cuda"
