"""What a recipe gave, in the terminal and as one HTML file that needs nothing else. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from rich.console import Console
from rich.table import Table
from rich.text import Text

from brickyard.compare import details, shown
from brickyard.compare.report import breakable
from brickyard.compare.shown import duration, visible
from brickyard.core.files import write_bytes
from brickyard.recipe import findings
from brickyard.recipe.graph import picture, rails

_WORDS = {"done": "done", "kept": "kept", "failed": "failed", "waiting": "not run"}
_STYLES = {"done": "green", "kept": "dim", "failed": "red", "waiting": "yellow"}
_LOWER = ("bits_per_byte", "nats_per_token", "loss", "mse")


def render(result: Mapping[str, Any], text: str, path: str | Path) -> Path:
    """Write the report of `result` (as of `recipe.run`) with the recipe's own text to `path`, and return the path."""
    path = Path(path)
    write_bytes(path, _template().render(view(result, text)).encode("utf-8"))
    return path


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "compare" / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown.visible(value),
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("recipe.html.j2")


def view(result: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return everything that the template prints, already in words."""
    steps = result["steps"]
    needs = {step["name"]: step["needs"] for step in steps}
    kept = sum(step["seconds"] for step in steps if step["status"] == "kept")
    words = {
        s["name"]: (
            s["what"],
            s["status"],
            f"{s['name']}: {s['what']}; {_WORDS[s['status']]}" + (f", {duration(s['seconds'])}" if s["key"] else ""),
        )
        for s in steps
    }
    return {
        "title": result["recipe"],
        "headline": headline(result),
        "facts": [
            {"name": "Steps", "value": str(len(steps)), "note": counts(steps)},
            {
                "name": "All steps together",
                "value": duration(sum(s["seconds"] for s in steps)),
                "note": "when they ran",
            },
            {"name": "Not repeated", "value": duration(kept), "note": "what the kept steps had taken"},
            {
                "name": "This run",
                "value": duration(result["seconds"]),
                "note": f"{result['date'][:16].replace('T', ' ')} UTC",
            },
        ],
        "graph": picture(needs, words),
        "tables": [_shown(table) for table in tables(steps)],
        "steps": [_step(step) for step in steps],
        "environment": details.tree(result["environment"]),
        "text": Markup("\n").join(escape(visible(line)) for line in text.splitlines()),
        "file": result["file"],
    }


def headline(result: Mapping[str, Any]) -> str:
    """Return in a sentence whether all steps are there."""
    lost = [s["name"] for s in result["steps"] if s["status"] == "failed"]
    if lost:
        return f"{', '.join(lost)} failed."
    doubted = [s["name"] for s in result["steps"] if (s["result"] or {}).get("holds") is False]
    if doubted:
        return f"All steps finished, but what {', '.join(doubted)} checks does not hold."
    return "All steps finished."


def counts(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return how many steps ran, were kept, failed or were not run."""
    found = {word: sum(s["status"] == state for s in steps) for state, word in _WORDS.items()}
    return ", ".join(f"{count} {word}" for word, count in found.items() if count)


def tables(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tables that steps left: {"step", "about", "corner", "heads": [(column, metric)], "rows", ...}.

    A row is (label, cells); `corner` says what the labels are. A cell of scores is {"mean", "low", "high"}; one of an
    audit is {"mean", "text", "interval"}, where `mean` may be None, or None where a model has no such figure. "best"
    holds the best mean of each column of scores, and is empty for an audit, whose figures have no better side; "notes"
    are lines below the table.
    """
    out = []
    for step in steps:
        found = step["result"] or {}
        if step["verb"] == "evaluate" and found:
            columns = found["data"]
            rows = [(row["model"], [cell["score"] for cell in row["scores"]], row["mean"]) for row in found["rows"]]
            length = found["max_length"]
            about = f"Test rows of each data set{f', read to {length} tokens at most' if length else ''}."
            out.append(_marked(step["name"], about, columns, rows))
        if step["verb"] == "merge" and "scores" in found:
            tasks = found["scores"]["tasks"]
            rows = [
                (r["model"], [{**c, "metric": t["metric"]} for c, t in zip(r["scores"], tasks, strict=True)], r["mean"])
                for r in found["scores"]["rows"]
            ]
            out.append(_marked(step["name"], "Test rows of each task.", [t["data"] for t in tasks], rows))
        if "search" in found:
            search = found["search"]
            rows = [
                (row["arm"], [{"mean": score, "metric": search["metric"]} for score in row["scores"]], row["mean"])
                for row in search["tried"]
            ]
            about = f"Validation rows; {search['chosen']} was chosen by the mean."
            out.append(_marked(step["name"], about, search["validate"], rows))
        if step["verb"] == "compare" and found:
            rows = [(m["arm"], [m["score"]], None) for m in found["methods"] if m.get("score")]
            out.append(_marked(step["name"], found["verdict"], ["test"], rows))
        if step["verb"] == "audit" and found:
            out.extend(findings.tables(step))
    return out


def _marked(
    step: str, about: str, columns: Sequence[str], rows: Sequence[tuple[str, list[Any], Any]]
) -> dict[str, Any]:
    """Mark the best of every column, and add the mean where all share a metric."""
    metrics = [rows[0][1][i]["metric"] if rows else "" for i in range(len(columns))]
    with_mean = len(columns) > 1 and all(mean is not None for _, _, mean in rows)
    lines = [
        (label, [*cells, *([{"mean": mean, "metric": metrics[0]}] if with_mean else [])]) for label, cells, mean in rows
    ]
    heads = [(column, metric) for column, metric in zip(columns, metrics, strict=True)]
    heads += [("mean", metrics[0])] if with_mean else []
    best = []
    for i, (_, metric) in enumerate(heads):
        means = [cells[i]["mean"] for _, cells in lines]
        best.append((min if metric in _LOWER else max)(means) if len(means) > 1 else None)
    return {"step": step, "about": about, "corner": "Model", "heads": heads, "rows": lines, "best": best, "notes": []}


def _number(value: float) -> str:
    return f"{value:.4f}"


def _shown(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with its cells in words: (number for sorting, text, interval, whether it is the best)."""
    rows = []
    for label, cells in table["rows"]:
        line = []
        for i, cell in enumerate(cells):
            text, interval = _texts(cell)
            mean = cell["mean"] if cell else None
            line.append(("" if mean is None else mean, text, interval, _is_best(table, i, cell)))
        rows.append((label, line))
    heads = [
        (name, metric.replace("_", " "), "ascending" if metric in _LOWER else "descending")
        for name, metric in table["heads"]
    ]
    best = "The best of each column is bold. " if table["best"] else ""
    small = "Small figures are 95 % intervals. " if any(cell[2] for _, line in rows for cell in line) else ""
    return {**table, "heads": heads, "rows": rows, "hint": f"{best}{small}Press a heading to sort."}


def _texts(cell: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return a cell's figure and its interval in words."""
    if cell is None:
        return shown.MISSING, ""
    if "text" in cell:
        return cell["text"], cell["interval"]
    interval = f"{_number(cell['low'])} to {_number(cell['high'])}" if cell.get("low") is not None else ""
    return _number(cell["mean"]), interval


def _is_best(table: Mapping[str, Any], column: int, cell: Mapping[str, Any] | None) -> bool:
    return bool(table["best"]) and cell is not None and cell["mean"] == table["best"][column]


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    tables = ("rows", "scores", "search", "data", "methods")
    said = {key: value for key, value in (step["result"] or {}).items() if key not in tables or isinstance(value, int)}
    return {
        "name": step["name"],
        "what": step["what"],
        "word": _WORDS[step["status"]],
        "state": step["status"],
        "seconds": duration(step["seconds"]) if step["key"] else shown.MISSING,
        "reason": step["reason"],
        "options": details.tree({key: value for key, value in step["options"].items() if value not in (None, "", [])}),
        "result": details.tree(said),
        "folder": step["folder"],
    }


def show(result: Mapping[str, Any], console: Console, *, dry: bool = False) -> None:
    """Write the graph with the time of every step, and the tables of scores, to a terminal."""
    plain = console.options.ascii_only
    steps = result["steps"]
    lanes = rails({s["name"]: s["needs"] for s in steps}, ascii_only=plain)
    names = max(len(s["name"]) for s in steps)
    room = max(console.width - len(lanes[0]) - names - 24, 16)
    console.print()
    for lane, step in zip(lanes, steps, strict=True):
        status, what = step["status"], visible(step["what"])
        if len(what) > room:
            what = f"{what[: room - 3]}..."
        word = "to run" if dry and status == "waiting" else _WORDS[status]
        taken = duration(step["seconds"]) if step["seconds"] and status in ("done", "kept", "failed") else ""
        line = Text.assemble((f"{lane} ", "blue"), (f"{step['name']:<{names}}  ", "bold"), f"{what:<{room}}  ")
        line.append(f"{word:<8}", "dim" if dry and status == "waiting" else _STYLES[status])
        line.append(f"{taken.replace(chr(160), ' '):>10}")
        console.print(line, soft_wrap=True)
    for table in tables(steps):
        console.print()
        said = f"  {visible(table['about'])}{_better(table)}"
        console.print(Text.assemble((table["step"], "bold"), said), soft_wrap=True)
        console.print(_terminal(table))
        for note in table["notes"]:
            console.print(Text(visible(note), "dim"), soft_wrap=True)
    lost = [s for s in steps if s["status"] == "failed"]
    for step in lost:
        console.print()
        console.print(Text.assemble(("failed ", "red"), (step["name"], "bold"), f": {visible(step['reason'])}"))
        console.print(Text(f"details: {step['folder']}/error.txt", "dim"), soft_wrap=True)
    console.print()


def _better(table: Mapping[str, Any]) -> str:
    """Return which way a table of scores is better; nothing for an audit."""
    if not table["best"]:
        return ""
    metrics = list(dict.fromkeys(metric for _, metric in table["heads"]))
    better = "lower" if all(metric in _LOWER for metric in metrics) else "higher"
    return f" {', '.join(metrics)}; {better} is better, the best is bold."


def _terminal(table: Mapping[str, Any]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    made.add_column("", overflow="fold")
    for name, _ in table["heads"]:
        made.add_column(Text(visible(name).removeprefix("embedded:")), justify="right", overflow="fold")
    for label, cells in table["rows"]:
        texts = []
        for i, cell in enumerate(cells):
            text, interval = _texts(cell)
            # The interval of a score stands in the HTML report, that of an audit's figures in the notes below them.
            told = text if table["best"] or table["notes"] or not interval else f"{text} ({interval})"
            texts.append(Text(visible(told), "bold" if _is_best(table, i, cell) else ""))
        made.add_row(Text(visible(label)), *texts)
    return made
