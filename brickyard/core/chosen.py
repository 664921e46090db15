"""What the methods of an arm decide by the training rows before training: options, first weights, rows of epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from brickyard.core import registry
from brickyard.core.answers import Examples
from brickyard.core.arm import Arm, Piece
from brickyard.core.attached import Attached
from brickyard.core.build import resolve
from brickyard.core.curriculum import Curriculum
from brickyard.core.errors import Refused

if TYPE_CHECKING:
    from brickyard.core.trial import Prepared


def settle(ready: Prepared) -> tuple[Prepared, dict[str, Any]]:
    """Let the methods of an arm choose the options that they were asked to choose from the training rows.

    Returns the setting with these options written into its arm, and method -> report of what was chosen and why.
    """
    options, reports = chosen_by(ready, "choose", ready)
    return with_options(ready, options), reports


def chosen_by(ready: Prepared, function: str, *given: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Call `function(config, *given)` of the arm's methods that have it: method -> options, and method -> the rest."""
    options: dict[str, dict[str, Any]] = {}
    rest: dict[str, Any] = {}
    for name, config in ready.plan.configs.items():
        call = getattr(registry.load(name), function, None)
        if call is not None and (found := call(config, *given)) is not None:
            options[name], rest[name] = found
    return options, rest


def initialise(ready: Prepared, attached: Attached) -> dict[str, Any]:
    """Let the arm's tuner, then its start, set the first weights; method -> report, with its seconds."""
    reports = {}
    for name in (ready.plan.tuner, ready.plan.start):
        call = getattr(registry.load(name), "initialise", None) if name else None
        if name and call and (report := call(ready.plan.configs[name], ready, attached)):
            reports[name] = report
    return reports


def with_options(ready: Prepared, options: dict[str, dict[str, Any]]) -> Prepared:
    """Return the same with `options` written into the arm."""
    if not options:
        return ready
    pieces = (Piece(p.name, {**p.options, **options.get(p.name, {})}) for p in ready.plan.arm.pieces)
    plan = resolve(Arm(tuple(pieces), ready.plan.arm.training), ready.task)
    return replace(ready, plan=plan)


def curriculum_of(ready: Prepared, sets: Mapping[str, Examples], attached: Attached | None = None) -> Curriculum | None:
    """Return the curriculum that the arm names, prepared on the rows it will train on (`sets`, see `examples`).

    A tuner may bring one of its own for `attached`; Refused where the arm names another.
    """
    name, tuner = ready.plan.data, ready.plan.tuner
    make = getattr(registry.load(name), "curriculum", None) if name else None
    own = getattr(registry.load(tuner), "curriculum", None) if tuner and attached is not None else None
    brought = None
    if own and tuner and attached is not None:
        brought = own(ready.plan.configs[tuner], ready, sets, ready.device, attached.model)
    if make and brought:
        raise Refused(f"{tuner} decides itself which rows an epoch holds; leave {name} out.")
    return make(ready.plan.configs[name], ready, sets, ready.device) if name and make else brought


def joined_by(ready: Prepared, attached: Attached) -> Any:
    """Return the callback by which the arm's data piece brings rows of its own into the model, or None."""
    name = ready.plan.data
    make = getattr(registry.load(name), "join", None) if name else None
    return make(ready.plan.configs[name], ready, attached.model) if name and make else None
