"""`brickyard merge`: combine models fine-tuned from one base, as weights or, where that is exact, as an adapter.

Nothing here imports transformers unless bricks or data are given, so that full checkpoints of any size are merged in
the memory of a few buffers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.base_files import ADAPTER, CONFIG, INDEX
from brickyard.core.checkpoint import differences
from brickyard.core.errors import Changed, NoEffect, NotFinite, Refused, UsageError
from brickyard.core.files import Lock, complete_folder, plain_file, read_json, write_json, write_tensors
from brickyard.merge._engine import SHARD, Edit, Merge, Rule
from brickyard.merge._from_data import OfData
from brickyard.merge._inputs import Factors, LowRank
from brickyard.merging_inputs import ADAPTER_WEIGHTS, Ground, Input, open_ground, open_inputs
from brickyard.merging_search import asked, search

MANIFEST = "merge.json"
FORMS = ("auto", "model", "adapter")
SCHEMA = 1
_PREFIX = "base_model.model."
_NOT_COPIED = frozenset({CONFIG, INDEX, ADAPTER, "brick.json", "route.json", MANIFEST})
_COPIED = frozenset({".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".codes", ".tiktoken"})


@dataclass(frozen=True)
class Recipe:
    """An arm of merges, resolved: one rule that combines, and the edits that follow it.

    alignment: the config of a rule for independently trained models, which are aligned before they are combined.
    """

    text: str
    rule: Rule
    edits: tuple[Edit, ...]
    alignment: Any = None


def resolve(arm: str) -> Recipe:
    """Read an arm such as `ties:density=0.2 + lines:alpha=0.3`; UsageError where its pieces do not fit.

    The first piece combines; those after it edit what it gives. Edits alone stand behind the average, which of one
    model is that model.
    """
    wanted = parse(arm)
    if wanted.training:
        raise UsageError(f"{arm!r}: nothing trains in a merge; leave out {', '.join(wanted.training)}.")
    rules: list[Rule] = []
    edits: list[Edit] = []
    alignment = None
    for piece in wanted.pieces:
        module = registry.load(registry.find(piece.name, "merge").record.name)
        config = registry.config(piece.name, piece.options)
        if hasattr(module, "edit"):
            edits.append(module.edit(config))
        elif rules or edits:
            raise UsageError(f"{arm!r}: {piece.name} combines models, as the first piece of an arm does; give one.")
        else:
            rules.append(module.rule(config))
            if registry.find(piece.name).record.ancestry == "independent":
                alignment = config
    if not rules:
        rules.append(registry.load("average").rule(registry.config("average", {})))
    return Recipe(str(wanted), rules[0], tuple(edits), alignment)


def merge(
    arm: str,
    *,
    base: str,
    bricks: Sequence[str | Path],
    out: str | Path,
    data: Sequence[Any] = (),
    form: str = "auto",
    dtype: str | None = None,
    heads: str = "own",
    threads: int | None = None,
    shard_bytes: int = SHARD,
    force: bool = False,
    device: str | None = None,
    task: str | None = None,
    metric: str | None = None,
    max_length: int | None = None,
    audit: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge `bricks` (bricks, plain PEFT adapters or full checkpoints) into `out`; return its merge.json.

    Args:
        arm: the merge and its post-edits, such as "ties:density=0.2 + lines:alpha=0.3".
        base: the base that all of them were fine-tuned from: a folder, a hub id, or `embedded:NAME`.
        bricks: the inputs, in the order in which weights by model are given.
        out: a new folder; it becomes a model for any --base, or an adapter. Heads of single inputs lie in OUT/heads.
        data: one data set a task; then every input and the merge are scored on the test rows of each. A strength that
            the arm leaves to a search, as "ties:scale=search", is chosen on their validation rows. Methods of data
            (fisher, regmean) read train rows of every input's task without their labels; a merge of independently
            trained models (cca-merge) takes one set, and compares features on its training rows.
        form: "model" writes weights, "adapter" an adapter; "auto" an adapter where all inputs are LoRA and the rule is
            a weighted sum, which is exact: the ranks add up.
        dtype: float32, bfloat16 or float16 for the result, and lets checkpoints differ in it; None: the base's own.
        heads: "own": each task is read through its brick's head; "base": through one fitted on the base's states.
        threads: workers; None: one for each thread that torch uses, at least two, so that reading goes on meanwhile.
        shard_bytes: size of an output file.
        force: skip the checks of ancestry.
        device: where scores are computed; None: an accelerator where there is one.
        task, metric, max_length: how the data are read, as everywhere.
        audit: such as "backdoor:target=0"; what its trigger does to every input and to the merge, on the test rows of
            every task that has the target class.

    A run that was killed and is called again goes on: meanwhile `OUT.merging` holds the complete shards.

    Raises Refused with a table of what does not fit, WrongBase, NotFinite naming the tensor, NoEffect where an input or
    the merge changes nothing, DiskFull, Changed where the folder's unfinished merge is another one.
    """
    folder, wanted = Path(out), asked(arm)
    recipe = resolve(arm if wanted is None else wanted.at(wanted.grid[0]))
    if form not in FORMS:
        raise UsageError(f"form={form!r}; expected {', '.join(FORMS)}.")
    if heads not in ("own", "base"):
        raise UsageError(f"heads={heads!r}; expected own or base.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty; give a new folder.")
    if wanted is not None and not data:
        raise UsageError(
            f"{arm!r}: {wanted.name} is chosen on the validation rows of the tasks; give one --data a task, or fix the "
            f"strength, as {wanted.at(wanted.grid[0])!r}."
        )
    of_data = isinstance(recipe.rule, OfData)
    if of_data and len(data) != len(bricks):
        raise UsageError(
            f"{arm!r} reads unlabelled train rows of every input's own task: {len(bricks)} inputs and {len(data)} data "
            "sets were given; give one --data for each of the --bricks, in their order."
        )
    attack = _attack(audit, data)
    for part in (recipe.rule, *recipe.edits):
        part.check(len(bricks))
    ground = open_ground(base, trust_remote_code=trust_remote_code)
    reading = {"task": task, "metric": metric, "max_length": max_length}
    aligned = None
    if recipe.alignment is not None:
        from brickyard.merging_aligned import open_aligned

        if form == "adapter":
            raise Refused(f"{recipe.text} changes all weights, which no adapter holds; leave out --as.")
        aligned = open_aligned(recipe.alignment, ground, list(map(str, bricks)), data, reading, force, device)
        ground, inputs = aligned.ground, aligned.inputs
    else:
        inputs = open_inputs(list(map(str, bricks)), ground, mixed=dtype is not None, force=force)
    plan = Merge(
        ground.stored,
        [given.source for given in inputs],
        recipe.rule,
        recipe.edits,
        threads or max(2, torch.get_num_threads()),
        ground.heads if aligned is None else frozenset(),
    )
    as_adapter = _as_adapter(form, recipe, inputs)
    columns: list[Any] = []
    score: Callable[[Path], dict[str, Any]] | None = None
    if aligned is not None:
        if wanted is not None or attack is not None:
            raise UsageError(f"{arm!r} aligns independent models: it takes no strength to search, and no --audit.")
        score = aligned.scorer()
    elif data:
        from brickyard.merging_scores import columns_of
        from brickyard.merging_scores import score as score_all

        splits = [name for name, needed in (("validation", wanted), ("train", of_data)) if needed]
        columns = columns_of(ground, inputs, data, splits=splits, attack=attack, heads=heads, **reading)
        score = partial(score_all, ground, inputs, columns=columns, device=device, attack=attack)
    found: dict[str, Any] = {}
    if isinstance(recipe.rule, OfData):
        from brickyard.merging_data import made_of_data

        made, found["data"] = made_of_data(recipe.rule, plan, ground, inputs, columns, arm=arm, device=device)
        plan = replace(plan, rule=made)
    if wanted is not None:
        found["search"] = search(wanted, plan, _parts(plan), ground, columns, dtype=dtype, device=device)
        recipe = resolve(wanted.at(found["search"]["chosen"]))
        rule, edits = _parts(plan)(recipe.text)
        plan = replace(plan, rule=rule, edits=edits)
    about = {
        "schema": SCHEMA,
        "family": "merge",
        "slot": "",
        "arm": recipe.text,
        **found,
        "base": {"spec": ground.spec},
        "inputs": [{"label": i.label, "spec": i.spec, "kind": i.kind, "checked": i.checked} for i in inputs],
        "forced": force,
        **({} if aligned is None else {"alignment": aligned.about}),
    }
    if as_adapter:
        result = _write_adapter(plan, inputs, folder, about)
    else:
        result = _write_model(plan, ground, inputs, folder, about, dtype, shard_bytes)
    if score is not None:
        result["scores"] = score(folder)
        write_json(folder / MANIFEST, result)
    return result


def _attack(audit: str | None, data: Sequence[Any]) -> Any:
    """Return the trigger to look for, None where nobody asked; UsageError for other audits, or without data."""
    if audit is None:
        return None
    pieces = parse(audit).pieces
    if len(pieces) != 1 or pieces[0].name != "backdoor":
        raise UsageError(f"--audit {audit!r}: a merge is audited for a backdoor; write backdoor:target=CLASS.")
    if not data:
        raise UsageError(f"--audit {audit!r} judges on test rows; give one --data a task.")
    return registry.config("backdoor", pieces[0].options)


def _parts(plan: Merge) -> Callable[[str], tuple[Rule, tuple[Edit, ...]]]:
    """Return what reads an arm's rule and edits; a rule that was made of data stays that of `plan`."""

    def read(arm: str) -> tuple[Rule, tuple[Edit, ...]]:
        recipe = resolve(arm)
        return plan.rule if isinstance(recipe.rule, OfData) else recipe.rule, recipe.edits

    return read


def _as_adapter(form: str, recipe: Recipe, inputs: Sequence[Input]) -> bool:
    possible = all(i.is_low_rank for i in inputs) and recipe.rule.coefficients(len(inputs)) is not None
    if form == "adapter" and not possible:
        odd = next((i.label for i in inputs if not i.is_low_rank), None)
        why = f"{odd} is no LoRA adapter" if odd else "its result is no weighted sum, and so of no low rank"
        raise Refused(f"{recipe.text} cannot be written as an adapter: {why}. Leave out --as, or say --as model.")
    return form == "adapter" or (form == "auto" and possible)


def _write_model(
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
        _same_merge(work, {**about, "files": _files(ground, inputs), "dtype": dtype, "shard_bytes": shard_bytes})
        try:
            seen = plan.write(work, dtype=dtype, shard_bytes=shard_bytes)
        except (NoEffect, NotFinite):
            shutil.rmtree(work)  # there is nothing to go on with: the inputs must change
            raise
        scales = seen.pop("scales")
        if not any(scales.values()):
            shutil.rmtree(work)
            raise NoEffect(f"{about['arm']}: every scale is 0, so the merge would be the base itself.")
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


def _files(ground: Ground, inputs: Sequence[Input]) -> dict[str, list[int]]:
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


def _write_adapter(plan: Merge, inputs: Sequence[Input], folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Write a weighted sum of adapters as one PEFT LoRA."""
    scales = plan.scales()
    adapters = [given.source for given in inputs if isinstance(given.source, LowRank)]
    coefficients = plan.rule.coefficients(len(inputs))
    assert coefficients is not None
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
