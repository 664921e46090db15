"""A group of hidden neurons, cut out: a mask brick. It trains nothing; `brickyard bricks BASE --find DATA` writes it.

    h = (a * (1 - m)) W_down'    a [.., F] activations of a feed-forward network, m [F]: 1 for the group's neurons
    W_down[:, j] <- 0  for m_j = 1

The two are one function (to rounding); the second is what applying the brick does, so that such a model merges, exports
and tunes like any other and no hook is left in it. `undo` writes the old columns back bit for bit. What the group does
for the base is what the base loses with this brick on it: `brickyard bricks BASE --data ...` shows it as damage.

Source: the self-organised bricks of "Configurable Foundation Models", arXiv 2409.02877, section on emergent bricks; how
groups are chosen: see `brickyard show configurable-bricks`. Left out: groups of attention heads.
Legend: F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, Refused
from brickyard.core.ffn import FFN, every_ffn, plain
from brickyard.core.method import Record
from brickyard.core.task import Task

RECORD = Record(
    name="neuron-group",
    family="tune",
    title="a group of hidden neurons cut out of the base (a mask; found, not trained)",
    paper="Configurable Foundation Models, arXiv 2409.02877",
    slot="tuner",
    part_of="configurable-bricks",
)
SUFFIX = ".neurons"  # of a mask's name in the brick, behind the name of the network's last layer


@dataclass(frozen=True, kw_only=True)
class Config:
    pass


@torch.no_grad()
def cut_(weight: Tensor, group_F: Tensor, *, rows: bool) -> Tensor:
    """Zero the columns (rows of a Conv1D) of W_down [D, F] that belong to a group, in place; return what they held."""
    view = weight if rows else weight.T
    held = view[group_F].clone()
    view[group_F] = 0
    return held


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Return the base with an empty group, into which `load` writes the brick's; Refused without networks to cut.

    Raises BadBrick for masks that do not fit the base's feed-forward networks.
    """
    ffns = every_ffn(model, RECORD.name)
    group = {ffn.value + SUFFIX: torch.zeros(ffn.neurons, dtype=torch.bool) for ffn in ffns}
    held: dict[str, Tensor] = {}

    def detach() -> nn.Module:
        for ffn in ffns:
            if (old := held.pop(ffn.value, None)) is not None:
                weight, rows, group_F = _of(ffn, group)
                with torch.no_grad():
                    (weight if rows else weight.T)[group_F] = old
        for mask_F in group.values():
            mask_F.zero_()
        return model

    def load(tensors: dict[str, Tensor]) -> None:
        found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        expected = {name: (tuple(t.shape), t.dtype) for name, t in group.items()}
        if found != expected:
            raise BadBrick(f"{RECORD.name}: the masks given are {found}; the base takes {expected}.")
        detach()
        for ffn in ffns:
            group[ffn.value + SUFFIX].copy_(tensors[ffn.value + SUFFIX])
            weight, rows, group_F = _of(ffn, group)
            held[ffn.value] = cut_(weight, group_F, rows=rows)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Attached(
        model=model,
        parameter_groups=[],
        tensors=lambda: {name: mask_F.clone() for name, mask_F in group.items()},
        load=load,
        detach=detach,
        matched={"down": [ffn.value for ffn in ffns]},
    )


def _of(ffn: FFN, group: dict[str, Tensor]) -> tuple[Tensor, bool, Tensor]:
    layer: Any = ffn.value_layer
    if plain(layer) is not layer:
        raise Refused(f"{RECORD.name}: {ffn.value} carries an adapter; cut the group out of the base itself.")
    return layer.weight, isinstance(layer, Conv1D), group[ffn.value + SUFFIX].to(layer.weight.device)
