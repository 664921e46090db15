"""How much the changes of several experts contradict each other, block by block, in one pass over the tensors.

    tau_t = theta_t - theta_0, of which the top `trim` share of each tensor by magnitude stays, the rest is 0
    sign       c_l = (1/N_l) #{j : exists s, t with tau_s[j] tau_t[j] < 0}
    magnitude  c_l = 1 - sum_j |sum_t tau_t[j]| / sum_j sum_t |tau_t[j]|
    cosine     c_l = (1 - mean over pairs of cos(tau_s, tau_t)) / 2

All are 0 where the experts are identical. Of tau and -tau, magnitude and cosine are 1, and sign is the share of entries
that was kept (1 at trim=1). Sums over the tensors of a block add up, so a block is never held as a whole: base and T
experts, one tensor each. Shapes: N elements of a tensor, T experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from brickyard.core.base import Base
from brickyard.core.errors import NotFinite, Refused
from brickyard.core.kth_largest import kth_largest
from brickyard.core.names import same_names
from brickyard.core.roles import blocks

Tensors = Mapping[str, Tensor]  # float32 by the base's names; may read a tensor from disk when it is asked for
_FLOATS = ("F32", "F16", "BF16")


def trimmed(tau_N: Tensor, share: float) -> Tensor:
    """Return a change with all but its largest max(1, int(share * N)) magnitudes set to 0 (ties with the last stay)."""
    if share == 1:
        return tau_N
    kept = max(1, int(share * tau_N.numel()))
    return torch.where(tau_N.abs() >= kth_largest(tau_N, kept), tau_N, torch.zeros_like(tau_N))


def summed(taus: Sequence[Tensor], rule: str) -> Tensor:
    """Return what a rule needs of one tensor, in float64; it adds up over the tensors of a block."""
    if rule == "sign":
        plus, minus = torch.zeros_like(taus[0], dtype=torch.bool), torch.zeros_like(taus[0], dtype=torch.bool)
        for tau_N in taus:
            plus |= tau_N > 0
            minus |= tau_N < 0
        return torch.tensor([float((plus & minus).sum()), float(taus[0].numel())], dtype=torch.float64)
    if rule == "magnitude":
        joint = torch.stack(list(taus)).sum(0).abs().sum(dtype=torch.float64)
        return torch.stack([joint, torch.stack([tau.abs().sum(dtype=torch.float64) for tau in taus]).sum()])
    x_TN = torch.stack(list(taus)).double()
    return x_TN @ x_TN.T


def settled(total: Tensor, rule: str) -> float:
    """Return c_l from the sums over a block; 0 where nothing changed, or only one expert changed anything."""
    if rule == "sign":
        return float(total[0] / total[1])
    if rule == "magnitude":
        return float(1 - total[0] / total[1]) if total[1] > 0 else 0.0
    norm_T = total.diagonal().sqrt()
    moved = norm_T > 0
    cosine_TT = total[moved][:, moved] / (norm_T[moved, None] * norm_T[moved])
    count = len(cosine_TT)
    if count < 2:
        return 0.0
    return float(1 - (cosine_TT.sum() - cosine_TT.diagonal().sum()) / (count * (count - 1))) / 2


def conflict(
    base: Tensors, experts: Sequence[Tensors], groups: Mapping[str, Sequence[str]], *, rule: str, trim: float
) -> dict[str, float]:
    """Return c_l of every group of tensors; each tensor of each model is read once.

    Args:
        base: theta_0.
        experts: theta_t, every tensor of it, changed or not.
        groups: the names of the tensors of every block.
        rule: "sign", "magnitude" or "cosine".
        trim: share of each change that counts, in (0, 1].

    Raises NotFinite with the tensor's name.
    """
    out = {}
    for group, names in groups.items():
        total: Tensor | None = None
        for name in names:
            start_N = base[name].reshape(-1)
            taus = [expert[name].reshape(-1) - start_N for expert in experts]
            for place, tau_N in enumerate(taus):
                if not tau_N.isfinite().all():
                    raise NotFinite(f"tensor {name} of expert {place + 1} or of the base holds NaN or infinity.")
                taus[place] = trimmed(tau_N, trim)
            part = summed(taus, rule)
            total = part if total is None else total + part
        assert total is not None, group
        out[group] = settled(total, rule)
    return out


def block_tensors(base: Base) -> dict[str, list[str]]:
    """Return the names, as the base stores them, of the floating-point tensors of each of its blocks, in their order.

    Raises Refused where the base has no repeated blocks.
    """
    skeleton: nn.Module = base.outline()
    stored = [name for name, (_, info) in base.weights.items() if info.dtype in _FLOATS and info.elements]
    own = same_names(stored, skeleton.state_dict()).own
    inside = {
        block: sorted(name for name, other in own.items() if other.startswith(f"{block}."))
        for block, _ in blocks(skeleton)
    }
    found = {block: names for block, names in inside.items() if names}
    if not found:
        raise Refused(f"base {base.spec} has no repeated blocks, which are what is averaged or routed.")
    return found
