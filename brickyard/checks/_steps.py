"""Steps of training timed in turn: what one costs, as a ratio to another of the same round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from brickyard.core import measure
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import Base
from brickyard.core.batches import EncodedText, Order
from brickyard.core.build import build, resolve
from brickyard.core.loop import train_mode
from brickyard.core.states import States
from brickyard.core.task import Task

TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
_BATCHES = 4  # of the rows that steps are taken from


def attached(base: Base, arm: str, attention: str = "sdpa") -> Attached:
    """Return an arm on a base for two made-up classes."""
    return build(resolve(parse(arm), TASK), base, TASK, seed=0, attention=attention)


def random_batch(base: Base, batch: int, tokens: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Return full rows of random tokens, and the loss on random labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(base.config.vocab_size), (batch, tokens), generator=generator)
    labels = torch.randint(2, (batch,), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs, lambda logits: TASK.loss(logits, labels)


def random_rows(base: Base, rows: int, tokens: int) -> EncodedText:
    """Return rows of so many random tokens with random labels, as `encode` would."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(base.config.vocab_size), (rows * tokens,), generator=generator)
    return EncodedText(
        ids.to(torch.int32).numpy(),
        None,
        np.full(rows, tokens, dtype=np.int64),
        torch.randint(TASK.width, (rows,), generator=generator),
        labelled=True,
        pad=0,
        multiple=1,
        report={"rows": rows, "truncated": 0},
    )


def one_step(made: Attached, base: Base, batch: int, tokens: int) -> Callable[[], None]:
    """Return one step of training as the loop makes it: the rows of a batch put together, forward, backward, AdamW.

    Where the arm's states are kept they lie in the cache folder, and a step reads those of its rows from there.
    """
    rows = random_rows(base, _BATCHES * batch, tokens)
    if (prefix := made.prefix) is not None:
        of = f"{base.fingerprint}, {prefix.label}"
        rows = rows.keeping(States.of(prefix, rows, base=of, dtype=prefix.store))  # type: ignore[arg-type]
    order = itertools.cycle(Order(rows.lengths, batch, seed=0, bucket=False).epoch(0))
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-5, fused=True)
    train_mode(made.model)

    def step() -> None:
        inputs = rows.collate(next(order))
        labels = inputs.pop("labels")
        TASK.loss(made.model(**inputs).logits, labels).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def in_turn(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every step in each round; who begins changes, so that each meets every state alike."""
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in np.roll(list(steps), -turn):
            taken[name].append(measure.step_time(steps[name], warmup=0, repeats=1))
    return taken


def mean_ratio(ratios_R: np.ndarray) -> tuple[float, float, float]:
    """Return the geometric mean of paired ratios and its 95 % interval over rounds."""
    logs_R = np.log(ratios_R)
    reach = student.ppf(0.975, len(logs_R) - 1) * logs_R.std(ddof=1) / np.sqrt(len(logs_R))
    return float(np.exp(logs_R.mean())), float(np.exp(logs_R.mean() - reach)), float(np.exp(logs_R.mean() + reach))
