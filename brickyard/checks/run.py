"""`brickyard check`: re-measure a method's headline claims here, with their gates and negative controls."""

from __future__ import annotations

import importlib
import re
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from brickyard.compare.plan import Contestant, Request, key_of
from brickyard.compare.run import Listener, compare
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.errors import RunFailed, UsageError
from brickyard.core.files import write_json
from brickyard.core.measure import cpu_bfloat16_is_fast, environment
from brickyard.core.method import Claim
from brickyard.core.stats import examples_needed, paired

RESULTS = registry.ROOT / "claims" / "results"
_INEQUALITY = re.compile(r"\s*([\w-]+)\s*(>=|>)\s*([\w-]+)\s*(?:([+-])\s*([\d.]+))?\s*\Z")


@dataclass(frozen=True)
class Inequality:
    """`left >= right + margin`, margin in points (hundredths of the metric)."""

    left: str
    right: str
    margin: float

    @classmethod
    def read(cls, text: str) -> Inequality:
        """Read `"mos >= lora - 0.7"`; UsageError when it is not of that form."""
        match = _INEQUALITY.match(text)
        if match is None:
            raise UsageError(f"{text!r} is no inequality of the form 'a >= b + 1.0'.")
        left, _, right, sign, margin = match.groups()
        return cls(left, right, float(margin or 0) * (-1 if sign == "-" else 1))


@dataclass(frozen=True)
class Answers:
    """What one arm answered: predictions [seeds, examples] and the labels [examples]."""

    labels: np.ndarray
    predictions: np.ndarray


def judge(inequality: Inequality, answers: dict[str, Answers], metric: str) -> dict[str, Any]:
    """Measure an inequality: the difference in points with its 95 % interval, and whether it holds.

    True when the interval clears the margin, False when it misses it, else "undecided" with the examples needed.
    """
    a, b = answers[inequality.left], answers[inequality.right]
    found = paired(a.labels, a.predictions, b.predictions, metric)
    points = {k: 100 * float(getattr(found, k)) for k in ("difference", "low", "high")}
    # Identical answers leave no room for doubt: the interval is a point and counts as clearing its own value.
    if points["low"] >= inequality.margin:
        holds: Any = True
    elif points["high"] < inequality.margin:
        holds = False
    else:
        holds = "undecided"
    out = {"measured": points["difference"], "low": points["low"], "high": points["high"], "holds": holds}
    if holds == "undecided":
        shifted = abs(points["difference"] - inequality.margin) / 100
        out["needed"] = examples_needed(a.labels, a.predictions, b.predictions, metric, difference=max(shifted, 1e-4))
    return out


def check(
    name: str,
    *,
    base: str | None = None,
    data: Any = None,
    full: bool = False,
    out: str | Path | None = None,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Re-measure every claim of a method and write `NAME.json`; return what was written.

    Interrupted checks go on where they stopped. RunFailed names an arm that did not finish.
    """
    entry, started = registry.find(name), time.monotonic()
    if not entry.record.claims:
        raise UsageError(f"{name} makes no claim that could be checked.")
    claims = [replace(c, **c.full) if full else c for c in entry.record.claims]
    measured = []
    for i, claim in enumerate(claims):
        if claim.measure:
            function = getattr(importlib.import_module(f"brickyard.checks.{name.replace('-', '_')}"), claim.measure)
            measured.append({"text": claim.text, "kind": claim.kind, **function(claim)})
        else:
            measured.append(_measure(name, i, claim, base, data, listen))
    result = {
        "method": name, "claims": measured, "environment": environment(), "full": full,
        "seconds": time.monotonic() - started, "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    folder = Path(out) if out else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)
    return result


def _measure(name: str, index: int, claim: Claim, base: str | None, data: Any, listen: Listener) -> dict[str, Any]:
    settings = tuple({"lr": lr} for lr in claim.lrs) or ({},)
    seeds = tuple(range(1, claim.seeds + 1))
    arms = [Contestant(label, str(parse(text)), _fixed(text, settings), seeds) for label, text in claim.arms.items()]
    if "arm" in claim.control:
        changes = {"shuffle_labels": True} if claim.control.get("labels") == "shuffled" else {}
        arms.append(Contestant("control", str(parse(claim.control["arm"])), _fixed(claim.control["arm"], settings), seeds, changes=changes))
    precision = "bfloat16" if cpu_bfloat16_is_fast() else "float32"
    request = Request(
        methods=tuple(a.arm for a in arms), base=base or claim.base, data=data or claim.data, seeds=claim.seeds,
        trials=len(settings), train_rows=claim.train_rows, baselines=False,
        training={"epochs": claim.epochs, "precision": precision},
    )  # fmt: skip
    folder = Path("runs") / "checks" / f"{name}-{index}-{key_of([str(claim), request.base, str(request.data)])}"
    result, folder = compare(request, folder, arms=arms, listen=listen, allow_change=("code",))
    rows = {row["arm"]: row for row in result["methods"]}
    for label, row in rows.items():
        if row["status"] != "done":
            raise RunFailed(f"check {name}: arm {label} {row['status']}: {row['reason']}")
    answers = {label: _read(folder, row["answers"]) for label, row in rows.items() if "answers" in row}
    some = next(iter(answers.values()))
    majority = np.full_like(some.predictions, np.bincount(some.labels.astype(int)).argmax())
    answers["majority"] = Answers(some.labels, majority)
    metric = result["task"]["metric"]
    out: dict[str, Any] = {
        "text": claim.text, "inequality": claim.inequality, "kind": claim.kind, "metric": metric,
        "arms": {
            label: {
                "arm": row["setting_arm"], "mean": row["score"]["mean"], "per_seed": row["score"]["per_seed"],
                "trainable_parameters": row["cost"]["trainable_parameters"], "train_seconds": row["cost"]["train_seconds"],
            }
            for label, row in rows.items()
        },
        "base": request.base, "data": result["data"]["name"], "rows": result["data"]["rows"], "train_rows": claim.train_rows,
        **judge(Inequality.read(claim.inequality), answers, metric), "control": None, "gate": None,
    }  # fmt: skip
    if claim.control:
        found = judge(Inequality.read(claim.control["inequality"]), answers, metric)
        out["control"] = {
            "what": claim.control["what"], "inequality": claim.control["inequality"], "measured": found["measured"],
            "low": found["low"], "high": found["high"], "destroyed": found["holds"] is True,
        }  # fmt: skip
    if claim.gate:
        found = judge(Inequality.read(claim.gate), answers, metric)
        out["gate"] = {"inequality": claim.gate, "measured": found["measured"], "low": found["low"], "high": found["high"], "holds": found["holds"]}
        if found["holds"] is not True:
            out["holds"] = "set-up invalid"
    needed = f"; {out['needed']['sentence']}" if out.get("needed") else ""
    out["detail"] = f"measured {out['measured']:+.2f} points ({out['low']:+.2f} to {out['high']:+.2f}){needed}"
    return out


def _fixed(text: str, settings: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Search the claim's learning rates, except for an arm that fixes its own."""
    return ({},) if "lr" in parse(text).training else settings


def _read(folder: Path, place: str) -> Answers:
    tables = [pq.read_table(path, columns=["label", "prediction"]) for path in sorted((folder / place).glob("seed*.parquet"))]
    return Answers(tables[0]["label"].to_numpy(), np.stack([t["prediction"].to_numpy() for t in tables]))
