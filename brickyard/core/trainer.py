"""Our callbacks inside `transformers.Trainer`: an arm trained there gives the same numbers as in our own loop."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from brickyard.core.attached import Attached
from brickyard.core.errors import UsageError
from brickyard.core.loop import Hooks, Training
from brickyard.core.task import Task

# Trainer's schedules that are ours too.
SCHEDULES: dict[str, Any] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


@dataclass(frozen=True, kw_only=True)
class TrainersTraining(Training):
    """What Trainer's arguments say, in our words; the course of the learning rate is that of its own scheduler."""

    scheduler: Any = None
    named: str = "linear"

    @classmethod
    def of(cls, args: TrainingArguments, total: int, scheduler: Any) -> TrainersTraining:
        """Return the settings of a run of `total` optimiser steps under `args`."""
        accumulation = max(1, args.gradient_accumulation_steps)
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        warm = 0 if name == "constant" else args.get_warmup_steps(total)
        return cls(
            lr=args.learning_rate,
            wd=args.weight_decay,
            steps=total,
            batch=args.train_batch_size * accumulation,
            accumulation=accumulation,
            # Half a step less, so that rounding up gives back the same number of steps.
            warmup=max(0.0, min(warm, total) - 0.5) / total,
            schedule=SCHEDULES.get(name, "linear"),
            precision="bfloat16" if args.bf16 else "float32",
            clip=args.max_grad_norm or 0.0,
            seed=args.seed,
            scheduler=getattr(scheduler, "scheduler", scheduler),  # accelerate may have wrapped it
            named=name,
        )

    def factor(self, step: int, total: int) -> float:
        """Learning-rate factor of step `step` out of `total`: Trainer's own for the whole run, for a part of it the
        same rule over that part. UsageError where the schedule does not tell it by the step.
        """
        rules = getattr(self.scheduler, "lr_lambdas", None)
        if total == self.steps and rules:
            return float(rules[0](step))
        if total == self.steps or self.named not in SCHEDULES:
            raise UsageError(
                f"lr_scheduler_type={self.named!r} ({type(self.scheduler).__name__}) does not tell the learning rate "
                f"that this arm needs; choose one of {', '.join(SCHEDULES)}."
            )
        return super().factor(step, total)


class ArmCallback(TrainerCallback):
    """Runs an arm's callbacks at Trainer's hook points; `after_step` is `on_optimizer_step`, gradients still there."""

    def __init__(self, attached: Attached, task: Task) -> None:
        self.hooks = Hooks(attached.callbacks)
        self.state: Any = SimpleNamespace(
            attached=attached, task=task, training=None, total=0, step=0, history=[], hooks=self.hooks, optimiser=None
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Hand the callbacks the number of optimiser steps, their course, and the optimiser."""
        if state.max_steps <= 0:
            raise UsageError("Trainer does not know its number of steps; give max_steps or a data set with a length.")
        self.state.total, self.state.step = state.max_steps, state.global_step
        self.state.training = TrainersTraining.of(args, state.max_steps, given.get("lr_scheduler"))
        optimiser = given.get("optimizer")
        # Moments are held by AdamW, not by the wrapper that accelerate puts around it.
        self.state.optimiser = getattr(optimiser, "optimizer", optimiser)
        self.hooks("begin", self.state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the optimiser's step."""
        self.state.step = state.global_step
        self.hooks("before_step", self.state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the optimiser's step, before gradients are cleared."""
        self.hooks("after_step", self.state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After training."""
        self.hooks("end", self.state)


class ArmTrainer(Trainer):
    """`transformers.Trainer` for an attached arm: the task's loss, the arm's regulariser, groups and hooks."""

    def __init__(self, attached: Attached, task: Task, *, args: TrainingArguments, **options: Any) -> None:
        self.attached, self.task_of_arm = attached, task
        super().__init__(
            model=attached.model,  # type: ignore[arg-type]
            args=args,
            callbacks=[*options.pop("callbacks", []), ArmCallback(attached, task)],
            **options,
        )

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as Trainer does, keeping for backward what the arm says."""
        with self.attached.saving():
            return super().train(*args, **options)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """Evaluate as Trainer does, the model as it will be served."""
        with self.attached.serving():
            return super().evaluate(*args, **options)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """Return the mean loss of the arm's objective, else the task's, over the batch, plus the arm's regulariser."""
        outputs: Any = {}  # an objective reads what it wants of the model itself
        if self.attached.objective is not None:
            loss = self.attached.objective(self.attached.model, inputs)
        else:
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
            loss = self.task_of_arm.loss(outputs.logits.float(), inputs["labels"])
        if self.attached.extra_loss is not None and model.training:
            loss = loss + self.attached.extra_loss()
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Use the arm's parameter groups with AdamW, as our loop does."""
        if self.optimizer is None:
            groups = [
                {
                    "params": g["params"],
                    "lr": self.args.learning_rate * g.get("lr_scale", 1.0),
                    "weight_decay": g.get("weight_decay", self.args.weight_decay),
                    "lr_scale": g.get("lr_scale", 1.0),
                }
                for g in self.attached.parameter_groups
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, fused=True)
        return self.optimizer


class ClosureTrainer(ArmTrainer):
    """ArmTrainer for an optimiser that evaluates the loss itself, given as `optimizers=(optimiser, None)`.

    `optimiser.update(closure)` does the work of a step in `training_step`, in evaluation mode and without backward; the
    `step()` that Trainer calls afterwards must find it done. Raises UsageError for accumulated batches and for an
    optimiser without `update`.
    """

    def __init__(self, attached: Attached, task: Task, *, args: TrainingArguments, **options: Any) -> None:
        optimiser = options.get("optimizers", (None, None))[0]
        if not hasattr(optimiser, "update"):
            raise UsageError(
                f"ClosureTrainer was given the optimiser {type(optimiser).__name__}; one with update(closure) was "
                "expected: optimizers=(ZerothOrder(...), None)."
            )
        if args.gradient_accumulation_steps != 1:
            raise UsageError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}: a step without gradients "
                "has none to add up; raise per_device_train_batch_size instead."
            )
        super().__init__(attached, task, args=args, **options)

    def training_step(self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Update from the batch and return its loss."""
        model.eval()
        batch, extra = self._prepare_inputs(inputs), self.attached.extra_loss

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
            return loss if extra is None else loss + extra()

        prepared: Any = self.optimizer
        return getattr(prepared, "optimizer", prepared).update(closure)
