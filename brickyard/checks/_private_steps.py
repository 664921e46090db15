"""A private step beside the plain one, on made-up full batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from brickyard.checks._steps import TASK, attached, random_batch
from brickyard.core.base import Base
from brickyard.core.loop import Backprop, Hooks, State, Training, train_mode
from brickyard.private import dp

BATCHES = 100  # of rows that the private step believes to sample from


def step_of(base: Base, arm: str, batch: int, tokens: int, microbatch: int = 0) -> Callable[[], Any]:
    """Return one step of `arm`: private, its batch taken `microbatch` rows at a time, or the loop's own for 0."""
    made = attached(base, arm)
    training = Training(batch=batch, steps=1000, lr=1e-5, precision="float32")
    if microbatch:
        config = dp.Config(epsilon=8.0, delta=1e-7, microbatch=microbatch)
        step: Any = dp.step(config, made, training, rows=BATCHES * batch, task=TASK)
    else:
        step = Backprop(made, training)
    inputs, _ = random_batch(base, batch, tokens)
    labels = torch.randint(2, (batch,), generator=torch.Generator().manual_seed(1))
    state = State(made, TASK, training, 1000, Accelerator(cpu=True), hooks=Hooks([]))
    train_mode(made.model)
    return partial(step, state, [(1.0, {**inputs, "labels": labels})])
