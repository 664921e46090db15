"""What a model answers to examples: classes and values, the nats of texts, and which of several texts it prefers.

Shapes: N examples, S texts (a preference pair has two, a multiple-choice question as many as choices), U units.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.completions import EncodedCompletions
from brickyard.core.documents import EncodedBlocks
from brickyard.core.errors import NotFinite, UsageError
from brickyard.core.task import PER_TEXT, Task

PREFERENCE_SCALE = 0.1  # beta of DPO: turns a margin in nats into the loss by which a preference is judged
_POSITIONS = 4096  # of a batch of texts: logits over a vocabulary are wide


class Examples(Protocol):
    """What the loop trains on: `batches.Encoded` or cached `states.States`."""

    labels: Tensor
    lengths: np.ndarray

    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def collate(self, index: np.ndarray) -> dict[str, Any]: ...


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors (and tuples of tensors) of a batch to a device."""
    move = lambda v: tuple(map(move, v)) if isinstance(v, tuple) else v.to(device)  # noqa: E731
    return {k: move(v) for k, v in inputs.items()}


@dataclass(frozen=True)
class Answers:
    """What a model says of the examples, in the order of the data.

    predictions: [N] classes, values, a text's nats, or 1 where the chosen text gained on the rejected one; losses: [N]
    nats (of a language model, per token) or squared errors; weights: [N] what an example counts in a mean loss; logits:
    [N, W], None of a language model.
    """

    predictions: np.ndarray
    losses: np.ndarray
    weights: np.ndarray
    logits: np.ndarray | None


def score_of(task: Task, examples: Examples, answers: Answers) -> dict[str, Any]:
    """Return {"metric", "mean"} of the answers to `examples`, with what tells how much that is.

    Of classes "majority", the score of one who always gives the examples' commonest; of texts "nats_per_token".
    """
    labels = examples.labels.numpy()
    score = {"metric": task.metric, "mean": task.score(labels, answers.predictions)}
    if task.labels is not None and len(labels):
        score["majority"] = task.score(labels, np.full_like(labels, np.bincount(labels).argmax()))
    if isinstance(examples, EncodedBlocks | EncodedCompletions) and task.metric in PER_TEXT:
        score["nats_per_token"] = float(answers.predictions.sum() / examples.tokens.sum())
    return score


def answer(model: nn.Module, examples: Examples, task: Task, *, precision: str = "float32") -> Answers:
    """Run `model` over all examples in evaluation mode; NotFinite where it gives no finite number."""
    if isinstance(examples, EncodedCompletions):
        return _judged(_nats(model, examples, precision), examples, task)
    if task.generative:
        assert isinstance(examples, EncodedBlocks)
        nats = _nats(model, examples, precision)
        return Answers(nats, nats / examples.tokens, examples.tokens.astype(np.float64), None)
    logits = predict(model, examples, precision=precision)
    losses = task.losses(torch.from_numpy(logits), examples.labels).numpy()
    return Answers(task.predict(logits), losses, np.ones(len(losses)), logits)


def _judged(nats_S: np.ndarray, examples: EncodedCompletions, task: Task) -> Answers:
    """Turn the nats of every text into answers: a completion's nats, the preferred one, or the most probable choice."""
    if task.kind == "instruct":
        return Answers(nats_S, nats_S / examples.tokens, examples.tokens.astype(np.float64), None)
    ones = np.ones(len(examples))
    if task.kind == "preference":
        margin = examples.margin(nats_S)
        return Answers((margin > 0).astype(np.int64), np.logaddexp(0.0, -PREFERENCE_SCALE * margin), ones, None)
    if task.metric == "accuracy_norm":
        nats_S = nats_S / examples.bytes
    scores_NC = examples.by_example(-nats_S)
    chosen = scores_NC.argmax(axis=1)
    total = np.logaddexp.reduce(scores_NC, axis=1)
    return Answers(chosen, total - scores_NC[np.arange(len(chosen)), examples.labels.numpy()], ones, None)


def nats(model: nn.Module, examples: EncodedCompletions, *, precision: str = "float32") -> np.ndarray:
    """Return the nats that `model` needs for every completion: [S]."""
    return _nats(model, examples, precision)


@torch.no_grad()
def _nats(model: nn.Module, examples: EncodedBlocks | EncodedCompletions, precision: str) -> np.ndarray:
    """Return the nats of every unit: [U]."""
    device = next(model.parameters()).device
    kind = nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)
    was_training = model.training
    model.eval()
    if isinstance(examples, EncodedCompletions):
        examples.instructions = bool(getattr(model, "reads_instructions", False))
    total = torch.zeros(len(examples.tokens), dtype=torch.float64)
    with kind:
        for rows in examples.parts(_POSITIONS):
            inputs = to_device(examples.texts(rows), device)
            targets = inputs.pop("labels").flatten()
            logits = model(**inputs).logits.float().flatten(0, 1)
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")  # 0 where nothing is asked
            total.index_add_(0, examples.units(rows).flatten(), losses.double().cpu())
    model.train(was_training)
    if not total.isfinite().all():
        raise NotFinite(f"the loss of {examples.report['unit']} {int((~total.isfinite()).nonzero()[0])} is not finite.")
    return total.numpy()


@torch.no_grad()
def predict(model: nn.Module, examples: Examples, *, batch: int = 64, precision: str = "float32") -> np.ndarray:
    """Return float32 logits [rows, width] in the order of the data; batches are cut by length, so padding is little."""
    device = next(model.parameters()).device
    kind = nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)
    was_training = model.training
    model.eval()
    rows = np.argsort(examples.lengths, kind="stable")
    out: np.ndarray | None = None
    with kind:
        for part in np.array_split(rows, math.ceil(len(rows) / batch)):
            inputs = to_device({k: v for k, v in examples.collate(part).items() if k != "labels"}, device)
            logits = model(**inputs).logits.float().cpu().numpy()
            if out is None:
                out = np.empty((len(rows), *logits.shape[1:]), dtype=np.float32)
            out[part] = logits
    model.train(was_training)
    if out is None:
        raise UsageError("there is no row to predict.")
    if not np.isfinite(out).all():
        raise NotFinite(f"the logits of row {int(np.argwhere(~np.isfinite(out))[0][0])} are not finite.")
    return out
