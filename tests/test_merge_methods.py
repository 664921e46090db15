"""The pure functions of the merge methods: their equations and invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brickyard.core.errors import Refused
from brickyard.core.kth_largest import kth_largest
from brickyard.merge import dare, lines, slerp
from brickyard.merge._engine import Piece
from brickyard.merge._signs import disjoint_mean
from brickyard.merge.average import average
from brickyard.merge.ties import ties, trim


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40]), min_size=1, max_size=40), st.data())
def test_the_kth_largest_magnitude_is_exact(values: list[float], data: st.DataObject) -> None:
    x_N = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(1, len(values)))
    assert kth_largest(x_N, k) == float(x_N.abs().sort(descending=True).values[k - 1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6))
def test_only_entries_of_the_heavier_sign_are_averaged(models: int, n: int, seed: int) -> None:
    taus = [noise(seed + t, n).round(decimals=1) for t in range(models)]  # rounded: zeros and ties occur
    found = disjoint_mean(taus)
    for i in range(n):
        column = [float(tau[i]) for tau in taus]
        total = sum(torch.tensor(column, dtype=torch.float32))
        agreeing = [v for v in column if v * float(total) > 0]
        assert float(found[i]) == pytest.approx(sum(agreeing) / len(agreeing) if agreeing else 0.0, abs=1e-6)


def test_trimming_keeps_the_share_asked_for_and_what_equals_the_smallest_kept() -> None:
    tau = noise(0, 1000)
    kept = trim(tau, kth_largest(tau, 200))
    assert int((kept != 0).sum()) == 200
    assert float(kept[kept != 0].abs().min()) >= float(tau[kept == 0].abs().max())
    assert torch.equal(trim(torch.tensor([0.0, 2.0, -1.0]), 0.0), torch.tensor([0.0, 2.0, -1.0]))
    assert torch.equal(trim(torch.ones(4), kth_largest(torch.ones(4), 2)), torch.ones(4))


def test_ties_of_one_model_is_that_model_and_order_does_not_matter() -> None:
    taus = [noise(t, 50) for t in range(3)]
    assert torch.equal(ties(taus[:1], 1.0), taus[0])
    torch.testing.assert_close(ties(taus, 0.3), ties(taus[::-1], 0.3))


def test_dare_without_drops_is_the_sum_and_keeps_the_mean_with_them() -> None:
    tau, piece = torch.ones(200_000), Piece("w", 0, 200_000)
    assert dare.thin(tau, 0.0, dare.generator_of(0, 0, piece)) is tau
    thinned = dare.thin(tau, 0.9, dare.generator_of(0, 0, piece))
    assert thinned.unique().tolist() == [0.0, pytest.approx(10.0)]
    assert float(thinned.mean()) == pytest.approx(1.0, abs=0.03)
    others = [dare.generator_of(1, 0, piece), dare.generator_of(0, 1, piece), dare.generator_of(0, 0, Piece("v", 0, 9))]
    others.append(dare.generator_of(0, 0, Piece("w", 2**18, 9)))
    assert all(not torch.equal(thinned, dare.thin(tau, 0.9, other)) for other in others)
    assert torch.equal(thinned, dare.thin(tau, 0.9, dare.generator_of(0, 0, piece)))


def test_slerp_keeps_ends_and_norms() -> None:
    a, b = noise(0, 40), noise(1, 40)
    assert torch.equal(slerp.slerp(a, b, 0.0), a) and torch.equal(slerp.slerp(a, b, 1.0), b)
    x, y = torch.eye(4)[0], torch.eye(4)[1]
    assert float(slerp.slerp(x, y, 0.3).norm()) == pytest.approx(1.0)
    near = a + 1e-4 * b
    torch.testing.assert_close(slerp.slerp(a, near, 0.25), 0.75 * a + 0.25 * near)
    torch.testing.assert_close(slerp.slerp(a, torch.zeros(40), 0.25), 0.75 * a)


def test_the_average_weighs_models() -> None:
    a, b = noise(0, 8), noise(1, 8)
    torch.testing.assert_close(average([a, b], [3.0, 1.0]), 0.75 * a + 0.25 * b)
    torch.testing.assert_close(average([a, a, a]), a)


def scales(names: list[str], alpha: float = 0.2, beta: float = 0.8, **options: bool) -> list[Any]:
    shapes = {name: (2, 2) for name in names} | {f"{name}.too": (2, 2) for name in names}
    found = lines.scale_by_depth(shapes, alpha, beta, **options)
    return [pytest.approx(found[name]) for name in names]


def test_lines_counts_blocks_by_the_first_number_of_a_name() -> None:
    names = [f"encoder.layer.{i}.w" for i in range(12)]
    assert scales(names) == [0.2 + 0.8 * i / 11 for i in range(12)]
    assert scales(["h.0.w"]) == [1.0]  # one block is the last one
    assert scales(names[:3], reverse=True) == [1.0, 0.6, 0.2]
    experts = [f"layers.{i}.experts.{j}.w" for i in range(2) for j in range(5)]
    assert scales(experts) == [0.2] * 5 + [1.0] * 5
    two = [f"{side}.block.{i}.w" for side, count in (("encoder", 3), ("decoder", 2)) for i in range(count)]
    assert scales(two) == [0.2, 0.6, 1.0, 0.2, 1.0]
    outside = lines.scale_by_depth(
        {"classifier.0.weight": (2, 2), "classifier.1.weight": (2, 2), "norm": (2,)}
        | {f"layers.{i}.{leaf}": (2, 2) for i in range(2) for leaf in "ab"},
        0.3,
        0.7,
    )
    assert outside["classifier.1.weight"] == outside["norm"] == 0.3 and outside["layers.1.a"] == 1.0
    with pytest.raises(Refused, match="no tensor's name"):
        lines.scale_by_depth({"a.weight": (2, 2)}, 0.1, 0.9)
