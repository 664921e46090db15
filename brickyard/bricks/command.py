"""The verb `brickyard bricks` on the command line. Apart from the others, because its parser needs no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DONE = 0
RUNS = "runs"
# Options with their defaults, by what reads them.
_SCORING = {"data": [], "rows": 500, "max_length": None}
_FINDING = {"clusters": 0, "prompts": 200, "tokens": 64}
_SHARE = {"share": 0.01}
EPILOG = """\
A brick is what one run left: an adapter, a head, changed weights, a structure,
a group of neurons. The four operations on bricks:

  find     brickyard bricks BASE --find DATA --out DIR
             the neurons that serve each capability, one brick for each
  route    brickyard route METHOD --base BASE --bricks A B ...
             choose among bricks prompt by prompt
  combine  brickyard bricks BASE --conflict A B
             do they get in each other's way?
           brickyard merge METHOD --base BASE --bricks A B ... --out DIR
             one model of several
  update   brickyard bricks BASE --replace OLD NEW | --remove OLD | --undo
             with a record in DIR/.bricks, taken back bit for bit
             (an edit of a single fact inside the weights is not offered)
  grow     brickyard export OLD --to merged --out M
           brickyard tune ARM --base M --data D --out DIR
             a new brick on the old ones, frozen as a part of its base

Plain PEFT adapters whose tensors fit the base are listed and scored beside
its bricks, whatever they were trained with.

With --data each brick is scored on each data set against the bare base. It
"improves" or "damages" where the paired difference is beyond chance (Holm over
the table), else it is undecided. A group of neurons is cut out when it is
applied, so what it damages is what it served.
"""


def options(p: argparse.ArgumentParser, positive: Callable[[type], Callable[[str], Any]]) -> None:
    """Add the verb's own options to its parser; `positive` makes a reader of positive numbers."""
    p.epilog, p.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    p.add_argument("base", metavar="BASE", help="a model folder, a hub id, or embedded:NAME")
    p.add_argument("--in", dest="folder", default=RUNS, metavar="DIR", help=f"where to look (default: {RUNS})")
    p.add_argument("--data", nargs="+", default=[], metavar="D", help="score every brick on these, against the base")
    p.add_argument(
        "--rows", type=positive(int), default=_SCORING["rows"], help="test rows of each data set, drawn with seed 0"
    )
    p.add_argument("--max-length", type=positive(int), help="tokens a row; longer rows are truncated and counted")
    g = p.add_argument_group("operations, in place of the table").add_mutually_exclusive_group()
    g.add_argument("--find", metavar="DATA", help="rows of text and label (the capability): one brick a capability")
    g.add_argument("--conflict", nargs=2, metavar=("A", "B"), help="opposed signs, cosine, and neurons both move")
    g.add_argument("--replace", nargs=2, metavar=("OLD", "NEW"), help="put a copy of NEW in the place of OLD")
    g.add_argument("--remove", metavar="OLD", help="take a brick out of the folder; its files are kept aside")
    g.add_argument("--undo", action="store_true", help="take the last --replace or --remove back")
    f = p.add_argument_group("with --find")
    f.add_argument("--out", metavar="DIR", help="a new folder for the groups")
    f.add_argument(
        "--share", type=positive(float), default=_SHARE["share"], help="of each layer's neurons in a group (0.01)"
    )
    f.add_argument(
        "--clusters",
        type=int,
        default=_FINDING["clusters"],
        help="take whole groups of like keys, of so many a layer (0)",
    )
    f.add_argument(
        "--prompts", type=positive(int), default=_FINDING["prompts"], help="prompts of each capability at most (200)"
    )
    f.add_argument(
        "--tokens", type=int, default=_FINDING["tokens"], help="of each prompt; shorter ones are left out (64)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--trust-remote-code", action="store_true", help="let a hub model run its own Python here")
    p.add_argument("--json", action="store_true")


def bricks(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Show the table of bricks, or do one of the operations on them."""
    from brickyard.core.errors import UsageError

    if args.out and not args.find:
        raise UsageError("--out belongs to --find, which writes new bricks; leave it out.")
    if args.find and not args.out:
        raise UsageError("--find writes one brick a capability; say where with --out NEW_FOLDER.")
    from brickyard.console import aside
    from brickyard.core.progress import told_to

    _assert_used(args)
    act = _table
    if args.find:
        act = _find
    elif args.conflict:
        act = _conflict
    elif args.replace or args.remove or args.undo:
        act = _update
    with told_to(aside):
        return act(args)


def _assert_used(args: argparse.Namespace) -> None:
    """Refuse options that what was asked for would not read."""
    from brickyard.core.errors import UsageError

    operations = ("find", "conflict", "replace", "remove", "undo")
    asked = next((name for name in operations if getattr(args, name)), None)
    unread = {} if asked is None else dict(_SCORING)
    unread |= {} if asked == "find" else _FINDING
    unread |= {} if asked in ("find", "conflict") else _SHARE
    unread |= {"device": None} if asked in ("replace", "remove", "undo") else {}
    if odd := [f"--{name.replace('_', '-')}" for name, default in unread.items() if getattr(args, name) != default]:
        what = "the table of bricks" if asked is None else f"--{asked}"
        raise UsageError(
            f"{', '.join(odd)} would not be read by {what}; leave {'it' if len(odd) == 1 else 'them'} out."
        )


def _say(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console().print(escape(text), soft_wrap=True, highlight=False)


def _print_json(value: Any) -> int:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    return DONE


def _table(args: argparse.Namespace) -> int:
    from brickyard import api
    from brickyard.core.errors import UsageError

    if args.folder != RUNS and not Path(args.folder).is_dir():
        raise UsageError(f"--in {args.folder}: there is no such folder; give one that holds bricks.")
    left_out: dict[str, str] = {}
    rows = api.bricks_in(
        args.folder,
        args.base,
        data=args.data,
        rows=args.rows,
        max_length=args.max_length,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        left_out=left_out,
    )
    for folder, why in left_out.items():
        sys.stderr.write(f"left out {folder}: {why}\n")
    if args.json:
        return _print_json(rows)
    if not rows:
        _say(f"no brick for {args.base} under {args.folder}")
        return DONE
    from rich.console import Console

    console = Console()
    widest = max((len(entry["data"]) for row in rows for entry in row.get("on", ())), default=0)
    for row in rows:
        _say(_headline(row))
        for entry in sorted(row.get("on", ()), key=lambda e: list(_COLOURS).index(e["verdict"])):
            console.print(_line(entry, widest), soft_wrap=True, highlight=False)
    if args.data:
        console.print(
            "Differences to the bare base, turned so that more is better, with 95 % intervals; improves and damages: "
            f"p < 0.05 after Holm's correction over the table; up to {args.rows:,} test rows of each.",
            highlight=False,
        )
    else:
        console.print("What each improves and what it damages: add --data D1 D2 ...", highlight=False)
    return DONE


_COLOURS = {"improves": "green", "damages": "red", "undecided": "yellow", "unchanged": "dim", "not scored": "dim"}


def _headline(row: dict[str, Any]) -> str:
    """What a brick is, what it cost, and its own score, on one line."""
    cost, score = row["cost"], row["scores"].get("score")
    length = f" in {cost['steps']:,} steps" if cost.get("steps") else ""
    if not length and cost.get("epochs"):
        length = f" in {cost['epochs']:g} epochs"
    trained = f"{cost['trainable_parameters']:,} parameters trained{length}"
    said = f"{score['metric']} {score['mean']:.3f}" if score else "no test score"
    if "made_for" in row:  # a plain adapter knows no data and no score
        named = f"names {row['made_for']} as its base" if row["made_for"] else "names no base"
        return f"{row['folder']}: {row['arm']}, {row['kind']}, {cost['bytes']:,} bytes, {trained}, fits, {named}"
    return (
        f"{row['folder']}: {row['arm']}, {row['kind']}, {cost['bytes']:,} bytes, {row['data'] or 'no data'}, "
        f"{trained if cost['trainable_parameters'] else 'nothing trained'}, {said}"
    )


def _line(entry: dict[str, Any], widest: int) -> str:
    """What a brick does on one data set, with its verdict in colour."""
    from rich.markup import escape

    marked = f"    [{_COLOURS[entry['verdict']]}]{entry['verdict']:<10}[/]  {escape(entry['data'].ljust(widest))}  "
    if "p" not in entry:
        return marked + escape(entry["why"])
    head = f", {entry['head']} head" if entry["head"] else ""
    return f"{marked}{entry['difference']:+.4f} ({entry['low']:+.4f} to {entry['high']:+.4f}) {entry['metric']}{head}"


def _find(args: argparse.Namespace) -> int:
    from brickyard.bricks.groups import find

    rows = find(
        args.base,
        args.find,
        args.out,
        share=args.share,
        clusters=args.clusters,
        prompts=args.prompts,
        tokens=args.tokens,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if args.json:
        return _print_json(rows)
    for row in rows:
        _say(
            f"{row['folder']}: {row['neurons']} of {row['of']:,} neurons for {row['capability']}, average precision "
            f"{row['precision']:.2f}, on other prompts {row['precision_held_out']:.2f} (chance: {row['base_rate']:.2f})"
        )
    _say(f"what the base loses without each: brickyard bricks {args.base} --in {args.out} --data ...")
    return DONE


def _conflict(args: argparse.Namespace) -> int:
    from brickyard.bricks.groups import conflict

    found = conflict(
        args.base, *args.conflict, share=args.share, device=args.device, trust_remote_code=args.trust_remote_code
    )
    if args.json:
        return _print_json(found)
    number = lambda value, form: "nothing to compare" if value is None else format(value, form)  # noqa: E731
    _say(
        f"weights that both change: {found['both']:.1%} of all; in opposite directions: {number(found['sign'], '.1%')}"
    )
    _say(f"cosine of the two changes: {number(found['cosine'], '+.3f')}")
    _say(
        f"the {args.share:.1%} of neurons that each moves most: {found['moved']:.1%} in common "
        f"(chance: {found['moved_chance']:.1%})"
    )
    _say(f"cosine of what they do to the last states: {number(found['states'], '+.3f')}")
    return DONE


def _update(args: argparse.Namespace) -> int:
    from brickyard.bricks import updates

    if args.undo:
        record = updates.undo(args.folder)
    elif args.remove:
        record = updates.remove(args.folder, args.remove, args.base)
    else:
        record = updates.replace(args.folder, args.replace[0], args.replace[1], args.base)
    if args.json:
        return _print_json(record)
    done = {"remove": "removed", "replace": f"replaced by {record['by']}"}[record["operation"]]
    if args.undo:
        _say(f"{record['brick']} is back, bit for bit (it had been {done})")
    else:
        place = f"{args.folder}/.bricks/{record['number']:04d}"
        _say(f"{record['brick']} was {done}; --undo takes it back (kept in {place})")
    return DONE
