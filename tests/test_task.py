"""Metrics against scikit-learn and scipy, losses against torch, and what a data set poses as a task."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from tabular import rows
from torch.nn import functional as F

from brickyard.core.answers import Answers, score_of
from brickyard.core.data import read_data
from brickyard.core.errors import BadData, NotFinite, UnknownName, UsageError
from brickyard.core.task import Task, accuracy, macro_f1, matthews, metric_of, spearman, task_of

CLASSES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)
# Few distinct values, so that ties are common; whole multiples of a half, so that ranks do not hang on rounding.
VALUES = st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), min_size=2, max_size=60)


def task(metric: str = "accuracy", classes: int = 5) -> Task:
    if metric == "spearman":
        return Task("regression", metric, None, 1, "text")
    return Task("text-classification", metric, tuple(f"c{i}" for i in range(classes)), classes, "text")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(CLASSES)
def test_class_metrics_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs).T
    assert task("accuracy").score(labels, predictions) == pytest.approx(sk.accuracy_score(labels, predictions))
    expected = sk.f1_score(labels, predictions, average="macro", zero_division=0)
    assert task("macro-f1").score(labels, predictions) == pytest.approx(expected)
    if len(set(labels) | set(predictions)) > 1:  # scikit-learn warns of a single class
        assert task("matthews").score(labels, predictions) == pytest.approx(sk.matthews_corrcoef(labels, predictions))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(VALUES)
def test_spearman_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs).T / 2
    score = task("spearman").score(labels, predictions)
    if len(set(labels)) == 1 or len(set(predictions)) == 1:
        assert score == 0.0  # undefined: scipy gives NaN
    else:
        assert score == pytest.approx(scipy.stats.spearmanr(labels, predictions).statistic, abs=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CLASSES, st.integers(0, 2**31))
def test_many_resamples_at_once_equal_one_by_one(pairs: list[tuple[int, int]], seed: int) -> None:
    labels, predictions = np.array(pairs).T
    index = np.random.Generator(np.random.PCG64(seed)).integers(0, len(labels), (4, len(labels)))
    for metric in (accuracy, macro_f1, matthews, spearman):
        together = metric(labels[index], predictions[index])
        assert together.shape == (4,)
        assert together == pytest.approx(np.array([metric(labels[i], predictions[i]) for i in index]), abs=1e-12)
    stacked = task("matthews").scores(labels[index].reshape(2, 2, -1), predictions[index].reshape(2, 2, -1))
    assert stacked.ravel() == pytest.approx(matthews(labels[index], predictions[index]), abs=1e-12)


def test_known_scores_to_the_last_digit() -> None:
    labels, predictions = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 0, 2]
    assert task("accuracy").score(labels, predictions) == pytest.approx(5 / 7)
    assert task("macro-f1").score(labels, predictions) == pytest.approx((1 / 2 + 4 / 5 + 4 / 5) / 3)
    assert task("spearman").score([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
    assert task("spearman").score([1.0, 2.0, 3.0], [9.0, 8.0, -1.0]) == pytest.approx(-1.0)
    assert task("matthews", 2).score([0, 1, 0, 1], [1, 0, 1, 0]) == pytest.approx(-1.0)


def test_a_constant_answer_scores_nothing_in_a_correlation() -> None:
    assert task("matthews").score([0, 1, 2, 0], [1, 1, 1, 1]) == 0.0
    assert task("spearman").score([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0


def test_losses_are_cross_entropy_and_squared_error() -> None:
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 0])
    each = task().losses(logits, labels)
    by_hand = torch.logsumexp(logits, 1) - logits[torch.arange(6), labels]
    torch.testing.assert_close(each, by_hand)
    torch.testing.assert_close(task().loss(logits, labels), F.cross_entropy(logits, labels))
    regression = task("spearman")
    torch.testing.assert_close(
        regression.losses(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.5])), torch.tensor([4.0, 0.25])
    )
    assert regression.loss(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.5])).shape == ()
    half = task().losses(logits.bfloat16(), labels)
    assert half.dtype == torch.float32


def test_predictions() -> None:
    assert task(classes=3).predict([[0.1, 0.9, 0.3], [2.0, 2.0, 1.0]]).tolist() == [1, 0]
    logits = torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16, requires_grad=True)
    values = task("spearman").predict(logits)
    assert values.tolist() == [1.5, -2.0]
    assert values.dtype == np.float64
    with pytest.raises(UsageError, match=r"shape \(2, 3\); expected \[N, 5\]"):
        task().predict(np.zeros((2, 3)))


def test_scores_that_cannot_be_given() -> None:
    with pytest.raises(BadData, match=r"predictions \(3,\) do not fit labels \(2,\)"):
        task().score([0, 1], [0, 1, 2])
    with pytest.raises(BadData, match="N > 0"):
        task().score([], [])
    with pytest.raises(NotFinite, match="NaN or infinite"):
        task("spearman").score([1.0, 2.0], [np.nan, 1.0])


def test_the_default_metric_and_those_that_fit() -> None:
    assert metric_of("image-classification") == "accuracy"
    assert metric_of("regression") == "spearman"
    assert metric_of("pair-classification", "matthews") == "matthews"
    with pytest.raises(UsageError, match="'accuracy' does not fit the task 'regression'; expected spearman"):
        metric_of("regression", "accuracy")
    with pytest.raises(UnknownName, match="did you mean macro-f1"):
        metric_of("regression", "macrof1")
    with pytest.raises(UnknownName, match="unknown task"):
        metric_of("summarisation")


def test_a_task_follows_from_its_data() -> None:
    data = read_data({"train": rows(30, classes=3), "test": rows(9, classes=3, start=90)})
    assert task_of(data) == Task("text-classification", "accuracy", ("class 0", "class 1", "class 2"), 3, "text")
    assert task_of(data, kind="text-classification", metric="macro-f1").metric == "macro-f1"
    with pytest.raises(UsageError, match="read them with task='regression'"):
        task_of(data, kind="regression")
    with pytest.raises(UsageError, match="does not fit"):
        task_of(data, metric="spearman")
    numbers = {s: {"text": ["a", "b", "c"], "label": [1.0, 2.5, 3.0]} for s in ("train", "validation")}
    regression = task_of(read_data(numbers, need=("train",)))
    assert (regression.kind, regression.width, regression.labels, regression.regression) == (
        "regression",
        1,
        None,
        True,
    )


def test_a_task_cannot_contradict_itself() -> None:
    with pytest.raises(UsageError, match="cannot have 3 outputs"):
        Task("text-classification", "accuracy", ("a", "b"), 3, "text")
    with pytest.raises(UsageError, match="does not fit"):
        Task("regression", "accuracy", None, 1, "text")


def test_a_score_of_classes_stands_beside_that_of_the_commonest() -> None:
    rows: Any = SimpleNamespace(labels=torch.tensor([2, 2, 0, 1, 2]))
    said = Answers(np.array([2, 2, 0, 1, 0]), np.zeros(5), np.ones(5), None)
    assert score_of(task(classes=3), rows, said) == {"metric": "accuracy", "mean": 0.8, "majority": 0.6}
    floats: Any = SimpleNamespace(labels=torch.tensor([0.5, 1.5, 2.5]))
    ordered = Answers(np.array([1.0, 2.0, 3.0]), np.zeros(3), np.ones(3), None)
    assert "majority" not in score_of(task("spearman"), floats, ordered)
