"""What S2A keeps of an attention that draws, and that a score without any key stays what PyTorch makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brickyard.tune._coded import Recomputed
from brickyard.tune._codes import EXACT, Grouped

HEADS, WIDTH = 2, 4


def operands(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, HEADS, tokens, WIDTH, generator=generator).requires_grad_() for _ in range(3)]


def attention(mask: Tensor | None = None) -> object:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.5)


def twice(call: object, given: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """(result, gradients, generator afterwards) of `call` and of `Recomputed`, which keeps its inputs exactly."""
    found = []
    for coded in (False, True):
        torch.manual_seed(0)
        y = Recomputed.apply(call, [Grouped(EXACT)] * 3, True, *given) if coded else call(*given)  # type: ignore[operator]
        gradients = torch.autograd.grad(y.cos().sum(), given)
        found.append((y.detach(), *gradients, torch.get_rng_state()))
    return found


# Of 3 T d float32 values a quarter is 3 T d bytes for each head; a bit for each of T^2 scores takes T^2 / 8.
@pytest.mark.parametrize(("tokens", "bits"), [(8 * 3 * WIDTH, True), (8 * 3 * WIDTH + 8, False)])
def test_draws_are_kept_while_they_are_small_and_drawn_again_else(tokens: int, bits: bool) -> None:
    given = operands(tokens)
    plain, coded = twice(attention(), given)
    for a, b in zip(plain, coded, strict=True):
        assert torch.equal(a, b)
    y = Recomputed.apply(attention(), [Grouped(EXACT)] * 3, True, *given)
    state, kept = torch.get_rng_state(), y.grad_fn.saved_tensors[-1]
    assert kept.dtype == torch.uint8 and kept.numel() == (HEADS * tokens**2 // 8 if bits else state.numel())


def test_what_draws_in_another_way_goes_back_to_the_generator() -> None:
    given = operands(8)
    plain, coded = twice(lambda q, k, v: F.dropout(q * k) + v * torch.rand(v.shape), given)
    for a, b in zip(plain, coded, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_token_without_any_key_gets_what_pytorch_gives_it(value: float | None) -> None:
    given = operands(8)
    if value is not None:
        with torch.no_grad():
            given[0][0, 0, 3] = value
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[5] = False
    plain, coded = twice(attention(mask), given)
    assert not plain[0][0, 0, 5].any()
    for a, b in zip(plain, coded, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
