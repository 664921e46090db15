"""The settings that a comparison tries: defaults first, and the grid of whoever says what a rate means."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from brickyard.compare.plan import settings, with_setting
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.build import SLOTS, resolve, training_of
from brickyard.core.errors import Refused, UsageError
from brickyard.core.loop import Training

NAMES = {slot: [e.record.name for e in registry.records() if e.record.slot == slot] for slot in SLOTS}
BESIDE = [name for slot in SLOTS if slot not in ("tuner", "start") for name in NAMES[slot]]


def arms() -> Iterator[str]:
    """All tuners and heads alone, and all else beside a tuner."""
    yield from (*NAMES["tuner"], *NAMES["head"])
    for tuner, other in product(("full", "lora", "mos"), BESIDE):
        yield f"{tuner} + {other}"


def test_the_first_setting_is_what_one_run_alone_would_train() -> None:
    seen = 0
    for arm in arms():
        try:
            alone = resolve(parse(arm))
        except (Refused, UsageError):  # those that need a teacher or a template
            continue
        first = resolve(parse(with_setting(arm, settings(parse(arm), 4)[0])))
        assert first.configs == alone.configs, arm
        assert training_of(first, {}, Training()) == training_of(alone, {}, Training()), arm
        seen += 1
    assert seen > 80


def test_a_steps_grid_rules_over_the_tuners() -> None:
    tried = {point["lr"] for point in settings(parse("full + zo-sgd"), 9)}
    assert tried == set(registry.find("zo-sgd").record.search["lr"])


def test_a_private_step_takes_ten_times_a_tuners_rates_and_a_heads_as_they_are() -> None:
    """A sixteenth of the steps, each of them noisy: at the tuner's own rate nothing is learned in three epochs."""
    assert resolve(parse("lora + dp")).training["lr"] == 1e-2
    assert {point["lr"] for point in settings(parse("lora + dp"), 9)} == {3e-3, 1e-2, 3e-2}
    assert resolve(parse("full + ew-tune")).training["lr"] == 1e-3
    assert resolve(parse("lora:lr=2e-3 + dp")).training["lr"] == 2e-3
    assert resolve(parse("linear-probe + dp")).training["lr"] == resolve(parse("linear-probe")).training["lr"]


def test_a_tuners_grid_rules_over_the_heads() -> None:
    tried = {point["lr"] for point in settings(parse("lora + moment-probing"), 99)}
    assert tried == set(registry.find("lora").record.search["lr"])


def test_a_rate_that_the_arm_fixes_is_not_searched() -> None:
    assert all("lr" not in point for point in settings(parse("full:lr=3e-4 + zo-sgd"), 9))
