"""LiNeS where its closed form has no effect, or the wrong one: it says so and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_merge_engine import changed, make_base, write

from brickyard.core.errors import NoEffect, Refused
from brickyard.merge._engine import Norms
from brickyard.merge.lines import Config, edit
from brickyard.merging.merge import merge

SHAPES = {f"h.{i}.{name}": (2, 2) for i in range(3) for name in ("a", "b")}


@pytest.mark.parametrize("arm", ["lines", "average + lines", "slerp + lines", "lines:reverse=true", "lines:alpha=1"])
def test_lines_that_change_no_scale_are_said(arm: str, tmp_path: Path) -> None:
    base = make_base()
    made = [write(tmp_path / str(seed), changed(base, seed)) for seed in (1, 2)]
    with pytest.raises(NoEffect, match=r"alpha is .*Give alpha.* or beta, or lines:beta=search"):
        merge(arm, base=str(write(tmp_path / "base", base)), bricks=made, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.merging").exists()


def test_a_default_beta_below_zero_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = make_base()
    made = [write(tmp_path / str(seed), changed(base, seed)) for seed in (1, 2)]
    given = {"base": str(write(tmp_path / "base", base)), "bricks": made}
    with pytest.raises(Refused, match=r"alpha is 1\.25 here.*beta = 1 - alpha is below 0"):
        merge("average + lines:alpha=1.25", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.merging").exists()
    merge("average + lines:alpha=1.25,beta=-0.25", out=tmp_path / "asked", **given)


def test_an_alpha_of_the_closed_form_above_one_is_refused_unless_it_is_the_control() -> None:
    norms = Norms(models=2, summed=3.0, merged=1.0)
    with pytest.raises(Refused, match=r"alpha is 1\.5 here"):
        edit(Config()).scales(SHAPES, 1.0, norms)
    assert edit(Config(reverse=True)).scales(SHAPES, 1.0, norms)["h.2.a"] == 1.5
    assert edit(Config(beta=-0.5)).scales(SHAPES, 1.0, norms)["h.2.a"] == 1.0
    # The same scales as without lines are an effect where they were asked for, and where the merge's own is another.
    assert set(edit(Config(alpha=1, beta=0)).scales(SHAPES, 1.0, None).values()) == {1.0}
    assert set(edit(Config(alpha=1)).scales(SHAPES, 0.3, None).values()) == {1.0}
