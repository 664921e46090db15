"""SoRA and the rank engine: the proximal step, ranks that die, and what is left as a plain LoRA."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bridged import bert, logits, words
from bridged import stir as stir_adapter
from conftest import documents, text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F

import brickyard
from brickyard.checks import _runs
from brickyard.checks import sora as checks
from brickyard.checks._runs import asked_by, to_the_end
from brickyard.checks.sora import ranks_left
from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.base import open_base
from brickyard.core.build import build
from brickyard.core.errors import BadBrick, NoEffect, Refused, UsageError
from brickyard.core.inject import BrickyardConfig, register, to_lora
from brickyard.core.loop import State, train
from brickyard.core.ranks import Ranks, keep_best
from brickyard.tune import sora

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
register()
NUMBERS = st.floats(-10, 10, allow_nan=False, width=32)


def model(**options: object) -> PeftModel:
    return get_peft_model(bert(), BrickyardConfig(method="sora", options={"r": 4, **options}, seed=1)).eval()


def stir(peft_model: PeftModel, seed: int = 5) -> PeftModel:
    stir_adapter(peft_model, "default", seed)
    return peft_model


def ranks(peft_model: PeftModel) -> Ranks:
    return Ranks(peft_model.base_model, "default")  # type: ignore[arg-type]


def gates(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: layer.brick_gate["default"] for name, layer in ranks(peft_model).layers().items()}  # type: ignore[index]


def kill(peft_model: PeftModel, seed: int = 0, share: float = 0.5) -> dict[str, torch.Tensor]:
    """Set a random half of the gates to zero, all of those of one layer; return what is left as masks."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, gate in enumerate(gates(peft_model).values()):
            gate[torch.rand(len(gate), generator=g) < (1.0 if place == 3 else share)] = 0.0
    return {name: gate != 0 for name, gate in gates(peft_model).items()}


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=20), st.lists(NUMBERS, min_size=1, max_size=20), st.floats(0, 3))
def test_the_soft_threshold_is_the_proximal_step_of_an_l1_norm(a: list[float], b: list[float], k: float) -> None:
    for v, found in zip(a, sora.soft(torch.tensor(a, dtype=torch.float64), k).tolist(), strict=True):
        assert found == pytest.approx(np.sign(v) * max(abs(v) - k, 0.0), abs=1e-12)
    size = min(len(a), len(b))
    one, other = (torch.tensor(x[:size], dtype=torch.float64) for x in (a, b))
    assert ((sora.soft(one, k) - sora.soft(other, k)).abs() <= (one - other).abs() + 1e-12).all()
    assert not sora.soft(torch.zeros(3), k).any()


def test_the_released_rule_shrinks_and_then_cuts() -> None:
    k = 0.25
    values = torch.tensor([0.5, 1.5, 2.0, 3.0, -0.5, -1.5, -2.0, -3.0]) * k
    assert sora.sequential(values, k).tolist() == pytest.approx([0, 0, k, 2 * k, 0, 0, -k, -2 * k])


def test_a_new_adapter_changes_nothing_and_the_gates_are_drawn() -> None:
    plain, adapted = bert(), model()
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=0, atol=0)
    found = torch.cat(list(gates(adapted).values()))
    assert found.std() > 0.5 and not (found == 1).any()
    assert all((g == 1).all() for g in gates(model(gate="ones")).values())


def test_a_layer_computes_its_equation_in_training_and_outside() -> None:
    adapted = stir(model(alpha=8.0))
    layer = next(iter(ranks(adapted).layers().values()))
    x = torch.randn(3, 5, layer.in_features)
    part = layer.part("default")
    wanted = layer.base_layer(x) + 2.0 * F.linear(F.linear(x, part["a"]) * part["gate"], part["b"])
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    layer.train()
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_dead_rank_gets_no_gradient_but_its_gate_does() -> None:
    adapted = stir(model()).train()
    with torch.no_grad():
        for gate in gates(adapted).values():
            gate[1] = 0.0
    adapted(**words()).logits.square().sum().backward()
    for layer in ranks(adapted).layers().values():
        a, b, gate = (getattr(layer, f"brick_{n}")["default"] for n in ("a", "b", "gate"))
        assert not a.grad[1].any() and not b.grad[:, 1].any()
        assert a.grad[0].any() and b.grad[:, 0].any()
        assert gate.grad[1] != 0


@pytest.mark.parametrize("seed", range(3))
def test_cutting_dead_ranks_keeps_the_outputs_and_the_moments_of_the_rest(seed: int) -> None:
    adapted = stir(model(), seed=seed).train()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted(**words()).logits.square().sum().backward()
    optimiser.step()
    masks = kill(adapted.eval(), seed)
    before = logits(adapted)
    first = next(name for name, mask in masks.items() if 0 < mask.sum() < 4)
    layer = ranks(adapted).layers()[first]
    held = [getattr(layer, f"brick_{n}")["default"] for n in ("a", "b", "gate")]
    moments = [optimiser.state[p]["exp_avg_sq"].clone() for p in held]
    ranks(adapted).keep(masks, optimiser)
    assert ranks(adapted).now() == {name: int(mask.sum()) for name, mask in masks.items()}
    assert ranks(adapted).now()[list(masks)[3]] == 0
    torch.testing.assert_close(logits(adapted), before, rtol=1e-5, atol=1e-6)
    for p, moment, axis in zip(held, moments, (0, 1, 0), strict=True):
        assert (
            p
            is getattr(layer, f"brick_{'a' if p.ndim == 2 and axis == 0 else 'b' if p.ndim == 2 else 'gate'}")[
                "default"
            ]
        )
        kept = masks[first].nonzero()[:, 0]
        torch.testing.assert_close(optimiser.state[p]["exp_avg_sq"], moment.index_select(axis, kept), rtol=0, atol=0)
    adapted.train()(**words()).logits.square().sum().backward()
    optimiser.step()  # the same objects, in their new shapes


def test_a_cut_adapter_is_stored_merged_and_exported_in_its_shape(tmp_path: Path) -> None:
    adapted = stir(model())
    masks = kill(adapted)
    ranks(adapted).keep(masks, None)
    before = logits(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(bert(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again), before, rtol=0, atol=0)
    assert ranks(again).now() == {name: int(mask.sum()) for name, mask in masks.items()}  # type: ignore[arg-type]
    exported = to_lora(adapted, "default", tmp_path / "lora")
    assert exported.exact and exported.ranks == {n: int(m.sum()) for n, m in masks.items() if m.any()}
    plain = PeftModel.from_pretrained(bert(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    sizes = [(tmp_path / f / "adapter_model.safetensors").stat().st_size for f in ("lora", "adapter")]
    whole = stir(model())
    whole.save_pretrained(str(tmp_path / "whole"))
    of_all = sum(int(m.sum()) for m in masks.values()) / sum(len(m) for m in masks.values())
    weights = sum(t.numel() for n, t in whole.base_model.adapter_tensors("default").items() if "gate" not in n)  # type: ignore[operator]
    kept = sum(t.numel() for n, t in adapted.base_model.adapter_tensors("default").items() if "gate" not in n)  # type: ignore[operator]
    assert kept / weights == pytest.approx(of_all, abs=0.05) and sizes[0] < 1.2 * sizes[1]
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)


def test_ranks_in_a_file_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadBrick, match="allows 0 to 4"):
        get_peft_model(bert(), BrickyardConfig(method="sora", options={"r": 4}, rank_pattern={_first(): 9}))
    with pytest.raises(BadBrick, match="no ranks here"):
        get_peft_model(bert(), BrickyardConfig(method="sora", options={"r": 4}, rank_pattern={"elsewhere": 1}))
    with pytest.raises(Refused, match="exceeds layer"):
        model(r=17)


def _first() -> str:
    return next(iter(ranks(model()).layers()))


@pytest.mark.parametrize(
    "options",
    [{"k": -1.0}, {"schedule": [1e-3, 1e-4]}, {"schedule": [-1.0, 0.0]}, {"r": 0}, {"prox": "hard"}, {"gate": "zeros"}],
    ids=str,
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        sora.Config(**options)


def setting(arm: str, base: Path) -> trial.Setting:
    training = {"batch": 8, "precision": "float32"}
    return trial.Setting(arm=arm, base=str(base), data=text_data(), training=training, device="cpu")


def test_gates_are_in_a_group_of_their_own_without_weight_decay(text_base: Path) -> None:
    prepared = trial.prepare(setting("sora:r=4,gate_lr=0.5", text_base), ("train",))
    made = build(prepared.plan, prepared.base, prepared.task, seed=0)
    others, own = made.parameter_groups
    assert {p.ndim for p in own["params"]} == {1} and own["weight_decay"] == 0.0 and own["lr_scale"] == 0.5
    assert not {id(p) for p in own["params"]} & {id(p) for p in others["params"]}


def tuned(arm: str, base: Path) -> tuple[dict[str, int], dict]:
    training = {"batch": 8, "epochs": 4, "lr": 5e-3}
    made, result = brickyard.tune(arm, base=str(base), data=text_data(), training=training, device="cpu")
    applied = made.apply(open_base(str(base))).model
    return ranks(applied).now(), result  # type: ignore[arg-type]


def test_ranks_fall_with_the_threshold_and_the_brick_holds_what_is_left(text_base: Path) -> None:
    totals = []
    for k in (0.0, 0.02, 0.05):
        left, result = tuned(f"sora:r=4,k={k}", text_base)
        totals.append(sum(left.values()))
        best = next(point for point in result["history"] if point["step"] == result["best_step"])
        assert best["ranks"] == totals[-1] > 0
    assert totals[0] == 4 * len(left) > totals[1] > totals[2]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 7))
def test_stages_share_out_all_steps(total: int, stages: int) -> None:
    stages = min(stages, total)
    found = [sora.stage_of(step, total, stages) for step in range(total)]
    assert [stage for stage, _, _ in found] == sorted(stage for stage, _, _ in found)
    assert {stage for stage, _, _ in found} == set(range(stages))
    assert all(first <= step < first + steps for step, (_, first, steps) in enumerate(found))
    lengths = {steps for _, _, steps in found}
    assert max(lengths) - min(lengths) <= 1


class Watch:
    """Notes the learning rate and the threshold of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.thresholds: list[float] = []

    def after_step(self, state: State) -> None:
        assert state.optimiser is not None
        self.rates.append(state.optimiser.param_groups[0]["lr"])
        sparsifier = next(c for c in state.attached.callbacks if isinstance(c, sora.Sparsifier))
        self.thresholds.append(sparsifier.threshold(state))


def test_every_stage_is_trained_to_its_end_under_a_rising_threshold(text_base: Path) -> None:
    """k = eta lambda with eta's own course in each stage: the last stage presses hardest, and each one is recorded."""
    ks, watch = (0.01, 0.02, 0.04), Watch()
    _, result = brickyard.tune(
        f"sora:r=4,schedule=[{','.join(map(str, ks))}]",
        base=str(text_base),
        data=text_data(),
        training={"batch": 8, "steps": 50, "lr": 5e-3, "warmup": 0.1, "evaluate_every": 20, "patience": 1},
        callbacks=(watch,),
        device="cpu",
    )
    assert len(watch.rates) == 50, "patience does not end a run before its last stage"
    shares = np.array_split(np.arange(50), 3)
    ends = [17, 34, 50]
    for share, k, end in zip(shares, ks, ends, strict=True):
        rates, thresholds = np.array(watch.rates)[share], np.array(watch.thresholds)[share]
        assert rates.max() == pytest.approx(5e-3) and rates[-1] < 0.1 * rates.max()
        np.testing.assert_allclose(thresholds, k * rates / 5e-3, rtol=1e-6)
        point = next(p for p in result["history"] if p["step"] == end)
        assert point["k"] == k and point["ranks"] > 0 and 0 <= point["validation_score"] <= 1
    curve = [p for p in result["history"] if "k" in p]
    assert [p["stage"] for p in curve] == [1, 2, 3]
    assert curve[0]["ranks"] > curve[1]["ranks"] > curve[2]["ranks"]


def test_more_stages_than_steps_are_refused(text_base: Path) -> None:
    with pytest.raises(UsageError, match="2 steps are too few for 3 stages"):
        brickyard.tune(
            "sora:r=4,schedule=[1e-3,2e-3,3e-3]",
            base=str(text_base),
            data=text_data(),
            training={"steps": 2},
            device="cpu",
        )


class Stop:
    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self, state: State) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


def test_ranks_cut_in_training_resume_bit_for_bit(text_base: Path, tmp_path: Path) -> None:
    """Interrupted after the cut, the run goes on in the new shapes and ends in the same weights."""
    arm = "sora:r=4,k=0.02,compact=3"
    ends = []
    for stop in (0, 40):
        prepared = trial.prepare(setting(arm, text_base), ("train",))
        training = replace(prepared.training, steps=60, checkpoint_every=10, lr=5e-3, schedule="constant", batch=8)
        data = prepared.encoded["train"]

        for callbacks in ([Stop(stop)], []) if stop else ([],):
            torch.manual_seed(0)
            made = build(prepared.plan, prepared.base, prepared.task, seed=0)
            try:
                train(made, data, None, prepared.task, training, folder=tmp_path / f"s{stop}", callbacks=callbacks)
            except KeyboardInterrupt:
                assert sum(ranks(made.model).now().values()) < 4 * len(ranks(made.model).now())  # type: ignore[arg-type]
        ends.append(made.tensors())
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=0)


def test_a_threshold_that_kills_everything_is_no_result(text_base: Path) -> None:
    with pytest.raises(NoEffect, match="every rank of every layer"):
        tuned("sora:r=2,k=5.0", text_base)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 40))
def test_the_budget_is_kept_by_count_and_by_cost(scores: list[list[int]], budget: int) -> None:
    vectors = [torch.tensor(s, dtype=torch.float32) for s in scores]
    masks = keep_best(vectors, budget)
    total = sum(len(s) for s in scores)
    assert sum(int(m.sum()) for m in masks) == min(budget, total)
    kept = [v for s, m in zip(vectors, masks, strict=True) for v in s[m].tolist()]
    dropped = [v for s, m in zip(vectors, masks, strict=True) for v in s[~m].tolist()]
    assert not kept or not dropped or min(kept) >= max(dropped)
    costs = [1.0 + i for i in range(len(scores))]
    spent = sum(c * int(m.sum()) for c, m in zip(costs, keep_best(vectors, budget, costs), strict=True))
    assert spent <= budget
    with pytest.raises(UsageError):
        keep_best(vectors, budget, [0.0] * len(vectors))


def test_the_checks_arms_keep_the_weights_of_their_last_step(text_base: Path, tmp_path: Path) -> None:
    """The share of ranks that a claim names is that at the end, whichever step validated best."""
    claim = next(c for c in sora.RECORD.claims if c.measure == "by_sparsity")
    asked = {**asked_by(claim), "base": str(text_base), "data": text_data(), "device": "cpu"}
    arm = "sora:r=4,k=0.02,lr=5e-3"
    runs = {}
    for name, given_ in (("selected", asked), ("last", to_the_end(asked))):
        made = asdict(trial.Setting(arm=arm, **given_))
        runs[name] = trial.run({"setting": made, "folder": str(tmp_path / name), "role": "search"})
    last = runs["last"]
    assert last["best_step"] == last["steps"] == runs["selected"]["steps"]
    assert [point["step"] for point in last["history"]] == [last["steps"]]
    assert len(runs["selected"]["history"]) == claim.epochs  # without it every epoch competes
    left = bricks.load(tmp_path / "last" / "brick").apply(open_base(str(text_base))).model
    assert sum(ranks(left).now().values()) == ranks_left(last) == runs["selected"]["history"][-1]["ranks"]  # type: ignore[arg-type]


def test_the_check_asks_for_the_last_steps_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = next(c for c in sora.RECORD.claims if c.measure == "by_sparsity")
    seen: list[dict] = []

    def stop(claim: object, arms: object, asked: dict, folder: Path, workers: int, **_: Any) -> None:
        seen.append(asked)
        raise InterruptedError("nothing is trained here")

    monkeypatch.setattr(checks, "tuned", stop)
    with pytest.raises(InterruptedError):
        checks.by_sparsity(claim)
    assert seen == [to_the_end(asked_by(claim))] and seen[0]["training"]["epochs"] == claim.epochs


def test_on_a_language_model_gains_over_the_base_are_compared(
    causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(jobs: Any, workers: int, folder: Path) -> dict[str, Any]:
        return {job.key: trial.run(job.argument) for job in jobs}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "finished", here)
    claim = next(c for c in sora.RECORD.claims if c.measure == "by_sparsity" and c.base == "embedded:pylm")
    small: Any = replace(
        claim, base=str(causal_base), data=documents(), seeds=2, lrs=(1e-2,), train_rows=0, epochs=2, max_length=32
    )
    found = checks.by_sparsity(small, workers=1, task="causal-lm")
    assert found.keys() == {"against_dense", "against_cutting"}
    dense = found["against_dense"]
    assert dense["inequality"] == "many >= 0.9 lora" and dense["gate"]["inequality"] == "lora > base +1.0"
    assert found["against_cutting"]["inequality"] == "few >= smallest"
    gains = dense["detail"].partition("hundredths of bits per byte")[2].partition("untouched base: lora ")[2]
    assert float(gains.partition(",")[0]) > 1  # what it gained, and not its bits


def test_tune_prints_the_curve_of_quality_against_ranks() -> None:
    from rich.console import Console

    from brickyard.commands import _Curve

    console = Console(record=True, width=200)
    point = {"step": 9, "train_loss": 0.5, "validation_score": 0.75, "validation_loss": 0.6, "examples": 72}
    task = SimpleNamespace(metric="accuracy")
    noted = SimpleNamespace(history=[{**point, "ranks": 31, "stage": 2, "k": 7e-4}], total=9, task=task)
    _Curve(console).evaluated(noted)
    assert console.export_text().rstrip().endswith("validation accuracy 0.7500  ranks 31  stage 2  k 0.0007")


def test_counts_of_dead_steps_go_back_to_the_models_device() -> None:
    adapted = model(compact=2)
    sparsifier = sora.Sparsifier(sora.Config(r=4, compact=2), ranks(adapted))
    kept = {name: torch.ones(4, dtype=torch.int64) for name in gates(adapted)}  # a checkpoint, read on the CPU
    adapted.to("meta")
    sparsifier.load_state_dict(kept)
    assert {count.device.type for count in sparsifier.dead_for.values()} == {"meta"}


def test_cutting_dead_ranks_does_not_raise_the_penalty(text_base: Path) -> None:
    prepared = trial.prepare(setting("sora:r=4,l1=2.0,compact=3", text_base), ("train",))
    made = build(prepared.plan, prepared.base, prepared.task, seed=0)
    found = gates(made.model)  # type: ignore[arg-type]
    every = torch.cat(list(found.values())).detach()
    penalty = made.extra_loss
    assert penalty is not None
    torch.testing.assert_close(penalty().detach(), 2.0 * every.abs().mean())
    kill(made.model)  # type: ignore[arg-type]
    before = penalty().detach()
    sparsifier = next(c for c in made.callbacks if isinstance(c, sora.Sparsifier))
    sparsifier.cut({name: gate == 0 for name, gate in found.items()}, None)
    assert sum(len(gate) for gate in found.values()) < len(every)
    torch.testing.assert_close(penalty().detach(), before)


def test_what_killed_every_rank_is_named_in_the_error() -> None:
    adapted = model()
    with torch.no_grad():
        for gate in gates(adapted).values():
            gate.zero_()
    # The course of the learning rate has come down to 0 here, and with it the soft threshold.
    state = SimpleNamespace(step=9, total=10, training=SimpleNamespace(lr=1.0, factor=lambda step, total: 0.0))
    sparsifier = sora.Sparsifier(sora.Config(r=4, schedule=(0.5, 3.0)), ranks(adapted))
    with pytest.raises(NoEffect, match=r"k=3 is too large"):
        sparsifier.end(state)  # type: ignore[arg-type]


def test_factors_in_double_precision_are_exported_as_they_are(tmp_path: Path) -> None:
    adapted = stir(model()).double()
    exported = to_lora(adapted, "default", tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert exported.exact
    for name, layer in ranks(adapted).layers().items():
        a_rn, b_mr, _ = layer.factors("default", layer.part("default", training=False))
        for key, value in (("lora_A", a_rn), ("lora_B", b_mr)):
            torch.testing.assert_close(stored[f"base_model.model.{name}.{key}.weight"], value.detach(), rtol=0, atol=0)
