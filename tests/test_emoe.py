"""EMoE: an equal split of a trained layer, gated by its own keys, is the layer at k = N and a true mixture below."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import (
    MODELS,
    SMALL,
    classifier,
    gaussian,
    made,
    out,
    seen,
)
from scipy.optimize import linprog
from torch import Tensor, nn
from transformers.activations import ACT2FN

from brickyard.core import ffn as experts
from brickyard.core.errors import BadBrick, Refused, UsageError
from brickyard.core.ffn import Split, clusters, ffns, permute_
from brickyard.tune import emoe
from brickyard.tune.emoe import Config, restructure, to_dense

# The split


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_every_neuron_belongs_to_one_expert_and_all_have_one_size(n: int, size: int, width: int, seed: int) -> None:
    keys_FP = gaussian(n * size, width, seed=seed).numpy()
    labels_F = clusters(keys_FP, n, seed=seed)
    assert labels_F.shape == (n * size,) and np.bincount(labels_F, minlength=n).tolist() == [size] * n
    assert np.array_equal(labels_F, clusters(keys_FP, n, seed=seed))


def test_planted_clusters_are_found() -> None:
    truth_F = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 10))
    keys_FP = 5 * gaussian(6, 8).numpy()[truth_F] + 0.1 * gaussian(60, 8, seed=1).numpy()
    found_F = clusters(keys_FP, 6)
    assert len(set(zip(truth_F, found_F, strict=True))) == 6


@pytest.mark.parametrize("at_once", [4096, 16])
def test_clusters_are_closer_than_chance_also_when_assigned_in_parts(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "AT_ONCE", at_once)
    x_FP = gaussian(64, 3).numpy()
    cost = lambda labels: sum(x_FP[labels == n].var(0).sum() * (labels == n).sum() for n in range(8))  # noqa: E731
    found_F = clusters(x_FP, 8)
    assert np.bincount(found_F).tolist() == [8] * 8
    by_chance = min(cost(np.random.default_rng(i).permutation(np.repeat(np.arange(8), 8))) for i in range(20))
    assert cost(found_F) < 0.5 * by_chance


def test_the_last_assignment_is_the_best_one_by_linear_programming() -> None:
    """Golden: at rest, no transport of neurons to experts of the given sizes is cheaper (scipy's HiGHS)."""
    x_FP, n, size = gaussian(24, 2).numpy().astype(np.float64), 4, 6
    labels_F = clusters(x_FP, n)
    centres_NP = np.stack([x_FP[labels_F == i].mean(0) for i in range(n)])
    cost_FN = ((x_FP[:, None] - centres_NP) ** 2).sum(-1)
    once = np.kron(np.eye(24), np.ones(n))
    sizes = np.kron(np.ones(24), np.eye(n))
    found = linprog(cost_FN.ravel(), A_eq=np.vstack([once, sizes]), b_eq=[1] * 24 + [size] * n)
    assert cost_FN[np.arange(24), labels_F].sum() == pytest.approx(found.fun, rel=1e-6)


def test_a_split_is_remembered_by_the_keys_and_a_damaged_memory_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    keys_FD, calls = gaussian(32, 5, seed=77), []
    counted = lambda *args, **options: calls.append(1) or clusters(*args, **options)  # noqa: E731
    monkeypatch.setattr(experts, "clusters", counted)
    first, seconds = experts.by_keys(keys_FD, 4)
    again, as_before = experts.by_keys(2 * keys_FD, 4)  # directions alone count
    assert len(calls) == 1 and torch.equal(first.labels_F, again.labels_F) and seconds == as_before
    for path in (experts.cache_folder() / "experts").glob("*.json"):
        path.write_text('{"labels": [0, 0, 0], "seconds": 1}')
    assert torch.equal(experts.by_keys(keys_FD, 4)[0].labels_F, first.labels_F) and len(calls) == 2
    experts.by_keys(keys_FD + 0.1, 4)
    assert len(calls) == 3


def test_a_split_of_unequal_experts_is_refused() -> None:
    for labels in ([0, 0, 0, 1], [0, 0, 1, 2], [0, 0, -1, 1]):
        with pytest.raises(BadBrick, match="experts of one size"):
            Split(torch.tensor(labels), 2)


# The mathematics


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_all_experts_are_the_dense_network(kind: str, permute: bool) -> None:
    model, inputs = made(kind)
    expected = out(model, inputs)
    restructure(model, Config(experts=8, topk=8, layers=(0, 1)), permute=permute)
    torch.testing.assert_close(out(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_permutation_changes_no_output_and_comes_undone_bit_for_bit(kind: str) -> None:
    model, inputs = made(kind)
    model.double()  # in float32 the order of the sums alone is worth about 1e-6, by the processor
    expected, before = out(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    structure = restructure(model, SMALL, permute=True)
    with structure.switched(False):
        torch.testing.assert_close(out(model, inputs), expected, atol=1e-12, rtol=1e-12)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    structure.remove()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(out(model, inputs), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_permuted_and_in_place_are_one_function(kind: str) -> None:
    (plain, inputs), (moved, _) = made(kind), made(kind)
    restructure(plain, SMALL)
    restructure(moved, SMALL, permute=True)
    torch.testing.assert_close(out(plain, inputs), out(moved, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_and_names_stay_and_the_output_does_not(kind: str) -> None:
    model, inputs = made(kind)
    expected, before = out(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    count = sum(p.numel() for p in model.parameters())
    restructure(model, SMALL)
    assert list(model.state_dict()) == list(before) and sum(p.numel() for p in model.parameters()) == count
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.allclose(out(model, inputs), expected, atol=1e-3)
    assert to_dense(model) == 1 and to_dense(model) == 0
    assert torch.equal(out(model, inputs), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_as_many_neurons_work_for_a_token_as_the_gate_lets_through(kind: str) -> None:
    model, inputs = made(kind)
    dense = seen(model, inputs)["hidden"]
    restructure(model, SMALL)
    sparse = seen(model, inputs)["hidden"]
    if kind == "relu":  # zero by itself as well
        assert ((sparse != 0) <= (dense != 0)).all() and (sparse != 0).sum(-1).max() <= 3 * 8
    else:
        assert ((sparse != 0).sum(-1) == 3 * 8).all()
    torch.testing.assert_close(sparse, torch.where(sparse != 0, dense, 0.0), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu", "conv1d", "vit"])
def test_the_mask_gives_what_a_dispatch_to_chosen_experts_gives(kind: str) -> None:
    """Each token is sent to k experts by x . mean key, whose outputs are added up; in float64, with slices alone."""
    model, inputs = made(kind)
    restructure(model, SMALL)
    [gate] = emoe._gates(ffns(model, (0,), "test")[0].key_layer)
    found = seen(model, inputs)
    assert gate.split is not None
    named = {role: getattr(gate.ffn, role) for role in ("key", "also", "value")}
    layers = {role: gate.ffn.model.get_submodule(name) for role, name in named.items() if name}
    weight = {r: (m.weight.T if kind == "conv1d" else m.weight).double() for r, m in layers.items()}
    bias = {r: torch.zeros(len(weight[r])) if m.bias is None else m.bias.double() for r, m in layers.items()}
    act = ACT2FN[{"relu": "relu", "swiglu": "silu", "conv1d": "gelu_new"}.get(kind, "gelu")]
    x_TD = found["x"].double().flatten(0, -2)
    members = [(gate.split.labels_F == n).nonzero().flatten() for n in range(8)]
    scores_TN = torch.stack([x_TD @ weight["key"][rows].mean(0) for rows in members], -1)
    expected = bias["value"].double().repeat(len(x_TD), 1)
    for t, x_D in enumerate(x_TD):
        for n in scores_TN[t].topk(3).indices.tolist():
            rows = members[n]
            h = act(weight["key"][rows] @ x_D + bias["key"][rows])
            if "also" in weight:
                h = h * (weight["also"][rows] @ x_D + bias["also"][rows])
            expected[t] += weight["value"][:, rows] @ h
    torch.testing.assert_close(found["y"].flatten(0, -2).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_score_is_the_mean_pre_activation_without_the_bias(dtype: torch.dtype, contiguous: bool) -> None:
    labels_F = torch.arange(12) // 3 if contiguous else torch.arange(12) % 4
    split = Split(labels_F, 4)
    assert split.contiguous is contiguous
    x_TD, w_FD, b_F = gaussian(5, 6).to(dtype), gaussian(12, 6, seed=1).to(dtype), gaussian(12, seed=2).to(dtype)
    found = emoe.gate_scores(x_TD @ w_FD.T + b_F, b_F, split)
    mean_ND = torch.stack([w_FD[labels_F == n].mean(0) for n in range(4)])
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    torch.testing.assert_close(found, (x_TD @ mean_ND.T).to(found.dtype), atol=close, rtol=close)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # scores stay exact where the layers are not
        again = emoe.gate_scores(x_TD @ w_FD.T.to(dtype) + b_F, None, split)
    assert again.dtype != torch.bfloat16


def test_ties_go_to_the_lower_number() -> None:
    s_TN = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]]).repeat(1, 7)
    assert emoe.top(s_TN, 2).nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 1]]


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_chosen_experts_of_a_token_get_a_gradient(kind: str) -> None:
    model, inputs = made(kind)
    restructure(model, SMALL)
    chosen: list[Tensor] = []
    ffn = ffns(model, (0,), "test")[0]
    hook = ffn.value_layer.register_forward_hook(lambda m, args, y: (chosen.append(args[0]), y[..., 0, :] * 1.0)[0])
    one = {k: v[:1] if k == "pixel_values" else v[:1, :1] for k, v in inputs.items()}
    y: Any = None
    hook.remove()

    def first(m: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal y
        chosen.append(args[0][0, 0])
        y = output[0, 0].square().sum()

    hook = ffn.value_layer.register_forward_hook(first)
    model(**one)
    y.backward()
    gradient: Any = ffn.key_layer.weight.grad
    moved_F = (gradient.T if kind == "conv1d" else gradient).abs().sum(-1) != 0
    assert 0 < moved_F.sum() <= 24 and not moved_F[chosen[-1] == 0].any()
    if kind != "relu":
        assert moved_F.sum() == 24


def test_the_masks_gradient_is_that_of_a_product_and_it_keeps_booleans() -> None:
    h_TF = gaussian(3, 5, 12).double().requires_grad_()
    m_TN = emoe.top(gaussian(3, 5, 4, seed=1), 2)
    for labels_F in (torch.arange(12) // 3, torch.arange(12) % 4):
        split = Split(labels_F, 4)
        y = emoe.masked(h_TF, m_TN, split)
        assert torch.equal(y, h_TF * m_TN[..., labels_F])
        assert [t.shape for t in y.grad_fn.saved_tensors if t is not None and t.ndim == 3] == [m_TN.shape]
        assert torch.autograd.gradcheck(lambda h, s=split: emoe.masked(h, m_TN, s), (h_TF,))
        each = torch.func.vmap(torch.func.grad(lambda h, m, s=split: emoe.masked(h, m, s).square().sum()))(h_TF, m_TN)
        torch.testing.assert_close(each, 2 * h_TF.detach() * m_TN[..., labels_F])


# Errors


def test_what_cannot_be_split_is_refused_with_a_reason() -> None:
    model, _ = made("gelu")
    for options, words in (
        ({"experts": 7, "topk": 2}, "7 experts do not divide the 64 neurons.*near are 2, 4, 8"),
        ({"experts": 8, "topk": 2, "layers": 2}, "layer 2 is out of range; the model has 2 blocks"),
        ({"experts": 8, "topk": 2, "layers": -3}, "layer -3 is out of range"),
        ({"experts": 8, "topk": 2, "layers": (1, -1)}, "names a block twice"),
    ):
        with pytest.raises(UsageError, match=words):
            restructure(model, Config(**options))
    for options, words in (
        ({"experts": 4, "topk": 5}, "topk=5 of experts=4"),
        ({"experts": 4, "topk": 0}, "topk=0 of experts=4"),
        ({"experts": 1, "topk": 1}, "at least 2"),
        ({"layers": ()}, "names no block"),
        ({"gate": "dropout"}, "write keep=dense"),
        ({"gate": "learn", "keep": "dense"}, "use keep=sparse"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"balance": -1.0}, "balance=-1.0"),
    ):
        with pytest.raises(UsageError, match=words):
            Config(**options)
    restructure(model, SMALL)
    with pytest.raises(Refused, match="split already"):
        restructure(model, SMALL)
    restructure(model, Config(experts=8, topk=3, layers=1))
    with pytest.raises(UsageError, match="splits are given for nowhere"):
        restructure(made("gelu")[0], SMALL, splits={"nowhere": Split(torch.arange(64) // 8, 8)})


def test_a_block_without_one_plain_feed_forward_network_is_refused() -> None:
    model, _ = made("swiglu")
    fused = copy.deepcopy(model)
    for block in fused.model.layers:
        block.mlp = nn.ModuleDict({"gate_up_proj": nn.Linear(32, 128), "down_proj": nn.Linear(64, 32)})
    with pytest.raises(Refused, match=r"no feed-forward network was recognised in model\.layers\.0.*fuses gate and up"):
        restructure(fused, SMALL)
    for block in model.model.layers:
        block.mlp.down_proj = nn.Linear(48, 32)
    with pytest.raises(Refused, match="have not the same neurons"):
        restructure(model, SMALL)


def test_weights_beneath_an_adapter_are_not_permuted(text_base: Path) -> None:
    attached = classifier(text_base, "lora:r=4,target=all-linear")
    with pytest.raises(Refused, match="permute before it"):
        restructure(attached.model, SMALL, permute=True)
    [ffn] = ffns(attached.model, (0,), "test")
    with pytest.raises(Refused, match="carries an adapter"):
        permute_(ffn, torch.arange(64))
