"""The mathematics of aligning one network's features with another's: maps between two feature spaces from covariances.

    z_A ~ T z_B        a map T [n, n] and its inverse, from S_xx = X'X / m, S_yy = Y'Y / m, S_xy = X'Y / m

Shapes: m samples, n features, K models, H heads of width d. X [m, n] are the reference's activations, Y [m, n] those
of the model that is mapped, their columns centred. Everything here is float64 and knows no module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from brickyard.core.errors import NotFinite, Refused, UsageError


@dataclass(frozen=True)
class Map:
    """A map of features: z_A ~ forward @ z_B, with the inverse in closed form; both [n, n] float64.

    `correlations` [n], descending, where the map was found from them; `order` [H]: the mapped model's head that takes
    the place of each of the reference's, where the space is made of heads.
    """

    forward: Tensor
    inverse: Tensor
    correlations: Tensor | None = None
    order: Tensor | None = None

    @property
    def condition(self) -> float:
        """The condition number of `forward`: by how much it can stretch noise."""
        return float(torch.linalg.cond(self.forward))

    @property
    def permutes(self) -> bool:
        """Whether it only changes the order of features."""
        return bool(((self.forward == 0) | (self.forward == 1)).all())

    def then(self, second: Map) -> Map:
        """Return this map followed by another."""
        return Map(second.forward @ self.forward, self.inverse @ second.inverse)


@dataclass(frozen=True)
class Covariances:
    """What is known of one pair of feature spaces: [n, n] each, float64, without any ridge; m samples."""

    xx: Tensor
    xy: Tensor
    yy: Tensor
    samples: int

    @property
    def width(self) -> int:
        return len(self.xx)

    @property
    def scale(self) -> float:
        """The mean variance of the reference's features."""
        return float(self.xx.diagonal().mean())

    def dead(self) -> tuple[int, int]:
        """Return how many features of each side never change."""
        return int((self.xx.diagonal() <= 0).sum()), int((self.yy.diagonal() <= 0).sum())


@dataclass
class Moments:
    """Running sums for one feature space of K models, of which the first is the reference.

    Only 2K - 1 blocks of n x n are kept: every model's own, and the reference's with each of the others. Samples are
    shifted by the first batch's mean, so that large means cost no digits.
    """

    models: int
    samples: int = 0
    _shift: list[Tensor] = field(default_factory=list)
    _sum: list[Tensor] = field(default_factory=list)
    _own: list[Tensor] = field(default_factory=list)
    _with: list[Tensor] = field(default_factory=list)  # [i]: the reference with model i; [0] is not used

    def add(self, model: int, x_mn: Tensor, reference_mn: Tensor | None = None) -> Tensor:
        """Add a batch of one model's features and return them as they were counted, shifted, for the other models.

        x_mn: [m, n]; models come in their order within a batch. reference_mn: what the call for model 0 returned.
        """
        # Float64 products on a GPU are many times slower; there the shift keeps float32 exact enough.
        dtype = torch.float32 if x_mn.is_cuda else torch.float64
        if len(self._shift) == model:
            n = x_mn.shape[1]
            self._shift.append(x_mn.to(dtype).mean(0))
            self._sum.append(torch.zeros(n, dtype=torch.float64))
            self._own.append(torch.zeros(n, n, dtype=torch.float64))
            self._with.append(torch.zeros(n, n, dtype=torch.float64))
        x_mn = (x_mn - self._shift[model]).to(dtype)  # float32 less float64 is float64, in one pass
        self._sum[model] += x_mn.sum(0, dtype=torch.float64).cpu()
        _add_product(self._own[model], x_mn, x_mn)
        if model == 0:
            self.samples += len(x_mn)
        else:
            assert reference_mn is not None
            _add_product(self._with[model], reference_mn, x_mn)
        return x_mn

    def covariances(self, model: int) -> Covariances:
        """Return the covariances of the reference and a model."""
        m = self.samples
        mean_x, mean_y = self._sum[0] / m, self._sum[model] / m
        xx = self._own[0] / m - mean_x.outer(mean_x)
        yy = self._own[model] / m - mean_y.outer(mean_y)
        xy = self._with[model] / m - mean_x.outer(mean_y)
        return Covariances(_settled(xx), xy, _settled(yy), m)


def _add_product(total_nn: Tensor, x_mn: Tensor, y_mn: Tensor) -> None:
    """Add X'Y to a float64 sum that lies in main memory."""
    if x_mn.dtype == total_nn.dtype and not x_mn.is_cuda:
        total_nn.addmm_(x_mn.T, y_mn)
    else:
        total_nn += (x_mn.T @ y_mn).double().cpu()


def _settled(s_nn: Tensor) -> Tensor:
    """Make a covariance exactly symmetric, and the rounding left of a constant feature's variance exactly zero."""
    s_nn = (s_nn + s_nn.T) / 2
    alive = s_nn.diagonal() > 1e-14 * s_nn.diagonal().max()
    return s_nn * alive * alive[:, None]


def roots(s_nn: Tensor) -> tuple[Tensor, Tensor]:
    """Return S^{1/2} and S^{-1/2} of a symmetric positive definite matrix; Refused where it is singular."""
    values, vectors = torch.linalg.eigh(s_nn)
    if not float(values[0]) > len(values) * torch.finfo(s_nn.dtype).eps * float(values[-1]):
        raise Refused(
            f"a covariance of {len(values)} features is singular (dead features, or too few samples) and gamma is too "
            "small to mend it; give a larger gamma."
        )
    root = values.sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def polar(c_nn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthogonal factor U V' of C = U diag(s) V', and s.

    Where C has no full rank, U V' is not unique on its null spaces; of all choices the one nearest to the identity is
    taken, so that a network is mapped to itself by the identity even where it has dead features.
    """
    u, s, vh = torch.linalg.svd(c_nn)
    rank = int((s > len(s) * torch.finfo(s.dtype).eps * float(s[0])).sum()) if float(s[0]) > 0 else 0
    if rank == len(s):
        return u @ vh, s
    null_u, null_v = u[:, rank:], vh[rank:]
    a, _, b = torch.linalg.svd(null_u.T @ null_v.T)
    return u[:, :rank] @ vh[:rank] + null_u @ (a @ b) @ null_v, s


def cca(found: Covariances, x_roots: tuple[Tensor, Tensor], y_roots: tuple[Tensor, Tensor]) -> Map:
    """Return the map by canonical correlations.

        T = S_xx^{1/2} U V' S_yy^{-1/2}      U diag(s) V' = S_xx^{-1/2} S_xy S_yy^{-1/2}, S_xx and S_yy with the ridge

    x_roots, y_roots: `roots` of S_xx and S_yy, the ridge added; those of the reference serve for all models. Source:
    arXiv 2407.05385, section 4.
    """
    (root_x, inverse_x), (root_y, inverse_y) = x_roots, y_roots
    turned, s = polar(inverse_x @ found.xy @ inverse_y)
    return Map(root_x @ turned @ inverse_y, root_y @ turned.T @ inverse_x, s)


def ridged(s_nn: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return `roots` of S + ridge I; Refused where that is singular."""
    return roots(s_nn + ridge * torch.eye(len(s_nn), dtype=s_nn.dtype))


def correlations(found: Covariances) -> Tensor:
    """Return the plain correlations of every pair of features: [n, n]; 0 with a dead one."""
    x, y = found.xx.diagonal().clamp(min=0).sqrt(), found.yy.diagonal().clamp(min=0).sqrt()
    size = x.outer(y)
    return torch.where(size > 0, found.xy / size.where(size > 0, torch.ones_like(size)), torch.zeros_like(size))


def assigned(worth_nn: Tensor) -> Tensor:
    """Return for every row the column that the best one-to-one assignment gives it: [n]."""
    if not bool(worth_nn.isfinite().all()):
        raise NotFinite("the similarities of features hold NaN or infinity; nothing can be assigned.")
    return torch.from_numpy(linear_sum_assignment(worth_nn.numpy(), maximize=True)[1])


def permutation(order_n: Tensor, worth_nn: Tensor | None = None) -> Map:
    """Return the map that puts the mapped model's feature `order_n[i]` at place i."""
    forward = torch.eye(len(order_n), dtype=torch.float64)[order_n]
    s = None if worth_nn is None else worth_nn.gather(1, order_n[:, None])[:, 0].sort(descending=True).values
    return Map(forward, forward.T.contiguous(), s)


def permute(found: Covariances) -> Map:
    """Return the permutation with the largest sum of correlations (the Hungarian method)."""
    worth = correlations(found)
    return permutation(assigned(worth), worth)


def procrustes(found: Covariances, *, keep_mean: bool = False) -> Map:
    """Return the orthogonal T that minimises |X - Y T'|; with `keep_mean` among those that keep T 1 = 1.

    Such a T commutes with what LayerNorm does before its gain: it keeps lengths and the mean over features.
    """
    c_nn = found.xy
    if keep_mean:
        n = found.width
        mean = torch.full((n, n), 1 / n, dtype=torch.float64)
        away = torch.eye(n, dtype=torch.float64) - mean
        c_nn = away @ c_nn @ away
        # The direction of ones is put in by hand, of a size with the others, so that it is mapped to itself.
        c_nn = c_nn + max(float(torch.linalg.matrix_norm(c_nn, 2)), 1.0) * mean
    turned, _ = polar(c_nn)
    return Map(turned, turned.T.contiguous())


def by_heads(found: Covariances, heads: int, make: Callable[[Covariances], Map]) -> Map:
    """Return a map that pairs heads and maps features within each pair only, by what `make` gives for a pair.

    Heads are paired by the largest sum of the correlations of their features, once mapped.
    """
    d = found.width // heads
    at = [slice(a * d, (a + 1) * d) for a in range(heads)]

    def pair(a: int, b: int) -> Covariances:
        i, j = at[a], at[b]
        return Covariances(found.xx[i, i], found.xy[i, j], found.yy[j, j], found.samples)

    maps = [[make(pair(a, b)) for b in range(heads)] for a in range(heads)]
    worth = torch.tensor([[closeness(pair(a, b), maps[a][b]) for b in range(heads)] for a in range(heads)]).double()
    order = assigned(worth)
    forward, inverse = torch.zeros_like(found.xx), torch.zeros_like(found.xx)
    known = []
    for a, b in enumerate(order.tolist()):
        forward[at[a], at[b]] = maps[a][b].forward
        inverse[at[b], at[a]] = maps[a][b].inverse
        known.append(maps[a][b].correlations)
    s = [c for c in known if c is not None]
    return Map(forward, inverse, torch.cat(s).sort(descending=True).values if s else None, order)


def closeness(found: Covariances, made: Map) -> float:
    """Return the sum of the canonical or matched correlations; of another map, tr(T S_yx) over the total spreads."""
    if made.correlations is not None:
        return float(made.correlations.sum())
    size = float(found.xx.trace() * found.yy.trace()) ** 0.5
    return float((made.forward * found.xy).sum()) / size if size > 0 else 0.0


def identity(width: int, heads: int = 0) -> Map:
    """Return the map that changes nothing, of a space made of so many heads."""
    eye = torch.eye(width, dtype=torch.float64)
    return Map(eye, eye.clone(), None, torch.arange(heads) if heads else None)


def moved(tensor: Tensor, found: Map, *, axis: int, inward: bool, block: int = 1) -> Tensor:
    """Return a tensor rewritten for mapped features along one of its axes, in its own dtype.

    tensor: a producer's weight, bias, ... (T acts from the left), or with `inward` a consumer's weight (T^{-1} acts
    from the right). axis: of the features, each of which stands for `block` neighbouring entries (after a flatten).
    """
    n = len(found.forward)
    by_feature = tensor.double().movedim(axis, 0)
    if len(by_feature) != n * block:
        raise UsageError(f"an axis of {len(by_feature)} entries is no space of {n} features of {block} entries each.")
    shape = by_feature.shape
    flat = (found.inverse.T if inward else found.forward).to(tensor.device) @ by_feature.reshape(n, -1)
    return flat.reshape(shape).movedim(0, axis).to(tensor.dtype).contiguous()


def repeated(found: Map, times: int) -> Map:
    """Return the map of a space in which every head of `order` stands for `times` neighbouring ones, each mapped alike.

    That is how grouped queries share a head of values: [H d] -> [H times d].
    """
    assert found.order is not None
    heads = len(found.order)
    d = len(found.forward) // heads
    eye = torch.eye(times, dtype=torch.float64)

    def spread(t_nn: Tensor) -> Tensor:
        out = torch.einsum("aibj,rs->aribsj", t_nn.reshape(heads, d, heads, d), eye)
        return out.reshape(heads * times * d, -1)

    return Map(spread(found.forward), spread(found.inverse), found.correlations, found.order)


def heads_only(found: Map) -> Map:
    """Return the part of a map over heads that moves whole heads and nothing inside them."""
    assert found.order is not None
    d = len(found.forward) // len(found.order)
    places = found.order[:, None] * d + torch.arange(d)
    moves = permutation(places.flatten())
    return Map(moves.forward, moves.inverse, None, found.order)


def average(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of aligned states, summed in float64; what is no floating-point number is the first one's."""
    out = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            out[name] = first.clone()
            continue
        total = first.double()
        for state in states[1:]:
            total = total + state[name].double()
        out[name] = (total / len(states)).to(first.dtype)
    return out
