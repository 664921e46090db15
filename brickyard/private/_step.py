"""The private step: Poisson batches, clipped gradients of single rows, noise, AdamW; and the account it keeps.

    batch  B: each of n rows with probability q = batch / n, anew every step; it may be empty, and still counts
    g      = (sum over b in B of min(1, C/|g_b|) g_b + sigma C N(0, I)) / (q n)        then AdamW on g

Noise and sampling are drawn from the operating system's entropy, never from a seed: who knows the seed could take the
noise off again. Two runs of one command therefore differ. The weights kept are those of the last step: to keep the best
by validation would let rows that nobody counted choose among them (`keep="best"` does it, for public validation rows).

The guarantee is of the weights, towards any one row of train that is or is not there. Learning curves, receipts and
scores are computed without noise and are for the owner's eyes. A choice among runs (learning rates, seeds) looks at
all of them, so their costs add up: `core.privacy.compose`.

Sources: Abadi et al. 2016, arXiv 1607.00133 (DP-SGD); division by the expected batch size: ibid., algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.attached import Attached
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.loop import Backprop, State, Training, autocast
from brickyard.core.objective import model_inputs
from brickyard.core.privacy import Mechanism, epsilon_of, listed
from brickyard.core.task import Task
from brickyard.private._engines import Engine, Factors, Inputs, RowByRow, choose, part, refuse_mixing
from brickyard.private._entropy import gaussian, generator
from brickyard.private._estimates import edgeworth_epsilon
from brickyard.private._per_sample import clip_factors

Keep = Literal["last", "best"]
_VIEW = "view "  # before the names of its tensors in a checkpoint
_COVERS = "the weights, towards one row of train more or less; not the learning curve, the receipt or the scores"
_ADJACENCY = "add-or-remove"  # of one row: what Poisson sampling is accounted for


class Poisson:
    """Batches that take each of `rows` rows with probability `rate`, independently, from the system's entropy."""

    def __init__(self, rows: int, rate: float) -> None:
        self.rows, self.rate = rows, rate

    def epoch(self, k: int) -> list[np.ndarray]:
        """Return ceil(1 / rate) new batches of ascending row numbers, each possibly empty; no two calls agree."""
        source = generator()
        return [np.flatnonzero(source.random(self.rows) < self.rate) for _ in range(math.ceil(1 / self.rate - 1e-9))]


def check_budget(epsilon: float, delta: float, clip: float, microbatch: int) -> None:
    """Raise UsageError for a budget that means nothing."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise UsageError(f"epsilon={epsilon}: give a finite number above 0.")
    if not 0 < delta < 1:
        raise UsageError(f"delta={delta}: give a probability above 0 and below 1/n.")
    if not (clip > 0 and math.isfinite(clip)):
        raise UsageError(f"clip={clip}: give a finite norm above 0.")
    if microbatch < 1:
        raise UsageError(f"microbatch={microbatch}: give 1 row or more.")


def sample_rate(training: Training, rows: int) -> float:
    """Return q = batch / rows; UsageError for a batch of more rows than there are."""
    if training.batch > rows:
        raise UsageError(
            f"batch={training.batch} is more than the {rows} rows of train; give a smaller batch (lora + dp:batch=64)."
        )
    return training.batch / rows


class View(Protocol):
    """Through what the gradients of rows are looked at: `Whole`, or a part that is cheaper to hide."""

    def factors(self, named: Mapping[str, nn.Parameter]) -> Factors: ...
    def shapes(self, named: Mapping[str, nn.Parameter]) -> dict[str, torch.Size]: ...
    def gradients(self, noisy: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None: ...


class Whole:
    """Every number of every gradient."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        pass

    def factors(self, named: Mapping[str, nn.Parameter]) -> Factors:
        """No matrix is seen through factors."""
        return {}

    def shapes(self, named: Mapping[str, nn.Parameter]) -> dict[str, torch.Size]:
        """What is summed over rows: name -> shape."""
        return {name: p.shape for name, p in named.items()}

    def gradients(self, noisy: dict[str, Tensor]) -> dict[str, Tensor]:
        """The noisy sums are the gradients."""
        return noisy

    def state_dict(self) -> dict[str, Tensor]:
        """It remembers nothing."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `state_dict`."""


class LastWeights:
    """A callback by which only the weights of the last step may be kept."""

    def ready(self, state: State) -> bool:
        """Whether the run has taken all of its steps."""
        return state.step == state.total


class PrivateStep(Backprop):
    """See the file's head. `noise_for(sample_rate, steps)` gives the noise multiplier, `set_by` says what set it.

    Raises UsageError for a batch larger than the data, a delta of 1/n or more, or patience without public validation;
    Refused for arms whose loss is not a sum over rows.
    """

    def __init__(
        self,
        attached: Attached,
        training: Training,
        *,
        rows: int,
        task: Task,
        noise_for: Callable[[float, int], float],
        clip: float,
        delta: float,
        microbatch: int,
        keep: Keep,
        order: int = 1,
        view: Callable[[Mapping[str, nn.Parameter]], View] = Whole,
        set_by: Callable[[float, int], str] = lambda rate, steps: "the certified bound",
    ) -> None:
        _check(attached, training, rows, delta, keep)
        super().__init__(attached, training)
        if keep == "last":
            attached.callbacks = (*attached.callbacks, LastWeights())
        self.model, self.task, self.rows = attached.model, task, rows
        self.clip, self.delta, self.microbatch, self.order = clip, delta, microbatch, order
        rate, steps = sample_rate(training, rows), training.total_steps(rows)
        self.whole, self.set_by = Mechanism(noise_for(rate, steps), rate, steps), set_by(rate, steps)
        self.mechanism = replace(self.whole, steps=0)
        self.earlier: list[Mechanism] = []  # of a run that was resumed under other settings
        self.view = view(self.named)
        self.engine: Engine | None = None
        self.loss = 0.0

    def sampler(self, lengths: np.ndarray, training: Training) -> Poisson:
        """Return Poisson batches of all rows of train; Refused for a choice of rows, which no account covers."""
        if len(lengths) != self.rows:
            raise Refused(
                f"a private step samples all {self.rows} rows of train, {len(lengths)} were chosen: the choice itself "
                "looks at private rows. Leave the curriculum out."
            )
        return Poisson(self.rows, self.mechanism.sample_rate)

    def __call__(self, state: State, batches: list[tuple[float, Inputs]]) -> float:
        """Take a step; return the mean loss of the rows drawn, or the last one where there is none."""
        named = self.named
        factors = self.view.factors(named)
        device = next(iter(named.values())).device
        sums = {
            name: torch.zeros(shape, dtype=torch.float32, device=device)
            for name, shape in self.view.shapes(named).items()
        }
        losses = []
        for _, inputs in batches:
            rows = len(inputs["labels"])
            for start in range(0, rows, self.microbatch):
                losses.append(self._add(part(inputs, start, min(start + self.microbatch, rows)), factors, sums, state))
        self._noise(sums, device)
        expected = self.mechanism.sample_rate * self.rows
        gradients = self.view.gradients({name: t.div_(expected) for name, t in sums.items()})
        for name, p in named.items():
            p.grad = gradients[name].to(p.dtype)
        factor = self.training.factor(state.step, state.total)
        for group in self.optimiser.param_groups:
            group["lr"] = self.training.lr * group["lr_scale"] * factor
        assert state.hooks is not None
        state.hooks("before_step", state)
        self.optimiser.step()
        state.hooks("after_step", state)
        self.optimiser.zero_grad(set_to_none=True)
        self.mechanism = replace(self.mechanism, steps=self.mechanism.steps + 1)
        if losses:
            self.loss = float(torch.cat(losses).mean())
        return self.loss

    def _add(self, inputs: Inputs, factors: Factors, sums: dict[str, Tensor], state: State) -> Tensor:
        """Add the clipped gradients of a micro-batch's rows; return their losses."""
        if self.engine is None and len(inputs["labels"]) > 1:
            plain = partial(self._losses, state, precision="float32")
            self.engine = choose(self.model, self.named, plain, part(inputs, 0, 2))
        engine = self.engine or RowByRow(self.model, self.named)
        engine.factors = factors
        losses = partial(self._losses, state, precision=self.training.precision)
        losses_B, norm_B = engine.add(losses, inputs, partial(clip_factors, clip=self.clip), sums)
        if not (losses_B.isfinite().all() and norm_B.isfinite().all()):
            raise NotFinite(
                f"the loss or the gradient of a row is not finite at step {state.step + 1}, {self._where(state)}; "
                "lower lr."
            )
        return losses_B

    def _losses(self, state: State, call: Callable[..., Any], inputs: Inputs, *, precision: str) -> Tensor:
        with autocast(state.accelerator, precision):  # type: ignore[arg-type]
            logits = call(**model_inputs(inputs)).logits
        return self.task.losses(logits, inputs["labels"])

    def _noise(self, sums: dict[str, Tensor], device: torch.device) -> None:
        scale = self.mechanism.noise_multiplier * (self.clip if math.isfinite(self.clip) else 1.0)
        if scale == 0:
            return
        source = generator()
        for tensor in sums.values():
            tensor.add_(gaussian(tensor.shape, source, device), alpha=scale)

    def report(self) -> dict[str, Any]:
        """Return what was spent: the certified epsilon, and the Edgeworth estimate beside it."""
        taken = [m for m in (*self.earlier, self.mechanism) if m.steps]
        found = {
            "epsilon": epsilon_of(taken, self.delta),
            "delta": self.delta,
            "kind": "certified",
            "adjacency": _ADJACENCY,
            "estimate": self._estimate(taken),
            "noise_multiplier": self.mechanism.noise_multiplier,
            "noise_set_by": self.set_by,
            "sample_rate": self.mechanism.sample_rate,
            "steps": sum(m.steps for m in taken),
            "clip": self.clip,
            "rows": self.rows,
            "per_sample_gradients": type(self.engine).__name__ if self.engine else None,
            "covers": _COVERS,
            "mechanisms": listed(taken),
        }
        return {"privacy": found}

    def planned(self) -> dict[str, Any]:
        """Return what all steps of the run will have cost, to be composed with other runs."""
        return {
            "delta": self.delta,
            "kind": "certified",
            "adjacency": _ADJACENCY,
            "mechanisms": listed([self.whole]),
        }

    def _estimate(self, taken: list[Mechanism]) -> dict[str, Any]:
        how = {"kind": "estimate", "accountant": f"Edgeworth, order {self.order}"}
        if len(taken) != 1:
            return {**how, "epsilon": None, "because": f"{len(taken)} noise levels; the series is for one"}
        try:
            return {**how, "epsilon": edgeworth_epsilon(taken[0], self.delta, self.order)}
        except Refused as reason:
            return {**how, "epsilon": None, "because": str(reason)}

    def state_dict(self) -> dict[str, Tensor]:
        """AdamW's state and the account: one line (noise multiplier, sampling rate, steps) for each mechanism."""
        rows = [[m.noise_multiplier, m.sample_rate, m.steps] for m in (*self.earlier, self.mechanism)]
        return {
            "account": torch.tensor(rows, dtype=torch.float64),
            "loss": torch.tensor(self.loss, dtype=torch.float64),
            **{_VIEW + name: tensor for name, tensor in self.view.state_dict().items()},
            **super().state_dict(),
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take up the state and what was spent: epsilon never falls, whatever settings the run goes on with."""
        rest = dict(tensors)
        account = [Mechanism(float(s), float(q), int(t)) for s, q, t in rest.pop("account").tolist()]
        self.loss = float(rest.pop("loss"))
        now = self.mechanism
        same = account[-1].noise_multiplier == now.noise_multiplier and account[-1].sample_rate == now.sample_rate
        self.earlier = account[:-1] if same else account
        self.mechanism = account[-1] if same else now
        of_view = [name for name in rest if name.startswith(_VIEW)]
        self.view.load_state_dict({name.removeprefix(_VIEW): rest.pop(name) for name in of_view})
        super().load_state_dict(rest)


def _check(attached: Attached, training: Training, rows: int, delta: float, keep: Keep) -> None:
    if not 0 < delta < 1 / rows:
        raise UsageError(
            f"delta={delta:g} with {rows} rows of train: at 1/n or more a mechanism that publishes a random row would "
            f"pass. Give a delta below {1 / rows:.2g}, such as {10.0 ** math.floor(math.log10(0.1 / rows)):g}."
        )
    if training.patience and keep == "last":
        raise UsageError(
            "patience stops a run by its validation scores, and keep=last says that they decide nothing; set "
            "patience=0, or keep=best where the validation rows are public."
        )
    for what, there in {
        "an objective": attached.objective is not None,
        "a term of the loss that is no row's own": attached.extra_loss is not None,
        "a way to save memory": attached.convert is not None,
    }.items():
        if there:
            raise Refused(f"a private step clips the loss of each row, and the arm has {what}; leave it out.")
    refuse_mixing(attached.model)
