"""Which parameters a zeroth-order step asks about at a time, and which it leaves to backpropagation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from brickyard.core import roles
from brickyard.core.errors import Refused

UNITS = ("none", "block", "half", "leaf")


def parts_of(model: nn.Module, parameters: Sequence[nn.Parameter], unit: str) -> list[list[nn.Parameter]]:
    """Cut parameters into blocks of `unit`, in the order in which they are given.

    unit: "block", a repeated block; "half", its attention or the rest of it; "leaf", a layer with its adapter. What
    lies in no repeated block is one part before the first and one after it. Raises Refused where there is none.
    """
    inside: dict[int, tuple[int, str]] = {}
    for index, (_, block) in enumerate(roles.blocks(model)):
        for path, module in block.named_modules():
            half = "attention" if roles.ATTENTION.search(path) else "rest"
            part = {"block": "", "half": half, "leaf": path}[unit]
            # An adapted layer comes before what it holds, so that its weights and its adapter's stay together.
            for p in module.parameters(recurse=isinstance(module, BaseTunerLayer)):
                inside.setdefault(id(p), (index, part))
    if not inside:
        raise Refused(f"blocks={unit}: this model has no repeated blocks; use blocks=none.")
    place = {id(p): i for i, p in enumerate(model.parameters())}
    start = min(place[key] for key in inside)
    parts: dict[tuple[int, str], list[nn.Parameter]] = {}
    for p in parameters:
        outside = (-1, "before" if place[id(p)] < start else "after")
        parts.setdefault(inside.get(id(p), outside), []).append(p)
    return list(parts.values())


def late(model: nn.Module, parameters: Sequence[nn.Parameter], count: int) -> list[nn.Parameter]:
    """Return those of the parameters that are in the last `count` repeated blocks or come after them.

    Raises Refused where there are fewer blocks, or no parameter is left on one of the two sides.
    """
    blocks = roles.blocks(model)
    if len(blocks) < count:
        raise Refused(f"first={count}: this model has {len(blocks)} repeated blocks.")
    places = {id(p): i for i, p in enumerate(model.parameters())}
    start = min(places[id(p)] for p in blocks[-count][1].parameters())
    found = [p for p in parameters if places[id(p)] >= start]
    if not found or len(found) == len(parameters):
        side = "the zeroth-order step" if found else "backpropagation"
        raise Refused(f"first={count} leaves no trained parameter to {side}; choose another number of blocks.")
    return found


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it the parameters need no gradient, so that the graph begins behind them."""
    held = [p for p in parameters if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)
