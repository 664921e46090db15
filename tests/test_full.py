"""Full tuning of the whole base and of chosen layers: what moves, what stays, and what a brick holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from brickyard.core import registry
from brickyard.core.base import open_base
from brickyard.core.errors import Unmatched
from brickyard.core.task import Task
from brickyard.tune import full

TASK = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")


def attached(base: Path, **options: Any) -> Any:
    model = open_base(str(base)).model(TASK, seed=0)
    return full.attach(model, registry.config("full", options), TASK)


def test_chosen_layers_and_the_head_move_and_nothing_else(text_base: Path) -> None:
    made = attached(text_base, target=["*.layer.1.*"])
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    ids = torch.arange(2, 10).view(2, 4)
    optimiser = torch.optim.SGD(made.parameter_groups, lr=0.1)
    made.model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    optimiser.step()
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".layer.1." in name or name.startswith("classifier.") for name in moved)
    assert {"classifier.weight", "classifier.bias"} < moved and moved <= made.tensors().keys()
    assert all(".layer.1." in name or name.startswith("classifier.") for name in made.tensors())
    assert torch.equal(made.detach().state_dict()["classifier.weight"], before["classifier.weight"])


def test_without_a_target_everything_trains(text_base: Path) -> None:
    made = attached(text_base)
    assert made.tensors().keys() == dict(made.model.named_parameters()).keys()
    assert all(p.requires_grad for p in made.model.parameters())


def test_a_target_that_matches_nothing_is_named(text_base: Path) -> None:
    with pytest.raises(Unmatched, match=r"\*\.layer\.9"):
        attached(text_base, target="*.layer.9.*")
