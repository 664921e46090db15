"""The check of `lines`: it runs end to end, and its judgements follow the errors that it is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS
from test_route import rows as sentences

from brickyard.checks import lines as check
from brickyard.core import registry
from brickyard.core.data import read_data


def errors(**accuracies: float) -> check.Errors:
    """Errors of three seeds on 400 digits with these accuracies; the same digits are wrong as far as they go."""
    found = check.Errors()
    for arm, accuracy in accuracies.items():
        for seed in range(3):
            wrong = np.zeros(400)
            wrong[: round(400 * (1 - accuracy)) + seed] = 1
            found.add(arm, wrong)
    return found


def one(**changes: float) -> dict:
    names = {
        "base: controls": 0.9,
        "fine-tuned: controls": 0.6,
        "fine-tuned: target": 0.95,
        "lines: target": 0.95,
        "lines: controls": 0.85,
        "reversed: controls": 0.65,
        "constant: target": 0.92,
    }
    return check.judged_one(errors(**{**names, **changes}))


def test_one_model_is_judged_by_all_three_parts_and_its_gate() -> None:
    found = one()
    assert found["holds"] is True and found["control"]["destroyed"]
    assert found["measured"] == pytest.approx(3.0, abs=0.1)
    assert one(**{"constant: target": 0.99})["holds"] is False
    assert one(**{"lines: controls": 0.62})["holds"] is False
    assert one(**{"lines: target": 0.85})["holds"] is False
    assert one(**{"fine-tuned: controls": 0.89})["holds"] == "set-up invalid"
    assert not one(**{"reversed: controls": 0.9})["control"]["destroyed"]


def test_merging_needs_most_seeds_and_experts_worth_merging() -> None:
    names = {
        "task arithmetic": 0.8,
        "task arithmetic + lines": 0.85,
        "task arithmetic + reversed": 0.7,
        "experts, each on its own": 0.95,
        "base": 0.7,
    }
    found = check.judged_many(errors(**names))
    assert found["holds"] is True and found["better_seeds"] == 3 and found["control"]["destroyed"]
    assert check.judged_many(errors(**{**names, "base": 0.94}))["holds"] == "set-up invalid"
    equal = check.judged_many(errors(**{**names, "task arithmetic + lines": 0.8}))
    assert equal["holds"] is False and "no gain here" in equal["detail"]


def test_the_check_runs_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 10
    rows = {split: (torch.rand(80, 8, 8, generator=draw), labels) for split in ("train", "validation", "test")}
    monkeypatch.setattr(check, "splits_of", lambda name: rows)
    claim = replace(registry.find("lines").record.claims[0], seeds=1)
    found = check.by_views(claim, base_epochs=1, epochs=1)
    assert found["holds"] in (True, False, "undecided", "set-up invalid")
    accuracy = found["figures"]["accuracy"]
    assert all(0 <= value <= 100 for value in accuracy.values())
    assert {"constant: target", "constant chosen freely: controls"} <= accuracy.keys()


def test_merging_is_measured_end_to_end_on_sentence_tasks(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = []
    for place, topic in enumerate((WORDS[10:13], WORDS[13:16])):
        splits = {
            s: sentences(24, 3 * place + i, topic, ("a", "b")) for i, s in enumerate(("train", "validation", "test"))
        }
        sets.append(read_data(splits, need=("train", "validation", "test"), allow_overlap=True))
    monkeypatch.setattr(check, "task_sets", lambda names: sets)
    claim = replace(registry.find("lines").record.claims[1], seeds=1, train_rows=16, epochs=4, base=str(text_base))
    accuracy = check.by_tasks(claim, held=12, test=24)["figures"]["accuracy"]
    ways = {"task arithmetic", "TIES", "average"}
    reversed_ = {"task arithmetic + reversed", "experts, each on its own", "base"}
    assert accuracy.keys() == ways | {f"{way} + lines" for way in ways} | reversed_
    assert all(0 <= value <= 100 for value in accuracy.values())


def test_scales_in_the_check_are_those_of_the_method() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = {s: (torch.rand(40, 8, 8, generator=draw), torch.arange(40) % 10) for s in ("train", "validation", "test")}
    world = check.World(rows, 1, 1, 1)
    scales = world.named(world.scale_P(0.1, 0.9))
    assert float(scales["embed.weight"].max()) == pytest.approx(0.1)
    assert float(scales[f"blocks.{check.BLOCKS - 1}.up.weight"].min()) == pytest.approx(1.0)
    assert torch.equal(world.scale_P(1.0, 0.0), torch.ones(len(world.base_P)))
    tau = world.taus["turned"]
    assert not torch.equal(tau, torch.zeros_like(tau))
    assert world.score(tau).test["turned"].shape == (40,)
