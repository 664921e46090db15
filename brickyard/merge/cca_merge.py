"""CCA Merge: bring independently trained networks into one network's features by canonical correlations, then average.

    S_xx = X'X / m + g I    S_yy = Y'Y / m + g I    S_xy = X'Y / m     columns centred; one triple a feature space
    U diag(s) V' = S_xx^{-1/2} S_xy S_yy^{-1/2}                          s: canonical correlations, 0 <= s <= 1
    T = S_xx^{1/2} U V' S_yy^{-1/2}        T^{-1} = S_yy^{1/2} V U' S_xx^{-1/2}               z_A ~ T z_B
    W_l <- T_l W_l,   b_l <- T_l b_l,   W_{l+1} <- W_{l+1} T_l^{-1}      of every model but A, the reference
    theta = (theta_A + sum_k theta'_k) / K

Shapes: X, Y [m, n], the activations of A and of another model on the same m inputs (of a convolution, every pixel is a
sample); T [n, n]. Layers that write into one residual stream share one T. No label is read and nothing is trained.

What keeps a network's function: T of a linear space (values of attention), permutations everywhere, and the orthogonal
T of a residual stream that norms read. T does not commute with an activation function, so where that stands in between
the mapped network is an approximation, the better the closer the spaces are. The averaged statistics of a BatchNorm
mean nothing: they are estimated anew on the inputs. How T passes a BatchNorm is described in `_align_norms` (the
released code does it otherwise: folds=False), transformers in `_align_transformer`.

Source: Horoi, Camacho, Belilovsky, Wolf, "Harmony in Diversity: Merging Neural Networks with Canonical Correlation
Analysis", arXiv 2407.05385. Headline claim: ResNet20 x8 of two seeds on CIFAR-100: direct average about 14 %,
permutation 72.9 %, CCA Merge 75.1 % (base 78.8 %), and with more models it loses less than permutations do. The ridge
here is relative, g = gamma times the mean variance of A's features, and chosen by agreement with the ensemble; the
paper's is absolute and chosen by labels. Left out: ZipIt!, and maps of queries and keys within heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core.errors import Refused, UnknownName, UsageError
from brickyard.core.forwards import evaluating
from brickyard.core.method import Claim, Record
from brickyard.merge._align import (
    Covariances,
    Map,
    average,
    by_heads,
    cca,
    identity,
    permute,
    procrustes,
    ridged,
)
from brickyard.merge._align_measure import batches_of, measured, output_of
from brickyard.merge._align_points import Layout, Names, Point, by_name, discover
from brickyard.merge._align_weights import weight_matching

if TYPE_CHECKING:
    from brickyard.merge._engine import Piece

RECORD = Record(
    name="cca-merge",
    family="merge",
    title="Independently trained networks, aligned by canonical correlations and averaged",
    paper="arXiv 2407.05385",
    ancestry="independent",
    presets={"released": {"gamma": 1.0, "relative": False}},
    claims=(
        Claim(
            text="Two perceptrons of width 32: CCA is at least 5 points above the permutation and at most 4 below the "
            "single networks.",
            measure="of_digits",
            part="width 32",
            data="embedded:digits",
            base="",
            seeds=5,
        ),
        Claim(
            text="Two perceptrons of width 128: CCA is at least 1 point above the permutation and at most 1 below the "
            "single networks.",
            measure="of_digits",
            part="width 128",
            data="embedded:digits",
            base="",
            seeds=5,
        ),
        Claim(
            text="From 2 to 5 networks of width 32, CCA loses less than the permutation.",
            measure="of_digits",
            part="more networks",
            data="embedded:digits",
            base="",
            seeds=5,
        ),
        Claim(
            text="Two small convolutional networks with BatchNorm: CCA is at least 1 point above the permutation and "
            "at most 4 below the single networks, statistics estimated anew.",
            measure="of_images",
            data="mnist",
            base="",
            seeds=2,
            epochs=5,
            train_rows=6000,
            full={"seeds": 5, "train_rows": 0},
        ),
    ),
)

METHODS = ("cca", "permute", "weight-matching", "orthogonal", "identity")
GRID = (1.0, 0.1, 0.01, 0.001)  # of gamma, scanned by "auto"
GAMMA = 0.1  # where no outputs can be compared
KIN = 0.5  # |theta_B - theta_A| / |theta_A| of weights below which two networks share an ancestor; strangers have 1.4


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of CCA Merge."""

    method: str = "cca"
    """cca, permute, weight-matching, orthogonal, or identity (the plain average)"""
    gamma: float | str = "auto"
    """the ridge, in mean variances of the reference's features; auto: of 1, 0.1, 0.01, 0.001 what agrees most with the
    ensemble"""
    relative: bool = True
    """false: gamma is the ridge itself, as in the paper"""
    residual: str = "auto"
    """of transformers: orthogonal, permute or identity; auto: orthogonal where all layers read the stream by a norm"""
    rows: int = 512
    """training rows (of a language model, blocks of text) on which features are compared, drawn evenly; 0: all"""

    def __post_init__(self) -> None:
        assert_method(self.method, self.gamma)
        if self.residual not in ("auto", "orthogonal", "permute", "identity"):
            raise UnknownName.among("residual map", self.residual, ("auto", "orthogonal", "permute", "identity"))
        if self.rows < 0:
            raise UsageError(f"cca-merge: rows={self.rows}; expected 0 (all) or more.")


@dataclass(frozen=True)
class Diagnosis:
    """What was found at one point for one model (1, 2, ...: the reference is 0).

    map: the kind of map in use; width n; samples m; dead: features that never change, of the reference and the model;
    condition: of T; correlations: canonical ones (of a permutation: of the matched pairs), descending.
    """

    point: str
    model: int
    map: str
    width: int
    samples: int
    dead: tuple[int, int]
    condition: float
    correlations: tuple[float, ...]

    def said(self) -> dict[str, Any]:
        """Return it as JSON, the correlations by their mean, largest and smallest."""
        s = self.correlations
        short = {"mean": sum(s) / len(s), "largest": s[0], "smallest": s[-1]} if s else None
        return {**self.__dict__, "dead": list(self.dead), "correlations": short}


@dataclass(frozen=True)
class Alignment:
    """Networks in one network's features: `states` (the reference's own first), and what was found on the way.

    maps: by model after the reference, then by point. gamma: the ridge in use, None where no map has one. agreement:
    of each gamma that "auto" tried, the share of inputs on which its merge answers as the ensemble does.
    """

    states: list[dict[str, Tensor]]
    points: tuple[Point, ...]
    maps: list[dict[str, Map]]
    found: list[Diagnosis]
    method: str
    gamma: float | None = None
    agreement: dict[float, float] = field(default_factory=dict)


def assert_method(method: str, gamma: Any) -> None:
    """Raise UnknownName or UsageError for what is no method or no ridge."""
    if method not in METHODS:
        raise UnknownName.among("alignment", method, METHODS)
    if gamma != "auto" and (isinstance(gamma, str) or not 0 <= gamma < math.inf):
        raise UsageError(f"gamma={gamma!r}; expected auto, or a number of at least 0.")


def align(
    models: Sequence[nn.Module],
    inputs: Any,
    method: str = "cca",
    gamma: float | str = "auto",
    points: Mapping[str, Names] | Layout | None = None,
    *,
    relative: bool = True,
    folds: bool = True,
    force: bool = False,
) -> Alignment:
    """Bring every model after the first into the first one's features.

    Args:
        models: K >= 2 networks of one architecture; they are left as they are. The first is the reference.
        inputs: unlabelled inputs: a tensor [N, ...], or batches that can be gone through several times (a list or a
            DataLoader of tensors or of keyword arguments).
        method: "cca"; "permute" (Hungarian, by correlation); "weight-matching"; "orthogonal" (Procrustes); "identity".
        gamma: the ridge in mean variances of the reference's features (`relative=False`: absolute). "auto" takes the
            one of GRID whose merge answers most often as the ensemble of all models does; outputs are read as logits
            over their last axis, or, where that has one entry, as values.
        points: point -> (producers, consumers), names of modules; None: found by `torch.fx`.
        folds: pass a BatchNorm so that the mapped layer gives T z (`_align_norms`); False: T on its scale and shift, as
            the released code has it.
        force: align although two models look fine-tuned from one another.

    Raises Refused for models of different architectures or of one ancestor, and where the network cannot be traced or
    rewritten; NotFinite naming the point where activations are NaN or infinite. Warns where there are fewer than twice
    as many samples as features. Source: arXiv 2407.05385, section 4.
    """
    assert_method(method, gamma)
    states = [state_of(model) for model in models]
    _assert_fitting(models, states)
    if not force:
        assert_strangers(states)
    batches = batches_of(inputs)
    layout = points if isinstance(points, Layout) else _layout(models[0], points, folds)
    if method == "identity":
        maps = [{p.name: identity(p.width, p.heads) for p in layout.points} for _ in models[1:]]
        return Alignment(states, layout.points, maps, [], method)
    if method == "weight-matching":
        maps = [weight_matching(states[0], state, layout.points) for state in states[1:]]
        return Alignment(_rewritten(layout, states, maps), layout.points, maps, [], method)
    with evaluating(*models), torch.no_grad():
        moments = measured(models, layout.points, batches)
        known = [{p.name: moments[p.name].covariances(k) for p in layout.points} for k in range(1, len(models))]
        ridges = [p for p in layout.points if kind_of(p, method) == "cca"]
        agreement: dict[float, float] = {}
        if gamma == "auto" and ridges and layout.judged:
            judged = _judged(models, states, layout, known, method, relative, batches)
            gamma = max(judged, key=lambda g: (judged[g], g))
            agreement = {g: found[0] for g, found in judged.items()}
    chosen = GAMMA if gamma == "auto" else float(gamma)
    maps = mapped(layout.points, known, method, chosen, relative)
    found = _diagnoses(layout.points, known, maps, method)
    done = _rewritten(layout, states, maps)
    return Alignment(done, layout.points, maps, found, method, chosen if ridges else None, agreement)


def merge(models: Sequence[nn.Module], inputs: Any, **options: Any) -> tuple[nn.Module, Alignment]:
    """Align models, average them, and estimate the averaged network's BatchNorm statistics anew on the inputs.

    Arguments and errors as of `align`. Returns a new network in evaluation mode, and the alignment.
    """
    done = align(models, inputs, **options)
    return merged(models[0], done.states, inputs), done


def merged(like: nn.Module, states: Sequence[dict[str, Tensor]], inputs: Any) -> nn.Module:
    """Return a copy of a network with the mean of aligned states, its BatchNorm statistics estimated on the inputs."""
    out = copy.deepcopy(like)
    out.load_state_dict(average(states))
    recalibrate(out, inputs)
    return out.eval()


@torch.no_grad()
def recalibrate(model: nn.Module, inputs: Any) -> None:
    """Replace the running statistics of the BatchNorms, in place, by the plain average over all batches.

    Only they are in training mode meanwhile: dropout stays off. UsageError where a batch is too small to have spread.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluating(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative average
            norm.train()
        try:
            for batch in batches_of(inputs):
                output_of(model, batch)
        except ValueError as error:
            raise UsageError(
                f"BatchNorm statistics need at least two values a channel in every batch: {error}"
            ) from None
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_strangers(states: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise Refused where a network looks fine-tuned from the first, or both from one ancestor."""
    for k, state in enumerate(states[1:], 1):
        apart = distance(states[0], state)
        if apart < KIN:
            raise Refused(
                f"model {k} looks fine-tuned from the reference, or both from one base: their weights differ by "
                f"{apart:.2f} of their size (networks trained apart: about 1.4). Their features are aligned already; "
                "merge their changes (brickyard merge ties, task-arithmetic, ...), or force it."
            )


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return |theta_B - theta_A| / |theta_A| over all matrices and filters (norms and biases resemble each other)."""
    apart = size = 0.0
    for name, tensor in a.items():
        if tensor.ndim >= 2 and tensor.is_floating_point():
            apart += float((b[name].double() - tensor.double()).square().sum())
            size += float(tensor.double().square().sum())
    return math.sqrt(apart / size) if size else 0.0


def kind_of(point: Point, method: str) -> str:
    """Return the map that a method uses at a point: what it asks for, as far as the point can bear it."""
    if method == "permute" or point.kind == "permute":
        return "permute"
    return "orthogonal" if point.kind == "orthogonal" else method


def mapped(
    points: Sequence[Point], known: Sequence[Mapping[str, Covariances]], method: str, gamma: float, relative: bool
) -> list[dict[str, Map]]:
    """Return the map of every point for every model; `known`: by model after the reference, then by point."""
    out: list[dict[str, Map]] = [{} for _ in known]
    for point in points:
        kind, reference = kind_of(point, method), None
        for maps, by_point in zip(out, known, strict=True):
            found = by_point[point.name]
            if not found.scale > 0:
                raise Refused(
                    f"point {point.name}: none of the reference's {point.width} features changes on these inputs; "
                    "there is nothing to align with. Give other inputs, or another reference."
                )
            ridge = gamma * (found.scale if relative else 1.0)
            if kind == "cca" and not point.heads:
                try:
                    reference = reference or ridged(found.xx, ridge)
                    maps[point.name] = cca(found, reference, ridged(found.yy, ridge))
                except Refused as error:
                    raise Refused(f"point {point.name}, gamma={gamma:g}: {error}") from None
                continue
            make = _maker(kind, ridge, point.keep_mean)
            maps[point.name] = by_heads(found, point.heads, make) if point.heads else make(found)
    return out


def _maker(kind: str, ridge: float, keep_mean: bool) -> Any:
    if kind == "permute":
        return permute
    if kind == "orthogonal":
        return lambda found: procrustes(found, keep_mean=keep_mean)
    return lambda found: cca(found, ridged(found.xx, ridge), ridged(found.yy, ridge))


def _rewritten(
    layout: Layout, states: list[dict[str, Tensor]], maps: Sequence[Mapping[str, Map]]
) -> list[dict[str, Tensor]]:
    others = [layout.rewrite(states[0], state, by_point) for state, by_point in zip(states[1:], maps, strict=True)]
    return [states[0], *others]


def _diagnoses(
    points: Sequence[Point],
    known: Sequence[Mapping[str, Covariances]],
    maps: Sequence[Mapping[str, Map]],
    method: str,
) -> list[Diagnosis]:
    out = []
    for k, (by_point, made) in enumerate(zip(known, maps, strict=True), 1):
        for point in points:
            found, one = by_point[point.name], made[point.name]
            s = () if one.correlations is None else tuple(one.correlations.tolist())
            kind = kind_of(point, method)
            out.append(Diagnosis(point.name, k, kind, point.width, found.samples, found.dead(), one.condition, s))
    return out


def _judged(
    models: Sequence[nn.Module],
    states: list[dict[str, Tensor]],
    layout: Layout,
    known: Sequence[Mapping[str, Covariances]],
    method: str,
    relative: bool,
    batches: Iterable[Any],
) -> dict[float, tuple[float, float]]:
    """Return for every gamma how often its merge answers as the ensemble does, and minus their mean divergence."""
    rivals = {}
    for gamma in GRID:
        maps = mapped(layout.points, known, method, gamma, relative)
        rivals[gamma] = merged(models[0], _rewritten(layout, states, maps), batches)
    totals = {gamma: torch.zeros(3, dtype=torch.float64) for gamma in rivals}
    for batch in batches:
        outputs = [output_of(model, batch).double() for model in models]
        values = outputs[0].shape[-1] == 1
        target = torch.stack(outputs if values else [o.softmax(-1) for o in outputs]).mean(0)
        for gamma, rival in rivals.items():
            out = output_of(rival, batch).double()
            if values:
                apart = (out - target).square()
                same = -apart
            else:
                apart = F.kl_div(out.log_softmax(-1), target, reduction="none").sum(-1)
                same = (out.argmax(-1) == target.argmax(-1)).double()
            totals[gamma] += torch.stack([same.sum(), -apart.sum(), same.new_tensor(same.numel())]).cpu()
    return {gamma: (float(t[0] / t[2]), float(t[1] / t[2])) for gamma, t in totals.items()}


def _assert_fitting(models: Sequence[nn.Module], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise UsageError or Refused where the models are not K >= 2 of one architecture."""
    if len(models) < 2:
        raise UsageError(f"{len(models)} models were given; an alignment needs a reference and at least one other.")
    first = states[0]
    for k, (model, state) in enumerate(zip(models[1:], states[1:], strict=True), 1):
        for name in [*first, *state]:
            shapes = [list(s[name].shape) if name in s else "missing" for s in (first, state)]
            if shapes[0] != shapes[1]:
                raise Refused(
                    f"model {k} has another architecture than the reference: {name} is {shapes[1]}, in the reference "
                    f"{shapes[0]}. Only networks of one architecture and width are aligned."
                )
        for (name, one), other in zip(models[0].named_modules(), model.modules(), strict=False):
            if type(one) is not type(other):
                raise Refused(
                    f"model {k} has another architecture than the reference: {name or 'the network'} is a "
                    f"{type(other).__name__}, in the reference a {type(one).__name__}."
                )


def _layout(model: nn.Module, points: Mapping[str, Names] | None, folds: bool) -> Layout:
    return Layout(tuple(discover(model) if points is None else by_name(model, points)), folds=folds)


@dataclass(frozen=True)
class Share:
    """The average with the reference, as the engine runs it on aligned models; see `_engine.Rule`.

    The engine's base is the reference, so that of T others (theta_A + sum theta') / (T + 1) is the sum of their
    differences from it, times 1 / (T + 1).
    """

    config: Config
    scale: float
    weights: bool = False

    def check(self, models: int) -> None:
        return None

    def survey(self) -> None:
        return None

    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor:
        out = models[0].clone()
        for model_n in models[1:]:
            out += model_n
        return out.div_(len(models) + 1)

    def coefficients(self, models: int) -> None:
        return None


def rule(config: Config) -> Share:
    """Return the average that follows an alignment."""
    return Share(config, 1.0)
