"""The orthonormal cosine transform (DCT-II): by a table of cosines for short sides, by FFT for long ones.

    C_N [i, j] = s_i cos(pi (2 j + 1) i / (2 N)),    s_0 = sqrt(1 / N), s_i = sqrt(2 / N)        C_N C_N^T = I
    dct(x) = x C_N^T        idct(x) = x C_N          along the last axis of x [..., N]; each is the other's inverse

A table has N^2 entries, so beyond LARGEST_TABLE there is none: whole transforms go through an FFT of N numbers, and
single rows are evaluated. Source of the FFT's form: Makhoul, "A fast cosine transform in one and two dimensions", IEEE
Transactions on Acoustics, Speech, and Signal Processing 28, 1980.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

LARGEST_TABLE = 1024  # 4 MiB in float32; up to about here a product with the table is no slower than an FFT


@lru_cache(maxsize=32)
def table(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return C_N [n, n], made once for all layers with a side of length `n`."""
    with torch.inference_mode(False):  # one made in inference mode could not be used in training later
        return _evaluated(torch.arange(n, device=device), n, dtype)


def rows(index_K: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return the rows C_N[index] [K, n]; `index_K` are whole numbers from 0 to n - 1."""
    if n <= LARGEST_TABLE:
        return table(n, index_K.device, dtype).index_select(0, index_K)
    return _evaluated(index_K, n, dtype)


def dct(x: Tensor, fft: bool | None = None) -> Tensor:
    """Return x C_N^T for x [..., N], float32 or wider; `fft` overrides the choice by length."""
    n = x.shape[-1]
    if not (n > LARGEST_TABLE if fft is None else fft):
        return x @ table(n, x.device, x.dtype).t()
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    w = torch.fft.rfft(v) * _turns(n, x).conj()
    # The real parts are the first half of the spectrum, the imaginary parts the second half from its end.
    return torch.cat([w.real, -w.imag[..., 1 : (n + 1) // 2].flip(-1)], dim=-1) * _scales(n, x)


def idct(x: Tensor, fft: bool | None = None) -> Tensor:
    """Return x C_N for x [..., N], float32 or wider; `fft` overrides the choice by length."""
    n = x.shape[-1]
    if not (n > LARGEST_TABLE if fft is None else fft):
        return x @ table(n, x.device, x.dtype)
    z = x / _scales(n, x)
    mirrored = torch.cat([z.new_zeros(*z.shape[:-1], 1), z[..., n - n // 2 :].flip(-1)], dim=-1)
    v = torch.fft.irfft(torch.complex(z[..., : n // 2 + 1], -mirrored) * _turns(n, x), n)
    out = torch.empty_like(v)
    out[..., ::2] = v[..., : (n + 1) // 2]
    out[..., 1::2] = v[..., (n + 1) // 2 :].flip(-1)
    return out


def dct2(x_mn: Tensor, fft: bool | None = None) -> Tensor:
    """Return C_m x C_n^T."""
    return dct(dct(x_mn, fft).t(), fft).t()


def idct2(x_mn: Tensor, fft: bool | None = None) -> Tensor:
    """Return C_m^T x C_n."""
    return idct(idct(x_mn, fft).t(), fft).t()


def cost(n: int) -> float:
    """Time of a transform of length `n` for each of its entries, in multiplications of a matrix product.

    That is N with a table. The FFT's 2.5 log2 N operations an entry run at a small part of a product's rate (measured:
    N = 4096 on a CPU core).
    """
    return n if n <= LARGEST_TABLE else 37 * math.log2(n)


def _evaluated(index_K: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    odd_N = 2 * torch.arange(n, device=index_K.device) + 1
    # Whole periods are taken off in integers, so that the cosine of a large argument loses no digits.
    phase_KN = (index_K.long()[:, None] * odd_N) % (4 * n)
    cosine_KN = torch.cos(phase_KN.to(wide) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    return torch.where(index_K[:, None] == 0, math.sqrt(1 / n), cosine_KN).to(dtype)


def _scales(n: int, like: Tensor) -> Tensor:
    scale_N = like.new_full((n,), math.sqrt(2 / n))
    scale_N[0] = math.sqrt(1 / n)
    return scale_N


def _turns(n: int, like: Tensor) -> Tensor:
    """exp(i pi k / (2 N)) for k = 0 .. N / 2."""
    angle = torch.arange(n // 2 + 1, device=like.device, dtype=like.dtype) * (math.pi / (2 * n))
    return torch.polar(torch.ones_like(angle), angle)
