"""The claims of telly that are no inequality between arms: step time, bytes kept for backward, and rho by depth."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from brickyard.checks._rho_curve import rho_curve
from brickyard.checks._steps import attached, in_turn, mean_ratio, one_step, random_batch
from brickyard.checks._takes import takes
from brickyard.core import measure
from brickyard.core.base import open_base
from brickyard.core.method import Claim
from brickyard.core.roles import blocks

__all__ = ["rho_curve", "saved_bytes", "step_time"]

HEAD = " + linear-probe"
FULL, RATIO, LINEAR = "full", 0.65, 0.02
BATCH, TOKENS, ROUNDS = 32, 64, 8


def depths(layers: int) -> list[int]:
    """The values of K that the card asks for: 0, L/3, L/2, 2L/3, L - 1."""
    return sorted({0, layers // 3, layers // 2, 2 * layers // 3, layers - 1})


@takes("base")
def step_time(claim: Claim, *, batch: int = BATCH, tokens: int = TOKENS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time steps of full training, of each K with nothing kept, and of the same K on kept states, in turn.

    Each round gives one ratio to full training; the interval is over rounds. The claim is of the steps with nothing
    kept, as in the paper; those on kept states stand beside them. Control: as many layers frozen at the top, whose
    steps must still go back through all below, and so save less.
    """
    base = open_base(claim.base)
    count = len(blocks(base.backbone()))
    two_thirds = 2 * count // 3
    arms = {FULL: FULL, **{f"k={k}": f"telly:k={k},cache=false" for k in depths(count)}}
    arms |= {f"k={k} kept": f"telly:k={k}" for k in depths(count) if k}
    arms["top"] = f"telly:k={two_thirds},top=true"
    steps = {name: one_step(attached(base, arm + HEAD), base, batch, tokens) for name, arm in arms.items()}
    taken = in_turn(steps, rounds)
    full_R = np.array(taken[FULL])
    ratios = {name: mean_ratio(np.array(found) / full_R) for name, found in taken.items() if name != FULL}
    chain = [f"k={k}" for k in depths(count)]
    falls = [mean_ratio(np.array(taken[b]) / np.array(taken[a])) for a, b in itertools.pairwise(chain)]
    at = ratios[f"k={two_thirds}"]
    if at[2] <= RATIO and all(high < 1 for _, _, high in falls):
        holds: Any = True
    elif at[1] > RATIO or any(low >= 1 for _, low, _ in falls):
        holds = False
    else:
        holds = "undecided"
    said = ", ".join(f"{name} {mean:.2f}" for name, (mean, _, _) in ratios.items())
    return {
        "inequality": f"t(K = {two_thirds}) <= {RATIO:g} t(full), and t falls with K",
        "holds": holds,
        "measured": at[0],
        "low": at[1],
        "high": at[2],
        "detail": (
            f"step time over that of full training at B={batch}, T={tokens} (measured, {rounds} rounds): {said}; "
            f"K={two_thirds}: {at[0]:.3f} ({at[1]:.3f} to {at[2]:.3f})"
        ),
        "gate": None,
        "control": {
            "what": "as many layers frozen at the top: the way back through the others stays",
            "inequality": "control > telly",
            "measured": ratios["top"][0] - at[0],
            "low": ratios["top"][1] - at[2],
            "high": ratios["top"][2] - at[1],
            "destroyed": bool(ratios["top"][1] > at[2]),
        },
        "figures": {"seconds": taken, "ratios": ratios},
    }


@takes("base")
def saved_bytes(claim: Claim, *, batch: int = BATCH, tokens: int = TOKENS) -> dict[str, Any]:
    """Count the bytes kept for backward at every K, with eager attention and dropout off, and fit a line through them.

    It holds where no K lies off the line by more than 2 % of the bytes at K = 0 and the line meets 0 where all blocks
    are frozen, within a fifth of a block, which the head keeps. Control: layers frozen at the top save next to nothing.
    """
    base = open_base(claim.base)
    count = len(blocks(base.backbone()))

    def kept(arm: str) -> int:
        inputs, loss = random_batch(base, batch, tokens)
        model = attached(base, arm + HEAD, "eager").model
        return measure.saved_for_backward_bytes(model, inputs, loss)

    sizes = np.array([kept(f"telly:k={k},cache=false") for k in range(count)], dtype=np.float64)
    full, top = kept(FULL), kept(f"telly:k={count // 2},top=true")
    slope, at_zero = np.polyfit(np.arange(count), sizes, 1)
    off = float(np.abs(sizes - (at_zero + slope * np.arange(count))).max() / sizes[0])
    left = float(at_zero + slope * count) / -slope
    mib = " ".join(f"{size / 2**20:.1f}" for size in sizes)
    return {
        "inequality": f"|bytes - line| <= {LINEAR:g} bytes(K=0), and the line ends at 0 for K = L",
        "holds": bool(slope < 0 and off <= LINEAR and abs(left) <= 0.2),
        "measured": off,
        "low": off,
        "high": off,
        "detail": (
            f"MiB at K=0..{count - 1}, B={batch}, T={tokens}, eager: {mib}; full {full / 2**20:.1f}; off the line by "
            f"at most {100 * off:.2f} % of K=0, {100 * left:.1f} % of a block left at K=L"
        ),
        "gate": None,
        "control": {
            "what": "as many layers frozen at the top: they are passed backward all the same",
            "inequality": "control > telly at K = L/2",
            "measured": (top - sizes[count // 2]) / full,
            "destroyed": bool(top > 1.2 * sizes[count // 2]),
        },
        "figures": {"bytes": sizes.tolist(), "full": full, "top": top},
    }
