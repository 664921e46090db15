"""Language models: packing, the loss of documents, the metrics, comparing, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, documents, make_text_base, write_data
from rich.console import Console

import brickyard
from brickyard.checks import run as checks
from brickyard.compare.report import page
from brickyard.compare.table import show
from brickyard.core import build, trial
from brickyard.core.answers import answer
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split, read_data
from brickyard.core.documents import EncodedBlocks
from brickyard.core.errors import BadBase, BadData, Changed, Refused, UsageError
from brickyard.core.generate import Decoding, continuations
from brickyard.core.influence import influence
from brickyard.core.loop import State
from brickyard.core.method import Claim
from brickyard.core.task import Task, task_of
from brickyard.embedded import base_folder

LM = Task("causal-lm", "bits_per_byte", None, 1, "text")
TOKENS = Task("causal-lm", "nats_per_token", None, 1, "text")


def blocks(base: Path, texts: list[str], task: Task = LM, size: int | None = None) -> EncodedBlocks:
    made = encode(Split({"text": texts}), open_base(str(base)), task, max_length=size)
    assert isinstance(made, EncodedBlocks)
    return made


def alone(base: Path, text: str) -> float:
    """Nats of one document by a plain forward pass: the end token, then the text, then the end token as a target."""
    opened = open_base(str(base))
    model = opened.model(LM, seed=0)
    ids = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = opened.tokenizer.eos_token_id
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[end, *ids]])).logits[0].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor([*ids, end]), reduction="sum"))


def test_every_document_is_scored_as_if_it_stood_alone(causal_base: Path) -> None:
    texts = documents()["test"]["text"]
    made = blocks(causal_base, texts)
    found = answer(open_base(str(causal_base)).model(LM, seed=0), made, LM)
    inside = [i for i in range(len(texts)) if len(np.unique(np.nonzero(made.columns["units"] == i)[0])) == 1]
    assert len(inside) > 15  # documents that no block boundary cuts
    np.testing.assert_allclose(found.predictions[inside], [alone(causal_base, texts[i]) for i in inside], rtol=1e-5)


def test_packing_loses_no_token_and_wastes_little(causal_base: Path) -> None:
    texts = documents(train=400)["train"]["text"]
    made = blocks(causal_base, texts)
    opened = open_base(str(causal_base))
    ids = [opened.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    targets = made.columns["targets"]
    expected = [token for row in ids for token in (*row, opened.tokenizer.eos_token_id)]
    assert targets[targets != -100].tolist() == expected
    assert made.report["wasted"] < 0.01 and made.report["documents"] == 400
    assert made.tokens.sum() == len(expected) and made.bytes.tolist() == [len(t.encode()) for t in texts]
    starts = made.columns["positions"] == 0
    assert starts.sum() == 400 + made.report["cut"] + (made.columns["targets"][-1] == -100).any()
    # An input is the target before it, within a document as across a cut.
    flat = made.columns["ids"].ravel()[1:][targets.ravel()[1:] != -100]
    assert (flat == targets.ravel()[:-1][targets.ravel()[1:] != -100]).all()


def test_metrics_are_ratios_of_sums_with_their_influence(causal_base: Path) -> None:
    g = np.random.default_rng(0)
    sizes, nats = g.integers(10, 500, 40), g.uniform(5, 400, (3, 40))
    for task, unit in ((LM, math.log(2)), (TOKENS, 1.0)):
        score, psi = influence(sizes, nats, task.metric)
        np.testing.assert_allclose(score, nats.sum(axis=1) / sizes.sum() / unit)
        np.testing.assert_allclose(task.scores(np.tile(sizes, (3, 1)), nats), score)
        np.testing.assert_allclose(psi.sum(axis=1), 0, atol=1e-9)
        left = np.array([influence(np.delete(sizes, i), np.delete(nats, i, 1), task.metric)[0] for i in range(40)])
        jackknife = 39 / 40 * ((left - left.mean(axis=0)) ** 2).sum(axis=0)
        np.testing.assert_allclose((psi**2).sum(axis=1) / 40**2, jackknife, rtol=0.15)
    made = blocks(causal_base, documents()["test"]["text"], TOKENS)
    assert made.labels.tolist() == made.tokens.tolist()


def test_a_few_long_documents_are_judged_by_their_pieces(causal_base: Path) -> None:
    text = " ".join(documents(train=80)["train"]["text"])
    made = blocks(causal_base, [text], size=16)
    assert made.report["unit"] == "piece of a document" and len(made.labels) == made.report["cut"] + 1 > 20
    assert made.labels.sum() == pytest.approx(len(text.encode())) and made.tokens.sum() == made.report["tokens"]


def test_compare_gives_a_paired_table_with_the_untouched_base(causal_base: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", documents())
    asked = {"task": "causal-lm", "max_length": 32, "device": "cpu"}
    options = {"seeds": 2, "batch": 4, "training": {"epochs": 6}, **asked}
    result = brickyard.compare(
        base=str(causal_base),
        data=str(data),
        methods=["full:lr=1e-2", "lora:lr=1e-2", "linear-probe"],
        out=tmp_path / "run",
        metric="nats_per_token",
        **options,
    )
    rows = {row["arm"]: row for row in result["methods"]}
    assert rows["linear-probe"]["status"] == "refused" and "works on" in rows["linear-probe"]["reason"]
    assert rows["untouched base"]["trivial"] and rows["untouched base"]["score"]["metric"] == "nats_per_token"
    full, lora, bare = (rows[n]["score"]["mean"] for n in ("full:lr=0.01", "lora:lr=0.01", "untouched base"))
    assert full < lora < bare
    assert result["verdict"]["recommended"] == "full:lr=0.01"
    kept = pq.read_table(tmp_path / "run" / rows["untouched base"]["answers"] / "seed0.parquet").to_pydict()
    assert sum(kept["prediction"]) / sum(kept["label"]) == pytest.approx(bare, rel=1e-6)
    assert (tmp_path / "run" / rows["full:lr=0.01"]["brick"] / "brick.json").is_file()
    brick = tmp_path / "run" / rows["full:lr=0.01"]["brick"]
    scored = brickyard.evaluate(brick=brick, data=str(data), metric="nats_per_token", **asked)
    assert min(abs(scored["score"]["mean"] - s) for s in rows["full:lr=0.01"]["score"]["per_seed"]) < 1e-4
    bare_again = brickyard.evaluate(base=str(causal_base), data=str(data), **asked)
    assert bare_again["score"]["metric"] == "bits_per_byte"
    assert bare_again["score"]["nats_per_token"] == pytest.approx(bare, rel=1e-4)


def test_a_comparison_in_bits_per_byte_says_what_they_are_in_nats_per_token(causal_base: Path, tmp_path: Path) -> None:
    data = str(write_data(tmp_path / "data", documents()))
    asked: Any = {"task": "causal-lm", "max_length": 32, "device": "cpu"}
    result = brickyard.compare(
        base=str(causal_base),
        data=data,
        methods=["lora:lr=1e-2"],
        out=tmp_path / "run",
        seeds=1,
        batch=4,
        training={"steps": 6},
        **asked,
    )
    for name, given in (
        ("untouched base", {"base": str(causal_base)}),
        ("lora:lr=0.01", {"brick": tmp_path / "run" / "bricks" / "lora_lr_0.01"}),
    ):
        score = next(row["score"] for row in result["methods"] if row["arm"] == name)
        again = brickyard.evaluate(data=data, **given, **asked)["score"]
        assert score["metric"] == "bits_per_byte" and score["mean"] == pytest.approx(again["mean"], rel=1e-4)
        assert score["nats_per_token"] == pytest.approx(again["nats_per_token"], rel=1e-4)
    told = f"One bit per byte is {result['task']['nats_per_token']:.3f} nats per token"
    console = Console(file=StringIO(), width=120)
    show(result, console)
    assert told in console.file.getvalue() and "nats/token" in console.file.getvalue()  # type: ignore[attr-defined]
    assert told in page(result)


def test_shuffled_targets_say_nothing_of_what_follows_what(causal_base: Path) -> None:
    made, plain = (blocks(causal_base, documents()["train"]["text"], size=32) for _ in range(2))
    before = made.digest
    made.shuffle(0)
    assert made.digest != before and blocks(causal_base, documents()["train"]["text"], size=32).digest == before
    for name in ("ids", "positions", "units"):
        np.testing.assert_array_equal(made.columns[name], plain.columns[name])
    dealt, true = made.columns["targets"], plain.columns["targets"]
    np.testing.assert_array_equal(dealt == -100, true == -100)
    np.testing.assert_array_equal(np.sort(dealt, axis=1), np.sort(true, axis=1))
    assert (dealt == true)[true != -100].mean() < 0.5
    again = blocks(causal_base, documents()["train"]["text"], size=32)
    again.shuffle(0)
    assert again.digest == made.digest


def test_a_claim_on_a_language_model_is_judged_by_gains_over_the_untouched_base(
    causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, columns in documents().items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.txt").write_text("\n\n".join(columns["text"]) + "\n")
    claim = Claim(
        text="t",
        inequality="full >= 0.9 lora",
        arms={"full": "full:lr=1e-2", "lora": "lora:lr=1e-2"},
        control={"what": "w", "arm": "full:lr=1e-2", "labels": "shuffled", "inequality": "full > control + 1.0"},
        gate="full > base + 1.0",
        base=str(causal_base),
        data=str(tmp_path / "data"),
        epochs=6,
        seeds=2,
        batch=4,
        max_length=32,
    )
    found = checks._Run.of("made-up", [claim], lambda event: None).judge(claim)
    assert found["metric"] == "bits_per_byte" and "hundredths of bits per byte" in found["detail"]
    assert found["holds"] is True and found["gate"]["holds"] is True and found["control"]["destroyed"] is True
    full, lora = (found["arms"][name]["mean"] for name in ("full", "lora"))
    bare = full + found["gate"]["measured"] / 100
    assert found["measured"] == pytest.approx(100 * (0.9 * lora + 0.1 * bare - full), abs=1e-3)
    assert found["gains"] == pytest.approx({"full": 100 * (bare - full), "lora": 100 * (bare - lora)}, abs=1e-3)
    assert f"full {found['gains']['full']:.2f}" in found["detail"]


def test_plain_text_files_are_documents(tmp_path: Path, causal_base: Path) -> None:
    text = "\n".join(documents(train=50)["train"]["text"])
    (tmp_path / "train.txt").write_text(text + "\n", encoding="utf-8")
    data = read_data(str(tmp_path), need=("train",))
    assert data.kind == "causal-lm" and task_of(data).metric == "bits_per_byte"
    assert data.splits["train"]["text"][0] + data.splits["validation"]["text"][0] == text + "\n"
    assert data.report["cut"]["from"].startswith("the end")


def test_continuations_are_those_of_one_prompt_alone(causal_base: Path, tmp_path: Path) -> None:
    prompts = [" ".join(WORDS[i % 15 : i % 15 + 2 + i % 5]) for i in range(24)]
    data = {"test": {"text": prompts}}
    asked = Decoding(new_tokens=6)
    brickyard.predict(base=str(causal_base), data=data, out=tmp_path / "out.parquet", decoding=asked, device="cpu")
    found = pq.read_table(tmp_path / "out.parquet")["prediction"].to_pylist()
    with pytest.raises(UsageError, match="cuts no prompt"):
        brickyard.predict(base=str(causal_base), data=data, out=tmp_path / "no.parquet", max_length=8, device="cpu")
    opened = open_base(str(causal_base))
    model, end = opened.model(LM, seed=0), opened.tokenizer.eos_token_id
    for prompt, text in zip(prompts[:6], found[:6], strict=True):
        ids = [end, *opened.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        made: list[int] = []
        while len(made) < 6:
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([[*ids, *made]])).logits[0, -1].argmax())
            if token == end:
                break
            made.append(token)
        assert text == opened.tokenizer.decode(made)
    sampled = [
        continuations(model, opened, prompts[:4], Decoding(new_tokens=8, temperature=1.5, top_p=0.9, seed=s))
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(continuations(model, opened, prompts[:4], Decoding(new_tokens=5, beams=3))) == 4
    with pytest.raises(BadData, match="context of 64"):
        continuations(model, opened, [" ".join(WORDS * 3)], asked)
    for wrong in ({"top_p": 0.5}, {"beams": 2, "temperature": 1.0}, {"new_tokens": 0}):
        with pytest.raises(UsageError):
            Decoding(**wrong)


def test_what_cannot_work_is_refused_before_training(tmp_path: Path, causal_base: Path, text_base: Path) -> None:
    texts = documents()["test"]["text"]
    with pytest.raises(BadData, match="fewer than one block"):
        blocks(causal_base, ["good film"])
    with pytest.raises(Refused, match="causal language model"):
        open_base(str(text_base)).model(LM, seed=0)
    with pytest.raises(UsageError, match="does not fit"):
        read_data({"train": {"text": texts}, "test": {"text": texts[:20]}}, task="causal-lm", metric="accuracy")
    with pytest.raises(BadData, match="50,000,000"):
        read_data({"train": {"text": ["a" * 60_000_000]}}, task="causal-lm", need=("train",))
    small = make_text_base(tmp_path / "small", causal=True)
    (small / "tokenizer.json").write_bytes((base_folder("minilm") / "tokenizer.json").read_bytes())
    with pytest.raises(BadBase, match="another model"):
        blocks(small, texts)


def test_one_endless_line_and_mixed_encodings_are_refused_by_name(tmp_path: Path) -> None:
    endless = tmp_path / "endless" / "train.txt"
    endless.parent.mkdir()
    with endless.open("wb") as file:
        for _ in range(51):
            file.write(b"word " * 200_000)
    with pytest.raises(BadData, match=r"50,000,000.*(split|cut|shorter|lines)"):
        read_data(str(endless.parent), task="causal-lm", need=("train",))
    mixed = tmp_path / "mixed" / "train.txt"
    mixed.parent.mkdir()
    mixed.write_bytes("na\u00efve\n".encode() * 3 + "na\u00efve\n".encode("latin-1"))
    with pytest.raises(BadData, match=r"train\.txt is not valid UTF-8: .*line 4"):
        read_data(str(mixed.parent), task="causal-lm", need=("train",))


def test_a_run_does_not_go_on_with_another_tokenizer(causal_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(causal_base, base)
    training = {"steps": 8, "batch": 2}
    setting = {"data": documents(), "task": "causal-lm", "training": training, "device": "cpu", "max_length": 32}

    class Stop:
        def before_step(self, state: State) -> None:
            if state.step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        brickyard.tune("lora", base=str(base), out=tmp_path / "run", checkpoint_every=2, callbacks=[Stop()], **setting)
    file = base / "tokenizer.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    words = known["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    file.write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(Changed):
        brickyard.tune("lora", base=str(base), out=tmp_path / "run", checkpoint_every=2, **setting)


def test_long_blocks_make_smaller_batches_where_nobody_says_how_many(causal_base: Path, tmp_path: Path) -> None:
    data = str(write_data(tmp_path / "d", documents(train=200)))
    given = {"base": str(causal_base), "data": data, "device": "cpu", "task": "causal-lm"}
    ready = trial.prepare(trial.Setting(arm="full", max_length=16, **given))
    assert ready.training.batch == 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BLOCK_TOKENS", 64)
        assert trial.prepare(trial.Setting(arm="full", max_length=16, **given)).training.batch == 4
        assert trial.prepare(trial.Setting(arm="full:batch=7", max_length=16, **given)).training.batch == 7
        assert trial.prepare(trial.Setting(arm="full", max_length=16, batch=9, **given)).training.batch == 9
