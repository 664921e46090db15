"""Which rows each epoch of a run holds, where an arm has a piece that says so (`full + pudf`).

`epochs` and `steps` are the budget of examples, as they are without it: a run takes ceil(epochs * ceil(N / batch))
steps, and its learning-rate schedule is made for these. An epoch is one pass over the rows chosen for it; where they
are few it is short, and the same steps hold more epochs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from brickyard.core.errors import RunFailed
from brickyard.core.loop import Sampler, State, train_mode


class Curriculum(ABC):
    """Chooses the rows of every epoch. A method writes `choose`; the place in the run is kept here.

    It stands among the callbacks of the loop, so that a checkpoint holds its state: the epoch, its first step and its
    rows, and what a method adds to `state_dict`. A resumed run chooses nothing anew before the next epoch.

    Attributes:
        seconds: what preparing cost; charged in full to the arm, also where a cache held the result.
        digest: of what it was prepared from; a resumed run must have the same.
        prepared: how the order came about, JSON-serialisable.
        log: one entry an epoch: its number, its first step, its rows, and what the method adds.
    """

    def __init__(self, *, seconds: float = 0.0, digest: str = "", prepared: dict[str, Any] | None = None) -> None:
        self.seconds, self.digest, self.prepared = seconds, digest, prepared or {}
        self.epoch, self.first, self.rows = -1, 0, np.empty(0, dtype=np.int64)
        self.log: list[dict[str, Any]] = []

    @abstractmethod
    def choose(self, state: State) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the rows of the epoch that starts at `state.step`, and what the log says of it.

        It may run the model, and is timed as training; it must be a function of the weights and of `state_dict` alone.
        """

    def batches(self, state: State, order: Callable[[np.ndarray], Sampler]) -> Iterator[np.ndarray]:
        """Yield the rows of each step from `state.step` on; `order(rows)` shuffles positions among `rows`."""
        parts = self._cut(order) if self.epoch >= 0 else []
        while state.step < state.total:
            if state.step == self.first + len(parts):
                self._open(state)
                parts = self._cut(order)
            yield parts[state.step - self.first]

    def _open(self, state: State) -> None:
        rows, known = self.choose(state)
        train_mode(state.attached.model)
        if len(rows) == 0:
            raise RunFailed(f"the curriculum chose no row for epoch {self.epoch + 1}; widen its bounds.")
        self.epoch, self.first, self.rows = self.epoch + 1, state.step, np.asarray(rows, dtype=np.int64)
        self.log.append({"epoch": self.epoch, "step": self.first, "rows": len(rows), **known})

    def _cut(self, order: Callable[[np.ndarray], Sampler]) -> list[np.ndarray]:
        return [self.rows[part] for part in order(self.rows).epoch(self.epoch)]

    def report(self, steps: int, batch: int) -> dict[str, Any]:
        """Say how the order was prepared, what each epoch held, and how many examples `steps` steps processed."""
        examples = sum(entry["rows"] for entry in self.log[:-1])
        if self.log:
            examples += min(self.log[-1]["rows"], (steps - self.log[-1]["step"]) * batch)
        return {"seconds": self.seconds, "examples": examples, "epochs": self.log, **self.prepared}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; tensors and JSON values."""
        return {"epoch": self.epoch, "first": self.first, "rows": torch.from_numpy(self.rows), "log": self.log}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take the place that a checkpoint holds."""
        self.epoch, self.first, self.rows, self.log = kept["epoch"], kept["first"], kept["rows"].numpy(), kept["log"]
