"""Where networks are aligned: feature spaces, the tensors that write or read each, and where their values are seen.

A space is what one map T rewrites. Layers that write into one residual stream share a space, because a sum of features
makes sense in one basis only. Of plain modules the spaces are found by `torch.fx`; whoever knows better names them:
point -> (producers, consumers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, fx, nn

from brickyard.core.errors import Refused, Unmatched, UsageError
from brickyard.merge._align import Map, heads_only, moved, repeated
from brickyard.merge._align_norms import Pair, into, out_of

Kind = Literal["any", "permute", "orthogonal"]
Names = tuple[Sequence[str], Sequence[str]] | Mapping[str, Sequence[str]]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh,
    nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Upsample,
)  # fmt: skip
_FUNCTIONS = frozenset(
    (
        "relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "tanh",
        "tanh_", "sigmoid", "hardswish", "hardtanh", "dropout", "dropout2d", "max_pool1d", "max_pool2d", "avg_pool1d",
        "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "contiguous",
        "clamp", "clamp_min", "float", "double", "boolean_dispatch", "clone", "detach",
    )
)  # fmt: skip
_SUMS, _PRODUCTS = ("add", "iadd", "add_", "sub", "isub", "sub_"), ("mul", "imul", "mul_", "truediv", "div")
_MIXING = ("softmax", "log_softmax")  # every feature depends on all, in whatever order they stand
_SHOWN = 8  # names in a refusal


@dataclass(frozen=True)
class Use:
    """One axis of one tensor that lies in a space: T acts on it, or with `inward` T^{-1}.

    block: neighbouring entries a feature stands for. squared: the squares of T's entries act (variances: exact where T
    is a permutation). heads: only whole heads move. repeat: heads that share one of the space's.
    """

    tensor: str
    axis: int
    inward: bool = False
    block: int = 1
    squared: bool = False
    heads: bool = False
    repeat: int = 1

    def apply(self, tensor: Tensor, found: Map) -> Tensor:
        """Return the tensor rewritten."""
        if self.heads:
            found = heads_only(found)
        if self.repeat > 1:
            found = repeated(found, self.repeat)
        if self.squared:
            found = Map(found.forward.square(), found.inverse)
        return moved(tensor, found, axis=self.axis, inward=self.inward, block=self.block)


@dataclass(frozen=True)
class Site:
    """Where a space's values are seen: what goes into a module, or what comes out of it.

    axis: of the features (1 of images, -1 of tokens and vectors), each `block` entries wide. level: every row is
    brought to length 1, as a norm behind it brings it; its mean over the features stays.
    """

    module: str
    axis: int
    output: bool = False
    block: int = 1
    level: bool = False

    def rows(self, x: Tensor, width: int, mask: Tensor | None) -> Tensor:
        """Return the values as samples [m, width]; mask [B, T] leaves out padding."""
        x = x.detach()
        if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape:
            x = x[mask]
        if self.axis == -1:
            x = x.reshape(-1, width, self.block).transpose(1, 2)
        x_mn = x.movedim(self.axis, -1).reshape(-1, width)
        if self.level:
            x_mn = x_mn / x_mn.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return x_mn


@dataclass(frozen=True)
class Point:
    """One space: its width, the tensors in it, where it is seen, and which maps it can bear.

    kind: "any" map; "permute" where only that keeps what the layers compute (two factors of a product, a norm with a
    gain inside the stream); "orthogonal" (`keep_mean`: and T 1 = 1), where norms read it. heads: of values, or 0.
    """

    name: str
    width: int
    uses: tuple[Use, ...]
    sites: tuple[Site, ...]
    kind: Kind = "any"
    heads: int = 0
    keep_mean: bool = False
    pairs: tuple[Pair, ...] = ()  # its producers with the BatchNorm that alone reads each


@dataclass(frozen=True)
class Layout:
    """The points of an architecture and how a state is rewritten at them.

    judged: its outputs are logits. folds: BatchNorms are passed as `_align_norms` does it; False: as the released code.
    """

    points: tuple[Point, ...]
    judged: bool = True
    folds: bool = True

    def rewrite(
        self, reference: Mapping[str, Tensor], state: Mapping[str, Tensor], maps: Mapping[str, Map]
    ) -> dict[str, Tensor]:
        """Return a network's state in the reference's spaces; neither is changed."""
        # A permutation commutes with every norm as it is.
        mixed = [p for p in self.points if self.folds and p.pairs and not maps[p.name].permutes]
        pairs = [pair for point in mixed for pair in point.pairs]
        out = dict(state)
        for pair in pairs:
            into(out, pair)
        out = rewritten(out, self.points, maps)
        for pair in pairs:
            out_of(out, reference, pair)
        return {name: tensor.to(state[name].dtype) for name, tensor in out.items()}


def rewritten(state: Mapping[str, Tensor], points: Iterable[Point], maps: Mapping[str, Map]) -> dict[str, Tensor]:
    """Return a network's state in the reference's spaces: every tensor mapped along each of its axes in a space."""
    out = dict(state)
    for point in points:
        if point.name in maps:
            for use in point.uses:
                out[use.tensor] = use.apply(out[use.tensor], maps[point.name])
    return out


def written(module: nn.Module, name: str) -> list[Use]:
    """Return what of a producer lies in the space it writes."""
    if isinstance(module, nn.Embedding):
        return [Use(f"{name}.weight", 1)]
    return [Use(f"{name}.weight", 0), *([Use(f"{name}.bias", 0)] if module.bias is not None else [])]


def read(module: nn.Module, name: str, width: int) -> Use:
    """Return what of a consumer lies in the space it reads: the input axis of its weight."""
    size = sizes(module)[1]
    if size % width:
        raise UsageError(f"{name} reads {size} features, which is no multiple of the {width} of its space.")
    return Use(f"{name}.weight", 1, inward=True, block=size // width)


def carried(module: nn.Module, name: str, width: int) -> list[Use]:
    """Return what of a norm (or another layer with a number a feature) lies in the space it passes on."""
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return [
        Use(f"{name}.{leaf}", 0, block=tensor.shape[0] // width, squared=leaf == "running_var")
        for leaf, tensor in held.items()
        if tensor is not None and tensor.ndim == 1 and tensor.shape[0] >= width
    ]


def paired(layer: str, writer: nn.Module, norm: str, module: Any) -> Pair | None:
    """Return a layer and the BatchNorm behind it, where that holds statistics; else None."""
    fits = isinstance(module, NORMS) and isinstance(writer, (nn.Linear, *CONVS)) and module.running_var is not None
    return Pair(layer, norm, module.eps) if fits else None


def sizes(module: Any) -> tuple[int, int]:
    """Return the features that a layer writes and reads."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, 0
    return module.out_channels, module.in_channels


def by_name(model: nn.Module, points: Mapping[str, Names]) -> list[Point]:
    """Return the points that somebody names: point -> (producers, consumers), each the names of modules.

    Producers are Linear, Conv and Embedding layers, and the norms behind them, each named behind its layer; consumers
    Linear and Conv layers, at whose inputs the space is seen. Raises Unmatched with the nearest names, Refused for a
    layer that no map can rewrite, UsageError where widths differ or a layer writes into two points.
    """
    out = []
    for point, names in points.items():
        given = (names["producers"], names["consumers"]) if isinstance(names, Mapping) else tuple(names)
        if len(given) != 2 or not all(given) or any(isinstance(part, str) for part in given):
            raise UsageError(f"point {point!r}: give (producers, consumers), two lists of module names, none empty.")
        producers, consumers = ([(name, _module(model, name)) for name in part] for part in given)
        writers = [(name, m) for name, m in producers if isinstance(m, (nn.Linear, nn.Embedding, *CONVS))]
        widths = {sizes(m)[0] for _, m in writers}
        if len(widths) != 1:
            raise UsageError(f"point {point!r}: its producers write {sorted(widths)} features; expected one width.")
        width = widths.pop()
        uses, kind = [use for name, m in writers for use in written(m, name)], "any"
        for name, m in producers:
            if isinstance(m, NORMS):
                uses += carried(m, name, width)
            elif isinstance(m, nn.LayerNorm):
                uses, kind = [*uses, *carried(m, name, width)], "permute"
            elif (name, m) not in writers:
                raise Refused(f"point {point!r}: {name} is a {type(m).__name__}, which writes no features by a weight.")
        sites = []
        for name, m in consumers:
            if not isinstance(m, (nn.Linear, *CONVS)):
                raise Refused(f"point {point!r}: {name} is a {type(m).__name__}; consumers are Linear or Conv layers.")
            uses.append(read(m, name, width))
            sites.append(Site(name, -1 if isinstance(m, nn.Linear) else 1, block=uses[-1].block))
        for name, m in (*producers, *consumers):
            _assert_whole(m, name)
        pairs = [p for a, b in pairwise(producers) if a in writers and (p := paired(*a, *b)) is not None]
        out.append(Point(point, width, tuple(uses), tuple(sites), kind, pairs=tuple(pairs)))
    return assert_apart(out)


def assert_apart(points: list[Point]) -> list[Point]:
    """Return the points; UsageError where an axis of a tensor lies in two of them."""
    seen: dict[tuple[str, int], str] = {}
    for point in points:
        for use in point.uses:
            other = seen.setdefault((use.tensor, use.axis), point.name)
            if other != point.name or sum((use.tensor, use.axis) == (u.tensor, u.axis) for u in point.uses) > 1:
                raise UsageError(
                    f"axis {use.axis} of {use.tensor} lies in {other!r} and in {point.name!r}; layers that share a "
                    "stream are one point with one map. Name it once."
                )
    return points


def _module(model: nn.Module, name: str) -> nn.Module:
    known = dict(model.named_modules())
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        raise Unmatched(f"no module {name!r}; did you mean {' or '.join(near) or 'another name'}?")
    return known[name]


def _assert_whole(module: nn.Module, name: str) -> None:
    groups = getattr(module, "groups", 1)
    if groups != 1:
        raise Refused(
            f"{name} is a convolution in {groups} groups: a map would mix channels across groups, which it cannot "
            "follow. Name the points around it with points=, so that it lies in none."
        )


@dataclass(frozen=True)
class _Value:
    """What flows along an edge of the graph: features of a space on axis 1 (of images) or on the last axis."""

    space: int
    images: bool | None  # None: unknown, of the network's own input


class _Spaces:
    """Spaces as they are found, joined where a sum makes them one."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.fixed: set[int] = set()
        self.permuted: set[int] = set()

    def new(self) -> int:
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def root(self, space: int) -> int:
        while self.parent[space] != space:
            space = self.parent[space]
        return space

    def join(self, a: int, b: int) -> None:
        self.parent[self.root(b)] = self.root(a)

    def among(self, space: int, marked: set[int]) -> bool:
        return self.root(space) in {self.root(other) for other in marked}


class _Walk:
    """One pass over a traced graph."""

    def __init__(self, model: nn.Module) -> None:
        self.modules, self.spaces = dict(model.named_modules()), _Spaces()
        self.writes: dict[str, int] = {}
        self.reads: dict[str, int] = {}
        self.sources: dict[str, fx.Node] = {}  # what a reader reads
        self.carries: dict[str, int] = {}
        self.odd: list[str] = []

    def value(self, node: fx.Node, seen: Mapping[fx.Node, _Value | None]) -> _Value | None:
        """Return what a node gives: None for what is no tensor of features (sizes and the like)."""
        given = [seen[n] for n in node.all_input_nodes]
        tensors = [v for v in given if v is not None]
        if node.op == "placeholder":
            space = self.spaces.new()
            self.spaces.fixed.add(space)
            return _Value(space, None)
        if node.op == "output":
            self.spaces.fixed |= {v.space for v in tensors}
            return None
        name = _called(node)
        if not tensors or name in ("size", "dim", "getattr"):
            if node.op == "get_attr":
                self.odd.append(f"{node.target} (a parameter used outside of a layer)")
            return None
        if node.op == "call_module":
            self.sources.setdefault(str(node.target), node.all_input_nodes[0])
            return self.layer(str(node.target), tensors[0])
        if name in _FUNCTIONS:
            return tensors[0]
        if name in _MIXING:
            self.spaces.permuted.add(tensors[0].space)
            return tensors[0]
        if name in _SUMS or name in _PRODUCTS:
            for other in tensors[1:]:
                self.spaces.join(tensors[0].space, other.space)
            if name in _PRODUCTS and len(tensors) > 1:
                self.spaces.permuted.add(tensors[0].space)
            return next((v for v in tensors if v.images is not None), tensors[0])
        if _flattens(node, name):
            return _Value(tensors[0].space, None if tensors[0].images is None else False)
        if name == "mean" and tensors[0].images and _over_pixels(node):
            return _Value(tensors[0].space, bool(node.kwargs.get("keepdim", False)))
        self.odd.append(f"{node.name} ({name})")
        return tensors[0]

    def pairs(self) -> list[Pair]:
        """Return every layer that a BatchNorm alone reads, with it."""
        out = []
        for norm in self.carries:
            source = self.sources[norm]
            layer = str(source.target)
            if source.op == "call_module" and layer in self.writes and len(source.users) == 1:
                pair = paired(layer, self.modules[layer], norm, self.modules[norm])
                out += [] if pair is None else [pair]
        return out

    def layer(self, name: str, x: _Value) -> _Value:
        """Follow a value through a leaf module."""
        module = self.modules[name]
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            images = not isinstance(module, nn.Linear)
            if x.images not in (None, images):
                self.odd.append(f"{name} (features lie on another axis than a {type(module).__name__} reads)")
            if name in self.reads:  # called twice: the same weight reads both
                self.spaces.join(self.reads[name], x.space)
            self.reads.setdefault(name, x.space)
            return _Value(self.writes.setdefault(name, self.spaces.new()), images)
        if isinstance(module, (*NORMS, nn.LayerNorm)):
            if name in self.carries:
                self.spaces.join(self.carries[name], x.space)
            self.carries.setdefault(name, x.space)
            if isinstance(module, nn.LayerNorm):
                if x.images or len(module.normalized_shape) != 1:
                    self.odd.append(f"{name} (a LayerNorm over more than the features)")
                self.spaces.permuted.add(x.space)
            return x
        if isinstance(module, nn.Flatten) and module.start_dim == 1:
            return _Value(x.space, None if x.images is None else False)
        if isinstance(module, nn.Softmax | nn.LogSoftmax):
            self.spaces.permuted.add(x.space)
        elif not isinstance(module, _ELEMENTWISE):
            self.odd.append(f"{name} ({type(module).__name__})")
        return x


def discover(model: nn.Module) -> list[Point]:
    """Return the alignment points of a network of plain modules, found by tracing it.

    Every hidden space between layers is a point; what comes in and what goes out stays. Sums join spaces (residual
    streams), products and LayerNorm allow permutations only. Raises Refused listing what could not be traced or
    understood, and for grouped convolutions.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a forward in Python does with a symbol
        names = ", ".join(_untraceable(model)[:_SHOWN])
        raise Refused(
            f"the network cannot be traced ({type(error).__name__} in: {names}); name its points: "
            "points={'hidden': (['fc1'], ['fc2'])}, point -> (producers, consumers)."
        ) from error
    walk, seen = _Walk(model), dict[fx.Node, _Value | None]()
    for node in graph.nodes:
        seen[node] = walk.value(node, seen)
    if walk.odd:
        raise Refused(
            f"{len(walk.odd)} steps of the network are not understood: {', '.join(walk.odd[:_SHOWN])}; name its points "
            "with points=, point -> (producers, consumers)."
        )
    return assert_apart(_points(walk))


def _points(walk: _Walk) -> list[Point]:
    spaces, modules = walk.spaces, walk.modules
    found: dict[int, list[str]] = {}
    for name, space in walk.writes.items():
        found.setdefault(spaces.root(space), []).append(name)
    out = []
    for space, writers in found.items():
        readers = [name for name, at in walk.reads.items() if spaces.root(at) == space]
        if spaces.among(space, spaces.fixed) or not readers:
            continue
        width = sizes(modules[writers[0]])[0]
        uses = [use for name in writers for use in written(modules[name], name)]
        for name, at in walk.carries.items():
            if spaces.root(at) == space:
                uses += carried(modules[name], name, width)
        reads = [read(modules[name], name, width) for name in readers]
        # Layers that read the same values see them once.
        once = {walk.sources[name]: (name, use) for name, use in reversed(list(zip(readers, reads, strict=True)))}
        sites = [
            Site(name, -1 if isinstance(modules[name], nn.Linear) else 1, block=use.block)
            for name, use in reversed(once.values())
        ]
        for name in (*writers, *readers):
            _assert_whole(modules[name], name)
        kind: Kind = "permute" if spaces.among(space, spaces.permuted) else "any"
        pairs = tuple(pair for pair in walk.pairs() if pair.layer in writers)
        out.append(Point(writers[0], width, (*uses, *reads), tuple(sites), kind, pairs=pairs))
    if not out:
        raise Refused("the network has no hidden space between two layers; there is nothing to align.")
    return out


def _called(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _flattens(node: fx.Node, name: str) -> bool:
    """Whether a step lays out all that is behind the batch axis as one."""
    rest: Any = node.args[1:]
    if name == "flatten":
        return bool((rest[0] if rest else node.kwargs.get("start_dim", 0)) == 1)
    shape: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    return name in ("view", "reshape") and len(shape) == 2 and bool(shape[1] == -1)


def _over_pixels(node: fx.Node) -> bool:
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, tuple | list) and {d % 4 for d in dims} == {2, 3}


def _untraceable(model: nn.Module) -> list[str]:
    """Return the innermost modules that cannot be traced; the network itself where each of its parts can."""
    bad: list[str] = []
    for name, module in reversed(list(model.named_modules())):
        if any(b == name or b.startswith(f"{name}." if name else "") for b in bad) or not list(module.children()):
            continue
        try:
            fx.Tracer().trace(module)
        except Exception:
            bad.append(name or type(module).__name__)
    return bad or [type(model).__name__]
