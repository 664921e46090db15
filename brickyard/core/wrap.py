"""PEFT's own adapter types (LoRA, IA3, AdaLoRA, ...) as `Attached`, beside the bridge in `inject`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import peft
from torch import Tensor, nn

from brickyard.core import adapter_type
from brickyard.core.attached import Attached, copy_into
from brickyard.core.errors import BadMix, Refused
from brickyard.core.roles import match, own_head

ADAPTER = "default"


def targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Return pattern -> leaves of the backbone that it matches; the task's head is never a target."""
    heads = tuple(f"{name}." for name in own_head(model))
    heads_exact = set(own_head(model))
    matched = match(model, patterns)
    return {
        p: [n for n in names if not n.startswith(heads or ("\0",)) and n not in heads_exact]
        for p, names in matched.items()
    }


def check_rank(model: nn.Module, matched: dict[str, list[str]], r: int, name: str) -> None:
    """Refuse a rank above the smaller side of a layer: such a change is no longer low-rank."""
    modules = dict(model.named_modules())
    for found in matched.values():
        for layer in found:
            weight = modules[layer].weight
            if isinstance(weight, nn.Parameter) and r > min(weight.shape[0], weight[0].numel()):
                raise Refused(
                    f"{name}: rank {r} exceeds layer {layer}, whose weight is {tuple(weight.shape)}; "
                    f"use r <= {min(weight.shape[0], weight[0].numel())} or other targets."
                )


def attach_peft(
    model: nn.Module, config: peft.PeftConfig, matched: dict[str, list[str]], *, callbacks: tuple[Any, ...] = ()
) -> Attached:
    """Wrap `model` in PEFT with `config` on the `matched` leaves; the model's own head trains and travels along.

    The targets are handed to PEFT as full names, so nothing can be matched by half. Raises Refused where PEFT does.
    """
    frozen_before = {name: p.requires_grad for name, p in model.named_parameters()}
    names = sorted({name for found in matched.values() for name in found})
    config.target_modules = set(names)  # type: ignore[attr-defined]
    config.modules_to_save = own_head(model) or None  # type: ignore[attr-defined]
    config.base_model_name_or_path = None
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 still asks transformers by an old name; nothing that a user could mend.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)  # type: ignore[arg-type]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Refused(f"PEFT refuses {config.peft_type} on this model: {error}") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ("LORA", adapter_type.TYPE):
        refusing = partial(_one_adapter, kind)
        wrapped.base_model._enable_peft_forward_hooks = refusing  # type: ignore[assignment]

    def live() -> dict[str, Tensor]:
        return peft.get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False)

    def detach() -> nn.Module:
        plain = wrapped.unload()
        for name, p in plain.named_parameters():
            p.requires_grad_(frozen_before.get(name, True))
        return plain

    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    return Attached(
        model=wrapped,
        parameter_groups=[{"params": trainable}],
        tensors=lambda: {name: t.detach().cpu().clone() for name, t in live().items()},
        load=lambda tensors: copy_into(live(), tensors, "adapter"),
        detach=detach,
        matched=matched,
        callbacks=callbacks,
        peft=True,
    )


@contextmanager
def _one_adapter(kind: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Refuse `adapter_names`, which PEFT's layers of this kind ignore or fail on with a word of their own."""
    if kwargs.get("adapter_names") is not None:
        raise BadMix(f"PEFT's {kind} serves one adapter at a time; take rows of one adapter, or export it as a LoRA.")
    yield
