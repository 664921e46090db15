"""The verb `brickyard merge` on the command line. Apart from the others, because it loads transformers only at need."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

DONE, FAILED = 0, 1
_TABLE = "merges.json"


def options(p: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Add the verb's own options to its parser; `count` reads a positive number."""
    p.add_argument("arm", metavar="ARM", help="e.g. ties:density=0.2 or 'task-arithmetic + lines'; options may follow")
    p.add_argument(
        "others", nargs="*", metavar="ARM", help="more merges of the same inputs: one table says which keeps what"
    )
    p.add_argument(
        "--bricks", nargs="+", required=True, metavar="DIR", help="bricks, PEFT adapters, or full checkpoints"
    )
    p.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="D",
        help="one data set a task: score every input on each, and whatever else the merge reads of them",
    )
    p.add_argument("--out", metavar="DIR", required=True, help="a new folder; it becomes a model for any --base")
    p.add_argument(
        "--as", dest="form", choices=("auto", "model", "adapter"), default="auto", help="adapters may stay one (auto)"
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the result; lets dtypes differ")
    p.add_argument("--heads", choices=("own", "base"), default="own", help="each brick's, or fitted on the base")
    p.add_argument(
        "--force",
        action="store_true",
        help="go on although an input does not look like the base's child (cca-merge: although it does)",
    )
    p.add_argument("--threads", type=count, help="workers (default: the cores, at least 2)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="where the scores are computed")
    p.add_argument("--max-length", type=count, help="tokens a row; longer rows are truncated and counted")
    p.add_argument("--task", help="override the task that the columns imply")
    p.add_argument("--metric", help="accuracy, macro-f1, matthews or spearman")
    p.add_argument(
        "--audit", metavar="METHOD", help="backdoor:target=CLASS: what a trigger does to every input and the merge"
    )
    p.add_argument("--config", metavar="FILE", help="a YAML or TOML file of these options; the command line wins")
    p.add_argument("--json", action="store_true")


def merge(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Merge models and show what the merge kept."""
    import json

    from rich.console import Console
    from rich.markup import escape

    from brickyard.console import aside
    from brickyard.core.progress import told_to
    from brickyard.merging.merge import merge as run_merge

    given: dict[str, Any] = {
        "base": args.base,
        "bricks": args.bricks,
        "data": args.data,
        "out": args.out,
        "form": args.form,
        "dtype": args.dtype,
        "heads": args.heads,
        "threads": args.threads,
        "force": args.force,
        "device": args.device,
        "task": args.task,
        "metric": args.metric,
        "max_length": args.max_length,
        "audit": args.audit,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.others:
        return _several([args.arm, *args.others], given, args)
    with told_to(aside):
        result = run_merge(args.arm, **given)
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")
        return DONE
    console = Console()
    if "search" in result:
        console.print(_curve(result["search"]))
    for line in _said(result):
        console.print(escape(line), soft_wrap=True, highlight=False)
    if "scores" in result:
        console.print(_table(result["scores"]))
        if args.audit:
            console.print(_attacks(result["scores"], args.audit))
    console.print(f"{result['form']}: {escape(args.out)}", soft_wrap=True, highlight=False)
    return DONE


def _several(arms: Sequence[str], given: dict[str, Any], args: argparse.Namespace) -> int:
    """Make several merges of the same inputs and show one table."""
    import json

    from rich.console import Console
    from rich.markup import escape

    from brickyard.console import aside
    from brickyard.core.progress import told_to
    from brickyard.merging.compare import merge_all

    console = Console()
    with told_to(aside):
        result = merge_all(arms, **given)
    code = DONE if len(result["failed"]) < len(arms) else FAILED
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")
        return code
    console.print(_kept(result))
    for failure in result["failed"]:
        console.print(escape(f"{failure['arm']}: {failure['why']}"), soft_wrap=True, highlight=False)
    for line in _left_out(result["tasks"]):
        console.print(escape(line), soft_wrap=True, highlight=False)
    if result["best"] is not None:
        alike = f"; not told apart from it: {', '.join(result['alike'])}" if result["alike"] else ""
        console.print(escape(f"{result['best']} keeps most{alike}"), soft_wrap=True, highlight=False, style="bold")
    console.print(f"models and {_TABLE}: {escape(args.out)}", soft_wrap=True, highlight=False)
    return code


def _left_out(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """Return which tasks do not count in the ranking, and why."""
    lines = [
        f"{task['data']} does not count: the input {task['expert']} gains {task['gain']:+.4f} there over the base "
        f"({task['gain_low']:+.4f} to {task['gain_high']:+.4f}), which may be nothing, and so nothing can be kept"
        for task in tasks
        if not task["counts"]
    ]
    if len(lines) == len(tasks):
        lines.append("no ranking: no task counts. Give more test rows, or inputs that learned their tasks")
    return lines


def _kept(result: dict[str, Any]) -> Any:
    """Return the table of several merges: scores with how they stand to the task's own expert, and what is kept."""
    from rich.markup import escape
    from rich.table import Table

    tasks = result["tasks"]
    table = Table(
        title=f"test rows; heads: {', '.join(dict.fromkeys(task['head'] for task in tasks))}",
        caption="kept: share of what its expert gained on a task over the base, mean over tasks that count; "
        "- below the expert of the task, + above it, = not told apart (95 %, paired)",
    )
    table.add_column("model", overflow="fold")
    for task in tasks:
        table.add_column(f"{escape(task['data'])}\n{task['metric']}", justify="right", overflow="fold")
    table.add_column("kept", justify="right")
    merges = len(result["rows"]) - len(result["about"]["inputs"]) - 1
    for i, row in enumerate(result["rows"]):
        cells = [
            f"{cell['mean']:.4f} {_mark(cell, row['model'] == task['expert'], task['metric'])}"
            for cell, task in zip(row["scores"], tasks, strict=True)
        ]
        kept = "" if row["mean_kept"] is None else f"{100 * row['mean_kept']:.0f} %"
        style = "bold" if row["model"] == result["best"] or row["model"] in result["alike"] else None
        table.add_row(
            escape(row["model"]), *cells, kept, style=style, end_section=i == len(result["rows"]) - merges - 1
        )
    return table


def _mark(cell: dict[str, float], own: bool, metric: str) -> str:
    """Return how a score stands to that of the task's expert: better or worse by the metric's own direction."""
    from brickyard.core.influence import LOWER_IS_BETTER

    low, high = cell["to_expert_low"], cell["to_expert_high"]
    if own:
        return " "
    if low <= 0 <= high:
        return "="
    return "+" if (low > 0) != (metric in LOWER_IS_BETTER) else "-"


def straight_lines(result: dict[str, Any]) -> list[bool]:
    """Return for every tensor (of every input, where each has an angle of its own) whether SLERP's arc was a line."""
    known = result.get("known", {}).values()
    found = [one for value in known for one in (value if isinstance(value, list) else [value])]
    return [one["straight"] for one in found if isinstance(one, dict) and "straight" in one]


def _said(result: dict[str, Any]) -> list[str]:
    """Return what happened in a few lines."""
    scales = ", ".join(f"{scale} ({count})" for scale, count in result["scales"].items())
    lines = [f"{len(result['inputs'])} inputs merged by {result['arm']}; scales of tensors: {scales}"]
    if "alignment" in result:
        lines = [f"{result['arm']}: the base and {_count(len(result['inputs']), 'input')}, aligned and averaged"]
        lines += _aligned(result["alignment"])
    if result.get("search", {}).get("edge"):
        lines.append(f"{result['search']['option']}: the best is the last of the grid; a larger one may be better")
    for task in result.get("data", {}).get("tasks", ()):
        of = f"{task['rows']:,} of {task['train_rows']:,}" if task["rows"] < task["train_rows"] else f"{task['rows']:,}"
        lines.append(f"{task['input']} read {of} train rows of {task['data']}, without labels; head: {task['head']}")
    lines += [result["data"]["detail"]] if "data" in result else []
    for edit in result["edits"]:
        blocks = ", ".join(f"{name} ({count})" for name, count in edit["blocks"].items())
        lines.append(f"blocks: {blocks}; {len(edit['outside'])} tensors outside of them")
    lines += [f"{a} and {b} are identical: the merge counts them twice" for a, b in result.get("identical", [])]
    if straight := straight_lines(result):
        count = sum(straight)
        lines.append(f"{count} of {len(straight)} tensors are nearly parallel and went along a straight line")
    lines += [f"{i['label']}: {i['checked']}" for i in result["inputs"] if i["checked"]]
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _aligned(found: dict[str, Any]) -> list[str]:
    """Return what an alignment found in a few lines."""
    rows = f"{found['rows']:,} of {found['of_rows']:,} training rows of {found['data']}"
    lines = [f"features compared on {rows}; no label was read"]
    by_map: dict[str, list[dict[str, Any]]] = {}
    for point in found["points"]:
        by_map.setdefault(point["map"], []).append(point)
    for kind, points in by_map.items():
        known = [point["correlations"]["mean"] for point in points if point["correlations"]]
        mean = f", mean correlation {sum(known) / len(known):.2f}" if known else ""
        worst = max(point["condition"] for point in points)
        spread = f", condition at most {worst:.3g}" if kind == "cca" else ""
        lines.append(f"{kind}: {_count(len(points), 'map')}{mean}{spread}")
    dead = sum(sum(point["dead"]) for point in found["points"])
    if dead:
        lines.append(f"{dead} features never change on these rows")
    if found["agreement"]:
        tried = ", ".join(f"{gamma}: {100 * share:.1f} %" for gamma, share in found["agreement"].items())
        lines.append(f"gamma {found['gamma']:g} agrees most with the ensemble ({tried})")
    lines.append(f"exact maps change an input's answers by {found['parity']:.1g} of the largest")
    if found["unties"]:
        lines.append("input and output embeddings are no longer tied: the rotated stream needs one of each")
    return [*lines, *(f"warning: {text}" for text in found["warnings"])]


def _curve(search: dict[str, Any]) -> Any:
    """Return the curve of a search: a line for every point of the grid."""
    from rich.markup import escape
    from rich.table import Table

    name = search["option"].partition(":")[2]
    table = Table(title=f"{search['option']} on validation rows", caption=f"chosen: {search['chosen']:g}")
    table.add_column(name, justify="right")
    for task in search["tasks"]:
        rows = f"{task['rows']} rows{' cut from train' if task['cut'] else ''}"
        table.add_column(f"{escape(task['data'])}\n{task['metric']}\n{rows}", justify="right", overflow="fold")
    table.add_column("mean", justify="right")
    for i, strength in enumerate(search["grid"]):
        cells = [f"{of_task[i]:.4f}" for of_task in search["scores"]]
        style = "bold green" if strength == search["chosen"] else None
        mark = " <" if strength == search["chosen"] else "  "
        table.add_row(f"{strength:g}", *cells, f"{search['means'][i]:.4f}{mark}", style=style)
    return table


def _attacks(scores: dict[str, Any], audit: str) -> Any:
    """Return what the trigger does to every model, on the tasks that have the target class."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{escape(audit)}: attack success (without trigger), accuracy of triggered rows",
        caption="over rows of other classes than the target; a cure lowers the first and raises the last",
    )
    table.add_column("model", overflow="fold")
    for task in scores["tasks"]:
        table.add_column(escape(task["data"]), justify="right", overflow="fold")
    for row in scores["rows"]:
        found = [cell.get("attack") for cell in row["scores"]]
        cells = [f"{a['success']:.3f} ({a['without']:.3f}), {a['triggered_accuracy']:.3f}" if a else "-" for a in found]
        table.add_row(escape(row["model"]), *cells)
    return table


def _table(scores: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    heads = dict.fromkeys(task["head"] for task in scores["tasks"])
    table = Table(title=f"test rows; heads: {', '.join(heads)}")
    table.add_column("model", overflow="fold")
    for task in scores["tasks"]:
        table.add_column(f"{escape(task['data'])}\n{task['metric']}", justify="right", overflow="fold")
    table.add_column("mean", justify="right")
    for row in scores["rows"]:
        cells = [f"{cell['mean']:.4f} ({cell['low']:.4f} to {cell['high']:.4f})" for cell in row["scores"]]
        table.add_row(escape(row["model"]), *cells, "" if row["mean"] is None else f"{row['mean']:.4f}")
    return table
