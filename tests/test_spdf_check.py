"""The check of SPDF: what it concludes from given answers, and that its whole way runs on a few documents."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import documents

from brickyard.checks import spdf as check
from brickyard.core.method import Claim
from brickyard.core.split import Split

CLAIM = Claim(text="t", epochs=1, max_length=128)
TOKENS = np.random.default_rng(0).integers(200, 2000, 40)


def runs(seeds: int = 3, noise: float = 0.002, **losses: float) -> check.Runs:
    """Answers of every arm and stage with the given mean losses in nats per token."""
    known = {
        "dense_source": 3.0,
        "half_source": 3.1,
        "sparse_source": 3.2,
        "dense_before": 3.5,
        "sparse_before": 3.8,
        "dense_after": 3.0,
        "sparse_after": 3.05,
        "sparse_after_masked": 3.2,
        "small_after": 3.1,
        "scratch_after": 4.0,
        **losses,
    }
    g = np.random.default_rng(1)
    nats = {
        tuple(key.split("_", 1)): TOKENS * (value + g.normal(0, noise, (seeds, 40))) for key, value in known.items()
    }
    return check.Runs({"source": TOKENS, "target": TOKENS}, nats, {"small_width": 8})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "losses", "holds"),
    [
        ("loss_order", {}, True),
        ("loss_order", {"half_source": 3.3}, False),
        ("loss_order", {"half_source": 3.0, "noise": 0.05}, "undecided"),
        ("gap_narrows", {}, True),
        ("gap_narrows", {"sparse_after": 3.5}, False),
        ("gap_narrows", {"sparse_before": 3.4}, "set-up invalid"),
        ("dense_beats_sparse", {}, True),
        ("dense_beats_sparse", {"sparse_after_masked": 3.0}, False),
        ("within_three_percent", {}, True),
        ("within_three_percent", {"sparse_after": 3.2}, False),
        ("within_three_percent", {"sparse_after": 3.09, "noise": 0.05}, "undecided"),
        ("beats_equal_flops", {}, True),
        ("beats_equal_flops", {"small_after": 2.9}, False),
        ("beats_equal_flops", {"scratch_after": 2.9}, "set-up invalid"),
    ],
)
def test_conclusions_follow_from_the_answers(
    function: str, losses: dict[str, Any], holds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_runs", lambda scale: runs(**losses))
    found = getattr(check, function)(CLAIM)
    assert found["holds"] == holds and type(found["holds"]) is type(holds)
    assert found["low"] <= found["measured"] <= found["high"] and found["detail"] and found["inequality"]
    if function == "within_three_percent":
        assert found["control"]["destroyed"] is True


def test_the_flops_are_those_of_the_paper_and_the_control_costs_as_many() -> None:
    found = check.flops(CLAIM)
    assert found["holds"] is True and found["measured"] == pytest.approx(2.5, abs=0.05)
    assert "saved no time" in found["detail"]
    width = check.smaller_width(128)
    sparse, small = check.cost(check.WIDTH, 128, 0.75), check.cost(width, 128, 0.0)
    both = sparse.sparse + check.FINE_TUNING * sparse.dense
    assert width < check.WIDTH and small.dense * (1 + check.FINE_TUNING) == pytest.approx(both, rel=0.04)


def test_a_chain_runs_from_text_to_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {name: Split(columns) for name, columns in documents(train=60, test=30).items()}
    monkeypatch.setattr(check, "read_data", lambda name: SimpleNamespace(splits=splits))
    scale = check.Scale(epochs=6, block=32, batch=4, seeds=1, documents=50, lrs=(1e-3, 2e-3), held_out=30)
    about = check.prepare(tmp_path, scale)
    assert about["texts"]["pretraining"]["documents"] == 50
    found = check.chain({"folder": str(tmp_path), "scale": asdict(scale), "arm": "sparse", "seed": 0})
    assert found["nats"].keys() == {"source", "before", "after", "after_masked"}
    loss = {stage: sum(values) / sum(found["tokens"]["target"]) for stage, values in found["nats"].items()}
    assert max(loss["before"], loss["after"], loss["after_masked"]) < 0.3 * np.log(check.VOCABULARY)
    assert found["lr"].keys() == {"after", "after_masked"} and set(found["lr"].values()) <= {1e-3, 2e-3}
    small = check.chain({"folder": str(tmp_path), "scale": asdict(scale), "arm": "scratch", "seed": 0})
    assert small["nats"].keys() == {"after"} and small["seconds"] == 0.0
