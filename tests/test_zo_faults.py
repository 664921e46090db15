"""Zeroth-order steps whose loss raises: the parameters are back where they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from brickyard.core.errors import NotFinite
from brickyard.optim._zo_guards import IN_A_ROW
from brickyard.optim._zo_optimizer import RULES, Rule, ZerothOrder
from brickyard.optim._zo_step import Direction


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("kind", [Interrupt, ValueError])
@pytest.mark.parametrize(("estimator", "calls"), [("two-point", 4), ("one-point", 3), ("jvp", 2)])
def test_a_loss_that_raises_leaves_the_parameters_at_home(
    estimator: str, calls: int, kind: type[BaseException]
) -> None:
    for fatal in range(calls):
        theta = nn.Parameter(torch.linspace(-1, 1, 50))
        before, seen = theta.detach().clone(), []
        optimiser = ZerothOrder([theta], lr=0.1, q=2, eps=1e-2, estimator=estimator)

        def loss(theta: Tensor = theta, seen: list = seen, fatal: int = fatal) -> Tensor:
            seen.append(theta.detach().clone())
            if len(seen) > fatal:
                raise kind
            return theta.square().sum()

        with pytest.raises(kind):
            optimiser.step(loss)
        assert len(seen) == fatal + 1
        torch.testing.assert_close(theta.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fatal", [2, 3, 4])
def test_conservative_goes_home_from_every_candidate(fatal: int) -> None:
    theta = nn.Parameter(torch.linspace(-1, 1, 50))
    before, seen = theta.detach().clone(), []

    def loss() -> Tensor:
        seen.append(theta.detach().clone())
        if len(seen) > fatal:
            raise Interrupt
        return theta.square().sum()

    with pytest.raises(Interrupt):
        ZerothOrder([theta], lr=0.1, rule=Rule(name="conservative")).step(loss)
    assert torch.allclose(seen[-1], before, atol=1e-6) == (fatal == 2)
    torch.testing.assert_close(theta.detach(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_a_bad_batch_of_many_parts_is_one_skipped_step(joint: bool) -> None:
    theta = [nn.Parameter(torch.ones(2)) for _ in range(30)]
    optimiser = ZerothOrder(theta, lr=0.0, parts=[[p] for p in theta], joint=joint)
    optimiser.step(lambda: torch.tensor(math.nan))
    assert (optimiser.counts["skipped"], optimiser.counts["in_a_row"]) == (30, 1)
    # A step of which one part was updated is no skipped one.
    values = iter([1.0, 2.0] + [math.nan] * 58)
    optimiser.step(lambda: torch.tensor(next(values)))
    assert (optimiser.counts["skipped"], optimiser.counts["in_a_row"]) == (59, 0)
    with pytest.raises(NotFinite, match=f"{IN_A_ROW} zeroth-order steps in a row, up to step {2 + IN_A_ROW}"):
        for _ in range(IN_A_ROW):
            optimiser.step(lambda: torch.tensor(math.nan))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_weights_of_float64_are_not_rounded_to_float32_on_their_way(law: str, rule: str) -> None:
    """With lr=0 a step goes out and home. Through float32 it lost up to 3e-8; eps z itself is rounded to 1e-10."""
    theta = nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float64) + 1e-12)
    before = theta.detach().clone()
    optimiser = ZerothOrder([theta], lr=0.0, direction=Direction(law), rule=Rule(name=rule))
    optimiser.step(lambda: theta.square().sum())
    torch.testing.assert_close(theta.detach(), before, rtol=0, atol=1e-9)
