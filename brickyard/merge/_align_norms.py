"""How a map passes the BatchNorm behind a layer, which divides every channel by a spread of its own.

    z = gamma (W x + c - mu) + b        gamma = w / sqrt(var + eps): of each network, another one
    W' = diag(1 / gamma_A) T diag(gamma_B) W,  c', mu' likewise,  b' = T b,  w' = w_A,  var' = var_A        z' = T z

so that the mapped layer and its norm give exactly T z, in the reference's units. The released code multiplies w by T
instead, which does so for permutations only: a row of T sums to anything, below 0 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-3  # of the largest |gamma| of the reference: a channel that its norm switches off cannot be divided by


@dataclass(frozen=True)
class Pair:
    """A layer and the BatchNorm that alone reads it."""

    layer: str
    norm: str
    eps: float


def into(state: dict[str, Tensor], pair: Pair) -> None:
    """Move what a norm multiplies by into its layer; the state's tensors are replaced, not changed."""
    _scale(state, pair, _gamma(state, pair))


def out_of(state: dict[str, Tensor], reference: Mapping[str, Tensor], pair: Pair) -> None:
    """Take the reference's factors out of the layer, and give its scale and spread to the norm."""
    gamma = _gamma(reference, pair)
    floor = _FLOOR * gamma.abs().max().clamp(min=1e-12)
    kept = torch.where(gamma.abs() >= floor, gamma, torch.where(gamma < 0, -floor, floor))
    _scale(state, pair, 1 / kept)
    spread = reference[f"{pair.norm}.running_var"].double()
    state[f"{pair.norm}.running_var"] = spread
    if f"{pair.norm}.weight" in reference:
        own = reference[f"{pair.norm}.weight"].double()
        state[f"{pair.norm}.weight"] = torch.where(kept == gamma, own, kept * (spread + pair.eps).sqrt())


def _gamma(state: Mapping[str, Tensor], pair: Pair) -> Tensor:
    root = (state[f"{pair.norm}.running_var"].double() + pair.eps).sqrt()
    weight = state.get(f"{pair.norm}.weight")
    return 1 / root if weight is None else weight.double() / root


def _scale(state: dict[str, Tensor], pair: Pair, gamma: Tensor) -> None:
    weight = state[f"{pair.layer}.weight"].double()
    state[f"{pair.layer}.weight"] = weight * gamma.reshape(-1, *[1] * (weight.ndim - 1))
    for name in (f"{pair.layer}.bias", f"{pair.norm}.running_mean"):
        if name in state:
            state[name] = state[name].double() * gamma
