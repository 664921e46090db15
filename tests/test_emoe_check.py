"""EMoE's check: the parts of its answer, its gate, its control, and what it calls broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Here, text_data, write_data
from mixtures import (
    EMOE,
    classifier,
    setting,
)

from brickyard.checks import _place
from brickyard.checks import emoe as checks
from brickyard.checks.run import Answers
from brickyard.core import registry, trial


def tiny_check(monkeypatch: pytest.MonkeyPatch, base: Path, folder: Path) -> Any:
    """The check's set-up on the small base: both places, one short run an arm in this process."""
    monkeypatch.setattr(_place, "Local", Here)
    claim = registry.find("emoe").record.claims[0]
    home, other = write_data(folder / "home", text_data()), write_data(folder / "other", text_data(test=40))
    monkeypatch.setattr(checks, "ELSEWHERE", {"home": str(other)})
    small = {
        name: text.replace("experts=32,topk=16,layers=4", "experts=8,topk=4") for name, text in checks.ARMS.items()
    }
    monkeypatch.setattr(checks, "ARMS", small)
    return replace(claim, base=str(base), data=str(home), seeds=2, epochs=6, lrs=(3e-3,), train_rows=0)


def test_the_check_answers_in_three_parts(text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = tiny_check(monkeypatch, text_base, tmp_path)
    found = checks.transfer(claim, test_rows=50)
    assert (
        found.keys() == {"kept", "dense", "sparse"} == {c.part for c in registry.find("emoe").record.claims if c.part}
    )
    sparse = found["sparse"]
    assert sparse["holds"] is True and sparse["measured"] == 0.5, sparse["detail"]
    assert sparse["figures"]["count"]["fewest"] == sparse["figures"]["count"]["most"] == 32
    assert list(sparse["figures"]["ladder"]) == ["1/8", "2/8", "4/8", "6/8", "8/8"]
    kept = found["kept"]
    assert kept["arms"].keys() == {"full", "emoe", "random", "dropout"}
    assert (
        kept["gate"]["holds"] is True and kept["control"]["destroyed"] and kept["holds"] in (True, False, "undecided")
    )
    assert list(kept["comparisons"]["kept"]) == ["at home", "in other"]
    assert kept["comparisons"]["beside"]["in other"].keys() == {"full", "to-dense", "random", "dropout"}
    assert "gain over full may be claimed" in kept["detail"] and "to-dense" in found["dense"]["detail"]


def fixed(right: float, seeds: int = 3, rows: int = 400) -> Answers:
    """Answers of which a given share is right, the same rows in every seed."""
    labels = np.arange(rows) % 2
    wrong = np.arange(rows) < round((1 - right) * rows)
    return Answers(labels, np.tile(np.where(wrong, 1 - labels, labels), (seeds, 1)))


def verdict(**changes: Any) -> dict[str, dict[str, Any]]:
    rights = {"full": 0.8, "emoe": 0.8, "to-dense": 0.8, "random": 0.7, "shuffled": 0.5, **changes.pop("rights", {})}
    home = {name: fixed(right, 1 if name == "shuffled" else 3) for name, right in rights.items()}
    count = {"tokens": 9, "fewest": 32, "most": 32, "allowed": 32, "neurons": 64, **changes.pop("count", {})}
    steps = changes.pop("steps", {"1/8": 0.9, "4/8": 0.2, "8/8": 0.0})
    return checks.judged({"at home": home}, count, steps, "accuracy", {})


def test_what_the_check_calls_broken() -> None:
    good = verdict()
    assert [good[part]["holds"] for part in ("kept", "dense", "sparse")] == [True, True, True]
    assert "no gain over full may be claimed" in good["kept"]["detail"]
    assert verdict(rights={"emoe": 0.6})["kept"]["holds"] is False
    assert "a gain over full may be claimed" in verdict(rights={"emoe": 0.95})["kept"]["detail"].replace("no gain", "")
    for dense in (0.6, 0.95):
        assert verdict(rights={"to-dense": dense})["dense"]["holds"] is False
    # The gate: nothing was learned. The control: shuffled labels learn as much.
    assert {part["holds"] for name, part in verdict(rights={"full": 0.55}).items() if name != "sparse"} == {
        "set-up invalid"
    }
    assert verdict(rights={"shuffled": 0.8})["kept"]["control"]["destroyed"] is False
    for count in ({"most": 64}, {"allowed": 64, "most": 64, "fewest": 64}, {"fewest": 8, "most": 24}):
        assert verdict(count=count)["sparse"]["holds"] is False
    for steps in ({"1/8": 0.1, "4/8": 0.2, "8/8": 0.0}, {"1/8": 0.9, "8/8": 0.1}):
        assert verdict(steps=steps)["sparse"]["holds"] is False


def test_the_count_sees_a_model_that_was_never_sparse(text_base: Path) -> None:
    ready = trial.prepare(setting(text_base, "full"), ("train", "test"))
    found = checks.counted(classifier(text_base, "full").model, ready.encoded["test"], f"full + {EMOE}")
    assert found["most"] == 64 > found["allowed"] == 32
