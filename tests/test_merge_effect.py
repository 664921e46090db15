"""Merges that would end as no number, or as what they began with, say so and leave nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dam import search, stage
from test_merge_engine import changed, make_base, write

from brickyard.core.errors import NoEffect, NotFinite
from brickyard.merge import dam
from brickyard.merging.merge import merge


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_result_that_overflows_is_named_in_every_dtype(dtype: str | None, tmp_path: Path) -> None:
    base = make_base()
    far = {name: t + 10 if t.is_floating_point() else t for name, t in base.items()}
    given: dict[str, Any] = {"base": str(write(tmp_path / "base", base)), "bricks": [write(tmp_path / "far", far)]}
    scale = 1e38 if dtype != "float16" else 1e5
    with pytest.raises(NotFinite, match=f"tensor .* exceeds {dtype or 'float32'}"):
        merge(f"task-arithmetic:scale={scale!r}", out=tmp_path / "out", dtype=dtype, force=True, **given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.merging").exists()


def test_the_start_of_an_arc_is_no_merge(tmp_path: Path) -> None:
    base = make_base()
    made = [write(tmp_path / str(seed), changed(base, seed)) for seed in (1, 2)]
    spec = str(write(tmp_path / "base", base))
    for count, start in ((1, "the base"), (2, "the first model")):
        with pytest.raises(NoEffect, match=f"at t=0 the merge would be {start} itself"):
            merge("slerp:t=0.0", base=spec, bricks=made[:count], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_entropy_that_dam_reports_is_of_inputs_as_they_are() -> None:
    """Whatever the adversary's weight: the first and the last are compared with each other."""
    config = dam.Config(steps=2, masks=1, adapt_steps=0, rows=8, lam="fixed", adversary_weight=0.0)
    alone, with_it = search(config, stage()), search(replace(config, adversary_weight=5.0), stage())
    for made in (alone, with_it):
        made.step()
    assert with_it.history[0] == pytest.approx(alone.history[0], rel=1e-5)
    two = search(replace(config, masks=2, adversary_weight=5.0), stage())
    two.step()
    assert len(two.history) == 1 and torch.isfinite(torch.tensor(two.history)).all()
