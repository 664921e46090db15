"""Meta-tuning: many classifications as one, yes/no questions about texts, so that new questions work unseen.

    a data set with classes c, each described by questions q_c, and a text x of class y become rows
        (q, x, a),   a = 1 if q in q_y else 0            what a model reads: the pair of lower-cased q and x
    a model with two outputs learns   loss = - log softmax([z_no, z_yes])[a]        (any tuner, see below)
    and a class is told by            argmax_c  mean over q in q_c of  log p(yes | q, x)

This step writes such rows from a task file (see `core/questions.py`), with one group of tasks held out: train and
validation hold the other groups' questions, test those of the group, about texts of the data sets' own test splits.
Of every question as many no rows are drawn as yes rows, `rows` at most of each, so that a large data set does not
dominate and no question is mostly answered no. Texts that stand in test are not trained on. Then

    brickyard data meta-tuning:hold_out=internet --data tasks.yaml --out DIR
    brickyard tune full --data DIR --out RUN
    brickyard audit zero-shot --data DIR --brick RUN/brick         the area under the ROC curve of each unseen question

Source: "Adapting Language Models for Zero-shot Learning by Meta-tuning on Dataset and Prompt Collections", arXiv
2104.04670. Headline claim: on unseen groups the tuned T5 beats a question-answering T5 of its size on most label
descriptions (AUC-ROC), and a larger one is better. The two outputs of a classifier stand for the two words of T5.
Left out: sequence-to-sequence bases, and texts of which several descriptions are true beyond `overlap`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from brickyard.core.data import read_data
from brickyard.core.errors import BadData, UnknownName, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.pool import Outcome, Pool
from brickyard.core.questions import NO, YES, Described, parts, read_tasks, row
from brickyard.core.readers import SPLITS, Source

RECORD = Record(
    name="meta-tuning",
    family="data",
    title="classifications as yes/no questions, with a group of tasks held out",
    paper="arXiv 2104.04670",
    needs=("pair-classification",),
    claims=(
        Claim(
            text="On a held-out group's questions a meta-tuned encoder beats the cosine of question and text by 2 "
            "points of AUC, and one whose questions were permuted by 10.",
            measure="held_out",
            part="unseen",
            data="embedded:stdlib-modules",
            seeds=5,
            epochs=2,
            max_length=48,
            full={"seeds": 10},
        ),
        Claim(
            text="Training on more groups does not lower the AUC by more than a point.",
            measure="held_out",
            part="groups",
            data="embedded:stdlib-modules",
            seeds=5,
            epochs=2,
            max_length=48,
            full={"seeds": 10},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of meta-tuning; UsageError where no group is held out or a number is out of range."""

    hold_out: str = ""
    """group of the task file whose questions are the test"""
    groups: tuple[str, ...] = ()
    """groups that are trained on; empty: all others"""
    rows: int = 60
    """most yes rows of a question in train, and most no rows"""
    test_rows: int = 60
    """most yes rows of a question in validation and test, and most no rows"""
    permute: bool = False
    """negative control: the questions of train are dealt out anew among the labels of each data set"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(str(group) for group in self.groups))
        if not self.hold_out:
            raise UsageError("meta-tuning: hold_out=GROUP is missing; name the group of tasks that is the test.")
        if self.rows < 1 or self.test_rows < 1:
            raise UsageError(f"meta-tuning: rows={self.rows} and test_rows={self.test_rows} must be positive.")
        if self.hold_out in self.groups:
            raise UsageError(f"meta-tuning: {self.hold_out!r} is held out, so it cannot be among groups.")


def balanced(answer_N: np.ndarray, limit: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `limit` rows that answer yes (1) and as many that answer no (0), in random order; never -1."""
    yes, no = (draw.permutation(np.flatnonzero(answer_N == a)) for a in (1, 0))
    count = min(limit, len(yes), len(no))
    return yes[:count], no[:count]


def merged(tasks: list[Described]) -> list[Described]:
    """Return one task for each data set: all labels that are described there, with all of their questions."""
    made: dict[str, Described] = {}
    for task in tasks:
        before = made.get(task.data, Described(task.data, task.group, {}))
        labels = before.labels | {c: before.labels.get(c, ()) + asked for c, asked in task.labels.items()}
        made[task.data] = Described(task.data, before.group, labels, before.overlap | task.overlap)
    return list(made.values())


def permuted(task: Described, draw: np.random.Generator) -> Described:
    """Return the task with its lists of questions dealt out among its labels so that none keeps its own, if it can."""
    labels = list(task.labels)
    order = draw.permutation(len(labels))
    owner = {labels[order[i]]: labels[order[i - 1]] for i in range(len(labels))}  # one cycle has no fixed point
    return Described(task.data, task.group, {label: task.labels[owner[label]] for label in labels}, task.overlap)


def source(config: Config, spec: Any, seed: int) -> Source:
    """Make the splits of yes/no rows from a task file.

    Raises UnknownName for a group or label that there is not, BadData where a split would be empty.
    """
    tasks = read_tasks(spec)
    groups = sorted({task.group for task in tasks})
    for group in (config.hold_out, *config.groups):
        if group not in groups:
            raise UnknownName.among("group", group, groups)
    trained = set(config.groups) or set(groups) - {config.hold_out}
    opened = {name: _read(name) for name in sorted({task.data for task in tasks})}
    # The rows of test are those of the seed, whatever is trained on and whether it is permuted.
    draw, draw_test = (np.random.Generator(np.random.PCG64([seed, len(tasks), use])) for use in (0, 1))
    tested = {text for task in tasks if task.group == config.hold_out for text in opened[task.data]["test"][0]}
    columns: dict[str, dict[str, list]] = {split: {"text": [], "text_pair": [], "label": []} for split in SPLITS}
    for task in tasks:
        if unknown := set(task.labels) - set(opened[task.data]["train"][1].tolist()):
            raise UnknownName.among(f"label of {task.data}", min(unknown), sorted(set(opened[task.data]["train"][1])))
    learned = [task for task in tasks if task.group in trained]
    if config.permute:
        # Not inside a group, whose labels are alike: a question of the same group would still say something true.
        learned = [permuted(task, draw) for task in merged(learned)]
    held = [task for task in tasks if task.group == config.hold_out]
    used = [("train", learned, draw), ("validation", learned, draw), ("test", held, draw_test)]
    for split, asked, drawing in used:
        limit = config.rows if split == "train" else config.test_rows
        for task in asked:
            left_out = tested if split != "test" else set()
            for made_row in _rows(task, *opened[task.data][split], limit, left_out, drawing):
                for name, value in zip(columns[split], made_row, strict=True):
                    columns[split][name].append(value)
    made = Source(str(spec), "tasks")
    for split, found in columns.items():
        if not found["text"]:
            raise BadData(f"meta-tuning: no row for {split}; the data sets or groups are too small.")
        order = (draw_test if split == "test" else draw).permutation(len(found["text"]))
        mixed = {name: [values[i] for i in order] for name, values in found.items()}
        made.add(split, f"split {split!r}", "tasks", list(mixed), mixed)
    return made


def _read(name: str) -> dict[str, tuple[list[str], np.ndarray]]:
    """Return texts and label names [N] of each split of a data set."""
    data = read_data(name, need=("train", "test"))
    if data.labels is None or data.input != "text":
        raise BadData(f"meta-tuning: {name} is {data.kind}; data sets of single texts with classes were expected.")
    names = np.array(data.labels)
    return {split: (rows["text"], names[np.array(rows["label"])]) for split, rows in data.splits.items()}


def _rows(
    task: Described, texts: list[str], found: np.ndarray, limit: int, left_out: set[str], draw: np.random.Generator
) -> Iterator[tuple[str, str, str]]:
    """Yield question, text and answer of each row."""
    free_N = np.array([text not in left_out for text in texts])
    for label, questions in task.labels.items():
        answer_N = np.where(free_N, task.answers(label, found), -1)
        for question in questions:
            yes, no = balanced(answer_N, limit, draw)
            yield from ((*row(question, texts[i]), YES) for i in yes)
            yield from ((*row(question, texts[i]), NO) for i in no)


def run(config: Config, pool: Pool) -> Outcome:
    """Keep every row that was made, and report the questions that are trained on."""
    asked = sorted({parts(*pair)[0] for pair in zip(pool.columns["text"], pool.columns["text_pair"], strict=True)})
    return Outcome(np.arange(len(pool)), report={"questions": len(asked), "trained_on": asked})
