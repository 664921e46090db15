"""The noise of zeroth-order methods: the same bits on any thread count, chunk size and device, and Gaussian."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from brickyard.core import noise
from brickyard.core.errors import UsageError

COMPARE = """
import torch
from brickyard.core import _noise_triton, noise

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for count, start, terms in ((1, 0, 1), (5000, 3, 2), (3000, noise.PAGE - 4096, 3)):
        theta = torch.linspace(-1, 1, count).to(dtype)
        given = [(noise.key(7, j), 0.3 / (j + 1)) for j in range(terms)]
        plain = noise.add_(theta.clone(), given, parameter=2, start=start)
        keys = [noise._subkeys(k, 2, start // noise.PAGE) for k, _ in given]
        fused = theta.clone().to(device)
        _noise_triton.add_page(fused, start % noise.PAGE, keys, [s for _, s in given], noise.table(device))
        assert torch.equal(plain, fused.cpu()), (dtype, count, (plain - fused.cpu()).abs().max())
print("equal")
"""


def test_the_test_vector_of_the_docstring_holds() -> None:
    found = noise.normal(noise.key(1, 2), 3, 0, 4)
    assert torch.equal(found, torch.tensor([-0.8452160954475403, 3.1611487865448, 0.5051613450050354, -1.0895309448]))
    assert "[-0.8452161, 3.1611488, 0.5051613, -1.0895309]" in (noise.__doc__ or "")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 2**34), st.integers(1, 700), st.integers(0, 699))
def test_a_position_has_its_value_wherever_a_draw_begins(
    key: int, parameter: int, start: int, n: int, cut: int
) -> None:
    whole = noise.normal(key, parameter, start, n)
    cut = min(cut, n)
    parts = [noise.normal(key, parameter, start, cut), noise.normal(key, parameter, start + cut, n - cut)]
    assert torch.equal(whole, torch.cat(parts))


def test_what_a_kernel_writes_counts_as_a_new_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def unseen(theta: torch.Tensor, *_: object) -> None:
        theta.numpy()[:] += 1

    monkeypatch.setattr(noise, "_kernel", lambda kind: unseen)
    weight = torch.nn.Parameter(torch.zeros(8))
    before = weight._version
    noise.add_(weight.detach(), [(noise.key(1), 0.5)], parameter=0)
    assert weight._version > before and torch.equal(weight.detach(), torch.ones(8))


def test_chunks_pages_and_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    start, count = noise.PAGE - 300_001, 600_000
    whole = noise.normal(9, 1, start, count)
    threads = torch.get_num_threads()
    try:
        for some in (1, 2):  # by numpy, by torch
            torch.set_num_threads(some)
            assert torch.equal(noise.normal(9, 1, start, count), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(noise, "CHUNK", 1000)
    assert torch.equal(noise.normal(9, 1, start, count), whole)
    # Another page has another stream: a counter of 32 bits alone would begin again.
    assert not torch.equal(noise.normal(9, 1, 0, 100), noise.normal(9, 1, noise.PAGE, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_terms_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    theta = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    terms = [(noise.key(4, j), scale) for j, scale in enumerate((0.5, -0.25, 1e-3))]
    total = torch.zeros(3003)
    for key, scale in terms:
        total += noise.normal(key, 6, 10, 3003) * scale
    wide = theta.double() if dtype == torch.float64 else theta.float()
    expected = (wide + total.view(3, 1001)).to(dtype)
    found = noise.add_(theta, terms, parameter=6, start=10)
    assert found is theta and torch.equal(theta, expected)


def test_the_draws_are_gaussian_and_independent() -> None:
    n = 1 << 20
    z = noise.normal(noise.key(123), 0, 0, n).double().numpy()
    # A table of 65,536 values cannot pass as continuous for many more draws than this.
    assert stats.kstest(z[: 1 << 16], "norm").pvalue > 1e-3
    assert abs(z.mean()) * n**0.5 < 4 and abs(np.mean(z**2) - 1) * (n / 2) ** 0.5 < 4
    assert abs(np.mean(z**4) - 3) * (n / 96) ** 0.5 < 4
    for shift in (1, 2, 3, 4, 1024):  # a pair shares one hash; the rest are neighbours
        for a, b in ((z[:-shift], z[shift:]), (np.abs(z[:-shift]), np.abs(z[shift:]))):
            correlation = np.corrcoef(a, b)[0, 1]
            assert abs(correlation) * n**0.5 < 4.5, (shift, correlation)
    pairs = np.corrcoef(z[::2] ** 2, z[1::2] ** 2)[0, 1]
    assert abs(pairs) * (n / 2) ** 0.5 < 4.5


def test_neighbouring_keys_and_parameters_are_unrelated() -> None:
    n = 1 << 16
    draws = [noise.normal(noise.key(0, step), p, 0, n).double().numpy() for step in range(6) for p in range(3)]
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() * n**0.5 < 4.5
    # Nor is one stream another one at an offset.
    a, b = np.float32(draws[0]), np.float32(draws[3])
    windows = {a[i : i + 4].tobytes() for i in range(n - 4)}
    assert not any(b[i : i + 4].tobytes() in windows for i in range(0, n - 4, 4))
    assert noise.key(1, 2) != noise.key(2, 1) and noise.key(0) != noise.key(0, 0)


def test_a_tensor_that_noise_cannot_reach_in_place_is_refused() -> None:
    with pytest.raises(UsageError, match="contiguous"):
        noise.add_(torch.zeros(4, 4).T[1:], [(1, 1.0)], parameter=0)
    with pytest.raises(UsageError, match="floating"):
        noise.add_(torch.zeros(4, dtype=torch.int64), [(1, 1.0)], parameter=0)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_gives_the_same_bits() -> None:
    environment = {**os.environ}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-2000:]
