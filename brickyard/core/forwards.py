"""What two forwards of one input must share, where a method compares the losses of weights that differ a little."""

from __future__ import annotations

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
