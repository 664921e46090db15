"""configurable-bricks: scores against scikit-learn, cuts against zeroed columns, and planted neurons that are found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import MODELS, made
from peft import LoraConfig, get_peft_model
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from brickyard.audit import _neurons as neurons
from brickyard.audit.configurable_bricks import (
    average_precision,
    chance_overlap,
    highest,
    matched,
    overlaps,
)
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.ffn import every_ffn

DECODERS = ("swiglu", "conv1d")


def prompts(rows: list[list[int]], labels: list[int]) -> neurons.Prompts:
    """Prompts of given tokens behind the start token 0."""
    base: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(bos_token_id=0, eos_token_id=0), config=SimpleNamespace(vocab_size=10**6)
    )
    return neurons.prompts_of([np.array(row) for row in rows], labels, base)


def some(count: int = 8, tokens: int = 6, seed: int = 0) -> neurons.Prompts:
    draw = np.random.default_rng(seed)
    return prompts(draw.integers(4, 40, (count, tokens)).tolist(), [i % 2 for i in range(count)])


# Scores


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 999))
def test_average_precision_is_scikit_learns_with_ties_too(n: int, f: int, values: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    score_NF = draw.integers(0, values, (n, f)).astype(np.float32)
    labels = draw.permutation(np.arange(n) % 3)
    member_CN = torch.from_numpy(labels == np.arange(3)[:, None])
    found_CF = average_precision(torch.from_numpy(score_NF), member_CN)
    for c in range(3):
        expected = [average_precision_score(member_CN[c].numpy(), score_NF[:, j]) for j in range(f)]
        np.testing.assert_allclose(found_CF[c].numpy(), expected, atol=1e-12)


def test_a_constant_neurons_average_precision_is_the_base_rate_and_a_perfect_ones_is_1() -> None:
    member_CN = torch.tensor([[True, False, False, False, True], [False, True, True, True, False]])
    score_NF = torch.stack([torch.full((5,), 0.3), torch.tensor([3.0, 1, 1, 0, 2])], 1)
    found_CF = average_precision(score_NF, member_CN)
    assert found_CF[:, 0].tolist() == pytest.approx([0.4, 0.6]) and float(found_CF[0, 1]) == 1.0
    with pytest.raises(NotFinite, match="cannot be ranked"):
        average_precision(score_NF.fill_(torch.nan), member_CN)


def test_scores_are_sorted_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    score_NF = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    member_CN = torch.arange(12)[None] % 2 == torch.arange(2)[:, None]
    whole = average_precision(score_NF, member_CN)
    monkeypatch.setattr("brickyard.audit.configurable_bricks._SCORES", 25)
    assert torch.equal(average_precision(score_NF, member_CN), whole)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_activations_are_act_gate_times_up_pooled_over_a_prompts_own_tokens(
    pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = made("swiglu")
    ffns = every_ffn(model, "test")
    asked = prompts([[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16]], [0, 1, 0])
    seen: dict[int, Tensor] = {}
    monkeypatch.setattr(neurons, "_POSITIONS", 6)
    done = neurons.read(model, ffns, asked, 2, pool, seen.__setitem__)
    inputs: list[Tensor] = []
    mlp: Any = model.get_submodule(ffns[1].block).mlp  # type: ignore[operator]
    handle = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    squares = torch.zeros(2, 64, dtype=torch.float64)
    for row, ids in enumerate(([0, 5, 6, 7], [0, 9, 10, 11, 12, 13], [0, 15])):
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
            x_TD = inputs.pop()[0, 1:]
            a_TF = mlp.act_fn(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
        expected = a_TF.amax(0) if pool == "max" else a_TF.mean(0)
        torch.testing.assert_close(seen[1][row], expected, atol=1e-6, rtol=1e-5)
        squares[[0, 1, 0][row]] += a_TF.double().square().sum(0)
    handle.remove()
    torch.testing.assert_close(done.square[1], squares / torch.tensor([[4.0], [5.0]]), atol=1e-9, rtol=1e-4)


def test_activations_that_do_not_fit_are_read_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("swiglu")
    ffns, once, twice = every_ffn(model, "test"), {}, {}
    one = neurons.read(model, ffns, some(), 2, "max", once.__setitem__)
    monkeypatch.setattr(neurons, "POOLED", 1)
    two = neurons.read(model, ffns, some(), 2, "max", twice.__setitem__)
    assert (one.passes, two.passes) == (1, 2) and all(torch.equal(once[i], twice[i]) for i in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.size, two.size, strict=True))


# Cuts


def cut_of(kind: str, share: float, sets: int = 1) -> tuple[nn.Module, list[Any], list[Tensor], dict[str, Tensor]]:
    model, inputs = made(kind)
    ffns = every_ffn(model, "test")
    draw = torch.Generator().manual_seed(1)
    return model, ffns, [torch.rand(sets, ffn.neurons, generator=draw) < share for ffn in ffns], inputs


@pytest.mark.parametrize("kind", MODELS)
def test_cutting_no_neuron_changes_no_bit_and_the_hooks_go(kind: str) -> None:
    model, ffns, cut, inputs = cut_of(kind, 0.0)
    with torch.no_grad():
        before = model(**inputs)[0]
        with neurons.cutting(ffns, cut):
            assert torch.equal(model(**inputs)[0], before)
        with pytest.raises(ZeroDivisionError), neurons.cutting(ffns, [~c for c in cut]):
            assert not torch.equal(model(**inputs)[0], before)
            _ = 1 / 0
        assert torch.equal(model(**inputs)[0], before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_zeroed_activations_are_zeroed_columns_of_the_last_layer(kind: str) -> None:
    model, ffns, cut, inputs = cut_of(kind, 0.3)
    with torch.no_grad():
        before = model(**inputs)[0]
        with neurons.cutting(ffns, cut):
            by_hook = model(**inputs)[0]
        for ffn, cut_SF in zip(ffns, cut, strict=True):
            weight: Any = ffn.value_layer.weight
            (weight if kind == "conv1d" else weight.T)[cut_SF[0]] = 0
        by_column = model(**inputs)[0]
    torch.testing.assert_close(by_hook, by_column, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(by_hook, before, atol=1e-3)


@pytest.mark.parametrize("kind", DECODERS)
def test_several_sets_in_one_batch_are_each_set_by_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ffns, cut, _ = cut_of(kind, 0.4, sets=5)
    asked = prompts([[5, 6, 7, 8, 9], [9, 10, 11], [12, 13, 14, 15]], [0, 1, 0])
    together = neurons.losses(model, ffns, asked, cut)
    monkeypatch.setattr(neurons, "_POSITIONS", 10)  # two rows at once
    torch.testing.assert_close(neurons.losses(model, ffns, asked, cut), together, atol=1e-5, rtol=1e-5)
    for s in range(5):
        alone = neurons.losses(model, ffns, asked, [x[s : s + 1] for x in cut])[0]
        torch.testing.assert_close(together[s], alone, atol=1e-5, rtol=1e-5)
    assert together.std(0).min() > 1e-4
    # Padding counts not: a prompt costs what it costs by itself, by transformers' own loss.
    with torch.no_grad():
        own = model(input_ids=torch.tensor([[0, 9, 10, 11]]), labels=torch.tensor([[-100, 9, 10, 11]])).loss
    none = neurons.losses(model, ffns, asked, [torch.zeros(1, 64, dtype=torch.bool)] * 2)
    assert float(none[0, 1]) == pytest.approx(float(own), abs=1e-5)


def test_the_columns_norms_are_those_of_the_weight_that_an_adapter_makes() -> None:
    model, _ = made("swiglu")
    plain = neurons.down_norms(every_ffn(model, "test")[0])
    weight = model.model.layers[0].mlp.down_proj.weight.detach()  # type: ignore[union-attr, index]
    torch.testing.assert_close(plain, weight.double().norm(dim=0))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))  # type: ignore[arg-type]
    found = neurons.down_norms(every_ffn(tuned, "test")[0])
    whole = tuned.merge_and_unload().model.layers[0].mlp.down_proj.weight.detach()
    torch.testing.assert_close(found, whole.double().norm(dim=0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_what_holds_no_single_feed_forward_network_in_a_block_is_refused() -> None:
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(Refused, match="no feed-forward network was recognised"):
        every_ffn(MixtralForCausalLM(config), "configurable-bricks")
    with pytest.raises(Refused, match="no feed-forward network was recognised in Linear"):
        every_ffn(nn.Linear(3, 3), "configurable-bricks")


# Sets


def test_every_layer_gives_the_same_share_of_its_neurons() -> None:
    score_CF = torch.tensor([[0.1, 0.9, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5]])
    assert highest(score_CF, 0.25).int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert highest(score_CF, 0.01).sum(1).tolist() == [1, 1]  # at least one
    assert highest(torch.rand(3, 200), 0.03).sum(1).tolist() == [6, 6, 6]


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 200), st.integers(0, 999))
def test_random_neurons_are_others_as_many_and_of_the_same_norm(width: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    norm_F = np.exp(draw.normal(size=width))
    chosen_F = np.zeros(width, dtype=bool)
    chosen_F[draw.permutation(width)[: max(1, width // 20)]] = True
    pick = lambda s: matched(norm_F, chosen_F, np.random.Generator(np.random.PCG64(s)))  # noqa: E731
    found_F = pick(0)
    assert found_F.sum() == chosen_F.sum() and not (found_F & chosen_F).any() and np.array_equal(found_F, pick(0))
    off = abs(np.log(norm_F[found_F]).mean() - np.log(norm_F[chosen_F]).mean())
    anyone = np.log(norm_F)[np.argsort(np.abs(np.log(norm_F) - np.log(norm_F[chosen_F]).mean()))]
    assert off <= abs(anyone[-1] - np.log(norm_F[chosen_F]).mean())


def test_random_neurons_match_a_strong_set_and_differ_from_draw_to_draw() -> None:
    norm_F = np.exp(np.random.default_rng(0).normal(size=400))
    chosen_F = np.zeros(400, dtype=bool)
    chosen_F[np.argsort(-norm_F)[1:40:4]] = True  # strong ones, with as strong ones beside them
    picks = [matched(norm_F, chosen_F, np.random.Generator(np.random.PCG64(s))) for s in range(5)]
    for pick in picks:
        assert norm_F[pick].sum() == pytest.approx(norm_F[chosen_F].sum(), rel=0.15)
        assert norm_F[pick].mean() > 3 * norm_F.mean()
    assert len({pick.tobytes() for pick in picks}) == 5
    with pytest.raises(UsageError, match="smaller share"):
        matched(norm_F[:4], np.array([True, True, True, False]), np.random.default_rng(0))


def test_overlaps_are_shares_of_unions_and_chance_is_that_of_drawn_sets() -> None:
    sets = [highest(torch.rand(2, 100, generator=torch.Generator().manual_seed(i)), 0.1) for i in range(40)]
    a, b = ({(i, int(j)) for i, x in enumerate(sets) for j in x[c].nonzero()} for c in (0, 1))
    found = overlaps(sets)
    assert found[0, 1] == found[1, 0] == pytest.approx(len(a & b) / len(a | b)) and found[0, 0] == 1
    assert chance_overlap(sets) == pytest.approx(found[0, 1], abs=0.02)


# Sparsity


def test_the_smallest_contributions_go_first_and_none_at_share_0() -> None:
    a_BTF = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    norm_F = torch.rand(10, generator=torch.Generator().manual_seed(1))
    found = neurons.smallest(a_BTF, norm_F, 0.35)
    order = np.argsort((a_BTF.abs() * norm_F).numpy(), axis=-1)[..., :3]
    assert found.sum(-1).eq(3).all() and all(found[b, t, order[b, t]].all() for b in range(2) for t in range(3))
    assert not neurons.smallest(a_BTF, norm_F, 0.0).any()


@pytest.mark.parametrize("kind", DECODERS)
def test_the_curve_starts_at_the_model_itself_and_its_error_is_that_of_the_output(kind: str) -> None:
    model, ffns, _, _ = cut_of(kind, 0.0)
    asked = some(6)
    norms = [neurons.down_norms(ffn) for ffn in ffns]
    error_K, nats_K = neurons.sparsity(model, ffns, asked, norms, (0.0, 0.3, 0.9))
    whole = neurons.losses(model, ffns, asked, [torch.zeros(1, 64, dtype=torch.bool)] * 2).mean()
    assert float(error_K[0]) == 0 and float(nats_K[0]) == pytest.approx(float(whole), abs=1e-6)
    assert 0 < error_K[1] < error_K[2] < 1.5 and abs(nats_K[2] - nats_K[0]) > 1e-5
    inputs: list[Tensor] = []
    handles = [f.value_layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for f in ffns]
    with torch.no_grad():
        model(**asked.batch(torch.arange(6), 1, torch.device("cpu")))
    for handle in handles:
        handle.remove()
    ratios = []
    for ffn, a_BTF, norm in zip(ffns, inputs, norms, strict=True):
        weight: Any = ffn.value_layer.weight.detach()
        weight = weight if kind == "conv1d" else weight.T
        lost = a_BTF * neurons.smallest(a_BTF, norm.float(), 0.3)
        ratio = (lost @ weight).norm(dim=-1) / (a_BTF @ weight).norm(dim=-1)
        ratios.append(ratio[:, 1:])  # the start token is the same everywhere
    assert float(error_K[1]) == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-4)
