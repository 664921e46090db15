"""A bridged method as `Attached`: what the training loop takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import Tensor, nn

from brickyard.core import wrap
from brickyard.core.attached import Attached
from brickyard.core.inject_config import BrickyardConfig, find
from brickyard.core.inject_tuner import BrickyardTuner
from brickyard.core.ranks import Ranks


def attach(
    model: nn.Module, name: str, config: Any, task: Any = None, *, target: str | Sequence[str] | None = None
) -> Attached:
    """Put the bridged method `name` on the layers of `model` that `target` matches (by default `config.target`).

    The model's head trains along. This is the whole `attach` of a method file whose functions follow the protocol
    above. What is random comes from torch's generator. Raises Unmatched where a pattern matches nothing, Refused where
    a layer does not fit.
    """
    matched = find(model, target or config.target)
    trained = {path: p.requires_grad for path, p in model.named_parameters()}
    attached = wrap.attach_peft(model, BrickyardConfig(method=name, options=asdict(config)), matched)
    tuner: BrickyardTuner = attached.model.base_model  # type: ignore[assignment]
    return replace(attached, load=_checked(tuner, attached.load), detach=lambda: _detach(tuner, trained))


def _checked(tuner: BrickyardTuner, load: Callable[[dict[str, Tensor]], None]) -> Callable[[dict[str, Tensor]], None]:
    def checked(tensors: dict[str, Tensor]) -> None:
        ours = {k: k.removeprefix("base_model.") + f".{wrap.ADAPTER}" for k in tensors}
        stored = {v: tensors[k] for k, v in ours.items()}
        Ranks(tuner, wrap.ADAPTER).fit(stored)
        tuner.check_tensors(wrap.ADAPTER, stored)
        load(tensors)

    return checked


def _detach(tuner: BrickyardTuner, trained: dict[str, bool]) -> nn.Module:
    """Return the model as it was: base weights, the head from before training, and what was trainable."""
    if any(layer.merged for _, layer in tuner.layers()):
        tuner.unmerge_adapter()
    for path, wrapper in list(tuner.model.named_modules()):
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            parent, _, child = _get_submodules(tuner.model, path)
            setattr(parent, child, wrapper.original_module)
    model = tuner.unload()
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(trained[path])
    return model
