"""`brickyard merge`: combine models fine-tuned from one base, as weights or, where that is exact, as an adapter.

Nothing here imports transformers unless bricks or data are given, so that full checkpoints of any size are merged in
the memory of a few buffers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.errors import Changed, Refused, UsageError
from brickyard.core.files import write_json
from brickyard.merge._engine import SHARD, Edit, Merge, Rule
from brickyard.merge._from_data import OfData
from brickyard.merging.files import REQUEST, request_of, unscored, write_adapter, write_model
from brickyard.merging.inputs import MANIFEST, Ground, Input, open_ground, open_inputs
from brickyard.merging.search import Asked, asked, search

FORMS = ("auto", "model", "adapter")
SCHEMA = 1


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

    A run that was killed and is called again goes on: meanwhile `OUT.merging` holds the complete shards, and a merge
    that is written but was not scored yet is scored.

    Raises Refused with a table of what does not fit, WrongBase, NotFinite naming the tensor, NoEffect where an input or
    the merge changes nothing, DiskFull, Changed where the folder's unfinished merge is another one.
    """
    folder = Path(out)
    begun = unscored(folder, MANIFEST) if data else None
    _assert_new(folder, begun)
    wanted = want(arm, bricks=len(bricks), data=len(data))
    wanted.check(len(bricks))
    prepared = prepare(
        [wanted],
        base=base,
        bricks=bricks,
        data=data,
        form=form,
        dtype=dtype,
        heads=heads,
        force=force,
        device=device,
        reading={"task": task, "metric": metric, "max_length": max_length},
        audit=audit,
        trust_remote_code=trust_remote_code,
    )
    if prepared.score is None:
        _assert_new(folder, None)
        return carry_out(wanted, prepared, folder, threads=threads, shard_bytes=shard_bytes)
    said = {"arm": wanted.arm, "base": base, "form": form, "dtype": dtype, "force": force, "shards": shard_bytes}
    aligned = None if prepared.aligned is None else prepared.aligned.about
    request = request_of(prepared.ground, prepared.inputs, {**said, **prepared.reading, "alignment": aligned})
    if begun is None:
        begun = carry_out(wanted, prepared, folder, threads=threads, shard_bytes=shard_bytes, request=request)
    elif begun[REQUEST] != request:
        raise Changed(
            f"{folder} holds a merge of other inputs, data or code that was not scored yet; give a new --out."
        )
    shutil.rmtree(folder.with_name(f"{folder.name}.merging"), ignore_errors=True)  # left by a kill just after the end
    result = {key: value for key, value in begun.items() if key != REQUEST} | {"scores": prepared.score(folder)}
    write_json(folder / MANIFEST, result)
    return result


@dataclass(frozen=True)
class Wanted:
    """An arm of merges: its recipe, and the strength that is left to a search, if any."""

    arm: str
    recipe: Recipe
    searched: Asked | None

    def check(self, bricks: int) -> None:
        """Raise UsageError or NoEffect where the recipe does not take so many inputs, or would change nothing."""
        for part in (self.recipe.rule, *self.recipe.edits):
            part.check(bricks)


@dataclass(frozen=True)
class Prepared:
    """Inputs and tasks, opened and checked once for all merges of them.

    score: the table of a merge in a folder; None without data. aligned: what a merge of independent models found.
    reading: how the data were read, and which they are: a killed merge goes on only with the same.
    """

    ground: Ground
    inputs: list[Input]
    columns: list[Any]
    score: Callable[[Path], dict[str, Any]] | None
    aligned: Any
    form: str
    dtype: str | None
    device: str | None
    force: bool
    reading: dict[str, Any]


def want(arm: str, *, bricks: int, data: int) -> Wanted:
    """Read an arm; UsageError where it asks for data sets that were not given."""
    searched = asked(arm)
    recipe = resolve(arm if searched is None else searched.at(searched.grid[0]))
    if searched is not None and not data:
        raise UsageError(
            f"{arm!r}: {searched.name} is chosen on the validation rows of the tasks; give one --data a task, or fix "
            f"the strength, as {searched.at(searched.grid[0])!r}."
        )
    if isinstance(recipe.rule, OfData) and data != bricks:
        raise UsageError(
            f"{arm!r} reads unlabelled train rows of every input's own task: {bricks} inputs and {data} data "
            "sets were given; give one --data for each of the --bricks, in their order."
        )
    return Wanted(arm, recipe, searched)


def prepare(
    arms: Sequence[Wanted],
    *,
    base: str,
    bricks: Sequence[str | Path],
    data: Sequence[Any],
    form: str,
    dtype: str | None,
    heads: str,
    force: bool,
    device: str | None,
    reading: dict[str, Any],
    audit: str | None,
    trust_remote_code: bool,
) -> Prepared:
    """Open what all of `arms` read; keywords as in `merge`. An arm that aligns independent models must be alone."""
    if form not in FORMS:
        raise UsageError(f"form={form!r}; expected {', '.join(FORMS)}.")
    if heads not in ("own", "base"):
        raise UsageError(f"heads={heads!r}; expected own or base.")
    attack, specs = _attack(audit, data), list(map(str, bricks))
    ground = open_ground(base, trust_remote_code=trust_remote_code)
    alone = next((wanted for wanted in arms if wanted.recipe.alignment is not None), None)
    if alone is not None:
        from brickyard.merging.aligned import open_aligned

        if len(arms) > 1:
            raise UsageError(f"{alone.arm!r} aligns independent models, which no other arm takes; merge it by itself.")
        if form == "adapter":
            raise Refused(f"{alone.recipe.text} changes all weights, which no adapter holds; leave out --as.")
        mixed = dtype is not None
        aligned = open_aligned(alone.recipe.alignment, ground, specs, data, reading, force, device, mixed=mixed)
        if alone.searched is not None or attack is not None:
            raise UsageError(
                f"{alone.arm!r} aligns independent models: it takes no strength to search, and no --audit."
            )
        found = aligned.ground, aligned.inputs, [], aligned.scorer(), aligned
        return Prepared(*found, form, dtype, device, force, dict(reading))
    inputs = open_inputs(specs, ground, mixed=dtype is not None, force=force)
    for wanted in arms:
        _as_adapter(form, wanted.recipe, inputs)
    columns: list[Any] = []
    score: Callable[[Path], dict[str, Any]] | None = None
    if data:
        from brickyard.merging.scores import columns_of
        from brickyard.merging.scores import score as score_all

        needed = {
            "validation": any(wanted.searched is not None for wanted in arms),
            "train": any(isinstance(wanted.recipe.rule, OfData) for wanted in arms),
        }
        splits = [name for name, asked_for in needed.items() if asked_for]
        columns = columns_of(ground, inputs, data, splits=splits, attack=attack, heads=heads, **reading)
        score = partial(score_all, ground, inputs, columns=columns, device=device, attack=attack)
    read = {**reading, "heads": heads, "data": [column.data.fingerprint for column in columns]}
    return Prepared(ground, inputs, columns, score, None, form, dtype, device, force, read)


def carry_out(
    wanted: Wanted,
    prepared: Prepared,
    folder: Path,
    *,
    threads: int | None = None,
    shard_bytes: int = SHARD,
    request: str | None = None,
) -> dict[str, Any]:
    """Write one merge of what was prepared to `folder`; return its merge.json, without scores.

    `request` stands in it until the scores do: see `files.request_of`.
    """
    recipe, ground, inputs, aligned = wanted.recipe, prepared.ground, prepared.inputs, prepared.aligned
    plan = Merge(
        ground.stored,
        [given.source for given in inputs],
        recipe.rule,
        recipe.edits,
        threads or max(2, torch.get_num_threads()),
        ground.heads if aligned is None else frozenset(),
    )
    as_adapter = aligned is None and _as_adapter(prepared.form, recipe, inputs)
    found: dict[str, Any] = {}
    if isinstance(recipe.rule, OfData):
        from brickyard.merging.data import made_of_data

        made, found["data"] = made_of_data(
            recipe.rule, plan, ground, inputs, prepared.columns, arm=wanted.arm, device=prepared.device
        )
        plan = replace(plan, rule=made)
    if wanted.searched is not None:
        found["search"] = search(
            wanted.searched,
            plan,
            _parts(plan),
            ground,
            prepared.columns,
            dtype=prepared.dtype,
            device=prepared.device,
        )
        recipe = resolve(wanted.searched.at(found["search"]["chosen"]))
        rule, edits = _parts(plan)(recipe.text)
        plan = replace(plan, rule=rule, edits=edits)
    about = {
        "schema": SCHEMA,
        "family": "merge",
        "slot": "",
        "arm": recipe.text,
        **found,
        "base": {"spec": ground.spec, "sample": ground.sample},
        "inputs": [{"label": i.label, "spec": i.spec, "kind": i.kind, "checked": i.checked} for i in inputs],
        "forced": prepared.force,
        **({} if aligned is None else {"alignment": aligned.about}),
        **({} if request is None else {REQUEST: request}),
    }
    if as_adapter:
        return write_adapter(plan, ground, inputs, folder, about, prepared.dtype)
    return write_model(plan, ground, inputs, folder, about, prepared.dtype, shard_bytes, prepared.reading)


def _assert_new(folder: Path, begun: dict[str, Any] | None) -> None:
    """Refuse a folder that holds anything but a merge that was killed before it was scored."""
    if begun is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty; give a new folder.")


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
