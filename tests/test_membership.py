"""The membership attack: its figures against brute force, what it says of leaky and private runs, and bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents, text_data, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from brickyard.audit.membership import area, attack, caught, epsilon_lower
from brickyard.checks import membership as checks
from brickyard.cli import main
from brickyard.core import registry, trial
from brickyard.core.errors import BadData, UsageError


def drawn(n: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(n) + shift


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.booleans(), st.integers(0, 99))
def test_the_area_is_the_share_of_pairs_in_order(m: int, n: int, ties: bool, seed: int) -> None:
    a, b = drawn(m, 0.5, seed), drawn(n, 0.0, seed + 100)
    if ties:
        a, b = a.round(), b.round()
    pairs = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    auc, low, high = area(a, b)
    assert auc == pytest.approx(pairs.mean()) and 0 <= low <= auc <= high <= 1
    assert area(b, a)[0] == pytest.approx(1 - auc)


def test_the_interval_of_the_area_covers_as_it_should() -> None:
    from scipy.special import ndtr

    true = float(ndtr(0.6 / math.sqrt(2)))
    hits = [
        low <= true <= high for low, high in (area(drawn(60, 0.6, s), drawn(80, 0.0, 1000 + s))[1:] for s in range(400))
    ]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_members_are_caught_at_the_errors_that_are_allowed() -> None:
    others = np.arange(1000.0)
    members = np.array([2000.0, 995.0, 989.5, 3.0])
    assert caught(members, others, 0.01) == 0.75  # ten others lie above the threshold, 989
    assert caught(members, others, 0.0) == 0.25


def test_the_bound_on_epsilon_is_the_binomial_tail() -> None:
    member, other = np.arange(100.0) + 1000, np.arange(100.0)
    # All of 2 k guesses right: e^eps / (1 + e^eps) to the power of 2 k is the error left to that k.
    expected = max(-math.log((0.05 / 4) ** (-1 / (2 * k)) - 1) for k in (5, 10, 25, 50))
    assert epsilon_lower(member, other) == pytest.approx(expected, rel=1e-6)
    assert binom.sf(99, 100, 1 / (1 + math.exp(-expected))) == pytest.approx(0.05 / 4, rel=1e-4)
    assert epsilon_lower(other, member) == 0 and epsilon_lower(np.zeros(50), np.zeros(80)) == 0


def test_randomised_response_is_bounded_below_its_own_epsilon() -> None:
    """Its epsilon is known: the bound exceeds it in at most 5 % of runs, and comes near with many rows."""
    epsilon, found = 1.0, []
    for seed in range(200):
        draw = np.random.Generator(np.random.PCG64(seed))
        truth = draw.random(4000) < 0.5
        told = np.where(draw.random(4000) < 1 / (1 + math.exp(-epsilon)), truth, ~truth)
        score = told + 0.01 * draw.random(4000)
        found.append(epsilon_lower(score[truth], score[~truth]))
    assert np.mean(np.array(found) > epsilon) <= 0.05 and np.mean(found) > 0.75


def test_strangers_are_no_members() -> None:
    found = [attack(drawn(200, 0.0, s), drawn(200, 0.0, 500 + s)) for s in range(100)]
    assert np.mean([f.detected for f in found]) <= 0.08 and np.mean([f.epsilon_lower > 0 for f in found]) <= 0.06
    assert all(attack(drawn(200, 1.0, s), drawn(200, 0.0, 500 + s)).detected for s in range(20))
    with pytest.raises(BadData, match="at least 2"):
        attack(np.zeros(1), np.zeros(5))
    with pytest.raises(BadData, match="not finite"):
        attack(np.array([1.0, np.nan]), np.zeros(5))


def hard_data() -> dict[str, dict[str, list]]:
    """Labels without a rule: what is right on train was learned by heart."""
    data = text_data()
    draw = np.random.Generator(np.random.PCG64(0))
    for split in data.values():
        split["label"] = [("a", "b")[i] for i in draw.integers(2, size=len(split["label"]))]
    return data


def test_a_leaky_run_is_detected_and_a_private_one_is_not(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_data(tmp_path / "data", hard_data())

    def audit(arm: str, **training: Any) -> dict[str, Any]:
        asked = trial.Setting(
            arm=arm, base=str(text_base), data=str(folder), cache=False, device="cpu",
            training={"epochs": 25, "batch": 16, "precision": "float32", **training},
        )  # fmt: skip
        place = tmp_path / arm.replace(" ", "").replace(":", "")
        trial.tune(trial.prepare(asked), place)
        words = [
            "audit",
            "membership",
            "--base",
            str(text_base),
            "--data",
            str(folder),
            "--brick",
            str(place / "brick"),
        ]
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    # Evaluated at the end alone, the last weights are kept: they know every row.
    leaky = audit("full", lr=3e-3, epochs=80, evaluate_every=10**6)
    assert leaky["detected"] and leaky["auc"] > 0.75 and leaky["epsilon_lower"]["value"] > 0.5
    private = audit("full + dp:epsilon=1", lr=1e-3)
    assert private["auc"] < 0.7 and private["epsilon_lower"]["value"] <= 1 == round(private["certified_epsilon"])
    assert private["holds"] is True and private["members"] == 96 and private["score"] == "loss"


def test_what_cannot_be_attacked_is_refused(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = (write_data(tmp_path / name, text_data(train=n)) for name, n in (("data", 96), ("other", 90)))
    for place, rows in (("whole", 0), ("some", 60)):
        asked = trial.Setting(
            arm="linear-probe", base=str(text_base), data=str(data), cache=False, device="cpu", train_rows=rows,
            training={"steps": 2, "batch": 16, "precision": "float32"},
        )  # fmt: skip
        trial.tune(trial.prepare(asked), tmp_path / place)
    for words, expected in (
        (["--data", str(data)], "--brick"),
        (["--data", str(data), "--brick", str(text_base)], "--brick"),
        (["--data", str(other), "--brick", str(tmp_path / "whole" / "brick")], "other rows"),
        (["--data", str(data), "--brick", str(tmp_path / "some" / "brick")], "60 of the 96"),
        (["--data", str(data), "--brick", str(tmp_path / "whole" / "brick"), "--score", "calibrated"], "no head"),
    ):
        assert main(["audit", "membership", "--base", str(text_base), *words]) == 2
        assert expected in capsys.readouterr().err
    assert main(["audit", "membership", "--base", str(text_base), "--data", str(data), "--brick",
                 str(tmp_path / "whole" / "brick")]) == 0  # fmt: skip
    assert "AUC" in capsys.readouterr().out


@pytest.mark.parametrize("some", [0, 3])
def test_a_language_model_of_some_blocks_is_refused_as_one_of_some_rows_is(
    some: int, causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", documents())
    asked = trial.Setting(
        arm="lora:r=2", base=str(causal_base), data=str(data), cache=False, device="cpu", train_rows=some,
        task="causal-lm", max_length=16, training={"steps": 2, "batch": 4, "precision": "float32"},
    )  # fmt: skip
    trial.tune(trial.prepare(asked), tmp_path / "run")
    words = ["--base", str(causal_base), "--data", str(data), "--brick", str(tmp_path / "run" / "brick")]
    # More documents than are looked at: the blocks of all of them count.
    code = main(["audit", "membership", *words, "--rows", "20"])
    told = capsys.readouterr()
    assert (code, "AUC" in told.out, "on 3 of the" in told.err) == ((2, False, True) if some else (0, True, False))


def test_the_claims_run_from_end_to_end(text_base: Path) -> None:
    claim = registry.find("membership").record.claims[0]
    small = replace(claim, base=str(text_base), data=text_data(), seeds=1, epochs=2, train_rows=60)
    found = checks.leaks(small)
    assert found["leaky"]["holds"] in (True, False, "undecided") and found["private"]["figures"]["certified"][0] <= 1
    assert found["leaky"]["control"]["destroyed"] is True
    json.dumps(found)


@pytest.mark.parametrize(("detected", "destroyed"), [(0, True), (1, False), (2, False), (3, False)])
def test_a_control_in_which_any_seed_detects_is_not_destroyed(
    detected: int, destroyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that nobody trained on tell nothing; one seed that finds something there is one too many."""
    claim = registry.find("membership").record.claims[0]
    scores = [(drawn(80, 1.0, 3 * s), drawn(120, 0.0, 3 * s + 1)) for s in range(3)]
    for place in range(detected):
        members, others = scores[place]
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(others))
        others[order[::2]] += 2.0
        scores[place] = (members + 2.0, others)
    monkeypatch.setattr(checks, "trained", lambda *_: {"private": [{"step": {"privacy": {"epsilon": 1.0}}}] * 3})
    monkeypatch.setattr(checks, "_scores", lambda *_: scores)
    assert checks.leaks(claim)["leaky"]["control"]["destroyed"] is destroyed


def test_options_out_of_range_are_usage_errors() -> None:
    for options in ({"rows": 3}, {"confidence": 1.0}, {"score": "x"}):
        with pytest.raises(UsageError, match=next(iter(options))):
            registry.config("membership", options)


def test_rows_of_a_brick_whose_validation_was_cut_from_train_are_its_own(
    text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = text_data(96, 40)
    del data["validation"]
    common = ["--base", str(text_base), "--data", str(write_data(tmp_path / "data", data)), "--device", "cpu"]
    assert main(["tune", "lora:r=2", "--steps", "2", "--out", str(tmp_path / "out"), *common]) == 0
    assert main(["audit", "membership", "--brick", str(tmp_path / "out" / "brick"), *common]) in (0, 3)
    found = capsys.readouterr()
    assert "over 86 members and 40 others" in found.out and not found.err
