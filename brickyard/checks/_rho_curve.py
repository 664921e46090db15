"""The shared measurement of telly and similarity: how rho falls with depth after full tuning."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import t as student

from brickyard.checks._takes import takes
from brickyard.core import trial
from brickyard.core.answers import answer
from brickyard.core.build import build
from brickyard.core.loop import train
from brickyard.core.method import Claim
from brickyard.core.retention import inner
from brickyard.core.similarity import cka, layer_means, rho

RISE = 0.02  # rho may rise by so much from one layer to the next
ARM = "full + linear-probe"
_ROWS = 1000  # test rows by which rho is measured


@takes("base", "data")
def rho_curve(claim: Claim) -> dict[str, Any]:
    """Tune the whole base with several seeds; compare it with itself, before and after, at every layer.

    Gate: the tuned model beats the majority class by 10 points. Control: the untuned model against itself, whose curve
    is flat at 1, so that no layer is the lowest.
    """
    curves, aligned, scores, majority = [], [], [], 0.0
    flat: list[float] = []
    for seed in range(1, claim.seeds + 1):
        ready = trial.prepare(_setting(claim, seed), ("train", "test"))
        attached = build(ready.plan, ready.base, ready.task, seed=seed)
        attached.model.to(ready.device)
        rows = ready.encoded["test"]
        index = np.arange(min(_ROWS, len(rows)))
        before = layer_means(inner(attached.model), rows, index)
        flat = [rho(x, x) for x in before]
        train(attached, ready.encoded["train"], None, ready.task, ready.training, device=str(ready.device))
        after = layer_means(inner(attached.model), rows, index)
        curves.append([rho(x, y) for x, y in zip(before, after, strict=True)])
        aligned.append([cka(x, y) for x, y in zip(before, after, strict=True)])
        found, labels = answer(attached.model, rows, ready.task).predictions, rows.labels.numpy()
        scores.append(ready.task.score(labels, found))
        majority = ready.task.score(labels, np.full_like(found, np.bincount(labels.astype(int)).argmax()))
    return judged(np.array(curves), np.array(aligned), np.array(scores), majority, np.array(flat))


def judged(
    curves_SL: np.ndarray, aligned_SL: np.ndarray, scores_S: np.ndarray, majority: float, flat_L: np.ndarray
) -> dict[str, Any]:
    """Judge rho [S seeds, L + 1 states]: the largest rise, and how far the top layer lies below the next lowest."""
    rise_S = np.diff(curves_SL, axis=1).max(1)
    lead_S = curves_SL[:, :-1].min(1) - curves_SL[:, -1]
    rise, lead = _over_seeds(rise_S), _over_seeds(lead_S)
    gate = float(scores_S.min()) > majority + 0.1
    if not gate:
        holds: Any = "set-up invalid"
    elif rise[2] <= RISE and lead[1] > 0:
        holds = True
    elif rise[1] > RISE or lead[2] <= 0:
        holds = False
    else:
        holds = "undecided"
    mean_L = curves_SL.mean(0)
    return {
        "inequality": f"largest rise of rho <= {RISE:g} and rho of the top layer < that of all others",
        "holds": holds,
        "measured": lead[0],
        "low": lead[1] if len(curves_SL) > 1 else None,
        "high": lead[2] if len(curves_SL) > 1 else None,
        "detail": (
            f"rho {' '.join(f'{v:.3f}' for v in mean_L)} (mean of {len(curves_SL)} seeds); largest rise {rise[0]:.3f} "
            f"({rise[1]:.3f} to {rise[2]:.3f}), the top lies {lead[0]:.3f} lower ({lead[1]:.3f} to {lead[2]:.3f})"
        ),
        "gate": {"inequality": "full > majority + 10.0", "measured": 100 * (scores_S.min() - majority), "holds": gate},
        "control": {
            "what": "a model compared with itself: rho is 1 at every layer and none is the lowest",
            "inequality": "1 - rho <= 1e-6",
            "measured": float(1 - flat_L.min()),
            "destroyed": bool(flat_L.min() >= 1 - 1e-6),
        },
        "figures": {"rho": curves_SL.tolist(), "cka": aligned_SL.tolist(), "scores": scores_S.tolist()},
    }


def _over_seeds(values_S: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t) over seeds; without an end for a single seed."""
    mean = float(values_S.mean())
    if len(values_S) < 2:
        return mean, -np.inf, np.inf
    reach = float(student.ppf(0.975, len(values_S) - 1) * values_S.std(ddof=1) / np.sqrt(len(values_S)))
    return mean, mean - reach, mean + reach


def _setting(claim: Claim, seed: int) -> trial.Setting:
    return trial.Setting(
        arm=ARM,
        base=claim.base,
        data=claim.data,
        seed=seed,
        batch=claim.batch or None,
        max_length=claim.max_length or None,
        train_rows=claim.train_rows,
        training={"epochs": claim.epochs},
    )
