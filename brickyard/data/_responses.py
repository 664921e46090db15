"""Who answered what rightly: the responses of a crowd, and the JSONL in which py-irt and its users exchange them.

    {"subject_id": "logistic-states-1-100", "responses": {"train-0": 1, "train-1": 0, ...}, "student": {...}}

One line a student; r_ji is 0 or 1. py-irt reads the first two keys and passes over the others, in which we keep what
each student was and which rows the items stand for.

Shapes: J students, I items.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brickyard.core.errors import BadData, UnsafeFile
from brickyard.core.files import write_bytes
from brickyard.core.safetensors_check import unique_keys


@dataclass(frozen=True)
class Responses:
    """Answers of J students to I items.

    Attributes:
        students: a name and what is known of each (kind, rows it was fitted on, seeds, accuracy).
        items: the items' names, `SPLIT-ROW` for rows of a split.
        right_JI: bool, whether student j was right on item i.
        about: `seconds` that the crowd cost and `data`, the digest of the rows, where known.
    """

    students: tuple[dict[str, Any], ...]
    items: tuple[str, ...]
    right_JI: np.ndarray
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.right_JI.shape != (len(self.students), len(self.items)):
            raise BadData(
                f"responses of shape {self.right_JI.shape} came with {len(self.students)} students and "
                f"{len(self.items)} items; one row a student and one column an item were expected."
            )


def write_jsonl(path: str | os.PathLike[str], responses: Responses) -> None:
    """Write responses as py-irt reads them, complete or not at all."""
    lines = []
    for student, right_I in zip(responses.students, responses.right_JI.astype(int).tolist(), strict=True):
        line = {
            "subject_id": student["name"],
            "responses": dict(zip(responses.items, right_I, strict=True)),
            "student": student,
            "about": responses.about,
        }
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    write_bytes(path, "".join(lines).encode())


def read_jsonl(path: str | os.PathLike[str]) -> Responses:
    """Read responses that py-irt or `write_jsonl` wrote; items stand in the order of the first line.

    Raises BadData with the line where it is not of that form, an answer is not 0 or 1, a student comes twice, or a
    student did not answer the same items as the first: the fit needs every answer.
    """
    path = Path(path)
    if not path.is_file():
        raise BadData(f"{path}: no such file; responses=FILE takes the JSONL of py-irt, one line a student.")
    students: list[dict[str, Any]] = []
    rows: list[np.ndarray] = []
    items: tuple[str, ...] = ()
    about: dict[str, Any] = {}
    with open(path, encoding="utf-8") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            name, answers, line = _line(text, where)
            if any(student["name"] == name for student in students):
                raise BadData(f"{where}: the student {name!r} comes twice; give each one line.")
            if not students:
                items, about = tuple(answers), line.get("about", {})
            if answers.keys() != set(items):
                off = sorted(answers.keys() ^ set(items))
                raise BadData(
                    f"{where}: {name!r} answered other items than the first student ({len(off)} differ, e.g. "
                    f"{off[0]!r}); every student must answer every item."
                )
            rows.append(np.fromiter((answers[item] for item in items), dtype=bool, count=len(items)))
            students.append({**line.get("student", {}), "name": name})
    if not students:
        raise BadData(f"{path} holds no student; the JSONL of py-irt has one line a student.")
    return Responses(tuple(students), items, np.stack(rows), about)


def _line(text: str, where: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    try:
        line = json.loads(text, object_pairs_hook=unique_keys(where))
    except (ValueError, RecursionError) as error:
        raise BadData(f"{where} is not JSON: {error}") from None
    except UnsafeFile as error:
        raise BadData(str(error)) from None
    kinds = {"subject_id": str, "responses": dict}
    if not isinstance(line, dict) or any(not isinstance(line.get(key), kind) for key, kind in kinds.items()):
        raise BadData(f'{where}: expected {{"subject_id": "NAME", "responses": {{"ITEM": 0 or 1, ...}}}}.')
    for key in ("student", "about"):
        if not isinstance(line.get(key, {}), dict):
            raise BadData(f"{where}: {key!r} is {line[key]!r}; a dictionary was expected.")
    for item, answer in line["responses"].items():
        if answer not in (0, 1):
            raise BadData(f"{where}: the answer to {item!r} is {answer!r}; 0 (wrong) or 1 (right) was expected.")
    return line["subject_id"], line["responses"], line
