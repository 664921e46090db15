"""SoRA: LoRA with a gate on every rank; a proximal step drives gates to exact zeros, and their ranks are cut out.

    y = W x + (alpha / r) B (g * (A dropout(x)))        A [r, n], g [r], B [m, r], W [m, n] frozen
    g <- T_k( AdamW step of g )      T_k(v) = sign(v) max(|v| - k, 0), the proximal step of an l1 norm

A starts Kaiming-uniform, g ~ N(0, 1), B = 0, so a fresh adapter changes nothing. The scaling stays alpha / r however
many ranks are left. A rank with g = 0 gives no gradient to its A and B, but one to g: it may come back until it is cut.
k rises in stages (`schedule`): each is an equal share of the training with a course of the learning rate of its own,
from warm-up to its end, and goes on from the weights of the one before. The run's history holds at the end of every
stage its k, the ranks left and the score: the curve of quality against ranks.

Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696.
Headline claim: above LoRA and AdaLoRA with about 70 % of the parameters.
prox=soft is the paper's rule, with k in proportion to the learning rate (`k` is its value at the peak of a stage).
prox=sequential is what the released optimiser computes: a constant k, gates below 2k to zero, the others k smaller.
Left out: training the norm layers along, as the released configuration does.
Legend: n in, m out, T tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, NoEffect, Refused, UsageError
from brickyard.core.inject import Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.ranks import Ranks
from brickyard.core.task import Task
from brickyard.core.wrap import ADAPTER

if TYPE_CHECKING:
    from brickyard.core.loop import State

RECORD = Record(
    name="sora",
    family="tune",
    title="Sparse low-rank adaptation: gated ranks that are pruned while they train",
    paper="Sparse Low-rank Adaptation of Pre-trained Language Models, EMNLP 2023, arXiv 2311.11696",
    slot="tuner",
    search={"lr": (3e-4, 1e-3, 3e-3), "k": (1e-4, 3e-4, 1e-3)},
    training={"lr": 1e-3, "wd": 0.1},
    presets={
        "paper": {"k": 3e-4},
        "released": {"k": 3e-4, "prox": "sequential", "l1": 10.0},
    },
    claims=(
        Claim(
            text="With 70 % of its ranks SoRA is at most 0.5 points below LoRA of the full rank.",
            measure="by_sparsity",
            part="against_dense",
            epochs=3,
            lrs=(2e-3,),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="At 40 % of the ranks learned gates beat a LoRA whose smallest ranks are cut after training.",
            measure="by_sparsity",
            part="against_cutting",
            epochs=3,
            lrs=(2e-3,),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="On a language model SoRA keeps with 70 % of its ranks at least 90 % of LoRA's gain.",
            measure="by_sparsity",
            part="against_dense",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lrs=(3e-3, 1e-2),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model learned gates gain no less at 40 % of the ranks than LoRA cut afterwards.",
            measure="by_sparsity",
            part="against_cutting",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lrs=(3e-3, 1e-2),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
    ),
)
RANK_AXES = {"a": 0, "b": 1, "gate": 0}
KEEP_FACTORS = False  # the gate on the rank-r activation costs less than a kept copy of A
MOSTLY_DEAD = 0.25  # share of the ranks at zero from which cutting them out in training pays


@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 8
    """ranks of every layer at the start"""
    alpha: float = 16.0
    """numerator of the scaling alpha / r, where r stays the one of the start"""
    dropout: float = 0.0
    """dropout on the input of A"""
    k: float = 3e-4
    """threshold of the proximal step; the larger, the fewer ranks are left"""
    schedule: tuple[float, ...] = ()
    """rising thresholds in place of k, each for an equal share of the training that ends in convergence"""
    prox: str = "soft"
    """soft (paper: k times the course of the learning rate) or sequential (released: constant k)"""
    l1: float = 0.0
    """weight of mean |g|, over the gates of the start, in the loss, which the released trainer adds to the threshold"""
    gate: str = "normal"
    """start of the gates: normal (paper) or ones"""
    gate_lr: float = 1.0
    """learning rate of the gates over that of A and B"""
    compact: int = 0
    """steps that ranks must have been at zero before they are cut out in training (no way back); 0: cut at the end"""
    target: str | tuple[str, ...] = "blocks"
    """`blocks` (all linear layers of the repeated blocks), roles, `all-linear`, or patterns of layer names"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", tuple(self.schedule))
        stages = self.schedule or (self.k,)
        if self.r < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UsageError(f"sora: r={self.r} >= 1, alpha={self.alpha} > 0 and dropout={self.dropout} in [0, 1).")
        if min(stages) < 0 or list(stages) != sorted(set(stages)):
            raise UsageError(f"sora: thresholds {list(stages)}; none below 0, and rising from stage to stage.")
        if self.prox not in ("soft", "sequential") or self.gate not in ("normal", "ones"):
            raise UsageError(
                f"sora: prox={self.prox!r} (soft or sequential), gate={self.gate!r} (normal or ones) was expected."
            )
        if self.l1 < 0 or not self.gate_lr > 0 or self.compact < 0:
            raise UsageError(f"sora: l1={self.l1} and compact={self.compact} >= 0, gate_lr={self.gate_lr} > 0.")


def soft(values: Tensor, k: float) -> Tensor:
    """Return sign(v) max(|v| - k, 0)."""
    return values.sign() * (values.abs() - k).clamp_min_(0)


def sequential(values: Tensor, k: float) -> Tensor:
    """Return what the released optimiser makes of its gates: 0 below 2k, |v| - k with v's sign from there on."""
    return torch.where(values.abs() >= 2 * k, values - values.sign() * k, torch.zeros_like(values))


PROX = {"soft": soft, "sequential": sequential}


def stage_of(step: int, total: int, stages: int) -> tuple[int, int, int]:
    """Return (stage from 0, its first step, its steps) of step `step` of `total`, in `stages` equal shares."""
    stage = min(stages - 1, step * stages // total)
    first = -(-stage * total // stages)
    return stage, first, -(-(stage + 1) * total // stages) - first


def plan(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> Plan:
    """Lay out A, B and the gates; Refused where r exceeds a layer."""
    made = Plan()
    for leaf in leaves:
        n, m = leaf.in_features, leaf.out_features
        if config.r > min(n, m):
            raise Refused(f"sora: rank r={config.r} exceeds layer {leaf.name} ({n} in, {m} out); use r <= {min(n, m)}.")
        a_rn = torch.empty(config.r, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
        gate_r = torch.randn(config.r, generator=generator) if config.gate == "normal" else torch.ones(config.r)
        made.own[leaf.name] = {"a": a_rn, "b": torch.zeros(m, config.r), "gate": gate_r}
    return made


def factors(config: Config, part: Part) -> tuple[Tensor, Tensor, float]:
    """Return (g A, B, alpha / r) of one layer."""
    return part["a"] * part["gate"][:, None], part["b"], config.alpha / config.r


def around(config: Config, part: Part, x: Tensor, y: Tensor) -> Tensor:
    """Return y + (alpha / r) B (g * (A x)); the path for training, where A is not copied to fold g in."""
    gated_r = F.linear(x, part["a"]) * (part["gate"] * (config.alpha / config.r)).to(x.dtype)
    if gated_r.dtype == y.dtype == part["b"].dtype:
        y_Tm = y.reshape(-1, y.shape[-1])
        return torch.addmm(y_Tm, gated_r.reshape(len(y_Tm), -1), part["b"].t()).view(y.shape)
    return (y + F.linear(gated_r, part["b"])).to(y.dtype)


def check(config: Config, part: Part) -> None:
    """Raise BadBrick where a layer has more ranks than the adapter began with."""
    if len(part["gate"]) > config.r:
        raise BadBrick(f"sora: {part.leaf.name} has {len(part['gate'])} ranks in the file, but r={config.r}.")


class Sparsifier:
    """Takes the proximal step after the optimiser's, and cuts out what has died."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.dead_for: dict[str, Tensor] = {}

    def gates(self) -> dict[str, Tensor]:
        """Return {layer: gate [r]}, the live tensors."""
        return {name: layer.brick_gate[ADAPTER] for name, layer in self.ranks.layers().items()}  # type: ignore[index]

    @property
    def stages(self) -> tuple[float, ...]:
        """The thresholds k, one a stage."""
        return self.config.schedule or (self.config.k,)

    def begin(self, state: State) -> None:
        """Refuse a training that has fewer steps than stages."""
        if state.total < len(self.stages):
            raise UsageError(
                f"sora: {state.total} steps are too few for {len(self.stages)} stages; train longer, or give fewer."
            )

    def course(self, state: State) -> float:
        """Return the learning rate's factor within the present stage."""
        _, first, steps = stage_of(state.step, state.total, len(self.stages))
        return state.training.factor(state.step - first, steps)

    def threshold(self, state: State) -> float:
        """Return k of the present step."""
        k = self.stages[stage_of(state.step, state.total, len(self.stages))[0]]
        if self.config.prox == "sequential":
            return k
        return k * self.course(state) if state.training.lr else 0.0

    def before_step(self, state: State) -> None:
        """Every stage is trained to convergence, so the learning rate rises and falls within it."""
        if len(self.stages) > 1 and state.optimiser is not None:
            for group in state.optimiser.param_groups:
                group["lr"] = state.training.lr * group.get("lr_scale", 1.0) * self.course(state)

    @torch.no_grad()
    def after_step(self, state: State) -> None:
        """All gates of the model go through one call."""
        gates = self.gates()
        flat = PROX[self.config.prox](torch.cat(list(gates.values())), self.threshold(state))
        torch._foreach_copy_(list(gates.values()), flat.split([len(g) for g in gates.values()]))
        if self.config.compact:
            self._compact(state, gates)

    def _compact(self, state: State, gates: dict[str, Tensor]) -> None:
        for name, gate in gates.items():
            before = self.dead_for.get(name, torch.zeros(len(gate), dtype=torch.int64, device=gate.device))
            self.dead_for[name] = torch.where(gate == 0, before + 1, 0)
        done = {name: count >= self.config.compact for name, count in self.dead_for.items()}
        if sum(int(d.sum()) for d in done.values()) >= MOSTLY_DEAD * sum(len(d) for d in done.values()):
            self.cut(done, state.optimiser)

    def cut(self, dead: dict[str, Tensor], optimiser: torch.optim.Optimizer | None) -> None:
        """Cut the ranks `dead` [r] of every layer out of the adapter in training, and forget them."""
        self.ranks.keep({name: ~mask for name, mask in dead.items()}, optimiser)
        self.dead_for = {name: count[~dead[name]] for name, count in self.dead_for.items()}

    def due(self, state: State) -> bool:
        """Whether a stage has just ended: its last weights are evaluated."""
        _, first, steps = stage_of(state.step - 1, state.total, len(self.stages))
        return state.step == first + steps

    def point(self, state: State) -> None:
        """Note in the learning curve how many ranks are alive and, at the end of a stage, its k."""
        state.history[-1]["ranks"] = sum(int(g.count_nonzero()) for g in self.gates().values())
        if self.due(state):
            stage, _, _ = stage_of(state.step - 1, state.total, len(self.stages))
            state.history[-1] |= {"stage": stage + 1, "k": self.stages[stage]}

    def ready(self, state: State) -> bool:
        """Only weights of the last stage may be kept as the best."""
        return stage_of(state.step - 1, state.total, len(self.stages))[0] == len(self.stages) - 1

    def end(self, state: State) -> None:
        """Cut the dead ranks out of the result; NoEffect where none is left."""
        masks = {name: gate != 0 for name, gate in self.gates().items()}
        if not any(bool(mask.any()) for mask in masks.values()):
            raise NoEffect(f"sora: the threshold k={max(self.stages):g} is too large; every rank of every layer is 0.")
        self.ranks.keep(masks, None)

    def state_dict(self) -> dict[str, Any]:
        """For how many steps each rank has been at zero."""
        return dict(self.dead_for)

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take `state_dict` back."""
        gates = self.gates()  # a checkpoint is read on the CPU
        self.dead_for = {name: count.to(gates[name].device) for name, count in kept.items()}


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put gated ranks on the target layers of `model`, which carries the task's head; gates have their own group."""
    made = inject.attach(model, RECORD.name, config, task)
    ranks = Ranks(made.model.base_model, ADAPTER)  # type: ignore[arg-type]
    sparsifier = Sparsifier(config, ranks)
    gates = list(sparsifier.gates().values())
    known = {id(gate) for gate in gates}
    made.parameter_groups = [
        {"params": [p for p in made.parameters() if id(p) not in known]},
        {"params": gates, "weight_decay": 0.0, "lr_scale": config.gate_lr},
    ]
    made.callbacks = (*made.callbacks, sparsifier)
    if config.l1:
        # Of all gates there were: cutting those at zero must not press harder on the others.
        share = config.l1 / sum(len(gate) for gate in gates)
        made.extra_loss = lambda: share * torch.cat(list(sparsifier.gates().values())).abs().sum()
    return made
