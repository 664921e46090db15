"""The statistics against scipy, against formulae written out, against properties, and against made-up arms."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from brickyard.core.errors import BadData, NotFinite, UnknownName, UsageError
from brickyard.core.influence import MINIMUM_EXAMPLES, influence
from brickyard.core.stats import examples_needed, holm, interval, mcnemar, paired, sign_flip
from brickyard.core.task import macro_f1, matthews, spearman

CLASS_METRICS = ("accuracy", "macro-f1", "matthews")


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    """The benchmark, which brings the made-up arms."""
    path = Path(__file__).parents[1] / "benchmarks" / "aa_calibration.py"
    spec = importlib.util.spec_from_file_location("aa_calibration", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["aa_calibration"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def answers(seed: int, seeds: int, n: int, right: float = 0.8, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and answers [S, N] that are right in about `right`, with hard examples in common."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    quality = right + rng.normal(0, 0.15, n) + rng.normal(0, 0.02, (seeds, 1))
    return labels, np.where(rng.random((seeds, n)) < quality, labels, rng.integers(0, classes, (seeds, n)))


def numbers(seed: int, seeds: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and predictions [S, N] for a rank correlation, with ties."""
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=n).round(1)
    return labels, (labels + rng.normal(0, 0.7, (seeds, n))).round(1)


def drawn(metric: str, seed: int, seeds: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    return numbers(seed, seeds, n) if metric == "spearman" else answers(seed, seeds, n)


def test_scores_equal_those_of_the_task_and_of_scipy() -> None:
    labels, predictions = answers(0, 3, 200)
    np.testing.assert_allclose(influence(labels, predictions, "macro-f1")[0], macro_f1(labels, predictions))
    np.testing.assert_allclose(influence(labels, predictions, "matthews")[0], matthews(labels, predictions))
    labels, predictions = numbers(0, 3, 200)
    found = influence(labels, predictions, "spearman")[0]
    np.testing.assert_allclose(found, spearman(np.broadcast_to(labels, predictions.shape), predictions))
    np.testing.assert_allclose(found, [scipy_stats.spearmanr(labels, row).statistic for row in predictions])


def test_class_names_may_be_any_numbers_and_a_class_may_be_missing() -> None:
    labels, predictions = answers(1, 2, 60)
    far = np.array([7, -3, 1000, 4])
    assert paired(far[labels], far[predictions], far[predictions[::-1]], "macro-f1") == paired(
        labels, predictions, predictions[::-1], "macro-f1"
    )


@pytest.mark.parametrize("metric", [*CLASS_METRICS, "spearman"])
def test_influence_is_the_derivative_by_the_weight_of_an_example(metric: str) -> None:
    labels, predictions = drawn(metric, 2, 2, 50)
    score_S, psi_SN = influence(labels, predictions, metric)
    copies = 400
    for i in range(0, 50, 7):
        more = np.concatenate([np.tile(labels, copies), labels[i : i + 1]])
        guessed = np.concatenate([np.tile(predictions, (1, copies)), predictions[:, i : i + 1]], axis=1)
        slope = (influence(more, guessed, metric)[0] - score_S) * len(more)
        np.testing.assert_allclose(slope, psi_SN[:, i], atol=2e-3)
    np.testing.assert_allclose(psi_SN.sum(axis=1), 0, atol=1e-9)


def test_weighted_loss_is_the_ratio_of_sums() -> None:
    rng = np.random.default_rng(3)
    losses, tokens = rng.gamma(2, 1, (1, 40)), rng.integers(1, 50, 40).astype(float)
    score_S, psi_SN = influence(None, losses, "loss", weights=tokens)
    assert score_S[0] == pytest.approx((losses[0] * tokens).sum() / tokens.sum())
    # Linearised ratio estimator, Cochran 1977, eq. 6.13.
    expected = 40 * tokens * (losses[0] - score_S[0]) / tokens.sum()
    np.testing.assert_allclose(psi_SN[0], expected)


def test_one_model_gets_wilsons_interval() -> None:
    labels, predictions = answers(4, 1, 20_000)
    found = interval(labels, predictions, "accuracy")
    hits = int((labels == predictions[0]).sum())
    wilson = scipy_stats.binomtest(hits, 20_000).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    assert found.mean == hits / 20_000
    assert "one trained model" in found.note


def test_all_right_still_has_a_width_as_wilsons_interval_has() -> None:
    labels = np.arange(1000) % 3
    found = interval(labels, np.stack([labels] * 3), "accuracy")
    wilson = scipy_stats.binomtest(1000, 1000).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(wilson.low, abs=1e-4), 1.0)


def test_losses_of_one_model_get_students_interval_and_test() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.gamma(2, 1, 35), rng.gamma(2, 1.1, 35)
    student = scipy_stats.ttest_1samp(a, 0).confidence_interval()
    found = interval(None, a, "loss")
    assert (found.low, found.high) == pytest.approx((student.low, student.high))
    expected = scipy_stats.ttest_rel(a, b)
    pair, between = paired(None, a, b, "loss"), expected.confidence_interval()
    assert (pair.p, pair.low, pair.high) == pytest.approx((expected.pvalue, between.low, between.high))


@pytest.mark.parametrize("metric", ["bits_per_byte", "nats_per_token"])
def test_the_loss_of_texts_has_no_upper_bound(metric: str) -> None:
    """A score above 1 must lie inside its interval, which is that of a ratio of sums."""
    rng = np.random.default_rng(6)
    sizes = rng.integers(20, 200, 60)
    nats = sizes * rng.gamma(9, 0.3, 60)
    found = interval(sizes, nats, metric)
    drawn = rng.integers(0, 60, (4000, 60))
    ratios = nats[drawn].sum(axis=1) / sizes[drawn].sum(axis=1) / (math.log(2) if metric == "bits_per_byte" else 1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    assert 1.0 < found.low < found.mean < found.high
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.02)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    pair = paired(sizes, nats, nats * 1.01, metric)
    assert pair.low < pair.difference < pair.high < 0


def test_noise_of_seeds_alone_gives_welchs_test() -> None:
    a, b = np.array([0.80, 0.83, 0.81]), np.array([0.78, 0.77, 0.80, 0.70])
    pair = paired(None, np.tile(a[:, None], 50), np.tile(b[:, None], 50), "loss")
    welch = scipy_stats.ttest_ind(a, b, equal_var=False)
    between = welch.confidence_interval()
    assert (pair.p, pair.low, pair.high) == pytest.approx((welch.pvalue, between.low, between.high))
    assert pair.seed_share == 1


def test_the_interval_is_that_of_the_two_way_analysis_of_variance() -> None:
    rng = np.random.default_rng(6)
    s, n = 4, 30
    y = rng.normal(size=n) + 2 * rng.normal(size=(s, 1)) + rng.normal(size=(s, n))
    rows, columns, grand = y.mean(axis=1), y.mean(axis=0), y.mean()
    ms_seeds = n * ((rows - grand) ** 2).sum() / (s - 1)
    ms_examples = s * ((columns - grand) ** 2).sum() / (n - 1)
    ms_rest = ((y - rows[:, None] - columns + grand) ** 2).sum() / ((s - 1) * (n - 1))
    assert ms_seeds > ms_rest
    total = ms_seeds + ms_examples - ms_rest
    squares = ms_seeds**2 / (s - 1) + ms_examples**2 / (n - 1) + ms_rest**2 / ((s - 1) * (n - 1))
    half = scipy_stats.t.ppf(0.975, total**2 / squares) * math.sqrt(total / (s * n))
    found = interval(None, y, "loss")
    assert (found.low, found.high) == pytest.approx((grand - half, grand + half))


@pytest.mark.parametrize("metric", [*CLASS_METRICS, "spearman"])
def test_one_model_agrees_with_the_bootstrap(metric: str) -> None:
    n = 600
    labels, predictions = drawn(metric, 7, 2, n)
    a, b = predictions

    def score(index: np.ndarray, answer: np.ndarray) -> float:
        return float(influence(labels[index], answer[index], metric)[0][0])

    def error(statistic: Callable[[np.ndarray], float]) -> float:
        rows = (np.arange(n),)
        drawn = scipy_stats.bootstrap(rows, statistic, vectorized=False, n_resamples=500, method="basic", rng=0)
        return drawn.standard_error

    found, pair = interval(labels, a, metric), paired(labels, a, b, metric)
    assert found.high - found.low == pytest.approx(3.92 * error(lambda i: score(i, a)), rel=0.1)
    assert pair.high - pair.low == pytest.approx(3.92 * error(lambda i: score(i, a) - score(i, b)), rel=0.1)


def test_mcnemar_is_the_exact_binomial() -> None:
    labels = np.zeros(40, dtype=int)
    a, b = np.zeros(40, dtype=int), np.zeros(40, dtype=int)
    a[:9], b[8:10] = 1, 1
    found = mcnemar(labels, a, b)
    tail = sum(math.comb(9, k) for k in range(2)) / 2**9
    assert (found.only_a, found.only_b, found.p) == (1, 8, pytest.approx(2 * tail))
    assert mcnemar(labels, a, a).p == 1
    with pytest.raises(BadData, match="single models"):
        mcnemar(labels, np.stack([a, b]), b)


@pytest.mark.parametrize("only_b", range(1, 13))
def test_few_differing_answers_are_judged_as_by_the_exact_test(only_b: int) -> None:
    labels = np.zeros(200, dtype=int)
    a = np.zeros(200, dtype=int)
    a[:only_b] = 1
    exact = mcnemar(labels, a, labels).p
    p = paired(labels, a, labels, "accuracy").p
    assert (p < 0.05) == (exact < 0.05)
    assert p > exact / 3


def test_sign_flip_tries_every_sign() -> None:
    d = np.array([0.5, -0.1, 0.4, 0.3, 0.2, 0.0, 0.35])
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    expected = (np.abs((signs * d).mean(axis=1)) >= abs(d.mean()) - 1e-12).mean()
    assert sign_flip(d) == pytest.approx(expected)
    assert sign_flip([0.1, 0.2, 0.3]) == pytest.approx(0.25)
    assert sign_flip([0.0, 0.0]) == 1
    assert sign_flip([0.2]) == 1
    many = np.random.default_rng(8).normal(0.1, 1, 100)
    assert sign_flip(many, draws=1999) == pytest.approx(scipy_stats.ttest_1samp(many, 0).pvalue, abs=0.02)
    assert sign_flip(many, draws=500) == sign_flip(many, draws=500)
    with pytest.raises(NotFinite):
        sign_flip([0.1, float("nan")])


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]).shape == (0,)
    with pytest.raises(BadData):
        holm([0.5, 1.5])


CASES = st.tuples(
    st.sampled_from([*CLASS_METRICS, "spearman"]), st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4)
)


@settings(deadline=None, max_examples=60)
@given(CASES)
def test_pairs_are_antisymmetric_and_know_no_order(case: tuple[str, int, int, int]) -> None:
    metric, seed, seeds_a, seeds_b = case
    labels, predictions = drawn(metric, seed, seeds_a + seeds_b, 40)
    a, b = predictions[:seeds_a], predictions[seeds_a:]
    pair, back = paired(labels, a, b, metric), paired(labels, b, a, metric)
    turned = (-pair.difference, -pair.high, -pair.low, pair.p)
    # The reach is found once for each order, so the last bit may differ.
    assert (back.difference, back.low, back.high, back.p) == pytest.approx(turned, rel=1e-12, abs=1e-15)
    assert back.test == pair.test
    rng = np.random.default_rng(seed)
    order = rng.permutation(40)
    mixed = paired(labels[order], rng.permutation(a)[:, order], rng.permutation(b)[:, order], metric)
    assert (mixed.difference, mixed.low, mixed.p) == pytest.approx((pair.difference, pair.low, pair.p), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(CASES, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_and_p_say_the_same(case: tuple[str, int, int, int], level: float) -> None:
    metric, seed, seeds_a, seeds_b = case
    labels, predictions = drawn(metric, seed, seeds_a + seeds_b, 40)
    pair = paired(labels, predictions[:seeds_a], predictions[seeds_a:], metric, level=level)
    assert pair.low <= pair.difference <= pair.high
    assert 0 <= pair.p <= 1
    assert (pair.p < 1 - level) == (pair.low > 0 or pair.high < 0)
    one = interval(labels, predictions[:seeds_a], metric, level=level)
    assert (0 if metric in ("accuracy", "macro-f1") else -1) <= one.low <= one.mean <= one.high <= 1
    wider = interval(labels, predictions[:seeds_a], metric, level=0.999)
    assert wider.low <= one.low and one.high <= wider.high


@settings(deadline=None, max_examples=30)
@given(CASES)
def test_identical_answers_differ_by_nothing(case: tuple[str, int, int, int]) -> None:
    metric, seed, seeds, _ = case
    labels, predictions = drawn(metric, seed, seeds, 30)
    pair = paired(labels, predictions, predictions.copy(), metric)
    assert (pair.difference, pair.low, pair.high, pair.p) == (0, 0, 0, 1)
    assert examples_needed(labels, predictions, predictions, metric)["limited_by"] == "no difference"


@pytest.mark.parametrize("metric", ["matthews", "spearman"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_other_answers_without_variance_are_not_taken_for_identical_ones(metric: str, seeds: int) -> None:
    labels, one = np.arange(60) % 3, np.zeros((seeds, 60), int)
    pair, needed = paired(labels, one, one + 1, metric), examples_needed(labels, one, one + 1, metric, difference=0.01)
    assert (pair.difference, pair.low, pair.high, pair.p) == (0, -2, 2, 1) and "nothing is known" in pair.note
    assert needed["limited_by"] == "no noise" and needed["examples"] is None and needed["sentence"] == pair.note


def test_arms_that_err_differently_on_the_same_examples_may_differ_by_a_hit() -> None:
    labels, wrong = np.zeros(200, int), np.arange(200) < 50
    pair = paired(labels, 1 * wrong, 2 * wrong, "accuracy")
    reach = scipy_stats.t.ppf(0.975, 199) * math.sqrt(2) / 200  # of one more hit of either (Bonett and Price)
    assert (pair.low, pair.high, pair.p) == pytest.approx((-reach, reach, 1))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_only_raises_p_and_keeps_their_order(raw: list[float]) -> None:
    adjusted = holm(raw)
    assert (adjusted >= np.array(raw)).all() and (adjusted <= 1).all()
    for (p, q), (x, y) in zip(itertools.combinations(raw, 2), itertools.combinations(adjusted, 2), strict=True):
        assert p >= q or x <= y
    np.testing.assert_array_equal(holm(raw[::-1]), adjusted[::-1])


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1"])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_an_arm_against_itself_is_seldom_rejected(calibration: ModuleType, metric: str, noise: float) -> None:
    model = calibration.Model(noise=noise)

    def p(rng: np.random.Generator) -> float:
        labels, a, b = model.draw(rng, 3, 400, metric)
        return paired(labels, a, b, metric).p

    assert calibration.rejection(p, 200) <= calibration.LIMIT


def shared_draws(rng: np.random.Generator, gap: float, seeds: int = 8, examples: int = 300) -> list[np.ndarray]:
    """Losses [S, N] of two arms whose seeds share a large offset, as those of one draw of labelled rows do."""
    offset_S1 = rng.normal(0, 0.5, (seeds, 1))
    easy_N = rng.normal(0, 1, examples)
    own = [offset_S1 + easy_N + rng.normal(0, 0.05, (seeds, 1)) + rng.normal(0, 0.3, (seeds, examples)) for _ in "ab"]
    return [own[0] + gap, own[1]]


def test_noise_that_both_arms_share_seed_by_seed_drops_out() -> None:
    rng = np.random.default_rng(3)
    a, b = shared_draws(rng, 0.1)
    apart, beside = paired(None, a, b, "loss"), paired(None, a, b, "loss", together=True)
    assert apart.difference == beside.difference and apart.p > 0.05 > beside.p
    assert beside.high - beside.low < 0.3 * (apart.high - apart.low) and "within seeds" in beside.test
    needed = examples_needed(None, a, b, "loss", difference=0.02, together=True)
    assert needed["limited_by"] != "nothing" and examples_needed(None, a, b, "loss", difference=0.02) != needed
    with pytest.raises(UsageError, match="share no noise"):
        paired(None, a, b[:5], "loss", together=True)


def test_arms_that_share_their_seeds_noise_are_seldom_told_apart_without_cause(calibration: ModuleType) -> None:
    def p(rng: np.random.Generator) -> float:
        return paired(None, *shared_draws(rng, 0.0), "loss", together=True).p

    assert calibration.rejection(p, 400) <= calibration.LIMIT


def test_a_test_that_forgets_the_seeds_would_be_caught(calibration: ModuleType) -> None:
    model = calibration.Model(noise=0.3)

    def p(rng: np.random.Generator) -> float:
        labels, a, b = model.draw(rng, 3, 400, "accuracy")
        hits = (a == labels).mean(axis=0) - (b == labels).mean(axis=0)
        return float(scipy_stats.ttest_1samp(hits, 0).pvalue)

    assert calibration.rejection(p, 200) > 3 * calibration.LIMIT


def test_three_points_are_usually_seen_where_seeds_agree(calibration: ModuleType) -> None:
    model = calibration.Model(noise=0.03, own=0.06, gap=0.03)

    def p(n: int, rng: np.random.Generator) -> float:
        labels, a, b = model.draw(rng, 3, n, "accuracy")
        return paired(labels, a, b, "accuracy").p

    assert calibration.rejection(lambda rng: p(500, rng), 100) > 0.5
    assert calibration.rejection(lambda rng: p(1821, rng), 100) > 0.9


@pytest.mark.parametrize("metric", ["accuracy", "spearman"])
def test_the_interval_covers_the_score_on_endless_examples_and_seeds(calibration: ModuleType, metric: str) -> None:
    model = calibration.Model(noise=0.2)
    labels, a, _ = model.draw(np.random.default_rng(0), 60, 5_000, metric)
    truth = interval(labels, a, metric).mean
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        labels, a, _ = model.draw(rng, 3, 400, metric)
        found = interval(labels, a, metric)
        inside += found.low <= truth <= found.high
    assert inside / 200 >= 0.91


def test_the_examples_needed_are_what_it_takes(calibration: ModuleType) -> None:
    model = calibration.Model(noise=0.0, own=0.06, gap=0.03)
    rng = np.random.default_rng(0)
    told = [
        examples_needed(labels, a, b, "accuracy", difference=0.03)["examples"]
        for labels, a, b in (model.draw(rng, 3, 300, "accuracy") for _ in range(15))
    ]
    enough = 300 + int(np.median([n for n in told if n is not None]))

    def p(n: int, rng: np.random.Generator) -> float:
        labels, a, b = model.draw(rng, 3, n, "accuracy")
        return paired(labels, a, b, "accuracy").p

    assert 0.65 <= calibration.rejection(lambda rng: p(enough, rng), 150) <= 0.95
    assert calibration.rejection(lambda rng: p(300, rng), 100) < 0.65


def test_more_examples_do_not_help_where_seeds_dominate() -> None:
    rng = np.random.default_rng(9)
    a, b = (mean + rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.001, (3, 200)) for mean in (1.0, 1.05))
    needed = examples_needed(None, a, b, "loss", difference=0.05)
    assert (needed["examples"], needed["limited_by"]) == (None, "seeds")
    assert 1 <= needed["seeds"] <= 60
    assert "noise between seeds dominates" in needed["sentence"]


def test_one_seed_asks_for_examples_only_and_a_smaller_difference_for_more_of_them() -> None:
    labels, predictions = answers(10, 2, 300)
    ask = partial(examples_needed, labels, predictions[0], predictions[1], "accuracy")
    small, large = ask(difference=0.01), ask(difference=0.03)
    assert small["seeds"] is None and small["examples"] > large["examples"] > 0
    assert small["examples"] > 5 * large["examples"]  # about with the square
    assert ask(difference=0.01, power=0.95)["examples"] > small["examples"]
    assert ask(difference=0.01, level=0.99)["examples"] > small["examples"]
    assert ask(difference=0.5)["limited_by"] == "nothing"
    assert f"{small['examples']:,} more test examples would be needed" in small["sentence"]
    assert json.loads(json.dumps(small)) == small


def test_an_arm_with_one_seed_is_taken_to_be_as_noisy_as_the_other() -> None:
    rng = np.random.default_rng(11)
    many = np.tile(rng.normal(1, 0.1, (4, 1)), 50)
    pair = paired(None, np.full((1, 50), 1.1), many, "loss")
    spread = many[:, 0].var(ddof=1)
    half = scipy_stats.t.ppf(0.975, 3) * math.sqrt(spread * (1 + 1 / 4))
    assert pair.high - pair.difference == pytest.approx(half)
    assert "as noisy" in pair.note


@pytest.mark.parametrize(
    ("labels", "predictions", "metric", "error", "words"),
    [
        (np.zeros(MINIMUM_EXAMPLES - 1, int), np.zeros((3, MINIMUM_EXAMPLES - 1), int), "accuracy", BadData, "too few"),
        (np.zeros(0, int), np.zeros((3, 0), int), "accuracy", BadData, "too few"),
        (np.zeros(30, int), np.zeros((3, 31), int), "accuracy", BadData, "do not fit"),
        (np.zeros(30, int), np.zeros((0, 30), int), "accuracy", BadData, "at least one seed"),
        (np.zeros(30, int), np.zeros((2, 2, 30), int), "accuracy", BadData, "expected"),
        (np.zeros(30), np.full((1, 30), np.nan), "spearman", NotFinite, "NaN"),
        (np.zeros(30, int), np.zeros((3, 30), int), "acuracy", UnknownName, "did you mean accuracy"),
        (None, np.zeros((3, 30), int), "accuracy", UsageError, "needs labels"),
    ],
)
def test_bad_input_is_refused(
    labels: np.ndarray, predictions: np.ndarray, metric: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        interval(labels, predictions, metric)
    with pytest.raises(error, match=words):
        paired(labels, predictions, predictions, metric)


def test_weights_levels_and_unlike_arms_are_refused() -> None:
    labels, a = answers(12, 3, 40)
    with pytest.raises(UsageError, match="weights belong"):
        interval(labels, a, "accuracy", weights=np.ones(40))
    with pytest.raises(BadData, match="not all 0"):
        interval(None, a, "loss", weights=np.zeros(40))
    with pytest.raises(UsageError, match="level"):
        interval(labels, a, "accuracy", level=95)
    with pytest.raises(BadData, match="do not fit"):
        paired(labels, a, a[:, :-1], "accuracy")
    with pytest.raises(UsageError, match="power"):
        examples_needed(labels, a, a, "accuracy", power=1)


@pytest.mark.parametrize("metric", [*CLASS_METRICS, "spearman"])
def test_one_class_or_one_answer_gives_a_score_and_an_interval(metric: str) -> None:
    same, other = np.zeros(30, int), np.arange(30) % 2
    for labels, guess in ((same, same), (other, same), (same, other)):
        found = interval(labels, np.stack([guess] * 3), metric)
        assert math.isfinite(found.low) and found.low <= found.mean <= found.high
        assert math.isfinite(paired(labels, guess, 1 - guess, metric).p)


def test_the_benchmark_reads_runs_and_tells_good_from_bad(
    calibration: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, a, b = calibration.Model(noise=0.6).draw(np.random.default_rng(0), 4, 300, "accuracy")
    for name, arm in (("lora", a), ("lora-2", b)):
        (tmp_path / name).mkdir()
        for k, row in enumerate(arm):
            table = pa.table({"index": np.arange(300), "label": labels, "prediction": row})
            pq.write_table(table, tmp_path / name / f"seed{k}.parquet")
    folders = [str(tmp_path / "lora"), str(tmp_path / "lora-2")]
    assert calibration.main([*folders, "--repeats", "60"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rejection_rate"] <= told["limit"] and told["repeats"] == 60
    assert (told["seeds_per_side"], told["seeds_in_pool"], told["examples_per_repeat"]) == (3, 8, 150)
    assert calibration.main([*folders, "--repeats", "60", "--seeds", "1"]) == 3  # a seed alone is no method
    assert calibration.main([str(tmp_path / "nowhere")]) == 2
    table = pa.table({"index": np.arange(300), "label": labels[::-1], "prediction": a[0]})
    pq.write_table(table, tmp_path / "lora" / "seed9.parquet")
    assert calibration.main(folders) == 2
    assert "other examples or labels" in capsys.readouterr().err
