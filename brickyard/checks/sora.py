"""The claims of `sora`: with part of its ranks beside a whole LoRA, and beside a LoRA that was cut afterwards."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import nn

from brickyard.checks._place import place_of
from brickyard.checks._runs import (
    answers,
    arm_row,
    asked_by,
    lora_factors,
    majority,
    opened_answers,
    to_the_end,
    trained,
    tuned,
    untouched,
    with_training,
)
from brickyard.checks._takes import takes
from brickyard.checks.run import BASE, Inequality, judge
from brickyard.core.arm import parse
from brickyard.core.build import build
from brickyard.core.influence import influence
from brickyard.core.method import Claim
from brickyard.core.ranks import keep_best
from brickyard.core.task import PER_TEXT
from brickyard.core.trial import Prepared, Setting, prepare

RANK = 8
SHARES = (0.9, 0.7, 0.55, 0.4, 0.25)  # of the ranks that thresholds are laid out to leave
MANY, FEW = 0.7, 0.4  # of the ranks, as the card asks
TARGET = "target=blocks"


@takes("base", "data")
def by_sparsity(claim: Claim, *, workers: int = 2, **more: Any) -> dict[str, Any]:
    """Find the thresholds that leave 70 and 40 % of the ranks, without a look at any score, and train with them.

    The shares are meant at the end of the training, so every arm keeps its last step's weights: the step that validates
    best may lie before it, where more ranks are alive. Control: the same training on shuffled labels. Gate: the whole
    LoRA beats the majority class by 10 points. On a language model, gains over the untouched base are compared, in
    hundredths of bits per byte: with 70 % of the ranks nine tenths of LoRA's gain are asked for, and the gate wants 1.
    """
    asked = to_the_end({**asked_by(claim), **more})
    with place_of("sora", claim, more) as folder:
        arms = {"lora": f"lora:r={RANK},alpha=16,{TARGET}", "dense": sora(0.0)}
        ready = prepare(Setting(arm=arms["lora"], **asked), ("train", "test"))
        language = ready.task.metric in PER_TEXT
        arms = tuned(claim, arms, asked, folder, workers, lower_is_better=language)
        steps = math.ceil(len(ready.encoded["train"]) / ready.training.batch) * ready.training.epochs
        chosen = parse(arms["dense"]).training
        grid = {f"k={k:.2g}": with_training(sora(k), **chosen) for k in thresholds(steps)}
        swept = trained(grid, asked, 1, folder, workers)
        left = {name: ranks_left(runs[0]) / whole_ranks(ready) for name, runs in swept.items()}
        many = min(left, key=lambda name: abs(left[name] - MANY))
        few = min(
            (n for n in left if left[n] <= FEW), key=lambda n: FEW - left[n], default=min(left, key=left.__getitem__)
        )
        arms |= {"many": grid[many], "few": grid[few]}
        every, shuffled = {**arms, "shuffled": arms["many"]}, {"shuffled": {"shuffle_labels": True}}
        runs = trained(every, asked, claim.seeds, folder, workers, but=shuffled)
        found = {name: answers(folder, name, claim.seeds) for name in (*arms, "shuffled")}
        kept = {name: [ranks_left(run) for run in runs[name]] for name in ("dense", "many", "few")}
        for how in ("smallest", "random"):
            cut = [
                lambda model, b=budget, s=seed, how=how: leave(model, b, how, s)
                for seed, budget in enumerate(kept["few"])
            ]
            found[how] = opened_answers(ready, folder, "lora", cut)
    rival = BASE if language else "majority"
    found[rival] = untouched(ready, claim.seeds) if language else majority(found["lora"])

    def compare(
        left: str, right: str, margin: float = 0.0, share: float = 1.0, *, strict: bool = False
    ) -> dict[str, Any]:
        of = f"{share:g} {right}" if share != 1 else right
        asked_for = Inequality(left, right, margin, share, strict)
        return {
            "inequality": f"{left} {'>' if strict else '>='} {of}{f' {margin:+.1f}' if margin else ''}",
            **judge(asked_for, found, ready.task.metric, base=found.get(BASE)),
        }

    total = whole_ranks(ready)
    shares = {name: float(np.mean(counts)) / total for name, counts in kept.items()}
    rising = list(left.values())
    gate = compare("lora", rival, 1.0 if language else 10.0, strict=True)
    gone = compare("many", "shuffled", 0.5 if language else 5.0, strict=True)
    shared = {
        "gate": gate,
        "control": {"what": "training labels shuffled", "destroyed": gone["holds"] is True, **gone},
        "arms": {name: arm_row(text, runs[name]) for name, text in arms.items()},
        "figures": {
            "ranks": kept,
            "of": total,
            "share_by_threshold": left,
            "never_rises": all(a >= b for a, b in itertools.pairwise(rising)),
            "comparisons": [compare("dense", "lora"), compare("few", "random"), compare("many", "dense")],
        },
    }
    parts = {}
    unit, gains = ("hundredths of bits per byte", "; gains over the untouched base: ") if language else ("points", "")
    if language:
        means = {n: float(influence(f.labels, f.predictions, ready.task.metric)[0].mean()) for n, f in found.items()}
        gains += ", ".join(f"{name} {100 * (means[BASE] - mean):.2f}" for name, mean in means.items() if name != BASE)
    beside_whole = compare("many", "lora", share=0.9) if language else compare("many", "lora", -0.5)
    for part, outcome, name in (
        ("against_dense", beside_whole, "many"),
        ("against_cutting", compare("few", "smallest"), "few"),
    ):
        near = abs(shares["many"] - MANY) <= 0.1 if name == "many" else shares["few"] <= FEW + 0.02
        valid = gate["holds"] is True and near
        parts[part] = {
            **outcome,
            "holds": outcome["holds"] if valid else "set-up invalid",
            "detail": (
                f"{outcome['measured']:+.2f} {unit} ({outcome['low']:+.2f} to {outcome['high']:+.2f}) with "
                f"{100 * shares[name]:.0f} % of {total} ranks{gains}"
            ),
            **shared,
        }
    return parts


def sora(k: float) -> str:
    """Return the arm with threshold k."""
    return f"sora:r={RANK},alpha=16,k={k:.3g},{TARGET}"


def thresholds(steps: float) -> list[float]:
    """Return the thresholds at which a gate that no gradient moves would be left alive with each of SHARES.

    It starts from N(0, 1) and is pulled by k times the course of the learning rate, on average half its peak.
    """
    return [float(norm.ppf(1 - share / 2)) / (0.5 * steps) for share in SHARES]


def ranks_left(run: dict[str, Any]) -> int:
    """Return the ranks of the weights that a run kept, its last step's."""
    best = next(point for point in run["history"] if point["step"] == run["best_step"])
    return int(best["ranks"])


def whole_ranks(ready: Prepared) -> int:
    """Return the ranks of all target layers before any has died."""
    made = build(ready.plan, ready.base, ready.task, seed=0)
    return RANK * len(lora_factors(made.model))


@torch.no_grad()
def leave(model: nn.Module, budget: int, how: str, seed: int) -> None:
    """Leave `budget` ranks of a trained LoRA: those of the largest |a_i| |b_i|, or random ones; the others become 0."""
    found = lora_factors(model)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _, a_rn, b_mr in found:
        size_r = a_rn.norm(dim=1) * b_mr.norm(dim=0)
        scores.append(size_r if how == "smallest" else torch.rand(len(size_r), generator=generator))
    for (_, _, b_mr), mask_r in zip(found, keep_best(scores, budget), strict=True):
        b_mr[:, ~mask_r] = 0.0
