"""The gradient of every row of a batch by itself: its norm, and sums in which each row counts less or more.

For a linear layer with inputs a and gradients g of its outputs, row b's gradient is G_b = g_b' a_b, and

    |G_b|^2 = sum over t, s of (a_bt . a_bs)(g_bt . g_bs)        T x T numbers in place of P x D: a "ghost" norm
    sum over b of c_b G_b = (c g)' a                             one matrix product

so neither needs any G_b; where P D numbers are fewer than T (P + D) they are made after all. One forward and one
backward pass serve both, for a and g are kept until the factors c are known ("book-keeping").

Sources: Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679, section 4 (ghost clipping); Bu et al.
2023, arXiv 2210.00038 (book-keeping).

With W = L R + (W - L R) of rank R, rows are seen through G_b R' and L' G_b (Yu et al. 2021, arXiv 2106.09352).

Shapes: B rows, T positions, P outputs, D inputs, V entries of a table, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Of the sum of absolute terms of a ghost norm: what float32 may have rounded away, so that no norm is taken too small.
_ROUNDING = 2e-6


def clip_factors(norm_B: Tensor, clip: float) -> Tensor:
    """Return c [B] = min(1, clip / norm): no row's gradient then exceeds `clip`; all ones for an infinite clip."""
    if math.isinf(clip):
        return torch.ones_like(norm_B)
    return (clip / norm_B.clamp_min(torch.finfo(norm_B.dtype).tiny)).clamp_max(1.0)


class Term(Protocol):
    """The gradients of all rows for one parameter, made or not."""

    def squares(self) -> Tensor: ...
    def weighted(self, c_B: Tensor) -> Tensor: ...
    def made(self) -> Tensor: ...
    def through(self, l_PR: Tensor, r_RD: Tensor) -> tuple[Term, Term]: ...


@dataclass(frozen=True)
class Made:
    """Gradients that were made: gradient [B, ...] of the parameter's shape."""

    gradient: Tensor

    def squares(self) -> Tensor:
        """Return |G_b|^2 of each row: [B]."""
        return self.gradient.flatten(1).square().sum(1)

    def weighted(self, c_B: Tensor) -> Tensor:
        """Return the sum over b of c_b G_b."""
        return torch.tensordot(c_B, self.gradient, dims=1)

    def made(self) -> Tensor:
        """Return all G_b: [B, ...]."""
        return self.gradient

    def through(self, l_PR: Tensor, r_RD: Tensor) -> tuple[Term, Term]:
        """Return G_b R' [B, P, R] and L' G_b [B, R, D], the gradients of L and R in W = L R + (W - L R)."""
        return Made(self.gradient @ r_RD.mT), Made(l_PR.mT @ self.gradient)


@dataclass(frozen=True)
class Outer:
    """G_b = left_b' right_b, with left [B, T, P] and right [B, T, D]."""

    left_BTP: Tensor
    right_BTD: Tensor

    def squares(self) -> Tensor:
        """Return |G_b|^2 of each row: [B]."""
        if self.left_BTP.shape[1] == 1:
            return self.left_BTP.square().sum((1, 2)) * self.right_BTD.square().sum((1, 2))
        pairs_BTT = (self.left_BTP @ self.left_BTP.mT).mul_(self.right_BTD @ self.right_BTD.mT)
        return pairs_BTT.sum((1, 2)).clamp_min(0.0) + _ROUNDING * pairs_BTT.abs().sum((1, 2))

    def weighted(self, c_B: Tensor) -> Tensor:
        """Return the sum over b of c_b G_b: [P, D]."""
        return (self.left_BTP * c_B[:, None, None]).flatten(0, 1).mT @ self.right_BTD.flatten(0, 1)

    def made(self) -> Tensor:
        """Return all G_b: [B, P, D]."""
        return self.left_BTP.mT @ self.right_BTD

    def through(self, l_PR: Tensor, r_RD: Tensor) -> tuple[Term, Term]:
        """As `Made.through`; no G_b is made."""
        return (
            Made(self.left_BTP.mT @ (self.right_BTD @ r_RD.mT)),
            Made((self.left_BTP @ l_PR).mT @ self.right_BTD),
        )


@dataclass(frozen=True)
class Lookup:
    """Row b's gradient of a table [V, D]: g_BTD added up at the places ids_BT."""

    g_BTD: Tensor
    ids_BT: Tensor
    entries: int

    def squares(self) -> Tensor:
        """Return |G_b|^2 of each row: [B]."""
        pairs_BTT = (self.g_BTD @ self.g_BTD.mT).mul_(self.ids_BT[:, :, None] == self.ids_BT[:, None, :])
        return pairs_BTT.sum((1, 2)).clamp_min(0.0) + _ROUNDING * pairs_BTT.abs().sum((1, 2))

    def weighted(self, c_B: Tensor) -> Tensor:
        """Return the sum over b of c_b G_b: [V, D]."""
        out = self.g_BTD.new_zeros(self.entries, self.g_BTD.shape[-1])
        return out.index_add_(0, self.ids_BT.flatten(), (self.g_BTD * c_B[:, None, None]).flatten(0, 1))

    def made(self) -> Tensor:
        """Return all G_b: [B, V, D]."""
        rows, width = len(self.ids_BT), self.g_BTD.shape[-1]
        out = self.g_BTD.new_zeros(rows * self.entries, width)
        place = self.ids_BT + self.entries * torch.arange(rows, device=self.ids_BT.device)[:, None]
        return out.index_add_(0, place.flatten(), self.g_BTD.flatten(0, 1)).view(rows, self.entries, width)

    def through(self, l_PR: Tensor, r_RD: Tensor) -> tuple[Term, Term]:
        """As `Made.through`; no G_b is made."""
        return (
            Lookup(self.g_BTD @ r_RD.mT, self.ids_BT, self.entries),
            Made(l_PR[self.ids_BT].mT @ self.g_BTD),
        )


def cheaper(term: Outer) -> Term:
    """Return the term, with its gradients made where that takes less room than what they are made of."""
    _, positions, p = term.left_BTP.shape
    d = term.right_BTD.shape[-1]
    return Made(term.made()) if positions > 1 and p * d <= positions * (p + d) else term


def together(terms: Sequence[Term]) -> Term:
    """Join the terms of a parameter that was used several times: its gradient is the sum over the uses.

    Norms do not add up over uses, so what can be lengthened is, and the rest is made.
    """
    first, *rest = terms
    if not rest:
        return first
    if all(isinstance(term, Outer) for term in terms):
        return Outer(*(torch.cat([getattr(t, side) for t in terms], 1) for side in ("left_BTP", "right_BTD")))
    if all(isinstance(term, Lookup) for term in terms):
        assert isinstance(first, Lookup)
        g_BTD, ids_BT = (torch.cat([getattr(t, side) for t in terms], 1) for side in ("g_BTD", "ids_BT"))
        return Lookup(g_BTD, ids_BT, first.entries)
    return Made(torch.stack([term.made() for term in terms]).sum(0))
