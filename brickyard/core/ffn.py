"""The hidden neurons of trained feed-forward networks: found by role, and split into experts of one size.

    h = act(x W1' + b1) W2' + b2                        W1 [F, D]: a row is the key of a neuron; W2 [D, F]
    h = (act(x Wg' + bg) * (x Wu' + bu)) W2' + b2       gated: the rows of Wg are the keys

    min over labels  sum_f |k_f - c_label(f)|^2   s.t. each of N labels is taken F / N times;  c_n the mean of its keys

k-means with sizes fixed: in turn the means, and the assignment to them, which is a linear assignment of F neurons to
N x F/N places. As every size is given, |c_n|^2 adds the same to every assignment, so its cost is -k_f . c_n alone.

Source: the problem is that of Bradley, Bennett, Demiriz 2000, "Constrained k-means clustering"; keys as features follow
MoEfication (arXiv 2110.01786) and EMoE (arXiv 2310.10908). Legend: F neurons, N experts, D width, P features, T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import BadBrick, DiskFull, Refused, UnsafeFile, UsageError
from brickyard.core.files import cache_folder, read_json, write_json
from brickyard.core.roles import LINEAR, blocks, roles

AT_ONCE = 4096  # neurons assigned together: the costs of so many take 128 MiB
_ROUNDS = 100
_SETTLED = 1e-4  # share by which the cost must still fall
_FORMAT = 1  # of what is kept in the cache; part of its key


@dataclass
class Split:
    """Which of `experts` experts each neuron belongs to: labels_F, int64 [F] on the CPU; all experts have one size."""

    labels_F: Tensor
    experts: int
    _members: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts = torch.bincount(self.labels_F.clamp(min=0), minlength=self.experts)
        if self.labels_F.min() < 0 or len(counts) != self.experts or counts.unique().numel() != 1:
            raise BadBrick(
                f"{len(self.labels_F)} neurons were given to experts of {counts.tolist()[:8]} neurons; expected "
                f"{self.experts} experts of one size. The brick was written by something else."
            )

    @property
    def size(self) -> int:
        """Neurons of an expert."""
        return len(self.labels_F) // self.experts

    @cached_property
    def contiguous(self) -> bool:
        """Whether expert n is the neurons from n F/N on, so that nothing need be looked up."""
        return bool((self.labels_F == torch.arange(len(self.labels_F)) // self.size).all())

    @property
    def order_F(self) -> Tensor:
        """The neurons expert by expert: the order that makes the split contiguous."""
        return torch.argsort(self.labels_F, stable=True)

    def members(self, like: Tensor) -> Tensor:
        """Return the 0/1 matrix [N, F] of who belongs to whom, of the device and type of `like`."""
        key = like.device, like.dtype
        if key not in self._members:
            one_NF = nn.functional.one_hot(self.labels_F, self.experts).T
            self._members[key] = one_NF.to(*key).contiguous()
        return self._members[key]


def clusters(keys_FP: np.ndarray, experts: int, *, seed: int = 0) -> np.ndarray:
    """Return the expert of every row of `keys_FP` [F, P], int64 [F]: k-means into clusters of exactly F / N rows.

    Deterministic in `seed`. Above AT_ONCE rows an assignment goes through parts of that many, drawn anew every round:
    the cost falls in every one, and the sizes stay as they are. UsageError where N does not divide F.
    """
    count = len(keys_FP)
    if count % experts:
        raise UsageError(f"{experts} experts do not divide {count} neurons.")
    draw = np.random.Generator(np.random.PCG64(seed))
    x_FP = keys_FP.astype(np.float64)
    centres_NP = x_FP[_spread(x_FP, experts, draw)]
    labels_F = draw.permutation(np.repeat(np.arange(experts), count // experts))
    before = math.inf
    for _ in range(_ROUNDS):
        affinity_FN = x_FP @ centres_NP.T
        for part in np.array_split(draw.permutation(count), -(-count // AT_ONCE)):
            places = labels_F[part]
            _, taken = linear_sum_assignment(affinity_FN[part][:, places], maximize=True)
            labels_F[part] = places[taken]
        centres_NP = (np.eye(experts)[:, labels_F] @ x_FP) / (count // experts)
        cost = float(((x_FP - centres_NP[labels_F]) ** 2).sum())
        if cost >= before * (1 - _SETTLED):
            break
        before = cost
    return labels_F


def _spread(x_FP: np.ndarray, experts: int, draw: np.random.Generator) -> np.ndarray:
    """First centres: rows drawn with a chance that grows with the square of their distance from those drawn before."""
    chosen = [int(draw.integers(len(x_FP)))]
    far_F = ((x_FP - x_FP[chosen[0]]) ** 2).sum(1)
    while len(chosen) < experts:
        total = far_F.sum()
        chance_F = far_F / total if total > 0 else np.full(len(x_FP), 1 / len(x_FP))
        chosen.append(int(draw.choice(len(x_FP), p=chance_F)))
        far_F = np.minimum(far_F, ((x_FP - x_FP[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen)


def by_keys(keys_FD: Tensor, experts: int, *, seed: int = 0) -> tuple[Split, float]:
    """Split neurons by the directions of their keys [F, D]; remembered in the cache by the keys' values.

    Returns the split and the seconds that its making took, now or when it was made.
    """
    unit_FD = nn.functional.normalize(keys_FD.detach().cpu().float(), dim=1).numpy()
    about = f"{_FORMAT} {unit_FD.shape} {experts} {seed} {AT_ONCE} "
    digest = hashlib.sha256(about.encode() + unit_FD.tobytes()).hexdigest()
    remembered = cache_folder() / "experts" / f"{digest}.json"
    with contextlib.suppress(OSError, UnsafeFile, BadBrick, KeyError, TypeError, ValueError):
        known = read_json(remembered)
        split = Split(torch.tensor(known["labels"], dtype=torch.int64), experts)
        if split.labels_F.shape == (len(unit_FD),):
            return split, float(known["seconds"])
    started = time.monotonic()
    split = Split(torch.from_numpy(clusters(unit_FD, experts, seed=seed)), experts)
    seconds = time.monotonic() - started
    with contextlib.suppress(OSError, DiskFull):  # only slower next time
        write_json(remembered, {"labels": split.labels_F.tolist(), "seconds": seconds})
    return split, seconds


def at_random(count: int, experts: int, *, seed: int = 0) -> Split:
    """Split `count` neurons into equal experts by chance."""
    labels_F = np.repeat(np.arange(experts), count // experts)
    return Split(torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).permutation(labels_F)), experts)


@dataclass(frozen=True)
class FFN:
    """The feed-forward network of a block: dotted names of its layers in the model, adapters around them included.

    `key` is the layer whose rows are the neurons' keys (gate where there is one, else up), `value` the last one, and
    `also` the up of a gated network, "" else.
    """

    block: str
    key: str
    value: str
    also: str
    neurons: int
    model: nn.Module

    @property
    def key_layer(self) -> nn.Module:
        return self.model.get_submodule(self.key)

    @property
    def value_layer(self) -> nn.Module:
        return self.model.get_submodule(self.value)

    @property
    def keys_FD(self) -> Tensor:
        """The base's own keys, without what an adapter adds."""
        inner: Any = plain(self.key_layer)
        return inner.weight.T if isinstance(inner, Conv1D) else inner.weight


def plain(layer: nn.Module) -> nn.Module:
    """Return the layer itself, without the adapters around it."""
    while isinstance(inner := getattr(layer, "base_layer", None), nn.Module):
        layer = inner
    return layer


def ffns(model: nn.Module, layers: tuple[int, ...], name: str) -> list[FFN]:
    """Find the feed-forward networks of the blocks `layers` of `model` (0-based, negative from the end).

    `name` is the method that asks. UsageError for a block that is not there or named twice, Refused where a block holds
    no feed-forward network of one up, one down and at most one gate, or one whose weights are quantised.
    """
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found, kinds = blocks(inner), roles(inner)
    count = len(found)
    for layer in layers:
        if not -count <= layer < count:
            raise UsageError(
                f"{name}: layer {layer} is out of range; the model has {count} blocks, 0 to {count - 1} "
                f"(or -{count} to -1, from the end)."
            )
    places = [layer % count for layer in layers]
    if len(set(places)) != len(places):
        raise UsageError(f"{name}: layers={list(layers)} names a block twice; each can be split once.")
    return [_ffn(inner, found[place][0], kinds, name) for place in sorted(places)]


def every_ffn(model: nn.Module, name: str) -> list[FFN]:
    """Find the feed-forward networks of all blocks of `model`, in their order.

    `name` is the method that asks. Refused as by `ffns`, and where the model has no repeated blocks.
    """
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    count = len(blocks(inner))
    if not count:
        raise Refused(
            f"{name}: no feed-forward network was recognised in {type(inner).__name__}, which has no repeated blocks; "
            "give a base made of transformer blocks."
        )
    return ffns(model, tuple(range(count)), name)


def _ffn(model: nn.Module, block: str, kinds: dict[str, str], name: str) -> FFN:
    by_role: dict[str, list[str]] = {"up": [], "down": [], "gate": []}
    for leaf, role in kinds.items():
        if leaf.startswith(f"{block}.") and role in by_role:
            by_role[role].append(_around(leaf))
    ups, downs, gates = (sorted(set(by_role[role])) for role in ("up", "down", "gate"))
    if len(ups) != 1 or len(downs) != 1 or len(gates) > 1:
        raise Refused(
            f"{name}: no feed-forward network was recognised in {block}: expected one up, one down and at most one "
            f"gate, found up {ups or 'none'}, down {downs or 'none'}, gate {gates or 'none'} (one matrix that fuses "
            "gate and up is not split). Name other layers."
        )
    key, value, also = (gates or ups)[0], downs[0], ups[0] if gates else ""
    sizes = {leaf: _neurons(model, leaf, name, out=leaf != value) for leaf in (key, value, also) if leaf}
    if len(set(sizes.values())) != 1:
        raise Refused(f"{name}: the layers of {block} have not the same neurons: {sizes}. Name other layers.")
    return FFN(block, key, value, also, sizes[key], model)


def _around(leaf: str) -> str:
    """The name of the outermost adapter around a leaf."""
    while leaf.endswith(".base_layer"):
        leaf = leaf.removesuffix(".base_layer")
    return leaf


def _neurons(model: nn.Module, name: str, method: str, *, out: bool) -> int:
    layer: Any = plain(model.get_submodule(name))
    if not isinstance(layer, LINEAR) or not layer.weight.is_floating_point():
        raise Refused(
            f"{method}: {name} is a {type(layer).__name__} of {layer.weight.dtype}; expected Linear or Conv1D with "
            "floating-point weights. Open the base unquantised."
        )
    rows = isinstance(layer, Conv1D) != out
    return layer.weight.shape[0 if rows else 1]


def check_divides(ffn: FFN, experts: int, name: str) -> None:
    """Raise UsageError, with what fits, where `experts` does not divide the neurons."""
    if ffn.neurons % experts:
        fits = sorted((n for n in range(2, ffn.neurons) if ffn.neurons % n == 0), key=lambda n: (abs(n - experts), n))
        raise UsageError(
            f"{name}: {experts} experts do not divide the {ffn.neurons} neurons of {ffn.block}; near are "
            f"{', '.join(map(str, sorted(fits[:3])))}."
        )


@torch.no_grad()
def permute_(ffn: FFN, order_F: Tensor) -> None:
    """Reorder the neurons of a feed-forward network in place: neuron i becomes the one that was order_F[i].

    Its function stays the same up to the order of a sum; reordered by `argsort(order_F)` its weights are again what
    they were, bit for bit. Refused beneath adapters, whose matrices know the old order.
    """
    for name in (ffn.key, ffn.also, ffn.value):
        layer: Any = ffn.model.get_submodule(name) if name else None
        if layer is None:
            continue
        if plain(layer) is not layer:
            raise Refused(f"{name} carries an adapter, which knows its neurons by their place; permute before it.")
        order = order_F.to(layer.weight.device)
        rows = (name == ffn.value) == isinstance(layer, Conv1D)
        layer.weight.copy_(layer.weight[order] if rows else layer.weight[:, order])
        if name != ffn.value and layer.bias is not None:
            layer.bias.copy_(layer.bias[order])
