"""What a person sees while a comparison runs: what is being done, how far it is, how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from brickyard.compare.shown import duration
from brickyard.core.data import overlap_sentence


def aside(text: str) -> None:
    """Write a line about what is under way to where errors go, so that results can be piped."""
    Console(stderr=True).print(escape(text), soft_wrap=True, highlight=False)


class Live:
    """Listens to a comparison's events and keeps one progress line, with an estimate of the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} runs"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None
        self.plan: dict[str, Any] = {}
        self.started = time.monotonic()
        self.seconds: dict[str, list[float]] = {}
        self.ahead: list[str] = []

    def __enter__(self) -> Live:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event of `compare.run`."""
        getattr(self, f"_{event['event']}")(event)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def _probe(self, event: dict[str, Any]) -> None:
        arms = "1 arm" if event["arms"] == 1 else f"{event['arms']} arms, one at a time"
        self._say(f"measuring {arms} ...")

    def _plan(self, event: dict[str, Any]) -> None:
        self.plan, data, base = event["plan"], event["data"], event["base"]
        rows = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
        self._say(f"[bold]{escape(str(data.name))}[/]: {rows}; {event['task'].kind}, {event['task'].metric}")
        self._say(
            f"[bold]{escape(base.spec)}[/]; {escape(self.plan['sentence'])}; results in {escape(event['folder'])}"
        )
        if said := overlap_sentence(data.report["overlap"], len(data.splits["test"])):
            self._say(f"[yellow]{said}[/] The report says what the result is without them.")
        for name, reason in self.plan["refused"].items():
            self._say(f"  [yellow]{escape(name)} refused:[/] {escape(reason)}")
        for name, failed in self.plan["failed"].items():
            self._say(f"  [red]{escape(name)} {failed['status']}:[/] {escape(failed['reason'])}")

    def _jobs(self, event: dict[str, Any]) -> None:
        """A measurement of its own begins some runs; how long each takes is not known beforehand."""
        if event["finished"]:
            self._say(f"  {_runs(event['finished'])} already finished; nothing of that is repeated.")
        if self.task is None:
            self.task = self.progress.add_task("", total=0, left="")
        total = (self.progress.tasks[0].total or 0) + event["jobs"]
        self.progress.update(self.task, total=total, description="measuring")

    def _job(self, event: dict[str, Any]) -> None:
        assert self.task is not None
        self.progress.advance(self.task)
        value = event["value"]
        score = value.get("score") if isinstance(value, dict) else None
        said = f": {score['metric']} {score['mean']:.3f}" if score else ""
        self._say(f"  {escape(event['key'])}{said} ({event['seconds']:.0f} s)")

    def _start(self, event: dict[str, Any]) -> None:
        if event["finished"]:
            self._say(f"{_runs(event['finished'])} already finished; nothing of that is repeated.")
        if not event["jobs"]:
            return
        if self.task is None:
            self.task = self.progress.add_task("", total=0, left="")
        total = (self.progress.tasks[0].total or 0) + event["jobs"]
        self.progress.update(self.task, total=total, description="training", left=self._left(total))

    def _trial(self, event: dict[str, Any]) -> None:
        row = event["row"]
        self.seconds.setdefault(row["name"], []).append(row["seconds"])
        assert self.task is not None
        self.progress.advance(self.task)
        self.progress.update(self.task, left=self._left(self.progress.tasks[0].total or 0))
        name, seed = escape(row["name"]), row["seed"]
        if row["status"] != "done":
            self._say(f"  [red]{name} seed {seed} {row['status']}:[/] {escape(row['reason'])}")
        elif row["role"] == "search":
            arm = escape(row["arm"])
            # An arm of a check has a name of its own: "control" may be the very method with shuffled labels.
            told = arm if arm.split(":")[0].split()[0] == name.split(":")[0].split()[0] else f"{name}, {arm}"
            self._say(f"  [dim]{told}: validation {row['value']['validation']:.3f} ({row['seconds']:.0f} s)[/]")
        else:
            score = row["value"]["score"]
            self._say(f"  {name} seed {seed}: {score['metric']} {score['mean']:.3f} ({row['seconds']:.0f} s)")

    def _done(self, event: dict[str, Any]) -> None:
        self.progress.stop()

    def _left(self, total: float) -> str:
        """Estimate from what the finished runs took against what was predicted for them."""
        predicted = self.plan["predicted_seconds"]
        runs = {name: self.plan["seeds"] for name in predicted}
        each = {name: predicted[name] * self.plan["workers"] / max(1, runs[name]) for name in predicted}
        done = sum(each.get(n, 0.0) * len(s) for n, s in self.seconds.items())
        taken = sum(sum(s) for s in self.seconds.values())
        pace = taken / done if done else 1.0
        finished = sum(len(s) for s in self.seconds.values())
        if finished >= total:
            return ""
        mean = sum(each.values()) / max(1, len(each))
        waiting = sum(each[n] * max(0, runs[n] - len(self.seconds.get(n, []))) for n in each) or mean * (
            total - finished
        )
        seconds = pace * waiting / self.plan["workers"]
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


def _runs(count: int) -> str:
    return "1 run was" if count == 1 else f"{count} runs were"


def beside(score: Mapping[str, Any]) -> str:
    """Return what a score is to be held against, as the end of its line."""
    if "nats_per_token" in score:
        return f"; {score['nats_per_token']:.4f} nats per token"
    return f"; always the commonest class of these rows: {score['majority']:.4f}" if "majority" in score else ""


def estimates(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Write what `api.plan` found: a table in which figures never wrap, and why arms cannot run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    table.add_column("\narm", overflow="fold")
    for title in ("trainable\nparameters", "saved\nMiB", "peak\nMiB", "step\nms", "\nsteps", "training\ntime"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row["status"] == "done":
            table.add_row(
                Text(row["arm"]),
                f"{row['trainable_parameters']:,}",
                f"{row['saved_for_backward_bytes'] / 2**20:,.1f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['step_ms']:,.1f}",
                f"{row['steps']:,}",
                duration(row["train_seconds"]).replace("\u00a0", " "),
            )
    if table.row_count:
        console.print(table)
        console.print(
            Text(
                "From a short probe. Counted: trainable parameters, bytes saved for the backward pass. "
                "Predicted: peak memory, time of a step and of the whole training.",
                "dim",
            )
        )
    for row in rows:
        if row["status"] != "done":
            console.print(Text.assemble((f"{row['status']} ", "red"), (row["arm"], "bold"), f": {row['reason']}"))
