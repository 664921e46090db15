"""EW-Tune's accounts against each other, and its low-rank views against whole gradients."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brickyard.checks._runs import answers, arm_row, asked_by, majority, trained, with_training
from brickyard.checks._takes import takes
from brickyard.checks.run import Inequality, judge
from brickyard.core.errors import Refused
from brickyard.core.method import Claim
from brickyard.core.privacy import Mechanism, epsilon_of
from brickyard.private.ew_tune import Config, LowRank, noise_of
from brickyard.private.ew_tune import edgeworth_epsilon as estimate

# noise, rate, steps of the settings that the claims are judged in
SETTINGS = ((0.8, 0.01, 1000), (1.0, 0.0297, 660), (0.7, 0.0297, 660), (2.0, 0.05, 200), (1.0, 0.00509, 3920))
DELTA = 1e-5
NEAR = 0.08
MARGIN, SHARE = -1.5, 1.2


def noise(claim: Claim) -> dict[str, Any]:
    """Return {"less": noise needed by each account at epsilon 3, "near": the estimate beside the certified bound}."""
    asked = {"rdp": {"accountant": "rdp"}, "pld": {"accountant": "pld"}, "edgeworth, order 2": {"order": 2}}
    needed = {
        name: noise_of(Config(epsilon=3.0, delta=DELTA, **options), 0.01, 1000) for name, options in asked.items()
    }  # type: ignore[arg-type]
    saved = {name: 1 - sigma / needed["rdp"] for name, sigma in needed.items() if name != "rdp"}
    table = []
    for setting in SETTINGS:
        mechanism = Mechanism(*setting)
        found = {"certified": epsilon_of([mechanism], DELTA), "estimate": estimate(mechanism, DELTA, 2)}
        table.append({"setting": setting, **found, "off": found["estimate"] / found["certified"] - 1})
    worst = max(abs(row["off"]) for row in table)
    under = sum(row["estimate"] < row["certified"] for row in table)
    # Fifty steps leave no normal law to expand about: an estimate that still agreed would be a copy of the bound.
    few = Mechanism(0.8, 0.01, 50)
    try:
        control = abs(estimate(few, DELTA, 2) / epsilon_of([few], DELTA) - 1)
    except Refused:
        control = None
    return {
        "less": {
            "holds": min(saved.values()) > 0.02,
            "measured": min(saved.values()),
            "figures": {"noise": needed, "saved": saved},
            "control": None,
            "gate": None,
            "detail": "noise " + ", ".join(f"{name} {sigma:.4g}" for name, sigma in needed.items()),
        },
        "near": {
            "holds": worst <= NEAR,
            "measured": worst,
            "figures": {"table": table, "under-reported": under},
            "control": {
                "what": "50 steps leave no normal law: the estimate is off, or refused",
                "measured": control,
                "destroyed": control is None or control > NEAR,
            },
            "gate": None,
            "detail": f"off by {100 * worst:.1f} % at most; below the bound in {under} of {len(table)} settings",
        },
    }


@takes("base", "data")
def low_rank(claim: Claim, *, epsilon: float = 8.0, workers: int = 2) -> dict[str, Any]:
    """Judge rank-1 views against whole gradients, by accuracy, and count the numbers that noise falls on."""
    common = f"epsilon={epsilon},accountant=pld,clip=1.0"
    arms = {
        "views": with_training(f"full + ew-tune:rank=1,{common}", lr=3e-4),
        "whole": with_training(f"full + ew-tune:rank=0,{common}", lr=3e-4),
        "drowned": with_training("full + ew-tune:rank=1,epsilon=0.02,accountant=pld,clip=1.0", lr=3e-4),
    }
    asked = asked_by(claim)
    with tempfile.TemporaryDirectory() as place:
        runs = trained(arms, asked, claim.seeds, Path(place), workers)
        given = {name: answers(Path(place), name, claim.seeds) for name in arms}
    given["majority"] = majority(given["whole"])
    metric = runs["whole"][0]["score"]["metric"]
    found = judge(Inequality("views", "whole", MARGIN), given, metric)
    gate = judge(Inequality("whole", "majority", 5.0), given, metric)
    control = judge(Inequality("views", "drowned", 5.0), given, metric)
    share, bound = views_share(384, 1536, 1)
    holds = found["holds"] if share <= SHARE * bound else False
    return {
        **found,
        "holds": holds if gate["holds"] is True else "set-up invalid",
        "arms": {name: arm_row(text, runs[name]) for name, text in arms.items()},
        "figures": {"numbers of a 384 x 1536 matrix": share},
        "control": {
            "what": "noise for epsilon 0.02 drowns what the rows say",
            "measured": control["measured"],
            "destroyed": control["holds"] is True,
        },
        "gate": {"what": "whole gradients learn the task", **gate},
        "detail": (
            f"views {found['measured']:+.2f} points against whole gradients "
            f"({found['low']:+.2f} to {found['high']:+.2f}); noise falls on {100 * share:.2f} % of a matrix's numbers"
        ),
    }


def views_share(outputs: int, inputs: int, rank: int) -> tuple[float, float]:
    """Return the share of a matrix's numbers that is summed over rows, counted on tensors, and r (P + D) / (P D)."""
    matrix = {"weight": nn.Parameter(torch.zeros(outputs, inputs))}
    counted = sum(shape.numel() for shape in LowRank(rank, matrix).shapes(matrix).values())
    return counted / (outputs * inputs), rank * (outputs + inputs) / (outputs * inputs)
