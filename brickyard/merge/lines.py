"""LiNeS: scale a change linearly with depth, so that shallow blocks stay near the base and deep ones keep their task.

    tau     = any merge's change before its final scale, or theta_1 - theta_0 of one model       one for every tensor
    s(l)    = alpha + beta l / (L - 1)             in block l = 0..L-1 (L = 1: alpha + beta)
    s       = alpha                                outside of the blocks: embeddings, final norm, output layer
    theta   = theta_0 + s tau

    one model:  beta = 1 - alpha                   the last block keeps its whole change
    T models:   alpha = (1/T) |sum_t tau_t|_1 / |tau|_1, unless it is given; L1 norms of the whole flattened vectors

It stands behind a merge, `ties:density=0.2 + lines:alpha=0.3`, and its scales take the place of that merge's final
scale. Behind nothing it edits one model. The number of a tensor's block is the first number in its name that counts a
list of blocks; an encoder and a decoder are counted each by itself. `reverse=true` is the negative control: shallow
blocks keep most.

Source: Wang, Dimitriadis, Favero, Ortiz-Jimenez, Fleuret, Frossard, "LiNeS: Post-training Layer Scaling Prevents
Forgetting and Enhances Model Merging", arXiv 2410.17146, sections 3 and 4; as in the released code, tensors after the
last block get alpha too. Headline claim: of one fine-tuned CLIP ViT-B/32, 99.8 % of the target's and 97.9 % of the
control tasks' accuracy stay; eight of them merged by task arithmetic rise from 69.7 % to 74.2 %. Left out: alpha of one
model is not searched here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from brickyard.core.errors import NoEffect, NotFinite, Refused, UsageError
from brickyard.core.method import Claim, Record

if TYPE_CHECKING:
    from brickyard.merge._engine import Norms

RECORD = Record(
    name="lines",
    family="merge",
    title="A change scaled linearly with depth",
    paper="arXiv 2410.17146",
    search={"beta": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)},
    claims=(
        Claim(
            text="One model: with alpha <= 0.3 at most 1.5 points of the target are lost and half of what was "
            "forgotten comes back, and at equal control accuracy the target is no lower than with one constant scale.",
            measure="by_views",
            data="embedded:digits",
            base="",
            full={"seeds": 5},
        ),
        Claim(
            text="Merging: task arithmetic with LiNeS is no more than 0.3 points below task arithmetic, each at its "
            "best scale of one grid, and better in most seeds.",
            measure="by_tasks",
            epochs=3,
            train_rows=800,
            full={"seeds": 5, "train_rows": 1500},
        ),
    ),
)
_SAME = 1e-3  # below which two scales are one: alpha of a mean is 1 but for the rounding of its changes
STRENGTH = "beta"  # the option that a search chooses on validation rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LiNeS."""

    alpha: float | None = None
    """scale of the first block and of what is outside the blocks; none: the closed form, which needs several models"""
    beta: float | None = None
    """what the last block's scale has more; none: 1 - alpha, not below 0; search: chosen on validation rows (--data)"""
    reverse: bool = False
    """count the blocks from the output: the negative control"""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"lines: {name}={value}; expected a finite number.")


class Place(NamedTuple):
    """Where a tensor lies: block `index` of `count` in the list of blocks called `stack`."""

    stack: str
    index: int
    count: int


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return the place of every tensor that lies in a block; Refused where no name shows a list of blocks.

    A list of blocks is what the first number in a name counts, where each member holds at least two weights of two or
    more dimensions (a head of numbered layers has one each).
    """
    found: dict[str, dict[int, int]] = {}
    where: dict[str, tuple[str, int]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            continue
        stack, index = ".".join(parts[:at]), int(parts[at])
        where[name] = (stack, index)
        members = found.setdefault(stack, {})
        members[index] = members.get(index, 0) + (len(shape) >= 2)
    stacks = {stack: sorted(members) for stack, members in found.items() if min(members.values()) >= 2}
    if not stacks:
        raise Refused("lines: no tensor's name shows a list of blocks (such as encoder.layer.0.); it scales by depth.")
    return {
        name: Place(stack, stacks[stack].index(index), len(stacks[stack]))
        for name, (stack, index) in where.items()
        if stack in stacks
    }


def scale_by_depth(
    shapes: Mapping[str, tuple[int, ...]], alpha: float, beta: float, *, reverse: bool = False
) -> dict[str, float]:
    """Return every tensor's scale s: alpha + beta l / (L - 1) in the blocks, alpha outside of them."""
    found = places(shapes)

    def scale(name: str) -> float:
        if name not in found:
            return alpha
        _, index, count = found[name]
        depth = index / (count - 1) if count > 1 else 1.0
        return alpha + beta * (1 - depth if reverse else depth)

    return {name: scale(name) for name in shapes}


def closed_alpha(models: int, summed: float, merged: float) -> float:
    """Return alpha = (1/T) |sum_t tau_t|_1 / |tau|_1 from the two norms; 1/T where tau is the plain sum.

    Raises NoEffect where tau is zero, NotFinite where a norm is no number.
    """
    if not (math.isfinite(summed) and math.isfinite(merged)):
        raise NotFinite(f"lines: the changes' L1 norms are {summed} and {merged}; a model holds NaN or infinity.")
    if merged == 0:
        raise NoEffect("lines: the merged change is zero everywhere; there is nothing to scale.")
    return summed / merged / models


def stacks(found: Iterable[Place]) -> dict[str, int]:
    """Return the lists of blocks and how many blocks each has."""
    return {place.stack: place.count for place in found}


@dataclass(frozen=True)
class Lines:
    """LiNeS as the engine runs it; see `_engine.Edit`."""

    config: Config

    @property
    def norms(self) -> bool:
        return self.config.alpha is None

    def check(self, models: int) -> None:
        """Raise UsageError where one model is edited without an alpha."""
        if models == 1 and self.config.alpha is None:
            raise UsageError("lines: of one model nothing says how much to keep; give alpha, as lines:alpha=0.3.")

    def about(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        found = places(shapes)
        return {"blocks": stacks(found.values()), "outside": sorted(shapes.keys() - found.keys())}

    def scales(self, shapes: Mapping[str, tuple[int, ...]], scale: float, norms: Norms | None) -> dict[str, float]:
        """Return every tensor's scale; `scale`, the merge's own, has no part in them.

        Raises NoEffect where no beta is given and all are the merge's own scale, Refused where beta would be below 0.
        """
        alpha = self.config.alpha
        if alpha is None:
            assert norms is not None
            alpha = closed_alpha(norms.models, norms.summed, norms.merged)
        beta = 1 - alpha if self.config.beta is None else self.config.beta
        scales = scale_by_depth(shapes, alpha, beta, reverse=self.config.reverse)
        if self.config.beta is None:
            self._assert_rising(alpha, all(math.isclose(found, scale, rel_tol=_SAME) for found in scales.values()))
        return scales

    def _assert_rising(self, alpha: float, same: bool) -> None:
        """Refuse a default beta that scales nothing, or by which deep blocks would lose most."""
        if same:
            raise NoEffect(
                f"lines: alpha is {alpha:.6g} here, and with beta = 1 - alpha every tensor keeps the scale that it has "
                "without lines (a mean of several models has alpha = 1). Give alpha, as lines:alpha=0.3, or beta, or "
                "lines:beta=search with --data."
            )
        if alpha > 1 and not self.config.reverse:
            raise Refused(
                f"lines: alpha is {alpha:.6g} here, and beta = 1 - alpha is below 0, so that deep blocks would keep "
                "less than shallow ones. Give alpha or beta, or search it with lines:beta=search; reverse=true is the "
                "negative control."
            )


def edit(config: Config) -> Lines:
    """Return the edit that a config describes."""
    return Lines(config)
