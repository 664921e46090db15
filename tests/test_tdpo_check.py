"""The check of `tdpo`: its rule, its pairs, the frontier between evaluations, and the whole of it in small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Here, asked, write_data

from brickyard.checks import _place
from brickyard.checks import tdpo as check
from brickyard.core import registry
from brickyard.core.data import read_data
from brickyard.core.method import Claim


def test_the_reward_is_the_share_of_short_words() -> None:
    assert check.reward("Return the old value") == 0.5
    assert check.reward("a bc def ghij") == 1.0 and check.reward("((12))") == 0.0


def test_pairs_prefer_the_larger_reward_and_leave_ties_out() -> None:
    found = check.preferences(["p", "q", "r"], ["a bc", "longest word", "a"], ["longest", "a b", "bc"])
    assert found.columns == {"prompt": ["p", "q"], "chosen": ["a bc", "a b"], "rejected": ["longest", "longest word"]}


def test_divergence_is_compared_where_both_first_reach_the_lower_top() -> None:
    slow = np.array([0.0, 0.1, 0.2]), np.array([0.0, 1.0, 2.0])
    fast = np.array([0.0, 0.4, 0.3]), np.array([0.0, 8.0, 9.0])
    # Level 0.2: the slow one is there at its end (2.0), the fast one halfway to its first evaluation (4.0).
    assert check.at_equal_reward(slow, fast) == pytest.approx(-2.0)
    assert check.at_equal_reward(fast, slow) == pytest.approx(2.0)


def test_a_verdict_needs_its_whole_interval() -> None:
    assert check.verdict([-1.0, -1.1, -0.9])["holds"] is True
    assert check.verdict([1.0, 1.1, 0.9])["holds"] is False
    assert check.verdict([-1.0, 1.1, 0.1])["holds"] == "undecided"
    assert check.verdict([0.01, 0.011, 0.012], 0.02)["holds"] is True


def curve(reward: float, entropy: float) -> check.Curve:
    around_N = np.linspace(-0.02, 0.02, 20)
    rewards, k = np.array([0.3 + around_N, reward + around_N]), np.ones(20)
    return check.Curve(rewards, np.array([0.0, 1.0]), np.array([2.0, entropy]), k, k)


def test_entropy_at_a_lower_reward_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(share: float) -> tuple[dict[str, list[check.Curve]], dict]:
        arms = {arm: [curve(0.6, 1.5) for _ in range(3)] for arm in ("dpo", "tdpo1", "control")}
        return arms | {"tdpo2": [curve(0.6 * share, 1.6) for _ in range(3)]}, {}

    claim = Claim(text="", measure="entropy")
    for share, expected in ((1.0, True), (0.94, False)):
        monkeypatch.setattr(check, "runs", lambda scale, share=share: runs(share))
        found = check.entropy(claim)
        assert found["holds"] is expected and found["share_of_reward"] == pytest.approx(share)


def test_the_check_runs_from_end_to_end(causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = registry.find("tdpo").record.claims[0]
    claim = replace(first, base=str(causal_base), seeds=2)
    scale = check.Scale(
        str(causal_base), prompts=24, held_out=200, steps=1, every=1, new_tokens=4, batch=4, seeds=2, tuning_epochs=1.0
    )
    monkeypatch.setattr(check.Scale, "of", lambda claim: scale)
    monkeypatch.setattr(check, "TUNING_ROWS", 8)
    monkeypatch.setattr(_place, "Local", Here)
    rows = asked("instruct", train=300)
    halves = {"train": slice(0, 100), "test": slice(100, None)}
    parts = {name: {column: values[half] for column, values in rows["train"].items()} for name, half in halves.items()}
    data = read_data(write_data(tmp_path / "d", rows | parts))
    monkeypatch.setattr(check, "read_data", lambda name: data)
    found = {name: getattr(check, name)(claim) for name in ("frontier", "rejected", "difference", "entropy")}
    for one in found.values():
        assert one["holds"] in (True, False, "undecided", "set-up invalid") and {"gate", "detail"} <= one.keys()
        assert one["control"]["destroyed"]  # without its divergence TDPO2 is DPO, number for number
        assert len(one["arms"]["tdpo2"]["reward"]) == 2 and len(one["arms"]["control"]["reward"]) == 1
