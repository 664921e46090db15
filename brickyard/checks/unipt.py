"""The claim of `unipt` that is counted."""

from __future__ import annotations

from typing import Any

from brickyard.checks._side import LORA, at_most, kept_epochs, saved
from brickyard.checks._takes import takes
from brickyard.core.base import open_base
from brickyard.core.method import Claim


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
