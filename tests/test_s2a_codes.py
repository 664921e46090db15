"""The codes of S2A: packing, the error of a group, rounding without bias, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brickyard.core.errors import Refused
from brickyard.tune._codes import Bounded, Grouped, Rows, dither, pack, unpack


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 70), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_packing_gives_every_code_back_in_as_few_bytes_as_there_can_be(count: int, bits: int, seed: int) -> None:
    q = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), q)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([2, 16, 64]),
    st.booleans(),
    st.sampled_from([1e-20, 1.0, 1e6]),
    st.sampled_from([0.0, -3.0, 100.0]),
)
@settings(max_examples=80, deadline=None)
def test_no_value_lies_further_from_its_code_than_half_a_step(
    shape: list[int], bits: int, group: int, stochastic: bool, scale: float, offset: float
) -> None:
    x = (gaussian(*shape, seed=len(shape)) + offset) * scale
    code = Grouped(bits, group, stochastic)
    parts = code.encode(x)
    found = code.decode(parts, x.shape, x.dtype)
    assert found.shape == x.shape and found.dtype == x.dtype
    step = parts[2].float().expand(-1, group).reshape(-1)[: x.numel()].view(x.shape)
    slack = 1e-5 * x.abs().max()  # of float32 itself
    assert ((found - x).abs() <= step * (1.0 if stochastic else 0.5) + slack).all()
    spread = x.max() - x.min()
    assert (step <= 1.02 * (spread + 0.01 * x.abs().max()) / (2**bits - 1)).all()


def test_a_constant_group_is_kept_to_the_precision_of_its_low_and_a_zero_one_exactly() -> None:
    code = Grouped(4, 8)
    for value in (0.0, 3.3):
        x = torch.full((2, 8), value)
        torch.testing.assert_close(code.decode(code.encode(x), x.shape, x.dtype), x, rtol=0.01, atol=0)


def test_an_outlier_spoils_its_own_group_only_and_nan_is_not_hidden() -> None:
    x = gaussian(4, 64)
    y = x.clone()
    y[0, 0], y[3, 1] = 1e6, float("nan")
    code = Grouped(4)
    found, plain = (code.decode(code.encode(t), t.shape, t.dtype) for t in (y, x))
    assert torch.equal(found[1:3], plain[1:3]) and found[3].isnan().any()


def test_stochastic_rounding_has_no_bias_and_draws_from_no_generator() -> None:
    x = torch.full((100_000,), 0.3)
    x[:64] = torch.linspace(0, 1, 64)
    before = torch.get_rng_state()
    grid = Bounded(4, 0.0, 1.0, stochastic=True)
    found = grid.decode(grid.encode(x), x.shape, x.dtype)
    assert abs(float((found - x)[64:].mean())) < 1e-3
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(
        found, grid.decode(grid.encode(x), x.shape, x.dtype)
    )
    u = dither(gaussian(100_000))
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5e-3 and abs(float(u.var()) - 1 / 12) < 2e-3
    assert abs(float((u[1:] * u[:-1]).mean()) - 0.25) < 5e-3


def test_integers_are_refused() -> None:
    with pytest.raises(Refused, match="int64"):
        Grouped(4).encode(torch.arange(5))


def test_rows_of_a_norm_keep_mean_and_deviation() -> None:
    x = 3 * gaussian(50, 96) + 5
    code = Rows(4)
    found = code.decode(code.encode(x), x.shape, x.dtype)
    for a, b in zip(torch.std_mean(found, dim=-1), torch.std_mean(x, dim=-1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
