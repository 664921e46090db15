"""Parts of a network that is trained already: stand-ins are distilled from them, and they begin as they are.

An extension of Deep Incubation, which trains from scratch. Of a network M with K parts:

    1 distil     min over m_j and a new task head     sum_j |m_j(H_j) - H_{j+1}|^2 / |H_{j+1}|^2  +  L(head, y)
    2 incubate   as ever, but M_i begins at its stored weights instead of random ones, the head at that of 1

H_j is M's own state where part j begins, so that every stand-in learns its part alone, all of them in one pass; L
reaches the head only. A stand-in begins as its part's first blocks. Stem, shared tensors and a head that came with the
checkpoint stay as they are. One part at a time then needs gradients and optimiser state, and `tune=0` leaves it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core.attached import Attached, attach_in_place, copy_into
from brickyard.core.objective import model_inputs
from brickyard.core.roles import own_head
from brickyard.core.task import Task
from brickyard.grow._assembling_plan import Plan, tensors_of


def begun(plan: Plan, whole: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return a meta network that is `whole` but for its depth: each stand-in is the first blocks of its part."""
    model = plan.build(plan.sources(), seed=plan.seed(seed))
    live, stored, sources = tensors_of(model), tensors_of(whole), plan.sources()

    def source(name: str) -> str:
        inside = name.removeprefix(f"{plan.path}.")
        if inside == name:
            return name
        slot, _, rest = inside.partition(".")
        return f"{plan.path}.{sources[int(slot)]}.{rest}"

    copy_into(live, {name: stored[source(name)] for name in live}, "the meta network")
    return model


class Distillation:
    """The objective (model, batch) -> scalar of phase 1; `whole` is read in evaluation mode and without gradients."""

    def __init__(self, plan: Plan, whole: nn.Module, task: Task) -> None:
        self.plan, self.whole, self.task = plan, whole.eval().requires_grad_(False), task

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        entered, wanted = self._states(batch)
        mask = batch.get("attention_mask")
        found: dict[int, Tensor] = {}
        handles = []
        for part in range(1, self.plan.parts + 1):
            first = (part - 1) * self.plan.meta_depth
            block = model.get_submodule(f"{self.plan.path}.{first}")
            handles.append(block.register_forward_pre_hook(_given(entered[part]), with_kwargs=True))
            last = model.get_submodule(f"{self.plan.path}.{first + self.plan.meta_depth - 1}")
            # What the head reads is cut off: it learns the task, the stand-ins their parts.
            handles.append(last.register_forward_hook(_kept(found, part, cut=part == self.plan.parts)))
        try:
            logits = model(**model_inputs(batch)).logits
        finally:
            for handle in handles:
                handle.remove()
        errors = [_relative(found[part], wanted[part], mask) for part in wanted]
        total = torch.stack(errors).sum()
        return total + self.task.loss(logits, batch["labels"]) if logits.requires_grad else total

    @torch.no_grad()
    def _states(self, batch: dict[str, Any]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return M's states where each part begins and where it ends."""
        entered: dict[int, Tensor] = {}
        left: dict[int, Tensor] = {}
        handles = []
        for part in range(1, self.plan.parts + 1):
            span = self.plan.blocks(part)
            first, last = (self.whole.get_submodule(f"{self.plan.path}.{b}") for b in (span[0], span[-1]))
            handles.append(first.register_forward_pre_hook(_noted(entered, part), with_kwargs=True))
            handles.append(last.register_forward_hook(_kept(left, part)))
        try:
            self.whole(**model_inputs(batch))
        finally:
            for handle in handles:
                handle.remove()
        return entered, left


def distilled(plan: Plan, whole: nn.Module, task: Task, *, seed: int) -> Attached:
    """Return the meta network ready for phase 1: its stand-ins and a head that is new train, nothing else."""
    model = begun(plan, whole, seed=seed).to(next(whole.parameters()).device)
    learn = (f"{plan.path}.", *(f"{name}." for name in own_head(model)))
    names = [name for name, _ in model.named_parameters() if name.startswith(learn)]
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, names, matched={"stand-ins": names}, no_decay=flat)
    attached.objective = Distillation(plan, whole, task)
    return attached


def beginnings(plan: Plan, part: int, whole: nn.Module, meta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a part begins at, by the target's names: its own blocks, and the meta network's stem or head."""
    stored = tensors_of(whole)
    outside = set(plan.outside(part)) - set(plan.shared)
    return {
        name: meta[name] if name in outside else stored[name].detach().cpu()
        for name in plan.names(part)
        if name not in plan.shared
    }


def _given(state: Tensor) -> Any:
    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    return replace


def _noted(into: dict[int, Tensor], part: int) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into[part] = args[0] if args else kwargs["hidden_states"]

    return note


def _kept(into: dict[int, Tensor], part: int, *, cut: bool = False) -> Any:
    def keep(_: nn.Module, args: Any, output: Any) -> Any:
        into[part] = output if isinstance(output, Tensor) else output[0]
        if not cut:
            return None
        held = into[part].detach()
        return held if isinstance(output, Tensor) else (held, *output[1:])

    return keep


def _relative(found: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Return the squared error of states [B, T, D] as a share of what they were to be, without padding; a scalar."""
    if mask is not None and mask.shape == found.shape[:2]:
        found, wanted = found[mask.bool()], wanted[mask.bool()]
    return (found.float() - wanted.float()).square().sum() / wanted.float().square().sum()
