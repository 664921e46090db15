"""What Fisher, RegMean and DAM share: experts + base + unlabelled rows -> a rule that the engine runs.

A method of data measures something of every expert on rows of that expert's own task, read through that task's head:

    measured_t = measure(expert_t, rows_t)                       t = 1..T; no label enters
    rule       = made of all measured_t                          then as any other: streamed, rounded once, post-edited

Its file defines `rule(config)`, whose `from_data(stage)` returns that rule. Every expert is a model of its own that is
already in memory, so that T backbones are held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.errors import Refused

if TYPE_CHECKING:
    from brickyard.core.encoded import Encoded
    from brickyard.core.task import Task
    from brickyard.merge._engine import Piece, Rule

IGNORED = -100  # target of a position that is not predicted, as in `core.encoded`


@dataclass(frozen=True)
class Expert:
    """One fine-tuned model with its task's head on it, and rows of that task without their labels.

    `tensors` are the model's live tensors that a merge may change, by the base's names; `data` names the rows. Of
    images `bounds` are what black and white pixels become, [C, 1, 1] each; None for text.
    """

    label: str
    model: nn.Module
    tensors: Mapping[str, Tensor]
    task: Task
    rows: Encoded
    data: str = ""
    bounds: tuple[Tensor, Tensor] | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What of `tensors` has gradients: buffers (of a batch norm) have none."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, nn.Parameter)}

    def drawn(self, count: int, seed: int) -> np.ndarray:
        """Return the places of `count` rows drawn from `seed`, rising; all of them where there are no more."""
        return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(self.rows))[:count])

    def batches(self, places: np.ndarray, size: int) -> Iterator[tuple[dict[str, Any], Tensor | None]]:
        """Yield what the model reads of the rows at `places`, `size` at a time, on its device.

        Beside it, of a language model's blocks, the positions [B, T] that are predicted; else None.
        """
        device = next(self.model.parameters()).device
        for start in range(0, len(places), size):
            batch = {
                name: tensor.to(device) for name, tensor in self.rows.collate(places[start : start + size]).items()
            }
            targets = batch.pop("labels", None)
            yield batch, None if targets is None else targets != IGNORED


@dataclass(frozen=True)
class Stage:
    """What a method of data gets: the experts in the order of the inputs, and theta_0 by name where it asks for it."""

    experts: Sequence[Expert]
    read_base: Callable[[], dict[str, Tensor]]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """The base's tensors that any expert may change, in float32, on the experts' device."""
        return self.read_base()


@runtime_checkable
class OfData(Protocol):
    """A rule that stands for another until the data are there. `kinds` are the tasks that it can read."""

    @property
    def kinds(self) -> tuple[str, ...]: ...
    def from_data(self, stage: Stage) -> Rule: ...


@dataclass(frozen=True)
class Waiting:
    """What every `OfData` says before its data are there, as `_engine.Rule` asks; it cannot combine."""

    weights: bool = field(default=True, init=False)
    scale: float = field(default=1.0, init=False)

    def check(self, models: int) -> None:
        """Any number of models will do."""

    def survey(self) -> None:
        return None

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        raise Refused("this merge reads data: give one --data for each of the --bricks, in their order.")

    def coefficients(self, models: int) -> None:
        return None


@dataclass(frozen=True)
class Made(Waiting):
    """A rule whose result is in memory for the tensors in `tensors`; all others are averaged.

    `about` says what was found, for the report: "rows", how many each expert read, and "detail", one line.
    """

    tensors: Mapping[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        if piece.name in self.tensors:
            flat = self.tensors[piece.name].reshape(-1)
            return flat[piece.start : piece.start + piece.count].to(device="cpu", dtype=torch.float32, copy=True)
        return mean(models)


def mean(models: Sequence[Tensor]) -> Tensor:
    """Return the plain mean of T tensors of equal shape."""
    out = models[0].clone()
    for model in models[1:]:
        out += model
    return out.div_(len(models))
