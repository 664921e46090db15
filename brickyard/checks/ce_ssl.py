"""The timed claim of `ce-ssl`: what leaving adapters out saves of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from brickyard.checks._steps import attached, in_turn, mean_ratio, one_step
from brickyard.checks._takes import takes
from brickyard.core.base import open_base
from brickyard.core.method import Claim

P = 0.5  # a fifth saves too little of a step for a clock on a shared machine to see


@takes("base")
def step_time(claim: Claim, *, batch: int = 32, tokens: int = 32, rounds: int = 30) -> dict[str, Any]:
    """Time steps with half of the adapters left out, with a fifth, and with all, in turn; the interval is over rounds.

    Control: the same step twice, which must show no gain.
    """
    base = open_base(claim.base)
    options = {"all": "p=0", "fifth": "p=0.2", "half": f"p={P:g}", "again": "p=0"}
    steps = {
        name: one_step(attached(base, f"ce-ssl:r=16,{given}"), base, batch, tokens) for name, given in options.items()
    }
    taken = in_turn(steps, rounds)
    ratios = {name: mean_ratio(np.array(taken[name]) / np.array(taken["all"])) for name in options if name != "all"}
    (mean, low, high), same = ratios["half"], ratios["again"]
    holds: Any = True if high < 1 else False if low > 1 else "undecided"
    return {
        "inequality": f"t(p = {P:g}) < t(p = 0)",
        "holds": holds,
        "measured": mean,
        "low": low,
        "high": high,
        "detail": (
            f"with p = {P:g} a step takes {mean:.2f} ({low:.2f} to {high:.2f}) of the one with every adapter, with the "
            f"paper's p = 0.2 {ratios['fifth'][0]:.2f} ({ratios['fifth'][1]:.2f} to {ratios['fifth'][2]:.2f}), at "
            f"B={batch}, T={tokens}, r=16"
        ),
        "gate": None,
        "control": {
            "what": "the step with every adapter, timed a second time",
            "inequality": "t(again) < t(p = 0)",
            "measured": same[0],
            "low": same[1],
            "high": same[2],
            "destroyed": same[2] >= 1,
        },
        "figures": {"seconds": taken, "ratios": ratios},
    }
