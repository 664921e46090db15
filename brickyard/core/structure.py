"""Which part of its layers a model runs: a change of the forward pass that takes no weight away and can be undone.

A method that fills the arm's slot `structure` writes `restructure(model, config) -> Structure`. It differs from a way
to run the layers in training (slot `memory`) in that it computes another function, so it must be clear when it is at
work:

    in training       always (`Attached.saving`)
    at serving        where `serves`: then the brick holds what it needs, and every hand-over must know of it
    for the base      never (`Attached.untouched`): what a change is compared with is the model as it was found
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from brickyard.core.errors import Refused

if TYPE_CHECKING:
    from brickyard.core.attached import Attached

PREFIX = "structure."  # of the names of its tensors in a brick


@dataclass
class Structure:
    """A structure that was put on a model; it is at work while `on`.

    `about` says what it is (JSON-like; it stands in `brick.json` where it serves), with "runs", what of the layers is
    at work, in words. `prepare` makes what it needs from the model's present weights, and returns the seconds that this
    took; it is called before anything trains. `tensors` and `load` are what a brick stores of it, by names that begin
    with PREFIX; `remove` takes it off the model. `parameter_groups` and `extra_loss` as in `Attached`.
    """

    about: dict[str, Any]
    serves: bool
    prepare: Callable[[], float]
    tensors: Callable[[], dict[str, Tensor]]
    load: Callable[[dict[str, Tensor]], None]
    remove: Callable[[], None]
    matched: dict[str, list[str]] = field(default_factory=dict)
    parameter_groups: list[dict[str, Any]] = field(default_factory=list)
    extra_loss: Callable[[], Tensor] | None = None
    on: bool = True

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Be at work, or not, within the context."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before


def put_on(attached: Attached, structure: Structure, name: str) -> None:
    """Let `attached` train, store, load and take off the structure of the method `name` with what it holds already.

    Refused beside a tuner that keeps the states of its frozen layers, which would pass the structure by.
    """
    if attached.prefix is not None:
        structure.remove()
        raise Refused(
            f"{name} changes how layers run, and the tuner of this arm trains on kept states of layers that do not; "
            f"put {name} beside full, lora or another tuner of the layers themselves."
        )
    tensors, load, detach, extra = attached.tensors, attached.load, attached.detach, attached.extra_loss

    def load_both(given: dict[str, Tensor]) -> None:
        own = {key: tensor for key, tensor in given.items() if key.startswith(PREFIX)}
        structure.load(own)
        load({key: tensor for key, tensor in given.items() if key not in own})

    def detach_both() -> nn.Module:
        structure.remove()
        return detach()

    def loss_of_both() -> Tensor:
        assert structure.extra_loss is not None
        return structure.extra_loss() if extra is None else extra() + structure.extra_loss()

    structure.on = structure.serves
    attached.structure = structure
    attached.tensors = lambda: {**tensors(), **structure.tensors()}
    attached.load, attached.detach = load_both, detach_both
    attached.matched = {**attached.matched, **structure.matched}
    attached.parameter_groups = [*attached.parameter_groups, *structure.parameter_groups]
    if structure.extra_loss is not None:
        attached.extra_loss = loss_of_both
