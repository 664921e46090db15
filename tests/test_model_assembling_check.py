"""The check of model-assembling: what it concludes from given answers, and that its whole way runs on a tiny stack."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Here, documents

from brickyard.checks import _place
from brickyard.checks import model_assembling as check
from brickyard.core.data import read_data
from brickyard.core.method import Claim
from brickyard.grow._assembling_parts import Shard, meta, meta_shard
from brickyard.grow._assembling_plan import plan, tensors_of

ABOUT: dict[str, Any] = {
    "block_steps": {"total": 60.0, "end_to_end": 100.0},
    "seconds": {"pretrain": 1.0, "parts": 4.0, "longest part": 1.0, "tune": 1.0, "end-to-end": 10.0},
}
RIGHT = {
    "end-to-end": 0.95,
    "equal-budget": 0.93,
    "before": 0.8,
    "assembled": 0.95,
    "different-before": 0.12,
    "different": 0.7,
    "stacked": 0.94,
    "scratch": 0.5,
    "meta": 0.9,
}
ARMS = set(RIGHT)


def table(seeds: int = 3, n: int = 2000, **right: float) -> check.Table:
    """Arms that are right on such shares of the test rows."""
    g = np.random.default_rng(0)
    labels = g.integers(0, 10, n)
    hard = g.random(n)
    answers = {}
    for name, share in {**RIGHT, **{key.replace("_", "-"): value for key, value in right.items()}}.items():
        wrong = hard + g.normal(0, 0.003, (seeds, n)) > share
        answers[name] = np.where(wrong, (labels + 1) % 10, labels).astype(float)
    return check.Table(labels, answers, ABOUT)


@pytest.mark.parametrize(
    ("part", "right", "holds"),
    [
        ("before", {}, True),
        ("before", {"before": 0.3}, False),
        ("before", {"meta": 0.2}, "set-up invalid"),
        ("equal budget", {}, True),
        ("equal budget", {"assembled": 0.9}, False),
        ("equal budget", {"end_to_end": 0.2}, "set-up invalid"),
        ("full budget", {"assembled": 0.97}, True),
        ("full budget", {"assembled": 0.93}, False),
    ],
)
def test_conclusions_follow_from_the_answers(part: str, right: dict[str, float], holds: Any) -> None:
    found = check.of_images(part, table(**right), "here")
    assert found["holds"] == holds and type(found["holds"]) is type(holds)
    assert found["low"] <= found["measured"] <= found["high"] and found["inequality"] == check.PARTS[part]
    assert found["control"]["destroyed"] is True and "60.0% of the 100" in found["detail"]
    assert "(3 s with the parts side by side) against 10 s" in found["detail"] and "6 s" in found["detail"]


@pytest.mark.parametrize(
    ("part", "right"), [("before", {"different_before": 0.9}), ("equal budget", {"scratch": 0.95})]
)
def test_a_control_can_fail(part: str, right: dict[str, float]) -> None:
    assert check.of_images(part, table(**right), "here")["control"]["destroyed"] is False


@pytest.mark.parametrize(
    ("losses", "holds"),
    [({}, True), ({"assembled": 3.2}, False), ({"end-to-end": 5.0}, "set-up invalid")],
)
def test_language_models_are_judged_in_nats_per_token(losses: dict[str, float], holds: Any) -> None:
    g = np.random.default_rng(0)
    tokens = g.integers(200, 900, 40)
    known = {**dict.fromkeys(ARMS, 3.5), "equal-budget": 3.0, "assembled": 2.9, "scratch": 4.0, "end-to-end": 2.8}
    nats = {arm: tokens * (x + g.normal(0, 0.002, (3, 40))) for arm, x in {**known, **losses}.items()}
    found = check.of_language(check.Table(tokens, nats, ABOUT), "here")
    assert found["holds"] == holds and found["control"]["destroyed"] is True
    assert found["measured"] == pytest.approx({**known, **losses}["assembled"] - 3.0, abs=0.01)


def test_language_models_wait_for_full() -> None:
    found = check.language(Claim(text="t", epochs=0))
    assert found["holds"] == "skipped" and "--full" in found["detail"]


@pytest.mark.usefixtures("quiet_libraries")
def test_the_whole_way_runs_on_a_tiny_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_place, "Local", Here)
    wanted: list[list[int]] = []
    different = check._different
    monkeypatch.setattr(
        check, "_different", lambda bench, seed, given: wanted.append(given["donors"]) or different(bench, seed, given)
    )
    claim = Claim(text="t", data="embedded:digits", epochs=2, train_rows=256, batch=16, seeds=1, lrs=(3e-3,))
    found = check.images(claim, depth=4, width=16, heads=2, tested=60)
    assert found.keys() == set(check.PARTS) and wanted == [[1, 2, 3, 4]]  # no two parts of one meta network
    figures = found["before"]["figures"]
    assert figures["scores"].keys() == ARMS | {"majority"}
    spent = figures["block_steps"]
    assert spent["total"] <= 0.6 * spent["end_to_end"] == 0.6 * 4 * 32
    assert 0 <= spent["total"] - spent["equal-budget"] < 4 and figures["steps"]["end_to_end"] == 32
    assert len(figures["interfaces"]["seed 1"]["assembled"]) == 4
    for part in found.values():
        assert part["holds"] in (True, False, "undecided", "set-up invalid") and part["detail"]


@pytest.mark.usefixtures("quiet_libraries")
def test_the_language_side_runs_on_a_tiny_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_data(documents(train=24, test=20), task="causal-lm")
    monkeypatch.setattr(check, "read_data", lambda name, **_: data)
    seen: list[dict[str, Any]] = []

    def one_arm(bench: check.Bench, seeds: int, tokens: np.ndarray, workers: int) -> check.Table:
        found = check.job({"bench": asdict(bench), "what": "assembling", "seed": 1})
        seen.append({**found, "steps": bench.steps, "tokens": tokens})
        return check.Table(tokens, {arm: np.asarray([found["answers"].get(arm, tokens * 5.0)]) for arm in ARMS}, ABOUT)

    monkeypatch.setattr(check, "measured", one_arm)
    claim = Claim(text="t", epochs=8, batch=4, max_length=32, seeds=1, lrs=(1e-3,))
    found = check.language(claim, depth=4, width=16, heads=2)
    answers, tokens = seen[0]["answers"], seen[0]["tokens"]
    assert answers.keys() == {"meta", "before", "assembled", "stacked"} and len(tokens) == 20
    loss = {arm: sum(nats) / tokens.sum() for arm, nats in answers.items()}
    assert all(loss[arm] == pytest.approx(found["figures"]["scores"][arm]) for arm in answers)
    assert max(loss.values()) < np.log(4096) and seen[0]["steps"] % 8 == 0


def test_stacking_copies_each_stand_in_into_its_blocks() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
    cut = plan(BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=6)), 3)
    network: Shard = meta_shard(cut, meta(cut, seed=4))
    made: Any = type("Made", (), {"plan": cut})
    live = tensors_of(check.stacked(made, network))
    for block in range(6):
        for name in (name for name in live if name.startswith(f"{cut.path}.{block}.")):
            assert torch.equal(live[name], network.tensors[name.replace(f".{block}.", f".{block // 2}.", 1)])
    assert all(torch.equal(live[name], network.tensors[name]) for name in (*cut.stem, *cut.head))
