"""What a method costs: bytes kept for the backward pass, peak memory, time, FLOPs, bytes stored.

Each figure is either *counted* (read off the tensors and the graph: equal on every machine with the same library
versions) or *measured* (time, accelerator memory, resident memory: of this machine only); every docstring says which.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from brickyard.core.errors import Refused
from brickyard.core.forwards import evaluating

Loss = Callable[[Tensor], Tensor]


_DROPOUTS = frozenset(
    {
        torch.dropout,
        torch.alpha_dropout,
        torch.feature_dropout,
        torch.feature_alpha_dropout,
        nn.functional.dropout,
        nn.functional.dropout1d,
        nn.functional.dropout2d,
        nn.functional.dropout3d,
        nn.functional.alpha_dropout,
        nn.functional.feature_alpha_dropout,
    }
)


class _NoDropout(TorchFunctionMode):
    """Turns functional dropout into the identity, so that attention code that calls it needs no special case."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention:
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **kwargs)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Run `model` in training mode with every dropout off; flags, rates, buffers and random state are restored after.

    Covers dropout modules, functional dropout, the dropout of attention and recurrent layers, and stochastic depth
    (`drop_prob`). Buffers are copied, because batch statistics move in training mode.
    """
    training = {module: module.training for module in model.modules()}
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else None
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == kind})
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    rates: list[tuple[nn.Module, str, float]] = []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices, device_type=kind) if kind else torch.random.fork_rng([]))
        try:
            for module in training:
                module.training = not isinstance(module, _DropoutNd)
                for name in ("drop_prob", "dropout"):
                    if name == "dropout" and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
                        continue
                    rate = getattr(module, name, None)
                    if isinstance(rate, float):
                        rates.append((module, name, rate))
                        setattr(module, name, 0.0)
            stack.enter_context(_NoDropout())
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            for module, name, rate in rates:
                setattr(module, name, rate)
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)


@dataclass(frozen=True, kw_only=True)
class HiddenSave:
    """A tensor that lives from forward to backward without passing through `save_for_backward`.

    `where` is the autograd node and attribute that holds it, or the operator that made it when the holder is unknown
    (`node` is then empty).
    """

    node: str
    where: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one forward kept: `bytes` in `storages` distinct storages, and the saves that this count cannot see."""

    bytes: int
    storages: int
    hidden: tuple[HiddenSave, ...]


def _key(tensor: Tensor) -> int:
    """Identity of a tensor's storage. Not the address: tensors on the meta device have none."""
    return tensor.untyped_storage()._cdata


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors held by a value: nested containers, and the attributes of plain objects, but not modules."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _tensors_in(item, depth - 1)
    elif depth and not isinstance(value, (nn.Module, type, weakref.ref)) and hasattr(value, "__dict__"):
        yield from _tensors_in(vars(value), depth - 1)


def _nodes(root: Node | None) -> Iterator[Node]:
    """Every node of the graph behind `root`, once."""
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


def _raw_saves(node: Node) -> Iterator[Any]:
    """The `SavedTensor`s of a node, still packed."""
    for name in dir(node):
        if name.startswith("_raw_saved"):
            value = getattr(node, name)
            yield from value if isinstance(value, (tuple, list)) else (value,)


class _Births(TorchDispatchMode):
    """Remembers, without keeping it alive, every storage that an operator makes, and which operator that was."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[weakref.ref[Any], str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _key(leaf) not in before:
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = (weakref.ref(storage), f"{func} {tuple(leaf.shape)}")
        return out

    def alive(self) -> dict[int, tuple[int, str]]:
        """Storage -> (bytes, operator) of what still lives."""
        found = ((key, ref(), name) for key, (ref, name) in self.made.items())
        return {key: (storage.nbytes(), name) for key, storage, name in found if storage is not None}


def _inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Model inputs without `labels`, with which a model would compute a second loss of its own."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def saved_for_backward(
    model: nn.Module, inputs: Mapping[str, Any], loss: Loss, *, hidden: bool = True, exclude: Iterable[Tensor] = ()
) -> Saved:
    """Count what one forward of `loss(model(**inputs).logits)` keeps for the backward pass. Counted.

    Distinct storages, each with its full bytes once; parameters, buffers and `exclude` left out; dropout off, all else
    as in training. What a method packs through saved-tensor hooks of its own counts with the bytes that it packed.
    `labels` in the inputs are not given to the model. The figure depends on the attention implementation: state it.

    `hidden=True` also searches for what this count cannot see (tensors kept as attributes of an autograd function's
    ctx, of a module or of a closure), at the price of a second forward. Raises Refused when the loss needs no gradient.
    """
    inputs = _inputs(inputs)
    known = {_key(tensor) for tensor in (*model.parameters(), *model.buffers(), *exclude)}
    packed: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in known:
            packed[_key(tensor)] = tensor
        return tensor

    def give(tensor: Tensor) -> Tensor:
        return tensor

    births = _Births()
    with without_dropout(model), torch.enable_grad():
        if hidden:  # caches that a first call fills for good are no saves of this forward
            with torch.no_grad():
                model(**inputs)
        with ExitStack() as stack:
            if hidden:
                stack.enter_context(births)
            stack.enter_context(saved_tensors_hooks(keep, give))
            value = loss(model(**inputs).logits)
        if not value.requires_grad:
            raise Refused(
                "the loss does not depend on any parameter that needs a gradient, so nothing is saved for backward; "
                "a method trained without backward has no such figure"
            )
        attributes: list[HiddenSave] = []
        explained = known | {_key(value)}
        for node in _nodes(value.grad_fn):
            for raw in _raw_saves(node):
                if raw.unpack_hook not in (give, None):  # packed by hooks set inside the model: ours never ran
                    packed.update({_key(t): t for t in _tensors_in(raw.data) if _key(t) not in known})
            for name, attribute in getattr(node, "__dict__", {}).items():
                tensors = {_key(t): t for t in _tensors_in(attribute) if _key(t) not in known}
                if tensors:
                    size = sum(t.untyped_storage().nbytes() for t in tensors.values())
                    attributes.append(HiddenSave(node=type(node).__name__, where=name, bytes=size))
                    explained |= tensors.keys()
        total = sum(tensor.untyped_storage().nbytes() for tensor in packed.values())
        explained |= packed.keys()
        storages = len(packed)
        packed.clear()
        gc.collect()
        elsewhere = [
            HiddenSave(node="", where=operator, bytes=size)
            for key, (size, operator) in births.alive().items()
            if key not in explained
        ]
    return Saved(bytes=total, storages=storages, hidden=(*attributes, *elsewhere))


def saved_for_backward_bytes(model: nn.Module, inputs: Mapping[str, Any], loss: Loss) -> int:
    """Bytes of the distinct storages that one forward saves for backward. Counted; see `saved_for_backward`."""
    return saved_for_backward(model, inputs, loss, hidden=False).bytes


def hidden_saves(model: nn.Module, inputs: Mapping[str, Any], loss: Loss) -> tuple[HiddenSave, ...]:
    """Tensors held from forward to backward that `saved_for_backward_bytes` cannot see; empty for an honest method.

    An entry with a `node` is a tensor kept as an attribute of an autograd function's ctx: its memory would be missing
    from every table, so such a method is not accepted. An entry without one is held by a module or a closure.
    """
    return saved_for_backward(model, inputs, loss).hidden


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak memory of a step: `bytes`, and whether they were counted from the tensors or measured by the device."""

    bytes: int
    how: str


class _Live(TorchDispatchMode):
    """Bytes of the storages alive, operator by operator.

    A storage first seen as an argument existed before the step; it is charged from the beginning until it is freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, weakref.finalize] = {}
        self.resident = 0  # existed before the step
        self.change = 0  # made in the step and alive, less what existed before and is gone
        self.high = 0

    def _watch(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        if new:
            self.change += size
        else:
            self.resident += size
        self.known[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.pop(key, None)
        self.change -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._watch(leaf, new=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf, new=True)
        self.high = max(self.high, self.change)
        return out


def peak_bytes(step: Callable[[], object], device: torch.device | None = None) -> Peak:
    """Peak memory of one call of `step`.

    On an accelerator (`device`): *measured*, the allocator's highest allocated bytes, everything resident included.
    Otherwise *counted*: the highest sum of bytes of the tensor storages alive at the end of any operator, those which
    the step only reads (weights, batch, optimiser state) included. Scratch space inside one operator, the interpreter
    and the libraries are not in a counted figure; `resident_high_water` sees them.
    """
    accelerator = torch.accelerator.current_accelerator()
    if device is not None and accelerator is not None and device.type == accelerator.type:
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        step()
        torch.accelerator.synchronize(device)
        high = torch.accelerator.max_memory_allocated(device)
        return Peak(bytes=high, how="measured: highest allocated bytes of the device")
    gc.collect()  # so that garbage of an earlier step is not freed in the middle of this one
    live = _Live()
    try:
        with live:
            step()
    finally:
        for finalizer in list(live.known.values()):
            finalizer.detach()
    return Peak(bytes=live.resident + live.high, how="counted: tensor storages alive after an operator")


def resident_high_water() -> int:
    """Highest resident memory of this process so far, in bytes. Measured; take it in a process of its own."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux a child would inherit its parent's figure
    return high if sys.platform == "darwin" else high * 1024  # kilobytes on Linux, bytes on macOS


def distinct_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind `tensors`. Counted."""
    storages = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None}
    return sum(storages.values())


def gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the gradients that `parameters` hold now. Counted."""
    return distinct_bytes(parameter.grad for parameter in parameters)


def optimiser_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in the optimiser's state. Counted; zero before the first step."""
    return distinct_bytes(_tensors_in(list(optimiser.state.values())))


def folder_bytes(folder: Path) -> int:
    """Bytes of the plain files in `folder` and below; links are not followed. Counted."""
    return sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())


def _attention_flops(q_BHTD: Any, k_BHSD: Any, v_BHSE: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    *batch, tokens, width = q_BHTD
    count = 1
    for size in batch:
        count *= size
    return 2 * count * tokens * k_BHSD[-2] * (width + v_BHSE[-1])


def forward_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Floating-point operations of one forward in evaluation mode; a multiply-add is two. Counted.

    Matrix products, convolutions and attention are counted; element-wise work is not. Products with a mask or with
    zeros count in full, because they are still carried out.
    """
    # torch has formulas for the fused attention of accelerators only; without this one sdpa counts as zero here
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    # torch's counter hooks itself to inputs that need a gradient, and fails where one is a slice of a parameter
    trainable = [parameter.requires_grad_(False) for parameter in model.parameters() if parameter.requires_grad]
    try:
        with evaluating(model), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
            model(**_inputs(inputs))
    finally:
        for parameter in trainable:
            parameter.requires_grad_()
    return counter.get_total_flops()


def _timed(run: Callable[[], object]) -> float:
    accelerated = torch.accelerator.is_available()
    if accelerated:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    if accelerated:
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def step_time(run: Callable[[], object], *, warmup: int = 3, repeats: int = 10) -> float:
    """Median seconds of one call of `run`, after `warmup` untimed calls. Measured, on the monotonic clock."""
    return interleaved({"": run}, repeats, warmup=warmup)[""]


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, *, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each of `runs`, called in turn so that all meet the same state of the machine. Measured.

    Each round calls every run once and begins one place further on, so that none always follows the same neighbour.
    """
    if rounds < 1 or not runs:
        raise ValueError(f"timing needs at least one run and one round, got {len(runs)} runs and {rounds} rounds")
    names = list(runs)
    for _ in range(warmup):
        for name in names:
            runs[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            taken[name].append(_timed(runs[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


@cache
def cpu_bfloat16_is_fast() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32, decided once in a process.

    The processor's own features decide (AVX512-BF16 or AMX); where they cannot be read, two timed products do.
    """
    try:
        features = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        features = {}
    if features.get("architecture") == "x86_64":
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    single_NN = torch.ones(256, 256)
    half_NN = single_NN.bfloat16()
    times = interleaved({"single": lambda: single_NN @ single_NN, "half": lambda: half_NN @ half_NN}, 9, warmup=2)
    return times["half"] < 0.8 * times["single"]  # a clear gain: conversions around the products eat the rest


def precision(dtype: str = "auto", device: str | None = None) -> str:
    """Return the compute type of training: bfloat16 where this machine multiplies it faster than float32."""
    if dtype != "auto":
        return dtype
    if device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if cpu_bfloat16_is_fast() else "float32"


def _processor() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What a figure depends on: versions, processor, threads, accelerator. No host name, no user name, no path."""
    packages = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{package: _version(package) for package in packages},
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_bfloat16_is_fast": cpu_bfloat16_is_fast(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
