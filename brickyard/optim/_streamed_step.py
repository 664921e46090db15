"""The step of the training loop that `zo2` puts in the place of backpropagation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brickyard.core.attached import Attached
from brickyard.core.batches import Order
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.forwards import refuse_readers, refuse_tuner
from brickyard.core.loop import State, Training, autocast, batch_loss
from brickyard.core.task import Task
from brickyard.optim._slow_tier import HostTier
from brickyard.optim._streaming import Chain, Streamed, Trained


class StreamedStep:
    """Plain zeroth-order steps with the blocks in host memory; whoever asks the arm for its tensors gets them flushed.

    Raises Refused for accumulated batches, for a model that is no chain and for tuners with which no two losses can be
    compared; UsageError where nothing trains.
    """

    backward = False
    optimiser = None

    def __init__(
        self,
        chain: Chain,
        attached: Attached,
        training: Training,
        task: Task,
        *,
        eps: float,
        slots: int,
        overlap: bool,
    ) -> None:
        if training.accumulation != 1:
            raise Refused(f"zo2 runs a whole batch through each block; accumulation={training.accumulation}, not 1.")
        refuse_tuner(attached.model)
        self.attached, self.training, self.task = attached, training, task
        self._last = math.nan
        model = attached.model
        device = next(model.parameters()).device
        layout = chain.layout()
        given = [[u.parameters[piece.name] for piece in b.pieces] for u, b in zip(chain.blocks, layout, strict=True)]
        self.streamed = Streamed(
            chain,
            HostTier(layout, given, device),
            trained=_trained(attached, training.wd),
            seed=training.seed,
            eps=eps,
            device=device,
            slots=slots,
            overlap=overlap,
        )
        self._tensors, self._load = attached.tensors, attached.load
        attached.tensors, attached.load = self._flushed, self._replaced

    def sampler(self, lengths: np.ndarray, training: Training) -> Order:
        """Return the same order of rows as backpropagation has."""
        return Order(lengths, training.batch, seed=training.seed, bucket=training.bucket)

    def __call__(self, state: State, batches: list[tuple[float, dict[str, Any]]]) -> float:
        """Return the batch's mean loss over both sides of the estimate; of a skipped step, the last one."""
        [(_, inputs)] = batches
        assert state.hooks is not None
        refuse_readers(state.hooks.callbacks)
        self.attached.model.eval()  # dropout would make the two losses incomparable

        def loss() -> Tensor:
            with autocast(state.accelerator, self.training.precision):
                found = batch_loss(self.attached, self.task, inputs)
            return found if self.attached.extra_loss is None else found + self.attached.extra_loss()

        state.hooks("before_step", state)
        found = self.streamed.step(loss, self.training.lr * self.training.factor(state.step, state.total))
        if state.step + 1 == state.total:
            self.streamed.flush()
        state.hooks("after_step", state)
        if math.isfinite(found):
            self._last = found
        elif math.isnan(self._last):
            raise NotFinite("the loss is not finite in the first zeroth-order step; check the data and the base.")
        return self._last

    def state_dict(self) -> dict[str, Tensor]:
        """Return how far it is; the weights are flushed by whoever stores them."""
        counts = [self.streamed.steps, self.streamed.skipped, self.streamed.in_a_row]
        return {"counts": torch.tensor(counts), "last": torch.tensor(self._last).double()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take `state_dict` back."""
        self.streamed.steps, self.streamed.skipped, self.streamed.in_a_row = tensors["counts"].tolist()
        self._last = float(tensors["last"])

    def report(self) -> dict[str, Any]:
        """Return what moved, in counted bytes and blocks, and how many updates were skipped."""
        tier = self.streamed.tier
        return {
            "fast_bytes": self.streamed.fast_bytes,
            "bytes_read": tier.bytes_read,
            "bytes_written": tier.bytes_written,
            "blocks": len(tier.blocks),
            "block_bytes": max(block.bytes for block in tier.blocks),
            "updates_skipped": self.streamed.skipped,
        }

    def _flushed(self) -> dict[str, Tensor]:
        self.streamed.flush()
        return self._tensors()

    def _replaced(self, tensors: dict[str, Tensor]) -> None:
        self.streamed.forget()
        self._load(tensors)


def _trained(attached: Attached, wd: float) -> dict[str, Trained]:
    """Return how the parameters of an arm train; they are numbered in the order of its groups, as zo-sgd has it."""
    names = {id(p): name for name, p in attached.model.named_parameters()}
    found: dict[str, Trained] = {}
    for group in attached.parameter_groups:
        for p in group["params"]:
            how = Trained(len(found), group.get("lr_scale", 1.0), group.get("weight_decay", wd))
            found.setdefault(names[id(p)], how)
    if not found:
        raise UsageError("the arm has no trainable parameter; zo2 stands beside a tuner that trains some: full + zo2.")
    return found
