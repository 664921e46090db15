"""Zeroth-order steps: parameters move by what a few evaluations of the loss say; nothing is differentiated backwards.

    z ~ N(0, I_d)                                                d trained numbers, drawn again from a key, never kept
    p = [L(theta + eps z) - L(theta - eps z)] / (2 eps)          L: the loss of one batch, a scalar; dropout off
    g = (1 / q) sum_i p_i z_i                                    E[g] = grad of L smoothed over eps
                                                                 E ||g||^2 = (d + q + 1) / q ||grad L||^2

    zo-sgd            theta <- theta - lr (g + wd theta)
    zo-momentum       m <- beta m + g;  theta <- theta - lr m
    zo-sign           theta <- theta - lr sign(g)
    zo-conservative   theta <- the best of theta, theta - lr g, theta + lr g on the same batch
    zo-adam           theta <- Adam(theta, g)
    forward-grad      p = <grad L(theta), z>, exact, by forward-mode differentiation; then as zo-sgd

An arm names one beside its tuner: `full + zo-sgd`, `lora + zo-adam:q=4`. Estimator, direction, blocks and rule compose.
Beyond inference a step needs a few MB (momentum d numbers, Adam 2 d, forward-grad d and about a second forward). The
noise is 40 % and more of a step on a processor, so it is drawn three times a step, not four: the last pass takes theta
home and updates it. `first=K` trains the last K blocks, and what comes after them, by backpropagation.

`released` is what the authors' code does where the paper says otherwise: zo-sign takes the sign of the scalar p. Their
random mask, which compares a normal draw with the sparsity, and their several queries, which perturb with the mask and
update without it, are faults and are left out.

Gradient clipping does not apply: ||g|| grows with sqrt(d), and a bound would be another method. A learning rate that
suits full tuning is 10 to 100 times too small for adapters, for it scales like 1 / d: search it. A few thousand queries
do not teach a new head; fit it first: `lora + linear-probe:fitted=true + zo-adam`.

Source: Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark", ICML
2024, arXiv 2402.11592; the replayed seed is Malladi et al., "Fine-Tuning Language Models with Just Forward Passes",
NeurIPS 2023, arXiv 2305.17333. Headline claim: near first-order quality (OPT-1.3B on SST-2: 90.8 against 91.1) at the
memory of inference, where the task is put as the pre-trained model knows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brickyard.core.attached import Attached
from brickyard.core.batches import Order
from brickyard.core.errors import NotFinite, UsageError
from brickyard.core.forwards import refuse_readers, refuse_tuner
from brickyard.core.loop import Backprop, State, Training, autocast, batch_loss
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.optim._zo_blocks import UNITS, frozen, late, parts_of
from brickyard.optim._zo_optimizer import RULES, SIGNS, Rule, ZerothOrder
from brickyard.optim._zo_step import ESTIMATORS, LAWS, Direction, equal_zeros, magnitude_zeros

RECORDS = (
    Record(
        name="zo-sgd",
        family="optim",
        title="Zeroth-order SGD: two evaluations of the loss, the memory of inference",
        paper="Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning, ICML 2024, arXiv 2402.11592",
        slot="step",
        fixed={"rule": "sgd", "sign": "elementwise", "beta": 0.9, "beta2": 0.999},
        search={"lr": (1e-6, 1e-5, 1e-4, 1e-3)},
        training={"lr": 1e-5, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
        claims=(
            Claim(
                text="g points along the gradient, and its mean square is d + 2 times the gradient's.",
                measure="law",
                data="embedded:digits",
                full={"seeds": 10},
            ),
            Claim(
                text="First-order SGD beats every zeroth-order rule, at each one's best learning rate.",
                measure="ranking",
                part="first-order",
                data="embedded:digits",
                seeds=4,
                full={"seeds": 10},
            ),
            Claim(
                text="Driven by the same seeds, forward-grad and zo-sgd end within a point of each other.",
                measure="ranking",
                part="same",
                data="embedded:digits",
                seeds=4,
                full={"seeds": 10},
            ),
            Claim(
                text="Every rule learns: 30 points above the untrained network's 10 %.",
                measure="ranking",
                part="learns",
                data="embedded:digits",
                seeds=4,
                full={"seeds": 10},
            ),
            Claim(
                text="ZO-Adam is the most accurate of the zeroth-order rules.",
                measure="ranking",
                part="adam",
                data="embedded:digits",
                seeds=4,
                full={"seeds": 10},
            ),
            Claim(
                text="At equal steps a slope for each layer, asked about apart, beats one slope for all numbers.",
                measure="ranking",
                part="by layer",
                data="embedded:digits",
                seeds=4,
                full={"seeds": 10},
            ),
            Claim(
                text="At equal steps a random mask over a fifth of the numbers beats none.",
                measure="ranking",
                part="sparse",
                data="embedded:digits",
                seeds=4,
                full={"seeds": 10},
            ),
            Claim(
                text="Zeroth-order steps on a task whose head was fitted beforehand end 5 points above those from a "
                "random head, and at most half a point below that head alone.",
                measure="alignment",
                train_rows=600,
                batch=8,
                seeds=3,
                lrs=(1e-4, 1e-3),
                full={"seeds": 5, "train_rows": 0, "batch": 16, "lrs": (1e-5, 1e-4, 1e-3)},
            ),
            Claim(
                text="A step's peak is that of a forward without gradient, plus at most the largest tensor and 1 MB.",
                measure="memory",
                kind="counted",
            ),
        ),
    ),
    Record(
        name="zo-momentum",
        family="optim",
        title="Zeroth-order SGD with momentum",
        paper="Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning, ICML 2024, arXiv 2402.11592",
        slot="step",
        fixed={"rule": "momentum", "sign": "elementwise", "beta2": 0.999},
        search={"lr": (1e-7, 1e-6, 1e-5, 1e-4)},
        training={"lr": 1e-6, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
        part_of="zo-sgd",
    ),
    Record(
        name="zo-sign",
        family="optim",
        title="Zeroth-order SGD with the sign of the estimate",
        paper="Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning, ICML 2024, arXiv 2402.11592",
        slot="step",
        fixed={"rule": "sign", "beta": 0.9, "beta2": 0.999},
        presets={"paper": {"sign": "elementwise"}, "released": {"sign": "scalar"}},
        search={"lr": (1e-6, 1e-5, 1e-4, 1e-3)},
        training={"lr": 1e-5, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
        part_of="zo-sgd",
    ),
    Record(
        name="zo-conservative",
        family="optim",
        title="Zeroth-order SGD that keeps the best of three places",
        paper="Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning, ICML 2024, arXiv 2402.11592",
        slot="step",
        fixed={"rule": "conservative", "sign": "elementwise", "beta": 0.9, "beta2": 0.999},
        search={"lr": (1e-6, 1e-5, 1e-4, 1e-3)},
        training={"lr": 1e-5, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
        part_of="zo-sgd",
    ),
    Record(
        name="zo-adam",
        family="optim",
        title="Adam on a zeroth-order estimate",
        paper="Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning, ICML 2024, arXiv 2402.11592",
        slot="step",
        fixed={"rule": "adam", "sign": "elementwise"},
        search={"lr": (1e-5, 1e-4, 1e-3)},
        training={"lr": 1e-4, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
        part_of="zo-sgd",
    ),
    Record(
        name="forward-grad",
        family="optim",
        title="Forward gradient: the exact slope along one direction, by forward-mode differentiation",
        paper="Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning, ICML 2024, arXiv 2402.11592",
        slot="step",
        fixed={"estimator": "jvp", "eps": 1e-3},
        search={"lr": (1e-6, 1e-5, 1e-4, 1e-3)},
        training={"lr": 1e-5, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
        part_of="zo-sgd",
    ),
)

ORDERS = ("coordinate", "joint")
MASKS = ("equal", "magnitude")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a record fixes is no option of it."""

    rule: str = "sgd"
    """what becomes of g: sgd, momentum, sign, conservative or adam"""
    estimator: str = "two-point"
    """two-point, one-point (one evaluation less, biased by eps / 2 z'Hz) or jvp (forward-mode differentiation)"""
    eps: float = 1e-3
    """radius within which the loss is evaluated: too small drowns in rounding, too large is biased"""
    q: int = 1
    """directions asked about in a step; their estimates are averaged"""
    direction: str = "gaussian"
    """law of z: gaussian, sphere (||z||^2 = d; one pass of noise more) or rademacher (signs)"""
    sparsity: float = 0.0
    """share of the entries of z that a random mask sets to 0"""
    mask: str = "equal"
    """equal: that share of every tensor; magnitude: of a tensor the share of its weights below one threshold for all"""
    resample: int = 1
    """steps for which a mask stays"""
    blocks: str = "none"
    """what is asked about at a time: none (all), block, half (attention or the rest of a block), leaf (one layer)"""
    order: str = "coordinate"
    """coordinate: a block moves at once, as in the released code; joint: all move when all slopes are known"""
    sign: str = "elementwise"
    """zo-sign: elementwise takes sign(g), as the paper; scalar sign(p) z, as the released code"""
    beta: float = 0.9
    """decay of momentum, and of Adam's first moment"""
    beta2: float = 0.999
    """decay of Adam's second moment"""
    first: int = 0
    """blocks, from the end, that train by backpropagation and AdamW, with what comes after them"""
    first_lr: float = 1e-4
    """learning rate of those"""

    def __post_init__(self) -> None:
        for name, known in (
            ("rule", RULES),
            ("estimator", tuple(ESTIMATORS)),
            ("direction", LAWS),
            ("mask", MASKS),
            ("blocks", UNITS),
            ("order", ORDERS),
            ("sign", SIGNS),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"zo: {name}={getattr(self, name)!r}; expected one of {', '.join(known)}.")
        for name, ok in (
            ("eps", self.eps > 0),
            ("q", self.q >= 1),
            ("sparsity", 0 <= self.sparsity < 1),
            ("resample", self.resample >= 1),
            ("beta", 0 <= self.beta < 1),
            ("beta2", 0 <= self.beta2 < 1),
            ("first", self.first >= 0),
            ("first_lr", self.first_lr >= 0),
        ):
            if not ok:
                raise UsageError(f"zo: {name}={getattr(self, name)!r} is out of range.")
        if self.rule == "conservative" and self.order == "joint":
            raise UsageError("zo-conservative judges each block by the loss: it takes them with order=coordinate.")

    @property
    def backward(self) -> bool:
        """Whether a part of the model trains by backpropagation."""
        return self.first > 0


class ZerothOrderStep:
    """The loop's step: sets learning rates, evaluates the loss of the batch without gradient, updates; see `step`."""

    def __init__(self, config: Config, attached: Attached, training: Training) -> None:
        model, trained = attached.model, attached.parameters()
        refuse_tuner(model)
        self.config, self.attached, self.training = config, attached, training
        self.late: Backprop | None = None
        self.last = math.nan
        if config.first:
            behind = {id(p) for p in late(model, trained, config.first)}
            split = [_only(attached.parameter_groups, behind, wanted) for wanted in (True, False)]
            self.late = Backprop(replace(attached, parameter_groups=split[0]), replace(training, lr=config.first_lr))
            groups = split[1]
        else:
            groups = attached.parameter_groups
        given = [
            {
                "params": group["params"],
                "weight_decay": group.get("weight_decay", training.wd),
                "lr_scale": group.get("lr_scale", 1.0),
            }
            for group in groups
            if group["params"]
        ]
        moved = [p for group in given for p in group["params"]]
        self.optimiser = ZerothOrder(
            given,
            lr=training.lr,
            eps=config.eps,
            q=config.q,
            estimator=config.estimator,
            direction=Direction(config.direction),
            resample=config.resample,
            rule=Rule(name=config.rule, sign=config.sign, beta=config.beta, beta2=config.beta2),
            parts=None if config.blocks == "none" else parts_of(model, moved, config.blocks),
            joint=config.order == "joint",
            seed=training.seed,
            model=model,
        )
        if config.sparsity:
            zeros = {"equal": equal_zeros, "magnitude": magnitude_zeros}[config.mask]
            self.optimiser.direction = Direction(config.direction, zeros(self.optimiser.numbered, config.sparsity))

    @property
    def backward(self) -> bool:
        """Whether a part of the model trains by backpropagation."""
        return self.late is not None

    def sampler(self, lengths: np.ndarray, training: Training) -> Order:
        """Return the same order of rows as backpropagation has."""
        return Order(lengths, training.batch, seed=training.seed, bucket=training.bucket)

    def __call__(self, state: State, batches: list[tuple[float, dict[str, Any]]]) -> float:
        """Return the batch's mean loss as the estimator found it, regulariser included.

        Of a step that was skipped, whose loss is no number, the last one that was.
        """
        assert state.hooks is not None
        refuse_readers(state.hooks.callbacks)
        if self.attached.model.training:
            self.attached.model.eval()
        factor = self.training.factor(state.step, state.total)
        for group in self.optimiser.param_groups:
            group["lr"] = self.training.lr * group["lr_scale"] * factor
        if self.late is None:
            state.hooks("before_step", state)

        def loss() -> Tensor:
            with autocast(state.accelerator, self.training.precision):
                parts = [weight * batch_loss(self.attached, state.task, inputs) for weight, inputs in batches]
            total = torch.stack(parts).sum()
            return total if self.attached.extra_loss is None else total + self.attached.extra_loss()

        found = float(self.optimiser.update(loss))
        if math.isfinite(found):
            self.last = found
        elif math.isnan(self.last):
            raise NotFinite("the loss is not finite in the first zeroth-order step; check the data and the base.")
        if self.late is None:
            state.hooks("after_step", state)
            return self.last
        with frozen(p for _, p in self.optimiser.numbered):  # type: ignore[misc]
            return self.late(state, batches)

    def report(self) -> dict[str, Any]:
        """Return what ran, and how many updates were skipped because a slope was no number."""
        config, counts = self.config, self.optimiser.counts
        told = {name: getattr(config, name) for name in ("rule", "estimator", "eps", "q", "direction", "blocks")}
        if config.rule == "sign":
            told["sign"] = config.sign
        if config.sparsity:
            told |= {"sparsity": config.sparsity, "mask": config.mask, "resample": config.resample}
        if config.blocks != "none":
            told["order"] = config.order
        if config.first:
            told |= {"first": config.first, "first_lr": config.first_lr}
        return told | {
            "losses_evaluated": counts["losses"],
            "updates": counts["updates"],
            "updates_skipped": counts["skipped"],
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the rule keeps of every parameter, by number, and the counts."""
        out = {"counts": torch.tensor(list(self.optimiser.counts.values())), "last": torch.tensor(self.last).double()}
        for number, p in self.optimiser.numbered:
            out |= {f"{number}.{name}": tensor for name, tensor in self.optimiser.state[p].items()}
        late = self.late.state_dict() if self.late is not None else {}
        return out | {f"first:{name}": tensor for name, tensor in late.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take `state_dict` back."""
        self.optimiser.counts = dict(zip(self.optimiser.counts, tensors["counts"].tolist(), strict=True))
        self.last = float(tensors["last"])
        parameters = dict(self.optimiser.numbered)
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            if number.isdigit():
                p = parameters[int(number)]
                self.optimiser.state[p][name] = tensor.to("cpu" if name == "step" else p.device)
        if self.late is not None:
            own = {key.removeprefix("first:"): t for key, t in tensors.items() if key.startswith("first:")}
            self.late.load_state_dict(own)


def _only(groups: list[dict[str, Any]], chosen: set[int], wanted: bool) -> list[dict[str, Any]]:
    """Return the groups with those of their parameters that are (not) chosen."""
    return [{**group, "params": [p for p in group["params"] if (id(p) in chosen) == wanted]} for group in groups]


def step(config: Config, attached: Attached, training: Training, *, rows: int, task: Task) -> ZerothOrderStep:
    """Return the step of an arm. `training.clip` has no part in it: see above. Refused where it fits no such step."""
    return ZerothOrderStep(config, attached, training)
