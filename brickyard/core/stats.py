"""What the answers of a few seeds on a few test examples say of a method. Needs numpy and scipy only.

Shapes: S seeds, N test examples. A score varies because the test examples are a sample, and because training again
gives another model. The examples are the same in all seeds, so both act at once (two crossed random effects). With
theta_s the score of seed s and psi_SN the influence of each example on it (`core.influence`), a mean over seeds, or a
difference of two such means, has the variance

    V = sum_n (mean_s psi)^2 / (N (N - 1))                examples, and what is left between seeds and examples
      + max(0, var_s(theta) / S - MS_rest / (S N))        seeds, less what the line above already holds; of each arm

and is judged by Student's t with Satterthwaite's degrees of freedom; those of two arms' seeds are Welch's.

Seeds of two arms are not paired: their noise is hardly correlated, three pairs leave 2 degrees of freedom where two
times three seeds leave up to 4, and in simulations (tests/test_stats.py, benchmarks/aa_calibration.py) the paired form
rejected a true null more often and saw a true difference less often. The exception is noise that two arms share by
construction (`together`: the same few labelled examples, or two uses of one trained model): the differences within each
seed are then one arm of their own. Nor are seeds drawn by a bootstrap, for it takes
three seeds for the whole population and rejects a true null in up to 16 %.

Sources: Satterthwaite 1946, "An approximate distribution of estimates of variance components"; Welch 1947, "The
generalization of 'Student's' problem when several different population variances are involved"; Wilson 1927; Korn and
Graubard 1998 (Wilson's interval with the effective number of examples); Bonett and Price 2012, "Adjusted Wald
confidence interval for a difference of binomial proportions based on paired data".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.stats import binomtest, permutation_test

from brickyard.core.errors import BadData, NotFinite, UsageError
from brickyard.core.influence import LOWER_IS_BETTER, checked, influence

FEW_SEEDS = 10  # more than these are not offered in place of more examples
MOST = 10**9  # examples or seeds; a search for more than that is given up
ONE_SEED = "one seed: this speaks of one trained model, not of the method"
ROUNDING = 1e-24  # variances below are none: one answer among a million that differs leaves 1e-12
NO_NOISE = "the answers differ, but the scores show no noise to judge by: nothing is known of their difference"
TWO_SEEDS = "two seeds: where their noise dominates, the interval is too narrow (in simulations it holds in 86 to 95 %)"


@dataclass(frozen=True)
class Interval:
    """A score: its mean over seeds, its interval, each seed's own, and what must be said with it (often nothing)."""

    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    note: str = ""


@dataclass(frozen=True)
class Paired:
    """The difference a - b of two arms, its interval, its two-sided p (below 1 - level exactly where 0 is outside).

    `seed_share` is the share of the variance that more examples would not remove; `note` as in Interval; `error` is the
    difference's standard error.
    """

    difference: float
    low: float
    high: float
    p: float
    test: str
    seed_share: float = 0.0
    note: str = ""
    error: float = 0.0


@dataclass(frozen=True)
class _Arm:
    """One arm: score and psi of each seed, the variance of the scores, and the mean square of psi about its mean."""

    score_S: np.ndarray
    psi_SN: np.ndarray
    between: float
    rest: float

    @classmethod
    def of(cls, labels: ArrayLike | None, predictions: ArrayLike, metric: str, weights: ArrayLike | None) -> _Arm:
        return cls.made(*influence(labels, predictions, metric, weights=weights))

    @classmethod
    def made(cls, score_S: np.ndarray, psi_SN: np.ndarray) -> _Arm:
        seeds, n = psi_SN.shape
        if seeds == 1:
            return cls(score_S, psi_SN, 0.0, 0.0)
        left_SN = psi_SN - psi_SN.mean(axis=0)
        return cls(score_S, psi_SN, float(score_S.var(ddof=1)), float((left_SN**2).sum() / ((seeds - 1) * (n - 1))))

    @property
    def seeds(self) -> int:
        return len(self.score_S)


@dataclass(frozen=True)
class _Variance:
    """The lines of V: `examples`, and `seeds` less `rest`, each summed over arms; and their degrees of freedom."""

    n: int
    examples: float
    seeds: float
    rest: float
    df_seeds: float
    df_rest: float

    @classmethod
    def of(cls, examples: float, arms: Sequence[_Arm]) -> _Variance:
        n = arms[0].psi_SN.shape[1]
        several = [arm for arm in arms if arm.seeds > 1]
        if not several:
            return cls(n, examples, 0.0, 0.0, 1.0, 1.0)
        # An arm with one seed borrows the other's noise: its own is unknown, and surely not zero.
        parts = [(arm if arm.seeds > 1 else several[0], arm.seeds) for arm in arms]
        mean_variance = [arm.between / seeds for arm, seeds in parts]
        total = sum(mean_variance)
        if len(several) == len(arms):
            squares = sum(v**2 / (arm.seeds - 1) for v, arm in zip(mean_variance, arms, strict=True))
            df = total**2 / squares if squares > 0 else float(sum(arm.seeds - 1 for arm in arms))
        else:
            df = float(several[0].seeds - 1)
        rest = sum(arm.rest / (seeds * n) for arm, seeds in parts)
        return cls(n, examples, total, rest, df, sum(arm.seeds - 1 for arm in several) * (n - 1.0))

    @property
    def beyond(self) -> float:
        """The part that more examples would not remove."""
        return max(0.0, self.seeds - self.rest)

    @property
    def total(self) -> float:
        return self.examples + self.beyond

    @property
    def df(self) -> float:
        squares = self.examples**2 / (self.n - 1) + self.seeds**2 / self.df_seeds + self.rest**2 / self.df_rest
        # Subtracting `rest` may push Satterthwaite's figure below that of each part, where it has no meaning.
        return max(self.total**2 / squares, min(self.df_seeds, self.n - 1.0)) if squares > 0 else self.n - 1.0

    def p(self, difference: float) -> float:
        """Return the two-sided p of a difference from 0."""
        if difference == 0 or self.total == 0:
            return float(difference == 0)
        return float(min(1.0, 2 * special.stdtr(self.df, -abs(difference) / math.sqrt(self.total))))

    def reach(self, level: float) -> float:
        """Return the half width of the interval."""
        return self.quantile(level) * math.sqrt(self.total)

    def quantile(self, level: float) -> float:
        """Return Student's two-sided critical value."""
        return float(special.stdtrit(self.df, (1 + level) / 2))

    def at(self, examples: float, seeds: float) -> _Variance:
        """Return the variance to expect with `examples` times the examples and `seeds` times the seeds."""
        alone = max(0.0, self.examples - self.rest)
        rest = min(self.rest, self.examples) / (examples * seeds)
        # df_seeds sums over arms of (seeds - 1): with g times as many seeds, at least g times as many.
        return _Variance(
            math.ceil(self.n * examples),
            alone / examples + rest,
            self.beyond / seeds + rest,
            rest,
            self.df_seeds * seeds,
            self.df_rest * examples * seeds,
        )


def _level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"level {level}: a number between 0 and 1 was expected, e.g. 0.95.")


def interval(
    labels: ArrayLike | None,
    predictions: ArrayLike,
    metric: str,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval:
    """Return the mean score over seeds with its interval for new test examples and new seeds.

    Bounded scores get Wilson's interval with the effective number of examples: it stays within the bounds, has a width
    where every answer is right, and is Wilson's own for the accuracy of one model (but for t in place of the normal).
    With one seed it holds for that model on new examples, which `note` says.

    Args:
        labels: [N] class ids or numbers; None for "loss".
        predictions: [S, N] or [N], class ids, or numbers for "spearman"; for "loss" the loss of each example.
        metric: one of `influence.METRICS`.
        weights: [N], only for "loss" (tokens, bytes).
        level: of the interval.

    Raises:
        As `influence.influence`: BadData (too few examples, shapes), NotFinite, UnknownName, UsageError.
    """
    _level(level)
    arm = _Arm.of(labels, predictions, metric, weights)
    n = arm.psi_SN.shape[1]
    psi_N = arm.psi_SN.mean(axis=0)
    # Divided by N * N as Wilson's p (1 - p) / N is; without bounds by N * (N - 1), as in Student's test.
    bounded = metric not in LOWER_IS_BETTER
    v = _Variance.of(float((psi_N**2).sum() / (n * (n if bounded else n - 1))), [arm])
    mean = float(arm.score_S.mean())
    if bounded:
        low, high = _wilson(mean, v, _floor(metric), level)
    else:
        low, high = mean - v.reach(level), mean + v.reach(level)
    return Interval(mean, low, high, tuple(map(float, arm.score_S)), _note(arm.seeds))


def _note(seeds: int) -> str:
    return {1: ONE_SEED, 2: TWO_SEEDS}.get(seeds, "")


def _floor(metric: str) -> float:
    """Return the least value of a metric whose greatest is 1."""
    return -1.0 if metric in ("matthews", "spearman") else 0.0


def _blind(v: _Variance, metric: str) -> bool:
    """Whether differing answers left no variance because the score does not respond to them.

    A loss is not meant: one that differs by the same on every example is measured on each of them.
    """
    return v.total < ROUNDING and metric not in LOWER_IS_BETTER


def _wilson(mean: float, v: _Variance, floor: float, level: float) -> tuple[float, float]:
    width = 1 - floor
    p = min(1.0, max(0.0, (mean - floor) / width))
    spread, variance = p * (1 - p), v.total / width**2
    # Where the score is at its bound, or no answer ever differs, the variance says nothing: N examples count as N.
    n = v.n if spread == 0 or variance == 0 else spread / variance
    c = v.quantile(level)
    centre = (p + c * c / (2 * n)) / (1 + c * c / n)
    half = c / (1 + c * c / n) * math.sqrt(spread / n + c * c / (4 * n * n))
    return floor + width * max(0.0, centre - half), floor + width * min(1.0, centre + half)


def paired(
    labels: ArrayLike | None,
    a: ArrayLike,
    b: ArrayLike,
    metric: str,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    together: bool = False,
) -> Paired:
    """Compare two arms on the same examples: the difference a - b of their mean scores over seeds.

    The arms may have different numbers of seeds. An arm with one seed is taken to be as noisy as the other, so give one
    whose answers never change (a majority class) as one row per seed. Two arms with the same answers in every seed get
    p = 1 and an interval of no width. Other answers whose bounded score has no variance (two constants, to which a
    correlation gives 0) say nothing: p = 1, and the interval is all that the difference can be. With two seeds per arm,
    one arm noisy and the other not, a true null is rejected in up to 11 % (with three in about 7 %). Arguments and
    errors as in `interval`.

    together: seed s of both arms shares its noise (the same few-shot examples, the same trained model), so that only
    differences within a seed count; both need the same number of seeds then, or UsageError.
    """
    _level(level)
    found = _compare(labels, a, b, metric, weights, together)
    if found is None:
        return Paired(0.0, 0.0, 0.0, 1.0, "identical answers")
    difference, v, seeds = found
    if _blind(v, metric):
        most = 1.0 - _floor(metric)
        return Paired(difference, -most, most, 1.0, "none: the scores show no noise", 0.0, NO_NOISE, most)
    reach = v.reach(level)
    test, note = "t over examples and seeds (Satterthwaite)", _note(min(seeds))
    if together and min(seeds) > 1:
        test = "t over examples and differences within seeds (Satterthwaite)"
    if seeds == (1, 1):
        test = "t over examples (one seed)"
    elif 1 in seeds:
        note = "one arm has one seed and is taken to be as noisy as the other"
    share = v.beyond / v.total if v.total > 0 else 0.0
    low, high, error = difference - reach, difference + reach, float(np.sqrt(v.total))
    return Paired(difference, low, high, v.p(difference), test, share, note, error)


def _compare(
    labels: ArrayLike | None,
    a: ArrayLike,
    b: ArrayLike,
    metric: str,
    weights: ArrayLike | None,
    together: bool = False,
) -> tuple[float, _Variance, tuple[int, int]] | None:
    """Return the difference, its variance and the seeds; None where both arms gave the same answers throughout."""
    arms = [_Arm.of(labels, x, metric, weights) for x in (a, b)]
    n = arms[0].psi_SN.shape[1]
    if arms[1].psi_SN.shape[1] != n:
        other = arms[1].psi_SN.shape[1]
        raise BadData(f"arms with {n} and {other} examples cannot be paired; expected answers to the same examples.")
    seeds = arms[0].seeds, arms[1].seeds
    if together and seeds[0] != seeds[1]:
        raise UsageError(
            f"arms with {seeds[0]} and {seeds[1]} seeds share no noise seed by seed; expected as many of each."
        )
    if np.shape(a) == np.shape(b) and np.array_equal(np.asarray(a), np.asarray(b)):
        return None
    difference = float(arms[0].score_S.mean()) - float(arms[1].score_S.mean())
    psi_N = arms[0].psi_SN.mean(axis=0) - arms[1].psi_SN.mean(axis=0)
    variance = float((psi_N**2).sum() / (n * (n - 1)))
    if metric not in {"spearman", *LOWER_IS_BETTER}:
        # Few answers differ, so their number is uncertain: one more example on either side (Bonett and Price), of the
        # size that the differing ones have (1 where each arm has one seed and the metric is accuracy). Where only wrong
        # answers differ there are none; a hit more or less is of size 1, and unknown of the other metrics.
        pseudo_N = psi_N + difference
        square = float((pseudo_N**2).sum())
        unseen = float(metric in ("accuracy", "accuracy_norm"))
        variance += 2 * (float((pseudo_N**4).sum()) / square if square > ROUNDING else unseen) / n**2
    if together:
        arms = [_Arm.made(arms[0].score_S - arms[1].score_S, arms[0].psi_SN - arms[1].psi_SN)]
    return difference, _Variance.of(variance, arms), seeds


def examples_needed(
    labels: ArrayLike | None,
    a: ArrayLike,
    b: ArrayLike,
    metric: str,
    *,
    difference: float | None = None,
    power: float = 0.8,
    weights: ArrayLike | None = None,
    level: float = 0.95,
    together: bool = False,
) -> dict[str, Any]:
    """Estimate what it would take to see `difference` (default: the observed one) with probability `power`.

    The present noise is extrapolated, so the answer is an order of magnitude, not a promise.

    Returns:
        {"examples", "seeds": how many more test examples, or more seeds per arm, would do with the other left as it is
        (0: what is there would do; None: no number would), "limited_by": "nothing", "examples", "seeds" (their noise
        dominates, more examples would never do), "both" (neither alone would do, the two numbers together would),
        "no difference" or "no noise" (nothing to extrapolate), "sentence": the same in words}.
    """
    _level(level)
    if not 0 < power < 1:
        raise UsageError(f"power {power}: a number between 0 and 1 was expected.")
    found = _compare(labels, a, b, metric, weights, together)
    if found and _blind(found[1], metric):
        return _needed(None, None, "no noise", NO_NOISE)
    size = abs(found[0] if found and difference is None else difference or 0.0)
    if found is None or size == 0:
        return _needed(None, None, "no difference", "there is no difference that more data could show")
    _, v, (seeds_a, seeds_b) = found
    z = float(special.ndtri(power))
    least, n = min(seeds_a, seeds_b), v.n

    def seen(examples: float, seeds: float) -> bool:
        there = v.at(examples, seeds)
        return there.total == 0 or size >= (there.quantile(level) + z) * math.sqrt(there.total)

    if seen(1, 1):
        return _needed(0, 0, "nothing", "the present test set and seeds suffice")
    by_examples = _smallest(lambda k: seen(k, 1), MOST / n)
    by_seeds = _smallest(lambda k: seen(1, k), MOST / least) if least > 1 else None
    examples = None if by_examples is None else _round_up(n * (by_examples - 1))
    seeds = None if by_seeds is None else _round_up(least * (by_seeds - 1))
    if examples is not None:
        instead = f" or {_some(seeds, 'seed')} per arm" if seeds is not None and seeds <= FEW_SEEDS else ""
        limited, sentence = "examples", f"about {_some(examples, 'test example')}{instead} would be needed to tell"
    elif seeds is not None:
        limited = "seeds"
        sentence = f"noise between seeds dominates: about {_some(seeds, 'seed')} per arm would be needed to tell"
    else:
        both = _smallest(lambda k: seen(k, k), MOST / n)
        if both is None:
            return _needed(None, None, "both", "the difference is too small to be seen")
        limited, examples, seeds = "both", _round_up(n * (both - 1)), _round_up(least * (both - 1))
        more = f"{_some(examples, 'test example')} and {_some(seeds, 'seed')} per arm"
        sentence = f"about {more} together would be needed to tell"
    return _needed(examples, seeds, limited, sentence)


def _needed(examples: int | None, seeds: int | None, limited_by: str, sentence: str) -> dict[str, Any]:
    return {"examples": examples, "seeds": seeds, "limited_by": limited_by, "sentence": sentence}


def _smallest(fits: Callable[[float], bool], most: float) -> float | None:
    """Return the smallest factor above 1 that fits, to one part in 10,000; None if none up to `most` does."""
    low, high = 1.0, 2.0
    while not fits(high):
        low, high = high, high * 2
        if low > most:
            return None
    while high - low > 1e-4 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _round_up(value: float) -> int:
    """Round up to two significant digits: an estimate from noise deserves no more."""
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1.0))) - 1)
    return math.ceil(value / unit - 1e-3) * unit


def _some(count: int, what: str) -> str:
    return f"{count:,} more {what}" + ("" if count == 1 else "s")


@dataclass(frozen=True)
class McNemar:
    """How often only the first of two models was right, only the second, and the exact two-sided p."""

    only_a: int
    only_b: int
    p: float


def mcnemar(labels: ArrayLike, a: ArrayLike, b: ArrayLike) -> McNemar:
    """Compare the accuracy of two single models, [N] answers each, by McNemar's exact test.

    It says which of the two models is better, and nothing of the methods that made them. Errors as in `interval`.
    """
    true, answers_a, _ = checked(labels, a, "accuracy")
    _, answers_b, _ = checked(labels, b, "accuracy")
    if len(answers_a) != 1 or len(answers_b) != 1:
        given = f"{len(answers_a)} and {len(answers_b)} seeds"
        raise BadData(f"McNemar's test compares single models, not {given}; expected one row each, or use paired().")
    right_a, right_b = answers_a[0] == true, answers_b[0] == true
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p)


def sign_flip(differences: ArrayLike, *, draws: int = 9999, seed: int = 0) -> float:
    """Return the two-sided p of a mean difference under random signs (exact where 2 to the number of values allows).

    Args:
        differences: one value per exchangeable unit, e.g. per example the difference of two arms' mean hits, or per
            seed the difference of their scores. k seeds can give no p below 2 / 2**k: for three, 0.25.
        draws: random sign vectors where not all of them can be tried.
        seed: of the draws.
    """
    values = np.asarray(differences, dtype=np.float64).ravel()
    if not np.isfinite(values).all():
        raise NotFinite("a difference is NaN or infinite; no test can be made.")
    values = values[values != 0]  # flipping a zero changes nothing
    if len(values) == 0:
        return 1.0
    if len(values) == 1:
        return 1.0  # both signs are equally far from 0
    found = permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=draws,
        batch=max(1, 10**7 // len(values)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Return Holm's adjusted p values in the given order, [M] -> [M]: each at least the raw one, and at most 1.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise BadData("p values must be a list of numbers between 0 and 1.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted
