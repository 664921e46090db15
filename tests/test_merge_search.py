"""A merge's strength chosen on validation rows: the curve is that of real merges, and no test row is looked at."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import documents, make_text_base, text_data, write_data
from test_merge import LANGUAGE, make_brick, weights

from brickyard.cli import main
from brickyard.core import registry
from brickyard.core.brick import Brick
from brickyard.core.errors import UsageError
from brickyard.merging.merge import merge
from brickyard.merging.search import asked

Data = dict[str, dict[str, list]]


@pytest.fixture
def bricks(text_base: Path, tmp_path: Path) -> list[Brick]:
    return [make_brick(tmp_path / name, text_base, "full", seed, size=0.3) for seed, name in enumerate("ab", 1)]


def tasks() -> list[Data]:
    return [text_data(), text_data(test=50)]


def searched(arm: str, bricks: list[Brick], base: Path, out: Path, data: list[Data], **options: Any) -> dict[str, Any]:
    folders = [brick.folder for brick in bricks]
    return merge(arm, base=str(base), bricks=folders, out=out, data=data, device="cpu", force=True, **options)


@pytest.mark.parametrize(
    ("arm", "at", "last"),
    [
        ("task-arithmetic:scale=search", "task-arithmetic:scale={}", 1.0),
        ("ties:density=0.5,scale=search", "ties:density=0.5,scale={}", 1.5),
        ("ties:density=0.5 + lines:beta=search", "ties:density=0.5 + lines:beta={}", 1.5),
        ("average + lines:alpha=0.2,beta=search", "average + lines:alpha=0.2,beta={}", 1.0),
    ],
)
def test_the_curve_is_that_of_merges_made_at_every_point(
    arm: str, at: str, last: float, bricks: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    result = searched(arm, bricks, text_base, tmp_path / "out", tasks())
    found = result["search"]
    assert found["grid"] == [pytest.approx(0.1 * i) for i in range(1, len(found["grid"]) + 1)]
    assert found["grid"][-1] == last
    # Merges at fixed strengths, judged on what the search calls validation.
    turned = [{**data, "validation": data["test"], "test": data["validation"]} for data in tasks()]
    for i in (0, 4, len(found["grid"]) - 1):
        fixed = searched(at.format(found["grid"][i]), bricks, text_base, tmp_path / f"at{i}", turned)
        row = fixed["scores"]["rows"][-1]
        assert [cell["mean"] for cell in row["scores"]] == pytest.approx([task[i] for task in found["scores"]])
        assert row["mean"] == pytest.approx(found["means"][i])
    assert len(set(found["means"])) > 2, "the strength must matter here, or nothing was compared"
    best = max(found["means"])
    assert found["chosen"] == found["grid"][found["means"].index(best)]
    assert result["arm"] == str(asked(arm).at(found["chosen"]))  # type: ignore[union-attr]
    plain = searched(result["arm"], bricks, text_base, tmp_path / "plain", [])
    chosen, again = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert plain["arm"] == result["arm"] and all(torch.equal(chosen[name], again[name]) for name in again)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["search"] == json.loads(json.dumps(found))


def test_no_test_row_moves_the_choice(bricks: list[Brick], text_base: Path, tmp_path: Path) -> None:
    data, other = tasks(), tasks()
    for splits in other:
        splits["test"] = copy.deepcopy(splits["test"])
        splits["test"]["label"] = splits["test"]["label"][::-1]
    arm = "task-arithmetic:scale=search"
    one = searched(arm, bricks, text_base, tmp_path / "one", data)
    two = searched(arm, bricks, text_base, tmp_path / "two", other)
    assert one["search"] == two["search"] and one["scores"] != two["scores"]
    # Validation rows do move it.
    for splits in other:
        splits["validation"]["label"] = splits["validation"]["label"][::-1]
    assert searched(arm, bricks, text_base, tmp_path / "three", other)["search"] != one["search"]


def test_points_are_rounded_as_they_will_be_stored(bricks: list[Brick], text_base: Path, tmp_path: Path) -> None:
    from brickyard.core.base import open_base
    from brickyard.merge._engine import Merge
    from brickyard.merging.inputs import open_ground, open_inputs
    from brickyard.merging.merge import resolve
    from brickyard.merging.search import Held, scales_of

    ground = open_ground(str(text_base))
    given = open_inputs([str(brick.folder) for brick in bricks], ground, mixed=True, force=True)
    recipe = resolve("task-arithmetic:scale=0.7")
    plan = Merge(ground.stored, [i.source for i in given], recipe.rule, recipe.edits)
    target = {name: torch.empty_like(tensor) for name, tensor in open_base(str(text_base))._stored().items()}
    Held.of(plan, ground, "bfloat16", torch.device("cpu")).put(target, scales_of(plan, None))
    merge(
        "task-arithmetic:scale=0.7",
        base=str(text_base),
        bricks=[brick.folder for brick in bricks],
        out=tmp_path / "out",
        dtype="bfloat16",
        force=True,
    )
    for name, tensor in weights(tmp_path / "out").items():
        if tensor.is_floating_point():
            assert torch.equal(target[name], tensor.float()), name


def test_a_missing_validation_is_cut_from_train_and_said(bricks: list[Brick], text_base: Path, tmp_path: Path) -> None:
    data = [{name: rows for name, rows in splits.items() if name != "validation"} for splits in tasks()]
    found = searched("task-arithmetic:scale=search", bricks, text_base, tmp_path / "out", data)["search"]
    assert [(task["rows"], task["cut"]) for task in found["tasks"]] == [(10, True), (10, True)]


def test_language_models_want_few_bits(causal_base: Path, tmp_path: Path) -> None:
    made = [make_brick(tmp_path / f"m{seed}", causal_base, "full", seed, LANGUAGE, size=0.2) for seed in (1, 2)]
    arm = "task-arithmetic:scale=search"
    found = searched(arm, made, causal_base, tmp_path / "out", [documents()], max_length=16)["search"]
    assert found["tasks"][0]["metric"] == "bits_per_byte"
    # These models were moved by noise: the farther from the base, the worse.
    assert found["chosen"] == 0.1 and found["means"][0] == min(found["means"]) and not found["edge"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("task-arithmetic:scale=search + lines:beta=search", "both searched"),
        ("task-arithmetic:scale=search + lines", "search lines:beta"),
        ("slerp:t=search", "slerp:t is no strength of a merge; searched can be .*ties:scale"),
        ("lines:alpha=search", "lines:alpha is no strength"),
        ("ties:density=search", "ties:density is no strength"),
    ],
)
def test_what_is_no_strength_is_refused(arm: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked(arm)


def test_grids_are_those_of_the_record() -> None:
    assert asked("dare:scale=search").grid == registry.find("dare").record.search["scale"]  # type: ignore[union-attr]
    assert asked("ties + lines:beta=search").grid[-1] == 1.5  # type: ignore[union-attr]
    assert asked("lines:alpha=0.3,beta=search").grid[-1] == 1.0  # type: ignore[union-attr]
    assert asked("ties:scale=0.4") is None


def test_metrics_that_have_no_mean_are_refused(bricks: list[Brick], text_base: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from brickyard.merging.search import search

    columns: Any = [SimpleNamespace(task=SimpleNamespace(metric=name)) for name in ("accuracy", "matthews")]
    with pytest.raises(UsageError, match="scored by accuracy, matthews"):
        search(asked("ties:scale=search"), None, None, None, columns)  # type: ignore[arg-type]


def test_the_command_shows_the_curve_and_asks_for_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text_base: Path
) -> None:
    base = make_text_base(tmp_path / "base")
    made = [make_brick(tmp_path / name, base, "lora:r=3", seed, size=0.4) for seed, name in enumerate("ab")]
    argv = ["merge", "task-arithmetic", "--scale", "search", "--base", str(base), "--bricks"]
    argv += [*(str(brick.folder) for brick in made), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "give one --data a task" in capsys.readouterr().err and not (tmp_path / "out").exists()
    folders = [str(write_data(tmp_path / f"data{i}", data)) for i, data in enumerate(tasks())]
    assert main([*argv, "--data", *folders]) == 0
    said = capsys.readouterr().out
    assert "task-arithmetic:scale on validation rows" in said and "chosen: 0." in said and "40 rows" in said
    assert "adapter" in said
