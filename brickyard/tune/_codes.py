"""Codes of a few bits for tensors that only the backward pass reads: packing, groups of one scale, rounding.

    q = round((x - low_G) / step_G),  x' = low_G + step_G q,  q in {0, ..., 2^b - 1},  8/b codes a byte

A group is G values that follow one another; its low and step are kept in bfloat16 (4 bytes a group, and the range of
float32), rounded outwards so that every value lies inside its grid: |x' - x| <= step_G / 2, less than step_G where the
rounding is stochastic. Legend: N values, P packed bytes, K groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from brickyard.core.errors import Refused

EXACT = 32  # "bits" of a tensor that is kept as it is
_OUTWARDS = 0.004  # a little more than the relative rounding error of bfloat16, 2^-8


def pack(q_N: Tensor, bits: int) -> Tensor:
    """Return uint8 [ceil(N bits / 8)] holding the uint8 codes `q_N` < 2^bits; bits is 1, 2, 4 or 8.

    The codes are cut into 8 / bits runs that lie over one another, so that every step works on whole vectors.
    """
    runs = 8 // bits
    if runs == 1:
        return q_N
    size = -(-len(q_N) // runs)
    q_RP = F.pad(q_N, (0, size * runs - len(q_N))).view(runs, size)
    packed_P = q_RP[0].clone()
    for run in range(1, runs):
        packed_P |= q_RP[run] << (bits * run)
    return packed_P


def unpack(packed_P: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` codes in `packed_P`, uint8: the inverse of `pack`."""
    runs = 8 // bits
    if runs == 1:
        return packed_P
    q_RP = packed_P.new_empty(runs, len(packed_P))
    for run in range(runs):
        torch.bitwise_right_shift(packed_P, bits * run, out=q_RP[run])
    return q_RP.bitwise_and_(2**bits - 1).view(-1)[:count]


def dither(x_N: Tensor) -> Tensor:
    """Return float32 [N] in [0, 1) that looks random, a hash of each value and its place.

    No generator is asked, so dropout draws what it would draw anyway and a forward that runs twice gives equal codes.
    The mixing steps are those of MurmurHash3's finaliser (public domain).
    """
    h_N = torch.arange(len(x_N), dtype=torch.int32, device=x_N.device)
    h_N.mul_(-1640531527).bitwise_xor_(x_N.view(torch.int32))  # 2^32 / golden ratio, as a signed number
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        h_N.bitwise_xor_((h_N >> shift) & (2 ** (32 - shift) - 1)).mul_(factor)
    return (h_N & 0xFFFFFF).float().mul_(2.0**-24)


@dataclass(frozen=True)
class Grouped:
    """Groups of `group` values, each between a low and a high of its own; EXACT bits keep the tensor itself."""

    bits: int
    group: int = 64
    stochastic: bool = False

    def encode(self, x: Tensor, *, spare: bool = False) -> tuple[Tensor, ...]:
        """Return (codes uint8 [P], low bfloat16 [K, 1], step bfloat16 [K, 1]) of `x`, any shape.

        `spare`, for all codes: `x` may be overwritten, nobody reads it afterwards.
        Raises Refused for a tensor that is not of a floating-point type.
        """
        if self.bits == EXACT:
            return (x,)
        if not x.is_floating_point():
            raise Refused(f"s2a: a tensor of type {x.dtype} was to be coded; floating-point activations can be.")
        x_N = x.detach().reshape(-1).float()
        x_KG = _padded(x_N, self.group).view(-(-len(x_N) // self.group), self.group)
        low_K = x_KG.amin(dim=1, keepdim=True)  # amin and amax take a fifth of the time of aminmax on a CPU
        high_K = x_KG.amax(dim=1, keepdim=True)
        low_K = (low_K - low_K.abs() * _OUTWARDS).bfloat16()
        step_K = (high_K.sub_(low_K) * ((1 + _OUTWARDS) / (2**self.bits - 1))).bfloat16()
        inverse_K = torch.where(step_K == 0, 0.0, 1 / step_K.float())
        q_N = torch.sub(x_KG, low_K).mul_(inverse_K).view(-1)
        codes_N = _rounded(q_N, self.bits, x_KG.view(-1) if self.stochastic else None)
        return pack(codes_N, self.bits), low_K, step_K

    def decode(self, parts: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return what `parts` stand for, in the shape and type of the tensor that was encoded."""
        if self.bits == EXACT:
            return parts[0]
        codes_P, low_K, step_K = parts
        q_KG = unpack(codes_P, self.bits, len(low_K) * self.group).view(len(low_K), self.group)
        x_KG = q_KG.float().mul_(step_K).add_(low_K)
        return x_KG.view(-1)[: math.prod(shape)].view(shape).to(dtype)


@dataclass(frozen=True)
class Rows(Grouped):
    """The same for the input of a norm over the last dimension: mean and deviation of each row stay exact.

    Rounding adds its variance to that of the row, so that 1/sigma and all gradients would come out too small.
    """

    def encode(self, x: Tensor, *, spare: bool = False) -> tuple[Tensor, ...]:
        """Return the parts of `Grouped` and the deviation and mean of each row, float32 [..., 1]."""
        if self.bits == EXACT:
            return (x,)
        _, mean, std = _centred(x.detach().float())
        return (*super().encode(x), std, mean)

    def decode(self, parts: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return what `parts` stand for, each row moved and stretched to its own mean and deviation."""
        if self.bits == EXACT:
            return parts[0]
        centred, _, std = _centred(super().decode(parts[:3], shape, torch.float32))
        stretch = torch.where(std > 0, parts[3] / std, 1.0)
        return centred.mul_(stretch).add_(parts[4]).to(dtype)


@dataclass(frozen=True)
class Bounded:
    """One grid from `low` to `high` for all values: a bounded derivative. Values outside count as the nearer end."""

    bits: int
    low: float
    high: float
    stochastic: bool = False

    @property
    def step(self) -> float:
        return (self.high - self.low) / (2**self.bits - 1)

    def encode(self, x: Tensor, *, spare: bool = False) -> tuple[Tensor, ...]:
        """Return the codes of `x`, uint8 [P]."""
        x_N = x.detach().reshape(-1).float()
        # NaN has no code here, but where a derivative is NaN so is the activation itself, and the loss says so.
        q_N = x_N.sub_(self.low) if spare and not self.stochastic else x_N - self.low
        q_N.mul_(1 / self.step).clamp_(0, 2**self.bits - 1)
        return (pack(_rounded(q_N, self.bits, x_N if self.stochastic else None), self.bits),)

    def decode(self, parts: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return what `parts` stand for."""
        q_N = unpack(parts[0], self.bits, math.prod(shape))
        return q_N.float().mul_(self.step).add_(self.low).view(shape).to(dtype)


Code = Grouped | Bounded  # Rows is a Grouped


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `x` less the mean of its rows, the means, and the deviations: a tenth of `std_mean`'s time on a CPU."""
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    return centred, mean, torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])


def _padded(x_N: Tensor, group: int) -> Tensor:
    """Fill the last group with the last value, which leaves its range as it is."""
    missing = -len(x_N) % group
    return torch.cat([x_N, x_N[-1:].expand(missing)]) if missing else x_N


def _rounded(q_N: Tensor, bits: int, noise_of: Tensor | None) -> Tensor:
    """Round `q_N` >= 0 in place to uint8 codes: to the nearest, or up with the probability of the fraction."""
    q_N = q_N.add_(0.5) if noise_of is None else q_N.add_(dither(noise_of)).clamp_(max=2**bits - 1)
    return q_N.to(torch.uint8)
