"""MoS: low-rank matrices assembled from shards that all layers of one type share.

    A = P_A[idx_A].reshape(r, n)     B^T = P_B[idx_B].reshape(r, m)     y = W x + (alpha / r) B A dropout(x)

Per group of L layers of one type and shape (m out, n in): pools P_A [N, n/l] and P_B [N, m/l] with N = L e l rows
train; idx_A, idx_B (r l integers for each layer) are drawn once and frozen. The first (r - p) l entries are drawn
WITHOUT replacement from the L (e - p) l public rows (subset selection), independently for A and B (pair dissociation);
the last p l are rows that belong to that layer alone (privatisation); l > 1 cuts vectors into shards (vector sharding).
P_A ~ U(-1/sqrt(n), 1/sqrt(n)), P_B = 0, so a fresh adapter changes nothing. L e (n + m) values train: as many as in
LoRA of rank e, whatever r, p and l are. e = p = r, l = 1 is LoRA itself.

Source: MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards, ICLR 2025, arXiv 2410.00938.
Headline claim: about 8 times fewer trained parameters than LoRA at equal quality.
Left out: the random scaling of the released code, which is disabled there.
Legend: n in, m out, r assembled rank, T tokens of the batch, K = r l entries of an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, Refused, UsageError
from brickyard.core.inject import Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task

RECORD = Record(
    name="mos",
    family="tune",
    title="Mixture of shards: LoRA assembled from pools that layers share",
    paper="MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards, ICLR 2025, 2410.00938",
    slot="tuner",
    presets={"paper": {"r": 8, "e": 2, "p": 1, "l": 4, "alpha": 16.0, "dropout": 0.1}},
    search={"lr": (5e-4, 1e-3, 2e-3)},
    training={"lr": 1e-3, "wd": 0.0},
    claims=(
        Claim(
            text="MoS with the parameters of LoRA r=2 stays within 0.7 points of LoRA r=16, at 1/8 of its parameters.",
            inequality="mos >= lora16 - 0.7",
            arms={
                "mos": "mos:r=7,e=2,p=1,l=4",
                "lora16": "lora:r=16,alpha=16,dropout=0.1,target=[query,key,value,out,up,down]",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "mos:r=7,e=2,p=1,l=4",
                "labels": "shuffled",
                "inequality": "mos > control + 5.0",
            },
            gate="lora16 > majority + 10.0",
            epochs=2,
            lrs=(2e-3,),
            train_rows=800,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
        Claim(
            text="At equal trained parameters MoS is no worse than LoRA r=2 by more than 0.2 points.",
            inequality="mos >= lora2 - 0.2",
            arms={
                "mos": "mos:r=7,e=2,p=1,l=4",
                "lora2": "lora:r=2,alpha=16,dropout=0.1,target=[query,key,value,out,up,down]",
            },
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "mos:r=7,e=2,p=1,l=4",
                "labels": "shuffled",
                "inequality": "mos > control + 5.0",
            },
            gate="lora2 > majority + 10.0",
            epochs=2,
            lrs=(2e-3,),
            train_rows=800,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
        Claim(
            text="What makes layers differ is what helps: MoS is at least as good as pure sharing of the same pools.",
            inequality="mos >= sharing",
            arms={
                "mos": "mos:r=7,e=2,p=1,l=4",
                "sharing": "mos:r=12,e=2,p=0,l=1,paired=true",
            },
            control={
                "what": "no private shards (p=0): one of the differences between layers is gone",
                "arm": "mos:r=7,e=2,p=0,l=4",
                "inequality": "mos >= control",
            },
            gate="mos > majority + 10.0",
            epochs=2,
            lrs=(2e-3,),
            train_rows=800,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3)},
        ),
        Claim(
            text="On a language model it keeps at least 90 % of the gain of LoRA r=16, at 1/8 of its parameters.",
            inequality="mos >= 0.9 lora16",
            arms={
                "mos": "mos:r=5,e=2,p=1,l=4",
                "lora16": "lora:r=16,alpha=16,dropout=0.1,target=blocks",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "mos:r=5,e=2,p=1,l=4",
                "labels": "shuffled",
                "inequality": "mos > control + 0.5",
            },
            gate="lora16 > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model it gains no less than LoRA with as many trained parameters.",
            inequality="mos >= lora2",
            arms={
                "mos": "mos:r=5,e=2,p=1,l=4",
                "lora2": "lora:r=2,alpha=16,dropout=0.1,target=blocks",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "mos:r=5,e=2,p=1,l=4",
                "labels": "shuffled",
                "inequality": "mos > control + 0.5",
            },
            gate="lora2 > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model it gains no less than pure sharing of the same pools.",
            inequality="mos >= sharing",
            arms={
                "mos": "mos:r=5,e=2,p=1,l=4",
                "sharing": "mos:r=8,e=2,p=0,l=1,paired=true",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "mos:r=5,e=2,p=1,l=4",
                "labels": "shuffled",
                "inequality": "mos > control + 0.5",
            },
            gate="mos > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
    ),
)


RANK = 7  # what six layers with e=2 and p=1 allow; a larger budget e takes the card's least, 4 e


@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 0
    """assembled rank of each layer, at most p + L (e - p) for L layers that share; 0: 7 (4 e above e=2) or that many"""
    e: int = 2
    """budget: trained parameters are those of LoRA of rank e"""
    p: int = 1
    """private rank of each layer; 0 shares everything"""
    l: int = 4
    """shards per vector; must divide both sides of every target layer"""
    alpha: float = 16.0
    """numerator of the scaling alpha / r"""
    dropout: float = 0.1
    """dropout on the input of A"""
    target: str | tuple[str, ...] = "blocks"
    """`blocks` (all linear layers of the repeated blocks), roles, `all-linear`, or patterns of layer names"""
    paired: bool = False
    """ablation: the same shards for A and B (no pair dissociation)"""

    def __post_init__(self) -> None:
        if min(self.e, self.l) < 1 or min(self.r, self.p) < 0:
            raise UsageError(f"mos: e={self.e}, l={self.l} must be at least 1, r={self.r} and p={self.p} at least 0.")
        most = min(self.e, self.r or self.e)
        if self.p > most:
            above = f"r={self.r}" if most == self.r else f"e={self.e}"
            raise UsageError(f"mos: p={self.p} exceeds {above}; use p <= {most}.")
        if self.r and self.p == self.e != self.r:
            raise UsageError(f"mos: p = e = {self.e} leaves no public shards for r={self.r}; use p < e, or r = e.")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UsageError(f"mos: alpha={self.alpha} must be positive and dropout={self.dropout} in [0, 1).")


def rows(count: int, config: Config) -> tuple[int, int]:
    """Return (public, all) rows of a pool that `count` layers share."""
    return count * (config.e - config.p) * config.l, count * config.e * config.l


def draw_index(count: int, position: int, config: Config, generator: torch.Generator) -> Tensor:
    """Return the int32 index [r l] of the layer at `position` of `count`: public rows drawn, then its private rows."""
    public, _ = rows(count, config)
    private = config.p * config.l
    drawn = torch.randperm(public, generator=generator)[: (config.r - config.p) * config.l]
    own = public + position * private + torch.arange(private)
    return torch.cat([drawn, own]).to(torch.int32)


def assemble(pool: Tensor, index_K: Tensor, rank: int) -> Tensor:
    """Return [rank, width]: each row is the concatenation of l consecutive selected shards of `pool` [N, width / l]."""
    return pool.index_select(0, index_K).view(rank, -1)


def scatter(pool: Tensor, index_K: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `pool` for the gradient [rank, width] of what `assemble` made of it."""
    rows_KS = grad.reshape(index_K.numel(), -1).to(pool.dtype)
    return torch.zeros_like(pool).index_add_(0, index_K, rows_KS)


class Assembled(torch.autograd.Function):
    """y + scaling * (x A^T) B^T with A and B gathered from the pools anew in the backward pass and never kept.

    Kept are x, the rank-r product u, and the pools and indices, which exist anyway: no more than LoRA of rank r keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        pool_a: Tensor,
        pool_b: Tensor,
        index_a: Tensor,
        index_b: Tensor,
        rank: int,
        scaling: float,
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.rank, ctx.scaling, ctx.x_dtype = rank, scaling, x.dtype
        x = x.to(dtype)
        a_rn, b_rm = assemble(pool_a, index_a, rank).to(dtype), assemble(pool_b, index_b, rank).to(dtype)
        u_Tr = F.linear(x, a_rn) * scaling
        ctx.save_for_backward(x, u_Tr, pool_a, pool_b, index_a, index_b)
        if u_Tr.dtype == y.dtype:
            return torch.addmm(y.reshape(-1, y.shape[-1]), u_Tr.reshape(-1, rank), b_rm).view(y.shape)
        return (y + u_Tr @ b_rm).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u_Tr, pool_a, pool_b, index_a, index_b = ctx.saved_tensors
        needs_x, needs_y, needs_a, needs_b = ctx.needs_input_grad[:4]
        g_Tm = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_x = grad_a = grad_b = None
        if needs_b:
            grad_b = scatter(pool_b, index_b, u_Tr.reshape(-1, ctx.rank).t() @ g_Tm)
        if needs_x or needs_a:
            g_Tr = (g_Tm @ assemble(pool_b, index_b, ctx.rank).to(x.dtype).t()) * ctx.scaling
            if needs_a:
                grad_a = scatter(pool_a, index_a, g_Tr.t() @ x.reshape(-1, x.shape[-1]))
            if needs_x:
                grad_x = (g_Tr @ assemble(pool_a, index_a, ctx.rank).to(x.dtype)).view(x.shape).to(ctx.x_dtype)
        return grad_x, grad if needs_y else None, grad_a, grad_b, None, None, None, None


def fitted(config: Config, leaves: Sequence[Leaf]) -> Config:
    """Return the config with a rank, where it names none: 7, or 4 e above e=2, or less where a group is small.

    Raises Refused for a layer that is too narrow for p.
    """
    if config.r:
        return config
    most = [min(x.count * (config.e - config.p) + config.p, x.in_features, x.out_features) for x in leaves]
    narrow = min(leaves, key=lambda leaf: min(leaf.in_features, leaf.out_features))
    if config.p > min(most):
        raise Refused(
            f"mos: p={config.p} private ranks exceed layer {narrow.name} ({narrow.in_features} in, "
            f"{narrow.out_features} out); use p <= {min(most)}."
        )
    return replace(config, r=min(max(RANK, 4 * config.e if config.e > 2 else 0), *most))


def plan(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> Plan:
    """Lay out pools and indices; Refused where l does not fit a side, r exceeds a layer, or shards do not suffice."""
    made = Plan()
    for leaf in leaves:
        n, m = leaf.in_features, leaf.out_features
        public, total = rows(leaf.count, config)
        if n % config.l or m % config.l:
            raise Refused(f"mos: l={config.l} shards do not divide the sides {n} and {m} of layer {leaf.name}.")
        if config.r > min(n, m):
            raise Refused(f"mos: rank r={config.r} exceeds layer {leaf.name} ({n} in, {m} out); use r <= {min(n, m)}.")
        if (config.r - config.p) * config.l > public:
            most = leaf.count * (config.e - config.p) + config.p
            needed = (config.r - config.p) * config.l
            raise Refused(
                f"mos: cannot select more public shards than exist: r={config.r} needs {needed}, the "
                f"{leaf.count} layers like {leaf.name} share {public}; use r <= {most}, a larger e, or leave them "
                f"out of target."
            )
        if leaf.group not in made.shared:
            bound = n**-0.5  # of the whole vector's width, not of a shard's
            pool_a = torch.empty(total, n // config.l).uniform_(-bound, bound, generator=generator)
            made.shared[leaf.group] = {"pool_a": pool_a, "pool_b": torch.zeros(total, m // config.l)}
        index_a = draw_index(leaf.count, leaf.position, config, generator)
        index_b = index_a if config.paired else draw_index(leaf.count, leaf.position, config, generator)
        made.fixed[leaf.name] = {"index_a": index_a, "index_b": index_b}
    return made


def factors(config: Config, part: Part) -> tuple[Tensor, Tensor, float]:
    """Return (A_rn, B_mr, alpha / r) of one layer."""
    a_rn = assemble(part["pool_a"], part["index_a"], config.r)
    b_rm = assemble(part["pool_b"], part["index_b"], config.r)
    return a_rn, b_rm.t(), config.alpha / config.r


def around(config: Config, part: Part, x: Tensor, y: Tensor) -> Tensor:
    """Return y + (alpha / r) B A x; the path for training."""
    return Assembled.apply(  # type: ignore[return-value]
        x, y, part["pool_a"], part["pool_b"], part["index_a"], part["index_b"], config.r, config.alpha / config.r
    )


def check(config: Config, part: Part) -> None:
    """Raise BadBrick for a stored index that is no draw of `draw_index`."""
    public, _ = rows(part.leaf.count, config)
    private = config.p * config.l
    for name in ("index_a", "index_b"):
        index = part[name].long()
        drawn, own = index[: len(index) - private], index[len(index) - private :]
        first = public + part.leaf.position * private
        right = torch.equal(own, torch.arange(first, first + private, device=own.device))
        if not right or ((drawn < 0) | (drawn >= public)).any() or len(drawn.unique()) != len(drawn):
            raise BadBrick(
                f"mos: {name} of {part.leaf.name} in the file does not fit r={config.r}, p={config.p}, l={config.l}."
            )


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put MoS on the target layers of `model`, which carries the task's head."""
    return inject.attach(model, RECORD.name, config, task)
