"""What a comparison says of all its private runs together."""

from __future__ import annotations

import pytest

from brickyard.compare.privacy import total
from brickyard.core.privacy import Mechanism, epsilon_of, sentence


def report(kind: str = "certified", steps: int = 100) -> dict:
    mechanism = Mechanism(1.0, 0.05, steps)
    return {
        "epsilon": epsilon_of([mechanism], 1e-5),
        "delta": 1e-5,
        "kind": kind,
        "covers": "the weights",
        "mechanisms": [{"noise_multiplier": 1.0, "sample_rate": 0.05, "steps": steps}],
    }


def trial(step: dict | None, status: str = "done") -> dict:
    return {"status": status, "value": ({"step": step} if step else {}) if status == "done" else None}


def test_search_and_seeds_add_up_as_one_long_run() -> None:
    runs = [trial({"privacy": report()}) for _ in range(4)]
    found = total([*runs, trial(None), trial({"updates": 3}), trial(None, "failed")])
    assert found is not None and found["runs"] == 4 and found["estimates"] == 0
    assert found["epsilon"] == pytest.approx(epsilon_of([Mechanism(1.0, 0.05, 400)], 1e-5))
    assert found["epsilon"] > 1.5 * report()["epsilon"]
    assert (
        "4 private runs together spend" in found["sentence"] and "the other 2 runs have no bound" in found["sentence"]
    )


def test_an_estimate_enters_no_certified_total() -> None:
    found = total([trial({"privacy": report()}), trial({"privacy": report("estimate")})])
    assert found is not None and (found["runs"], found["estimates"]) == (1, 1)
    assert found["epsilon"] == pytest.approx(report()["epsilon"]) and "proves nothing" in found["sentence"]
    alone = total([trial({"privacy": report("estimate")})])
    assert alone is not None and alone["epsilon"] is None and alone["sentence"].startswith("Privacy: of 1 private runs")


def test_no_private_run_no_total() -> None:
    assert total([trial(None), trial(None, "timeout")]) is None


def test_one_run_says_what_is_proven_and_what_is_estimated() -> None:
    given = {**report(), "estimate": {"kind": "estimate", "accountant": "Edgeworth, order 1", "epsilon": 1.7}}
    told = sentence(given)
    assert "(certified)" in told and "1.7 by Edgeworth, order 1 (estimate)" in told and "the weights" in told
