"""What the methods of an arm decide by the training rows before training: options, first weights, rows of epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from brickyard.core import registry
from brickyard.core.answers import Examples
from brickyard.core.arm import Arm, Piece
from brickyard.core.attached import Attached
from brickyard.core.batches import encode
from brickyard.core.build import resolve
from brickyard.core.curriculum import Curriculum
from brickyard.core.data import read_data
from brickyard.core.encoded import IGNORED
from brickyard.core.errors import Refused, UsageError
from brickyard.core.objective import WithColumns
from brickyard.core.split import Split

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
    """Let the arm's tuner, its head, then its start set the first weights; method -> report, with its seconds."""
    reports = {}
    for name in (ready.plan.tuner, ready.plan.head, ready.plan.start):
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


def with_unlabelled(ready: Prepared, **encoding: Any) -> Prepared:
    """Put rows without labels behind train's rows, where the arm's objective learns from them (`Plan.unlabelled`).

    They are the rows of train that shots or train_rows left out, or the train rows of the data set that the objective's
    option `unlabelled` names. Their labels are replaced by IGNORED here, in the data as in the encoded rows, so that no
    method ever sees one. `encoding`: keywords of `batches.encode`. UsageError where there are no such rows.
    """
    wanted, name = ready.plan.unlabelled, ready.plan.objective
    if wanted is None or "train" not in ready.encoded:
        return ready
    if ready.plan.data is not None:
        raise Refused(f"{ready.plan.data} orders rows by their labels, which most rows of {name} do not have.")
    train = ready.data.splits["train"]
    if wanted:
        given = read_data(wanted, need=(), labelled=False)
        if "train" not in given.splits or given.input != ready.task.input:
            raise UsageError(
                f"{name}: unlabelled={wanted!r} must hold a split train of {ready.task.input}; it has "
                f"{', '.join(given.splits) or 'no split'} of {given.input}."
            )
        more = given.splits["train"]
    else:
        more = train.take(np.setdiff1d(np.arange(len(train)), ready.train_index))
    if not len(more):
        raise UsageError(
            f"{name}: no unlabelled rows: every row of train is used with its label. Give {name}:unlabelled=DATA, or "
            "fewer labelled rows by --shots or --train-rows."
        )
    few, labels = train.take(ready.train_index), ready.encoded["train"].labels.tolist()
    inputs = {column: [*few[column], *more[column]] for column in more.columns if column != "label"}
    rows = Split({**inputs, "label": [*labels, *[IGNORED] * len(more)]})
    return replace(
        ready,
        data=replace(ready.data, splits={**ready.data.splits, "train": rows}),
        encoded={**ready.encoded, "train": encode(rows, ready.base, ready.task, **encoding)},
        train_index=np.arange(len(rows)),
    )


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


def refuse_unaccounted(ready: Prepared, chosen: Mapping[str, Any], joined: Any) -> None:
    """Refuse decisions by the rows beside a private step: no account of what its weights tell covers them."""
    step = ready.plan.step
    if step is None or registry.find(step).record.family != "private":
        return
    # A start begins with another run's modules, whatever that cost.
    deciding = [name for name in chosen if name != ready.plan.start]
    if joined is not None and ready.plan.data:
        deciding.append(ready.plan.data)
    if deciding:
        raise Refused(
            f"{' and '.join(deciding)} looks at the training rows before or beside training, which the epsilon of "
            f"{step} does not cover. Fix what it would choose, or leave it out."
        )


def with_prepared(
    ready: Prepared, rows: Examples, *, probing: bool = False
) -> tuple[Examples, dict[str, Any], dict[str, Any]]:
    """Return train's rows with what the arm's objective prepares for them, its cost, and its report.

    A probe, which has but a few of the rows, takes the objective's `stand_in` where it has one.
    """
    module = registry.load(ready.plan.objective) if ready.plan.objective else None
    prepare_rows = (probing and getattr(module, "stand_in", None)) or getattr(module, "prepare", None)
    if prepare_rows is None:
        return rows, {}, {}
    assert ready.plan.objective is not None
    columns = prepare_rows(ready.plan.configs[ready.plan.objective], ready)
    return WithColumns(rows, columns), {"prepare_seconds": columns.seconds}, columns.report
