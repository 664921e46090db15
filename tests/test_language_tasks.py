"""Instruction tuning, preferences and multiple choice: what is scored, how pairs are judged, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import asked, make_text_base, write_data

import brickyard
from brickyard.core.answers import answer, nats
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.completions import EncodedCompletions, prompt_ids
from brickyard.core.data import Split, read_data
from brickyard.core.errors import BadData, UsageError
from brickyard.core.generate import Decoding
from brickyard.core.task import Task, task_of

TASKS = {
    "instruct": Task("instruct", "bits_per_byte", None, 1, "completion"),
    "preference": Task("preference", "accuracy", None, 1, "preference"),
    "multiple-choice": Task("multiple-choice", "accuracy", None, 1, "choice"),
}


def encoded(base: Path, kind: str, rows: int = 30, task: Task | None = None, **options: int) -> EncodedCompletions:
    split = Split(asked(kind, train=rows)["train"])
    made = encode(split, open_base(str(base)), task or TASKS[kind], **options)  # type: ignore[arg-type]
    assert isinstance(made, EncodedCompletions)
    return made


def alone(base: Path, prompt: str, reply: str) -> float:
    """Nats of one reply (and the end behind it) after its prompt, by a plain forward pass."""
    opened = open_base(str(base))
    tokenizer = opened.tokenizer
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    before = first + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = opened.model(TASKS["instruct"], seed=0)(input_ids=torch.tensor([before + after[:-1]])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[len(before) - 1 :], torch.tensor(after), reduction="none")
    return float(losses.sum())


def test_a_completion_is_scored_without_its_prompt(causal_base: Path) -> None:
    data = asked("instruct", train=30)["train"]
    found = answer(
        open_base(str(causal_base)).model(TASKS["instruct"], seed=0),
        encoded(causal_base, "instruct"),
        TASKS["instruct"],
    )
    expected = [alone(causal_base, p, c) for p, c in zip(data["prompt"], data["completion"], strict=True)]
    np.testing.assert_allclose(found.predictions, expected, rtol=1e-4)
    assert found.weights.tolist() == [len(c.split()) + 1 for c in data["completion"]]


def test_the_training_loss_is_that_of_the_completions_alone(causal_base: Path) -> None:
    task = TASKS["instruct"]
    made = encoded(causal_base, "instruct")
    model = open_base(str(causal_base)).model(task, seed=0)
    batch = made.collate(np.arange(30))
    labels = batch.pop("labels")
    found = answer(model, made, task)
    loss = task.loss(model(**batch).logits, labels).item()
    assert loss == pytest.approx(found.predictions.sum() / found.weights.sum(), rel=1e-4)


def test_choices_are_ranked_by_their_probability(causal_base: Path) -> None:
    data = asked("multiple-choice", train=30)["train"]
    model = open_base(str(causal_base)).model(TASKS["multiple-choice"], seed=0)
    by_hand = [
        [alone(causal_base, p, c) / (len(c.encode()) if norm else 1) for c in choices]
        for norm in (False, True)
        for p, choices in zip(data["prompt"], data["choices"], strict=True)
    ]
    for metric, rows in (("accuracy", by_hand[:30]), ("accuracy_norm", by_hand[30:])):
        task = Task("multiple-choice", metric, None, 1, "choice")
        found = answer(model, encoded(causal_base, "multiple-choice", task=task), task)
        assert found.predictions.tolist() == [int(np.argmin(row)) for row in rows]
        surprise = [
            -np.log(np.exp(-np.array(r))[label] / np.exp(-np.array(r)).sum())
            for r, label in zip(rows, data["label"], strict=True)
        ]
        np.testing.assert_allclose(found.losses, surprise, rtol=1e-3)


def test_questions_may_have_different_numbers_of_choices(causal_base: Path) -> None:
    split = Split(
        {"prompt": ["the film", "a book"], "choices": [["was", "is", "it"], ["good", "bad"]], "label": [2, 1]}
    )
    made = encode(split, open_base(str(causal_base)), TASKS["multiple-choice"])
    assert isinstance(made, EncodedCompletions)
    assert made.by_example(np.arange(5.0)).tolist() == [[0, 1, 2], [3, 4, -np.inf]]
    ids = open_base(str(causal_base)).tokenizer.convert_tokens_to_ids(["it", "bad"])
    assert made.collate([0, 1])["labels"].max(dim=1).values.tolist() == ids  # training reads the right choices


def test_pairs_are_judged_against_the_untouched_base(causal_base: Path) -> None:
    task = TASKS["preference"]
    made = encoded(causal_base, "preference")
    model = open_base(str(causal_base)).model(task, seed=0)
    with pytest.raises(UsageError, match="were not measured"):
        answer(model, made, task)
    made.reference = nats(model, made)
    untouched = answer(model, made, task)
    assert not untouched.predictions.any()  # a base has gained nothing over itself
    np.testing.assert_allclose(untouched.losses, np.log(2), rtol=1e-6)
    made.reference = made.reference + np.tile([0.5, -0.5], 30)  # as if the model had gained a nat on every pair
    np.testing.assert_allclose(made.margin(nats(model, made)), 1.0, atol=1e-4)
    assert answer(model, made, task).predictions.all()


@pytest.mark.parametrize("kind", TASKS)
def test_taking_rows_gives_the_same_batches(causal_base: Path, kind: str) -> None:
    made = encoded(causal_base, kind)
    rows = np.array([7, 3, 21])
    part = made.take(rows)
    direct, taken = made.collate(rows), part.collate(np.arange(3))
    assert all(torch.equal(direct[name], taken[name]) for name in direct)
    assert part.lengths.tolist() == made.lengths[rows].tolist() and part.digest != made.digest
    assert sum(map(len, made.parts(64))) == len(made.tokens)


def test_answers_are_cut_and_counted_and_prompts_never(causal_base: Path) -> None:
    long = {"prompt": ["the film was", "the film"], "completion": ["very " * 20, "bad"]}
    base = open_base(str(causal_base))
    made = encode(Split(long), base, TASKS["instruct"], max_length=10)
    assert made.report["truncated"] == 1 and made.report["longest"] == 24 and made.lengths.tolist() == [10, 4]
    with pytest.raises(BadData, match=r"row 1: the prompt alone has 31 tokens.*16 positions.*--max-length"):
        encode(Split({"prompt": ["the " * 30], "completion": ["film"]}), base, TASKS["instruct"], max_length=16)
    with pytest.raises(BadData, match=r"row 1: the prompt alone has 101 tokens.*64 positions.*shorten the prompt"):
        encode(Split({"prompt": ["the " * 100], "completion": ["film"]}), base, TASKS["instruct"])


def test_of_a_cut_answer_only_the_bytes_that_are_left_count(causal_base: Path) -> None:
    rows = {"prompt": ["good film", "the plot"], "completion": ["the acting was fine and great " * 3, "dull"]}
    task, base = TASKS["instruct"], open_base(str(causal_base))
    model = base.model(task, seed=0)
    cut = encode(Split(rows), base, task, max_length=12)
    assert isinstance(cut, EncodedCompletions) and cut.report["truncated"] == 1
    share = cut.tokens[0] / len(rows["completion"][0].split())
    assert share < 0.6
    assert cut.bytes.tolist() == [round(share * len(rows["completion"][0])), len("dull")] == cut.labels.tolist()
    # So a cut answer costs about as many bits per byte as the whole one, not a fraction of them.
    found = [
        task.score(made.labels.numpy(), answer(model, made, task).predictions)
        for made in (cut, encode(Split(rows), base, task))
    ]
    assert found[0] == pytest.approx(found[1], rel=0.3)


def test_a_chat_template_wraps_prompts_alike_in_training_and_in_use(tmp_path: Path) -> None:
    folder = make_text_base(tmp_path / "chat", causal=True)
    opened = open_base(str(folder))
    opened.tokenizer.chat_template = "{% for m in messages %}{{ 'it ' + m['content'] + ' was ' }}{% endfor %}"
    ids = opened.tokenizer.convert_tokens_to_ids(["it", "film", "was", "good"])
    assert prompt_ids(opened, ["film"], chat=True) == [ids[:3]]
    assert prompt_ids(opened, ["film"], chat=False)[0][1:] == [ids[1]]
    made = encode(Split({"prompt": ["film"], "completion": ["good"]}), opened, TASKS["instruct"])
    assert made.report["chat_template"] and made.collate([0])["input_ids"].tolist() == [ids]


def test_columns_say_the_task() -> None:
    for kind in TASKS:
        data = read_data(asked(kind))
        assert data.kind == kind and task_of(data).generative and data.labels is None
        assert len(data.splits["validation"]) == 20 and data.report["classes"] is None
        again = read_data(asked(kind))
        assert again.fingerprint == data.fingerprint
    assert read_data({"test": {"prompt": ["a"]}}, need=("test",), labelled=False).input == "prompt"
    with pytest.raises(UsageError, match=r"task 'regression' does not fit.*'instruct'"):
        read_data(asked("instruct"), task="regression")
    with pytest.raises(UsageError, match="'causal-lm' does not fit the columns prompt"):
        read_data(asked("instruct"), task="causal-lm")
    with pytest.raises(UsageError, match="'macro-f1' does not fit the task 'preference'"):
        read_data(asked("preference"), metric="macro-f1")


def test_pairs_that_prefer_nothing(causal_base: Path) -> None:
    data = asked("preference", train=300)
    data["train"]["rejected"][4] = data["train"]["chosen"][4]
    assert read_data(data).report["undecided"] == {"train": 1, "validation": 0, "test": 0}
    data["train"]["rejected"] = list(data["train"]["chosen"])
    with pytest.raises(
        BadData, match="'train': chosen and rejected are the same text in rows 1, 2, 3, 4, 5 and 295 more"
    ):
        read_data(data)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "label",
            3,
            r"'train', row 2: the label is 3; expected the place of the right one of 3 choices, counted from 0",
        ),
        ("label", -1, "row 2: the label is -1"),
        ("label", True, "labels? (is|are)"),
        ("label", "b", "label"),
        ("choices", ["only one"], "row 2: 'choices' is .*expected a list of two or more texts"),
        ("choices", "a, b", "row 2: 'choices' is 'a, b'"),
        ("choices", ["a", " "], "expected a list of two or more texts"),
        ("choices", ["a", "b", "a"], "row 2: two of the choices are the same"),
        ("prompt", None, "the column 'prompt' is empty in row 2"),
    ],
)
def test_bad_questions(column: str, value: object, message: str) -> None:
    data = asked("multiple-choice")
    data["train"][column][1] = value
    with pytest.raises(BadData, match=message):
        read_data(data)


def test_choices_come_as_lists(tmp_path: Path) -> None:
    data = asked("multiple-choice")
    folder = write_data(tmp_path / "parquet", data)
    assert read_data(str(folder)).splits["train"]["choices"] == data["train"]["choices"]
    pq.write_table(pa.table({"prompt": ["a"], "choices": [[1, 2]], "label": [0]}), folder / "test.parquet")
    with pytest.raises(BadData, match=r"column 'choices' of test.parquet holds list.*expected lists of strings"):
        read_data(str(folder))
    other = tmp_path / "csv"
    other.mkdir()
    for split in ("train", "test"):
        (other / f"{split}.csv").write_text("prompt,choices,label\na,b,0\n", encoding="utf-8")
    with pytest.raises(BadData, match="whose lists a csv cannot hold"):
        read_data(str(other))


@pytest.mark.parametrize("kind", TASKS)
def test_tune_evaluate_and_predict(kind: str, causal_base: Path, tmp_path: Path) -> None:
    data, base = asked(kind), str(causal_base)
    brick, result = brickyard.tune(
        "full",
        base=base,
        data=data,
        out=tmp_path / "run",
        device="cpu",
        training={"epochs": 10, "lr": 1e-2, "batch": 16},
    )
    scored = brickyard.evaluate(brick=brick.folder, data=data, device="cpu")["score"]
    assert scored["mean"] == pytest.approx(result["score"]["mean"], abs=1e-5)
    assert scored["low"] <= scored["mean"] <= scored["high"]
    if kind == "preference":
        assert scored["mean"] > 0.9
        with pytest.raises(UsageError, match="add --brick"):
            brickyard.evaluate(base=base, data=data, device="cpu")
    else:
        untouched = brickyard.evaluate(base=base, data=data, device="cpu")["score"]["mean"]
        assert scored["mean"] > untouched + 0.2 if kind == "multiple-choice" else scored["mean"] < 0.5 * untouched
    ask = {"test": {k: v for k, v in data["test"].items() if k in ("prompt", "choices")}}
    decoding = None if kind == "multiple-choice" else Decoding(new_tokens=6)
    brickyard.predict(brick=brick.folder, data=ask, out=tmp_path / "p.parquet", decoding=decoding, device="cpu")
    rows = pq.read_table(tmp_path / "p.parquet").to_pydict()
    if kind == "multiple-choice":
        assert rows["choice"] == [c[i] for c, i in zip(data["test"]["choices"], rows["prediction"], strict=True)]
        assert np.mean(np.array(rows["prediction"]) == data["test"]["label"]) == pytest.approx(scored["mean"])
    elif kind == "instruct":
        right = np.mean([p == c for p, c in zip(rows["prediction"], data["test"]["completion"], strict=True)])
        assert right > 0.15  # the length of a completion is drawn, so only some can be hit


def test_a_brick_answers_to_other_tasks_of_its_language_model(causal_base: Path, tmp_path: Path) -> None:
    training = {"epochs": 4, "lr": 1e-2, "batch": 16}
    brick, _ = brickyard.tune(
        "lora", base=str(causal_base), data=asked("instruct"), out=tmp_path, device="cpu", training=training
    )
    for kind in ("preference", "multiple-choice"):
        found = brickyard.evaluate(brick=brick.folder, data=asked(kind), device="cpu")
        assert found["score"]["metric"] == "accuracy" and 0 <= found["score"]["mean"] <= 1


def test_prompts_made_of_the_whole_instruction_do_not_answer_to_plain_text(causal_base: Path, tmp_path: Path) -> None:
    data = asked("instruct", train=40)
    brick, _ = brickyard.tune(
        "iapt", base=str(causal_base), data=data, out=tmp_path, training={"steps": 2}, device="cpu"
    )
    text = {"test": {"text": ["good film the plot was fine"] * 30}}
    with pytest.raises(UsageError, match=r"data is for causal-lm, and a brick of iapt answers .*instruct: prompts are"):
        brickyard.evaluate(brick=brick.folder, data=text, device="cpu")


def test_compare_preferences_by_objective(causal_base: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", asked("preference"))
    result = brickyard.compare(
        base=str(causal_base),
        data=str(data),
        methods=["lora", "lora + tdpo", "linear-probe", "lora + dpo:beta=0.3"],
        out=tmp_path / "run",
        seeds=2,
        batch=16,
        device="cpu",
        training={"epochs": 2, "lr": 1e-2},
    )
    rows = {row["arm"]: row for row in result["methods"]}
    assert "untouched base" not in rows  # it has gained nothing over itself
    assert rows["linear-probe"]["status"] == "refused"
    done = [rows[name] for name in ("lora", "lora + tdpo", "lora + dpo:beta=0.3")]
    assert all(row["status"] == "done" and row["score"]["mean"] > 0.6 for row in done)
    assert all(row["cost"]["saved_for_backward_bytes"] > 0 for row in done)
    assert "chance" not in result["verdict"]["sentence"]
    mixed = asked("preference")
    for row in range(0, len(mixed["train"]["chosen"]), 2):
        pair = mixed["train"]["chosen"][row], mixed["train"]["rejected"][row]
        mixed["train"]["rejected"][row], mixed["train"]["chosen"][row] = pair
    again = {"out": tmp_path / "again", "device": "cpu", "training": {"epochs": 1, "lr": 1e-4}}
    found = brickyard.compare(base=str(causal_base), data=mixed, methods=["lora"], seeds=1, **again)
    assert "No method here is surely above chance, 50.0 %." in found["verdict"]["sentence"]


def test_an_objective_needs_something_to_train_and_its_own_task(causal_base: Path) -> None:
    from brickyard.core.arm import parse
    from brickyard.core.build import resolve
    from brickyard.core.errors import Refused

    with pytest.raises(Refused, match=r"dpo trains nothing; dpo stands beside a tuner or a head: 'full [+] dpo'"):
        resolve(parse("dpo"), TASKS["preference"])
    with pytest.raises(Refused, match="dpo works on preference; this task is instruct"):
        resolve(parse("lora + dpo"), TASKS["instruct"])
    with pytest.raises(Refused, match="are both a objective"):
        resolve(parse("lora + dpo + tdpo"), TASKS["preference"])


def test_a_coin_takes_away_what_pairs_and_questions_say(causal_base: Path) -> None:
    pairs, questions = encoded(causal_base, "preference", rows=200), encoded(causal_base, "multiple-choice", rows=200)
    before, labels, digest = pairs.collate(np.arange(200))["input_ids"], questions.labels.numpy().copy(), pairs.digest
    pairs.shuffle(3)
    questions.shuffle(3)
    after = pairs.collate(np.arange(200))["input_ids"]
    stayed = (before[:200] == after[:200]).all(dim=1)
    assert 70 < int(stayed.sum()) < 130 and torch.equal(before[200:][~stayed], after[:200][~stayed])
    assert 0.2 < float((questions.labels.numpy() == labels).mean()) < 0.5 and pairs.digest != digest
    assert torch.equal(pairs.take([5, 9]).collate([0, 1])["input_ids"], pairs.collate([5, 9])["input_ids"])
    with pytest.raises(UsageError, match="no labels that could be shuffled"):
        encoded(causal_base, "instruct").shuffle(0)
