"""Alignment points of transformers, from the roles of their layers.

    residual stream   T orthogonal where every layer reads it by a norm, else a permutation       keeps the function
    values            of every head: any T; the heads of two networks are paired first            keeps the function
    hidden layer      behind a gate a permutation                                                 keeps the function
                      behind an activation alone: any T                                           approximate

A norm divides by the length of its input, which an orthogonal T keeps (LayerNorm also takes away the mean, which T
keeps if T 1 = 1), but then scales every feature by a gain g, with which T does not commute. So the gain of each network
goes into the layers that read it before T is applied, and the reference's is taken out of them after:

    W g_B LN(x) + W b_B + c  =  W' (g_A LN(T x) + b_A) + c'      W' = W diag(g_B) T^{-1} diag(1 / g_A),
                                                                 c' = c + W b_B - W' b_A

so that all networks share the reference's norms and can be averaged. Where the norm stands in the stream itself (BERT),
its gain reaches the sum, and only permutations are left. Tied input and output embeddings come apart under an
orthogonal T, because only the output reads through a gain. Queries and keys are left as they are within their head.

What is read off the names is proved: a network rewritten by these maps, approximate ones left out, must answer as it
did. Nothing here knows a model family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core.errors import ParityBroken, Refused
from brickyard.core.forwards import evaluating
from brickyard.core.roles import blocks, roles
from brickyard.merge._align import Map
from brickyard.merge._align_measure import output_of
from brickyard.merge._align_points import Layout, Point, Site, Use, assert_apart, carried, rewritten, written

RESIDUAL = "residual stream"
_ONE_EACH = ("query", "key", "value", "out", "up", "down")
PARITY = 1e-3  # of the largest output: float32 through some dozens of layers


@dataclass(frozen=True)
class Norm:
    """A norm that reads the stream, and the layers that read it. `mean`: it takes away the mean (LayerNorm)."""

    name: str
    readers: tuple[str, ...]
    bias: bool
    mean: bool


@dataclass(frozen=True)
class Transformer(Layout):
    """The points of a transformer; `norms` are those whose gain and bias go through their readers."""

    norms: tuple[Norm, ...] = ()
    unties: bool = False

    def rewrite(
        self, reference: Mapping[str, Tensor], state: Mapping[str, Tensor], maps: Mapping[str, Map]
    ) -> dict[str, Tensor]:
        if RESIDUAL not in maps:
            return rewritten(state, self.points, maps)
        out = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        for norm in self.norms:
            _into(out, norm)
        out = rewritten(out, self.points, maps)
        for norm in self.norms:
            _from(out, reference, norm)
        return {name: tensor.to(state[name].dtype) for name, tensor in out.items()}


def _into(state: dict[str, Tensor], norm: Norm) -> None:
    """Move a norm's gain and bias into the layers that read it."""
    gain, shift = state[f"{norm.name}.weight"], state.get(f"{norm.name}.bias")
    for reader in norm.readers:
        weight = state[f"{reader}.weight"]
        if shift is not None:
            state[f"{reader}.bias"] = state[f"{reader}.bias"] + weight @ shift
        state[f"{reader}.weight"] = weight * gain


def _from(state: dict[str, Tensor], reference: Mapping[str, Tensor], norm: Norm) -> None:
    """Take the reference's gain and bias out of the layers that read a norm, and give them to the norm."""
    gain = reference[f"{norm.name}.weight"].double()
    shift = reference.get(f"{norm.name}.bias")
    if norm.readers and not bool((gain.abs() > 1e-6 * gain.abs().max()).all()):
        raise Refused(
            f"{norm.name} of the reference has a gain of 0, which hides a feature that no other network's can be "
            "brought to; give another reference, or residual=permute."
        )
    for reader in norm.readers:
        weight = state[f"{reader}.weight"] / gain
        state[f"{reader}.weight"] = weight
        if shift is not None:
            state[f"{reader}.bias"] = state[f"{reader}.bias"] - weight @ shift.double()
    state[f"{norm.name}.weight"] = gain
    if shift is not None:
        state[f"{norm.name}.bias"] = shift.double()


def transformer(model: nn.Module, probe: Any, *, residual: str = "auto", judged: bool = True) -> Transformer:
    """Return the layout of a transformer that transformers built.

    Args:
        model: in float32, on the probe's device.
        probe: a batch of inputs (keyword arguments), through which one pass goes to see which layers read which norm.
        residual: "orthogonal", "permute", "identity", or "auto": orthogonal where the norms allow it.
        judged: whether its outputs are logits.

    Raises Refused for an architecture of other layers than attention with separate query, key and value and a feed
    forward, naming what stands in the way.
    """
    kinds, modules = roles(model), _modules(model)
    found = blocks(model)
    if not found:
        raise Refused("the base is a stack of no known blocks; only transformers are aligned from the command line.")
    by_block = [_roles_in(name, kinds, modules) for name, _ in found]
    width = modules[by_block[0]["out"]].out_features
    flow = _Flow(model, probe, found)
    in_stream = flow.ends_in_norm
    if residual == "auto":
        residual = "permute" if in_stream else "orthogonal"
    if residual == "orthogonal" and in_stream:
        raise Refused(
            f"residual=orthogonal: {in_stream} stands in the residual stream, and its gain commutes with no rotation; "
            "give residual=permute."
        )
    points: list[Point] = []
    norms: tuple[Norm, ...] = ()
    if residual != "identity":
        point, norms = _stream(model, kinds, modules, by_block, width, flow, residual)
        points.append(point)
    for (name, _), layers in zip(found, by_block, strict=True):
        points += [_values(model, modules, name, layers), _hidden(modules, name, layers)]
    points += _behind(modules, flow, [name for name, _ in found])
    unties = residual == "orthogonal" and _tied(model)
    return Transformer(tuple(assert_apart(points)), judged, norms=norms, unties=unties)


def _modules(model: nn.Module) -> dict[str, Any]:
    return dict(model.named_modules())


def _roles_in(block: str, kinds: Mapping[str, str], modules: Mapping[str, Any]) -> dict[str, str]:
    """Return role -> layer of one block; Refused where it is not attention and a feed forward of separate layers."""
    inside = {name: role for name, role in kinds.items() if name.startswith(f"{block}.")}
    odd = [n for n, r in inside.items() if r == "other" or (r != "norm" and not isinstance(modules[n], nn.Linear))]
    out: dict[str, str] = {}
    for name, role in inside.items():
        if role != "norm":
            odd += [name] if role in out else []
            out[role] = name
    missing = [role for role in _ONE_EACH if role not in out]
    if odd or missing:
        what = f"{odd[0]} ({type(modules[odd[0]]).__name__}) has no place in it" if odd else f"no {missing[0]} layer"
        raise Refused(
            f"block {block} is not attention with separate query, key and value and a feed forward: {what}; align such "
            "a network through brickyard.merge.cca_merge.align with points=."
        )
    return out


class _Flow:
    """What one pass shows: which leaf reads which norm, in what order leaves run, whether blocks end in a norm.

    A tensor is known again by where it lies; all that a leaf gives is kept meanwhile, so that no place is used twice.
    """

    def __init__(self, model: nn.Module, probe: Any, found: Sequence[tuple[str, nn.Module]]) -> None:
        kinds = roles(model)
        self.order: list[str] = []
        self.readers: dict[str, list[str]] = {name: [] for name, role in kinds.items() if role == "norm"}
        outputs: dict[int, str] = {}
        kept: list[Tensor] = []
        ends: list[Any] = []

        def before(name: str) -> Any:
            def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
                self.order.append(name)
                source = outputs.get(given[0].data_ptr()) if given and isinstance(given[0], Tensor) else None
                if source in self.readers:
                    self.readers[source].append(name)

            return hook

        def after(name: str) -> Any:
            def hook(module: nn.Module, given: Any, out: Any) -> None:
                kept.append(out)
                outputs[out.data_ptr()] = name

            return hook

        handles = []
        for name in kinds:
            module = model.get_submodule(name)
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
        last = found[-1][1]
        end = last.register_forward_hook(lambda m, g, out: ends.append(out))
        try:
            with evaluating(model), torch.no_grad():
                output_of(model, probe)
        finally:
            for handle in (*handles, end):
                handle.remove()
        states = ends[-1][0] if isinstance(ends[-1], tuple) else ends[-1]
        source = outputs.get(states.data_ptr())
        self.ends_in_norm = source if source in self.readers else ""


def _stream(
    model: nn.Module,
    kinds: Mapping[str, str],
    modules: Mapping[str, Any],
    by_block: Sequence[Mapping[str, str]],
    width: int,
    flow: _Flow,
    residual: str,
) -> tuple[Point, tuple[Norm, ...]]:
    """Return the point of the residual stream, and the norms whose gains must be moved."""
    first = flow.order.index(next(n for n in flow.order if n in by_block[0].values()))
    inside = {name for layers in by_block for name in layers.values()}
    uses: list[Use] = []
    for layers in by_block:
        uses += [u for role in ("out", "down") for u in written(modules[layers[role]], layers[role])]
        uses += [Use(f"{layers[r]}.weight", 1, True) for r in ("query", "key", "value", "gate", "up") if r in layers]
    norms = [name for name in flow.readers if _size(modules[name]) == width]
    behind = _chain(modules, flow, inside, width)
    for name, module in modules.items():
        if name in inside or name not in kinds or name in norms:
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            uses.append(Use(f"{name}.weight", 1))
        elif (isinstance(module, nn.Conv2d) and kinds[name] == "embedding") or (
            isinstance(module, nn.Linear) and name in flow.order[:first]
        ):
            uses += written(module, name)
    if behind:
        uses.append(Use(f"{behind[0]}.weight", 1, True))
    leaves = {f"{name}." for name in kinds}
    for name, parameter in model.named_parameters():
        if f"{name.rpartition('.')[0]}." not in leaves and parameter.shape[-1] == width:
            uses.append(Use(name, parameter.ndim - 1))
    if residual == "permute":
        for name in norms:
            uses += carried(modules[name], name, width)
        sites = [Site(layers[role], -1) for layers in by_block for role in ("query", "up")]
        return Point(RESIDUAL, width, tuple(_once(uses)), tuple(sites), "permute"), ()
    found = []
    for name in norms:
        module = modules[name]
        bias = getattr(module, "bias", None) is not None
        readers = tuple(dict.fromkeys(flow.readers[name]))
        deaf = [r for r in readers if bias and modules[r].bias is None]
        if deaf:
            raise Refused(f"{name} has a bias and {deaf[0]}, which reads it, none; give residual=permute.")
        found.append(Norm(name, readers, bias, isinstance(module, nn.LayerNorm)))
    sites = [Site(norm.name, -1, level=True) for norm in found]
    mean = any(norm.mean for norm in found)
    return Point(RESIDUAL, width, tuple(_once(uses)), tuple(sites), "orthogonal", keep_mean=mean), tuple(found)


def _once(uses: Sequence[Use]) -> list[Use]:
    return list(dict.fromkeys(uses))


def _size(norm: Any) -> int:
    weight = getattr(norm, "weight", None)
    return -1 if weight is None else weight.numel()


def _chain(modules: Mapping[str, Any], flow: _Flow, inside: set[str], width: int) -> list[str]:
    """Return the linear layers that run behind the blocks, in their order; the first reads the stream."""
    last = max(i for i, name in enumerate(flow.order) if name in inside)
    return [n for n in dict.fromkeys(flow.order[last + 1 :]) if isinstance(modules[n], nn.Linear) and n not in inside]


def _values(model: Any, modules: Mapping[str, Any], block: str, layers: Mapping[str, str]) -> Point:
    """Return the point of a block's values, one space a head; whole heads of queries and keys go with it."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    heads = int(config.num_attention_heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    value, out = modules[layers["value"]], modules[layers["out"]]
    width, times = value.out_features, heads // shared
    if width % shared or out.in_features != width * times:
        raise Refused(
            f"block {block}: values of {width} features do not fall into {shared} heads of its configuration."
        )
    uses = [
        *written(value, layers["value"]),
        Use(f"{layers['out']}.weight", 1, True, repeat=times),
        *(_whole(use, 1) for use in written(modules[layers["key"]], layers["key"])),
        *(_whole(use, times) for use in written(modules[layers["query"]], layers["query"])),
    ]
    return Point(f"{block}: values", width, tuple(uses), (Site(layers["value"], -1, output=True),), heads=shared)


def _whole(use: Use, times: int) -> Use:
    return Use(use.tensor, use.axis, use.inward, heads=True, repeat=times)


def _hidden(modules: Mapping[str, Any], block: str, layers: Mapping[str, str]) -> Point:
    """Return the point of a block's feed forward, seen where the last layer reads it."""
    up, down = modules[layers["up"]], modules[layers["down"]]
    if down.in_features != up.out_features:
        raise Refused(f"block {block}: {layers['down']} reads {down.in_features} features of {up.out_features}.")
    uses = [u for role in ("up", "gate") if role in layers for u in written(modules[layers[role]], layers[role])]
    uses.append(Use(f"{layers['down']}.weight", 1, True))
    kind = "permute" if "gate" in layers else "any"
    return Point(f"{block}: hidden", up.out_features, tuple(uses), (Site(layers["down"], -1),), kind)


def _behind(modules: Mapping[str, Any], flow: _Flow, found: Sequence[str]) -> list[Point]:
    """Return the points between the linear layers that run behind the blocks (a pooler and a classifier)."""
    inside = {name for name in modules if any(name.startswith(f"{block}.") for block in found)}
    chain = _chain(modules, flow, inside, 0)
    out = []
    for first, second in pairwise(chain):
        width = modules[first].out_features
        if modules[second].in_features != width:
            raise Refused(f"{second} does not read what {first} writes; only a chain of layers behind the blocks fits.")
        uses = (*written(modules[first], first), Use(f"{second}.weight", 1, True))
        out.append(Point(f"{first}: hidden", width, uses, (Site(second, -1),)))
    return out


def _tied(model: Any) -> bool:
    find = getattr(model, "get_output_embeddings", None)
    last: Any = find() if callable(find) else None
    return last is not None and last.weight is model.get_input_embeddings().weight


def untie(model: Any) -> None:
    """Give a language model, in place, an output layer of its own, equal to the embeddings it shared."""
    last = model.get_output_embeddings()
    last.weight = nn.Parameter(last.weight.detach().clone())
    model.config.tie_word_embeddings = False


@torch.no_grad()
def assert_same(
    model: nn.Module, layout: Transformer, reference: Mapping[str, Tensor], maps: Mapping[str, Map], probe: Any
) -> float:
    """Prove that the exact maps keep a network's answers; return the largest gap over the largest answer.

    model: is loaded with the rewritten state and given its own back. Raises ParityBroken where the gap exceeds PARITY.
    """
    exact = {p.name: maps[p.name] for p in layout.points if p.kind != "any" or p.heads}
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with evaluating(model), torch.no_grad():
        before = output_of(model, probe).double()
        try:
            model.load_state_dict(layout.rewrite(reference, own, exact))
            after = output_of(model, probe).double()
        finally:
            model.load_state_dict(own)
    if RESIDUAL in maps and not layout.judged:
        before, after = _in_one_basis(layout, reference, own, maps[RESIDUAL], before, after)
    gap = float((before - after).abs().max() / before.abs().max().clamp(min=1e-12))
    if not gap <= PARITY:
        raise ParityBroken(
            f"rewriting the network changed its answers by {gap:.2g} of the largest (at most {PARITY:g} was expected): "
            "its layers are connected otherwise than their names say. Give residual=identity, or method=identity."
        )
    return gap


def _in_one_basis(
    layout: Transformer,
    reference: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    found: Map,
    before: Tensor,
    after: Tensor,
) -> tuple[Tensor, Tensor]:
    """Bring states of the stream, before and after it was mapped, into one basis: T before = after, norms undone."""
    last = next((norm for norm in layout.norms if not norm.readers), None) or (layout.norms or (None,))[-1]
    if last is not None:
        before = _plain(before, own, last)
        after = _plain(after, reference, last)
    return before @ found.forward.T, after


def _plain(states: Tensor, held: Mapping[str, Tensor], norm: Norm) -> Tensor:
    if norm.bias:
        states = states - held[f"{norm.name}.bias"].double()
    return states / held[f"{norm.name}.weight"].double()
