"""What two forwards of one input must share, where a method compares the losses of weights that differ a little."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from brickyard.core.errors import Refused


def refuse_unlike_forwards(model: nn.Module) -> None:
    """Raise Refused where two forwards of the same input would differ, or change what no step decided."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise Refused(f"{name} is a batch norm whose statistics every forward would move; call model.eval() first.")
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise Refused(f"{name} drops out other numbers in every forward; call model.eval() first.")


def refuse_tuner(model: nn.Module) -> None:
    """Raise Refused for what two evaluations of one batch would change, or would not see alike, in training mode."""
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


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put every module of the models into evaluation mode, and each back into the mode that it was in."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag
