"""The claims of `unipt` that are counted and timed, and what its learned weights of the layers say."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from brickyard.checks._runs import asked_by
from brickyard.checks._side import LORA, at_most, kept_epochs, saved
from brickyard.checks._takes import takes
from brickyard.core.base import open_base
from brickyard.core.build import build
from brickyard.core.loop import train
from brickyard.core.method import Claim
from brickyard.core.prefix import ENTERING
from brickyard.core.side import SIDE
from brickyard.core.trial import Setting, examples, prepare

FLAT = 1e-3  # weights of layers that lie no further apart than this say nothing


@takes("base")
def saved_bytes(claim: Claim, *, batch: int = 32, tokens: int = 64) -> dict[str, Any]:
    """Count what UniPT, LST, LoRA and full tuning save for backward."""
    arms = {"unipt": "unipt:width=64", "lst": "lst:r=8,init=random", "lora": LORA, "full": "full"}
    found = saved(open_base(claim.base), arms, batch, tokens)
    return at_most(found, {"lora": 0.4, "lst": 1.1}, "unipt", "full", batch, tokens)


@takes("base")
def epoch_time(claim: Claim) -> dict[str, Any]:
    """Time UniPT from kept states against LoRA."""
    return kept_epochs(claim, "unipt:width=64", 1 / 4)


@takes("base", "data")
@torch.no_grad()
def confidence(claim: Claim, *, arm: str = "unipt:width=64") -> dict[str, Any]:
    """Train one seed; judge the weight c [B, N] of each layer for each test row.

    The mean over rows must leave 1/N, and two rows must differ, both by FLAT in some layer. Control: the gate that sets
    c no longer reads the states (w = 0).
    """
    ready = prepare(Setting(arm=arm, seed=1, **asked_by(claim)))
    attached = build(ready.plan, ready.base, ready.task, seed=1)
    sets, _ = examples(ready, attached)
    with torch.enable_grad():
        train(attached, sets["train"], sets["validation"], ready.task, ready.training, device=ready.setting.device)
    side: Any = attached.model.get_submodule(SIDE)
    layers = len(side.down)

    def weights() -> np.ndarray:
        found = []
        for index in np.array_split(np.arange(len(sets["test"])), -(-len(sets["test"]) // 64)):
            inputs = {name: t.to(ready.device) for name, t in sets["test"].collate(index).items()}
            found.append(side.confidence(list(inputs.pop(ENTERING).chunk(layers, dim=-1)), inputs).cpu())
        return torch.cat(found).double().numpy()

    c_BN = weights()
    side.gate.weight.zero_()
    off, apart = spread(c_BN)
    gone = spread(weights())
    shown = ", ".join(f"{c:.3f}" for c in c_BN.mean(0))
    return {
        "inequality": f"|mean c - 1/N| > {FLAT:g} and |c - c'| > {FLAT:g} between texts",
        "holds": bool(min(off, apart) > FLAT),
        "measured": min(off, apart),
        "low": min(off, apart),
        "high": min(off, apart),
        "detail": (
            f"mean weights of layers 0 to {layers - 2} over {len(c_BN)} test rows: {shown}; at most {off:.4f} from "
            f"1/{layers - 1}, two texts differ by {apart:.4f} (median)"
        ),
        "gate": None,
        "control": {
            "what": "the gate no longer reads the states (w = 0)",
            "inequality": f"both > {FLAT:g}",
            "measured": min(gone),
            "low": min(gone),
            "high": min(gone),
            "destroyed": max(gone) <= FLAT,
        },
        "figures": {"mean": c_BN.mean(0).tolist(), "deviation": c_BN.std(0).tolist()},
    }


def spread(c_BN: np.ndarray) -> tuple[float, float]:
    """Return how far mean weights of layers lie from equal ones, and the median distance of two neighbouring rows.

    Both are the largest over the layers.
    """
    off = np.abs(c_BN.mean(0) - 1 / c_BN.shape[1]).max()
    return float(off), float(np.median(np.abs(np.diff(c_BN, axis=0)).max(1)))
