"""A linear head fitted once on the states of the untouched base, then frozen.

Where models of one base are compared on a task, each with a head that was trained along with it, a head says as much of
the other head as of the backbone. This one belongs to the base, and every model is read through it:

    v = mean over the valid tokens of X                                         X [B,T,D], v [B,D]
    W, b = argmin mean_i loss(W v_i + b, y_i) + l2/2 |W|^2                       over v scaled to unit variance
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.answers import Examples, to_device
from brickyard.core.base import HeadedModel
from brickyard.core.errors import NotFinite
from brickyard.core.task import Task

_L2 = 1e-3  # on scaled features: a mild prior, so that separable classes have a finite solution
_CONSTANT = 1e-5  # spread against the largest one below which a dimension says nothing: a hundred float32 roundings
_ROUNDS = 200  # of L-BFGS; it stops by itself long before
_BATCH = 64


class FittedHead(nn.Module):
    """logits [B, K] = W mean(x_BTD over valid tokens) + b; its parameters do not train."""

    def __init__(self, weight_KD: Tensor, bias_K: Tensor) -> None:
        super().__init__()
        self.weight_KD = nn.Parameter(weight_KD, requires_grad=False)
        self.bias_K = nn.Parameter(bias_K, requires_grad=False)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return _mean(x_BTD, mask_BT) @ self.weight_KD.T + self.bias_K


def fit_head(backbone: nn.Module, rows: Examples, task: Task) -> FittedHead:
    """Fit a head for `task` on the mean-pooled last states of `backbone` for labelled `rows`.

    Classes by multinomial logistic regression, numbers by ridge regression; the solution is unique, so no seed is
    needed. Raises NotFinite where the fit diverges.
    """
    v_ND = pooled_states(backbone, rows)
    return fit_on(v_ND, rows.labels, task)


@torch.no_grad()
def pooled_states(backbone: nn.Module, rows: Examples) -> Tensor:
    """Return the mean of every row's last states over its valid tokens, on the CPU: [N, D].

    Batches are cut by length, so that padding is little.
    """
    reader = HeadedModel(backbone, nn.Identity()).eval()
    device, out = next(backbone.parameters()).device, []
    order = np.argsort(rows.lengths, kind="stable")
    for part in np.array_split(order, -(-len(rows) // _BATCH)):
        batch = to_device({k: v for k, v in rows.collate(part).items() if k != "labels"}, device)
        out.append(_mean(*reader.states(**batch)).float().cpu())
    return torch.cat(out)[np.argsort(order)]


def fit_on(v_ND: Tensor, labels_N: Tensor, task: Task, l2: float = _L2, smoothing: float = 0.0) -> FittedHead:
    """Fit a head on pooled states; see `fit_head`.

    smoothing: the share of each label's mass that is spread evenly over all classes.
    """
    center_D, spread_D = v_ND.double().mean(0), v_ND.double().std(0)
    # Some backbones have dimensions that are constant but for rounding (all-MiniLM-L6-v2 has three): scaled to unit
    # variance they would be noise with weights of 10^7, and no model but the base could be read through the head.
    spread_D = spread_D.where(spread_D > _CONSTANT * spread_D.max(), torch.inf)
    x_ND = (v_ND.double() - center_D) / spread_D
    weight = torch.zeros(task.width, x_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(task.width, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        logits = x_ND @ weight.T + bias
        if task.regression:
            loss = (logits.squeeze(-1) - labels_N.double()).square().mean()
        else:
            loss = nn.functional.cross_entropy(logits, labels_N, label_smoothing=smoothing)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    weight_KD = weight.detach() / spread_D
    bias_K = bias.detach() - weight_KD @ center_D
    if not (weight_KD.isfinite().all() and bias_K.isfinite().all()):
        raise NotFinite("the head fitted on the base's states is not finite; look at the labels and the base.")
    return FittedHead(weight_KD.float(), bias_K.float())


def _mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    mask_BT1 = mask_BT.unsqueeze(-1).to(x_BTD.dtype)
    return (x_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
