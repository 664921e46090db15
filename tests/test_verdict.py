"""The pairs and the recommendation: which arm, why, and what is said where little or nothing can be told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brickyard.compare.report import page
from brickyard.compare.verdict import pairs_table, verdict
from brickyard.core.errors import BadData, UnknownName, UsageError
from brickyard.core.stats import holm, interval, paired

N = 600
PRICE = {"majority": 0, "linear-probe": 400, "lora": 1_000, "mos": 1_200, "full": 25_000}


def arms(seeds: int = 3, **accuracy: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels [N] and answers of arms with the given accuracies, which mostly fail on the same hard examples."""
    rng = np.random.default_rng(0)
    labels, hard = rng.integers(0, 4, N), rng.random(N)
    made = {}
    for name, share in accuracy.items():
        wrong = hard + rng.normal(0, 0.04, N) + rng.normal(0, 0.02, (seeds, N)) > share
        made[name.replace("_", "-")] = np.where(wrong, (labels + 1) % 4, labels)
    return labels, made


def row(name: str, labels: np.ndarray, answers: np.ndarray, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    found = interval(labels, answers, metric)
    score = {"metric": metric, **{k: getattr(found, k) for k in ("mean", "low", "high", "per_seed")}}
    cost = {"trainable_parameters": PRICE.get(name, 5_000), "saved_for_backward_bytes": 40 * PRICE.get(name, 5_000)}
    return {"arm": name, "status": "done", "reason": "", "score": score, "cost": cost, "trivial": False, **more}


def judged(
    labels: np.ndarray, made: dict[str, np.ndarray], metric: str = "accuracy", trivial: tuple[str, ...] = ()
) -> dict[str, Any]:
    rows = [row(name, labels, a, metric, trivial=name in trivial) for name, a in made.items()]
    return verdict(rows, pairs_table(labels, made, metric), metric=metric)


def test_pairs_hold_every_pair_once_with_holms_correction() -> None:
    labels, made = arms(lora=0.9, mos=0.88, full=0.7)
    pairs = pairs_table(labels, made, "accuracy")
    assert [(p["a"], p["b"]) for p in pairs] == [("lora", "mos"), ("lora", "full"), ("mos", "full")]
    assert set(pairs[0]) >= {"a", "b", "difference", "low", "high", "p", "p_holm", "test"}
    np.testing.assert_allclose([p["p_holm"] for p in pairs], holm([p["p"] for p in pairs]))
    for p in pairs:
        alone = paired(labels, made[p["a"]], made[p["b"]], "accuracy")
        assert (p["difference"], p["low"], p["high"], p["p"]) == (alone.difference, alone.low, alone.high, alone.p)
        assert (p["needed"] is None) == (p["p_holm"] <= 0.05)


def test_a_part_of_the_rows_is_judged_like_data_of_its_own() -> None:
    labels, made = arms(lora=0.9, full=0.7)
    keep = np.arange(N) % 3 > 0
    part = pairs_table(labels[keep], {name: a[:, keep] for name, a in made.items()}, "accuracy")
    alone = paired(labels[keep], made["lora"][:, keep], made["full"][:, keep], "accuracy")
    assert (part[0]["difference"], part[0]["p"]) == (alone.difference, alone.p)
    with pytest.raises(BadData, match="too few"):
        pairs_table(labels[:9], {name: a[:, :9] for name, a in made.items()}, "accuracy")


def test_a_clear_winner_is_recommended_although_it_costs_more() -> None:
    labels, made = arms(full=0.92, lora=0.8)
    found = judged(labels, made)
    assert (found["recommended"], found["indistinguishable"]) == ("full", [])
    mean = interval(labels, made["full"], "accuracy").mean
    assert found["sentence"].startswith(f"full: {100 * mean:.1f} % accuracy (")
    assert "better than every other arm; the next is lora (difference +" in found["sentence"]
    assert len(found["reasons"]) == 1 and found["reasons"][0].startswith("lora against full: difference −")


def test_among_arms_that_cannot_be_told_apart_the_cheapest_is_recommended() -> None:
    labels, made = arms(full=0.9, lora=0.898, mos=0.899, linear_probe=0.6)
    found = judged(labels, made)
    best = max(made, key=lambda name: interval(labels, made[name], "accuracy").mean)
    assert best != "lora"  # otherwise this shows nothing
    assert found["recommended"] == "lora"
    assert sorted(found["indistinguishable"]) == ["full", "mos"]
    for words in (
        f"indistinguishable from {best} on your data (difference",
        "points, 95 % interval",
        "would be needed to tell",
        "% of its trainable parameters",
        "cheapest of the 3 arms",
        "by trainable parameters, then brick size",
    ):
        assert words in found["sentence"]
    assert "\u00a0" not in found["sentence"]


def test_a_cheap_arm_far_below_the_best_is_not_recommended_because_its_seeds_scatter() -> None:
    """With three noisy seeds no test can call 61 % worse than 87 %; that is no reason to take it."""
    count = 600
    labels = np.zeros(count, dtype=int)

    def hits(*shares: float) -> np.ndarray:
        return np.stack([(np.arange(count) >= round(share * count)).astype(int) for share in shares])

    answers = {"full": hits(0.90, 0.84, 0.88), "lora": hits(0.60, 0.75, 0.48), "mos": hits(0.88, 0.85, 0.875)}
    pairs = pairs_table(labels, answers, "accuracy")
    rows = [row(name, labels, answers[name]) for name in answers]
    found = verdict(rows, pairs)
    assert found["recommended"] == "mos" and sorted(found["indistinguishable"]) == ["full", "lora"]
    assert "cheapest of the 2 arms within two standard errors of the best score" in found["sentence"]
    without = verdict(rows[:2], pairs[:1])
    assert without["recommended"] == "full" and without["indistinguishable"] == ["lora"]
    assert "the best score, although not beyond chance. The next, lora, is indistinguishable" in without["sentence"]
    assert "scored lower by more than two standard errors" in without["sentence"]


def test_an_arm_that_lost_to_another_close_one_is_neither_recommended_nor_called_alike() -> None:
    """That cannot be told apart is not transitive: big's seeds scatter; small ties with it and loses to mid."""
    count = 600
    labels = np.zeros(count, dtype=int)

    def hits(*shares: float) -> np.ndarray:
        return np.stack([(np.arange(count) >= round(share * count)).astype(int) for share in shares])

    answers = {"big": hits(0.86, 0.97, 0.90), "mid": hits(0.895, 0.895, 0.895), "small": hits(0.87, 0.87, 0.87)}
    rows = [
        row(name, labels, answers[name], cost={"trainable_parameters": n})
        for name, n in (("big", 300), ("mid", 200), ("small", 100))
    ]
    pairs = pairs_table(labels, answers, "accuracy")
    found = verdict(rows, pairs)
    assert found["recommended"] == "mid" and found["indistinguishable"] == ["big"]
    assert "cheapest of the 2 arms" in found["sentence"]
    assert any(said.startswith("small against big") and "; mid is better than it" in said for said in found["reasons"])


def test_the_cost_that_decides_can_be_chosen() -> None:
    labels, made = arms(full=0.9, lora=0.9)
    rows = [row(name, labels, a) for name, a in made.items()]
    rows[0]["cost"]["train_seconds"], rows[1]["cost"]["train_seconds"] = 1.0, 2.0
    pairs = pairs_table(labels, made, "accuracy")
    assert verdict(rows, pairs)["recommended"] == "lora"
    assert verdict(rows, pairs, costs=("train_seconds",))["recommended"] == "full"
    with pytest.raises(UnknownName, match="did you mean train_seconds"):
        verdict(rows, pairs, costs=("train_second",))
    with pytest.raises(UsageError, match="no cost"):
        verdict(rows, pairs, costs=())


def test_an_unknown_cost_counts_as_the_highest_and_equal_ones_go_to_the_next() -> None:
    labels, made = arms(full=0.9, lora=0.9, mos=0.9)
    rows = [row(name, labels, a) for name, a in made.items()]
    rows[0]["cost"] = {}
    for method, saved in zip(rows[1:], (9, 8), strict=True):
        method["cost"] = {"trainable_parameters": 5, "saved_for_backward_bytes": saved}
    assert verdict(rows, pairs_table(labels, made, "accuracy"))["recommended"] == "mos"


def test_it_is_said_when_nothing_beats_a_trivial_baseline() -> None:
    labels, made = arms(lora=0.8, linear_probe=0.8, majority=0.3)
    found = judged(labels, made, trivial=("linear-probe", "majority"))
    assert found["recommended"] == "linear-probe"
    assert "No method here beats the trivial baseline linear-probe" in found["sentence"]
    assert "majority" not in found["sentence"]
    labels, made = arms(lora=0.9, linear_probe=0.8)
    assert "trivial" not in judged(labels, made, trivial=("linear-probe",))["sentence"]
    assert "Only trivial" in judged(labels, made, trivial=("linear-probe", "lora"))["sentence"]


def test_arms_that_learned_nothing_are_named() -> None:
    labels, made = arms(lora=0.9, linear_probe=0.8, full=0.3, mos=0.29, majority=0.3)
    found = judged(labels, made, trivial=("linear-probe", "majority"))
    assert found["recommended"] == "lora"
    assert "Nothing was learned by full, mos: not above majority." in found["sentence"]


def test_a_trivial_arm_that_is_best_but_dear_still_shames_the_others() -> None:
    labels, made = arms(full=0.9, lora=0.7)
    found = judged(labels, made, trivial=("full",))
    assert found["recommended"] == "full"
    assert "No method here beats the trivial baseline full." in found["sentence"]


def test_it_is_said_when_nothing_is_above_chance() -> None:
    labels, made = arms(lora=0.5, full=0.52)
    rows = [row(name, labels, answers) for name, answers in made.items()]
    pairs = pairs_table(labels, made, "accuracy")
    assert "No method here is surely above chance, 50.0 %." in verdict(rows, pairs, chance=0.5)["sentence"]
    assert "chance" not in verdict(rows, pairs)["sentence"] + verdict(rows, pairs, chance=0.3)["sentence"]


@pytest.mark.parametrize(("seeds", "words"), [(1, "With one seed"), (2, "With two seeds"), (3, None)])
def test_few_seeds_are_named(seeds: int, words: str | None) -> None:
    labels, made = arms(seeds, lora=0.9, full=0.9)
    sentence = judged(labels, made)["sentence"]
    assert (words in sentence) if words else ("With " not in sentence)


def test_arms_cut_short_by_the_minutes_are_named() -> None:
    labels, made = arms(lora=0.9, full=0.9)
    pairs = pairs_table(labels, made, "accuracy")
    rows = [row(name, labels, answers) for name, answers in made.items()]
    assert "cut the training short" not in verdict(rows, pairs)["sentence"]
    rows[0]["trained_share"] = 0.31
    assert "cut the training short: lora for 31 % of its full length" in verdict(rows, pairs)["sentence"]


def test_identical_arms_are_called_identical() -> None:
    labels, made = arms(lora=0.9)
    found = judged(labels, {"lora": made["lora"], "full": made["lora"].copy()})
    assert (found["recommended"], found["indistinguishable"]) == ("lora", ["full"])
    assert "(identical answers)" in found["sentence"]


def test_a_difference_that_only_the_correction_hides_is_explained() -> None:
    labels, made = arms(full=0.9, lora=0.9)
    rows = [row(name, labels, a) for name, a in made.items()]
    pair = {
        "a": "lora",
        "b": "full",
        "difference": -0.02,
        "low": -0.038,
        "high": -0.002,
        "p": 0.03,
        "p_holm": 0.09,
        "test": "t",
        "needed": None,
    }
    rows[1]["score"]["mean"] = rows[0]["score"]["mean"] - 0.02
    sentence = verdict(rows, [pair])["sentence"]
    assert "difference −2.0 points, 95 % interval −3.8 to −0.2, but p = 0.090 after Holm's correction" in sentence


def test_one_none_or_no_finished_arm() -> None:
    labels, made = arms(lora=0.9)
    lost = {"arm": "rigl", "status": "timeout", "reason": "stopped after 600 s"}
    alone = verdict([row("lora", labels, made["lora"]), lost], [])
    assert (alone["recommended"], alone["reasons"]) == ("lora", ["rigl: timeout: stopped after 600 s"])
    assert "the only arm that finished" in alone["sentence"]
    none = verdict([lost, {"arm": "full", "status": "out-of-memory", "reason": None}], [])
    assert none["recommended"] is None and none["indistinguishable"] == []
    assert none["sentence"] == "No arm finished (1 out-of-memory, 1 timeout), so there is nothing to recommend."
    assert none["reasons"][1] == "full: out-of-memory: no reason was given"
    assert "No arm was given" in verdict([], [])["sentence"]
    assert pairs_table(labels, made, "accuracy") == [] and pairs_table(labels, {}, "accuracy") == []


def test_arms_that_were_not_compared_are_not_called_worse() -> None:
    labels, made = arms(lora=0.9, full=0.5)
    found = verdict([row(name, labels, a) for name, a in made.items()], [])
    assert found["indistinguishable"] == ["full"]
    assert "not compared" in found["reasons"][0]


def test_other_metrics_are_written_in_their_own_units() -> None:
    labels, made = arms(full=0.9, lora=0.6)
    assert judged(labels, made, "macro-f1")["sentence"].startswith("full: 91.7 % macro F1 (")
    sentence = judged(labels, made, "matthews")["sentence"]
    assert sentence.startswith("full: Matthews correlation 0.8") and "points" not in sentence


def test_the_lowest_loss_wins() -> None:
    rng = np.random.default_rng(1)
    losses = {"lora": rng.gamma(2, 1, (3, 80)), "full": 9 + rng.gamma(2, 1, (3, 80))}
    rows = [
        {"arm": name, "status": "done", "score": {"mean": a.mean(), "per_seed": list(a.mean(axis=1))}, "cost": {}}
        for name, a in losses.items()
    ]
    pairs = [{"a": "lora", "b": "full", "p_holm": 0.0, **_bounds(paired(None, losses["lora"], losses["full"], "loss"))}]
    found = verdict(rows, pairs, metric="loss")
    assert (found["recommended"], found["indistinguishable"]) == ("lora", [])


def _bounds(pair: Any) -> dict[str, Any]:
    return {"difference": pair.difference, "low": pair.low, "high": pair.high, "p": pair.p, "test": pair.test}


@settings(deadline=None, max_examples=40)
@given(
    st.permutations(["full", "lora", "mos", "linear-probe"]),
    st.sampled_from([(0.9, 0.9, 0.89, 0.7), (0.9, 0.8, 0.8, 0.8)]),
)
def test_the_order_in_which_arms_are_given_changes_nothing(order: list[str], accuracies: tuple[float, ...]) -> None:
    labels, made = arms(**dict(zip(("full", "lora", "mos", "linear_probe"), accuracies, strict=True)))
    found = judged(labels, {name: made[name] for name in order})
    expected = judged(labels, made)
    assert found["recommended"] == expected["recommended"]
    assert found["indistinguishable"] == expected["indistinguishable"]
    assert found["recommended"] not in found["indistinguishable"]


def test_names_from_outside_cannot_play_tricks_and_the_report_takes_the_result() -> None:
    labels, made = arms(lora=0.9, full=0.9)
    strange = {"lora\u202e": made["lora"], "full": made["full"]}
    found = judged(labels, strange)
    assert "\u202e" not in found["sentence"] and found["recommended"] in strange
    result = {
        "methods": [row(name, labels, a) for name, a in strange.items()],
        "verdict": found,
        "pairs": pairs_table(labels, strange, "accuracy"),
        "task": {"metric": "accuracy"},
    }
    assert "indistinguishable" in page(result)
