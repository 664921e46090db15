"""RegMean: the linear layer whose outputs come nearest to every expert's, on that expert's own inputs.

    G_t = X_t^T X_t                                      X_t [tokens, n]: what enters the layer in expert t
    G_t <- a G_t + (1 - a) diag(G_t)                     a = off_diagonal
    W   = (sum_t G_t)^-1 sum_t G_t W_t                   W_t [n, m], the layer of expert t: y = x W
        = argmin_W sum_t |X_t W - X_t W_t|^2             where a = 1

Only unlabelled rows and forward passes are needed. Everything else (biases, norms, embeddings, convolutions, weights
that two layers share) is averaged. An input that is 0 in every row of every task says nothing: its row of W is averaged
as well. Padding does not count.

Source: Jin, Ren, Preotiuc-Pietro and Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv
2212.09849, equation 2 and section 3.3. Headline claim: above Fisher merging and the average of models fine-tuned on
different domains or tasks. Left out: coefficients by layer type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.method import Record
from brickyard.merge._from_data import Expert, Made, Stage, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable

RECORD = Record(
    name="regmean",
    family="merge",
    title="Linear layers that answer as their experts do",
    paper="arXiv 2212.09849",
    needs=("text-classification", "pair-classification", "regression", "image-classification", "causal-lm"),
    because="rows of other tasks are several texts, whose tokens would count several times",
    search={"off_diagonal": (0.1, 0.5, 0.7, 0.9, 1.0)},
    part_of="lines",
)

SMALLEST = 1e-10  # squared pivot, of inputs scaled to unit length, below which a layer's inputs do not determine it


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of RegMean."""

    rows: int = 256
    """unlabelled train rows of each task, at most; each costs a forward pass"""
    off_diagonal: float = 0.9
    """factor of what is beside the diagonal of each Gram matrix, in [0, 1]; the paper's for T5 is 0.1"""
    at_once: int = 32
    """rows of a forward pass"""
    seed: int = 0
    """of the rows drawn"""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.at_once < 1 or self.seed < 0:
            raise UsageError(
                f"regmean: rows={self.rows}, at_once={self.at_once}, seed={self.seed}; expected 1, 1 and 0."
            )
        if not 0 <= self.off_diagonal <= 1:
            raise UsageError(f"regmean: off_diagonal={self.off_diagonal}; expected 0 to 1.")


def shrunk(gram_NN: Tensor, off_diagonal: float) -> Tensor:
    """Return the Gram matrix with everything beside its diagonal multiplied by `off_diagonal`."""
    return (gram_NN * off_diagonal).diagonal_scatter(gram_NN.diagonal())


def solve(grams: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return (sum_t G_t)^-1 sum_t G_t W_t, float64 [n, m]; rows of inputs that are 0 throughout are averaged.

    grams: T positive semi-definite float64 [n, n]; weights: T float64 [n, m]. Raises Refused where they do not
    determine the result.
    """
    total_NN = torch.stack(list(grams)).sum(0)
    right_NM = torch.stack([gram @ weight for gram, weight in zip(grams, weights, strict=True)]).sum(0)
    out_NM = torch.stack(list(weights)).mean(0)
    live = total_NN.diagonal() > 0
    if not live.any():
        return out_NM
    # Scaled to a unit diagonal, so that inputs of different sizes are judged alike.
    unit_n = total_NN.diagonal()[live].rsqrt()
    factor_nn, failed = torch.linalg.cholesky_ex(total_NN[live][:, live] * unit_n[:, None] * unit_n)
    if int(failed) or float(factor_nn.diagonal().min()) ** 2 < SMALLEST:
        raise Refused(
            "regmean: the rows read do not determine a layer, whose inputs depend on each other; take off_diagonal "
            "below 1, or more rows."
        )
    out_NM[live] = unit_n[:, None] * torch.cholesky_solve(unit_n[:, None] * right_NM[live], factor_nn)
    return out_NM


def linear_layers(expert: Expert) -> dict[str, nn.Module]:
    """Return, by the base's name of its weight, each linear layer that may change and whose weight it alone uses."""
    from transformers.pytorch_utils import Conv1D

    named = {id(tensor): name for name, tensor in expert.tensors.items()}
    users: dict[int, list[nn.Module]] = {}
    for module in expert.model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    return {
        named[key]: modules[0]
        for key, modules in users.items()
        if key in named
        and len(modules) == 1
        and isinstance(modules[0], nn.Linear | Conv1D)
        and modules[0].weight is expert.tensors[named[key]]
    }


@torch.no_grad()
def grams_of(expert: Expert, layers: Mapping[str, nn.Module], config: Config) -> dict[str, Tensor]:
    """Return G = X^T X of each layer that the rows reach: products in float32, sums in float64, on the device."""
    out: dict[str, Tensor] = {}
    counts: list[Tensor | None] = [None]  # which tokens [B, T] of the batch count

    def reader(name: str) -> Callable[..., None]:
        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float()
            kept = counts[0]
            x_XN = x[kept] if kept is not None and x.shape[:-1] == kept.shape else x.flatten(0, -2)
            gram = (x_XN.T @ x_XN).double()
            out[name] = out[name].add_(gram) if name in out else gram

        return read

    expert.model.eval()
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(reader(name)).remove)
        for batch, predicted in expert.batches(expert.drawn(config.rows, config.seed), config.at_once):
            mask = predicted if predicted is not None else batch.get("attention_mask")
            counts[0] = mask.bool() if mask is not None and mask.ndim == 2 else None
            expert.model(**batch)
    for name, gram in out.items():
        if not gram.isfinite().all():
            raise NotFinite(f"{expert.label}: what enters the layer of {name} is not finite on {expert.data}.")
    return out


@dataclass(frozen=True)
class RegMean(Waiting):
    """RegMean before its data are there; see `_from_data.OfData`."""

    config: Config
    kinds: tuple[str, ...] = RECORD.needs

    @torch.no_grad()
    def from_data(self, stage: Stage) -> Made:
        """Solve for every linear layer that all experts have and that the rows of all of them reach."""
        layers = [linear_layers(expert) for expert in stage.experts]
        grams = [grams_of(e, found, self.config) for e, found in zip(stage.experts, layers, strict=True)]
        names = sorted(set.intersection(*(set(found) for found in grams)))
        tensors = {}
        for name in names:
            turned = [isinstance(found[name], nn.Linear) for found in layers]  # stored [m, n]; Conv1D as [n, m]
            weights = [expert.tensors[name].double() for expert in stage.experts]
            weights = [w.T if t else w for w, t in zip(weights, turned, strict=True)]
            shrunken = [shrunk(found.pop(name), self.config.off_diagonal) for found in grams]
            try:
                solved = solve(shrunken, weights)
            except Refused as error:
                raise Refused(f"{name}: {error}") from None
            tensors[name] = (solved.T if turned[0] else solved).float().contiguous().cpu()
        rows = [len(expert.drawn(self.config.rows, self.config.seed)) for expert in stage.experts]
        others = len(set().union(*(e.tensors for e in stage.experts))) - len(names)
        detail = f"{len(names)} linear layers solved for, the other {others} tensors averaged"
        return Made(tensors, {"rows": rows, "solved": names, "detail": detail})


def rule(config: Config) -> RegMean:
    """Return the RegMean that a config describes."""
    return RegMean(config)
