"""Several merges of the same inputs in one table: what each keeps, what is told apart, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import text_data, write_data
from test_merge import TASK, make_brick

from brickyard.cli import main
from brickyard.core.brick import Brick
from brickyard.core.errors import Changed, UsageError
from brickyard.core.progress import told_to
from brickyard.core.stats import interval
from brickyard.core.task import Task
from brickyard.merging.command import _left_out
from brickyard.merging.compare import _judged, merge_all
from brickyard.merging.merge import merge
from brickyard.merging.scores import Answered

ARMS = ["average", "ties:density=0.3", "slerp", "task-arithmetic:scale=0.0"]


@pytest.fixture
def experts(text_base: Path, tmp_path: Path) -> list[Brick]:
    return [make_brick(tmp_path / name, text_base, "lora:r=3", seed, size=0.4) for seed, name in enumerate(("a", "b"))]


def inputs(experts: list[Brick], text_base: Path) -> dict[str, Any]:
    sets = [text_data(), text_data(test=40)]
    return {"base": str(text_base), "bricks": [e.folder for e in experts], "data": sets, "device": "cpu"}


class FakeColumn:
    """A task whose test labels are known, in place of an opened one."""

    def __init__(self, labels: np.ndarray, owner: int, metric: str = "accuracy") -> None:
        import torch

        class Rows:
            pass

        self.rows: Any = Rows()
        self.rows.labels = torch.as_tensor(labels)
        self.task: Any = Rows()
        self.task.metric, self.owner = metric, owner


def row(model: str, right: list[float], labels: list[np.ndarray]) -> dict[str, Any]:
    """A model that answers the first share of each task's rows rightly."""
    answers = []
    for share, wanted in zip(right, labels, strict=True):
        given = np.where(np.arange(len(wanted)) < round(share * len(wanted)), wanted, 1 - wanted)
        score = interval(wanted, given[None], "accuracy")
        answers.append(Answered(given, {"mean": score.mean, "low": score.low, "high": score.high}))
    return {"model": model, "answers": answers}


def test_kept_is_the_share_of_the_experts_gain_and_ranks_the_merges() -> None:
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 2, 400), rng.integers(0, 2, 400)]
    columns: Any = [FakeColumn(labels[0], 0), FakeColumn(labels[1], 1)]
    models = [row("the base", [0.5, 0.6], labels), row("a", [0.9, 0.5], labels), row("b", [0.4, 0.8], labels)]
    merges = [row("poor", [0.5, 0.6], labels), row("good", [0.8, 0.75], labels), row("near", [0.8, 0.745], labels)]
    found = _judged(models, merges, columns)
    assert [r["model"] for r in found["rows"]] == ["the base", "a", "b", "good", "near", "poor"]
    by = {r["model"]: r for r in found["rows"]}
    assert by["good"]["kept"] == pytest.approx([0.75, 0.75]) and by["good"]["mean_kept"] == pytest.approx(0.75)
    assert by["the base"]["mean_kept"] == pytest.approx(0.0) and by["a"]["kept"][0] == pytest.approx(1.0)
    assert found["best"] == "good" and found["alike"] == ["near"]
    assert by["good"]["scores"][0]["to_expert"] == pytest.approx(-0.1)
    assert by["good"]["scores"][0]["to_expert_high"] < 0 < by["poor"]["scores"][1]["mean"]


def test_a_task_without_a_gain_is_left_out_and_said() -> None:
    labels = [np.arange(100) % 2, np.arange(100) % 2]
    columns: Any = [FakeColumn(labels[0], 0), FakeColumn(labels[1], 1)]
    models = [row("the base", [0.5, 0.9], labels), row("a", [0.9, 0.5], labels), row("b", [0.4, 0.8], labels)]
    found = _judged(models, [row("one", [0.7, 0.1], labels)], columns)
    assert found["rows"][-1]["kept"] == [pytest.approx(0.5), None] and found["gains"][1]["gain"] < 0
    assert found["rows"][-1]["mean_kept"] == pytest.approx(0.5)


def test_a_task_counts_only_where_the_gain_of_its_expert_is_told_from_nothing() -> None:
    labels = [np.arange(100) % 2, np.arange(100) % 2]
    columns: Any = [FakeColumn(labels[0], 0), FakeColumn(labels[1], 1)]
    # One row of a hundred more is a gain that may be chance; a merge with twice as many would keep 200 % of it.
    models = [row("the base", [0.5, 0.6], labels), row("a", [0.9, 0.5], labels), row("b", [0.4, 0.61], labels)]
    merges = [row("lucky", [0.5, 0.62], labels), row("good", [0.8, 0.6], labels)]
    found = _judged(models, merges, columns)
    assert [gain["counts"] for gain in found["gains"]] == [True, False]
    assert found["gains"][1]["gain_low"] <= 0 < found["gains"][1]["gain"] < found["gains"][1]["gain_high"]
    assert found["best"] == "good" and found["alike"] == []
    by = {r["model"]: r for r in found["rows"]}
    assert by["lucky"]["kept"] == [pytest.approx(0.0), None] and by["good"]["mean_kept"] == pytest.approx(0.75)
    # Where none counts nothing is ranked.
    none = _judged([models[0], row("a", [0.51, 0.5], labels), models[2]], merges, columns)
    assert none["best"] is None and none["alike"] == []
    assert [r["model"] for r in none["rows"][-2:]] == ["lucky", "good"]
    assert all(r["mean_kept"] is None for r in none["rows"])
    told = _left_out([{"data": d, "expert": "x", **g} for d, g in zip(("one", "two"), none["gains"], strict=True)])
    assert len(told) == 3 and "two does not count: the input x gains +0.0100" in told[1] and "no ranking" in told[2]
    assert len(_left_out([{"data": "two", "expert": "x", **found["gains"][1]}])) == 2
    assert _left_out([{"data": "one", "expert": "x", **found["gains"][0]}]) == []


def test_inputs_that_are_at_home_on_no_task_are_asked_for(
    experts: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    given = inputs(experts, text_base)
    for change in (
        {"data": given["data"][:1], "heads": "base"},
        {"data": [*given["data"], text_data()], "heads": "base"},
    ):
        with pytest.raises(UsageError, match=r"no input is known to be at home on .*one --data for each"):
            merge_all(["average", "slerp"], out=tmp_path / "all", **{**given, **change})
    assert not list((tmp_path / "all").glob("*/*.safetensors"))
    # A brick that is found by its labels is at home wherever its data stand.
    other = make_brick(
        tmp_path / "c", text_base, "lora:r=3", 5, Task("text-classification", "accuracy", ("no", "yes"), 2, "text")
    )
    named = {**given, "bricks": [experts[0].folder, other.folder], "data": given["data"][:1]}
    table = merge_all(["average", "slerp"], out=tmp_path / "found", **named)
    assert [task["expert"] for task in table["tasks"]] == ["a"]


def test_a_merge_of_fewer_inputs_stands_in_the_table_and_what_takes_long_is_told(
    experts: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    given, heard = inputs(experts, text_base), []
    third = make_brick(tmp_path / "c", text_base, "lora:r=3", 5)
    three = {"bricks": [*given["bricks"], third.folder], "data": [*given["data"], given["data"][0]]}
    with told_to(heard.append):
        table = merge_all(["slerp", "average"], out=tmp_path / "all", **{**given, **three, "heads": "base"})
    assert [f["arm"] for f in table["failed"]] == ["slerp"] and "joins two models" in table["failed"][0]["why"]
    assert "average" in {row["model"] for row in table["rows"]}
    assert sum("fitting a head" in line for line in heard) == 3
    assert heard[3].startswith("the base: ") and heard[-2:] == [
        "slerp: cannot be made of these inputs",
        next(line for line in heard if line.startswith("average: ")),
    ]


def test_what_is_under_way_goes_where_errors_go(
    experts: list[Brick], text_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = [str(write_data(tmp_path / name, text_data())) for name in ("one", "two")]
    given = ["--base", str(text_base), "--bricks", *(str(e.folder) for e in experts), "--data", *data, "--json"]
    for arms, out in ((["average", "ties"], "both"), (["average"], "alone")):
        assert main(["merge", *arms, *given, "--out", str(tmp_path / out)]) == 0
        shown = capfd.readouterr()
        assert json.loads(shown.out) and "the base: " in shown.err
        assert sum(line.startswith(("the base: ", "a: ", "b: ")) for line in shown.err.splitlines()) == 3


def test_every_merge_is_the_one_that_is_made_alone(experts: list[Brick], text_base: Path, tmp_path: Path) -> None:
    given = inputs(experts, text_base)
    table = merge_all(ARMS, out=tmp_path / "all", **given)
    assert {r["model"] for r in table["rows"]} == {"the base", "a", "b", "average", "ties:density=0.3", "slerp"}
    assert [f["arm"] for f in table["failed"]] == ["task-arithmetic:scale=0.0"] and "every scale" in table["failed"][0][
        "why"
    ]
    for arm in ("average", "ties:density=0.3"):
        alone = merge(arm, out=tmp_path / "alone" / arm[:4], **given)["scores"]["rows"][-1]["scores"]
        here = next(r for r in table["rows"] if r["model"] == arm)
        assert [cell["mean"] for cell in here["scores"]] == [cell["mean"] for cell in alone]
        made = {p.name: p.read_bytes() for p in (tmp_path / "alone" / arm[:4]).glob("*.safetensors")}
        folder = tmp_path / "all" / here["folder"]
        assert made == {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} and made
    stored = json.loads((tmp_path / "all" / "merges.json").read_text())
    assert [r["model"] for r in stored["rows"]] == [r["model"] for r in table["rows"]]


def stopped(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_a_second_call_adds_arms_and_other_inputs_are_refused(
    experts: list[Brick], text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(experts, text_base)
    first = merge_all(["average", "slerp"], out=tmp_path / "all", **given)
    import brickyard.merging.compare as module

    made: list[str] = []
    real = module.carry_out
    monkeypatch.setattr(module, "carry_out", lambda w, *a, **k: made.append(w.arm) or real(w, *a, **k))
    second = merge_all(["average", "slerp", "ties"], out=tmp_path / "all", **given)
    assert made == ["ties"] and len(second["rows"]) == len(first["rows"]) + 1
    took = {r["model"]: r["seconds"] for r in second["rows"] if "seconds" in r}
    assert took["average"] is None and took["slerp"] is None and took["ties"] > 0
    stored = (tmp_path / "all" / "merges.json").read_text()
    monkeypatch.setattr(module, "carry_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_all(["average", "dare"], out=tmp_path / "all", **given)
    assert (tmp_path / "all" / "merges.json").read_text() == stored, "an interrupted call lost the table"
    with pytest.raises(Changed, match="another inputs"):
        merge_all(["average", "slerp"], out=tmp_path / "all", **{**given, "bricks": given["bricks"][::-1]})
    with monkeypatch.context() as patch:
        patch.setattr(module, "code_digest", lambda: "of another release")
        with pytest.raises(Changed, match="another code"):
            merge_all(["average", "slerp"], out=tmp_path / "all", **given)
    with pytest.raises(Changed, match="another reading"):
        merge_all(["average", "slerp"], out=tmp_path / "all", **given, max_length=8)
    os.utime(experts[0].folder / "adapter_config.json", ns=(1, 1))
    with pytest.raises(Changed, match="another files"):
        merge_all(["average", "slerp"], out=tmp_path / "all", **given)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="not empty"):
        merge_all(["average", "slerp"], out=tmp_path / "full", **given)
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"


def test_what_cannot_be_set_beside_others_is_refused_first(
    experts: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    given, out = inputs(experts, text_base), tmp_path / "all"
    for arms, change, said in (
        (["average", "average"], {}, "twice"),
        (["average", "ties"], {"data": []}, "one --data a task"),
        (["average", "ties"], {"audit": "backdoor:target=0"}, "one arm"),
        (["average", "cca-merge"], {}, "by itself"),
        (["average", "tis"], {}, "ties"),
    ):
        with pytest.raises(UsageError, match=said):
            merge_all(arms, out=out, **{**given, **change})
    assert not list(out.glob("*/model.safetensors"))


def test_the_command_prints_one_table(
    experts: list[Brick], text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = []
    for i, count in enumerate((60, 40)):
        folder = tmp_path / f"data{i}"
        folder.mkdir()
        for split, columns in text_data(test=count).items():
            lines = [
                json.dumps({"text": t, "label": str(l)}) for t, l in zip(columns["text"], columns["label"], strict=True)
            ]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        sets.append(str(folder))
    argv = ["merge", "average", "task-arithmetic:scale=0.0", "ties:density=0.5", "--base", str(text_base)]
    argv += ["--bricks", *(str(e.folder) for e in experts), "--data", *sets, "--out", str(tmp_path / "all")]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "ties:density=0.5" in said.out and "kept" in said.out and "every scale is 0" in said.out
    assert "average:" in said.err
    assert main([*argv[:2], "averge", *argv[4:]]) == 2
    none = ["merge", "task-arithmetic:scale=0.0", "ties:scale=0.0", *argv[4:-1], str(tmp_path / "none")]
    assert main(none) == 1 and "every scale is 0" in capsys.readouterr().out
    assert TASK.labels is not None
