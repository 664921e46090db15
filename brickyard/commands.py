"""The verbs that load models: they turn parsed options into calls of the Python interface and print what it returns."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape

from brickyard import api
from brickyard.console import Live, beside, estimates
from brickyard.core import registry
from brickyard.core.errors import UsageError
from brickyard.core.generate import Decoding
from brickyard.listing import control_of, survived, word_of

DONE, FAILED, DOUBTFUL = 0, 1, 3
EXAMPLE = "e.g. --data my-folder (train/validation/test files), or --data embedded:stdlib-topics"


def quiet_libraries() -> None:
    """Keep progress bars, and notices to programmers who call the libraries themselves, out of the terminal."""
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")


def check_device(device: str | None) -> None:
    """Raise UsageError for a device that is not here, before anything is read or measured."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; leave --device out, or say cpu.")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def _data(args: argparse.Namespace, default: str | None = None) -> str:
    if given := args.data or default:
        return given
    raise UsageError(f"--data is missing; {EXAMPLE}.")


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "task": args.task,
        "metric": args.metric,
        "max_length": args.max_length,
        "batch": args.batch_size,
        "device": args.device,
        "cache": not args.no_cache,
        "allow_overlap": args.allow_overlap,
        "trust_remote_code": args.trust_remote_code,
        "train_rows": args.train_rows or 0,
        "shots": args.shots or 0,
    }


def _given(args: argparse.Namespace) -> dict[str, Any]:
    if args.epochs and args.steps:
        raise UsageError("--epochs and --steps both say how long to train; give one.")
    return {k: v for k, v in {"epochs": args.epochs, "steps": args.steps}.items() if v is not None}


def compare(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run a comparison with live progress, then print its table, its verdict and where the report is."""
    from brickyard.compare.table import show

    console = Console(stderr=args.json)
    request = {
        **_shared(args),
        "base": args.base,
        "data": _data(args, "embedded:stdlib-topics"),
        "minutes": args.minutes,
        "memory": args.memory,
        "seeds": args.seeds,
        "trials": args.trials,
        "search": args.search,
        "retain": args.retain,
        "engine": args.engine,
        "threads": args.threads or 1,
        "workers": args.workers,
        "baselines": not args.no_baselines,
    }
    if args.methods:
        request["methods"] = args.methods
    with Live(console) as live:
        result = api.compare(
            **request,
            out=args.out,
            dtype=args.dtype,
            training=_given(args),
            listen=live,
            allow_change=args.allow_change,
            command="brickyard " + shlex.join(argv),
        )
    if args.json:
        _print_json(result)
    else:
        show(result, console)
        console.print(f"report: {escape(str(Path(result['folder']) / 'report.html'))}", soft_wrap=True, highlight=False)
    rows = [row for row in result["methods"] if not row["trivial"]]
    if not any(row["status"] == "done" for row in rows):
        return FAILED
    return (
        DOUBTFUL
        if any("changed nothing" in row["reason"] or "no trainable tensor" in row["reason"] for row in rows)
        else DONE
    )


_PRINTED = ("step", "examples", "train_loss", "validation_score", "validation_loss")


class _Curve:
    """Prints one line an evaluation, with what the arm notes in its learning curve (SoRA's k and ranks, say)."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def evaluated(self, state: Any) -> None:
        """Show the last point of the learning curve."""
        point = state.history[-1]
        noted = "".join(f"  {name} {value:g}" for name, value in point.items() if name not in _PRINTED)
        self.console.print(
            f"  step {point['step']:>6}/{state.total}  train loss {point['train_loss']:.4f}  "
            f"validation {state.task.metric} {point['validation_score']:.4f}{noted}",
            highlight=False,
        )

    def phase(self, said: str) -> None:
        """Show that a phase of several has ended."""
        self.console.print(escape(said), soft_wrap=True, highlight=False)


def _one_run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the keywords that training one arm takes, whatever the verb."""
    if args.minutes and (args.epochs or args.steps):
        raise UsageError("--minutes stands in place of --epochs and --steps; give one of them.")
    return {
        **_shared(args),
        "base": args.base,
        "data": _data(args),
        "out": args.out,
        "seed": args.seed,
        "minutes": args.minutes,
        "dtype": args.dtype,
        "training": _given(args),
        "threads": args.threads,
        "checkpoint_every": args.checkpoint_every,
        "callbacks": (_Curve(console),),
        "allow_change": args.allow_change,
    }


def tune(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Train one arm and say where its brick is."""
    console = Console(stderr=args.json)
    brick, result = api.tune(args.arm, **_one_run(args, console))
    if args.json:
        _print_json({**result, "brick": str(brick.folder)})
        return DONE
    proof, cost = result["receipt"], result["cost"]
    console.print(
        f"{len(proof['moved'])} tensors moved, {cost['trainable_parameters']:,} parameters trained in "
        f"{cost['train_seconds']:.1f} s; logits on the probe batch changed by {proof['logits']['mean']:.3f} "
        "on average.",
        highlight=False,
    )
    for name, report in result["encoding"].items():
        if report.get("truncated"):
            console.print(
                f"{name}: {report['truncated']} of {report['rows']} rows were truncated to "
                f"{report['max_length']} tokens."
            )
    if "privacy" in result.get("step", {}):
        from brickyard.core import privacy

        console.print(privacy.sentence(result["step"]["privacy"]), highlight=False)
    if "score" in result:
        score = f"test {result['score']['metric']} {result['score']['mean']:.4f}{beside(result['score'])}"
        console.print(f"{score}; {result['overlap']}" if result["overlap"] else score, highlight=False)
    if brick.structure:
        console.print(f"served as it was tuned: {brick.structure}; keep=dense serves all.", highlight=False)
    console.print(f"brick: {escape(str(brick.folder))} ({brick.bytes:,} bytes)", soft_wrap=True, highlight=False)
    return DONE


def grow(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Train a growing model and say where its folder is."""
    from brickyard.growing import grow as run_grow

    console = Console(stderr=args.json)
    result = run_grow(args.arm, **_one_run(args, console))
    if args.json:
        _print_json(result)
        return DONE
    console.print(escape(result["summary"]), soft_wrap=True, highlight=False)
    if "score" in result:
        score = result["score"]
        console.print(f"test {score['metric']} {score['mean']:.4f}{beside(score)}", highlight=False)
    console.print(f"model: {escape(args.out)}", soft_wrap=True, highlight=False)
    return DONE


def data(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run a data step and say what it dropped."""
    card = api.data(
        args.step,
        data=args.data,
        out=args.out,
        options=args.options,
        text_column=args.text_column,
        domain_column=args.domain_column,
        base=args.base,
        seed=args.seed,
        device=args.device,
        cache=not args.no_cache,
        contamination=args.contamination,
        baseline=args.baseline,
    )
    if args.json:
        _print_json(card)
        return DONE
    console, rows = Console(), card["rows"]
    again = f", {rows['written']:,} written" if rows["written"] != rows["kept"] else ""
    console.print(f"{rows['kept']:,} of {rows['read']:,} rows of train kept{again}", highlight=False)
    for rule, left in card["skipped"].items():
        said = f"  {left['count']:>7,}  not read: {rule}, e.g. {left['examples'][0]}"
        console.print(escape(said), soft_wrap=True, highlight=False)
    for rule, found in card["rules"].items():
        example = found["examples"][0]
        said = f"  {found['dropped']:>7,}  {rule}, e.g. row {example['row']} ({example['why']}): {example['excerpt']!r}"
        console.print(escape(said), highlight=False)
    for line in card["uneven"]:
        console.print(f"[yellow]uneven:[/] {escape(line)}", highlight=False)
    checked = card["contamination"]
    if checked["checked"]:
        done = "taken out first" if checked["removed"] else "left in train"
        said = f"train rows in test: {checked['exact']} exactly, {checked['near']} nearly; {done}"
    else:
        said = f"train was not compared with test: {checked['why']}"
    console.print(said, highlight=False)
    if beside := card.get("baseline"):
        said = (
            f"random subset: {beside['rows']:,} rows, {beside['tokens']:,} tokens of {beside['budget']:,} in the result"
        )
        console.print(f"{said}; {escape(beside['folder'])}", soft_wrap=True, highlight=False)
    card_path = str(Path(args.out) / "data_card.json")
    console.print(f"card: {escape(card_path)}", soft_wrap=True, highlight=False)
    return DONE


def shrink(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Make a smaller model and say what each stage cost and what the model can do."""
    result = api.shrink(
        args.arm,
        base=args.base,
        bricks=args.bricks,
        data=_data(args),
        text=args.text,
        out=args.out,
        threads=args.threads,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        seed=args.seed,
        batch=args.batch_size,
        max_length=args.max_length,
        device=args.device,
        cache=not args.no_cache,
        checkpoint_every=args.checkpoint_every,
        allow_change=tuple(args.allow_change),
    )
    if args.json:
        _print_json(result)
        return DONE
    console = Console()
    for name, stage in result["stages"].items():
        console.print(
            f"  {name:<9} {stage['steps']:>7,} steps  {stage['tokens']:>12,} tokens  {stage['seconds']:>8,.1f} s",
            highlight=False,
        )
    if "score" in result:
        score = result["score"]
        known = score["low"] is not None
        told = f"95 % interval {score['low']:.4f} to {score['high']:.4f}" if known else score["note"]
        console.print(f"test {score['metric']} {score['mean']:.4f} ({told})", highlight=False)
    console.print(f"model: {escape(result['model'])}", soft_wrap=True, highlight=False)
    return DONE


def evaluate(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Score a base or a brick."""
    result = api.evaluate(
        base=None if args.brick and args.base == "embedded:minilm" else args.base,
        brick=args.brick,
        data=_data(args),
        split=args.split,
        scale=args.scale,
        predictions=args.predictions,
        dtype=args.dtype,
        force=args.force,
        device=args.device,
        max_length=args.max_length,
        task=args.task,
        metric=args.metric,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        _print_json(result)
        return DONE
    score, console = result["score"], Console()
    console.print(
        f"{score['metric']} {score['mean']:.4f} (95 % interval {score['low']:.4f} to {score['high']:.4f}) "
        f"on {result['examples']:,} {args.split} examples{beside(score)}",
        highlight=False,
    )
    cut = result.get("encoding", {}).get("truncated", 0)
    if cut:
        longest = result["encoding"]["max_length"]
        console.print(f"{cut:,} of {result['examples']:,} rows were truncated to {longest} tokens", highlight=False)
    if routing := result.get("routing"):
        shares = ", ".join(f"{task} {share:.1%}" for task, share in routing["most_probable"].items())
        said = f"prompts routed to: {shares}; under several experts: {routing['blended']:.1%}"
        console.print(escape(said), highlight=False)
    for point in result.get("scale", []):
        console.print(
            f"  strength {point['scale']:5.2f}: {point['mean']:.4f} ({point['low']:.4f} to {point['high']:.4f})",
            highlight=False,
        )
    return DONE


def predict(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Write predictions for unlabelled rows, or a language model's continuations."""
    chosen = {
        k: v for k in ("new_tokens", "temperature", "top_p", "beams", "seed") if (v := getattr(args, k)) is not None
    }
    if args.out and not str(args.out).endswith(".parquet"):
        raise UsageError(f"--out {args.out}: predictions are written as Parquet; name a file that ends in .parquet.")
    result = api.predict(
        base=None if args.brick and args.base == "embedded:minilm" else args.base,
        brick=args.brick,
        data=_data(args),
        out=args.out,
        dtype=args.dtype,
        force=args.force,
        device=args.device,
        max_length=args.max_length,
        decoding=Decoding(**chosen) if chosen else None,
        trust_remote_code=args.trust_remote_code,
    )
    sys.stdout.write(f"{result['rows']} predictions in {result['out']}\n")
    return DONE


def audit(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure what a change did to a model; exit code 3 where the method says that something does not hold."""
    from rich.table import Table

    findings = api.audit(
        args.arm,
        base=args.base,
        brick=args.brick,
        data=_data(args, "embedded:stdlib-topics"),
        force=args.force,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        _print_json(findings)
    else:
        console = Console()
        tables = {findings.get("title", args.arm): findings["table"], **findings.get("tables", {})}
        for title, rows in tables.items():
            table = Table(title=escape(title))
            for place, (name, value) in enumerate(rows[0].items()):
                words = place == 0 and isinstance(value, str)
                table.add_column(escape(name), justify="left" if words else "right", overflow="fold")
            for row in rows:
                table.add_row(*(f"{v:.4f}" if isinstance(v, float) else escape(str(v)) for v in row.values()))
            console.print(table)
        console.print(escape(findings["detail"]), highlight=False)
    return DOUBTFUL if findings.get("holds") is False else DONE


def verify(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check an adapter, and a merged model, for silent failures."""
    result = api.verify(args.base, args.adapter, merged=args.merged, data=args.data)
    if args.json:
        _print_json(result)
    else:
        console = Console()
        for finding in result["findings"]:
            mark = {True: "[green]ok[/]", False: "[red]NOT OK[/]"}.get(finding["ok"], "[yellow]unknown[/]")
            console.print(
                f"{mark:>6}  {escape(finding['check'])}: {escape(str(finding['detail']))}",
                soft_wrap=True,
                highlight=False,
            )
        console.print(
            "[bold green]everything holds[/]"
            if result["holds"]
            else "[bold red]this adapter does not do what it should[/]"
        )
    return DONE if result["holds"] else DOUBTFUL


def plan(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Estimate memory and time."""
    rows = api.plan(
        base=args.base,
        data=_data(args, "embedded:stdlib-topics"),
        methods=args.methods or ["linear-probe", "lora", "full"],
        dtype=args.dtype,
        threads=args.threads or 1,
        training=_given(args),
        **_shared(args),
    )
    if args.json:
        _print_json(rows)
        return DONE
    estimates(rows, Console())
    return DONE if any(row["status"] == "done" for row in rows) else FAILED


def check(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Re-measure claims; exit code 3 when one does not hold, or its negative control does not destroy the gain."""
    console, results, judged = Console(stderr=args.json), [], []
    for name in args.methods:
        with Live(console) as live:
            options = {"base": args.base, "data": args.data, "full": args.full, "only": args.claim, "out": args.out}
            results += api.check([name], **options, listen=live)
        stated = registry.find(name).record.claims
        now = {stated[number - 1].text for number in args.claim or range(1, len(stated) + 1)}
        judged += (measured := [claim for claim in results[-1]["claims"] if claim["text"] in now])
        for claim in measured:
            colour = {True: "yellow" if survived(claim) else "green", False: "red"}.get(claim["holds"], "yellow")
            holds = f"[{colour}]{word_of(claim)}[/]"
            console.print(f"[bold]{name}[/] {holds}: {escape(claim['text'])}", highlight=False)
            if survived(claim):
                console.print(f"  negative control not destroyed: {escape(control_of(claim))}", highlight=False)
            told = "; ".join(claim[key] for key in ("inequality", "detail") if claim.get(key))
            console.print(f"  {escape(told)}", highlight=False)
    if args.json:
        _print_json(results if len(results) > 1 else results[0])
    return DONE if all(claim["holds"] is True and not survived(claim) for claim in judged) else DOUBTFUL


def report(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Write report.html again from result.json, and rebuild the ledger's index."""
    from brickyard.compare.ledger import Ledger
    from brickyard.compare.report import render
    from brickyard.core.files import read_json

    folder = Path(args.folder)
    if not (folder / "result.json").is_file():
        raise UsageError(f"{folder} holds no result.json; give the folder of a finished comparison.")
    Ledger(folder)
    sys.stdout.write(f"{render(read_json(folder / 'result.json'), folder / 'report.html')}\n")
    return DONE


def export(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Turn a brick into a plain PEFT adapter, a merged model or its log, and prove that it behaves the same."""
    from brickyard.core.export import export as run_export

    result = run_export(args.brick, args.to, Path(args.out), base=args.base, rank=args.rank, max_rank=args.max_rank)
    sys.stdout.write(f"{result['sentence']}\n{args.out}\n")
    return DONE
