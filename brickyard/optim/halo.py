"""HALO: the three products of linear layers on INT8 or FP8 operands, behind Hadamard rotations. Beside any tuner.

    forward    Y   = X W^T          HALO-0  Q(X) Q(W)^T      HALO-1, 2  Q(X H) Q(W H)^T
    error      E_X = E W            HALO-0  Q(E) Q(W)        HALO-1     Q(E) Q(W H) H^T
                                                             HALO-2     H_b^T [Q(H_b E) Q(W H)] H^T
    gradient   G   = E^T X          HALO-0  Q(E)^T Q(X)      HALO-1, 2  Q(E)^T Q(X H) H^T

    Q(x) = s round(x / s), s = max|x| / 127   (int8; the products are summed in int32)
    Q(x) = s e4m3(x / s),  s = max|x| / 448   (fp8, rounded by the type itself)

H and H_b are normalised Hadamard matrices over the layer's inputs and over the tokens (`_hadamard`): H H^T = I, so that
without Q nothing changes. X has outliers in a few channels and E in a few tokens; with one scale a tensor they take the
range from all other values, and a rotation spreads them. Backward is that of the exact product, on the operands that
forward quantised and kept (a quarter of float32). A batch whose tokens have no Hadamard size is filled with zero rows
for E_X, which changes nothing and from 128 tokens on adds less than a tenth. Weights, gradients and the optimiser stay
as they are; so do embeddings, norms, attention itself, the head, what an adapter adds, and all that runs in evaluation
mode without gradient. A frozen weight is rotated and quantised once.

`full + halo`, `lora + halo:level=0,dtype=fp8`; `convert(model, Config())` does it for any other loop. For fp8 the
rotation gains nothing (its steps are relative: an outlier costs the other values no precision), so use level 0 there.
On a processor without int8 instructions the same integers come from float32 products, as exact and no faster: there
this shows what low precision does to training, not how fast it is.

Source: "HALO: Hadamard-Assisted Lower-Precision Optimization for LLMs", NeurIPS 2025, arXiv 2501.02625. Headline:
Llama-3-8B tuned in INT8 (HALO-2) or FP8 is within noise of bfloat16, up to 1.41 times as fast on an RTX 4090.
Left out: HALO-i (a cast without scale, a bound on speed), FP6 (simulated in the release), fused rotate-and-quantise
kernels. Under FSDP2, `gather_codes` between `convert` and `fully_shard` lets weights travel as one byte a value.
Legend: B tokens of a batch, M inputs, N outputs of a layer, K a contracted dimension, S rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import Refused, UsageError
from brickyard.core.inject_layer import BrickyardLinear
from brickyard.core.method import Claim, Record
from brickyard.core.roles import LINEAR, blocks, match, roles
from brickyard.core.side import SIDE
from brickyard.optim._hadamard import base_of, nearest, next_size, transform
from brickyard.optim._halo_shards import How, ShardedWeight
from brickyard.optim._low_precision import LARGEST, Codes, multiply, quantise

RECORD = Record(
    name="halo",
    family="optim",
    title="Hadamard rotations around INT8 and FP8 products in training (HALO)",
    paper="HALO, NeurIPS 2025, arXiv 2501.02625",
    slot="memory",
    presets={
        "halo0_fp8": {"level": 0, "dtype": "fp8"},
        "halo1_fp8": {"level": 1, "dtype": "fp8"},
        "halo2_int8": {"level": 2, "dtype": "int8"},
    },
    claims=(
        Claim(
            text="With outliers a rotation lowers a layer's INT8 error at least 4 times; without, it costs < 10 %.",
            measure="one_layer",
            kind="emulated",
        ),
        Claim(
            text="INT8 HALO-2 tunes a model with outliers to within 1 % of float32, with at most 0.3 of INT8's gap.",
            measure="fine_tuning",
            kind="emulated",
            base="embedded:pylm-small",
            data="embedded:python-tests",
            epochs=1,
            train_rows=1200,
            batch=4,
            max_length=128,
            full={"train_rows": 2400, "batch": 8, "max_length": 256, "seeds": 5},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of HALO; UsageError for values out of range."""

    level: int = 2
    """0: no rotation; 1: over the inputs of a layer; 2: over the tokens too, for the error"""
    dtype: Literal["int8", "fp8", "exact"] = "int8"
    """operands of the products: int8, fp8 (E4M3), or exact: rotated only (a control)"""
    skip: tuple[str, ...] = ()
    """patterns of layers that stay as they are: roles ("down"), names or globs"""

    def __post_init__(self) -> None:
        if self.level not in (0, 1, 2):
            raise UsageError(f"halo: level={self.level}; use 0, 1 or 2.")
        if self.dtype not in (*LARGEST, "exact"):
            raise UsageError(f"halo: dtype={self.dtype!r}; use int8, fp8 or exact.")


def over_inputs(x_BM: Tensor, config: Config) -> Codes:
    """Return Q(X H): the operand that forward and gradient, or forward and error, share. Q(X) at level 0."""
    return quantise(transform(x_BM, transpose=True) if config.level else x_BM, config.dtype)


def error_to_inputs(e_BN: Tensor, w_NM: Codes, config: Config, error: Codes | None = None) -> Tensor:
    """Return E_X [B, M]; `error` is Q(E) where it is at hand, which level 2 has no use for.

    Raises:
        Refused: level 2 and a single token.
    """
    if config.level == 2:
        tokens = len(e_BN)
        if tokens == 1:
            raise Refused("halo: level 2 rotates the error over the tokens, and this batch has one; use level=1.")
        filled = F.pad(e_BN, (0, 0, 0, next_size(tokens) - tokens))
        rotated = multiply(quantise(transform(filled, 0), config.dtype), w_NM, e_BN.dtype)
        x_BM = transform(rotated, 0, transpose=True)[:tokens]
    else:
        x_BM = multiply(quantise(e_BN, config.dtype) if error is None else error, w_NM, e_BN.dtype)
    return transform(x_BM) if config.level else x_BM


def gradient_of_weight(error: Codes, x_BM: Codes, config: Config, dtype: torch.dtype) -> Tensor:
    """Return G [N, M]."""
    g_NM = multiply(error.t(), x_BM, dtype)
    return transform(g_NM) if config.level else g_NM


class LowPrecision(torch.autograd.Function):
    """X W^T on quantised operands; `ready` holds Q(W H) where the weight is frozen, or came from other ranks so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_NM: Tensor, ready: Codes | None, config: Config) -> Tensor:
        x_BM = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            inputs = over_inputs(x_BM, config)
            weight = over_inputs(w_NM.to(x.dtype), config) if ready is None else ready
            y_BN = multiply(inputs, weight.t(), x.dtype)
        to_inputs, to_weight = ctx.needs_input_grad[:2]
        ctx.config, ctx.shape, ctx.dtype = config, x.shape, w_NM.dtype
        ctx.save_for_backward(*(weight if to_inputs else (None, None)), *(inputs if to_weight else (None, None)))
        return y_BN.view(*x.shape[:-1], len(w_NM))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        config: Config = ctx.config
        weight, inputs = Codes(*ctx.saved_tensors[:2]), Codes(*ctx.saved_tensors[2:])
        to_inputs, to_weight = ctx.needs_input_grad[:2]
        e_BN = grad.reshape(-1, grad.shape[-1])
        x_grad = w_grad = None
        with torch.autocast(grad.device.type, enabled=False):
            error = quantise(e_BN, config.dtype) if to_weight or config.level < 2 else None
            if to_inputs:
                x_grad = error_to_inputs(e_BN, weight, config, error).view(ctx.shape)
            if to_weight and error is not None:
                w_grad = gradient_of_weight(error, inputs, config, e_BN.dtype).to(ctx.dtype)
        return x_grad, w_grad, None, None


@dataclass
class HaloForward:
    """Stands in for the forward of one linear layer while it trains; at rest, without gradient, it is the layer's own.

    Training mode counts too, for checkpointed blocks run first without gradient. Steps that never run a backward pass
    evaluate the model at rest, and so in its own arithmetic: an arm refuses the two together.
    """

    module: Any
    config: Config
    plain: Callable[[Tensor], Tensor]
    frozen: tuple[Tensor, int, Codes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.module.weight.requires_grad:
            self._once(self.module.weight)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0 or not (self.module.training or torch.is_grad_enabled()):
            return self.plain(x)
        weight, bias = self.module.weight, self.module.bias  # looked up anew: a method may resize or unfreeze it
        ready = getattr(weight, "codes", None)  # of a weight that FSDP gathered as such
        if ready is None and not weight.requires_grad:
            ready = self._once(weight)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y = LowPrecision.apply(x, self._by_outputs(weight), ready, self.config)
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def _once(self, weight: Tensor) -> Codes:
        if self.frozen is None or self.frozen[0] is not weight or self.frozen[1] != weight._version:
            self.frozen = weight, weight._version, over_inputs(self._by_outputs(weight), self.config)
        return self.frozen[2]

    def _by_outputs(self, weight: Tensor) -> Tensor:
        return weight.t() if isinstance(self.module, Conv1D) else weight


def convert(model: nn.Module, config: Config) -> Callable[[], None]:
    """Let the linear layers of the blocks of `model` train in low precision, in place; call the result to undo it.

    Parameters and module tree stay as they are. Under an adapter it is the base layer that changes. Raises Refused,
    with the first layer that does not fit, where a layer is quantised already, is of a kind of its own, has been
    replaced, or has a number of inputs for which there is no rotation; or where the device has no float8.
    """
    found = layers(model, config.skip)
    for name, module in found.items():
        _fits(name, module, config)
    if config.dtype == "fp8":
        _has_float8(next(iter(found.values())).weight.device)
    with ExitStack() as undo:
        for module in found.values():
            module.forward = HaloForward(module, config, module.forward)
            undo.callback(delattr, module, "forward")
        return undo.pop_all().close


def gather_codes(model: nn.Module) -> list[str]:
    """Let FSDP2 gather the weights of a converted model as codes, a quarter of float32's bytes; return their names.

    For a loop of your own, on every rank: `convert(model, config)`, `gather_codes(model)`, then `fully_shard` on the
    blocks and on the model. The scale is that of the whole weight, so a step is the same as on one process. It cannot
    be undone; evaluation reads the weights as rounded, and `full_tensor()` of a parameter is exact. Raises Refused
    where no layer is converted, or where a layer keeps its weight by inputs (Conv1D), which FSDP would cut across.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(vars(m).get("forward"), HaloForward)}
    if not found:
        raise Refused("halo: no layer of this model is converted; call convert(model, config) first.")
    if by_inputs := next((name for name, m in found.items() if isinstance(m, Conv1D)), None):
        raise Refused(f"halo: {by_inputs} is a Conv1D, whose rows are inputs; sharded along them it cannot be rotated.")
    made: dict[int, nn.Parameter] = {}
    for module in found.values():
        weight: Any = module.weight
        forward: Any = module.forward
        how = How(forward.config.level, forward.config.dtype)
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(ShardedWeight(weight.detach(), how), weight.requires_grad)
        module.weight = made[id(weight)]
        forward.frozen = None  # codes of all rows, which FSDP keeps apart
    return [f"{name}.weight" for name in found]


def layers(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the linear layers of the blocks by name, base layers of adapters among them, adapters' own left out.

    Raises Refused where there are none, or where training goes past them; Unmatched where `skip` matches nothing.
    """
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    inside = tuple(f"{name}." for name, _ in blocks(plain))
    adapted = [name for name, m in plain.named_modules() if isinstance(m, BaseTunerLayer)]
    added = {
        name
        for owner in adapted
        for name, _ in plain.get_submodule(owner).named_modules(prefix=owner)
        if name != f"{owner}.base_layer"
    }
    left = {name for names in match(plain, skip).values() for name in names}
    bound = [b for m in plain.modules() if isinstance(m, BrickyardLinear) for b in m.bound.values()]
    if by_hand := next((b.module.RECORD.name for b in bound if b.has("whole")), None):
        raise Refused(f"halo: {by_hand} multiplies by weights that it makes itself, where rotations do not reach.")
    if hasattr(plain, SIDE) and not any(p.requires_grad for n, p in plain.named_parameters() if n.startswith(inside)):
        raise Refused("halo: the blocks only feed a network beside them, and run without gradient; nothing is gained.")
    found = {
        name: plain.get_submodule(name)
        for name in roles(plain)
        if name.startswith(inside) and name not in added | left and isinstance(plain.get_submodule(name), LINEAR)
    }
    if not found:
        raise Refused("halo: this model has no linear layer in repeated blocks (or all of them are skipped).")
    return found


def _fits(name: str, module: Any, config: Config) -> None:
    kind, advice = type(module).__name__, f"leave it out with skip=[{name!r}]"
    if not module.weight.is_floating_point():
        raise Refused(f"halo: {name} holds {module.weight.dtype}, a quantised weight; open the base unquantised.")
    if type(module) not in LINEAR:
        raise Refused(f"halo: {name} is a {kind}, which computes in a way of its own; {advice}.")
    if "forward" in vars(module):
        raise Refused(f"halo: the forward of {name} is replaced already; is the model converted twice?")
    inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
    if config.level and base_of(inputs) is None:
        below, above = nearest(inputs)
        raise Refused(
            f"halo: {name} has {inputs} inputs, for which there is no Hadamard matrix here (nearest: {below} and "
            f"{above}); use level=0, or {advice}."
        )


def _has_float8(device: torch.device) -> None:
    try:
        torch.ones(1, device=device).to(torch.float8_e4m3fn).float()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise Refused(f"halo: {device} has no float8 type ({error}); use dtype=int8.") from None
