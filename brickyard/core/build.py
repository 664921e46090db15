"""From an arm to a model ready to train: resolve its pieces, check that they fit, attach them in order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
from brickyard.core.loop import Backprop, Step, Training
from brickyard.core.method import FOREIGN_TASKS, Record
from brickyard.core.objective import Objective
from brickyard.core.structure import put_on
from brickyard.core.task import Task
from brickyard.core.template import Template

SLOTS = ("tuner", "head", "step", "objective", "data", "memory", "structure", "start")
# Whose training settings count more, the last most: the tuner's learning rate rules the arm, for it moves the backbone;
# but what a rate means, the step says.
RULING = ("data", "objective", "head", "tuner", "step")
PREFERENCE = "dpo"  # the objective of preference pairs, where an arm names none
BLOCK_TOKENS = (
    8192  # of a batch of packed text where nobody says how many blocks it has: its logits are a vocabulary wide
)


@dataclass(frozen=True)
class Plan:
    """An arm whose methods and options were found and checked, before anything is loaded."""

    arm: Arm
    tuner: str | None
    head: str | None
    step: str | None
    objective: str | None
    data: str | None
    memory: str | None
    structure: str | None
    start: str | None
    configs: dict[str, Any]
    training: dict[str, Any]

    @property
    def template(self) -> Template | None:
        """The sentence that the head wants around every text."""
        pattern = getattr(self.configs.get(self.head or ""), "template", None)
        return None if pattern is None else Template(pattern)

    @property
    def unlabelled(self) -> str | None:
        """Where the objective's rows without labels come from: a data set, or "" for the rows of train left out.

        None where it wants none.
        """
        return getattr(self.configs.get(self.objective or ""), "unlabelled", None)

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
                f"{piece.name} is a {record.family} method; an arm is made of a tuner, a head, a step, an objective, "
                "a curriculum and a way to run the layers in training."
            )
        if record.slot in slots:
            both = {
                "data": "curriculum",
                "memory": "way to run the layers in training",
                "structure": "structure of the layers",
            }.get(record.slot, record.slot)
            raise Refused(f"{slots[record.slot]} and {piece.name} are both a {both}; an arm takes one of each.")
        if task is not None and task.kind not in record.needs:
            raise Refused(
                f"{piece.name} works on {', '.join(record.needs)}; this task is {task.kind}{_because(record, task)}."
            )
        slots[record.slot] = piece.name
        configs[piece.name] = registry.config(piece.name, piece.options)
    if not slots.keys() & {"tuner", "head"}:
        other = next(iter(slots.values()))
        raise Refused(f"{arm} trains nothing; {other} stands beside a tuner or a head: 'full + {other}'.")
    for slot in ("memory", "structure"):
        if slot in slots and "tuner" not in slots:
            raise Refused(f"{arm}: a head alone trains no layers below it; {slots[slot]} stands beside a tuner.")
    if {"memory", "step"} <= slots.keys() and not getattr(configs[slots["step"]], "backward", True):
        raise Refused(
            f"{arm}: {slots['step']} runs no backward pass, for which {slots['memory']} changes how layers train; it "
            f"would have no effect. Leave out {slots['memory']}, or train by backpropagation."
        )
    if "start" in slots and "tuner" not in slots:
        raise Refused(f"{arm}: a head alone has nothing to begin with; {slots['start']} stands beside a tuner.")
    if "tuner" in slots and getattr(configs.get(slots.get("head", "")), "plus", False):
        raise Refused(
            f"{slots['head']}:plus=true changes the backbone itself and cannot stand beside {slots['tuner']}."
        )
    if "head" in slots and hasattr(registry.load(slots["head"]), "step"):
        beside = [slots[slot] for slot in ("tuner", "step", "objective", "data") if slot in slots]
        if beside:
            raise Refused(f"{slots['head']} trains its head alone, in steps of its own; leave out {', '.join(beside)}.")
        slots["step"] = slots["head"]
    if task is not None and task.kind == "preference" and "objective" not in slots:
        slots["objective"], configs[PREFERENCE] = PREFERENCE, registry.config(PREFERENCE, {})
    standing = registry.find(slots["tuner"]).record.head if "tuner" in slots and "head" not in slots else ""
    if standing and task is not None and not task.generative:
        slots["head"], configs[standing] = standing, registry.config(standing, {})
    for slot in RULING:
        if slot in slots:
            training.update(registry.find(slots[slot]).record.training)
    if (times := times_lr({slot: registry.find(name).record for slot, name in slots.items()})) != 1:
        training["lr"] = multiplied(training.get("lr", Training().lr), times)
    training.update(arm.training)
    found = {slot: slots.get(slot) for slot in SLOTS}
    return Plan(arm=arm, configs=configs, training=training, **found)


def times_lr(records: Mapping[str, Record]) -> float:
    """Return what the step multiplies the tuner's learning rates by; 1 where another piece says them. By slot."""
    step = records.get("step")
    return step.times_lr if step is not None and "tuner" in records and "lr" not in step.training else 1.0


def multiplied(lr: float, times: float) -> float:
    """Return lr * times as a person would write it, without the last binary digits."""
    return float(f"{lr * times:.6g}")


def _because(record: Record, task: Task) -> str:
    """Say why a method does not work on a task and, where no base reads its inputs, which methods do."""
    if task.kind not in FOREIGN_TASKS:
        return f": {record.because}" if record.because else ""
    able = [entry.record.name for entry in registry.records() if task.kind in entry.record.needs]
    return f": no base reads {task.input} by itself; methods that turn them into what one reads: {', '.join(able)}"


def for_blocks(longest: int) -> Training:
    """Return the defaults for text packed into blocks of up to `longest` tokens: of long ones fewer make a batch."""
    default = Training()
    return replace(default, batch=max(1, min(default.batch, BLOCK_TOKENS // longest)))


def training_of(plan: Plan, given: dict[str, Any], defaults: Training) -> Training:
    """Merge: the defaults, then what the methods prefer, then what the command says, then what the arm fixes."""
    return replace(
        defaults, **{**plan.training, **{k: v for k, v in given.items() if v is not None}, **plan.arm.training}
    )


def build(
    plan: Plan, base: Base, task: Task, *, seed: int, attention: str = "sdpa", objective: bool = True
) -> Attached:
    """Open the base for the task and attach the arm's head and tuner; everything random is drawn from `seed`.

    `objective=False` leaves out the arm's objective, which only training needs (it may hold a copy of the base), and
    does not prepare its structure, which `load` then brings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if plan.head is None:
            model: nn.Module = base.model(task, seed=seed, attention=attention)
        else:
            make = registry.load(plan.head).head
            head = make(plan.configs[plan.head], task, base.width, **_wanted(make, base))
            model = base.headed(head, attention=attention)
        torch.manual_seed(seed)
        if plan.tuner is None:
            attached = _head_only(plan, model, task)
        else:
            attach = registry.load(plan.tuner).attach
            attached = attach(model, plan.configs[plan.tuner], task, **_wanted(attach, base))
        # What is compared with the base has its copy of it by now, or switches the structure off (`untouched`).
        if objective and plan.objective is not None:
            module, config = registry.load(plan.objective), plan.configs[plan.objective]
            attached.objective = Objective(module, config, attached, generative=task.generative)
        if plan.structure is not None:
            torch.manual_seed(seed)
            made = registry.load(plan.structure).restructure(attached.model, plan.configs[plan.structure])
            put_on(attached, made, plan.structure)
            if objective:  # a brick that is applied brings its own
                attached.cost["structure_seconds"] = made.prepare()
        if plan.memory is not None:
            attached.convert = partial(registry.load(plan.memory).convert, config=plan.configs[plan.memory])
        return attached


def step_of(plan: Plan, rows: int, task: Task) -> Callable[[Attached, Training], Step]:
    """Return what makes the arm's step, which trains on `rows` rows: backpropagation where the arm names none."""
    if plan.step is None:
        return Backprop
    return partial(registry.load(plan.step).step, plan.configs[plan.step], rows=rows, task=task)


def _wanted(make: Callable[..., Any], base: Base) -> dict[str, Base]:
    """Return the base for a method that asks for it: some read its tokenizer or image processor."""
    return {"base": base} if "base" in inspect.signature(make).parameters else {}


def _head_only(plan: Plan, model: nn.Module, task: Task) -> Attached:
    assert plan.head is not None and isinstance(model, HeadedModel)
    module, config = registry.load(plan.head), plan.configs[plan.head]
    # A head may bring modules that sit inside the frozen backbone (moment-probing's recalibration).
    if getattr(config, "plus", False):
        return module.attach(model, config, task)
    names = [name for name, _ in model.named_parameters() if name.startswith("head.")]
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    drawn = [f"head.{name}" for name, _ in model.head.named_buffers() if name in model.head.state_dict()]
    attached = attach_in_place(model, names, matched={"head": names}, no_decay=flat, stored=drawn)
    attached.frozen_states = not getattr(model.head, "reads_ids", False)
    return attached
