"""What `brickyard merge --bricks` takes: bricks, PEFT adapters and full checkpoints, as sources for the merge engine.

Full checkpoints and plain LoRA adapters are opened without transformers; only bricks need it, for their base's
fingerprint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brickyard.core import base_files
from brickyard.core.base_files import ADAPTER, CONFIG
from brickyard.core.errors import BadBrick, Refused, UnsafeFile, UsageError, WrongBase
from brickyard.core.files import check_safetensors, plain_file, read_json, read_tensors, sha256
from brickyard.core.names import Names, same_names
from brickyard.merge._inputs import (
    FLOATS,
    Factors,
    Held,
    LowRank,
    Places,
    Source,
    Stored,
    distance,
    heads_among,
    misfits,
    refuse,
    sample_of,
    tensors_at,
    unmergeable,
)

MANIFEST = "merge.json"
BRICK, ADAPTER_WEIGHTS = "brick.json", "adapter_model.safetensors"
FAR = 0.1  # mean |theta - theta_0| / mean |theta_0| of models that fine-tuning from one base does not reach
MASK = "neuron-group"  # stores which neurons it cuts, in place of the weights that this makes
_PREFIX = "base_model.model."
_PEFT_ALPHA = 8.0  # lora_alpha of PEFT's LoraConfig where a configuration has none
_QUANTISED = "quantization_config"
# Ways to begin an adapter that leave the base as it is (PEFT 0.21, tuners/lora/layer.py); the others take their first
# factors, or what quantising loses, out of the base's weights, so that B A stands beside other weights.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# What two configurations must agree on for their weights to mean the same.
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Input:
    """One opened input: its tensors by the base's names, and its head's own tensors, which no merge touches.

    kind: "brick", "adapter" or "checkpoint"; `config` is the PEFT config of a plain LoRA, and `modules` what it calls
    the layers, by the base's names of their weights; `files` say what was read.
    """

    label: str
    spec: str
    kind: str
    source: Source
    heads: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    modules: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    checked: str = ""

    @property
    def is_low_rank(self) -> bool:
        return isinstance(self.source, LowRank)


@dataclass(frozen=True)
class Ground:
    """The base of a merge: its folder and where its tensors lie."""

    spec: str
    folder: Path
    config: dict[str, Any]
    stored: Stored
    trust_remote_code: bool = False

    @cached_property
    def opened(self) -> Any:
        """The base as a `core.base.Base`; loads transformers."""
        from brickyard.core.base import open_base

        return open_base(self.spec, trust_remote_code=self.trust_remote_code)

    @cached_property
    def sample(self) -> str:
        """A digest by which merges of this base know it again."""
        return sample_of(self.stored.places)

    @property
    def heads(self) -> frozenset[str]:
        """Tensors of a trained classification head in the base, which is no part of what models share."""
        if "Classification" not in next(iter(self.config.get("architectures") or []), ""):
            return frozenset()
        names = self.stored.places
        numbered = [name for name in names if any(part.isdecimal() for part in name.split("."))]
        inside = {name.split(".")[0] for name in numbered if len(names[name][1].shape) >= 2}
        largest = max(inside, key=lambda part: sum(n.split(".")[0] == part for n in numbered), default="")
        return frozenset(name for name in names if name.split(".")[0] != largest)


def open_ground(spec: str, *, trust_remote_code: bool = False) -> Ground:
    """Open the base's weights, without building anything; errors as of `core.base.open_base`."""
    folder = base_files.locate(spec, trust_remote_code=trust_remote_code)
    config = _config(folder)
    return Ground(spec, folder, config, Stored("the base", base_files.weight_files(folder)), trust_remote_code)


def open_inputs(specs: Sequence[str], ground: Ground, *, mixed: bool, force: bool) -> list[Input]:
    """Open every input and check that it fits the base; Refused with one table of everything that does not.

    `mixed` lets checkpoints be stored in other dtypes than the base; `force` skips the checks of ancestry.
    """
    if not specs:
        raise UsageError("no model was given; name bricks, adapters or checkpoints with --bricks.")
    labels = _labels(specs)
    out, rows = [], _quantised("the base", ground.config, "")
    for spec, label in zip(specs, labels, strict=True):
        folder = Path(spec).expanduser()
        if (folder / BRICK).is_file():
            made, found = _brick(folder, spec, label, ground, force)
        elif (folder / ADAPTER).is_file():
            made, found = _adapter(folder, spec, label, ground, "adapter")
        else:
            made, found = _checkpoint(spec, label, ground, mixed)
        out.append(made)
        rows += found
    refuse(rows)
    for made in out:
        if made.kind == "checkpoint" and not force and not _merged_from(made, ground):
            far = distance(ground.stored, made.source)
            if far >= FAR:
                raise WrongBase(
                    f"{made.label} does not look fine-tuned from {ground.spec}: its weights differ by {far:.2f} times "
                    f"the base's own size (expected below {FAR}). Give its base as --base, merge models that were "
                    "trained apart by cca-merge, or --force."
                )
    return out


def _merged_from(made: Input, ground: Ground) -> bool:
    """Whether a checkpoint is a merge on this very base, whose own inputs were held against it when it was made."""
    path = made.files[0].parent / MANIFEST
    if not path.is_file():
        return False
    about = read_json(plain_file(path.parent, MANIFEST))
    known = isinstance(about, dict) and not about.get("forced") and "alignment" not in about
    return known and (about.get("base") or {}).get("sample") == ground.sample


def _labels(specs: Sequence[str]) -> list[str]:
    """Name each input by its folder, and by more of its path where that does not tell it apart."""
    paths = [Path(spec).expanduser().parts for spec in specs]
    if len(set(paths)) != len(paths):
        raise UsageError(f"an input is given twice: {', '.join(map(str, specs))}.")
    own = [parts[:-1] if parts[-1] == "brick" and len(parts) > 1 else parts for parts in paths]
    for depth in range(1, max(map(len, own)) + 1):
        labels = ["/".join(parts[-depth:]).strip("/") for parts in own]
        if len(set(labels)) == len(labels):
            return labels
    return list(map(str, specs))


def _config(folder: Path) -> dict[str, Any]:
    known = read_json(plain_file(folder, CONFIG), constants=True)
    if not isinstance(known, dict):
        raise UnsafeFile(f"{folder / CONFIG}: expected a JSON object")
    return known


def _quantised(label: str, config: dict[str, Any], base: str) -> list[list[str]]:
    """Return the row that refuses quantised weights, in whatever types they are stored."""
    found = config.get(_QUANTISED)
    if not found:
        return []
    kind = str(found.get("quant_method") or "set") if isinstance(found, dict) else "set"
    return [[label, f"{CONFIG}: {_QUANTISED}", base or kind, kind if base else ""]]


def _checkpoint(spec: str, label: str, ground: Ground, mixed: bool) -> tuple[Input, list[list[str]]]:
    folder = base_files.locate(spec)
    places, config = base_files.weight_files(folder), _config(folder)
    base, heads = ground.stored.places, ground.heads
    names = same_names(base.keys() - heads, places)
    shared = {name: place for name, place in base.items() if name not in heads}
    rows = [
        [label, f"{CONFIG}: {key}", str(ground.config[key]), str(config[key])]
        for key in _ARCHITECTURE
        if key in config and key in ground.config and config[key] != ground.config[key]
    ]
    rows += _quantised(label, config, "none")
    own_heads = sorted({*heads_among(names), *(name for name in names.extra if name in heads)})
    names = Names(names.own, [name for name in names.extra if name not in heads])
    rows += misfits(shared, places, label, names, whole=True, mixed=mixed) + unmergeable(base, places, label, names)
    if rows:
        own_heads = []
    source = Stored(label, _by_base(names, places))
    files = (*sorted({path for path, _ in places.values()}), folder / CONFIG)
    return Input(label, spec, "checkpoint", source, tensors_at(places, own_heads), files=files), rows


def _by_base(names: Names, places: Places) -> dict[str, Any]:
    """Return the floating-point tensors' places by the base's names."""
    return {name: places[own] for name, own in names.own.items() if places[own][1].dtype in FLOATS}


def _brick(folder: Path, spec: str, label: str, ground: Ground, force: bool) -> tuple[Input, list[list[str]]]:
    from brickyard.core import brick as bricks

    made = bricks.load(folder)
    wanted = made.manifest["base"]["fingerprint"]
    if wanted != ground.opened.fingerprint and not force:
        raise WrongBase(
            f"brick {folder} was made for base {made.manifest['base']['spec']} (fingerprint {wanted[:12]}), the base "
            f"given is {ground.spec} ({ground.opened.fingerprint[:12]}). Merge bricks of one base, or --force."
        )
    if made.structure:
        raise Refused(
            f"brick {folder} runs a part of its layers ({made.structure}), and a merged model runs all; merge "
            "bricks that were tuned with keep=dense."
        )
    weights = made.manifest["weights"]
    path = plain_file(folder, weights)
    if sha256(path) != made.manifest["files"][weights]:
        raise UnsafeFile(f"{path}: its bytes are not those that {BRICK} was written for; fetch or write it again.")
    if (folder / ADAPTER).is_file():
        if read_json(plain_file(folder, ADAPTER), constants=True).get("peft_type") == "LORA":
            return _adapter(folder, spec, label, ground, "brick")
        return _applied(made, spec, label, ground)
    if made.manifest["method"] == MASK:
        return _applied(made, spec, label, ground)
    places: Places = {name: (path, info) for name, info in check_safetensors(path).items()}
    names = same_names(ground.stored.places.keys() - ground.heads, places)
    if not names.own:
        raise Refused(
            f"{label}: {made.manifest['arm']} trained parts beside the base and none of its weights, which are all "
            "that a merge adds up. Leave it out."
        )
    base = ground.stored.places
    rows = misfits(base, places, label, names, whole=False, mixed=True) + unmergeable(base, places, label, names)
    heads = [] if rows else names.extra
    source = Stored(label, _by_base(names, places))
    return Input(label, spec, "brick", source, tensors_at(places, heads), files=(path, folder / BRICK)), rows


def _applied(made: Any, spec: str, label: str, ground: Ground) -> tuple[Input, list[list[str]]]:
    """Open a brick whose change is no plain low-rank product: put it on the base, and take the weights it makes."""
    model = made.apply(ground.opened, force=True).model
    try:
        plain = model if made.manifest["method"] == MASK else model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise Refused(f"{label}: {made.manifest['arm']} is no change of the base's weights: {error}") from error
    state = {name: tensor.detach() for name, tensor in plain.state_dict().items() if tensor.is_floating_point()}
    names = same_names(ground.stored.places.keys() - ground.heads, state)
    held = {name: state[own] for name, own in names.own.items()}
    heads = {name: state[name].clone() for name in names.extra}
    base = ground.stored.places
    # What is not merged must be as in the base; the model holds it as it was read from there.
    rows = [
        [label, name, f"{base[name][1].dtype} {list(base[name][1].shape)}", "other values"]
        for name, tensor in held.items()
        if base[name][1].dtype not in FLOATS and not _as_stored(tensor, base, name)
    ]
    files = _present(made.folder, made.manifest["weights"], BRICK, ADAPTER)
    return Input(label, spec, "brick", Held(label, held), heads, files=files), rows


def _present(folder: Path, *names: str) -> tuple[Path, ...]:
    """Return those of an input's files that there are: its weights and what says how they are read."""
    return tuple(folder / name for name in names if (folder / name).is_file())


def _as_stored(tensor: Tensor, places: Places, name: str) -> bool:
    return torch.equal(tensor.cpu(), tensors_at(places, [name])[name].to(tensor.dtype))


def _adapter(folder: Path, spec: str, label: str, ground: Ground, kind: str) -> tuple[Input, list[list[str]]]:
    config = read_json(plain_file(folder, ADAPTER), constants=True)
    odd = [key for key in ("use_dora", "layer_replication", "alora_invocation_tokens") if config.get(key)]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        what = ", ".join(odd) or config.get("peft_type")
        raise Refused(
            f"{label}: an adapter of the type {what} (bias={config.get('bias', 'none')}) is no plain low-rank change; "
            "merge it into its base first (brickyard export --to merged) and give that folder."
        )
    begun = config.get("init_lora_weights")
    if (begun.lower() if isinstance(begun, str) else begun) not in _KEEPS_BASE:
        raise Refused(
            f"{label}: an adapter with init_lora_weights={begun!r} was trained beside a base that this start changes, "
            "so its product is no change of the base itself. Convert it to a plain LoRA (save_pretrained of PEFT with "
            "path_initial_model_for_weight_conversion), or merge it into its base first and give that folder."
        )
    path = plain_file(folder, ADAPTER_WEIGHTS)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(path).items()}
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    if not modules:
        raise BadBrick(f"{path}: no low-rank factors (lora_A) of linear layers; this merges adapters of those only.")
    rest = [name for name in tensors if ".lora_" not in name]
    strange = sorted(n for n in tensors if ".lora_" in n and not n.endswith((".lora_A.weight", ".lora_B.weight")))
    if strange:
        raise Refused(f"{label}: {strange[0]} is no factor of a linear layer; merge the adapter into its base first.")
    base = ground.stored.places
    names = same_names(base.keys() - ground.heads, [*(f"{module}.weight" for module in modules), *rest])
    turned = {own: name for name, own in names.own.items()}
    factors, rows = {}, []
    for module in modules:
        a_rn, b_mr = tensors[f"{module}.lora_A.weight"], tensors.get(f"{module}.lora_B.weight")
        if b_mr is None or a_rn.ndim != 2 or b_mr.ndim != 2:
            raise BadBrick(f"{path}: {module} has no pair of matrices lora_A, lora_B.")
        made = Factors(a_rn, b_mr, _scaling(config, module, len(a_rn)), bool(config.get("fan_in_fan_out")))
        shape = [made.sides[0].shape[0], made.sides[1].shape[1]]
        name = turned.get(f"{module}.weight")
        if name is None or list(base[name][1].shape) != shape:
            rows.append(
                [label, f"{module}.weight", "missing" if name is None else str(base[name][1].shape), str(shape)]
            )
        elif base[name][1].dtype not in FLOATS:
            rows.append([label, name, f"{base[name][1].dtype} {shape}", "a low-rank change"])
        else:
            factors[name] = made
    replaced = [own for own in rest if own in turned]
    if replaced:
        raise Refused(
            f"{label}: the adapter replaces {replaced[0]} of the base as a whole; merge it into its base first."
        )
    heads = {name: tensors[name] for name in rest}
    source = LowRank(label, factors)
    checked = "" if kind == "brick" else "an adapter does not tell its base: only names and shapes were compared"
    own = {name: names.own[name].removesuffix(".weight") for name in factors}
    files = _present(folder, ADAPTER_WEIGHTS, ADAPTER, BRICK)
    return Input(label, spec, kind, source, heads, config, own, files, checked), rows


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """Return the factor of B A, as PEFT computes it: alpha / r, or alpha / sqrt(r) with rslora; patterns go first."""
    given = config.get("lora_alpha")
    alpha = _PEFT_ALPHA if given is None else float(given)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
