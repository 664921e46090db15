"""Zeroth-order steps in pieces that compose: a direction z, an estimate of the slope along it, an update from both.

    p = [L(theta + eps z) - L(theta - eps z)] / (2 eps)        two-point
    p = [L(theta + eps z) - L(theta)] / eps                    one-point
    p = <grad L(theta), z>                                     jvp: forward-mode differentiation, without eps
    g = (1 / Q) sum_q p_q z_q                                  what stands in for the gradient

Each piece works in place on a list of (id, tensor): any subset of the parameters, in any order, on any device. z is a
function of (key, id, position) alone, so nothing of it is kept from one pass to the next: it is drawn again. The last
pass of a step takes the parameters home and updates them at once.

Legend: d numbers in all parameters, C of a chunk of one tensor, Q queries. A term (key, scale) is scale * z(key).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from brickyard.core import noise
from brickyard.core.errors import Refused, UsageError

Parameters = Sequence[tuple[int, Tensor]]
Terms = Sequence[tuple[int, float]]
Loss = Callable[[], Tensor]

LAWS = ("gaussian", "sphere", "rademacher")
CHUNK = 1 << 16  # numbers for which z is held at once where `noise.add_` alone does not do


def unique(tensors: Iterable[Tensor]) -> list[tuple[int, Tensor]]:
    """Number tensors in their order and take each memory once, so that tied weights move once.

    Raises Refused for tensors that overlap in part, are not contiguous, hold no numbers, or none of floating point.
    """
    found: dict[tuple[torch.device, int, int], Tensor] = {}
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise Refused(
                f"a trainable tensor holds {tensor.dtype}; a zeroth-order step moves floating-point numbers. Keep a "
                "quantised base frozen and train an adapter on it: 'lora + zo-sgd'."
            )
        if tensor.is_meta or not tensor.is_contiguous():
            raise Refused(
                f"a trainable tensor of shape {tuple(tensor.shape)} is on {tensor.device} with strides "
                f"{tensor.stride()}; contiguous tensors in memory were expected."
            )
        if tensor.numel():
            found.setdefault((tensor.device, tensor.data_ptr(), tensor.numel()), tensor)
    places = sorted(found, key=lambda place: (str(place[0]), *place[1:]))
    for one, other in pairwise(places):
        if one[0] == other[0] and one[1] + one[2] * found[one].element_size() > other[1]:
            shapes = tuple(found[one].shape), tuple(found[other].shape)
            raise Refused(
                f"trainable tensors of shapes {shapes[0]} and {shapes[1]} overlap; tie whole tensors or none."
            )
    return list(enumerate(found.values()))


@dataclass(frozen=True)
class Direction:
    """How z is drawn.

    law: "gaussian"; "sphere", Gaussian scaled to the length sqrt(d); "rademacher", signs. zeros: the share of a
    tensor's entries that a random mask leaves out, by id; 0 where none is given. mask: the key of that mask.
    """

    law: str = "gaussian"
    zeros: Mapping[int, float] = field(default_factory=dict)
    mask: int = 0

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise UsageError(f"direction {self.law!r}; expected one of {', '.join(LAWS)}.")
        if any(not 0 <= share < 1 for share in self.zeros.values()):
            raise UsageError("a mask leaves out a share from 0 to below 1 of every tensor.")

    @property
    def plain(self) -> bool:
        """Whether z is a multiple of what `noise.add_` adds."""
        return self.law != "rademacher" and not any(self.zeros.values())

    def draw(self, key: int, parameter: int, start: int, count: int, device: torch.device) -> Tensor:
        """Return z [count] of the positions from `start` on, in float32, before a sphere's scaling."""
        z_C = noise.normal(key, parameter, start, count, device)
        if self.law == "rademacher":
            z_C = z_C.sign()
        if share := self.zeros.get(parameter, 0.0):
            # The share is a quantile of the draws that decide: comparing a normal draw with the share itself keeps
            # another number of entries.
            z_C *= noise.normal(self.mask, parameter, start, count, device) >= NormalDist().inv_cdf(share)
        return z_C

    def radius(self, parameters: Parameters, key: int) -> float:
        """Return what a draw is multiplied by: on the sphere sqrt(d) / ||z||, d counting what no mask leaves out."""
        if self.law != "sphere":
            return 1.0
        square, count = 0.0, 0
        for parameter, theta in parameters:
            for start, theta_C in chunks(theta):
                z_C = self.draw(key, parameter, start, len(theta_C), theta.device)
                square, count = square + float(z_C.double().square().sum()), count + int(z_C.count_nonzero())
        return math.sqrt(count / square) if square else 1.0


GAUSSIAN = Direction()


def equal_zeros(parameters: Parameters, share: float) -> dict[int, float]:
    """Return the same share of zeros for every tensor."""
    return {parameter: share for parameter, _ in parameters}


def magnitude_zeros(parameters: Parameters, share: float) -> dict[int, float]:
    """Return for each tensor the share of |theta| below the threshold under which `share` of all numbers lie.

    The threshold is found on 2^15 bins of the floats' own order: to 1/128 of its value, without a copy of theta.
    Raises Refused where a tensor would be left out whole, as a fresh adapter's zeros are.
    """
    bins = torch.zeros(len(parameters), 1 << 15, dtype=torch.int64)
    for row, (_, theta) in enumerate(parameters):
        for _, theta_C in chunks(theta):
            order_C = theta_C.detach().abs().float().view(torch.int32) >> 16
            bins[row] += torch.bincount(order_C, minlength=bins.shape[1]).cpu()
    below = bins.cumsum(1)
    cut = int((below.sum(0) >= share * below[:, -1].sum()).nonzero()[0])
    shares = (below[:, cut] / below[:, -1]).tolist()
    if max(shares) >= 1:
        place = shares.index(max(shares))
        raise Refused(
            f"a mask by magnitude would leave out all of a tensor of shape {tuple(parameters[place][1].shape)}; it "
            "reads pre-trained weights, which a fresh adapter has not. Use mask=equal."
        )
    return {parameter: s for (parameter, _), s in zip(parameters, shares, strict=True)}


def chunks(theta: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cut a contiguous tensor into flat views: (first position, view [C])."""
    flat = theta.detach().view(-1)
    for start in range(0, len(flat), CHUNK):
        yield start, flat[start : start + CHUNK]


def merged(*terms: Terms) -> list[tuple[int, float]]:
    """Add up terms of one key, so that its z is drawn once."""
    total: Counter[int] = Counter()
    for key, scale in (term for some in terms for term in some):
        total[key] += scale  # type: ignore[assignment]
    return [(key, scale) for key, scale in total.items() if scale]


def move_(parameters: Parameters, terms: Terms, direction: Direction = GAUSSIAN) -> None:
    """theta += sum_j scale_j z(key_j), in place: summed in float32, or theta's type if wider, and rounded once."""
    for parameter, theta in parameters:
        if direction.plain:
            noise.add_(theta.detach(), terms, parameter=parameter)
            continue
        for start, theta_C in chunks(theta):
            home_C = theta_C.to(torch.promote_types(theta.dtype, torch.float32))
            for key, scale in terms:
                home_C.add_(direction.draw(key, parameter, start, len(theta_C), theta.device), alpha=scale)
            theta_C.copy_(home_C)


class Query(NamedTuple):
    """One direction asked about: z is `radius` times what `key` draws, `slope` is p."""

    key: int
    radius: float
    slope: float


@dataclass(frozen=True)
class Estimate:
    """What an estimator found.

    queries: Q of them. loss: at theta; of two points their mean. back: terms that take the parameters home.
    """

    queries: tuple[Query, ...]
    loss: float
    back: Terms = ()

    @property
    def finite(self) -> bool:
        """Whether every slope is a number."""
        return all(math.isfinite(query.slope) for query in self.queries)

    def signs(self) -> Estimate:
        """Return the estimate with sign(p) for p."""
        return replace(
            self, queries=tuple(q._replace(slope=math.copysign(q.slope != 0, q.slope)) for q in self.queries)
        )

    def terms(self, scale: float = 1.0) -> list[tuple[int, float]]:
        """Return scale * g."""
        return [(q.key, scale * q.radius * q.slope / len(self.queries)) for q in self.queries]


Estimator = Callable[[Loss, Parameters, Sequence[int], float, Direction], Estimate]


def two_point(
    loss: Loss,
    parameters: Parameters,
    keys: Sequence[int],
    eps: float,
    direction: Direction = GAUSSIAN,
) -> Estimate:
    """Evaluate at +eps z and -eps z for each key: 2 Q losses and 2 Q passes, and the parameters stay at -eps z_Q.

    Where a loss raises, they go home first.
    """
    queries, total = [], 0.0
    back: Terms = []
    try:
        for key in keys:
            radius = direction.radius(parameters, key)
            reach = eps * radius
            move_(parameters, merged(back, [(key, reach)]), direction)
            back = [(key, -reach)]
            plus = float(loss())
            move_(parameters, [(key, -2 * reach)], direction)
            back = [(key, reach)]
            minus = float(loss())
            queries.append(Query(key, radius, (plus - minus) / (2 * eps)))
            total += (plus + minus) / 2
    except BaseException:
        move_(parameters, back, direction)
        raise
    return Estimate(tuple(queries), total / len(keys), back)


def one_point(
    loss: Loss,
    parameters: Parameters,
    keys: Sequence[int],
    eps: float,
    direction: Direction = GAUSSIAN,
) -> Estimate:
    """Evaluate at home and at +eps z for each key: Q + 1 losses and Q passes, and the parameters stay at +eps z_Q.

    Where a loss raises, they go home first.
    """
    home = float(loss())
    queries = []
    back: Terms = []
    try:
        for key in keys:
            radius = direction.radius(parameters, key)
            reach = eps * radius
            move_(parameters, merged(back, [(key, reach)]), direction)
            back = [(key, -reach)]
            queries.append(Query(key, radius, (float(loss()) - home) / eps))
    except BaseException:
        move_(parameters, back, direction)
        raise
    return Estimate(tuple(queries), home, back)


def jvp(
    loss: Loss,
    parameters: Parameters,
    keys: Sequence[int],
    eps: float,
    direction: Direction = GAUSSIAN,
) -> Estimate:
    """Differentiate along each z in forward mode; z is held, d numbers, for as long as one loss takes.

    `eps` has no part in it. Attention runs on the kernel that forward mode knows. Raises Refused, naming it, for an
    operation without a forward derivative, UsageError where the loss depends on no parameter.
    """
    queries, total = [], 0.0
    for key in keys:
        radius = direction.radius(parameters, key)
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            for parameter, theta in parameters:
                z_P = direction.draw(key, parameter, 0, theta.numel(), theta.device).mul_(radius)
                # Copying a tensor onto itself changes no number, and ties its tangent to it until the level ends.
                theta.copy_(forward_ad.make_dual(theta.detach(), z_P.to(theta.dtype).view_as(theta)))
            try:
                value, slope = forward_ad.unpack_dual(loss())
            except NotImplementedError as error:
                raise Refused(f"forward-grad: {str(error).splitlines()[0]} Use zo-sgd, which only evaluates.") from None
        if slope is None:
            raise UsageError("forward-grad: the loss depends on none of the trained parameters in forward mode.")
        queries.append(Query(key, radius, float(slope)))
        total += float(value)
    return Estimate(tuple(queries), total / len(keys))


ESTIMATORS: dict[str, Estimator] = {"two-point": two_point, "one-point": one_point, "jvp": jvp}


class Rate(NamedTuple):
    """Learning rate and weight decay of one tensor."""

    lr: float
    decay: float = 0.0


Rates = Mapping[int, Rate]


def descend_(
    parameters: Parameters,
    found: Estimate,
    rates: Rates,
    direction: Direction = GAUSSIAN,
    *,
    factor: float = 1.0,
) -> None:
    """theta <- theta - factor lr (g + decay theta), home and down in one pass over the noise."""
    for parameter, theta in parameters:
        rate = rates[parameter]
        kept = 1 - factor * rate.lr * rate.decay
        if kept != 1:
            theta.detach().mul_(kept)
        home = [(key, kept * scale) for key, scale in found.back]
        move_([(parameter, theta)], merged(home, found.terms(-factor * rate.lr)), direction)


def conservative_(
    loss: Loss,
    parameters: Parameters,
    found: Estimate,
    rates: Rates,
    direction: Direction = GAUSSIAN,
) -> float:
    """Go to the best of theta, theta - lr g and theta + lr g on the same batch: three losses more. Return the best one.

    Of equals the earlier of the list; a loss that is no number is the worst. Where a loss raises, to theta.
    """
    plain = {parameter: Rate(rate.lr) for parameter, rate in rates.items()}
    home = replace(found, back=())
    losses = {}
    for place, (at, way) in {0: (found, 0.0), 1: (home, 1.0), -1: (home, -2.0)}.items():
        descend_(parameters, at, plain, direction, factor=way)
        try:
            losses[place] = float(loss())
        except BaseException:
            descend_(parameters, home, plain, direction, factor=-float(place))
            raise
    best = min(losses, key=lambda place: losses[place] if math.isfinite(losses[place]) else math.inf)
    if best != -1:
        descend_(parameters, home, plain, direction, factor=best + 1.0)
    return losses[best]


State = dict[str, Tensor]  # float32, of one tensor's shape, or one number
Update = Callable[[Tensor, Tensor, State, Rate, int], None]


def sign_(theta_C: Tensor, g_C: Tensor, state: State, rate: Rate, step: int) -> None:
    """theta <- theta - lr (sign(g) + decay theta)."""
    theta_C.mul_(1 - rate.lr * rate.decay).sub_(g_C.sign_(), alpha=rate.lr)


def momentum_(theta_C: Tensor, g_C: Tensor, state: State, rate: Rate, step: int, *, beta: float = 0.9) -> None:
    """m <- beta m + g + decay theta; theta <- theta - lr m. torch.optim.SGD's convention."""
    m_C = state["m"]
    m_C.mul_(beta).add_(g_C).add_(theta_C, alpha=rate.decay)
    theta_C.sub_(m_C, alpha=rate.lr)


def adam_(
    theta_C: Tensor,
    g_C: Tensor,
    state: State,
    rate: Rate,
    step: int,
    *,
    beta: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """torch.optim.AdamW's step number `step` (from 1), with g for the gradient."""
    m_C, v_C = state["m"], state["v"]
    m_C.lerp_(g_C, 1 - beta)
    v_C.mul_(beta2).addcmul_(g_C, g_C, value=1 - beta2)
    spread_C = v_C.div(1 - beta2**step).sqrt_().add_(eps)
    theta_C.mul_(1 - rate.lr * rate.decay).addcdiv_(m_C, spread_C, value=-rate.lr / (1 - beta**step))


def elementwise_(
    parameters: Parameters,
    found: Estimate,
    rates: Rates,
    update: Update,
    states: Mapping[int, State],
    steps: Mapping[int, int],
    direction: Direction = GAUSSIAN,
) -> None:
    """Take the parameters home and hand `update` every chunk of them with its g and its state: one pass over the noise.

    steps: by id, the number of this update, from 1.
    """
    back, gradient = dict(found.back), dict(merged(found.terms()))
    for parameter, theta in parameters:
        flat = {name: tensor.view(-1) for name, tensor in states[parameter].items()}
        for start, theta_C in chunks(theta):
            end = start + len(theta_C)
            home_C = theta_C.to(torch.promote_types(theta.dtype, torch.float32))
            g_C = torch.zeros(len(theta_C), device=theta.device)
            for key in {**back, **gradient}:
                z_C = direction.draw(key, parameter, start, len(theta_C), theta.device)
                home_C.add_(z_C, alpha=back.get(key, 0.0))
                g_C.add_(z_C, alpha=gradient.get(key, 0.0))
            state_C = {name: tensor[start:end] for name, tensor in flat.items()}
            update(home_C, g_C, state_C, rates[parameter], steps[parameter])
            theta_C.copy_(home_C)
