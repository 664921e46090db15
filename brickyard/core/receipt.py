"""Receipts and parity: did a stage change anything, where, and did a hand-over keep the behaviour.

A receipt compares a model with a `Snapshot` taken before the stage. Trainable tensors are copied in full, frozen ones
only sampled, so that a receipt of an adapter costs little beside a large base. `parity` compares two models that should
be the same function, and names the layer at which they part.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from brickyard.core.attached import Attached
from brickyard.core.errors import NoEffect, NotFinite, ParityBroken, Refused, Unmatched
from brickyard.core.forwards import evaluating

SAMPLES = 1024  # elements of a frozen tensor that its fingerprint reads
DECAY_RESIDUAL = 1e-2  # share of a change that may deviate from pure shrinking and still be called weight decay
# Largest accepted gap as a share of the largest logit. Merging a LoRA into MiniLM (6 blocks) shows 2e-6 in float32,
# 1.5e-3 in float16 and 1.2e-2 in bfloat16; the rest is room for deeper models.
TOLERANCE = MappingProxyType({torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2})


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model's tensors at one moment: full copies of the trainable parameters, samples of all the rest."""

    trainable: dict[str, Tensor]
    frozen: dict[str, str]


def _sample(tensor: Tensor) -> str:
    """Hash of shape, dtype and evenly spread elements; a change of a few elements of a large tensor can escape it."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() > SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64, device=flat.device).long()]
    raw = flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype} ".encode() + raw, digest_size=16).hexdigest()


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether it trains, of every parameter and buffer."""
    for name, parameter in model.named_parameters():
        yield name, parameter, parameter.requires_grad
    for name, buffer in model.named_buffers():
        yield name, buffer, False


def snapshot(model: nn.Module) -> Snapshot:
    """Remember `model` as it is: call it after a method is attached and before anything trains.

    Returns copies of the trainable parameters (on the CPU) and a sampled fingerprint of every other tensor.
    """
    trainable, frozen = {}, {}
    for name, tensor, trains in _named(model):
        if tensor.is_meta:
            raise Refused(f"{name} has no values (meta device); load the weights before taking a snapshot.")
        if trains:
            trainable[name] = tensor.detach().cpu().clone()
        else:
            frozen[name] = _sample(tensor)
    return Snapshot(trainable=trainable, frozen=frozen)


def _only_decayed(old: Tensor, change: Tensor) -> bool:
    """Whether the tensor merely shrank towards zero: what weight decay does to a tensor that gets no gradient."""
    size = old.norm()
    if old.numel() < 8 or size == 0:
        return False
    share = float((old * change).sum() / size**2)
    residual = float((change - share * old).norm())
    rounding = 4 * torch.finfo(torch.float32).eps * float(size)
    return share < 0 and residual <= DECAY_RESIDUAL * float(change.norm()) + rounding


def _moved(name: str, old: Tensor, new: Tensor) -> dict[str, Any] | None:
    """How far one tensor moved, or None if it did not: norms are over all elements, `relative` is change / old norm."""
    new = new.detach().cpu()
    if old.shape != new.shape:
        return {"name": name, "from": list(old.shape), "to": list(new.shape)}
    if torch.equal(old, new):
        return None
    old, new = old.float(), new.float()
    change, norm = new - old, float(old.norm())
    far = float(change.norm())
    return {
        "name": name,
        "norm": norm,
        "change": far,
        "relative": far / norm if norm else None,  # no ratio to a tensor that began at zero
        "largest": float(change.abs().max()),
        "only_decayed": _only_decayed(old, change),
    }


def logit_distance(logits: Any, base_logits: Any) -> dict[str, Any]:
    """Distance of two sets of logits [rows, width]: largest and mean absolute gap, and mean KL(base || model) in nats.

    `kl` is None for a single logit (regression), where there is no distribution.
    """
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (logits, base_logits))
    if a.shape != b.shape:
        raise Refused(f"logits of shape {tuple(a.shape)} cannot be compared with the base's {tuple(b.shape)}.")
    gap = (a - b).abs()
    finite = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    kl = None
    if a.shape[-1] > 1 and finite:
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        kl = max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))
    return {"max": float(gap.max()), "mean": float(gap.mean()), "kl": kl, "rows": int(a.shape[0]), "finite": finite}


def probe_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits of `model` on `batch` in evaluation mode, without gradients; `labels` are not given to the model."""
    with evaluating(model), torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits.detach()


def receipt(
    before: Snapshot,
    model: nn.Module,
    attached: Attached,
    probe_batch: Mapping[str, Any] | None = None,
    base_logits: Any = None,
) -> dict[str, Any]:
    """Prove what a stage did to `model` since `before`. Holds only plain values, so it can be written as JSON.

    `matched`: pattern -> modules. `moved`: one entry a trainable tensor that changed, with norms; `unmoved`: those that
    did not; `reshaped`, `added`, `removed`: tensors without a counterpart to compare. `frozen_moved`: tensors that were
    not to train and changed nevertheless (batch statistics may). `not_finite`: tensors with NaN or infinity.
    `logits`: distance from `base_logits` on `probe_batch` (max, mean, KL), None without them. `warnings`: sentences.
    """
    entries, unmoved, frozen_moved, not_finite, added = [], [], [], [], []
    present: set[str] = set()
    for name, tensor, trains in _named(model):
        present.add(name)
        if (trains or name in before.trainable) and not bool(torch.isfinite(tensor.detach()).all()):
            not_finite.append(name)
        if name in before.trainable:
            entry = _moved(name, before.trainable[name], tensor)
            entries.append(entry) if entry else unmoved.append(name)
        elif name not in before.frozen:
            added.append(name)
        elif _sample(tensor) != before.frozen[name]:
            frozen_moved.append(name)
    logits = None
    if probe_batch is not None and base_logits is not None:
        logits = logit_distance(probe_logits(attached.model, probe_batch), base_logits)
        if not logits["finite"]:
            not_finite.append("logits on the probe batch")
    moved = [entry for entry in entries if "change" in entry]
    return {
        "warnings": _warnings(moved, unmoved, frozen_moved, len(before.trainable)),
        "matched": {pattern: sorted(names) for pattern, names in attached.matched.items()},
        "trainable_tensors": len(before.trainable),
        "trainable_parameters": sum(tensor.numel() for tensor in before.trainable.values()),
        "moved": moved,
        "unmoved": unmoved,
        "reshaped": [entry for entry in entries if "change" not in entry],
        "added": added,
        "removed": sorted((before.trainable.keys() | before.frozen.keys()) - present),
        "frozen_moved": frozen_moved,
        "change": math.sqrt(sum(entry["change"] ** 2 for entry in moved if math.isfinite(entry["change"]))),
        "not_finite": not_finite,
        "logits": logits,
    }


def _warnings(moved: list[dict[str, Any]], unmoved: list[str], frozen_moved: list[str], trainable: int) -> list[str]:
    """Sentences for a reader: what a receipt shows that is seldom intended."""
    decayed = [entry["name"] for entry in moved if entry["only_decayed"]]
    found = []
    for names, what in (
        (unmoved, f"of {trainable} trainable tensors did not move"),
        (decayed, "trainable tensors only shrank, as by weight decay without a gradient"),
        (frozen_moved, "tensors moved although they were not to train"),
    ):
        if names:
            found.append(f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    return found


def assert_effect(receipt: Mapping[str, Any]) -> None:
    """Raise unless the stage changed something, for a reason other than weight decay, and everything is finite.

    Raises NotFinite with the name of the first such tensor; Unmatched for a target pattern without a module; NoEffect
    when no trainable tensor moved, when those that moved only shrank, or when tensors moved but the logits on the probe
    batch are bit-equal to the base's.
    """
    if receipt["not_finite"]:
        bad = receipt["not_finite"]
        raise NotFinite(
            f"{bad[0]} holds NaN or infinity ({len(bad)} such in all); lower the learning rate, clip gradients, "
            "or train in float32."
        )
    empty = [pattern for pattern, names in receipt["matched"].items() if not names]
    if empty:
        raise Unmatched(f"target pattern {empty[0]!r} matched no module; give a role or a name that the base has.")
    changed = [entry for entry in receipt["moved"] if not entry["only_decayed"]]
    if not (changed or receipt["reshaped"] or receipt["added"] or receipt["removed"]):
        found = (
            f"{len(receipt['moved'])} of {receipt['trainable_tensors']} trainable tensors only shrank by weight decay"
            if receipt["moved"]
            else f"all {receipt['trainable_tensors']} are bit-equal to the start"
        )
        raise NoEffect(
            f"no trainable tensor moved: {found}. Expected at least one with a gradient; check the learning rate, that "
            "the labels are not all masked, and that the trained parameters are the ones the model uses."
        )
    if receipt["logits"] is not None and receipt["logits"]["max"] == 0.0:
        raise NoEffect(
            f"{len(changed)} trainable tensors moved, but the logits on {receipt['logits']['rows']} probe rows are "
            "bit-equal to the base's: what was trained is not on the way to the output (a disabled adapter, say)."
        )


def _plain_name(name: str) -> str:
    """A module's name as it was before PEFT wrapped the model."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name)
    while name.startswith(("base_model.model.", "module.", "_orig_mod.")):
        name = name.split(".", 2)[2] if name.startswith("base_model.model.") else name.split(".", 1)[1]
    return name


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items: Iterable[Any] = (
        value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else ()
    )
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest gap as a share of the largest value of `a`; infinite when shapes differ or a value is not finite."""
    if a.shape != b.shape:
        return math.inf
    gap = float((a.float() - b.float()).abs().max()) if a.numel() else 0.0
    if not math.isfinite(gap):
        return math.inf
    return gap / max(float(a.float().abs().max()), 1e-12) if gap else 0.0


def _as(module: nn.Module, value: Any) -> Any:
    """`value` with its floating-point tensors in the type of the module's parameters."""
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return tree_map(lambda x: x.to(kind) if kind and isinstance(x, Tensor) and x.is_floating_point() else x, value)


def _layer_gaps(model_a: nn.Module, model_b: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Gap of every leaf that both models have, each fed with the input that it gets in `model_a`.

    Fed alike, a layer answers for its own weights only, and the fault of an early layer does not spread to later ones.
    """
    leaves = {
        _plain_name(name): module
        for name, module in model_b.named_modules()
        if hasattr(module, "base_layer") or not list(module.children())  # an adapted layer answers as one
    }
    gaps: dict[str, float] = {}
    hooks = []

    def compare(name: str, other: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            a, b = _first_tensor(output), _first_tensor(other(*_as(other, args), **_as(other, kwargs)))
            if a is not None and b is not None:
                gaps[name] = max(gaps.get(name, 0.0), _apart(a, b))

        return hook

    try:
        for full, module in model_a.named_modules():
            name = _plain_name(full)
            if name in leaves:
                hooks.append(module.register_forward_hook(compare(name, leaves[name]), with_kwargs=True))
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return gaps


def parity(
    model_a: nn.Module, model_b: nn.Module, inputs: Mapping[str, Any], tolerance: float | None = None
) -> dict[str, Any]:
    """Compare two models that should be one function, on `inputs`, in evaluation mode.

    `tolerance` is the largest accepted gap of the logits as a share of the largest logit; by default that of the
    coarsest floating-point type among the parameters of both (TOLERANCE). Returns `{"max_gap", "mean_gap", "scale",
    "tolerance", "dtype", "rows", "holds", "worst_layer", "worst_layer_gap"}`: gaps are in logits, `worst_layer` is the
    leaf that differs most when both are fed the same input, and `worst_layer_gap` a share of its largest output.
    """
    kinds = {p.dtype for model in (model_a, model_b) for p in model.parameters() if p.is_floating_point()}
    kind = max(kinds & TOLERANCE.keys(), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    limit = TOLERANCE[kind] if tolerance is None else tolerance
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with evaluating(model_a, model_b), torch.no_grad():
        a, b = model_a(**inputs).logits.double().cpu(), model_b(**inputs).logits.double().cpu()
        if a.shape != b.shape:
            raise ParityBroken(f"logits have shape {tuple(a.shape)} before and {tuple(b.shape)} after the hand-over.")
        gaps = _layer_gaps(model_a, model_b, lambda: model_a(**inputs))
    gap, scale = (a - b).abs(), float(a.abs().max())
    worst = max(gaps, key=lambda name: gaps[name], default=None)
    max_gap = float(gap.max())
    return {
        "max_gap": max_gap if math.isfinite(max_gap) else math.inf,
        "mean_gap": float(gap.mean()),
        "scale": scale,
        "tolerance": limit,
        "dtype": str(kind).removeprefix("torch."),
        "rows": int(a.shape[0]),
        "holds": bool(max_gap <= limit * scale),
        "worst_layer": worst if worst is not None and gaps[worst] > 0 else None,
        "worst_layer_gap": gaps[worst] if worst is not None else None,
    }


def assert_parity(result: Mapping[str, Any], what: str) -> None:
    """Raise ParityBroken with the largest gap and the worst layer unless `result` of `parity` holds."""
    if result["holds"]:
        return
    layer = result["worst_layer"]
    place = (
        f"worst layer {layer} (gap {result['worst_layer_gap']:.3g} of its output)"
        if layer
        else "every layer agrees on its own, so the models differ in how layers are put together"
    )
    raise ParityBroken(
        f"{what}: the largest logit gap is {result['max_gap']:.3g} on {result['rows']} rows, accepted is "
        f"{result['tolerance']:.3g} x {result['scale']:.3g} for {result['dtype']}; {place}."
    )
