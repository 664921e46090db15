"""The settings that a comparison tries: defaults first, and the grid of whoever says what a rate means."""

from __future__ import annotations

from itertools import product

import pytest

from brickyard.compare.plan import settings
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.build import resolve

STEPS = [e.record.name for e in registry.records() if e.record.slot == "step" and "causal-lm" in e.record.needs]


@pytest.mark.parametrize("arm", [f"{tuner} + {step}" for tuner, step in product(("full", "lora", "mos"), STEPS)])
def test_the_first_setting_is_what_one_run_alone_would_train(arm: str) -> None:
    first = settings(parse(arm), 4)[0]
    assert first["lr"] == resolve(parse(arm)).training["lr"]


def test_a_steps_grid_rules_over_the_tuners() -> None:
    tried = {point["lr"] for point in settings(parse("full + zo-sgd"), 9)}
    assert tried == set(registry.find("zo-sgd").record.search["lr"])
    tried = {point["lr"] for point in settings(parse("lora + dp"), 9)}
    assert tried == set(registry.find("lora").record.search["lr"])


def test_a_tuners_grid_rules_over_the_heads() -> None:
    tried = {point["lr"] for point in settings(parse("lora + moment-probing"), 99)}
    assert tried == set(registry.find("lora").record.search["lr"])


def test_a_rate_that_the_arm_fixes_is_not_searched() -> None:
    assert all("lr" not in point for point in settings(parse("full:lr=3e-4 + zo-sgd"), 9))
