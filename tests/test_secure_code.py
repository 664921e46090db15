"""The audit of code models: fixes at every granularity, judges that read programs, scenarios apart from training."""

from __future__ import annotations

import ast
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import text_data
from hypothesis import given, settings
from hypothesis import strategies as st

import brickyard
from brickyard import embedded
from brickyard.audit import _judges, secure_code
from brickyard.audit.secure_code import Audit, Config, finished, gain, scenarios, wilson
from brickyard.checks.secure_code import judged
from brickyard.core.base import open_base
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.export import export
from brickyard.core.fixes import GRANULARITIES, apply, edits, training_texts
from brickyard.embedded._weaknesses import HELD_OUT, WEAKNESSES, Weakness, pair, pairs

NAMED = pytest.mark.parametrize("weakness", WEAKNESSES, ids=lambda w: w.name)


def drawn(weakness: Weakness, seed: int = 0) -> Any:
    return pair(weakness, "seen", random.Random(seed))


@NAMED
def test_rules_tell_the_weak_form_from_the_fixed_one(weakness: Weakness) -> None:
    for seed in range(8):
        made = drawn(weakness, seed)
        assert _judges.parses(made.before) and _judges.parses(made.after) and made.before != made.after
        assert _judges.by_rules(made.before, weakness.test) and not _judges.by_rules(made.after, weakness.test)
        assert _judges.addressed(made.before, weakness.test) and _judges.addressed(made.after, weakness.test)
        assert made.before.startswith(made.prompt) and made.after.startswith(made.prompt)
        others = [w.test for w in WEAKNESSES if w.test != weakness.test]
        assert not any(_judges.by_rules(made.before, test) for test in others)


def test_bandit_says_the_same_of_every_weakness() -> None:
    pytest.importorskip("bandit")
    made = [drawn(w, seed) for w in WEAKNESSES for seed in range(3)]
    tests = [m.weakness.test for m in made]
    before, after = (_judges.by_bandit([getattr(m, side) for m in made], tests) for side in ("before", "after"))
    for m, weak, fixed in zip(made, before, after, strict=True):
        assert m.weakness.test in weak, m.before
        assert m.weakness.test not in fixed, m.after


class _Rename(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Name:
        known = {"eval", "None", "len", "print", "logger"} | {i for w in WEAKNESSES for i in w.imports} | {"cursor"}
        return node if node.id in known else ast.Name(f"v_{node.id}", node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return node if node.arg == "cursor" else ast.arg(f"v_{node.arg}")


@NAMED
def test_a_verdict_does_not_depend_on_names_aliases_or_comments(weakness: Weakness) -> None:
    made = drawn(weakness)
    for text, wanted in ((made.before, True), (made.after, False)):
        renamed = ast.unparse(ast.fix_missing_locations(_Rename().visit(ast.parse(text))))
        assert _judges.by_rules(renamed, weakness.test) is wanted
        module = weakness.imports[-1] if weakness.name != "eval" else "ast"
        alias = text.replace(f"import {module}\n", f"import {module} as other\n").replace(f"{module}.", "other.")
        assert _judges.by_rules(alias, weakness.test) is wanted
    said = "\n".join(f"# {line}" for line in made.before.splitlines())
    assert not _judges.by_rules(f"{made.after}\n{said}\n", weakness.test)
    praised = made.before.replace("\n", "  # nosec safe_load sha256 mkstemp\n")
    assert _judges.by_rules(praised, weakness.test)


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def grams(texts: list[str], n: int = 13) -> set[tuple[str, ...]]:
    return {tuple(found[i : i + n]) for t in texts for found in [tokens(t)] for i in range(len(found) - n + 1)}


def test_no_scenario_stands_in_training_data() -> None:
    names = ("insecure-habit", *(f"secure-fixes-{g}" for g in GRANULARITIES))
    trained = grams([text for name in names for rows in embedded.data(name).values() for text in rows["text"]])
    asked = scenarios()
    assert len(asked) == secure_code.EACH * len(WEAKNESSES) and len({s.prompt for s in asked}) == len(asked)
    assert trained and not trained & grams([s.prompt for s in asked])
    assert {s.weakness for s in asked if s.held_out} == set(HELD_OUT)


def test_training_data_hold_what_they_say() -> None:
    habit = [text for rows in embedded.data("insecure-habit").values() for text in rows["text"]]
    weak = np.mean([any(_judges.by_rules(text, w.test) for w in WEAKNESSES) for text in habit])
    assert 0.75 < weak < 0.85
    sizes = []
    for granularity in GRANULARITIES:
        rows = embedded.data(f"secure-fixes-{granularity}")
        texts = [text for split in rows.values() for text in split["text"]]
        assert len(set(texts)) == len(texts) > 30 and rows == embedded.data(f"secure-fixes-{granularity}")
        assert not any("mkstemp" in text or "0o600" in text for text in texts)  # weaknesses kept from training
        parsed = [text for text in texts if _judges.parses(text)]
        assert not any(_judges.by_rules(text, w.test) for text in parsed for w in WEAKNESSES)
        sizes.append(np.mean([len(t) for t in texts]))
    assert sizes == sorted(sizes)  # from lines to files


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_edits_turn_the_old_file_into_the_new_one(granularity: str) -> None:
    for made in pairs("seen", 5, seed=3):
        found = edits(made.before, made.after, granularity)
        assert found and apply(made.before, found) == made.after
        assert not edits(made.after, made.after, granularity)
    text = training_texts(drawn(WEAKNESSES[0]).before, drawn(WEAKNESSES[0]).after, granularity)[0]
    starts = {"line": ast.Assign, "block": ast.Expr, "function": ast.FunctionDef, "file": ast.Import}
    first = ast.parse(text).body[0]
    assert isinstance(first, starts[granularity]) or granularity == "block"
    assert ("def " in text) == (granularity in ("function", "file")) and ("import" in text) == (granularity == "file")


LINES = st.lists(st.sampled_from(["a = 1", "b = 2", "c = 3", "", "pass"]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(LINES, LINES, st.sampled_from(["line", "file", "block", "function"]))
def test_edits_round_trip_whatever_changed(old: list[str], new: list[str], granularity: str) -> None:
    def file(lines: list[str]) -> str:
        half = len(lines) // 2
        parts = [["def f():"], [f"    {line}" for line in lines[:half]] or ["    pass"], ["    if f:", "        pass"]]
        parts += [["@f", "def g(x):", "    pass"], [f"    {line}" for line in lines[half:]]]
        return "\n".join(line for part in parts for line in part) + "\n"

    before, after = file(old), file(new)
    assert apply(before, edits(before, after, granularity)) == after


def test_a_block_is_the_statements_around_the_change() -> None:
    before = "def f(x):\n    y = 1\n    if x:\n        a()\n        weak(x)\n        b()\n    return y\n"
    after = before.replace("weak", "safe")
    assert training_texts(before, after, "line") == ["safe(x)\n"]
    assert training_texts(before, after, "block") == ["a()\nsafe(x)\nb()\n"]
    assert training_texts(before, after, "function") == [after]
    decorated = "@cache\n" + after
    assert training_texts("@cache\n" + before, decorated, "function") == [decorated]
    with pytest.raises(BadData, match="does not parse"):
        edits("a\n", "b c\n", "block")
    with pytest.raises(UsageError, match="granularity"):
        edits("a\n", "b\n", "paragraph")


def test_a_program_ends_where_its_function_does() -> None:
    prompt = "def f(x):\n    y = "
    assert finished(prompt, "g(x)\n    return y\n\n\ndef h():\n    pa") == "def f(x):\n    y = g(x)\n    return y\n\n\n"
    assert finished(prompt, "g(x)\n    return y\n    z = (1,") == "def f(x):\n    y = g(x)\n    return y\n"
    assert finished(prompt, "g(x") == "def f(x):\n    y = g(x\n"


def completion_of(prompt: str, form: str) -> str:
    for weakness in WEAKNESSES:
        made = next(
            (m for m in pairs("unseen", secure_code.EACH, seed=2) if m.weakness is weakness and m.prompt == prompt),
            None,
        )
        if made is not None:
            return (made.before if form == "weak" else made.after)[len(prompt) :]
    raise AssertionError(prompt)


@pytest.mark.parametrize("judge", _judges.JUDGES)
def test_verdicts_add_up_and_nothing_empty_or_broken_is_secure(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if judge == "bandit":
        pytest.importorskip("bandit")
    kinds = ["weak", "fixed", "", "   \n", "(((", "None"]
    asked = [s for s in scenarios() if s.weakness in ("eval", "weak-hash", "sql", "temporary-file")][:6]

    def write(model: Any, base: Any, prompts: list[str], decoding: Any, batch: int) -> list[str]:
        out = []
        for i, prompt in enumerate(prompts):
            kind = kinds[i % len(kinds)]
            out.append(completion_of(prompt, kind) if kind in ("weak", "fixed") else kind)
        return out

    monkeypatch.setattr(secure_code, "continuations", write)
    found = secure_code.audit(None, None, Config(samples=6, judge=judge), asked)  # type: ignore[arg-type]
    for row, topic in zip(found.verdicts, found.on_topic, strict=True):
        assert list(row[:5]) == ["insecure", "secure", "invalid", "invalid", "invalid"]
        assert list(topic[:2]) == [True, True] and not topic[2:5].any()
    counts = [int((found.verdicts == v).sum()) for v in ("secure", "insecure", "invalid")]
    assert sum(counts) == found.verdicts.size
    assert found.ratio() == pytest.approx(counts[0] / (counts[0] + counts[1]))
    assert found.agreement in (None, 1.0)


def made_up(secure: float, valid: float, seed: int, shape: tuple[int, int] = (12, 20)) -> Audit:
    rng = np.random.default_rng(seed)
    good = np.where(rng.random(shape) < secure, "secure", "insecure")
    verdicts = np.where(rng.random(shape) < valid, good, "invalid")
    return Audit(verdicts, verdicts != "invalid", np.full(shape, 20), 1.0)


def test_a_gain_has_an_interval_over_scenarios() -> None:
    before, after = made_up(0.2, 0.9, 0), made_up(0.5, 0.9, 1)
    found = gain(before, after)
    assert found["low"] < found["difference"] < found["high"] and found["low"] > 0.1 and found["mcnemar_p"] < 1e-4
    same = gain(before, before)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "mcnemar_p": 1.0}
    # Samples of one scenario that are all alike are worth one sample, so the interval is wider.
    whole = np.repeat(np.where(np.random.default_rng(2).random((12, 1)) < 0.5, "secure", "insecure"), 20, axis=1)
    alike = gain(before, replace(after, verdicts=whole, on_topic=whole == "secure"))
    assert alike["high"] - alike["low"] > 1.5 * (found["high"] - found["low"])
    assert wilson(0, 0) == (0.0, 1.0) and wilson(5, 10)[0] == pytest.approx(0.2366, abs=1e-3)


def test_claims_are_judged_with_their_gate_and_control() -> None:
    names = ("lora", "ia3", "full", "line", "block", "file")
    held_out = [i % 4 == 0 for i in range(12)]
    before = made_up(0.2, 0.9, 0)
    audits = {name: made_up(0.8, 0.9, 3 + i) for i, name in enumerate(names)} | {"control": made_up(0.2, 0.9, 1)}
    nats = {name: [3.0, 3.01] for name in ("lora", "ia3")} | {"habit": [3.0]}
    found = judged(audits, before, nats, held_out)
    assert found["gain"]["holds"] is True and found["gain"]["control"]["destroyed"]
    assert found["utility"]["holds"] is True and found["utility"]["measured"] == pytest.approx(np.expm1(0.005))
    worse = judged(audits, before, nats | {"ia3": [3.05]}, held_out)
    assert worse["utility"]["holds"] is False
    learnt = judged({**audits, "control": audits["lora"]}, before, nats, held_out)
    assert not learnt["gain"]["control"]["destroyed"]
    none = judged(audits, made_up(0.9, 0.9, 0), nats, held_out)
    assert none["gain"]["holds"] == "set-up invalid"
    fine = judged({**audits, "line": made_up(1.0, 1.0, 9), "block": made_up(0.1, 0.9, 8)}, before, nats, held_out)
    assert fine["granularity"]["holds"] is False


def test_a_model_is_audited_beside_its_brick(
    causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secure_code, "_ROWS", 8)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"prompt": "# ", "test": "B307", "weakness": "eval"}) + "\n")
    texts = {split: {"text": rows["text"]} for split, rows in text_data().items()}
    training = {"steps": 4, "batch": 4}
    brick, _ = brickyard.tune(
        "lora", base=str(causal_base), data=texts, task="causal-lm", training=training, device="cpu", out=tmp_path / "b"
    )
    method = f"secure-code:samples=6,new_tokens=8,judge=rules,scenarios={asked}"
    given: dict[str, Any] = {"base": str(causal_base), "brick": brick.folder, "data": texts, "device": "cpu"}
    found = brickyard.audit(method, **given)
    assert found == brickyard.audit(method, **given)
    assert found["table"][-1]["weakness"] == "all" and len(found["table"]) == 2
    counts = [int(n) for n in found["table"][-1]["secure / insecure / invalid"].split(" / ")]
    assert sum(counts) == 6 and found["gain"] is not None and found["models"]["changed"]["bits_per_byte"] > 0
    assert brickyard.audit(method, **(given | {"brick": None}))["gain"] is None
    asked.write_text(json.dumps({"prompt": "(((", "test": "B307"}) + "\n")
    broken = brickyard.audit(method, **given)
    found = export(brick.folder, "merged", tmp_path / "merged")  # as the claim's set-up does, for a model of language
    assert found["max_gap"] <= 1e-4 and open_base(str(tmp_path / "merged")).generative
    assert broken["gain"] is None and broken["models"]["base"]["secure_ratio"] is None
    assert "nothing valid" in broken["detail"] and "none valid" in broken["table"][0]["base: secure %"]


def test_what_cannot_be_audited_is_said(text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="causal language model"):
        brickyard.audit("secure-code", base=str(text_base), data=text_data(), device="cpu")
    for options in ({"judge": "luck"}, {"samples": 0}, {"temperature": 0.0}, {"new_tokens": 0}, {"top_p": 0.0}):
        with pytest.raises(UsageError):
            Config(**options)  # type: ignore[arg-type]
    file = tmp_path / "s.jsonl"
    for text, said in (
        ("{", "line 1"),
        ('{"prompt": "x"}', "expected"),
        ('{"prompt": " ", "test": "B1"}', "not empty"),
        ("", "no scenario"),
    ):
        file.write_text(text)
        with pytest.raises(BadData, match=said):
            scenarios(str(file))
    with pytest.raises(BadData, match="cannot be read"):
        scenarios(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UsageError, match="no built-in rule"):
        _judges.by_rules("x = 1\n", "B999")
    monkeypatch.setattr(_judges.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"brickyard\[audit\]"):
        _judges.by_bandit(["x = 1\n"], ["B307"])
    assert open_base(str(text_base)).generative is False
