"""What is known of a recipe's steps before one of them runs: models, bricks and data are opened, arms are built."""

from __future__ import annotations

import itertools
from pathlib import Path

from brickyard import auditing
from brickyard.core import base_files, readers, registry
from brickyard.core.arm import Arm, Piece, parse
from brickyard.core.base_files import ADAPTER, CONFIG
from brickyard.core.brick import MANIFEST
from brickyard.core.build import resolve
from brickyard.core.data import read_data
from brickyard.core.errors import BadBrick, BrickyardError, UsageError
from brickyard.core.files import read_json
from brickyard.merging.merge import resolve as resolve_merge
from brickyard.recipe import audit
from brickyard.recipe.contents import digest_of_rows
from brickyard.recipe.steps import Step
from brickyard.recipe.work import Thing, Work, read_as


def check(work: Work) -> None:
    """Open everything that a recipe names outside of itself, and check every arm; UsageError with the line."""
    sources: dict[str, readers.Source] = {}
    for step in work.recipe.steps.values():
        for name, value in step.inputs():
            if value.startswith("$"):
                continue
            try:
                if (role := read_as(step, name)) == "data":
                    _look_at_rows(work, step, name, value, sources)
                elif (role, value) not in work.outside:
                    work.outside[role, value] = _outside(work, role, value)
            except (BrickyardError, OSError) as error:
                raise work.recipe.fault(step, name, error) from None
        try:
            _check_arm(step)
        except BrickyardError as error:
            raise work.recipe.fault(step, step.verb, error) from None
        if step.verb == "audit":
            audit.check(work, step)


def _outside(work: Work, role: str, value: str) -> Thing:
    spec = work.recipe.outside(value)
    path = Path(spec)
    if role == "brick" and ((path / MANIFEST).is_file() or (path / ADAPTER).is_file()):
        kind = "brick" if (path / MANIFEST).is_file() else "adapter"
        base = read_json(path / MANIFEST)["base"]["spec"] if kind == "brick" else None
        return Thing(kind, spec, work.hashes.digest(path), value, base)
    folder = base_files.locate(spec, trust_remote_code=work.trust_remote_code)
    if not (folder / CONFIG).is_file():
        raise BadBrick(f"{value} holds neither {CONFIG}, {MANIFEST} nor {ADAPTER}; give a model or a brick.")
    return Thing("model", spec, work.hashes.digest(folder), value)


def _look_at_rows(work: Work, step: Step, name: str, value: str, sources: dict[str, readers.Source]) -> None:
    """Read the rows of data from outside as the step will, so that what is wrong with them is known first."""
    spec = work.recipe.outside(value)
    if step.verb == "data":
        place = Path(spec)
        if place.exists():
            work.outside["data", value] = Thing("data", spec, work.hashes.digest(place), value)
            return
    if value not in sources:
        sources[value] = readers.read(spec)
    source = sources[value]
    digest = digest_of_rows(source.splits, source.names)
    work.outside["data", value] = Thing("data", spec, digest, value)
    if step.verb == "data" or name == "text":
        return
    if step.verb == "audit":
        auditing.check_rows(parse(step.options["audit"]).pieces[0].name, source)
        return
    trains = step.verb in ("tune", "grow", "shrink", "compare")
    need = ("train",) if trains or name == "validate" else ("test",)
    labelled, task = step.verb not in ("predict", "verify"), step.options.get("task")
    if name == "validate" and "validation" in source.splits:
        need = ("validation",)
    if labelled and (task is not None or trains):
        read_data(
            source,
            task=task,
            metric=step.options.get("metric"),
            need=need,
            allow_overlap=True,  # how much may overlap is the verb's own judgement
        )
    elif need[0] not in source.splits:
        read_data(source, need=need, labelled=False)


def _check_arm(step: Step) -> None:
    head = step.options[step.verb]
    if step.verb == "tune":
        resolve(parse(head))
    elif step.verb == "compare":
        for text in head:
            resolve(parse(text))
    elif step.verb == "merge":
        for arm in tries(step):
            found = resolve_merge(arm)
            for part in (found.rule, *found.edits):
                part.check(len(step.options["bricks"]))
    elif step.verb in ("grow", "shrink", "data"):
        found = parse(head)
        if len(found.pieces) != 1 or (found.training and step.verb != "grow"):
            raise UsageError(f"{head!r}: {step.verb} takes one method and its own options.")
        registry.config(found.pieces[0].name, found.pieces[0].options)
    elif step.verb == "audit":
        auditing.check_installed(head)


def tries(step: Step) -> list[str]:
    """Return the arms of a merge: its own, or one for each point of the grid that it searches."""
    arm, search = step.options["merge"], step.options.get("search")
    if not search:
        return [arm]
    parsed = parse(arm)
    first, *rest = parsed.pieces
    points = itertools.product(*([(key, value) for value in values] for key, values in search.items()))
    return [str(Arm((Piece(first.name, {**first.options, **dict(p)}), *rest), parsed.training)) for p in points]
