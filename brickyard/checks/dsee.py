"""The claim of `dsee` that is counted and timed: what removing heads and neurons saves of a forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from brickyard.checks._steps import attached, in_turn, mean_ratio, random_batch
from brickyard.checks._takes import takes
from brickyard.core import measure
from brickyard.core.base import Base, open_base
from brickyard.core.method import Claim

PARTS = "r=4,n_sparse=64,heads=0.25,neurons=0.4"
MASKED = "r=4,n_sparse=64,unstructured=0.5"
FLOPS, TIME = 0.8, 0.9  # of the whole model's that may be left


@takes("base")
def saved_work(claim: Claim, *, batch: int = 32, tokens: int = 64, rounds: int = 15) -> dict[str, Any]:
    """Count and time a forward pass of the whole model, of the one without parts, and of one with zeros in its weights.

    Control: half of the single weights at zero, which must save nothing: the products are as large as before.
    """
    base = open_base(claim.base)
    models = {"whole": _pruned(base, "r=4,n_sparse=64"), "parts": _pruned(base, PARTS), "zeros": _pruned(base, MASKED)}
    inputs, _ = random_batch(base, batch, tokens)
    flops = {name: measure.forward_flops(model, inputs) for name, model in models.items()}
    taken = in_turn({name: _forward(model, inputs) for name, model in models.items()}, rounds)
    share = flops["parts"] / flops["whole"]
    time, zeros = (mean_ratio(np.array(taken[name]) / np.array(taken["whole"])) for name in ("parts", "zeros"))
    fast: Any = True if time[2] <= TIME else False if time[1] > TIME else "undecided"
    return {
        "inequality": f"FLOPs <= {FLOPS:g} and time <= {TIME:g} of the whole model's",
        "holds": fast if share <= FLOPS else False,
        "measured": time[0],
        "low": time[1],
        "high": time[2],
        "detail": (
            f"without 1/4 of the heads and 40 % of the neurons {share:.2f} of the FLOPs (counted) and {time[0]:.2f} "
            f"({time[1]:.2f} to {time[2]:.2f}) of the time (measured) at B={batch}, T={tokens}"
        ),
        "gate": None,
        "control": {
            "what": "half of the single weights at zero",
            "inequality": f"time <= {TIME:g} of the whole model's",
            "measured": zeros[0],
            "low": zeros[1],
            "high": zeros[2],
            "destroyed": flops["zeros"] >= flops["whole"] and zeros[1] > TIME,
        },
        "figures": {"flops": flops, "seconds": taken},
    }


def _pruned(base: Base, options: str) -> nn.Module:
    made = attached(base, f"dsee:{options}")
    if not made.callbacks[-1].pruned:
        made.callbacks[-1].prune(None, torch.Generator().manual_seed(0))
    return made.model.eval()


def _forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    def run() -> None:
        with torch.no_grad():
            model(**inputs)

    return run
