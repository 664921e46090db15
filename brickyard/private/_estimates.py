"""Two other figures for the epsilon of Poisson-sampled Gaussian steps: Edgeworth's estimate, and Rényi's looser bound.

With l(x) as in `core/privacy.py`, P its law under x ~ N(0, 1) and Q under the mixture, and T k_j the cumulants of the
sum of T steps, the Edgeworth series of order 1 (first term) or 2 (all) for the distribution function of the sum is

    F(e)       = Phi(u) - phi(u) [ l3/(6 sqrt T) (u^2 - 1) + l4/(24 T) (u^3 - 3u) + l3^2/(72 T) (u^5 - 10 u^3 + 15 u) ]
    u          = (e - T k1) / sqrt(T k2),   l3 = k3 / k2^1.5,   l4 = k4 / k2^2
    delta(eps) = 1 - F_Q(eps) - e^eps (1 - F_P(eps))          a row removed; F_P(-eps) - e^eps F_Q(-eps) for one added

It is no bound: in the tail, where delta lies, F may leave [0, 1] and epsilon may come out below the true one. Where F
leaves it by more than 1e-3, where delta(0) is not positive or the sum is too skew for an expansion about the normal
law (|l3| / sqrt T > 1), there is no estimate. Rényi's

    eps(delta) = min over a > 1 of  D_a + log((a - 1)/a) - (log delta + log a)/(a - 1)
    D_a        = T log E_P[exp(a l)] / (a - 1)

is a bound, the one that most published runs state ("moments accountant").

Sources: Wang et al. 2022, arXiv 2206.04236 (Edgeworth); Mironov et al. 2019, arXiv 1908.10530 (Rényi divergence of the
sampled Gaussian); Canonne, Kamath and Steinke 2020, arXiv 2004.00010, proposition 12 (to epsilon).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr

from brickyard.core.errors import Refused
from brickyard.core.privacy import Direction, Mechanism, loss

FEWEST = 50  # steps: below it the expansion is no good for sampled steps
SKEWEST = 1.0  # skew of the sum above which it is not near a normal law
OUTSIDE = 1e-3  # how far F may leave [0, 1]: order 1 does by 7e-4 where it is still within 4 % of the certified figure
_REACH = 14.0  # standard deviations of the quadrature
_POINTS = 4097
_LARGEST = 200.0  # epsilon
_ORDERS = np.concatenate([1 + np.arange(1, 100) / 10, np.arange(11, 64), [96.0, 128.0, 192.0, 256.0]])


def cumulants(noise_multiplier: float, sample_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (k_P, k_Q): the first four cumulants [4] of l under N(0, 1) and under the mixture."""
    mu = 1 / noise_multiplier
    x = np.linspace(-_REACH, _REACH + mu, _POINTS)
    l = loss(x, mu, sample_rate)
    null, shifted = np.exp(-(x**2) / 2), np.exp(-((x - mu) ** 2) / 2)

    def of(density: np.ndarray) -> np.ndarray:
        weights = density / density.sum()
        mean = float(weights @ l)
        second, third, fourth = (float(weights @ (l - mean) ** power) for power in (2, 3, 4))
        return np.array([mean, second, third, fourth - 3 * second**2])

    return of(null), of((1 - sample_rate) * null + sample_rate * shifted)


def edgeworth(e: np.ndarray, k: np.ndarray, steps: int, order: int) -> np.ndarray:
    """Return F(e), the Edgeworth distribution function of the sum of `steps` losses with cumulants k [4]."""
    u = (e - steps * k[0]) / math.sqrt(steps * k[1])
    l3, l4 = k[2] / k[1] ** 1.5, k[3] / k[1] ** 2
    terms = l3 / (6 * math.sqrt(steps)) * (u**2 - 1)
    if order == 2:
        terms = terms + l4 / (24 * steps) * (u**3 - 3 * u) + l3**2 / (72 * steps) * (u**5 - 10 * u**3 + 15 * u)
    return ndtr(u) - np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi) * terms


def edgeworth_delta(
    mechanism: Mechanism, epsilon: np.ndarray, order: int, direction: Direction | Literal["both"] = "both"
) -> np.ndarray:
    """Return the estimate of delta at each epsilon, for a row removed, one added, or the larger of the two."""
    grow, f = np.exp(epsilon), _distributions(mechanism, epsilon, order)
    removed = 1 - f["Q"] - grow * (1 - f["P"])
    added = f["-P"] - grow * f["-Q"]
    return {"remove": removed, "add": added, "both": np.maximum(removed, added)}[direction]


def _distributions(mechanism: Mechanism, epsilon: np.ndarray, order: int) -> dict[str, np.ndarray]:
    """Return F_P and F_Q at epsilon, which a row removed asks about, and at -epsilon, which one added does."""
    k_P, k_Q = cumulants(mechanism.noise_multiplier, mechanism.sample_rate)
    return {
        sign + law: edgeworth(-epsilon if sign else epsilon, k, mechanism.steps, order)
        for law, k in (("P", k_P), ("Q", k_Q))
        for sign in ("", "-")
    }


def edgeworth_epsilon(
    mechanism: Mechanism, delta: float, order: int = 1, direction: Direction | Literal["both"] = "both"
) -> float:
    """Return the estimate of epsilon at `delta`; published figures look at a removed row only.

    Raises Refused where the expansion cannot be trusted: few steps, a skew sum, a delta that does not fall through
    `delta` or is not positive at epsilon 0, a distribution function outside [0, 1].
    """
    where = (
        f"(noise {mechanism.noise_multiplier:g}, sampling rate {mechanism.sample_rate:g}, {mechanism.steps} steps): "
        "the expansion does not hold there. Take the certified figure."
    )
    if mechanism.steps < FEWEST and mechanism.sample_rate < 1:
        raise Refused(f"the Edgeworth expansion wants {FEWEST} steps or more; there are {mechanism.steps}.")
    if mechanism.noise_multiplier == 0:
        return math.inf
    of_both = cumulants(mechanism.noise_multiplier, mechanism.sample_rate)
    skew = max(abs(float(k[2] / k[1] ** 1.5)) for k in of_both) / math.sqrt(mechanism.steps)
    if not skew <= SKEWEST:
        raise Refused(f"the sum of the privacy losses has skew {skew:.2g}, above {SKEWEST:g} {where}")
    epsilons = np.linspace(0.0, _LARGEST, 20_001)
    deltas = edgeworth_delta(mechanism, epsilons, order, direction)
    if not deltas[0] > 0:
        raise Refused(f"the Edgeworth estimate of delta at epsilon 0 is {deltas[0]:.2g}, not positive {where}")
    below = deltas <= delta
    if below[0]:
        return 0.0
    if not below.any():
        raise Refused(f"the Edgeworth estimate of delta stays above {delta:g} up to epsilon {_LARGEST:g}.")
    at = int(np.argmax(below))
    if (np.diff(deltas[: at + 1]) > 0).any():
        raise Refused(f"the Edgeworth estimate of delta rises with epsilon {where}")
    used = {"remove": ("P", "Q"), "add": ("-P", "-Q"), "both": ("P", "Q", "-P", "-Q")}[direction]
    found = _distributions(mechanism, epsilons[: at + 1], order)
    outside = max(max(-float(found[law].min()), float(found[law].max()) - 1) for law in used)
    if outside > OUTSIDE:
        raise Refused(f"the Edgeworth distribution function leaves [0, 1] by {outside:.2g} {where}")

    def beyond(epsilon: float) -> float:
        return float(edgeworth_delta(mechanism, np.array(epsilon), order, direction)) - delta

    return float(brentq(beyond, epsilons[at - 1], epsilons[at], xtol=1e-12))  # type: ignore[arg-type]


def renyi_epsilon(mechanism: Mechanism, delta: float) -> float:
    """Return the bound on epsilon at `delta` by Rényi divergences."""
    if mechanism.noise_multiplier == 0:
        return math.inf
    mu = 1 / mechanism.noise_multiplier
    # The integrand of order a is centred near a mu, so the grid reaches as far.
    x = np.linspace(-_REACH, _REACH + mu * _ORDERS[-1], _POINTS)
    log_density = -(x**2) / 2 - 0.5 * math.log(2 * math.pi) + math.log(x[1] - x[0])
    l = loss(x, mu, mechanism.sample_rate)
    divergence = np.array([logsumexp(a * l + log_density) / (a - 1) for a in _ORDERS])
    found = mechanism.steps * divergence + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    return max(0.0, float(found.min()))
