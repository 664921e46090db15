"""Batches whose rows belong to different adapters: which names are asked for, and how layers and heads hear of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from brickyard.core.errors import BadMix

BASE = "__base__"


def check_names(given: Any, known: Collection[str], training: bool) -> None:
    """Raise BadMix unless `given` names a known adapter, or none, for each row, and the model is not in training."""
    if training:
        raise BadMix("adapter_names were given in training mode; call model.eval() first, or train one at a time.")
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise BadMix(f"adapter_names={given!r}: expected one name per row of the batch.")
    unknown = sorted(set(given) - set(known) - {BASE})
    if unknown:
        raise BadMix(f"adapter_names {unknown} do not exist; known: {sorted(known)}, and {BASE!r} for none.")


def served(
    x: Tensor, y: Tensor, names: Sequence[str], known: Collection[str], adapted: Callable[[str, Tensor, Tensor], Tensor]
) -> Tensor:
    """Return a layer's outputs, each row with the effect of its own adapter.

    x, y: the layer's inputs and the base's outputs [rows, ...]; `adapted` returns the outputs of rows under one
    adapter. Raises BadMix where there is not one name a row.
    """
    if len(names) != len(x):
        raise BadMix(f"{len(names)} adapter_names were given for a batch of {len(x)}; give one per row.")
    y = y.clone()
    for adapter in sorted(set(names) & set(known)):
        rows = torch.tensor([i for i, name in enumerate(names) if name == adapter], device=x.device)
        y[rows] = adapted(adapter, x[rows], y[rows])
    return y


@contextmanager
def named_rows(
    model: nn.Module, modules: Iterable[nn.Module], given: Sequence[str], beams: int, kind: type | tuple[type, ...]
) -> Iterator[None]:
    """Hand the names to every layer of `kind` and to the heads among `modules`, as `adapter_names` of their forward."""
    encoder: Any = model.get_encoder() if beams > 1 and hasattr(model, "get_encoder") else None  # type: ignore[operator]
    # Beam search repeats each row for the decoder only; transformers gives the model itself if it has no encoder.
    plain = set() if encoder is None or encoder is model else set(encoder.modules())
    handles = []
    try:
        for module in modules:
            if not isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, kind):
                continue
            names = [name for name in given for _ in range(1 if module in plain else beams)]
            if isinstance(module, AuxiliaryTrainingWrapper):
                # PEFT looks up a head for every name, though an adapter may have brought none.
                names = [name if name in module._adapters else BASE for name in names]
            handles.append(module.register_forward_pre_hook(partial(_with_names, names), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
