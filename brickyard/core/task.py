"""What is learned: the kind of task, its loss and its metric.

Shapes: R resamples, N examples, K classes, W outputs of the model (K, or 1 for regression). A language model's outputs
are [B, T, V] over blocks of T positions; its examples are documents, whose "labels" are their bytes (or tokens) and
whose "predictions" are the nats that the model needs for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from brickyard.core.errors import BadData, NotFinite, UnknownName, UsageError
from brickyard.core.influence import LOWER_IS_BETTER
from brickyard.core.method import LANGUAGE_TASKS, TASKS

if TYPE_CHECKING:
    from brickyard.core.data import Data


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the share of equal entries over the last axis: [..., N] and [..., N] -> [...]."""
    return (labels == predictions).mean(axis=-1)


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the classes that stand in the labels or the predictions: [..., N] -> [...]."""
    counts_RKK = _confusion(labels, predictions)
    hits = np.diagonal(counts_RKK, axis1=-2, axis2=-1)
    present = counts_RKK.sum(axis=-1) + counts_RKK.sum(axis=-2)  # 2 hits + misses + false alarms
    f1 = np.divide(2.0 * hits, present, out=np.zeros(present.shape), where=present > 0)
    return f1.sum(axis=-1) / (present > 0).sum(axis=-1)


def matthews(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return Matthews' correlation for K classes: [..., N] -> [...]; 0 where labels or predictions are all equal.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient", eq. 8.
    """
    counts_RKK = _confusion(labels, predictions).astype(np.float64)
    true, guessed = counts_RKK.sum(axis=-1), counts_RKK.sum(axis=-2)
    total = true.sum(axis=-1)
    covariance = np.trace(counts_RKK, axis1=-2, axis2=-1) * total - (true * guessed).sum(axis=-1)
    spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (guessed**2).sum(axis=-1))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros(np.shape(total)), where=spread > 0)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation (ties: mean ranks): [..., N] -> [...].

    Where one side is constant the coefficient is undefined; it counts as 0, for it orders nothing.
    """
    x = rankdata(labels, axis=-1)
    y = rankdata(predictions, axis=-1)
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    spread = (x**2).sum(axis=-1) * (y**2).sum(axis=-1)
    return np.divide((x * y).sum(axis=-1), np.sqrt(spread), out=np.zeros(np.shape(spread)), where=spread > 0)


def _confusion(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Count (label, prediction) pairs: [..., N] -> [..., K, K]."""
    labels, predictions = np.broadcast_arrays(labels, predictions)
    lead, rows = labels.shape[:-1], int(np.prod(labels.shape[:-1], dtype=np.int64))
    classes = int(max(labels.max(), predictions.max())) + 1
    cell_RN = (labels * classes + predictions).reshape(rows, -1)
    cell_RN = cell_RN + np.arange(rows)[:, None] * classes**2
    return np.bincount(cell_RN.ravel(), minlength=rows * classes**2).reshape(*lead, classes, classes)


def bits_per_byte(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the bits that all documents need over their bytes: bytes [..., N] and nats [..., N] -> [...]."""
    return nats_per_token(labels, predictions) / np.log(2)


def nats_per_token(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the nats that all documents need over their tokens: tokens [..., N] and nats [..., N] -> [...]."""
    return predictions.sum(axis=-1) / labels.sum(axis=-1)


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "macro-f1": macro_f1,
    "matthews": matthews,
    "spearman": spearman,
    "bits_per_byte": bits_per_byte,
    "nats_per_token": nats_per_token,
    "accuracy_norm": accuracy,
}
PER_TEXT = ("bits_per_byte", "nats_per_token")
_FITTING = {
    "regression": ("spearman",),
    "causal-lm": PER_TEXT,
    "instruct": PER_TEXT,
    "preference": ("accuracy",),
    "multiple-choice": ("accuracy", "accuracy_norm"),
}


def metric_of(kind: str, metric: str | None = None) -> str:
    """Name the metric of a kind of task: `metric`, once it is known to fit, or the default.

    Raises:
        UnknownName: no such kind or metric.
        UsageError: the metric does not fit the kind.
    """
    if kind not in TASKS:
        raise UnknownName.among("task", kind, TASKS)
    fitting = _FITTING.get(kind, ("accuracy", "macro-f1", "matthews"))
    if metric is None:
        return fitting[0]
    if metric not in _METRICS:
        raise UnknownName.among("metric", metric, _METRICS)
    if metric not in fitting:
        raise UsageError(
            f"metric {metric!r} does not fit the task {kind!r}; expected {' or '.join(fitting)}. "
            "String and integer labels are classes, floating-point labels are regression; --task overrides."
        )
    return metric


@dataclass(frozen=True)
class Task:
    """One objective on one kind of input.

    Regression trains on the labels as they are: nothing is standardised, so labels far from the order of 1 are better
    rescaled beforehand (`Data.report` gives their mean and standard deviation).

    Attributes:
        kind: one of `method.TASKS`.
        metric: "accuracy", "macro-f1" or "matthews" for classes, "spearman" for regression, "bits_per_byte" or
            "nats_per_token" for documents and completions. Of preferences, "accuracy" is the share of pairs in which
            the chosen text gained on the rejected one against the untouched base; of multiple-choice questions, the
            share in which the right choice is the most probable ("accuracy_norm": per byte).
        labels: class names in the order of the outputs; None for regression and language models.
        width: outputs of the model; 1 for language models, whose outputs are the base's own.
        input: one of `inputs.INPUTS`.
    """

    kind: str
    metric: str
    labels: tuple[str, ...] | None
    width: int
    input: str

    def __post_init__(self) -> None:
        metric_of(self.kind, self.metric)
        if self.width != (1 if self.labels is None else len(self.labels)):
            raise UsageError(f"a task with labels {self.labels} cannot have {self.width} outputs.")

    @property
    def regression(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.kind == "regression"

    @property
    def generative(self) -> bool:
        """Whether the base's own output layer is used, and every position is predicted."""
        return self.kind in LANGUAGE_TASKS

    @property
    def reads(self) -> Literal["text", "image"]:
        """What the base must read: point clouds are painted as images."""
        return "image" if self.input in ("image", "points") else "text"

    def goodness(self, score: float) -> float:
        """Return `score` so that more is better."""
        return -score if self.metric in LOWER_IS_BETTER else score

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example in float32: cross entropy in nats, or squared error.

        Args:
            logits: [N, W].
            labels: [N], class indices, or floats for regression.
        """
        if self.regression:
            return (logits.float().reshape(-1) - labels.float()) ** 2
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of `losses`, a scalar; of a language model, the mean over the positions that have a label."""
        if self.generative:
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return self.losses(logits, labels).mean()

    def predict(self, logits: ArrayLike | Tensor) -> np.ndarray:
        """Turn logits [N, W] into predictions [N]: class indices (the first of equals), or float64 values."""
        array = _array(logits)
        if array.ndim != 2 or array.shape[1] != self.width:
            raise UsageError(f"logits have the shape {array.shape}; expected [N, {self.width}].")
        return array[:, 0].astype(np.float64) if self.regression else array.argmax(axis=1)

    def score(self, labels: ArrayLike | Tensor, predictions: ArrayLike | Tensor) -> float:
        """Return the metric of predictions [N] against labels [N], a fraction in [-1, 1]."""
        return float(self.scores(labels, predictions))

    def scores(self, labels: ArrayLike | Tensor, predictions: ArrayLike | Tensor) -> np.ndarray:
        """Return the metric over the last axis, [..., N] against [..., N] -> [...]: many resamples at once.

        Raises:
            BadData: no example, or shapes that differ.
            NotFinite: NaN or infinity among the predictions.
        """
        true, guessed = _array(labels), _array(predictions)
        if true.shape != guessed.shape or true.ndim == 0 or true.shape[-1] == 0:
            raise BadData(f"predictions {guessed.shape} do not fit labels {true.shape}; expected [..., N] both, N > 0.")
        if not np.isfinite(guessed).all():
            raise NotFinite("a prediction is NaN or infinite; no score can be given.")
        return np.asarray(_METRICS[self.metric](true, guessed), dtype=np.float64)


def _array(values: Any) -> np.ndarray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def task_of(data: Data, *, kind: str | None = None, metric: str | None = None) -> Task:
    """Return the task that a data set poses.

    `kind` must be the one with which the data were read (`read_data(..., task=kind)`), for it decides what labels are.
    """
    if kind is not None and kind != data.kind:
        metric_of(kind)
        raise UsageError(f"the data were read for {data.kind!r}, not {kind!r}; read them with task={kind!r}.")
    width = 1 if data.labels is None else len(data.labels)
    return Task(data.kind, metric_of(data.kind, metric), data.labels, width, data.input)
