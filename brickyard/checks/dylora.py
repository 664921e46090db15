"""The claims of `dylora`: its quality at every rank beside LoRAs of that rank and a LoRA that was cut, and its cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import nn

from brickyard.checks._place import place_of
from brickyard.checks._runs import (
    answers,
    arm_row,
    asked_by,
    lora_factors,
    majority,
    opened_answers,
    trained,
    tuned,
    untouched,
)
from brickyard.checks._steps import attached, in_turn, mean_ratio, one_step
from brickyard.checks._takes import takes
from brickyard.checks.run import BASE, Answers, Inequality, judge
from brickyard.core.base import open_base
from brickyard.core.export import at_rank
from brickyard.core.influence import influence
from brickyard.core.method import Claim
from brickyard.core.task import PER_TEXT
from brickyard.core.trial import Setting, prepare
from brickyard.core.wrap import ADAPTER

RANKS = (1, 2, 4, 8)
SCALINGS, SVD = ("alpha over the rank left", "alpha over 8"), "by singular values"
CUT = (*SCALINGS, SVD)
TARGET = "target=[query,value]"
DEAR = 1.3  # times a LoRA that a DyLoRA may cost
ROUNDS = 12


@takes("base", "data")
def by_rank(claim: Claim, *, workers: int = 2, **more: Any) -> dict[str, Any]:
    """Train one DyLoRA and a LoRA of every rank, and hold them against each other at every rank.

    Control of all parts: a LoRA of rank 8 is no DyLoRA, so used at rank 1 as it stands it must fall behind by more
    than a point. Gate: LoRA of rank 8 beats the majority class by 10 points. On a language model a point is a tenth of
    the gain over the untouched base, which the gate wants to be 0.01 bits per byte.
    """
    arms = {"dylora": f"dylora:r={RANKS[-1]},{TARGET}", "frozen": f"dylora:r={RANKS[-1]},frozen=true,{TARGET}"}
    arms |= {f"lora{r}": f"lora:r={r},alpha=16,{TARGET}" for r in RANKS}
    asked = {**asked_by(claim), **more}
    ready = prepare(Setting(arm=arms["lora8"], **asked), ("train", "test"))
    language = ready.task.metric in PER_TEXT
    with place_of("dylora", claim, more) as folder:
        arms = tuned(claim, arms, asked, folder, workers, lower_is_better=language)
        runs = trained(arms, asked, claim.seeds, folder, workers)
        found = {name: answers(folder, name, claim.seeds) for name in arms}
        top = RANKS[-1]  # there nothing is cut
        found |= {f"{name}@{top}": found[name] for name in ("dylora", "frozen")}
        found |= {f"cut@{top} {how}": found[f"lora{top}"] for how in CUT}
        for r in RANKS[:-1]:
            for name in ("dylora", "frozen"):
                change = [lambda model, r=r: at_rank(model, r)] * claim.seeds
                found[f"{name}@{r}"] = opened_answers(ready, folder, name, change)
            for how in CUT:
                change = [lambda model, r=r, how=how: cut(model, r, how)] * claim.seeds
                found[f"cut@{r} {how}"] = opened_answers(ready, folder, "lora8", change)
        if language:
            found[BASE] = untouched(ready, claim.seeds)
        else:
            found["majority"] = majority(found["lora8"])

    rows = {name: arm_row(text, runs[name]) for name, text in arms.items()}
    return {part: {**verdict, "arms": rows} for part, verdict in judged(found, ready.task.metric).items()}


def judged(found: dict[str, Answers], metric: str) -> dict[str, dict[str, Any]]:
    """Judge the answers at every rank: `dylora@b`, `frozen@b` and `cut@b HOW` beside `lora8`, `lora{b}` and `majority`.

    Of the two scalings the one with the better mean counts at each rank, as the card has it. A cut by singular values
    is no cut of the paper's: it stands in the figures and in the detail, whichever way it goes, and decides nothing.
    """
    language = metric in PER_TEXT
    near, more, less = ("0.9 ", "", (0.0, 0.9)) if language else ("", " + 1.0", (-1.0, 1.0))
    below = "" if language else " - 1.0"

    def compare(a: str, b: str, margin: float, share: float = 1.0) -> dict[str, Any]:
        names, asked = {"a": found[a], "b": found[b]}, Inequality("a", "b", margin, share)
        return {"a": a, "b": b, "margin": margin, **judge(asked, names, metric, base=found.get(BASE))}

    means = {name: float(influence(f.labels, f.predictions, metric)[0].mean()) for name, f in found.items()}
    sign = -1 if language else 1
    best = {r: max((f"cut@{r} {how}" for how in SCALINGS), key=lambda name: sign * means[name]) for r in RANKS}
    gate = compare("lora8", BASE, 1.0) if language else compare("lora8", "majority", 10.0)
    gone = compare(f"cut@1 {SCALINGS[0]}", "lora1", *less)
    control = {
        "what": "a LoRA of rank 8 used at rank 1 as it stands: nothing taught it to be cut",
        "inequality": f"cut >= {near}lora{below}",
        "destroyed": gone["holds"] is False,
        **{k: gone[k] for k in ("measured", "low", "high")},
    }
    every = [compare(f"dylora@{r}", f"lora{r}", *less) for r in RANKS]
    over = [compare(f"dylora@{r}", best[r], 0.0 if language else 1.0) for r in RANKS if r <= 4]
    beside = [compare(f"dylora@{r}", f"cut@{r} {SVD}", 0.0) for r in RANKS if r <= 4]
    flatter = flatness([found[f"dylora@{r}"] for r in RANKS], [found[best[r]] for r in RANKS], metric)
    shared = {
        "gate": gate,
        "control": control,
        "figures": {"means": means, "spread": flatter.pop("spread"), "against_singular_values": beside},
    }
    valid = gate["holds"] is True
    parts = {
        "every_rank": {
            "inequality": f"dylora(b) >= {near}lora(b){below} for b = 1, 2, 4, 8",
            **_all(every, valid, near),
        },
        "against_cutting": {"inequality": f"dylora(b) >= cut(b){more} for b = 1, 2, 4", **_all(over, valid)},
        "spread": {**flatter, "holds": flatter["holds"] if valid else "set-up invalid"},
    }
    parts["against_cutting"]["detail"] += f"; cut by singular values, which decides nothing: {_said(beside)} points"
    if language:
        gains = ", ".join(f"{n} {100 * (means[BASE] - m):.2f}" for n, m in means.items() if n != BASE)
        for part in parts.values():
            unit = "; points are hundredths of bits per byte"
            part["detail"] += f"{unit}; gains over the untouched base: {gains}"
    return {name: {**part, **shared} for name, part in parts.items()}


def flatness(dylora: list[Answers], cut: list[Answers], metric: str) -> dict[str, Any]:
    """Judge whether the best and the worst rank of DyLoRA lie at most half as far apart as those of a LoRA that is cut.

    Measured is spread(dylora) - spread(cut) / 2 in points, at the ranks whose means are largest and smallest, with the
    95 % interval over examples and the seeds of each arm (Satterthwaite's degrees of freedom).
    """
    spreads, scores, psis = [], [], []
    for weight, ranks in ((1.0, dylora), (-0.5, cut)):
        each = [influence(one.labels, one.predictions, metric) for one in ranks]
        means = [float(score_S.mean()) for score_S, _ in each]
        (top_S, top_SN), (low_S, low_SN) = each[int(np.argmax(means))], each[int(np.argmin(means))]
        spreads.append(100 * (max(means) - min(means)))
        scores.append(weight * (top_S - low_S))
        psis.append(weight * (top_SN - low_SN).mean(axis=0))
    psi_N = psis[0] + psis[1]
    n = len(psi_N)
    variances = [float((psi_N**2).sum() / (n * (n - 1))), *(float(s.var(ddof=1) / len(s)) for s in scores)]
    freedom = [n - 1, *(len(s) - 1 for s in scores)]
    squares = sum(v**2 / df for v, df in zip(variances, freedom, strict=True))
    reach = 100 * student.ppf(0.975, sum(variances) ** 2 / squares) * sum(variances) ** 0.5 if squares else 0.0
    measured = spreads[0] - spreads[1] / 2
    low, high = float(measured - reach), float(measured + reach)
    holds: Any = True if high <= 0 else False if low > 0 else "undecided"
    return {
        "inequality": "max - min over b of dylora(b) <= (max - min over b of cut(b)) / 2",
        "holds": holds,
        "measured": measured,
        "low": low,
        "high": high,
        "detail": (
            f"over ranks {', '.join(map(str, RANKS))} dylora spreads by {spreads[0]:.2f} points, a cut LoRA by "
            f"{spreads[1]:.2f}; dylora - cut / 2 {measured:+.2f} ({low:+.2f} to {high:+.2f}) points"
        ),
        "spread": dict(zip(("dylora", "cut"), spreads, strict=True)),
    }


def _all(parts: list[dict[str, Any]], valid: bool, share: str = "") -> dict[str, Any]:
    """Join inequalities that must all hold; the figures are those of the one nearest to failing.

    `share` stands before the second of each two, where a share of it is asked for.
    """
    worst = min(parts, key=lambda part: part["low"] - part["margin"])
    said = [part["holds"] for part in parts]
    holds: Any = False if False in said else True if all(h is True for h in said) else "undecided"
    return {
        "holds": holds if valid else "set-up invalid",
        **{k: worst[k] for k in ("measured", "low", "high")},
        "detail": f"{_said(parts, share)} points",
        "comparisons": parts,
    }


def _said(parts: list[dict[str, Any]], share: str = "") -> str:
    return "; ".join(
        f"{p['a']} - {share}{p['b']} {p['measured']:+.2f} ({p['low']:+.2f} to {p['high']:+.2f})" for p in parts
    )


@torch.no_grad()
def cut(model: nn.Module, rank: int, how: str) -> None:
    """Leave `rank` ranks of every LoRA layer: its first ones, at either scaling, or those of its largest values."""
    for layer, a_rn, b_mr in lora_factors(model):
        if how == SVD:
            u_mk, s_k, v_kn = torch.linalg.svd(b_mr @ a_rn, full_matrices=False)
            a_rn[:rank], b_mr[:, :rank] = v_kn[:rank], u_mk[:, :rank] * s_k[:rank]
        if how == SCALINGS[0]:
            layer.scaling[ADAPTER] *= len(a_rn) / rank
        a_rn[rank:], b_mr[:, rank:] = 0.0, 0.0


@takes("base")
def search_cost(claim: Claim, *, batch: int = 32, tokens: int = 32, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time steps of DyLoRA and of LoRA of the same largest rank in turn; the interval is over rounds.

    Four ranks then cost four LoRAs, or one DyLoRA. Control: the dense weights trained in place of ranks.
    """
    base = open_base(claim.base)
    arms = {
        "lora": f"lora:r=8,alpha=16,{TARGET}",
        "dylora": f"dylora:r=8,{TARGET}",
        "frozen": f"dylora:r=8,frozen=true,{TARGET}",
        "full": "full",
    }
    steps = {name: one_step(attached(base, text), base, batch, tokens) for name, text in arms.items()}
    taken = in_turn(steps, rounds)
    ratios = {name: mean_ratio(np.array(taken[name]) / np.array(taken["lora"])) for name in arms if name != "lora"}
    mean, low, high = ratios["dylora"]
    gone = ratios["full"]
    holds: Any = True if high <= DEAR else False if low > DEAR else "undecided"
    return {
        "inequality": f"t(dylora) <= {DEAR:g} t(lora)",
        "holds": holds,
        "measured": mean,
        "low": low,
        "high": high,
        "detail": (
            f"a step of DyLoRA takes {mean:.2f} ({low:.2f} to {high:.2f}) of LoRA's at B={batch}, T={tokens}, with "
            f"frozen lower ranks {ratios['frozen'][0]:.2f}; a search over {len(RANKS)} ranks costs "
            f"{len(RANKS) / mean:.1f} times as much"
        ),
        "gate": None,
        "control": {
            "what": "all weights trained, which is no low-rank step",
            "inequality": f"t(full) > {DEAR:g} t(lora)",
            "measured": gone[0],
            "low": gone[1],
            "high": gone[2],
            "destroyed": gone[1] > DEAR,
        },
        "figures": {"seconds": taken, "ratios": ratios},
    }
