"""HALO under FSDP2: a weight whose shards are gathered as one byte a value, with one scale for all ranks.

    shard of W [S, M]   before the all-gather: rotate, all-reduce max|W H|, quantise     behind it: Q(W H) [N, M]

FSDP asks the tensors that it shards for both. What the layer then finds holds the codes and no weights: it multiplies
by them, and whatever else reads the weight gets the codes' values rotated back, the weight as rounded. Gradients, the
optimiser and checkpoints see the shards themselves, in their own type.
Legend: N outputs and M inputs of a layer, S rows of a shard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map_only

from brickyard.core.errors import Refused
from brickyard.optim._hadamard import transform
from brickyard.optim._low_precision import Codes, absolute_maximum, quantise

_aten = torch.ops.aten
# What cuts, copies and moves a shard leaves it one; any other operation gives an ordinary tensor.
_KEPT = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.empty_like.default,
    _aten.new_zeros.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.view.default,
    _aten._pin_memory.default,
    _aten._to_copy.default,
}


class How(NamedTuple):
    """What becomes of a weight before it travels: rotated unless `level` is 0, then `dtype` (int8, fp8, exact)."""

    level: int
    dtype: str


def quantise_shard(shard_SM: Tensor, how: How, group: dist.ProcessGroup | None = None) -> Codes:
    """Return a rank's rows of Q(W H), with the scale of the whole weight: one byte a value to gather.

    FSDP2 shards along the rows, which the rotation over the inputs leaves apart. All ranks of `group` must call it; the
    maximum is all-reduced, so that all have one scale. A shard may have no rows.
    """
    rotated_SM = transform(shard_SM, transpose=True) if how.level else shard_SM
    if how.dtype == "exact":
        return quantise(rotated_SM, how.dtype)
    largest = absolute_maximum(rotated_SM)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return quantise(rotated_SM, how.dtype, largest)


def gathered(values_RM: Tensor, scale: Tensor, rows: int) -> Codes:
    """Return Q(W H) from the values of all ranks, without the rows that fill the last shard.

    `LowPrecision` takes it as `ready`. Raises Refused where rows miss.
    """
    if len(values_RM) < rows:
        raise Refused(f"halo: all ranks together gave {len(values_RM)} rows of a weight of {rows}.")
    return Codes(values_RM[:rows], scale)


class ShardedWeight(Tensor):
    """A weight, or rows of it, that knows how it is gathered; in all else the tensor that it holds."""

    held: Tensor
    how: How

    @staticmethod
    def __new__(cls, held: Tensor, how: How) -> ShardedWeight:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=held.device,
            requires_grad=held.requires_grad,
        )
        made.held, made.how = held, how
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ShardedWeight({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        plain_args, plain_kwargs = tree_map_only(cls, lambda x: x.held, (args, kwargs or {}))
        out = function(*plain_args, **plain_kwargs)
        if function in _KEPT:
            return tree_map_only(Tensor, lambda x: cls(x, first.how), out)
        # What was changed in place is handed back as itself.
        return args[0] if isinstance(args[0], cls) and out is args[0].held else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be stored as what it holds, so that a checkpoint needs nothing of Brickyard's."""
        return self.held.__reduce_ex__(protocol)

    def __tensor_flatten__(self) -> tuple[list[str], How]:
        return ["held"], self.how

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], how: How, size: Any, stride: Any) -> ShardedWeight:
        return ShardedWeight(inner["held"], how)

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor], tuple[Tensor, int, How]]:
        """Return the codes of this rank's rows, filled to as many as every rank sends, and what they mean."""
        shard_SM = self.held if mp_policy.param_dtype is None else self.held.to(mp_policy.param_dtype)
        codes = quantise_shard(shard_SM, self.how, mesh.get_group())
        rows = -(-outer_size[0] // mesh.size())
        return (F.pad(codes.values, (0, 0, 0, rows - len(shard_SM))),), (codes.scale, outer_size[0], self.how)

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        about: tuple[Tensor, int, How],
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the gathered weight and what of it FSDP frees behind the layer; with `out` renew its scale."""
        scale, rows, how = about
        codes = gathered(outputs[0], scale, rows)
        if out is None:
            return GatheredWeight(codes, how, dtype), (outputs[0],)
        assert isinstance(out, GatheredWeight)
        out.codes = codes  # the values lie where they lay before
        return None


class GatheredWeight(Tensor):
    """What a layer multiplies by between two all-gathers: `codes`, Q(W H) of all rows."""

    codes: Codes
    how: How

    @staticmethod
    def __new__(cls, codes: Codes, how: How, dtype: torch.dtype) -> GatheredWeight:
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.values.size(), dtype=dtype, device=codes.values.device, requires_grad=False
        )
        made.codes, made.how = codes, how
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GatheredWeight({self.codes!r})"

    def values(self) -> Tensor:
        """Return the weight as rounded, [N, M]."""
        rotated_NM = self.codes.values.to(self.dtype) * self.codes.scale.to(self.dtype)
        return transform(rotated_NM) if self.how.level else rotated_NM

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (_aten.detach.default, _aten.as_strided.default, _aten.alias.default):
            source: GatheredWeight = args[0]
            return cls(source.codes, source.how, source.dtype)
        args, kwargs = tree_map_only(cls, lambda x: x.values(), (args, kwargs or {}))
        return function(*args, **kwargs)
