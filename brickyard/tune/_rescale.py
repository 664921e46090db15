"""Where the MLP branch of a block can be rescaled, found by what a block computes rather than by what it is called.

A block adds an MLP branch m to a residual x: the sum x + m is what the block returns, or what a norm after it takes
(post-norm blocks). x is the input of the MLP's first layer, or the input of the norm before it (pre-norm blocks). One
forward pass with recorded inputs and outputs tells which; a block that adds nothing of the kind is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core.errors import Refused
from brickyard.core.roles import blocks, roles

Rescale = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """One block's MLP branch: the input of module `source` is x, the output of module `branch` is m."""

    block: str
    source: str
    branch: str
    width: int


def sites(model: nn.Module) -> list[Site]:
    """Return the MLP branch of every block of `model`, in order; Refused where a block has none of the known form.

    The model is run once on two made-up examples, in evaluation mode and without gradients; nothing of it changes.
    """
    found = blocks(model)
    if not found:
        raise Refused("no repeated block was found in the base; rescaling works on transformer blocks.")
    role = roles(model)
    calls = _trace(model, [name for name, _ in found])
    return [_site(name, calls[name], role) for name, _ in found]


def install(model: nn.Module, where: Site, rescale: Rescale) -> Callable[[], None]:
    """Replace m by rescale(x, m) at one site; returns what takes it off again."""
    held: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held[:] = [_first(args, kwargs)]

    def change(_: nn.Module, __: Any, m: Tensor) -> Tensor:
        return rescale(held.pop(), m)

    handles = [
        model.get_submodule(where.source).register_forward_pre_hook(take, with_kwargs=True),
        model.get_submodule(where.branch).register_forward_hook(change),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@dataclass
class _Call:
    """One finished call inside a block; `started` orders the beginnings, the list of calls orders the ends."""

    name: str
    started: int
    given: Tensor | None
    gave: Tensor | None


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _tensor(value: Any) -> Tensor | None:
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else None


def _trace(model: nn.Module, names: list[str]) -> dict[str, list[_Call]]:
    """Run the model once and list, for each block, the calls inside it in the order in which they ended."""
    calls: dict[str, list[_Call]] = {name: [] for name in names}
    open_calls: list[tuple[int, Tensor | None]] = []
    count = 0

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        open_calls.append((count, _tensor(_first(args, kwargs))))

    def after(block: str, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            started, given = open_calls.pop()
            # Some blocks return their states in a tuple; a branch in one could not be replaced.
            whole = output[0] if name == block and isinstance(output, tuple) else output
            calls[block].append(_Call(name, started, given, _tensor(whole)))

        return record

    flags = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for block in names:
            for inner, module in model.get_submodule(block).named_modules():
                name = f"{block}.{inner}" if inner else block
                for handle in (
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after(block, name)),
                ):
                    stack.callback(handle.remove)
        model.eval()
        try:
            with torch.no_grad():
                model(**_example(model))
        finally:
            for module, flag in flags.items():
                module.training = flag
    return calls


def _example(model: nn.Module) -> dict[str, Tensor]:
    """Two made-up examples of the kind that the backbone takes, from its config alone."""
    config: Any = model.config
    device = next(model.parameters()).device
    size = getattr(config, "image_size", None)
    if size is None:
        tokens = torch.arange(16, device=device).view(2, 8) % config.vocab_size
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=generator).to(device)}


def _site(block: str, calls: list[_Call], role: Mapping[str, str]) -> Site:
    entries = [c for c in calls if role.get(c.name) in ("gate", "up")]
    ends = [c for c in calls if role.get(c.name) == "down"]
    if not entries or len(ends) != 1:
        raise Refused(
            f"block {block} has {len(entries)} layers of role up or gate and {len(ends)} of role down in one pass; "
            "rescaling needs one MLP in each block."
        )
    entry, end = entries[0], ends[0]
    # x as the MLP itself sees it, or as the norm before it does.
    sources = [entry] + [
        c for c in calls if c.started < entry.started and role.get(c.name) == "norm" and _same(c.gave, entry.given)
    ]
    after_end = calls.index(end)
    sums = [calls[-1].gave] + [c.given for c in calls[after_end:] if role.get(c.name) == "norm"]
    for branch in calls[after_end:]:
        for source in sources:
            if source.given is None or branch.gave is None or branch.gave.shape != source.given.shape:
                continue
            if any(_same(total, source.given + branch.gave) for total in sums):
                return Site(block, source.name, branch.name, branch.gave.shape[-1])
    raise Refused(
        f"block {block} does not add the output of its MLP to the MLP's input or to the input of the norm before it; "
        "rescaling has no place in such a block."
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
