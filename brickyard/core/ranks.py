"""Ranks while they live: scores become masks, masks become smaller tensors in a running adapter and its optimiser.

A method of `core.inject` whose layers may end with different ranks says where they lie in its own and fixed tensors:

    RANK_AXES = {"a": 0, "b": 1, "gate": 0}          A [r, n], B [m, r], gate [r]

and removes ranks with `Ranks.keep`. The ranks of the layers then stand in the adapter's config (`rank_pattern`), so
that bricks, checkpoints and PEFT open it in its new shape; `to_lora` writes it with PEFT's own rank pattern.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from brickyard.core.errors import BadBrick, UsageError
from brickyard.core.inject_layer import FIXED, PREFIX, BrickyardLinear, Plan

if TYPE_CHECKING:
    from brickyard.core.inject_tuner import BrickyardTuner


def keep_best(scores: Sequence[Tensor], budget: float, costs: Sequence[float] | None = None) -> list[Tensor]:
    """Return boolean masks of the best entries over all score vectors [r_k] whose costs together fit into `budget`.

    `costs` holds what one entry of each vector costs (1 by default, so that `budget` counts entries). The best come
    first, equal scores by place, until one no longer fits. Raises UsageError for a cost that is not positive.
    """
    costs = [1.0] * len(scores) if costs is None else list(costs)
    if len(costs) != len(scores) or not all(c > 0 for c in costs):
        raise UsageError(f"costs={costs}: one positive cost for each of {len(scores)} score vectors was expected.")
    flat = torch.cat([s.flatten() for s in scores])
    cost = torch.cat([torch.full((s.numel(),), c, dtype=torch.float64) for s, c in zip(scores, costs, strict=True)])
    order = torch.sort(flat, descending=True, stable=True).indices
    fits = cost.to(order.device)[order].cumsum(0) <= budget + 1e-9 * abs(budget)
    best = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    best[order[fits]] = True
    return list(best.split([s.numel() for s in scores]))


def cut(plan: Plan, module: ModuleType, pattern: Mapping[str, int]) -> None:
    """Shorten the planned tensors to the ranks of `pattern` {layer: rank}; BadBrick where that cannot be."""
    axes = getattr(module, "RANK_AXES", {})
    for layer, rank in pattern.items():
        planned = [(box[layer], name) for box in (plan.own, plan.fixed) for name in box.get(layer, {}) if name in axes]
        if not planned:
            raise BadBrick(f"rank_pattern names {layer!r}, which has no ranks here.")
        for tensors, name in planned:
            whole = tensors[name].shape[axes[name]]
            if not 0 <= rank <= whole:
                raise BadBrick(f"rank_pattern gives {layer} rank {rank}; its config allows 0 to {whole}.")
            tensors[name] = tensors[name].narrow(axes[name], 0, rank).contiguous()


class Ranks:
    """The ranks of one adapter's layers, in a model that may be in training."""

    def __init__(self, tuner: BrickyardTuner, adapter: str) -> None:
        self.tuner, self.adapter = tuner, adapter

    def layers(self) -> dict[str, BrickyardLinear]:
        """Return the adapter's layers by their names in the base model."""
        return {name: layer for name, layer in self.tuner.layers() if self.adapter in layer.bound}

    def now(self) -> dict[str, int]:
        """Return {layer: rank} of the layers that have ranks."""
        found = {}
        for name, layer in self.layers().items():
            for _, box, axis in _ranked(layer, self.adapter):
                found[name] = int(box[self.adapter].shape[axis])
        return found

    def keep(self, masks: Mapping[str, Tensor], optimiser: torch.optim.Optimizer | None) -> None:
        """Remove the ranks whose entry in the mask [r] of a layer is False, in place, moments of the optimiser too.

        Parameters stay the same objects, so optimisers and hooks go on holding them. What remains keeps its order and,
        with the dead ranks at zero, the layer's output.
        """
        for name, layer in self.layers().items():
            if name not in masks or bool(masks[name].all()):
                continue
            for _, box, axis in _ranked(layer, self.adapter):
                tensor = box[self.adapter]
                index = masks[name].to(tensor.device).nonzero()[:, 0]
                take(tensor, axis, index, optimiser)
            layer._factors.clear()
        self._note()

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Give each layer the rank of its stored tensors, named as by `BrickyardTuner.adapter_tensors`.

        A layer whose stored tensors disagree about its rank is left alone; checking the tensors refuses it.
        """
        for name, layer in self.layers().items():
            stored = [
                (box[self.adapter], axis, tensors.get(f"model.{name}.{attribute}.{self.adapter}"))
                for attribute, box, axis in _ranked(layer, self.adapter)
            ]
            sizes = {given.shape[axis] if given is not None and given.ndim > axis else -1 for _, axis, given in stored}
            if len(sizes) != 1 or -1 in sizes:
                continue
            size = sizes.pop()
            for tensor, axis, _ in stored:
                resize(tensor, axis, size)
            layer._factors.clear()
        self._note()

    def _note(self) -> None:
        config: Any = self.tuner.peft_config[self.adapter]
        config.rank_pattern = self.now() or None


def _ranked(layer: BrickyardLinear, adapter: str) -> Iterator[tuple[str, Any, int]]:
    """The dictionaries of a layer's tensors that have ranks, with their names and the ranks' axes."""
    bound = layer.bound[adapter]
    axes = getattr(bound.module, "RANK_AXES", {})
    for name, attribute in bound.tensors:
        if name in axes and attribute.startswith((PREFIX, FIXED)):
            yield attribute, getattr(layer, attribute), axes[name]


def take(tensor: Tensor, axis: int, index: Tensor, optimiser: torch.optim.Optimizer | None) -> None:
    """Keep only the entries `index` of a live tensor along `axis`, in its gradient and the optimiser's moments too."""
    before = tensor.shape
    if optimiser is not None and isinstance(tensor, nn.Parameter):
        state = optimiser.state.get(tensor, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == before:
                state[key] = value.index_select(axis, index)
    gradient = tensor.grad
    _replace(tensor, tensor.detach().index_select(axis, index))
    if gradient is not None:
        tensor.grad = gradient.index_select(axis, index)


def resize(tensor: Tensor, axis: int, size: int) -> None:
    """Give a live tensor `size` zeros along `axis`, to be loaded over, if it has another size there."""
    if tensor.shape[axis] != size:
        shape = list(tensor.shape)
        shape[axis] = size
        _replace(tensor, tensor.detach().new_zeros(shape))


def _replace(tensor: Tensor, value: Tensor) -> None:
    tensor.grad = None
    # `.data` because the object must stay the one that optimisers, hooks and layers hold, in another shape.
    tensor.data = value
