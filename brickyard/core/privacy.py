"""What differential privacy costs: a certified epsilon of Poisson-sampled Gaussian steps, and of many runs together.

One step takes each of n rows with probability q, adds up gradients of norm at most C and adds N(0, sigma^2 C^2 I). With
mu = 1/sigma, a row's presence is hidden as well as N(0, 1) is told from the mixture (1 - q) N(0, 1) + q N(mu, 1); at x
the privacy loss is

    l(x)       = log(1 - q + q exp(mu x - mu^2/2))
    delta(eps) = E[(1 - exp(eps - L))_+] + P(L = infinity),   L = sum over the steps of l(x_t)

where x is drawn from the mixture and l taken as it is (a row is removed), or x ~ N(0, 1) and -l (a row is added): the
larger of the two counts. The law of l is put on a grid of width h such that the grid's hockey-stick curve is nowhere
below the true one ("connect the dots": the mass of each cell goes to the cell's ends, keeping its mass under both
laws), convolved with itself by FFT, and what is cut off or may have been rounded away counts as infinite loss. So every
figure is an upper bound, for neighbouring data sets that differ by one row. This leaves out that noise is drawn in
floating point (Mironov 2012).

Sources: Koskela, Jälkö and Honkela 2020, arXiv 1906.03049 (FFT); Doroshenko et al. 2022, arXiv 2207.04380 (connect the
dots); Zhu, Dong and Wang 2022, arXiv 2106.08567 (composition of dominating pairs). Written here because dp-accounting
asks for numpy below 2; the tests hold every figure against it.

Shapes: K cells of one step's loss, N places of the sum's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.optimize import brentq
from scipy.signal import lfilter
from scipy.special import ndtr

from brickyard.core.errors import UsageError

Direction = Literal["remove", "add"]

_CELLS_PER_SPREAD = 20.0  # of the grid in a step's standard deviation: rounding then adds 0.04 % to its variance
_WIDEST = 1e-2  # of a cell: between two dots the curve is straight in exp(epsilon), 1e-5 of delta too high
_MOST = 2**20  # cells of one step's loss; wider cells are taken beyond it, which only makes the bound larger
_CUT = 1e-6  # share of delta that may be cut off at either end
_LARGEST_NOISE = 1e5


@dataclass(frozen=True)
class Mechanism:
    """`steps` steps that each take a row with probability `sample_rate` and add noise of `noise_multiplier` times C."""

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise UsageError(f"noise_multiplier={self.noise_multiplier}: give a finite number, 0 or more.")
        if not 0 < self.sample_rate <= 1:
            raise UsageError(
                f"sample_rate={self.sample_rate}: a row is taken with a probability above 0 and at most 1."
            )
        if self.steps < 0:
            raise UsageError(f"steps={self.steps}: give 0 or more.")


@dataclass(frozen=True)
class _Loss:
    """A step's privacy loss: mass_K at (first + k) h, and the mass at infinity."""

    first: int
    mass_K: np.ndarray
    infinite: float


@dataclass(frozen=True)
class _Sum:
    """The loss of all steps: mass_N at values_N, ascending, and what must be taken as infinite."""

    values_N: np.ndarray
    mass_N: np.ndarray
    infinite: float

    def delta(self, epsilon: float) -> float:
        """Return delta at `epsilon`."""
        above = self.values_N > epsilon
        gain = -np.expm1(epsilon - self.values_N[above])
        return min(1.0, float((self.mass_N[above] * gain).sum()) + self.infinite)

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 whose delta is at most `delta`; infinity where there is none."""
        if self.infinite > delta:
            return math.inf
        if self.delta(0.0) <= delta:
            return 0.0
        above = self.values_N > 0
        values, mass = self.values_N[above], self.mass_N[above]
        # Between values[j-1] and values[j]: delta(eps) = tail_j + infinite - exp(eps - values_j) shrunk_j, where
        # shrunk_j = sum over i >= j of mass_i exp(values_j - values_i), a recursion on the even grid.
        tail = np.cumsum(mass[::-1])[::-1] + self.infinite
        width = float(self.values_N[1] - self.values_N[0])
        shrunk = lfilter([1.0], [1.0, -math.exp(-width)], mass[::-1])[::-1]
        j = int(np.argmax(tail - shrunk <= delta))
        return max(0.0, float(values[j]) + math.log((tail[j] - delta) / shrunk[j]))


def epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return the certified epsilon at `delta` of all mechanisms together, each free to depend on those before it.

    Raises UsageError for a delta outside (0, 1). Without noise the answer is infinity.
    """
    _check_delta(delta)
    taken = _taken(mechanisms)
    if not taken:
        return 0.0
    if any(m.noise_multiplier == 0 for m in taken):
        return math.inf
    return max(_composed(taken, direction, delta).epsilon(delta) for direction in ("remove", "add"))


def delta_of(mechanisms: Sequence[Mechanism], epsilon: float, *, smallest: float = 1e-12) -> float:
    """Return the certified delta at `epsilon`; masses below `smallest` are not resolved, and count in full."""
    if not epsilon >= 0:
        raise UsageError(f"epsilon={epsilon}: give 0 or more.")
    taken = _taken(mechanisms)
    if not taken:
        return 0.0
    if any(m.noise_multiplier == 0 for m in taken):
        return 1.0
    return max(_composed(taken, direction, smallest).delta(epsilon) for direction in ("remove", "add"))


@cache
def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return the least noise multiplier (to 4 digits, rounded up) whose certified epsilon is at most `epsilon`.

    Raises UsageError where no noise reaches it.
    """
    return least_noise(lambda sigma: epsilon_of([Mechanism(sigma, sample_rate, steps)], delta), epsilon)


def least_noise(epsilon_at: Callable[[float], float], epsilon: float, *, digits: int = 4) -> float:
    """Return the least sigma, rounded up to `digits` digits, with `epsilon_at(sigma) <= epsilon`, by root finding.

    `epsilon_at` must fall as sigma grows. Raises UsageError where the largest noise does not reach `epsilon`.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise UsageError(f"epsilon={epsilon}: give a finite number above 0.")
    high = 1.0
    while epsilon_at(high) > epsilon:
        high *= 2
        if high > _LARGEST_NOISE:
            raise UsageError(
                f"epsilon={epsilon:g} cannot be reached with noise of {_LARGEST_NOISE:g} times the clipping norm; "
                "take fewer steps, smaller batches of more rows, or a larger epsilon or delta."
            )
    low = high / 2
    while epsilon_at(low) <= epsilon:
        low, high = low / 2, low

    def above(log_sigma: float) -> float:
        return math.log(min(max(epsilon_at(math.exp(log_sigma)) / epsilon, 1e-9), 1e9))

    step = 10.0**-digits
    sigma = math.exp(float(brentq(above, math.log(low), math.log(high), xtol=step / 4)))  # type: ignore[arg-type]
    unit = 10.0 ** (math.floor(math.log10(sigma)) + 1 - digits)
    places = math.ceil(sigma / unit)
    while epsilon_at(places * unit) > epsilon:
        places += 1
    return float(f"{places * unit:.{digits}g}")


def compose(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the total privacy of all runs that used the same rows.

    reports: what the `report()` of private steps gave, with or without the key "privacy" around it. Runs that list
    their `mechanisms` are composed exactly, as one long run, at the largest of their deltas; a run that only states
    (epsilon, delta) adds both.

    Returns {"epsilon", "delta", "kind", "adjacency", "runs", "how"}. Raises UsageError for a report that is not
    certified (a sum with an estimate proves nothing), that does not state its adjacency (what must not be told apart),
    or states another one than the others: see `by_adjacency`.
    """
    found = [_plain(report) for report in reports]
    for one in found:
        if one.get("kind") != "certified":
            raise UsageError(f"only certified reports add up to a certified total; one is {one.get('kind')!r}.")
    kinds = sorted({_adjacency(one) for one in found})
    if len(kinds) > 1:
        raise UsageError(
            f"reports for {' and '.join(kinds)} neighbours hide different things and have no common total; compose "
            "those of one adjacency (by_adjacency does)."
        )
    listed = [one for one in found if one.get("mechanisms")]
    stated = [one for one in found if not one.get("mechanisms")]
    epsilon, delta = sum(float(one["epsilon"]) for one in stated), sum(float(one["delta"]) for one in stated)
    if listed:
        most = max(float(one["delta"]) for one in listed)
        epsilon += epsilon_of([Mechanism(**m) for one in listed for m in one["mechanisms"]], most)
        delta += most
    how = " and ".join(
        text for text, some in (("composed loss distributions", listed), ("sums of epsilon and delta", stated)) if some
    )
    adjacency = kinds[0] if kinds else None
    return {
        "epsilon": epsilon,
        "delta": delta,
        "kind": "certified",
        "adjacency": adjacency,
        "runs": len(found),
        "how": how,
    }


def by_adjacency(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one total for each adjacency that the reports state, in the order of its name; errors as of `compose`."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        groups.setdefault(_adjacency(_plain(report)), []).append(report)
    return [compose(group) for _, group in sorted(groups.items())]


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    return dict(report.get("privacy", report))


def _adjacency(report: Mapping[str, Any]) -> str:
    """Return which data sets a report calls neighbours."""
    if not report.get("adjacency"):
        raise UsageError(
            'a report does not state its adjacency, so nobody knows what its epsilon hides; add "adjacency", as '
            '"add-or-remove" or "replace-one".'
        )
    return str(report["adjacency"])


def sentence(report: Mapping[str, Any]) -> str:
    """Write what one run spent, from what its step reported under "privacy"."""
    told = f"privacy: epsilon {report['epsilon']:.3g} at delta {report['delta']:g} ({report['kind']})"
    other = report.get("estimate")
    if other and other.get("epsilon") is not None:
        told += f"; {other['epsilon']:.3g} by {other['accountant']} ({other['kind']})"
    if report.get("noise_set_by"):
        told += f"; noise {report['noise_multiplier']:.4g}, set by {report['noise_set_by']}"
    return f"{told}. It covers {report['covers']}."


def listed(mechanisms: Sequence[Mechanism]) -> list[dict[str, Any]]:
    """Return mechanisms as a report holds them."""
    return [asdict(m) for m in mechanisms]


def loss(x: np.ndarray, mu: float, q: float) -> np.ndarray:
    """Return l(x) = log(1 - q + q exp(mu x - mu^2/2)) without overflow."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-q), math.log(q) + mu * x - mu**2 / 2)


def _taken(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    """Mechanisms that took a step, equal ones joined."""
    steps: dict[tuple[float, float], int] = {}
    for m in mechanisms:
        key = (m.noise_multiplier, m.sample_rate)
        steps[key] = steps.get(key, 0) + m.steps
    return [Mechanism(*key, count) for key, count in steps.items() if count]


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"delta={delta}: give a probability above 0 and below 1.")


def _reach(budget: float) -> float:
    """The z beyond which a normal variable lies with at most probability `budget`, a little too far."""
    return math.sqrt(2 * math.log(1 / budget)) + 0.5


def _composed(mechanisms: Sequence[Mechanism], direction: Direction, delta: float) -> _Sum:
    """Convolve the losses of all steps; what lies beyond the window counts as infinite."""
    total = sum(m.steps for m in mechanisms)
    budget = _CUT * delta
    reach = _reach(budget / total)
    width = _cell(mechanisms, reach, total)
    losses = [_discretised(m, direction, width, reach) for m in mechanisms]
    low, high = _window(losses, mechanisms, width, budget)
    first = math.floor(low / width)
    size: int = next_fast_len(math.ceil(high / width) - first + 2, real=True)  # type: ignore[assignment]
    spectrum: Any = 1.0
    rounding: Any = 0.0
    unit = np.finfo(np.float64).eps * math.log2(size)
    for m, one in zip(mechanisms, losses, strict=True):
        folded = np.bincount(np.arange(len(one.mass_K)) % size, weights=one.mass_K, minlength=size)
        step: np.ndarray = rfft(folded)  # type: ignore[assignment]
        spectrum = spectrum * step**m.steps
        rounding = rounding + m.steps * unit * np.abs(step) ** (m.steps - 1)
    mass: np.ndarray = irfft(spectrum, size)  # type: ignore[assignment]
    start = sum(m.steps * one.first for m, one in zip(mechanisms, losses, strict=True))
    mass_N = np.clip(np.roll(mass, (start - first) % size), 0.0, None)
    infinite = sum(m.steps * one.infinite for m, one in zip(mechanisms, losses, strict=True))
    # Errors of the transforms, to first order: at most this in the sum of |errors| over all places.
    wrong = 4 * float(np.linalg.norm(rounding)) if np.ndim(rounding) else 0.0
    return _Sum((first + np.arange(size)) * width, mass_N, infinite + budget + wrong)


def _cell(mechanisms: Sequence[Mechanism], reach: float, total: int) -> float:
    """Choose the width of a cell: fine beside the spread of one step's loss, however small that is."""
    variance, widest = 0.0, 0.0
    for m in mechanisms:
        mu = 1 / m.noise_multiplier
        x = np.linspace(-reach, reach + mu, 8193)
        density = (1 - m.sample_rate) * np.exp(-(x**2) / 2) + m.sample_rate * np.exp(-((x - mu) ** 2) / 2)
        l = loss(x, mu, m.sample_rate)
        mean = np.average(l, weights=density)
        variance += m.steps * float(np.average((l - mean) ** 2, weights=density))
        widest = max(widest, float(l[-1] - l[0]))
    return max(min(math.sqrt(variance / total) / _CELLS_PER_SPREAD, _WIDEST), widest / _MOST)


def _discretised(m: Mechanism, direction: Direction, width: float, reach: float) -> _Loss:
    """Put one step's loss on the grid by connecting the dots of its hockey-stick curve."""
    mu, q = 1 / m.noise_multiplier, m.sample_rate
    low, high = (float(v) for v in loss(np.array([-reach, reach + mu]), mu, q))
    first, last = math.floor(low / width), math.ceil(high / width)
    edges_K = np.arange(first, last + 1) * width
    x_K = _inverse(edges_K, mu, q)
    with_row, without = _cells(x_K, mu, q), _cells(x_K, 0.0, 1.0)
    # Below the first edge and above the last: masses of both laws.
    below = {"with": q * float(ndtr(x_K[0] - mu)) + (1 - q) * float(ndtr(x_K[0])), "without": float(ndtr(x_K[0]))}
    above = {"with": q * float(ndtr(mu - x_K[-1])) + (1 - q) * float(ndtr(-x_K[-1])), "without": float(ndtr(-x_K[-1]))}
    if direction == "remove":
        mass = _dots(with_row, without, edges_K[:-1], width)
        mass[0] += below["with"]  # rounded up to the first edge
        return _Loss(first, mass, above["with"])
    mass = _dots(without[::-1], with_row[::-1], -edges_K[:0:-1], width)
    mass[0] += above["without"]
    return _Loss(-last, mass, below["without"])


def _inverse(l: np.ndarray, mu: float, q: float) -> np.ndarray:
    """Return x with loss(x) = l; minus infinity at and below the least loss log(1 - q)."""
    # (e^l - 1 + q)/q, written for large l as e^l (1 - (1 - q) e^-l) / q.
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.where(
            l > 0,
            l + np.log1p(-(1 - q) * np.exp(-np.abs(l))),
            np.log(np.maximum(np.expm1(np.minimum(l, 0.0)) + q, 0.0)),
        )
    return (inside - math.log(q) + mu**2 / 2) / mu


def _cells(x_K: np.ndarray, mu: float, q: float) -> np.ndarray:
    """Return the mass of (1 - q) N(0, 1) + q N(mu, 1) between neighbouring x, exact in either tail."""

    def between(mean: float) -> np.ndarray:
        a, b = x_K[:-1] - mean, x_K[1:] - mean
        return np.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))

    return between(mu) if q == 1 else (1 - q) * between(0.0) + q * between(mu)


def _dots(p_K: np.ndarray, q_K: np.ndarray, left_K: np.ndarray, width: float) -> np.ndarray:
    """Move each cell's mass to its two ends so that its mass under both laws stays: [K] cells -> [K + 1] edges.

    p_K, q_K: masses of a cell under the law that draws the loss and under the other one; left_K: its lower end.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        upper_K = (p_K - np.exp(left_K) * q_K) / -np.expm1(-width)
    # Where the difference is lost in rounding, the whole mass goes up.
    upper_K = np.clip(np.where(np.isfinite(upper_K), upper_K, p_K), 0.0, p_K)
    out = np.zeros(len(p_K) + 1)
    out[1:] += upper_K
    out[:-1] += p_K - upper_K
    return out


def _window(
    losses: Sequence[_Loss], mechanisms: Sequence[Mechanism], width: float, budget: float
) -> tuple[float, float]:
    """Return bounds that the sum exceeds with at most probability `budget` on either side (Chernoff)."""
    variance = 0.0
    for m, one in zip(mechanisms, losses, strict=True):
        values = (one.first + np.arange(len(one.mass_K))) * width
        variance += m.steps * float((values - values @ one.mass_K) ** 2 @ one.mass_K)
    rates = np.geomspace(0.3, 30.0, 20) / max(math.sqrt(variance), width)

    def bound(sign: float) -> float:
        """Bound sign * sum from above."""
        moment = np.zeros(len(rates))
        for m, one in zip(mechanisms, losses, strict=True):
            values, mass = _blocks(one, width, sign)
            exponent = rates[:, None] * (sign * values)
            largest = exponent[:, mass > 0].max(1)
            with np.errstate(under="ignore"):
                total = (np.exp(np.minimum(exponent - largest[:, None], 0.0)) * mass).sum(1)
            moment += m.steps * (largest + np.log(total))
        return float(((moment - math.log(budget)) / rates).min())

    return -bound(-1.0), bound(1.0)


def _blocks(one: _Loss, width: float, sign: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a coarser law whose mass lies further out, towards `sign`: values and masses of at most 4,096 blocks."""
    size = math.ceil(len(one.mass_K) / 4096)
    mass = np.add.reduceat(one.mass_K, np.arange(0, len(one.mass_K), size))
    starts = np.arange(len(mass)) * size
    ends = np.minimum(starts + size, len(one.mass_K)) - 1
    return (one.first + (ends if sign > 0 else starts)) * width, mass
