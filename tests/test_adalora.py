"""AdaLoRA: the card's schedule, scores and masks, and what this library adds to PEFT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from conftest import text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from safetensors.torch import load_file

from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.answers import predict
from brickyard.core.build import build
from brickyard.core.errors import BadMix, NoEffect, Refused, UsageError
from brickyard.core.loop import train
from brickyard.core.ranks import keep_best
from brickyard.core.wrap import ADAPTER
from brickyard.tune.adalora import Allocation, Config, residual

ARM = "adalora:init_r=4,target_r=2,every=2,target=[query,key,value,out,up,down]"
LAYERS = 12  # two blocks of six linear layers


def ready(base: Path, arm: str = ARM, **training: object) -> trial.Prepared:
    known = {"epochs": 4, "precision": "float32", "batch": 16, "lr": 5e-3, **training}
    return trial.prepare(
        trial.Setting(arm=arm, base=str(base), data=text_data(), training=known, cache=False, device="cpu")
    )


def layers(model: torch.nn.Module) -> list[AdaLoraLayer]:
    return [m for m in model.modules() if isinstance(m, AdaLoraLayer)]


def trained(base: Path, **options: object) -> tuple[trial.Prepared, object]:
    known = ready(base, **options)
    attached = build(known.plan, known.base, known.task, seed=0)
    train(attached, known.encoded["train"], known.encoded["validation"], known.task, known.training, device="cpu")
    return known, attached


def test_step_0_is_the_base(text_base: Path) -> None:
    known = ready(text_base)
    plain = known.base.model(known.task, seed=0)
    attached = build(known.plan, known.base, known.task, seed=0)
    np.testing.assert_array_equal(predict(plain, known.encoded["test"]), predict(attached.model, known.encoded["test"]))


def test_budget_follows_the_cubic_schedule() -> None:
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.peft_config = SimpleNamespace(tinit=20, tfinal=60, total_step=200, deltaT=10)
    allocator.init_bgt, allocator.target_bgt = 48, 24
    for step, expected in [
        (10, 48),
        (20, 48),
        (50, 24 + int(24 * (1 - 30 / 120) ** 3)),
        (80, 27),
        (140, 24),
        (170, 24),
    ]:
        assert allocator.budget_schedule(step)[0] == expected


def test_exactly_the_target_stays_and_the_file_holds_no_dead_rank(text_base: Path, tmp_path: Path) -> None:
    known, attached = trained(text_base)
    ranks = [layer.lora_A[ADAPTER].shape[0] for layer in layers(attached.model)]  # type: ignore[attr-defined]
    assert sum(ranks) == 2 * LAYERS and len(ranks) == LAYERS and max(ranks) > min(ranks)
    assert all((layer.lora_E[ADAPTER] != 0).all() for layer in layers(attached.model))  # type: ignore[attr-defined]
    before = predict(attached.model, known.encoded["test"])  # type: ignore[attr-defined]
    bricks.save(tmp_path / "b", attached, known.plan, known.base, known.task, seed=0, about={})  # type: ignore[arg-type]
    stored = bricks.load(tmp_path / "b").tensors()
    assert sum(t.shape[0] for n, t in stored.items() if n.endswith("lora_A")) == 2 * LAYERS
    again = bricks.load(tmp_path / "b").apply().model
    np.testing.assert_allclose(predict(again, known.encoded["test"]), before, atol=1e-5)
    np.testing.assert_allclose(predict(again.merge_and_unload(), known.encoded["test"]), before, atol=1e-5)


class Watch:
    """Notes the ranks of all layers after every step, the moments' shapes, and what the model computes around a cut."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def after_step(self, state: object) -> None:
        found = layers(state.attached.model)  # type: ignore[attr-defined]
        self.ranks.append(sum(layer.lora_A[ADAPTER].shape[0] for layer in found))
        for layer in found:
            for p in (layer.lora_A[ADAPTER], layer.lora_E[ADAPTER], layer.lora_B[ADAPTER]):
                held = state.optimiser.state[p]  # type: ignore[attr-defined]
                assert held["exp_avg"].shape == held["exp_avg_sq"].shape == p.shape == p.grad.shape


def test_ranks_are_cut_as_soon_as_they_are_final_and_the_result_is_unchanged(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without regulariser and clipping, which see the dead ranks, the weights of a run that drags them along."""
    from brickyard.core.export import export

    arm = ARM.replace("every=2", "every=2,orth=0,tfinal=0.4")
    ends = []
    for cut in (True, False):
        known = ready(text_base, arm, clip=0.0)
        made = build(known.plan, known.base, known.task, seed=0)
        watch = Watch()
        with monkeypatch.context() as patch:
            if not cut:
                masks: dict[str, list[bool]] = {}

                def step(self: Allocation, step: int, optimiser: object = None, masks: dict = masks) -> None:
                    """PEFT's own course: masks to the end; the layers are cut when training is over."""
                    config = self.model.peft_config[ADAPTER]
                    self.model.base_model.update_and_allocate(step)
                    self.allocated = step >= config.total_step - config.tfinal
                    masks.update(config.rank_pattern or {})

                patch.setattr(Allocation, "step", step)
                patch.setattr(Allocation, "end", lambda self, state: self.cut(None))
            train(made, known.encoded["train"], None, known.task, known.training, callbacks=[watch], device="cpu")
        total = len(watch.ranks)
        final = total - int(0.4 * total)
        assert watch.ranks[final - 2] == 4 * LAYERS
        assert set(watch.ranks[final - 1 :]) == {2 * LAYERS if cut else 4 * LAYERS}
        bricks.save(tmp_path / f"{cut}", made, known.plan, known.base, known.task, seed=0, about={})
        export(tmp_path / f"{cut}", "peft", tmp_path / f"lora-{cut}")
        exported = load_file(tmp_path / f"lora-{cut}" / "adapter_model.safetensors")
        ends.append((made.tensors(), exported))
    for ours, theirs in zip(*ends, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


def test_a_run_that_stops_after_the_cut_resumes_bit_for_bit(text_base: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class At:
        def after_step(self, state: object) -> None:
            if state.step == 21:  # type: ignore[attr-defined]
                raise Stop

    ends = []
    for folder, callbacks in ((None, [[]]), (tmp_path, [[At()], []])):
        for these in callbacks:
            known = ready(text_base)
            made = build(known.plan, known.base, known.task, seed=0)
            training = replace(known.training, checkpoint_every=5)
            try:
                train(
                    made,
                    known.encoded["train"],
                    known.encoded["validation"],
                    known.task,
                    training,
                    folder=folder,
                    callbacks=these,
                    device="cpu",
                )
            except Stop:
                assert sum(layer.lora_A[ADAPTER].shape[0] for layer in layers(made.model)) == 2 * LAYERS
        ends.append(made.tensors())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_each_row_of_a_batch_is_served_by_its_own_adapter(text_base: Path) -> None:
    known = ready(text_base)
    model = build(known.plan, known.base, known.task, seed=0).model.eval()
    config = replace(model.peft_config[ADAPTER], inference_mode=True, init_r=3, target_r=2)
    model.add_adapter("other", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    batch = known.encoded["test"].collate(np.arange(4))
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def logits(**more: object) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, **more).logits

    own = {}
    for name in (ADAPTER, "other"):
        model.set_adapter(name)
        own[name] = logits()
    with model.disable_adapter():
        own["__base__"] = logits()
    names = ["other", "__base__", ADAPTER, "other"]
    mixed = logits(adapter_names=names)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], own[name][i], rtol=1e-5, atol=1e-5)
    assert (own["other"] - own[ADAPTER]).abs().max() > 0.1
    torch.testing.assert_close(logits(), own["other"], rtol=0, atol=0)
    with pytest.raises(BadMix, match="do not exist"):
        logits(adapter_names=["typo"] * 4)
    with pytest.raises(BadMix, match="2 adapter_names were given for a batch of 4"):
        logits(adapter_names=["other"] * 2)
    torch.testing.assert_close(logits(), own["other"], rtol=0, atol=0)
    model.merge_adapter()
    with pytest.raises(BadMix, match="merged"):
        logits(adapter_names=names)


def test_the_export_is_a_plain_lora(text_base: Path, tmp_path: Path) -> None:
    from brickyard.core.export import export

    known, attached = trained(text_base)
    bricks.save(tmp_path / "b", attached, known.plan, known.base, known.task, seed=0, about={})  # type: ignore[arg-type]
    assert export(tmp_path / "b", "peft", tmp_path / "lora")["max_gap"] < 1e-5
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "lora"))
    assert config.peft_type == peft.PeftType.LORA and sum(config.rank_pattern.values()) == 2 * LAYERS  # type: ignore[attr-defined]


def test_importance_is_the_cards_moving_average() -> None:
    """A, E, B with fixed gradients against NumPy over five steps."""
    g = np.random.Generator(np.random.PCG64(0))
    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    shapes = {"lora_A": (3, 5), "lora_E": (3, 1), "lora_B": (4, 3)}
    for name, shape in shapes.items():
        setattr(
            model.layer,
            name,
            torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.from_numpy(g.normal(size=shape)))}),
        )
    allocator = RankAllocator.__new__(RankAllocator)
    allocator.adapter_name, allocator.beta1, allocator.beta2 = "default", 0.85, 0.7
    allocator.reset_ipt()
    mean = {n: np.zeros(s) for n, s in shapes.items()}
    spread = {n: np.zeros(s) for n, s in shapes.items()}
    for _ in range(5):
        for name, shape in shapes.items():
            w = getattr(model.layer, name)["default"]
            w.grad = torch.from_numpy(g.normal(size=shape))
            i = np.abs(w.detach().numpy() * w.grad.numpy())
            mean[name] = 0.85 * mean[name] + 0.15 * i
            spread[name] = 0.7 * spread[name] + 0.3 * np.abs(i - mean[name])
        allocator.update_ipt(model)
    for name in shapes:
        np.testing.assert_allclose(
            allocator._element_score(f"layer.{name}.default").numpy(), mean[name] * spread[name], rtol=1e-9
        )


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=5), st.integers(0, 25))
@settings(derandomize=True, deadline=None)
def test_masks_keep_exactly_the_budget_and_ties_go_to_the_earlier(scores: list[list[int]], budget: int) -> None:
    masks = keep_best([torch.tensor(s, dtype=torch.float) for s in scores], budget)
    flat, mask = np.concatenate(scores), torch.cat(masks).numpy()
    assert mask.sum() == min(budget, len(flat))
    order = np.argsort(-flat, kind="stable")
    assert set(np.flatnonzero(mask)) == set(order[:budget])


def test_without_ties_the_masks_are_pefts() -> None:
    torch.manual_seed(0)
    scores = [torch.rand(6) for _ in range(4)]
    for budget in range(1, 24):
        threshold = torch.kthvalue(torch.cat(scores), 24 - budget)[0]
        for mine, s in zip(keep_best(scores, budget), scores, strict=True):
            assert torch.equal(mine, s > threshold)


def test_regulariser_is_the_mean_frobenius_norm_and_training_lowers_it(text_base: Path) -> None:
    torch.manual_seed(0)
    sides = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 6)]
    expected = np.mean([np.linalg.norm(m.numpy() @ m.numpy().T - np.eye(4)) for m in sides])
    assert float(residual(sides)) == pytest.approx(expected, rel=1e-5)
    known = ready(text_base, epochs=12)
    attached = build(known.plan, known.base, known.task, seed=0)
    start = float(attached.extra_loss().detach())  # type: ignore[misc]
    train(attached, known.encoded["train"], None, known.task, known.training, device="cpu")
    assert float(attached.extra_loss().detach()) < start  # type: ignore[misc]


def test_equal_ranks_run_though_peft_alone_fails(text_base: Path) -> None:
    known = ready(text_base, "adalora:init_r=2,target_r=2")
    attached = build(known.plan, known.base, known.task, seed=0)
    train(attached, known.encoded["train"], None, known.task, known.training, device="cpu")
    assert {layer.lora_A[ADAPTER].shape[0] for layer in layers(attached.model)} == {2}


def test_a_run_without_the_callback_is_an_error(text_base: Path) -> None:
    known = ready(text_base)
    attached = build(known.plan, known.base, known.task, seed=0)
    with pytest.raises(NoEffect, match="never allocated"):
        attached.callbacks[0].finish()


def test_resume_in_the_middle_of_the_schedule_is_exact(text_base: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class At:
        def after_step(self, state: object) -> None:
            if state.step == 13:  # type: ignore[attr-defined]
                raise Stop

    known = ready(text_base)
    training = replace(known.training, checkpoint_every=5)
    runs = []
    for folder in (None, tmp_path):
        attached = build(known.plan, known.base, known.task, seed=0)
        if folder is not None:
            with pytest.raises(Stop):
                train(
                    attached,
                    known.encoded["train"],
                    known.encoded["validation"],
                    known.task,
                    training,
                    folder=folder,
                    callbacks=[At()],
                    device="cpu",
                )
            attached = build(known.plan, known.base, known.task, seed=0)
        train(
            attached,
            known.encoded["train"],
            known.encoded["validation"],
            known.task,
            training,
            folder=folder,
            device="cpu",
        )
        runs.append(attached.tensors())
    assert runs[0].keys() == runs[1].keys() and all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize(
    "bad",
    [
        {"target_r": 0},
        {"init_r": 2, "target_r": 3},
        {"tinit": 0.6, "tfinal": 0.5},
        {"beta1": 1.0},
        {"score": "guess"},
        {"every": 0},
        {"alpha": 0},
        {"alpha": -8},
        {"dropout": 1.0},
        {"dropout": -0.1},
    ],
)
def test_options_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match="adalora"):
        Config(**bad)


def test_a_rank_above_the_layers_is_refused(text_base: Path) -> None:
    with pytest.raises(Refused, match="rank 64 exceeds"):
        known = ready(text_base, "adalora:init_r=64")
        build(known.plan, known.base, known.task, seed=0)


# PEFT compares these patterns, its own AdaLoRA's as well, with layers' names, which they are not.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_plain_peft_opens_the_brick_and_answers_the_same(text_base: Path, tmp_path: Path) -> None:
    known, attached = trained(text_base)
    ranks = [layer.lora_A[ADAPTER].shape[0] for layer in layers(attached.model)]  # type: ignore[attr-defined]
    bricks.save(tmp_path / "b", attached, known.plan, known.base, known.task, seed=0, about={})  # type: ignore[arg-type]
    inputs = {k: v for k, v in known.encoded["test"].collate(np.arange(8)).items() if k != "labels"}
    plain = peft.PeftModel.from_pretrained(known.base.model(known.task, seed=1), str(tmp_path / "b")).eval()
    own = bricks.load(tmp_path / "b").apply()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, own.model(**inputs).logits, rtol=0, atol=1e-6)
    assert [layer.lora_A[ADAPTER].shape[0] for layer in layers(plain)] == ranks
    # A brick that is opened and saved again says its ranks as well.
    bricks.save(tmp_path / "c", own.attached, known.plan, known.base, known.task, seed=0, about={})
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "c"))
    found = {n: len(m.lora_E[ADAPTER]) for n, m in own.model.base_model.model.named_modules() if hasattr(m, "lora_E")}  # type: ignore[index, union-attr]
    assert {n.removesuffix(".lora_E"): sum(m) for n, m in config.rank_pattern.items()} == found  # type: ignore[attr-defined]


def test_importances_go_back_to_the_models_device(text_base: Path) -> None:
    known = ready(text_base)
    kept = {}
    for device in ("cpu", "meta"):  # a checkpoint of the CPU, and a model elsewhere
        attached = build(known.plan, known.base, known.task, seed=0)
        allocation = attached.callbacks[0]
        allocation.start(20)
        attached.model.to(device)
        allocator = allocation.model.base_model.rankallocator
        if device == "cpu":
            allocator.reset_ipt()
            for name, p in allocation.model.base_model.model.named_parameters():
                if f"lora_E.{ADAPTER}" in name:
                    allocator.exp_avg_ipt[name] = allocator.exp_avg_unc[name] = torch.ones_like(p)
            kept = allocation.state_dict()
        else:
            allocation.load_state_dict(kept)
            for part in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
                held = getattr(allocator, part)
                assert len(held) == LAYERS and all(t.device.type == "meta" for t in held.values()), part


def test_the_papers_setting_adapts_all_linear_layers_of_a_block(text_base: Path) -> None:
    known = ready(text_base, "adalora:preset=paper")
    assert known.plan.configs["adalora"].target == "blocks"
    assert len(layers(build(known.plan, known.base, known.task, seed=0).model)) == LAYERS
