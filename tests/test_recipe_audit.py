"""The verb `audit` of a recipe: checked before anything runs, repeated only for what changed, and shown."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import documents, text_data, write_data

from brickyard import auditing
from brickyard.checks import secure_code as check_of_claims
from brickyard.cli import main
from brickyard.core import registry
from brickyard.core.questions import row
from brickyard.recipe.audit import _spelled, _together
from brickyard.recipe.findings import _names, tables
from brickyard.recipe.run import run
from brickyard.recipe.steps import read

RECIPE = """\
defaults: {base: base, device: cpu, threads: 1}
steps:
  fixed: {tune: "full:lr=1e-2", data: data, task: causal-lm, steps: 2, batch-size: 4, max-length: 16}
  other: {tune: "lora:r=2,lr=1e-2", data: data, task: causal-lm, steps: 2, batch-size: 4, max-length: 16}
  audited:
    audit: "secure-code:samples=4,new_tokens=1,judge=rules,scenarios=asked.jsonl"
    brick: [$fixed, $other]
    data: data
"""


@pytest.fixture
def kitchen(causal_base: Path, tmp_path: Path) -> Path:
    """A folder with a recipe, and beside it what it reads: a base, documents and two scenarios."""
    shutil.copytree(causal_base, tmp_path / "base")
    write_data(tmp_path / "data", documents(24, 8))
    scenarios(tmp_path, "eval", "held")
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def scenarios(folder: Path, *weaknesses: str) -> None:
    lines = [json.dumps({"prompt": "x = ", "test": "B307", "weakness": weakness}) for weakness in weaknesses]
    (folder / "asked.jsonl").write_text("\n".join(lines), encoding="utf-8")


def written(folder: Path, text: str) -> Path:
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return folder / "r.yaml"


def states(result: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in result["steps"]}


def step_of(result: dict[str, Any], name: str = "audited") -> dict[str, Any]:
    return next(step for step in result["steps"] if step["name"] == name)


def test_an_audit_says_what_the_command_says_and_only_what_changed_runs_again(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = auditing.audit, []

    def audit(method: str, **given: Any) -> Any:
        calls.append(method)
        return real(method, **given)

    monkeypatch.setattr("brickyard.recipe.audit.auditing.audit", audit)
    out, path = kitchen / "out", kitchen / "r.yaml"
    first = run(path, out=out)
    assert set(states(first).values()) == {"done"} and first["exit_code"] == 0 and len(calls) == 2
    step = step_of(first)
    assert step["result"]["base"] == "base" and step["leaves"] == "scores" and step["needs"] == ["fixed", "other"]
    found = {one["model"]: one["findings"] for one in step["result"]["audited"]}
    method = f"secure-code:samples=4,new_tokens=1,judge=rules,scenarios={kitchen / 'asked.jsonl'}"
    given = {"base": str(kitchen / "base"), "data": str(kitchen / "data"), "device": "cpu"}
    brick = Path(step_of(first, "fixed")["folder"]) / "brick"
    assert found["fixed"] == json.loads(json.dumps(real(method, brick=brick, **given)))
    stored = json.loads((Path(step["folder"]) / "step.json").read_text(encoding="utf-8"))
    assert stored["result"] == step["result"]
    again = run(path, out=out)
    assert set(states(again).values()) == {"kept"} and len(calls) == 2
    assert step_of(again)["result"] == step["result"]
    # One brick fewer asks nothing new: each pair is known. Another option is another audit, and the bricks stand.
    assert states(run(written(kitchen, RECIPE.replace("[$fixed, $other]", "$fixed")), out=out))["audited"] == "done"
    assert len(calls) == 2
    changed = run(written(kitchen, RECIPE.replace("samples=4", "samples=3")), out=out)
    assert states(changed) == {"fixed": "kept", "other": "kept", "audited": "done"} and len(calls) == 4
    # A file that the method reads counts by what it holds.
    scenarios(kitchen, "eval")
    changed = run(path, out=out)
    assert states(changed) == {"fixed": "kept", "other": "kept", "audited": "done"} and len(calls) == 6


def test_an_interrupted_audit_goes_on_behind_its_last_pair(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = auditing.audit, []

    def audit(method: str, **given: Any) -> Any:
        calls.append(given["brick"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(method, **given)

    monkeypatch.setattr("brickyard.recipe.audit.auditing.audit", audit)
    with pytest.raises(KeyboardInterrupt):
        run(kitchen / "r.yaml", out=kitchen / "out")
    found = run(kitchen / "r.yaml", out=kitchen / "out")
    assert states(found) == {"fixed": "kept", "other": "kept", "audited": "done"}
    assert len(calls) == 3 and calls[1] == calls[2]


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("secure-code:", "secure-cod:", 6, "unknown audit method 'secure-cod'; did you mean secure-code"),
        ("secure-code:samples=4,", "lora:r=4,", 6, "unknown audit method 'lora'"),
        ("samples=4", "sample=4", 6, "unknown option of secure-code 'sample'; did you mean samples"),
        ("samples=4", "samples=four", 6, "secure-code: samples='four'"),
        ("samples=4", "samples=0", 6, "secure-code: samples=0.* must be positive"),
        ("samples=4", "samples=4,lr=1", 6, "one method and no training settings"),
        ("asked.jsonl", "none.jsonl", 6, "scenarios=none.jsonl: no such file"),
        ("    brick: ", "    bricks: ", 7, "unknown option of audit .* 'bricks'; did you mean brick"),
        ("$other]", "$otter]", 7, "unknown step in brick: 'otter'; did you mean other"),
        ("$other]", "missing]", 7, "step audited: base 'missing' is not a folder here"),
        ("$other]", "$audited]", 7, r"\$audited leaves scores; a brick or a model was expected"),
        ("    data: data\n", "    data: nothing/here/at\n", 8, "there is no folder 'nothing/here/at'"),
        ("    data: data\n", "    data: data\n    force: often\n", 9, "force: 'often' was given; true or false"),
        ("    data: data\n", "    data: data\n    base: $fixed\n", 9, "Merge it or export it"),
        ("{base: base, device: cpu,", "{base: base, judge: rules,", 1, "unknown default .* 'judge'"),
        ("secure-code:samples=4,new_tokens=1,judge=rules,scenarios=asked.jsonl", "zero-shot", 8, "has no labels"),
        ("secure-code:samples=4,new_tokens=1,judge=rules,scenarios=asked.jsonl", "membership", 7, "a model was given"),
    ],
)
def test_an_audit_that_cannot_be_is_refused_before_anything_runs(
    kitchen: Path,
    old: str,
    new: str,
    line: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("a step ran")

    monkeypatch.setattr("brickyard.recipe.run.perform", never)
    assert old in RECIPE
    text = RECIPE.replace(old, new, 1)
    text = text.replace("[$fixed, $other]", "[$fixed, base]") if new == "membership" else text
    path = written(kitchen, text)
    assert main(["run", str(path), "--out", str(kitchen / "out")]) == 2
    shown = capsys.readouterr().err
    assert f"{path}, line {line}:" in shown and re.search(said, shown), shown


@pytest.mark.parametrize("method", ["membership", "similarity"])
def test_a_method_that_compares_two_models_is_refused_without_the_second(
    kitchen: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(kitchen, f"steps:\n  a:\n    audit: {method}\n    base: base\n    data: data\n")
    assert main(["run", str(path), "--out", str(kitchen / "out")]) == 2
    assert "beside the base; name it under brick" in capsys.readouterr().err


def test_a_judge_that_is_not_installed_is_missed_before_anything_runs(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "bandit" else real(name, *at))
    path = written(kitchen, RECIPE.replace("judge=rules", "judge=bandit"))
    assert main(["run", str(path), "--out", str(kitchen / "out")]) == 2
    assert "line 6: step audited: judge=bandit needs the package bandit" in capsys.readouterr().err


def test_an_adapter_and_missing_splits_are_refused(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kitchen / "peft").mkdir()
    (kitchen / "peft" / "adapter_config.json").write_text("{}")
    write_data(kitchen / "half", {"train": text_data()["train"]})
    text = "steps:\n  a: {audit: METHOD, base: base, brick: BRICK, data: DATA}\n"
    for method, brick, data, said in (
        ("similarity", "peft", "data", "a PEFT adapter was given; similarity takes a brick or a model"),
        ("zero-shot", "base", "half", "a model was given; zero-shot takes a brick"),
        ("backdoor:target=good", "base", "half", "reads the rows of test; half has none"),
        ("membership", "base", "half", "reads the rows of train and test|reads the rows of test"),
    ):
        path = written(kitchen, text.replace("METHOD", f'"{method}"').replace("BRICK", brick).replace("DATA", data))
        assert main(["run", str(path), "--out", str(kitchen / "out")]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_the_report_and_the_terminal_show_the_models_side_by_side(
    kitchen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    out = kitchen / "out"
    assert main(["run", str(kitchen / "r.yaml"), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    step = step_of(json.loads((out / "result.json").read_text(encoding="utf-8")))
    summary, *compared = tables(step)
    assert [label for label, _ in summary["rows"]] == ["base", "fixed", "other"]
    heads = [name for name, _ in summary["heads"]]
    assert {"secure ratio", "valid", "bits per byte", "gain"} <= set(heads)
    findings = step["result"]["audited"][1]["findings"]
    other = dict(zip(heads, summary["rows"][2][1], strict=True))
    assert other["secure ratio"]["mean"] == findings["models"]["changed"]["secure_ratio"]
    assert other["gain"]["mean"] == findings["gain"]["difference"] and " to " in other["gain"]["interval"]
    assert dict(zip(heads, summary["rows"][0][1], strict=True))["gain"] is None  # the base has gained nothing
    assert [table["about"] for table in compared] == ["secure %, by weakness.", "on topic %, by weakness."]
    assert compared[0]["corner"] == "weakness" and compared[0]["heads"] == [(n, "") for n in ("base", "fixed", "other")]
    assert [label for label, _ in compared[0]["rows"]] == ["eval", "held", "all"]
    told = [f"{cell['text']} ({cell['interval']})" for cell in compared[0]["rows"][2][1]]
    last = [one["findings"]["table"][-1] for one in step["result"]["audited"]]
    assert told == [last[0]["base: secure %"], *(line["changed: secure %"] for line in last)]
    html = (out / "report.html").read_text(encoding="utf-8")
    for text in (*told, "Small figures are 95 % intervals"):
        assert text.split(" (")[0] in html
    assert f'<span class="sub">{compared[0]["rows"][2][1][0]["interval"]}</span>' in html
    assert (
        told[0] in shown
        and "secure ratio" in re.sub(r"\s+", " ", shown)
        and f"fixed: {findings['detail'][:20]}" in shown
    )
    assert 'data-v=""' in html and "–" in html
    assert "audit secure-code" in re.sub("<wbr>", "", html)


# What each method needs in a recipe: its options, the base, what stands beside it, its rows.
METHODS = {
    "backdoor": ("backdoor:target=good", "base: words\n    brick: $tuned\n    data: topics"),
    "configurable-bricks": ("configurable-bricks:prompts=20,tokens=8,draws=2,share=0.1", "base: base\n    data: kinds"),
    "membership": ("membership", "base: words\n    brick: $tuned\n    data: topics"),
    "secure-code": (
        "secure-code:samples=2,new_tokens=1,judge=rules,scenarios=asked.jsonl",
        "base: base\n    data: data",
    ),
    "similarity": ("similarity", "base: words\n    brick: [$tuned, words]\n    data: topics"),
    "zero-shot": ("zero-shot", "base: words\n    data: answers"),
}


@pytest.mark.parametrize("name", [entry.record.name for entry in registry.records("audit")])
def test_every_audit_method_runs_in_a_recipe(name: str, kitchen: Path, text_base: Path) -> None:
    shutil.copytree(text_base, kitchen / "words")
    write_data(kitchen / "topics", text_data(40, 60))
    kinds = text_data(56, 1)["train"]
    longer = [f"{a} {b}" for a, b in zip(kinds["text"], kinds["text"][2:] + kinds["text"][:2], strict=True)]
    write_data(kitchen / "kinds", {"train": {**kinds, "text": longer}})
    good = text_data(8, 24)["test"]
    asked_of = [row("is it good?", text) for text in good["text"]]
    rows = dict(zip(("text", "text_pair"), map(list, zip(*asked_of, strict=True)), strict=True))
    write_data(kitchen / "answers", {"test": {**rows, "label": [{"good": "yes"}.get(x, "no") for x in good["label"]]}})
    method, asked = METHODS[name]
    text = f'defaults: {{device: cpu}}\nsteps:\n  audited:\n    audit: "{method}"\n    {asked}\n'
    if "$tuned" in asked:
        text += '  tuned: {tune: "lora:r=2", base: words, data: topics, steps: 2, batch-size: 8, max-length: 16}\n'
    result = run(written(kitchen, text), out=kitchen / "out")
    step = step_of(result)
    assert step["status"] == "done", step["reason"]
    found = tables(step)
    assert found[0]["rows"] and len(found) >= 2 and found[0]["notes"]
    assert all(len(cells) == len(table["heads"]) for table in found for _, cells in table["rows"])
    assert (kitchen / "out" / "report.html").is_file()
    assert set(states(run(kitchen / "r.yaml", out=kitchen / "out")).values()) == {"kept"}


def test_what_a_method_wants_is_stated_of_all() -> None:
    entries = registry.records("audit")
    for entry in entries:
        named = {name for name, option in entry.options.items() if "file" in option.doc}
        assert named == set(auditing.wants(entry.record.name).files), entry.record.name


def test_verdicts_names_and_odd_figures() -> None:
    assert _together([True, True]) is True and _together([True, False, "undecided"]) is False
    assert _together([True, "undecided"]) == "undecided"
    assert _names("base", [None]) == ["base"]
    assert _names("m", ["m", "a", "a", "b"]) == ["m (2)", "a", "a (2)", "b"]
    assert _spelled({"a": [float("nan"), 1.5], "b": (float("inf"), "x")}) == {"a": ["nan", 1.5], "b": ["inf", "x"]}


def test_the_shipped_recipe_is_the_checks_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bandit")
    steps = read("embedded:secure-code").steps
    assert [step.verb for step in steps.values()].count("tune") == 5
    settings = {"lora": "lora", "ia3": "ia3", "lora-block": "block", "lora-line": "line"}
    for name, arm in settings.items():
        text, granularity = check_of_claims.ARMS[arm]
        options = steps[name].options
        assert (options["tune"], options["data"]) == (text, f"embedded:secure-fixes-{granularity}")
        assert (options["steps"], options["max-length"]) == (check_of_claims.STEPS, check_of_claims.BLOCK)
    claim = registry.find("secure-code").record.claims[0]
    habit = steps["habit"].options
    assert (habit["base"], habit["steps"], habit["batch-size"]) == (
        claim.base,
        check_of_claims.HABIT_STEPS,
        claim.batch,
    )
    assert steps["security"].needs == ["taught", *settings] and steps["utility"].options["data"] == [
        check_of_claims.ORDINARY
    ]
    monkeypatch.chdir(tmp_path)
    result = run("embedded:secure-code", dry=True)
    assert set(states(result).values()) == {"waiting"}
