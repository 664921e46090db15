"""model-assembling on a trained base: stand-ins learn their own part alone, parts begin as they are stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import documents, make_text_base, text_data
from test_model_assembling import MODELS, bert, inputs, llama, logits
from torch import Tensor, nn

from brickyard.core.base import open_base
from brickyard.core.errors import BadBrick, UsageError
from brickyard.core.files import read_tensors
from brickyard.core.roles import own_head
from brickyard.core.task import Task
from brickyard.grow._assembling_distil import beginnings, begun, distilled
from brickyard.grow._assembling_plan import Plan, plan, tensors_of
from brickyard.grow.model_assembling import Config, Steps, assemble, block_steps, hybrid, meta_shard, train_part
from brickyard.growing import grow

TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")


def cut_of(model: nn.Module, splits: tuple[int, ...] = (2, 2), depth: int = 1) -> Plan:
    return plan(model, len(splits), splits, meta_depth=depth, batch=inputs(model, 1))


def batch_of(model: nn.Module, labels: int = 0) -> dict[str, Tensor]:
    return {**inputs(model), "labels": torch.full((3,), labels)}


@pytest.mark.parametrize("kind", MODELS)
def test_where_stand_ins_are_as_deep_as_their_parts_they_are_the_base(kind: str) -> None:
    model = MODELS[kind]()
    made = begun(cut_of(model, depth=2), model)
    assert torch.equal(logits(made, inputs(model)), logits(model, inputs(model)))
    assert not any(a is b for a in made.parameters() for b in model.parameters())


def test_a_stand_in_that_is_its_part_has_nothing_to_learn_and_another_one_has() -> None:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for depth, exact in ((2, True), (1, False)):
        attached = distilled(cut_of(model, depth=depth), copy.deepcopy(model), TASK, seed=0)
        attached.model.eval()
        batch = batch_of(model)
        head = TASK.loss(attached.model(**inputs(model)).logits, batch["labels"])
        found = float(attached.objective(attached.model, batch).detach())  # type: ignore[misc]
        assert (found == pytest.approx(float(head.detach()), abs=1e-5)) == exact


def gradients(attached: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    attached.model.zero_grad()
    attached.objective(attached.model, batch).backward()
    return {n: p.grad.clone() for n, p in attached.model.named_parameters() if p.grad is not None}


def test_every_stand_in_learns_its_own_part_and_the_task_reaches_the_head_alone() -> None:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    cut = cut_of(model)
    attached = distilled(cut, copy.deepcopy(model), TASK, seed=0)
    plain = gradients(attached, batch_of(model))
    heads = tuple(f"{name}." for name in own_head(attached.model))
    inside = {n for n in plain if n.startswith(f"{cut.path}.")}
    assert inside and set(plain) == {n for n, p in attached.model.named_parameters() if p.requires_grad}
    assert set(plain) - inside == {n for n in plain if n.startswith(heads)}
    other = gradients(attached, batch_of(model, labels=1))
    assert all(torch.equal(plain[n], other[n]) for n in inside)
    assert any(not torch.equal(plain[n], other[n]) for n in plain if n.startswith(heads))
    with torch.no_grad():  # another first stand-in: the second one meets the base's states all the same
        for n, p in attached.model.named_parameters():
            if n.startswith(f"{cut.path}.0."):
                p.add_(0.1)
    moved = gradients(attached, batch_of(model))
    assert all(torch.equal(plain[n], moved[n]) for n in inside if n.startswith(f"{cut.path}.1."))
    assert any(not torch.equal(plain[n], moved[n]) for n in inside if n.startswith(f"{cut.path}.0."))


def test_a_language_models_own_head_stays() -> None:
    model = llama()
    cut = cut_of(model)
    attached = distilled(cut, copy.deepcopy(model), Task("causal-lm", "bits_per_byte", None, 1, "text"), seed=0)
    trained = [n for n, p in attached.model.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith(f"{cut.path}.") for n in trained)


def test_padding_has_no_part_in_what_is_learned() -> None:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    attached = distilled(cut_of(model), copy.deepcopy(model), TASK, seed=0)
    attached.model.eval()
    ids = inputs(model)["input_ids"]
    padded = torch.cat([ids, torch.full((3, 4), 7)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    labels = torch.zeros(3, dtype=torch.int64)
    short = attached.objective(attached.model, {"input_ids": ids, "attention_mask": mask[:, :6], "labels": labels})  # type: ignore[misc]
    long = attached.objective(attached.model, {"input_ids": padded, "attention_mask": mask, "labels": labels})  # type: ignore[misc]
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_parts_begin_as_they_are_stored_and_assemble_to_the_base(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    cut, whole = cut_of(model), copy.deepcopy(model)
    standing = meta_shard(cut, begun(cut, whole))
    shards = []
    for part in (1, 2):
        begin = beginnings(cut, part, whole, standing.tensors)
        made = hybrid(cut, part, standing.tensors, begin=begin)
        live, stored = tensors_of(made.model), tensors_of(whole)
        assert made.own and all(torch.equal(live[n], stored[target]) for n, target in made.own.items())

        def nudged(attached: Any) -> dict[str, Any]:
            with torch.no_grad():
                next(iter(attached.parameters())).view(-1)[0].add_(1e-3)
            return {}

        file = tmp_path / f"{part}.safetensors"
        shards.append(train_part(cut, part, standing, nudged, file, begin=begin))
    found, stored = tensors_of(assemble(cut, shards)), tensors_of(whole)
    moved = {n for n in stored if not torch.equal(found[n], stored[n])}
    assert len(moved) == 2 and all((found[n] != stored[n]).sum() == 1 for n in moved)
    with pytest.raises(BadBrick, match="part 1"):
        hybrid(cut, 1, standing.tensors, begin={})


def test_passing_the_base_forward_is_counted() -> None:
    steps = Steps(10, 2, 0, 30)
    plain, distil = (block_steps((3, 3), 1, steps, distil=flag) for flag in (False, True))
    assert distil["pretrain"] - plain["pretrain"] == 10 * 2 and distil["incubate"] == plain["incubate"]
    with pytest.raises(UsageError):
        Config(meta="distil", parts=0)


def test_a_trained_language_model_is_adapted_part_by_part(tmp_path: Path) -> None:
    base = make_text_base(tmp_path / "base", layers=4, causal=True)
    known = grow(
        "model-assembling:meta=distil,parts=2,tune=0,lr=2e-3",
        base=str(base),
        data=documents(),
        out=tmp_path / "out",
        task="causal-lm",
        max_length=16,
        batch=8,
        device="cpu",
        dtype="float32",
        threads=1,
        training={"steps": 240},
    )
    scores = {name: score["mean"] for name, score in known["scores"].items()}
    assert list(scores) == ["meta", "base", "assembled"] and scores["assembled"] < scores["base"] - 0.1
    before, after = (
        tensors_of(open_base(str(base)).model(_language(), seed=0)),
        read_tensors(tmp_path / "out" / "model.safetensors"),
    )
    shared = known["plan"]["shared"]
    assert shared and all(torch.equal(after[n], before[n]) for n in shared)  # tied embeddings stay the base's
    alike = [
        float(torch.cosine_similarity(after[n].flatten(), before[n].detach().flatten(), dim=0))
        for n in after
        if before[n].ndim == 2 and n not in shared
    ]
    assert min(alike) > 0.3, alike  # moved from where they were stored; weights drawn anew would have nothing in common


def _language() -> Task:
    return Task("causal-lm", "bits_per_byte", None, 1, "text")


def test_a_new_head_is_learned_with_the_stand_ins(tmp_path: Path) -> None:
    base = make_text_base(tmp_path / "base", layers=4)
    shared: dict[str, Any] = {"data": text_data(), "batch": 8, "device": "cpu", "threads": 1, "dtype": "float32"}
    shared["training"] = {"steps": 80}
    grow("model-assembling:parts=2,lr=5e-3", base=str(base), out=tmp_path / "trained", **shared)
    arm = "model-assembling:meta=distil,parts=2,tune=0,lr=2e-3"
    known = grow(arm, base=str(tmp_path / "trained"), out=tmp_path / "out", **shared)
    assert "base" not in known["scores"]  # its head is new, so it has nothing to say
    assert known["scores"]["assembled"]["mean"] > 0.8
