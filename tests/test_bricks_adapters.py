"""Plain PEFT adapters in the table of bricks: listed where they fit, scored as bricks are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import documents, make_text_base, text_data
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import brickyard
from brickyard import api
from brickyard.bricks.adapters import KIND, installed
from brickyard.bricks.scores import Course
from brickyard.cli import main
from brickyard.core import brick as bricks
from brickyard.core.adapted import head_width, model_class, open_model, read_adapter
from brickyard.core.base import open_base
from brickyard.core.export import export

CPU = torch.device("cpu")


def save(base: Path, auto: Any, config: Any, folder: Path, move: float = 0.3) -> Path:
    """Write an adapter by PEFT alone, with values as a training leaves them."""
    model = peft.get_peft_model(auto.from_pretrained(base), config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=move)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, causal_base: Path, text_base: Path) -> Path:
    """Adapters of a language model and of an encoder, in one folder."""
    made = tmp_path_factory.mktemp("adapters")
    lm: Any = {"task_type": "CAUSAL_LM"}
    save(causal_base, AutoModelForCausalLM, peft.LoraConfig(r=4, **lm), made / "lora")
    save(causal_base, AutoModelForCausalLM, peft.IA3Config(**lm), made / "ia3")
    save(causal_base, AutoModelForCausalLM, peft.PromptTuningConfig(num_virtual_tokens=3, **lm), made / "prompt")
    save(text_base, AutoModelForSequenceClassification, peft.LoraConfig(r=2, task_type="SEQ_CLS"), made / "encoder")
    return made


def named(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {Path(row["folder"]).name: row for row in rows}


def test_adapters_are_listed_with_the_base_that_they_fit(folder: Path, causal_base: Path, text_base: Path) -> None:
    on_language_model = named(api.bricks_in(folder, str(causal_base)))
    assert set(on_language_model) == {"lora", "ia3", "prompt"} and set(
        named(api.bricks_in(folder, str(text_base)))
    ) == {"encoder"}
    lora = on_language_model["lora"]
    assert (lora["kind"], lora["arm"], lora["made_for"]) == (KIND, "LORA r=4", str(causal_base))
    stored = read_adapter(folder / "lora").tensors
    assert lora["cost"]["trainable_parameters"] == sum(t.numel() for t in stored.values()) > 0
    assert len(lora["attach_points"]) == len(stored) // 2 and all("_proj" in name for name in lora["attach_points"])


def test_an_adapter_whose_shapes_are_another_bases_is_not_listed(folder: Path, tmp_path: Path) -> None:
    deeper = make_text_base(tmp_path / "deeper", layers=3, causal=True)
    assert set(named(api.bricks_in(folder, str(deeper)))) == {"lora", "ia3", "prompt"}  # its layers 0 and 1 fit
    shallow = make_text_base(tmp_path / "shallow", layers=1, causal=True)
    assert set(named(api.bricks_in(folder, str(shallow)))) == {"prompt"}  # which has no layer at all


def test_a_damaged_adapter_is_none(folder: Path, causal_base: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "cut" / name).write_bytes((folder / "lora" / name).read_bytes()[:-8])
    left_out: dict[str, str] = {}
    assert not api.bricks_in(tmp_path, str(causal_base), left_out=left_out)
    assert list(left_out) == [str(tmp_path / "cut")] and left_out[str(tmp_path / "cut")]


def test_one_unsafe_adapter_does_not_hide_the_others(
    folder: Path, causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "lora", tmp_path / "good")
    shutil.copytree(folder / "lora", tmp_path / "a-bad")
    config = tmp_path / "a-bad" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"megatron_config": {"x": 1}}))
    assert set(named(api.bricks_in(tmp_path, str(causal_base)))) == {"good"}
    assert main(["bricks", str(causal_base), "--in", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert f"left out {tmp_path / 'a-bad'}: " in said.err and "megatron_config" in said.err and "good" in said.out


def test_an_exported_adapter_scores_as_its_brick(causal_base: Path, tmp_path: Path) -> None:
    given: Any = {"base": str(causal_base), "data": documents(), "device": "cpu", "task": "causal-lm", "cache": False}
    training = {"steps": 30, "lr": 0.05, "precision": "float32", "batch": 4}
    brickyard.tune("lora:r=4", out=tmp_path / "run", training=training, **given)
    export(tmp_path / "run" / "brick", "peft", tmp_path / "plain")
    rows = named(api.bricks_in(tmp_path, str(causal_base), data=[documents()], device="cpu"))
    assert rows["plain"]["kind"] == KIND and rows["brick"]["kind"] == "adapter"
    own, plain = rows["brick"]["on"][0], rows["plain"]["on"][0]
    assert own["verdict"] == plain["verdict"] == "improves"
    assert plain["brick"] == pytest.approx(own["brick"], abs=1e-6) and plain["brick"] != own["base"]


def test_a_classifier_s_adapter_is_read_through_the_base_s_head(folder: Path, text_base: Path) -> None:
    base = open_base(str(text_base))
    (adapter,) = installed(folder, base)
    course = Course(text_data(), base, CPU, 60, None)
    said = course.answers(adapter)
    assert not np.array_equal(said, course.answers(None))
    # PEFT's own model, its backbone under the same head
    auto = model_class(base, adapter.stored)
    plain, _ = open_model(auto, base, head_width(auto, base, adapter.stored))
    theirs: Any = peft.PeftModel.from_pretrained(plain, folder / "encoder").eval()
    inputs = {k: v for k, v in course.test.collate(np.arange(60)).items() if k != "labels"}
    with torch.no_grad():
        states = theirs.get_base_model().bert(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
        expected = (pooled @ course.head.weight_KD.T + course.head.bias_K).argmax(-1)
    assert np.array_equal(said, expected.numpy())


def test_trained_tokens_before_the_text_are_not_scored_as_the_bare_base(
    folder: Path, causal_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = named(api.bricks_in(folder, str(causal_base), data=[documents()], device="cpu"))
    entry = rows["prompt"]["on"][0]
    assert entry["verdict"] == "not scored" and "trained tokens before the text" in entry["why"]
    assert {rows[name]["on"][0]["verdict"] for name in ("lora", "ia3")} <= {"damages", "improves", "undecided"}
    assert main(["bricks", str(causal_base), "--in", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"LORA r=4, {KIND}" in said and f"names {causal_base} as its base" in said
    assert main(["bricks", str(causal_base), "--in", str(folder), "--json"]) == 0
    assert {row["kind"] for row in json.loads(capsys.readouterr().out)} == {KIND}


def test_a_brick_that_is_a_peft_adapter_too_is_listed_once(causal_base: Path, tmp_path: Path) -> None:
    given: Any = {"base": str(causal_base), "data": documents(), "device": "cpu", "task": "causal-lm"}
    brickyard.tune("lora:r=2", out=tmp_path, training={"steps": 4}, **given)
    assert (tmp_path / "brick" / "adapter_config.json").is_file()
    assert [row["kind"] for row in api.bricks_in(tmp_path, str(causal_base))] == ["adapter"]
    assert len(bricks.installed(tmp_path, open_base(str(causal_base)).fingerprint)) == 1
