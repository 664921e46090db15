"""The claims of `lst` that are counted and timed."""

from __future__ import annotations

from typing import Any

from brickyard.checks._side import LORA, at_most, kept_epochs, saved
from brickyard.checks._takes import takes
from brickyard.core.base import open_base
from brickyard.core.method import Claim


@takes("base")
def saved_bytes(claim: Claim, *, batch: int = 32, tokens: int = 64) -> dict[str, Any]:
    """Count what LST at three reductions, LoRA and full tuning save for backward."""
    arms = {f"lst r={r}": f"lst:r={r},init=random" for r in (8, 4, 16)} | {"lora": LORA, "full": "full"}
    found = saved(open_base(claim.base), arms, batch, tokens)
    judged = at_most(found, {"lora": 0.4}, "lst r=8", "full", batch, tokens)
    return {**judged, "detail": f"{judged['detail']}; the ladder's own attention is fused, as it always is"}


@takes("base")
def epoch_time(claim: Claim) -> dict[str, Any]:
    """Time LST from kept states against LoRA."""
    return kept_epochs(claim, "lst:r=8,init=random", 1 / 3)
