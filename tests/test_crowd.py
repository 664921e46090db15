"""The artificial crowd: nobody answers what he was fitted on, the bill is full, responses travel as py-irt's JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import text_data
from crowded import responses, setting
from hypothesis import given, settings
from hypothesis import strategies as st

from brickyard.core import trial
from brickyard.core.errors import BadData
from brickyard.core.trial import prepare
from brickyard.data import _crowd, _students, pudf
from brickyard.data._crowd import Design, Material
from brickyard.data._responses import Responses, read_jsonl, write_jsonl

CPU = torch.device("cpu")


@given(st.integers(6, 60), st.integers(10, 30), st.integers(2, 5), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_every_row_is_asked_once_and_nobody_is_asked_what_he_saw(n: int, v: int, folds: int, seed: int) -> None:
    design = Design.cross_fit(n, v, folds, seed)
    np.testing.assert_array_equal(design.asked, np.arange(n + v))
    for fit, asked in design.parts:
        assert not set(fit) & set(asked) and len(set(fit)) == len(fit) and max(fit) < n
    held = Design.held_out(n, v, seed)
    ((fit, asked),) = held.parts
    assert (
        min(fit) >= n
        and len(fit) == v // 2
        and set(fit) | set(asked) == set(range(n + v))
        and not set(fit) & set(asked)
    )


def random_labels(n: int = 240) -> dict[str, dict[str, list]]:
    """Labels that nothing in the text can tell."""
    data = text_data(train=n)
    g = np.random.Generator(np.random.PCG64(5))
    for split in data.values():
        split["label"] = [("bad", "good")[int(x)] for x in g.integers(0, 2, len(split["label"]))]
    return data


@pytest.mark.parametrize("held_out", [False, True])
def test_a_crowd_can_guess_labels_no_better_than_chance_where_only_memory_could(
    text_base: Path, held_out: bool
) -> None:
    """A student that had seen an item would know its label: the nearest neighbour of a row is the row itself."""
    ready = prepare(setting(text_base, "linear-probe", random_labels(), cache=False))
    found = _crowd.ask_crowd(ready, ready.encoded, CPU, held_out=held_out, folds=3)
    rows = len(found.items)
    assert rows == 240 + (20 if held_out else 40)
    for student, right_I in zip(found.students, found.right_JI, strict=True):
        assert abs(right_I.mean() - 0.5) < 4 * 0.5 / rows**0.5, student["name"]
    assert {s["kind"] for s in found.students} == {"logistic", "knn", "mlp"}


def test_students_learn_what_can_be_learned_and_stronger_ones_more(text_base: Path) -> None:
    ready = prepare(setting(text_base, "linear-probe", text_data(train=300), cache=False))
    found = _crowd.ask_crowd(ready, ready.encoded, CPU, held_out=False, folds=3)
    accuracy = {s["name"]: s["accuracy"] for s in found.students}
    assert accuracy["logistic-tokens-1-30"] > 0.9 and accuracy["mlp-states-1-10"] > 0.8
    assert accuracy["logistic-tokens-1-30"] > accuracy["logistic-tokens-0.05-3"] + 0.1
    assert len(accuracy) == len(_students.CROWD) and all(len(s["seeds"]) == 3 for s in found.students)


def test_the_logistic_student_is_at_the_optimum_of_its_objective() -> None:
    g = np.random.Generator(np.random.PCG64(0))
    x_ND, y_N = g.standard_normal((80, 5)), g.integers(0, 3, 80)
    v_DK, b_K = _students.fit_logistic(x_ND, y_N, 3, 2000)
    v, b = (torch.from_numpy(a).requires_grad_() for a in (v_DK, b_K))
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(x_ND) @ v + b, torch.from_numpy(y_N))
    (loss + 0.5 * _students._L2 * v.pow(2).sum()).backward()
    assert v.grad.abs().max() < 1e-4 and b.grad.abs().max() < 1e-4  # type: ignore[union-attr]


def test_the_cache_gives_the_same_crowd_and_the_same_bill(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepare(setting(text_base, "linear-probe", text_data(train=61)))
    first = _crowd.ask_crowd(ready, ready.encoded, CPU, held_out=False, folds=3)
    asking = _crowd.ask
    monkeypatch.setattr(_crowd, "ask", lambda *a, **k: pytest.fail("the crowd was asked twice"))
    again = _crowd.ask_crowd(ready, ready.encoded, CPU, held_out=False, folds=3)
    np.testing.assert_array_equal(first.right_JI, again.right_JI)
    assert json.dumps(first.students) == json.dumps(again.students)
    students = sum(s["seconds"] for s in first.students)
    assert again.about["seconds"] > students > 0, "found in the cache, it is charged in full"
    for file in (_crowd.files.cache_folder() / "crowd").glob("*/right.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    monkeypatch.setattr(_crowd, "ask", asking)
    with pytest.warns(UserWarning, match="damaged"):
        np.testing.assert_array_equal(
            _crowd.ask_crowd(ready, ready.encoded, CPU, held_out=False, folds=3).right_JI, first.right_JI
        )


def test_an_arm_that_reads_the_states_itself_pays_for_them_once(text_base: Path) -> None:
    ready = prepare(setting(text_base, "linear-probe + pudf:min_size=9", text_data(train=63)))
    sets, cost = trial.examples(ready, trial.build(ready.plan, ready.base, ready.task, seed=0))
    built = cost["states_seconds"]
    assert built > 0
    own = [sets[name].seconds for name in ("train", "validation")]  # type: ignore[attr-defined]
    for states in sets.values():
        states.report.seconds = 1000.0  # type: ignore[attr-defined]
    shared, apart = Material.of(ready, sets, CPU), Material.of(ready, ready.encoded, CPU)
    assert shared.seconds < 100 and apart.seconds > sum(own)


def test_responses_survive_the_file_that_py_irt_reads(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "r.jsonl", responses())
    again = read_jsonl(tmp_path / "r.jsonl")
    assert again.students == responses().students and again.items == responses().items and again.about["seconds"] == 2.5
    np.testing.assert_array_equal(again.right_JI, responses().right_JI)
    # What py-irt's own reader does with a file.
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["subject_id"] for line in lines] == [f"s{j}" for j in range(6)]
    assert lines[1]["responses"] == dict(zip("abc", responses().right_JI[1].astype(int).tolist(), strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no student"),
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1: expected"),
        ('{"subject_id": "s"}', "line 1: expected"),
        ('{"subject_id": "s", "responses": {"a": 0.5}}', "the answer to 'a' is 0.5"),
        ('{"subject_id": "s", "responses": {"a": null}}', "the answer to 'a' is None"),
        ('{"subject_id": "s", "responses": {"a": 1, "a": 0}}', "'a' is given twice"),
        ('{"subject_id": "s", "responses": {"a": 1}, "about": 3}', "a dictionary was expected"),
        ('{"subject_id": "s", "responses": {"a": 1}}\n' * 2, "line 2: the student 's' comes twice"),
        (
            '{"subject_id": "s", "responses": {"a": 1}}\n{"subject_id": "t", "responses": {"b": 1}}',
            "line 2: 't' answered other items",
        ),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(BadData, match=message):
        read_jsonl(tmp_path / "r.jsonl")


def test_published_responses_stand_in_for_the_crowd_if_they_fit_the_rows(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare(setting(text_base, "full", text_data(train=20)))
    names = tuple(f"train-{i}" for i in range(20)) + tuple(f"validation-{i}" for i in range(7))
    file = tmp_path / "r.jsonl"
    monkeypatch.setattr(pudf, "ask_crowd", lambda *a, **k: pytest.fail("no crowd was wanted"))
    config = pudf.Config(min_size=4, responses=str(file))
    mixed = np.random.Generator(np.random.PCG64(0)).permutation(27).tolist()
    shuffled = Responses(responses().students, tuple(names[i] for i in mixed), responses(names).right_JI[:, mixed])
    write_jsonl(file, shuffled)
    made = pudf.curriculum(config, ready, ready.encoded, CPU)
    np.testing.assert_array_equal(made.difficulty_N, pudf.fit_irt(responses(names).right_JI)[0][:20])
    assert len(made.held) == 7 and not made.prepared["crowd_seconds_known"]
    for bad, message in (
        (names[1:], "no difficulty for 1 training rows, the first train-0"),
        (names[:20], "no difficulty for every validation row"),
        ((*names, "test-0"), "'test-0' of the responses stands for no row"),
        ((*names, "train-20"), "'train-20' of the responses"),
    ):
        write_jsonl(file, responses(bad))
        with pytest.raises(BadData, match=message):
            pudf.curriculum(config, ready, ready.encoded, CPU)
    write_jsonl(file, Responses(responses().students, names, responses(names).right_JI, {"data": "other"}))
    with pytest.raises(BadData, match="taken on other rows"):
        pudf.curriculum(config, ready, ready.encoded, CPU)
    with pytest.raises(BadData, match="no such file"):
        pudf.curriculum(pudf.Config(min_size=4, responses="nowhere.jsonl"), ready, ready.encoded, CPU)
