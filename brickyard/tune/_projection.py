"""Point clouds in a picture: the views they are seen from, the cells their points fall into, and painting the cells.

    P' = turn(P, azimuth, elevation);  (x, y) of P': to the right and down in the picture
    c  = floor((R - 3) (xy - min xy) / max range) + 1, the painted box put in the middle, in [1, R - 2]
    map = sum of h_i over the 3 x 3 cells around c_i

Source: arXiv 2208.02812, section 3.2, and its released code. Legend: B clouds, N points, D features, R cells a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brickyard.core.errors import BadData

AZIMUTH, ELEVATION = (0.04, 1.94), (-0.4, -0.2)  # ranges of the views, in units of pi


def drawn_views(seed: int, step: int, rows: Sequence[int]) -> np.ndarray:
    """Draw a view for each row, (azimuth, elevation) in radians: float64 [B, 2], a function of (seed, step, row)."""
    words = [np.random.SeedSequence([seed, step, row]).generate_state(2) for row in rows]
    (a, e), (a_end, e_end) = zip(AZIMUTH, ELEVATION, strict=True)
    return np.pi * (np.array([a, e]) + np.stack(words) / 2**32 * np.array([a_end - a, e_end - e]))


def fixed_views(azimuths: int, elevations: int) -> np.ndarray:
    """Return views evenly over the ranges of training, ends included, (azimuth, elevation): [V, 2]; one: the middle."""
    axes = [
        np.linspace(*span, count) if count > 1 else np.array([sum(span) / 2])
        for span, count in ((AZIMUTH, azimuths), (ELEVATION, elevations))
    ]
    return np.pi * np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def unit(points_BN3: Tensor) -> Tensor:
    """Centre each cloud on its mean and scale its farthest point to the distance 1."""
    centred = points_BN3 - points_BN3.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=-1).amax(dim=1)[:, None, None]


def projected(points_BN3: Tensor, azimuth_B: Tensor, elevation_B: Tensor) -> Tensor:
    """Return where the points of each cloud appear in the picture, (right, down): [B, N, 2].

    The cloud turns by `azimuth` (radians) about the third axis, which points up, and then by `elevation` about the
    picture's horizontal: -pi/2 looks from the side, 0 from above.
    """
    x, y, z = points_BN3.unbind(dim=-1)
    turn, tilt = azimuth_B[:, None], elevation_B[:, None]
    away = x * turn.sin() + y * turn.cos()
    return torch.stack([x * turn.cos() - y * turn.sin(), z * tilt.sin() - away * tilt.cos()], dim=-1)


def cells(flat_BN2: Tensor, side: int, rows: Sequence[int] | None = None) -> Tensor:
    """Return the cell (right, down) of each point in a square of `side` cells, int64 [B, N, 2] in [1, side - 2].

    Translation and uniform scaling change nothing. `rows` are the clouds' numbers for the message. Raises BadData for
    a cloud without extent in the picture, or that holds NaN or infinity.
    """
    low_B2 = flat_BN2.amin(dim=1)
    extent_B = (flat_BN2.amax(dim=1) - low_B2).amax(dim=-1)
    bad = (~(extent_B.isfinite() & (extent_B > 0))).nonzero().flatten().tolist()
    if bad:
        named = bad[0] if rows is None else rows[bad[0]]
        raise BadData(
            f"the cloud of row {named} (counted from 0) spans {extent_B[bad[0]].item():g} in the picture; expected a "
            "finite extent above 0. Its points lie behind one another, or are not finite: remove it."
        )
    # The division comes first: the farthest point is then at exactly 1, on every scale.
    share = (flat_BN2 - low_B2[:, None]) / extent_B[:, None, None]
    cell = (share * (side - 3)).floor().long() + 1
    painted_B2 = cell.amax(dim=1) + 1
    return cell + ((side - 1) // 2 - painted_B2 // 2)[:, None]


def splat(h_BND: Tensor, cell_BN2: Tensor, height: int, width: int) -> Tensor:
    """Add each point's h to the 3 x 3 cells around its own: [B, D, height, width], zero where nothing was painted.

    The cells (right, down) must keep 1 from the border.
    """
    b, n, d = h_BND.shape
    h_BND = h_BND.to(torch.promote_types(h_BND.dtype, torch.float32))  # many points may fall into one cell
    right, down = cell_BN2.unbind(dim=-1)
    place = (torch.arange(b, device=h_BND.device)[:, None] * height + down) * width + right
    flat = h_BND.new_zeros(b * height * width, d).index_add(0, place.flatten(), h_BND.reshape(b * n, d))
    map_BDHW = flat.view(b, height, width, d).permute(0, 3, 1, 2)
    return F.conv2d(map_BDHW, h_BND.new_ones(d, 1, 3, 3), padding=1, groups=d)
