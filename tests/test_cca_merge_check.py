"""The check of `cca-merge`: it runs end to end, and its judgements follow the errors that it is given."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from brickyard.checks import cca_merge as check
from brickyard.core import registry


def errors(**changes: float) -> check.Errors:
    """Errors of three seeds on 400 examples with these accuracies; the same examples are wrong as far as they go."""
    known = {"single": 0.95, "direct": 0.3, "permute": 0.82, "cca": 0.94, "cca with noise": 0.5, "cca of 5": 0.92,
             "permute of 5": 0.6, **changes}  # fmt: skip
    found = check.Errors()
    for arm, accuracy in known.items():
        for seed in range(3):
            wrong = np.zeros(400)
            wrong[: round(400 * (1 - accuracy)) + seed] = 1
            found.add(arm, wrong)
    return found


def test_the_gain_is_judged_by_both_parts_its_gate_and_its_control() -> None:
    found = check.judged(errors(), 5.0, -4.0)
    assert found["holds"] is True and found["control"]["destroyed"] and found["gate"]["holds"]
    assert found["measured"] == pytest.approx(12.0)
    assert check.judged(errors(permute=0.93), 5.0, -4.0)["holds"] is False
    assert check.judged(errors(cca=0.88), 5.0, -4.0)["holds"] is False
    assert check.judged(errors(direct=0.7), 5.0, -4.0)["holds"] == "set-up invalid"
    assert not check.judged(errors(**{"cca with noise": 0.94}), 5.0, -4.0)["control"]["destroyed"]


def test_what_more_networks_cost_is_compared() -> None:
    found = check.judged_many(errors())
    assert found["holds"] is True and found["measured"] == pytest.approx(20.0) and found["control"]["destroyed"]
    assert check.judged_many(errors(**{"cca of 5": 0.5}))["holds"] is False
    assert check.judged_many(errors(direct=0.9))["holds"] == "set-up invalid"


def test_networks_trained_side_by_side_are_those_trained_alone() -> None:
    (x, labels), _ = check.digits()
    x, labels = x[:100], labels[:100]
    (alone,) = check.trained(8, [5], x, [labels], 2)
    _, beside = check.trained(8, [3, 5], x, [labels.flip(0), labels], 2)
    for one, two in zip(alone.parameters(), beside.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    start = check.perceptron(8, 5)
    assert not torch.allclose(alone[0].weight, start[0].weight, atol=1e-4)  # type: ignore[index]


def test_the_split_is_that_of_the_card() -> None:
    (x, labels), (test, answers) = check.digits()
    assert len(x) == 1078 and len(test) == 719 == len(answers) and len(labels) == 1078
    assert not {row.tobytes() for row in x.numpy()} & {row.tobytes() for row in test.numpy()}


@pytest.mark.filterwarnings("ignore:point")
def test_the_check_on_digits_runs_end_to_end() -> None:
    claim = replace(registry.find("cca-merge").record.claims[0], seeds=2)
    found = check.of_digits(claim, epochs=1, widths=(12, 16))
    assert found.keys() == {c.part for c in registry.find("cca-merge").record.claims if c.part}
    for part in found.values():
        assert part["holds"] in (True, False, "undecided", "set-up invalid")
        accuracy = part["figures"]["accuracy"]
        assert {"single", "ensemble", "direct", "permute", "weights", "orthogonal", "cca", "cca, gamma 0.1"} <= set(
            accuracy
        )
        assert all(0 <= value <= 100 for value in accuracy.values())
    many = found["more networks"]["figures"]["accuracy"]
    assert {"cca of 3", "cca of 4", "cca of 5", "permute of 5"} <= set(many)


@pytest.mark.filterwarnings("ignore:point")
def test_the_check_on_images_runs_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)

    def png(label: int) -> bytes:
        pixels = draw.integers(0, 60, (8, 8), dtype=np.uint8)
        pixels[:, 4 * label : 4 * label + 4] += 150
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()

    labels = [i % 2 for i in range(160)]
    splits = {s: {"image": [png(label) for label in labels], "label": labels} for s in ("train", "test")}
    claim = replace(registry.find("cca-merge").record.claims[3], seeds=1, data=splits, epochs=2, train_rows=0)  # type: ignore[arg-type]
    found = check.of_images(claim, aligned=80, tested=40)
    assert "cca, statistics averaged" in found["figures"]["accuracy"]
    assert found["control"]["inequality"] == "cca with noise >= permute +1"
    x, y = check.images(splits, "test", 40)  # type: ignore[arg-type]
    assert x.shape == (40, 1, 8, 8) and sorted(set(y.tolist())) == [0, 1]
