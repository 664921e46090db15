"""What training kept of the base is told against the base itself, wherever an arm starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import text_data

from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.base import open_base
from brickyard.core.build import build
from brickyard.core.errors import UsageError
from brickyard.core.retention import Drift, Retention, fixed_inputs, pooled, watched


def ready(base: Path, arm: str, **changes: object) -> trial.Prepared:
    training = {"epochs": 2, "batch": 16, "lr": 2e-2}
    return trial.prepare(
        trial.Setting(arm=arm, base=str(base), data=text_data(), training=training, device="cpu", **changes)  # type: ignore[arg-type]
    )


def test_an_arm_that_starts_from_another_brick_is_held_against_the_base(text_base: Path, tmp_path: Path) -> None:
    first = trial.tune(ready(text_base, "lora:r=4"), tmp_path / "first")
    frozen = f"lora:r=4 + pvp:brick={tmp_path / 'first' / 'brick'},freeze=true"
    second = trial.tune(ready(text_base, frozen), tmp_path / "second")
    # Only the head moved, so the states are those that the first brick left.
    assert second["retained"]["drift"] == pytest.approx(first["retained"]["drift"], rel=1e-4) != 0
    base = open_base(str(text_base))
    inputs = fixed_inputs(base, 8)
    made = bricks.load(tmp_path / "second" / "brick").apply(base).model
    cosine = torch.cosine_similarity(
        pooled(base.model(ready(text_base, "full").task, seed=0), inputs), pooled(made, inputs)
    )
    assert second["retained"]["drift"] == pytest.approx(float((1 - cosine).mean()), rel=1e-3)


@pytest.mark.parametrize("arm", ["lst:r=2", "unipt:width=8"])
def test_a_network_beside_the_base_leaves_its_states_alone(arm: str, text_base: Path) -> None:
    known = ready(text_base, arm)
    assert watched(known, build(known.plan, known.base, known.task, seed=0)) is None


@pytest.mark.parametrize("arm", ["lst:r=2", "lora:r=4", "iapt:bottleneck=4"])
def test_a_head_is_fitted_on_the_base_and_not_on_what_stands_beside_it(arm: str, text_base: Path) -> None:
    other = text_data(64, 40)
    known = ready(text_base, arm, retain=other)
    found = watched(known, build(known.plan, known.base, known.task, seed=0))
    expected = Retention.before(known.base.model(known.task, seed=0), known.base, other)
    assert isinstance(found, Retention)
    torch.testing.assert_close(found.weight, expected.weight)
    assert found.score == expected.score


def test_states_of_another_width_have_no_head_of_the_base(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ready(text_base, "lst:r=2", retain=text_data(64, 40))
    made = build(known.plan, known.base, known.task, seed=0)
    whole = pooled
    cut = lambda model, inputs: whole(model, inputs)[:, : 4 if model is made.model else None]  # noqa: E731
    monkeypatch.setattr("brickyard.core.retention.pooled", cut)
    with pytest.raises(UsageError, match=r"--retain: lst:r=2 leaves states of width 4.* leave --retain out"):
        watched(known, made)


def test_drift_is_nothing_where_nothing_moved(text_base: Path) -> None:
    known = ready(text_base, "lora:r=4")
    made = build(known.plan, known.base, known.task, seed=0)
    found = watched(known, made)
    assert isinstance(found, Drift) and found.after(made.model)["drift"] == pytest.approx(0, abs=1e-6)
