"""The verbs that only read: methods, show, cache. Nothing here imports torch."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

from brickyard.core import registry
from brickyard.core.files import cache_clear, cache_list


def measured(name: str) -> dict[str, Any] | None:
    """Return the last measured claims of a method, or None; what a claim does not say is "" or None."""
    path = resources.files("brickyard") / "claims" / "results" / f"{name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    absent: dict[str, Any] = {"inequality": "", "low": None, "high": None, "detail": ""}
    return result | {"claims": [absent | claim for claim in result["claims"]]}


def verdict_of(name: str) -> str:
    """Return in a word whether a method's claims hold here."""
    result = measured(name)
    if result is None:
        return "not measured"
    words = {True: "holds", False: "does not hold"}
    said = [
        words.get(c["holds"], str(c["holds"])) if isinstance(c["holds"], bool) else str(c["holds"])
        for c in result["claims"]
    ]
    return ", ".join(dict.fromkeys(said)) or "no claim"


def methods(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """List the methods, or print them as JSON."""
    entries = registry.records(args.family)
    if args.json:
        rows = [
            {
                "name": e.record.name,
                "family": e.record.family,
                "title": e.record.title,
                "needs": list(e.record.needs),
                "status": e.record.status,
                "presets": sorted(e.record.presets),
                "claims": [c.text for c in e.record.claims],
            }
            for e in entries
        ]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    width = max(len(e.record.name) for e in entries) + 2
    family = ""
    for e in entries:
        if e.record.family != family:
            family = e.record.family
            sys.stdout.write(f"{family}\n")
        sys.stdout.write(
            f"  {e.record.name:<{width}}{e.record.title}  [{verdict_of(e.record.part_of or e.record.name)}]\n"
        )
    return 0


def show(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Explain one method: its docstring, its options, and its claims with what was measured."""
    entry = registry.find(args.method)
    record, write = entry.record, sys.stdout.write
    docstring = ast.get_docstring(ast.parse(entry.path.read_text(encoding="utf-8")))
    write(f"{record.name} ({record.family}): {record.title}\n\n{docstring}\n")
    write(f"\nworks on: {', '.join(record.needs)}\n")
    if entry.options:
        write("\noptions (written NAME:option=value,...):\n")
        for option in entry.options.values():
            write(f"  {option.name} = {option.default!r:<12} {option.doc}\n")
    for name, options in record.presets.items():
        write(f"  preset={name}: {', '.join(f'{k}={v!r}' for k, v in options.items())}\n")
    if record.search:
        write(
            "\nsearched by compare --trials K: "
            + "; ".join(f"{k} in {list(v)}" for k, v in record.search.items())
            + "\n"
        )
    if record.part_of:
        write(f"\nclaims: see brickyard show {record.part_of}\n")
        return 0
    result = measured(record.name)
    known = {c["text"]: c for c in result["claims"]} if result else {}
    write("\nclaims:\n")
    for number, claim in enumerate(record.claims, 1):
        write(f"  {number}. {claim.text}\n")
        if (found := known.get(claim.text)) is None:
            write("    not measured yet: brickyard check " + record.name + "\n")
            continue
        holds = {True: "holds", False: "does not hold"}.get(found["holds"], found["holds"])
        interval = f"{_number(found['low'])} to {_number(found['high'])}"
        unit = " hundredths of bits per byte" if found.get("metric") == "bits_per_byte" else ""
        judged = found["inequality"] or found["detail"]
        older = found.get("date", result["date"]) if result else ""
        on = f", on {older}" if result and older != result["date"] else ""
        write(f"    {holds}: {judged}; measured {_number(found['measured'])}{unit} ({interval}), {found['kind']}{on}\n")
        if found.get("control"):
            gone = "destroyed" if found["control"]["destroyed"] else "NOT destroyed"
            write(f"    control: {found['control']['what']}: gain {gone}\n")
    if result:
        env = result["environment"]
        write(f"  measured {result['date']} in {result['seconds']:.0f} s on {env.get('cpu', 'unknown hardware')}\n")
    return 0


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"


def cache(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """List or clear the cache."""
    if args.action == "clear":
        sys.stdout.write(f"{cache_clear():,} bytes freed\n")
        return 0
    rows = cache_list()
    for row in rows:
        sys.stdout.write(f"{row}\n")
    if not rows:
        sys.stdout.write("the cache is empty\n")
    return 0
