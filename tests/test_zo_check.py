"""The check of the zeroth-order steps: what its claims are judged by, and that its arms are what they are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import text_data
from torch import nn

from brickyard.checks import zo
from brickyard.checks.run import Answers
from brickyard.core import registry, trial
from brickyard.core.answers import answer
from brickyard.core.build import build

CLAIMS = {(claim.measure, claim.part): claim for claim in registry.find("zo-sgd").record.claims}
LABELS = np.arange(1000) % 4


def answering(share: float, seeds: int = 3) -> np.ndarray:
    """Predictions [seeds, N], so many of which are right."""
    return np.tile(np.where(np.arange(1000) < 1000 * share, LABELS, (LABELS + 1) % 4), (seeds, 1))


def judged(fitted: float, alone: float) -> dict:
    shares = {"fitted": fitted, "head alone": alone, "random": 0.3, "control": 0.3, "majority": 0.25}
    answers = {name: Answers(LABELS, answering(share)) for name, share in shares.items()}
    told = {name: {"per_seed": [share] * 3} for name, share in shares.items()}
    return zo._aligned(answers, told, {})


def test_a_fitted_head_that_the_steps_ruin_does_not_hold_by_the_fitting_alone() -> None:
    assert judged(0.8, 0.8)["holds"] is True
    assert judged(0.85, 0.8)["holds"] is True
    ruined = judged(0.6, 0.8)
    assert ruined["holds"] is False and ruined["measured"] == pytest.approx(-20)
    assert "fitted >= head alone - 0.5" in ruined["inequality"] and ruined["control"]["destroyed"]
    assert judged(0.32, 0.3)["holds"] == "set-up invalid"


def test_alignment_on_a_small_base(text_base: Path) -> None:
    """At learning rate 0 the steps change nothing, so what is left is what the head alone answers."""
    data: Any = text_data(48, 60)
    claim = replace(CLAIMS["alignment", ""], base=str(text_base), data=data, train_rows=40, lrs=(0.0,), seeds=2)
    found = zo.alignment(claim, steps=2, fitting=200)
    arms = {name: arm["per_seed"] for name, arm in found["arms"].items()}
    assert arms["fitted"] == arms["head alone"] and found["arms"]["fitted"]["lr"] == 0
    assert found["figures"]["fitted >= head alone - 0.5"]["measured"] == 0
    assert zo.alignment(claim, steps=2, fitting=200)["arms"] == found["arms"]


def test_what_enters_the_head_gives_the_model_s_own_answers_in_the_order_of_the_rows(text_base: Path) -> None:
    asked = trial.Setting(arm="lora + zo-sgd", base=str(text_base), data=text_data(80, 20), cache=False, device="cpu")
    ready = trial.prepare(asked, ("train",))
    made, rows = build(ready.plan, ready.base, ready.task, seed=3), ready.encoded["train"]
    x_ND = zo._entering(made, rows, ready.device)
    head, trained = zo._head(made.model)
    assert len(trained) == 2 and len(x_ND) == 80
    before = [p.detach().clone() for p in made.parameters()]
    zo._fit(head, trained, x_ND, rows.labels, 20, 0, shuffled=False)
    moved = [not torch.equal(p, old) for p, old in zip(made.parameters(), before, strict=True)]
    assert sum(moved) == 2 and all(p.grad is None for p in made.parameters())
    with torch.no_grad():
        expected = answer(made.model, rows, ready.task)
        assert expected.logits is not None
        np.testing.assert_allclose(head(x_ND).numpy(), expected.logits, rtol=1e-3, atol=1e-4)


def test_a_head_is_fitted_to_its_labels_and_the_control_s_to_others() -> None:
    x_ND = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    right = {}
    for shuffled in (False, True):
        head = nn.Linear(8, 3)
        zo._fit(head, list(head.parameters()), x_ND, x_ND[:, :3].argmax(1), 200, 0, shuffled)
        right[shuffled] = float((head(x_ND).argmax(1) == x_ND[:, :3].argmax(1)).float().mean())
    assert right[False] > 0.9 and right[True] < 0.6


def test_the_ranking_has_an_arm_for_each_part_and_charges_what_it_evaluates() -> None:
    claim = replace(CLAIMS["ranking", "by layer"], seeds=2)
    found = zo.ranking(claim, steps=30)
    assert found.keys() == {part for measure, part in CLAIMS if measure == "ranking"}
    arms = found["by layer"]["arms"]
    assert arms["zo-sgd, by layer"]["losses_per_step"] == 4 and arms["zo-sgd, sparse"]["losses_per_step"] == 2
    assert found["sparse"]["inequality"] == "zo-sgd, sparse > zo-sgd"
    assert arms["zo-sgd"]["losses_per_step"] == 2 and len(arms["zo-sgd, sparse"]["per_seed"]) == 2


def test_a_slope_for_each_layer_moves_both_layers_and_learns() -> None:
    split = zo.data()["train"]
    theta, losses = zo._trained(zo.BY_LAYER, 8e-3, 1, split, 150)
    moved = theta != zo.start(1)
    hidden = zo.SIZES[0] * zo.SIZES[1] + zo.SIZES[1]
    assert losses == 600 and moved[:hidden].float().mean() > 0.9 and moved[hidden:].float().mean() > 0.9
    assert zo._validated(theta, split) > zo._validated(zo.start(1), split) + 0.05
