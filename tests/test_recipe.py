"""Recipes: the graph is checked before anything runs, only what changed runs again, and the pictures tell the truth."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import documents, write_data

from brickyard.cli import main
from brickyard.core.errors import UsageError
from brickyard.core.settings import read_placed
from brickyard.recipe import verbs
from brickyard.recipe.graph import HEIGHT, WIDTH, layout, rails
from brickyard.recipe.report import headline
from brickyard.recipe.run import run
from brickyard.recipe.steps import read

RECIPE = """\
recipe: Two experts & one <merge>
defaults:
  base: base
  task: causal-lm
  device: cpu
steps:
  a:
    tune: full:lr=1e-2
    data: data
    steps: 3
    batch-size: 4
    max-length: 16
    threads: 1
  b: {tune: "lora:r=2,lr=1e-2", data: data, steps: 2, batch-size: 4, max-length: 16, threads: 1}
  merged:
    merge: average
    bricks: [$a, $b]
    threads: 2
  report:
    evaluate: [base, $a, $merged]
    data: data
    max-length: 32
"""


@pytest.fixture
def kitchen(causal_base: Path, tmp_path: Path) -> Path:
    """A folder with a recipe, a base and data beside it."""
    shutil.copytree(causal_base, tmp_path / "base")
    write_data(tmp_path / "data", documents(40, 24))
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def written(folder: Path, text: str) -> Path:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return folder / "r.yaml"


def states(result: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in result["steps"]}


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("tune: full:lr=1e-2", "tun: full", 8, "unknown verb .* 'tun'; did you mean tune"),
        ("tune: full:lr=1e-2", "tune: fulll", 8, "step a: unknown method 'fulll'; did you mean full"),
        ("lora:r=2,", "lora:rr=2,", 14, "step b: unknown option of lora 'rr'"),
        ("    steps: 3", "    step: 3", 10, "unknown option of tune .* 'step'; did you mean steps"),
        ("    steps: 3", "    steps: three", 10, "steps: 'three' was given; a whole number was expected"),
        ("    steps: 3", "    steps: -3", 10, "steps: -3 was given; a number above 0"),
        ("    steps: 3", "    steps: 3\n    epochs: 2", 10, "epochs and steps both say how long"),
        ("    steps: 3", "    steps: 3\n    merge: average", 7, "step a names tune and merge; a step does one thing"),
        ("[$a, $b]", "[$a, $c]", 17, "unknown step in bricks: 'c'"),
        ("[$a, $b]", "[$a, $merged]", 17, "in a circle: merged <- merged"),
        ("[$a, $b]", "[$a, $report]", 17, r"\$report leaves scores; a brick or a model or an adapter was expected"),
        ("    data: data\n    steps", "    data: $b\n    steps", 9, r"data: \$b leaves a brick; data was expected"),
        ("    data: data\n    steps", "    base: $b\n    data: data\n    steps", 9, "Merge it or export it"),
        ("merge: average", "merge: lora", 16, "unknown merge method 'lora'"),
        ("merge: average", "merge: average\n    search: {t: [0.5]}", 17, "search and validate belong together"),
        (
            "merge: average",
            "merge: slerp:t=0.5\n    search: {t: [0.5]}\n    validate: data",
            17,
            "search: t is fixed in slerp:t=0.5",
        ),
        (
            "merge: average",
            "merge: slerp\n    search: {q: [0.5]}\n    validate: data",
            17,
            "search: unknown option of slerp 'q'",
        ),
        ("  device: cpu", "  device: gpu", 5, "unknown device 'gpu'; did you mean cpu"),
        ("  device: cpu", "  devise: cpu", 5, "unknown default .* 'devise'; did you mean device"),
        ("    threads: 2", "    threads: true", 18, "threads: True was given; a whole number"),
        ("    threads: 2", "    threads: .nan", 18, "threads: nan is no finite number"),
        ("    threads: 2", "    threads: 2\n    threads: 3", 19, "key 'threads' stands twice"),
        ("    threads: 2", "    threads: &x 2\n    dtype: *x", 19, "aliases .* are not accepted"),
        ("    threads: 2", "    dtype: !!python/object:os.system x", 18, "could not determine a constructor"),
        ("  merged:", "  Merged!:", 15, "'Merged!' is no name of a step"),
        ("recipe: Two experts & one <merge>", "recipee: x", 1, "unknown key .* 'recipee'; did you mean recipe"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_its_line(
    kitchen: Path, old: str, new: str, line: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in RECIPE
    path = written(kitchen, RECIPE.replace(old, new, 1))
    assert main(["run", str(path), "--out", str(kitchen / "out")]) == 2
    shown = capsys.readouterr().err
    assert f"{path}, line {line}:" in shown.replace(f"{path}:", f"{path}, line 1:") and re.search(said, shown)
    assert shown.count("\n") == 1 and not (kitchen / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("[base, $a, $merged]", "[basis, $a]", 20, "step report: base 'basis' is not a folder here"),
        ("    data: data\n    max", "    data: ./dato\n    max", 21, r"there is no folder '\./dato'"),
        (
            "    data: data\n    max",
            "    data: embedded:python-tset\n    max",
            21,
            "unknown embedded data set .* did you mean .*python-tests",
        ),
        ("[$a, $b]", "[$a, data]", 17, "step merged: data holds neither config.json"),
        ("merge: average", "merge: slerp:t=2", 16, "step merged: slerp: t=2.* expected 0 to 1|t=2"),
        ("tune: full:lr=1e-2", "tune: full + lora", 8, "step a: "),
        ("    data: data\n    max", "    data: few\n    max", 21, "few has no test split"),
    ],
)
def test_models_data_and_arms_are_opened_before_anything_runs(
    kitchen: Path, old: str, new: str, line: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("a step ran")

    monkeypatch.setattr("brickyard.recipe.run.perform", never)
    write_data(kitchen / "few", {"train": documents(20, 8)["train"]})
    path = written(kitchen, RECIPE.replace(old, new, 1))
    with pytest.raises(UsageError, match=said) as error:
        run(path, out=kitchen / "out")
    assert f"{path}, line {line}: " in str(error.value)


def test_only_what_changed_runs_again(kitchen: Path) -> None:
    out, path = kitchen / "out", kitchen / "r.yaml"
    first = run(path, out=out)
    assert states(first) == dict.fromkeys(("a", "b", "merged", "report"), "done") and first["exit_code"] == 0
    assert states(run(path, out=out)) == dict.fromkeys(("a", "b", "merged", "report"), "kept")
    # Another place and name of the recipe and its inputs change nothing; what counts is what they hold.
    (kitchen / "base").rename(kitchen / "moved")
    written(kitchen, RECIPE.replace("base: base", "base: moved").replace("[base,", "[moved,"))
    assert set(states(run(path, out=out)).values()) == {"kept"}
    # A merge has the same bits on any number of threads: it runs again, and the scores behind it stand.
    text = (kitchen / "r.yaml").read_text().replace("threads: 2", "threads: 1")
    written(kitchen, text)
    assert states(run(path, out=out)) == {"a": "kept", "b": "kept", "merged": "done", "report": "kept"}
    written(kitchen, text.replace("r=2", "r=3"))
    changed = run(path, out=out, dry=True)
    assert states(changed) == {"a": "kept", "b": "waiting", "merged": "waiting", "report": "waiting"}
    assert states(run(path, out=out, prune=True)) == {"a": "kept", "b": "done", "merged": "done", "report": "done"}
    assert len(list((out / "steps").iterdir())) == 4  # those of r=2 were pruned
    # New rows in the data: all that reads them, and all behind it.
    write_data(kitchen / "data", documents(41, 24))
    assert states(run(path, out=out, dry=True))["a"] == "waiting"


def test_an_output_that_was_changed_or_lost_is_made_again(kitchen: Path) -> None:
    out, path = kitchen / "out", kitchen / "r.yaml"
    first = run(path, out=out)
    folder = {step["name"]: Path(step["folder"]) for step in first["steps"]}
    weights = folder["merged"] / "merged" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert states(run(path, out=out)) == {"a": "kept", "b": "kept", "merged": "done", "report": "kept"}
    assert weights.read_bytes() == before
    shutil.rmtree(folder["a"] / "brick")
    found = run(path, out=out)
    assert states(found)["a"] == "done" and states(found)["b"] == "kept"


def test_an_interrupt_keeps_what_is_finished_and_the_training_goes_on(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = kitchen / "out"
    path = written(kitchen, RECIPE.replace("    steps: 3", "    steps: 6\n    checkpoint-every: 2"))
    whole = run(path, out=kitchen / "whole")
    real, calls = verbs.api.tune, []

    class Stop:
        def after_step(self, state: Any) -> None:
            if state.step + 1 == 5:
                raise KeyboardInterrupt

    def tune(arm: str, **given: Any) -> Any:
        calls.append(arm)
        stop = (Stop(),) if len(calls) == 1 else ()
        return real(arm, **{**given, "callbacks": (*given["callbacks"], *stop)})

    monkeypatch.setattr(verbs.api, "tune", tune)
    with pytest.raises(KeyboardInterrupt):
        run(path, out=out)
    (begun,) = (out / "steps").iterdir()
    assert any((begun / "checkpoints").iterdir()) and not (begun / "step.json").exists()
    events: list[dict[str, Any]] = []
    found = run(path, out=out, listen=events.append)
    assert set(states(found).values()) == {"done"}
    assert [e["again"] for e in events if e["event"] == "start"] == [True, False, False, False]
    same = [(s["result"], t["result"]) for s, t in zip(found["steps"], whole["steps"], strict=True)]
    assert same[3][0]["rows"] == same[3][1]["rows"]  # the scores of every model, bit for bit


def test_a_step_that_fails_stops_only_what_needs_it(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = verbs.api.tune

    def tune(arm: str, **given: Any) -> Any:
        if arm.startswith("full"):
            raise RuntimeError("the disk is on fire")
        return real(arm, **given)

    monkeypatch.setattr(verbs.api, "tune", tune)
    path, out = kitchen / "r.yaml", kitchen / "out"
    assert main(["run", str(path), "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "RuntimeError: the disk is on fire" in shown and "it needs a" in shown
    result = json.loads((out / "result.json").read_text())
    assert states(result) == {"a": "failed", "b": "done", "merged": "waiting", "report": "waiting"}
    (failed,) = (Path(s["folder"]) for s in result["steps"] if s["status"] == "failed")
    assert "Traceback" in (failed / "error.txt").read_text()
    monkeypatch.setattr(verbs.api, "tune", real)
    assert states(run(path, out=out)) == {"a": "done", "b": "kept", "merged": "done", "report": "done"}


def test_a_search_keeps_the_best_on_validation_and_scores_nothing_twice(kitchen: Path) -> None:
    text = RECIPE.replace(
        "merge: average", "merge: task-arithmetic\n    search: {scale: [0.001, 1.0]}\n    validate: data"
    )
    result = run(written(kitchen, text), out=kitchen / "out")
    merged = next(s for s in result["steps"] if s["name"] == "merged")["result"]
    tried = {row["arm"]: row["mean"] for row in merged["search"]["tried"]}
    assert len(tried) == 2 and merged["search"]["chosen"] == min(tried, key=lambda arm: tried[arm]) == merged["arm"]
    cells = len(list((kitchen / "out" / "cells").iterdir()))
    assert cells == 2 + 3
    (folder,) = (Path(s["folder"]) for s in result["steps"] if s["name"] == "merged")
    assert sorted(p.name for p in folder.iterdir()) == ["merged", "step.json"]
    # One more model costs one more score.
    text = text.replace("[base, $a, $merged]", "[base, $a, $b, $merged]")
    again = run(written(kitchen, text), out=kitchen / "out")
    assert states(again)["report"] == "done" and len(list((kitchen / "out" / "cells").iterdir())) == cells + 1


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 1), ("bits_per_byte", 0)])
def test_a_search_goes_by_the_metric_of_its_scores(
    kitchen: Path, metric: str, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `metric:` the scores say what they are, and so which way is better."""
    real, told = verbs._cell, iter([0.25, 0.75])

    def cell(work: Any, step: Any, model: Any, *rest: Any) -> dict[str, Any]:
        if model.label == "a candidate":
            return {"score": {"metric": metric, "mean": next(told)}, "examples": 4}
        return real(work, step, model, *rest)

    monkeypatch.setattr(verbs, "_cell", cell)
    text = RECIPE.replace("merge: average", "merge: slerp\n    search: {t: [0.25, 0.75]}\n    validate: data")
    result = run(written(kitchen, text), out=kitchen / "out")
    search = next(s for s in result["steps"] if s["name"] == "merged")["result"]["search"]
    assert search["metric"] == metric and search["chosen"] == search["tried"][best]["arm"]


def test_a_search_over_scores_of_two_metrics_is_refused() -> None:
    cells = [{"metric": "accuracy", "mean": 0.5}, {"metric": "bits_per_byte", "mean": 2.0}]
    with pytest.raises(UsageError, match="accuracy, bits_per_byte, whose mean says nothing"):
        verbs._one_metric(cells)


def test_a_merge_of_data_can_be_searched(kitchen: Path) -> None:
    search = "search: {off_diagonal: [0.5, 0.9]}\n    validate: data\n    data: [data, data]\n    max-length: 16"
    text = RECIPE.replace("merge: average", f"merge: regmean:rows=8\n    {search}")
    result = run(written(kitchen, text), out=kitchen / "out")
    assert states(result)["merged"] == "done"
    found = next(s for s in result["steps"] if s["name"] == "merged")["result"]
    assert len(found["search"]["tried"]) == 2 and found["search"]["metric"] == "bits_per_byte"


def test_the_other_verbs_hand_over_to_each_other(kitchen: Path) -> None:
    text = (
        RECIPE.split("steps:\n")[0]
        + """\
steps:
  clean: {data: dedup, from: data}
  b: {tune: "lora:r=2,lr=1e-2", data: $clean, steps: 2, batch-size: 4, max-length: 16, allow-overlap: true}
  adapter: {export: $b, to: peft}
  model: {export: $b, to: merged}
  proof: {verify: $adapter}
  said: {predict: $model, data: data, new-tokens: 3}
  scored: {evaluate: [$b, $model], data: $clean}
"""
    )
    result = run(written(kitchen, text), out=kitchen / "out")
    # After so few steps lora_A is as it was, for lora_B began at zero: a doubt, which is no failure.
    assert set(states(result).values()) == {"done"} and result["exit_code"] == 3
    found = {step["name"]: step["result"] for step in result["steps"]}
    assert [f["check"] for f in found["proof"]["findings"] if f["ok"] is False] == ["every tensor trained"]
    assert found["said"]["rows"] == 24 and headline(result).startswith("All steps finished, but what proof checks")
    brick, model = (row["scores"][0]["score"]["mean"] for row in found["scored"]["rows"])
    assert brick == pytest.approx(model, abs=1e-4)  # the model reads no more of a row than the brick was trained with
    assert found["scored"]["max_length"] == 16
    assert states(run(kitchen / "r.yaml", out=kitchen / "out")) == dict.fromkeys(found, "kept")


def test_the_report_is_one_file_that_draws_the_graph_and_escapes_what_it_shows(
    kitchen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = kitchen / "out"
    assert main(["run", str(kitchen / "r.yaml"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"●\s+a\s+tune full:lr=1e-2", shown) and re.search(r"╰.*●\s+report", shown)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Two experts &amp; one &lt;merge&gt;" in html and "<merge>" not in html
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", html) and "default-src 'none'" in html
    svg = re.search(r"<svg[^>]*class=\"graph\".*?</svg>", html, re.DOTALL)
    assert svg is not None
    tree = ElementTree.fromstring(svg.group(0))
    names = [node.text for node in tree.iter("text") if node.get("class") == "stepname"]
    assert sorted(map(str, names)) == ["a", "b", "merged", "report"]
    assert sum(node.get("class") == "edge" for node in tree.iter("path")) == 4
    assert all(f'id="step-{name}"' in html for name in names) and "prefers-color-scheme: dark" in html
    assert main(["run", str(kitchen / "r.yaml"), "--out", str(out), "--json"]) == 0
    assert set(states(json.loads(capsys.readouterr().out)).values()) == {"kept"}


def test_lanes_begin_where_something_is_made_and_end_where_it_is_read_last() -> None:
    needs = {"a": [], "b": [], "c": ["a"], "d": ["b", "c"], "e": [], "f": ["a", "d"]}
    assert len({len(line) for line in rails(needs)}) == 1
    assert [line.rstrip() for line in rails(needs)] == ["●", "│ ●", "├─│─●", "│ ╰─┴─●", "│ ●   │", "╰─────┴─●"]
    assert rails(needs, ascii_only=True)[3].rstrip() == "| \\-+-*"


def test_boxes_stand_below_what_they_need_and_never_on_each_other() -> None:
    needs = {f"e{i}": [] for i in range(6)}
    needs |= {f"r{i}": [f"e{i}"] for i in range(6)}
    needs |= {"m": [f"r{i}" for i in range(6)], "x": ["m", "e0"], "all": [*(f"e{i}" for i in range(6)), "m", "x"]}
    found = layout(needs)
    for name, above in needs.items():
        assert all(found.boxes[other][1] + HEIGHT < found.boxes[name][1] for other in above)
    places = list(found.boxes.values())
    for i, (x, y) in enumerate(places):
        assert 0 <= x <= found.width - WIDTH + 0.01 and y + HEIGHT <= found.height + 0.01
        assert all(y != v or abs(x - u) >= WIDTH for u, v in places[i + 1 :])
    assert {(a, b) for a, b, _ in found.lines} == {(other, name) for name in needs for other in needs[name]}
    assert all(points[0][1] < points[-1][1] for _, _, points in found.lines)


def test_lines_of_values_and_shipped_recipes(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n", encoding="utf-8")
    values, lines = read_placed(path)
    assert values == {"a": 1, "b": ["x", {"c": 2, "d": 3}]}
    assert lines["b", 1] == 4 and lines["b", 1, "d"] == 5 and lines["a",] == 1
    with pytest.raises(UsageError, match="did you mean mediphi"):
        read("embedded:medifi")
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "none.yaml")
    assert len(read("embedded:mediphi").steps) == 18
