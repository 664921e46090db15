"""Fisher merging: average the models, each parameter weighted by how much its own model's answers depend on it.

    F_t   = mean over rows x of (d log p_t(y | x) / d theta_t)^2          y drawn from p_t(. | x), no label is read
    theta = sum_t F_t theta_t / sum_t F_t                                 entry by entry; F_t at least `floor`

F_t [as theta_t] is the diagonal of model t's Fisher information at its own weights, estimated on unlabelled rows of its
own task through that task's head. Its scale differs between tasks by orders of magnitude, so that one model may rule:
`normalise=true` divides each F_t by its mean over all parameters. An entry on which no model depends is averaged.

Regression counts as a Gaussian of variance 1 around the output; a language model's row is a block of text, whose
positions are drawn one by one given the text before them.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832, equations 4 and 5.
Headline claim: better than the plain average of fine-tuned models. Left out: weights by model, which the paper searches
for pairs, and the full expectation over y, which costs a pass for every class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from brickyard.core.errors import NotFinite, UsageError
from brickyard.core.method import Record
from brickyard.merge._from_data import Expert, Stage, Waiting, mean

if TYPE_CHECKING:
    from brickyard.merge._engine import Piece

RECORD = Record(
    name="fisher",
    family="merge",
    title="Average weighted by the models' Fisher information",
    paper="arXiv 2111.09832",
    needs=("text-classification", "pair-classification", "regression", "image-classification", "causal-lm"),
    because="the labels that it draws are one class, one number or one token a position",
    part_of="lines",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of Fisher merging."""

    rows: int = 256
    """unlabelled train rows of each task, at most; each costs a forward and a backward pass"""
    floor: float = 1e-6
    """least Fisher information of an entry; with normalise=true in units of the model's mean"""
    normalise: bool = False
    """divide each model's Fisher information by its mean, so that no task rules by its scale"""
    seed: int = 0
    """of the rows and of the labels drawn"""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.seed < 0:
            raise UsageError(f"fisher: rows={self.rows}, seed={self.seed}; expected at least 1 and 0.")
        if not 0 < self.floor < math.inf:
            raise UsageError(f"fisher: floor={self.floor}; expected above 0, or entries without use have no mean.")


def merge(thetas: Sequence[Tensor], fishers: Sequence[Tensor]) -> Tensor:
    """Return sum_t F_t theta_t / sum_t F_t of T tensors of equal shape; all F_t above 0."""
    weighted, total = thetas[0] * fishers[0], fishers[0].clone()
    for theta, fisher in zip(thetas[1:], fishers[1:], strict=True):
        weighted.addcmul_(theta, fisher)
        total += fisher
    return weighted.div_(total)


def drawn_loss(
    logits: Tensor, generator: torch.Generator, *, regression: bool, counted: Tensor | None = None
) -> Tensor:
    """Return -log p(y) of labels y drawn from the model's own distribution, summed; a scalar.

    logits: [B, K], of a language model [B, T, V] with `counted` [B, T], the positions that are predicted. The draw is
    made on the CPU, so that it is the same on every device.
    """
    if regression:
        noise = torch.randn(logits.shape, generator=generator).to(logits)
        return 0.5 * (logits - (logits.detach() + noise)).square().sum()
    flat = logits.flatten(0, -2) if counted is None else logits[counted]
    y = torch.multinomial(flat.detach().float().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(flat.float(), y.to(flat.device), reduction="sum")


def information(expert: Expert, config: Config) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of every parameter that a merge may change, before the floor: on the CPU.

    One row at a time, which is exact for every architecture. NotFinite names a parameter whose gradient is not.
    """
    expert.model.eval()
    parameters = {name: p.requires_grad_(True) for name, p in expert.parameters.items()}
    held = list(parameters.values())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in held]
    generator = torch.Generator().manual_seed(config.seed)
    places = expert.drawn(config.rows, config.seed)
    for batch, counted in expert.batches(places, 1):
        logits = expert.model(**batch).logits
        if not logits.isfinite().all():
            raise NotFinite(f"{expert.label}: its answers to {expert.data} are not finite; look at its weights.")
        loss = drawn_loss(logits, generator, regression=expert.task.regression, counted=counted)
        gradients = torch.autograd.grad(loss, held, allow_unused=True)
        used = [(total, g.float()) for total, g in zip(sums, gradients, strict=True) if g is not None]
        totals, found = (list(part) for part in zip(*used, strict=True))
        torch._foreach_addcmul_(totals, found, found)
    out = {name: (total / len(places)).cpu() for name, total in zip(parameters, sums, strict=True)}
    for name, fisher in out.items():
        if not fisher.isfinite().all():
            raise NotFinite(f"{expert.label}: the Fisher information of {name} is not finite on {expert.data}.")
    return out


def prepared(fisher: Mapping[str, Tensor], floor: float, *, normalise: bool) -> dict[str, Tensor]:
    """Return a model's Fisher information as it weighs: divided by its mean where asked, and at least `floor`."""
    whole = sum(float(f.sum(dtype=torch.float64)) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    unit = whole if normalise and whole > 0 else 1.0
    return {name: (f / unit).clamp_(min=floor) for name, f in fisher.items()}


@dataclass(frozen=True)
class Weighted(Waiting):
    """The weighted average as the engine runs it: F_t by model and name; what has none is averaged."""

    fishers: Sequence[Mapping[str, Tensor]]
    about: dict[str, Any] = field(default_factory=dict)

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        if any(piece.name not in fisher for fisher in self.fishers):
            return mean(models)
        part = slice(piece.start, piece.start + piece.count)
        return merge(models, [fisher[piece.name].reshape(-1)[part] for fisher in self.fishers])


@dataclass(frozen=True)
class Fisher(Waiting):
    """Fisher merging before its data are there; see `_from_data.OfData`."""

    config: Config
    kinds: tuple[str, ...] = RECORD.needs

    def from_data(self, stage: Stage) -> Weighted:
        """Estimate every expert's Fisher information; return the weighted average."""
        found = [information(expert, self.config) for expert in stage.experts]
        fishers = [prepared(f, self.config.floor, normalise=self.config.normalise) for f in found]
        shares = [_at_floor(f, self.config.floor) for f in fishers]
        rows = [len(expert.drawn(self.config.rows, self.config.seed)) for expert in stage.experts]
        said = ", ".join(f"{e.label} {share:.0%}" for e, share in zip(stage.experts, shares, strict=True))
        detail = f"entries whose Fisher information the floor {self.config.floor:g} lifted: {said}"
        return Weighted(fishers, {"rows": rows, "at_floor": shares, "detail": detail})


def _at_floor(fisher: Mapping[str, Tensor], floor: float) -> float:
    """Return the share of entries that the floor lifted: where it is near 1, the merge is the plain average."""
    return sum(int((f <= floor).sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())


def rule(config: Config) -> Fisher:
    """Return the Fisher merge that a config describes."""
    return Fisher(config)
