"""Scores of predictions, and the influence of each test example on them. Needs numpy only.

Shapes: S seeds, N test examples, K classes. The influence psi of an example on a score theta is its infinitesimal
jackknife value, N dtheta/dw_i at equal weights (for accuracy `hit - accuracy`): psi sums to 0 and sum(psi^2) / N^2
estimates the variance that comes from the choice of the examples, for any smooth score.
Source: Efron 1982, "The jackknife, the bootstrap and other resampling plans", ch. 6.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from brickyard.core.errors import BadData, NotFinite, UnknownName, UsageError

_PER_UNIT = {"bits_per_byte": math.log(2), "nats_per_token": 1.0}  # nats in one of the metric's own units
METRICS = ("accuracy", "accuracy_norm", "macro-f1", "matthews", "spearman", "loss", *_PER_UNIT)
LOWER_IS_BETTER = frozenset({"loss", *_PER_UNIT})
MINIMUM_EXAMPLES = 20  # below, no interval is worth its name: one answer moves the score by 5 points


def influence(
    labels: ArrayLike | None, predictions: ArrayLike, metric: str, *, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the score of each seed [S] and the influence psi of each example on it [S, N]; each row sums to 0.

    Args:
        labels: [N] class ids or numbers; None for "loss"; for "bits_per_byte" and "nats_per_token" each document's
            bytes or tokens.
        predictions: [S, N] or [N], class ids, or numbers for "spearman"; for "loss" the loss of each example, for the
            metrics of language models each document's nats.
        metric: accuracy (or accuracy_norm), macro-f1, matthews, spearman, loss (the mean, weighted by `weights`),
            bits_per_byte, nats_per_token (ratios of sums).
        weights: [N], only for "loss".

    Raises:
        BadData: shapes that differ, or fewer than MINIMUM_EXAMPLES examples.
        NotFinite: NaN or infinity among the predictions.
        UnknownName: no such metric.
        UsageError: labels are missing, or weights given where they have no meaning.
    """
    true, answers_SN, weight = checked(labels, predictions, metric, weights=weights)
    if metric == "loss":
        score_S = answers_SN @ weight / weight.sum()
        return score_S, weight / weight.mean() * (answers_SN - score_S[:, None])
    if metric in _PER_UNIT:
        unit_N = true * _PER_UNIT[metric]
        score_S = answers_SN.sum(axis=1) / unit_N.sum()
        return score_S, (answers_SN - score_S[:, None] * unit_N) / unit_N.mean()
    if metric in ("accuracy", "accuracy_norm"):
        hit_SN = (answers_SN == true).astype(np.float64)
        return hit_SN.mean(axis=1), hit_SN - hit_SN.mean(axis=1, keepdims=True)
    each = {"macro-f1": _macro_f1, "matthews": _matthews, "spearman": _spearman}[metric]
    pairs = [each(true, row) for row in answers_SN]
    return np.array([score for score, _ in pairs]), np.stack([psi for _, psi in pairs])


def checked(
    labels: ArrayLike | None, predictions: ArrayLike, metric: str, *, weights: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels [N], predictions [S, N] and weights [N] once they fit together; see `influence`."""
    if metric not in METRICS:
        raise UnknownName.among("metric", metric, METRICS)
    answers = np.atleast_2d(np.asarray(predictions))
    if answers.ndim != 2 or answers.shape[0] == 0:
        raise BadData(f"predictions of shape {answers.shape}: expected [seeds, examples] with at least one seed.")
    n = answers.shape[1]
    if metric == "loss":
        true = np.zeros(n)
    elif labels is None:
        raise UsageError(f"metric {metric!r} needs labels [{n}]; only the metric 'loss' goes without.")
    else:
        true = np.asarray(labels)
    if weights is not None and metric != "loss":
        raise UsageError(f"weights belong to the metric 'loss'; {metric!r} counts every example once.")
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if true.shape != (n,) or weight.shape != (n,):
        raise BadData(
            f"predictions of {n} examples do not fit labels of shape {true.shape} or weights of shape {weight.shape}; "
            f"expected [{n}] for both."
        )
    if n < MINIMUM_EXAMPLES:
        raise BadData(
            f"{n} test examples are too few for statistics; expected at least {MINIMUM_EXAMPLES}. "
            "Use a larger test split."
        )
    for what, array in (("prediction", answers), ("label", true), ("weight", weight)):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotFinite(f"a {what} is NaN or infinite; no score can be given.")
    if metric in _PER_UNIT and not (true > 0).all():
        raise BadData(f"metric {metric!r}: a document without bytes or tokens stands among the test examples.")
    if (weight < 0).any() or weight.sum() == 0:
        raise BadData("weights must be 0 or more, and not all 0.")
    return true, answers, weight


def _counts(labels: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Number the classes that occur 0..K-1: labels [N], answers [N], K."""
    names, index = np.unique(np.concatenate([labels, answers]), return_inverse=True)
    return index[: len(labels)], index[len(labels) :], len(names)


def _macro_f1(labels: np.ndarray, answers: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean F1 = 2 hits / (labelled + answered) over the classes that stand in the labels or the answers."""
    y, p, classes = _counts(labels, answers)
    present_K = np.bincount(y, minlength=classes) + np.bincount(p, minlength=classes)
    f_K = 2 * np.bincount(y[y == p], minlength=classes) / present_K
    slope = (2 * (y == p) - f_K[y]) / present_K[y] - f_K[p] / present_K[p]
    return float(f_K.mean()), len(y) * slope / classes


def _matthews(labels: np.ndarray, answers: np.ndarray) -> tuple[float, np.ndarray]:
    """Gorodkin's K-class correlation (2004, eq. 8); 0, without influence, where one side is constant."""
    y, p, classes = _counts(labels, answers)
    n = len(y)
    t_K, p_K = np.bincount(y, minlength=classes) / n, np.bincount(p, minlength=classes) / n
    hit = (y == p).astype(np.float64)
    top = hit.mean() - t_K @ p_K
    a, b = 1 - p_K @ p_K, 1 - t_K @ t_K
    if a < 1e-12 or b < 1e-12:
        return 0.0, np.zeros(n)
    score = top / math.sqrt(a * b)
    d_top = hit + hit.mean() - t_K[p] - p_K[y]
    d_a, d_b = 2 * (1 - p_K[p]), 2 * (1 - t_K[y])
    # The three are homogeneous of degree 2 in the weights, so the row sums to 0 without centring.
    return float(score), d_top / math.sqrt(a * b) - score / 2 * (d_a / a + d_b / b)


def _spearman(labels: np.ndarray, answers: np.ndarray) -> tuple[float, np.ndarray]:
    """Pearson's correlation of mid-ranks; 0, without influence, where one side is constant."""
    f, group_f = _centred_rank(labels)
    g, group_g = _centred_rank(answers)
    a, b, c = f @ f / len(f), g @ g / len(g), f @ g / len(f)
    if a == 0 or b == 0:
        return 0.0, np.zeros(len(f))
    score = c / math.sqrt(a * b)
    # One more example also lifts the rank of every larger one: that is what `_above` adds.
    d_c = f * g + _above(group_f, g) + _above(group_g, f) - 3 * c
    d_a = f * f + 2 * _above(group_f, f) - 3 * a
    d_b = g * g + 2 * _above(group_g, g) - 3 * b
    return float(score), d_c / math.sqrt(a * b) - score / 2 * (d_a / a + d_b / b)


def _centred_rank(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (mid-rank - (N + 1) / 2) / N of each value, and the number of its group of equals in rising order."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    below = np.cumsum(count) - count
    return ((below + (count - len(values)) / 2) / len(values))[group], group


def _above(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return for each example the mean over all of `value` where theirs is the higher group, and half where it ties."""
    total = np.bincount(group, weights=value)
    return ((total.sum() - np.cumsum(total) + total / 2) / len(value))[group]
