"""Zeroth-order steps on a model whose blocks come to the fast tier one after the other, each once a step.

The model is cut into units: its blocks, which travel, and the modules around them, which stay. While a step runs, a
unit's parameters are there only as long as the unit itself computes, and hold what its pass needs:

    enter, pass 0     deferred update of the step before; += eps z     theta + eps z     theta of a block just arrived
    enter, pass 1     -= 2 eps z                                       theta - eps z
    leave, pass 1     the block goes back as it is: the next update takes the eps z back too

Whoever reads a weight outside of its own unit finds it empty, so a model that is no chain fails instead of training on
the wrong sign. A parameter that several units hold (a tied embedding) is kept in both signs during a step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core import noise
from brickyard.core.errors import Refused, RunFailed, UsageError
from brickyard.core.forwards import refuse_unlike_forwards
from brickyard.optim._lockstep import Lockstep
from brickyard.optim._slow_tier import Block, FileTier, Tier
from brickyard.optim._zo_guards import check_eps, check_slots, own_casts, refuse_to_go_on
from brickyard.optim._zo_step import Estimate, Query, Rate, descend_, move_


@dataclass(frozen=True)
class Pending:
    """An update that waits: along z(key), with this slope and rate; of a step that was skipped the slope is None."""

    key: int
    slope: float | None
    lr: float


@dataclass(frozen=True)
class Trained:
    """How a parameter trains: its number in the noise, the factor of its learning rate, its weight decay."""

    number: int
    lr_scale: float = 1.0
    decay: float = 0.0


@dataclass(eq=False)
class Unit:
    """A module with the parameters that it alone holds, by name; `block` is its place in the slow tier, if it travels.

    `tensors` are what the parameters show while the unit computes; those of a block are made when it arrives.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    block: int | None = None
    tensors: list[Tensor] = field(default_factory=list)


@dataclass
class Chain:
    """A model cut into units. `shared` are the parameters of several units, and of modules that enclose the blocks."""

    blocks: list[Unit]
    ends: list[Unit]
    shared: dict[str, nn.Parameter]
    aliases: dict[str, str]  # every name of a parameter -> its first
    ends_block: Block  # the ends and what is shared, as they are packed in a file
    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[str]) -> Chain:
        """Cut `model`, whose blocks are the modules called `blocks`, in the order in which they compute.

        Raises Refused where there are fewer than two, or where a block holds a parameter that is not its alone.
        """
        if len(blocks) < 2:
            raise Refused(f"{type(model).__name__} is no chain of repeated blocks: {len(blocks)} were found.")
        names = {id(p): name for name, p in model.named_parameters()}
        around = {block.rsplit(".", n)[0] for block in blocks for n in range(1, block.count(".") + 1)} | {""}
        cut = [Unit(name, model.get_submodule(name), {}, i) for i, name in enumerate(blocks)]
        ends: dict[int, Unit] = {}
        holders: dict[str, list[str]] = {}
        for path in sorted(around):
            parent = model.get_submodule(path)
            for p in parent.parameters(recurse=False):
                # It may be read before the blocks and behind them, so it is kept in both signs.
                holders.setdefault(names[id(p)], []).extend([path or "the model", "its forward"])
            for child_name, child in parent.named_children():
                child_path = f"{path}.{child_name}" if path else child_name
                if child_path in around or child_path in blocks:
                    continue
                ends.setdefault(id(child), Unit(child_path, child, {}))
                for p in child.parameters():
                    holders.setdefault(names[id(p)], []).append(child_path)
        for unit in cut:
            for p in unit.module.parameters():
                holders.setdefault(names[id(p)], []).append(unit.name)
        found = dict(model.named_parameters())
        for unit in (*cut, *ends.values()):
            for p in unit.module.parameters():
                name = names[id(p)]
                if len(holders[name]) == 1:
                    unit.parameters[name] = p
                elif unit.block is not None:
                    raise Refused(f"{name} is held by {' and '.join(holders[name][:2])}; a block must hold its own.")
        shared = {name: found[name] for name, held in holders.items() if len(held) > 1}
        aliases = {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        units = [unit for unit in ends.values() if unit.parameters]
        stay = {name: p for unit in units for name, p in unit.parameters.items()} | shared
        return cls(cut, units, shared, aliases, Block.of("ends", stay), model)

    def layout(self, stored: torch.dtype | None = None) -> list[Block]:
        """Return the blocks as they lie in the slow tier, their numbers stored as `stored` or as they are."""
        return [Block.of(unit.name, unit.parameters, stored) for unit in self.blocks]

    def off_meta(self, model: nn.Module, device: torch.device) -> None:
        """Put empty parameters on `device` in the place of those that have no memory; Refused for such a buffer."""
        for name, buffer in model.named_buffers():
            if buffer.is_meta:
                raise Refused(
                    f"buffer {name} of the model has no memory; build the model under accelerate's "
                    "init_empty_weights(include_buffers=False)."
                )
        made: dict[str, nn.Parameter] = {}
        for name, first in self.aliases.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            p = module.get_parameter(leaf)
            if p.is_meta:
                empty = torch.empty(0, dtype=p.dtype, device=device)
                made.setdefault(first, nn.Parameter(empty, requires_grad=p.requires_grad))
                module.register_parameter(leaf, made[first])
        for held in (*(unit.parameters for unit in (*self.blocks, *self.ends)), self.shared):
            held.update({name: made[name] for name in held if name in made})


class Streamed:
    """Plain ZO-SGD on a chain whose blocks lie in a slow tier.

    Args:
        chain: the model, cut. Its parameters show nothing useful of a block from here on, except while it computes.
        tier: where the blocks lie; `ends`, uint8, holds what does not travel, packed as `chain.ends_block` says, or is
            None where those parameters stay as they are.
        trained: how each trainable parameter trains, by name; the others are only carried.
        slots: blocks in the fast tier at once; with `overlap`, one of them is under way while another computes.
        done, pending: where a stored run stands.
    """

    def __init__(
        self,
        chain: Chain,
        tier: Tier,
        *,
        trained: Mapping[str, Trained],
        seed: int,
        eps: float,
        device: torch.device,
        slots: int = 2,
        overlap: bool = True,
        ends: Tensor | None = None,
        done: int = 0,
        pending: Pending | None = None,
    ) -> None:
        check_slots(slots, overlap)
        check_eps(eps)
        self.chain, self.tier, self.trained, self.seed, self.eps = chain, tier, dict(trained), seed, eps
        self.steps, self.pending = done, pending
        self.skipped = self.in_a_row = 0
        self._slots = [torch.empty(max(b.bytes for b in tier.blocks), dtype=torch.uint8, device=device)]
        self._slots += [torch.empty_like(self._slots[0]) for _ in range(slots - 1)]
        self._place_ends(ends)
        for unit in chain.blocks:
            self._rest(unit)
        self._coming: dict[int, Future[None]] = {}
        self._leaving: list[Future[None]] = []
        self._mover = ThreadPoolExecutor(1, "blocks") if overlap else None
        self._stream = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        self._baton = Lockstep()
        self._key: int | None = None  # of the step that runs
        self._visited: list[Unit] = []
        self._unit: Unit | None = None
        self._plus: list[Tensor] = []
        self._whole = True  # the weights in memory and in the slow tier belong to one step
        self._hooks = [
            handle
            for unit in (*chain.blocks, *chain.ends)
            for handle in (
                unit.module.register_forward_pre_hook(partial(self._enter, unit)),
                unit.module.register_forward_hook(partial(self._leave, unit)),
            )
        ]

    @property
    def fast_bytes(self) -> int:
        """Bytes of parameters in the fast tier at most: the ends, both signs of what is shared, slots, staging."""
        stay = sum(t.nbytes for unit in self.chain.ends for t in unit.tensors)
        shared = 2 * sum(t.nbytes for t in self._minus)
        return stay + shared + sum(slot.nbytes for slot in self._slots) + self.tier.staging_bytes

    @property
    def weights(self) -> Path:
        """The safetensors file that counts: after `flush` an ordinary checkpoint. UsageError where there is none."""
        if not isinstance(self.tier, FileTier):
            raise UsageError("the blocks lie in host memory, not in a file; read the model's parameters after flush().")
        return self.tier.weights

    def step(self, loss: Callable[[], Tensor], lr: float) -> float:
        """Estimate along the noise of this step and decide its update; return the mean of the two losses.

        `loss` runs the model forward once and returns a scalar; it is called twice, on the same batch. The update
        itself happens when the blocks come by next: in the next step, in `flush`, or before any other forward. Where a
        loss is no number, the weights stay what they were, and `skipped` counts it. Raises Refused where the model is
        no chain or its two forwards would differ, NotFinite where too many losses in a row were no numbers, RunFailed
        after a step or a flush that was interrupted: from then on nothing is updated, stored or computed; `close` is
        all that is left to do.
        """
        self._refuse_broken()
        refuse_unlike_forwards(self.chain.model)
        self._whole = False
        key = noise.key(self.seed, self.steps, 0, 0)
        try:
            self._begin(key)
            plus, minus = self._baton.run(partial(self._pass, loss))
            self._end(key)
        except RuntimeError as error:
            if re.search(r"\b(shapes?|sizes?|dimensions?|empty)\b|\d-D\b", str(error)):
                error.add_note("zo2: a weight is empty while its own module does not compute; see Streamed.")
            raise
        finally:
            self._key = self._unit = None
        slope = (plus - minus) / (2 * self.eps)
        known = math.isfinite(slope)
        self.skipped, self.in_a_row = self.skipped + (not known), 0 if known else self.in_a_row + 1
        self._commit(Pending(key, slope if known else None, lr), 1)
        refuse_to_go_on(self.in_a_row, self.steps)
        return (plus + minus) / 2

    def flush(self) -> None:
        """Carry out the update of the last step, so that every weight is what it should be. Twice is once.

        Raises RunFailed after a step or a flush that was interrupted: the weights in memory are then part old, part new
        and part on their way, and storing them would overwrite the last whole ones.
        """
        self._refuse_broken()
        if self.pending is None:
            return
        self._whole = False  # a second try would update once more what the first has updated
        self._drain()
        for unit in self.chain.blocks:
            self._bring(unit)
            self._update(unit.parameters, unit.tensors)
            self._send(unit)
            self._rest(unit)
        for unit in self.chain.ends:
            self._update(unit.parameters, unit.tensors)
        self._update(self.chain.shared, self._minus)
        self._drain()
        self._commit(None, 0)

    def forget(self) -> None:
        """Drop the update that is pending: other weights are about to take the place of those it was meant for."""
        self._refuse_broken()
        self.pending = None

    def close(self) -> None:
        """Flush, take the hooks off, and let go of the slow tier: weights in host memory stay, files are closed.

        A run that was interrupted is closed without the flush; its files hold the last whole step.
        """
        try:
            if self._whole:
                self.flush()
        finally:
            wait([*self._coming.values(), *self._leaving])  # no copy may find its file closed
            for handle in self._hooks:
                handle.remove()
            self.tier.close()

    def _refuse_broken(self) -> None:
        if not self._whole:
            raise RunFailed(
                "a step or a flush was interrupted, so the weights in memory are none; open the run again, from its "
                "files or its last checkpoint."
            )

    def _place_ends(self, packed: Tensor | None) -> None:
        self._ends = torch.empty(0, dtype=torch.uint8) if packed is None else packed
        held = {name: p for unit in self.chain.ends for name, p in unit.parameters.items()} | self.chain.shared
        if packed is None:
            place = {name: p.data for name, p in held.items()}
        else:
            block = self.chain.ends_block
            place = dict(zip((piece.name for piece in block.pieces), block.views(packed), strict=True))
        for name, p in held.items():
            p.data = place[name]
        for unit in self.chain.ends:
            unit.tensors = [place[name] for name in unit.parameters]
        self._minus = [place[name] for name in self.chain.shared]

    def _begin(self, key: int) -> None:
        self._key, self._visited, self._unit = key, [], None
        self._drain()
        self._fetch_from(0)
        for unit in (*self.chain.blocks, *self.chain.ends):
            _hide(unit)
        self._update(self.chain.shared, self._minus)
        self._perturb(key, self.eps, self.chain.shared, self._minus)
        self._plus = [t.clone() for t in self._minus]
        self._perturb(key, -2 * self.eps, self.chain.shared, self._minus)

    def _pass(self, loss: Callable[[], Tensor]) -> float:
        with torch.no_grad(), own_casts():
            self._show_shared()
            return float(loss())

    def _end(self, key: int) -> None:
        missed = [unit.name for unit in self.chain.blocks if unit not in self._visited]
        if missed:
            raise Refused(f"the forward left out {len(missed)} blocks, such as {missed[0]}: the model is no chain.")
        for unit in self.chain.ends:
            if unit not in self._visited:  # a part that this task does not use drifts as it would in memory
                self._update(unit.parameters, unit.tensors)
                self._perturb(key, self.eps, unit.parameters, unit.tensors)
                self._perturb(key, -2 * self.eps, unit.parameters, unit.tensors)
            _show(unit, unit.tensors)
        for unit in self.chain.blocks:
            self._rest(unit)
        self._plus = []
        for p, tensor in zip(self.chain.shared.values(), self._minus, strict=True):
            p.data = tensor
        self._drain()

    def _commit(self, pending: Pending | None, steps: int) -> None:
        state = {"step": self.steps + steps, "pending": None if pending is None else asdict(pending)}
        self.tier.commit(self._ends, state | {"skipped": self.skipped, "in_a_row": self.in_a_row})
        self.pending, self.steps, self._whole = pending, self.steps + steps, True

    def _enter(self, unit: Unit, module: nn.Module, args: Any) -> None:
        """Give a unit that is about to compute the weights that its pass needs."""
        if self._key is None:
            self.flush()
            if unit.block is not None:
                if unit.block == 0:
                    self._drain()  # what a forward that broke off has left
                self._bring(unit)
            return
        if self._baton.current == 0:
            expected = sum(u.block is not None for u in self._visited)
            if self._baton.ended or unit in self._visited or unit.block not in (None, expected):
                raise Refused(
                    f"{unit.name} computes twice, or out of its turn: zo2 takes chains, each module of which computes "
                    "once in a forward, and whole batches (accumulation=1)."
                )
            self._visited.append(unit)
            self._unit = unit
            if unit.block is not None:
                self._bring(unit)
            else:
                _show(unit, unit.tensors)
            self._update(unit.parameters, unit.tensors)
            self._perturb(self._key, self.eps, unit.parameters, unit.tensors)
        else:
            if unit is not self._unit:
                raise Refused(f"{unit.name} computes in one of the two forwards only; they must take the same way.")
            self._perturb(self._key, -2 * self.eps, unit.parameters, unit.tensors)

    def _leave(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        """Let the other pass come to where this one is; after both, a block goes back to the slow tier."""
        if self._key is None:
            if unit.block is not None:
                self._rest(unit)
            return
        if self._baton.current == 1:
            self._unit = None
            if unit.block is not None:
                self._send(unit)
            _hide(unit)
        self._baton.hand_over()
        self._show_shared()

    def _show_shared(self) -> None:
        sign = self._plus if self._baton.current == 0 else self._minus
        for p, tensor in zip(self.chain.shared.values(), sign, strict=True):
            p.data = tensor

    def _update(self, parameters: Mapping[str, nn.Parameter], tensors: Sequence[Tensor]) -> None:
        """Carry out the pending update, in place."""
        if (pending := self.pending) is None:
            return
        slopes = () if pending.slope is None else (Query(pending.key, 1.0, pending.slope),)
        found = Estimate(slopes, math.nan, [(pending.key, self.eps)])
        for how, tensor in self._trained_of(parameters, tensors):
            if slopes:
                descend_([(how.number, tensor)], found, {how.number: Rate(pending.lr * how.lr_scale, how.decay)})
            else:
                move_([(how.number, tensor)], found.back)

    def _perturb(
        self, key: int, scale: float, parameters: Mapping[str, nn.Parameter], tensors: Sequence[Tensor]
    ) -> None:
        for how, tensor in self._trained_of(parameters, tensors):
            move_([(how.number, tensor)], [(key, scale)])

    def _trained_of(
        self, parameters: Mapping[str, nn.Parameter], tensors: Sequence[Tensor]
    ) -> Iterator[tuple[Trained, Tensor]]:
        for name, tensor in zip(parameters, tensors, strict=True):
            if name in self.trained:
                yield self.trained[name], tensor

    def _fetch_from(self, first: int) -> None:
        """Send for the blocks that there are slots for, from `first` on."""
        for i in range(first, min(first + len(self._slots), len(self.chain.blocks))):
            if i not in self._coming:
                self._coming[i] = self._move(self.tier.read, i, self._slots[i % len(self._slots)])

    def _bring(self, unit: Unit) -> None:
        assert unit.block is not None
        # The slot of a block behind this one is that of a block before it, whose way back was ordered earlier.
        self._fetch_from(unit.block)
        self._coming.pop(unit.block).result()
        block = self.tier.blocks[unit.block]
        views = dict(
            zip((p.name for p in block.pieces), block.views(self._slots[unit.block % len(self._slots)]), strict=True)
        )
        unit.tensors = [views[name] for name in unit.parameters]
        _show(unit, unit.tensors)

    def _send(self, unit: Unit) -> None:
        assert unit.block is not None
        if not self.tier.in_place or any(name in self.trained for name in unit.parameters):
            slot = self._slots[unit.block % len(self._slots)]
            key = noise.key(self.seed, self.steps, 1 if self._key is None else 0)
            self._leaving.append(self._move(self.tier.write, unit.block, slot, key))

    def _rest(self, unit: Unit) -> None:
        assert unit.block is not None
        places = dict(
            zip((p.name for p in self.tier.blocks[unit.block].pieces), self.tier.resting(unit.block), strict=True)
        )
        _show(unit, [places[name] for name in unit.parameters])
        unit.tensors = []

    def _move(self, move: Callable[..., None], *arguments: Any) -> Future[None]:
        """Order a copy between the tiers; they happen one after the other, in the order in which they were ordered."""
        if self._mover is None:
            done: Future[None] = Future()
            done.set_result(move(*arguments))
            return done
        if self._stream is None:
            return self._mover.submit(move, *arguments)
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._stream.device))  # of the caller, in either pass: see Lockstep
        return self._mover.submit(self._move_beside, computed, move, arguments)

    def _move_beside(self, computed: Any, move: Callable[..., None], arguments: Any) -> None:
        """Copy on a stream of its own, after what was computed when the copy was ordered."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            move(*arguments)
            self._stream.synchronize()

    def _drain(self) -> None:
        """Wait for every copy under way; an error of a write is raised here."""
        waiting, self._leaving = self._leaving, []
        coming, self._coming = list(self._coming.values()), {}
        wait([*coming, *waiting])
        for copy in (*coming, *waiting):
            copy.result()


def _hide(unit: Unit) -> None:
    for p in unit.parameters.values():
        p.data = p.data.new_empty(0)


def _show(unit: Unit, tensors: Sequence[Tensor]) -> None:
    for p, tensor in zip(unit.parameters.values(), tensors, strict=True):
        p.data = tensor
