"""model-assembling as a user runs it: the model folder, exact resume, parts side by side, one part, other trainers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Here, documents, image_data, make_text_base, text_data, write_data
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from brickyard.cli import main
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.base import open_base
from brickyard.core.errors import Changed
from brickyard.core.files import read_tensors
from brickyard.core.loop import State, train
from brickyard.core.task import Task
from brickyard.core.trial import Prepared, Setting, prepare
from brickyard.grow import _assembling_run
from brickyard.grow._assembling_parts import Shard, meta, meta_shard, train_part
from brickyard.grow._assembling_plan import plan, tensors_of
from brickyard.grow.model_assembling import Config, assembly
from brickyard.growing import grow

COMMON = ["--dtype", "float32", "--device", "cpu", "--batch-size", "8", "--threads", "1"]


class Interrupt(Exception):
    pass


class StopAt:
    """Stops at a step of the n-th training of a run."""

    def __init__(self, training: int, step: int) -> None:
        self.training, self.step = training, step

    def begin(self, state: State) -> None:
        self.training -= 1

    def after_step(self, state: State) -> None:
        if self.training == 0 and state.step + 1 == self.step:
            raise Interrupt


class Told:
    def __init__(self) -> None:
        self.trainings, self.said = 0, []  # type: ignore[var-annotated]

    def begin(self, state: State) -> None:
        self.trainings += 1

    def phase(self, said: str) -> None:
        self.said.append(said)


@pytest.fixture(scope="module")
def deep_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep-vit")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    source = Path(__file__).parent.parent / "brickyard" / "embedded" / "tiny_vit" / "preprocessor_config.json"
    text = source.read_text(encoding="utf-8").replace("32", "16")
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder


def ready_of(base: Path, data: Any, **changes: Any) -> Prepared:
    training = {"steps": 40, "lr": 3e-3, "wd": 0.05, "schedule": "cosine"}
    return prepare(Setting(arm="full", base=str(base), data=data, batch=8, training=training, **changes))


def test_the_command_leaves_a_model_that_transformers_loads(
    deep_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_data(tmp_path / "data", image_data()), tmp_path / "out"
    argv = ["grow", "model-assembling:parts=2,lr=3e-3", "--base", str(deep_vit), "--data", str(data), *COMMON]
    assert main([*argv, "--steps", "60", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for words in (
        "2 parts of 2 blocks in a meta network of 2",
        "part 2: 9 steps",
        "parts (longest",
        "2 x 9",
        "140 block-steps together, 58.3% of the 240",
        "a part trains at most",
        "mean / std",
        "test accuracy: meta network",
    ):
        assert words in said, (words, said)
    assert not (tmp_path / "out.training").exists()
    model, about = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(about[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    task = Task("image-classification", "accuracy", ("bottom", "top"), 2, "image")
    plain = open_base(str(deep_vit)).model(task, seed=0)
    assert list(model.state_dict()) == list(plain.state_dict()) and model.config.id2label == {0: "bottom", 1: "top"}
    known = json.loads((out / "model_assembling.json").read_text())
    assert known["steps"] == {"pretrain": 28, "incubate": 9, "tune": 9, "end_to_end": 60}
    # By hand: 2 x 28; of the hybrids 2 + 1 and 2 + 1/3 blocks x 9; 4 x 9.
    spent = known["block_steps"]
    assert spent["pretrain"] == 56 and spent["incubate"] == pytest.approx(48) and spent["tune"] == 36
    assert spent["total"] == pytest.approx(140) and spent["end_to_end"] == 240
    assert [len(known["interfaces"][name]) for name in ("meta", "assembled", "tuned")] == [2, 2, 2]
    assert known["scores"]["tuned"]["mean"] == known["score"]["mean"]
    assert [phase["steps"] for phase in known["phases"]["incubate"]] == [9, 9]
    # The same score from the folder alone.
    assert main(["evaluate", "--base", str(out), "--data", str(data), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["score"]["mean"] == pytest.approx(known["score"]["mean"])

    for arm, words in (
        ("model-assembling:parts=3", ["4 blocks cannot be cut into 3", "splits=[2,1,1]"]),
        ("model-assembling:parts=2,splits=[1,2]", ["adds up to 3", "has 4"]),
        ("model-assembling:partz=2", ["partz", "parts"]),
        ("model-assembling:parts=2,budget=0.01", ["more --steps"]),
    ):
        assert main(["grow", arm, *argv[2:], "--steps", "60", "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("brickyard: ") and all(word in error for word in words), error
        assert not (tmp_path / "no").exists()


def test_a_language_model_with_tied_embeddings_is_grown_too(tmp_path: Path) -> None:
    base = make_text_base(tmp_path / "base", layers=2, causal=True)
    told = Told()
    known = grow(
        "model-assembling:parts=2,lr=1e-2",
        base=str(base),
        data=documents(),
        out=tmp_path / "out",
        task="causal-lm",
        max_length=16,
        batch=8,
        device="cpu",
        dtype="float32",
        threads=1,
        training={"steps": 60},
        callbacks=[told],
    )
    assert known["plan"]["shared"] == ["model.embed_tokens.weight"] and "frozen" in told.said[0]
    assert told.trainings == 4 and len(told.said) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.use_cache
    stored = read_tensors(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    losses = [known["scores"][name]["mean"] for name in ("meta", "tuned")]
    assert max(losses) < known["phases"]["pretrain"]["history"][0]["validation_score"] + 1e-6


def asked(base: Path) -> dict[str, Any]:
    shared: dict[str, Any] = {"base": str(base), "data": image_data(), "batch": 8, "device": "cpu", "threads": 1}
    return {**shared, "dtype": "float32", "training": {"steps": 48}, "checkpoint_every": 4, "seed": 3}


@pytest.fixture(scope="module")
def uninterrupted(deep_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    grow("model-assembling:parts=2,lr=3e-3", out=out, **asked(deep_vit))
    return out


@pytest.mark.parametrize(("training", "step", "left"), [(1, 12, 4), (3, 6, 2), (4, 5, 1)])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    training: int, step: int, left: int, deep_vit: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    arm = "model-assembling:parts=2,lr=3e-3"
    with pytest.raises(Interrupt):
        grow(arm, out=tmp_path / "cut", callbacks=[StopAt(training, step)], **asked(deep_vit))
    assert not (tmp_path / "cut").exists()
    work = tmp_path / "cut.training" / "checkpoints"
    name = {1: "meta", 3: "part-2", 4: "tune"}[training]
    assert [p.name for p in (work / "steps" / name).iterdir()] == ["step-" + ("8" if training == 1 else "4")]
    with pytest.raises(Changed, match="lr"):
        grow("model-assembling:parts=2,lr=1e-3", out=tmp_path / "cut", **asked(deep_vit))
    # Validation rows choose the weights of the meta network, which the parts are trained in.
    fewer = image_data()
    fewer["validation"] = {name: column[:20] for name, column in fewer["validation"].items()}
    with pytest.raises(Changed, match="validation"):
        grow(arm, out=tmp_path / "cut", **{**asked(deep_vit), "data": fewer})
    told = Told()
    grow(arm, out=tmp_path / "cut", callbacks=[told], **asked(deep_vit))
    assert told.trainings == left  # what was finished is not trained again
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (uninterrupted / file).read_bytes()


class Elsewhere(Here):
    """Jobs whose argument went through JSON, as to another machine."""

    def run(self, jobs: Iterable[Any]) -> Iterator[Any]:
        yield from super().run([replace(job, argument=json.loads(json.dumps(job.argument))) for job in jobs])


def test_parts_give_the_same_bits_alone_in_any_order_and_as_jobs(
    deep_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_assembling_run, "Local", Elsewhere)
    data = str(write_data(tmp_path / "data", image_data()))
    found: list[list[Shard]] = []
    for name in ("alone", "as jobs"):
        made, _ = assembly(ready_of(deep_vit, data, device="cpu"), Config(parts=2), tmp_path / name, {"code": "x"})
        made.pretrain()
        if name == "alone":
            shards = [made.incubate(2), made.incubate(1)][::-1]
        else:
            torch.set_num_threads(2)
            try:
                shards = made.incubate_all()
            finally:
                torch.set_num_threads(1)
        assert [shard.part for shard in shards] == [1, 2]
        found.append(shards)
    for alone, together in zip(*found, strict=True):
        assert alone.meta == together.meta and alone.tensors.keys() == together.tensors.keys()
        assert all(torch.equal(alone.tensors[name], together.tensors[name]) for name in alone.tensors)


def whole(model: nn.Module) -> Attached:
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    return attach_in_place(model, [n for n, _ in model.named_parameters()], matched={}, no_decay=flat)


def test_one_part_is_ordinary_training(text_base: Path, tmp_path: Path) -> None:
    ready = ready_of(text_base, text_data(), device="cpu", max_length=16)
    made, steps = assembly(ready, Config(parts=1, tune=0.0, budget=1.0), tmp_path, {})
    assert steps.pretrain == 0 and steps.incubate == 40 and made.plan.shared == () and made.plan.depth == 2
    assert made.training("tune").warmup == 0 < made.training("incubate").warmup == made.training("pretrain").warmup
    made.pretrain()
    shard = made.incubate(1)
    plain = made.plan.build(range(2), seed=made.plan.seed(0, 1))
    train(whole(plain), ready.encoded["train"], None, ready.task, made.training("incubate"), device="cpu")
    expected = tensors_of(plain)
    assert sorted(expected) == sorted(shard.tensors)
    assert all(torch.equal(expected[name], shard.tensors[name]) for name in expected)


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, 16, 16, generator=draw), "labels": i % 2}


def test_a_part_trains_in_transformers_trainer_as_well(deep_vit: Path, tmp_path: Path) -> None:
    task = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
    cut = plan(open_base(str(deep_vit)).skeleton(task), 2)
    network = meta_shard(cut, meta(cut))

    def trainer(attached: Attached) -> dict[str, Any]:
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            save_strategy="no",
        )
        run = Trainer(model=attached.model, args=args, train_dataset=Pictures())  # type: ignore[arg-type]
        run.train()
        optimiser: Any = run.optimizer
        held = sum(p.numel() for group in optimiser.param_groups for p in group["params"])
        return {"steps": 4, "held": held}

    shard = train_part(cut, 2, network, trainer, tmp_path / "part")
    assert shard.report["held"] == sum(tensor.numel() for tensor in shard.tensors.values())
    assert sorted(shard.tensors) == sorted(cut.names(2)) and not shard.report["tensors"]["unmoved"]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_skeleton_is_the_model_without_its_weights(kind: str, deep_vit: Path, text_base: Path) -> None:
    base = open_base(str(deep_vit if kind == "image" else text_base))
    named = "image-classification" if kind == "image" else "text-classification"
    task = Task(named, "accuracy", ("a", "b", "c"), 3, kind)
    bare, model = base.skeleton(task), base.model(task, seed=0)
    assert type(bare) is type(model) and all(p.is_meta for p in bare.parameters())
    shapes = [{n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (bare, model)]
    assert shapes[0] == shapes[1] and bare.config.id2label == model.config.id2label  # type: ignore[union-attr]
    assert bare.config._attn_implementation == model.config._attn_implementation  # type: ignore[union-attr]
    drawn = plan(bare, 2).target(5)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in drawn.parameters())
    assert np.isclose(float(drawn.classifier.weight.detach().std()), 0.02, rtol=0.5)  # type: ignore[union-attr, arg-type]
