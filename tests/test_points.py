"""Point clouds as data: columns of every format, clouds that cannot be used, and the generated shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from brickyard.core.data import read_data
from brickyard.core.errors import BadData
from brickyard.core.points import encode_points
from brickyard.embedded import shapes


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([[0.0, 1.0, float("nan")], [1.0, 2.0, 3.0]], r"row 2: point 1 is .*nan.*finite"),
        ([[1e39, 0.0, 0.0], [1.0, 2.0, 3.0]], r"row 2: point 1 is \[1e\+39.*finite float32"),
        ([[1.0, 2.0, 3.0]], r"row 2: all 1 points are \[1\.0, 2\.0, 3\.0\]; a cloud needs an extent"),
        ([[1.0, 2.0, 3.0]] * 2, r"row 2: all 2 points"),
        ([[1.0, 2.0], [3.0, 4.0]], r"row 2: 'points' is .*expected a list of \[x, y, z\]"),
        ([[1.0, 2.0, 3.0], [3.0, 4.0]], r"row 2: 'points' is"),
        ([["1", "2", "3"], ["4", "5", "6"]], r"row 2: 'points' is"),
        (None, r"row 2: 'points' is 'None'"),
        ([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], r"row 2 has 3 points, row 1 has 2; sample all"),
    ],
)
def test_bad_clouds_are_named(row: Any, said: str) -> None:
    good = [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]
    columns = {"points": [good, row, good], "label": ["a", "b", "a"]}
    with pytest.raises(BadData, match=rf"split 'test', {said}"):
        read_data({"test": columns}, need=("test",))


def test_bad_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="columns text and points; expected one kind of input"):
        read_data({"test": {"points": [1], "text": ["a"], "label": ["x"]}}, need=("test",))
    pq.write_table(pa.table({"points": [[1.0, 2.0]], "label": ["a"]}), tmp_path / "test.parquet")
    with pytest.raises(
        BadData, match=r"column 'points' of test\.parquet holds list<.*>; expected lists of \[x, y, z\]"
    ):
        read_data(str(tmp_path), need=("test",))
    (tmp_path / "test.parquet").unlink()
    (tmp_path / "test.csv").write_text("points,label\n1,a\n", encoding="utf-8")
    with pytest.raises(BadData, match="column points, whose lists a csv cannot hold"):
        read_data(str(tmp_path), need=("test",))
    big = {"test": {"points": [np.random.rand(400, 3)] * 3, "label": ["a", "b", "a"]}}
    with pytest.raises(BadData, match="row 1: 400 points take 4,800 bytes, above 1,000; sample fewer"):
        read_data(big, need=("test",), row_limit=1000)


def test_rows_keep_their_numbers_when_some_are_taken() -> None:
    points = [np.random.default_rng(i).random((5, 3), dtype=np.float32) for i in range(6)]
    rows = encode_points(points, torch.arange(6), labelled=True)
    batch = rows.take([4, 1, 5]).collate([2, 0])
    assert batch["rows"].tolist() == [5, 4] == batch["labels"].tolist()
    np.testing.assert_array_equal(batch["points"].numpy(), np.stack([points[5], points[4]]))
    assert rows.digest != rows.take([1, 0, 2, 3, 4, 5]).digest


def test_shapes_are_equally_many_distinct_and_in_the_unit_ball() -> None:
    data = read_data("embedded:shapes")
    assert data.kind == "point-classification" and data.labels == shapes.FAMILIES
    assert data.report["rows"] == shapes.ROWS and data.report["overlap"]["test_in_train"] == 0
    assert set(data.report["classes"]["train"].values()) == {shapes.ROWS["train"] // len(shapes.FAMILIES)}
    points = np.stack(data.splits["test"]["points"])
    assert points.shape == (600, 512, 3) and points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1).max(1), 1, atol=1e-5)
    np.testing.assert_allclose(points.mean(1), 0, atol=1e-5)
    again = shapes.draw(20, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(again, shapes.draw(20, seed=4), strict=True))
    with pytest.raises(ValueError, match="out of range"):
        shapes.draw(0, seed=0)


def test_surfaces_are_sampled_by_area() -> None:
    """Without noise and occlusion: even over a box's faces, a cone's height by its width, inside of a torus less."""
    rng = np.random.default_rng(0)
    area, sample = shapes._box(rng, 1.0, 2.0, 3.0)
    points = sample(30000)
    assert area == 22
    on_top = np.isclose(np.abs(points[:, 2]), 1.5).mean()
    np.testing.assert_allclose(on_top, 4 / 22, atol=0.01)
    area, sample = shapes._cone(rng, 1.0, 0.0, 1.0, bottom=False)
    np.testing.assert_allclose(area, np.pi * np.sqrt(2))
    np.testing.assert_allclose((sample(30000)[:, 2] < -0.25).mean(), 1 - 0.75**2, atol=0.01)
    area, sample = shapes._torus(rng, 1.0, 0.5)
    points = sample(30000)
    np.testing.assert_allclose(area, 2 * np.pi**2)
    inner = (np.hypot(points[:, 0], points[:, 1]) < 1).mean()
    np.testing.assert_allclose(inner, 0.5 - 0.5 / np.pi, atol=0.01)
    cut, _ = shapes.draw(10, seed=0, noise=0.0, occlusion=0.0)
    assert np.linalg.norm(cut, axis=-1).max() <= 1 + 1e-6
