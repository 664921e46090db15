"""What the last iterate of noisy cyclic gradient descent tells of one row: mu-GDP, and the (epsilon, delta) of it.

    V <- V - eta [ (1/b) sum of the batch's gradients + Z ],  Z ~ N(0, sigma^2 I),  k fixed disjoint batches, E epochs
    c   = max(|1 - eta m|, |1 - eta M|) < 1                    each batch's objective is m-strongly convex and M-smooth
    mu  = S / (b sigma) sqrt(1 + c^(2k-2) (1 - c^2) / (1 - c^k)^2 (1 - c^(k(E-1))) / (1 + c^(k(E-1))))
    delta(epsilon) = Phi(-epsilon/mu + mu/2) - e^epsilon Phi(-epsilon/mu - mu/2)

S bounds how far one row moves the sum of a batch's gradients. Only the last iterate may be seen: what any other one
tells is not in mu, and composition over all of them gives S sqrt(E) / (b sigma) instead.

Sources: mu: Bok, Su and Altschuler, "Shifted Interpolation for Differential Privacy", ICML 2024, arXiv 2403.00278;
delta: Dong, Roth and Su, "Gaussian Differential Privacy", 2022, corollary 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.special import log_ndtr

from brickyard.core.errors import UsageError


def contraction(lr: float, strong: float, smooth: float) -> float:
    """Return c, the factor by which a step brings two iterates together; UsageError where they need not come closer.

    lr: step size eta. strong, smooth: bounds m > 0 and M of the objective's curvature.
    """
    if not (0 < strong <= smooth and math.isfinite(smooth)):
        raise UsageError(
            f"curvature between {strong:g} and {smooth:g}: the guarantee of the last iterate needs a strongly convex "
            "objective; give a weight decay above 0, e.g. wd=1e-3."
        )
    if not 0 < lr < 2 / smooth:
        raise UsageError(
            f"lr={lr:g} makes the iterates of an objective with curvature up to {smooth:g} diverge, and voids the "
            f"guarantee of the last one; give an lr between 0 and {2 / smooth:.4g}."
        )
    return max(abs(1 - lr * strong), abs(1 - lr * smooth))


def last_iterate_factor(c: float, batches: int, epochs: int) -> float:
    """Return mu of the last iterate over that of one noisy gradient: 1 for one epoch, bounded in their number.

    c: contraction in (0, 1). batches: k. epochs: E, how often each batch is visited; the last visit may be the last
    step, and steps after it only help.
    """
    if not 0 < c < 1:
        raise UsageError(f"contraction {c}: a number between 0 and 1 was expected; it is that of strong convexity.")
    if batches < 1 or epochs < 1:
        raise UsageError(f"{batches} batches and {epochs} epochs: at least one of each was expected.")
    # 1 - c^i cancels where c is near 1, which is where training happens; c - 1 itself is exact there.
    rate = -math.log1p(c - 1)
    memory = math.exp(-(2 * batches - 2) * rate) * math.expm1(-2 * rate) / -(math.expm1(-batches * rate) ** 2)
    return math.sqrt(1 + memory * math.tanh(batches * (epochs - 1) * rate / 2))


def gdp_delta(epsilon: float, mu: float) -> float:
    """Return the delta of a mu-GDP release at `epsilon` >= 0; 0 for mu = 0 and 1 for an infinite mu."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    upper, lower = (float(log_ndtr(-epsilon / mu + sign * mu / 2)) for sign in (1, -1))
    return math.exp(upper) * -math.expm1(min(0.0, epsilon + lower - upper))


def gdp_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 at which a mu-GDP release has at most `delta`."""
    _probability(delta)
    if math.isinf(mu):
        return math.inf
    if gdp_delta(0.0, mu) <= delta:
        return 0.0
    return _crossing(lambda epsilon: gdp_delta(epsilon, mu) <= delta)[1]


def gdp_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu whose release is (epsilon, delta)-private; infinite for an infinite epsilon."""
    _probability(delta)
    if not epsilon > 0:
        raise UsageError(f"epsilon={epsilon}: a number above 0 was expected.")
    if math.isinf(epsilon):
        return math.inf
    return _crossing(lambda mu: gdp_delta(epsilon, mu) > delta)[0]


def _probability(delta: float) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"delta={delta}: a number between 0 and 1 was expected, well below 1 / rows.")


def _crossing(beyond: Callable[[float], bool]) -> tuple[float, float]:
    """Return the two neighbouring floats above 0 between which `beyond` turns from false to true."""
    low, high = 0.0, 1.0
    while not beyond(high):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return low, high


@dataclass(frozen=True, kw_only=True)
class HiddenStateGDP:
    """The accountant of one run of which only the last iterate is released.

    Attributes:
        contraction: c, see `contraction`.
        batches, epochs: k fixed disjoint batches, each visited at most `epochs` times in the same order.
        batch: b, by which a batch's sum of gradients is divided.
        noise: sigma, the standard deviation of the noise on that quotient; 0: none, and no privacy.
        sensitivity: S, how far one row moves the sum of a batch's gradients.
    """

    contraction: float
    batches: int
    epochs: int
    batch: int
    noise: float
    sensitivity: float

    @classmethod
    def for_budget(
        cls,
        epsilon: float,
        delta: float,
        *,
        contraction: float,
        batches: int,
        epochs: int,
        batch: int,
        sensitivity: float,
    ) -> HiddenStateGDP:
        """Return the accountant with the least noise that keeps the last iterate (epsilon, delta)-private."""
        factor = last_iterate_factor(contraction, batches, epochs)
        noise = sensitivity * factor / (batch * gdp_mu(epsilon, delta))
        return cls(
            contraction=contraction, batches=batches, epochs=epochs, batch=batch, noise=noise, sensitivity=sensitivity
        )

    @property
    def mu(self) -> float:
        """Of the last iterate."""
        return self._one_visit * last_iterate_factor(self.contraction, self.batches, self.epochs)

    @property
    def composed_mu(self) -> float:
        """Of all iterates together, which needs no convexity."""
        return self._one_visit * math.sqrt(self.epochs)

    @property
    def _one_visit(self) -> float:
        return self.sensitivity / (self.batch * self.noise) if self.noise else math.inf

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon of the last iterate at `delta`."""
        return gdp_epsilon(self.mu, delta)
