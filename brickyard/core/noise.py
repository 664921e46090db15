"""Gaussian noise that is the same bits everywhere: a hash of (key, parameter, position) looks up a table of quantiles.

    h = mix32(pair; k0, k1)          pair = position // 2, (k0, k1) from (key, parameter)
    z[2 pair]     = table[low  16 bits of h]
    z[2 pair + 1] = table[high 16 bits of h]

Only integer arithmetic and one load: no transcendental function, so that CPUs, GPUs and all workers agree, on any
number of threads and in any order. The table's 65,536 values are the quantiles in the middle of bins of equal
probability, scaled to a mean square of 1; the largest is 4.325. Test vector: `normal(key(1, 2), 3, 0, 4)` is
[-0.8452161, 3.1611488, 0.5051613, -1.0895309].

Never for privacy: whoever knows the key knows the noise. Legend: n positions, c positions of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brickyard.core.errors import UsageError
from brickyard.core.files import read_tensors

CHUNK = 1 << 18  # positions worked on at once: the buffers of a chunk stay in a core's second-level cache
FEW = 1 << 15  # positions up to which torch's operators run on one thread, where numpy's are quicker
PAGE = 1 << 33  # positions that one pair of 32-bit keys serves
M1, M2 = (
    0x7FEB352D,
    0x846CA68B,
)  # multipliers of a 32-bit mixer of low bias, found by search (C. Wellons, hash-prospector)
_64 = (1 << 64) - 1


def key(*parts: int) -> int:
    """Mix whole numbers (a seed, a step, a worker, a sample) into one key of 64 bits; their order counts."""
    mixed = len(parts)
    for part in parts:
        mixed = _mix64((mixed + 0x9E3779B97F4A7C15) & _64 ^ (part & _64))
    return mixed


def normal(key: int, parameter: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return z of the positions [start, start + count): float32 [count]."""
    out = torch.zeros(count, device=device)
    return add_(out, [(key, 1.0)], parameter=parameter, start=start)


def add_(theta: Tensor, terms: Sequence[tuple[int, float]], *, parameter: int, start: int = 0) -> Tensor:
    """Add sum_j scale_j z(key_j, parameter, start + i) to element i of `theta`, in place, and return it.

    theta: any shape, contiguous, floating-point; the noise is summed in float32 in the order of the terms, added in
    float32 (or theta's own precision if wider), and rounded once to theta's dtype. terms: (key, scale) pairs.
    parameter: a number of the tensor among those that share the keys. No copy of theta is made.
    Raises UsageError for a tensor that is not contiguous or not floating-point.
    """
    if not theta.is_contiguous() or not theta.is_floating_point():
        raise UsageError(
            f"noise was asked for a {theta.dtype} tensor of strides {theta.stride()}; a contiguous tensor of "
            "floating-point numbers was expected."
        )
    flat = theta.detach().view(-1)
    if not terms or not len(flat):
        return theta
    if (kernel := _kernel(theta.device.type)) is not None:
        for first, last in _pages(start, len(flat)):
            keys = [_subkeys(k, parameter, first // PAGE) for k, _ in terms]
            kernel(flat[first - start : last - start], first % PAGE, keys, [s for _, s in terms], table(theta.device))
        # Torch does not see a kernel of one's own write, and who keeps something made of a weight asks for its version.
        torch.autograd.graph.increment_version(theta)
        return theta
    one_thread = len(flat) <= FEW or torch.get_num_threads() == 1
    draw = _by_numpy if theta.device.type == "cpu" and one_thread else _Chunk(min(CHUNK, len(flat) + 2), theta.device)
    for first, last in _pages(start, len(flat)):
        keys = [_subkeys(k, parameter, first // PAGE) for k, _ in terms]
        for a in range(first, last, CHUNK):
            b = min(a + CHUNK, last)
            total: Tensor | None = None
            for subkeys, (_, scale) in zip(keys, terms, strict=True):
                z = draw(subkeys, a % PAGE, b - a)
                # Apart, not as one multiply-add: whether that rounds once or twice depends on the processor.
                z.mul_(scale)
                total = z.clone() if total is None and len(terms) > 1 else z if total is None else total.add_(z)
            assert total is not None
            part = flat[a - start : b - start]
            if part.dtype in (torch.float32, torch.float64):
                part.add_(total)
            else:
                part.copy_(total.add_(part.float()))
    return theta


@functools.lru_cache(maxsize=16)
def table(device: torch.device) -> Tensor:
    """Return the 65,536 quantiles in rising order: float32, on `device`."""
    upper = read_tensors(Path(__file__).with_name("gaussian_quantiles.safetensors"))["upper"]
    return torch.cat([-upper.flip(0), upper]).to(device)


class _Chunk:
    """Buffers for the draws of one chunk; each call overwrites what the last one returned."""

    def __init__(self, size: int, device: torch.device) -> None:
        pairs = size // 2 + 1
        self.table = table(device)
        self.counter = torch.arange(pairs, dtype=torch.int32, device=device)
        self.hash, self.shifted = torch.empty_like(self.counter), torch.empty_like(self.counter)
        self.index = torch.empty(2 * pairs, dtype=torch.int32, device=device)
        self.z = torch.empty(2 * pairs, device=device)

    def __call__(self, subkeys: tuple[int, int], first: int, count: int) -> Tensor:
        """Return z of the positions [first, first + count) of a page: float32 [count]."""
        pairs = (first + count + 1) // 2 - first // 2
        h, t, index, z = self.hash[:pairs], self.shifted[:pairs], self.index[: 2 * pairs], self.z[: 2 * pairs]
        k0, k1 = subkeys
        torch.add(self.counter[:pairs], _signed(first // 2 + k0), out=h)
        self._fold(h, t, 16)
        h.mul_(_signed(M1))
        self._fold(h, t, 15)
        # A second key in the middle: with the first alone the streams of two keys were one stream at two offsets.
        h.add_(_signed(k1)).mul_(_signed(M2))
        self._fold(h, t, 16)
        index.copy_(h.view(torch.int16)).add_(32768)
        torch.index_select(self.table, 0, index, out=z)
        return z[first % 2 : first % 2 + count]

    @staticmethod
    def _fold(h: Tensor, t: Tensor, bits: int) -> None:
        """h ^= h >> bits, shifting zeros in, which torch's shift of signed numbers does not."""
        torch.bitwise_right_shift(h, bits, out=t)
        h.bitwise_xor_(t.bitwise_and_((1 << (32 - bits)) - 1))


def _by_numpy(subkeys: tuple[int, int], first: int, count: int) -> Tensor:
    """Do what `_Chunk` does, on one thread of a CPU."""
    pairs = (first + count + 1) // 2 - first // 2
    h = np.arange(pairs, dtype=np.uint32)
    h += np.uint32(first // 2 + subkeys[0] & 0xFFFFFFFF)
    h ^= h >> 16
    h *= np.uint32(M1)
    h ^= h >> 15
    h += np.uint32(subkeys[1])
    h *= np.uint32(M2)
    h ^= h >> 16
    index = h.view(np.uint16) ^ np.uint16(0x8000)
    z = torch.empty(2 * pairs)  # torch's own memory: what counts a step's bytes sees it come and go
    np.take(table(torch.device("cpu")).numpy(), index, mode="clip", out=z.numpy())
    return z[first % 2 : first % 2 + count]


def _pages(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut [start, start + count) where a page ends."""
    end = start + count
    while start < end:
        stop = min(end, (start // PAGE + 1) * PAGE)
        yield start, stop
        start = stop


def _subkeys(key_: int, parameter: int, page: int) -> tuple[int, int]:
    mixed = key(key_, parameter, page)
    return mixed & 0xFFFFFFFF, mixed >> 32


def _mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The signed number with the same low 32 bits."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x


@functools.lru_cache(maxsize=4)
def _kernel(device: str):
    """Return the fused kernel for a kind of device, or None where the plain form serves."""
    if device != "cuda":
        return None
    try:
        from brickyard.core._noise_triton import add_page
    except ImportError:  # torch without Triton: the plain form gives the same bits, in more passes
        return None
    return add_page
