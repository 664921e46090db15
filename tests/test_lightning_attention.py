"""Lightning attention against its equations and against MiniMax: three forms, causality, splitting, packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from brickyard.core import registry
from brickyard.core.errors import UsageError
from brickyard.core.measure import saved_for_backward_bytes
from brickyard.models.lightning_attention import (
    decode_step,
    geometric_slopes,
    layer_slopes,
    lightning_attention,
    matrix_form,
)

LENGTHS = (1, 63, 64, 65, 1000)
DECAYS = (0.3, 0.9, 0.9999)
SLOPES = -torch.log(torch.tensor(DECAYS))


def inputs(length: int, *, rows: int = 2, d: int = 12, e: int = 20, seed: int = 0, **options: object) -> list[Tensor]:
    """q, k, v and an initial state."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, 3, length, d), (rows, 3, length, d), (rows, 3, length, e), (rows, 3, d, e)]
    return [torch.randn(s, generator=g).to(**options).requires_grad_() for s in shapes]  # type: ignore[arg-type]


def recurrent(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    out = []
    for t in range(q.shape[2]):
        o, state = decode_step(q[:, :, t], k[:, :, t], v[:, :, t], slopes, state)
        out.append(o)
    return torch.stack(out, 2), state


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm().clamp(min=1e-12))


def gradients(outputs: tuple[Tensor, Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(9)
    seeds = [torch.randn(o.shape, generator=g).to(o) for o in outputs]
    return torch.autograd.grad(outputs, given, seeds, retain_graph=True)


@pytest.mark.parametrize("length", LENGTHS)
def test_three_forms_agree_in_outputs_and_gradients(length: int) -> None:
    given = inputs(length)
    q, k, v, state = given
    tiled = lightning_attention(q, k, v, SLOPES, state, output_final_state=True)
    matrix = matrix_form(q, k, v, SLOPES, state)
    for other in (matrix, recurrent(q, k, v, SLOPES, state)):
        for a, b in zip(tiled, other, strict=True):
            assert a is not None and relative(a, b) < 1e-4
        for a, b in zip(gradients(tiled, given), gradients(other, given), strict=True):  # type: ignore[arg-type]
            assert relative(a, b) < 1e-4


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_the_result_does_not_depend_on_the_block(length: int, block: int, d: int, e: int, seed: int) -> None:
    q, k, v, state = inputs(length, d=d, e=e, seed=seed)
    one, last = lightning_attention(q, k, v, SLOPES, state, True, block=block)
    whole, final = lightning_attention(q, k, v, SLOPES, state, True, block=128)
    assert last is not None and final is not None
    torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_gradients_are_those_of_the_equation_to_the_last_bit_of_float64(cut: bool) -> None:
    given = inputs(13, rows=1, d=2, e=3, dtype=torch.float64)
    ends = torch.tensor([0, 3, 3, 12, 13]) if cut else None
    if cut:
        given[3] = torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def form(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        return lightning_attention(q, k, v, SLOPES, state, True, ends, block=4)

    assert torch.autograd.gradcheck(form, given)


@pytest.mark.parametrize("place", [0, 17, 63, 64, 129])
def test_no_output_knows_a_later_token(place: int) -> None:
    q, k, v, _ = (x.detach() for x in inputs(130))
    before, _ = lightning_attention(q, k, v, SLOPES)
    for x in (q, k, v):
        x[:, :, place:] = 3.0 + x[:, :, place:] ** 2
    after, _ = lightning_attention(q, k, v, SLOPES)
    assert torch.equal(before[:, :, :place], after[:, :, :place])
    assert not torch.equal(before[:, :, place], after[:, :, place])


def test_a_tiny_slope_is_plain_causal_linear_attention() -> None:
    q, k, v, _ = inputs(150, dtype=torch.float64)
    found, _ = lightning_attention(q, k, v, torch.full((3,), 1e-15))
    sums = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    torch.testing.assert_close(found, torch.einsum("bhnd,bhnde->bhne", q, sums), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", [1, 64, 100, 149])
def test_a_split_sequence_with_its_state_is_the_whole(first: int) -> None:
    q, k, v, state = inputs(150)
    whole, final = lightning_attention(q, k, v, SLOPES, state, True)
    halves, carried = [], state
    for part in (slice(None, first), slice(first, None)):
        o, carried = lightning_attention(q[:, :, part], k[:, :, part], v[:, :, part], SLOPES, carried, True)
        halves.append(o)
    torch.testing.assert_close(torch.cat(halves, 2), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(carried, final, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(sum), st.integers(1, 20), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_sequences_behind_one_another_do_not_see_each_other(lengths: list[int], block: int, seed: int) -> None:
    q, k, v, _ = inputs(sum(lengths), rows=1, seed=seed, dtype=torch.float64)
    state = torch.randn(len(lengths), 3, 12, 20, dtype=torch.float64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    o, final = lightning_attention(q, k, v, SLOPES, state, True, ends, block)
    assert final is not None
    for i, (a, b) in enumerate(zip(ends.tolist(), ends.tolist()[1:], strict=False)):
        if a == b:
            assert torch.equal(final[i], state[i])
            continue
        alone, last = matrix_form(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], SLOPES, state[i : i + 1])
        torch.testing.assert_close(o[:, :, a:b], alone)
        torch.testing.assert_close(final[i], last[0])


def test_strong_decay_and_great_length_stay_finite() -> None:
    q, k, v, state = inputs(4096, rows=1)
    slopes = torch.tensor([1e-12, 3.0, 100.0])
    found, final = lightning_attention(q, k, v, slopes, state, True)
    assert final is not None and found.isfinite().all() and final.isfinite().all()
    assert all(g.isfinite().all() for g in gradients((found, final), [q, k, v, state]))
    near, _ = lightning_attention(q, k, v, torch.full((3,), 1e4))
    torch.testing.assert_close(near, (q * k).sum(-1, keepdim=True) * v)  # only the token itself is left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    half = inputs(200, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, final = lightning_attention(*half[:3], SLOPES, half[3], True)
    exact, last = matrix_form(*(x.float() for x in half[:3]), SLOPES, half[3].float())
    assert o.dtype == dtype and final is not None and final.dtype == torch.float32
    assert torch.equal(o, exact.to(dtype)) or relative(o.float(), exact) < torch.finfo(dtype).eps
    assert relative(final, last) < 1e-5
    assert all(g.dtype == dtype for g in gradients((o, final), half))


def test_memory_grows_with_the_length_alone() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> CausalLMOutput:
            o_BHNe, _ = lightning_attention(q * self.scale, k * self.scale, v * self.scale, SLOPES)
            return CausalLMOutput(logits=o_BHNe)  # type: ignore[arg-type]

    kept = []
    for length in (512, 1024, 2048):
        q, k, v, _ = (x.detach() for x in inputs(length, rows=1, d=16, e=16))
        kept.append(saved_for_backward_bytes(Layer(), {"q": q, "k": k, "v": v}, lambda out: out.sum()))
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.01)
    tokens = 3 * 4 * 16 * 1024  # bytes of one of q, k, v at 1,024 positions of three heads
    assert kept[2] - kept[1] <= 7.1 * tokens  # q, k, v before and after scaling, and a state a block


def test_slopes_are_geometric_and_fade_with_depth() -> None:
    assert geometric_slopes(8) == tuple(2.0**-h for h in range(1, 9))
    six = geometric_slopes(6)
    assert six[:4] == geometric_slopes(4) and six[4:] == geometric_slopes(8)[0::2][:2]
    assert len(set(geometric_slopes(12))) == 12
    for layer in range(4):
        factor = 1 - layer / (3 + 1e-5) + 1e-5
        assert layer_slopes(8, layer, 4) == tuple(s * factor for s in geometric_slopes(8))
    assert all(s > 0 for heads in range(1, 20) for s in layer_slopes(heads, 7, 8))
    for bad in (lambda: geometric_slopes(0), lambda: layer_slopes(4, 4, 4), lambda: layer_slopes(4, -1, 4)):
        with pytest.raises(UsageError):
            bad()


def test_minimax_computes_the_same_layer() -> None:
    """transformers' MiniMax layer is an independent implementation, with its own offsets and its own recurrence."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_hidden_layers=3,
        block_size=16,
        layer_types=["linear_attention"] * 3,
    )
    torch.manual_seed(0)
    for index in range(3):
        layer = MiniMaxLightningAttention(config, index)
        x = torch.randn(2, 71, 32)
        past = MiniMaxCache()
        with torch.no_grad():
            expected, state = layer(x, (x, x), None, past)
            qkv = layer.act_fn(layer.qkv_proj(x)).view(2, 71, 4, 24).split(8, -1)
            q, k, v = (y.transpose(1, 2) for y in qkv)
            slopes = torch.tensor(layer_slopes(4, index, 3))
            torch.testing.assert_close(slopes, layer.slope_rate.flatten())
            o, final = lightning_attention(q, k, v, slopes, output_final_state=True, block=64)
            found = layer.out_proj(torch.sigmoid(layer.output_gate(x)) * layer.norm(o.transpose(1, 2).flatten(2)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-5)


def test_inputs_that_make_no_sense_are_refused() -> None:
    q, k, v, state = (x.detach() for x in inputs(10))
    cases = {
        "at least one": lambda: lightning_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], SLOPES),
        "expected .B, H, N, d. twice": lambda: lightning_attention(q, k[..., :5], v, SLOPES),
        "one floating-point type": lambda: lightning_attention(q, k.double(), v, SLOPES),
        "one floating-point type and": lambda: lightning_attention(q.long(), k.long(), v.long(), SLOPES),
        "above 0": lambda: lightning_attention(q, k, v, torch.tensor([0.1, 0.0, 0.2])),
        "above 0 .1e-12": lambda: lightning_attention(q, k, v, torch.tensor([0.1, -0.5, float("nan")])),
        "expected .3. on": lambda: lightning_attention(q, k, v, SLOPES[:2]),
        "decay is not learned": lambda: lightning_attention(q, k, v, SLOPES.clone().requires_grad_()),
        "initial_state is": lambda: lightning_attention(q, k, v, SLOPES, state[:1]),
        "block=0": lambda: lightning_attention(q, k, v, SLOPES, block=0),
        "rise from 0": lambda: lightning_attention(q[:1], k[:1], v[:1], SLOPES, cu_seqlens=torch.tensor([0, 7, 4, 10])),
        "expected one row": lambda: lightning_attention(q, k, v, SLOPES, cu_seqlens=torch.tensor([0, 10])),
        "cu_seqlens do not cut": lambda: lightning_attention(
            q[:1], k[:1], v[:1], SLOPES, cu_seqlens=torch.tensor([0.0, 10])
        ),
    }
    for message, call in cases.items():
        with pytest.raises(UsageError, match=message):
            call()


def test_the_registry_knows_the_layer_and_no_verb_runs_it() -> None:
    from brickyard.core.arm import parse
    from brickyard.core.build import resolve

    entry = registry.find("lightning-attention")
    assert entry.record.family == "models" and entry in registry.records("models")
    with pytest.raises(UsageError, match="is a models method"):
        resolve(parse("lightning-attention"))
