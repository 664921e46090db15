"""The check of `mediator`: it runs end to end on a tiny base, and its judgements follow what it is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS
from test_route import rows

from brickyard.checks import mediator as check
from brickyard.checks.lines import Errors
from brickyard.core import readers, registry
from brickyard.core.data import read_data


def errors(**accuracies: float) -> Errors:
    """Errors of three seeds on 600 texts with these accuracies; the same texts are wrong as far as they go."""
    found = Errors()
    for arm, accuracy in accuracies.items():
        for seed in range(3):
            wrong = np.zeros(600)
            wrong[: round(600 * (1 - accuracy)) + seed] = 1
            found.add(arm.replace("_", " "), wrong)
    return found


SEEN = {
    "base": 0.70,
    "experts": 0.90,
    "average": 0.80,
    "oracle": 0.88,
    "learned": 0.88,
    "random_blocks": 0.86,
    "router_of_shuffled_tasks": 0.80,
}
COUNT = {"stored": 1.2, "limit": 1.3, "stored dense": 3.0, "blended": 0.2}


def judged(unseen: float = 0.6, count: dict | None = None, **changes: float) -> dict:
    arms = errors(**{**SEEN, **changes})
    arms.rows["another task's expert"] = errors(x=changes.get("other", 0.7)).rows["x"]
    other = errors(blended=unseen, most_probable=0.6)
    return check.judged(arms, other, [{**COUNT, **(count or {})}] * 3)


def test_each_part_can_hold_and_fail() -> None:
    assert {name: part["holds"] for name, part in judged().items()} == dict.fromkeys(judged(), True)
    for part, changes in (
        ("half the gap", {"oracle": 0.82, "random_blocks": 0.7, "learned": 0.82}),
        ("conflict", {"random_blocks": 0.90}),
        ("conflict", {"random_blocks": 0.88}),  # as good, but not better
        ("bytes", {"count": {"stored": 1.4}}),
        ("router", {"learned": 0.84}),
        ("unseen", {"unseen": 0.55}),
    ):
        found = judged(**changes)
        assert found[part]["holds"] is False, part
        assert [name for name, other in found.items() if other["holds"] is not True] == [part]


def test_the_set_up_is_invalid_where_experts_learned_nothing() -> None:
    found = judged(base=0.9)
    assert {part["holds"] for part in found.values()} == {"set-up invalid"}
    assert found["router"]["gate"]["holds"] is not True


def test_nothing_is_said_of_blending_where_no_text_was_blended() -> None:
    found = judged(count={"blended": 0.0})
    assert found["unseen"]["holds"] == "set-up invalid" and "0 % of its texts are blended" in found["unseen"]["detail"]
    assert found["router"]["holds"] is True


def test_controls_tell_a_gain_from_its_absence() -> None:
    found = judged()
    assert all(found[name]["control"]["destroyed"] for name in ("half the gap", "conflict", "bytes", "router"))
    other = judged(other=0.9, random_blocks=0.88, router_of_shuffled_tasks=0.88, count={"stored dense": 1.1})
    assert not any(other[name]["control"]["destroyed"] for name in ("half the gap", "conflict", "bytes", "router"))


def test_the_check_runs_end_to_end(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topics = [WORDS[10:13], WORDS[13:16], WORDS[16:19], WORDS[19:22], WORDS[11:20]]
    sets = []
    for place, topic in enumerate(topics):
        splits = {s: rows(24, 3 * place + i, topic, ("a", "b")) for i, s in enumerate(("train", "validation", "test"))}
        sets.append(read_data(splits, need=("train", "validation", "test"), allow_overlap=True))
    monkeypatch.setattr(check, "task_sets", lambda: sets)
    claim = replace(registry.find("mediator").record.claims[0], seeds=1, train_rows=16, epochs=1, base=str(text_base))
    found = check.by_tasks(claim, held=12, test=24, prompts=16, draws=1)
    assert found.keys() == {"half the gap", "conflict", "bytes", "router", "unseen"}
    assert {claim.part for claim in registry.find("mediator").record.claims} == found.keys()
    figures = found["router"]["figures"]
    arms = "base, experts, average, TIES, task arithmetic, full routing, oracle, learned, random blocks"
    assert figures["accuracy"].keys() >= {*arms.split(", "), "low rank at equal bytes", "halfway"}
    assert all(0 <= mean <= 100 for mean in [*figures["accuracy"].values(), *figures["unseen"].values()])
    for counted in figures["counted"]:
        assert len(counted["blocks"]) == 1 and len(counted["conflict"]) == 2
        assert 1 < counted["stored"] < counted["limit"] < counted["stored dense"]


def test_embedded_topics_stand_in_for_the_public_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    labels = [f"topic {i}" for i in range(11)]
    splits = {
        s: {"text": [f"{s} {i} {x}" for x in labels for i in range(4)], "label": sorted(labels * 4)}
        for s in ("train", "validation", "test")
    }
    monkeypatch.setattr(readers, "read", lambda name, own=readers.read: own(splits if isinstance(name, str) else name))
    sets = check.task_sets()
    assert [len(data.labels or ()) for data in sets] == [3, 2, 2, 2, 2]
    seen = [label for data in sets for label in data.labels or ()]
    assert sorted(seen) == sorted(labels)
