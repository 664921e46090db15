"""Hadamard matrices: orthogonal in every supported size, and applied factor by factor as if they were written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import Tensor

from brickyard.core.errors import Refused
from brickyard.optim._hadamard import _CACHED, base_of, matrix, nearest, next_size, transform, williamson

BASES = (12, 20, 28, 36, 40, 44, 52, 60, 100, 108, 140, 156, 172)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1, 2, 4, 64, 128, 512, *BASES, 24, 344, 688, 384])
def test_every_supported_size_is_an_orthogonal_matrix_of_equal_entries(size: int) -> None:
    found = matrix(size)
    assert (found.double() @ found.double().t() - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-6
    torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5))


def test_powers_of_two_are_sylvesters() -> None:
    for size in (1, 2, 8, 64, 128, 256):
        np.testing.assert_allclose(matrix(size, dtype=torch.float64), hadamard(size) / size**0.5, atol=1e-12)


@given(st.sampled_from([1, 2, 8, 12, 20, 24, 40, 56, 128, 256]), st.integers(1, 3), st.integers(1, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_transform_is_the_product_with_the_matrix_along_its_dimension(k: int, a: int, b: int, back: bool) -> None:
    x, h = gaussian(a, k, b).double(), matrix(k, dtype=torch.float64)
    expected = torch.einsum("ij,ajb->aib", h.t() if back else h, x)
    torch.testing.assert_close(transform(x, 1, transpose=back), expected)
    torch.testing.assert_close(transform(transform(x, 1), 1, transpose=True), x)
    torch.testing.assert_close(transform(x.transpose(1, 2), -1, transpose=back), expected.transpose(1, 2))


@pytest.mark.parametrize("size", [2, 40, 128, 1024, 2048, 4096])
@pytest.mark.parametrize("back", [False, True])
def test_rows_in_several_pieces_are_the_product_with_the_matrix(size: int, back: bool) -> None:
    rows = 2 * _CACHED // (8 * size) + 3  # two pieces and a rest
    x, h = gaussian(rows, size).double(), matrix(size, dtype=torch.float64)
    expected = x @ (h if back else h.t())
    torch.testing.assert_close(transform(x, transpose=back), expected)
    columns = x.t().contiguous().t()  # rows that do not lie behind one another
    torch.testing.assert_close(transform(columns, transpose=back), expected)
    tracked = x[:5].clone().requires_grad_()
    made = transform(tracked, transpose=back)
    torch.testing.assert_close(made.detach(), expected[:5])
    (gradient,) = torch.autograd.grad(made.sum(), tracked)
    torch.testing.assert_close(gradient, torch.ones(5, size, dtype=torch.float64) @ (h.t() if back else h))
    assert transform(x[:0]).shape == (0, size)


def test_half_precision_keeps_the_length_of_a_vector() -> None:
    """1 / sqrt(768) rounded to bfloat16 would lengthen every vector by the same 0.13 %."""
    x = gaussian(64, 768).bfloat16()
    assert float(transform(x).double().norm() / x.double().norm()) == pytest.approx(1, abs=3e-4)


def test_sizes_without_a_matrix_are_refused_with_the_nearest() -> None:
    assert [base_of(k) for k in (0, 1, 24, 40, 56, 172)] == [None, (0, 1), (1, 12), (1, 20), (1, 28), (0, 172)]
    assert nearest(34) == (32, 36) and next_size(34) == 36 and next_size(129) == 140 and next_size(1) == 1
    with pytest.raises(Refused, match="size 34 here; the nearest are 32 and 36"):
        transform(gaussian(2, 34))
    with pytest.raises(ValueError, match="order 25"):
        williamson(25, 7)
