"""The checks of side networks: what a timed step holds, and what the learned weights of layers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import text_data

from brickyard.checks import unipt
from brickyard.checks._side import kept_epochs
from brickyard.checks._steps import attached, one_step
from brickyard.core.base import open_base
from brickyard.core.encoded import Encoded
from brickyard.core.method import Claim
from brickyard.core.states import States
from brickyard.tune.unipt import RECORD


@pytest.mark.parametrize(("arm", "kept"), [("lst:r=4,init=random", True), ("lora:r=2", False)])
def test_a_timed_step_puts_its_batch_together(
    arm: str, kept: bool, text_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(str(text_base))
    step = one_step(attached(base, arm), base, 4, 6)
    read: list[Path | None] = []
    put: list[list[int]] = []
    of_states, of_rows = States.collate, Encoded.collate
    monkeypatch.setattr(States, "collate", lambda s, i: read.append(s.path) or of_states(s, i))
    monkeypatch.setattr(Encoded, "collate", lambda s, i: put.append(list(i)) or of_rows(s, i))
    for _ in range(5):
        step()
    assert (
        len(put) == 5 and put[0] != put[1] and put[4] == put[0] and sorted(np.concatenate(put[:4])) == list(range(16))
    )
    assert len(read) == (5 if kept else 0)
    # From disk, as in an epoch: half precision becomes single in the step.
    assert all(path is not None and (path / "states.bin").is_file() for path in read)


def test_states_as_wide_as_their_rows_are_not_copied() -> None:
    x = torch.randn(2, 5, 3)
    rows: Any = SimpleNamespace(entering=SimpleNamespace(collate=lambda index: {"states": (x, None)}))
    for width in (5, 8):
        inputs = {"input_ids": torch.zeros(2, width, dtype=torch.int64)}
        found = Encoded._entered(rows, inputs, np.arange(2))["entering"]
        assert (found is x) == (width == 5) and found.shape == (2, width, 3)
        assert torch.equal(found[:, :5], x) and not found[:, 5:].any()


def test_epochs_from_kept_states_run_the_backbone_not_once(text_base: Path) -> None:
    found = kept_epochs(Claim(text="", base=str(text_base)), "lst:r=4,init=random", 1 / 3, batch=4, tokens=6, rounds=3)
    assert "the backbone ran 0 times" in found["detail"] and set(found["figures"]["ratios"]) == {"kept", "running"}


def test_learned_weights_of_layers_are_reported(text_base: Path) -> None:
    claim = next(c for c in RECORD.claims if c.measure == "confidence")
    data: Any = text_data()
    asked = replace(claim, base=str(text_base), data=data, epochs=2, train_rows=0, batch=8)
    found = unipt.confidence(asked, arm="unipt:width=8,lr=1e-2")
    assert found["holds"] is True and found["measured"] > unipt.FLAT
    assert found["control"]["destroyed"] and found["control"]["measured"] == pytest.approx(0, abs=1e-7)
    assert len(found["figures"]["mean"]) == 2 and sum(found["figures"]["mean"]) == pytest.approx(1)


def test_equal_weights_and_weights_that_ignore_the_text_are_seen() -> None:
    same = np.tile([0.2, 0.3, 0.5], (4, 1))
    assert unipt.spread(same) == (pytest.approx(0.5 - 1 / 3), 0.0)
    turned = np.array([[0.1, 0.9], [0.9, 0.1]] * 3)
    assert unipt.spread(turned) == (pytest.approx(0), pytest.approx(0.8))
