"""What zeroth-order steps, in memory or streamed, cannot work with: forwards that differ, readers of gradients, NaN."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from brickyard.core.errors import NotFinite, Refused

IN_A_ROW = 20  # updates skipped one after another before a run is given up: such weights do not recover


def refuse_tuner(model: nn.Module) -> None:
    """Raise Refused for what two evaluations would change, or would not see alike."""
    for name, module in model.named_modules():
        moves = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if moves and any(p.requires_grad for p in module.parameters()):
            raise Refused(
                f"{name} is a batch norm that trains: every forward would move its statistics, and a zeroth-order step "
                "makes several of one batch. Use a tuner that leaves it frozen, such as lora."
            )
        if hasattr(module, "brick_step"):
            raise Refused(
                "this tuner draws anew in every training forward, so that two losses of one batch cannot be compared; "
                "use lora, or backpropagation."
            )


def refuse_readers(callbacks: Iterable[Any]) -> None:
    """Raise Refused for a callback that reads gradients."""
    for callback in callbacks:
        if getattr(callback, "needs_gradients", False):
            reader = type(callback).__name__
            raise Refused(f"{reader} works on gradients, of which a zeroth-order step has none; use lora.")


def refuse_to_go_on(in_a_row: int, step: int) -> None:
    """Raise NotFinite where so many updates one after another, the last of them in step `step`, had no finite loss."""
    if in_a_row >= IN_A_ROW:
        raise NotFinite(
            f"the loss was not finite in {IN_A_ROW} zeroth-order updates in a row, up to step {step}; lower lr or "
            "check the data."
        )
