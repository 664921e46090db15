"""The long parts of the report in words: receipts, the data report, the confusion matrix, nested settings.

Keys that are known get a table; everything else is shown as it came, so that nothing a run recorded is hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from brickyard.compare import shown
from brickyard.compare.shown import number

MOST_CLASSES = 40  # a larger confusion matrix is given as its largest confusions only
MOST_ITEMS = 200  # of one list
_MOST_LETTERS = 4000  # of one text
_SPLITS = ("train", "validation", "test")

Table = dict[str, Any]  # {"columns": [title], "rows": [(name, [(sort, text)])]}


def lines(value: Any) -> list[str]:
    """Return warnings, given as a list or a single text, as a list of texts."""
    if not value:
        return []
    return [str(line) for line in value] if isinstance(value, (list, tuple)) else [str(value)]


def receipts(methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a table of what moved in each arm, and per arm its warnings, matched modules, tensors and the rest."""
    cards, rows = [], []
    for m in methods:
        receipt = dict(m.get("receipt") or {})
        if not receipt:
            continue
        warnings, matched, moved = (receipt.pop(key, None) for key in ("warnings", "matched", "moved"))
        tensors = [t for t in moved if isinstance(t, Mapping)] if isinstance(moved, list) else []
        rest = {key: value for key, value in receipt.items() if value not in ([], {}, None)}
        rows.append((m["arm"], _receipt_row(receipt, tensors, lines(warnings))))
        cards.append(
            {
                "arm": m["arm"],
                "warnings": lines(warnings),
                "matched": [(pattern, fold(names), len(names)) for pattern, names in matched.items()]
                if isinstance(matched, Mapping)
                else [],
                "moved": _moved(tensors),
                "tree": tree(rest if tensors or not moved else {"moved": moved, **rest}),
                "setting": tree(_setting(m)),
                "tried": tree(m.get("tried") or {}),
            }
        )
    columns = ["Tensors moved", "Largest relative change", "Logits moved by, mean", "at most", "Warnings"]
    known = any(cell[0] is not None for _, cells in rows for cell in cells[:4])
    return {"cards": cards, "table": {"columns": columns, "rows": rows} if known else None} if cards else {}


def _setting(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arm as it was trained at last, with everything that decided it."""
    known = {"arm": method.get("setting_arm"), **(method.get("training") or method.get("setting") or {})}
    return {**known, **{key: method.get(key) for key in ("seeds", "brick") if method.get(key) is not None}}


def _receipt_row(receipt: Mapping[str, Any], tensors: list[Mapping[str, Any]], warnings: list[str]) -> list[Any]:
    trainable, logits = number(receipt.get("trainable_tensors")), receipt.get("logits") or {}
    relative = [(r, str(t.get("name"))) for t in tensors if (r := number(t.get("relative"))) is not None]
    far, name = max(relative, default=(None, ""))
    of = f" of {trainable:,.0f}" if trainable is not None else ""
    distances = [number(logits.get(key)) if isinstance(logits, Mapping) else None for key in ("mean", "max")]
    return [
        (len(tensors) if tensors else None, f"{len(tensors):,}{of}" if tensors else shown.MISSING),
        (far, shown.MISSING if far is None else f"{shown.digits(100 * far)}\u00a0%", name),
        *((d, shown.MISSING if d is None else shown.digits(d)) for d in distances),
        (len(warnings), str(len(warnings)) if warnings else "none"),
    ]


def _moved(tensors: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (folded tensor names, their changes relative to the old norm), largest change first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in tensors:
        groups.setdefault(re.sub(r"\d+", "0", str(tensor.get("name"))), []).append(tensor)
    found = []
    for members in groups.values():
        relative = sorted(100 * r for t in members if (r := number(t.get("relative"))) is not None)
        changes = sorted(c for t in members if (c := number(t.get("change"))) is not None)
        if relative:
            words = f"{_range(relative, shown.digits)}\u00a0% of the old norm"
        else:
            words = f"by {_range(changes, shown.digits)} (began at zero)" if changes else ""
        found.append((relative[-1:] or [math.inf], ", ".join(fold([str(t.get("name")) for t in members])), words))
    return [(names, words) for _, names, words in sorted(found, key=lambda f: f[0], reverse=True)]


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    low, high = show(values[0]), show(values[-1])
    return low if low == high else f"{low} to {high}"


def data_report(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data set in words: one table with a row per split, a table of the classes, warnings, and the rest."""
    if not data:
        return {}
    report = {
        **(data.get("report") or {}),
        "encoding": data.get("encoding") or (data.get("report") or {}).get("encoding"),
    }
    report["fingerprint"] = data.get("fingerprint")
    warnings, classes = lines(report.pop("warnings", None)), report.pop("classes", None)
    report.pop("name", None)
    per_split = {"rows": data.get("rows") or report.get("rows") or {}}
    report.pop("rows", None)
    for key, value in list(report.items()):
        if isinstance(value, Mapping) and value and set(value) <= set(_SPLITS):
            if all(isinstance(v, Mapping) for v in value.values()):
                names = [n for v in value.values() for n in v if n != "rows"]
                inner = {n: {s: v[n] for s, v in value.items() if n in v} for n in dict.fromkeys(names)}
            else:
                inner = {key: value}
            if all(not isinstance(v, (Mapping, list)) for column in inner.values() for v in column.values()):
                per_split |= inner
                report.pop(key)
    labels = [str(label) for label in data.get("labels") or []]
    return {
        "name": data.get("name") or "",
        "warnings": warnings,
        "splits": _by_split(per_split, _SPLITS),
        "classes": _classes(classes, labels),
        "labels": labels[:MOST_ITEMS],
        "count": len(labels),
        "tree": tree({key: value for key, value in report.items() if value not in ({}, [], None)}),
    }


def _by_split(columns: Mapping[str, Mapping[str, Any]], splits: Sequence[str]) -> Table | None:
    present = [s for s in splits if any(s in column for column in columns.values())]
    if not present:
        return None
    rows = [
        (s, [(number(column.get(s)), figure(key, column.get(s))) for key, column in columns.items()]) for s in present
    ]
    return {"columns": [_title(key) for key in columns], "rows": rows}


def _title(key: str) -> str:
    words = key.replace("_", " ").removesuffix(" bytes")
    return words[:1].upper() + words[1:]


def _classes(classes: Any, labels: Sequence[str]) -> Table | None:
    if not isinstance(classes, Mapping) or not all(isinstance(v, Mapping) for v in classes.values()) or not classes:
        return None
    names = labels or list(dict.fromkeys(str(n) for counts in classes.values() for n in counts))
    splits = [s for s in (*_SPLITS, *classes) if s in classes]
    splits = list(dict.fromkeys(splits))
    rows = [(n, [(c := number(classes[s].get(n)), shown.count(c)) for s in splits]) for n in names[:MOST_ITEMS]]
    return {"columns": [_title(s) for s in splits], "rows": rows}


def confusion(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the confusion matrix: cells with a level of colour (share of the row), recall, precision, extremes."""
    if not given or not given.get("matrix"):
        return {}
    labels, matrix = [str(v) for v in given["labels"]], [[int(v) for v in row] for row in given["matrix"]]
    rows, columns = [sum(row) for row in matrix], [sum(column) for column in zip(*matrix, strict=True)]
    errors = [(v, i, j) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and v]
    worst = max((v / rows[i] for v, i, _ in errors), default=1.0)
    names = shown.short_names(labels, 22)
    drawn = []
    for i, row in enumerate(matrix):
        cells = []
        for j, v in enumerate(row):
            level = math.ceil(6 * v / (rows[i] * (1.0 if i == j else worst))) if v else 0
            cells.append((v, f"{'d' if i == j else 'e'}{min(6, level)}" if v else ""))
        recall = _share(row[i], rows[i])
        drawn.append({"label": labels[i], "short": names[labels[i]], "cells": cells, "recall": recall})
    largest = sorted(errors, key=lambda e: (-e[0], e[1], e[2]))[: 25 if len(labels) > MOST_CLASSES else 3]
    return {
        "arm": given.get("arm") or "",
        "large": len(labels) > MOST_CLASSES,
        "classes": len(labels),
        "lines": drawn,
        "labels": [(label, names[label]) for label in labels],
        "precision": [_share(matrix[i][i], columns[i]) for i in range(len(labels))],
        "largest": [(labels[i], labels[j], v) for v, i, j in largest],
    }


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}" if whole else shown.MISSING


def tree(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return nested values as (name, text or children) in words: units by the ends of the names, lists folded."""
    return [{"name": str(key).replace("_", " "), **_node(str(key), value)} for key, value in values.items()]


def _node(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {"text": "", "children": tree(value)}
    if isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
        return {"text": "", "children": tree({str(i + 1): v for i, v in enumerate(value[:MOST_ITEMS])})}
    if isinstance(value, (list, tuple)):
        names = all(isinstance(v, str) for v in value)
        items = fold([str(v) for v in value]) if names else [figure("", v) for v in value]
        more = [f"and {len(items) - MOST_ITEMS:,} more"] if len(items) > MOST_ITEMS else []
        return {"text": ", ".join(items[:MOST_ITEMS] + more) or "none", "children": []}
    return {"text": figure(key, value), "children": []}


def figure(key: str, value: Any) -> str:
    """Return one plain value in words; the end of its key says its unit (`_bytes`, `_seconds`, `_ms`, `_share`)."""
    known = number(value)
    if value is None or value == {}:
        return shown.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if known is None:
        text = str(value)
        return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}… ({len(text):,} characters in all)"
    if key.endswith("bytes"):
        return shown.size(known)
    if key.endswith("seconds"):
        return shown.duration(known)
    if key.endswith("_ms"):
        return shown.milliseconds(known)
    if key.endswith("share"):
        return f"{shown.digits(100 * known)}\u00a0%"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{known:.4g}" if abs(known) < 10_000 else shown.digits(known, 4)


def fold(names: Sequence[str]) -> list[str]:
    """Return module names, those that differ in one number only joined: `layer.{0–5}.query (6)`. Nothing is lost."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    return [folded for members in groups.values() for folded in _fold(members)]


def _fold(members: list[str]) -> list[str]:
    """Join names that are alike but for their numbers, if only one of the numbers varies and none is written oddly."""
    numbers = [re.findall(r"\d+", name) for name in members]
    varied = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
    plain = all(str(int(n)) == n for row in numbers for n in row)
    if len(varied) != 1 or not plain or len({row[varied[0]] for row in numbers}) < len(members):
        return members
    parts = re.split(r"\d+", members[0])
    filled = [
        _ranges([int(row[i]) for row in numbers]) if i in varied else numbers[0][i] for i in range(len(numbers[0]))
    ]
    return ["".join(a + b for a, b in zip(parts, [*filled, ""], strict=True)) + f" ({len(members)})"]


def _ranges(values: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "{" + ",".join(str(a) if a == b else f"{a}–{b}" for a, b in runs) + "}"
