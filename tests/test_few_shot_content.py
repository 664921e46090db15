"""The cloze head: templates that are never cut, gaps that are found, label words that can be told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import text_data

import brickyard
from brickyard.checks import _runs
from brickyard.checks import few_shot_content as check
from brickyard.checks.run import Answers
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.split import Split
from brickyard.core.task import Task
from brickyard.core.template import Template, label_tokens
from brickyard.core.trial import Setting, prepare
from brickyard.tune import few_shot_content
from brickyard.tune.few_shot_content import ClozeHead, Config, krippendorff

MINILM = pytest.mark.skipif("minilm" not in __import__("brickyard.embedded").embedded.BASES, reason="no minilm")


@pytest.fixture(scope="module")
def minilm() -> Any:
    return open_base("embedded:minilm")


def task(*names: str) -> Task:
    return Task("text-classification", "accuracy", names, len(names), "text")


@MINILM
@pytest.mark.parametrize("pattern", ["[MASK] News: {text}", "{text} It was [MASK].", "A [MASK] [MASK] text: {text} !"])
def test_a_long_text_is_cut_and_its_template_is_not(pattern: str, minilm: Any) -> None:
    template, tokenizer = Template(pattern), minilm.tokenizer
    texts = ["short one", "many words " * 5000, "ab,cd;" * 2000, "a b"]
    for limit in (16, 64):
        rows = encode(Split({"text": texts}), minilm, task("a", "b"), max_length=limit, template=template)
        ids = [rows.collate(np.array([i]))["input_ids"][0] for i in range(4)]
        assert rows.report["truncated"] == 2 and all(len(i) <= limit for i in ids)
        for row in ids:
            assert int((row == tokenizer.mask_token_id).sum()) == template.masks
            said = tokenizer.decode(row).replace(" ", "")
            for part in pattern.split("{text}"):
                assert part.replace(" ", "").lower() in said.lower()
        assert len(ids[1]) >= limit - 2
    with pytest.raises(BadData, match="alone fills"):
        Template("[MASK] " + "word " * 30 + "{text}").fill(["a text"], tokenizer, 16)
    with pytest.raises(BadData, match="row 2 holds"):
        template.fill(["a", "b [MASK]"], tokenizer, None)


@MINILM
def test_label_words_must_be_told_apart(minilm: Any) -> None:
    t = minilm.tokenizer
    assert [len(ids) for ids in label_tokens(["good", "bad"], t, 1)] == [1, 1]
    with pytest.raises(UsageError, match="begin with the same 1"):
        label_tokens(["antidisestablishment", "antidisestablishmentarianism"], t, 1)
    with pytest.raises(UsageError, match="has 1 tokens and the template 3 gaps"):
        label_tokens(["good", "antidisestablishmentarianism"], t, 3)
    with pytest.raises(UsageError, match="3 label words for 2 classes"):
        build(resolve(parse("few-shot-content:words=[a,b,c]"), task("x", "y")), minilm, task("x", "y"), seed=0)


def test_scores_are_sums_over_gaps_of_the_words_tokens() -> None:
    torch.manual_seed(0)
    head = ClozeHead(6, [[7, 3], [3, 9], [7, 9]], mask_id=4)
    x, ids = torch.randn(2, 5, 6), torch.tensor([[1, 4, 5, 4, 2], [4, 4, 5, 2, 0]])
    mask = ids != 0
    found = head(x, mask, ids)
    rows = {token: i for i, token in enumerate((3, 7, 9))}
    for b, gaps in enumerate(([1, 3], [0, 1])):
        o = head.rows(head.transform(x[b, gaps]))
        wanted = torch.stack([o[0, rows[p]] + o[1, rows[q]] for p, q in ((7, 3), (3, 9), (7, 9))])
        torch.testing.assert_close(found[b], wanted)
    moved = x.clone()
    moved[:, [2, 4]] += 1.0  # what stands beside the gaps is not read
    torch.testing.assert_close(head(moved, mask, ids)[0], found[0])
    with pytest.raises(BadData, match="row 1 of the batch has 1 gaps"):
        head(x, mask, torch.tensor([[1, 4, 5, 4, 2], [4, 1, 5, 2, 0]]))


@MINILM
def test_a_run_is_saved_with_its_template_and_a_warm_head_begins_at_the_words(minilm: Any, tmp_path: Path) -> None:
    names = dict(zip(sorted({str(v) for v in text_data()["train"]["label"]}), ("good", "bad", "plain"), strict=False))
    rows = {
        split: {"text": part["text"], "label": [names[str(v)] for v in part["label"]]}
        for split, part in text_data().items()
    }
    arm = "lora:r=2 + few-shot-content:template='{text} It is [MASK].'"
    training = {"steps": 12, "batch": 8, "lr": 2e-3}
    given: dict[str, Any] = {"base": "embedded:minilm", "data": rows, "device": "cpu", "training": training}
    brick, result = brickyard.tune(arm, out=tmp_path / "run", max_length=32, **given)
    again = brickyard.evaluate(brick=brick.folder, data=rows, device="cpu")
    assert again["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=1e-6)
    assert brick.template == Template("{text} It is [MASK].")
    brickyard.predict(brick=brick.folder, data={"test": {"text": ["a text"]}}, out=tmp_path / "p.parquet", device="cpu")
    warm = build(resolve(parse("few-shot-content:warm=true"), task("good", "bad")), minilm, task("good", "bad"), seed=0)
    weight = warm.model.head.rows.weight  # type: ignore[union-attr]
    known = sorted(ids[0] for ids in label_tokens(["good", "bad"], minilm.tokenizer, 1))
    torch.testing.assert_close(weight, minilm.backbone().get_input_embeddings().weight[known])
    turned = {split: {name: values[::-1] for name, values in part.items()} for split, part in rows.items()}
    ready, swapped = (
        prepare(Setting(arm=arm, base="embedded:minilm", data=data, device="cpu")) for data in (rows, turned)
    )
    assert ready.task.labels == swapped.task.labels  # the order of the classes does not depend on the order of rows


def test_krippendorffs_alpha_is_that_of_the_book() -> None:
    # Two coders of ten units, nominal: the worked example of Krippendorff (2011), section A, has alpha = 0.095.
    a = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff(np.array([a, b])) == pytest.approx(0.095, abs=1e-3)
    assert krippendorff(np.array([a, a, a])) == 1.0 and krippendorff(np.zeros((2, 5))) == 1.0
    rng = np.random.default_rng(0)
    assert abs(krippendorff(rng.integers(0, 4, (5, 4000)))) < 0.02
    with pytest.raises(UsageError, match="two coders"):
        krippendorff(np.zeros((1, 5)))


def test_the_claim_is_judged_by_macro_f1_and_a_rival_that_never_left_the_majority_is_none() -> None:
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(400) % 10, 0, 1 + np.arange(400) // 10 % 2)  # nine of ten rows are of one class

    def made(rare: float, often: float) -> Answers:
        right = rng.random((5, 400)) < np.where(labels, rare, often)
        return Answers(labels, np.where(right, labels, (labels + 1) % 3))

    found = {"lora-cloze": made(0.9, 0.95), "lora-ordinary": made(0.5, 0.95), "full-cloze": made(0.5, 0.9)}
    found["lora-control"] = made(0.1, 0.6)
    out = check.judged(found, "lora")
    assert out["holds"] is True and out["metric"] == "macro-f1" and out["control"]["destroyed"] is True
    # Its gain in accuracy is small: the classes that gain are rare.
    accuracy = {name: (of.predictions == labels).mean() for name, of in found.items()}
    assert out["measured"] > 5 > 100 * (accuracy["lora-cloze"] - accuracy["lora-ordinary"])
    assert out["figures"]["alpha"]["lora-cloze"] == krippendorff(found["lora-cloze"].predictions)
    assert "over seeds: lora-cloze" in out["detail"] and "alpha between them: lora-cloze" in out["detail"]
    assert f"full-cloze {out['figures']['spread']['full-cloze']:.1f}" in out["detail"]
    stuck = {**found, "lora-ordinary": Answers(labels, np.zeros((5, 400), dtype=int))}
    assert check.judged(stuck, "lora")["holds"] == "set-up invalid"


def test_the_check_runs_and_searches_all_heads_by_macro_f1(
    masked_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[dict[str, Any]] = []

    def here(jobs: Any, workers: int, folder: Path) -> dict[str, Any]:
        settings.extend(job.argument["setting"] for job in jobs)
        return {job.key: trial.run(job.argument) for job in jobs}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "finished", here)
    monkeypatch.setattr(check, "FULL_LRS", (1e-4, 3e-4))
    claim = few_shot_content.RECORD.claims[0]
    few: Any = replace(claim, base=str(masked_base), data=text_data(), seeds=1, epochs=2, shots=4, lrs=(1e-3, 3e-3))
    found = check.heads(few)
    for module, one in found.items():
        assert one["inequality"] == f"{module}-cloze >= {module}-ordinary + 2.0" and one["low"] <= one["high"]
        assert one["arms"].keys() == {*check.ARMS, *check.FULL, "probe", "lora-control", "adapter-control"}
    assert found.keys() == {"lora", "adapter"}
    assert {one["metric"] for one in settings} == {"macro-f1"}
    searched = [one["arm"] for one in settings if one["seed"] == 0]
    assert len(searched) == 2 * (len(check.ARMS) + len(check.FULL))


def test_a_start_on_a_near_task_is_judged_by_its_gain_its_control_and_its_first_stage() -> None:
    labels = np.arange(400) % 2

    def right(share: float, seeds: int = 5) -> Answers:
        draw = np.random.Generator(np.random.PCG64(int(1000 * share)))
        return Answers(labels, np.where(draw.random((seeds, 400)) < share, labels, 1 - labels))

    found = {"fresh": right(0.6), "begun": right(0.8), "control": right(0.55), "probe": right(0.7)}
    one = check.judged_start(found, right(0.85, 1))
    assert one["holds"] is True and one["control"]["destroyed"]
    assert 15 < one["measured"] < 25 and one["low"] < one["measured"] < one["high"]
    unlearned = check.judged_start(found, Answers(labels, np.zeros((1, 400), dtype=int)))
    assert unlearned["holds"] == "set-up invalid"
    assert check.judged_start({**found, "begun": found["fresh"]}, right(0.85, 1))["holds"] is False
    assert not check.judged_start({**found, "control": found["begun"]}, right(0.85, 1))["control"]["destroyed"]


def test_the_check_begins_at_the_bricks_of_the_near_task(
    masked_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms: dict[tuple[str, int], str] = {}

    def here(jobs: Any, workers: int, folder: Path) -> dict[str, Any]:
        for job in jobs:
            setting = job.argument["setting"]
            arms[Path(job.argument["folder"]).name, setting["shots"]] = setting["arm"]
        return {job.key: trial.run(job.argument) for job in jobs}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "finished", here)
    monkeypatch.setattr(check, "STEPS", 3)
    claim = few_shot_content.RECORD.claims[2]
    few: Any = replace(claim, base=str(masked_base), data=text_data(), seeds=1, epochs=2, shots=2, lrs=(1e-3,))
    found = check.pretuned(few, near=text_data(), near_rows=40)
    assert found["inequality"] == "begun >= fresh + 3.0" and found["low"] <= found["high"]
    assert found["arms"].keys() == {"fresh", "begun", "control", "probe"}
    assert {(f"{name}-1", 0) for name in ("near", "noise")} < arms.keys()  # many labels first
    assert "/near-1/brick" in arms["begun-1", 2] and "/noise-1/brick" in arms["control-1", 2]
    assert "pvp" not in arms["fresh-1", 2]
    assert str(tmp_path) not in str(found["arms"])


def test_what_has_no_gap_is_refused(text_base: Path) -> None:
    for pattern in ("{text}", "[MASK]", "[MASK] {text} {text}"):
        with pytest.raises(UsageError, match="once"):
            Config(template=pattern)
    base = open_base(str(text_base))
    if base.tokenizer.mask_token is None:
        with pytest.raises(Refused, match="no mask token"):
            encode(Split({"text": ["a"]}), base, task("a", "b"), template=Template("[MASK] {text}"))
