"""From finished trials to result.json: scores with intervals, pairs, the verdict, costs, curves, confusion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from brickyard.compare.plan import with_setting
from brickyard.compare.verdict import pairs_table, verdict
from brickyard.core.arm import parse
from brickyard.core.base import Base
from brickyard.core.data import Data
from brickyard.core.influence import MINIMUM_EXAMPLES
from brickyard.core.stats import interval
from brickyard.core.task import Task

UNTOUCHED = "untouched base"  # the arm of a language model's own answers

COSTS = ("trainable_parameters", "saved_for_backward_bytes", "peak_bytes", "step_ms", "forward_flops")


def assemble(
    entries: Sequence[dict[str, Any]],
    plan: dict[str, Any],
    data: Data,
    base: Base,
    task: Task,
    command: str,
    *,
    search_seconds: float,
    untouched: np.ndarray | None = None,
) -> dict[str, Any]:
    """Build result.json. `entries` are the rows of one run (see `run._Run.rows`), with answers where they are done."""
    labels = next((e["answers"][0]["label"] for e in entries if e["status"] == "done"), np.empty(0))
    answers = {e["name"]: np.stack([a["prediction"] for a in e["answers"]]) for e in entries if e["status"] == "done"}
    methods = [_method(e, answers, labels, task) for e in entries]
    if task.labels is not None and len(labels) and not any(e["name"] == "majority" for e in entries):
        most = int(np.bincount(np.asarray(data.splits["train"]["label"], dtype=int)).argmax())
        methods.append(_constant("majority", np.full(len(labels), most), labels, task, answers))
    if untouched is not None and len(labels):
        methods.append(_constant(UNTOUCHED, untouched, labels, task, answers) | {"answers": "answers/untouched-base"})
    each = _in_nats(methods, entries) if task.metric == "bits_per_byte" else None
    together = bool(plan["shots"])  # a seed draws its labelled rows, the same for every arm
    pairs = pairs_table(labels, answers, task.metric, together=together)
    judged = verdict(methods, pairs, metric=task.metric, chance=0.5 if task.kind == "preference" else None)
    best = judged.get("recommended")
    return {
        "methods": methods,
        "pairs": pairs,
        "verdict": judged,
        "without_overlap": _without_overlap(methods, answers, labels, data, task, together),
        "environment": plan["environment"],
        "budget": {
            "sentence": plan["sentence"],
            "shares": plan["shares"],
            "seeds": plan["seeds"],
            "trials": plan["trials"],
            "search": plan["search"],
            "threads": plan["threads"],
            "workers": plan["workers"],
            "predicted_seconds": sum(plan["predicted_seconds"].values()),
            "search_seconds": search_seconds,
            "allowed_changes": plan.get("allowed_changes", []),
        },
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "rows": {k: len(v) for k, v in data.splits.items()},
            "labels": list(task.labels) if task.labels is not None else None,
            "report": data.report,
            "encoding": next(
                (t["value"]["encoding"] for e in entries for t in e["trials"] if t["status"] == "done"), {}
            ),
        },
        "base": {"spec": base.spec, "fingerprint": base.fingerprint},
        "task": {"kind": task.kind, "metric": task.metric, **({"nats_per_token": each} if each else {})},
        "command": command,
        "curves": {
            e["name"]: [_curve(t) for t in e["trials"] if t["status"] == "done"] for e in entries if e["trials"]
        },
        "confusion": _confusion(best, answers, labels, task),
    }


def _method(entry: dict[str, Any], answers: dict[str, np.ndarray], labels: np.ndarray, task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arm": entry["name"],
        "status": entry["status"],
        "reason": entry["reason"],
        "trivial": entry["trivial"],
        "setting": entry.get("setting", {}),
        "setting_arm": with_setting(entry["arm"], entry.get("setting", {})),
        "tried": entry.get("tried", {}),
        "trained_share": entry["trained_share"],
        "score": None,
        "retained": None,
        "receipt": None,
        "cost": {},
    }
    if "probe" in entry:
        row["cost"] = {k: entry["probe"][k] for k in COSTS} | {"how": entry["probe"]["how"]}
    if entry["status"] != "done":
        return row
    found = interval(labels, answers[entry["name"]], task.metric)
    row["score"] = {
        "metric": task.metric,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "per_seed": list(found.per_seed),
        "note": found.note,
    }
    values = [t["value"] for t in entry["trials"]]
    middle = lambda key: float(np.median([v["cost"][key] for v in values]))  # noqa: E731
    row["cost"] |= {
        "train_seconds": middle("train_seconds"),
        "brick_bytes": int(middle("brick_bytes")),
        "states_seconds": float(np.median([v["cost"].get("states_seconds", 0.0) for v in values])),
        "curriculum_seconds": float(np.median([v["cost"].get("curriculum_seconds", 0.0) for v in values])),
        "peak_resident_bytes": int(np.median([t["peak_resident_bytes"] for t in entry["trials"]])),
    }
    row["training"] = values[0]["training"]
    if "step" in values[0]:
        row["step"] = values[0]["step"]
    row["receipt"] = values[0]["receipt"]
    row["retained"] = _retained([v["retained"] for v in values])
    row["seeds"] = [t["seed"] for t in entry["trials"]]
    row["answers"] = "answers/" + slug(entry["name"], entry["arm"])
    return row


def _in_nats(methods: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> float | None:
    """Give scores in nats per token too; return how many one bit per byte is, a constant of the test texts."""
    done = [t["value"]["score"] for e in entries if e["status"] == "done" for t in e["trials"]]
    each = next((s["nats_per_token"] / s["mean"] for s in done if s.get("nats_per_token") and s["mean"]), None)
    for row in methods:
        if each is not None and row["score"] is not None:
            row["score"]["nats_per_token"] = row["score"]["mean"] * each
    return each


def slug(name: str, arm: str) -> str:
    """Return the folder name of a contestant; the copies of an A/A comparison are numbered."""
    copy = re.fullmatch(re.escape(arm) + r"(?: \((\d+)\))?", name)
    if copy is None:
        return name
    return parse(arm).slug + (f"-{copy[1]}" if copy[1] else "")


def _retained(rows: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [row for row in rows if row]
    if not known:
        return None
    out = dict(known[0])
    for key in ("before", "after", "drift"):
        if key in out:
            out[key] = float(np.mean([row[key] for row in known]))
    return out


def _constant(
    name: str, predictions: np.ndarray, labels: np.ndarray, task: Task, answers: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Answers [N] that no training gave, as an arm that costs nothing; they join `answers` for the pairs."""
    seeds = max((len(a) for a in answers.values()), default=1)
    answers[name] = np.tile(predictions, (seeds, 1))
    found = interval(labels, answers[name], task.metric)
    return {
        "arm": name,
        "status": "done",
        "reason": "",
        "trivial": True,
        "setting": {},
        "setting_arm": name,
        "tried": {},
        "score": {
            "metric": task.metric,
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "per_seed": list(found.per_seed),
            "note": "",
        },
        "retained": None,
        "receipt": None,
        # It has no step, so memory and time of one are unknown, not zero.
        "cost": {**dict.fromkeys(COSTS), "trainable_parameters": 0, "train_seconds": 0.0, "brick_bytes": 0},
    }


def _curve(trial: dict[str, Any]) -> dict[str, Any]:
    return {"seed": trial["seed"], "points": trial["value"]["history"]}


def _without_overlap(
    methods: Sequence[dict[str, Any]],
    answers: dict[str, np.ndarray],
    labels: np.ndarray,
    data: Data,
    task: Task,
    together: bool,
) -> dict[str, Any] | None:
    """Judge once more without the test rows that also stand in train."""
    if not len(data.test_overlap) or not data.test_overlap.any() or not len(labels):
        return None
    if len(data.test_overlap) != len(labels):
        return None  # pieces of documents; the report of the data names the documents that stand in both
    keep = ~data.test_overlap
    if keep.sum() < MINIMUM_EXAMPLES:
        told = f"only {keep.sum()} rows remain, too few to judge ({MINIMUM_EXAMPLES} are needed)."
        return {"rows": int(keep.sum()), "removed": int((~keep).sum()), "sentence": told, "verdict": None, "pairs": []}
    left = {name: a[:, keep] for name, a in answers.items()}
    rows = []
    for method in methods:
        row = dict(method)
        if row["status"] == "done":
            found = interval(labels[keep], left[row["arm"]], task.metric)
            row["score"] = {
                **row["score"],
                "mean": found.mean,
                "low": found.low,
                "high": found.high,
                "per_seed": list(found.per_seed),
            }
        rows.append(row)
    pairs = pairs_table(labels[keep], left, task.metric, together=together)
    return {
        "rows": int(keep.sum()),
        "removed": int((~keep).sum()),
        "verdict": verdict(rows, pairs, metric=task.metric),
        "pairs": pairs,
    }


def _confusion(
    best: str | None, answers: dict[str, np.ndarray], labels: np.ndarray, task: Task
) -> dict[str, Any] | None:
    """Count labels (rows) against predictions (columns) of the recommended arm, all seeds together."""
    if best is None or task.labels is None or best not in answers:
        return None
    k = len(task.labels)
    counts = np.zeros((k, k), dtype=int)
    for predictions in answers[best]:
        np.add.at(counts, (labels.astype(int), predictions.astype(int)), 1)
    return {"arm": best, "labels": list(task.labels), "matrix": counts.tolist()}
