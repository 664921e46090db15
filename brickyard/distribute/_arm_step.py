"""one-byte as the step of an arm: alone, or one of the members that torch.distributed has brought together."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from brickyard.core.attached import copy_into
from brickyard.core.batches import Order
from brickyard.core.errors import NotFinite, ParityBroken, Refused
from brickyard.core.forwards import refuse_readers, refuse_tuner
from brickyard.core.loop import State, Training, autocast, batch_loss
from brickyard.distribute._members import Members, launched

if TYPE_CHECKING:
    import numpy as np

    from brickyard.core.attached import Attached

LOG = "run.zolog"


def named(attached: Attached) -> dict[str, Tensor]:
    """Return the arm's trainable parameters by name, each once, in the model's order."""
    wanted = {id(p) for p in attached.parameters()}
    return {name: p.data for name, p in attached.model.named_parameters() if id(p) in wanted}


class Together:
    """Tells the loop to keep the last weights where there are several members, whose validation rows may differ."""

    def __init__(self, world: int) -> None:
        self.world = world

    def ready(self, state: State) -> bool:
        return self.world == 1


class OneByteStep:
    """The loop's step: a round of a member, whose every estimate asks about the member's whole batch.

    The log lies in a temporary file and in the checkpoints; a brick takes it along as `run.zolog`.
    """

    backward = False
    optimiser = None

    def __init__(
        self, config: Any, attached: Attached, training: Training, rows: int, member: Callable[..., Any]
    ) -> None:
        refuse_tuner(attached.model)
        launched()
        self.attached, self.training = attached, training
        self.config = replace(config, lr=training.lr * _scale(attached, training))
        self.parameters = named(attached)
        self.members = Members(None, next(iter(self.parameters.values())).device)
        plans = {json.loads(text) for text in self.members.texts(json.dumps(training.total_steps(rows)))}
        if len(plans) > 1:
            raise Refused(
                f"the members would run {sorted(plans)} rounds, for their rows, batches or epochs differ; "
                "give all the same --steps, so that nobody waits for a round that does not come."
            )
        if self.members.world > 1:
            attached.callbacks = (*attached.callbacks, Together(self.members.world))
        self.start = {name: theta.clone() for name, theta in self.parameters.items()}
        self.place = tempfile.TemporaryDirectory(prefix="brickyard-one-byte-")
        self.path = Path(self.place.name) / LOG
        self.make, self.member = member, None
        self.last = math.nan

    def sampler(self, lengths: np.ndarray, training: Training) -> Order:
        """Return this member's own order of its rows."""
        return Order(lengths, training.batch, seed=training.seed + 1_000_003 * self.members.rank, bucket=False)

    def __call__(self, state: State, batches: list[tuple[float, dict[str, Any]]]) -> float:
        """Run one round; return the mean loss of this member's estimates, of a round without one the last that was.

        Raises, on every member alike, NotFinite where a member has no finite loss in the first round, and what joining
        and the round itself raise.
        """
        assert state.hooks is not None
        refuse_readers(state.hooks.callbacks)
        self.attached.model.eval()
        member = self.member or self._join(state)
        state.hooks("before_step", state)

        def loss(t: int, j: int) -> Tensor:
            with autocast(state.accelerator, self.training.precision):
                parts = [weight * batch_loss(self.attached, state.task, inputs) for weight, inputs in batches]
            total = torch.stack(parts).sum()
            return total if self.attached.extra_loss is None else total + self.attached.extra_loss()

        found = member.round(loss)
        if member.log.rounds == 1:
            self._refuse_to_begin(member)
        if math.isfinite(found):
            self.last = found
        state.hooks("after_step", state)
        return self.last

    def _refuse_to_begin(self, member: Any) -> None:
        """Raise NotFinite where the log's first round holds no number of a member: all read it, so all stop."""
        p_n = member.log.scalars(0, 1)[0]
        none = (p_n == 0) & p_n.signbit()
        dealt = [member.dealt(rank) for rank in range(self.members.world)]
        odd = [rank for rank, js in enumerate(dealt) if none[js.start : js.stop].all()]
        if odd:
            whose = f"the loss of members {odd}" if self.members.world > 1 else "the loss"
            raise NotFinite(f"{whose} is not finite in the first round; check the data and the base.")

    def _join(self, state: State) -> Any:
        """Meet the others at the weights of the base, and come back by the log to where the loop stands.

        Raises, on every member, Refused where the loops stand at different steps or the logs are not that long,
        ParityBroken where a log does not lead to the weights of its member's checkpoint.
        """
        steps = [int(text) for text in self.members.texts(str(state.step))]
        if len(set(steps)) > 1:
            at = "; ".join(f"members {[r for r, s in enumerate(steps) if s == n]} at {n}" for n in sorted(set(steps)))
            raise Refused(
                f"the members' checkpoints are of different steps ({at}), so some would wait for rounds that do not "
                "come. Delete the checkpoints (step-*) in the folders of all members and start all again."
            )
        stored = {name: theta.clone() for name, theta in self.parameters.items()}
        copy_into(self.parameters, self.start, "one-byte")
        member = self.make(
            self.parameters,
            self.config,
            seed=self.training.seed,
            log=self.path,
            model=self.attached.model,
            rounds=state.step,
        )
        if member.log.rounds != state.step:
            raise Refused(
                f"the loop stands at step {state.step}, the log that the members agree on holds {member.log.rounds} "
                "rounds. Delete the checkpoints (step-*) in the folders of all members and start all again."
            )
        same = not state.step or all(torch.equal(stored[name], theta) for name, theta in self.parameters.items())
        odd = [rank for rank, text in enumerate(self.members.texts(str(int(same)))) if text == "0"]
        if odd:
            raise ParityBroken(
                f"the log of {state.step} rounds does not lead to the weights in the checkpoints of members {odd}; "
                "delete the checkpoints (step-*) in the folders of all members and start all again."
            )
        self.start, self.member = {}, member
        return member

    def report(self) -> dict[str, Any]:
        """Return what travelled, and what was clipped or skipped since this process began."""
        told = {"estimates": self.config.estimates, "codec": self.config.codec, "members": self.members.world}
        if (member := self.member) is None:
            return told
        return told | {
            "rounds": member.log.rounds,
            "payload_bytes": member.payload_bytes,
            "log_bytes": self.path.stat().st_size,
            "clipped": member.clipped,
            "skipped": member.skipped,
        }

    def files(self, steps: int) -> dict[str, bytes]:
        """Return what a brick carries beside its tensors: the log up to `steps` rounds, which rebuilds them."""
        if self.member is None:
            return {}
        log = self.member.log
        return {LOG: self.path.read_bytes()[: self.path.stat().st_size - (log.rounds - steps) * log.round_bytes]}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the log as it is on the disk."""
        raw = self.path.read_bytes() if self.path.exists() else b""
        return {"log": torch.frombuffer(bytearray(raw), dtype=torch.uint8), "last": torch.tensor(self.last).double()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take `state_dict` back; the next round replays it from the base."""
        self.path.write_bytes(tensors["log"].numpy().tobytes())
        self.last = float(tensors["last"])


def _scale(attached: Attached, training: Training) -> float:
    """Return the factor of the learning rate; Refused for what the log could not tell whoever replays it."""
    given: Mapping[str, Any] = asdict(training)
    plain = {"schedule": "constant", "warmup": 0.0, "wd": 0.0}
    odd = [f"{name}={given[name]!r} (expected {value!r})" for name, value in plain.items() if given[name] != value]
    if odd:
        raise Refused(f"one-byte has one learning rate for the whole run and no decay: {', '.join(odd)}.")
    scales = {group.get("lr_scale", 1.0) for group in attached.parameter_groups if group["params"]}
    if len(scales) > 1:
        raise Refused("one-byte has one learning rate for all parameters, and this tuner has several; use lora.")
    return scales.pop()
