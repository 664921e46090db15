"""The claims of `meta-tuning`: answers to the questions of a group of tasks that no training has seen."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from brickyard.audit.zero_shot import Config as AuditConfig
from brickyard.audit.zero_shot import measure
from brickyard.checks._place import finished, place_of
from brickyard.checks._takes import takes
from brickyard.core import brick as bricks
from brickyard.core.base import open_base
from brickyard.core.data import read_data
from brickyard.core.jobs import Job
from brickyard.core.method import Claim
from brickyard.core.questions import read_tasks
from brickyard.core.trial import Setting
from brickyard.data.meta_tuning import Config, source

HELD_OUT = "internet"
LADDER = ("runtime", "files")  # groups added one by one, before all
GATE = 0.6  # mean AUC on the questions that were trained on


@takes("base", "data")
def held_out(
    claim: Claim,
    *,
    rows: int = 20,
    test_rows: int = 40,
    hold_out: str = HELD_OUT,
    ladder: tuple[str, ...] = LADDER,
    arm: str = "full:lr=1e-4",
    workers: int = 2,
) -> dict[str, Any]:
    """Train on all groups but one, on a growing number of them, and with permuted questions; test on the one left out.

    Every seed draws other rows and another order. Beside them the cosine of question and text, which needs no training.
    Control: the questions of train permuted among the labels of each data set. Gate: the questions that were trained
    on are answered better than by chance (AUC 0.6 on validation).
    """
    tasks = claim.data
    label_of = {q: label for task in read_tasks(tasks) for label, asked in task.labels.items() for q in asked}
    options: dict[str, dict[str, Any]] = {"tuned": {}, "permuted": {"permute": True}}
    options |= {f"{n} groups": {"groups": ladder[:n]} for n in range(1, len(ladder) + 1)}
    base, device = open_base(claim.base), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, list[dict[str, float]]] = {}
    seen: list[float] = []
    near: list[dict[str, Any]] = []
    with place_of("meta-tuning", claim, rows, test_rows, hold_out, ladder, arm) as folder:
        jobs, made = [], {}
        for seed in range(1, claim.seeds + 1):
            for name, given in options.items():
                config = Config(hold_out=hold_out, rows=rows, test_rows=test_rows, **given)
                splits = source(config, tasks, seed).splits
                made[name, seed] = splits
                setting = Setting(
                    arm=arm,
                    base=claim.base,
                    data=splits,
                    seed=seed,
                    max_length=claim.max_length or None,
                    training={"epochs": claim.epochs},
                )
                argument = {"setting": asdict(setting), "folder": str(folder / f"{name}-{seed}")}
                jobs.append(Job(key=f"{name}-{seed}", function="brickyard.core.trial:run", argument=argument))
        finished(jobs, workers, folder)
        audit = AuditConfig(length=claim.max_length)
        for (name, seed), splits in made.items():
            brick = bricks.load(folder / f"{name}-{seed}" / "brick").apply(base)
            table = measure(base, brick, audit, read_data(splits, need=()), device=device)["table"]
            found.setdefault(name, []).append({line["question"]: line["auc"] for line in table})
            if name == "tuned":
                found.setdefault("cosine", []).append({line["question"]: line["before"] for line in table})
                held = read_data({"test": splits["validation"]}, need=())
                seen.append(measure(base, brick, audit, held, device=device)["auc"])
                near = table
    return judged({n: by_label(rows_, label_of) for n, rows_ in found.items()}, found, seen, near)


def by_label(areas: list[dict[str, float]], label_of: dict[str, str]) -> np.ndarray:
    """Return the mean AUC of each label's questions, by seed: [S, L]. Questions about one label are no two samples."""
    labels = sorted({label_of[q] for q in areas[0]})
    return np.array(
        [[np.mean([a for q, a in one.items() if label_of[q] == label]) for label in labels] for one in areas]
    )


def difference(a_SL: np.ndarray, b_SL: np.ndarray, margin: float, text: str) -> dict[str, Any]:
    """Judge mean(a - b) >= margin, in points, by the 95 % interval of `reach`; a seed draws the same rows for both."""
    values_SL = 100 * (a_SL - b_SL)
    mean, half = float(values_SL.mean()), reach(values_SL)[0]
    return _judged(mean, max(mean - half, -200.0), min(mean + half, 200.0), margin, text)


def improved(better_SL: np.ndarray, margin: float, text: str) -> dict[str, Any]:
    """Judge the percentage of labels that are better by Wilson's interval: t would give none to ten of ten."""
    p = float(better_SL.mean())
    half, c, variance = reach(better_SL.astype(float))
    if not np.isfinite(half):
        return _judged(100 * p, 0.0, 100.0, margin, text)
    n = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else better_SL.shape[1]
    centre = (p + c * c / (2 * n)) / (1 + c * c / n)
    wide = c / (1 + c * c / n) * np.sqrt(p * (1 - p) / n + c * c / (4 * n * n))
    return _judged(100 * p, 100 * (centre - wide), 100 * (centre + wide), margin, text)


def reach(values_SL: np.ndarray) -> tuple[float, float, float]:
    """Return the half width of the 95 % interval of the mean, its critical value and its variance; inf for one label.

    Seeds and labels are two crossed random effects, as in `core.stats`, which judges no fewer than 20 examples: a group
    has fewer labels. Student's t with Satterthwaite's degrees of freedom; of one seed it holds for that seed.
    """
    seeds, labels = values_SL.shape
    if labels == 1:
        return np.inf, np.inf, np.inf
    of_L, of_S = values_SL.mean(0), values_SL.mean(1)
    by_labels, by_seeds, rest, df = of_L.var(ddof=1) / labels, 0.0, 0.0, labels - 1.0
    squares = by_labels**2 / (labels - 1)
    if seeds > 1:
        both = (seeds - 1) * (labels - 1)
        left_SL = values_SL - of_L - of_S[:, None] + values_SL.mean()
        by_seeds, rest = of_S.var(ddof=1) / seeds, (left_SL**2).sum() / both / values_SL.size
        squares += by_seeds**2 / (seeds - 1) + rest**2 / both
    total = by_labels + max(0.0, by_seeds - rest)
    if squares > 0:
        df = max(total**2 / squares, min(seeds if seeds > 1 else labels, labels) - 1.0)
    c = float(student.ppf(0.975, df))
    return c * float(np.sqrt(total)), c, float(total)


def _judged(measured: float, low: float, high: float, margin: float, text: str) -> dict[str, Any]:
    holds: Any = True if low >= margin else False if high < margin else "undecided"
    return {"inequality": text, "measured": measured, "low": float(low), "high": float(high), "holds": holds}


def judged(
    areas: dict[str, np.ndarray],
    found: dict[str, list[dict[str, float]]],
    seen: list[float],
    near: list[dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Return the two parts of the claim from the AUC [S, L] of every arm, by seed and label."""
    tuned = areas["tuned"]
    unseen = [
        difference(tuned, areas["cosine"], 2.0, "AUC(tuned) >= AUC(cosine) + 2 points"),
        difference(tuned, areas["permuted"], 10.0, "AUC(tuned) >= AUC(permuted) + 10 points"),
        improved(tuned > areas["cosine"], 60.0, "labels improved >= 60 %"),
    ]
    steps = [name for name in areas if name.endswith(" groups")]
    order = [*steps, "tuned"]
    groups = [
        difference(areas[more], areas[fewer], -1.0, f"AUC({more}) >= AUC({fewer}) - 1 point")
        for fewer, more in itertools.pairwise(order)
    ]
    gate = {
        "inequality": f"AUC(trained questions) > {GATE}",
        "measured": float(np.mean(seen)),
        "holds": min(seen) > GATE,
    }
    gone = difference(areas["permuted"], areas["cosine"], 2.0, "AUC(permuted) >= AUC(cosine) + 2 points")
    means = {name: float(values.mean()) for name, values in areas.items()}
    shared = {
        "gate": gate,
        "control": {
            "what": "questions permuted among the labels of each data set",
            "destroyed": gone["holds"] is False,
            **gone,
        },
        "figures": {
            "auc": means,
            "by_question": found,
            "trained_questions": seen,
            "nearest": [
                {k: line[k] for k in ("question", "nearest", "similarity")} for line in near if "nearest" in line
            ],
        },
    }
    unsure = "; the control is undecided" if gone["holds"] == "undecided" else ""
    said = "AUC on unseen questions: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    out = {}
    for part, rows in (("unseen", unseen), ("groups", groups)):
        verdicts = [row["holds"] for row in rows]
        holds: Any = False if False in verdicts else True if all(h is True for h in verdicts) else "undecided"
        figures = "; ".join(
            f"{r['inequality']}: {r['measured']:+.1f} ({r['low']:+.1f} to {r['high']:+.1f})" for r in rows
        )
        out[part] = {
            "inequality": " and ".join(row["inequality"] for row in rows),
            "holds": holds if gate["holds"] else "set-up invalid",
            **{k: rows[0][k] for k in ("measured", "low", "high")},
            "detail": f"{figures}; {said}; on trained questions {np.mean(seen):.3f}{unsure}",
            "comparisons": rows,
            **shared,
        }
    return out
