"""The verb `brickyard route` on the command line. Apart from the others, because its parser needs no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

DONE = 0


def options(p: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Add the verb's own options to its parser; `count` reads a positive number."""
    p.add_argument("arm", metavar="ARM", help="e.g. mediator:density=0.1,layers=3; options may also follow")
    p.add_argument(
        "--bricks", nargs="+", required=True, metavar="DIR", help="two or more bricks, adapters, checkpoints"
    )
    p.add_argument(
        "--data", nargs="+", default=[], metavar="D", help="one data set a brick, in order: the router's prompts"
    )
    p.add_argument("--out", metavar="DIR", help="a new folder, for evaluate --brick and predict --brick")
    p.add_argument("--inspect", action="store_true", help="only print how much the experts conflict in every block")
    p.add_argument("--heads", choices=("own", "base"), default="own", help="each brick's, or fitted on the base")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the dense model; lets dtypes differ")
    p.add_argument("--force", action="store_true", help="go on although an expert does not look like the base's child")
    p.add_argument("--threads", type=count, help="workers of the inner merge (default: the cores, at least 2)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="where the router is fitted and rows are scored")
    p.add_argument("--max-length", type=count, help="tokens a row; longer rows are truncated and counted")
    p.add_argument("--task", help="override the task that the columns imply")
    p.add_argument("--metric", help="accuracy, macro-f1, matthews or spearman")
    p.add_argument("--config", metavar="FILE", help="a YAML or TOML file of these options; the command line wins")
    p.add_argument("--json", action="store_true")


def route(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Route experts, or only show their conflict."""
    import json

    from rich.console import Console
    from rich.markup import escape

    from brickyard.console import aside
    from brickyard.core.progress import told_to
    from brickyard.routing.route import route as run_route

    with told_to(aside):
        result = run_route(
            args.arm,
            base=args.base,
            bricks=args.bricks,
            data=args.data,
            out=args.out,
            inspect=args.inspect,
            heads=args.heads,
            dtype=args.dtype,
            force=args.force,
            threads=args.threads,
            device=args.device,
            task=args.task,
            metric=args.metric,
            max_length=args.max_length,
            trust_remote_code=args.trust_remote_code,
        )
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")
        return DONE
    console = Console()
    console.print(_blocks(result))
    outside = result["outside"]
    names = ", ".join(outside["tensors"][:3]) + (", ..." if len(outside["tensors"]) > 3 else "")
    console.print(
        escape(f"outside of blocks, always averaged: {outside['weights']:,} weights ({names})"), highlight=False
    )
    if args.inspect:
        return DONE
    for line in _said(result):
        console.print(escape(line), soft_wrap=True, highlight=False)
    if "scores" in result:
        console.print(_scores(result["scores"]))
    console.print(f"routed model: {escape(args.out)}", soft_wrap=True, highlight=False)
    return DONE


def _blocks(result: dict[str, Any]) -> Any:
    """Return the table of blocks, each with a bar as long as its conflict."""
    from rich.markup import escape
    from rich.table import Table

    most = max((row["conflict"] for row in result["blocks"]), default=0) or 1
    table = Table(title=f"conflict by block: mean {result['mean']:.4f}, standard deviation {result['std']:.4f}")
    for name, justify in (("block", "left"), ("weights", "right"), ("conflict", "right"), ("", "left"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in result["blocks"]:
        bar = "█" * round(20 * max(row["conflict"], 0) / most)
        said = "[bold]routed[/]" if row["routed"] else "averaged"
        table.add_row(escape(row["block"]), f"{row['weights']:,}", f"{row['conflict']:.4f}", bar, said)
    return table


def _said(result: dict[str, Any]) -> list[str]:
    """Return what was made, in a few lines."""
    size, router = result["bytes"], result["router"]["about"]
    report, routed = router["report"], sum(row["routed"] for row in result["blocks"])
    over = "" if size["within"] else f"; above the method's limit of {size['limit']:,}"
    lines = [
        f"{len(result['tasks'])} experts by {result['arm']}: {routed} of {len(result['blocks'])} blocks routed "
        f"({result['share']:.0%} of the weights)",
        f"stored (counted): {size['total']:,} bytes: dense {size['dense']:,}, experts {size['experts']:,}, router "
        f"{size['router']:,}, heads {size['heads']:,}; {size['total'] / size['separate']:.0%} of "
        f"{len(result['tasks'])} separate models{over}",
        f"router: {report['accuracy']:.1%} right on {sum(report['held_out'])} held-out prompts; temperature "
        f"{router['temperature']:.2f}; experts are blended above an uncertainty of {router['u0']:.3f}",
    ]
    if not routed:
        lines.append("no block stands out, so this is the merge alone; --layers N routes the N most conflicting.")
    if report["prompts_cut"]:
        lines.append(f"{report['prompts_cut']} prompts were cut to {router['tokens']} tokens for the router alone")
    return lines


def _scores(scores: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="test rows")
    table.add_column("weights", overflow="fold")
    for task in scores["tasks"]:
        table.add_column(f"{escape(task['task'])}\n{task['metric']}", justify="right", overflow="fold")
    for row in scores["rows"]:
        cells = [f"{cell['mean']:.4f}\n({cell['low']:.3f} to {cell['high']:.3f})" for cell in row["scores"]]
        table.add_row(row["model"], *cells)
    table.add_section()
    table.add_row("prompts routed right", *(f"{task['routed_right']:.1%}" for task in scores["tasks"]))
    table.add_row("prompts under several experts", *(f"{task['blended']:.1%}" for task in scores["tasks"]))
    return table
