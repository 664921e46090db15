"""What a merge leaves: a model folder, complete or not at all and resumed after a kill, or one PEFT adapter."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brickyard.core.base_files import ADAPTER, CONFIG, INDEX
from brickyard.core.checkpoint import differences
from brickyard.core.errors import Changed, NoEffect, NotFinite, ParityBroken, Refused
from brickyard.core.files import Lock, complete_folder, plain_file, read_json, write_json, write_tensors
from brickyard.core.registry import code_digest
from brickyard.merge._engine import Merge
from brickyard.merge._inputs import Factors, LowRank
from brickyard.merging.inputs import ADAPTER_WEIGHTS, MANIFEST, Ground, Input, open_inputs

REQUEST = "request"  # in a manifest until the scores stand there: the digest of what the folder is made from
_PREFIX = "base_model.model."
_ZERO = "{}: every scale is 0, so the merge would be the base itself."
_NOT_COPIED = frozenset({CONFIG, INDEX, ADAPTER, "brick.json", "route.json", MANIFEST})
# What an input's configuration says of its own modules, or of how its factors began; the merge names its modules, and
# its factors begin nowhere.
_OF_ONE_INPUT = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "target_parameters")
_OF_A_START = ("eva_config", "corda_config", "loftq_config", "lora_ga_config")
_COMPARED = 5  # layers whose products are computed again from the written file
_COPIED = frozenset({".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".codes", ".tiktoken"})


def write_model(
    plan: Merge,
    ground: Ground,
    inputs: Sequence[Input],
    folder: Path,
    about: dict[str, Any],
    dtype: str | None,
    shard_bytes: int,
    reading: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the merged weights as a model folder, complete or not at all.

    `reading` is how the data were read that the merge depends on; a killed merge goes on only with the same.
    """
    work = folder.with_name(f"{folder.name}.merging")
    with Lock(work):
        _same_merge(
            work,
            {
                **about,
                "files": files_of(ground, inputs),
                "dtype": dtype,
                "shard_bytes": shard_bytes,
                "reading": dict(reading),
                "code": code_digest(),
            },
        )
        try:
            seen = plan.write(work, dtype=dtype, shard_bytes=shard_bytes)
        except (NoEffect, NotFinite, Refused):
            shutil.rmtree(work)  # there is nothing to go on with: the inputs must change
            raise
        scales = seen.pop("scales")
        if not any(scales.values()):
            shutil.rmtree(work)
            raise NoEffect(_ZERO.format(about["arm"]))
        shards = seen.pop("shards")
        result = {**about, "form": "model", "dtype": dtype, **_said(plan, scales), **seen}
        with complete_folder(folder) as temporary:
            for name in [*shards, *([INDEX] if len(shards) > 1 else [])]:
                _link(work / name, temporary / name)
            _side_files(ground, temporary, dtype)
            _heads(inputs, temporary)
            write_json(temporary / MANIFEST, result)
    shutil.rmtree(work)
    return result


def files_of(ground: Ground, inputs: Sequence[Input]) -> dict[str, list[int]]:
    """Return what tells the files of a merge from others of the same names: their sizes and times."""
    paths = {path for path, _ in ground.stored.places.values()} | {path for i in inputs for path in i.files}
    paths |= {ground.folder / CONFIG}
    stats = {str(path.resolve()): path.stat() for path in sorted(paths)}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}


def request_of(ground: Ground, inputs: Sequence[Input], said: Mapping[str, Any]) -> str:
    """Return a digest of all that a folder is made from, so that a call knows what it left unfinished."""
    order = [given.spec for given in inputs]
    what = {**said, "inputs": order, "files": files_of(ground, inputs), "code": code_digest()}
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def unscored(folder: Path, manifest: str) -> dict[str, Any] | None:
    """Return what a folder says of itself where a run was killed after it had written it and before its scores."""
    path = folder / manifest
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) and REQUEST in found and "scores" not in found else None


def _same_merge(work: Path, wanted: dict[str, Any]) -> None:
    """Refuse to go on with what another merge has left in `work`."""
    path = work / "started.json"
    if path.is_file():
        changed = differences(read_json(path), wanted)
        if changed:
            lines = "; ".join(f"{key}: was {a!r}, now {b!r}" for key, (a, b) in list(changed.items())[:5])
            raise Changed(f"{work} holds another unfinished merge ({lines}). Delete it, or give another --out.")
    write_json(path, wanted)


def _said(plan: Merge, scales: Mapping[str, float]) -> dict[str, Any]:
    """Return what a report says of the scales: those in use and how many tensors have each, and what edits found."""
    counts: dict[str, int] = {}
    for scale in scales.values():
        counts[f"{scale:.6g}"] = counts.get(f"{scale:.6g}", 0) + 1
    return {"scales": counts, "edits": [edit.about(plan.shapes) for edit in plan.edits]}


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, so that a kill before the end loses nothing; where that cannot be, move it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.move(source, target)


def _side_files(ground: Ground, folder: Path, dtype: str | None) -> None:
    """Write the configuration, and copy the tokenizer's or image processor's files beside it."""
    config = dict(ground.config)
    if dtype is not None:
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
    write_json(folder / CONFIG, config)
    for entry in sorted(os.listdir(ground.folder)):
        if Path(entry).suffix.lower() in _COPIED and entry not in _NOT_COPIED and not (ground.folder / entry).is_dir():
            shutil.copyfile(plain_file(ground.folder, entry), folder / entry)


def file_names(labels: Iterable[str]) -> dict[str, str]:
    """Return a file name without its ending for every label, none twice (in capitals or not): `a b` and `a_b` differ.

    A file system may dislike some characters and take no note of capitals.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in labels:
        plain = re.sub(r"[^\w.-]+", "_", label)
        name, number = plain, 1
        while name.lower() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.lower())
        names[label] = name
    return names


def _heads(inputs: Sequence[Input], folder: Path) -> None:
    """Write each input's own head, which no merge touches."""
    names = file_names(given.label for given in inputs)
    for given in inputs:
        if given.heads:
            (folder / "heads").mkdir(exist_ok=True)
            write_tensors(folder / "heads" / f"{names[given.label]}.safetensors", given.heads)


def concatenated(
    adapters: Sequence[LowRank], coefficients: Sequence[float], scales: Mapping[str, float]
) -> dict[str, Factors]:
    """Return the weighted sum of adapters as one adapter, which is exact: the ranks of a layer add up.

        scale sum_t c_t s_t B_t A_t = [scale c_1 s_1 B_1, ..., scale c_T s_T B_T] [A_1; ...; A_T]

    scales: by the weight's name; only B is scaled. A layer that not all adapters have takes part with those it has.
    """
    out = {}
    for name in sorted({name for adapter in adapters for name in adapter.factors}):
        held = [(a.factors[name], c) for a, c in zip(adapters, coefficients, strict=True) if name in a.factors]
        a_rn = torch.cat([part.a_rn.float() for part, _ in held])
        b_mr = torch.cat([part.b_mr.float() * (part.scaling * c * scales[name]) for part, c in held], dim=1)
        out[name] = Factors(a_rn, b_mr, 1.0, held[0][0].transposed)
    return out


def write_adapter(
    plan: Merge, ground: Ground, inputs: Sequence[Input], folder: Path, about: dict[str, Any], dtype: str | None
) -> dict[str, Any]:
    """Write a weighted sum of adapters as one PEFT LoRA, in float32 or in `dtype`.

    Before it takes its place it is read back, and some layers' products are compared with the sums that they stand
    for: ParityBroken where they differ by more than the rounding to its dtype.
    """
    scales = plan.scales()
    adapters = [given.source for given in inputs if isinstance(given.source, LowRank)]
    coefficients = plan.rule.coefficients(len(inputs))
    assert coefficients is not None
    if not any(scales.values()):
        raise NoEffect(_ZERO.format(about["arm"]))
    for given in adapters:
        for name, factors in given.factors.items():
            if not (factors.a_rn.isfinite().all() and factors.b_mr.isfinite().all()):
                raise NotFinite(f"{given.label}: the factors of {name} hold NaN or infinity; nothing is merged.")
        if not any(f.scaling and bool(f.b_mr.any() and f.a_rn.any()) for f in given.factors.values()):
            raise NoEffect(f"{given.label} changes nothing: its factors or their scaling are zero. Leave it out.")
    factors = concatenated(adapters, coefficients, scales)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    modules = {name: module for given in reversed(inputs) for name, module in given.modules.items()}
    for name, made in factors.items():
        for factor, value in (("A", made.a_rn), ("B", made.b_mr)):
            rounded = value.contiguous() if dtype is None else value.contiguous().to(getattr(torch, dtype))
            if not rounded.isfinite().all():
                raise NotFinite(f"the factors of {name} exceed {dtype or 'float32'}; give another --dtype.")
            tensors[f"{_PREFIX}{modules[name]}.lora_{factor}.weight"] = rounded
        ranks[modules[name]] = len(made.a_rn)
    exactly = {rf"^{re.escape(module)}": rank for module, rank in ranks.items()}
    config = {
        **{key: value for key, value in (inputs[0].config or {}).items() if key not in _OF_A_START},
        **dict.fromkeys(_OF_ONE_INPUT),
        "init_lora_weights": True,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": exactly,
        "alpha_pattern": dict(exactly),
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "inference_mode": True,
        "base_model_name_or_path": about["base"]["spec"],
    }
    with complete_folder(folder) as temporary:
        write_tensors(temporary / ADAPTER_WEIGHTS, tensors)
        write_json(temporary / ADAPTER, config)
        (again,) = open_inputs([str(temporary)], ground, mixed=True, force=True)
        assert isinstance(again.source, LowRank)
        result = {
            **about,
            "form": "adapter",
            "dtype": dtype or "float32",
            **_said(plan, scales),
            "ranks": {"largest": max(ranks.values())},
            "parity": _parity(adapters, coefficients, scales, again.source),
        }
        _heads(inputs, temporary)
        write_json(temporary / MANIFEST, result)
    return result


def _parity(
    adapters: Sequence[LowRank], coefficients: Sequence[float], scales: Mapping[str, float], found: LowRank
) -> dict[str, Any]:
    """Compare some layers' changes in an adapter that was read back with the weighted sums of the inputs' changes.

    A product of factors that are rounded to a dtype differs by at most a few of its roundings of |B| |A|. Returns
    {"layers", "gap", "worst"}: how many were compared, and the largest difference as a share of that size.
    """
    wanted = sorted({name for given in adapters for name in given.factors})
    if missing := sorted(set(wanted) ^ found.factors.keys()):
        raise ParityBroken(f"the written adapter and its inputs differ in their layers: {missing[0]} is in one only.")
    some = {wanted[round(i * (len(wanted) - 1) / (_COMPARED - 1))] for i in range(_COMPARED)}
    gaps = {}
    for name in sorted(some):
        held = found.factors[name]
        made = _product(held, held.scaling)
        total, size = torch.zeros_like(made), torch.zeros_like(made)
        for given, coefficient in zip(adapters, coefficients, strict=True):
            if name in given.factors:
                factors = given.factors[name]
                factor = factors.scaling * coefficient * scales[name]
                total += _product(factors, factor)
                size += _product(factors, factor, magnitudes=True)
        gaps[name] = float((made - total).abs().max() / size.max().clamp_min(torch.finfo(torch.float64).tiny))
        limit = 4 * torch.finfo(held.b_mr.dtype).eps
        if not gaps[name] <= limit:
            raise ParityBroken(
                f"the written adapter does not make the change that was merged: in {name} it differs by "
                f"{gaps[name]:.3g} of its size, expected at most {limit:.3g}. Nothing is kept; give --as model, or "
                "another --dtype."
            )
    worst = max(gaps, key=lambda name: gaps[name])
    return {"layers": len(gaps), "gap": gaps[worst], "worst": worst}


def _product(factors: Factors, scaling: float, *, magnitudes: bool = False) -> Tensor:
    """Return scaling B A as the weight is stored, in float64; of `magnitudes` |scaling| |B| |A|."""
    left, right = (side.double().abs() if magnitudes else side.double() for side in factors.sides)
    return (left @ right).mul_(abs(scaling) if magnitudes else scaling)
