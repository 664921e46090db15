"""What private steps cost: the certified epsilon against independent accounts, and what it must obey."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from brickyard.core import privacy
from brickyard.core.errors import UsageError
from brickyard.core.privacy import Mechanism, compose, delta_of, epsilon_of

# noise, rate, steps -> epsilon at delta 1e-5 by dp-accounting's privacy loss distributions.
KNOWN = {
    (0.8, 0.01, 1000): 3.1410,
    (1.0, 0.0297, 660): 4.8806,
    (0.7, 0.0297, 660): 11.1045,
    (2.0, 0.05, 200): 1.5606,
    (1.0, 0.00509, 3920): 1.7357,
}


@pytest.mark.parametrize("setting", KNOWN)
def test_epsilon_is_what_dp_accounting_finds_and_never_less(setting: tuple[float, float, int]) -> None:
    found = epsilon_of([Mechanism(*setting)], 1e-5)
    assert KNOWN[setting] - 1e-4 <= found <= KNOWN[setting] * 1.001


def test_epsilon_is_no_less_than_what_dp_accounting_finds_here() -> None:
    """The packages themselves, where they are installed (make setup)."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    theirs = pld.from_gaussian_mechanism(1.3, sampling_prob=0.07, value_discretization_interval=1e-3)
    expected = theirs.self_compose(90).get_epsilon_for_delta(1e-6)
    assert expected * 0.999 <= epsilon_of([Mechanism(1.3, 0.07, 90)], 1e-6) <= expected * 1.002


def test_epsilon_is_tighter_than_opacus_upper_bound_and_near_it() -> None:
    theirs = pytest.importorskip("opacus.accountants").PRVAccountant()
    theirs.history = [(1.1, 0.05, 100), (1.5, 0.02, 50)]
    upper = theirs.get_epsilon(1e-5, eps_error=0.02, delta_error=1e-8)
    assert upper - 0.05 <= epsilon_of([Mechanism(1.1, 0.05, 100), Mechanism(1.5, 0.02, 50)], 1e-5) <= upper


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 8.0), st.integers(1, 30), st.floats(0.1, 4.0))
def test_without_sampling_delta_is_the_gaussian_mechanisms(noise: float, steps: int, epsilon: float) -> None:
    """Balle and Wang 2018, theorem 8, with mu = sqrt(T) / sigma."""
    mu = math.sqrt(steps) / noise
    exact = ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu)
    found = delta_of([Mechanism(noise, 1.0, steps)], epsilon, smallest=1e-9)
    assert exact <= found + 1e-13 and found <= exact * 1.01 + 1e-8


@settings(max_examples=10, deadline=None)
@given(st.floats(0.6, 4.0), st.floats(0.002, 0.5), st.integers(1, 120))
def test_epsilon_moves_the_right_way_with_everything(noise: float, rate: float, steps: int) -> None:
    own = epsilon_of([Mechanism(noise, rate, steps)], 1e-5)
    assert epsilon_of([Mechanism(noise * 1.1, rate, steps)], 1e-5) <= own * 1.0005
    assert epsilon_of([Mechanism(noise, rate * 1.1, steps)], 1e-5) >= own * 0.9995
    assert epsilon_of([Mechanism(noise, rate, steps * 2)], 1e-5) >= own * 0.9995
    assert epsilon_of([Mechanism(noise, rate, steps)], 1e-4) <= own * 1.0005
    assert delta_of([Mechanism(noise, rate, steps)], own + 0.1, smallest=1e-9) <= 1e-5 * 1.001


def test_runs_compose_to_one_long_run_and_strangers_add_up() -> None:
    def report(steps: int, noise: float = 1.0) -> dict[str, Any]:
        taken = [Mechanism(noise, 0.02, steps)]
        epsilon = epsilon_of(taken, 1e-5)
        return {
            "privacy": {
                "epsilon": epsilon,
                "delta": 1e-5,
                "kind": "certified",
                "adjacency": "add-or-remove",
                "mechanisms": privacy.listed(taken),
            }
        }

    both = compose([report(100), report(200)])
    assert both["epsilon"] == pytest.approx(epsilon_of([Mechanism(1.0, 0.02, 300)], 1e-5), rel=1e-9)
    assert both["kind"] == "certified" and both["delta"] == 1e-5 and both["runs"] == 2
    mixed = compose([report(100), report(100, noise=1.5)])
    alone = [report(100)["privacy"]["epsilon"], report(100, noise=1.5)["privacy"]["epsilon"]]
    assert max(alone) < mixed["epsilon"] < sum(alone)
    stranger = {"epsilon": 0.5, "delta": 1e-6, "kind": "certified", "adjacency": "add-or-remove"}
    added = compose([report(100), stranger, stranger])
    assert added["epsilon"] == pytest.approx(alone[0] + 1.0) and added["delta"] == pytest.approx(1.2e-5)
    with pytest.raises(UsageError, match="estimate"):
        compose([report(10), {**stranger, "kind": "estimate"}])
    assert compose([])["epsilon"] == 0


def test_figures_that_hide_different_things_have_no_common_total() -> None:
    def stated(adjacency: str | None, epsilon: float) -> dict[str, Any]:
        return {"epsilon": epsilon, "delta": 1e-6, "kind": "certified", "adjacency": adjacency}

    mixed = [stated("replace-one", 1.0), stated("add-or-remove", 2.0), stated("replace-one", 4.0)]
    with pytest.raises(UsageError, match="add-or-remove and replace-one neighbours"):
        compose(mixed)
    found = [(total["adjacency"], total["runs"], total["epsilon"]) for total in privacy.by_adjacency(mixed)]
    assert found == [("add-or-remove", 1, 2.0), ("replace-one", 2, 5.0)]
    with pytest.raises(UsageError, match="does not state its adjacency"):
        compose([stated(None, 1.0)])


def test_the_noise_for_a_budget_meets_it_and_less_does_not() -> None:
    noise = privacy.noise_for(2.0, 1e-5, 0.1, 40)
    assert epsilon_of([Mechanism(noise, 0.1, 40)], 1e-5) <= 2.0 < epsilon_of([Mechanism(noise * 0.997, 0.1, 40)], 1e-5)
    with pytest.raises(UsageError, match="cannot be reached"):
        privacy.least_noise(lambda sigma: 1.0, 0.5)


def test_an_account_of_nothing_and_of_no_noise() -> None:
    assert epsilon_of([], 1e-5) == epsilon_of([Mechanism(1.0, 0.1, 0)], 1e-5) == 0
    assert epsilon_of([Mechanism(0.0, 0.1, 1)], 1e-5) == math.inf
    for wrong in (lambda: Mechanism(-1.0, 0.1, 1), lambda: Mechanism(1.0, 0.0, 1), lambda: Mechanism(1.0, 1.1, 1)):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UsageError, match="delta"):
        epsilon_of([Mechanism(1.0, 0.1, 1)], 1.0)
