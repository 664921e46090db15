"""One adapted layer: the base layer plus what the active methods add to it, and the words methods and layers share.

Legend of the shapes: x [..., n] inputs, y [..., m] outputs, W_mn the base weight, A_rn and B_mr low-rank factors.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import BadMix, NotFinite, Refused
from brickyard.core.rows import served

PREFIX = "brick_"
FIXED = "brick_fixed_"
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One matched layer as a method sees it, whether Linear or Conv1D.

    `group` is equal for the layers of one type (the dotted name without its numbers) and one shape; `position` counts
    from 0 to `count` - 1 within the group in the model's order. Number by it, never by a number found in the name.
    `role` is what the layer does in its block (`core.roles`).
    """

    name: str
    group: str
    in_features: int
    out_features: int
    position: int
    count: int
    role: str = "other"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The tensors that one adapter brings, at their initial values, which must leave the model's outputs unchanged.

    `shared` maps a group to {name: tensor}, trained and stored once for the group; `own` maps a layer's name to
    {name: tensor}, trained; `fixed` maps a layer's name to {name: tensor}, stored but never trained (indices, masks).
    """

    shared: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fixed: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Part:
    """What a method's functions get of one layer: `part["name"]` is its tensor, shared, own or fixed.

    `drawn` is what the method's `draw`, or its callback in the loop, gave this layer for the present training step, or
    outside training what `choose` set (None if neither); `training` tells the two apart. `weight` is the frozen base
    weight.
    """

    __slots__ = ("_layer", "drawn", "leaf", "tensors", "training")

    def __init__(self, leaf: Leaf, tensors: dict[str, Tensor], drawn: Any, training: bool, layer: nn.Module | None):
        self.leaf, self.tensors, self.drawn, self.training, self._layer = leaf, tensors, drawn, training, layer

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def weight(self) -> Tensor:
        """W_mn, the base layer's weight without gradient; Refused when it is quantised."""
        if not isinstance(self._layer, BrickyardLinear):
            raise Refused(f"{self.leaf.name}: the base weight is not at hand while a file is being checked.")
        return self._layer.base_weight()


@dataclass(frozen=True)
class Bound:
    """One adapter's method on one layer."""

    name: str
    module: ModuleType
    config: Any
    leaf: Leaf
    tensors: tuple[tuple[str, str], ...]  # (name for the method, attribute of the layer; "" if shared)

    def has(self, function: str) -> bool:
        return hasattr(self.module, function)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        return self  # nothing in it changes, and a Python module cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _bind_again, (self.name, self.module.__name__, self.config, self.leaf, self.tensors)

    @property
    def keeps(self) -> bool:
        """Whether its factors are kept at inference: not where the module says that they are as cheap without."""
        return self.has("factors") and getattr(self.module, "KEEP_FACTORS", True)

    @property
    def mergeable(self) -> bool:
        return self.has("factors") or self.has("weight")

    @property
    def additive(self) -> bool:
        """Whether the output is the base's plus a term that does not depend on the other adapters."""
        return self.has("factors") or self.has("delta") or (self.has("weight") and not self.has("around"))


def _bind_again(name: str, module: str, config: Any, leaf: Leaf, tensors: tuple[tuple[str, str], ...]) -> Bound:
    return Bound(name, importlib.import_module(module), config, leaf, tensors)


class Shared:
    """A group's tensors of one adapter, held by the tuner and seen by each layer of the group.

    Not a module, so that a layer may refer to it without registering the same parameters once per layer.
    """

    def __init__(self, adapter: str, containers: dict[str, nn.ParameterDict]):
        self.adapter, self.containers = adapter, containers

    def __getitem__(self, name: str) -> Tensor:
        return self.containers[name][self.adapter]

    def parameters(self) -> Iterator[Tensor]:
        """The parameters; PEFT switches `requires_grad` through this method."""
        return (container[self.adapter] for container in self.containers.values())

    def move(self, device: torch.device) -> None:
        for container in self.containers.values():
            if container[self.adapter].device not in (device, torch.device("meta")):
                container[self.adapter] = nn.Parameter(
                    container[self.adapter].detach().to(device), requires_grad=container[self.adapter].requires_grad
                )


def why_not(module: nn.Module) -> str:
    """Return why `module` cannot be adapted, or an empty text."""
    if isinstance(module, BaseTunerLayer):
        return "it already carries an adapter of another PEFT type; merge or unload that one first"
    if isinstance(module, nn.Linear | Conv1D):
        return ""
    kinds = "only nn.Linear and transformers' Conv1D layers are adapted"
    if isinstance(module, nn.Embedding):
        return f"it is an embedding, whose input is an index and not a vector; {kinds}"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"it is a convolution, whose weight is not a matrix; {kinds}"
    return f"it is a {type(module).__name__}; {kinds}"


def sides(module: nn.Module) -> tuple[int, int]:
    """Return (in_features n, out_features m) of a Linear or Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # type: ignore[union-attr]
    return int(rows), int(columns)


def low_rank(x: Tensor, y: Tensor, a_rn: Tensor, b_mr: Tensor, scaling: float) -> Tensor:
    """Return y + scaling * x A^T B^T; only x and the rank-r product are kept for the backward pass besides A and B."""
    u_r = F.linear(x, a_rn) * scaling
    if u_r.dtype == y.dtype == b_mr.dtype:
        # One pass over y instead of three: product, sum and scaling together.
        y_Tm = y.reshape(-1, y.shape[-1])
        return torch.addmm(y_Tm, u_r.reshape(len(y_Tm), len(a_rn)), b_mr.t()).view(y.shape)
    return (y + F.linear(u_r, b_mr)).to(y.dtype)


class BrickyardLinear(nn.Module, BaseTunerLayer):
    """A Linear or Conv1D layer with any number of adapters of our methods.

    The name ends in Linear because PEFT recognises adapted linear layers by their class name. Per-layer tensors live in
    `brick_NAME` (trained) and `brick_fixed_NAME` (stored only), dictionaries directly keyed by the adapter's name,
    which is the only nesting that PEFT loads under another adapter name.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = sides(base_layer)
        self.adapter_layer_names = ("shared",)
        self.other_param_names = ("bound", "drawn", "chosen")
        self.shared: dict[str, Shared] = {}
        self.bound: dict[str, Bound] = {}
        self.drawn: dict[str, Any] = {}
        self.chosen: dict[str, Any] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = []
        self._weight_before: Tensor | None = None
        self._factors: dict[str, tuple[Any, tuple[Tensor, Tensor, float]]] = {}
        self.train(base_layer.training)

    def add(
        self, adapter: str, bound: Bound, shared: Shared, own: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
    ) -> None:
        """Give this layer one more adapter; its floating tensors stay in full precision whatever the base's is."""
        device = self.weight.device
        for name, tensor in own.items():
            if not hasattr(self, PREFIX + name):
                self.add_module(PREFIX + name, nn.ParameterDict())
                self.adapter_layer_names = (*self.adapter_layer_names, PREFIX + name)
            self.get_submodule(PREFIX + name)[adapter] = nn.Parameter(tensor.to(device))  # type: ignore[index]
        for name, tensor in fixed.items():
            if not hasattr(self, FIXED + name):
                self.add_module(FIXED + name, BufferDict(persistent=True))
                self.other_param_names = (*self.other_param_names, FIXED + name)
            self.get_submodule(FIXED + name)[adapter] = tensor.to(device)  # type: ignore[index]
        self.shared[adapter] = shared
        self.bound[adapter] = bound

    def _get_available_adapters(self) -> set[str]:
        return set(self.bound)

    def part(self, adapter: str, *, training: bool | None = None) -> Part:
        """Return what the adapter's method sees of this layer, in its present mode or the one given."""
        training = self.training if training is None else training
        bound, shared = self.bound[adapter], self.shared[adapter]
        tensors = {n: getattr(self, at)[adapter] if at else shared[n] for n, at in bound.tensors}
        drawn = (self.drawn if training else self.chosen).get(adapter)
        return Part(bound.leaf, tensors, drawn, training, self)

    def base_weight(self) -> Tensor:
        """Return W_mn without gradient; Refused when the base is quantised."""
        base = self.get_base_layer()
        weight = base.weight
        if not isinstance(weight, Tensor) or weight.dtype not in PLAIN or weight.dim() != 2:
            kind = getattr(weight, "dtype", type(weight).__name__)
            raise Refused(
                f"{self._where()}: the base weight is quantised ({kind}), so it can be neither read nor merged into; "
                f"load the base in a floating-point type for this step."
            )
        return weight.detach().t() if isinstance(base, Conv1D) else weight.detach()

    def factors(self, adapter: str, part: Part | None = None) -> tuple[Tensor, Tensor, float]:
        """Return (A_rn, B_mr, scaling) of a low-rank adapter.

        Outside training and autograd those of active adapters are kept until one of the tensors they come from
        changes, so that memory does not grow with the adapters on the base. A write through `.data` does not count as
        a change to PyTorch: write to the parameter itself under `torch.no_grad()`.
        """
        bound, part = self.bound[adapter], part or self.part(adapter)
        active = self.active_adapters
        for name in [name for name in self._factors if name not in active]:
            del self._factors[name]
        plain = self.training or torch.is_grad_enabled() or adapter not in active
        if plain or any(t.is_inference() for t in part.tensors.values()):
            return bound.module.factors(bound.config, part)
        held, made = self._factors.get(adapter, ((), None))
        now = [(t, t._version, t.data_ptr()) for t in part.tensors.values()]
        if made is None or not _same(held, now):
            made = bound.module.factors(bound.config, part)
            # The alias keeps the storage alive, so that an equal address means the same storage.
            self._factors[adapter] = ([(t, v, p, t.detach()) for t, v, p in now], made)
        return made

    def change(self, adapter: str) -> Tensor:
        """Return dW_mn, what merging the adapter adds to the base weight, in float32 or wider; Refused if it cannot.

        What a training step happened to draw has no part in it, in whatever mode the model is.
        """
        bound, part = self.bound[adapter], self.part(adapter, training=False)
        with torch.no_grad():
            if bound.has("factors"):
                a_rn, b_mr, scaling = self.factors(adapter, part)
                return (b_mr @ a_rn) * scaling
            if bound.has("weight"):
                return bound.module.weight(bound.config, part)
        raise Refused(
            f"{bound.name} on {bound.leaf.name} is no change of the weight, so it cannot be merged or exported."
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the change in the orientation of the base weight (PEFT's name for it)."""
        change_mn = self.change(adapter)
        return change_mn.t() if isinstance(self.get_base_layer(), Conv1D) else change_mn

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name in self.bound and self.bound[adapter_name].mergeable

    def check_merge(self, adapters: list[str], *, finite: bool) -> None:
        """Raise Refused where `adapters` cannot be merged together here, NotFinite where a change is not finite."""
        self.base_weight()
        for adapter in adapters:
            if not self.bound[adapter].mergeable:
                self.change(adapter)
            if len({*adapters, *self.merged_adapters}) > 1 and not self.bound[adapter].additive:
                raise Refused(
                    f"{self._where()}: {self.bound[adapter].name} rescales the layer's output, so it cannot be merged "
                    f"together with {sorted({*adapters, *self.merged_adapters} - {adapter})}; merge it alone."
                )
            if finite and not torch.isfinite(self.change(adapter)).all():
                raise NotFinite(
                    f"{self._where()}: the change of adapter {adapter!r} holds NaN or infinity; not merged."
                )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' changes into the base weight; a copy of it is kept, so that `unmerge` is exact."""
        adapters = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.bound]
        if not adapters:
            return
        self.check_merge(adapters, finite=safe_merge)
        weight = self.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.detach().to(wide)
        for adapter in adapters:
            merged = merged + self.get_delta_weight(adapter).to(wide)
        merged = merged.to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise NotFinite(f"{self._where()}: the merged weight overflows {weight.dtype}; not merged.")
        with torch.no_grad():
            if self._weight_before is None:
                self._weight_before = weight.detach().clone()
            weight.copy_(merged)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self.merged or self._weight_before is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            self.weight.copy_(self._weight_before)
        self._weight_before = None
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._factors.pop(adapter_name, None)

    def choose(self, adapter: str, value: Any) -> None:
        """Set what the adapter's method gets as `part.drawn` outside training (None: nothing)."""
        self._factors.pop(adapter, None)
        self.chosen[adapter] = value

    def train(self, mode: bool = True) -> BrickyardLinear:
        self._factors.clear()
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        active = [] if self.merged else [adapter for adapter in self.active_adapters if adapter in self.bound]
        if len(active) == 1 and self.bound[active[0]].has("whole"):
            bound = self.bound[active[0]]
            return bound.module.whole(bound.config, self.part(active[0]), x, self.get_base_layer().bias)
        y = self.base_layer(x, *args, **kwargs)
        for adapter in active:
            y = self._adapted(adapter, x, y)
        return y

    def _mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise BadMix(f"adapter_names were given while {self.merged_adapters} are merged; unmerge them first.")
        y = self.base_layer(x, *args, **kwargs)
        alone = dict(self.bound)
        for module in {bound.module for bound in self.bound.values() if bound.has("together")}:
            rows = [i for i, name in enumerate(adapter_names) if name in alone and alone[name].module is module]
            if max(rows, default=0) >= len(x):
                continue  # `served` says what is wrong
            change = self._together(module, x[rows], [adapter_names[i] for i in rows])
            if change is not None:
                y = y.index_put((torch.tensor(rows, device=y.device),), change.to(y.dtype), accumulate=True)
                alone = {name: bound for name, bound in alone.items() if bound.module is not module}
        return served(x, y, adapter_names, alone, partial(self._adapted, keep=False))

    def _together(self, module: ModuleType, x: Tensor, names: list[str]) -> Tensor | None:
        """Return what rows of several adapters of one method add, or None where they are better served one by one."""
        parts = [self.part(name) for name in names]
        if len(set(names)) < 2 or len({_dtype(part, x) for part in parts}) > 1:
            return None
        return module.together([self.bound[name].config for name in names], parts, self._cast(x, parts[0]))

    def _cast(self, x: Tensor, part: Part) -> Tensor:
        return x if torch.is_autocast_enabled(x.device.type) else self._cast_input_dtype(x, _dtype(part, x))

    def _adapted(self, adapter: str, x: Tensor, y: Tensor, *, keep: bool = True) -> Tensor:
        """Return the layer's output y with one adapter's effect; x is the layer's input.

        keep: whether factors may be kept for the next call, which those of every adapter in a mixed batch are not.
        """
        bound, part = self.bound[adapter], self.part(adapter)
        module, config = bound.module, bound.config
        x = self._cast(x, part)
        rate = getattr(config, "dropout", 0.0)
        if rate and self.training:
            x = F.dropout(x, rate)
        # At inference kept factors are at hand already, whatever path the method takes in training.
        plain = keep and bound.keeps and not self.training and not torch.is_grad_enabled()
        if bound.has("around") and not plain:
            return module.around(config, part, x, y).to(y.dtype)
        if bound.has("delta") and not plain:
            return (y + module.delta(config, part, x)).to(y.dtype)
        if bound.has("factors"):
            a_rn, b_mr, scaling = self.factors(adapter, part) if keep else module.factors(config, part)
            return low_rank(x, y, a_rn, b_mr, scaling)
        return (y + F.linear(x, module.weight(config, part))).to(y.dtype)

    def _where(self) -> str:
        return next((bound.leaf.name for bound in self.bound.values()), "a layer")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the base's type, in which small steps and positions above 256 vanish (bfloat16).
        device = device or self.weight.device
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, attribute)
            if isinstance(held, nn.ParameterDict | BufferDict) and adapter_name in held:
                tensor = cast(Tensor, held[adapter_name])
                held[adapter_name] = tensor if tensor.is_meta else tensor.to(device)
        if adapter_name in self.shared:
            self.shared[adapter_name].move(device)


def _dtype(part: Part, x: Tensor) -> torch.dtype:
    return next((t.dtype for t in part.tensors.values() if t.is_floating_point()), x.dtype)


def warn_of_rank(layers: Iterable[BrickyardLinear], adapter: str) -> None:
    """Say which rank is handed over where a method has many and nobody chose one."""
    layer = next((layer for layer in layers if adapter in layer.bound), None)
    if layer is None or not layer.bound[adapter].has("at_rank") or layer.chosen.get(adapter) is not None:
        return
    a_rn, _, _ = layer.factors(adapter, layer.part(adapter, training=False))
    warnings.warn(
        f"{layer.bound[adapter].name}: no rank was chosen for adapter {adapter!r}, so it is taken at its largest, "
        f"{len(a_rn)}; choose one with at_rank({adapter!r}, b) or brickyard export --rank b.",
        stacklevel=4,
    )


def _same(held: Sequence[tuple[Tensor, int, int, Tensor]], now: list[tuple[Tensor, int, int]]) -> bool:
    return len(held) == len(now) and all(
        before[0] is after[0] and before[1] == after[1] and before[2] == after[2]
        for before, after in zip(held, now, strict=True)
    )
