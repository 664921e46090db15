"""What a merge leaves: a model folder, complete or not at all and resumed after a kill, or one PEFT adapter."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brickyard.core.base_files import ADAPTER, CONFIG, INDEX
from brickyard.core.checkpoint import differences
from brickyard.core.errors import Changed, NoEffect, NotFinite
from brickyard.core.files import Lock, complete_folder, plain_file, read_json, write_json, write_tensors
from brickyard.merge._engine import Merge
from brickyard.merge._inputs import Factors, LowRank
from brickyard.merging_inputs import ADAPTER_WEIGHTS, Ground, Input

MANIFEST = "merge.json"
_PREFIX = "base_model.model."
_ZERO = "{}: every scale is 0, so the merge would be the base itself."
_NOT_COPIED = frozenset({CONFIG, INDEX, ADAPTER, "brick.json", "route.json", MANIFEST})
_COPIED = frozenset({".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".codes", ".tiktoken"})


def write_model(
    plan: Merge,
    ground: Ground,
    inputs: Sequence[Input],
    folder: Path,
    about: dict[str, Any],
    dtype: str | None,
    shard_bytes: int,
) -> dict[str, Any]:
    """Write the merged weights as a model folder, complete or not at all."""
    work = folder.with_name(f"{folder.name}.merging")
    with Lock(work):
        _same_merge(work, {**about, "files": files_of(ground, inputs), "dtype": dtype, "shard_bytes": shard_bytes})
        try:
            seen = plan.write(work, dtype=dtype, shard_bytes=shard_bytes)
        except (NoEffect, NotFinite):
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
    stats = {str(path.resolve()): path.stat() for path in sorted(paths)}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()}


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


def _heads(inputs: Sequence[Input], folder: Path) -> None:
    """Write each input's own head, which no merge touches."""
    for given in inputs:
        if given.heads:
            (folder / "heads").mkdir(exist_ok=True)
            name = re.sub(r"[^\w.-]+", "_", given.label)
            write_tensors(folder / "heads" / f"{name}.safetensors", given.heads)


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


def write_adapter(plan: Merge, inputs: Sequence[Input], folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Write a weighted sum of adapters as one PEFT LoRA."""
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
        if not any(bool(factors.b_mr.any() and factors.a_rn.any()) for factors in given.factors.values()):
            raise NoEffect(f"{given.label} changes nothing: its factors are zero. Leave it out.")
    factors = concatenated(adapters, coefficients, scales)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    modules = {name: module for given in reversed(inputs) for name, module in given.modules.items()}
    for name, made in factors.items():
        tensors[f"{_PREFIX}{modules[name]}.lora_A.weight"] = made.a_rn.contiguous()
        tensors[f"{_PREFIX}{modules[name]}.lora_B.weight"] = made.b_mr.contiguous()
        ranks[modules[name]] = len(made.a_rn)
    exactly = {rf"^{re.escape(module)}": rank for module, rank in ranks.items()}
    config = {
        **(inputs[0].config or {}),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": exactly,
        "alpha_pattern": dict(exactly),
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "use_rslora": False,
        "inference_mode": True,
        "base_model_name_or_path": about["base"]["spec"],
    }
    result = {**about, "form": "adapter", **_said(plan, scales), "ranks": {"largest": max(ranks.values())}}
    with complete_folder(folder) as temporary:
        write_tensors(temporary / ADAPTER_WEIGHTS, tensors)
        write_json(temporary / ADAPTER, config)
        _heads(inputs, temporary)
        write_json(temporary / MANIFEST, result)
    return result
