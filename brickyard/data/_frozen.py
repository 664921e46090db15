"""What a frozen base says of each row: an embedding, and the losses of linear heads that never saw the row.

    v_i = mean over the tokens of row i of the base's final states, scaled to length 1
    head: softmax(V v + b), fitted by min  mean_i -log p(y_i) + l2 / 2 |V|^2

Shapes: N rows, D channels, K classes, E epochs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.errors import Refused
from brickyard.core.pool import Pool
from brickyard.core.split import Split
from brickyard.core.states import States
from brickyard.core.task import Task

FOLDS = 5
_STEPS = 100  # of L-BFGS; a linear head on a few hundred channels is done in fewer


def embeddings(pool: Pool, texts: list[str] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the embeddings [N, D] (float32, length 1) of a pool's rows, or of `texts`, and what encoding did.

    Raises BadData where a text has no token, Refused where the base reads images.
    """
    base = open_base(pool.base)
    if base.input != "text":
        raise Refused(f"base {pool.base} reads {base.input}; a data step needs one that reads text.")
    given = pool.texts if texts is None else texts
    task = Task("text-classification", "accuracy", None, 1, "text")
    rows = encode(Split({"text": given}), base, task)
    model = base.backbone()
    if pool.device != "cpu" and torch.cuda.is_available():
        model = model.to("cuda")
    states = States.of(model, rows, base=base.fingerprint, pool="mean", cache=pool.cache)
    x_NB1D = [
        states.collate(part)["states"][0] for part in np.array_split(np.arange(len(given)), len(given) // 4096 + 1)
    ]
    v_ND = F.normalize(torch.cat(x_NB1D)[:, 0].float(), dim=1).numpy()
    return v_ND, {"truncated": rows.report["truncated"], "seconds": states.seconds, "base": pool.base}


def head_losses(
    v_ND: np.ndarray, y_N: np.ndarray, fold_N: np.ndarray, classes: int, *, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss [N] of each row's label by a head fitted on the other folds, and a mask [N] of rows without one.

    A head knows the classes that its folds hold. A row whose label the other folds lack has no finite loss under them:
    it is given log K, the loss of a uniform guess, and marked in the mask.
    """
    x_ND = torch.from_numpy(v_ND).double()
    loss_N, unknown_N = np.full(len(y_N), np.log(classes)), np.ones(len(y_N), bool)
    for fold in np.unique(fold_N):
        inside_N = fold_N != fold
        known, y = np.unique(y_N[inside_N], return_inverse=True)
        rows = np.flatnonzero(~inside_N & np.isin(y_N, known))
        if not len(rows):
            continue
        weight, bias = fit_head(x_ND[inside_N], torch.from_numpy(y), len(known), l2)
        own = torch.from_numpy(np.searchsorted(known, y_N[rows]))
        loss_N[rows] = F.cross_entropy(x_ND[rows] @ weight + bias, own, reduction="none").numpy()
        unknown_N[rows] = False
    return loss_N, unknown_N


def fit_head(x_ND: Tensor, y_N: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Return the weight [D, K] and bias [K] of the ridge-penalised softmax regression; deterministic."""
    parameters = torch.zeros(x_ND.shape[1] + 1, classes, dtype=x_ND.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x_ND @ parameters[:-1] + parameters[-1], y_N)
        value = value + l2 / 2 * parameters[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    fitted = parameters.detach()
    return fitted[:-1], fitted[-1]


def dynamics(v_ND: np.ndarray, y_N: np.ndarray, classes: int, *, epochs: int, lr: float) -> np.ndarray:
    """Return the probability of each row's label after each epoch of training a head on all rows: [E, N].

    An epoch is one full-batch step of Adam, so that the order of rows changes nothing.
    """
    x_ND, y = torch.from_numpy(v_ND).double(), torch.from_numpy(y_N)
    parameters = torch.zeros(x_ND.shape[1] + 1, classes, dtype=x_ND.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([parameters], lr=lr)
    out = np.empty((epochs, len(y)))
    for epoch in range(epochs):
        logits = x_ND @ parameters[:-1] + parameters[-1]
        out[epoch] = logits.detach().softmax(1).gather(1, y[:, None])[:, 0].numpy()
        optimiser.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimiser.step()
    return out
