"""How claims are judged: strict inequalities, arms of unlike seeds, arms that say nothing, and controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_checks import answers, bits

from brickyard.checks import run as checks
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.compare.results import UNTOUCHED
from brickyard.core.errors import RunFailed
from brickyard.core.method import Claim


def test_an_arm_is_not_above_its_equal() -> None:
    same = {"a": answers([0.9, 0.91]), "b": answers([0.9, 0.91])}
    for text, holds in (
        ("a > b", False),
        ("a >= b", True),
        ("a > b - 0.5", True),
        ("a >= b + 0.5", False),
        ("a > b + 0.5", False),
    ):
        assert judge(Inequality.read(text), same, "accuracy")["holds"] is holds, text


def test_constant_answers_of_two_classes_decide_no_correlation() -> None:
    labels = np.arange(300) % 3
    known = {name: Answers(labels, np.full((3, 300), k)) for k, name in enumerate("ml")}
    found = judge(Inequality.read("m >= l - 0.5"), known, "matthews")
    assert found["holds"] == "undecided" and (found["low"], found["high"]) == (-200, 200)
    assert "nothing is known" in found["needed"]["sentence"]
    assert judge(Inequality.read("m >= m - 0.5"), known, "matthews")["holds"] is True


def test_seeds_whose_noise_is_lost_in_rounding_decide_nothing() -> None:
    """Two classes that do not occur, in each other's place, make no difference to a macro F1."""
    labels, right = np.arange(300) % 3, np.tile(np.arange(300) * 7 % 5 % 3, (3, 1))
    one, other = right.copy(), right.copy()
    one[:, :2], other[:, :2] = [7, 8], [8, 7]
    found = judge(Inequality("a", "b", -0.5), {"a": Answers(labels, one), "b": Answers(labels, other)}, "macro-f1")
    assert found["holds"] == "undecided" and (found["low"], found["high"]) == (-100, 100)


def test_a_side_without_answers_is_named() -> None:
    with pytest.raises(RunFailed, match="arm base has no answers, so full and base cannot be compared"):
        judge(Inequality.read("full > base + 1.0"), {"full": bits([1.5, 1.5])}, "bits_per_byte")


def width(found: dict[str, Any]) -> float:
    return found["high"] - found["low"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_control_of_fewer_seeds_is_no_arm_of_more(seeds: int) -> None:
    full, control, base = bits([1.5, 1.6, 1.55]), bits([1.9, 1.95][:seeds]), bits([2.0] * 3)
    known = {"full": full, "control": control}
    few = Answers(base.labels, base.predictions[:seeds])
    for text in ("full > control + 1.0", "full >= 0.5 control"):
        asked = Inequality.read(text)
        found = judge(asked, known, "bits_per_byte", base=base)
        assert found == judge(asked, known, "bits_per_byte", base=few), text
        if seeds == 1:  # said three times, its answers would show three seeds without noise
            thrice = known | {"control": Answers(control.labels, np.tile(control.predictions, (3, 1)))}
            assert width(found) > 1.2 * width(judge(asked, thrice, "bits_per_byte", base=base)), text


def test_draws_of_few_rows_are_paired_with_the_controls_own() -> None:
    rates = [0.90, 0.84, 0.87, 0.93]
    arm, control = answers(rates), answers([rate - 0.1 for rate in rates])
    two = {"a": Answers(arm.labels, arm.predictions[:2]), "control": Answers(arm.labels, control.predictions[:2])}
    asked = Inequality.read("a > control + 5")
    expected = judge(asked, two, "accuracy", together=True)
    for known in ({**two, "a": arm}, {**two, "control": control}):
        assert judge(asked, known, "accuracy", together=True) == expected
    one = {"a": arm, "control": Answers(arm.labels, control.predictions[:1])}
    alone = {name: Answers(arm.labels, a.predictions[:1]) for name, a in one.items()}
    found = judge(asked, one, "accuracy", together=True)
    assert found == judge(asked, one, "accuracy"), "a single draw borrows the noise of the other arm's"
    assert width(found) > 2 * width(judge(asked, alone, "accuracy", together=True))


def finished(monkeypatch: pytest.MonkeyPatch, metric: str, given: dict[str, Answers], claim: Claim) -> checks._Run:
    """A run of a claim whose comparison is done and gave these answers."""
    rows = [
        {
            "arm": name,
            "status": "done",
            "answers": name,
            "setting_arm": "lora",
            "score": {"mean": 0.5, "per_seed": [0.5]},
            "cost": {"trainable_parameters": 1, "train_seconds": 1.0},
        }
        for name in given
    ]
    result = {
        "methods": rows,
        "task": {"metric": metric},
        "base": {"spec": "embedded:pylm"},
        "data": {"name": "mine", "rows": {}},
    }
    monkeypatch.setattr(checks, "compare", lambda request, folder, **_: (result, folder))
    monkeypatch.setattr(checks, "_read", lambda folder, place: given[place])
    return checks._Run.of("any", [claim], lambda event: None)


def test_a_control_that_changes_nothing_destroys_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = answers([0.9, 0.91, 0.9])
    claim = Claim(
        text="t",
        inequality="a >= b",
        arms={"a": "lora:r=2", "b": "lora:r=4"},
        control={"what": "the same again", "arm": "lora:r=2", "inequality": "a > control"},
    )
    run = finished(monkeypatch, "accuracy", {"control": arm, "a": arm, "b": arm}, claim)
    found = run.judge(claim)
    assert found["holds"] is True and found["control"]["destroyed"] is False
    assert [found["control"][key] for key in ("measured", "low", "high")] == [0, 0, 0]


def test_a_constant_has_as_many_rows_as_a_claim_has_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer would be taken to be as noisy as the other arm, and the first row may be a control's of few seeds."""
    arm = answers([0.9, 0.91, 0.95])
    claim = Claim(text="t", inequality="a > majority", arms={"a": "lora"})
    alone = Answers(arm.labels, arm.predictions[:1])
    run = finished(monkeypatch, "accuracy", {"control": alone, "a": arm}, claim)
    assert {name: run.answers[name].predictions.shape for name in ("majority", "coin")} == {
        "majority": (3, 4000),
        "coin": (3, 4000),
    }


def test_a_base_that_did_not_finish_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim(text="t", inequality="a >= 0.9 b", arms={"a": "lora:r=2", "b": "lora:r=4"}, gate="b > base + 1.0")
    with pytest.raises(RunFailed, match=r"arm base \(the untouched base\) did not finish"):
        finished(monkeypatch, "bits_per_byte", {"a": bits([1.5] * 3), "b": bits([1.5] * 3)}, claim)


def test_a_choice_is_no_gain_over_the_untouched_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a score of which more is better, a side is its own value; only losses are counted from the base."""
    claim = Claim(text="t", inequality="a > base + 5.0", arms={"a": "lora"})
    given = {"a": answers([0.9] * 3), UNTOUCHED: answers([0.7])}
    assert finished(monkeypatch, "accuracy_norm", given, claim).judge(claim)["holds"] is True
