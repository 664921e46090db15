"""Blocks with fewer attention heads and feed-forward neurons: found by role, removed from the layers themselves.

What is removed is gone from the weights, not masked, so that time and memory fall. transformers' attention reads its
number of heads off the projections' width, so blocks may keep different numbers of them. With grouped-query attention
the unit is a group: one key/value head and the query heads that share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import Refused
from brickyard.core.roles import blocks, roles

OUTPUTS, INPUTS = "outputs", "inputs"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What can be removed together: heads or neurons of one block.

    `layers` maps a layer's name to (side, indices a unit takes there); `gate` is the layer whose inputs the units are,
    where a coefficient a unit can stand.
    """

    block: str
    kind: str  # "heads" | "neurons"
    count: int
    layers: dict[str, tuple[str, int]]
    gate: str

    def index(self, name: str, kept: Tensor) -> Tensor:
        """Return the rows or columns of a layer that the units `kept` [K] own."""
        _, width = self.layers[name]
        return (kept[:, None] * width + torch.arange(width, device=kept.device)).reshape(-1)


def units(model: nn.Module) -> list[Unit]:
    """Return the removable parts of every block of `model`; Refused where its layers do not show them."""
    found: list[Unit] = []
    projections = _projections(model)  # first, for it refuses a model without heads
    if not projections:
        raise Refused("this base has no repeated blocks, so it has no heads and neurons that could be removed.")
    modules, text = dict(model.named_modules()), _text_config(model)
    heads = text.num_attention_heads
    for block, one in projections.items():
        out_of = {role: _size(modules[name], OUTPUTS) for role, name in one.items() if role != "norm"}
        groups = getattr(text, "num_key_value_heads", None) or heads
        wide, narrow = out_of["query"] // groups, out_of["key"] // groups
        if wide * groups != out_of["query"] or narrow * groups != out_of["key"] or out_of["key"] != out_of["value"]:
            raise Refused(f"block {block}: {groups} heads do not divide its projections; its heads cannot be removed.")
        found.append(
            Unit(
                block=block,
                kind="heads",
                count=groups,
                layers={
                    one["query"]: (OUTPUTS, wide),
                    one["key"]: (OUTPUTS, narrow),
                    one["value"]: (OUTPUTS, narrow),
                    one["out"]: (INPUTS, wide),
                },
                gate=one["out"],
            )
        )
        feeding = {one[role]: (OUTPUTS, 1) for role in ("up", "gate") if role in one}
        found.append(
            Unit(
                block=block,
                kind="neurons",
                count=out_of["up"],
                layers={**feeding, one["down"]: (INPUTS, 1)},
                gate=one["down"],
            )
        )
    return found


def _projections(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return block -> {role: name of its only layer}; Refused where a block does not show its projections."""
    kinds, found = roles(model), {}
    heads = getattr(_text_config(model), "num_attention_heads", None)
    for block, _ in blocks(model):
        here: dict[str, list[str]] = {}
        for name, role in kinds.items():
            if name.startswith(f"{block}."):
                here.setdefault(role, []).append(name)
        one = {role: names[0] for role, names in here.items() if len(names) == 1}
        missing = sorted({"query", "key", "value", "out", "up", "down"} - one.keys())
        if missing or not isinstance(heads, int):
            raise Refused(
                f"block {block} shows no single {', '.join(missing) or 'number of heads'}; heads and neurons can be "
                "removed only where each projection is a layer of its own."
            )
        found[block] = one
    return found


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def resize_config(model: nn.Module) -> dict[str, int]:
    """Write the sizes that a slimmed model has into its configuration, so that transformers builds it; return them.

    Raises Refused where the configuration has no words for them: blocks of different sizes, or fewer heads in a model
    whose heads are as wide as hidden_size / num_attention_heads.
    """
    modules, text = dict(model.named_modules()), _text_config(model)
    sizes = {
        block: tuple(_size(modules[one[role]], OUTPUTS) for role in ("query", "key", "up"))
        for block, one in _projections(model).items()
    }
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{block} {size}" for block, size in sizes.items())
        raise Refused(f"blocks differ in the outputs of query, key and up ({told}); no configuration can say so.")
    query, key, up = next(iter(sizes.values()))
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    found = {}
    if query != heads * width:
        if not hasattr(text, "head_dim"):
            raise Refused(
                f"{type(text).__name__} makes heads hidden_size / num_attention_heads wide, so it cannot hold "
                f"{query // width} heads of {width}; open the brick instead, or remove neurons alone."
            )
        found |= {"num_attention_heads": query // width, "head_dim": width}
        found |= {} if groups is None else {"num_key_value_heads": key // width}
    name = next((n for n in ("intermediate_size", "n_inner") if hasattr(text, n)), "")
    if name and up != (getattr(text, name) or 4 * text.hidden_size):
        found[name] = up
    for setting, value in found.items():
        setattr(text, setting, value)
    return found


def _size(layer: nn.Module, side: str) -> int:
    rows, columns = layer.weight.shape  # type: ignore[union-attr]
    return int(rows if (side == OUTPUTS) != isinstance(layer, Conv1D) else columns)


@dataclass
class Slimmed:
    """Layers that were made smaller in place; `undo` gives them back their weights, bit for bit."""

    before: dict[nn.Module, dict[str, object]] = field(default_factory=dict)

    def keep(self, layer: nn.Module, side: str, index: Tensor) -> None:
        """Keep only the outputs or inputs `index` of a Linear or Conv1D."""
        if layer not in self.before:
            names = ("weight", "bias", "in_features", "out_features", "nf", "nx")
            self.before[layer] = {
                n: v.data if isinstance(v := getattr(layer, n), nn.Parameter) else v
                for n in names
                if getattr(layer, n, None) is not None
            }
        weight, bias = layer.weight, layer.bias
        axis = 0 if (side == OUTPUTS) != isinstance(layer, Conv1D) else 1
        index = index.to(weight.device)  # type: ignore[union-attr]
        # The Parameter stays the same object: adapters, tied modules and hooks hold it.
        weight.data = weight.data.index_select(axis, index)  # type: ignore[union-attr]
        if side == OUTPUTS and bias is not None:
            bias.data = bias.data.index_select(0, index)  # type: ignore[union-attr]
        sizes = {OUTPUTS: ("out_features", "nf"), INPUTS: ("in_features", "nx")}
        for name in sizes[side]:
            if hasattr(layer, name):
                setattr(layer, name, len(index))

    def undo(self) -> None:
        """Put every weight back."""
        for layer, known in self.before.items():
            for name, value in known.items():
                if isinstance(value, Tensor):
                    getattr(layer, name).data = value
                else:
                    setattr(layer, name, value)
        self.before.clear()


def keep_units(slimmed: Slimmed, layers: Mapping[str, nn.Module], unit: Unit, kept: Tensor) -> None:
    """Keep only the units `kept` [K] (rising) of one block in the layers themselves; Refused where none is left."""
    if not len(kept):
        raise Refused(f"all {unit.count} {unit.kind} of block {unit.block} would be removed; keep at least one.")
    for name, (side, _) in unit.layers.items():
        slimmed.keep(layers[name], side, unit.index(name, kept))
