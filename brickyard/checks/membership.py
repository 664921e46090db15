"""The membership attack on a run that learns its rows by heart, on a private one, and on rows that none trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from brickyard.audit.membership import Found, attack
from brickyard.checks._place import place_of
from brickyard.checks._runs import asked_by, trained, with_training
from brickyard.checks._takes import takes
from brickyard.core import brick as bricks
from brickyard.core.answers import answer
from brickyard.core.method import Claim
from brickyard.core.trial import Setting, prepare

LEAKY, PRIVATE = "full", "lora + dp:epsilon=1"


@takes("base", "data")
def leaks(claim: Claim, *, lr: float = 5e-4, workers: int = 2) -> dict[str, Any]:
    """Return {"leaky": the attack on full tuning, "private": on a private run of the same rows}, over all seeds."""
    batch = claim.batch or 16
    arms = {
        "leaky": with_training(LEAKY, lr=lr, batch=batch),
        "private": with_training(PRIVATE, batch=max(batch, claim.train_rows // 4)),
    }
    # Looked at in the end alone: the last weights know the rows best, and validating costs more than training here.
    asked = {**asked_by(claim), "training": {"epochs": claim.epochs, "evaluate_every": 10**9}}
    with place_of("membership", claim, lr) as folder:
        runs = trained(arms, asked, claim.seeds, folder, workers)
        scores = {name: _scores(folder, name, arms[name], asked, claim.seeds) for name in arms}
    found = {name: [attack(*pair) for pair in pairs] for name, pairs in scores.items()}
    # Two halves of the rows that nobody trained on: the attack must find nothing there.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(scores["leaky"][0][1]))
    halves = [attack(others[order[::2]], others[order[1::2]]) for _, others in scores["leaky"]]
    certified = [run["step"]["privacy"]["epsilon"] for run in runs["private"]]
    bounds = [f.epsilon_lower for f in found["private"]]
    detected = [f.detected for f in found["leaky"]]
    control = {
        "what": "rows that nobody trained on, in two halves",
        "measured": float(np.mean([f.auc for f in halves])),
        "destroyed": not any(f.detected for f in halves),
    }
    figures = {name: [asdict(f) for f in each] for name, each in {**found, "control": halves}.items()}
    gate = {"what": "the leaky run is detected with every seed", "holds": all(detected)}
    less = np.array([f.auc for f in found["leaky"]]) - np.array([f.auc for f in found["private"]])
    below = all(bound <= epsilon for bound, epsilon in zip(bounds, certified, strict=True))
    return {
        "leaky": {
            "inequality": "every leaky run is detected",
            "holds": True if all(detected) else "undecided" if any(detected) else False,
            "measured": _mean(found["leaky"]),
            "arms": arms,
            "figures": figures,
            "control": control,
            "gate": None,
            "detail": f"AUC {_mean(found['leaky']):.3f} over {len(detected)} seeds, detected in {sum(detected)}",
        },
        "private": {
            "inequality": "bound(private) <= certified epsilon, and AUC(private) < AUC(leaky), with every seed",
            "holds": "set-up invalid" if not all(detected) else bool(below and less.min() > 0),
            "measured": _mean(found["private"]),
            "arms": arms,
            "figures": {**figures, "certified": certified},
            "control": control,
            "gate": gate,
            "detail": (
                f"AUC {_mean(found['private']):.3f} against {_mean(found['leaky']):.3f}; epsilon at least "
                f"{max(bounds):.3g} (estimate), at most {min(certified):.3g} (certified)"
            ),
        },
    }


def _mean(found: list[Found]) -> float:
    return float(np.mean([f.auc for f in found]))


def _scores(
    folder: Path, name: str, text: str, asked: dict[str, Any], seeds: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (members, others) scores of every seed's brick, on the rows that it trained on and on test's."""
    out = []
    for seed in range(1, seeds + 1):
        ready = prepare(Setting(arm=text, seed=seed, **asked), ("train", "test"))
        model = bricks.load(folder / f"{name}-{seed}" / "brick").apply(ready.base).model
        losses = {split: answer(model, ready.encoded[split], ready.task).losses for split in ("train", "test")}
        out.append((-losses["train"], -losses["test"]))
    return out
