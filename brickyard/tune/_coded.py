"""Operations whose forward is the plain one, bit for bit, and which keep what their backward needs in codes.

    Elementwise   y = phi(x)                 keeps phi'(x)          dx = g phi'(x)
    Softmax       y = softmax(x)             keeps y                dx = y (g - sum(g y))
    Dropped       y = x m / (1 - p)          keeps m, one bit       dx = g m / (1 - p)
    Trained       y = W x + b, W trains      keeps x                dW = g^T x, dx = W^T g
    Recomputed    y = f(x_1, ..., x_k)       keeps x_1 .. x_k       runs f again on what the codes stand for

Everything is coded inside `forward`, so that the full tensor is freed at once, and goes through `save_for_backward`.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from brickyard.tune._codes import EXACT, Code, Grouped, pack, unpack

_BERNOULLI = torch.ops.aten.bernoulli_.float  # what dropout draws by on a CPU; fused kernels draw out of sight
_SAFE_SOFTMAX = torch.ops.aten._safe_softmax.default


@dataclass(frozen=True)
class Kept:
    """How one tensor was put among the saved ones: its code, shape, type, and how many parts it took."""

    code: Code
    shape: torch.Size
    dtype: torch.dtype
    parts: int

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return self.code.decode(tuple(parts), self.shape, self.dtype)


def keep(x: Tensor, code: Code, *, spare: bool = False) -> tuple[Kept, tuple[Tensor, ...]]:
    """Code `x` and say how; `spare`: nobody reads `x` afterwards."""
    parts = code.encode(x, spare=spare)
    return Kept(code, x.shape, x.dtype, len(parts)), parts


class Once:
    """Codes the last tensor asked for only once: several layers read one input. Forgets it when that tensor dies."""

    def __init__(self, code: Grouped) -> None:
        self.code = code
        self._of: tuple[weakref.ref[Tensor], int] | None = None
        self._kept: tuple[Kept, tuple[Tensor, ...]] | None = None

    def keep(self, x: Tensor) -> tuple[Kept, tuple[Tensor, ...]]:
        if self._kept is not None and self._of is not None and self._of[0]() is x and self._of[1] == x._version:
            return self._kept
        kept = keep(x, self.code)
        # The last tensor may die, and be forgotten, between these lines.
        self._of = (weakref.ref(x, self._forget), x._version)
        self._kept = kept
        return kept

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        if self._of is not None and self._of[0] is reference:
            self._of = self._kept = None


class Elementwise(torch.autograd.Function):
    """phi(x) for an element-wise `phi` without parameters; its derivative comes from autograd and is kept in `code`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phi: Callable[[Tensor], Tensor], code: Code) -> Tensor:
        # Hooks of our own keep what this small graph saves from being seen (or stored) by those of the caller.
        with torch.enable_grad(), saved_tensors_hooks(_same, _same):
            leaf = x.detach().requires_grad_()
            y = phi(leaf)
            (slope,) = torch.autograd.grad(y, leaf, y.new_ones(()).expand_as(y))
        ctx.kept, parts = keep(slope, code, spare=True)
        ctx.save_for_backward(*parts)
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        slope = ctx.kept.decode(parts)
        # An exact one is the saved tensor itself, which a second backward pass reads again.
        return slope * grad if slope is parts[0] else slope.mul_(grad), None, None


class Softmax(torch.autograd.Function):
    """softmax(x) over `dim`; kept is the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, code: Code) -> Tensor:
        y = F.softmax(x, dim)
        ctx.dim = dim
        ctx.kept, parts = keep(y, code)
        ctx.save_for_backward(*parts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y = ctx.kept.decode(ctx.saved_tensors)
        return y * (grad - (grad * y).sum(ctx.dim, keepdim=True)), None, None


class Dropped(torch.autograd.Function):
    """Dropout with rate `p` in (0, 1), drawn as PyTorch draws it; kept is one bit for each value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if x.device.type == "cpu":  # as PyTorch does there, but the mask is drawn as one
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
            scaled_mask = mask.to(x.dtype).div_(1 - p)
        else:
            scaled_mask = F.dropout(torch.ones_like(x), p)
            mask = scaled_mask != 0
        ctx.p, ctx.shape = p, x.shape
        ctx.save_for_backward(pack(mask.reshape(-1).view(torch.uint8), 1))
        return scaled_mask.mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask_N = unpack(ctx.saved_tensors[0], 1, grad.numel())
        return mask_N.to(grad.dtype).div_(1 - ctx.p).view(ctx.shape).mul_(grad), None


class Trained(torch.autograd.Function):
    """A linear layer whose weight trains: `layer(x)`, its input kept by `once`. `transposed`: the weight is [n, m]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Callable[[Tensor], Tensor],
        transposed: bool,
        once: Once,
    ) -> Tensor:
        ctx.transposed = transposed
        ctx.kept, parts = once.keep(x)
        ctx.save_for_backward(weight, *parts)
        return layer(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        g_Nm = grad.reshape(-1, grad.shape[-1])
        if needs_x:
            w_mn = (weight.t() if ctx.transposed else weight).to(grad.dtype)
            grad_x = (g_Nm @ w_mn).view(ctx.kept.shape).to(ctx.kept.dtype)
        if needs_weight:
            x_Nn = ctx.kept.decode(parts).reshape(len(g_Nm), -1).to(grad.dtype)
            grad_weight = (x_Nn.t() @ g_Nm if ctx.transposed else g_Nm.t() @ x_Nn).to(weight.dtype)
        if needs_bias:
            grad_bias = g_Nm.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


class Recomputed(torch.autograd.Function):
    """`call(*given)`, run again in the backward pass on the decoded inputs, under the autocast of the forward.

    `codes` has one code for each of `given`; what is no tensor is handed on, what is no floating-point tensor is kept
    as it is. A parameter that `call` uses stands among `given` so that it gets its gradient; it is not kept, for it is
    there anyway. With `random`, dropout inside `call` gets the same draws again: they are kept, one bit each, where
    that takes a quarter of the other codes at most, as drawing is slow; else the generator goes back for them.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., Any], codes: Sequence[Grouped], random: bool, *given: Any
    ) -> tuple[Any, ...] | Tensor:
        device = next(x.device for x in given if isinstance(x, Tensor))
        ctx.call, ctx.device = call, device
        ctx.autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        ctx.set_materialize_grads(False)
        state = _generator_state(device) if random else None
        saved: list[Tensor] = []
        ctx.given = []
        for x, code in zip(given, codes, strict=True):
            if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                held, parts = keep(x, code if x.is_floating_point() else Grouped(EXACT))
                saved.extend(parts)
                x = held
            ctx.given.append(x)
        ctx.replay = nullcontext
        if state is None:
            ctx.save_for_backward(*saved)
            return call(*given)
        with _Draws(room=sum(part.nbytes for part in saved) // 4) as draws:
            out = call(*given)
        kept = [state] if draws.bits is None else draws.bits
        ctx.replay = partial(_replayed, device) if draws.bits is None else _Again
        ctx.save_for_backward(*saved, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = iter(ctx.saved_tensors)
        given = [
            x.decode([next(parts) for _ in range(x.parts)]).detach().requires_grad_(needed)
            if isinstance(x, Kept)
            else x
            for x, needed in zip(ctx.given, ctx.needs_input_grad[3:], strict=True)
        ]
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device.type, dtype, enabled), ctx.replay(*parts):
            out = ctx.call(*given)
        out = out if isinstance(out, tuple) else (out,)
        reached = [(y, g) for y, g in zip(out, grads, strict=True) if g is not None and y.requires_grad]
        wanted = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        found: Iterator[Tensor | None] = iter(
            torch.autograd.grad([y for y, _ in reached], wanted, [g for _, g in reached], allow_unused=True)
        )
        return None, None, None, *(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in given)


class _Random(TorchDispatchMode):
    """Sees the operations inside a call that draws: `draw` takes the place of those that dropout draws by."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SAFE_SOFTMAX and args[0].device.type == "cpu":
            # It searches all scores for rows without a key, which takes longer than the softmax; one column shows them.
            out = F.softmax(*args, **kwargs)
            return func(*args, **kwargs) if out.select(args[1], 0).isnan().any() else out
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self.draw(func, args, kwargs)
        return func(*args, **kwargs)

    @abstractmethod
    def draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation that draws returns."""


class _Draws(_Random):
    """Keeps what dropout draws in `bits`, packed; None once they take more than `room` bytes or all is not known."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.bits: list[Tensor] | None = []
        self._room = room

    def draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if self.bits is not None:
            self._room -= -(-out.numel() // 8) if func is _BERNOULLI else self._room + 1
            self.bits = None if self._room < 0 else [*self.bits, pack(out.reshape(-1).to(torch.uint8), 1)]
        return out


class _Again(_Random):
    """Hands out the draws that `_Draws` kept, in their order, and leaves the generator alone."""

    def __init__(self, *bits: Tensor) -> None:
        super().__init__()
        self._bits = iter(bits)

    def draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        return args[0].copy_(unpack(next(self._bits), 1, args[0].numel()).view(args[0].shape))


def coding(x: Tensor, once: Once) -> AbstractContextManager[Any]:
    """Within it, what an operation that is out of reach saves of the size of its input `x` [..., n] is kept in codes.

    Such are the products in gated networks and adapters that are no linear layers. A saved tensor counts when it has
    x's leading dimensions (at least two: a weight has none of them) and rows of at least a group, or is x itself.
    """
    # The graph keeps these hooks: they must not hold x.
    storage, lead, size = x.untyped_storage()._cdata, x.shape[:-1], x.numel()

    def hold(tensor: Tensor) -> Any:
        alike = tensor.ndim > 2 and tensor.shape[:-1] == lead and tensor.shape[-1] >= once.code.group
        itself = tensor.untyped_storage()._cdata == storage and tensor.numel() == size
        return once.keep(tensor) if tensor.is_floating_point() and (alike or itself) else tensor

    return saved_tensors_hooks(hold, lambda held: held if isinstance(held, Tensor) else held[0].decode(held[1]))


def _same(x: Tensor) -> Tensor:
    return x


def _generator_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


@contextmanager
def _replayed(device: torch.device, state: Tensor) -> Iterator[None]:
    """Let the device's generator draw from `state` on, and give it back as it was."""
    before = _generator_state(device)
    restore = torch.set_rng_state if device.type == "cpu" else torch.get_device_module(device).set_rng_state
    where = () if device.type == "cpu" else (device,)
    restore(state, *where)
    try:
        yield
    finally:
        restore(before, *where)
