"""AdaLoRA: SVD-shaped adapters whose ranks are shared out over the model by importance. PEFT's implementation.

    y = W x + (alpha / r0) B (A * E) dropout(x)        A [r0, n], E [r0, 1], B [m, r0]; A, B ~ N(0, 0.02), E = 0
    every step, for each entry w of A, E, B:  I = |w grad w|,  Ibar <- b1 Ibar + (1 - b1) I,
                                              U <- b2 U + (1 - b2) |I - Ibar|,  s = Ibar U
    score of rank i of layer k:               S_ki = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)
    budget:  b(t) = bT + (b0 - bT) (1 - (t - ti) / (T - tf - ti))^3;  E of all ranks outside the best b(t) becomes 0
    loss:    task + gamma * mean over A, B of ||A A^T - I||_F, ||B^T B - I||_F

At t = T - tf the ranks are final: the others are cut out of A, E and B and of their moments, so that no later step
multiplies them. The model computes the same without them; the regulariser and the norm by which gradients are clipped
are from then on those of the ranks that are left, where PEFT's go on counting the dead.

Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv 2303.10512.
Headline claim: at equal parameters above LoRA, the more so the smaller the budget.
What PEFT lacks and this file adds: the allocation at the right hook point, the regulariser where the loss is computed
outside the model, `init_r == target_r`, exact counts under ties, batches whose rows belong to different adapters, and a
brick that holds only the ranks that are alive.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from brickyard.core.attached import Attached, copy_into
from brickyard.core.errors import BadMix, NoEffect, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.ranks import keep_best, resize, take
from brickyard.core.rows import check_names, named_rows, served
from brickyard.core.task import Task
from brickyard.core.wrap import ADAPTER, attach_peft, check_rank, targets

if TYPE_CHECKING:
    from brickyard.core.loop import State

RECORD = Record(
    name="adalora",
    family="tune",
    title="Rank budget shared out by importance (PEFT's AdaLoRA)",
    paper="Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, ICLR 2023, arXiv 2303.10512",
    slot="tuner",
    search={"lr": (2e-3, 6e-3, 2e-2)},
    training={"lr": 2e-3},
    # The script's tinit=8000 and tfinal=50000 are steps of MNLI, of which no share of another run can be told.
    presets={"paper": {"orth": 0.1, "alpha": 16, "every": 100, "target": "blocks"}},
    claims=(
        Claim(
            text="At one rank a layer AdaLoRA is at most 0.3 points below LoRA.",
            inequality="adalora >= lora - 0.3",
            arms={
                "adalora": "adalora:init_r=2,target_r=1,target=[query,key,value,out,up,down]",
                "lora": "lora:r=1,alpha=8,target=[query,key,value,out,up,down]",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "adalora:init_r=2,target_r=1,target=[query,key,value,out,up,down]",
                "labels": "shuffled",
                "inequality": "adalora > control + 5.0",
            },
            gate="lora > majority + 10.0",
            epochs=2,
            lrs=(2e-3, 8e-3),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0},
        ),
        Claim(
            text="Sharing ranks out by importance is no worse than sharing them out at random.",
            inequality="adalora >= random",
            arms={
                "adalora": "adalora:init_r=2,target_r=1,target=[query,key,value,out,up,down]",
                "random": "adalora:init_r=2,target_r=1,target=[query,key,value,out,up,down],score=random",
            },
            gate="adalora > majority + 10.0",
            epochs=2,
            lrs=(2e-3, 8e-3),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0},
        ),
        Claim(
            text="On a language model, too, sharing ranks out by importance gains no less than at random.",
            inequality="adalora >= random",
            arms={
                "adalora": "adalora:init_r=2,target_r=1,target=[query,key,value,out,up,down]",
                "random": "adalora:init_r=2,target_r=1,target=[query,key,value,out,up,down],score=random",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "adalora:init_r=2,target_r=1,target=[query,key,value,out,up,down]",
                "labels": "shuffled",
                "inequality": "adalora > control + 0.5",
            },
            gate="adalora > base + 0.5",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    init_r: int = 12
    """rank of every layer at the start"""
    target_r: int = 8
    """mean rank of a layer at the end"""
    alpha: int = 8
    """numerator of the scaling alpha / init_r"""
    dropout: float = 0.0
    """dropout on the input of A"""
    tinit: float = 0.1
    """share of the steps before ranks are cut"""
    tfinal: float = 0.3
    """share of the steps after the ranks are fixed"""
    every: int = 10
    """steps between two allocations"""
    beta1: float = 0.85
    """smoothing of the sensitivity"""
    beta2: float = 0.85
    """smoothing of the uncertainty"""
    orth: float = 0.5
    """weight of the orthogonality regulariser"""
    target: str | tuple[str, ...] = ("query", "value")
    """roles, `blocks`, `all-linear`, or patterns of layer names"""
    score: str = "importance"
    """importance, or as controls magnitude (|E|) and random"""

    def __post_init__(self) -> None:
        if not 1 <= self.target_r <= self.init_r:
            raise UsageError(f"adalora: target_r={self.target_r} must lie in 1 .. init_r={self.init_r}.")
        if self.tinit < 0 or self.tfinal < 0 or self.tinit + self.tfinal >= 1:
            raise UsageError(
                f"adalora: tinit={self.tinit} + tfinal={self.tfinal} must leave steps in between (sum < 1)."
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1) or self.every < 1 or self.orth < 0:
            raise UsageError("adalora: beta1 and beta2 lie in (0, 1), every >= 1, orth >= 0.")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UsageError(f"adalora: alpha={self.alpha} must be positive and dropout={self.dropout} in [0, 1).")
        if self.score not in ("importance", "magnitude", "random"):
            raise UsageError(f"adalora: score={self.score!r}; importance, magnitude or random were expected.")


def residual(matrices: Sequence[Tensor]) -> Tensor:
    """Return the mean of ||M M^T - I||_F over matrices M [r, width]; equal shapes go through one batched product."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for m in matrices:
        by_shape.setdefault(m.shape, []).append(m)
    norms = []
    for group in by_shape.values():
        m_Krn = torch.stack(group)
        gram_Krr = m_Krn @ m_Krn.mT
        norms.append(torch.linalg.matrix_norm(gram_Krr - torch.eye(gram_Krr.shape[-1], device=m_Krn.device)))
    return torch.cat(norms).mean()


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put AdaLoRA on the target layers; its allocator runs as a callback of the loop."""
    patterns = (config.target,) if isinstance(config.target, str) else config.target
    matched = targets(model, patterns)
    check_rank(model, matched, config.init_r, "adalora")
    allocation = Allocation(config)
    made = attach_peft(
        model,
        peft.AdaLoraConfig(
            init_r=config.init_r,
            target_r=config.target_r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            beta1=config.beta1,
            beta2=config.beta2,
            deltaT=config.every,
            orth_reg_weight=config.orth,
            # PEFT wants the schedule now; the true number of steps is known only when the loop begins.
            total_step=1_000_000,
        ),
        matched,
        callbacks=(allocation,),
    )
    wrapped = made.model
    allocation.model = wrapped
    wrapped.base_model._enable_peft_forward_hooks = types.MethodType(_mixed, wrapped.base_model)  # type: ignore[union-attr]

    def live() -> dict[str, Tensor]:
        # PEFT would cut the tensors by its rank pattern here; the layers themselves are cut once it is final.
        pattern, wrapped.peft_config[ADAPTER].rank_pattern = wrapped.peft_config[ADAPTER].rank_pattern, None  # type: ignore[index]
        try:
            with warnings.catch_warnings():
                # A layer that lost all its ranks is a legitimate outcome here; PEFT takes it for an unfinished gather.
                warnings.filterwarnings("ignore", message=".*invalid shape")
                return peft.get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False)  # type: ignore[arg-type]
        finally:
            wrapped.peft_config[ADAPTER].rank_pattern = pattern  # type: ignore[index]

    def load_exact(tensors: dict[str, Tensor]) -> None:
        _resize(wrapped, tensors)
        copy_into(live(), tensors, "adapter")

    made.tensors = lambda: {name: t.detach().cpu().clone() for name, t in live().items()}
    made.load = load_exact
    if config.orth:
        layers = [m for m in wrapped.modules() if isinstance(m, AdaLoraLayer)]

        def regulariser() -> Tensor:
            sides = [side for m in layers for side in (m.lora_A[ADAPTER], m.lora_B[ADAPTER].T)]
            return config.orth * residual(sides)

        made.extra_loss = regulariser
    return made


def _resize(wrapped: Any, tensors: dict[str, Tensor]) -> None:
    """Give each layer the rank that its stored tensors have; the scaling stays alpha / init_r."""
    modules = dict(wrapped.named_modules())
    for name, tensor in tensors.items():
        layer = modules.get(name.removesuffix(".lora_A"))
        if name.endswith(".lora_A") and isinstance(layer, AdaLoraLayer):
            for part, axis in _sides(layer):
                resize(part, axis, len(tensor))
            layer.r[ADAPTER] = len(tensor)
    _note(wrapped)


def _note(wrapped: Any) -> None:
    """Write the ranks that layers have into the adapter's config, as PEFT wants them to open the adapter in its shape.

    PEFT's pattern is a mask over the ranks of the start; those that are left stand first.
    """
    config = wrapped.peft_config[ADAPTER]
    pattern = {}
    for name, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, AdaLoraLayer) and ADAPTER in layer.lora_E:
            rank = len(layer.lora_E[ADAPTER])
            pattern[f"{name}.lora_E"] = [True] * rank + [False] * (config.init_r - rank)
    if any(not all(mask) for mask in pattern.values()):
        config.rank_pattern = pattern


@contextmanager
def _mixed(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Serve each row of a batch by its own adapter where `adapter_names` are given, which PEFT's layers do not know."""
    given = kwargs.get("adapter_names")
    if given is None:
        yield
        return
    layers = [m for m in model.modules() if isinstance(m, AdaLoraLayer)]
    check_names(given, {adapter for layer in layers for adapter in layer.lora_A}, model.training)
    if merged := {adapter for layer in layers for adapter in layer.merged_adapters}:
        raise BadMix(f"adapter_names were given while {sorted(merged)} are merged; unmerge them first.")
    try:
        for layer in layers:
            layer.forward = types.MethodType(_forward_rows, layer)
        with named_rows(model, model.modules(), given, kwargs.get("num_beams") or 1, AdaLoraLayer):
            yield
    finally:
        for layer in layers:
            del layer.forward


def _forward_rows(layer: AdaLoraLayer, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
    y = layer.base_layer(x, *args, **kwargs)

    def adapted(adapter: str, x: Tensor, y: Tensor) -> Tensor:
        a_rn, e_r1, b_mr = layer.lora_A[adapter], layer.lora_E[adapter], layer.lora_B[adapter]
        x = layer._cast_input_dtype(x, a_rn.dtype)
        scaling = layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5)
        return (y + x @ (a_rn * e_r1).T @ b_mr.T * scaling).to(y.dtype)

    return y if layer.disable_adapters else served(x, y, adapter_names, set(layer.lora_A), adapted)


def _sides(layer: AdaLoraLayer) -> list[tuple[Tensor, int]]:
    """The tensors of a layer that have ranks, and the axes on which they lie."""
    return [(layer.lora_A[ADAPTER], 0), (layer.lora_E[ADAPTER], 0), (layer.lora_B[ADAPTER], 1)]


class Allocation:
    """Runs PEFT's allocator where gradients still exist: after the optimiser's step, before they are cleared."""

    needs_gradients = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model: Any = None
        self.allocated = False

    def begin(self, state: State) -> None:
        """Fill in the schedule, which needs the number of optimiser steps."""
        self.start(state.total)
        self.generator = torch.Generator().manual_seed(state.training.seed)

    def start(self, total: int) -> None:
        """Set the schedule for `total` optimiser steps; UsageError when they are too few for one allocation."""
        peft_config = self.model.peft_config[ADAPTER]
        tinit, tfinal = int(self.config.tinit * total), int(self.config.tfinal * total)
        if total - tfinal - tinit < 1:
            raise UsageError(
                f"adalora: {total} optimiser steps leave none between tinit={tinit} and the last {tfinal}."
            )
        peft_config.total_step, peft_config.tinit, peft_config.tfinal = total, tinit, tfinal
        allocator = self.model.base_model.rankallocator
        allocator.mask_to_budget = types.MethodType(_mask_to_budget, allocator)
        allocator.rule = self.rule
        self.generator = torch.Generator().manual_seed(0)

    def rule(self, scores: list[Tensor], values: list[Tensor]) -> list[Tensor]:
        """Return the scores to rank by: PEFT's importances, or what a control puts in their place."""
        if self.config.score == "magnitude":
            return [v.abs().flatten() for v in values]
        if self.config.score == "random":
            return [torch.rand(s.shape, generator=self.generator).to(s.device) for s in scores]
        return scores

    def after_step(self, state: State) -> None:
        """One optimiser step has been taken."""
        self.step(state.step + 1, state.optimiser)

    def step(self, step: int, optimiser: torch.optim.Optimizer | None = None) -> None:
        """Update the importances and, when it is time, allocate; `step` counts optimiser steps from 1.

        The final allocation cuts the other ranks out of the layers and the optimiser's moments; nothing follows it.
        """
        if self.allocated:
            return
        peft_config = self.model.peft_config[ADAPTER]
        if peft_config.init_r == peft_config.target_r:
            self.allocated = True  # nothing to cut; PEFT's threshold search fails on a budget of all ranks
            return
        self.model.base_model.update_and_allocate(step)
        if step >= peft_config.total_step - peft_config.tfinal:
            self.allocated = True
            self.cut(optimiser)

    def cut(self, optimiser: torch.optim.Optimizer | None) -> None:
        """Cut the ranks outside the rank pattern out of the layers, the same parameters in smaller shapes."""
        peft_config, modules = self.model.peft_config[ADAPTER], dict(self.model.base_model.model.named_modules())
        for name, mask in (peft_config.rank_pattern or {}).items():
            layer = modules[name.removesuffix(f".{ADAPTER}").removesuffix(".lora_E")]
            alive = torch.tensor(mask, device=layer.lora_E[ADAPTER].device).nonzero()[:, 0]
            for part, axis in _sides(layer):
                take(part, axis, alive, optimiser)
            layer.r[ADAPTER] = len(alive)
        _note(self.model)

    def ready(self, state: State) -> bool:
        """Only weights after the final allocation may be kept as the best."""
        return self.allocated

    def end(self, state: State) -> None:
        """NoEffect when the allocator never ran."""
        self.finish()

    def finish(self) -> None:
        """NoEffect when training ended before the ranks were final."""
        peft_config = self.model.peft_config[ADAPTER]
        if peft_config.init_r != peft_config.target_r and not self.allocated:
            raise NoEffect("adalora: training ended but ranks were never allocated; its callback did not run.")

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: importances, the mask, and the control's generator."""
        allocator = self.model.base_model.rankallocator
        kept: dict[str, Any] = {"allocated": self.allocated, "pattern": self.model.peft_config[ADAPTER].rank_pattern}
        for part in ("exp_avg_ipt", "exp_avg_unc"):
            kept |= {f"{part}|{name}": t for name, t in getattr(allocator, part).items()}
        return kept | {"generator": self.generator.get_state()}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take `state_dict` back."""
        allocator = self.model.base_model.rankallocator
        self.allocated, self.model.peft_config[ADAPTER].rank_pattern = kept["allocated"], kept["pattern"]
        self.generator.set_state(kept["generator"])
        live = dict(self.model.base_model.model.named_parameters())
        for name, tensor in kept.items():
            part, bar, parameter = name.partition("|")
            if bar:
                # A checkpoint is read on the CPU; PEFT goes on adding the model's gradients to these.
                held = tensor.to(live[parameter].device)
                getattr(allocator, part)[parameter] = held
                allocator.ipt[parameter] = torch.zeros_like(held)


def _mask_to_budget(self: Any, model: nn.Module, budget: int) -> dict[str, list[bool]]:
    """PEFT's scores, ranked with ties resolved by position, so that exactly `budget` ranks stay."""
    named = {n: p for n, p in model.named_parameters() if f".{self.adapter_name}" in n}
    values = [n for n in named if f"lora_E.{self.adapter_name}" in n]
    scores = []
    for name in values:
        a, b = name.replace("lora_E", "lora_A"), name.replace("lora_E", "lora_B")
        scores.append(
            self._element_score(name).flatten()
            + self._element_score(a).mean(dim=1)
            + self._element_score(b).mean(dim=0)
        )
    with torch.no_grad():
        masks = keep_best(self.rule(scores, [named[n] for n in values]), budget)
        for name, mask in zip(values, masks, strict=True):
            named[name].masked_fill_(~mask[:, None], 0.0)
    return {name: mask.tolist() for name, mask in zip(values, masks, strict=True)}
