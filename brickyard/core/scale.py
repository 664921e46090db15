"""Sweep the strength of a brick's change: theta(s) = base + s (brick - base), the task's head left as it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from brickyard.core.base import Base
from brickyard.core.errors import Refused, UsageError
from brickyard.core.headed import HeadedModel
from brickyard.core.inject_tuner import BrickyardTuner
from brickyard.core.roles import own_head
from brickyard.core.structure import PREFIX

_POINTS = 101


def sweep_points(text: str) -> list[float]:
    """Read LOW:HIGH:STEP into its points, both ends included."""
    try:
        low, high, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(f"--scale {text!r}: LOW:HIGH:STEP was expected, e.g. 0:2:0.25.") from None
    if (
        not (math.isfinite(low) and math.isfinite(high) and step > 0 and high >= low)
        or (high - low) / step > _POINTS - 1
    ):
        raise UsageError(f"--scale {text!r}: HIGH >= LOW, STEP > 0 and at most {_POINTS} points were expected.")
    return [low + i * step for i in range(math.floor((high - low) / step + 1e-9) + 1)]


@contextlib.contextmanager
def scaled(model: nn.Module, base: Base, brick: Any, s: float) -> Iterator[None]:
    """Give the brick's change in `model` the strength `s` inside the context; Refused when there is none to scale."""
    tuners = [m for m in model.modules() if isinstance(m, BrickyardTuner)]
    if any(slimmed.before for tuner in tuners for slimmed in tuner.slimmed.values()):
        raise Refused(
            "this brick removed heads or neurons from the base, so strength 0 would not be the base but what is left "
            "of it; --scale works on bricks that leave every layer its size."
        )
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if layers:
        # Every layer of PEFT is linear in its own change, so mixing outputs scales the weights' difference exactly.
        # First of a layer's hooks: a structure reads what the layer gives.
        hooks = [layer.register_forward_hook(_mix(s), prepend=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        return
    heads = tuple(f"{name}." for name in own_head(model)) or ("\0",)
    changed = [name for name in brick.tensors() if not name.startswith((*heads, PREFIX))]
    if not changed:
        raise Refused(
            "this brick trains only a head; there is no change of the backbone whose strength could be swept."
        )
    original = _untouched(model, base, brick)
    if added := [name for name in changed if name not in original]:
        raise Refused(
            f"this brick adds modules of its own to the base ({added[0]}, {len(added)} tensors in all), and what was "
            "not there before has no strength to sweep. --scale works on adapters of weights, such as lora, and on "
            "bricks that change the base's own weights, such as full or bitfit."
        )
    live = model.state_dict()
    held = {name: live[name].clone() for name in changed}
    with torch.no_grad():
        for name in changed:
            if held[name].is_floating_point():
                live[name].copy_(torch.lerp(original[name].to(held[name]), held[name], s))
    try:
        yield
    finally:
        with torch.no_grad():
            for name in changed:
                live[name].copy_(held[name])


def _untouched(model: nn.Module, base: Base, brick: Any) -> dict[str, Tensor]:
    """Return the base's own tensors under the names that they have in `model`."""
    if isinstance(model, HeadedModel):
        return {f"backbone.{name}": tensor for name, tensor in base.backbone().state_dict().items()}
    return base.model(brick.task, seed=0).state_dict()


def _mix(s: float) -> Any:
    def hook(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        plain = layer.base_layer(*inputs)
        return plain + s * (output - plain)

    return hook
