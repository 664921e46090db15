"""Zeroth-order steps as a `torch.optim.Optimizer` with a closure; the loop's step and `transformers.Trainer` use it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core import noise
from brickyard.core.errors import Refused, UnknownName, UsageError
from brickyard.core.forwards import refuse_unlike_forwards
from brickyard.optim._zo_guards import own_casts, refuse_to_go_on
from brickyard.optim._zo_step import (
    ESTIMATORS,
    GAUSSIAN,
    Direction,
    Estimate,
    Parameters,
    Rate,
    adam_,
    conservative_,
    descend_,
    elementwise_,
    momentum_,
    move_,
    sign_,
    unique,
)

RULES = ("sgd", "momentum", "sign", "conservative", "adam")
SIGNS = ("elementwise", "scalar")
SLOTS = {"momentum": ("m",), "adam": ("m", "v")}  # float32 numbers kept for every parameter
MASK = 1  # tells a mask's key from those of directions, which are made of four numbers


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of g: name is one of RULES.

    sign: "elementwise" takes the sign of g, as in the paper; "scalar" that of each slope, as in the released code.
    beta, beta2: of momentum and of Adam.
    """

    name: str = "sgd"
    sign: str = "elementwise"
    beta: float = 0.9
    beta2: float = 0.999

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UnknownName.among("zeroth-order rule", self.name, RULES)
        if self.sign not in SIGNS:
            raise UnknownName.among("kind of sign", self.sign, SIGNS)
        if not (0 <= self.beta < 1 and 0 <= self.beta2 < 1):
            raise UsageError(f"beta={self.beta} and beta2={self.beta2} must be in [0, 1).")


class ZerothOrder(torch.optim.Optimizer):
    """An optimiser that evaluates the loss a few times and runs no backward pass.

    `step(closure)` takes a closure that returns the scalar loss of one batch and calls no `backward`. The model must
    answer alike twice: call `model.eval()` first, or give `model`, which is then held to it at every step.

    Args:
        params: parameters or groups of them, as torch takes them; of tied ones one moves.
        lr: step size; it scales like 1 / d, far below that of a first-order method.
        weight_decay: part of g for sgd and momentum, apart from it for sign and Adam, as torch has it.
        eps: radius within which the loss is evaluated.
        q: directions asked about in a step.
        estimator: "two-point", "one-point" or "jvp" (forward-mode differentiation).
        direction: law and mask of z, see `Direction`; the mask is drawn anew every `resample` steps.
        rule: what becomes of the estimate.
        parts: blocks that are asked about one after another, each with a slope of its own; all parameters, once.
        joint: update the blocks when all slopes are known, instead of each at once.
        seed: of the directions, with the step's number.
        model: checked before every step.

    Raises:
        UsageError: no parameter, an option out of range, a loss that is no scalar.
        Refused: parameters that cannot be moved, moving batch statistics or dropout in `model`.
        NotFinite: too many steps in a row of which every update was skipped. A single update whose slope is NaN or
            infinite is skipped and counted in `counts["skipped"]`, with the parameters back where they were.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        eps: float = 1e-3,
        q: int = 1,
        estimator: str = "two-point",
        direction: Direction = GAUSSIAN,
        resample: int = 1,
        rule: Rule = Rule(),
        parts: Sequence[Sequence[Tensor]] | None = None,
        joint: bool = False,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        for name, value, ok in (
            ("lr", lr, lr >= 0 and math.isfinite(lr)),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("eps", eps, eps > 0 and math.isfinite(eps)),
            ("q", q, q >= 1),
            ("resample", resample, resample >= 1),
        ):
            if not ok:
                raise UsageError(f"zeroth-order {name}={value!r} is out of range.")
        if estimator not in ESTIMATORS:
            raise UnknownName.among("estimator", estimator, ESTIMATORS)
        if joint and rule.name == "conservative":
            raise UsageError("the conservative rule judges each block by the loss; it takes them one after another.")
        params = list(params)
        if not params:
            raise UsageError("a zeroth-order step was given no trainable parameter; choose a tuner that trains some.")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.eps, self.q, self.estimator, self.rule, self.joint = eps, q, estimator, rule, joint
        self.direction, self.resample, self.seed, self.model = direction, resample, seed, model
        every = [p for group in self.param_groups for p in group["params"]]
        self.numbered: Parameters = unique(every)
        if not self.numbered:
            raise UsageError("a zeroth-order step was given no trainable number; choose a tuner that trains some.")
        self.parts = [self.numbered] if parts is None else self._cut(parts)
        self.updated = False
        self.counts = {"steps": 0, "losses": 0, "updates": 0, "skipped": 0, "in_a_row": 0}
        if rule.name == "conservative" and any(group["weight_decay"] for group in self.param_groups):
            raise Refused("zo-conservative compares theta with its neighbours; with weight decay, wd=0 is needed.")
        if estimator != "jvp":
            _warn_of_rounding(self.numbered, eps)

    def _cut(self, parts: Sequence[Sequence[Tensor]]) -> list[Parameters]:
        number = {id(p): i for i, p in self.numbered}
        cut: list[Parameters] = [[(number[id(p)], p) for p in part if id(p) in number] for part in parts]
        cut = [part for part in cut if part]
        if sorted(i for part in cut for i, _ in part) != list(range(len(self.numbered))):
            raise UsageError("blocks must hold every trainable parameter once.")
        return cut

    def rates(self) -> dict[int, Rate]:
        """Return the present learning rate and weight decay of every parameter, by number."""
        of = {id(p): Rate(group["lr"], group["weight_decay"]) for group in self.param_groups for p in group["params"]}
        return {i: of[id(p)] for i, p in self.numbered}

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update from the closure's loss and return it; without a closure, only take note that `update` was called."""
        if closure is not None:
            loss = self.update(closure)
            self.updated = False
            return loss
        if not self.updated:
            raise UsageError("a zeroth-order step evaluates the loss itself: call step(closure), without backward.")
        self.updated = False
        return None

    @torch.no_grad()
    def update(self, closure: Callable[[], Any]) -> Tensor:
        """Update the parameters and return the loss, the mean over the blocks; NaN where all of them were skipped."""
        if self.model is not None:
            refuse_unlike_forwards(self.model)

        def loss() -> Tensor:
            with own_casts():
                value = torch.as_tensor(closure())
            if value.numel() != 1:
                raise UsageError(f"the closure returned a tensor of shape {tuple(value.shape)}; a scalar was expected.")
            self.counts["losses"] += 1
            return value

        rates, device = self.rates(), self.numbered[0][1].device
        mask = noise.key(self.seed, self.counts["steps"] // self.resample, MASK)
        direction = replace(self.direction, mask=mask)
        waiting, losses = [], []
        for place, part in enumerate(self.parts):
            keys = [noise.key(self.seed, self.counts["steps"], place, query) for query in range(self.q)]
            found = ESTIMATORS[self.estimator](loss, part, keys, self.eps, direction)
            if not found.finite:
                move_(part, found.back, direction)
                self.counts["skipped"] += 1
                continue
            losses.append(found.loss)
            if self.joint:
                move_(part, found.back, direction)
                waiting.append((part, replace(found, back=())))
            else:
                self._update(loss, part, found, rates, direction)
        for part, found in waiting:
            self._update(loss, part, found, rates, direction)
        self.counts["steps"] += 1
        self.updated = True
        # Of a whole step: one bad batch skips all of its blocks, of which there may be more than steps to wait for.
        self.counts["in_a_row"] = 0 if losses else self.counts["in_a_row"] + 1
        refuse_to_go_on(self.counts["in_a_row"], self.counts["steps"])
        return torch.tensor(sum(losses) / len(losses) if losses else math.nan, device=device)

    def _update(
        self, loss: Callable[[], Tensor], part: Parameters, found: Estimate, rates: Any, direction: Any
    ) -> None:
        self.counts["updates"] += 1
        rule = self.rule
        if rule.name == "conservative":
            conservative_(loss, part, found, rates, direction)
        elif rule.name == "sgd" or (rule.name, rule.sign) == ("sign", "scalar"):
            descend_(part, found.signs() if rule.name == "sign" else found, rates, direction)
        else:
            updates = {
                "sign": sign_,
                "momentum": partial(momentum_, beta=rule.beta),
                "adam": partial(adam_, beta=rule.beta, beta2=rule.beta2),
            }
            states = {i: self._slots(p) for i, p in part}
            steps = {}
            for i, p in part:
                self.state[p]["step"] += 1
                steps[i] = int(self.state[p]["step"])
            elementwise_(part, found, rates, updates[rule.name], states, steps, direction)

    def _slots(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state.update({s: torch.zeros_like(p, dtype=torch.float32) for s in SLOTS.get(self.rule.name, ())})
        return {name: tensor for name, tensor in state.items() if name != "step"}

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with the counts beside it: directions are a function of the step's number."""
        return {**super().state_dict(), "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take `state_dict` back; what is kept stays float32, whatever the parameters are."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "counts"})
        every = [p for group in self.param_groups for p in group["params"]]
        for place, given in state_dict["state"].items():
            p = every[int(place)]
            self.state[p] = {k: v.to(p.device if k != "step" else "cpu") for k, v in given.items()}
        self.counts = {k: int(v) for k, v in state_dict["counts"].items()}


def _warn_of_rounding(parameters: Parameters, eps: float) -> None:
    """Warn of half-precision tensors in which a perturbation mostly rounds away."""
    lost, numbers, total = 0, 0, 0
    for _, theta in parameters:
        total += theta.numel()
        if theta.dtype not in (torch.bfloat16, torch.float16):
            continue
        typical = float(torch.linalg.vector_norm(theta.detach(), dtype=torch.float32)) / math.sqrt(theta.numel())
        ulp = torch.finfo(theta.dtype).eps * 2.0 ** math.floor(math.log2(typical)) if typical else 0.0
        if eps < ulp:
            lost, numbers = lost + 1, numbers + theta.numel()
    if lost:
        warnings.warn(
            f"eps={eps:g} is below one unit in the last place of {lost} of {len(parameters)} tensors in half precision "
            f"({100 * numbers / total:.1f} % of the trained numbers): there most of eps z rounds away. Raise eps, or "
            "keep what trains in float32.",
            stacklevel=3,
        )
