"""Students that two processor cores can afford: small classifiers on what a frozen base says of each row.

    states: z_i = mean over the tokens of row i of the base's final states, standardised       z [I,D]
    tokens: t_iv = count_iv log(I / df_v), scaled to length 1 (TF-IDF over the base's own tokens)   t [I,V]

    logistic:  min_(V,b)  mean_i -log softmax(V x_i + b)[y_i] + l2 / 2 |V|^2,  stopped after some steps of L-BFGS
    knn:       the k nearest rows by cosine vote, each with 1 + its cosine
    mlp:       softmax(V GELU(U z + c) + b), some epochs of Adam

Students differ in kind, in what they read, in how many rows they saw and in how long they learned: weak ones tell easy
items apart, strong ones hard items. Only text has tokens.

Shapes: I items, N rows to fit on, Q rows to answer, D channels, V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, diags_array, issparse
from scipy.special import log_softmax
from torch import nn

from brickyard.core.batches import EncodedText
from brickyard.core.encoded import Encoded
from brickyard.core.states import States

Features = Any  # float64 [I, D] dense, or csr [I, V]

MOST_ROWS = 4096  # that a student is fitted on, so that the crowd's cost grows with the rows and not with their square
_L2 = 1e-4  # on mean cross entropy: about C = 2.5 of scikit-learn on 4,000 rows
_HIDDEN, _LR, _BATCH = 64, 2e-3, 64  # of an MLP student
_QUERIES = 1024  # rows whose neighbours are searched at once


@dataclass(frozen=True)
class Student:
    """One kind of student. `share` of the rows it may see; `effort`: L-BFGS steps, neighbours, or epochs."""

    kind: Literal["logistic", "knn", "mlp"]
    reads: Literal["states", "tokens"]
    share: float
    effort: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.reads}-{self.share:g}-{self.effort}"


CROWD = (
    *(Student("logistic", reads, share, steps) for reads in ("states", "tokens") for share in (0.05, 0.25, 1.0)
      for steps in (3, 30)),
    *(Student("knn", reads, share, k) for reads in ("states", "tokens") for share in (0.25, 1.0) for k in (1, 15)),
    *(Student("mlp", "states", share, epochs) for share in (0.25, 1.0) for epochs in (2, 10)),
)  # fmt: skip


def state_features(sets: Sequence[States]) -> np.ndarray:
    """Return z [I,D] of pooled states, the rows of all sets behind one another, standardised over them."""
    parts = []
    for states in sets:
        chunks = np.array_split(np.arange(len(states)), max(1, len(states) // 1024))
        parts += [states.collate(rows)["states"][0][:, 0].numpy() for rows in chunks]
    z_ID = np.concatenate(parts).astype(np.float64)
    return (z_ID - z_ID.mean(axis=0)) / np.maximum(z_ID.std(axis=0), 1e-8)


def token_features(sets: Sequence[Encoded]) -> csr_matrix | None:
    """Return t [I,V] of encoded texts, the rows of all sets behind one another; None where rows have no tokens."""
    texts = [rows for rows in sets if isinstance(rows, EncodedText)]
    if len(texts) < len(sets):
        return None
    known, ids = np.unique(np.concatenate([rows.ids for rows in texts]), return_inverse=True)
    ends = np.cumsum(np.concatenate([[0], *(rows.lengths for rows in texts)]))
    items, vocabulary = len(ends) - 1, len(known)
    count_IV = csr_matrix((np.ones(len(ids)), ids, ends), shape=(items, vocabulary))
    count_IV.sum_duplicates()
    found_V = np.bincount(count_IV.indices, minlength=vocabulary)
    return _unit(csr_matrix(count_IV @ diags_array(np.log(items / np.maximum(found_V, 1)))))


def _unit(x_ID: Features) -> Features:
    if issparse(x_ID):
        length_I = np.sqrt(np.asarray(x_ID.multiply(x_ID).sum(axis=1)).ravel())
        return csr_matrix(diags_array(1 / np.maximum(length_I, 1e-12)) @ x_ID)
    return x_ID / np.maximum(np.linalg.norm(x_ID, axis=1, keepdims=True), 1e-12)


def fit_logistic(x_ND: Features, y_N: np.ndarray, classes: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (V_DK, b_K) after at most `steps` steps of L-BFGS from zero on the mean cross entropy with l2 on V."""
    rows, width = x_ND.shape
    target_NK = np.eye(classes)[y_N]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        v_DK, b_K = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        log_NK = log_softmax(x_ND @ v_DK + b_K, axis=1)
        error_NK = (np.exp(log_NK) - target_NK) / rows
        slope = np.concatenate([(x_ND.T @ error_NK + _L2 * v_DK).ravel(), error_NK.sum(axis=0)])
        return -(log_NK * target_NK).sum() / rows + _L2 / 2 * (v_DK**2).sum(), slope

    found = minimize(
        objective, np.zeros((width + 1) * classes), jac=True, method="L-BFGS-B", options={"maxiter": steps}
    )
    return found.x[: width * classes].reshape(width, classes), found.x[width * classes :]


def nearest(x_ND: Features, y_N: np.ndarray, asked_QD: Features, classes: int, k: int) -> np.ndarray:
    """Return the votes [Q,K] of the k rows of x (of length 1) with the largest cosine, each with 1 + it."""
    k = min(k, x_ND.shape[0])
    votes = []
    for start in range(0, asked_QD.shape[0], _QUERIES):
        close_QN = asked_QD[start : start + _QUERIES] @ x_ND.T
        close_QN = close_QN.toarray() if issparse(close_QN) else close_QN
        best_Qk = np.argpartition(-close_QN, k - 1, axis=1)[:, :k]
        weight_Qk = 1 + np.take_along_axis(close_QN, best_Qk, axis=1)  # standardised states may point apart
        votes.append(np.einsum("qk,qkc->qc", weight_Qk, np.eye(classes)[y_N[best_Qk]]))
    return np.concatenate(votes)


def fit_mlp(x_ND: np.ndarray, y_N: np.ndarray, classes: int, epochs: int, seed: int) -> nn.Module:
    """Return an MLP with one hidden layer after `epochs` epochs of Adam."""
    x, y = torch.from_numpy(x_ND).float(), torch.from_numpy(y_N)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, classes))
        optimiser = torch.optim.Adam(model.parameters(), lr=_LR)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(_BATCH):
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimiser.step()
                optimiser.zero_grad()
    return model


@torch.no_grad()
def answers(
    student: Student, x_ND: Features, y_N: np.ndarray, asked_QD: Features, classes: int, seed: int
) -> np.ndarray:
    """Fit one student and return the classes [Q] that it gives."""
    if student.kind == "logistic":
        v_DK, b_K = fit_logistic(x_ND, y_N, classes, student.effort)
        return (asked_QD @ v_DK + b_K).argmax(axis=1)
    if student.kind == "knn":
        return nearest(_unit(x_ND), y_N, _unit(asked_QD), classes, student.effort).argmax(axis=1)
    model = fit_mlp(x_ND, y_N, classes, student.effort, seed)
    return model(torch.from_numpy(asked_QD).float()).argmax(dim=1).numpy()
