"""S2A, second half: what training keeps for the backward pass takes 4 or 8 bits a value. Stands beside any tuner.

    y = phi(x)                      keep q = round((phi'(x) - lo) / s), s = (hi - lo) / (2^b - 1);  dx = g (lo + s q)
    y = relu(x), dropout(x)         keep one bit a value, exact
    y = norm(x)                     keep x as codes with a low and a step for each group of 64 values
    y = W x + b, W trains           keep x so, once for all layers that read it
    y = attention(q, k, v)          keep q, k, v so and no T x T matrix: backward runs the attention again, as fused
                                    kernels do (what its dropout drew is kept in bits while T is small)
    y = softmax(x)  (nn.Softmax)    keep y so;  dx = y (g - sum(g y))

The forward is the model's own, bit for bit, so nothing is rounded but gradients: an element's error is at most half a
step. `lora + s2a` trains LoRA and stores the brick that `lora` would; `convert(model, Config())` does it for any other
loop. With 4 bits for all (preset paper) LoRA's own gradient in MiniLM has a cosine of 0.993 with the exact one: of the
missing 0.007 the slopes phi' make 0.003, attention's operands and the inputs of trained layers 0.0017 each, norms
0.0006. So by default all but the norms take 8 bits.

Source: "Structure-Activation Synergy: A Dual Efficiency Framework for Parameter-Memory Optimized Transfer Learning",
arXiv 2503.08154, of which abstract and summary were at hand: S2A (reimplementation), the formulas are the standard ones
for the mechanism. Headline: a quarter of the training memory. The first half, tuners that need few stored inputs, is
`s2a-modules`. Left out: a code book fitted by Lloyd's algorithm (on the derivatives of MiniLM's GELU its error is 4 to
9 % below the even grid's, its rounding is slower); convolutions; what the loss keeps (a language model's logits).
Legend: B batch, T tokens, g the gradient that arrives, N values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2CLS, LinearActivation
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.roles import own_head, roles
from brickyard.tune._coded import Dropped, Elementwise, Once, Recomputed, Softmax, Trained, coding
from brickyard.tune._codes import EXACT, Bounded, Code, Grouped, Rows

RECORD = Record(
    name="s2a",
    family="tune",
    title="Saved activations in 4 and 8 bits beside any tuner (S2A, reimplementation)",
    paper="Structure-Activation Synergy, arXiv 2503.08154",
    slot="memory",
    presets={"paper": {"bits": 4, "slope_bits": 4, "operand_bits": 4}},
    claims=(
        Claim(
            text="LoRA keeps at most a quarter of its bytes for backward; gradient cosine at least 0.998.",
            measure="saved_bytes",
            kind="counted",
        ),
        Claim(
            text="A step of LoRA takes at most 1.4 times as long, and less memory at its peak.",
            measure="step_time",
        ),
        Claim(
            text="LoRA trained on coded activations is at most 0.5 points worse.",
            inequality="s2a >= lora - 0.5",
            arms={"s2a": "lora + s2a", "lora": "lora"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "lora + s2a",
                "labels": "shuffled",
                "inequality": "s2a > control + 5.0",
            },
            gate="lora > majority + 10.0",
            epochs=2,
            lrs=(2e-3,),
            train_rows=800,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="On a language model it keeps at least 95 % of LoRA's gain over the untouched base.",
            inequality="s2a >= 0.95 lora",
            arms={
                "s2a": "lora + s2a",
                "lora": "lora",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "lora + s2a",
                "labels": "shuffled",
                "inequality": "s2a > control + 0.5",
            },
            gate="lora > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=1,
            lrs=(3e-2,),
            train_rows=200,
            batch=16,
            max_length=128,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
    ),
)

_NAME = "brickyard_s2a"  # in transformers' AttentionInterface
_ACTIVATIONS = tuple(
    {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()} - {LinearActivation}
    | {nn.GELU, nn.ELU, nn.Softplus}
)
_RANGE = (-40.0, 40.0, 160_001)  # where derivatives are looked at: all bounded ones are flat beyond


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of S2A's saved activations; UsageError for values out of range."""

    bits: int = 4
    """bits a value of the inputs of norms and the results of softmax: 1, 2, 4 or 8; 32 keeps them exact (a control)"""
    slope_bits: int = 8
    """bits of the derivatives of activations; those with two values take one"""
    operand_bits: int = 8
    """bits of queries, keys, values, the inputs of trained layers and the factors of gated products"""
    group: int = 64
    """values that share a low and a step (4 bytes)"""
    stochastic: bool = False
    """round up or down by chance, without bias but with twice the variance, instead of to the nearest"""
    strict: bool = True
    """refuse a model in which a norm, activation or attention cannot be coded; false: leave those as they are"""

    def __post_init__(self) -> None:
        for name in ("bits", "slope_bits", "operand_bits"):
            if getattr(self, name) not in (1, 2, 4, 8, EXACT):
                raise UsageError(f"s2a: {name}={getattr(self, name)}; use 1, 2, 4 or 8 (or 32: exact).")
        if self.group < 2:
            raise UsageError(f"s2a: group={self.group}; at least 2 values share a scale.")


def slope_code(phi: Callable[[Tensor], Tensor], config: Config) -> Code:
    """Return the code for phi': one bit if it takes two values, a fixed grid if it is bounded, else groups."""
    if config.slope_bits == EXACT:
        return Grouped(EXACT)
    x_N = torch.linspace(*_RANGE, dtype=torch.float64).float().requires_grad_()
    with torch.enable_grad():
        (slope_N,) = torch.autograd.grad(phi(x_N * 1.0).sum(), x_N)
    values = slope_N.unique()
    low, high = float(values[0]), float(values[-1])
    if len(values) <= 2:
        return Bounded(1, low, high)
    inside_N = slope_N[x_N.detach().abs() < 0.75 * _RANGE[1]]
    slack = 1e-3 * (high - low)
    if inside_N.min() > low + slack or inside_N.max() < high - slack:  # it still grows at the ends
        return Grouped(config.slope_bits, config.group, config.stochastic)
    return Bounded(config.slope_bits, low, high, config.stochastic)


def convert(model: nn.Module, config: Config) -> Callable[[], None]:
    """Let the modules of `model` keep codes for their backward pass, in place; call what is returned to undo it.

    Parameters, module tree, and the outputs of forward stay as they are. Raises Refused where nothing can be coded and,
    if `config.strict`, where a norm, activation or attention cannot, with the first of them.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    heads = tuple(f"{name}." for name in own_head(model))
    leaves = {name: m for name, m in plain.named_modules() if not f"{name}.".startswith(heads or ("\0",))}
    operands = Grouped(config.operand_bits, config.group, config.stochastic)
    coder = _Coder(config, operands, Once(operands), {})
    gated = _gated(plain)
    replaced = next((name for name, module in leaves.items() if "forward" in vars(module)), None)
    if replaced is not None:
        raise Refused(f"s2a: the forward of {replaced} is replaced already; is the model converted twice?")
    with ExitStack() as undo:
        missed, done = [], 0
        for name, module in leaves.items():
            forward = coder.coded(module, name in gated)
            if forward is not None:
                _set(undo, module, "forward", forward)
            elif _dispatches(module):
                coder.attention(module, undo)
            elif _uncoded(module):
                missed.append(f"{name} ({type(module).__name__})")
                continue
            else:
                continue
            done += 1
        missed += [f"{name} ({type(plain.get_submodule(name)).__name__})" for name in _own_attention(plain)]
        if missed and config.strict:
            raise Refused(
                f"s2a: {len(missed)} modules keep what cannot be coded: {', '.join(missed[:5])}; strict=false leaves "
                "such modules as they are."
            )
        if not done:
            raise Refused("s2a: this model holds nothing that could be coded: no activation, norm or attention.")
        return undo.pop_all().close


def _set(undo: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of this one module, and have it back as it was when `undo` closes."""
    if name in vars(module):
        undo.callback(setattr, module, name, vars(module)[name])
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, value)


def _reaches(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class _Coder:
    """Makes the forwards that take the place of the modules' own; each falls back on it where no gradient flows."""

    config: Config
    operands: Grouped
    once: Once
    slopes: dict[str, Code]

    def coded(self, module: nn.Module, gated: bool) -> Callable[..., Any] | None:
        """Return a forward for `module`, or None where there is nothing to code."""
        trained = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if type(module) is nn.Dropout:
            return self._dropout(module)
        if type(module) is nn.Softmax and module.dim is not None:
            return self._softmax(module)
        if _elementwise(module):
            return self._activation(module)
        if _norm(module):
            return self._norm(module, trained)
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad:
            return self._linear(module)
        if gated or (isinstance(module, BaseTunerLayer) and _by_hand(module)):
            return self._hooked(module)
        return None

    def _activation(self, module: nn.Module) -> Callable[..., Any]:
        plain = module.forward
        # In place it would write over the leaf by which its derivative is taken.
        phi = (lambda x: plain(x.clone())) if getattr(module, "inplace", False) else plain
        kind = f"{type(module).__qualname__}({module.extra_repr()}) {getattr(module, 'act', '')}"
        if kind not in self.slopes:
            self.slopes[kind] = slope_code(phi, self.config)
        code = self.slopes[kind]
        return lambda x: Elementwise.apply(x, phi, code) if _reaches(x) else plain(x)

    def _softmax(self, module: nn.Softmax) -> Callable[..., Any]:
        plain, code = module.forward, Grouped(self.config.bits, self.config.group, self.config.stochastic)
        return lambda x: Softmax.apply(x, module.dim, code) if _reaches(x) else plain(x)

    def _dropout(self, module: nn.Dropout) -> Callable[..., Any]:
        plain = module.forward
        return lambda x: (
            Dropped.apply(x, module.p) if module.training and 0 < module.p < 1 and _reaches(x) else plain(x)
        )

    def _norm(self, module: nn.Module, trained: list[nn.Parameter]) -> Callable[..., Any]:
        plain = module.forward
        exact = Grouped(EXACT)
        codes = [Rows(self.config.bits, self.config.group, self.config.stochastic), *(exact for _ in trained)]

        def forward(x: Tensor) -> Any:
            if not _reaches(x, *trained):
                return plain(x)
            return Recomputed.apply(lambda x, *_: plain(x), codes, False, x, *trained)

        return forward

    def _linear(self, module: Any) -> Callable[..., Any] | None:
        plain, transposed = module.forward, isinstance(module, Conv1D)
        if module.weight.shape[0 if transposed else 1] < self.config.group:
            return None  # the rank-r product inside an adapter: too small to be worth a rounding error

        def forward(x: Tensor) -> Any:
            weight, bias = module.weight, module.bias  # looked up anew: a rank may shrink while it trains
            if not _reaches(x, weight, bias):
                return plain(x)
            return Trained.apply(x, weight, bias, plain, transposed, self.once)

        return forward

    def _hooked(self, module: nn.Module) -> Callable[..., Any]:
        plain = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(x, *args, **kwargs)
            with coding(x, self.once):
                return plain(x, *args, **kwargs)

        return forward

    def attention(self, module: Any, undo: ExitStack) -> None:
        """Let `module` find this function in the AttentionInterface, and this function the module's own.

        Where a tuner stands between the two (prompts), it calls `inner_attention`, which this function then replaces.
        """
        here = inspect.unwrap(type(module).forward).__globals__
        inner = getattr(module, "inner_attention", None)
        original = inner or here["ALL_ATTENTION_FUNCTIONS"].get_interface(
            module.config._attn_implementation, here["eager_attention_forward"]
        )

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            if not _reaches(query, key, value):
                return original(module, query, key, value, mask, **options)
            tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
            others = {name: x for name, x in options.items() if name not in tensors}
            names = tuple(tensors)  # the closure must not hold the tensors themselves

            def call(query: Tensor, key: Tensor, value: Tensor, mask: Any, *more: Tensor) -> Any:
                named = dict(zip(names, more, strict=True))
                return original(module, query, key, value, mask, **others, **named)

            codes = (*[self.operands] * 3, *(Grouped(EXACT) for _ in (mask, *tensors)))
            random = options.get("dropout", 0.0) > 0
            return Recomputed.apply(call, codes, random, query, key, value, mask, *tensors.values())

        if inner is not None:
            _set(undo, module, "inner_attention", lambda _, *tensors, **options: attend(*tensors, **options))
            return
        # Only this module's view of the config changes: masks are still made for the model's own attention.
        config = copy.deepcopy(module.config)
        config._attn_implementation = _NAME
        AttentionInterface.register(_NAME, _attend)
        _set(undo, module, "coded_attention", attend)
        _set(undo, module, "config", config)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    return module.coded_attention(query, key, value, attention_mask, **options)


def _dispatches(module: nn.Module) -> bool:
    """Whether the module looks its attention up in transformers' AttentionInterface."""
    if isinstance(module, PreTrainedModel) or not hasattr(module, "config"):
        return False
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "ALL_ATTENTION_FUNCTIONS" in names and "eager_attention_forward" in forward.__globals__


def _elementwise(module: nn.Module) -> bool:
    return isinstance(module, _ACTIVATIONS) and not any(True for _ in (*module.parameters(), *module.children()))


def _norm(module: nn.Module) -> bool:
    """Whether it normalises the last dimension."""
    kind = type(module).__name__
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) == 1
    return ("LayerNorm" in kind or "RMSNorm" in kind) and all(p.ndim == 1 for p in module.parameters())


def _uncoded(module: nn.Module) -> bool:
    """Whether the module keeps large inputs and is of a kind that `_Coder` has no forward for."""
    known = isinstance(module, (nn.MultiheadAttention, *_ACTIVATIONS)) or "Norm" in type(module).__name__
    return known and not any(True for _ in module.children())


def _by_hand(layer: nn.Module) -> bool:
    """Whether a PEFT layer multiplies by its parameters itself, so that no linear layer in it is coded."""
    trained = {id(p) for p in layer.parameters() if p.requires_grad}
    linear = {id(p) for m in layer.modules() if isinstance(m, nn.Linear | Conv1D) for p in m.parameters()}
    return bool(trained - linear) or hasattr(layer, "shared")


def _siblings(model: nn.Module) -> dict[str, set[str]]:
    """Module -> the roles of the layers directly in it; an adapter around a layer does not count as a module."""
    found: dict[str, set[str]] = {}
    for name, role in roles(model).items():
        name = name.removesuffix(".base_layer")
        found.setdefault(name.rpartition(".")[0], set()).add(role)
    return found


def _gated(model: nn.Module) -> set[str]:
    """The modules that multiply a gate by an up projection: that product keeps both its factors."""
    return {name for name, of in _siblings(model).items() if {"gate", "up"} <= of}


def _own_attention(model: nn.Module) -> list[str]:
    """The modules that hold queries and keys but do not look their attention up: it is out of reach."""
    modules = dict(model.named_modules())
    return [n for n, of in _siblings(model).items() if {"query", "key"} <= of and not _dispatches(modules[n])]
