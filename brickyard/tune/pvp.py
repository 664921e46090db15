"""PVP: begin with modules that another task has trained, so that a few examples suffice.

    stage 1   theta* = what a tuner's modules become on a large labelled set, under a head that is thrown away
    stage 2   the same modules begin at theta*, under a new head, on the few examples

Any tuner of the same options on the same base can give and take theta*: `lora + pvp:brick=runs/upstream/brick`. Of
several bricks the mean is taken. `freeze` leaves theta* as it is and trains the head alone, which tells what of a gain
was there before any example was seen.

Source: "PVP: Pre-trained Visual Parameter-Efficient Tuning", arXiv 2304.13639, with visual prompts; here for any tuner.
Headline claim: over the random start +16.1, +11.5, +6.4, +2.9 and +2.0 points with 1, 2, 4, 8 and 16 images a class.
Left out: a first stage without labels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from brickyard.core import brick as bricks
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, Refused, UsageError, WrongBase
from brickyard.core.method import Claim, Record
from brickyard.core.roles import own_head

if TYPE_CHECKING:
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="pvp",
    family="tune",
    title="Begin with modules that another task has trained",
    paper="PVP: Pre-trained Visual Parameter-Efficient Tuning, arXiv 2304.13639",
    slot="start",
    claims=(
        Claim(
            text="With one and two examples a class prompts from another task beat fresh ones by 5 points.",
            measure="by_shots",
            part="prompts",
            data="trec|embedded:stdlib-topics",
            seeds=10,
        ),
        Claim(
            text="With one and two examples a class LoRA from another task beats a fresh one by a point.",
            measure="by_shots",
            part="lora",
            data="trec|embedded:stdlib-topics",
            seeds=10,
        ),
        Claim(
            text="The gain shrinks as examples grow: it is larger with one a class than with sixteen.",
            measure="by_shots",
            part="shape",
            data="trec|embedded:stdlib-topics",
            seeds=10,
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where theta* comes from; UsageError where nothing is named."""

    brick: str | tuple[str, ...] = ""
    """folder of a brick of the same tuner on the same base, or several, whose mean is taken"""
    freeze: bool = False
    """train the new head alone"""

    def __post_init__(self) -> None:
        given = (self.brick,) if isinstance(self.brick, str) else tuple(self.brick)
        if not all(given):
            raise UsageError("pvp: brick=... is missing; give the folder of a brick: pvp:brick=./runs/upstream/brick.")
        object.__setattr__(self, "brick", given)


def modules_of(attached: Attached) -> list[str]:
    """Return the names of what a brick of this arm stores beside the task's head."""
    heads = [f".{name}." for name in own_head(attached.model)]
    return [name for name in attached.tensors() if not any(head in f".{name}" for head in heads)]


def initialise(config: Config, ready: Prepared, attached: Attached) -> dict[str, Any]:
    """Give the tuner's modules the values of the bricks, and with `freeze` keep them there.

    Raises WrongBase, BadBrick or UsageError where a brick does not fit: another base, tuner, option or shape.
    """
    started = time.monotonic()
    wanted = modules_of(attached)
    if not wanted:
        raise Refused(f"{ready.plan.arm} has no modules beside its head that another task could have trained.")
    tuner = ready.plan.tuner or ""  # an arm without one is refused before
    own = next(str(piece) for piece in ready.plan.arm.pieces if piece.name == tuner)
    total: dict[str, torch.Tensor] = {}
    for folder in config.brick:
        made = bricks.load(folder)
        if made.manifest["base"]["fingerprint"] != ready.base.fingerprint:
            raise WrongBase(
                f"pvp: {folder} was trained on base {made.manifest['base']['spec']}, this arm stands on "
                f"{ready.base.spec}; modules only fit the base that they were trained on."
            )
        # As the method reads them: an option that is written out and one left at its default are the same.
        pieces = [p for p in parse(made.manifest["arm"]).pieces if p.name == tuner]
        if [registry.config(p.name, p.options) for p in pieces] != [ready.plan.configs[tuner]]:
            raise UsageError(f"pvp: {folder} holds {made.manifest['arm']}; the same tuner was expected: {own}.")
        stored = made.tensors()
        if missing := [name for name in wanted if name not in stored]:
            raise BadBrick(f"pvp: {folder} has no tensor {missing[0]}; it cannot be the start of {own}.")
        for name in wanted:
            tensor = stored[name]
            total[name] = total[name] + tensor / len(config.brick) if name in total else tensor / len(config.brick)
    before = attached.tensors()
    for name, tensor in total.items():
        if tensor.shape != before[name].shape:
            raise BadBrick(f"pvp: {name} is {tuple(tensor.shape)} there and {tuple(before[name].shape)} here.")
    attached.load({**before, **{name: tensor.to(before[name].dtype) for name, tensor in total.items()}})
    if config.freeze:
        heads = tuple(f".{name}." for name in own_head(attached.model))
        named = attached.model.named_parameters()
        attached.freeze(p for n, p in named if p.requires_grad and not any(head in f".{n}" for head in heads))
    return {"seconds": time.monotonic() - started, "from": list(config.brick), "tensors": len(wanted)}
