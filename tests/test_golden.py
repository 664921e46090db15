"""Bricks of every schema version that was ever released load and answer as they did when they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brickyard.core import brick as bricks
from brickyard.core.base import open_base
from brickyard.core.errors import BadBrick

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["the film was very good", "a dull book", "not a broken room and it is fine"]


@torch.no_grad()
def logits(model: Any, base: Any) -> np.ndarray:
    """Answers to TEXTS, [3, classes]."""
    inputs = base.tokenizer(TEXTS, padding=True, return_tensors="pt")
    return model.eval()(**inputs).logits.double().numpy()


@pytest.mark.parametrize("expected", sorted(GOLDEN.glob("schema*/*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_brick_of_an_older_release_loads_and_answers_as_before(expected: Path) -> None:
    base = open_base(str(expected.parent / "base"))
    made = bricks.load(expected.with_suffix("")).apply(base)
    np.testing.assert_allclose(logits(made.model, base), json.loads(expected.read_text())["logits"], atol=1e-5)


def test_the_present_schema_has_a_golden_brick() -> None:
    assert list((GOLDEN / f"schema{bricks.SCHEMA}").glob("*.json"))


def test_a_brick_of_a_later_release_is_refused(tmp_path: Path) -> None:
    source = next(GOLDEN.glob("schema*/lora"))
    manifest = json.loads((source / "brick.json").read_text())
    (tmp_path / "brick.json").write_text(json.dumps({**manifest, "schema": bricks.SCHEMA + 1}))
    with pytest.raises(BadBrick, match="later"):
        bricks.load(tmp_path)
