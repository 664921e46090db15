"""What a private step costs beside the plain one; the claim on accuracy is an inequality in the record."""

from __future__ import annotations

from typing import Any

import numpy as np

from brickyard.checks._private_steps import step_of
from brickyard.checks._steps import in_turn, mean_ratio
from brickyard.checks._takes import takes
from brickyard.core import measure
from brickyard.core.base import open_base
from brickyard.core.method import Claim

TIME, MEMORY = 1.15, 0.6
MICROBATCH = 64


@takes("base")
def cost(
    claim: Claim, *, arm: str = "lora", tokens: int = 32, rounds: int = 5, microbatch: int = MICROBATCH
) -> dict[str, Any]:
    """Return {"time": ..., "memory": ...}: private over plain steps, in seconds (measured) and peak bytes (counted).

    The control is the private step without micro-batches, whose memory must not be so small.
    """
    base = open_base(claim.base)
    batch = claim.batch
    steps = {
        "plain": step_of(base, arm, batch, tokens),
        "private": step_of(base, arm, batch, tokens, microbatch),
        "whole batch": step_of(base, arm, batch, tokens, batch),
    }
    taken = in_turn({name: steps[name] for name in ("plain", "private")}, rounds)
    ratio, low, high = mean_ratio(np.array(taken["private"]) / np.array(taken["plain"]))
    peaks = {name: measure.peak_bytes(step).bytes for name, step in steps.items()}
    share = peaks["private"] / peaks["plain"]
    whole = peaks["whole batch"] / peaks["plain"]
    about = {"arms": {"plain": arm, "private": f"{arm} + dp"}, "batch": batch, "tokens": tokens, "base": base.spec}
    return {
        "time": {
            **about,
            "inequality": f"seconds(private) <= {TIME} seconds(plain)",
            "holds": True if high <= TIME else False if low > TIME else "undecided",
            "measured": ratio,
            "low": low,
            "high": high,
            "figures": {"seconds": taken},
            "control": None,
            "gate": None,
            "detail": f"{ratio:.3f} times the plain step ({low:.3f} to {high:.3f} over {rounds} rounds), limit {TIME}",
        },
        "memory": {
            **about,
            "inequality": f"peak(private) <= {MEMORY} peak(plain)",
            "holds": share <= MEMORY,
            "measured": share,
            "figures": {"peak_bytes": peaks},
            "control": {
                "what": "the batch in one piece keeps all activations",
                "measured": whole,
                "destroyed": whole > MEMORY,
            },
            "gate": None,
            "detail": f"peak {share:.2f} of the plain step's (limit {MEMORY}); {whole:.2f} without micro-batches",
        },
    }
