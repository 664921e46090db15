"""What side networks are measured by: bytes kept for the backward pass, and epochs from kept states."""

from __future__ import annotations

from typing import Any

import numpy as np

from brickyard.checks._steps import attached, in_turn, mean_ratio, one_step, random_batch
from brickyard.core.attached import Attached
from brickyard.core.base import Base, open_base
from brickyard.core.measure import saved_for_backward_bytes
from brickyard.core.method import Claim

LORA = "lora:r=8,target=[query,value]"


def saved(base: Base, arms: dict[str, str], batch: int, tokens: int) -> dict[str, int]:
    """Return the bytes that a step of each arm saves for backward, attention eager, its states computed in the step."""
    inputs, loss = random_batch(base, batch, tokens)
    found = {}
    for name, text in arms.items():
        made = attached(base, text, "eager")
        # A frozen backbone under a side network saves nothing; that it ran is part of what is counted.
        found[name] = saved_for_backward_bytes(made.model.train(), inputs, loss)
    return found


def at_most(found: dict[str, int], limits: dict[str, float], of: str, control: str, batch: int, tokens: int) -> Any:
    """Return the outcome of "bytes of `of` <= limit times those of the others", the control being full tuning."""
    ratios = {name: found[of] / found[name] for name in limits}
    worst = max(limits, key=lambda name: ratios[name] / limits[name])
    first = next(iter(limits))
    gone = found[control] / found[first]
    sizes = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in found.items())
    return {
        "inequality": " and ".join(f"saved({of}) <= {limit:g} saved({name})" for name, limit in limits.items()),
        "holds": all(ratios[name] <= limit for name, limit in limits.items()),
        "measured": ratios[worst],
        "low": ratios[worst],
        "high": ratios[worst],
        "detail": f"MiB saved for backward at B={batch}, T={tokens}, eager attention (counted): {sizes}",
        "gate": None,
        "control": {
            "what": f"{control} in place of {of}",
            "inequality": f"saved({control}) <= {limits[first]:g} saved({first})",
            "measured": gone,
            "low": gone,
            "high": gone,
            "destroyed": gone > limits[first],
        },
        "figures": {"bytes": found},
    }


def kept_epochs(claim: Claim, arm: str, limit: float, *, batch: int = 32, tokens: int = 64, rounds: int = 12) -> Any:
    """Time steps from kept states against LoRA's in turn; the interval is over rounds. Control: without kept states."""
    base = open_base(claim.base)
    plain = f"{arm},cache=false"
    made = {name: attached(base, text) for name, text in (("lora", LORA), ("kept", arm), ("running", plain))}
    steps = {name: one_step(one, base, batch, tokens) for name, one in made.items()}
    passes = _passes(made["kept"])
    taken = in_turn(steps, rounds)
    ran = _passes(made["kept"]) - passes
    ratios = {name: mean_ratio(np.array(taken[name]) / np.array(taken["lora"])) for name in ("kept", "running")}
    (mean, low, high), gone = ratios["kept"], ratios["running"]
    holds: Any = True if high <= limit else False if low > limit else "undecided"
    return {
        "inequality": f"t({arm.partition(':')[0]} from kept states) <= {limit:.2f} t(lora)",
        "holds": holds if ran == 0 else False,
        "measured": mean,
        "low": low,
        "high": high,
        "detail": (
            f"a step from kept states takes {mean:.2f} ({low:.2f} to {high:.2f}) of LoRA's, with the backbone running "
            f"{gone[0]:.2f}, at B={batch}, T={tokens}; the backbone ran {ran} times"
        ),
        "gate": None,
        "control": {
            "what": "the backbone runs in every step",
            "inequality": f"t(running) <= {limit:.2f} t(lora)",
            "measured": gone[0],
            "low": gone[1],
            "high": gone[2],
            "destroyed": gone[1] > limit,
        },
        "figures": {"seconds": taken, "ratios": ratios},
    }


def _passes(made: Attached) -> int:
    return int(getattr(made.prefix, "passes", 0))
