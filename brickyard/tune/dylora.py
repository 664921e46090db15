"""DyLoRA: one LoRA that can be used at every rank, because each training step uses only its first b ranks.

    y = W x + (alpha / b) B[:, :b] A[:b] dropout(x)        A [r, n], B [m, r], W [m, n] frozen; B = 0 at the start

Every training forward draws b from `distribution` over r_min..r, the same for all layers of the model; with gradients
accumulated a step has several. A rank that they left out has gradient zero; AdamW's moments and weight decay go on
moving it, as in the released code. With frozen=true the ranks below the drawn unit are used but get no gradient; the
moments of earlier steps, and weight decay, may still move them.
Outside training, and in what is merged or exported, nothing is drawn: rank r is used, or the one that was chosen. The
first b ranks, with alpha kept, are an ordinary LoRA of rank b (`brickyard export --rank b`).

Source: Valipour et al., "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation", EACL 2023, arXiv 2210.07558, sec. 3 and algorithm 1.
Headline claim: one training replaces a search over ranks, 4 to 7 times faster, without a significant loss at any rank.
Left out: losses at several ranks in one step (Matryoshka LoRA).
Legend: n in, m out, T tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.errors import Refused, UsageError
from brickyard.core.inject import Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task

RECORD = Record(
    name="dylora",
    family="tune",
    title="One LoRA for every rank: nested dropout over ranks",
    paper="DyLoRA: Dynamic Search-Free Low-Rank Adaptation, EACL 2023, arXiv 2210.07558",
    slot="tuner",
    search={"lr": (3e-4, 1e-3, 3e-3), "frozen": (False, True)},
    training={"lr": 1e-3},
    presets={"paper": {"r": 8, "r_min": 1, "alpha": 16.0}},
    claims=(
        Claim(
            text="At ranks 1, 2, 4 and 8 one DyLoRA is at most a point below a LoRA trained at that rank.",
            measure="by_rank",
            part="every_rank",
            epochs=3,
            lrs=(2e-3,),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="At ranks up to 4 DyLoRA beats a LoRA of rank 8 that is cut to that rank after training.",
            measure="by_rank",
            part="against_cutting",
            epochs=3,
            lrs=(2e-3,),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="Between ranks 1 and 8 its quality differs at most half as much as that of a LoRA that is cut.",
            measure="by_rank",
            part="spread",
            epochs=3,
            lrs=(2e-3,),
            train_rows=600,
            batch=8,
            full={"train_rows": 0, "batch": 0, "max_length": 0, "lrs": (5e-4, 1e-3, 2e-3), "seeds": 5},
        ),
        Claim(
            text="On a language model one DyLoRA keeps at every rank at least 90 % of the gain of a LoRA of that rank.",
            measure="by_rank",
            part="every_rank",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lrs=(3e-3, 1e-2),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model it gains more at ranks up to 4 than a LoRA of rank 8 that is cut after training.",
            measure="by_rank",
            part="against_cutting",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lrs=(3e-3, 1e-2),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model its gains differ over the ranks at most half as much as a cut LoRA's.",
            measure="by_rank",
            part="spread",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lrs=(3e-3, 1e-2),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="One DyLoRA costs at most 1.3 times one LoRA, so four ranks come at a third of the price or less.",
            measure="search_cost",
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    r: int = 8
    """largest rank"""
    r_min: int = 1
    """smallest rank that can be used"""
    alpha: float = 16.0
    """numerator of the scaling alpha / b"""
    dropout: float = 0.0
    """dropout on the input of A"""
    unit: int = 1
    """ranks that are drawn together; must divide r"""
    distribution: str = "uniform"
    """uniform, or geometric (p = 0.15, cut to the range), which favours low ranks"""
    frozen: bool = False
    """give a gradient to the topmost drawn unit alone (cheaper), not to all ranks up to it"""
    target: str | tuple[str, ...] = ("query", "value")
    """roles, `blocks`, `all-linear`, or patterns of layer names"""

    def __post_init__(self) -> None:
        if not 1 <= self.r_min <= self.r:
            raise UsageError(f"dylora: r_min={self.r_min} must lie in 1 .. r={self.r}.")
        if self.unit < 1 or self.r % self.unit:
            raise UsageError(f"dylora: unit={self.unit} must divide r={self.r}.")
        if not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UsageError(f"dylora: alpha={self.alpha} must be positive and dropout={self.dropout} in [0, 1).")
        if self.distribution not in WEIGHTS:
            raise UsageError(f"dylora: distribution={self.distribution!r}; expected one of {', '.join(WEIGHTS)}.")


WEIGHTS = {"uniform": 1.0, "geometric": 0.85}  # weight of a rank over that of the one before it


def ranks(config: Config) -> list[int]:
    """Return the ranks that may be drawn, rising: multiples of `unit` from r_min to r."""
    return [b for b in range(config.unit, config.r + 1, config.unit) if b >= config.r_min]


def probabilities(config: Config) -> Tensor:
    """Return p [ranks] of the draw."""
    weights = WEIGHTS[config.distribution] ** torch.arange(len(ranks(config)), dtype=torch.float64)
    return weights / weights.sum()


def plan(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> Plan:
    """Lay out A [r, n] and B transposed [r, m], both contiguous when cut; Refused where r exceeds a layer."""
    made = Plan()
    for leaf in leaves:
        n, m = leaf.in_features, leaf.out_features
        if config.r > min(n, m):
            raise Refused(
                f"dylora: rank r={config.r} exceeds layer {leaf.name} ({n} in, {m} out); use r <= {min(n, m)}."
            )
        a_rn = torch.empty(config.r, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
        made.own[leaf.name] = {"a": a_rn, "bt": torch.zeros(config.r, m)}
    return made


def draw(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> dict[str, int]:
    """Draw one rank for all layers."""
    place = int(torch.multinomial(probabilities(config), 1, generator=generator))
    return dict.fromkeys((leaf.name for leaf in leaves), ranks(config)[place])


def at_rank(config: Config, leaves: Sequence[Leaf], rank: int) -> dict[str, int]:
    """Return what every layer is given as `part.drawn` to be used at `rank`; UsageError where it was not trained."""
    if rank not in ranks(config):
        raise UsageError(f"rank {rank} was given; this dylora was trained for {ranks(config)}.")
    return dict.fromkeys((leaf.name for leaf in leaves), rank)


def factors(config: Config, part: Part) -> tuple[Tensor, Tensor, float]:
    """Return (A[:b], B[:, :b], alpha / b) of one layer, b the rank in use."""
    b = part.drawn or config.r
    return part["a"][:b], part["bt"][:b].t(), config.alpha / b


def around(config: Config, part: Part, x: Tensor, y: Tensor) -> Tensor:
    """Return y + (alpha / b) B[:, :b] A[:b] x; with `frozen` only the topmost drawn unit gets gradients."""
    a_bn, b_mb, scaling = factors(config, part)
    if not (config.frozen and part.training and len(a_bn) > config.unit):
        return inject.low_rank(x, y, a_bn, b_mb, scaling)
    low = len(a_bn) - config.unit
    y = inject.low_rank(x, y, a_bn[:low].detach(), b_mb[:, :low].detach(), scaling)
    return inject.low_rank(x, y, a_bn[low:], b_mb[:, low:], scaling)


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put DyLoRA on the target layers of `model`, which carries the task's head."""
    return inject.attach(model, RECORD.name, config, task)
