"""Meta-tuning: what is held out stays out, questions survive any text, and scores are areas, not thresholds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, documents, write_data
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

import brickyard
from brickyard import api
from brickyard.audit import zero_shot
from brickyard.checks import meta_tuning as check
from brickyard.core import trial
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.completions import prompt_ids
from brickyard.core.data import read_data
from brickyard.core.errors import BadData, Refused, UnknownName, UsageError
from brickyard.core.questions import Described, auc, chosen, parts, read_tasks, row
from brickyard.core.split import Split
from brickyard.core.task import Task
from brickyard.data import meta_tuning
from brickyard.data.meta_tuning import Config, balanced, merged, permuted, source
from brickyard.embedded import stdlib_modules

NOUNS = ("film", "book", "room", "meal")
FILE = """
tasks:
  - data: nouns
    group: art
    labels:
      film: ["Is it a film?", "is the film what it is about?"]
      book: is it a book?
  - data: nouns
    group: place
    labels:
      room: ["is it a room?", "is it in a room?"]
    overlap: [[room, meal]]
  - data: tone
    group: tone
    labels: {good: "is it good?", bad: "is it bad?"}
"""


def nouns(rows: int, seed: int) -> dict[str, list]:
    g = np.random.Generator(np.random.PCG64(seed))
    rest = [w for w in WORDS if w not in NOUNS]
    out: dict[str, list] = {"text": [], "label": []}
    for i in range(rows):
        words = [*g.choice(rest, 4), NOUNS[i % 4]]
        g.shuffle(words)
        out["text"].append(f"{' '.join(map(str, words))}")
        out["label"].append(NOUNS[i % 4])
    return out


def tone(rows: int, seed: int) -> dict[str, list]:
    found = nouns(rows, seed)
    label = ["good" if t.count("good") + t.count("great") else "bad" for t in found["text"]]
    label[:2] = ["good", "bad"]
    return {"text": [f"quite {t}" for t in found["text"]], "label": label}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, make in (("nouns", nouns), ("tone", tone)):
        splits = {"train": make(120, 1), "validation": make(24, 2), "test": make(60, 3)}
        splits["train"]["text"][5], splits["train"]["label"][5] = splits["test"]["text"][7], splits["test"]["label"][7]
        write_data(folder / name, splits)
    (folder / "tasks.yaml").write_text(FILE, encoding="utf-8")
    return folder / "tasks.yaml"


@given(hnp.arrays(np.float64, 12, elements=st.floats(-3, 3).map(lambda v: round(v, 1))), st.integers(0, 4095))
def test_the_area_is_that_of_sklearn_and_knows_only_the_order(scores: np.ndarray, bits: int) -> None:
    yes = np.array([bits >> i & 1 for i in range(12)], dtype=bool)
    assume(yes.any() and not yes.all())
    assert auc(scores, yes) == pytest.approx(roc_auc_score(yes, scores))
    assert auc(np.exp(scores), yes) == auc(scores, yes) == auc(3 * scores - 7, yes)
    assert auc(-scores, yes) == pytest.approx(1 - auc(scores, yes))
    with pytest.raises(UsageError, match="12 rows are yes and 0 no"):
        auc(scores, np.ones(12))


@given(hnp.arrays(np.float64, (6, 3), elements=st.floats(-9, 0)))
def test_a_question_asked_twice_counts_as_one(log_p: np.ndarray) -> None:
    once = chosen(log_p, np.array([0, 1, 2]))
    np.testing.assert_array_equal(once, log_p.argmax(1))
    np.testing.assert_array_equal(chosen(log_p[:, [0, 0, 1, 1, 2, 2]], np.array([0, 0, 1, 1, 2, 2])), once)


@given(hnp.arrays(np.int64, 30, elements=st.integers(-1, 1)), st.integers(1, 9), st.integers(0, 5))
def test_as_many_no_as_yes(answers: np.ndarray, limit: int, seed: int) -> None:
    yes, no = balanced(answers, limit, np.random.default_rng(seed))
    assert len(yes) == len(no) == min(limit, (answers == 1).sum(), (answers == 0).sum())
    assert (answers[yes] == 1).all() and (answers[no] == 0).all() and len({*yes, *no}) == 2 * len(yes)


def test_permuted_questions_belong_to_no_label_of_their_own() -> None:
    task = Described("d", "g", {name: (f"is it {name}?",) for name in "abcde"})
    for seed in range(9):
        other = permuted(task, np.random.default_rng(seed))
        assert all(other.labels[name] != task.labels[name] for name in "abcde")
        assert sorted(other.labels.values()) == sorted(task.labels.values())


def test_questions_are_permuted_among_all_labels_of_a_data_set(tmp_path: Path, tasks: Path) -> None:
    two = [
        Described("d", "g", {"a": ("is it a?",)}, frozenset({("a", "b")})),
        Described("e", "g", {"a": ("is it e?",)}),
        Described("d", "h", {"b": ("is it b?",), "a": ("is it like a?",)}),
    ]
    whole = merged(two)
    assert [task.data for task in whole] == ["d", "e"] and whole[0].overlap == {("a", "b")}
    assert whole[0].labels == {"a": ("is it a?", "is it like a?"), "b": ("is it b?",)}
    # A group of one label has nothing to permute with inside itself; inside its data set it has.
    split = (
        "tasks:\n  - {data: nouns, group: one, labels: {film: 'is it a film?'}}\n"
        "  - {data: nouns, group: two, labels: {book: 'is it a book?'}}\n"
        "  - {data: nouns, group: three, labels: {room: 'is it a room?'}}\n"
    )
    path = tasks.with_name("apart.yaml")
    path.write_text(split, encoding="utf-8")
    plain, control, fewer = (
        source(Config(hold_out="three", rows=10, test_rows=5, **more), path, seed=3).splits  # type: ignore[arg-type]
        for more in ({}, {"permute": True}, {"groups": ("one",)})
    )
    said = zip(*(control["train"][k] for k in ("text", "text_pair", "label")), strict=True)
    answered = [(q, text) for q, text, answer in said if answer == "yes"]
    assert answered and all(("book" if q == "is it a film?" else "film") in text for q, text in answered)
    assert plain["test"] == control["test"] == fewer["test"]


def test_a_separator_parts_question_and_text_and_the_text_alone_is_cut(text_base: Path) -> None:
    base = open_base(str(text_base))
    question, text = "is it a film and not a book or a room or a meal ?", "film " * 10_000
    columns = [
        list(c) for c in zip(row(question, "a film"), row(question, text), row("a ? " * 30 + "?", text), strict=True)
    ]
    task = Task("pair-classification", "accuracy", ("no", "yes"), 2, "pair")
    rows = encode(Split({"text": columns[0], "text_pair": columns[1]}), base, task, max_length=20)
    found = [base.tokenizer.convert_ids_to_tokens(rows.collate([i])["input_ids"][0]) for i in range(3)]
    asked = base.tokenizer.tokenize(question)
    assert found[0] == ["[CLS]", *asked, "[SEP]", "a", "film", "[SEP]"]
    assert found[1] == ["[CLS]", *asked, "[SEP]", *["film"] * (20 - 3 - len(asked)), "[SEP]"]  # fewer than the question
    assert len(found[2]) == 20 and rows.report["truncated"] == 2
    # What has no separator, a language model, is given the line break.
    assert "".join(row("Is it?", "yes")) == "is it?\nyes"


def test_a_text_that_may_have_both_labels_answers_neither_yes_nor_no() -> None:
    task = Described("d", "g", {"a": ("is it a?",)}, frozenset({("b", "a")}))
    assert task.answers("a", np.array(["a", "b", "c"])).tolist() == [1, -1, 0]


def test_the_held_out_group_stays_out(tasks: Path) -> None:
    made = source(Config(hold_out="art", rows=10, test_rows=5), tasks, seed=3)
    pairs = {
        split: [parts(*p) for p in zip(c["text"], c["text_pair"], strict=True)] for split, c in made.splits.items()
    }
    asked = {split: {q for q, _ in rows} for split, rows in pairs.items()}
    assert asked["test"] == {"is it a film?", "is the film what it is about?", "is it a book?"}
    assert (
        asked["train"]
        == asked["validation"]
        == {
            "is it a room?",
            "is it in a room?",
            "is it good?",
            "is it bad?",
        }
    )
    test_texts = set(read_data(str(tasks.parent / "nouns")).splits["test"]["text"])
    assert test_texts.isdisjoint(text for _, text in pairs["train"])
    for split, limit in (("train", 10), ("test", 5)):
        answers = Counter(zip((q for q, _ in pairs[split]), made.splits[split]["label"], strict=True))
        for question in asked[split]:
            assert answers[question, "yes"] == answers[question, "no"] <= limit
    right = {text: label for text, label in zip(*(nouns(60, 3)[k] for k in ("text", "label")), strict=True)}
    for (question, text), answer in zip(pairs["test"], made.splits["test"]["label"], strict=True):
        assert (answer == "yes") == (right[text] in question)
    assert not any("meal" in text for q, text in pairs["train"] if "room" in q)  # it says nothing about rooms
    again, other = (source(Config(hold_out="art", rows=10, test_rows=5), tasks, seed=s) for s in (3, 4))
    assert again.splits == made.splits != other.splits
    few = source(Config(hold_out="art", groups=("tone",), rows=10), tasks, seed=3)
    assert set(few.splits["train"]["text"]) == {"is it good?", "is it bad?"}


def test_a_meta_tuned_brick_is_audited_on_what_it_never_saw(text_base: Path, tasks: Path, tmp_path: Path) -> None:
    card = brickyard.data("meta-tuning", data=tasks, out=tmp_path / "rows", options={"hold_out": "tone", "rows": 40})
    assert card["report"]["questions"] == 5 and card["rows"]["written"] > 100
    given: dict[str, Any] = {"base": str(text_base), "data": tmp_path / "rows", "device": "cpu"}
    training = {"steps": 400, "batch": 32, "lr": 2e-3}
    made, _ = brickyard.tune("full", out=tmp_path / "run", training=training, dtype="float32", **given)
    held = brickyard.audit("zero-shot", brick=made.folder, **given)
    assert {line["question"] for line in held["table"]} == {"is it good?", "is it bad?"}
    assert all(line["nearest"] in card["report"]["trained_on"] for line in held["table"])
    assert held["skipped"] == 0 and 0 <= held["auc"] <= 1 and "before" in held
    # On the questions that it did learn, and on the texts of test, it must tell which is asked.
    (tmp_path / "nouns.yaml").write_text(
        "tasks:\n  - data: nouns\n    group: all\n    labels: {film: 'is it a film?', book: 'is it a book?', "
        "room: 'is it a room?', meal: 'is it a meal?'}\n",
        encoding="utf-8",
    )
    own = {"base": str(text_base), "data": tasks.parent / "nouns", "device": "cpu"}
    said = brickyard.audit(f"zero-shot:tasks={tmp_path / 'nouns.yaml'}", brick=made.folder, **own)
    areas = {line["question"]: line["auc"] for line in said["table"]}
    assert areas["is it a film?"] > 0.75 and areas["is it a room?"] > 0.75 and 0 <= said["accuracy"] <= 1
    model = api.apply(made.folder)
    base = open_base(str(text_base))
    text = "the room was very good"
    asked = [f"is it a {noun}?" for noun in ("film", "book", "room", "meal")]
    # The question is read; not every pair of the four need be told apart by a network of this size.
    whole, cut = zero_shot.by_brick(model, base, [row(q, text) for q in asked], None)
    assert np.ptp(whole) > 0.1 and cut == 0
    long, cut = zero_shot.by_brick(model, base, [row(q, "film " * 10_000) for q in asked], 16)
    assert np.ptp(long) > 0.1 and cut == 4  # also before a text of ten thousand words
    short = brickyard.audit(f"zero-shot:tasks={tmp_path / 'nouns.yaml'},length=12", brick=made.folder, **own)
    assert said["truncated"] == 0 < short["truncated"] and f"{short['truncated']} rows were cut" in short["detail"]
    with pytest.raises(BadData, match="alone has"):
        zero_shot._must_fit(["is it a room?"], base, 6)


def test_without_a_brick_a_base_scores_by_cosine_or_by_words(
    text_base: Path, causal_base: Path, tasks: Path, tmp_path: Path
) -> None:
    rows = source(Config(hold_out="art", test_rows=6), tasks, seed=0).splits
    data = read_data({k: rows[k] for k in ("train", "test")})
    found = zero_shot.measure(open_base(str(text_base)), None, zero_shot.Config(), data, device=torch.device("cpu"))
    assert "before" not in found and len(found["table"]) == 3 and 0 <= found["auc"] <= 1
    pairs = {**rows["test"], "text_pair": [f"{text}{' very' * 30}" for text in rows["test"]["text_pair"]]}
    long, few = read_data({"train": rows["train"], "test": pairs}), zero_shot.Config(length=24)
    cut = zero_shot.measure(open_base(str(text_base)), None, few, long, device=torch.device("cpu"))
    assert found["truncated"] == 0 and cut["truncated"] == len(set(pairs["text_pair"]))
    assert cut["detail"].endswith(f"{cut['truncated']} texts were cut to fit")
    base = open_base(str(causal_base))
    with pytest.raises(UsageError, match="one token each is needed"):
        zero_shot.measure(base, None, zero_shot.Config(), data, device=torch.device("cpu"))


def test_a_language_model_is_asked_for_two_words(causal_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(str(causal_base))
    monkeypatch.setattr(zero_shot, "YES", "good")
    monkeypatch.setattr(zero_shot, "NO", "bad")
    monkeypatch.setattr(zero_shot, "ANSWER", " it is")
    asked = zero_shot.Asked(
        ["is it?"], np.zeros(3, int), ["the film", "a very very poor book " * 40, "room"], np.ones(3)
    )
    found, cut = zero_shot.by_words(base, asked, 24, torch.device("cpu"))
    assert cut == 1
    model = base.model(zero_shot.Task("causal-lm", "bits_per_byte", None, 1, "text"), seed=0)
    tokenizer = base.tokenizer
    words = tokenizer.convert_tokens_to_ids(["bad", "good"])
    tail = tokenizer(" it is", add_special_tokens=False)["input_ids"]
    for value, text in zip(found, asked.rows, strict=True):
        # A training text begins with this token, so a question does.
        [[start, *ids]] = prompt_ids(base, ["".join(text)], chat=False)
        ids = [start, *ids[: 24 - 1 - len(tail)], *tail]
        assert len(ids) <= 24
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1, words]
        assert value == pytest.approx(logits.log_softmax(0)[1].item(), abs=1e-4)


def test_a_brick_of_another_task_is_refused(causal_base: Path, text_base: Path, tasks: Path, tmp_path: Path) -> None:
    rows = source(Config(hold_out="art", test_rows=6), tasks, seed=0).splits
    data = read_data({k: rows[k] for k in ("train", "test")})
    training = {"steps": 2, "batch": 4}
    wrote = {"base": str(causal_base), "data": documents(), "training": training, "task": "causal-lm"}
    told = {"base": str(text_base), "data": tasks.parent / "tone", "training": training, "device": "cpu"}
    for name, how, match in (("a", wrote, "tuned on causal-lm"), ("b", told, "text-classification with 2 classes")):
        folder = brickyard.tune("lora:r=2", out=tmp_path / name, **how)[0].folder  # type: ignore[arg-type]
        base = open_base(how["base"])  # type: ignore[arg-type]
        applied = brickyard.load(folder).apply(base)
        with pytest.raises(Refused, match=match):
            zero_shot.measure(base, applied, zero_shot.Config(), data, device=torch.device("cpu"))


def test_task_files_are_read_strictly(tmp_path: Path) -> None:
    def refused(text: str, match: str, error: type[Exception] = UsageError) -> None:
        path = tmp_path / "t.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(error, match=match):
            read_tasks(path)

    task = "tasks:\n  - {data: d, group: g, labels: {a: 'is it a?'}}\n"
    (tmp_path / "ok.yaml").write_text(task, encoding="utf-8")
    assert read_tasks(tmp_path / "ok.yaml") == [Described("d", "g", {"a": ("is it a?",)})]
    refused("other: 1\n", "one key, tasks")
    refused("tasks:\n  - {data: d, labels: {a: 'is it a?'}}\n", "task 1: group is missing")
    refused("tasks:\n  - {data: d, group: g, lables: {a: 'is it a?'}}\n", "did you mean labels", UnknownName)
    refused("tasks:\n  - {data: d, group: g, labels: {a: it is a}}\n", "no question of one line")
    refused("tasks:\n  - {data: d, group: g, labels: {a: []}}\n", "at least one question")
    refused("tasks:\n  - {data: d, group: no, labels: {a: 'is it a?'}}\n", "group")
    refused(task + "  - {data: e, group: h, labels: {b: 'is it a?'}}\n", "must not be trained on")
    refused(task + "  - {data: e, group: h, labels: {b: 'is it b?'}, overlap: [a]}\n", "list of pairs")
    with pytest.raises(UsageError, match="no such file"):
        read_tasks(tmp_path / "absent.yaml")
    with pytest.raises(UnknownName, match="did you mean stdlib-modules"):
        read_tasks("embedded:stdlib-module")


def test_what_cannot_be_is_refused(tasks: Path) -> None:
    for options, match in (({}, "hold_out=GROUP is missing"), ({"hold_out": "a", "rows": 0}, "must be positive")):
        with pytest.raises(UsageError, match=match):
            Config(**options)
    with pytest.raises(UsageError, match="cannot be among groups"):
        Config(hold_out="a", groups=("a",))
    with pytest.raises(UnknownName, match="did you mean place"):
        source(Config(hold_out="plaice"), tasks, seed=0)
    wrong = tasks.with_name("wrong.yaml")
    wrong.write_text(FILE.replace("room:", "rooom:"), encoding="utf-8")
    with pytest.raises(UnknownName, match=r"label of .*did you mean room"):
        source(Config(hold_out="art"), wrong, seed=0)

    def pairs(*labels: str) -> dict[str, dict[str, list]]:
        return {"test": {"text": ["a", "b"], "text_pair": ["c", "d"], "label": list(labels)}}

    with pytest.raises(BadData, match="is no question with a text"):
        zero_shot.asked_of(read_data(pairs("no", "yes"), need=()), "")
    with pytest.raises(BadData, match="expected no and yes"):
        zero_shot.asked_of(read_data(pairs("x", "y"), need=()), "")
    with pytest.raises(BadData, match="pairs of question and text"):
        zero_shot.asked_of(read_data({"test": {"text": ["a", "b"], "label": ["no", "yes"]}}, need=()), "")


def test_the_embedded_questions_describe_the_embedded_modules() -> None:
    described = read_tasks("embedded:stdlib-modules")
    labels = [label for task in described for label in task.labels]
    assert sorted(labels) == sorted(stdlib_modules.MODULES) and len({task.group for task in described}) == 7
    questions = [q for task in described for asked in task.labels.values() for q in asked]
    assert len(set(questions)) == len(questions) == 2 * len(labels)
    splits = stdlib_modules.splits()
    for columns in splits.values():
        assert len(columns["text"]) == len(set(columns["text"]))
    texts = [set(columns["text"]) for columns in splits.values()]
    assert not (texts[0] & texts[2] or texts[0] & texts[1] or texts[1] & texts[2])
    counts = Counter(label for columns in splits.values() for label in columns["label"])
    assert counts.keys() == stdlib_modules.MODULES and max(counts.values()) == stdlib_modules.LARGEST
    assert set(splits["train"]["label"]) == set(splits["test"]["label"]) == stdlib_modules.MODULES
    with pytest.raises(BadData, match="needs the sources of the whole standard library"):
        stdlib_modules.splits(Path(__file__).parent / "golden")


def test_the_check_runs_from_end_to_end_and_its_verdicts_follow_the_areas(
    text_base: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "finished", lambda jobs, workers, folder: [trial.run(job.argument) for job in jobs])
    claim = replace(
        meta_tuning.RECORD.claims[0], base=str(text_base), data=str(tasks), seeds=1, epochs=4, max_length=24
    )
    found = check.held_out(claim, rows=6, test_rows=6, hold_out="art", ladder=("tone",), arm="linear-probe", workers=1)
    assert found.keys() == {"unseen", "groups"}
    assert set(found["unseen"]["figures"]["auc"]) == {"tuned", "permuted", "1 groups", "cosine"}
    assert len(found["unseen"]["figures"]["nearest"]) == 3
    high, low = np.full((3, 10), 0.9), np.full((3, 10), 0.6)
    areas = {"tuned": high, "permuted": low, "1 groups": low, "cosine": low}
    told = check.judged(areas, {}, [0.9], [])
    assert told["unseen"]["holds"] is True and told["groups"]["holds"] is True
    worse = check.judged({**areas, "permuted": high}, {}, [0.9], [])
    assert worse["unseen"]["holds"] is False and not worse["unseen"]["control"]["destroyed"]
    assert check.judged({**areas, "1 groups": high + 0.05}, {}, [0.9], [])["groups"]["holds"] is False
    assert check.judged(areas, {}, [0.9, 0.55], [])["groups"]["holds"] == "set-up invalid"
    # A control that is not decided is not destroyed, and the verdict says so.
    mixed = np.tile([0.5, 0.9], (3, 5))
    unsure = check.judged({**areas, "permuted": mixed}, {}, [0.9], [])["unseen"]
    assert unsure["control"]["holds"] == "undecided" and not unsure["control"]["destroyed"]
    assert "the control is undecided" in unsure["detail"] and "undecided" not in told["unseen"]["detail"]


@pytest.mark.parametrize(("by_seed", "by_label"), [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_the_interval_holds_the_truth_for_new_seeds_and_new_labels(by_seed: float, by_label: float) -> None:
    g = np.random.Generator(np.random.PCG64(0))
    held, seeds = 0, meta_tuning.RECORD.claims[0].seeds
    for _ in range(400):
        noise = by_seed * g.normal(size=(seeds, 1)) + by_label * g.normal(size=10) + 0.3 * g.normal(size=(seeds, 10))
        found = check.difference(0.01 * noise, np.zeros((seeds, 10)), 0.0, "a >= b")
        held += found["low"] <= 0 <= found["high"]
    assert held >= 0.92 * 400
    assert check.difference(np.ones((seeds, 1)), np.zeros((seeds, 1)), 0.0, "")["holds"] == "undecided"  # one label


def test_a_share_of_labels_has_an_interval_also_where_all_are_better() -> None:
    every = check.improved(np.ones((5, 10), dtype=bool), 60.0, "")
    assert every["holds"] is True and 60 < every["low"] < 70 and every["high"] == pytest.approx(100)
    assert check.improved(np.ones((5, 6), dtype=bool), 60.0, "")["holds"] == "undecided"
    half = check.improved(np.tile([True, False], (5, 5)), 60.0, "")
    assert half["low"] + half["high"] == pytest.approx(100) and half["holds"] == "undecided"
