"""The maps of CCA Merge: their invariants, and the same numbers as other implementations give."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.cross_decomposition import CCA
from torch import Tensor

from brickyard.core.errors import NotFinite
from brickyard.merge import _align
from brickyard.merge._align import Covariances, Moments, cca, permute, polar, procrustes, ridged

GAMMAS = (0.0, 1e-3, 1.0, 100.0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariances(x: Tensor, y: Tensor) -> Covariances:
    moments = Moments(2)
    for a, b in zip(x.split(50), y.split(50), strict=True):
        moments.add(1, b, moments.add(0, a))
    return moments.covariances(1)


def mapped(found: Covariances, ridge: float) -> _align.Map:
    return cca(found, ridged(found.xx, ridge), ridged(found.yy, ridge))


def correlated(n: int = 6, m: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of two networks that share something: [m, n] each, with large means."""
    shared = draw(seed, m, n)
    x = shared @ draw(seed + 1, n, n) + 5
    return x, (shared + 0.5 * draw(seed + 2, m, n)) @ draw(seed + 3, n, n) - 3


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_map_and_its_inverse_cancel_and_carry_the_covariance(gamma: float) -> None:
    found = covariances(*correlated())
    t = mapped(found, gamma)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(t.forward @ t.inverse, eye, atol=1e-6, rtol=0)
    torch.testing.assert_close(t.forward @ (found.yy + gamma * eye) @ t.forward.T, found.xx + gamma * eye)
    s = t.correlations
    assert s is not None and bool((s.diff() <= 0).all()) and float(s[-1]) >= 0 and float(s[0]) <= 1 + 1e-6


@pytest.mark.parametrize("gamma", GAMMAS)
def test_of_a_permuted_copy_the_map_is_the_permutation_for_any_ridge(gamma: float) -> None:
    x, _ = correlated()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    wanted = _align.permutation(order).inverse.T  # z_B[order[i]] is z_A[i]
    y = torch.empty_like(x)
    y[:, order] = x
    torch.testing.assert_close(mapped(covariances(x, y), gamma).forward, wanted, atol=1e-6, rtol=0)
    assert torch.equal(permute(covariances(x, y)).forward, wanted)


def test_of_an_invertible_mixture_all_correlations_are_one_and_the_map_undoes_it() -> None:
    x, _ = correlated()
    mixed = x @ draw(9, 6, 6)
    t = mapped(covariances(x, mixed), 0.0)
    assert t.correlations is not None
    torch.testing.assert_close(t.correlations, torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close((mixed - mixed.mean(0)) @ t.forward.T, x - x.mean(0), atol=1e-6, rtol=0)


def test_canonical_correlations_are_those_of_scikit_learn() -> None:
    x, y = correlated()
    s = mapped(covariances(x, y), 0.0).correlations
    a, b = CCA(n_components=6, max_iter=10_000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    wanted = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(6)]
    assert s is not None
    np.testing.assert_allclose(s.numpy(), sorted(wanted, reverse=True), atol=1e-5)


def test_procrustes_is_that_of_scipy_and_can_keep_the_mean_over_features() -> None:
    x, y = correlated()
    found = covariances(x, y)
    centre = lambda z: (z - z.mean(0)).numpy()  # noqa: E731
    wanted = orthogonal_procrustes(centre(y), centre(x))[0].T
    np.testing.assert_allclose(procrustes(found).forward.numpy(), wanted, atol=1e-8)
    t = procrustes(found, keep_mean=True).forward
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(t @ ones, ones)
    torch.testing.assert_close(t @ t.T, torch.eye(6, dtype=torch.float64))


def test_moments_are_those_of_numpy_whatever_the_batches() -> None:
    x, y = correlated(m=150)
    found = covariances(x + 1e6, y)  # a mean a million times the spread
    wanted = np.cov(np.hstack([x.numpy(), y.numpy()]).T, bias=True)
    np.testing.assert_allclose(found.xx, wanted[:6, :6], rtol=1e-7)
    np.testing.assert_allclose(found.xy, wanted[:6, 6:], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.yy, wanted[6:, 6:], rtol=1e-9)
    assert found.samples == 150


def test_the_assignment_is_the_best_of_all() -> None:
    worth = draw(3, 5, 5)
    best = max(float(sum(worth[i, j] for i, j in enumerate(order))) for order in permutations(range(5)))
    order = _align.assigned(worth)
    assert float(worth[torch.arange(5), order].sum()) == pytest.approx(best)
    with pytest.raises(NotFinite):
        _align.assigned(worth * torch.nan)


def test_a_rank_deficient_polar_factor_is_orthogonal_and_nearest_to_the_identity() -> None:
    root = draw(0, 5, 3)
    turned, _ = polar(root @ root.T)
    torch.testing.assert_close(turned, torch.eye(5, dtype=torch.float64))
    turned, _ = polar(draw(1, 5, 2) @ draw(2, 2, 5))
    torch.testing.assert_close(turned @ turned.T, torch.eye(5, dtype=torch.float64))
    assert torch.equal(polar(torch.zeros(3, 3, dtype=torch.float64))[0], torch.eye(3, dtype=torch.float64))


def test_heads_are_paired_and_mapped_within_pairs_alone() -> None:
    x = draw(0, 300, 8)
    mixed = torch.cat([x[:, 4:] @ draw(1, 4, 4), x[:, :4] @ draw(2, 4, 4)], 1)  # heads change places and mix inside
    found = covariances(x, mixed)
    t = _align.by_heads(found, 2, lambda part: mapped(part, 1e-9))
    assert t.order is not None and t.order.tolist() == [1, 0]
    torch.testing.assert_close(mixed @ t.forward.T - (mixed @ t.forward.T).mean(0), x - x.mean(0), atol=1e-6, rtol=0)
    assert not t.forward[:4, :4].any() and not t.forward[4:, 4:].any()
    torch.testing.assert_close(t.forward @ t.inverse, torch.eye(8, dtype=torch.float64))
    wide = _align.repeated(t, 2)
    values = draw(4, 5, 2, 1, 4)
    spread = values.expand(5, 2, 2, 4).reshape(5, 16) @ wide.forward.T
    single = (values.reshape(5, 8) @ t.forward.T).reshape(5, 2, 1, 4).expand(5, 2, 2, 4).reshape(5, 16)
    torch.testing.assert_close(spread, single)
    whole = _align.heads_only(t).forward
    assert torch.equal(
        whole @ torch.arange(8.0, dtype=torch.float64), torch.tensor([4.0, 5, 6, 7, 0, 1, 2, 3]).double()
    )
