"""Point clouds: the rows of a column `points` as arrays, and batches of them.

Shapes: N rows, P points of a cloud, all of one split as many. Row numbers in messages count from 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadData
from brickyard.core.readers import Source


def as_clouds(source: Source, limit: int) -> None:
    """Make a float32 array [P, 3] of each row's points, in the source itself.

    Raises:
        BadData: a row that is no list of [x, y, z], holds NaN or infinity, holds the same point throughout, has another
            number of points than the first of its split, or takes more than `limit` bytes.
    """
    for split, columns in source.splits.items():
        clouds: list[np.ndarray] = []
        for row, value in enumerate(columns["points"], 1):
            where = f"split {split!r}, row {row}"
            cloud = _cloud(value, where, limit)
            if clouds and len(cloud) != len(clouds[0]):
                raise BadData(
                    f"{where} has {len(cloud)} points, row 1 has {len(clouds[0])}; sample all clouds of a split to one "
                    "number of points."
                )
            clouds.append(cloud)
        columns["points"] = clouds


def _cloud(value: Any, where: str, limit: int) -> np.ndarray:
    try:
        found: np.ndarray = np.asarray(value)
    except ValueError:  # lists of several lengths
        found = np.empty(0)
    if found.ndim != 2 or found.shape[1] != 3 or not len(found) or found.dtype.kind not in "fiu":
        raise BadData(f"{where}: 'points' is {str(value)[:60]!r}; expected a list of [x, y, z] of numbers.")
    with np.errstate(over="ignore"):  # beyond float32 is infinity, and refused as such
        cloud = np.ascontiguousarray(found, dtype=np.float32)
    if cloud.nbytes > limit:
        raise BadData(f"{where}: {len(cloud):,} points take {cloud.nbytes:,} bytes, above {limit:,}; sample fewer.")
    wrong = np.flatnonzero(~np.isfinite(cloud).all(axis=1))
    if len(wrong):
        raise BadData(f"{where}: point {wrong[0] + 1} is {found[wrong[0]].tolist()}; expected finite float32 numbers.")
    if (cloud == cloud[0]).all():
        raise BadData(f"{where}: all {len(cloud)} points are {cloud[0].tolist()}; a cloud needs an extent. Remove it.")
    return cloud


class EncodedPoints(Encoded):
    """Clouds [N, P, 3] in float32; batches hold `points` [n, P, 3] and `rows` [n], their rows in the split from 0.

    By the row's number a model can name a cloud, and draw something for it that does not depend on the other rows of
    the batch.
    """

    def __init__(
        self, points: np.ndarray, rows: np.ndarray, labels: Tensor, *, labelled: bool, report: dict[str, Any]
    ) -> None:
        self.points, self.rows, self.labels = points, rows, labels
        self.labelled, self.report = labelled, report
        self.lengths = np.ones(len(points), dtype=np.int64)

    def _inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {"points": torch.from_numpy(self.points[rows]), "rows": torch.from_numpy(self.rows[rows])}

    def take(self, index: ArrayLike) -> EncodedPoints:
        rows = np.asarray(index, dtype=np.int64)
        labels = self.labels[torch.from_numpy(rows)]
        return EncodedPoints(self.points[rows], self.rows[rows], labels, labelled=self.labelled, report=self.report)

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256(f"points {self.points.shape} ".encode())
        digest.update(self.points.tobytes())
        digest.update(self.rows.tobytes())
        return digest.hexdigest()


def encode_points(clouds: Sequence[np.ndarray], labels: Tensor, labelled: bool) -> EncodedPoints:
    """Put the clouds of a split, [P, 3] each, into one array."""
    points = np.stack(clouds)
    report = {"rows": len(points), "truncated": 0, "longest": 1, "max_length": None, "points": points.shape[1]}
    return EncodedPoints(points, np.arange(len(points)), labels, labelled=labelled, report=report)
