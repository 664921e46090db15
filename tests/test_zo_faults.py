"""Zeroth-order steps whose loss raises: the parameters are back where they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brickyard.optim._zo_optimizer import Rule, ZerothOrder


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
