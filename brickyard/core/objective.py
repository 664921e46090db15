"""What is minimised in place of the task's own loss: an objective sees hidden states and the output layer.

An objective never gets the logits of a whole batch, so that it can work on the vocabulary in chunks. Its file defines
`loss(config, hidden, head, batch, reference) -> scalar`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core.attached import Attached
from brickyard.core.errors import Refused


@dataclass(frozen=True)
class Reference:
    """What the untouched base says of a batch: hidden [B, T, D] and its output layer; no gradient."""

    hidden: Tensor
    head: nn.Linear


Loss = Callable[[Tensor, nn.Linear, dict[str, Tensor], Reference | None], Tensor]


class Objective:
    """An objective bound to a model: (model, batch) -> loss.

    Where the objective compares with the untouched base, that is the same model with its adapter switched off or, where
    the arm trains the base's own weights, a second copy (`copied_bytes`). Dropout is off, for with it the model would
    differ from its reference before the first step.
    """

    def __init__(self, loss: Loss, attached: Attached, *, with_reference: bool) -> None:
        self.loss, self.attached = loss, attached
        self.with_reference = with_reference
        self.copy: nn.Module | None = None
        if with_reference and not attached.peft:
            self.copy = copy.deepcopy(language_model(attached.model)).requires_grad_(False).eval()

    @property
    def copied_bytes(self) -> int:
        """Memory of the second copy of the base, where there is one."""
        return 0 if self.copy is None else sum(p.numel() * p.element_size() for p in self.copy.parameters())

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        model.eval()
        plain = language_model(model)
        reference = self._reference(plain, batch) if self.with_reference else None
        return self.loss(states(plain, batch), plain.get_output_embeddings(), batch, reference)  # type: ignore[operator]

    def _reference(self, plain: nn.Module, batch: dict[str, Tensor]) -> Reference:
        with torch.no_grad(), nullcontext() if self.copy is not None else self._switched_off():
            base = plain if self.copy is None else self.copy
            return Reference(states(base, batch), base.get_output_embeddings())  # type: ignore[operator]

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        with self.attached.model.disable_adapter():  # type: ignore[operator]
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
    inputs = {k: v[:1] for k, v in batch.items() if k != "labels"}
    head = plain.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise Refused(f"the output layer is {type(head).__name__}; objectives on hidden states need a linear one.")
    expected, found = model(**inputs).logits.float(), head(states(plain, inputs)).float()
    if not torch.allclose(found, expected, atol=1e-4, rtol=1e-3):
        raise Refused(
            f"{type(plain).__name__} changes its logits behind the output layer (a scale or a cap); objectives on "
            "hidden states do not know how. Take the task's own loss, or another base."
        )
