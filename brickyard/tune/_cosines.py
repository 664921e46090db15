"""The change C_m^T S C_n of `loca` applied to tokens, and its gradients, in three ways; equations in its file.

    tokens     y' = ((x C_n[col]^T) * a) C_m[row]       T K (m + n) multiplications
    spectrum   y' = (S (x C_n^T)^T)^T C_m               two transforms of every token, K additions between them
    dense      y' = x (C_m^T S C_n)^T                   one matrix [m, n], whose transform T tokens share

Legend: m out, n in, T tokens of the batch, K coefficients, B of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from brickyard.tune._dct import LARGEST_TABLE, cost, dct, dct2, idct, idct2, rows

COEFFICIENTS, POSITIONS = "coefficients", "positions"
WAYS = TOKENS, SPECTRUM, DENSE = "tokens", "spectrum", "dense"
GATHERED = 50  # multiplications of a matrix product in the time of gathering and adding one number (measured, a CPU)


def nearest(places_2K: Tensor) -> Tensor:
    """Return the int64 positions [2, K] of real ones; those that are whole already stay as they are."""
    return (places_2K.round() if places_2K.is_floating_point() else places_2K).long()


def change(a_K: Tensor, index_2K: Tensor, m: int, n: int) -> Tensor:
    """Return C_m^T S C_n [m, n]; coefficients at one position add up."""
    s_L = a_K.new_zeros(m * n).index_add_(0, index_2K[0] * n + index_2K[1], a_K)
    return idct2(s_L.view(m, n))


def position_gradient(a_K: Tensor, slope_2K: Tensor) -> Tensor:
    """Return dL/d(row, col) [2, K] for the differences of Z between the neighbours on both sides."""
    return (a_K / 2 * slope_2K).clamp(-1, 1)


def neighbours(index_K: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the indices after and before each of `index_K`; at a border the border itself."""
    return (index_K + 1).clamp(max=n - 1), (index_K - 1).clamp(min=0)


def cheapest(tokens: int, count: int, m: int, n: int) -> str:
    """Return the way that takes least for T tokens and K coefficients, in multiplications of a matrix product."""
    takes = {
        TOKENS: tokens * count * (m + n),
        SPECTRUM: tokens * (m * cost(m) + n * cost(n) + GATHERED * count),
        DENSE: m * n * (tokens + cost(m) + cost(n)),
    }
    return min(takes, key=takes.__getitem__)


def _blocks(index_2K: Tensor, a_K: Tensor, m: int, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split K so that the gathered cosines of one block are no larger than the layer's own matrix."""
    size = min(m, n)
    for index_2B, a_B in zip(index_2K.split(size, dim=1), a_K.split(size), strict=True):
        yield index_2B[0], index_2B[1], a_B


def by_tokens(x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, m: int) -> Tensor:
    """Return x (C_m^T S C_n)^T [T, m] without that matrix."""
    n = x_Tn.shape[1]
    y_Tm = x_Tn.new_zeros(len(x_Tn), m)
    for row_B, col_B, a_B in _blocks(index_2K, a_K, m, n):
        u_TB = x_Tn @ rows(col_B, n, x_Tn.dtype).t()
        y_Tm.addmm_(u_TB * a_B.to(u_TB.dtype), rows(row_B, m, x_Tn.dtype))
    return y_Tm


def by_spectrum(x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, m: int) -> Tensor:
    """Return x (C_m^T S C_n)^T [T, m] by the transforms of the tokens."""
    x_Tn, kind = dct(_wide(x_Tn)), x_Tn.dtype
    return idct(_wide(_scattered(x_Tn, a_K, index_2K[0], index_2K[1], m))).to(kind)


def by_spectra(x_RTn: Tensor, a_L: Tensor, index_2L: Tensor, row_L: Tensor, m: int) -> Tensor:
    """Return x_r (C_m^T S_r C_n)^T [R, T, m]; coefficient l is one of S_r for r = row_l."""
    count, tokens, n = x_RTn.shape
    spectra_RnT = dct(_wide(x_RTn)).mT
    to_L, from_L = index_2L[0] + row_L * m, index_2L[1] + row_L * n
    mixed = _added(spectra_RnT.reshape(count * n, tokens), a_L, to_L, from_L, count * m)
    return idct(_wide(mixed.view(count, m, tokens).mT)).to(x_RTn.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return `x` in a type that `dct` takes; half precision is enough for a table, not for an FFT."""
    return x if x.shape[-1] <= LARGEST_TABLE else x.to(torch.promote_types(x.dtype, torch.float32))


def _scattered(x_Tn: Tensor, a_K: Tensor, to_K: Tensor, from_K: Tensor, m: int) -> Tensor:
    """Return x S^T [T, m] for S that takes a_k of entry from_k to entry to_k."""
    return _added(x_Tn.t().contiguous(), a_K, to_K, from_K, m).t()


def _added(x_nT: Tensor, a_K: Tensor, to_K: Tensor, from_K: Tensor, m: int) -> Tensor:
    """Return S x [m, T]: each row of the result is a bag of weighted rows of x, of which there may be none."""
    to_K, order_K = to_K.sort(stable=True)
    starts_m = torch.searchsorted(to_K, torch.arange(m, device=to_K.device))
    weights_K = a_K.to(x_nT.dtype)[order_K]
    return F.embedding_bag(from_K[order_K], x_nT, starts_m, mode="sum", per_sample_weights=weights_K)


@dataclass
class Gradients:
    """What one layer's backward pass gives: dL/dx [T, n], Z at the positions [K], its differences there [2, K]."""

    x_Tn: Tensor | None = None
    z_K: Tensor | None = None
    slope_2K: Tensor | None = None


def gradients_by_tokens(
    g_Tm: Tensor, x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, *, of_x: bool, of_a: bool, of_places: bool
) -> Gradients:
    """Return the wanted `Gradients` for G = g^T x, each entry of Z as a sum over the tokens."""
    m, n, dtype, wide = g_Tm.shape[1], x_Tn.shape[1], x_Tn.dtype, a_K.dtype
    found = Gradients(torch.zeros_like(x_Tn) if of_x else None)
    z, slopes = [], []
    for row_B, col_B, a_B in _blocks(index_2K, a_K, m, n):
        cosines_Bn = rows(col_B, n, dtype)
        v_TB = g_Tm @ rows(row_B, m, dtype).t()
        if found.x_Tn is not None:
            found.x_Tn.addmm_(v_TB * a_B.to(dtype), cosines_Bn)
        if not (of_a or of_places):
            continue
        u_TB = x_Tn @ cosines_Bn.t()
        z.append((u_TB * v_TB).sum(0, dtype=wide))
        if of_places:
            # Z is linear in the cosines, so the difference of two entries takes one product with their difference.
            by_row_TB = g_Tm @ _steps(row_B, m, dtype).t()
            by_col_TB = x_Tn @ _steps(col_B, n, dtype).t()
            slopes.append(torch.stack([(u_TB * by_row_TB).sum(0, dtype=wide), (by_col_TB * v_TB).sum(0, dtype=wide)]))
    found.z_K = torch.cat(z) if of_a else None
    found.slope_2K = torch.cat(slopes, dim=1) if of_places else None
    return found


def _steps(index_K: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    after_K, before_K = neighbours(index_K, n)
    return rows(after_K, n, dtype) - rows(before_K, n, dtype)


def gradients_by_spectrum(
    g_Tm: Tensor, x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, *, of_x: bool, of_a: bool, of_places: bool
) -> Gradients:
    """Return the wanted `Gradients` for G = g^T x, by the transforms of both."""
    m, n = g_Tm.shape[1], x_Tn.shape[1]
    g_Tm = dct(_wide(g_Tm))
    row_K, col_K = index_2K
    found = Gradients()
    if of_x:
        found.x_Tn = idct(_wide(_scattered(g_Tm, a_K, col_K, row_K, n))).to(x_Tn.dtype)
    if not (of_a or of_places):
        return found
    x_Tn = dct(_wide(x_Tn))
    z, slopes = [], []
    for row_B, col_B, _ in _blocks(index_2K, a_K, m, n):
        v_TB, u_TB = g_Tm.index_select(1, row_B), x_Tn.index_select(1, col_B)
        if of_places:
            (below_B, above_B), (right_B, left_B) = neighbours(row_B, m), neighbours(col_B, n)
            by_row_TB = g_Tm.index_select(1, below_B).sub_(g_Tm.index_select(1, above_B))
            by_col_TB = x_Tn.index_select(1, right_B).sub_(x_Tn.index_select(1, left_B))
            slopes.append(
                torch.stack([(u_TB * by_row_TB).sum(0, dtype=a_K.dtype), (by_col_TB * v_TB).sum(0, dtype=a_K.dtype)])
            )
        z.append(v_TB.mul_(u_TB).sum(0, dtype=a_K.dtype))
    found.z_K = torch.cat(z) if of_a else None
    found.slope_2K = torch.cat(slopes, dim=1) if of_places else None
    return found


def gradients_by_matrix(
    g_Tm: Tensor, x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, *, of_x: bool, of_a: bool, of_places: bool
) -> Gradients:
    """Return the wanted `Gradients` for G = g^T x, by the whole of G and Z."""
    m, n = g_Tm.shape[1], x_Tn.shape[1]
    found = Gradients(g_Tm @ change(a_K, index_2K, m, n).to(g_Tm.dtype) if of_x else None)
    if of_a or of_places:
        z_mn = dct2((g_Tm.t() @ x_Tn).to(a_K.dtype))
        row_K, col_K = index_2K
        found.z_K = z_mn[row_K, col_K] if of_a else None
        if of_places:
            (below_K, above_K), (right_K, left_K) = neighbours(row_K, m), neighbours(col_K, n)
            found.slope_2K = torch.stack(
                [z_mn[below_K, col_K] - z_mn[above_K, col_K], z_mn[row_K, right_K] - z_mn[row_K, left_K]]
            )
    return found


FORWARD = {
    TOKENS: by_tokens,
    SPECTRUM: by_spectrum,
    DENSE: lambda x_Tn, a_K, index_2K, m: x_Tn @ change(a_K, index_2K, m, x_Tn.shape[1]).to(x_Tn.dtype).t(),
}
BACKWARD = {TOKENS: gradients_by_tokens, SPECTRUM: gradients_by_spectrum, DENSE: gradients_by_matrix}


class Cosines(torch.autograd.Function):
    """y' = alpha x (C_m^T S C_n)^T. Kept for the way back are x, a and the positions; all else is made anew.

    `learns` says whose gradient is wanted (None: both); the other's is undefined, so the optimiser leaves it alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_K: Tensor, places_2K: Tensor, m: int, alpha: float, mode: str, learns: str | None
    ) -> Tensor:
        n, index_2K = x.shape[-1], nearest(places_2K)
        x_Tn = x.reshape(-1, n)
        ctx.m, ctx.alpha, ctx.learns = m, alpha, learns
        ctx.way = cheapest(len(x_Tn), len(a_K), m, n) if mode == "auto" else mode
        ctx.save_for_backward(x, a_K, index_2K.int())
        return FORWARD[ctx.way](x_Tn, a_K * alpha, index_2K, m).view(*x.shape[:-1], m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a_K, index_2K = ctx.saved_tensors
        of_x, of_a, of_places = ctx.needs_input_grad[:3]
        of_a, of_places = of_a and ctx.learns != POSITIONS, of_places and ctx.learns != COEFFICIENTS
        found = BACKWARD[ctx.way](
            grad.reshape(-1, ctx.m).to(x.dtype),
            x.reshape(-1, x.shape[-1]),
            a_K * ctx.alpha,
            index_2K.long(),
            of_x=of_x,
            of_a=of_a,
            of_places=of_places,
        )
        to_x = None if found.x_Tn is None else found.x_Tn.view(x.shape)
        to_a = None if found.z_K is None else found.z_K * ctx.alpha
        to_places = None if found.slope_2K is None else position_gradient(a_K, found.slope_2K * ctx.alpha)
        return to_x, to_a, to_places, None, None, None, None
