"""Data sets: read, checked, labelled and fingerprinted. Nothing is skipped, cropped or cast in silence.

Row numbers in messages count from 1. String and integer labels are classes (sorted), floating-point labels regression.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from brickyard.core import readers
from brickyard.core.errors import BadData, UnknownName, UsageError
from brickyard.core.inputs import (
    INPUTS,
    KINDS,
    UNLABELLED,
    check_inputs,
    chosen_of,
    input_of,
    keys,
    largest,
    plain,
    shown,
    undecided,
    whole_files,
)
from brickyard.core.method import LANGUAGE_TASKS
from brickyard.core.points import as_clouds
from brickyard.core.readers import SPLITS, Source
from brickyard.core.split import Split, cut_ends, cut_rows
from brickyard.core.task import metric_of

OVERLAP_LIMIT = 0.05  # of the test rows
ROW_LIMIT = 1_000_000  # bytes of text in one row
FEW_DOCUMENTS = 10  # fewer than these in train: validation is cut from the end of each, not from their number
DOCUMENT_LIMIT = 50_000_000  # bytes of one document of a language model
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf(inity)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Data:
    """A data set that may be trained on.

    Attributes:
        name: folder name, hub id or embedded name.
        kind: one of `method.TASKS`.
        input: one of `inputs.INPUTS`: "text", "pair", "image", "points", "completion", "preference", "choice" or
            "prompt".
        splits: "train", "validation", "test", as far as there are any.
        labels: class names in the order of the indices; None where the labels are no classes, or there are none.
        report: what was found and done (rows, cut, duplicates, overlap, classes, formats, ...), JSON-serialisable.
        fingerprint: sha256 over all rows in order.
        test_overlap: [test rows], whether the same input also stands in train (or in the validation cut from it).
    """

    name: str
    kind: str
    input: str
    splits: dict[str, Split]
    labels: tuple[str, ...] | None
    report: dict[str, Any]
    fingerprint: str
    test_overlap: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


def read_data(
    spec: Any,
    *,
    task: str | None = None,
    need: Sequence[str] = ("train", "test"),
    metric: str | None = None,
    allow_overlap: bool = False,
    labelled: bool = True,
    labels: Sequence[str] | None = None,
    row_limit: int | None = None,
) -> Data:
    """Read and check a data set.

    Args:
        spec: a folder with train, validation and test as .parquet, .jsonl, .csv or .txt; `embedded:NAME`; a hub id;
            {"train": {"text": [...], "label": [...]}, ...}; or what `readers.read` gave of one of them. Columns: text[,
            text_pair], label; image, label; points, label (a cloud as a list of [x, y, z]); prompt, completion; prompt,
            chosen, rejected; or prompt, choices, label (the right choice, counted from 0).
        task: overrides what the labels' type says ("regression" for integers, a classification for whole floats).
        need: the splits that must be there. Where a needed train comes without validation, 10 % of its distinct
            inputs are cut from it with seed 0, class by class; with a column group (speaker, article), of its groups.
        metric: only checked here, so that a wrong one stops before any work.
        allow_overlap: accept more than 5 % of test rows that stand in train.
        labelled: False reads rows without their labels.
        labels: class names that the labels must be among, in this order (those of a brick).
        row_limit: bytes of text (or of points, as float32) that one row may have; by default ROW_LIMIT, for documents
            DOCUMENT_LIMIT.

    A .txt file is a document for a language model. Rows of a table are such documents with task="causal-lm".

    Raises:
        BadData: anything about the rows or files, with the place. UnknownName: an unknown embedded set, task or metric.
        UsageError: a task or metric that does not fit.
    """
    if task is not None:
        metric_of(task, metric)
    for split in need:
        if split not in SPLITS:
            raise UnknownName.among("split", split, SPLITS)
    source = spec if isinstance(spec, Source) else readers.read(spec)
    absent = [split for split in need if split not in source.splits and not (split == "validation" and "train" in need)]
    if absent:
        raise BadData(
            f"{source.name} has no {' and no '.join(absent)} split; found: {', '.join(source.splits) or 'none'}"
            f"{' (and, not read: ' + ', '.join(source.ignored[:5]) + ')' if source.ignored else ''}."
        )
    documents = task == "causal-lm" or (task is None and labelled and plain(source))
    if documents:
        labelled, task = False, "causal-lm"
        metric_of(task, metric)
        whole_files(source)
    if row_limit is None:
        row_limit = DOCUMENT_LIMIT if documents else ROW_LIMIT
    kind_of_input = input_of(source, labelled)
    wanted = INPUTS[kind_of_input]
    if documents and kind_of_input != "text":
        raise UsageError(f"the task 'causal-lm' does not fit the columns {', '.join(wanted)}; expected text.")
    fits = KINDS[kind_of_input]
    if task not in (None, "regression", "causal-lm", fits) or (task == "regression" and fits in LANGUAGE_TASKS):
        raise UsageError(f"the task {task!r} does not fit the columns {', '.join(wanted)}; expected {fits!r}.")
    labelled = labelled and kind_of_input not in UNLABELLED
    if kind_of_input == "points":
        as_clouds(source, row_limit)
    empty = {
        split: check_inputs(split, columns, wanted, 2 if labelled else 1, row_limit)
        for split, columns in source.splits.items()
    }
    key = {split: keys(split, columns, wanted) for split, columns in source.splits.items()}
    raw: dict[str, list] = {}
    names: tuple[str, ...] | None = None
    kind = task or fits
    if labelled:
        raw, kind, names = _labels(source, task, kind_of_input, tuple(labels) if labels is not None else None)
    if source.splits:
        metric_of(kind, metric)
    splits = {
        split: Split({**{name: columns[name] for name in wanted}, **({"label": raw[split]} if labelled else {})})
        for split, columns in source.splits.items()
    }
    group = _groups(source)
    mask, overlap = _overlap(key, allow_overlap)
    overlap["test_groups_in_train"] = sum(map(set(group.get("train", ())).__contains__, group.get("test", ())))
    cut = None
    if "train" in need and "validation" not in splits:
        if documents and len(splits["train"]) < FEW_DOCUMENTS:
            cut = cut_ends(splits)
        else:
            cut = cut_rows(splits, key["train"], None if names is None else raw["train"], group.get("train"))
    splits = {split: splits[split] for split in SPLITS if split in splits}
    report = {
        "name": source.name,
        "origin": source.origin,
        "format": source.formats,
        "rows": {split: len(rows) for split, rows in splits.items()},
        "cut": cut,
        "duplicates": {split: len(values) - len(set(values)) for split, values in key.items()},
        "contradictions": {split: _contradictions(key[split], values) for split, values in raw.items()},
        "overlap": overlap,
        "empty_texts": empty,
        "undecided": {s: undecided(s, columns) for s, columns in source.splits.items()}
        if kind == "preference"
        else None,
        "largest_row_bytes": {split: largest(rows, wanted) for split, rows in splits.items()},
        "classes": None if names is None else {split: _counts(rows["label"], names) for split, rows in splits.items()},
        "label_values": {s: _spread(rows["label"]) for s, rows in splits.items()}
        if kind == "regression" and raw
        else None,
        "ignored_columns": {
            s: [c for c in found if c not in (*wanted, "label", "group")] for s, found in source.found.items()
        },
        "ignored_files": source.ignored,
    }
    fingerprint = _fingerprint(kind, names, splits, wanted)
    return Data(source.name, kind, kind_of_input, splits, names, report, fingerprint, mask)


def _labels(
    source: Source, task: str | None, kind_of_input: str, given: tuple[str, ...] | None
) -> tuple[dict[str, list], str, tuple[str, ...] | None]:
    """Return the labels as class indices or floats, the kind of task, and the class names."""
    raw = {split: columns["label"] for split, columns in source.splits.items()}
    for split, values in raw.items():
        empty = [i for i, v in enumerate(values, 1) if v is None or (isinstance(v, str) and not v.strip())]
        if empty:
            raise BadData(f"split {split!r}: the label is empty in {shown(empty)}. Remove or label them.")
    raw = _spelled(raw, source.textual)
    if kind_of_input == "choice":
        return chosen_of(raw, source.splits), KINDS[kind_of_input], None
    types = {split: _type(split, values) for split, values in raw.items()}
    if str in types.values() and set(types.values()) != {str}:
        found = ", ".join(f"{split}: {kind.__name__}" for split, kind in types.items())
        raise BadData(f"labels are of different types ({found}); expected the same in every split.")
    if task == "regression" or (task is None and float in types.values()):
        if given is not None:
            raise BadData(f"the data's labels are numbers; expected the classes {', '.join(given)}.")
        return {split: _numbers(split, values) for split, values in raw.items()}, "regression", None
    if float in types.values():
        raw = {split: _whole(split, values) for split, values in raw.items()}
    names, position = _classes(raw, source.names, given)
    indexed = {split: _index(split, values, position, names) for split, values in raw.items()}
    if "train" in indexed:
        known = set(indexed["train"])
        for split in (split for split in indexed if split != "train"):
            new = sorted({label for label in indexed[split] if label not in known})
            if new:
                rows = [i for i, label in enumerate(indexed[split], 1) if label == new[0]]
                sample = ", ".join(repr(names[label]) for label in new[:5])
                raise BadData(f"split {split!r} has labels that train never has: {sample} ({shown(rows)}).")
        if len(known) < 2:
            raise BadData(f"train has one class only, {names[next(iter(known))]!r}; expected two or more.")
    return indexed, KINDS[kind_of_input], names


def _spelled(raw: dict[str, list], textual: set[str]) -> dict[str, list]:
    """Read the labels of csv splits as numbers where all of them spell numbers."""
    strings = {value for split in textual for value in raw[split]}
    if any(isinstance(value, str) for split in raw if split not in textual for value in raw[split]):
        return raw
    for pattern, kind in ((_INTEGER, int), (_FLOAT, float)):
        if strings and all(pattern.fullmatch(value.strip()) for value in strings):
            return {split: [kind(v) for v in values] if split in textual else values for split, values in raw.items()}
    return raw


def _type(split: str, values: list) -> type:
    """Return str, int, bool or float (also for int beside float); a mixture with strings is an error."""
    types = {type(value) for value in values}
    if types <= {str} or types <= {bool}:
        return types.pop()
    if types <= {int, float}:
        return float if float in types else int
    first = type(values[0])
    row = next((i for i, value in enumerate(values, 1) if type(value) is not first), 1)
    raise BadData(
        f"split {split!r}, row {row}: the label is {type(values[row - 1]).__name__} {values[row - 1]!r:.80}; expected "
        f"strings, integers or floats throughout (row 1 is {first.__name__})."
    )


def _numbers(split: str, values: list) -> list[float]:
    numbers: list[float] = []
    for row, value in enumerate(values, 1):
        try:
            number = float(value)
        except ValueError as cause:
            raise BadData(f"split {split!r}, row {row}: the label {value!r:.80} is no number.") from cause
        if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
            raise BadData(f"split {split!r}, row {row}: the label {number} is not a finite float32 number.")
        numbers.append(number)
    if split == "train" and len(set(numbers)) < 2:
        raise BadData(f"train has one label value only, {numbers[0]}; expected two or more.")
    return numbers


def _whole(split: str, values: list) -> list[int]:
    row = next((i for i, value in enumerate(values, 1) if not float(value).is_integer()), None)
    if row is not None:
        raise BadData(f"split {split!r}, row {row}: the label {values[row - 1]} is no class; expected whole numbers.")
    return [int(value) for value in values]


def _classes(
    raw: dict[str, list], names: tuple[str, ...] | None, given: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Return the class names and the index of each label as it stands in the data.

    Indices with the names of a ClassLabel feature keep their order; other labels are sorted, integers by value.
    """
    values = {value for labels in raw.values() for value in labels}
    if names is not None and not any(isinstance(value, str) for value in values):
        name_of: dict[Any, str] = dict(enumerate(names))
    else:
        name_of = {value: str(value).lower() if isinstance(value, bool) else str(value) for value in sorted(values)}
    classes = tuple(name_of.values()) if given is None else given
    position = {name: index for index, name in enumerate(classes)}
    return classes, {value: position[name] for value, name in name_of.items() if name in position}


def _index(split: str, values: list, position: dict[Any, int], names: tuple[str, ...]) -> list[int]:
    wrong = [i for i, value in enumerate(values, 1) if value not in position]
    if wrong:
        value = values[wrong[0] - 1]
        hidden = " A label of -1 marks hidden labels; read such rows as unlabelled." if value == -1 else ""
        raise BadData(
            f"split {split!r}: the label {value!r:.80} of {shown(wrong)} is outside the {len(names)} classes "
            f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}).{hidden}"
        )
    return [position[value] for value in values]


def _contradictions(keys: Sequence[bytes], labels: Sequence[Any]) -> int:
    """Count the rows whose input also stands there with another label."""
    seen: dict[bytes, set] = {}
    for key, label in zip(keys, labels, strict=True):
        seen.setdefault(key, set()).add(label)
    return sum(len(seen[key]) > 1 for key in keys)


def _groups(source: Source) -> dict[str, list[str]]:
    """Return the groups of each split's rows, where there is such a column; BadData where a row has none."""
    found = {split: columns["group"] for split, columns in source.splits.items() if "group" in columns}
    for split, values in found.items():
        if empty := [row for row, value in enumerate(values, 1) if value is None or not str(value).strip()]:
            raise BadData(f"split {split!r}: the group is empty in {shown(empty)}. Name one, or leave the column out.")
    return {split: [str(value) for value in values] for split, values in found.items()}


def _overlap(keys: dict[str, list[bytes]], allow: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """Find the test rows that stand in train, exactly; too many are refused."""
    known = {split: set(values) for split, values in keys.items()}
    test, train = keys.get("test", []), known.get("train", set())
    mask = np.array([key in train for key in test], dtype=bool)
    share = float(mask.mean()) if len(mask) else 0.0
    if share > OVERLAP_LIMIT and not allow:
        row = int(mask.argmax())
        raise BadData(
            f"{int(mask.sum())} of {len(mask)} test rows ({share:.1%}) also stand in train, above the limit of "
            f"{OVERLAP_LIMIT:.0%}; the first is row {row + 1} of test, row {keys['train'].index(test[row]) + 1} of "
            "train. Remove them from train, or allow the overlap (--allow-overlap)."
        )
    validation = keys.get("validation", [])
    return mask, {
        "test_in_train": int(mask.sum()),
        "test_in_train_share": share,
        "validation_in_train": sum(key in train for key in validation),
        "test_in_validation": sum(key in known.get("validation", set()) for key in test),
    }


def overlap_sentence(overlap: dict[str, Any], rows: int) -> str:
    """Say how many test rows stand in train, themselves or by their group, of a report's `overlap`; "" if none."""
    found, share = overlap["test_in_train"], overlap["test_in_train_share"]
    told = [f"{found:,} of {rows:,} test rows ({share:.1%}) also stand in train."] if found else []
    if alike := overlap.get("test_groups_in_train"):
        told.append(f"{alike:,} of {rows:,} test rows belong to groups that train has too: scores may be too good.")
    return " ".join(told)


def _counts(labels: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    count = Counter(labels)
    return {name: count[index] for index, name in enumerate(names)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    array = np.asarray(values)
    spread = {"least": array.min(), "greatest": array.max(), "mean": array.mean(), "deviation": array.std()}
    return {name: float(value) for name, value in spread.items()}


def _fingerprint(kind: str, names: tuple[str, ...] | None, splits: dict[str, Split], wanted: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([kind, names, list(wanted)]).encode())
    for split, rows in splits.items():
        digest.update(json.dumps([split, len(rows)]).encode())
        for key in keys(split, rows.columns, wanted):
            digest.update(key)
        digest.update(json.dumps(rows.columns.get("label")).encode())
    return digest.hexdigest()
