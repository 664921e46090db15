"""Weight matching: permutations that bring a network's weights, not its activations, close to the reference's.

    maximise sum_l <W_l^A, P_l W_l^B P_{l-1}'>     one space at a time, the others held, until nothing changes

Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", arXiv 2209.04836, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from brickyard.core.errors import Refused
from brickyard.merge._align import Map, assigned, identity, permutation
from brickyard.merge._align_points import Point, rewritten

_ROUNDS = 100  # it ends by itself after a few; every round makes the sum larger


def weight_matching(
    reference: Mapping[str, Tensor], state: Mapping[str, Tensor], points: Sequence[Point]
) -> dict[str, Map]:
    """Return a permutation for every point. Spaces are taken in their order (the paper draws it anew each round)."""
    if any(point.heads for point in points):
        raise Refused("weight-matching moves single features, which would tear heads of attention apart; use permute.")
    maps = {point.name: identity(point.width) for point in points}
    for _ in range(_ROUNDS):
        changed = False
        for point in points:
            worth_nn = _worth(reference, state, point)
            order = assigned(worth_nn)
            gain = worth_nn[torch.arange(point.width), order].sum() - worth_nn.diagonal().sum()
            if float(gain) > 1e-9 * float(worth_nn.abs().max()):
                step = permutation(order)
                state = rewritten(state, [point], {point.name: step})
                maps[point.name] = maps[point.name].then(step)
                changed = True
        if not changed:
            break
    return maps


def _worth(reference: Mapping[str, Tensor], state: Mapping[str, Tensor], point: Point) -> Tensor:
    """Return the inner products of every pair of features over all weights that touch them: [n, n]."""
    worth = torch.zeros(point.width, point.width, dtype=torch.float64)
    for use in point.uses:
        if use.tensor.endswith(("running_mean", "running_var")):
            continue  # statistics of data, not weights
        a, b = (s[use.tensor].double().movedim(use.axis, 0).reshape(point.width, -1).cpu() for s in (reference, state))
        worth += a @ b.T
    return worth
