"""Hand an adapter of ours to programs that do not know us: as a plain PEFT LoRA, exact where the method is low-rank."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import Refused, UnknownName, UsageError
from brickyard.core.files import complete_folder, write_json, write_tensors
from brickyard.core.inject_layer import PREFIX, BrickyardLinear, sides, warn_of_rank

_ROOT = "base_model.model."


@dataclass(frozen=True)
class Exported:
    """What `to_lora` wrote. `error` is ||dW - scaling B A|| / ||dW|| over all layers (0.0 where `exact`)."""

    folder: Path
    ranks: dict[str, int]
    exact: bool
    error: float


@dataclass(frozen=True)
class _Low:
    a_rn: Tensor
    b_mr: Tensor
    scaling: float


@torch.no_grad()
def to_lora(peft_model: nn.Module, adapter: str, folder: str | Path, *, max_rank: int | None = None) -> Exported:
    """Write `adapter` as a plain PEFT LoRA that any PEFT opens without this library; heads in modules_to_save go along.

    A low-rank method's factors are written as they are. Other changes of the weight, and factors above `max_rank`, go
    through a singular value decomposition, at full numerical rank unless `max_rank` limits it. A layer whose change is
    zero by rank is left out. A method of many ranks is written at the one chosen with `at_rank`, else with a warning at
    its largest, whether or not the model is in training. Raises UnknownName, Refused where a method is no change of the
    weight or trains biases, UsageError for max_rank < 1.
    """
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"max_rank={max_rank}: expected at least 1.")
    configs: dict[str, Any] = peft_model.peft_config  # type: ignore[assignment]
    if adapter not in configs:
        raise UnknownName.among("adapter", adapter, configs)
    config = configs[adapter]
    if getattr(config, "bias", "none") != "none":
        raise Refused(
            f"adapter {adapter!r} trains biases (bias={config.bias!r}), which a LoRA file cannot hold exactly."
        )
    layers = {
        name.removeprefix(_ROOT): module
        for name, module in peft_model.named_modules()
        if isinstance(module, BrickyardLinear) and adapter in module.bound
    }
    _check_whole(layers)
    warn_of_rank(layers.values(), adapter)
    lows, exact, lost, whole = {}, True, 0.0, 0.0
    for name, layer in layers.items():
        lows[name], layer_exact, error, norm = _lower(layer, adapter, max_rank)
        exact, lost, whole = exact and layer_exact, lost + error**2, whole + norm**2
    lows = {name: low for name, low in lows.items() if len(low.a_rn)}
    if not lows:
        raise Refused(f"adapter {adapter!r} changes no layer (every rank is 0), so there is nothing to write.")
    lora, tensors = _adapter(lows, layers, config)
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
    heads = {k: t for k, t in state.items() if not any(part.startswith(PREFIX) for part in k.split("."))}
    folder = Path(folder)
    with complete_folder(folder) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", {k: t.cpu() for k, t in {**tensors, **heads}.items()})
        write_json(temporary / "adapter_config.json", _plain(lora.to_dict()))
    ranks = {name: len(low.a_rn) for name, low in lows.items()}
    return Exported(folder, ranks, exact, 0.0 if exact or not whole else (lost / whole) ** 0.5)


def _check_whole(layers: dict[str, BrickyardLinear]) -> None:
    """Raise Refused where the base layer under an adapter was made smaller: no plain file fits both bases."""
    for name, layer in layers.items():
        leaf = next(iter(layer.bound.values())).leaf
        found = sides(layer.get_base_layer())
        if found != (leaf.in_features, leaf.out_features):
            raise Refused(
                f"{name} has {found[1]} outputs and {found[0]} inputs left of {leaf.out_features} and "
                f"{leaf.in_features}; no adapter fits a base whose parts were removed. Write the whole model "
                "(--to merged), or open the brick."
            )


def _lower(layer: BrickyardLinear, adapter: str, max_rank: int | None) -> tuple[_Low, bool, float, float]:
    """Return a layer's factors, whether they are exact, the norm of what they miss and the norm of the change."""
    bound = layer.bound[adapter]
    if bound.has("factors"):
        a_rn, b_mr, scaling = layer.factors(adapter, layer.part(adapter, training=False))
        if max_rank is None or len(a_rn) <= max_rank:
            wide = torch.promote_types(a_rn.dtype, torch.float32)
            return _Low(a_rn.to(wide).contiguous(), b_mr.to(wide).contiguous(), scaling), True, 0.0, 0.0
    change_mn = layer.change(adapter)
    wide = torch.promote_types(change_mn.dtype, torch.float32)
    change_mn = change_mn.double()
    u_mk, s_k, v_kn = torch.linalg.svd(change_mn, full_matrices=False)
    floor = float(s_k[0]) * max(change_mn.shape) * torch.finfo(wide).eps
    rank = int((s_k > floor).sum())
    rank = rank if max_rank is None else min(rank, max_rank)
    low = _Low(v_kn[:rank].to(wide).contiguous(), (u_mk[:, :rank] * s_k[:rank]).to(wide).contiguous(), 1.0)
    missed = change_mn - low.b_mr.double() @ low.a_rn.double()
    return low, False, float(missed.norm()), float(change_mn.norm())


def _adapter(
    lows: dict[str, _Low], layers: dict[str, BrickyardLinear], config: Any
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the LoRA's config and tensors; ranks and scalings that differ go into its patterns."""
    # PEFT scales by alpha / rank, so alpha carries our scaling unchanged, whatever rank a layer has left.
    alphas = {name: _number(low.scaling * len(low.a_rn)) for name, low in lows.items()}
    (rank, alpha), _ = Counter((len(low.a_rn), alphas[name]) for name, low in lows.items()).most_common(1)[0]
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted(lows),
        rank_pattern={_exactly(n): len(low.a_rn) for n, low in lows.items() if len(low.a_rn) != rank},
        alpha_pattern={_exactly(n): a for n, a in alphas.items() if a != alpha},  # type: ignore[misc]
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        fan_in_fan_out=all(isinstance(layers[n].get_base_layer(), Conv1D) for n in lows),
        inference_mode=True,
    )
    tensors = {}
    for name, low in lows.items():
        tensors[f"{_ROOT}{name}.lora_A.weight"] = low.a_rn
        tensors[f"{_ROOT}{name}.lora_B.weight"] = low.b_mr
    return lora, tensors


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"  # PEFT reads the keys of its patterns as regular expressions that may begin anywhere


def _number(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def _plain(value: Any) -> Any:
    """Sets as sorted lists, so that the file is the same in every process."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
