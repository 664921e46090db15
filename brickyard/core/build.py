"""From an arm to a model ready to train: resolve its pieces, check that they fit, attach them in order."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from brickyard.core import registry
from brickyard.core.arm import Arm
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.base import Base, HeadedModel
from brickyard.core.errors import Refused, UsageError
from brickyard.core.loop import Training
from brickyard.core.objective import Objective
from brickyard.core.task import Task
from brickyard.core.template import Template

SLOTS = ("tuner", "head", "objective", "data", "memory", "start")
PREFERENCE = "dpo"  # the objective of preference pairs, where an arm names none


@dataclass(frozen=True)
class Plan:
    """An arm whose methods and options were found and checked, before anything is loaded."""

    arm: Arm
    tuner: str | None
    head: str | None
    objective: str | None
    data: str | None
    memory: str | None
    start: str | None
    configs: dict[str, Any]
    training: dict[str, Any]

    @property
    def template(self) -> Template | None:
        """The sentence that the head wants around every text."""
        pattern = getattr(self.configs.get(self.head or ""), "template", None)
        return None if pattern is None else Template(pattern)

    @property
    def method(self) -> str:
        """The piece that gives the arm its name: the tuner, else the head."""
        return self.tuner or self.head or ""


def resolve(arm: Arm, task: Task | None = None) -> Plan:
    """Check an arm against the registry; Refused when its pieces do not fit each other or the task."""
    slots: dict[str, str] = {}
    configs: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for piece in arm.pieces:
        record = registry.find(piece.name).record
        if record.slot not in SLOTS:
            raise UsageError(
                f"{piece.name} is a {record.family} method; an arm is made of a tuner, a head, an objective, a "
                "curriculum and a way to save memory."
            )
        if record.slot in slots:
            both = {"data": "curriculum", "memory": "way to save memory"}.get(record.slot, record.slot)
            raise Refused(f"{slots[record.slot]} and {piece.name} are both a {both}; an arm takes one of each.")
        if task is not None and task.kind not in record.needs:
            because = f": {record.because}" if record.because else ""
            raise Refused(f"{piece.name} works on {', '.join(record.needs)}; this task is {task.kind}{because}.")
        slots[record.slot] = piece.name
        configs[piece.name] = registry.config(piece.name, piece.options)
    if not slots.keys() & {"tuner", "head"}:
        other = next(iter(slots.values()))
        raise Refused(f"{arm} trains nothing; {other} stands beside a tuner or a head: 'full + {other}'.")
    if "memory" in slots and "tuner" not in slots:
        raise Refused(f"{arm}: a head alone keeps next to nothing; {slots['memory']} stands beside a tuner.")
    if "start" in slots and "tuner" not in slots:
        raise Refused(f"{arm}: a head alone has nothing to begin with; {slots['start']} stands beside a tuner.")
    # The tuner's learning rate rules the arm: it moves the backbone, which is the more delicate part.
    if "tuner" in slots and getattr(configs.get(slots.get("head", "")), "plus", False):
        raise Refused(
            f"{slots['head']}:plus=true changes the backbone itself and cannot stand beside {slots['tuner']}."
        )
    if task is not None and task.kind == "preference" and "objective" not in slots:
        slots["objective"], configs[PREFERENCE] = PREFERENCE, registry.config(PREFERENCE, {})
    standing = registry.find(slots["tuner"]).record.head if "tuner" in slots and "head" not in slots else ""
    if standing and task is not None and not task.generative:
        slots["head"], configs[standing] = standing, registry.config(standing, {})
    for slot in ("data", "objective", "head", "tuner"):
        if slot in slots:
            training.update(registry.find(slots[slot]).record.training)
    training.update(arm.training)
    found = {slot: slots.get(slot) for slot in SLOTS}
    return Plan(arm=arm, configs=configs, training=training, **found)


def training_of(plan: Plan, given: dict[str, Any], defaults: Training) -> Training:
    """Merge: the defaults, then what the methods prefer, then what the command says, then what the arm fixes."""
    return replace(
        defaults, **{**plan.training, **{k: v for k, v in given.items() if v is not None}, **plan.arm.training}
    )


def build(
    plan: Plan, base: Base, task: Task, *, seed: int, attention: str = "sdpa", objective: bool = True
) -> Attached:
    """Open the base for the task and attach the arm's head and tuner; everything random is drawn from `seed`.

    `objective=False` leaves out the arm's objective, which only training needs (it may hold a copy of the base).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if plan.head is None:
            model: nn.Module = base.model(task, seed=seed, attention=attention)
        else:
            make = registry.load(plan.head).head
            given = {"base": base} if "base" in inspect.signature(make).parameters else {}
            head = make(plan.configs[plan.head], task, base.width, **given)
            model = base.headed(head, attention=attention)
        torch.manual_seed(seed)
        if plan.tuner is None:
            attached = _head_only(plan, model, task)
        else:
            attached = registry.load(plan.tuner).attach(model, plan.configs[plan.tuner], task)
        if objective and plan.objective is not None:
            module, config = registry.load(plan.objective), plan.configs[plan.objective]
            attached.objective = Objective(module, config, attached, generative=task.generative)
        if plan.memory is not None:
            attached.convert = partial(registry.load(plan.memory).convert, config=plan.configs[plan.memory])
        return attached


def _head_only(plan: Plan, model: nn.Module, task: Task) -> Attached:
    assert plan.head is not None and isinstance(model, HeadedModel)
    module, config = registry.load(plan.head), plan.configs[plan.head]
    # A head may bring modules that sit inside the frozen backbone (moment-probing's recalibration).
    if getattr(config, "plus", False):
        return module.attach(model, config, task)
    names = [name for name, _ in model.named_parameters() if name.startswith("head.")]
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, names, matched={"head": names}, no_decay=flat)
    attached.frozen_states = not getattr(model.head, "reads_ids", False)
    return attached
