"""A narrow copy of a backbone: the same block type with every width divided by r, and its weights cut out of the wide.

    walk the blocks in order, carrying `cols`, the kept channels of the residual stream:
    q, k, v    columns `cols`; rows: the n / r with the largest score, which are the columns of `out`
    out        rows: the n / r best, which are the next `cols`; the norm after it is cut by them
    up, gate   columns `cols`; rows: the best, which are the columns of `down`;   down: as `out`

A row's score is the l1 norm of its importances; of projections that share their rows (q, k, v; gate, up) it is that of
the elementwise product. With rotary positions or fewer key than query heads, the same dimensions are kept in every
head, rotary ones in pairs, and their score is summed over the heads.

Source: LST, arXiv 2206.06522, section 3.3, and its released pruning "fisher-v2"; heads and pairs are ours.
Legend: n rows and m columns of a weight as nn.Linear holds it, d width, r reduction.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.core.errors import Refused, UsageError
from brickyard.core.roles import blocks, roles

_TOGETHER = (("query", "key", "value"), ("gate", "up"))


@dataclass(frozen=True)
class Shape:
    """What decides a narrow copy: widths and heads of the wide network."""

    width: int
    heads: int
    key_heads: int
    head: int
    rotary: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read them from a transformers configuration; Refused where it names none."""
        width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        if not isinstance(width, int) or not isinstance(heads, int):
            raise Refused(f"{type(config).__name__} names no hidden_size and num_attention_heads to divide.")
        head = getattr(config, "head_dim", None) or width // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        rotary = bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))
        return cls(width, heads, key_heads, head, rotary)

    def check(self, r: int, inner: int | None) -> None:
        """Raise UsageError, with the reductions that fit, where r does not divide every width."""
        unit = self.head // 2 if self.rotary else self.head
        fits = [q for q in range(1, unit + 1) if not (unit % q or self.width % q or (inner is not None and inner % q))]
        if r not in fits:
            raise UsageError(
                f"r={r} does not divide this base's widths (hidden {self.width}, heads of {self.head}"
                f"{', in rotary pairs' if self.rotary else ''}{f', inner {inner}' if inner else ''}); "
                f"possible: {', '.join(map(str, fits))}."
            )


def narrow(backbone: Any, r: int, layers: list[int]) -> nn.Module:
    """Return an untrained network of the backbone's class with its widths divided by r and `layers` of its blocks.

    Its token embedding has one row: it is given states. Raises UsageError where r does not divide the widths.
    """
    config = copy.deepcopy(backbone.config)
    inner_name = next((n for n in ("intermediate_size", "n_inner") if isinstance(getattr(config, n, None), int)), None)
    inner = getattr(config, inner_name) if inner_name else None
    shape = Shape.of(config)
    shape.check(r, inner)
    config.hidden_size, config.num_hidden_layers = shape.width // r, len(layers)
    if inner_name and inner is not None:
        setattr(config, inner_name, inner // r)
    if getattr(config, "head_dim", None):
        config.head_dim = shape.head // r
    if getattr(config, "layer_types", None):
        config.layer_types = [backbone.config.layer_types[i] for i in layers]
    if hasattr(config, "vocab_size"):
        config.vocab_size = 1
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, 0)
    pooling = "add_pooling_layer" in inspect.signature(type(backbone).__init__).parameters
    options = {"add_pooling_layer": False} if pooling else {}
    # Whatever the wide one uses: nobody asks for narrow attention weights, and as heads keep their number, unfused ones
    # would be more than a third of all that the narrow network saves for backward.
    attention = "sdpa" if getattr(backbone, "_supports_sdpa", False) else "eager"
    return type(backbone)._from_config(config, attn_implementation=attention, **options)


def has_last_norm(model: nn.Module) -> bool:
    """Whether a norm follows the last block."""
    names, kinds = list(dict(model.named_modules())), roles(model)
    last = max(i for i, name in enumerate(names) if name.startswith(f"{blocks(model)[-1][0]}"))
    return any(kinds.get(name) == "norm" for name in names[last + 1 :])


def sliced(
    backbone: nn.Module, small: nn.Module, layers: list[int], importance: Mapping[str, Tensor], first_I: Tensor
) -> dict[str, Tensor]:
    """Return the weights of the blocks of `small` cut out of those of `backbone`: name in `small` -> tensor.

    importance: name of a wide weight -> its entries' importances, of the weight's shape. first_I: [d] scores of the
    channels that enter the first block. Refused where a block is not made of q, k, v, out, up and down, or has norms
    that are not over the residual stream.
    """
    shape = Shape.of(backbone.config)
    r = shape.width // Shape.of(small.config).width
    kinds, wide = roles(backbone), dict(backbone.named_modules())
    names_small = [name for name, _ in blocks(small)]
    order = execution_order(backbone)
    cols = _best(first_I, shape.width // r)
    out: dict[str, Tensor] = {}
    for i, (block, _) in enumerate(blocks(backbone)):
        inside = [name for name in order if name.startswith(f"{block}.")]
        by_role = {kinds[name]: name for name in inside if kinds[name] != "norm"}
        if missing := {"query", "key", "value", "out", "up", "down"} - by_role.keys():
            raise Refused(f"{block} has no layer that is its {', '.join(sorted(missing))}; use init=random.")
        rows: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name in inside:
            kind = kinds[name]
            if kind == "norm":
                if wide[name].weight.shape != (shape.width,):
                    raise Refused(f"{name} is no norm over the residual stream; use init=random.")
                kept |= {f"{name}.{part}": p.detach()[cols].clone() for part, p in wide[name].named_parameters()}
                continue
            columns = rows["query"] if kind == "out" else rows["up"] if kind == "down" else cols
            if kind not in rows:
                group = next((g for g in _TOGETHER if kind in g), (kind,))
                members = [by_role[k] for k in group if k in by_role]
                scores = [_matrix(wide[m], importance[f"{m}.weight"])[:, columns] for m in members]
                rows.update(_rows(group, scores, shape, r))
            for part, p in wide[name].named_parameters():
                value = _matrix(wide[name], p.detach())[rows[kind]]
                if p.ndim == 2:
                    value = _matrix(wide[name], value[:, columns])
                kept[f"{name}.{part}"] = value.contiguous().clone()
            if kind in ("out", "down"):
                cols = rows[kind]
        if i in layers:
            target = names_small[layers.index(i)]
            out |= {f"{target}{name.removeprefix(block)}": tensor for name, tensor in kept.items()}
    return out


@torch.no_grad()
def execution_order(backbone: Any) -> list[str]:
    """Return the names of the leaves with parameters in the order in which a pass runs them."""
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: ran.append(name))
        for name, module in backbone.named_modules()
        if not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))
    ]
    config, device = backbone.config, next(backbone.parameters()).device
    try:
        if hasattr(config, "vocab_size"):
            backbone(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=device))
        else:
            size = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
            backbone(pixel_values=torch.zeros(1, getattr(config, "num_channels", 3), size, size, device=device))
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(ran))


def _rows(group: tuple[str, ...], scores: list[Tensor], shape: Shape, r: int) -> dict[str, Tensor]:
    """Return the rows to keep of each projection of a group."""
    attention = "query" in group
    if attention and (shape.rotary or shape.key_heads != shape.heads):
        total = torch.zeros(shape.head)
        for score in scores:
            total += score.abs().sum(1).view(-1, shape.head).sum(0)
        half = shape.head // 2
        if shape.rotary:
            pairs = _best(total[:half] + total[half:], half // r)
            dims = torch.cat([pairs, pairs + half])
        else:
            dims = _best(total, shape.head // r)
        every = lambda heads: (torch.arange(heads)[:, None] * shape.head + dims).flatten()  # noqa: E731
        return {"query": every(shape.heads), "key": every(shape.key_heads), "value": every(shape.key_heads)}
    product = scores[0].clone()
    for score in scores[1:]:
        product *= score
    return dict.fromkeys(group, _best(product.abs().sum(1), len(product) // r))


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest, in rising order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """A weight as nn.Linear holds it (rows are outputs), and back; a bias as it is."""
    return tensor.t() if isinstance(module, Conv1D) and tensor.ndim == 2 else tensor
