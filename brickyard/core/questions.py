"""Classes described by yes/no questions: task files, the rows that they make, and how well answers order texts.

A task file (YAML) lists data sets with questions for their labels, and says which of them are alike:

    tasks:
      - data: embedded:stdlib-modules      a folder, a hub id or embedded:NAME, with columns text and label
        group: internet                    held out, or trained on, as a whole
        labels:
          email:
            - is it about the parts of an e-mail message?
        overlap: [[email, mailbox]]        optional: rows of the one say nothing about the questions of the other

A row is a pair, the question in lower case and first, so that it stands before a tokenizer's separator and a cut row
keeps it; the text begins with a line break, which is what parts the two for a language model. A question is answered
yes by its label's rows and no by the rows of every other label of the data set, also of those that the file does not
describe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from brickyard import embedded
from brickyard.core.errors import BadData, UnknownName, UsageError
from brickyard.core.settings import read_yaml

NO, YES = "no", "yes"  # sorted, as the classes of a data set are
_KEYS = {"data": True, "group": True, "labels": True, "overlap": False}  # whether a task must have it


@dataclass(frozen=True)
class Described:
    """One data set with questions for some of its labels. `overlap`: pairs of labels that a text may both have."""

    data: str
    group: str
    labels: dict[str, tuple[str, ...]]
    overlap: frozenset[tuple[str, str]] = frozenset()

    def answers(self, label: str, found: np.ndarray) -> np.ndarray:
        """Return for rows of the labels `found` [N]: 1 yes, 0 no, -1 not known, to the questions of `label`."""
        answer_N = (found == label).astype(np.int64)
        either = {b if a == label else a for a, b in self.overlap if label in (a, b)}
        answer_N[np.isin(found, sorted(either))] = -1
        return answer_N


def read_tasks(spec: str | Path) -> list[Described]:
    """Read a task file, or an embedded one (`embedded:NAME`); paths of data sets in it are taken from its folder.

    Raises UsageError with the place of what is missing, unknown, of another type, or no question.
    """
    text = str(spec)
    path = embedded.questions(text.removeprefix("embedded:")) if text.startswith("embedded:") else Path(text)
    values = read_yaml(path)
    if set(values) != {"tasks"} or not isinstance(values["tasks"], list) or not values["tasks"]:
        raise UsageError(f"{path}: one key, tasks, was expected, with a list of data sets that are described.")
    found = [_task(task, f"{path}, task {number}", path.parent) for number, task in enumerate(values["tasks"], 1)]
    seen: dict[str, str] = {}
    for task in found:
        for question in (q for asked in task.labels.values() for q in asked):
            if seen.setdefault(question, task.group) != task.group:
                raise UsageError(
                    f"{path}: the question {question!r} stands in the groups {seen[question]!r} and {task.group!r}; "
                    "what is held out must not be trained on."
                )
    return found


def _task(given: Any, where: str, folder: Path) -> Described:
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}: data, group and labels were expected.")
    for key in given:
        if key not in _KEYS:
            raise UnknownName.among(f"key in {where}", str(key), _KEYS)
    if missing := [key for key, needed in _KEYS.items() if needed and not given.get(key)]:
        raise UsageError(f"{where}: {missing[0]} is missing or empty.")
    if not isinstance(given["data"], str) or not isinstance(given["group"], str):
        raise UsageError(f"{where}: data and group must be words; put them in quotes.")
    if not isinstance(given["labels"], Mapping):
        raise UsageError(f"{where}: labels must be a list of label: [questions].")
    labels = {}
    for label, asked in given["labels"].items():
        questions = tuple([asked] if isinstance(asked, str) else asked or ())
        for question in questions:
            if not isinstance(question, str) or not question.strip().endswith("?") or "\n" in question.strip():
                raise UsageError(f"{where}, label {label!r}: {question!r} is no question of one line ending in '?'.")
        if not questions:
            raise UsageError(f"{where}, label {label!r}: at least one question was expected.")
        labels[str(label)] = tuple(question.strip().lower() for question in questions)
    pairs = given.get("overlap") or []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UsageError(f"{where}: overlap must be a list of pairs of labels.")
    data = given["data"]
    near = folder / data
    overlap = frozenset((str(a), str(b)) for a, b in pairs)
    return Described(str(near) if near.is_dir() else data, given["group"], labels, overlap)


def row(question: str, text: str) -> tuple[str, str]:
    """Return what a model reads of a question about a text, as the columns text and text_pair."""
    return question.lower(), f"\n{text}"


def parts(first: str, second: str) -> tuple[str, str]:
    """Return question and text of a row; BadData where it is none."""
    if not first.endswith("?") or not second.startswith("\n"):
        raise BadData(
            f"{first[:60]!r} with {second[:60]!r} is no question with a text on a line of its own; make such rows with "
            "meta-tuning."
        )
    return first, second[1:]


def auc(score_N: np.ndarray, yes_N: np.ndarray) -> float:
    """Return the area under the ROC curve: how often a yes row scores above a no row (ties count half).

    UsageError where all rows are yes, or none is: it is not defined there.
    """
    yes_N = np.asarray(yes_N, dtype=bool)
    positive, negative = int(yes_N.sum()), int((~yes_N).sum())
    if not positive or not negative:
        raise UsageError(f"{positive} rows are yes and {negative} no; the area under the ROC curve needs both.")
    ranks_N = rankdata(score_N)
    return float((ranks_N[yes_N].sum() - positive * (positive + 1) / 2) / (positive * negative))


def chosen(log_p_ND: np.ndarray, class_D: np.ndarray) -> np.ndarray:
    """Return the class of each row [N]: the one with the largest mean of log p(yes) over its questions [N, D]."""
    classes = np.unique(class_D)
    mean_NC = np.stack([log_p_ND[:, class_D == c].mean(1) for c in classes], axis=1)
    return classes[mean_NC.argmax(1)]
