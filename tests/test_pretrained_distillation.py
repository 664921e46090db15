"""The recipe: pre-train small, distil on unlabelled text, fine-tune; and the students that it builds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, Here, documents, make_text_base, text_data, write_data
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, Qwen3Config

from brickyard import api
from brickyard.checks import _place
from brickyard.checks import distil as distil_check
from brickyard.checks import pretrained_distillation as check
from brickyard.cli import main, parse
from brickyard.core import loop, masked, registry
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import read_data
from brickyard.core.errors import BadData, Changed, Refused, UsageError, WrongBase
from brickyard.core.states import LIMIT_VARIABLE
from brickyard.core.task import task_of
from brickyard.shrink import _student
from brickyard.shrink import pretrained_distillation as recipe

SHAPE = "pretrained-distillation:layers=1,width=16,heads=2"
STEPS = "pretrain_steps=6,distil_steps=8,tune_steps=4"


@pytest.fixture(scope="module")
def masked_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small encoder with a mask token in its vocabulary."""
    folder = make_text_base(tmp_path_factory.mktemp("masked"))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def brick(masked_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher on that encoder."""
    training = {"epochs": 8, "batch": 16, "lr": 3e-3}
    folder = tmp_path_factory.mktemp("teacher")
    _, result = api.tune("full", base=str(masked_base), data=text_data(), out=folder, training=training, **RUN)
    assert result["score"]["mean"] > 0.9
    return folder / "brick"


RUN = {"dtype": "float32", "device": "cpu"}


def shrink(arm: str, base: Path, out: Path, **options: object) -> dict:
    given = {"data": text_data(), **RUN, "batch": 16, **options}
    return api.shrink(arm, base=str(base), out=out, **given)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_fifteen_in_a_hundred_tokens_are_hidden_and_special_ones_never(masked_base: Path) -> None:
    base, data = open_base(str(masked_base)), read_data(text_data(train=4000))
    rows = encode(data.splits["train"], base, task_of(data))
    hidden = masked.MaskedRows(rows, base.tokenizer, 0.15)
    torch.manual_seed(0)
    index = np.arange(4000)
    before, batch = rows.collate(index)["input_ids"], hidden.collate(index)
    special = torch.isin(before, torch.tensor(base.tokenizer.all_special_ids))
    chosen = batch["labels"] != -100
    assert not (chosen & special).any() and torch.equal(batch["labels"][chosen], before[chosen])
    assert torch.equal(batch["input_ids"][~chosen], before[~chosen])
    assert chosen.sum() / (~special).sum() == pytest.approx(0.15, abs=0.01)
    after = batch["input_ids"][chosen]
    kinds = [
        float((after == base.tokenizer.mask_token_id).float().mean()),
        float((after == before[chosen]).float().mean()),
    ]
    # A random token is the mask or the token itself once in a vocabulary.
    v = len(base.tokenizer)
    assert kinds[0] == pytest.approx(0.8 + 0.1 / v, abs=0.02) and kinds[1] == pytest.approx(0.1 + 0.1 / v, abs=0.02)


def test_only_hidden_tokens_count_and_only_their_logits_are_made(masked_base: Path, tmp_path: Path) -> None:
    base = open_base(str(masked_base))
    _student.write_student(tmp_path / "s", base, _student.scaled_config(base.config, 1, 16, 2, 64), base.tokenizer, 0)
    model = open_base(str(tmp_path / "s")).masked_model()
    batch = {"input_ids": torch.randint(4, 27, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    batch["labels"] = torch.full((3, 7), -100)
    batch["labels"][0, 2], batch["labels"][2, 6] = 5, 9
    whole = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    torch.testing.assert_close(masked.hidden_logits(model, batch), whole[[0, 2], [2, 6]])
    expected = F.cross_entropy(whole.flatten(0, 1), batch["labels"].flatten())
    assert masked.masked_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(**{k: v for k, v in batch.items() if k != "labels"}).logits.shape == whole.shape  # the hook is gone
    assert masked.masked_loss(model, {**batch, "labels": torch.full((3, 7), -100)}).item() == 0
    masked.check_hidden(model, batch)
    mixed = model.cls.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(1, keepdim=True),))
    with pytest.raises(Refused, match="each token by itself"):
        masked.check_hidden(model, batch)
    mixed.remove()


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128),
        DistilBertConfig(vocab_size=50, dim=64, n_layers=4, n_heads=4, hidden_dim=128),
        GPT2Config(vocab_size=50, n_embd=64, n_layer=4, n_head=4),
        LlamaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
        Qwen3Config(vocab_size=50, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=32),
    ],
    ids=lambda c: c.model_type,
)
def test_a_student_is_a_smaller_network_of_the_same_class(config: object) -> None:
    small = _student.scaled_config(config, 2, 32, 2, 96)  # type: ignore[arg-type]
    assert type(small) is type(config)
    model = AutoModel.from_config(small)
    assert len(_student.blocks(model)) == 2
    out = model(input_ids=torch.arange(6)[None]).last_hidden_state
    assert out.shape == (1, 6, 32)
    whole = AutoModel.from_config(config)
    assert type(_student.blocks(model)[0][1]) is type(_student.blocks(whole)[0][1])
    assert sum(p.numel() for p in model.parameters()) < 0.5 * sum(p.numel() for p in whole.parameters())
    with pytest.raises(Refused, match="deeper than its base"):
        _student.scaled_config(config, 5, 32, 2, 96)  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", [None, 256])
def test_a_width_of_the_feed_forward_part_that_is_not_said_is_set_too(inner: int | None) -> None:
    config = GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=2, n_inner=inner)
    small = _student.scaled_config(config, 1, 32, 2, 48)
    assert small.n_inner == 48 and config.n_inner == inner
    (_, block), *_ = _student.blocks(AutoModel.from_config(small))
    assert block.mlp.c_fc.weight.shape == (32, 48)


def test_nothing_of_the_teacher_is_taken_over(masked_base: Path, tmp_path: Path) -> None:
    """With the base's own sizes the student still is a new network, drawn from the seed alone."""
    base = open_base(str(masked_base))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _student.write_student(tmp_path / name, base, base.config, base.tokenizer, seed)
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")
    old, new = weights(masked_base), weights(tmp_path / "a")
    shared = [k for k in old if f"bert.{k}" in new and old[k].std() > 0]
    assert len(shared) > 10 and not any(torch.equal(old[k], new[f"bert.{k}"]) for k in shared)


def test_a_cut_vocabulary_must_still_know_the_text(masked_base: Path, tmp_path: Path) -> None:
    base = open_base(str(masked_base))
    texts = [" ".join(WORDS[:12])] * 50
    tokenizer, unknown = _student.cut_vocabulary(base, texts, 20)
    assert len(tokenizer) <= 20 and unknown == 0 and tokenizer.mask_token == "[MASK]"
    _student.write_student(tmp_path / "s", base, base.config, tokenizer, 0)
    made = open_base(str(tmp_path / "s"))
    assert made.config.vocab_size == len(tokenizer) and made.tokenizer.pad_token_id == made.config.pad_token_id
    with pytest.raises(BadData, match=r"above the limit of 0.5%.*Raise vocabulary"):
        _student.cut_vocabulary(base, [*texts, " ".join(WORDS)], 15)
    with pytest.raises(UsageError, match="is no cut"):
        _student.cut_vocabulary(base, texts, 5000)


def test_a_student_is_a_complete_model(masked_base: Path, brick: Path, tmp_path: Path) -> None:
    arm = f"{SHAPE},pretrain_steps=20,distil_steps=150,tune_steps=20,distil_lr=5e-3"
    report = shrink(arm, masked_base, tmp_path / "run", bricks=[brick])
    assert {name: stage["steps"] for name, stage in report["stages"].items()} == {
        "pretrain": 20,
        "distil": 150,
        "tune": 20,
    }
    assert report["steps"] == 190 and report["stages"]["tune"]["tokens"] == 20 * 16 * 9
    assert report["stages"]["distil"]["teacher_accuracy"] > 0.9 and report["score"]["mean"] > 0.8
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == {
        k: v for k, v in report.items() if k != "model"
    }
    model = Path(report["model"])
    assert not (model / "report.json").exists()
    scored = api.evaluate(base=str(model), data=text_data(), dtype="float32", device="cpu")["score"]
    assert scored["mean"] == report["score"]["mean"]
    api.predict(base=str(model), data=text_data(), out=tmp_path / "p.parquet", dtype="float32", device="cpu")
    _, tuned = api.tune(
        "lora:r=2", base=str(model), data=text_data(), out=tmp_path / "again", training={"epochs": 1}, **RUN
    )
    assert tuned["receipt"]["moved"]


@pytest.mark.parametrize("stop", [3, 6, 9, 15])
def test_an_interrupted_recipe_goes_on_bit_for_bit(
    stop: int, masked_base: Path, brick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"bricks": [brick], "checkpoint_every": 2}
    shrink(f"{SHAPE},{STEPS}", masked_base, tmp_path / "whole", **options)
    inner, done = loop.Backprop.__call__, []

    def step(self: loop.Backprop, state: loop.State, batches: list) -> float:
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(1)
        return inner(self, state, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Backprop, "__call__", step)
        shrink(f"{SHAPE},{STEPS}", masked_base, tmp_path / "cut", **options)
    with pytest.raises(Changed, match="tune_steps"):
        shrink(f"{SHAPE},{STEPS}1", masked_base, tmp_path / "cut", **options)
    report = shrink(f"{SHAPE},{STEPS}", masked_base, tmp_path / "cut", **options)
    assert same(tmp_path / "whole" / "student", tmp_path / "cut" / "student")
    assert report["tokens"] == json.loads((tmp_path / "whole" / "report.json").read_text())["tokens"]


def test_the_labels_of_the_unlabelled_text_change_nothing(masked_base: Path, brick: Path, tmp_path: Path) -> None:
    """Stages 1 and 2 give the same bits whatever labels stand beside their text."""
    data = text_data()
    flipped = {**data, "train": {**data["train"], "label": list(data["train"]["label"])}}
    for i in range(0, 20, 2):
        pair = flipped["train"]["label"][i : i + 2]
        flipped["train"]["label"][i : i + 2] = pair[::-1]
    arm = f"{SHAPE},pretrain_steps=3,distil_steps=5,tune_steps=0"
    for name, given in (("a", data), ("b", flipped)):
        shrink(arm, masked_base, tmp_path / name, bricks=[brick], data=given, text=given)
    assert same(tmp_path / "a" / "student", tmp_path / "b" / "student")


@pytest.mark.filterwarnings("ignore:the teacher's answers")
def test_streamed_answers_are_checked_and_teach_what_kept_ones_do(
    masked_base: Path, brick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, found = f"{SHAPE},pretrain_steps=0,distil_steps=4,tune_steps=0", {}
    for name, limit in (("kept", ""), ("streamed", "64")):
        monkeypatch.setenv(LIMIT_VARIABLE, limit)
        found[name] = shrink(arm, masked_base, tmp_path / name, bricks=[brick])["stages"]["distil"]
        assert found[name]["teacher_streamed"] == (name == "streamed")
    assert found["kept"]["teacher_accuracy"] == found["streamed"]["teacher_accuracy"] > 0.9
    left, right = (weights(tmp_path / name / "student") for name in found)
    for key in left:
        torch.testing.assert_close(left[key], right[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("limit", ["", "64"], ids=["kept", "streamed"])
@pytest.mark.filterwarnings("ignore:the teacher's answers")
def test_a_teacher_near_chance_is_refused_before_stage_one(
    limit: str, masked_base: Path, brick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, limit)
    swapped = text_data()
    swapped["train"]["label"] = [{"good": "bad", "bad": "good"}[label] for label in swapped["train"]["label"]]
    with pytest.raises(Refused, match="another order than the labels"):
        shrink(f"{SHAPE},{STEPS}", masked_base, tmp_path, bricks=[brick], data=swapped)
    assert not (tmp_path / "stages").exists()
    shrink(f"{SHAPE},{STEPS}", masked_base, tmp_path, bricks=[brick])  # the folder is free for one that knows its task


def test_few_test_rows_give_a_mean_without_an_interval(
    masked_base: Path, brick: Path, causal_base: Path, tmp_path: Path
) -> None:
    report = shrink(f"{SHAPE},{STEPS}", masked_base, tmp_path / "a", bricks=[brick], data=text_data(test=12))
    score = report["score"]
    assert score["low"] is None and score["high"] is None and "12 test examples are too few" in score["note"]
    assert score["mean"] in [n / 12 for n in range(13)]
    assert json.loads((tmp_path / "a" / "report.json").read_text())["score"] == score
    open_base(report["model"]).model(open_base(report["model"]).own_task, seed=0, stored_head=True)
    arm = f"{SHAPE},pretrain_steps=2,distil_steps=0,tune_steps=0"
    report = shrink(arm, causal_base, tmp_path / "b", data=documents(test=5), batch=4, max_length=32)
    assert 0 < report["score"]["mean"] < 10 and "7 test examples" in report["score"]["note"]  # pieces of 5 documents


def test_a_score_that_fails_does_not_cost_the_student(
    masked_base: Path, brick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise BadData("no score")

    arm = f"{SHAPE},pretrain_steps=0,distil_steps=0,tune_steps=2"
    with monkeypatch.context() as patch, pytest.raises(BadData, match="no score"):
        patch.setattr(recipe, "answer", fail)
        shrink(arm, masked_base, tmp_path, bricks=[brick])
    assert same(tmp_path / "student", tmp_path / "stages" / "tune") and not (tmp_path / "report.json").exists()
    assert shrink(arm, masked_base, tmp_path, bricks=[brick])["score"]["mean"] > 0


def test_every_arm_of_the_paper_runs_and_may_start_from_an_earlier_stage(
    masked_base: Path, brick: Path, tmp_path: Path
) -> None:
    pre = shrink(f"{SHAPE},pretrain_steps=4,distil_steps=0,tune_steps=0", masked_base, tmp_path / "pre")
    assert "score" not in pre and pre["student"]["layers"] == 1
    start = tmp_path / "pre" / "stages" / "pretrain"
    found = {}
    for name, soft, hard, student in (("F", 0, 6, ""), ("D", 6, 0, ""), ("PF", 0, 6, start), ("PD+F", 4, 2, start)):
        more = f',student="{student}"' if student else ""
        arm = f"{SHAPE},pretrain_steps=0,distil_steps={soft},tune_steps={hard}{more}"
        report = shrink(arm, masked_base, tmp_path / name, bricks=[brick])
        assert list(report["stages"]) == [s for s, n in (("distil", soft), ("tune", hard)) if n] and "score" in report
        found[name] = weights(tmp_path / name / "student")
    assert not torch.equal(found["F"]["classifier.weight"], found["D"]["classifier.weight"])


def test_stage_three_goes_on_with_the_head_of_stage_two(masked_base: Path, brick: Path, tmp_path: Path) -> None:
    arm = f"{SHAPE},pretrain_steps=0,distil_steps=6,tune_steps=1,tune_lr=1e-9"
    shrink(arm, masked_base, tmp_path, bricks=[brick])
    two, three = weights(tmp_path / "stages" / "distil"), weights(tmp_path / "student")
    torch.testing.assert_close(two["classifier.weight"], three["classifier.weight"], atol=1e-7, rtol=0)


def test_a_language_models_student_learns_its_teachers_tokens(causal_base: Path, tmp_path: Path) -> None:
    arm = f"{SHAPE},pretrain_steps=4,distil_steps=6,tune_steps=2,k=5"
    report = shrink(
        arm, causal_base, tmp_path / "run", data=documents(), text=documents(train=20), batch=4, max_length=32
    )
    assert report["score"]["metric"] == "nats_per_token" and report["text_rows"] == 80
    assert 0 < report["stages"]["distil"]["teacher_kept_mass"] < 1
    found = api.evaluate(base=report["model"], data=documents(), task="causal-lm", max_length=32, **RUN)
    assert found["score"]["nats_per_token"] == pytest.approx(report["score"]["mean"], rel=1e-4)


def test_what_does_not_fit_is_refused_before_training(
    masked_base: Path, text_base: Path, brick: Path, causal_base: Path, tmp_path: Path
) -> None:
    arm = f"{SHAPE},{STEPS}"
    with pytest.raises(Refused, match="no mask token"):
        shrink(f"{SHAPE},pretrain_steps=2,distil_steps=0", text_base, tmp_path / "a")
    with pytest.raises(WrongBase, match="was made for base"):
        shrink(arm, text_base, tmp_path / "b", bricks=[brick])
    with pytest.raises(UsageError, match="one teacher"):
        shrink(arm, masked_base, tmp_path / "c", bricks=[brick, brick])
    with pytest.raises(Refused, match="leave vocabulary out"):
        shrink(f"{arm},vocabulary=10", causal_base, tmp_path / "d", data=documents())
    with pytest.raises(BadData, match="unlabelled text holds pair"):
        shrink(arm, masked_base, tmp_path / "e", bricks=[brick], text=text_data(pair=True))
    for options in (
        "width=30,heads=4",
        "pretrain_steps=0,distil_steps=0,tune_steps=0",
        "mask=0.0",
        "k=0",
        "temperature=0.0",
        "temperature=-1.0",
        'student="x",vocabulary=9',
    ):
        with pytest.raises(UsageError, match="pretrained-distillation"):
            registry.config("pretrained-distillation", parse_options(options))
    with pytest.raises(UsageError, match="whose own options"):
        shrink(f"{SHAPE},lr=1e-3", masked_base, tmp_path / "f")


def parse_options(text: str) -> dict:
    from brickyard.core.arm import parse as parse_arm

    return parse_arm(f"pretrained-distillation:{text}").pieces[0].options


def test_the_command(masked_base: Path, brick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", text_data())
    argv = [
        "shrink",
        "pretrained-distillation",
        "--base",
        str(masked_base),
        "--bricks",
        str(brick),
        "--data",
        str(data),
    ]
    argv += ["--layers", "1", "--width", "16", "--heads", "2", "--pretrain-steps", "2", "--distil-steps", "3"]
    argv += ["--tune-steps", "1", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "out")]
    assert parse(argv).arm.endswith("tune_steps=1,width=16")
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "distil" in said and "test accuracy" in said and str(tmp_path / "out" / "student") in said
    assert main([*argv, "--widht", "3"]) == 2
    assert "--widht" in capsys.readouterr().err


def test_the_checks_run_from_end_to_end(masked_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = registry.find("pretrained-distillation").record.claims[0]
    claim = replace(first, base=str(masked_base), data=str(write_data(tmp_path / "t", text_data(train=200))), seeds=2)
    monkeypatch.setattr(_place, "Local", Here)
    sizes = {"steps": 6, "pretrain": 2, "tune": 2, "labelled": 120, "teacher_steps": 80, "layers": 1, "width": 16}
    found = check.compound(replace(claim, train_rows=130), heads=2, vocabulary=0, batch=8, teacher_lr=3e-3, **sizes)
    arms = {"F", "PF", "D", "D+F", "PD", "PD+F", "control", "teacher", "majority", "PD-130", "PD-520"}
    assert set(found["arms"]) == arms and "PD-520 >= PD-130" in found["figures"]
    assert found["holds"] in (True, False, "undecided", "set-up invalid")
    assert found["measured"] == next(iter(found["figures"].values()))["measured"]
    assert {"low", "high", "detail", "gate", "control"} <= found.keys() and len(found["arms"]["PD"]["per_seed"]) == 2


def test_the_language_models_checks_run_from_end_to_end(
    causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    second = registry.find("pretrained-distillation").record.claims[1]
    data = str(write_data(tmp_path / "d", documents()))
    claim = replace(second, base=str(causal_base), data=data, seeds=2, max_length=32)
    monkeypatch.setattr(_place, "Local", Here)
    found = check.language_model(claim, steps=6, pretrain=3, batch=4, k=4, teacher_steps=2, teacher_lr=1e-5)
    assert set(found["arms"]) == {"F", "D", "PF", "PD", "control", "teacher", "base"}
    assert found["holds"] == "set-up invalid"  # this teacher has hardly been trained
    taught = distil_check.soft_labels(claim, steps=4, batch=4, k=4, teacher_steps=20, teacher_lr=1e-2)["arms"]
    assert set(taught) == {"F", "D", "control", "teacher", "base"}
    assert taught["teacher"]["mean"] < taught["base"]["mean"]  # tuned on the text of the students
