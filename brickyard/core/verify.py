"""Check anybody's adapter, and a merged model, for the failures that raise no error.

An adapter can load without a complaint and do nothing: its names match no layer, its matrices are all zero, it was made
for another base, its head stayed random. A merge can drop the scaling or change nothing at all. `verify` looks for each
of these by reading names, shapes and values, and by running the models on probe inputs. A finding is `True` (holds),
`False` (does not) or `None` (cannot be known from what was given).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from brickyard.core.adapted import (
    ADAPTER,
    PREFIX,
    Adapted,
    Logits,
    Stored,
    head_width,
    layers_off,
    model_class,
    open_model,
    put_brick_on,
    put_on,
    read_adapter,
    silent_layers,
)
from brickyard.core.base import Base, HeadedModel, open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split, read_data
from brickyard.core.errors import BrickyardError, ParityBroken, UnsafeFile
from brickyard.core.inputs import KINDS
from brickyard.core.receipt import TOLERANCE, logit_distance, parity
from brickyard.core.task import Task

PROBE_ROWS, PROBE_TOKENS = 16, 64
LAST_TOKENS = 8  # of a language model's logits, which are as wide as the vocabulary
ROUNDING = 16 * torch.finfo(torch.float32).eps  # share of the largest logit below which an effect is rounding
PROBE_TEXTS = (
    "The committee approved the new budget after a long and careful debate.",
    "I waited forty minutes for a cold sandwich and nobody said sorry.",
    "Water boils at a lower temperature on top of a mountain.",
    "def area(radius): return 3.14159 * radius ** 2",
    "Which river flows through the largest number of countries?",
    "Everything about this little film is warm, funny and quietly brave.",
    "Please transfer 250 euros to my savings account by Friday.",
    "No.",
)


@dataclass
class _Findings:
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, check: str, ok: bool | None, detail: str) -> None:
        self.rows.append({"check": check, "ok": ok, "detail": detail})


def verify(base: str, adapter: str | Path, merged: str | Path | None = None, data: Any = None) -> dict[str, Any]:
    """Check an adapter against its base, and optionally a merged model against both.

    `base` and `merged` are specs that `open_base` takes, `adapter` a PEFT adapter folder (LoRA, IA3, BRICKYARD, ...) or
    a brick, `data` a data set whose rows serve as probe inputs (else fixed texts, or random pixels). Runs no code that
    a file names, and fetches nothing but a base that is given as a hub id.

    Returns `{"findings": [{"check", "ok", "detail"}], "holds": bool, "base", "adapter", "merged", "probe"}`; `holds` is
    false when any finding is. Raises UnsafeFile for pickles and damaged files, BadBrick or BadBase for incomplete ones.
    """
    found = _Findings()
    stored = read_adapter(adapter)
    opened = open_base(base)
    goal = None if merged is None else open_base(str(merged))
    size = sum(tensor.numel() for tensor in stored.tensors.values())
    found.add("files", True, f"{stored.kind}: {len(stored.tensors)} tensors, {size:,} parameters; plain safetensors")
    _finite(found, stored)
    _identity(found, stored, opened, base)
    inputs, probe = _probe(opened, data)
    adapted, before = _attach(found, stored, opened, inputs, goal)
    effect = None
    if adapted is not None:
        if adapted.config is not None:
            _patterns(found, stored, adapted)
        loaded = _names_and_shapes(found, stored, adapted)
        _ranks(found, stored)
        if _load(found, adapted, loaded):
            _still(found, adapted, loaded)
            effect = _effect(found, adapted, inputs, before)
    if goal is not None:
        _merged(found, stored, opened, goal, adapted, inputs, effect)
    return {
        "findings": found.rows,
        "holds": all(row["ok"] is not False for row in found.rows),
        "base": {"spec": base, "fingerprint": opened.fingerprint},
        "adapter": {"folder": str(adapter), "type": stored.kind, "tensors": len(stored.tensors), "parameters": size},
        "merged": None if merged is None else str(merged),
        "probe": probe,
    }


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _finite(found: _Findings, stored: Stored) -> None:
    bad = [n for n, t in stored.tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]
    found.add(
        "finite tensors",
        not bad,
        f"NaN or infinity in {len(bad)} tensors: {_some(bad)}" if bad else "every value is finite",
    )


def _identity(found: _Findings, stored: Stored, base: Base, spec: str) -> None:
    """Was the adapter made for this base: by fingerprint where one can be had, never by a mere name."""
    recorded = (stored.manifest or {}).get("base", {}).get("fingerprint")
    named = str((stored.config or {}).get("base_model_name_or_path") or "")
    if recorded is None and named:
        if named == spec:
            found.add("made for this base", True, f"the adapter names {named}, on which it is checked")
            return
        try:
            if (
                named.startswith("embedded:") or Path(named).is_dir()
            ):  # a hub id would be fetched: not for a file's sake
                recorded = open_base(named).fingerprint
        except (BrickyardError, OSError) as error:
            found.add("made for this base", None, f"the adapter names {named[:200]}, which cannot be opened: {error}")
            return
    if recorded is None:
        detail = f"the adapter names {named}; its weights are not at hand" if named else "the adapter names no base"
        found.add("made for this base", None, f"{detail}, so only shapes and names can be compared")
    elif recorded == base.fingerprint:
        found.add("made for this base", True, f"fingerprint {recorded[:12]} agrees")
    else:
        made_for = f"{named or (stored.manifest or {}).get('base', {}).get('spec')} (fingerprint {recorded[:12]})"
        found.add("made for this base", False, f"made for {made_for}; given is {spec} ({base.fingerprint[:12]})")


def _probe(base: Base, data: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs on which models are compared, and what they are."""
    if data is not None:
        read = read_data(data, need=(), labelled=False)
        name = next(split for split in ("test", "validation", "train") if split in read.splits)
        split = read.splits[name].take(range(min(PROBE_ROWS, len(read.splits[name]))))
        kind, what = read.input, f"rows of {read.name}, {name}"
    elif base.input == "image":
        size = getattr(base.config, "image_size", None) or 224
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(base.config, "num_channels", None) or 3
        pixels = torch.randn(4, channels, *sides, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels}, {"rows": 4, "what": "random pixels"}
    else:
        split, kind, what = Split({"text": list(PROBE_TEXTS)}), "text", "fixed texts"
    task = Task(kind=KINDS[kind], metric="accuracy", labels=None, width=1, input=kind)
    encoded = encode(split, base, task, max_length=None if kind == "image" else PROBE_TOKENS)
    inputs = {k: v for k, v in encoded.collate(np.arange(len(split))).items() if k != "labels"}
    if getattr(base.config, "is_encoder_decoder", False) and "input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :LAST_TOKENS]
    return inputs, {"rows": len(split), "what": what}


def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return Logits(model.eval(), LAST_TOKENS)(**inputs).logits


def _attach(
    found: _Findings, stored: Stored, base: Base, inputs: dict[str, Tensor], goal: Base | None
) -> tuple[Adapted | None, Tensor | None]:
    """Put the adapter on the base with its starting values; None where it cannot be. Also the base's own outputs."""
    before: Tensor | None = None
    weights: list[str] = []
    try:
        if stored.manifest is not None:
            adapted = put_brick_on(base, stored)
            before = _outputs(adapted.model, inputs)
        else:
            auto = model_class(base, stored)
            model, fresh = open_model(auto, base, _width(auto, base, stored, goal))
            weights = [name for name, _ in model.named_parameters()]
            before = _outputs(model, inputs)
            adapted = put_on(model, stored, fresh)
    except UnsafeFile:
        raise
    except Exception as error:  # PEFT and the model classes raise whatever they like on a config that does not fit
        wanted = (stored.config or {}).get("target_modules")
        wanted = [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, list) else []
        asked = f"; asked for {_some(map(str, wanted), 8)}{_near(map(str, wanted), weights)}" if wanted else ""
        found.add("adapter fits the base", False, f"{type(error).__name__}: {str(error)[:500]}{asked}")
        return None, before
    found.add("adapter fits the base", True, f"put on {type(adapted.model).__name__}, {len(adapted.layers())} layers")
    bare = sorted(adapted.fresh - {name.removeprefix(PREFIX) for name in stored.tensors})
    if bare:
        found.add("head is stored", None, f"neither base nor adapter holds {_some(bare)}: random here")
    if adapted.ignored:
        found.add("options known", None, f"this PEFT release does not know, and ignores: {_some(adapted.ignored)}")
    return adapted, before


def _width(auto: Any, base: Base, stored: Stored, goal: Base | None) -> int | None:
    """Labels of the head: the adapter's, else the merged model's."""
    return head_width(auto, base, stored) or (None if goal is None else goal.config.num_labels)


def _near(wanted: Iterable[str], weights: Iterable[str]) -> str:
    """What the base calls the layers whose names were not found; `weights` are the names of its parameters."""
    ends = sorted({name.split(".")[-2] for name in weights if name.endswith(".weight") and name.count(".")})
    close = sorted({c for w in wanted for c in get_close_matches(w.rpartition(".")[2], ends, n=2, cutoff=0.5)})
    return f"; the base has {_some(close or ends, 12)}" if ends else ""


def _patterns(found: _Findings, stored: Stored, adapted: Adapted) -> None:
    """Does each target pattern, and each pattern of ranks and alphas, match a layer?"""
    config, given = adapted.config, (stored.config or {}).get("target_modules")
    dead: list[tuple[str, str]] = []
    patterns = [given] if isinstance(given, str) else sorted(given or ())
    for pattern in patterns:
        one = copy(config)
        one.target_modules = pattern if isinstance(given, str) else {pattern}
        one.exclude_modules = one.modules_to_save = None  # "all-linear" is stored with the head that it then leaves out
        if pattern != "all-linear" and not any(check_target_module_exists(one, name) for name in adapted.names):
            dead.append(("target_modules", pattern))
    kept = (stored.config or {}).get("modules_to_save") or []
    empty = [m for m in kept if not any(name == m or name.endswith(f".{m}") for name in adapted.names)]
    # PEFT itself lists both usual names of a head, of which a model has one
    usual = {"classifier", "score"} if len(empty) < len(kept) else set()
    dead += [("modules_to_save", module) for module in empty if module not in usual]
    layers = [name.removeprefix(PREFIX) for name in adapted.layers()]
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in (stored.config or {}).get(option) or {}:
            layer = pattern.removesuffix(".lora_E")  # AdaLoRA's masks carry the name of their tensor
            if not any(re.match(rf"(.*\.)?({layer})$", name) for name in layers):
                dead.append((option, pattern))
    if dead:
        names = _some(f"{option} {pattern!r}" for option, pattern in dead)
        near = _near((pattern for _, pattern in dead), adapted.own | adapted.fresh)
        found.add("every pattern matches", False, f"matched nothing: {names}{near}")
    else:
        found.add("every pattern matches", True, f"{len(patterns)} target patterns matched {len(layers)} layers")


def _moved_parts(given: list[str], expected: list[str]) -> Counter[str]:
    """Parts whose removal from a name of `given` makes it a name of `expected`: what the two conventions differ by."""
    wanted = set(expected)
    counts: Counter[str] = Counter()
    for name in given:
        parts = name.split(".")
        for width in (1, 2):
            for at in range(len(parts) - width):
                if ".".join(parts[:at] + parts[at + width :]) in wanted:
                    counts[".".join(parts[at : at + width])] += 1
    return counts


def _why(unexpected: list[str], missing: list[str], weights: Iterable[str]) -> str:
    """The likely cause of names that do not fit."""
    for counts, what in (
        (_moved_parts(unexpected, missing), "the file's names have an extra {!r}"),
        (_moved_parts(missing, unexpected), "the file's names lack {!r}"),
    ):
        if counts:
            part, times = counts.most_common(1)[0]
            return f"; {what.format(part)} ({times} tensors): saved from a wrapped model, or with an adapter's name"
    return _near([name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in unexpected], weights)


def _names_and_shapes(found: _Findings, stored: Stored, adapted: Adapted) -> dict[str, Tensor]:
    """Compare the file's names and shapes with those that the model takes. Returns what fits."""
    state = adapted.model.state_dict()
    replaced = [n for n in stored.tensors if n not in adapted.start and n in state and ADAPTER not in n.split(".")]
    missing = sorted(adapted.start.keys() - stored.tensors.keys())
    unexpected = sorted(stored.tensors.keys() - adapted.start.keys() - set(replaced))
    if missing or unexpected:
        parts = [
            f"{len(names)} {what}: {_some(names)}"
            for names, what in (
                (unexpected, "tensors of the file have no place in the model"),
                (missing, "tensors of the model are not in the file and keep their starting values"),
            )
            if names
        ]
        why = _why(unexpected, missing, adapted.own | adapted.fresh)
        found.add("every tensor loads", False, "; ".join(parts) + why)
    else:
        found.add("every tensor loads", True, f"all {len(adapted.start)} names agree")
    expected = {**{name: state[name] for name in replaced}, **adapted.start}
    resized = stored.kind == "ADALORA" and bool((stored.config or {}).get("rank_pattern"))
    wrong = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in stored.tensors.items()
        if name in expected and tensor.shape != expected[name].shape and not resized
    ]
    found.add("shapes", not wrong, f"{len(wrong)} differ: {_some(wrong, 3)}" if wrong else "all shapes agree")
    if replaced:
        found.add(
            "base tensors", True, f"the adapter also replaces {len(replaced)} tensors of the base: {_some(replaced)}"
        )
    return {
        name: tensor
        for name, tensor in stored.tensors.items()
        if name in expected and (resized or tensor.shape == expected[name].shape)
    }


def _ranks(found: _Findings, stored: Stored) -> None:
    """Is every low-rank pair really low-rank?"""
    above = []
    for name, a in stored.tensors.items():
        b = stored.tensors.get(name.replace("lora_A", "lora_B"))
        if "lora_A" in name and b is not None and a.ndim == b.ndim == 2 and a.shape[0] > min(a.shape[1], b.shape[0]):
            above.append(f"{name} has rank {a.shape[0]} on a layer of {b.shape[0]} x {a.shape[1]}")
    if any("lora_A" in name for name in stored.tensors):
        found.add("rank fits the layers", not above, _some(above) if above else "no rank exceeds its layer")


def _load(found: _Findings, adapted: Adapted, tensors: dict[str, Tensor]) -> bool:
    try:
        adapted.load({**adapted.start, **tensors})
    except Exception as error:  # the loaders of PEFT's many types share no class of errors
        found.add("loads", False, f"{type(error).__name__}: {str(error)[:500]}")
        return False
    return True


def _still(found: _Findings, adapted: Adapted, loaded: dict[str, Tensor]) -> None:
    """Which tensors are still what they were before training."""
    start = {name: tensor for name, tensor in adapted.start.items() if name in loaded.keys() - adapted.fixed()}
    still = [name for name, tensor in start.items() if torch.equal(tensor.cpu().float(), loaded[name].cpu().float())]
    if still:
        detail = f"{len(still)} of {len(start)} tensors are as before training: {_some(still)}"
        # Of a model trained in place some part may have no say in the output (a pooler under another head)
        spared = not adapted.layers() and len(still) < len(start)
        found.add("every tensor trained", None if spared else False, detail)
        return
    known = [
        name
        for name, tensor in start.items()
        if adapted.config is None  # a brick tells its seed
        or name.removeprefix(PREFIX) in adapted.own
        or bool(tensor.min() == tensor.max())  # zeros or ones: no seed needed
    ]
    rest = "" if len(known) == len(start) else "; the others began at random values that the file does not tell"
    found.add("every tensor trained", True, f"{len(known)} of {len(start)} tensors are known to have moved{rest}")


def _effect(found: _Findings, adapted: Adapted, inputs: dict[str, Tensor], before: Tensor | None) -> float | None:
    """Does the adapter change what the model computes, layer by layer and at the output? Returns the largest gap."""
    after = _outputs(adapted.model, inputs)
    if not bool(torch.isfinite(after).all()):
        found.add("finite outputs", False, "NaN or infinity in the outputs on the probe inputs")
        return None
    found.add("finite outputs", True, f"outputs of shape {tuple(after.shape)} are finite")
    if adapted.layers():
        silent, unreached = silent_layers(adapted, lambda: _outputs(adapted.model, inputs))
        total = len(adapted.layers())
        detail = f"{len(silent)} of {total} adapted layers compute exactly what the base does: {_some(silent)}"
        found.add(
            "every layer acts", not silent, detail if silent else f"all {total - len(unreached)} layers reached act"
        )
        if unreached:
            found.add("every layer is used", None, f"the probe inputs never reach {_some(unreached)}")
        with layers_off(adapted):
            before = _outputs(adapted.model, inputs)
    if before is None or before.shape != after.shape:
        found.add("outputs change", None, "there is no output of the base to compare with")
        return None
    gap = logit_distance(after, before)
    scale = float(before.abs().max())
    acts = gap["max"] > ROUNDING * scale
    kl = "" if gap["kl"] is None else f", KL {gap['kl']:.3g} nats"
    what = "with the adapter's head on both sides" if adapted.layers() else "against the base"
    detail = f"largest gap {gap['max']:.3g}, mean {gap['mean']:.3g}{kl} {what}"
    found.add("outputs change", acts, detail if acts else f"a silent no-op: {detail}, which is no more than rounding")
    return gap["max"]


def _merged(
    found: _Findings,
    stored: Stored,
    base: Base,
    merged: Base,
    adapted: Adapted | None,
    inputs: dict[str, Tensor],
    effect: float | None,
) -> None:
    """Is the merged model the base with the adapter?"""
    if adapted is None:
        found.add("merged model agrees", None, "there is no adapted model to compare it with")
        return
    if any(isinstance(module, HeadedModel) for module in adapted.model.modules()):
        found.add("merged model agrees", None, "the brick has a head of its own, which no plain checkpoint holds")
        return
    auto = model_class(base, stored)
    model, fresh = open_model(auto, merged, _width(auto, base, stored, merged))
    if fresh:
        found.add("merged model is complete", False, f"it lacks {_some(sorted(fresh))}, which would be random")
    kinds = {info.dtype for _, info in merged.weights.values()}
    kind = next((k for name, k in (("BF16", torch.bfloat16), ("F16", torch.float16)) if name in kinds), torch.float32)
    state = model.state_dict()
    _share_head(adapted, stored, state)
    layers = {name.removeprefix(PREFIX): layer for name, layer in adapted.layers().items()}
    weights = {
        name: (weight, state[f"{name}.weight"])
        for name, layer in layers.items()
        if isinstance(weight := getattr(layer.get_base_layer(), "weight", None), Tensor) and f"{name}.weight" in state
    }
    same = [name for name, (old, new) in weights.items() if torch.equal(old.to(kind), new.to(kind))]
    if weights and same and effect:
        whole = "the merge did nothing" if len(same) == len(weights) else "the merge left layers out"
        detail = f"{whole}: {len(same)} of {len(weights)} layers are the base's: {_some(same)}"
        found.add("merge changed the weights", False, detail)
    elif weights:
        detail = f"{len(weights) - len(same)} of {len(weights)} layers differ from the base's"
        found.add("merge changed the weights", True, detail)
    try:
        gap = parity(Logits(adapted.model, LAST_TOKENS), Logits(model, LAST_TOKENS), inputs, TOLERANCE[kind])
    except (ParityBroken, RuntimeError, ValueError) as error:
        found.add("merged model agrees", False, str(error)[:500])
        return
    detail = f"largest gap {gap['max_gap']:.3g}, accepted {gap['tolerance'] * gap['scale']:.3g} ({str(kind)[6:]})"
    # A coarse type forgives gaps as large as the whole effect of a weak adapter
    lost = effect is not None and gap["max_gap"] > 0.5 * effect and gap["max_gap"] > ROUNDING * gap["scale"]
    if lost:
        detail += f"; the adapter's whole effect is {effect:.3g}"
    if not gap["holds"] or lost:
        factor = _factor({name: (layers[name], *pair) for name, pair in weights.items()})
        detail += f"; worst layer {gap['worst_layer']}{factor}"
    found.add("merged model agrees", gap["holds"] and not lost, detail)


def _share_head(adapted: Adapted, stored: Stored, state: dict[str, Tensor]) -> None:
    """Give a head that neither base nor adapter holds the merged model's values: only what lies below can be judged."""
    own = dict(adapted.model.named_parameters())
    for name in adapted.fresh - {name.removeprefix(PREFIX) for name in stored.tensors}:
        target = own.get(f"{PREFIX}{name}")
        if target is not None and name in state and state[name].shape == target.shape:
            target.data.copy_(state[name])


def _factor(layers: dict[str, tuple[Any, Tensor, Tensor]]) -> str:
    """By which multiple of the adapter's change the merged weights differ from the base's, where that is one number.

    `layers` holds the adapted layer, the base's weight and the merged weight.
    """
    along = changed = across = 0.0
    for layer, old, new in layers.values():
        if hasattr(layer, "get_delta_weight") and old.shape == new.shape:
            delta = layer.get_delta_weight(ADAPTER).detach().double()
            change = (new.double() - old.double()).reshape(delta.shape)
            along += float((delta * change).sum())
            across += float(delta.square().sum())
            changed += float(change.square().sum())
    if not across or not changed or along**2 < 0.99 * across * changed:
        return ""
    return f"; the merged weights hold {along / across:.3g} times the adapter's change"
