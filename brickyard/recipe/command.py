"""The verb `brickyard run` on the command line: options, what is said while steps run, and the summary."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def options(p: argparse.ArgumentParser) -> None:
    """Add the verb's own options to its parser."""
    p.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe, or embedded:NAME (mediphi, secure-code)")
    p.add_argument("--out", metavar="DIR", help="default: runs/recipe-NAME; a later run finds its finished steps there")
    p.add_argument("--dry-run", action="store_true", help="check everything, show the graph, and run nothing")
    p.add_argument("--prune", action="store_true", help="then delete the steps in DIR that this recipe does not use")
    p.add_argument("--trust-remote-code", action="store_true", help="let a hub model run its own Python here")
    p.add_argument("--json", action="store_true", help="print result.json instead of the summary")


class _Live:
    """Tells what runs: one line when a step ends, and on a terminal a moving one while it runs."""

    def __init__(self, console: Any, dry: bool) -> None:
        self.console, self.dry = console, dry
        self.count = self.total = 0
        self.said = ""
        self.status = console.status("")

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event of `recipe.run`."""
        getattr(self, f"_{event['event']}")(event)

    def _plan(self, event: dict[str, Any]) -> None:
        from rich.text import Text

        steps, ahead = len(event["rows"]), len(event["ahead"])
        self.total = ahead
        self.console.print(Text(event["recipe"].title, "bold"), soft_wrap=True)
        kept = f"{steps - ahead} finished earlier, {ahead} to run" if ahead < steps else "all to run"
        said = f"{steps} steps: {kept}" if ahead else f"{steps} steps, all finished earlier; nothing is repeated"
        self.console.print(f"{said}; in {event['folder']}", soft_wrap=True, highlight=False, markup=False)
        self.console.print()

    def _start(self, event: dict[str, Any]) -> None:
        from rich.markup import escape

        self.count += 1
        row = event["row"]
        again = ", from where it stopped" if event["again"] else ""
        self.said = f"[{self.count}/{self.total}] {row['name']}: {row['what']}{again}"
        if self.console.is_terminal:
            self.status.start()
            self.status.update(escape(self.said))

    def _progress(self, event: dict[str, Any]) -> None:
        from rich.markup import escape

        self.status.update(escape(f"{self.said}  {event['said']}"))

    def _end(self, event: dict[str, Any]) -> None:
        from rich.text import Text

        from brickyard.compare.shown import duration, visible

        self.status.stop()
        row = event["row"]
        word = {"done": "green", "kept": "dim", "failed": "red", "waiting": "yellow"}[row["status"]]
        told = {"waiting": "not run", "kept": "same as before"}.get(row["status"], row["status"])
        line = Text.assemble((f"{told:<8} ", word), (row["name"], "bold"), f"  {visible(row['what'])}")
        line.append(f"  {visible(row['reason'])}" if row["reason"] else f"  {duration(row['seconds'])}", "dim")
        self.console.print(line, soft_wrap=True)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run a recipe; show its graph with times, and its tables of scores."""
    from rich.console import Console

    from brickyard.recipe.report import show
    from brickyard.recipe.run import run as run_recipe

    console = Console(stderr=args.json)
    live = _Live(console, args.dry_run)
    try:
        result = run_recipe(
            args.recipe,
            out=args.out,
            dry=args.dry_run,
            prune=args.prune,
            trust_remote_code=args.trust_remote_code,
            listen=live,
        )
    finally:
        live.status.stop()
    if args.json:
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")
    else:
        show(result, console, dry=args.dry_run)
        if not args.dry_run:
            place = Path(result["folder"]) / "report.html"
            console.print(f"report: {place}", soft_wrap=True, highlight=False, markup=False)
    return 0 if args.dry_run else result["exit_code"]
