"""Masks whose weights reach the optimiser as their existing entries alone, so that its moments take no more room.

With N weights of which K exist, gradients and AdamW's moments take 4 N + 8 N bytes under `StaticMasks`; here they take
4 K + 8 K, beside the 4 K of the values that the optimiser moves: at 75 % sparsity 4 N bytes in place of 12 N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick
from brickyard.grow._static_masks import StaticMasks


class CompactMasks(StaticMasks):
    """`StaticMasks` for an optimiser that holds `values`, [K] per weight, in place of the weights themselves.

    Each backward pass moves the gradients of existing entries there and frees the rest; `after_step` writes the values
    back. For a loop that clips the gradients of what the optimiser holds, as ours does; Trainer clips the model's own.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        super().__init__(weights, masks)
        self.values = {name: nn.Parameter(self._gathered(name, weight)) for name, weight in self.weights.items()}

    def join(self, attached: Attached) -> Attached:
        """Return `attached` with the values in place of the weights in its parameter groups, and these masks called."""
        held = {id(weight): self.values[name] for name, weight in self.weights.items()}
        groups = [{**g, "params": [held.get(id(p), p) for p in g["params"]]} for g in attached.parameter_groups]

        def load(tensors: dict[str, Tensor]) -> None:
            attached.load(tensors)
            self._refresh()

        return replace(attached, parameter_groups=groups, load=load, callbacks=(*attached.callbacks, self))

    def begin(self, state: Any) -> None:
        """Follow the model to its device."""
        for name, weight in self.weights.items():
            self.values[name].data = self.values[name].data.to(weight.device)

    @torch.no_grad()
    def after_step(self, state: Any) -> None:
        """Write the values that the optimiser changed into the weights."""
        for name, weight in self.weights.items():
            weight.masked_scatter_(self._exists(name, weight), self.values[name])

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored masks of the same weights, with as many ones each."""
        super().load_state_dict(tensors)
        different = [name for name, kept in self.kept.items() if kept != self.values[name].numel()]
        if different:
            raise BadBrick(f"the stored mask of {different[0]} keeps another number of entries; name its sparsity.")
        self._refresh()

    def _clear_gradient(self, name: str, weight: Tensor) -> None:
        if weight.grad is None:
            return
        found, values = self._gathered(name, weight.grad), self.values[name]
        values.grad = found if values.grad is None else values.grad.add_(found)
        weight.grad = None

    def _exists(self, name: str, tensor: Tensor) -> Tensor:
        return ~self._place(name, tensor.device)

    def _gathered(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().masked_select(self._exists(name, tensor))

    @torch.no_grad()
    def _refresh(self) -> None:
        for name, weight in self.weights.items():
            self.values[name].copy_(self._gathered(name, weight))
