"""LoCA against its equations: transforms, both paths, both gradients, the turns, storage, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bridged import bert, logits, same, stir, words
from conftest import text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from scipy.fft import dctn, idctn
from torch import nn

from brickyard.checks import loca as check
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.build import build, resolve, step_of
from brickyard.core.errors import BadBrick, BadMix, Refused, UsageError
from brickyard.core.inject import BrickyardConfig, BrickyardLinear, Leaf, Part, register, to_lora
from brickyard.core.loop import Backprop, train
from brickyard.core.measure import saved_for_backward
from brickyard.tune import _cosines, _dct, loca

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ARM = "loca:n_frequency=40,cycle=[2,3],locate=0.5"
register()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosines(n: int) -> torch.Tensor:
    """C_N written out entry by entry, as the docstring has it."""
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    made = np.sqrt(2 / n) * np.cos(np.pi * (2 * j + 1) * i / (2 * n))
    made[0] = np.sqrt(1 / n)
    return torch.from_numpy(made)


def case(seed: int, m: int, n: int, count: int, tokens: int = 5) -> tuple[torch.Tensor, ...]:
    """g [T, m], x [T, n], a [K] and positions [2, K] with duplicates and every corner."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randint(side, (count,), generator=generator) for side in (m, n)])
    corners = torch.tensor([[0, 0], [0, n - 1], [m - 1, 0], [m - 1, n - 1], [0, 0]]).t()
    index = torch.cat([corners, index], dim=1)
    return draw(tokens, m, seed=seed), draw(tokens, n, seed=seed + 1), draw(index.shape[1], seed=seed + 2), index


def model(seed: int = 1, base: nn.Module | None = None, **options: object) -> PeftModel:
    given = {"n_frequency": 30, **options}
    return get_peft_model(base or bert(), BrickyardConfig(method="loca", options=given, seed=seed)).eval()


def ready(base: Path, arm: str = ARM, **training: object) -> trial.Prepared:
    known = {"epochs": 4, "precision": "float32", "batch": 16, "lr": 2e-2, **training}
    return trial.prepare(
        trial.Setting(arm=arm, base=str(base), data=text_data(), training=known, cache=False, device="cpu")
    )


@given(st.integers(1, 33), st.integers(1, 33), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_tables_ffts_and_scipy_are_one_transform(m, n, seed):
    x = draw(m, n, seed=seed)
    for transform, theirs in ((_dct.dct2, dctn), (_dct.idct2, idctn)):
        expected = theirs(x.numpy(), type=2, norm="ortho")
        for fft in (False, True):
            np.testing.assert_allclose(transform(x, fft).numpy(), expected, atol=1e-10)
            np.testing.assert_allclose(transform(x.float(), fft).numpy(), expected, atol=1e-4)
    torch.testing.assert_close(_dct.dct2(x).norm(), x.norm())
    table = _dct.table(n, x.device, torch.float32)
    assert table is _dct.table(n, x.device, torch.float32), "one table for all layers"
    torch.testing.assert_close(table @ table.t(), torch.eye(n), atol=1e-5, rtol=0)
    torch.testing.assert_close(_dct.table(n, x.device, torch.float64), cosines(n))


def test_beyond_the_largest_table_there_is_none_and_rows_are_evaluated():
    n = _dct.LARGEST_TABLE + 3
    before = _dct.table.cache_info().currsize
    index = torch.tensor([0, 1, 700, n - 1])
    torch.testing.assert_close(_dct.rows(index, n, torch.float64), cosines(n)[index])
    torch.testing.assert_close(_dct.rows(index, n, torch.float32).double(), cosines(n)[index], atol=1e-6, rtol=0)
    x = draw(2, n)
    torch.testing.assert_close(_dct.idct(_dct.dct(x)), x)
    torch.testing.assert_close(_dct.dct(x), x @ cosines(n).t())
    assert _dct.table.cache_info().currsize == before
    assert _dct.cost(n) < n / 2 and _dct.cost(n - 3) == n - 3 and _dct.cost(64 * n) < 2 * _dct.cost(n)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 40), st.integers(0, 999))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_all_ways_are_the_dense_equation_and_its_autograd(m, n, count, seed):
    g, x, a, index = case(seed, m, n, count)
    x, a = x.requires_grad_(), a.requires_grad_()
    spectrum = torch.zeros(m, n, dtype=torch.float64).index_put((index[0], index[1]), a, accumulate=True)
    dense = cosines(m).t() @ spectrum @ cosines(n)
    torch.testing.assert_close(_cosines.change(a, index, m, n), dense)
    y = 0.7 * x @ dense.t()
    to_x, to_a = torch.autograd.grad((y * g).sum(), (x, a))
    for mode in _cosines.WAYS:
        got = _cosines.Cosines.apply(x, a, index, m, 0.7, mode, None)
        torch.testing.assert_close(got, y)
        found = torch.autograd.grad((got * g).sum(), (x, a))
        torch.testing.assert_close(found, (to_x, to_a))


@pytest.mark.parametrize(("m", "n"), [(7, 1030), (1030, 7)])
def test_half_precision_goes_through_tables_and_ffts_alike(m, n):
    g, x, a, index = case(1, m, n, 50)
    expected = _cosines.gradients_by_matrix(g, x, a, index, of_x=True, of_a=True, of_places=True)
    half = (g.bfloat16(), x.bfloat16(), a.float())
    found = _cosines.gradients_by_spectrum(*half, index, of_x=True, of_a=True, of_places=True)
    pairs = [(getattr(found, name), value) for name, value in vars(expected).items()]
    pairs.append((_cosines.by_spectrum(half[1], half[2], index, m), _cosines.by_tokens(x, a, index, m)))
    assert [got.dtype for got, _ in pairs] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    for got, value in pairs:
        assert float((got - value).norm() / value.norm()) < 0.01


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 30), st.integers(0, 999), st.sampled_from([0.05, 5.0]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_the_gradient_of_positions_is_the_formula_borders_and_clipping_included(m, n, count, seed, size):
    g, x, a, index = case(seed, m, n, count)
    g = g * size
    z = 0.7 * (cosines(m) @ (g.t() @ x) @ cosines(n).t())
    expected = torch.zeros_like(index, dtype=torch.float64)
    for k, (row, col) in enumerate(index.t().tolist()):
        up, down = z[min(row + 1, m - 1), col], z[max(row - 1, 0), col]
        right, left = z[row, min(col + 1, n - 1)], z[row, max(col - 1, 0)]
        expected[:, k] = torch.stack([a[k] / 2 * (up - down), a[k] / 2 * (right - left)]).clamp(-1, 1)
    for mode in _cosines.WAYS:
        real = (index + 0.3 * torch.rand(index.shape, dtype=torch.float64)).requires_grad_()
        (_cosines.Cosines.apply(x, a, real, m, 0.7, mode, None) * g).sum().backward()
        torch.testing.assert_close(real.grad, expected)
    assert (expected.abs() == 1).any() or size < 1 or count < 20


def test_positions_are_scaled_held_and_rounded_as_the_paper_says():
    u = torch.tensor([[0.0, 0.5, 0.999, 1.4, -0.2], [0.1, 0.49, 0.95, 0.3, 0.7]], requires_grad=True)
    real = loca.places(u, 11, 5)
    assert _cosines.nearest(real).tolist() == [[0, 5, 10, 10, 0], [0, 2, 4, 1, 3]]
    real.sum().backward()
    torch.testing.assert_close(u.grad, torch.tensor([[10.0, 10, 10, 0, 0], [4.0, 4, 4, 4, 4]]))
    last = {m: int(_cosines.nearest(loca.places(torch.ones(2, 1), m, 2))[0]) for m in (500, 502)}
    assert last == {500: 499, 502: 500}, "from 502 rows on the last is out of reach"


def test_the_schedule_is_the_papers():
    table = {0: "c", 9: "c", 10: "p", 29: "p", 30: "c", 39: "c", 40: "p", 49: "p", 50: "c", 55: "c", 70: "c"}
    assert {t: loca.learning(t, 50, (10, 20))[0] for t in table} == table
    turns = loca.Turns(loca.Config(), [], [])
    for total, until in ((1000, 100), (200, 30), (20, 20)):
        turns.begin(SimpleNamespace(total=total, step=0))
        assert turns.until == until
    with pytest.raises(UsageError, match="10 optimiser steps leave none to the positions"):
        turns.begin(SimpleNamespace(total=10, step=0))


def test_the_cheaper_path_is_taken_and_gathers_no_more_than_the_layers_matrix(monkeypatch):
    assert _cosines.cheapest(2048, 100, 4096, 4096) == _cosines.cheapest(1, 100, 384, 384) == "tokens"
    assert _cosines.cheapest(64, 1000, 384, 384) == _cosines.cheapest(2048, 1000, 4096, 4096) == "spectrum"
    assert _cosines.cheapest(2048, 1000, 384, 384) == "dense"
    largest, plain = 0, _dct.rows

    def watched(index, n, dtype):
        nonlocal largest
        largest = max(largest, index.numel() * n)
        return plain(index, n, dtype)

    monkeypatch.setattr(_cosines, "rows", watched)
    g, x, a, index = case(0, 8, 6, 200)
    gradients = _cosines.gradients_by_tokens(g, x, a, index, of_x=True, of_a=True, of_places=True)
    assert 0 < largest <= 48
    whole = _cosines.gradients_by_matrix(g, x, a, index, of_x=True, of_a=True, of_places=True)
    for name, found in vars(gradients).items():
        torch.testing.assert_close(found, getattr(whole, name))


def test_a_fresh_adapter_is_the_base_and_one_coefficient_moves_by_alpha():
    assert same(logits(model()), logits(bert()))
    tuned = model(alpha=3.0)
    stir(tuned, "default")
    layer = next(layer for _, layer in tuned.base_model.layers())
    part = layer.part("default")
    index = _cosines.nearest(loca.positions(part))
    assert len(set(map(tuple, index.t().tolist()))) < 30, "some positions coincide, and add up"
    spectrum = np.zeros((16, 16))
    np.add.at(spectrum, tuple(index.numpy()), 3.0 * part["coefficients"].detach().numpy())
    np.testing.assert_allclose(layer.change("default"), idctn(spectrum, type=2, norm="ortho"), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_exported_and_reloaded_it_answers_the_same(dtype, tmp_path):
    tuned = model(base=bert().to(dtype), alpha=2.0)
    stir(tuned, "default")
    for _, layer in tuned.base_model.layers():
        part = layer.part("default")
        assert part["positions"].dtype == part["coefficients"].dtype == torch.float32
    adapted = logits(tuned)
    tuned.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(bert().to(dtype), tmp_path / "own", adapter_name="other")
    assert same(logits(again), adapted)
    if dtype == torch.float32:
        written = to_lora(tuned, "default", tmp_path / "lora")
        assert not written.exact and written.error < 1e-5
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(bert(), tmp_path / "lora")), adapted, rtol=0, atol=1e-4
        )
        lossy = to_lora(tuned, "default", tmp_path / "small", max_rank=2)
        assert 0.1 < lossy.error < 1 and set(lossy.ranks.values()) == {2}
        torch.testing.assert_close(logits(tuned.merge_and_unload(safe_merge=True)), adapted, rtol=0, atol=1e-5)


def test_positions_stored_as_floats_and_as_whole_numbers_give_the_same_model(tmp_path):
    learned, fixed = model(), model(locate=0.0)
    stir(learned, "default")
    for (_, one), (_, other) in zip(learned.base_model.layers(), fixed.base_model.layers(), strict=True):
        a, b = one.part("default"), other.part("default")
        assert b["positions"].dtype == torch.int32 and not isinstance(b["positions"], nn.Parameter)
        with torch.no_grad():
            b["positions"].copy_(_cosines.nearest(loca.positions(a)))
            b["coefficients"].copy_(a["coefficients"])
    fixed.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path)
    # The head is no part of the adapter here, and of the same seed.
    assert same(logits(again), logits(learned)) and not same(logits(again), logits(bert()))
    trained = {
        name: sum(p.numel() for p in m.parameters() if p.requires_grad)
        for name, m in (("learned", learned), ("fixed", fixed))
    }
    assert trained == {"learned": 8 * 90, "fixed": 8 * 30}


def test_both_arms_start_at_the_same_positions():
    learned, fixed = model(), model(locate=0.0)
    for (_, one), (_, other) in zip(learned.base_model.layers(), fixed.base_model.layers(), strict=True):
        a, b = one.part("default"), other.part("default")
        assert same(_cosines.nearest(loca.positions(a)).int(), b["positions"]) and a["positions"].min() >= 0


class Watch:
    """Keeps the tensors of every kind after each step, and the optimiser's state."""

    def __init__(self) -> None:
        self.a, self.u = [], []

    def after_step(self, state) -> None:
        groups = state.attached.parameter_groups
        self.a.append(torch.stack([p.detach().clone() for p in groups[0]["params"]]))
        self.u.append(torch.stack([p.detach().clone() for p in groups[1]["params"]]))


def test_who_rests_does_not_move_and_who_learns_does(text_base):
    known = ready(text_base, wd=0.1)
    attached = build(known.plan, known.base, known.task, seed=0)
    groups = attached.parameter_groups
    assert [g.get("lr_scale", 1.0) for g in groups] == [1.0, 0.02, 0.2] and groups[1]["weight_decay"] == 0.0
    assert sum(len(g["params"]) for g in groups) == len([p for p in attached.model.parameters() if p.requires_grad])
    before = torch.stack([p.detach().clone() for p in groups[1]["params"]])
    watch = Watch()
    # Accumulation makes two forwards a step, evaluation more: only steps count.
    training = replace(known.training, accumulation=2, evaluate_every=4)
    train(
        attached,
        known.encoded["train"],
        known.encoded["validation"],
        known.task,
        training,
        callbacks=[watch],
        device="cpu",
    )
    assert len(watch.a) == 24
    for step in range(1, 24):
        moved = tuple(not same(kept[step], kept[step - 1]) for kept in (watch.a, watch.u))
        expected = (False, True) if step < 12 and step % 5 >= 2 else (True, False)
        assert moved == expected, step
    assert same(watch.u[1], before)
    assert watch.u[-1].min() >= 0 and watch.u[-1].max() <= loca.LAST
    assert all(layer.drawn == {} for _, layer in attached.model.base_model.layers())


def test_positions_that_step_over_the_edge_come_back():
    u = nn.Parameter(torch.tensor([[-0.1, 0.5], [0.2, 1.3]]))
    loca.Turns(loca.Config(), [], [u]).after_step(SimpleNamespace(step=0))
    assert same(u.detach(), torch.tensor([[0.0, 0.5], [0.2, loca.LAST]]))


def test_resume_in_the_middle_of_a_turn_is_exact(text_base, tmp_path):
    class Stop(Exception):
        pass

    class At:
        def after_step(self, state) -> None:
            if state.step == 9:
                raise Stop

    known = ready(text_base)
    training = replace(known.training, checkpoint_every=4)
    rows, task = known.encoded["train"], known.task
    found = []
    for folder in (None, tmp_path):
        attached = build(known.plan, known.base, task, seed=0)
        if folder is not None:
            with pytest.raises(Stop):
                train(attached, rows, None, task, training, folder=folder, callbacks=[At()], device="cpu")
            attached = build(known.plan, known.base, task, seed=0)
        train(attached, rows, None, task, training, folder=folder, device="cpu")
        found.append(attached.tensors())
    assert found[0].keys() == found[1].keys() and all(same(found[0][k], found[1][k]) for k in found[0])


def test_it_keeps_its_input_and_positions_for_backward_and_hides_nothing():
    inputs = words(8)
    kept = {}
    for mode in _cosines.WAYS:
        saved = saved_for_backward(model(mode=mode).train(), inputs, lambda out: out.pow(2).sum())
        assert saved.hidden == ()
        kept[mode] = saved.bytes
    plain = bert()
    plain.requires_grad_(False)
    plain.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    base = saved_for_backward(plain.train(), inputs, lambda out: out.pow(2).sum()).bytes
    assert kept["tokens"] == kept["spectrum"] == kept["dense"] <= base + 8 * (2 * 30 * 4 + 30 * 4 + 4 * 60 * 8)


def test_half_precision_products_leave_the_cosines_in_full_precision():
    tuned = model(mode="dense")
    stir(tuned, "default")
    part = next(layer for _, layer in tuned.base_model.layers()).part("default")
    x = draw(6, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loca.delta(loca.Config(mode="dense"), part, x)
    exact = loca.weight(loca.Config(), part)
    assert got.dtype == torch.bfloat16
    assert same(got, x.bfloat16() @ exact.bfloat16().t())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frequency": 0}, "at least 1 coefficient"),
        ({"alpha": 0.0}, "positive"),
        ({"position_lr": 0.0}, "positive"),
        ({"locate": 1.5}, "share of the steps"),
        ({"cycle": (0, 20)}, "cycle"),
        ({"mode": "guess"}, "auto, tokens, spectrum or dense"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        loca.Config(**options)


def test_what_does_not_fit_a_layer_or_a_file_is_refused():
    with pytest.raises(Refused, match=r"n_frequency=300 exceeds the 256 entries of layer bert\.encoder\.layer\.0"):
        model(n_frequency=300)
    leaf = Leaf(name="q", group="g", in_features=4, out_features=6, position=0, count=1)
    for bad in ([[6], [0]], [[0], [4]], [[-1], [0]]):
        with pytest.raises(BadBrick, match="lie outside"):
            loca.check(
                loca.Config(), Part(leaf, {"positions": torch.tensor(bad, dtype=torch.int32)}, None, False, None)
            )
    loca.check(loca.Config(), Part(leaf, {"positions": torch.tensor([[5], [3]])}, None, False, None))


def test_rows_of_a_batch_are_served_by_their_own_adapters():
    tuned = model()
    tuned.add_adapter("second", BrickyardConfig(method="loca", options={"n_frequency": 7, "mode": "tokens"}, seed=2))
    stir(tuned, "default")
    stir(tuned, "second", seed=6)
    alone = {}
    for name in ("default", "second"):
        tuned.set_adapter(name)
        alone[name] = logits(tuned)
    mixed = logits(tuned, adapter_names=["second", "default", "__base__", "second"])
    expected = torch.stack([alone["second"][0], alone["default"][1], logits(bert())[2], alone["second"][3]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_one_transform_serves_the_rows_of_many_adapters(monkeypatch: pytest.MonkeyPatch, alpha: float):
    def options(count: int) -> dict:
        return {"n_frequency": count, "alpha": alpha, "target": ["query", "value"]}

    tuned = get_peft_model(bert(), BrickyardConfig(method="loca", options=options(30), seed=0)).eval()
    for i in range(3):  # one of them with fewer coefficients
        tuned.add_adapter(f"a{i}", BrickyardConfig(method="loca", options=options(30 - i), seed=i + 1))
    names = ["default", "a0", "a1", "a2"]
    for seed, name in enumerate(names):
        stir(tuned, name, seed=seed)
    asked = ["a2", "a0", "__base__", "a1"]
    monkeypatch.setattr(_cosines, "cheapest", lambda *_: "spectrum")
    alone = logits(tuned, adapter_names=asked)  # `loca` still asks the real one, which prefers another way
    spectra, calls = loca.by_spectra, []
    monkeypatch.setattr(loca, "cheapest", lambda *_: "spectrum")
    monkeypatch.setattr(loca, "by_spectra", lambda *args: calls.append(args[0].shape) or spectra(*args))
    torch.testing.assert_close(logits(tuned, adapter_names=asked), alone, rtol=0, atol=1e-6)
    layers = sum(isinstance(module, BrickyardLinear) for module in tuned.modules())
    assert len(calls) == layers and all(shape[0] == 3 for shape in calls), "once a layer, with the rows that have one"
    with pytest.raises(BadMix, match="2 adapter_names were given for a batch of 4"):
        logits(tuned, adapter_names=["a0", "a1"])
    with pytest.raises(BadMix, match="5 adapter_names were given for a batch of 4"):
        logits(tuned, adapter_names=["a0", "a1", "a2", "a0", "a1"])


def test_every_arm_of_the_claims_is_legal():
    for claim in loca.RECORD.claims:
        for arm in [*claim.arms.values(), claim.control.get("arm", "loca")]:
            assert resolve(parse(arm)).tuner in ("loca", "lora", "fourierft")
        assert claim.arms or callable(getattr(check, claim.measure))


def test_fourierft_starts_at_the_base_if_asked_and_its_head_learns_slower(text_base):
    known = ready(text_base, "fourierft:n_frequency=40,zero=true")
    attached = build(known.plan, known.base, known.task, seed=0)
    plain = known.base.model(known.task, seed=0)
    batch = {k: v for k, v in known.encoded["test"].collate(np.arange(8)).items() if k != "labels"}
    with torch.no_grad():
        attached.model.eval(), plain.eval()
        assert same(attached.model(**batch).logits, plain(**batch).logits)
    optimiser = Backprop(attached, known.training).optimiser
    sizes = {group["lr_scale"]: sum(p.numel() for p in group["params"]) for group in optimiser.param_groups}
    assert sizes == {1.0: 4 * 40, 0.1: sum(p.numel() for p in attached.parameters()) - 160}
    with pytest.raises(UsageError, match="n_frequency=0"):
        ready(text_base, "fourierft:n_frequency=0")
    with pytest.raises(Refused, match="PEFT refuses"):
        large = ready(text_base, "fourierft:n_frequency=2000")
        build(large.plan, large.base, large.task, seed=0)


def test_a_zeroth_order_step_is_refused_for_it_moves_who_rests(text_base):
    known = ready(text_base, arm=f"{ARM} + zo-sgd")
    attached = build(known.plan, known.base, known.task, seed=0)
    step = step_of(known.plan, len(known.encoded["train"]), known.task)
    with pytest.raises(Refused, match="works on gradients"):
        train(attached, known.encoded["train"], None, known.task, known.training, make_step=step, device="cpu")


def test_under_private_training_who_rests_does_not_move_either(text_base):
    known = ready(text_base, arm=f"{ARM} + dp", steps=12)
    attached = build(known.plan, known.base, known.task, seed=0)
    watch = Watch()
    step = step_of(known.plan, len(known.encoded["train"]), known.task)
    train(
        attached,
        known.encoded["train"],
        None,
        known.task,
        known.training,
        callbacks=[watch],
        make_step=step,
        device="cpu",
    )
    assert len(watch.a) == 12
    for at in range(1, 12):
        moved = tuple(not same(kept[at], kept[at - 1]) for kept in (watch.a, watch.u))
        expected = (False, True) if at < 6 and at % 5 >= 2 else (True, False)
        assert moved == expected, at
