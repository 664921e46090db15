"""Small data sets for tests, in memory or as files, and what reading them says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brickyard.core.data import Data, read_data
from brickyard.core.errors import BadData, BrickyardError

Columns = dict[str, list]


def rows(count: int = 20, classes: int = 2, start: int = 0) -> Columns:
    index = range(start, start + count)
    return {"text": [f"row number {i}" for i in index], "label": [f"class {i % classes}" for i in index]}


def three(**changes: Columns) -> dict[str, Columns]:
    return {"train": rows(40), "validation": rows(10, start=100), "test": rows(10, start=200), **changes}


def write(folder: Path, kind: str, splits: dict[str, Columns]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, columns in splits.items():
        path = folder / f"{split}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table(columns), path)
            continue
        lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if kind == "jsonl":
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        else:
            body = [
                ",".join(f'"{value}"' if isinstance(value, str) else str(value) for value in row.values())
                for row in lines
            ]
            path.write_text("\n".join([",".join(columns), *body]) + "\n", encoding="utf-8")
    return folder


def fails(spec: Any, *patterns: str, error: type[BrickyardError] = BadData, **options: Any) -> str:
    """Assert that reading stops with exactly `error`, whose message matches each pattern; return the message."""
    with pytest.raises(error) as caught:
        read_data(spec, **options)
    assert type(caught.value) is error
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} not in {caught.value}"
    return str(caught.value)


def labelled(train: list, test: list | None = None, **options: Any) -> Data:
    texts = [f"t{i}" for i in range(len(train))]
    test = train[: max(2, len(train) // 2)] if test is None else test
    splits = {
        "train": {"text": texts, "label": train},
        "test": {"text": [f"u{i}" for i in range(len(test))], "label": test},
    }
    return read_data({**splits, "validation": {"text": ["v", "w"], "label": train[:2]}}, **options)
