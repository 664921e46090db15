"""What is minimised in place of the task's own loss: an objective sees hidden states and the output layer.

An objective never gets a language model's logits for a whole batch, so that it can work on the vocabulary in chunks.
Its file defines `loss(config, hidden, head, batch, reference)`, and where it works on classifiers, whose logits are
few, `loss_of_logits(config, logits, batch)`. Both return a scalar, or the scalar and what to log beside it. A file may
also define `prepare(config, ready: trial.Prepared) -> Columns`: tensors for each row of train, made once before
training, which the loss finds in the batch under `PREPARED`. Where that cannot be made of a few rows, or does not cost
by the row, `stand_in` of the same form gives a probe columns that hold anything, and
`costliest(config, ready)` says the steps.

An objective whose Config has an option `unlabelled` also gets rows without labels, behind the labelled ones (see
`chosen.with_unlabelled`): their label is -100 everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.answers import Examples
from brickyard.core.attached import Attached
from brickyard.core.errors import Refused


@dataclass(frozen=True)
class Reference:
    """What the untouched base says of a batch: hidden [B, T, D] and its output layer; no gradient."""

    hidden: Tensor
    head: nn.Linear


Found = Tensor | tuple[Tensor, dict[str, Tensor]]
PREPARED = "prepared"  # key of a batch: the tuple of tensors that `Columns.collate` gave


class Columns(Protocol):
    """What an objective prepared for each row of train. `report` is JSON-like; `seconds` are charged to the arm."""

    report: dict[str, Any]

    @property
    def digest(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    def collate(self, index: np.ndarray) -> tuple[Tensor, ...]: ...


class WithColumns:
    """Rows of train whose batches also carry what an objective prepared; stands in for `Examples` in the loop."""

    def __init__(self, rows: Examples, columns: Columns) -> None:
        self.rows, self.columns = rows, columns
        self.labels, self.lengths = rows.labels, rows.lengths

    @property
    def digest(self) -> str:
        """Of rows and columns: a run that is resumed must have both as they were."""
        return f"{self.rows.digest} {self.columns.digest}"

    def __len__(self) -> int:
        return len(self.rows)

    def collate(self, index: np.ndarray) -> dict[str, Any]:
        """Return the batch of `rows` with the tensors under `PREPARED`."""
        return {**self.rows.collate(index), PREPARED: self.columns.collate(index)}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what of a batch the model reads."""
    return {k: v for k, v in batch.items() if k not in ("labels", PREPARED)}


class Objective:
    """An objective bound to a model: (model, batch) -> loss.

    Where the objective compares with the untouched base, that is the same model with its adapter switched off or, where
    the arm trains the base's own weights, a second copy (`copied_bytes`). Dropout is then off, for with it the model
    would differ from its reference before the first step.

    As a callback of the loop it writes the means of what its loss logged into the learning curve.
    """

    def __init__(self, module: ModuleType, config: Any, attached: Attached, *, generative: bool) -> None:
        self.module, self.config, self.attached, self.generative = module, config, attached, generative
        self.with_reference = module.WITH_REFERENCE
        self.copy: nn.Module | None = None
        self.logged: dict[str, list[float]] = {}  # name -> [sum, rows] since the last point of the learning curve
        if self.with_reference and not attached.peft:
            self.copy = copy.deepcopy(language_model(attached.model)).requires_grad_(False).eval()
        attached.callbacks = (*attached.callbacks, self)

    @property
    def copied_bytes(self) -> int:
        """Memory of the second copy of the base, where there is one."""
        return 0 if self.copy is None else sum(p.numel() * p.element_size() for p in self.copy.parameters())

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = self._loss_of_tokens(model, batch) if self.generative else self._loss_of_logits(model, batch)
        if isinstance(found, Tensor):
            return found
        loss, values = found
        rows = len(batch["labels"] if "labels" in batch else batch["input_ids"])
        for name, value in values.items():
            kept = self.logged.setdefault(name, [0.0, 0])
            kept[0] += rows * value.item()
            kept[1] += rows
        return loss

    def point(self, state: Any) -> None:
        """Write the means since the last point into the learning curve."""
        state.history[-1] |= {name: total / rows for name, (total, rows) in self.logged.items()}
        self.logged = {}

    def state_dict(self) -> dict[str, Any]:
        return {"logged": self.logged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.logged = state["logged"]

    def _loss_of_logits(self, model: nn.Module, batch: dict[str, Any]) -> Found:
        return self.module.loss_of_logits(self.config, model(**model_inputs(batch)).logits.float(), batch)

    def _loss_of_tokens(self, model: nn.Module, batch: dict[str, Any]) -> Found:
        if self.with_reference:
            model.eval()
        plain = language_model(model)
        reference = self._reference(plain, batch) if self.with_reference else None
        head = plain.get_output_embeddings()  # type: ignore[operator]
        return self.module.loss(self.config, states(plain, batch), head, batch, reference)

    def _reference(self, plain: nn.Module, batch: dict[str, Tensor]) -> Reference:
        with torch.no_grad(), nullcontext() if self.copy is not None else self._switched_off():
            base = plain if self.copy is None else self.copy
            return Reference(states(base, batch), base.get_output_embeddings())  # type: ignore[operator]

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        with self.attached.model.disable_adapter(), self.attached.untouched():  # type: ignore[operator]
            yield


def language_model(model: nn.Module) -> nn.Module:
    """Return the language model inside an adapter's wrapper, adapters included."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator,return-value]


def states(plain: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return what enters the output layer: [B, T, D]."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")}
    return getattr(plain, plain.base_model_prefix)(**inputs).last_hidden_state  # type: ignore[arg-type]


@torch.no_grad()
def check_head(model: nn.Module, batch: dict[str, Any]) -> None:
    """Refuse a model whose logits are not its output layer on its last hidden states (it scales or caps them)."""
    model.eval()
    plain = language_model(model)
    inputs = {k: v[:1] for k, v in model_inputs(batch).items()}
    head = plain.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise Refused(f"the output layer is {type(head).__name__}; objectives on hidden states need a linear one.")
    expected, found = model(**inputs).logits.float(), head(states(plain, inputs)).float()
    if not torch.allclose(found, expected, atol=1e-4, rtol=1e-3):
        raise Refused(
            f"{type(plain).__name__} changes its logits behind the output layer (a scale or a cap); objectives on "
            "hidden states do not know how. Take the task's own loss, or another base."
        )
