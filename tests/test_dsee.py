"""DSEE: where its sparse entries stand, that only they train, and that what is pruned is really gone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bridged import bert, logits, words
from conftest import documents, text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import brickyard
from brickyard.core import brick as bricks
from brickyard.core import measure, trial
from brickyard.core.answers import answer
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.build import build
from brickyard.core.data import read_data
from brickyard.core.errors import BadBrick, BadMix, Refused, UsageError
from brickyard.core.export import export
from brickyard.core.loop import State, train
from brickyard.core.roles import roles
from brickyard.core.slim import Slimmed, keep_units, resize_config, units
from brickyard.core.task import Task, task_of
from brickyard.tune import dsee
from brickyard.tune._outliers import positions

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TASK = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")
HALVES: dict[str, Any] = {"heads": 0.5, "neurons": 0.4}


def attached(stirred: bool = True, model: nn.Module | None = None, **options: object) -> Attached:
    given_ = {"r": 3, "alpha": 6.0, "n_sparse": 9, **options}
    torch.manual_seed(0)
    made = dsee.attach(model or bert(), dsee.Config(**given_), TASK)  # type: ignore[arg-type]
    if stirred:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in made.model.named_parameters():
                if "brick_" in name:
                    p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (1.0 if "scale" in name else 0.0))
    made.model.eval()
    return made


def pruner(made: Attached) -> dsee.Pruner:
    return made.callbacks[-1]


class Watch:
    """Notes the smallest |c| of every block before each step, as long as there are coefficients to judge."""

    def __init__(self, of: dsee.Pruner, found: dict[str, float]) -> None:
        self.of, self.found = of, found

    def before_step(self, state: State) -> None:
        if not self.of.pruned:
            at = {u.gate: self.of.layers[u.gate].get_parameter("brick_scale.default") for u in self.of.parts}
            self.found.update({gate: float(c.detach().abs().min()) for gate, c in at.items()})


@pytest.mark.parametrize("options", [{}, HALVES, {"unstructured": 0.5}, {"n_sparse": 0}], ids=str)
def test_a_new_adapter_changes_nothing(options: dict) -> None:
    made = attached(stirred=False, **options)
    torch.testing.assert_close(logits(made.model), logits(bert()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, HALVES, {"unstructured": 0.5}], ids=str)
def test_the_factored_form_is_the_dense_one_before_and_after_pruning(options: dict) -> None:
    made = attached(**options)
    for _ in range(3):
        for layer in pruner(made).layers.values():
            x, part = torch.randn(2, 5, layer.base_weight().shape[1]), layer.part("default")
            dense = F.linear(x, layer.base_weight() + dsee.weight(pruner(made).config, part), layer.base_layer.bias)  # type: ignore[arg-type]
            torch.testing.assert_close(layer(x), dense, rtol=1e-4, atol=1e-5)
        if pruner(made).pruned:
            with pytest.raises(Refused, match="pruned already"):
                pruner(made).prune(None, torch.Generator().manual_seed(0))
            break
        pruner(made).prune(None, torch.Generator().manual_seed(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 19), st.integers(0, 2**31 - 1))
def test_masks_are_packed_without_loss(m: int, n: int, seed: int) -> None:
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = dsee.pack(mask)
    assert bits.shape == (m, math.ceil(n / 8)) and torch.equal(dsee.unpack(bits, n), mask)


@pytest.mark.parametrize("rule", ["greedy", "magnitude", "random"])
def test_exactly_so_many_places_even_with_ties(rule: str) -> None:
    w = torch.ones(12, 20)
    rows, cols = positions(w, 17, rule, torch.Generator().manual_seed(0))
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) == 17
    assert rows.max() < 12 and cols.max() < 20


def test_the_decomposition_finds_planted_outliers_that_magnitude_misses() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(60, 4, generator=g) @ torch.randn(4, 80, generator=g) * 0.05
    place = torch.randperm(low.numel(), generator=g)[:40]
    w = low.clone()
    w.view(-1)[place] += 0.1 * torch.sign(torch.randn(40, generator=g))
    truth = set(place.tolist())
    found = {}
    for rule in ("greedy", "magnitude"):
        rows, cols = positions(w, 40, rule, torch.Generator().manual_seed(0))
        found[rule] = len(truth & set((rows.long() * 80 + cols.long()).tolist())) / 40
    assert found["greedy"] >= 2 * found["magnitude"] > 0


@pytest.mark.parametrize("planted", [0, 3])
def test_of_a_weight_of_small_entries_the_largest_residuals_are_taken(planted: int) -> None:
    """Where the first fit leaves fewer outliers above the threshold than are wanted, its residual ranks them all."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(30, 1, generator=g) @ torch.randn(1, 40, generator=g) * 5e-4
    place = torch.randperm(w.numel(), generator=g)[:20]
    w.view(-1)[place] += 7e-3 * torch.sign(torch.randn(20, generator=g))
    w.view(-1)[place[:planted]] *= 3.0
    rows, cols = positions(w, 20, "greedy", torch.Generator().manual_seed(0))
    found = set((rows.long() * 40 + cols.long()).tolist())
    assert len(found) == 20 and len(found & set(place.tolist())) >= 16
    assert found != set(range(20)) and set(place[:planted].tolist()) <= found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0.3}, r"heads=0\.3 of the 2 heads of block bert\.encoder\.layer\.0 .* at least 0\.5"),
        ({"neurons": 0.03}, r"neurons=0\.03 of the 32 neurons of block .* at least 0\.032"),
    ],
)
def test_a_share_below_one_unit_is_refused_with_the_count(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attached(**options)
    attached(heads=0.5, neurons=0.032)


def test_a_base_without_heads_is_refused_in_words() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 2]))  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"shows no single .*key"):
        units(model)
    with pytest.raises(Refused, match="no repeated blocks"):
        units(nn.Sequential(nn.Linear(4, 4)))


def test_only_the_entries_of_the_support_train(text_base: Path) -> None:
    prepared = trial.prepare(setting("dsee:r=2,n_sparse=5", text_base), ("train",))
    made = build(prepared.plan, prepared.base, prepared.task, seed=0)
    data = prepared.encoded["train"]
    train(made, data, None, prepared.task, replace(prepared.training, steps=6, wd=0.3, lr=1e-2))
    for layer in pruner(made).layers.values():
        part = layer.part("default")
        sparse = dsee.update(pruner(made).config, part) / pruner(made).config.scaling - part["b"] @ part["a"]  # type: ignore[operator]
        allowed = torch.zeros_like(sparse, dtype=torch.bool)
        allowed[part["rows"].long(), part["cols"].long()] = True
        assert int(allowed.sum()) == 5 and part["values"].all()
        assert sparse[~allowed].abs().max() < 1e-6


def test_every_coefficient_feels_the_whole_penalty() -> None:
    made = attached(stirred=False, l1=0.25, **HALVES)
    made.extra_loss().backward()  # type: ignore[misc]
    held = pruner(made).coefficients()
    assert sum(len(c) for c in held) > 40  # a mean over them would leave each a fortieth, or less
    for c in held:
        torch.testing.assert_close(c.grad, torch.full_like(c, 0.25), rtol=0, atol=0)


def test_the_penalty_shrinks_what_the_task_does_not_hold_and_decides_what_stays(text_base: Path) -> None:
    """At its default weight, beside a training without it: |c| falls in every block, and other neurons are kept."""
    smallest: dict[float, dict[str, float]] = {}
    kept: dict[float, list[int]] = {}
    for l1 in (0.0, dsee.Config().l1):
        prepared = trial.prepare(
            setting(f"dsee:r=2,n_sparse=4,heads=0.5,neurons=0.5,at=0.9,l1={l1}", text_base), ("train",)
        )
        made = build(prepared.plan, prepared.base, prepared.task, seed=0)
        found = smallest[l1] = {}
        train(
            made,
            prepared.encoded["train"],
            None,
            prepared.task,
            replace(prepared.training, steps=30, lr=5e-3),
            callbacks=[Watch(pruner(made), found)],
        )
        down = next(u.gate for u in pruner(made).parts if u.kind == "neurons")
        kept[l1] = pruner(made).layers[down].brick_fixed_kept["default"].tolist()  # type: ignore[index]
    without, with_it = smallest.values()
    assert all(with_it[gate] < without[gate] - 0.01 for gate in without)
    assert len(kept[0.0]) == len(kept[dsee.Config().l1]) and kept[0.0] != kept[dsee.Config().l1]


def test_removed_heads_and_neurons_answer_as_if_they_were_masked() -> None:
    slim, masked = bert(), bert()
    modules, other = dict(slim.named_modules()), dict(masked.named_modules())
    before = {n: p.clone() for n, p in slim.named_parameters()}
    held = Slimmed()
    for unit in units(slim):
        kept = torch.arange(0, unit.count, 2)
        keep_units(held, modules, unit, kept)
        gone = unit.index(unit.gate, torch.tensor([i for i in range(unit.count) if i not in set(kept.tolist())]))
        with torch.no_grad():
            other[unit.gate].weight[:, gone] = 0.0  # type: ignore[index]
    torch.testing.assert_close(logits(slim), logits(masked), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in slim.parameters()) < 0.8 * sum(p.numel() for p in masked.parameters())
    held.undo()
    assert all(torch.equal(p, before[n]) for n, p in slim.named_parameters())
    torch.testing.assert_close(logits(slim), logits(bert()), rtol=0, atol=0)


def test_groups_of_query_heads_go_together(causal_base: Path) -> None:
    model = open_base(str(causal_base)).model(Task("causal-lm", "bits_per_byte", None, 1, "text"), seed=0)
    heads = next(u for u in units(model) if u.kind == "heads")
    assert heads.count == 1  # two query heads share one key/value head
    with pytest.raises(Refused, match="keep at least one"):
        keep_units(Slimmed(), dict(model.named_modules()), heads, torch.tensor([], dtype=torch.long))


@pytest.mark.parametrize("score", ["update", "magnitude", "random"])
def test_pruning_makes_the_layers_and_the_flops_smaller(score: str) -> None:
    made = attached(score=score, **HALVES)
    before = measure.forward_flops(made.model, words())
    expected = {u.gate: u.count - math.floor((0.5 if u.kind == "heads" else 0.4) * u.count) for u in pruner(made).parts}
    scales = {g: pruner(made).layers[g].get_parameter("brick_scale.default").abs().clone() for g in expected}
    pruner(made).prune(None, torch.Generator().manual_seed(0))
    for unit in pruner(made).parts:
        layer = pruner(made).layers[unit.gate]
        assert layer.base_weight().shape[1] == expected[unit.gate] * unit.layers[unit.gate][1]
        if score == "update":
            left = layer.get_parameter("brick_scale.default").abs()
            assert left.min() >= scales[unit.gate].sort().values[unit.count - expected[unit.gate]]
    assert measure.forward_flops(made.model, words()) < 0.8 * before
    assert torch.isfinite(logits(made.model)).all()
    made.detach()


def test_taking_it_off_gives_the_base_back_bit_for_bit() -> None:
    model = bert()
    before = {n: p.clone() for n, p in model.named_parameters()}
    made = attached(model=model, **HALVES)
    pruner(made).prune(None, torch.Generator().manual_seed(0))
    plain = made.detach()
    assert {n for n, _ in plain.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())


def test_a_slimmed_base_serves_no_rows_of_others() -> None:
    made = attached(heads=0.5, neurons=0.5)
    model: Any = made.model.eval()
    names = ["default", "__base__", "default", "__base__"]
    whole = logits(model, adapter_names=names)  # nothing is removed yet
    torch.testing.assert_close(whole[0], logits(model)[0], rtol=1e-4, atol=1e-5)
    pruner(made).prune(None, torch.Generator().manual_seed(0))
    with pytest.raises(BadMix, match=r"removed heads or neurons.*'__base__'"):
        logits(model, adapter_names=names)
    torch.testing.assert_close(logits(model, adapter_names=["default"] * 4), logits(model), rtol=1e-4, atol=1e-5)


def test_the_share_of_zeros_is_exact_in_each_group() -> None:
    made = attached(unstructured=0.3)
    pruner(made).prune(None, torch.Generator().manual_seed(0))
    counts: dict[bool, list[int]] = {True: [0, 0], False: [0, 0]}
    for layer in pruner(made).layers.values():
        mask = dsee.unpack(layer.brick_fixed_mask["default"], layer.in_features)  # type: ignore[index]
        updated = "a" in layer.part("default").tensors
        counts[updated][0] += int((~mask).sum())
        counts[updated][1] += mask.numel()
    assert all(zeros == math.floor(0.3 * total) for zeros, total in counts.values())


def setting(arm: str, base: Path) -> trial.Setting:
    training = {"batch": 8, "precision": "float32"}
    return trial.Setting(arm=arm, base=str(base), data=text_data(), training=training, device="cpu")


@pytest.mark.parametrize(
    "arm",
    ["dsee:r=2,n_sparse=4,heads=0.5,neurons=0.5", "dsee:r=2,n_sparse=4,unstructured=0.4,support=magnitude"],
)
def test_a_brick_opens_pruned_and_answers_the_same(arm: str, text_base: Path, tmp_path: Path) -> None:
    training = {"batch": 8, "epochs": 4, "lr": 5e-3}
    made, result = brickyard.tune(
        arm, base=str(text_base), data=text_data(), training=training, device="cpu", out=tmp_path / "run"
    )
    base = open_base(str(text_base))
    ready = trial.prepare(setting(arm, text_base), ("train", "test"))
    opened = made.apply(base).model
    found = answer(opened, ready.encoded["test"], ready.task)
    labels = ready.encoded["test"].labels.numpy()
    assert ready.task.score(labels, found.predictions) == pytest.approx(result["score"]["mean"])
    twice = bricks.load(made.folder).apply(base).model
    assert np.array_equal(answer(twice, ready.encoded["test"], ready.task).predictions, found.predictions)
    if "heads" in arm:
        names = roles(opened)
        query = next(n for n, role in names.items() if role == "query")
        assert dict(opened.get_base_model().named_modules())[query].weight.shape[0] == 16  # type: ignore[operator]
        with pytest.raises(Refused, match="BertConfig makes heads hidden_size / num_attention_heads wide"):
            export(made.folder, "merged", tmp_path / "merged")
        with pytest.raises(Refused, match="no adapter fits a base whose parts were removed"):
            export(made.folder, "peft", tmp_path / "peft")
    else:
        assert export(made.folder, "merged", tmp_path / "merged")["max_gap"] <= 1e-4


@pytest.fixture
def grouped_base(causal_base: Path, tmp_path: Path) -> Path:
    """A Llama with two groups of two heads."""
    config = AutoConfig.from_pretrained(causal_base)
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "grouped")
    AutoTokenizer.from_pretrained(causal_base).save_pretrained(tmp_path / "grouped")
    return tmp_path / "grouped"


def test_a_smaller_language_model_is_a_plain_checkpoint_of_its_own_sizes(grouped_base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": documents(), "task": "causal-lm", "max_length": 32, "device": "cpu"}
    made, _ = brickyard.tune(
        "dsee:r=2,n_sparse=4,heads=0.5,neurons=0.25", base=str(grouped_base), out=tmp_path / "run",
        training={"batch": 8, "epochs": 4, "lr": 5e-3}, **options,
    )  # fmt: skip
    done = export(made.folder, "merged", tmp_path / "merged")
    assert done["max_gap"] <= 1e-4
    sizes = {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 48}
    assert f"({', '.join(f'{name} {size}' for name, size in sizes.items())})" in done["sentence"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {name: getattr(plain.config, name) for name in sizes} == sizes
    assert sum(p.numel() for p in plain.parameters()) < sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(grouped_base).parameters()
    )
    scores = [
        brickyard.evaluate(**given, **options)["score"]["mean"]
        for given in ({"base": str(tmp_path / "merged")}, {"brick": str(made.folder)})
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_an_encoder_without_some_of_its_neurons_is_one_too(text_base: Path, tmp_path: Path) -> None:
    made, _ = brickyard.tune(
        "dsee:r=2,n_sparse=4,neurons=0.5", base=str(text_base), data=text_data(), device="cpu", out=tmp_path / "run",
        training={"batch": 8, "epochs": 4, "lr": 5e-3},
    )  # fmt: skip
    done = export(made.folder, "merged", tmp_path / "merged")
    assert done["max_gap"] <= 1e-4 and "(intermediate_size 32)" in done["sentence"]
    assert AutoConfig.from_pretrained(tmp_path / "merged").intermediate_size == 32
    assert AutoConfig.from_pretrained(text_base).intermediate_size == 64


def test_blocks_of_different_sizes_have_no_configuration(grouped_base: Path) -> None:
    model = open_base(str(grouped_base)).model(task_of(read_data(documents(), task="causal-lm")), seed=0)
    slimmed = Slimmed()
    heads = next(unit for unit in units(model) if unit.kind == "heads")
    keep_units(slimmed, dict(model.named_modules()), heads, torch.tensor([0]))
    with pytest.raises(Refused, match="blocks differ in the outputs of query, key and up"):
        resize_config(model)
    slimmed.undo()
    assert resize_config(model) == {}


class Stop:
    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self, state: State) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [5, 15])
def test_an_interrupted_run_goes_on_bit_for_bit_across_the_pruning(stop: int, text_base: Path, tmp_path: Path) -> None:
    arm = "dsee:r=2,n_sparse=4,heads=0.5,neurons=0.5"
    prepared = trial.prepare(setting(arm, text_base), ("train",))
    training = replace(prepared.training, steps=20, checkpoint_every=2, lr=5e-3)
    data = prepared.encoded["train"]
    ends = []
    for name, runs in (("whole", [[]]), ("cut", [[Stop(stop)], []])):
        for callbacks in runs:
            made = build(prepared.plan, prepared.base, prepared.task, seed=0)
            try:
                train(made, data, None, prepared.task, training, folder=tmp_path / name, callbacks=callbacks)
            except KeyboardInterrupt:
                assert pruner(made).pruned == (stop > 10)
        ends.append(made.tensors())
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 1.0},
        {"heads": 0.5, "unstructured": 0.5},
        {"support": "largest"},
        {"score": "best"},
        {"at": 1.0},
        {"target": ("norm",)},
        {"r": 0},
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        dsee.Config(**options)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(Refused, match="exceeds layer"):
        attached(n_sparse=17 * 16)
    made = attached()
    tensors = made.tensors()
    name = next(n for n in tensors if "rows" in n)
    tensors[name] = tensors[name] + 100
    with pytest.raises(BadBrick, match="lie outside"):
        made.load(tensors)
