"""The check of LoCA's positions: what it concludes from its figures, and that its control moves them elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import text_data
from test_loca import draw

from brickyard.checks import loca as check
from brickyard.core.method import Claim
from brickyard.tune import _dct

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CLAIM = Claim(text="t", seeds=3)


def runs(**changes: float) -> dict[str, check.Runs]:
    known = {"learned": 0.50, "frozen": 0.53, "shuffled": 0.54, "moved": 0.4, "test": 0.0, "accuracy": 0.6, **changes}
    noise = np.array([0.0, 0.001, -0.001]) * changes.get("noise", 1.0)
    return {
        name: check.Runs(
            known[name] + noise * (1 + i),
            1.0 + known["test"] * (name == "learned") + noise,
            np.full(3, known["accuracy"]),
            np.full(3, known["moved"]),
        )
        for i, name in enumerate(("learned", "frozen", "shuffled"))
    }


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"test": -0.001}, True),
        ({"moved": 0.01}, False),
        ({"frozen": 0.48}, False),
        ({"test": 0.05}, False),
        ({"accuracy": 0.25}, "set-up invalid"),
        ({"noise": 60.0}, "undecided"),
    ],
)
def test_the_check_of_positions_concludes_what_its_figures_say(changes, holds):
    # Losses of two arms differ by the same amount in every seed only by accident; scipy warns of it.
    found = runs(**changes)
    found["learned"].test_loss_S[:] += [0.0, 1e-4, -1e-4]
    out = check.judged(found, 0.2, {})
    assert out["holds"] == holds and out["detail"]
    assert out["control"]["destroyed"] or changes.get("noise")


def test_the_check_of_positions_runs_and_its_control_moves_them_elsewhere(monkeypatch, text_base):
    plain = check._setting
    monkeypatch.setattr(
        check, "_setting", lambda *given: replace(plain(*given), data=text_data(), cache=False, device="cpu")
    )
    claim = replace(CLAIM, base=str(text_base), epochs=2, batch=16, seeds=2, max_length=0)
    out = check.location(claim, options="n_frequency=40,cycle=[2,6],position_lr=5.0")
    moved = out["figures"]
    assert set(moved["frozen"]["moved_S"]) == {0.0} and min(moved["learned"]["moved_S"]) > 0.05
    assert min(moved["shuffled"]["moved_S"]) > 0.05 and out["holds"] in (True, False, "undecided", "set-up invalid")
    assert moved["learned"]["train_loss_S"] != moved["shuffled"]["train_loss_S"]
    real = check.reconstruction(replace(claim, seeds=4), side=64, ranks=(1, 2))
    assert real["holds"] is True and real["control"]["destroyed"]
    assert np.array(real["figures"]["real"]).shape == (2, 3)


def test_the_energy_that_is_kept_counts_positions_of_chosen_cosines_and_none_of_random_ones():
    spectrum = torch.zeros(16, 16)
    spectrum[3, 4], spectrum[0, 9], spectrum[7, 7] = 3.0, -4.0, 0.5
    best, svd, some = check.kept(_dct.idct2(spectrum), 1, torch.Generator().manual_seed(0))
    assert best == pytest.approx(1.0) and svd == pytest.approx(16 / 25.25) and 0 <= some < 1
    low_rank = torch.outer(draw(16), draw(16, seed=1)).float()
    assert check.kept(low_rank, 1, torch.Generator().manual_seed(0))[1] == pytest.approx(1.0)
