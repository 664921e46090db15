"""One matrix over all tune methods: each task, proof of effect, save and load, undo, counted memory, its controls."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cloud_data, documents, image_data, make_text_base, text_data
from peft import PeftModel

from brickyard.core import brick as bricks
from brickyard.core import measure, registry, trial
from brickyard.core.answers import answer, predict
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadBrick, NoEffect, Refused, UnsafeFile, WrongBase

# One row a method: the smallest legal arm on a two-layer base of width 32.
METHODS = {
    "full": "full",
    "bitfit": "bitfit",
    "lora": "lora:r=4",
    "ia3": "ia3",
    "adalora": "adalora:init_r=4,target_r=2,every=2",
    "sora": "sora:r=4,k=0.001",
    "dylora": "dylora:r=4",
    "hut": "hut:r=2",
    "dsee": "dsee:r=2,n_sparse=4",
    "loca": "loca:n_frequency=40,cycle=[1,1]",
    "fourierft": "fourierft:n_frequency=40",
    "mos": "mos:r=3,e=2,p=1,l=2",
    "telly": "telly:k=1",
    "ce-ssl": "ce-ssl:r=4",
    "lst": "lst:r=2,init=magnitude",
    "unipt": "unipt:width=8",
    "hst": "hst:widths=[8,8],heads=[1,1]",
    "iapt": "iapt:bottleneck=8",
    "idpt": "idpt:k=3",
    "p2p": "p2p:neighbours=4,dims=4,width=8,views=[2,1]",
    "s2a": "lora:r=4 + s2a:group=16",
    "emoe": "full + emoe:experts=8,topk=4",
    "s2a-modules": "s2a-modules:kind=side,r=4",
    "bottleneck-adapter": "bottleneck-adapter:reduction=8",
    "linear-probe": "linear-probe",
    "moment-probing": "moment-probing:p=64,h=4",
}
COMPOSED = {
    "lora + moment-probing": "lora:r=4 + moment-probing:p=64",
    "mos + linear-probe": "mos:r=3,e=2,p=1,l=2 + linear-probe",
    "telly + moment-probing": "telly:k=1 + moment-probing:p=64",
    "s2a-modules + s2a": "s2a-modules:kind=prompt,tokens=3 + s2a:group=16",
    "lst + moment-probing": "lst:r=2,init=random + moment-probing:p=64",
    "full + pudf": "full + pudf:min_size=16,balance=true",
    "lora + pudf": "lora:r=4 + pudf:min_size=16,balance=true",
    "dp-convex": "dp-convex:gates=8,epsilon=50",
    "linear-probe + pudf": "linear-probe + pudf:min_size=16,balance=true",
    "full, one block": 'full:target=["*.1.*"]',
    "full + curriculum": "full + curriculum:by=random,min_size=16",
}
ALL = {**METHODS, **COMPOSED}
TASKS = {
    "text-classification": text_data(),
    "pair-classification": text_data(pair=True),
    "regression": text_data(regression=True),
    "image-classification": image_data(),
    "point-classification": cloud_data(),
    "causal-lm": documents(),
}


def setting(arm: str, task: str, base: Path, **changes: object) -> trial.Setting:
    batch = 4 if task == "causal-lm" else 16  # blocks are few
    training = {"epochs": 2, "precision": "float32", "batch": batch, **changes.pop("training", {})}  # type: ignore[dict-item]
    return trial.Setting(
        arm=arm,
        base=str(base),
        data=TASKS[task],
        task=task if task == "causal-lm" else None,
        training=training,
        cache=False,
        device="cpu",
        **changes,
    )  # type: ignore[arg-type]


def base_for(task: str, request: pytest.FixtureRequest) -> Path:
    images = {"image-classification": "image_base", "point-classification": "image_base"}
    kind = {**images, "causal-lm": "causal_base"}.get(task, "text_base")
    return request.getfixturevalue(kind)


def home(arm: str, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """The task, and the base for it, on which the tests that need but one try a method."""
    task = {"hst": "image-classification", "p2p": "point-classification"}.get(arm, "text-classification")
    return task, base_for(task, request)


def test_every_method_has_its_row() -> None:
    # A start needs another run's brick, a cloze a tokenizer with a mask, and a group of neurons is found, not trained:
    # they have tests of their own.
    others = {"pvp", "few-shot-content", "mpt", "neuron-group"}
    assert METHODS.keys() == {entry.record.name for entry in registry.records("tune")} - others


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arm", ALL)
def test_trains_proves_saves_and_loads(arm: str, task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A run leaves a brick that, applied to a fresh base, answers as the trained model did."""
    asked = setting(ALL[arm], task, base_for(task, request))
    if task == "causal-lm" and arm == "bitfit":
        with pytest.raises(Refused, match="no bias terms"):
            trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
        return
    if any(task not in registry.find(p.name).record.needs for p in parse(ALL[arm]).pieces):
        with pytest.raises(Refused, match="works on"):
            trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
        return
    result = trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    # AdaLoRA ends with other ranks than it began with: those tensors have no counterpart to have moved from.
    assert (result["receipt"]["moved"] or result["receipt"]["reshaped"]) and not result["receipt"]["not_finite"]
    assert all(names for names in result["receipt"]["matched"].values())
    made = bricks.load(tmp_path / "brick")
    assert made.bytes == result["cost"]["brick_bytes"] > 0
    assert {p.suffix for p in made.folder.iterdir()} <= {".json", ".safetensors", ".md"}
    ready = trial.prepare(asked, ("train", "test"))
    again = answer(made.apply().model, ready.encoded["test"], ready.task).predictions
    answers = __import__("pyarrow.parquet").parquet.read_table(tmp_path / "answers.parquet")
    np.testing.assert_allclose(again, answers["prediction"].to_numpy(), atol=1e-3)
    assert result["score"]["mean"] == pytest.approx(
        ready.task.score(ready.encoded["test"].labels.numpy(), again), abs=0.03
    )
    json.dumps(result)


@pytest.mark.parametrize("arm", ALL)
def test_perturbed_weights_survive_the_file_and_a_new_process_state(
    arm: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every stored tensor is read back into its place, whatever the fresh model drew."""
    task, folder = home(arm, request)
    base = open_base(str(folder))
    ready = trial.prepare(setting(ALL[arm], task, folder))
    attached = build(ready.plan, base, ready.task, seed=0)
    g = torch.Generator().manual_seed(1)
    changed = {
        n: t + 0.1 * torch.randn(t.shape, generator=g).to(t) if t.is_floating_point() else t
        for n, t in attached.tensors().items()
    }
    attached.load(changed)
    bricks.save(tmp_path / "brick", attached, ready.plan, base, ready.task, seed=0, about={})
    expected = predict(attached.model, ready.encoded["test"])
    torch.manual_seed(77)
    again = bricks.load(tmp_path / "brick").apply()
    np.testing.assert_array_equal(predict(again.model, ready.encoded["test"]), expected)
    assert all(torch.equal(t, changed[n]) for n, t in again.attached.tensors().items())


@pytest.mark.parametrize("arm", ALL)
def test_undo_gives_the_base_back(arm: str, request: pytest.FixtureRequest) -> None:
    task, folder = home(arm, request)
    base = open_base(str(folder))
    ready = trial.prepare(setting(ALL[arm], task, folder))
    plain = build(ready.plan, base, ready.task, seed=3)
    untouched = plain.detach()
    before = {k: v.clone() for k, v in untouched.state_dict().items()}
    attached = build(ready.plan, base, ready.task, seed=3)
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.05)
    after = attached.detach().state_dict()
    assert before.keys() == after.keys()
    heads = [k for k in before if k.startswith(("classifier", "head"))]
    assert all(torch.equal(before[k], after[k]) for k in before if k not in heads)


@pytest.mark.parametrize("arm", ALL)
def test_no_step_keeps_a_tensor_that_the_count_does_not_see(arm: str, request: pytest.FixtureRequest) -> None:
    ready = trial.prepare(setting(ALL[arm], *home(arm, request)), ("train",))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    batch = ready.encoded["train"].collate(np.arange(8))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = measure.hidden_saves(attached.model, inputs, lambda out: ready.task.loss(out, batch["labels"]))
    assert not hidden, hidden


@pytest.mark.parametrize("arm", [a for a in METHODS if a != "adalora"])
def test_learning_rate_zero_is_no_effect(arm: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    asked = setting(ALL[arm], *home(arm, request), training={"lr": 0.0})
    with pytest.raises(NoEffect, match="no trainable tensor moved"):
        trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    assert not (tmp_path / "brick").exists()


def test_shuffled_labels_destroy_what_is_learned(text_base: Path, tmp_path: Path) -> None:
    scores = []
    for shuffle in (False, True):
        asked = setting(
            "full", "text-classification", text_base, shuffle_labels=shuffle, training={"epochs": 8, "lr": 3e-3}
        )
        scores.append(trial.run({"setting": asdict(asked), "folder": str(tmp_path / str(shuffle))})["score"]["mean"])
    assert scores[0] > 0.9 and scores[0] - scores[1] > 0.25


@pytest.mark.parametrize("arm", ["lora", "full", "moment-probing"])
def test_same_seed_same_bits(arm: str, text_base: Path, tmp_path: Path) -> None:
    found = []
    for i in range(2):
        torch.manual_seed(i)
        trial.run(
            {"setting": asdict(setting(ALL[arm], "text-classification", text_base)), "folder": str(tmp_path / str(i))}
        )
        found.append(bricks.load(tmp_path / str(i) / "brick").tensors())
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_a_brick_of_another_base_is_refused_unless_forced(text_base: Path, tmp_path: Path) -> None:
    trial.run({"setting": asdict(setting("lora:r=4", "text-classification", text_base)), "folder": str(tmp_path)})
    other = open_base(str(make_text_base(tmp_path / "other", seed=9)))
    made = bricks.load(tmp_path / "brick")
    with pytest.raises(WrongBase, match="--force"):
        made.apply(other)
    made.apply(other, force=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "rename", "schema"])
def test_a_damaged_brick_is_refused(damage: str, text_base: Path, tmp_path: Path) -> None:
    trial.run({"setting": asdict(setting("lora:r=4", "text-classification", text_base)), "folder": str(tmp_path)})
    weights, manifest = tmp_path / "brick" / "adapter_model.safetensors", tmp_path / "brick" / "brick.json"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-3] ^= 4
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "rename":
        known = json.loads(manifest.read_text())
        known["weights"], known["files"] = "../x.safetensors", {"../x.safetensors": "0"}
        manifest.write_text(json.dumps(known))
    else:
        known = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**known, "schema": 99}))
    with pytest.raises((BadBrick, UnsafeFile)):
        bricks.load(tmp_path / "brick").apply()


@pytest.mark.parametrize("arm", ["lora", "ia3"])
def test_a_brick_is_an_adapter_that_plain_peft_opens(arm: str, text_base: Path, tmp_path: Path) -> None:
    asked = setting(ALL[arm], "text-classification", text_base)
    trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    ready = trial.prepare(asked, ("train", "test"))
    fresh = ready.base.model(ready.task, seed=123)
    opened = PeftModel.from_pretrained(fresh, str(tmp_path / "brick"), adapter_name="theirs")
    ours = bricks.load(tmp_path / "brick").apply().model
    np.testing.assert_array_equal(predict(opened, ready.encoded["test"]), predict(ours, ready.encoded["test"]))


def test_arms_that_do_not_fit_are_refused_with_a_reason(text_base: Path, decoder_base: Path) -> None:
    task = trial.prepare(setting("full", "text-classification", text_base), ("train",)).task
    with pytest.raises(Refused, match="both a tuner"):
        resolve(parse("lora + full"), task)
    with pytest.raises(Refused, match="rank 64 exceeds layer"):
        build(resolve(parse("lora:r=64"), task), open_base(str(text_base)), task, seed=0)
    with pytest.raises(Refused, match="no bias"):
        build(resolve(parse("bitfit"), task), open_base(str(decoder_base)), task, seed=0)


def test_a_decoder_is_tuned_as_a_classifier(decoder_base: Path, tmp_path: Path) -> None:
    asked = setting("lora:r=4", "text-classification", decoder_base, training={"epochs": 8, "lr": 2e-2})
    assert trial.run({"setting": asdict(asked), "folder": str(tmp_path)})["score"]["mean"] > 0.7
