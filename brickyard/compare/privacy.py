"""What the private runs of a comparison tell together of the rows that they trained on.

Every finished run counts, those of the search too: the choice among them looked at all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from brickyard.compare.shown import digits
from brickyard.core.privacy import compose


def total(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return {"epsilon", "delta", "kind", "runs", "how", "estimates", "sentence"}; None where no run was private.

    trials: rows of the ledger. `estimates` counts private runs without a proven bound, which no total can hold; where
    there are none but those, epsilon and delta are None.
    """
    done = [trial for trial in trials if trial["status"] == "done"]
    reports = [r for trial in done if (r := (trial["value"].get("step") or {}).get("privacy")) is not None]
    if not reports:
        return None
    certified = [report for report in reports if report["kind"] == "certified"]
    found: dict[str, Any] = {"epsilon": None, "delta": None, "kind": "certified", "runs": 0, "how": ""}
    if certified:
        found = compose(certified)
    estimates = len(reports) - len(certified)
    return {**found, "estimates": estimates, "sentence": _sentence(found, estimates, len(done) - len(reports))}


def _sentence(found: Mapping[str, Any], estimates: int, open_runs: int) -> str:
    parts = []
    if found["runs"]:
        runs = "one private run spends" if found["runs"] == 1 else f"{found['runs']} private runs together spend"
        parts.append(
            f"Privacy: {runs} epsilon {digits(found['epsilon'])} at delta {found['delta']:g} on these rows (certified; "
            "search and seeds counted)"
        )
    if estimates:
        of = f"of {estimates} more" if parts else f"Privacy: of {estimates} private runs"
        parts.append(f"{of} there is an estimate alone, which proves nothing")
    if open_runs:
        parts.append(f"the other {open_runs} runs have no bound")
    return f"{'; '.join(parts)}. Scores and curves were computed without noise."
