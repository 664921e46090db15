"""Moment probing against its paper: the covariance, the sizes, the invariances, and what a fake would do."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from brickyard.core import registry
from brickyard.core.errors import Refused, UsageError
from brickyard.tune import moment_probing as mp
from brickyard.tune.moment_probing import Config, MomentProbe, MomentProbeClassifier, cross_covariance, features

D, K = 24, 5


def probe(p: int = 32, h: int = 4, **options: Any) -> MomentProbe:
    torch.manual_seed(0)
    made = MomentProbe(D, K, p, h, **options)
    with torch.no_grad():  # at the start V2 u is tiny; a test of it wants it large
        for name, q in made.named_parameters():
            q.copy_(torch.randn(q.shape) * (0.5 if "weight" in name else 0.1))
    return made


def rows(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token states with random values on the padding too."""
    x = torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def numpy_cross_covariance(a_TQ: np.ndarray, b_TQ: np.ndarray) -> np.ndarray:
    q = a_TQ.shape[1]
    return np.cov(a_TQ, b_TQ, rowvar=False, ddof=0)[:q, q:]


@pytest.mark.parametrize("pairs", ["near", "half", "all"])
def test_covariance_equals_numpy_with_ddof_0(pairs: Any):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, 3, 9, 7, generator=generator)
    valid = torch.arange(9) < torch.tensor([[9], [2], [5]])
    c = cross_covariance(z, valid, pairs)
    couples = mp.head_pairs(4, pairs)
    assert c.shape == (3, len(couples), 7, 7)
    for b, n in enumerate([9, 2, 5]):
        for k, (i, j) in enumerate(couples):
            expected = numpy_cross_covariance(z[i, b, :n].double().numpy(), z[j, b, :n].double().numpy())
            np.testing.assert_allclose(c[b, k].numpy(), expected, atol=2e-6)


def test_pairs_of_heads():
    assert mp.head_pairs(4, "near") == [(0, 1), (1, 2), (2, 3)]
    assert mp.head_pairs(4, "half") == [(0, 2), (1, 3)]
    assert mp.head_pairs(4, "all") == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_scalar_centring_is_the_released_codes():
    z = torch.randn(4, 2, 9, 7, generator=torch.Generator().manual_seed(1)) + 3
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    c = cross_covariance(z, valid, "near", "scalar")
    for b, n in enumerate([9, 5]):
        centred = [z[i, b, :n] - z[i, b, :n].mean() for i in range(4)]
        for i in range(3):
            torch.testing.assert_close(c[b, i], centred[i].T @ centred[i + 1] / n, atol=1e-5, rtol=1e-5)
    # At the start, after the LayerNorm, that scalar is 0: the released matrix is an uncentred second moment.
    normed = torch.nn.functional.layer_norm(z, (7,))
    raw = normed[0, 0].T @ normed[1, 0] / 9
    torch.testing.assert_close(cross_covariance(normed, None, "near", "scalar")[0, 0], raw, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(cross_covariance(normed, None, "near", "channel")[0, 0], raw, atol=1e-2)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**31), st.floats(-2, 2))
def test_a_constant_added_to_every_token_changes_no_covariance(tokens: int, seed: int, shift: float):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 2, tokens, 7, generator=generator)
    moved = z + shift * torch.randn(2, 2, 1, 7, generator=generator)
    assert (cross_covariance(z) - cross_covariance(moved)).abs().max() < 1e-6 * 10


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_columns_have_norm_1_or_0(seed: int):
    c = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    c[0, 1, :, 4] = 0
    unit = mp.unit_columns(c)
    norms = unit.norm(dim=2)  # over the first covariance index
    assert norms[0, 1, 4] == 0
    norms[0, 1, 4] = 1
    torch.testing.assert_close(norms, torch.ones_like(norms))
    torch.testing.assert_close(unit, torch.nn.functional.normalize(c, dim=2, eps=1e-12))


def test_a_zero_column_has_a_finite_gradient():
    c = torch.zeros(1, 1, 8, 8, requires_grad=True)
    mp.unit_columns(c).sum().backward()
    assert c.grad is not None and c.grad.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(0, 99), st.integers(1, 5))
def test_order_and_padding_do_not_matter(lengths: list[int], seed: int, pad: int):
    head, (x, mask) = probe(), rows(lengths, seed)
    logits = head(x, mask)
    shuffled = x.clone()
    for b, n in enumerate(lengths):
        shuffled[b, :n] = x[b, torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(head(shuffled, mask), logits, atol=2e-4, rtol=2e-4)
    wide = torch.cat([x, torch.full((len(lengths), pad, D), float("nan"))], 1)
    longer = torch.cat([mask, torch.zeros(len(lengths), pad, dtype=torch.bool)], 1)
    torch.testing.assert_close(head(wide, longer), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head(wide, longer.long()), head(wide, longer))


@pytest.mark.parametrize("center", ["channel", "scalar"])
def test_a_row_does_not_see_its_batch(center: Any):
    head, (x, mask) = probe(center=center), rows([7, 3, 5])
    for b, n in enumerate([7, 3, 5]):
        torch.testing.assert_close(head(x[b : b + 1, :n]), head(x, mask)[b : b + 1], atol=1e-5, rtol=1e-5)


def test_the_second_moment_is_seen():
    """Two rows with the same mean and different covariance get different logits; the linear part alone sees none."""
    x = torch.randn(1, 8, D, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(1, keepdim=True)
    turned = x.clone()
    turned[..., 0] = -x[..., 0]
    head = probe()
    assert (head(x) - head(turned)).abs().max() > 1e-2
    flat = probe(second_order=False)
    assert (flat(x) - flat(turned)).abs().max() < 1e-6


def test_without_v2_and_with_v1_doubled_it_is_the_linear_probe():
    head, (x, mask) = probe(), rows([7, 3, 5])
    linear = nn.Linear(D, K)
    linear.load_state_dict(head.first.state_dict())
    with torch.no_grad():
        head.second.weight.zero_()
        head.second.bias.zero_()
        head.first.weight.mul_(2)
        head.first.bias.mul_(2)
    mean = torch.stack([x[b, :n].mean(0) for b, n in enumerate([7, 3, 5])])
    torch.testing.assert_close(head(x, mask), linear(mean), atol=1e-5, rtol=1e-5)


def test_logits_are_the_papers_equation():
    """The whole head written out again for one row, with loops."""
    head, (x, mask) = probe(p=32, h=4), rows([6])
    z = x[0] @ head.projection.weight.T + head.projection.bias
    split = [nn.functional.layer_norm(part, (8,), head.norm.weight, head.norm.bias) for part in z.split(8, dim=1)]
    image = []
    for a, b in pairwise(split):
        c = (a - a.mean(0)).T @ (b - b.mean(0)) / 6
        image.append(c / c.norm(dim=0, keepdim=True))
    conv1, act, conv2 = head.convolutions
    u = conv2(act(conv1(torch.stack(image)[None]))).flatten()
    expected = (head.first(x[0].mean(0)) + head.second(u)) / 2
    torch.testing.assert_close(head(x, mask)[0], expected, atol=1e-4, rtol=1e-4)
    assert conv1.bias is None and conv1.stride == (2, 2) and conv1.padding == (0, 0) and isinstance(act, nn.GELU)


def test_cls_is_v_and_leaves_x():
    head, (x, mask) = probe(pooled="cls"), rows([7, 4])
    u = head.moments(x[:, 1:].masked_fill(~mask[:, 1:, None], 0), mask[:, 1:])
    torch.testing.assert_close(head(x, mask), (head.first(x[:, 0]) + head.second(u)) / 2)
    twisted = x.clone()
    twisted[:, 0] += 5
    torch.testing.assert_close(
        head(twisted, mask) - head(x, mask), (head.first(twisted[:, 0]) - head.first(x[:, 0])) / 2
    )


def test_interleaved_heads_take_every_hth_channel():
    head, other = probe(interleaved=True), probe()
    x, mask = rows([6, 4])
    with torch.no_grad():  # channel c = q h + i of the interleaved head is channel i Q + q of the contiguous one
        order = torch.arange(32).view(8, 4).T.flatten()
        other.projection.weight.copy_(head.projection.weight[order])
        other.projection.bias.copy_(head.projection.bias[order])
    torch.testing.assert_close(head(x, mask), other(x, mask), atol=1e-5, rtol=1e-5)


def test_sizes():
    assert features(512, 4) == 2883 == 3 * 31 * 31
    assert features(128, 4) == 3 * 7 * 7
    assert features(28, 4) == 3
    assert features(512, 4, "all") == 2 * 2883 and features(512, 4, "half") == 2 * 31 * 31
    big = MomentProbe(8, 2, 512, 4)
    assert big.moments(torch.randn(1, 3, 8), None).shape == (1, 2883)
    assert probe(32, 4, pairs="all").moments(torch.randn(2, 3, D), None).shape == (2, 6)
    count = sum(q.numel() for q in MomentProbe(384, 6).parameters())
    assert count == 384 * 128 + 128 + 2 * 32 + 2 * 81 + 384 * 6 + 6 + 147 * 6 + 6 == 52_704


@pytest.mark.parametrize(
    ("p", "h", "pairs", "message"),
    [
        (130, 4, "near", "next p that does is 132"),
        (3, 4, "near", "next p that does is 28"),
        (24, 4, "near", "smallest p for h=4 is 28"),
        (512, 1, "near", "h >= 2"),
        (96, 3, "half", "even h"),
        (0, 4, "near", "next p that does is 28"),
        (-4, 4, "near", "next p that does is 28"),
    ],
)
def test_sizes_that_leave_nothing_are_refused(p: int, h: int, pairs: Any, message: str):
    with pytest.raises(UsageError, match=message):
        Config(p=p, h=h, pairs=pairs)
    with pytest.raises(UsageError, match=message):
        MomentProbe(D, K, p, h, pairs)


def test_too_few_tokens_name_the_row():
    x, mask = rows([5, 1, 1])
    with pytest.raises(Refused, match=r"row 1 of the batch has 1 valid token\(s\), rows like it: 2; .* needs 2"):
        probe()(x, mask)
    with pytest.raises(Refused, match=r"row 0 of the batch has 2 valid .* needs 3"):
        probe(pooled="cls")(x[:, :2])
    with pytest.raises(Refused, match="needs 1"):
        probe(second_order=False)(x, torch.zeros_like(mask))
    assert probe(second_order=False)(x, mask).isfinite().all()


def test_covariance_is_float32_under_autocast():
    x, mask = rows([9, 6])
    x = x * 30
    head = probe()
    exact = head(x, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = torch.randn(4, 2, 9, 8, dtype=torch.bfloat16)
        assert cross_covariance(z).dtype == torch.float32
        torch.testing.assert_close(cross_covariance(z), cross_covariance(z.float()), atol=1e-6, rtol=1e-6)
        loose = head(x, mask)
    assert loose.isfinite().all() and (loose.float() - exact).abs().max() < 0.1 * exact.abs().max()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
        return out


def test_memory_is_lean():
    """At B=32, T=64, D=384, p=128 6.6 MiB at most wait for the backward pass, and nothing larger than X is made."""
    torch.manual_seed(0)
    head = MomentProbe(384, 6)
    x, mask = torch.randn(32, 64, 384), torch.arange(64) < torch.randint(2, 65, (32, 1))
    own = {q.untyped_storage().data_ptr() for q in head.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = head(x, mask).sum()
    assert sum(saved.values()) <= 6.6 * 2**20
    with Largest() as largest:
        head(x, mask).sum().backward()
    assert largest.numel <= x.numel()
    loss.backward()


def task(width: int = K) -> Any:
    return SimpleNamespace(width=width, kind="text-classification", input="text")


def test_config_reaches_the_head():
    made = mp.head(Config(p=56, h=2, pairs="all", center="scalar", pooled="cls", interleaved=True, l2=False), task(), D)
    assert (made.heads, made.pairs, made.center, made.pooled) == (2, "all", "scalar", "cls")
    assert made.interleaved and not made.l2 and made.projection.out_features == 56
    assert not hasattr(mp.head(Config(second_order=False), task(), D), "projection")


def test_presets_are_the_papers():
    paper, released = (registry.config("moment-probing", {"preset": name}) for name in ("paper", "released"))
    assert (paper.p, paper.h, paper.pooled, paper.init, paper.center) == (512, 4, "cls", "paper", "channel")
    assert (released.p, released.center) == (512, "scalar")
    with pytest.raises(UsageError, match="smallest p"):
        registry.config("moment-probing", {"p": 24})


def learnable(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose class is the sign of a correlation between two channels: their mean says nothing."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 2, n)
    x = draw.standard_normal((n, 12, 16)).astype(np.float32)
    x[..., 1] = np.where(y == 1, 1, -1)[:, None] * x[..., 0] + 0.1 * x[..., 1]
    mask = np.arange(12) < draw.integers(6, 13, (n, 1))
    x[~mask] = 50.0
    return x, y, mask


def test_the_classifier_learns_what_only_the_covariance_shows():
    x, y, mask = learnable(400, 0)
    other_x, other_y, other_mask = learnable(200, 1)
    names = np.array(["minus", "plus"])
    model = MomentProbeClassifier(p=28, h=4, epochs=5, lr=1e-2).fit(x, names[y], mask)
    assert model.score(other_x, names[other_y], other_mask) > 0.9
    assert set(model.predict(other_x, other_mask)) <= {"minus", "plus"}
    assert np.allclose(model.predict_proba(other_x, other_mask).sum(1), 1, atol=1e-5)
    again = MomentProbeClassifier(p=28, h=4, epochs=5, lr=1e-2).fit(x, names[y], mask)
    assert np.array_equal(again.predict_proba(other_x, other_mask), model.predict_proba(other_x, other_mask))
    shuffled = np.random.default_rng(2).permutation(names[y])
    control = MomentProbeClassifier(p=28, h=4, epochs=5, lr=1e-2).fit(x, shuffled, mask)
    assert abs(control.score(other_x, names[other_y], other_mask) - 0.5) < 0.12


def test_the_classifier_refuses_misfits():
    x, y, mask = learnable(6, 0)
    with pytest.raises(UsageError, match="labels of shape"):
        MomentProbeClassifier(p=28).fit(x, y[:-1], mask)
    with pytest.raises(UsageError, match="expected"):
        MomentProbeClassifier(p=28).fit(x, y, mask[:, :-1])
