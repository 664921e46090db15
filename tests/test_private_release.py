"""What a private run leaves on disk: no weights that its guarantee does not cover, and its cost from the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import text_data

from brickyard import api
from brickyard.core import trial
from brickyard.core.privacy import compose
from brickyard.core.spent import PLANNED


class Stop:
    def __init__(self, at: int) -> None:
        self.at = at

    def after_step(self, state: Any) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


def tuned(arm: str, base: Path, out: Path, **options: Any) -> dict[str, Any]:
    training = {"batch": 16, "epochs": 2, "precision": "float32"}
    asked: dict[str, Any] = {"base": str(base), "data": text_data(), "training": training, "device": "cpu"}
    return api.tune(arm, out=out, checkpoint_every=5, cache=False, dtype="float32", **asked, **options)[1]


def test_where_only_the_last_weights_are_private_no_earlier_ones_stay(text_base: Path, tmp_path: Path) -> None:
    arm = "dp-convex:gates=8,epsilon=50"
    with pytest.raises(KeyboardInterrupt):
        tuned(arm, text_base, tmp_path / "run", callbacks=[Stop(7)])
    assert (tmp_path / "run" / "checkpoints" / "step-5").is_dir()  # an interrupted run goes on from it
    result = tuned(arm, text_base, tmp_path / "run")
    assert (tmp_path / "run" / "brick" / "brick.json").is_file() and result["steps"] == 12
    assert not list((tmp_path / "run").glob("checkpoints*"))


def test_where_every_step_is_accounted_for_checkpoints_may_stay(text_base: Path, tmp_path: Path) -> None:
    tuned("linear-probe + dp:epsilon=50", text_base, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-10").is_dir()


@pytest.mark.parametrize("arm", ["dp-convex:gates=8,epsilon=50", "linear-probe + dp:epsilon=50"])
def test_a_run_that_breaks_off_has_written_down_what_it_would_cost(arm: str, text_base: Path, tmp_path: Path) -> None:
    asked = trial.Setting(
        arm=arm, base=str(text_base), data=text_data(), training={"batch": 16, "epochs": 2}, cache=False, device="cpu"
    )
    with pytest.raises(KeyboardInterrupt):
        trial.tune(trial.prepare(asked), tmp_path / "cut", callbacks=[Stop(1)])
    planned = json.loads((tmp_path / "cut" / PLANNED).read_text())
    done = trial.tune(trial.prepare(asked), tmp_path / "whole")
    spent = done["step"]["privacy"]
    assert planned["mechanisms"] == spent["mechanisms"] and planned["adjacency"] == spent["adjacency"]
    assert compose([planned])["epsilon"] == compose([spent])["epsilon"] == pytest.approx(50, rel=0.02)
