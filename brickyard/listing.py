"""The verbs that only read: methods, show, cache. Nothing here imports torch."""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

from brickyard.core import registry
from brickyard.core.files import cache_clear, cache_list


def measured(name: str) -> dict[str, Any] | None:
    """Return the last measured claims of a method, or None; what a claim does not say is "" or None.

    Each says when, where and how it was measured itself (`environment`, `full`, `seconds`, `date`): the file says it of
    its last check, which may have measured some of its claims only.
    """
    path = resources.files("brickyard") / "claims" / "results" / f"{name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    absent: dict[str, Any] = {"inequality": "", "low": None, "high": None, "detail": ""}
    absent |= {key: result[key] for key in ("environment", "full", "seconds", "date") if key in result}
    claims = [absent | claim for claim in result["claims"]]
    for claim in claims:
        if claim.get("control"):
            claim["control"] = {"destroyed": None} | claim["control"]
    return result | {"claims": claims}


def survived(claim: dict[str, Any]) -> bool:
    """Whether a measured claim has a negative control that was judged and left the gain there."""
    gone = (claim.get("control") or {}).get("destroyed")
    return gone is not None and not gone


def word_of(claim: dict[str, Any]) -> str:
    """Return in a few words whether a measured claim holds, and where it does, whether its control did not."""
    holds = claim["holds"]
    said = {True: "holds", False: "does not hold"}.get(holds, str(holds))
    return f"{said}, control not destroyed" if holds is True and survived(claim) else said


def control_of(claim: dict[str, Any]) -> str:
    """Return what a measured claim's negative control was, what it had to do, and its figures."""
    control = claim["control"]
    bounds = [control.get(key) for key in ("low", "high")]
    interval = f" ({_number(bounds[0])} to {_number(bounds[1])})" if None not in bounds else ""
    asked = f": {control['inequality']}" if control.get("inequality") else ""
    return f"{control.get('what', 'the control')}{asked}; measured {_number(control.get('measured'))}{interval}"


def verdict_of(name: str) -> str:
    """Return in a few words how many of a method's claims hold here: "holds", "2 hold, 1 undecided"."""
    result = measured(name)
    if result is None:
        return "not measured"
    found = {claim["text"]: re.sub(", (.*)", r" (\1)", word_of(claim)) for claim in result["claims"]}
    words = Counter(found.get(claim.text, "not measured") for claim in registry.find(name).record.claims)
    if not words.total():
        return "no claim"
    if len(words) == 1:
        word, count = words.popitem()
        return word if count == 1 else f"{'both' if count == 2 else f'all {count}'} {_plural(word, count)}"
    order = sorted(words, key=lambda word: (not word.startswith("holds"), -words[word]))
    return ", ".join(f"{words[word]} {_plural(word, words[word])}" for word in order)


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word.replace("holds", "hold", 1).replace("does not", "do not", 1)


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
        interval = f"{_number(found['low'])} to {_number(found['high'])}"
        unit = f" {found['unit']}" if found.get("unit") else ""
        if found.get("metric") == "bits_per_byte":
            unit = " hundredths of bits per byte"
        judged = found["inequality"] or found["detail"]
        own = _own(found, result) if result else ""
        figures = f"measured {_number(found['measured'])}{unit} ({interval}), {found['kind']}{own}"
        write(f"    {word_of(found)}: {judged}; {figures}\n")
        if survived(found):
            write(f"    control: {control_of(found)}: gain NOT destroyed\n")
        elif found.get("control"):
            gone = "destroyed" if found["control"]["destroyed"] else "not judged"
            write(f"    control: {found['control'].get('what', '')}: gain {gone}\n")
    if result:
        cpu = result["environment"].get("cpu", "unknown hardware")
        how = ", --full" if result.get("full") else ""
        write(f"  measured {result['date']} in {result['seconds']:.0f} s on {cpu}{how}\n")
    return 0


def _own(claim: dict[str, Any], result: dict[str, Any]) -> str:
    """Return when, where and how a claim was measured, as far as that is not what the file says of its last check."""
    there, last = claim["environment"], result["environment"]
    said = [f"on {claim['date']}"] if claim["date"] != result["date"] else []
    said += [f"in {claim['seconds']:.0f} s"] if claim["seconds"] != result["seconds"] else []
    for key, words in (("cpu", "on {}"), ("torch", "with torch {}"), ("threads", "with {} threads")):
        if there.get(key) != last.get(key):
            said.append(words.format(there.get(key, f"unknown {key}")))
    if claim.get("full") != result.get("full"):
        said.append("--full" if claim.get("full") else "not --full")
    return "".join(f", {part}" for part in said)


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
