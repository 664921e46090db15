"""Zeroth-order steps: their pure pieces against calculus, brute force and torch.optim; what they must never do."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from brickyard.core import measure, noise
from brickyard.core.errors import NotFinite, Refused, UnknownName, UsageError
from brickyard.optim._zo_optimizer import Rule, ZerothOrder
from brickyard.optim._zo_step import (
    CHUNK,
    ESTIMATORS,
    Direction,
    Estimate,
    Query,
    Rate,
    conservative_,
    descend_,
    equal_zeros,
    jvp,
    magnitude_zeros,
    merged,
    move_,
    one_point,
    two_point,
    unique,
)

SIZES = (3, 8, 5)


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[tuple[int, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return unique([(scale * torch.randn(n, generator=g)).to(dtype) for n in SIZES])


def flat(parameters: list[tuple[int, Tensor]]) -> Tensor:
    return torch.cat([theta.flatten() for _, theta in parameters])


def z_of(parameters: list[tuple[int, Tensor]], key: int, direction: Direction = Direction()) -> Tensor:  # noqa: B008
    device = torch.device("cpu")
    z = [direction.draw(key, i, 0, theta.numel(), device) for i, theta in parameters]
    return torch.cat(z).double() * direction.radius(parameters, key)


def linear(parameters: list[tuple[int, Tensor]], seed: int = 1) -> tuple[Tensor, Callable[[], Tensor]]:
    a = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed)).double()
    return a, lambda: a @ flat(parameters).double()


def quadratic(parameters: list[tuple[int, Tensor]]) -> tuple[Tensor, Callable[[], Tensor]]:
    root = torch.randn(sum(SIZES), sum(SIZES), generator=torch.Generator().manual_seed(3)).double()
    return root @ root.T, lambda: 0.5 * flat(parameters) @ (root @ root.T) @ flat(parameters)


@settings(max_examples=15, deadline=None)
@given(
    st.floats(1e-4, 10),
    st.integers(0, 2**62),
    st.sampled_from(sorted(ESTIMATORS)),
    st.sampled_from(["gaussian", "sphere", "rademacher"]),
)
def test_on_a_linear_loss_the_slope_is_the_inner_product_for_any_eps(eps: float, key: int, name: str, law: str) -> None:
    parameters, direction = tensors(), Direction(law)
    a, loss = linear(parameters)
    before = flat(parameters)
    found = ESTIMATORS[name](loss, parameters, [key], eps, direction)
    z = z_of(parameters, key, direction)
    assert found.queries[0].slope == pytest.approx(float(a @ z), rel=1e-5, abs=1e-5)  # z is float32
    assert found.loss == pytest.approx(float(a @ before), abs=1e-5 * (1 + eps))
    move_(parameters, found.back, direction)
    torch.testing.assert_close(flat(parameters), before, rtol=0, atol=1e-5 * eps)


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-2, 1), st.integers(0, 2**62))
def test_bias_on_a_quadratic_is_zero_for_two_points_and_half_eps_curvature_for_one(eps: float, key: int) -> None:
    parameters = tensors()
    hessian, loss = quadratic(parameters)
    z, before = z_of(parameters, key), flat(parameters)
    slope = float((hessian @ before) @ z)
    for estimator, bias in ((two_point, 0.0), (one_point, eps / 2 * float(z @ hessian @ z)), (jvp, 0.0)):
        found = estimator(loss, parameters, [key], eps)
        move_(parameters, found.back)
        assert found.queries[0].slope - slope == pytest.approx(bias, rel=1e-5, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**62))
def test_going_there_and_back_costs_at_most_four_units_in_the_last_place(scale: float, key: int) -> None:
    parameters = tensors(dtype=torch.float32, scale=scale)
    before = flat(parameters)
    for step in (1e-3, -2e-3, 1e-3):
        move_(parameters, [(key, step)])
    # Of the largest number that a weight was on the way: one near zero cannot keep its own last places.
    reached = before.abs() + 1e-3 * z_of(parameters, key).abs().float()
    ulp = torch.nextafter(reached, torch.tensor(math.inf)) - reached
    assert ((flat(parameters) - before).abs() <= 4 * ulp).all()


def test_the_law_of_the_estimate_on_a_small_gradient() -> None:
    """The mean of g is the gradient, its mean square d + 2 times the gradient's."""
    parameters = unique([torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0)).double()])
    a, loss = linear(parameters)
    d, draws = sum(SIZES), 800
    total, squares = torch.zeros(d).double(), []
    for draw in range(draws):
        found = two_point(loss, parameters, [noise.key(7, draw)], 1e-2)
        move_(parameters, found.back)
        g = found.queries[0].slope * z_of(parameters, found.queries[0].key)
        total += g
        squares.append(float(g @ g))
    assert float(torch.cosine_similarity(total, a, dim=0)) > 0.97
    assert np.mean(squares) / float(a @ a) == pytest.approx(d + 2, rel=0.15)


def test_queries_add_up_to_the_mean_of_single_ones() -> None:
    keys, rates = [11, 12, 13], dict.fromkeys(range(3), Rate(0.1))
    several = tensors()
    _, loss = linear(several)
    found = two_point(loss, several, keys, 1e-2)
    descend_(several, found, rates)
    singles = []
    for key in keys:
        one = tensors()
        _, loss = linear(one)
        descend_(one, two_point(loss, one, [key], 1e-2), rates)
        singles.append(flat(one))
    torch.testing.assert_close(flat(several), torch.stack(singles).mean(0), rtol=0, atol=1e-7)


def test_terms_of_one_key_are_drawn_once_and_three_passes_make_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert merged([(5, 0.5)], [(6, 1.0), (5, 0.25)], [(7, 1.0), (7, -1.0)]) == [(5, 0.75), (6, 1.0)]
    passes = []
    plain = noise.add_
    monkeypatch.setattr(noise, "add_", lambda t, terms, **o: passes.append(list(terms)) or plain(t, terms, **o))
    parameters = tensors()[:1]
    optimiser = ZerothOrder([parameters[0][1]], lr=0.1, estimator="two-point")
    optimiser.step(lambda: parameters[0][1].sum())
    assert [len(terms) for terms in passes] == [1, 1, 1]
    assert [terms[0][1] for terms in passes[:2]] == pytest.approx([1e-3, -2e-3])


class Probe(nn.Module):
    """Two layers with attention between them, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).view(2, 5, 2, 4).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).reshape(2, 5, 8)
        return self.head(self.norm(y)).mean(1)


IDS, LABELS = torch.arange(10).view(2, 5), torch.tensor([0, 2])


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(model(IDS), LABELS)


@pytest.mark.parametrize("estimator", ["jvp", "two-point"])
def test_the_slope_is_backpropagation_s(estimator: str) -> None:
    model = Probe()
    loss_of(model)().backward()
    parameters = unique(model.parameters())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        found = ESTIMATORS[estimator](loss_of(model), parameters, [21], 1e-4, Direction())
        move_(parameters, found.back)
    assert found.queries[0].slope == pytest.approx(float(gradient @ z_of(parameters, 21)), rel=1e-5)
    exact = estimator == "jvp"
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0 if exact else 1e-15)
    loss_of(model)().backward()  # nothing of forward mode is left on the parameters


def test_an_operation_without_forward_derivative_is_named() -> None:
    theta = nn.Parameter(torch.rand(4, 3))
    with pytest.raises(Refused, match="cdist"):
        jvp(lambda: torch.cdist(theta, theta, p=3.0).sum(), unique([theta]), [1], 1e-3)
    with pytest.raises(UsageError, match="depends on none"):
        jvp(lambda: torch.ones(()), unique([theta]), [1], 1e-3)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_rules_are_torch_optim_s_with_the_estimate_as_gradient(name: str) -> None:
    """Golden: torch's own SGD and AdamW, given g as .grad, on tensors longer than a chunk, with weight decay."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=g) for n in (CHUNK + 100, 7)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimiser = ZerothOrder(ours, lr=0.01, weight_decay=0.1, q=2, rule=Rule(name=name, beta=0.8, beta2=0.95))
    options = {"lr": 0.01, "weight_decay": 0.1}
    reference = {
        "sgd": lambda: torch.optim.SGD(theirs, **options),
        "momentum": lambda: torch.optim.SGD(theirs, momentum=0.8, **options),
        "adam": lambda: torch.optim.AdamW(theirs, betas=(0.8, 0.95), **options),
    }[name]()
    for step in range(4):
        losses: list[float] = []

        def loss(seen: list[float] = losses) -> Tensor:
            value = 0.01 * sum((p.double().square().sum() for p in ours), torch.zeros(()))
            seen.append(float(value))
            return value

        optimiser.step(loss)
        keys = [noise.key(0, step, 0, query) for query in range(2)]
        p_q = [(plus - minus) / 2e-3 for plus, minus in (losses[:2], losses[2:])]
        for i, p in enumerate(theirs):
            p.grad = sum(s / 2 * noise.normal(k, i, 0, p.numel()) for s, k in zip(p_q, keys, strict=True))
        reference.step()
        for mine, known in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, known, rtol=1e-4, atol=5e-6)
    assert measure.optimiser_bytes(optimiser) == pytest.approx(
        4 * {"sgd": 0, "momentum": 1, "adam": 2}[name] * (CHUNK + 107), abs=16
    )


def test_both_signs() -> None:
    for sign in ("elementwise", "scalar"):
        parameters = [nn.Parameter(t.float()) for _, t in tensors()]
        before = torch.cat([p.detach().clone() for p in parameters])
        ZerothOrder(parameters, lr=0.5, rule=Rule(name="sign", sign=sign)).step(lambda: parameters[0].sum())  # noqa: B023
        z = torch.cat([noise.normal(noise.key(0, 0, 0, 0), i, 0, n) for i, n in enumerate(SIZES)])
        slope = z[: SIZES[0]].sum().sign()
        moved = 0.5 * slope * (z.sign() if sign == "elementwise" else z)
        torch.testing.assert_close(torch.cat([p.detach() for p in parameters]), before - moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("lr", "best"), [(1e-3, 1.0), (-1e-3, -1.0), (1e3, 0.0)])
def test_conservative_goes_where_the_loss_is_least(lr: float, best: float) -> None:
    parameters = tensors()
    _, loss = quadratic(parameters)
    before, key = flat(parameters), 31
    found = two_point(loss, parameters, [key], 1e-3)
    g = found.queries[0].slope * z_of(parameters, key)
    value = conservative_(loss, parameters, found, dict.fromkeys(range(3), Rate(lr)))
    torch.testing.assert_close(flat(parameters), before - best * lr * g, rtol=1e-6, atol=1e-6 * max(1, lr))
    assert value == pytest.approx(float(loss()), rel=1e-6)


def test_conservative_takes_a_loss_that_is_no_number_for_the_worst() -> None:
    parameters = tensors()
    answers = iter([math.nan, 2.0, 1.0])
    found = Estimate((Query(1, 1.0, 1.0),), 0.0)
    before = flat(parameters)
    conservative_(lambda: torch.tensor(next(answers)), parameters, found, dict.fromkeys(range(3), Rate(0.1)))
    torch.testing.assert_close(flat(parameters), before + 0.1 * z_of(parameters, 1), rtol=0, atol=1e-7)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 0.95), st.sampled_from(["gaussian", "rademacher"]))
def test_a_mask_leaves_out_the_share_asked_for(share: float, law: str) -> None:
    direction = Direction(law, {0: share}, mask=5)
    z = direction.draw(9, 0, 0, 40_000, torch.device("cpu"))
    assert float((z == 0).double().mean()) == pytest.approx(share, abs=0.015)
    kept = Direction(law).draw(9, 0, 0, 40_000, torch.device("cpu"))
    assert torch.equal(z[z != 0], kept[z != 0])


def test_a_masked_entry_stays_while_its_mask_does_and_no_sparsity_is_dense() -> None:
    theta = nn.Parameter(torch.zeros(1000))
    target = torch.randn(1000)
    optimiser = ZerothOrder([theta], lr=1e-3, direction=Direction(zeros={0: 0.5}), resample=3)
    at = []
    for _ in range(6):
        optimiser.step(lambda: (theta - target).square().sum())
        at.append(theta.detach().clone())
    still = [(a - b).abs() < 1e-6 for a, b in pairwise(at)]
    assert 400 < int((still[0] & still[1]).sum()) < 600  # steps 2 and 3 share the mask of step 1
    assert int((still[2] & still[1]).sum()) < 350  # step 4 has another
    runs = []
    for zeros in ({}, {0: 0.0}):
        theta = nn.Parameter(torch.zeros(50))
        ZerothOrder([theta], lr=1e-3, direction=Direction(zeros=zeros)).step(lambda: (theta - 1).square().sum())  # noqa: B023
        runs.append(theta.detach())
    assert torch.equal(*runs)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 0.9))
def test_magnitude_shares_come_from_one_threshold(share: float) -> None:
    g = torch.Generator().manual_seed(0)
    parameters = unique([torch.randn(5000, generator=g) * s for s in (1.0, 1.5)])
    threshold = torch.cat([t.abs() for _, t in parameters]).quantile(share)
    found = magnitude_zeros(parameters, share)
    for i, theta in parameters:
        assert found[i] == pytest.approx(float((theta.abs() <= threshold).double().mean()), abs=0.01)
    assert equal_zeros(parameters, share) == {0: share, 1: share}
    with pytest.raises(Refused, match="mask=equal"):
        magnitude_zeros(unique([torch.ones(9), torch.zeros(9)]), 0.4)


def test_a_sphere_has_radius_root_d() -> None:
    parameters = tensors()
    for zeros in ({}, {1: 0.5}):
        z = z_of(parameters, 3, Direction("sphere", zeros))
        assert float(z.norm()) == pytest.approx(math.sqrt(int(z.count_nonzero())), rel=1e-5)


def run(steps: int = 5, **options: object) -> Tensor:
    g = torch.Generator().manual_seed(0)
    theta = [nn.Parameter(torch.randn(n, generator=g)) for n in SIZES]
    if "parts" in options:
        options["parts"] = [[theta[i] for i in part] for part in options["parts"]]  # type: ignore[attr-defined]
    optimiser = ZerothOrder(theta, lr=1e-2, **options)  # type: ignore[arg-type]
    for _ in range(steps):
        optimiser.step(lambda: sum((p * (i + 1)).sum() for i, p in enumerate(theta)))
    return torch.cat([p.detach() for p in theta])


def test_same_seed_same_bits_and_one_block_is_all() -> None:
    assert torch.equal(run(), run()) and not torch.equal(run(), run(seed=1))
    assert torch.equal(run(), run(parts=[[0, 1, 2]]))
    assert not torch.equal(run(), run(parts=[[0], [1, 2]]))
    # A linear loss has the same slopes wherever one stands, so that it does not matter when blocks move.
    parts = [[0, 2], [1]]
    torch.testing.assert_close(run(parts=parts), run(parts=parts, joint=True), rtol=0, atol=2e-3)
    with pytest.raises(UsageError, match="blocks must hold"):
        run(parts=[[0], [1]])


def test_each_block_has_a_slope_of_its_own() -> None:
    theta = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    optimiser = ZerothOrder(theta, lr=1.0, parts=[[theta[0]], [theta[1]]])
    optimiser.step(lambda: theta[1].sum())
    assert theta[0].detach().abs().max() < 1e-6 and theta[1].detach().abs().max() > 1e-2


def test_learning_rate_zero_comes_back_and_another_batch_has_another_slope() -> None:
    theta = nn.Parameter(torch.randn(100))
    before = theta.detach().clone()
    ZerothOrder([theta], lr=0.0).step(lambda: theta.square().sum())
    torch.testing.assert_close(theta.detach(), before, rtol=0, atol=1e-6)
    inner = lambda b: lambda: theta.detach() @ b  # noqa: E731
    slopes = [two_point(inner(b), unique([theta.detach()]), [1], 1e-3).queries[0].slope for b in torch.eye(100)[:2]]
    assert slopes[0] != slopes[1]


def test_tied_weights_move_once() -> None:
    one = nn.Parameter(torch.zeros(6))
    other = nn.Parameter(one.detach().view(2, 3))
    assert len(unique([one, other])) == 2 - 1
    tied = ZerothOrder([one, other], lr=0.1)
    tied.step(lambda: one.sum())
    alone = nn.Parameter(torch.zeros(6))
    ZerothOrder([alone], lr=0.1).step(lambda: alone.sum())
    assert torch.equal(one.detach(), alone.detach())
    buffer = torch.zeros(10)
    with pytest.raises(Refused, match="overlap"):
        unique([buffer[:6], buffer[4:]])
    assert len(unique([buffer[:5], buffer[5:]])) == 2


def test_nothing_of_backpropagation_is_left_and_no_memory_beyond_a_chunk_is_taken() -> None:
    """The card's bound: a forward without gradient, plus at most the largest tensor and 1 MB."""
    model = nn.Sequential(nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10))
    x = torch.randn(16, 1200)
    with torch.no_grad():
        forward = measure.peak_bytes(lambda: model(x).square().mean()).bytes
    largest = 4 * max(p.numel() for p in model.parameters())
    for options, kept in (({}, 0), ({"rule": Rule(name="sign")}, 0), ({"rule": Rule(name="adam")}, 2)):
        optimiser = ZerothOrder(model.parameters(), lr=1e-6, **options)  # type: ignore[arg-type]
        loss = optimiser.step(lambda: model(x).square().mean())
        peak = measure.peak_bytes(lambda: optimiser.step(lambda: model(x).square().mean())).bytes  # noqa: B023
        state = 4 * kept * sum(p.numel() for p in model.parameters())
        assert peak - forward - state <= largest + 2**20
        assert loss is not None and not loss.requires_grad and loss.grad_fn is None
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_slope_that_is_no_number_is_skipped_and_counted() -> None:
    theta = nn.Parameter(torch.randn(10))
    before, bad = theta.detach().clone(), [math.nan]
    optimiser = ZerothOrder([theta], lr=0.1)
    assert math.isnan(float(optimiser.step(lambda: theta.sum() * bad[0])))  # type: ignore[arg-type]
    torch.testing.assert_close(theta.detach(), before, rtol=0, atol=1e-6)
    assert optimiser.counts["skipped"] == 1 and optimiser.counts["updates"] == 0
    bad[0] = 1.0
    optimiser.step(lambda: theta.sum() * bad[0])
    assert optimiser.counts["updates"] == 1 and optimiser.counts["in_a_row"] == 0
    with pytest.raises(NotFinite, match="20 zeroth-order steps in a row"):
        for _ in range(30):
            optimiser.step(lambda: theta.sum() * math.inf)


def test_half_precision_that_swallows_eps_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="1 of 2 tensors in half precision"):
        ZerothOrder([nn.Parameter(torch.ones(8, dtype=torch.bfloat16)), nn.Parameter(torch.ones(8))], eps=1e-3)
    ZerothOrder([nn.Parameter(torch.ones(8, dtype=torch.bfloat16))], eps=1e-1)
    theta = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    ZerothOrder([theta], lr=0.5, eps=1e-1, rule=Rule(name="adam")).step(lambda: theta.float().sum())
    assert not torch.equal(theta.detach().float(), torch.ones(8))


def test_state_dict_resumes_bit_for_bit() -> None:
    def made() -> tuple[nn.Parameter, ZerothOrder]:
        theta = nn.Parameter(torch.linspace(-1, 1, 9).to(torch.bfloat16))
        return theta, ZerothOrder([theta], lr=0.05, eps=0.1, rule=Rule(name="adam"))

    def go(theta: nn.Parameter, optimiser: ZerothOrder, steps: int) -> None:
        for _ in range(steps):
            optimiser.step(lambda: theta.float().square().sum())

    whole, half, again = made(), made(), made()
    go(*whole, 7)
    go(*half, 4)
    again[0].data.copy_(half[0].data)
    again[1].load_state_dict(half[1].state_dict())
    assert again[1].state[again[0]]["m"].dtype == torch.float32
    go(*again, 3)
    assert torch.equal(whole[0], again[0]) and again[1].counts == whole[1].counts


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0.0}, UsageError, "eps=0.0"),
        ({"q": 0}, UsageError, "q=0"),
        ({"lr": -1.0}, UsageError, "lr=-1"),
        ({"resample": 0}, UsageError, "resample"),
        ({"estimator": "two-points"}, UnknownName, "did you mean two-point"),
        ({"rule": Rule(name="conservative"), "joint": True}, UsageError, "one after another"),
        ({"rule": Rule(name="conservative"), "weight_decay": 0.1}, Refused, "wd=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ZerothOrder([nn.Parameter(torch.zeros(3))], **options)


def test_models_and_losses_that_do_not_fit_are_refused() -> None:
    theta = nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match="no trainable"):
        ZerothOrder([])
    with pytest.raises(UsageError, match="no trainable number"):
        ZerothOrder([nn.Parameter(torch.zeros(0))])
    with pytest.raises(Refused, match=r"int8.*lora \+ zo-sgd"):
        ZerothOrder([nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)])
    with pytest.raises(Refused, match="contiguous"):
        ZerothOrder([nn.Parameter(torch.zeros(3, 4).t())])
    with pytest.raises(UsageError, match=r"shape \(3,\); a scalar"):
        ZerothOrder([theta]).step(lambda: theta)
    with pytest.raises(UsageError, match=r"call step\(closure\)"):
        ZerothOrder([theta]).step()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1))
    held = ZerothOrder(model.parameters(), model=model)
    x = torch.randn(8, 4)
    with pytest.raises(Refused, match="batch norm"):
        held.step(lambda: model(x).sum())
    model[1].eval()
    with pytest.raises(Refused, match="drops out"):
        held.step(lambda: model(x).sum())
    held.model.eval()  # type: ignore[union-attr]
    held.step(lambda: model(x).sum())
