"""What a tune method hands to the loop: a model ready to train, and how to store, load and take off what it added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from brickyard.core.errors import BadBrick

if TYPE_CHECKING:
    from brickyard.core.prefix import Prefix
    from brickyard.core.structure import Structure


@dataclass
class Attached:
    """A model with one arm's tuner attached.

    `tensors` returns what a brick stores (detached, on the CPU); `load` takes the same names and shapes back, strictly;
    `detach` gives the model as it was before. `matched` maps each target pattern to the modules that it matched.
    `frozen_states` says that only a head on the last token states trains, so that the loop may feed cached states;
    `prefix` that the bottom blocks are frozen, so that it may feed the states that enter the first block that trains.
    `objective` stands in place of the task's own loss: (model, batch) -> scalar. `convert` changes in place how the
    model computes in training and what it keeps for the backward pass, and returns what undoes it. `structure` says
    which part of the layers runs. `cost` is what making it ready took, by name, in seconds.
    """

    model: nn.Module
    parameter_groups: list[dict[str, Any]]
    tensors: Callable[[], dict[str, Tensor]]
    load: Callable[[dict[str, Tensor]], None]
    detach: Callable[[], nn.Module]
    matched: dict[str, list[str]] = field(default_factory=dict)
    frozen_states: bool = False
    prefix: Prefix | None = None
    callbacks: tuple[Any, ...] = ()
    extra_loss: Callable[[], Tensor] | None = None
    objective: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None
    convert: Callable[[nn.Module], Callable[[], None]] | None = None
    structure: Structure | None = None
    cost: dict[str, float] = field(default_factory=dict)
    peft: bool = False
    beside: dict[str, bytes] = field(default_factory=dict)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Train within it: there the model computes and keeps what the arm says; after it, it is as it was before."""
        with ExitStack() as stack:
            if self.structure is not None:
                stack.enter_context(self.structure.switched(True))
            if self.convert is not None:
                stack.callback(self.convert(self.model))
            yield

    def serving(self) -> AbstractContextManager[None]:
        """Evaluate within it in the midst of training: there the model runs as it will when it is served."""
        return nullcontext() if self.structure is None else self.structure.switched(self.structure.serves)

    def untouched(self) -> AbstractContextManager[None]:
        """Look within it at the base, before anything trained or with an adapter off: there every part of it runs."""
        return nullcontext() if self.structure is None else self.structure.switched(False)

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in the order of the groups."""
        return [p for group in self.parameter_groups for p in group["params"]]

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let these stay as they are from now on; a brick stores them all the same."""
        held = {id(p.requires_grad_(False)) for p in parameters}
        groups = [{**g, "params": [p for p in g["params"] if id(p) not in held]} for g in self.parameter_groups]
        self.parameter_groups = [group for group in groups if group["params"]]


def copy_into(targets: dict[str, Tensor], tensors: dict[str, Tensor], what: str) -> None:
    """Copy `tensors` into `targets` in place; the names, shapes and dtypes must agree exactly, else BadBrick."""
    missing, extra = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing or extra:
        raise BadBrick(f"{what}: tensors do not fit the model; missing {missing[:5]}, unexpected {extra[:5]}.")
    for name, target in targets.items():
        given = tensors[name]
        if given.shape != target.shape or given.dtype != target.dtype:
            raise BadBrick(
                f"{what}: {name} is {tuple(given.shape)} {given.dtype}, "
                f"the model has {tuple(target.shape)} {target.dtype}."
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def attach_in_place(
    model: nn.Module,
    trainable: Iterable[str],
    *,
    matched: dict[str, list[str]],
    no_decay: Sequence[str] = (),
    stored: Sequence[str] = (),
) -> Attached:
    """Train the named parameters of `model` itself and freeze the rest; a brick stores their new values.

    `detach` writes the old values back bit for bit. Names in `no_decay` go into a group without weight decay; `stored`
    names buffers that a brick stores beside the parameters.
    """
    names = set(trainable)
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    # Buffers that move in training (batch-norm statistics) belong to the result as much as the weights do.
    statistics = _moving_modules(model, names)
    moving = {n: b for n, b in model.named_buffers() if n.rsplit(".", 1)[0] in statistics or n in stored}
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    held = {name: t.detach().clone() for name, t in {**parameters, **moving}.items()}

    def detach() -> nn.Module:
        copy_into({**parameters, **moving}, held, "undo")
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])
        return model

    skip = set(no_decay)
    groups = [
        {"params": [p for n, p in parameters.items() if n not in skip]},
        {"params": [p for n, p in parameters.items() if n in skip], "weight_decay": 0.0},
    ]
    return Attached(
        model=model,
        parameter_groups=[g for g in groups if g["params"]],
        tensors=lambda: {n: t.detach().cpu().clone() for n, t in {**parameters, **moving}.items()},
        load=lambda tensors: copy_into({**parameters, **moving}, tensors, "brick"),
        detach=detach,
        matched=matched,
    )


def also_undo(attached: Attached, undo: Callable[[], Any]) -> Attached:
    """Let `detach` call `undo` as well, once the weights are what they were."""
    put_back = attached.detach

    def detach() -> nn.Module:
        model = put_back()
        undo()
        return model

    attached.detach = detach
    return attached


def _moving_modules(model: nn.Module, names: set[str]) -> set[str]:
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and {f"{path}.weight", f"{path}.bias"} & names
    }
