"""Hadamard matrices of many sizes, normalised, and their product with a tensor as products with small factors.

    H = H_2^p (x) H_K,   k = 2^p K,   H H^T = I,   entries +-1 / sqrt(k)
    (A (x) B) x = A X B^T for X = x as a matrix: along each factor's axis one matrix product, k (a + b) steps for k a b

Powers of two are Sylvester's; the other bases K are built here: with circulants A, B, C, D of Williamson's type (order
w, symmetric, A^2 + B^2 + C^2 + D^2 = 4 w I), T-matrices T1, T2, T3 of order t (disjoint, sum of T T^T = t I), and

    P = T1 x A + T2 x B + T3 x C        Q = -T1 x B + T2 x A + T3 x D
    R = -T1 x C - T2 x D + T3 x A       S = -T1 x D + T2 x C - T3 x B

the array of Goethals and Seidel of P, Q, R, S is a Hadamard matrix of order 4 t w. Sources: Williamson 1944,
"Hadamard's determinant theorem and the sum of four squares"; Goethals and Seidel 1967, "Orthogonal matrices with zero
diagonal"; Cooper and Wallis 1972, "A construction for Hadamard arrays".
Legend: k size, w order of a circulant, t order of a T-matrix, S candidates, C classes of shifts.
"""

from __future__ import annotations

import itertools
import math
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from brickyard.core.errors import Refused

# K -> (t, w, multiplier); K = 4 t w. The circulants are looked for among those that multiplying indices by the
# multiplier leaves as they are: at 43 that leaves 2^7 candidates in place of 2^21.
_BASES = {
    12: (1, 3, 1),
    20: (1, 5, 1),
    28: (1, 7, 1),
    36: (1, 9, 1),
    44: (1, 11, 1),
    52: (1, 13, 1),
    60: (3, 5, 1),
    100: (5, 5, 1),
    108: (3, 9, 1),
    140: (5, 7, 1),
    156: (3, 13, 1),
    172: (1, 43, 6),
}
_WIDEST = 6  # bits of a power-of-two factor, 64 x 64, where each factor reads and writes memory
_WIDEST_CACHED = 5  # where it does not, more and smaller factors mean less arithmetic
_CACHED = 1 << 20  # bytes of rows that go through all factors together, so that what lies between stays in the cache
# Golay pairs by length g: their autocorrelations add up to zero everywhere but at shift 0.
_GOLAY: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {0: ((), ()), 1: ((1,), (1,)), 2: ((1, 1), (1, -1))}


def base_of(size: int) -> tuple[int, int] | None:
    """Return (p, K) with size = 2^p K, K = 1 or one of the bases; None where there is no such matrix here."""
    if size < 1:
        return None
    odd = size & -size
    if odd == size:
        return odd.bit_length() - 1, 1
    for base in _BASES:
        power, rest = divmod(size, base)
        if rest == 0 and power & (power - 1) == 0:
            return power.bit_length() - 1, base
    return None


def next_size(size: int) -> int:
    """Return the smallest supported size that is at least `size`."""
    return next(k for k in itertools.count(max(1, size)) if base_of(k) is not None)


def nearest(size: int) -> tuple[int, int]:
    """Return the supported sizes below and above one that is not supported."""
    return next(k for k in range(size, 0, -1) if base_of(k) is not None), next_size(size)


@cache
def williamson(order: int, multiplier: int = 1) -> np.ndarray:
    """Return the first rows [4, order] of four symmetric circulants of +-1 whose squares add up to 4 * order * I.

    They are constant on the classes of indices that -1 and `multiplier` make of one another, as their periodic
    autocorrelations are, so that a search through pairs of pairs finds them. ValueError where there are none.
    """
    classes: list[list[int]] = []
    for first in range(1, order):
        if not any(first in members for members in classes):
            members = [first]
            for index in members:
                members += [j for j in (-index % order, index * multiplier % order) if j not in members]
            classes.append(members)
    signs_SC = 1 - 2 * (np.arange(2 ** len(classes))[:, None] >> np.arange(len(classes)) & 1)
    rows_Sw = np.ones((len(signs_SC), order), dtype=np.int64)
    for c, members in enumerate(classes):
        rows_Sw[:, members] = signs_SC[:, c : c + 1]
    shifts = [members[0] for members in classes]
    correlation_SC = np.stack([(rows_Sw * np.roll(rows_Sw, s, axis=1)).sum(axis=1) for s in shifts], axis=1)
    one, other = np.triu_indices(len(rows_Sw))
    sums = list(map(tuple, correlation_SC[one] + correlation_SC[other]))
    place = {key: i for i, key in enumerate(sums)}
    for i, key in enumerate(sums):
        j = place.get(tuple(-value for value in key))
        if j is not None:
            return rows_Sw[[one[i], other[i], one[j], other[j]]]
    raise ValueError(f"there are no circulants of Williamson's type of order {order} with multiplier {multiplier}.")


def _circulant(row: np.ndarray) -> np.ndarray:
    index = np.arange(len(row))
    return row[(index[None, :] - index[:, None]) % len(row)]


@cache
def base_matrix(size: int) -> np.ndarray:
    """Return the +-1 Hadamard matrix [size, size] of one of the bases."""
    t, w, multiplier = _BASES[size]
    a, b, c, d = (_circulant(row) for row in williamson(w, multiplier))
    pair = _GOLAY[(t - 1) // 2]
    g = len(pair[0])
    rows = np.zeros((3, t), dtype=np.int64)
    rows[0, 0], rows[1, 1 : g + 1], rows[2, g + 1 :] = 1, pair[0], pair[1]
    t1, t2, t3 = (_circulant(row) for row in rows)
    p = np.kron(t1, a) + np.kron(t2, b) + np.kron(t3, c)
    q = np.kron(-t1, b) + np.kron(t2, a) + np.kron(t3, d)
    r = np.kron(-t1, c) + np.kron(-t2, d) + np.kron(t3, a)
    s = np.kron(-t1, d) + np.kron(t2, c) + np.kron(-t3, b)
    flip: np.ndarray = np.kron(np.eye(t)[::-1], np.eye(w)[::-1])
    return np.block(
        [
            [p, q @ flip, r @ flip, s @ flip],
            [q @ -flip, p, s.T @ flip, r.T @ -flip],
            [r @ -flip, s.T @ -flip, p, q.T @ flip],
            [s @ -flip, r.T @ flip, q.T @ -flip, p],
        ]
    )


def _sylvester(bits: int) -> np.ndarray:
    matrix = np.ones((1, 1), dtype=np.int64)
    for _ in range(bits):
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


@lru_cache(maxsize=256)
def _factors(size: int, dtype: torch.dtype, device: torch.device, widest: int) -> tuple[tuple[Tensor, ...], float]:
    """Return the factors of H, the first one scaled, and what is left of the scale.

    In half precision 1 / sqrt(k) would be rounded, the same way for every entry: there the first factor is scaled by a
    power of two, which is exact. In more precision it takes the whole scale.
    """
    found = base_of(size)
    if found is None:
        below, above = nearest(size)
        raise Refused(f"there is no Hadamard matrix of size {size} here; the nearest are {below} and {above}.")
    bits, base = found
    count = -(-bits // widest)
    parts = [_sylvester((bits + i) // count) for i in range(count)]  # the widest last, where memory is contiguous
    if base > 1 or not parts:  # last: along contiguous memory its product is one large one
        parts.append(base_matrix(base) if base > 1 else np.ones((1, 1)))
    whole = dtype in (torch.float32, torch.float64)
    scale = size**-0.5 if whole else 2.0 ** -math.floor(math.log2(size) / 2)
    tensors = [torch.as_tensor(part, dtype=dtype, device=device) for part in parts]
    tensors[0] = tensors[0] * scale
    return tuple(tensors), 1.0 if whole else size**-0.5 / scale


def transform(x: Tensor, dim: int = -1, *, transpose: bool = False) -> Tensor:
    """Return `x` with every vector along `dim` multiplied by H (or H^T), in the type of `x`.

    Along the last dimension that is X H^T (X H with `transpose`), along the first H X (H^T X).

    Raises:
        Refused: no Hadamard matrix of that size; the nearest sizes are named.
    """
    dim = dim % x.ndim
    tracked = x.requires_grad and torch.is_grad_enabled()
    cached = dim == x.ndim - 1 and x.device.type == "cpu" and not tracked
    factors, left = _factors(x.shape[dim], x.dtype, x.device, _WIDEST_CACHED if cached else _WIDEST)
    factors = tuple(factor.t() for factor in factors) if transpose else factors
    if cached:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows, memory_format=torch.contiguous_format)
        step = max(1, _CACHED // (rows.shape[-1] * rows.element_size()))
        for i in range(0, len(rows), step):
            _product(rows[i : i + step], factors, out=y[i : i + step])
        y = y.view(x.shape)
        return y if left == 1 else y.mul_(left)
    y = _product(x.reshape(math.prod(x.shape[:dim]), -1), factors).reshape(x.shape)
    return y if left == 1 else y * left


def _product(x_RN: Tensor, factors: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """Multiply every row, seen as an array with a dimension for each factor and one for what is left, by the factors.

    `out` [R, N] takes what the last one gives.
    """
    y, before, rest = x_RN, *x_RN.shape
    for i, factor in enumerate(factors):
        size = len(factor)
        rest //= size
        shape = (before, size, rest) if rest > 1 else (before, size)
        place = out.view(shape) if out is not None and i == len(factors) - 1 else None
        y = y.reshape(shape)
        if rest > 1:
            y = torch.bmm(factor.expand(before, -1, -1), y, out=place)
        else:
            y = torch.mm(y, factor.t(), out=place)
        before *= size
    return y


def matrix(size: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return H itself [size, size]."""
    return transform(torch.eye(size, dtype=dtype), 0)
