"""Bottleneck adapters: a narrow network with a residual behind every block.

    H' = H + U relu(D H + a) + c       D [d / f, d], U [d, d / f], a and c biases; U = c = 0 at the start

H leaves the block, so the adapter stands after its feed-forward part, once a layer (Pfeiffer's place; Houlsby's first
adapters stood behind the attention as well). The blocks are frozen; the head of the task trains too. A fresh adapter
changes nothing. It is no change of a weight and cannot be merged: every forward pass runs it.

Sources: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv 1902.00751; Pfeiffer et al.,
"AdapterFusion", EACL 2021, arXiv 2005.00247, for the place and f = 16. Headline claim: within 0.4 points of full tuning
on GLUE with 3.6 % of its parameters a task (Houlsby). With a cloze head it is the module of `few-shot-content`. Left
out: the second pass through the block's norm that released Pfeiffer adapters make in post-norm models.
Legend: d width of the blocks, f the reduction.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brickyard.core.attached import Attached, also_undo, attach_in_place
from brickyard.core.errors import Refused, UsageError
from brickyard.core.method import Record
from brickyard.core.roles import blocks, entering_width, own_head
from brickyard.core.task import Task

RECORD = Record(
    name="bottleneck-adapter",
    family="tune",
    title="A bottleneck with a residual behind every block (Houlsby, Pfeiffer)",
    paper="Parameter-Efficient Transfer Learning for NLP, ICML 2019, arXiv 1902.00751",
    slot="tuner",
    search={"lr": (5e-4, 1e-3, 2e-3)},
    training={"lr": 1e-3},
    part_of="few-shot-content",
)

NAME = "bottleneck_adapter"  # of an adapter in its block


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the adapters; UsageError for a reduction below 1."""

    reduction: int = 16
    """f: the width of the blocks is divided by it"""

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise UsageError(f"bottleneck-adapter: reduction={self.reduction} must be at least 1.")


class Bottleneck(nn.Module):
    """x + U relu(D x + a) + c for x [..., width]; the identity at the start."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        # The adapter is in full precision beside a base in half.
        inside = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        return x + self.up(F.relu(self.down(inside))).to(x.dtype)


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put an adapter behind every block of `model`; Refused where it has no blocks, or none as wide as `reduction`."""
    found = blocks(model)
    if not found:
        raise Refused("bottleneck-adapter: this base has no repeated blocks to put an adapter behind.")
    undo, names = ExitStack(), []
    for name, block in found:
        width = entering_width(block)
        if width < config.reduction:
            raise Refused(
                f"bottleneck-adapter: reduction={config.reduction} leaves nothing of the width {width} of {name}; "
                f"give at most {width}."
            )
        device = next(block.parameters()).device
        block.add_module(NAME, Bottleneck(width, width // config.reduction).to(device))
        undo.callback(delattr, block, NAME)
        undo.callback(block.register_forward_hook(_behind).remove)
        names += [f"{name}.{NAME}.{part}" for part, _ in block.get_submodule(NAME).named_parameters()]
    heads = tuple(f"{name}." for name in own_head(model)) or ("\0",)
    head = [n for n, _ in model.named_parameters() if n.startswith(heads)]
    biases = [n for n in names if n.endswith("bias")]
    attached = attach_in_place(model, [*names, *head], matched={"blocks": [n for n, _ in found]}, no_decay=biases)
    return also_undo(attached, undo.close)


def _behind(block: nn.Module, args: Any, out: Any) -> Any:
    adapter = block.get_submodule(NAME)
    if isinstance(out, tuple):
        return (adapter(out[0]), *out[1:])
    return adapter(out)
