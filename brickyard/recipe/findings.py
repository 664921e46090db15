"""The tables that an `audit` step leaves in a recipe's report. Imports no torch.

First the figures of each model, one row a model. Then the method's own tables: where a table gives the same figures of
the base and of the changed model ("base: F", "changed: F"), each figure F becomes a table with a column for every model
of the step, so that they stand side by side, and its further columns are left to the step's details; any other table is
shown as it came, once for each model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from brickyard.compare import shown
from brickyard.compare.details import figure

_OF_MODEL = re.compile(r"(base|changed): (.+)")
_WITH_INTERVAL = re.compile(r"(.+?) \((.+)\)")  # 47 (44-50)
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_CENTRES = ("mean", "value", "difference")  # what the figure of an interval is called


def tables(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of a finished audit, in the form of `report.tables`."""
    found, method = step["result"], step["options"]["audit"]
    base, every = found["base"], [one["findings"] for one in found["audited"]]
    names = _names(base, [one["model"] for one in found["audited"]])
    notes = [f"{name}: {line}" for name, one in zip(names, every, strict=True) for line in one["detail"].splitlines()]
    about = f"{method}, on {base}{' and beside it' if names != [base] else ''}."
    out = [{**_table(step, about, "Model", _figures(base, names, every)), "notes": notes}]
    compared = _side_by_side(base, names, every)
    for title, rows in compared.items():
        corner = next(iter(every[0]["table"][0]))
        out.append(_table(step, f"{title}, by {corner}.", corner, rows))
    for name, one in zip(names, every, strict=True):
        plain = {} if compared else {one.get("title", method): one["table"]}
        for title, rows in {**plain, **one.get("tables", {})}.items():
            of = f" ({name})" if len(names) > 1 else ""
            out.append(_table(step, f"{title}{of}.", next(iter(rows[0])), [_row(row) for row in rows]))
    return out


def _names(base: str, models: Sequence[str | None]) -> list[str]:
    """Return a name for each audited model, of which no two and none but the base itself are alike."""
    out: list[str] = []
    for model in models:
        alike = sum(other == model for other in (base, *models[: len(out)]))
        out.append(base if model is None else f"{model} ({alike + 1})" if alike else model)
    return out


def _table(
    step: Mapping[str, Any], about: str, corner: str, rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return rows of figures by their names as a table; a row without some figure has None in its place."""
    names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    return {
        "step": step["name"],
        "about": about,
        "corner": corner,
        "heads": [(name, "") for name in names],
        "rows": [(label, [cells.get(name) for name in names]) for label, cells in rows],
        "best": [],
        "notes": [],
    }


def _figures(base: str, names: Sequence[str], every: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the figures of each model: of the base once, where a method tells them apart, with what was gained."""
    if "models" not in every[0]:
        return [(name, _cells(one)) for name, one in zip(names, every, strict=True)]
    rows = [(base, _cells(every[0]["models"]["base"]))]
    for name, one in zip(names, every, strict=True):
        if "changed" in one["models"]:
            beside = {key: value for key, value in one.items() if key != "models"}
            rows.append((name, _cells({**one["models"]["changed"], **beside})))
    return rows


def _cells(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures among values: numbers, truth values, and mappings that hold one with its interval."""
    found = {key.replace("_", " "): _cell(value) for key, value in values.items()}
    return {name: cell for name, cell in found.items() if cell is not None}


def _cell(value: Any) -> dict[str, Any] | None:
    """Return one figure as {"mean", "text", "interval"}; None for what is no figure."""
    if isinstance(value, Mapping):
        centre = next((value[name] for name in _CENTRES if shown.number(value.get(name)) is not None), None)
        ends = [shown.number(value.get(end)) for end in ("low", "high")]
        interval = "" if None in ends else " to ".join(map(_told, ends))
        return None if centre is None else {"mean": centre, "text": _told(centre), "interval": interval}
    if isinstance(value, bool | int | float):
        return {"mean": shown.number(value), "text": _told(value), "interval": ""}
    return None


def _told(value: Any) -> str:
    """Return one value in words, a fraction to as many places as a score has."""
    return f"{value:.4f}" if isinstance(value, float) else figure("", value)


def _side_by_side(
    base: str, names: Sequence[str], every: Sequence[Mapping[str, Any]]
) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return figure -> rows with a cell for each model; empty where the method's table does not tell models apart."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name, one in zip(names, every, strict=True):
        for row in one["table"]:
            (_, head), *rest = row.items()
            for column, value in rest:
                if known := _OF_MODEL.fullmatch(column):
                    model = base if known[1] == "base" else name
                    out.setdefault(known[2], {}).setdefault(str(head), {})[model] = _written(value)
    return {title: list(rows.items()) for title, rows in out.items()}


def _row(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    (_, head), *rest = row.items()
    return str(head), {name: _written(value) for name, value in rest if value != ""}


def _written(value: Any) -> dict[str, Any]:
    """Return a value of a method's own table as a cell: words as they are, an interval in brackets apart."""
    if not isinstance(value, str):
        return {"mean": shown.number(value), "text": _told(value), "interval": ""}
    text, interval = known.groups() if (known := _WITH_INTERVAL.fullmatch(value)) else (value, "")
    number = _NUMBER.fullmatch(text)
    return {"mean": float(text) if number else None, "text": text, "interval": interval}
