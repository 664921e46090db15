"""PUDF: the item response fit, the ability schedule, the crowd that never sees what it answers, and exact resume."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import documents, text_data, write_data
from crowded import responses, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import log_expit
from scipy.stats import rankdata

from brickyard.checks import pudf as checks
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.build import resolve
from brickyard.core.chosen import curriculum_of
from brickyard.core.curriculum import Curriculum
from brickyard.core.errors import BadData, Changed, NotFinite, Refused, UsageError
from brickyard.core.loop import train
from brickyard.core.method import Claim
from brickyard.core.trial import prepare
from brickyard.data import _students, curriculum, pudf
from brickyard.data._responses import Responses, write_jsonl


def simulated(students: int, items: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    g = np.random.Generator(np.random.PCG64(seed))
    theta_J, b_I = np.linspace(-2, 2, students), g.standard_normal(items)
    return g.random((students, items)) < 1 / (1 + np.exp(b_I - theta_J[:, None])), theta_J, b_I


def test_the_fit_is_the_joint_mode_that_a_general_optimiser_finds() -> None:
    right_JI, _, _ = simulated(9, 30, 3)
    r = np.where(right_JI, 1.0, -1.0)

    def negative_log_posterior(x: np.ndarray) -> float:
        theta_J, b_I = x[:9], x[9:]
        return (x**2).sum() / 2 - log_expit(r * (theta_J[:, None] - b_I)).sum()

    found = minimize(negative_log_posterior, np.zeros(39), method="BFGS", options={"gtol": 1e-7}).x
    b_I, theta_J = pudf.fit_irt(right_JI)
    np.testing.assert_allclose(theta_J, found[:9], atol=1e-4)
    np.testing.assert_allclose(b_I, found[9:], atol=1e-4)


def test_simulated_difficulties_and_abilities_are_recovered() -> None:
    for seed in range(3):
        right_JI, theta_J, b_I = simulated(20, 1000, seed)
        found_I, found_J = pudf.fit_irt(right_JI)
        assert np.corrcoef(rankdata(found_I), rankdata(b_I))[0, 1] >= 0.85
        assert np.corrcoef(found_J, theta_J)[0, 1] >= 0.99


@given(st.integers(5, 12), st.integers(2, 30), st.integers(0, 10**6))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_equal_totals_are_equal_to_the_bit_and_fewer_right_answers_are_harder(j: int, i: int, seed: int) -> None:
    right_JI = np.random.Generator(np.random.PCG64(seed)).random((j, i)) < 0.6
    right_JI[0, :2] = True, False  # not all alike
    b_I, theta_J = pudf.fit_irt(right_JI)
    for values, totals, sign in ((b_I, right_JI.sum(0), -1), (theta_J, right_JI.sum(1), 1)):
        for total in set(totals.tolist()):
            assert len(set(values[totals == total].tolist())) == 1
        ordered = values[np.argsort(sign * totals, kind="stable")]
        assert (np.diff(ordered)[np.diff(np.sort(sign * totals)) > 0] > 0).all()
    order = np.random.Generator(np.random.PCG64(seed + 1)).permutation(i)
    np.testing.assert_array_equal(pudf.fit_irt(right_JI[:, order])[0], b_I[order])


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=60), st.integers(0, 2**31))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_ability_is_what_nelder_mead_finds_on_the_other_form_of_the_posterior(b: list[float], seed: int) -> None:
    b_I = np.array(b)
    right_I = np.random.Generator(np.random.PCG64(seed)).random(len(b)) < 0.5
    r_I = np.where(right_I, 1.0, -1.0)

    def negative(x: np.ndarray) -> float:  # log sigmoid(r z) = log1p((2 p - 1) r) - log 2
        return x[0] ** 2 / 2 - np.log1p((2 / (1 + np.exp(b_I - x[0])) - 1) * r_I).sum()

    found = minimize(negative, [0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).x[0]
    assert pudf.ability(b_I, right_I) == pytest.approx(found, abs=1e-4)


def test_ability_grows_with_every_right_answer_and_stays_finite_at_both_ends() -> None:
    b_I = np.random.Generator(np.random.PCG64(0)).standard_normal(50)
    found = [pudf.ability(b_I, np.arange(50) < right) for right in range(51)]
    assert (np.diff(found) > 0).all() and np.isfinite(found).all()


@pytest.mark.parametrize("b", [5.0, -5.0, 30.0, 0.0])
@pytest.mark.parametrize("right", [0, 1, 999, 1000])
def test_far_from_the_items_newton_does_not_run_away(b: float, right: int) -> None:
    x = pudf.ability(np.full(1000, b), np.arange(1000) < right)
    assert 1000 / (1 + math.exp(b - x)) + x == pytest.approx(right, abs=1e-6)


def test_ten_million_answers_settle_within_what_their_sum_is_rounded_by() -> None:
    total, count = np.array([1e7]), np.array([1e7])
    x = pudf.modes(total, np.array([-8.0]), count)[0]
    assert 1e7 / (1 + math.exp(-8 - x)) + x == pytest.approx(1e7, abs=1e-3)


def test_without_a_prior_ability_moves_with_the_items_and_needs_a_wrong_and_a_right_answer() -> None:
    b_I = np.random.Generator(np.random.PCG64(1)).standard_normal(40)
    right_I = np.arange(40) % 3 > 0
    alone = pudf.ability(b_I, right_I, precision=0.0)
    assert pudf.ability(b_I + 7.5, right_I, precision=0.0) == pytest.approx(alone + 7.5, abs=1e-8)
    assert pudf.ability(b_I + 1.0, right_I) < alone + 1.0, "the prior pulls it back"
    with pytest.raises(UsageError, match="without a prior"):
        pudf.ability(b_I, np.ones(40, dtype=bool), precision=0.0)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (np.ones((4, 9)), "4 students answered; at least 5"),
        (np.ones((6, 9)), "every answer of every student is right"),
        (np.zeros((6, 9)), "every answer of every student is wrong"),
        (np.full((6, 9), np.nan), r"missing \(NaN\)"),
        (np.full((6, 9), 2), "neither 0"),
        (np.ones(9), "the shape"),
        (np.ones((6, 0)), "the shape"),
    ],
)
def test_responses_that_no_fit_can_use_are_refused(responses: np.ndarray, message: str) -> None:
    with pytest.raises(BadData, match=message):
        pudf.fit_irt(responses)


def test_an_ability_without_sound_difficulties_is_refused() -> None:
    with pytest.raises(NotFinite, match="item 1"):
        pudf.ability(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(BadData, match="one each"):
        pudf.ability(np.zeros(3), np.ones(2, dtype=bool))
    with pytest.raises(BadData, match="one each"):
        pudf.ability(np.zeros(0), np.zeros(0, dtype=bool))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.floats(0.01, 1))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_capacity_never_falls_and_never_stalls(abilities: list[float], increment: float) -> None:
    capacity = None
    for theta in abilities:
        after = pudf.advance(capacity, theta, increment)
        assert after >= theta and (capacity is None or after > capacity)
        assert after == theta or after == capacity + increment  # type: ignore[operator]
        capacity = after


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(-4, 4), st.floats(0, 3), st.data())
@settings(derandomize=True, deadline=None, max_examples=80)
def test_more_capacity_selects_more_rows_and_never_fewer_than_the_least(
    b: list[int], capacity: float, more: float, data: st.DataObject
) -> None:
    b_N = np.array(b, dtype=float)
    least = data.draw(st.integers(1, len(b)))
    rows = pudf.select(b_N, capacity, min_size=least)
    assert set(rows) <= set(pudf.select(b_N, capacity + more, min_size=least)) and len(rows) >= least
    assert (np.diff(rows) > 0).all()
    inside = set(np.flatnonzero(b_N <= capacity).tolist())
    assert set(rows.tolist()) == inside or (len(inside) < least == len(rows) and inside <= set(rows.tolist()))


def test_ties_fall_to_the_first_rows_and_bounds_are_relative_to_capacity() -> None:
    b_N = np.array([0.0, 1.0, 0.0, 2.0, 0.0])
    np.testing.assert_array_equal(pudf.select(b_N, -9.0, min_size=2), [0, 2])
    np.testing.assert_array_equal(pudf.select(b_N, 2.0, min_size=1, lower=-1.0), [1, 3])
    np.testing.assert_array_equal(pudf.select(b_N, 2.0, min_size=1, lower=-1.0, upper=-0.5), [1])
    with pytest.raises(UsageError, match="min_size=6 exceeds the 5 training rows"):
        pudf.select(b_N, 0.0, min_size=6)
    with pytest.raises(NotFinite, match="row 1"):
        pudf.select(np.array([0.0, np.nan]), 0.0, min_size=1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-3, 3)), min_size=1, max_size=40), st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_balance_takes_the_easiest_of_every_class_in_its_share(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    class_N, b_N = np.array([c for c, _ in rows]), np.array([b for _, b in rows], dtype=float)
    count = data.draw(st.integers(1, len(rows)))
    chosen = pudf.balanced(b_N, class_N, count)
    for c in set(class_N.tolist()):
        mine = np.flatnonzero(class_N == c)
        taken = np.intersect1d(mine, chosen)
        assert len(taken) == math.ceil(count * len(mine) / len(rows)) >= 1
        assert b_N[taken].max() <= min(b_N[np.setdiff1d(mine, taken)], default=np.inf)
    assert set(chosen) <= set(pudf.balanced(b_N, class_N, min(count + 1, len(rows))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "at least 1"),
        ({"items": 0}, "at least 1"),
        ({"folds": 1}, "folds=1"),
        ({"increment": 0.0}, "must be positive"),
        ({"lower": 0.5, "upper": 0.5}, "must be below"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pudf.Config(**options)


def test_the_root_schedule_runs_from_its_start_to_everything() -> None:
    assert curriculum.competence(0.0, 0.1) == pytest.approx(0.1) and curriculum.competence(1.0, 0.1) == 1.0
    assert curriculum.competence(0.5, 0.1) == pytest.approx(math.sqrt(0.505)) and curriculum.competence(3.0, 0.1) == 1.0
    np.testing.assert_array_equal(curriculum.easiest(np.array([3.0, 1.0, 2.0, 1.0]), 0.3, 1), [1, 3])
    np.testing.assert_array_equal(curriculum.easiest(np.array([3.0, 1.0, 2.0, 1.0]), 0.3, 3), [1, 2, 3])
    for options in ({"start": 0.0}, {"until": 1.5}, {"min_size": 0}, {"folds": 1}):
        with pytest.raises(UsageError, match="curriculum:"):
            curriculum.Config(**options)


class Interrupt(Exception):
    pass


class StopAfter:
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: object) -> None:
        if state.step + 1 == self.step:  # type: ignore[attr-defined]
            raise Interrupt


@pytest.mark.parametrize(
    ("piece", "stops"), [("pudf:min_size=20,balance=true", (3, 9, 22)), ("curriculum:by=random,start=0.2", (6, 13))]
)
def test_a_run_killed_within_a_curriculum_goes_on_to_the_same_bits(
    text_base: Path, tmp_path: Path, piece: str, stops: tuple[int, ...]
) -> None:
    asked = setting(text_base, f"full + {piece}")
    whole = trial.tune(prepare(asked), tmp_path / "whole")
    expected = trial.bricks.load(tmp_path / "whole" / "brick").tensors()
    assert len({entry["rows"] for entry in whole["curriculum"]["epochs"]}) > 1, "epochs of several sizes were run"
    for stop in stops:
        folder = tmp_path / str(stop)
        with pytest.raises(Interrupt):
            trial.tune(prepare(asked), folder, checkpoint_every=2, callbacks=[StopAfter(stop)])
        torch.manual_seed(1234)
        again = trial.tune(prepare(asked), folder, checkpoint_every=2)
        found = trial.bricks.load(folder / "brick").tensors()
        assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in found)
        assert whole["history"] == again["history"]
        assert whole["curriculum"]["epochs"] == again["curriculum"]["epochs"]


def test_a_resumed_run_refuses_other_difficulties(text_base: Path, tmp_path: Path) -> None:
    names = tuple(f"train-{i}" for i in range(96)) + tuple(f"validation-{i}" for i in range(40))
    arm = f"full + pudf:min_size=20,balance=true,responses='{tmp_path}/r.jsonl'"
    asked = setting(text_base, arm)
    write_jsonl(tmp_path / "r.jsonl", responses(names))
    with pytest.raises(Interrupt):
        trial.tune(prepare(asked), tmp_path / "run", checkpoint_every=2, callbacks=[StopAfter(5)])
    turned = Responses(responses().students, names, ~responses(names).right_JI)
    write_jsonl(tmp_path / "r.jsonl", turned)
    with pytest.raises(Changed, match="curriculum"):
        trial.tune(prepare(asked), tmp_path / "run", checkpoint_every=2)


def test_the_time_that_a_crowd_took_is_in_the_training_time(text_base: Path, tmp_path: Path) -> None:
    names = tuple(f"train-{i}" for i in range(96)) + tuple(f"validation-{i}" for i in range(40))
    made = responses(names)
    write_jsonl(tmp_path / "r.jsonl", Responses(made.students, names, made.right_JI, {"seconds": 5000.0}))
    asked = setting(text_base, f"linear-probe + pudf:min_size=48,balance=true,responses='{tmp_path}/r.jsonl'")
    cost = trial.tune(prepare(asked), tmp_path / "run")["cost"]
    assert 5000 < cost["curriculum_seconds"] < 5100 and cost["curriculum_seconds"] < cost["train_seconds"]


class Everything(Curriculum):
    def choose(self, state: object) -> tuple[np.ndarray, dict]:
        return np.arange(96), {}


def test_a_curriculum_of_all_rows_is_the_plain_run(text_base: Path) -> None:
    found = []
    for made in (None, Everything()):
        ready = prepare(setting(text_base, "full"))
        attached = trial.build(ready.plan, ready.base, ready.task, seed=0)
        args = (attached, ready.encoded["train"], None, ready.task, ready.training)
        train(*args, curriculum=made, device="cpu")
        found.append(attached.tensors())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert made.report(24, 16)["examples"] == 4 * 96 and made.report(21, 16)["examples"] == 3 * 96 + 48  # type: ignore[union-attr]


class Watch:
    """Keeps the rows and the learning rate of every step."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.factors: list[float] = []

    def before_step(self, state: object) -> None:
        self.rows.append(state.batch_rows)  # type: ignore[attr-defined]
        self.factors.append(state.training.factor(state.step, state.total))  # type: ignore[attr-defined]


def test_each_epoch_holds_what_the_ability_allows_and_the_budget_is_kept(text_base: Path, tmp_path: Path) -> None:
    watch = Watch()
    asked = setting(text_base, "full + pudf:min_size=12,balance=true", training={"epochs": 6})
    ready = prepare(asked)
    result = trial.tune(ready, tmp_path, callbacks=[watch])
    epochs = result["curriculum"]["epochs"]
    assert result["steps"] == 6 * 6 and len(epochs) > 6, "as many steps as without it, in more and smaller epochs"
    assert watch.factors[-1] == pytest.approx(1 / (36 - math.ceil(0.06 * 36))), "the schedule ends with the run"
    assert result["curriculum"]["examples"] == sum(len(rows) for rows in watch.rows)
    made = curriculum_of(ready, ready.encoded)
    assert isinstance(made, pudf.AbilitySchedule)
    capacity = None
    for entry, after in itertools.pairwise(epochs):
        seen = np.concatenate(watch.rows[entry["step"] : after["step"]])
        capacity = pudf.advance(capacity, entry["ability"], 0.1)
        assert capacity == entry["capacity"]
        chosen = pudf.select(made.difficulty_N, capacity, min_size=12)
        np.testing.assert_array_equal(np.sort(seen), pudf.balanced(made.difficulty_N, made.class_N, len(chosen)))
    assert epochs[0]["rows"] < 96 and epochs[0]["ability"] < epochs[-1]["ability"]
    cost = result["cost"]
    assert cost["train_seconds"] > cost["curriculum_seconds"] == result["curriculum"]["seconds"] > 0
    stored = json.loads((tmp_path / "brick" / "brick.json").read_text())["curriculum"]
    assert stored["epochs"] == epochs and len(stored["students"]) == len(_students.CROWD)


def test_ability_is_asked_of_held_out_rows_only(text_base: Path) -> None:
    ready = prepare(setting(text_base, "full + pudf:min_size=12,items=25", text_data(train=64)))
    made = curriculum_of(ready, ready.encoded)
    assert isinstance(made, pudf.AbilitySchedule) and len(made.held) == 25
    own = ready.encoded["validation"]
    assert made.held.whole is own and len(set(made.held.rows.tolist())) == 25
    batch = made.held.collate(np.array([3, 1]))
    assert torch.equal(batch["labels"], own.labels[torch.from_numpy(made.held.rows[[3, 1]])])


def test_a_class_that_is_absent_is_announced_and_balance_brings_it_back(text_base: Path) -> None:
    ready = prepare(setting(text_base, "full", text_data(train=40)))
    class_N = ready.encoded["train"].labels.numpy()
    difficulty_N = class_N * 2.0 - 1.0  # one class is the easy one
    model = trial.build(ready.plan, ready.base, ready.task, seed=0)
    state = SimpleNamespace(attached=model, task=ready.task, training=ready.training, step=0, total=9)
    args = (difficulty_N, class_N, ready.encoded["validation"], np.arange(40), np.zeros(40))
    plain = pudf.AbilitySchedule(pudf.Config(min_size=10, upper=-3.0), *args)
    with pytest.warns(UserWarning, match="holds no row of class 1.*balance=true"):
        plain._open(state)  # type: ignore[arg-type]
    assert set(class_N[plain.rows]) == {0} and plain.log[0]["absent_classes"] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain._open(state)  # type: ignore[arg-type]  # said once
    even = pudf.AbilitySchedule(pudf.Config(min_size=10, upper=-3.0, balance=True), *args)
    even._open(state)  # type: ignore[arg-type]
    assert np.bincount(class_N[even.rows]).tolist() == [5, 5]


def test_the_control_keeps_the_difficulties_and_loses_their_rows(text_base: Path) -> None:
    made = []
    for option in ("false", "true"):
        ready = prepare(setting(text_base, f"full + pudf:min_size=12,shuffled={option}", seed=3))
        made.append(curriculum_of(ready, ready.encoded))
    a, b = (m.difficulty_N for m in made)  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.sort(a), np.sort(b))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.35 and made[0].digest != made[1].digest  # type: ignore[union-attr]


def test_orders_by_length_loss_and_chance(text_base: Path) -> None:
    data = text_data(train=80)
    g = np.random.Generator(np.random.PCG64(0))
    data["train"]["text"] = [t if g.random() < 0.5 else f"{t} it is {i}" for i, t in enumerate(data["train"]["text"])]
    wrong = np.arange(80) < 8
    flip = {"good": "bad", "bad": "good"}
    data["train"]["label"] = [flip[x] if w else x for x, w in zip(data["train"]["label"], wrong, strict=True)]
    found = {}
    for by in ("length", "loss", "random"):
        ready = prepare(setting(text_base, f"full + curriculum:by={by}", data))
        made = curriculum_of(ready, ready.encoded)
        assert isinstance(made, curriculum.CompetenceSchedule)
        found[by] = made
    np.testing.assert_array_equal(found["length"].difficulty_N, ready.encoded["train"].lengths)
    assert found["loss"].difficulty_N[wrong].mean() > 2 * found["loss"].difficulty_N[~wrong].mean()
    assert found["loss"].seconds > found["random"].seconds and np.isfinite(found["loss"].difficulty_N).all()


def test_what_does_not_fit_is_refused_with_its_reason(text_base: Path, causal_base: Path) -> None:
    def refused(arm: str, base: Path, data: object, **changes: object) -> None:
        ready = prepare(setting(base, arm, data, **changes), ("train", "validation"))
        curriculum_of(ready, ready.encoded)

    with pytest.raises(Refused, match="answers that are right or wrong"):
        refused("full + pudf", causal_base, documents(), task="causal-lm")
    with pytest.raises(Refused, match="this task is regression: item response"):
        refused("full + pudf", text_base, text_data(regression=True))
    with pytest.raises(Refused, match=r"by=loss scores rows by a classifier; this task is causal-lm"):
        refused("full + curriculum:by=loss", causal_base, documents(), task="causal-lm")
    with pytest.raises(Refused, match="by=length orders nothing"):
        refused("full + curriculum:by=length", causal_base, documents(), task="causal-lm")
    with pytest.raises(UsageError, match="min_size=1000 exceeds the 96 training rows"):
        refused("full + pudf", text_base, text_data())
    with pytest.raises(UsageError, match="min_size=97 exceeds the 96"):
        refused("full + curriculum:min_size=97", text_base, text_data())
    with pytest.raises(UsageError, match="folds=97"):
        refused("full + pudf:min_size=2,folds=97", text_base, text_data())
    data = text_data()
    data["validation"] = {k: v[:6] for k, v in data["validation"].items()}
    with pytest.raises(Refused, match="halves validation, which has 6 rows"):
        refused("full + pudf:min_size=2,crowd=held-out", text_base, data)
    with pytest.raises(Refused, match="trains nothing; pudf stands beside a tuner or a head"):
        resolve(parse("pudf"))
    with pytest.raises(Refused, match="curriculum and pudf are both a curriculum"):
        resolve(parse("full + curriculum + pudf"))


def test_a_probe_charges_the_crowd(text_base: Path) -> None:
    found = [trial.probe({"setting": setting(text_base, arm).__dict__}) for arm in ("full", "full + pudf:min_size=12")]
    assert found[0]["curriculum_seconds"] == 0.0 and found[1]["curriculum_seconds"] > 0.0


def test_the_checks_run_and_say_what_they_measured(text_base: Path, tmp_path: Path) -> None:
    shape = {"inequality", "holds", "measured", "low", "high", "detail", "control", "gate"}
    found = checks.recovery(Claim(text=""), items=300, repeats=3)
    assert shape <= found.keys() and found["control"]["destroyed"] is True and found["measured"] > 0.8
    folder = str(write_data(tmp_path / "data", text_data(train=300)))
    found = checks.noise(Claim(text="", data=folder), setting={"base": str(text_base), "device": "cpu"})
    assert shape <= found.keys() and found["holds"] is True and found["control"]["measured"] < 2
    data, wrong = checks.spoiled(folder)
    before = text_data(train=300)["train"]["label"]
    np.testing.assert_array_equal(wrong, [a != b for a, b in zip(before, data["train"]["label"], strict=True)])
    assert 0.1 < wrong.mean() < 0.2 and data["test"] == text_data()["test"]
