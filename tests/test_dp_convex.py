"""Private convex ReLU: the guarantee of the last iterate, the convex problem behind it, the step, and the arm."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from brickyard.checks import dp_convex as checks
from brickyard.core import brick as bricks
from brickyard.core import registry, trial
from brickyard.core.arm import parse
from brickyard.core.build import build, resolve, step_of
from brickyard.core.errors import BadData, Changed, Refused, UsageError
from brickyard.core.loop import train
from brickyard.private import dp_convex
from brickyard.private._hidden_state import (
    HiddenStateGDP,
    contraction,
    gdp_delta,
    gdp_epsilon,
    gdp_mu,
    last_iterate_factor,
)
from brickyard.private.dp_convex import Config, PrivateGatedClassifier, descend_, gated, logits, summed_gradient

contractions = st.floats(0.01, 0.99999)
counts = st.integers(1, 200)


def quadratic_factor(c: float, k: int, epochs: int) -> float:
    """What the last iterate tells of a row in the last batch, all losses quadratic with step map V -> c V: exact."""
    t = np.arange(k * epochs)
    shift = (c ** t[t % k == 0]).sum()
    return float(shift / np.sqrt((c ** (2 * t)).sum()))


@settings(max_examples=150, deadline=None)
@given(contractions, counts, counts)
def test_the_bound_is_never_below_what_quadratic_losses_tell(c: float, k: int, epochs: int):
    assert last_iterate_factor(c, k, epochs) >= quadratic_factor(c, k, epochs) * (1 - 1e-12)


def test_the_bound_is_met_by_one_step_and_by_one_batch_in_the_limit():
    assert last_iterate_factor(0.7, 1, 1) == pytest.approx(quadratic_factor(0.7, 1, 1), rel=1e-15)
    # One batch, many epochs, c near 1: both grow as sqrt(E) as long as nothing is forgotten.
    assert last_iterate_factor(1 - 1e-9, 1, 50) == pytest.approx(quadratic_factor(1 - 1e-9, 1, 50), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(contractions, counts, counts)
def test_more_epochs_tell_more_but_never_more_than_composition(c: float, k: int, epochs: int):
    now, later = last_iterate_factor(c, k, epochs), last_iterate_factor(c, k, epochs + 1)
    assert last_iterate_factor(c, k, 1) == 1.0
    assert 1.0 <= now <= later <= math.sqrt(epochs + 1) * (1 + 1e-12)


def test_the_factor_keeps_its_digits_where_nothing_is_forgotten():
    """At c -> 1 the bracket tends to 1 + (E - 1) / k; written with powers it is 0 / 0 there."""
    assert last_iterate_factor(1 - 2**-40, 100, 301) == pytest.approx(2.0, rel=1e-7)
    assert last_iterate_factor(0.999, 100, 10**6) == pytest.approx(math.sqrt(1.181), rel=1e-3)  # the card's example


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 8), st.floats(-8, -1).map(lambda e: 10**e))
def test_budget_and_mu_are_each_others_inverse(epsilon: float, delta: float):
    mu = gdp_mu(epsilon, delta)
    assert gdp_delta(epsilon, mu) <= delta < gdp_delta(epsilon, mu * (1 + 1e-6))
    assert gdp_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-9)


def test_delta_is_that_of_opacus():
    gdp = pytest.importorskip("opacus.accountants.analysis.gdp")
    for mu in (0.1, 0.5, 1.0, 3.0):
        for epsilon in (0.1, 1.0, 4.0):
            theirs = gdp.delta_eps_mu(eps=epsilon, mu=mu)
            assert gdp_delta(epsilon, mu) == pytest.approx(theirs, rel=1e-6, abs=1e-12)
        assert gdp_epsilon(mu, 1e-5) == pytest.approx(gdp.eps_from_mu(mu=mu, delta=1e-5), rel=1e-6)


def test_no_mu_tells_nothing_and_an_infinite_one_everything():
    assert gdp_delta(1.0, 0.0) == 0.0 and gdp_delta(1.0, math.inf) == 1.0
    assert gdp_epsilon(1e-9, 1e-5) == 0.0 and gdp_epsilon(math.inf, 1e-5) == math.inf
    assert gdp_mu(math.inf, 1e-5) == math.inf


def test_the_accountant_spends_what_it_was_given():
    about: Any = {"contraction": 0.999, "batches": 20, "epochs": 60, "batch": 512, "sensitivity": math.sqrt(2)}
    made = HiddenStateGDP.for_budget(4.0, 1e-5, **about)
    assert made.get_epsilon(1e-5) == pytest.approx(4.0, rel=1e-9)
    assert made.mu == pytest.approx(made.sensitivity / (512 * made.noise) * last_iterate_factor(0.999, 20, 60))
    assert made.composed_mu == pytest.approx(made.sensitivity / (512 * made.noise) * math.sqrt(60))
    assert HiddenStateGDP.for_budget(4.0, 1e-5, **{**about, "batch": 256}).noise == pytest.approx(2 * made.noise)
    assert replace(made, noise=0.0).get_epsilon(1e-5) == math.inf


@pytest.mark.parametrize(
    ("lr", "wd", "said"), [(0.0, 0.1, "lr=0"), (4.0, 0.1, "diverge"), (-1, 0.1, "lr=-1"), (1.0, 0.0, "weight decay")]
)
def test_steps_without_a_guarantee_are_refused(lr: float, wd: float, said: str):
    with pytest.raises(UsageError, match=said):
        contraction(lr, wd, wd + 0.5)


def test_out_of_range_arguments_of_the_accountant_are_refused():
    for call in (
        lambda: last_iterate_factor(1.0, 2, 2),
        lambda: last_iterate_factor(0.5, 0, 2),
        lambda: gdp_mu(0.0, 1e-5),
        lambda: gdp_mu(math.nan, 1e-5),
        lambda: gdp_epsilon(1.0, 1.0),
    ):
        with pytest.raises(UsageError, match="expected"):
            call()


# The convex problem.


def problem(rows: int = 12, d: int = 5, gates: int = 6, k: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    x, u, v = draw(rows, d) * 3, draw(gates, d), draw(d, max(1, gates), k)
    return x, u, v, torch.randint(k, (rows,), generator=g)


def phi(x_BD: Tensor, g_BP: Tensor) -> Tensor:
    """The feature map as written in the paper, which the module never makes: [B, D, P]."""
    return x_BD.unsqueeze(2) * g_BP.unsqueeze(1)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 8), st.integers(0, 7), st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([0.05, 0.6, 9.0])
)
def test_the_gradient_is_autograds_of_each_row_clipped(d: int, gates: int, k: int, seed: int, clip: float):
    x, u, v, y = problem(7, d, gates, k, seed)
    x, g = gated(x, u, 1.0)
    rows, losses = [], []
    for b in range(len(x)):
        leaf = v.clone().requires_grad_()
        loss = nn.functional.cross_entropy(
            torch.einsum("bdp,dpk->bk", phi(x[b : b + 1], g[b : b + 1]), leaf), y[b : b + 1]
        )
        row = torch.autograd.grad(loss, leaf)[0]
        r = torch.einsum("bdp,dpk->bk", phi(x[b : b + 1], g[b : b + 1]), v).softmax(1)
        r[0, y[b]] -= 1
        torch.testing.assert_close(row.norm(), phi(x, g)[b].norm() * r.norm(), rtol=1e-6, atol=1e-12)
        rows.append(row * min(1.0, clip / max(float(row.norm()), 1e-300)))
        losses.append(loss.detach())
    found, found_losses = summed_gradient(x, g, y, v, clip)
    torch.testing.assert_close(found, torch.stack(rows).sum(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found_losses, torch.stack(losses), rtol=1e-6, atol=1e-9)


def test_no_gradient_exceeds_sqrt_2_radius_and_short_rows_are_left_alone():
    x, u, v, y = problem(200)
    scaled, g = gated(x, u, 0.7)
    lengths = phi(scaled, g).flatten(1).norm(dim=1)
    assert lengths.max() <= 0.7 * (1 + 1e-12) and (lengths > 0.699).sum() > 100
    far = 50 * v  # wrong with certainty: residuals of length sqrt(2)
    each = [summed_gradient(scaled[b : b + 1], g[b : b + 1], y[b : b + 1], far)[0].norm() for b in range(200)]
    assert 0.95 * math.sqrt(2) * 0.7 < max(each) <= math.sqrt(2) * 0.7 * (1 + 1e-12)
    short, _ = gated(1e-3 * x, u, 0.7)
    assert torch.equal(short, 1e-3 * x)
    zero, g = gated(torch.zeros(1, 5, dtype=torch.float64), u, 0.7)
    assert torch.equal(zero, torch.zeros(1, 5, dtype=torch.float64)) and g.sum() == 6


def test_curvature_lies_between_lambda_and_beta():
    wd, radius = 0.03, 1.5
    x, u, v, y = problem(9, 3, 2, 3)
    x, g = gated(x, u, radius)

    def objective(flat: Tensor) -> Tensor:
        z = logits(x, g, flat.view(v.shape))
        return nn.functional.cross_entropy(z, y) + wd / 2 * flat.square().sum()

    for scale in (0.0, 0.3, 3.0):
        curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(objective, scale * v.flatten()))  # type: ignore[arg-type]
        assert curvature.min() >= wd - 1e-9 and curvature.max() <= wd + radius**2 / 2 + 1e-9


def test_gates_at_a_networks_own_neurons_give_back_the_network():
    """With u_i = w_i the cone constraints hold for V_i = w_i a_i^T, and f is the two-layer ReLU network."""
    x, w, _, _ = problem(40, 5, 6, 3)
    a = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scaled, g = gated(x, w, 1e9)
    torch.testing.assert_close(logits(scaled, g, torch.einsum("pd,pk->dpk", w, a)), (x @ w.T).relu() @ a)


def expansion(k: int, clip: float, seed: int, close: float) -> float:
    """How far apart one step brings two weights that differ by `close`, over c of the guarantee; without noise."""
    lr, wd = 1.5, 1e-4
    x, u, v, y = problem(3, 3, 2, k, seed)
    x, g = gated(x, u, 1.0)
    other = v + close * torch.randn(v.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=v.dtype)
    ends = [w - lr * (summed_gradient(x, g, y, w, clip)[0] / len(x) + wd * w) for w in (v, other)]
    return float((ends[0] - ends[1]).norm() / (v - other).norm()) / contraction(lr, wd, wd + 0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6), st.floats(1e-3, 10))
def test_a_step_brings_weights_together_as_the_guarantee_says(k: int, seed: int, close: float):
    """With C = sqrt(2) R for any number of classes, and for two classes however tight the clipping is."""
    assert expansion(k, math.sqrt(2), seed, close) <= 1 + 1e-9
    assert expansion(2, 0.2, seed, close) <= 1 + 1e-9


def test_clipped_gradients_of_three_classes_belong_to_no_convex_loss():
    """One row, phi = 1: there are two weights that a step drives apart. So epsilon is not certified there."""
    x, g, y = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), torch.tensor([2])
    v = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log().view(1, 1, 3)
    field = lambda w: summed_gradient(x, g, y, w, 0.2)[0]  # noqa: E731
    r = torch.tensor([0.7, 0.2, -0.9], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda w: field(w).flatten(), v).reshape(3, 3)  # type: ignore[arg-type]
    assert not torch.allclose(jacobian, jacobian.T, atol=1e-3)  # type: ignore[union-attr]
    values, vectors = torch.linalg.eigh((jacobian + jacobian.T) / 2)  # type: ignore[operator]
    assert values[0] < -1e-3 and abs(float(vectors[:, 0] @ r)) > 0.1
    away = v + 1e-3 * vectors[:, 0].view(1, 1, 3)
    step = 1e-2
    assert (away - v - step * (field(away) - field(v))).norm() > (away - v).norm()
    assert not Config(clip=0.2).certified(3)
    assert Config(clip=0.2).certified(2) and Config().certified(3) and Config(clip=2.0).certified(3)


# The noise.


def test_noise_has_the_standard_deviation_asked_for_and_no_seed_repeats_it():
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        v = torch.full((100, 20, 10), 3.0)
        descend_(v, torch.full_like(v, 64.0), batch=32, lr=0.5, wd=0.1, noise=0.2)
        made.append(v)
    # 3 (1 - 0.05) - 0.5 * 64 / 32, and 0.5 * 0.2 around it.
    assert float(made[0].mean()) == pytest.approx(1.85, abs=5e-3) and float(made[0].std()) == pytest.approx(
        0.1, rel=0.03
    )
    difference = made[0] - made[1]
    assert float(difference.std()) == pytest.approx(0.1 * math.sqrt(2), rel=0.03)


def blobs(rows: int = 300, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.Generator(np.random.PCG64(seed))
    y = g.integers(classes, size=rows)
    return (4 * np.eye(classes, 6)[y] + g.normal(size=(rows, 6))).astype(np.float32), y


def test_the_estimator_learns_under_a_budget_and_says_what_it_spent():
    x, y = blobs()
    made = PrivateGatedClassifier(3, epsilon=8.0, delta=1e-4, gates=8, epochs=20, batch=100).fit(x, y)
    assert made.accountant_.get_epsilon(1e-4) == pytest.approx(8.0) and made.accountant_.batches == 3
    assert made.score(*blobs(seed=1)) > 0.8
    np.testing.assert_allclose(made.predict_proba(x).sum(1), 1, rtol=1e-5)
    tight = PrivateGatedClassifier(3, epsilon=1e-3, delta=1e-4, gates=8, epochs=20, batch=100).fit(x, y)
    assert tight.score(*blobs(seed=1)) < 0.7  # all noise


def test_the_seed_decides_gates_and_batches_and_nothing_else():
    x, y = blobs()
    options: Any = {"gates": 8, "epochs": 2, "batch": 100, "delta": 1e-4}
    a, b = (PrivateGatedClassifier(3, seed=5, **options).fit(x, y) for _ in range(2))
    assert torch.equal(a.module_.get_buffer("directions"), b.module_.get_buffer("directions"))
    assert not torch.equal(a.module_.weight, b.module_.weight)
    free = [PrivateGatedClassifier(3, epsilon=math.inf, seed=s, **options).fit(x, y).module_ for s in (5, 5, 6)]
    assert torch.equal(free[0].weight, free[1].weight)
    assert not torch.equal(free[0].get_buffer("directions"), free[2].get_buffer("directions"))


def test_gates_see_what_no_linear_model_can():
    g = np.random.Generator(np.random.PCG64(0))
    x = g.normal(size=(800, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    scores = [
        PrivateGatedClassifier(2, epsilon=math.inf, delta=1e-4, gates=p, lr=3.5, epochs=60, batch=80)
        .fit(x, y)
        .score(x, y)
        for p in (0, 32)
    ]
    assert scores[0] < 0.65 and scores[1] > 0.9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": 0.01}, "publish one of them"),
        ({"gates": -1}, "gates=-1"),
        ({"gates": 10**8}, "GiB"),
        ({"radius": 0.0}, "radius=0"),
        ({"clip": -1.0}, "clip=-1"),
        ({"lr": 4.0}, "diverge"),
        ({"batch": 0}, "batch=0"),
        ({"wd": 0.0}, "weight decay above 0"),
    ],
)
def test_settings_that_guarantee_nothing_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        PrivateGatedClassifier(3, **{"delta": 1e-4, "epochs": 1, **options}).fit(*blobs())


def test_rows_that_do_not_fit_are_refused():
    x, y = blobs()
    made = PrivateGatedClassifier(3, epochs=1, delta=1e-4)
    bad = x.copy()
    bad[17, 2] = np.nan
    for features, labels, said in (
        (bad, y, "row 17 holds NaN"),
        (x, y + 1, "classes 0..2"),
        (x, y[:-1], "one class each"),
        (x, y.astype(float), "one class each"),
        (x[:, 0], y, r"\[rows, features\]"),
        (x[:0], y[:0], "at least one row"),
    ):
        with pytest.raises(BadData, match=said):
            made.fit(features, labels)


# The arm.

ARM = "dp-convex:gates=8,epsilon=50"


def asked(arm: str, base: Path, **training: Any) -> trial.Setting:
    training = {"epochs": 6, "batch": 16, **training}
    return trial.Setting(arm=arm, base=str(base), data=text_data(), training=training, cache=False, device="cpu")


def ready_to_step(arm: str, base: Path, **training: Any) -> tuple[trial.Prepared, Any, Any]:
    ready = trial.prepare(asked(arm, base, **training), ("train", "validation"))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    sets, _ = trial.examples(ready, attached)
    return ready, attached, sets


def test_an_arm_is_evaluated_once_and_reports_its_budget(text_base: Path, tmp_path: Path):
    result = trial.run({"setting": asdict(asked(ARM, text_base)), "folder": str(tmp_path)})
    assert len(result["history"]) == 1 and result["best_step"] == result["steps"] == 36
    spent = result["step"]["privacy"]
    assert spent["epsilon"] == pytest.approx(50.0) and spent["kind"] == "certified" and spent["steps"] == 36
    known = spent["accountant"]
    assert (known["batches"], known["epochs"], known["batch"], known["sensitivity"]) == (6, 6, 16, math.sqrt(2))
    assert (
        spent["composed_epsilon"] > spent["epsilon"] and spent["mechanisms"][0]["noise_multiplier"] == 1 / spent["mu"]
    )
    assert spent["adjacency"] == "zero-out" and "a run that did not finish" in spent["covers"]
    made = bricks.load(tmp_path / "brick")
    assert {"head.weight", "head.directions"} == made.tensors().keys()
    assert made.manifest["step"]["privacy"]["epsilon"] == spent["epsilon"]


def test_runs_on_the_same_rows_add_up(text_base: Path):
    privacy = pytest.importorskip("brickyard.core.privacy")
    ready, attached, _ = ready_to_step("dp-convex:gates=4,epsilon=1", text_base)
    report = step_of(ready.plan, 96, ready.task)(attached, ready.training).report()
    assert privacy.compose([report])["epsilon"] == pytest.approx(1.0, rel=0.01)
    both = privacy.compose([report, report])["epsilon"]
    assert both == pytest.approx(gdp_epsilon(math.sqrt(2) * report["privacy"]["mu"], 1e-5), rel=0.01)


def test_what_a_tighter_clip_of_three_classes_spends_is_an_estimate(text_base: Path):
    ready, attached, sets = ready_to_step(ARM + ",preset=paper,adjacency=replace-one", text_base)
    step = dp_convex.NoisyCGD(ready.plan.configs["dp-convex"], attached, ready.training, rows=96, classes=3)
    spent = step.report()["privacy"]
    assert spent["kind"] == "estimate" and spent["accountant"]["sensitivity"] == 2.0 and spent["clip"] == 1.0
    two = dp_convex.NoisyCGD(ready.plan.configs["dp-convex"], attached, ready.training, rows=96, classes=2)
    assert two.report()["privacy"]["kind"] == "certified"
    assert len(sets["train"]) == 96


def test_batches_are_the_same_in_every_epoch_and_hold_each_row_once(text_base: Path):
    ready, attached, _ = ready_to_step(ARM, text_base, batch=40)
    step = step_of(ready.plan, 96, ready.task)(attached, ready.training)
    order = step.sampler(np.arange(96), ready.training)
    first, later = order.epoch(0), order.epoch(5)
    assert [len(rows) for rows in first] == [40, 40, 16] and sorted(np.concatenate(first)) == list(range(96))
    assert all(np.array_equal(a, b) for a, b in zip(first, later, strict=True))
    # How long the rows are is data, so the batches must not go by it.
    again = step.sampler(np.ones(96), ready.training).epoch(0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(Refused, match="visits all 96 rows"):
        step.sampler(np.ones(50), ready.training)


def test_the_step_in_the_loop_is_the_equation(text_base: Path, monkeypatch: pytest.MonkeyPatch):
    """Without noise, the loop with micro-batches does what the estimator does on the same features."""
    monkeypatch.setattr(dp_convex, "generator", Silent)
    ready, attached, sets = ready_to_step(ARM, text_base, batch=40, accumulation=3)
    train(attached, sets["train"], None, ready.task, ready.training, make_step=step_of(ready.plan, 96, ready.task))
    states, _ = sets["train"].collate(np.arange(96))["states"]
    x, g = attached.model.head.features(states[:, 0])
    v, y = torch.zeros_like(attached.model.head.weight), sets["train"].labels
    for _ in range(6):
        for rows in dp_convex.Cycle(96, 40, ready.training.seed).epoch(0):
            total, _ = summed_gradient(x[rows], g[rows], y[rows], v)
            v = v - 2.0 * (total / 40 + 1e-4 * v)
    torch.testing.assert_close(attached.model.head.weight.detach(), v, rtol=1e-4, atol=1e-5)


class Silent:
    """A generator of no noise."""

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"schedule": "linear"}, "one step size throughout"),
        ({"warmup": 0.1}, "one step size throughout"),
        ({"evaluate_every": 5}, "other iterates than the last"),
        ({"evaluate_every": 0}, "other iterates than the last"),
        ({"wd": 0.0}, "weight decay above 0"),
    ],
)
def test_training_that_voids_the_guarantee_is_refused(training: dict[str, Any], said: str, text_base: Path):
    ready, attached, _ = ready_to_step(ARM, text_base, **training)
    with pytest.raises(UsageError, match=said):
        step_of(ready.plan, 96, ready.task)(attached, ready.training)


@pytest.mark.parametrize("beside", ["lora", "full", "pudf", "zo-sgd"])
def test_nothing_stands_beside_a_head_with_a_step_of_its_own(beside: str):
    if beside not in {entry.record.name for entry in registry.records()}:
        pytest.skip(f"{beside} is not part of this checkout")
    with pytest.raises(Refused, match=f"steps of its own; leave out {beside}"):
        resolve(parse(f"dp-convex + {beside}"))
    assert resolve(parse("dp-convex")).step == "dp-convex" and resolve(parse("linear-probe")).step is None


def test_it_trains_on_frozen_features_only(text_base: Path):
    ready, attached, _ = ready_to_step(ARM, text_base)
    attached.frozen_states = False
    with pytest.raises(Refused, match="frozen features alone"):
        step_of(ready.plan, 96, ready.task)(attached, ready.training)


class Stop:
    """Ends a run after some steps, as a crash would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def after_step(self, state: Any) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


def test_a_resumed_run_goes_on_with_its_account_and_only_with_that(text_base: Path, tmp_path: Path):
    ready, attached, sets = ready_to_step(ARM, text_base, checkpoint_every=4)
    run: Any = {"examples": sets["train"], "validation": None, "task": ready.task, "folder": tmp_path}
    made = step_of(ready.plan, 96, ready.task)
    with pytest.raises(KeyboardInterrupt):
        train(attached, **run, training=ready.training, make_step=made, callbacks=[Stop(9)])
    other = replace(ready.training, lr=1.0)
    with pytest.raises(Changed, match="one guarantee cannot"):
        train(attached, **run, training=other, make_step=made, allow_change=["training"])
    done = train(attached, **run, training=ready.training, make_step=made)
    assert done.steps == done.report["privacy"]["steps"] == 36
    assert done.report["privacy"]["epsilon"] == pytest.approx(50.0)


# The check.


def test_digits_stand_in_where_there_is_no_mnist_and_say_so(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("opacus")
    monkeypatch.setattr(checks, "_multiplier", lambda *_: 1.0)  # finding it takes a minute
    claim = replace(dp_convex.RECORD.claims[0], data="nowhere", seeds=2)
    found = checks.beside_dp_sgd(claim, rows=120, test_rows=60, epochs=1, batch=60, width=4)
    assert found.keys() == {claim.part for claim in dp_convex.RECORD.claims if claim.part}
    for part in found.values():
        assert part["holds"] == "set-up invalid" and part["detail"].startswith("nowhere is not there")
        assert {"convex", "relu", "logistic-plain", "convex-1", "shuffled"} <= part["arms"].keys()


def test_the_last_iterate_tells_less_than_all_of_them():
    found = checks.seen_from_outside(dp_convex.RECORD.claims[-1], runs=4000)
    assert found["control"]["destroyed"] and found["holds"] is not False
    assert found["figures"]["mu"] == pytest.approx(0.793, abs=2e-3)
