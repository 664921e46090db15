"""The one training loop, on accelerate: step strategies, accumulation, schedules, exact resume, callbacks.

Everything that decides an update is a pure function of (seed, step) or lies in the checkpoint, so an interrupted run
that is resumed gives the same bits as one that was not (same machine, same thread count).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from brickyard.core.answers import Examples, answer, to_device
from brickyard.core.attached import Attached
from brickyard.core.batches import Order
from brickyard.core.checkpoint import Checkpoints
from brickyard.core.encoded import IGNORED
from brickyard.core.errors import NotFinite, UsageError
from brickyard.core.task import Task

if TYPE_CHECKING:
    from brickyard.core.curriculum import Curriculum


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. `steps` > 0 overrides `epochs`; `warmup` is a fraction of the steps; `patience` counts evaluations.

    `accumulation` splits each batch of `batch` rows into that many micro-batches: less memory, the same update.
    """

    lr: float = 1e-3
    wd: float = 0.0
    epochs: float = 3.0
    steps: int = 0
    batch: int = 32
    accumulation: int = 1
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    precision: Literal["float32", "bfloat16"] = "float32"
    clip: float = 1.0
    seed: int = 0
    bucket: bool = False
    patience: int = 0
    evaluate_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        checks = {
            "lr": self.lr >= 0,
            "wd": self.wd >= 0,
            "epochs": self.epochs > 0 or self.steps > 0,
            "steps": self.steps >= 0,
            "batch": self.batch >= 1,
            "accumulation": 1 <= self.accumulation <= self.batch,
            "warmup": 0 <= self.warmup < 1,
            "clip": self.clip >= 0,
            "patience": self.patience >= 0,
            "evaluate_every": self.evaluate_every >= 0,
        }
        for name, ok in checks.items():
            if not ok:
                raise UsageError(f"training {name}={getattr(self, name)!r} is out of range.")
        if not math.isfinite(self.lr) or not math.isfinite(self.epochs):
            raise UsageError(f"training lr={self.lr} and epochs={self.epochs} must be finite.")

    def total_steps(self, rows: int) -> int:
        """Optimiser steps for a training set of `rows` rows."""
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(rows / self.batch)))

    def factor(self, step: int, total: int) -> float:
        """Learning-rate factor of optimiser step `step` (0-based) out of `total`; transformers' schedules."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return step / max(1, warm)
        if self.schedule == "constant":
            return 1.0
        left = (total - step) / max(1, total - warm)
        return max(0.0, left) if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


@dataclass
class State:
    """Where a run stands; what callbacks and steps see."""

    attached: Attached
    task: Task
    training: Training
    total: int
    accelerator: Accelerator
    step: int = 0
    examples: int = 0  # rows seen so far; the last batch of an epoch may be short
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None  # {"score", "step"}
    best_tensors: dict[str, Tensor] | None = None
    waited: int = 0
    batch_rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    hooks: Hooks | None = None
    optimiser: torch.optim.Optimizer | None = None  # None where the step has none
    seconds: float = 0.0  # of training up to `since`, those before an interruption too
    since: float | None = None  # when the clock went on, None while it stands still

    def elapsed(self) -> float:
        """Seconds of training so far, evaluation apart."""
        return self.seconds + (0.0 if self.since is None else time.monotonic() - self.since)

    def pause(self) -> None:
        """Stop the clock of training."""
        self.seconds, self.since = self.elapsed(), None

    def go_on(self) -> None:
        """Start the clock of training again."""
        self.since = time.monotonic()


class Hooks:
    """Calls the callbacks' optional methods in order."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = list(callbacks)

    def __call__(self, event: str, state: State) -> None:
        for callback in self.callbacks:
            if (method := getattr(callback, event, None)) is not None:
                method(state)

    def ready(self, state: State) -> bool:
        """Whether the present weights may be kept as the best (a method in the middle of a schedule says no)."""
        return all(callback.ready(state) for callback in self.callbacks if hasattr(callback, "ready"))

    def due(self, state: State) -> bool:
        """Whether a method wants the weights after `state.step` steps evaluated, beside the regular evaluations."""
        return any(callback.due(state) for callback in self.callbacks if hasattr(callback, "due"))


class Sampler(Protocol):
    """Which rows each step trains on: `epoch(k)` gives the batches of an epoch, of which some may be empty."""

    def epoch(self, k: int) -> Sequence[np.ndarray]: ...


class Step(Protocol):
    """One way of updating the parameters from a batch; an arm's step may replace `Backprop`.

    `backward` says whether it runs a backward pass; `report` what a run tells of it (JSON-like; {} for nothing). One
    that takes a batch in parts of so many rows has them as `microbatch`, so that their memory is counted. A private one
    has `planned()`, what the whole run will have spent (see `core.spent`), and `only_last = True` where earlier weights
    than the last are not covered: then the run's checkpoints go once its brick stands. `files(steps)` are what a brick
    with the weights of that many steps carries beside them. Called with (weight, micro-batch) pairs, of which there is
    none where the sampler drew no row, it returns the mean loss.
    """

    @property
    def backward(self) -> bool: ...
    @property
    def optimiser(self) -> torch.optim.Optimizer | None: ...
    def sampler(self, lengths: np.ndarray, training: Training) -> Sampler: ...
    def __call__(self, state: State, batches: list[tuple[float, dict[str, Any]]]) -> float: ...
    def report(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None: ...


class Backprop:
    """Backward through the model and AdamW; the hooks stand where `transformers.Trainer` has them."""

    backward = True

    def __init__(self, attached: Attached, training: Training) -> None:
        groups = [
            {
                "params": group["params"],
                "lr": 0.0,
                "weight_decay": group.get("weight_decay", training.wd),
                "lr_scale": group.get("lr_scale", 1.0),
            }
            for group in attached.parameter_groups
        ]
        if not any(group["params"] for group in groups):
            raise UsageError("the arm has no trainable parameter; choose a tuner or a head that trains something.")
        self.optimiser = torch.optim.AdamW(groups, fused=True)
        names = {id(p): name for name, p in attached.model.named_parameters()}
        self.named = {names.get(id(p), f"parameter {i}"): p for i, p in enumerate(attached.parameters())}
        self.training = training

    def sampler(self, lengths: np.ndarray, training: Training) -> Order:
        return Order(lengths, training.batch, seed=training.seed, bucket=training.bucket)

    def __call__(self, state: State, batches: list[tuple[float, dict[str, Any]]]) -> float:
        """Return the batch's mean loss (without the arm's regulariser). `batches` are (weight, micro-batch) pairs."""
        total = 0.0
        for weight, inputs in batches:
            with autocast(state.accelerator, self.training.precision):
                loss = batch_loss(state.attached, state.task, inputs)
            total += weight * loss.item()
            if state.attached.extra_loss is not None:
                loss = loss + state.attached.extra_loss()
            if loss.requires_grad:  # not where a step's draw leaves every adapter out and no head trains
                state.accelerator.backward(weight * loss)
        if not math.isfinite(total):
            raise NotFinite(
                f"the loss is {total} at step {state.step + 1}, {self._where(state)}; lower lr or check the data."
            )
        parameters = list(self.named.values())
        norm = state.accelerator.clip_grad_norm_(parameters, self.training.clip or math.inf)
        if norm is not None and not norm.isfinite():
            bad = next(
                (n for n, p in self.named.items() if p.grad is not None and not p.grad.isfinite().all()), "a norm"
            )
            raise NotFinite(
                f"the gradient of {bad} is not finite at step {state.step + 1}, {self._where(state)}; lower lr."
            )
        factor = self.training.factor(state.step, state.total)
        for group in self.optimiser.param_groups:
            group["lr"] = self.training.lr * group["lr_scale"] * factor
        assert state.hooks is not None
        state.hooks("before_step", state)
        self.optimiser.step()
        state.hooks("after_step", state)
        self.optimiser.zero_grad(set_to_none=True)
        return total

    @staticmethod
    def _where(state: State) -> str:
        return f"rows {state.batch_rows[:8].tolist()}{'...' if len(state.batch_rows) > 8 else ''} of train"

    def report(self) -> dict[str, Any]:
        """Nothing beyond what every run tells."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        out = {}
        for i, state in self.optimiser.state_dict()["state"].items():
            out.update({f"{i}.{key}": torch.as_tensor(value) for key, value in state.items()})
        return out

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        packed: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            packed.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({"state": packed, "param_groups": self.optimiser.state_dict()["param_groups"]})


def batch_loss(attached: Attached, task: Task, batch: dict[str, Any]) -> Tensor:
    """Return the loss of a batch, a scalar: the arm's objective, or else the task's own loss on the logits."""
    if attached.objective is not None:
        return attached.objective(attached.model, batch)
    logits = attached.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return task.loss(logits.float(), batch["labels"])


@dataclass
class Trained:
    """What a run did: learning curve, seconds (monotonic clock, evaluation apart), and where the best weights were.

    `report` is what its step tells; with `only_last` no weights but the last may stay behind.
    """

    history: list[dict[str, Any]]
    steps: int
    seconds: float
    best_step: int
    stopped: str
    report: dict[str, Any]
    only_last: bool = False


def autocast(accelerator: Accelerator, precision: str) -> Any:
    """Return the autocast context of `precision` on the accelerator's device."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(accelerator.device.type, dtype=torch.bfloat16)


def train_mode(model: nn.Module) -> None:
    """Put the model in training mode, but keep the statistics of frozen batch norms frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def train(
    attached: Attached,
    examples: Examples,
    validation: Examples | None,
    task: Task,
    training: Training,
    *,
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    allow_change: Sequence[str] = (),
    callbacks: Sequence[Any] = (),
    curriculum: Curriculum | None = None,
    make_step: Callable[[Attached, Training], Step] = Backprop,
    device: str | None = None,
) -> Trained:
    """Train `attached` on `examples`; with `validation` the best evaluated weights are the ones left in the model.

    With `folder`, checkpoints are written there every `training.checkpoint_every` steps and an earlier run is resumed;
    `identity` (config, data, code) must equal the earlier run's, else Changed. With `curriculum` the same number of
    steps goes to the rows that it chooses. Raises NotFinite at the first NaN.
    """
    accelerator = Accelerator(cpu=device == "cpu")
    attached.model.to(accelerator.device)
    model = attached.model
    state = State(attached, task, training, training.total_steps(len(examples)), accelerator)
    torch.manual_seed(training.seed)
    step = make_step(attached, training)
    # A checkpoint knows callbacks by their place, so what belongs to the arm (its step too) comes before what the
    # caller brings.
    state.hooks = Hooks([*attached.callbacks, *([curriculum] if curriculum else []), *callbacks])
    state.optimiser = step.optimiser
    saved = Checkpoints(
        folder, {"training": asdict(training), "data": examples.digest, **(identity or {})}, allow_change
    )
    state.hooks("begin", state)
    saved.resume(state, step)
    per_epoch = math.ceil(len(examples) / training.batch)
    every = training.evaluate_every or per_epoch
    stopped = "done"
    state.go_on()
    train_mode(model)
    if curriculum is None:
        batches = _rows(step.sampler(examples.lengths, training), per_epoch, state.step, state.total)
    else:
        batches = curriculum.batches(state, lambda rows: step.sampler(examples.lengths[rows], training))
    with attached.saving():
        for rows in batches:
            state.batch_rows = rows
            state.losses.append(step(state, _micro(examples, rows, task, training, accelerator)))
            state.step += 1
            state.examples += len(rows)
            due = state.step % every == 0 or state.step == state.total or state.hooks.due(state)
            if validation is not None and due:
                state.pause()
                with attached.serving():
                    stop = _evaluate(state, validation)
                train_mode(model)
                state.go_on()
                if stop:
                    stopped = f"no better validation score in {training.patience} evaluations"
                    break
            elif due:
                _point(state, {})
            if training.checkpoint_every and state.step % training.checkpoint_every == 0 and state.step < state.total:
                saved.save(state, step)
    state.pause()
    if state.best_tensors is not None:
        attached.load(state.best_tensors)
    state.hooks("end", state)
    model.eval()
    best = state.best["step"] if state.best else state.step
    if (files := getattr(step, "files", None)) is not None:
        attached.beside = files(best)
    only_last = bool(getattr(step, "only_last", False))
    return Trained(state.history, state.step, state.seconds, best, stopped, step.report(), only_last)


def _rows(order: Sampler, per_epoch: int, start: int, total: int) -> Iterator[np.ndarray]:
    step = start
    while step < total:
        for rows in order.epoch(step // per_epoch)[step % per_epoch :]:
            if step == total:
                return
            yield rows
            step += 1


def _micro(
    examples: Examples, rows: np.ndarray, task: Task, training: Training, accelerator: Accelerator
) -> list[tuple[float, dict[str, Any]]]:
    """Return the micro-batches of a batch, each with its share of what the batch's loss is a mean over."""
    if not len(rows):
        return []
    parts = [examples.collate(part) for part in np.array_split(rows, min(training.accumulation, len(rows)))]
    counts = [_terms(batch, task) for batch in parts]
    every = sum(counts) or 1
    # A part without a target adds nothing; the mean over none of them would be NaN.
    return [
        (count / every, to_device(batch, accelerator.device))
        for count, batch in zip(counts, parts, strict=True)
        if count or len(parts) == 1
    ]


def _terms(batch: dict[str, Any], task: Task) -> int:
    """Return how many numbers the loss of a batch is a mean over: tokens of texts, pairs, or rows."""
    labels = batch.get("labels")
    if labels is None:  # rows without one, for an objective that asks a teacher
        return len(next(value for value in batch.values() if isinstance(value, Tensor)))
    of_tokens = labels.ndim == 2 and task.generative and task.kind != "preference"
    return int((labels != IGNORED).sum()) if of_tokens else len(labels)


def _point(state: State, scores: dict[str, float]) -> None:
    loss = float(np.mean(state.losses))
    state.history.append({"step": state.step, "examples": state.examples, "train_loss": loss, **scores})
    state.losses = []
    assert state.hooks is not None
    state.hooks("point", state)


def _evaluate(state: State, validation: Examples) -> bool:
    """Evaluate, keep the best tensors, and say whether patience has run out."""
    answers = answer(state.attached.model, validation, state.task, precision=state.training.precision)
    score = state.task.score(validation.labels.numpy(), answers.predictions)
    loss = float(np.average(answers.losses, weights=answers.weights))
    _point(state, {"validation_score": score, "validation_loss": loss})
    assert state.hooks is not None
    found = (state.task.goodness(score), -loss)
    # In the middle of a method's schedule neither is kept: patience would end it before what it is for. Nor after the
    # first step of a warm-up, whose learning rate is zero: weights that have not moved are no outcome of training.
    moved = state.training.factor(state.step - 1, state.total) > 0
    if moved and state.hooks.ready(state):
        if state.best is None or found > (state.task.goodness(state.best["score"]), -state.best["loss"]):
            state.best = {"score": score, "loss": loss, "step": state.step}
            state.best_tensors = state.attached.tensors()
            state.waited = 0
        else:
            state.waited += 1
    state.hooks("evaluated", state)
    return bool(state.training.patience) and state.waited >= state.training.patience
