"""HUT: the frozen weight itself is transformed by a low-rank Hadamard factor; nothing is added beside it.

    one-plus   U(W) = W * (1 + s B A)            B [m, r] = 0, A [r, n]: the form of HiRA, which PEFT ships
    pure       U(W) = W * (B A)                  B A all ones at the start
    rank-1     U(W) = W * (b c^T), so U(W) x = b * (W (c * x))       b [m], c [n] ones at the start: IA3 on both sides

    y = U(W) x + bias        W [m, n] frozen; a weight that is zero stays zero

Source: Zhang, Zhou and Chen, "HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated
Transformation", arXiv 2409.13501. The equations are a reconstruction from the abstract and from HiRA; no official code
was found, so results are those of this reconstruction.
Headline claim: on par with LoRA and its kin with fewer training FLOPs and no added latency.
`pure` and `rank-1` store what is added to their ones, so that weight decay pulls to the base and not to zero weights.
Legend: n in, m out, T tokens of the batch, R rows of a tile.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.errors import Refused, UsageError
from brickyard.core.inject import BrickyardLinear, Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task

RECORD = Record(
    name="hut",
    family="tune",
    title="Hadamard updated transformation (reconstruction): the weight times a low-rank factor",
    paper="HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation, arXiv 2409.13501",
    slot="tuner",
    search={"lr": (1e-3, 3e-3, 1e-2), "variant": ("one-plus", "rank-1")},
    training={"lr": 3e-3},
    claims=(
        Claim(
            text="With the parameters of LoRA r=8 HUT is at most 0.5 points below it.",
            inequality="hut >= lora - 0.5",
            arms={"hut": "hut:r=8", "lora": "lora:r=8,alpha=16,target=[query,value]"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "hut:r=8",
                "labels": "shuffled",
                "inequality": "hut > control + 5.0",
            },
            gate="lora > majority + 10.0",
            epochs=3,
            lr_factors=(1.0, 3.0),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model it keeps at least 90 % of the gain of LoRA with as many parameters.",
            inequality="hut >= 0.9 lora",
            arms={
                "hut": "hut:r=8",
                "lora": "lora:r=8,alpha=16,target=[query,value]",
                "rank-1": "hut:variant=rank-1",
                "ia3": "ia3",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "hut:r=8",
                "labels": "shuffled",
                "inequality": "hut > control + 0.5",
            },
            gate="lora > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0, 100.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="A training step of HUT takes fewer FLOPs than one of LoRA at 512 tokens and more.",
            measure="flops",
            kind="counted",
        ),
    ),
)
VARIANTS = ("one-plus", "pure", "rank-1")
ROWS = 256  # of the weight that are transformed at a time
NAMED = 3  # layers that a warning names


@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 8
    """rank of the factor; rank-1 needs none"""
    scale: float = 1.0
    """s of one-plus"""
    variant: str = "one-plus"
    """one-plus, pure or rank-1"""
    target: str | tuple[str, ...] = ("query", "value")
    """roles, `blocks`, `all-linear`, or patterns of layer names"""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UsageError(f"hut: variant={self.variant!r}; expected one of {', '.join(VARIANTS)}.")
        if self.r < 1 or not self.scale > 0:
            raise UsageError(f"hut: r={self.r} must be at least 1 and scale={self.scale} positive.")


class Updated(torch.autograd.Function):
    """x (W * (offset + s B A))^T in one product; kept are x, A and B, and W, which exists anyway.

    The transformed weight and its gradient are made in tiles of rows, forward and backward, and never held whole.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_mn: Tensor, a_rn: Tensor, b_mr: Tensor, scale: float, offset: float) -> Tensor:
        ctx.scale, ctx.offset = scale, offset
        ctx.save_for_backward(x, w_mn, a_rn, b_mr)
        x_Tn = x.reshape(-1, x.shape[-1])
        y_Tm = x.new_empty(len(x_Tn), len(w_mn))
        for rows in _tiles(len(w_mn)):
            torch.mm(x_Tn, _updated(w_mn, a_rn, b_mr, rows, scale, offset).to(x.dtype).t(), out=y_Tm[:, rows])
        return y_Tm.view(*x.shape[:-1], len(w_mn))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_mn, a_rn, b_mr = ctx.saved_tensors
        g_Tm, x_Tn = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = torch.zeros_like(x_Tn) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = torch.zeros_like(a_rn), torch.empty_like(b_mr)
        with _exact(x):
            for rows in _tiles(len(w_mn)):
                g_TR = g_Tm[:, rows]
                if grad_x is not None:
                    grad_x += g_TR @ _updated(w_mn, a_rn, b_mr, rows, ctx.scale, ctx.offset).to(x.dtype)
                h_Rn = (g_TR.t() @ x_Tn).to(a_rn.dtype) * w_mn[rows] * ctx.scale
                grad_b[rows] = h_Rn @ a_rn.t()
                grad_a += b_mr[rows].t() @ h_Rn
        return None if grad_x is None else grad_x.view(x.shape), None, grad_a, grad_b, None, None


def _exact(x: Tensor) -> torch.autocast:
    """No autocast: next to the ones of 1 + s B A its types would round a small change away."""
    return torch.autocast(x.device.type, enabled=False)


def _tiles(count: int) -> list[slice]:
    return [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


def _updated(w_mn: Tensor, a_rn: Tensor, b_mr: Tensor, rows: slice, scale: float, offset: float) -> Tensor:
    """Rows of W * (offset + s B A), in the type of A, which is float32 or wider."""
    if offset:
        return w_mn[rows] * torch.addmm(a_rn.new_full((1, 1), offset), b_mr[rows], a_rn, alpha=scale)
    return w_mn[rows] * (b_mr[rows] @ a_rn * scale)


def plan(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> Plan:
    """Lay out A and B (what is added to the ones of `pure` and `rank-1`); Refused where r exceeds a layer."""
    made = Plan()
    for leaf in leaves:
        n, m = leaf.in_features, leaf.out_features
        if config.variant == "rank-1":
            made.own[leaf.name] = {"a": torch.zeros(1, n), "b": torch.zeros(m, 1)}
            continue
        if config.r > min(n, m):
            raise Refused(f"hut: rank r={config.r} exceeds layer {leaf.name} ({n} in, {m} out); use r <= {min(n, m)}.")
        if config.variant == "one-plus":
            a_rn = torch.empty(config.r, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
        else:
            a_rn = torch.randn(config.r, n, generator=generator) * 0.02
            a_rn[0] = 0.0
        made.own[leaf.name] = {"a": a_rn, "b": torch.zeros(m, config.r)}
    return made


def gain(config: Config, part: Part) -> tuple[Tensor, Tensor, float, float]:
    """Return (A, B, s, offset) such that U(W) = W * (offset + s B A)."""
    a_rn, b_mr = part["a"], part["b"]
    if config.variant == "one-plus":
        return a_rn, b_mr, config.scale, 1.0
    first_r = torch.zeros(len(a_rn), dtype=a_rn.dtype, device=a_rn.device)
    first_r[0] = 1.0
    return a_rn + first_r[:, None], b_mr + first_r, 1.0, 0.0


def weight(config: Config, part: Part) -> Tensor:
    """Return dW_mn = U(W) - W in float32 or wider."""
    with _exact(part["a"]):
        a_rn, b_mr, scale, offset = gain(config, part)
        wide = torch.promote_types(part.weight.dtype, a_rn.dtype)
        return part.weight.to(wide) * (b_mr @ a_rn * scale + (offset - 1.0))


def whole(config: Config, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return U(W) x + bias in one product with the weight."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x = x.to(dtype)
    with _exact(x):
        a_rn, b_mr, scale, offset = gain(config, part)
        if config.variant == "rank-1":
            y = (F.linear((x * a_rn[0]).to(dtype), part.weight.to(dtype)) * b_mr[:, 0]).to(dtype)
        else:
            y = Updated.apply(x, part.weight, a_rn, b_mr, scale, offset)
    return y if bias is None else y + bias.to(y.dtype)  # type: ignore[return-value,operator]


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put HUT on the target layers of `model`, which carries the task's head.

    A warning names the layers that have outputs or inputs whose weights are all zero, which no factor can move.
    """
    made = inject.attach(model, RECORD.name, config, task)
    if idle := _idle(dict(made.model.base_model.layers())):  # type: ignore[union-attr,arg-type,operator]
        more = f", and {len(idle) - NAMED} layers more" if len(idle) > NAMED else ""
        warnings.warn(
            f"hut multiplies weights, so those that are zero stay zero: {'; '.join(idle[:NAMED])}{more}. Use lora for "
            "them, or leave them out of target.",
            stacklevel=2,
        )
    return made


def _idle(layers: dict[str, BrickyardLinear]) -> list[str]:
    """Tell of every layer that has them how many rows (outputs) and columns (inputs) of its weight are zero."""
    found = []
    for name, layer in layers.items():
        used_mn = layer.base_weight() != 0
        rows, columns = int((~used_mn.any(1)).sum()), int((~used_mn.any(0)).sum())
        if rows or columns:
            found.append(f"{name} has {rows} outputs and {columns} inputs without any weight")
    return found
