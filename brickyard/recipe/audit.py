"""The verb `audit` of a recipe: one method on a base, and on it beside each brick or other model that a step names.

What was found of a pair is kept by the contents of both, so one more brick costs one more audit, and a step that was
interrupted goes on behind its last pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from brickyard import auditing
from brickyard.core.arm import Arm, Piece, parse
from brickyard.core.errors import BrickyardError
from brickyard.core.files import read_json, write_json
from brickyard.core.registry import code_digest
from brickyard.recipe.contents import digest_of
from brickyard.recipe.steps import Step
from brickyard.recipe.work import Thing, Work, read_as


def check(work: Work, step: Step) -> None:
    """Raise UsageError where the method does not take what the step names beside the base, or a file is missing."""
    kinds = []
    for value in step.options.get("brick") or []:
        inside = value.startswith("$")
        kinds.append(
            work.recipe.steps[value[1:]].leaves if inside else work.outside[read_as(step, "brick"), value].kind
        )
    try:
        auditing.check_beside(_piece(step).name, kinds)
    except BrickyardError as error:
        raise work.recipe.fault(step, "brick", error) from None
    for option, path in _paths(work, step).items():
        if not path.is_file():
            raise work.recipe.fault(step, step.verb, f"{option}={path}: no such file.")


def files(work: Work, step: Step) -> dict[str, str]:
    """Return the digests of the files that the method's options name."""
    return {option: work.hashes.file(path) for option, path in _paths(work, step).items()}


def perform(work: Work, step: Step, folder: Path, listen: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Audit every pair; return {"base", "audited": [{"model", "findings"}]}, and "holds" where the method judges.

    `base` and `model` are labels; a step without `brick` has one entry, of the base alone, whose model is None.
    """
    (base,) = work.things(step, "base")
    beside: list[Thing | None] = [*work.things(step, "brick")] or [None]
    audited = []
    for i, thing in enumerate(beside, 1):
        listen({"event": "progress", "said": f"{i} of {len(beside)}"})
        audited.append({"model": thing.label if thing else None, "findings": _findings(work, step, base, thing)})
    verdicts = [one["findings"]["holds"] for one in audited if "holds" in one["findings"]]
    found = {"base": base.label, "audited": audited}
    return {**found, "holds": _together(verdicts)} if verdicts else found


def _together(verdicts: list[Any]) -> Any:
    """Return False where one verdict is, True where all are, else the first that is neither."""
    return False if False in verdicts else next((one for one in verdicts if one is not True), True)


def _findings(work: Work, step: Step, base: Thing, beside: Thing | None) -> dict[str, Any]:
    """Audit one pair, or find it audited: what is known lies in the folder `cells`."""
    (data,), options = work.things(step, "data"), step.options
    read = [[thing.kind, thing.digest] for thing in (base, beside, data) if thing is not None]
    plain = {key: options.get(key) for key in ("audit", "force", "device")}
    path = work.folder / "cells" / f"{digest_of([plain, read, files(work, step), code_digest()])[:24]}.json"
    if not path.is_file():
        piece = _piece(step)
        named = {option: str(place) for option, place in _paths(work, step).items()}
        found = auditing.audit(
            str(Arm((Piece(piece.name, {**piece.options, **named}),))),
            base=base.spec,
            brick=beside.spec if beside else None,
            data=data.spec,
            force=options["force"],
            device=options.get("device"),
            trust_remote_code=work.trust_remote_code,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, _spelled(found))
    return read_json(path)


def _spelled(value: Any) -> Any:
    """Return findings with NaN and infinity, which JSON does not have, as words."""
    if isinstance(value, Mapping):
        return {key: _spelled(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _piece(step: Step) -> Piece:
    return parse(step.options["audit"]).pieces[0]


def _paths(work: Work, step: Step) -> dict[str, Path]:
    """Return the files that the method's options name, meant from the recipe's own folder."""
    piece = _piece(step)
    given = {option: piece.options[option] for option in auditing.wants(piece.name).files if piece.options.get(option)}
    return {option: Path(work.recipe.outside(str(value))) for option, value in given.items()}
