"""Few labels a class: other examples for every seed, the same for every arm, and never one lucky draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import documents, text_data

import brickyard
from brickyard.core.errors import BadData, UsageError
from brickyard.core.split import support
from brickyard.core.trial import FEW_STEPS, Setting, prepare


def asked(base: Path, **more: Any) -> Setting:
    return Setting(**{"arm": "lora", "base": str(base), "data": text_data(), "device": "cpu", "shots": 4, **more})


def test_each_class_gives_so_many_rows_drawn_from_the_seed() -> None:
    labels = np.array([0, 1, 2] * 20)
    names = ("a", "b", "c")
    drawn = [support(labels, names, 5, seed) for seed in range(3)]
    for rows in drawn:
        assert np.bincount(labels[rows]).tolist() == [5, 5, 5] and (np.diff(rows) > 0).all()
    assert not np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[2], support(labels, names, 5, 2))
    with pytest.raises(BadData, match="class 'a' has 20 rows"):
        support(labels, names, 21, 0)
    assert len(support(labels, names, 21, 0, all_of_few=True)) == 60
    with pytest.raises(BadData, match="class 'd' has 0 rows"):
        support(labels, (*names, "d"), 1, 0)


def test_arms_of_one_seed_see_the_same_examples_and_seeds_others(text_base: Path) -> None:
    found = {}
    for arm in ("lora", "linear-probe"):
        for seed in (1, 2):
            ready = prepare(asked(text_base, arm=arm, seed=seed))
            classes = len(ready.task.labels or ())
            assert len(ready.encoded["train"]) == 4 * classes == len(ready.train_index)
            assert len(ready.encoded["validation"]) <= 4 * classes
            found[arm, seed] = ready.encoded["train"].digest
    assert found["lora", 1] == found["linear-probe", 1] != found["lora", 2] == found["linear-probe", 2]
    whole = prepare(asked(text_base, shots=0))
    assert len(whole.encoded["test"]) == len(prepare(asked(text_base)).encoded["test"])


def test_few_rows_train_for_enough_steps_unless_the_command_says_how_long(text_base: Path) -> None:
    def steps(**more: Any) -> int:
        ready = prepare(asked(text_base, **more))
        if not ready.setting.shots:
            assert ready.training.evaluate_every == (10 if ready.training.steps else 0)
        return ready.training.total_steps(len(ready.encoded["train"]))

    assert steps() == FEW_STEPS and steps(training={"steps": 7}) == 7 and steps(arm="lora:epochs=2") == 2
    assert steps(training={"epochs": 5}) == 5 and steps(shots=0, train_rows=12) == FEW_STEPS
    assert steps(shots=0, train_rows=12, training={"epochs": 5}) == 5


def test_only_rows_that_train_are_encoded_and_counted(text_base: Path) -> None:
    data = text_data(40, 20)
    data["train"]["text"][0] *= 60  # longer than any row may be
    by_rows = {n: prepare(asked(text_base, data=data, shots=0, train_rows=n, max_length=32)) for n in (0, 12)}
    assert by_rows[0].encoded["train"].report["truncated"] == 1
    for n, ready in by_rows.items():
        rows, index = ready.encoded["train"], ready.train_index
        assert len(rows) == rows.report["rows"] == len(index) == (n or len(data["train"]["text"]))
        whole = by_rows[0].encoded["train"]
        assert all(
            torch.equal(rows.collate([i])["input_ids"], whole.collate([p])["input_ids"]) for i, p in enumerate(index)
        )
    assert by_rows[12].encoded["train"].report["truncated"] == (0 in by_rows[12].train_index)
    few = prepare(asked(text_base, data=data, shots=2, max_length=32))
    assert few.encoded["train"].report["rows"] == len(few.train_index) < len(data["train"]["text"])


def test_a_comparison_draws_anew_for_every_seed(text_base: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": str(text_base), "data": text_data(), "device": "cpu", "trials": 1}
    result = brickyard.compare(
        methods=["linear-probe"], seeds=2, shots=3, out=tmp_path / "run", baselines=False, **given
    )
    row = next(row for row in result["methods"] if row["arm"] == "linear-probe")
    assert row["status"] == "done" and len(row["score"]["per_seed"]) == 2
    with pytest.raises(UsageError, match="one draw of examples says little"):
        brickyard.compare(methods=["linear-probe"], seeds=1, shots=3, out=tmp_path / "one", **given)
    with pytest.raises(BadData, match="rows in train; 1000"):
        brickyard.compare(methods=["linear-probe"], shots=1000, out=tmp_path / "many", **given)
    assert not (tmp_path / "one").exists() and not (tmp_path / "many").exists()


def test_what_has_no_classes_or_too_few_rows_is_refused(text_base: Path, causal_base: Path) -> None:
    with pytest.raises(BadData, match="rows in train; 1000"):
        prepare(asked(text_base, shots=1000))
    with pytest.raises(UsageError, match="give one"):
        prepare(asked(text_base, train_rows=10))
    for changes in (
        {"data": text_data(regression=True)},
        {"base": str(causal_base), "data": documents(), "task": "causal-lm"},
    ):
        with pytest.raises(UsageError, match="has no classes"):
            prepare(replace(asked(text_base), **changes))
