"""How alike two models represent the same inputs, layer by layer: the mathematics of `similarity` and telly's choice.

Shapes: N rows, T tokens, D and E widths, n rows of a block. L blocks give L + 1 states: 0 is what enters the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadData, NotFinite, Refused, UsageError
from brickyard.core.states import tokens

_BLOCK = 512  # rows of a block: two of [512, N] are what a correlation holds at once
_BATCH_TOKENS = 4096  # of one forward pass
_ALIKE = 1e-28  # variance of cosines that differ by rounding alone, in float64


def mean_over_tokens(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the mean state of each row, [B, D] in float32, over its valid tokens; over all of them without a mask."""
    x_BTD = x_BTD.float()
    if mask_BT is None:
        return x_BTD.mean(1)
    weight_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
    return (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)


def rho(x_ND: Tensor, y_NE: Tensor, *, block: int = _BLOCK) -> float:
    """Return the correlation of two models' geometries of the same N rows, in [-1, 1].

    Pearson's r between the upper triangles, diagonal included, of the cosine matrices of `x_ND` and of `y_NE`. They are
    made block by block and only sums are kept. Raises BadData for fewer than 2 rows, Refused where all rows of a model
    are alike, so that there is no geometry to compare. Source: arXiv 2304.05216, section 3.
    """
    if len(x_ND) != len(y_NE) or len(x_ND) < 2:
        raise BadData(f"{len(x_ND)} and {len(y_NE)} rows cannot be compared; give the same rows, at least 2.")
    a_ND, b_NE = (nn.functional.normalize(m.double(), dim=1) for m in (x_ND, y_NE))
    shift: Tensor | None = None
    sums = torch.zeros(5, dtype=torch.float64, device=a_ND.device)  # u, v, uu, vv, uv
    for start in range(0, len(a_ND), block):
        # Row i of the block meets column i and those behind it.
        upper = torch.ones(min(block, len(a_ND) - start), len(a_ND) - start, dtype=torch.bool, device=a_ND.device)
        pair = torch.stack([(m[start : start + block] @ m[start:].T)[upper.triu()] for m in (a_ND, b_NE)])
        # Sums of squares around a value near the mean lose no digits.
        shift = pair.mean(1, keepdim=True) if shift is None else shift
        u, v = pair - shift
        sums += torch.stack([u.sum(), v.sum(), u @ u, v @ v, u @ v])
    count = len(a_ND) * (len(a_ND) + 1) / 2
    u, v, uu, vv, uv = (sums / count).tolist()
    one, other = uu - u * u, vv - v * v
    if not min(one, other) > _ALIKE:
        raise Refused("the rows are all alike to one of the two models at some layer: there is no geometry to compare.")
    return max(-1.0, min(1.0, (uv - u * v) / (one * other) ** 0.5))


def cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Return the linear centred kernel alignment of two models' states of the same N rows, in [0, 1].

    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) with centred columns: [D, E] at most is held. Source: Kornblith et al.,
    "Similarity of neural network representations revisited", ICML 2019, arXiv 1905.00414, equation 5.
    """
    x_ND, y_NE = (m.double() - m.double().mean(0) for m in (x_ND, y_NE))
    scale = torch.linalg.matrix_norm(x_ND.T @ x_ND) * torch.linalg.matrix_norm(y_NE.T @ y_NE)
    if not float(scale) > 0:
        raise Refused("the rows are all alike to one of the two models at some layer: there is nothing to align.")
    return float(torch.linalg.matrix_norm(y_NE.T @ x_ND) ** 2 / scale)


def bottom_alike(rho_L: list[float], threshold: float) -> int:
    """Return how many bottom blocks tuning left alike: those before the first state with rho < threshold.

    `rho_L` has L + 1 entries, of which entry i + 1 belongs to the state that leaves block i. At most L - 1: the top
    block always trains.
    """
    if len(rho_L) < 2:
        raise UsageError(f"{len(rho_L)} states were compared; a model with a block has at least 2.")
    alike = [value >= threshold for value in rho_L]
    return min(max([*alike, False].index(False) - 1, 0), len(rho_L) - 2)


@torch.no_grad()
def layer_means(backbone: nn.Module, rows: Encoded, index: np.ndarray, *, pad_to: int = 0) -> list[Tensor]:
    """Return the mean state of the rows `index` at each layer: L + 1 tensors [N, D], float32 on the CPU.

    The backbone runs in evaluation mode on its own device. The mean is over valid tokens; with `pad_to` > 0 it is over
    all positions of rows padded to that many. Raises NotFinite, and Refused where the backbone shows no hidden states.
    """
    device = next(backbone.parameters()).device
    flags = {module: module.training for module in backbone.modules()}
    backbone.eval()
    out: list[Tensor] = []
    longest = np.maximum(rows.lengths[index], pad_to)
    order = np.argsort(longest, kind="stable")
    try:
        for part in np.array_split(order, max(1, -(-int(longest.sum()) // _BATCH_TOKENS), -(-len(order) // 64))):
            batch = {k: v for k, v in rows.collate(index[part]).items() if k not in ("labels", "entering")}
            if pad_to:
                batch = {k: _widened(v, pad_to, rows, k) for k, v in batch.items()}
            batch = {k: v.to(device) for k, v in batch.items()}
            hidden = backbone(**batch, output_hidden_states=True).hidden_states
            if not hidden:
                raise Refused("this base shows no hidden states, so its layers cannot be compared.")
            mask_BT = None if pad_to else batch.get("attention_mask")
            out = out or [torch.empty(len(index), tokens(x).shape[-1]) for x in hidden]
            for kept, x in zip(out, hidden, strict=True):
                kept[torch.from_numpy(part)] = mean_over_tokens(tokens(x), mask_BT).cpu()
    finally:
        for module, flag in flags.items():
            module.training = flag
    for layer, means_ND in enumerate(out):
        if not means_ND.isfinite().all():
            raise NotFinite(f"hidden state {layer} holds NaN or infinity; the model or its data are damaged.")
    return out


def _widened(values: Tensor, width: int, rows: Any, name: str) -> Tensor:
    if values.shape[1] > width:
        raise UsageError(f"a row has {values.shape[1]} tokens, more than the length {width} that rows are padded to.")
    fill = rows.pad if name == "input_ids" else 0
    return nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
