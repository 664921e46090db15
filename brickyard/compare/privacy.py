"""What the private runs of a comparison tell together of the rows that they trained on.

Every run that was started counts, those of the search too: the choice among them looked at all of them, and whether a
run fails depends on the rows. One that did not finish counts at its planned cost, an upper bound of what it spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from brickyard.compare.shown import digits
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.privacy import by_adjacency

_HIDES = {
    "add-or-remove": "for one row more or less",
    "replace-one": "for one row replaced by another",
    "zero-out": "for one row whose part is left out",
}


def total(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what all private runs spent; None where no run was private.

    trials: `Ledger.started()`.

    Returns {"totals": one entry of `core.privacy.compose` for each adjacency, "epsilon", "delta", "kind", "adjacency",
    "runs", "how": of the only total (None, or 0 runs, where there is none or more than one), "estimates": private runs
    without a proven bound, "unfinished": runs counted at their planned cost, "uncounted": those that left no plan,
    "sentence"}.
    """
    done = [trial for trial in trials if trial["status"] == "done"]
    finished = [r for trial in done if (r := (trial["value"].get("step") or {}).get("privacy")) is not None]
    broken = [trial for trial in trials if trial["status"] != "done"]
    planned = [trial["planned"] for trial in broken if trial.get("planned") is not None]
    # What was refused without a plan never took a step, for the reason that was given and not for what rows say.
    uncounted = sum(
        trial.get("planned") is None and trial["status"] != "refused" and _is_private(trial["arm"]) for trial in broken
    )
    reports = [*finished, *planned]
    if not reports and not uncounted:
        return None
    totals = by_adjacency([report for report in reports if report["kind"] == "certified"])
    found: dict[str, Any] = {"epsilon": None, "delta": None, "kind": "certified", "adjacency": None, "how": ""}
    if len(totals) == 1:
        found = dict(totals[0])
    found |= {
        "totals": totals,
        "runs": sum(one["runs"] for one in totals),
        "estimates": sum(report["kind"] != "certified" for report in reports),
        "unfinished": len(planned),
        "uncounted": uncounted,
    }
    return {**found, "sentence": _sentence(found, len(done) - len(finished))}


def _is_private(arm: str) -> bool:
    return any(registry.find(piece.name).record.family == "private" for piece in parse(arm).pieces)


def _sentence(found: Mapping[str, Any], open_runs: int) -> str:
    parts = []
    for one in found["totals"]:
        runs = "one private run spends" if one["runs"] == 1 else f"{one['runs']} private runs together spend"
        hides = _HIDES.get(one["adjacency"], f"for {one['adjacency']} neighbours")
        parts.append(f"{runs} epsilon {digits(one['epsilon'])} at delta {one['delta']:g} on these rows, {hides}")
    said = f"Privacy: {'; '.join(parts)}" if parts else ""
    if said:
        unfinished = f", and {found['unfinished']} unfinished at their planned cost" if found["unfinished"] else ""
        said += f" (certified; search and seeds counted{unfinished})"
    if found["estimates"]:
        of = f"; of {found['estimates']} more" if said else f"Privacy: of {found['estimates']} private runs"
        said += f"{of} there is an estimate alone, which proves nothing"
    if found["uncounted"]:
        runs = "private run" if found["uncounted"] == 1 else "private runs"
        said += f"{'; ' if said else 'Privacy: '}{found['uncounted']} {runs} did not finish; not in this total"
    if open_runs:
        said += f"; the other {open_runs} runs have no bound"
    return f"{said}. Scores and curves were computed without noise."
