"""How a deep network is cut into parts, and which tensors each part owns: read off one run of it, not off names."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.base import blocks
from brickyard.core.base_config import quiet
from brickyard.core.errors import Refused, UsageError

META = 0  # in the place of a part's number: the meta network
_UNTOLD = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "architectures",
)  # of a configuration: nothing of its shape


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the live parameters and stored buffers of a model; a tied parameter stands under its first name only."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known: dict[str, Tensor] = dict(model.named_parameters())
    stored = model.state_dict(keep_vars=True)
    return {**known, **{name: tensor for name, tensor in stored.items() if name not in tied}}


@dataclass(frozen=True, eq=False)
class Plan:
    """A cut of one architecture's blocks into K parts, counted from 1, and the meta network that stands in for them.

    Attributes:
        kind, config: class and configuration of the target, a transformers model.
        splits: blocks of each part.
        meta_depth: blocks of each part's stand-in in the meta network.
        path: dotted name of the list of blocks.
        shapes: the target's tensors and their shapes.
        stem, head: tensors read before the first block (part 1's) and behind the last one (part K's).
        shared: tensors that more than one part reads, such as a tied embedding. They come from the meta network, stay
            frozen while parts train, lie in part 1's shard, and train again in the fine-tuning.
        early, late: modules without parameters (dropout, say) that run before and behind the blocks.
    """

    kind: type[nn.Module]
    config: Any
    splits: tuple[int, ...]
    meta_depth: int
    path: str
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    stem: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    early: tuple[str, ...] = field(default=(), repr=False)
    late: tuple[str, ...] = field(default=(), repr=False)

    @property
    def parts(self) -> int:
        """K."""
        return len(self.splits)

    @property
    def depth(self) -> int:
        """Blocks of the target."""
        return sum(self.splits)

    def blocks(self, part: int) -> range:
        """Return the target's blocks that make up a part; UsageError for a part that is not there."""
        if not 1 <= part <= self.parts:
            raise UsageError(f"there is no part {part}; this plan has the parts 1 to {self.parts}.")
        start = sum(self.splits[: part - 1])
        return range(start, start + self.splits[part - 1])

    def sources(self, part: int = META) -> list[int]:
        """Return of which of the target's blocks each block of hybrid `part` (or of the meta network) is a copy in
        kind: a stand-in is of the kind of its part's first blocks."""
        chosen = {j: self.blocks(j) for j in range(1, self.parts + 1)}
        return [b for j, whole in chosen.items() for b in (whole if j == part else whole[: self.meta_depth])]

    def own_slots(self, part: int) -> range:
        """Return which blocks of hybrid `part` are the part's own."""
        start = (part - 1) * self.meta_depth
        return range(start, start + len(self.blocks(part)))

    def outside(self, part: int) -> list[str]:
        """Return the tensors outside the blocks that a part owns: the stem, the head, and what is shared."""
        first, last = part == 1, part == self.parts
        return [*(self.stem if first else ()), *(self.shared if first else ()), *(self.head if last else ())]

    def names(self, part: int) -> list[str]:
        """Return the target's tensors that a part owns; each tensor has one owner."""
        inside = tuple(f"{self.path}.{b}." for b in self.blocks(part))
        return [*(name for name in self.shapes if name.startswith(inside)), *self.outside(part)]

    def build(self, sources: Sequence[int], *, seed: int) -> nn.Module:
        """Return a network of the target's class with one block for each of `sources`, its weights drawn from `seed`.

        In float32 and training mode; the global random state stays as it was. What a class scales by its depth when it
        draws weights (GPT-2 does) follows the depth of this network. Refused where the class does not build blocks of
        these shapes.
        """
        config = copy.deepcopy(self.config)
        depth = int(config.num_hidden_layers)
        for name, value in config.to_dict().items():
            if isinstance(value, list) and len(value) == depth and name not in _UNTOLD:  # such as layer_types
                setattr(config, name, [value[b] for b in sources])
        config.num_hidden_layers = len(sources)
        attention = getattr(self.config, "_attn_implementation", None)
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            kind: Any = self.kind
            model = kind._from_config(config, dtype=torch.float32, attn_implementation=attention)
        self._check(model, sources)
        return model

    def target(self, seed: int) -> nn.Module:
        """Return the whole target with new weights drawn from `seed`, as for training it end to end."""
        return self.build(range(self.depth), seed=seed)

    def seed(self, seed: int, part: int = META) -> int:
        """Return the seed of one part's initial weights: parts that began with the same numbers would not be
        independent."""
        return int(np.random.SeedSequence([seed, part]).generate_state(1)[0])

    def _check(self, model: nn.Module, sources: Sequence[int]) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
        expected = {name: shape for name, shape in self.shapes.items() if not name.startswith(f"{self.path}.")}
        for slot, source in enumerate(sources):
            start = f"{self.path}.{source}."
            expected |= {
                f"{self.path}.{slot}.{name.removeprefix(start)}": shape
                for name, shape in self.shapes.items()
                if name.startswith(start)
            }
        if found != expected:
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise Refused(
                f"a {self.kind.__name__} of {len(sources)} blocks differs from the whole one in {len(wrong)} tensors, "
                f"such as {wrong[0]} ({found.get(wrong[0])}, expected {expected.get(wrong[0])}); model-assembling "
                "works on stacks whose depth alone the configuration decides."
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that two shards must have in common to fit into one network."""
        known = {key: value for key, value in self.config.to_dict().items() if key not in _UNTOLD}
        described = {
            "class": self.kind.__name__,
            "config": known,
            "splits": self.splits,
            "meta_depth": self.meta_depth,
            "shapes": self.shapes,
            **{name: getattr(self, name) for name in ("stem", "head", "shared")},
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()

    def report(self) -> dict[str, Any]:
        """Return who owns what, JSON-like."""
        return {
            "digest": self.digest,
            "parts": [[span[0], span[-1]] for span in map(self.blocks, range(1, self.parts + 1))],
            "meta_depth": self.meta_depth,
            "stem": list(self.stem),
            "head": list(self.head),
            "shared": list(self.shared),
        }

    def sentence(self) -> str:
        """Say the cut in words."""
        sizes = list(dict.fromkeys(self.splits)) if len(set(self.splits)) == 1 else list(self.splits)
        cut = f"of {', '.join(map(str, sizes))} {'block' if sizes == [1] else 'blocks'}"
        said = f"{self.parts} {'part' if self.parts == 1 else 'parts'} {cut}"
        if self.parts == 1:
            return f"{said}: ordinary training"
        standing = self.parts * self.meta_depth
        said += f" in a meta network of {standing}; the stem belongs to part 1, the head to part {self.parts}"
        if self.shared:
            names = ", ".join(self.shared)
            said += f"; {names}: read by several parts, so frozen as the meta network left it until the fine-tuning"
        return said


def plan(
    model: nn.Module,
    parts: int = 4,
    splits: Sequence[int] | None = None,
    *,
    meta_depth: int = 1,
    batch: Mapping[str, Any] | None = None,
) -> Plan:
    """Cut a model by its list of blocks.

    Args:
        model: a transformers model with its task's head; only its class, configuration and shapes are read, so it may
            lie on the meta device.
        parts: K.
        splits: blocks of each part; by default depth / K each.
        meta_depth: blocks of each part's stand-in.
        batch: one batch of inputs, with which it is found out what runs before and behind the blocks; by default one is
            made up from the configuration.

    Raises:
        UsageError: a depth that K does not divide, or splits that do not add up to it.
        Refused: a model without one list of equal blocks, or one whose depth its configuration does not decide.
    """
    names = [name for name, _ in blocks(model)]
    lists = {name.rpartition(".")[0] for name in names}
    config: Any = getattr(model, "config", None)
    if len(lists) != 1 or getattr(config, "num_hidden_layers", None) != len(names):
        raise Refused(
            f"{type(model).__name__} has {len(names)} blocks in {len(lists)} lists; model-assembling cuts a single "
            "list of blocks of equal width whose length the configuration says (num_hidden_layers)."
        )
    depth, path = len(names), lists.pop()
    made = Plan(
        type(model),
        copy.deepcopy(config),
        _splits(depth, parts, splits, meta_depth),
        meta_depth,
        path,
        {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()},
    )
    return _owned(made, _made_up(model) if batch is None else dict(batch))


def _splits(depth: int, parts: int, splits: Sequence[int] | None, meta_depth: int) -> tuple[int, ...]:
    if parts < 1 or meta_depth < 1:
        raise UsageError(f"model-assembling: parts={parts} and meta_depth={meta_depth} must be at least 1.")
    if not splits:
        if depth % parts:
            raise UsageError(
                f"{depth} blocks cannot be cut into {parts} parts of one size; choose another number of parts, or say "
                f"the blocks of each, such as splits={_near(depth, parts)}."
            )
        splits = [depth // parts] * parts
    if len(splits) != parts:
        raise UsageError(f"splits={list(splits)} names {len(splits)} parts, parts={parts}; make them agree.")
    if sum(splits) != depth or min(splits) < 1:
        raise UsageError(
            f"splits={list(splits)} adds up to {sum(splits)} blocks, the model has {depth}; each part needs at least "
            "one, and all of them must have an owner."
        )
    if meta_depth > min(splits):
        raise UsageError(
            f"meta_depth={meta_depth} is deeper than a part of {min(splits)} blocks; a stand-in is no deeper than its "
            "part."
        )
    return tuple(map(int, splits))


def _near(depth: int, parts: int) -> str:
    each, more = divmod(depth, parts)
    return str([each + (i < more) for i in range(parts)]).replace(" ", "")


def _made_up(model: nn.Module) -> dict[str, Tensor]:
    """Return one row of inputs of the kind that a model reads."""
    config: Any = model.config
    size = getattr(config, "image_size", None)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values" and size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if isinstance(vocabulary := getattr(config, "vocab_size", None), int):
        return {"input_ids": torch.arange(8)[None] % vocabulary}
    raise UsageError(f"what a {type(model).__name__} reads does not follow from its configuration; give plan a batch.")


def _owned(made: Plan, batch: dict[str, Any]) -> Plan:
    """Find out which tensors and modules outside the blocks belong to the stem and to the head.

    A tensor is the stem's where the state that enters the blocks depends on it, the head's where the output depends on
    it with the blocks' state held fixed. It is shared where it is both, or where blocks read it by another way.
    """
    # Some stacks begin with a block of its own kind (without its first norm, say), so two of the last kind follow it.
    sources = [0, *[made.depth - 1] * 2] if made.depth > 1 else [0]
    model: Any = made.build(sources, seed=0).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a block that is run twice would find its own keys there
    flow = _Flow(model, [model.get_submodule(f"{made.path}.{slot}") for slot in range(len(sources))], made.path)
    flow.assert_placeless(batch)
    stem, beside = flow.run(batch, cut=False)
    _, head = flow.run(batch, cut=True)
    shared = (stem & head) | (beside - head)
    inside = f"{made.path}."
    outside = [name for name in tensors_of(model) if not name.startswith(inside)]
    parameters = dict(model.named_parameters())
    modules_of_head = {name.rpartition(".")[0] for name in head - shared}
    late: set[str] = set()
    for name in outside:
        buffer_of_head = name not in parameters and name.rpartition(".")[0] in modules_of_head
        # What nothing depends on (an unused pooler, say) is nobody's; the last part carries it along.
        if name in head or buffer_of_head or (name in parameters and name not in stem | shared):
            late.add(name)
    if made.parts == 1:
        shared = set()
    return Plan(
        made.kind,
        made.config,
        made.splits,
        made.meta_depth,
        made.path,
        made.shapes,
        stem=tuple(name for name in outside if name not in late | shared),
        head=tuple(name for name in outside if name in late - shared),
        shared=tuple(name for name in outside if name in shared),
        early=tuple(sorted(flow.early)),
        late=tuple(sorted(flow.late)),
    )


class _Flow:
    """Runs a network of a few blocks, the last two of one kind, and follows what its output depends on."""

    def __init__(self, model: nn.Module, stack: Sequence[nn.Module], path: str) -> None:
        self.model, self.stack, self.inside = model, stack, f"{path}."
        self.early: set[str] = set()
        self.late: set[str] = set()

    @torch.no_grad()
    def assert_placeless(self, batch: dict[str, Any]) -> None:
        """Raise Refused where two blocks of the same weights differ by their place, which is another in a hybrid."""
        called: list[tuple[Any, Any]] = []
        handle = self.stack[-1].register_forward_pre_hook(lambda _, *given: called.append(given), with_kwargs=True)
        try:
            self.model(**batch)
        finally:
            handle.remove()
        if not called:
            raise Refused(f"the blocks of {type(self.model).__name__} did not run in a pass through it.")
        if len(self.stack) == 1:
            return
        last, other = self.stack[-1], self.stack[-2]
        other.load_state_dict(last.state_dict())
        args, kwargs = called[0]
        states = [block(*args, **kwargs) for block in (last, other)]
        one, two = (state if isinstance(state, Tensor) else state[0] for state in states)
        if not torch.equal(one, two):
            raise Refused(
                f"the blocks of this {type(self.model).__name__} compute by their place in the stack, beside their "
                "weights; a part would be another function in its hybrid than in the target."
            )

    def run(self, batch: dict[str, Any], *, cut: bool) -> tuple[set[str], set[str]]:
        """Return which parameters the state before the blocks depends on, and which the output does with that state
        held fixed; with `cut` the state behind the blocks is held fixed too."""
        seen: dict[str, Tensor] = {}

        def entering(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = args[0] if args else kwargs["hidden_states"]
            seen["entered"] = state
            held = state.detach().requires_grad_()
            return ((held, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": held})

        def leaving(_: nn.Module, args: Any, output: Any) -> Any:
            seen["left"] = output if isinstance(output, Tensor) else output[0]
            if not cut:
                return output
            held = seen["left"].detach().requires_grad_()
            return held if isinstance(output, Tensor) else (held, *output[1:])

        def placed(name: str) -> Any:
            return lambda *_: (self.late if "left" in seen else self.early).add(name)

        handles = [
            self.stack[0].register_forward_pre_hook(entering, with_kwargs=True),
            self.stack[-1].register_forward_hook(leaving),
            *(
                module.register_forward_pre_hook(placed(name))
                for name, module in self.model.named_modules()
                if not name.startswith(self.inside) and not any(True for _ in module.parameters())
            ),
        ]
        try:
            logits = self.model(**batch).logits
        finally:
            for handle in handles:
                handle.remove()
        return self._below(seen["entered"]), self._below(logits)

    def _below(self, output: Tensor) -> set[str]:
        named = {n: p for n, p in self.model.named_parameters() if not n.startswith(self.inside)}
        if not named or not output.requires_grad:
            return set()
        found = torch.autograd.grad(output.sum(), list(named.values()), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(named, found, strict=True) if gradient is not None}
