"""What a comparison says of all its private runs together."""

from __future__ import annotations

from pathlib import Path

import pytest

from brickyard.compare.ledger import Ledger
from brickyard.compare.privacy import total
from brickyard.core.files import write_json
from brickyard.core.privacy import Mechanism, epsilon_of, sentence
from brickyard.core.spent import PLANNED


def report(kind: str = "certified", steps: int = 100, adjacency: str = "add-or-remove") -> dict:
    mechanism = Mechanism(1.0, 0.05, steps)
    return {
        "epsilon": epsilon_of([mechanism], 1e-5),
        "delta": 1e-5,
        "kind": kind,
        "adjacency": adjacency,
        "covers": "the weights",
        "mechanisms": [{"noise_multiplier": 1.0, "sample_rate": 0.05, "steps": steps}],
    }


def trial(step: dict | None, status: str = "done", *, arm: str = "lora", planned: dict | None = None) -> dict:
    value = ({"step": step} if step else {}) if status == "done" else None
    return {"status": status, "value": value, "arm": arm, "planned": planned}


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


def test_a_run_that_did_not_finish_counts_at_its_planned_cost() -> None:
    """Whether it fails depends on the rows: leaving it out would give a figure that is too small."""
    private = "lora + dp"
    finished = trial({"privacy": report()}, arm=private)
    unfinished = [trial(None, status, arm=private, planned=report()) for status in ("failed", "timeout", "unfinished")]
    found = total([finished, *unfinished])
    assert found is not None and (found["runs"], found["unfinished"], found["uncounted"]) == (4, 3, 0)
    assert found["epsilon"] == pytest.approx(epsilon_of([Mechanism(1.0, 0.05, 400)], 1e-5))
    assert "3 unfinished at their planned cost" in found["sentence"]
    # Without a plan there is nothing to add, and the sentence says so; a refusal was no run.
    lost = total([finished, trial(None, "failed", arm=private), trial(None, "refused", arm=private)])
    assert lost is not None and (lost["runs"], lost["uncounted"]) == (1, 1)
    assert "1 private run did not finish; not in this total" in lost["sentence"]
    alone = total([trial(None, "failed", arm=private)])
    assert alone is not None and alone["sentence"].startswith("Privacy: 1 private run did not finish")


def test_runs_that_hide_different_things_are_listed_apart() -> None:
    one, other = trial({"privacy": report()}), trial({"privacy": report(adjacency="replace-one")})
    found = total([one, other, one])
    assert found is not None and found["runs"] == 3 and found["epsilon"] is None
    assert [(t["adjacency"], t["runs"]) for t in found["totals"]] == [("add-or-remove", 2), ("replace-one", 1)]
    assert found["totals"][1]["epsilon"] == pytest.approx(report()["epsilon"])
    said = found["sentence"]
    assert "for one row more or less; one private run" in said and "for one row replaced by another" in said


def test_attempts_that_were_repeated_or_cut_short_stay_on_record(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    row = {"name": "a", "role": "final", "seed": 1, "arm": "lora + dp", "reason": "", "seconds": 1.0, "finished": "now"}
    for status in ("failed", "done"):
        write_json(ledger.begin("key") / PLANNED, report())
        ledger.write("key", {**row, "status": status, "value": {"step": {"privacy": report()}}})
    write_json(ledger.begin("killed") / PLANNED, report(steps=7))
    found = Ledger(tmp_path).started()
    assert sorted(trial["status"] for trial in found) == ["done", "unfinished", "unfinished"]
    spent = total(found)
    assert spent is not None and (spent["runs"], spent["unfinished"]) == (3, 2)
    assert spent["epsilon"] == pytest.approx(epsilon_of([Mechanism(1.0, 0.05, 207)], 1e-5))


def test_no_private_run_no_total() -> None:
    assert total([trial(None), trial(None, "timeout")]) is None


def test_one_run_says_what_is_proven_and_what_is_estimated() -> None:
    given = {**report(), "estimate": {"kind": "estimate", "accountant": "Edgeworth, order 1", "epsilon": 1.7}}
    told = sentence(given)
    assert "(certified)" in told and "1.7 by Edgeworth, order 1 (estimate)" in told and "the weights" in told
