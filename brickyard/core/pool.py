"""The rows that a data step works on, and what it returns: which rows stay, and why each of the others does not.

    step.run(config, pool) -> Outcome

A pool holds the train split alone, and the validation split as the picture of what is wanted. The test split never
reaches a step. Row indices count from 0; row numbers, which a person reads, count from 1.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from brickyard.core import readers
from brickyard.core.data import DOCUMENT_LIMIT, ROW_LIMIT
from brickyard.core.errors import BadData, Refused
from brickyard.core.readers import Source

INPUTS = ("text", "text_pair", "prompt", "completion", "chosen", "rejected")  # in the order in which they are read


@dataclass(frozen=True)
class Pool:
    """Rows that a step may choose from.

    Attributes:
        columns: the train split as read, column by column.
        wanted: the validation split in the same way; empty where there is none.
        domain: name of the column that holds each row's domain; "" where there is none.
        base: the base whose states or losses a step may ask for.
        seed: of everything that is drawn.
        device: where a model runs; None: on a GPU where there is one.
        cache: whether hidden states may be kept on disk.
        numbers: [rows] the number of each row in the file it came from, counted from 1; None: they follow one another.
    """

    columns: dict[str, list]
    wanted: dict[str, list] = field(default_factory=dict)
    domain: str = ""
    base: str = "embedded:minilm"
    seed: int = 0
    device: str | None = None
    cache: bool = True
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    @cached_property
    def texts(self) -> list[str]:
        """What is scored of each row: its input columns, joined by line breaks."""
        return joined(self.columns)

    @cached_property
    def wanted_texts(self) -> list[str]:
        """The same of the validation split."""
        return joined(self.wanted) if self.wanted else []

    @property
    def labels(self) -> list | None:
        """The labels as they stand in the data."""
        return self.columns.get("label")

    @property
    def domains(self) -> list | None:
        """The domain of each row; None where no column names it."""
        return self.columns[self.domain] if self.domain else None

    def take(self, rows: np.ndarray) -> Pool:
        """Return the pool of some of its rows, in their order."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, numbers=self.numbered[rows])

    @property
    def numbered(self) -> np.ndarray:
        """The number of each row in the file it came from, counted from 1: [rows]."""
        return np.arange(1, len(self) + 1) if self.numbers is None else self.numbers

    def folds(self, count: int) -> np.ndarray:
        """Return a fold [rows] for each row by a hash of its text, so that the order of rows does not matter."""
        digests = (hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8).digest() for t in self.texts)
        return np.fromiter((int.from_bytes(d, "little") % count for d in digests), np.int64, len(self))

    def must_have_words(self, step: str) -> None:
        """Raise BadData where a text is blank: nothing can be said about it."""
        blank = [row for row, text in zip(self.numbered, self.texts, strict=True) if not text.strip()]
        if blank:
            raise BadData(
                f"{step}: {len(blank)} texts of train are blank, the first in row {blank[0]}. "
                "Drop them first: brickyard data quality-filter --data ... --out ..."
            )


@dataclass(frozen=True)
class Outcome:
    """What a step decided.

    Attributes:
        rows: the rows that stay, in the order in which they are written; a mixture may name a row several times.
        drops: rule -> {row: what the rule saw}; every row that does not stay stands under exactly one rule.
        scores: name -> [rows of the pool], one number for each.
        report: what else a reader should know, JSON-serialisable.
    """

    rows: np.ndarray
    drops: dict[str, dict[int, str]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def complete(self, size: int) -> bool:
        """Whether every one of `size` rows either stays or stands under exactly one rule."""
        gone = [row for rows in self.drops.values() for row in rows]
        stay = set(self.rows.tolist())
        return len(gone) == len(set(gone)) and stay.isdisjoint(gone) and stay | set(gone) == set(range(size))


def joined(columns: Mapping[str, list]) -> list[str]:
    """Return the input columns of each row, joined by line breaks."""
    given = [columns[name] for name in INPUTS if name in columns]
    return list(given[0]) if len(given) == 1 else ["\n".join(row) for row in zip(*given, strict=True)]


def read_pool(spec: Any, *, text_column: str = "", domain_column: str = "") -> Source:
    """Read all splits of a data set for a step, with the columns named `text` and, as they stand, the rest.

    Args:
        spec: as `readers.read` takes it, or one .parquet, .jsonl, .csv or .txt file, which is the split train.
        text_column: the column that holds the text, where it is not called text.
        domain_column: the column that names each row's domain.

    Raises:
        BadData: no train split, no text column, a missing value, a value that is no valid text, or a row above the
            limit. Refused: images.
    """
    source = readers.read(spec, extra=[name for name in (text_column, domain_column) if name], single=True)
    if "train" not in source.splits:
        raise BadData(f"{source.name} has no train split to choose from; found: {', '.join(source.splits) or 'none'}.")
    for split, columns in source.splits.items():
        found = source.found[split]
        for name in filter(None, (text_column, domain_column if split == "train" else "")):
            if name not in columns:
                raise BadData(f"split {split!r} has no column {name!r}; found: {', '.join(found) or 'none'}.")
        if text_column and text_column != "text":
            if "text" in columns:
                raise BadData(f"split {split!r} has both {text_column!r} and a column 'text'; which is the text?")
            source.splits[split] = {"text" if k == text_column else k: v for k, v in columns.items()}
    for split, columns in source.splits.items():
        if "image" in columns:
            raise Refused("data steps work on text; these are images.")
        if source.names is not None and "label" in columns:
            columns["label"] = [source.names[i] if isinstance(i, int) else i for i in columns["label"]]
        _check(split, columns, source.found[split])
    return source


def _check(split: str, columns: dict[str, list], found: Sequence[str]) -> None:
    inputs = [name for name in INPUTS if name in columns]
    if not inputs:
        raise BadData(
            f"split {split!r} has no column text, or prompt and completion; found: {', '.join(found) or 'none'}. "
            "Name the column that holds the text with --text-column."
        )
    if not columns[inputs[0]]:
        raise BadData(f"split {split!r} has no rows.")
    limit = ROW_LIMIT if "label" in columns else DOCUMENT_LIMIT
    for name in inputs:
        for row, value in enumerate(columns[name], 1):
            if not isinstance(value, str):
                given = "empty" if value is None else type(value).__name__
                raise BadData(f"split {split!r}, row {row}: {name!r} is {given}; expected text.")
            # A character has four bytes at most, so only suspects are encoded.
            if len(value) * 4 > limit and (size := len(value.encode("utf-8", "surrogatepass"))) > limit:
                raise BadData(
                    f"split {split!r}, row {row}: {name!r} has {size:,} bytes, above the limit of {limit:,} for one "
                    "row. Split it into shorter rows."
                )
            if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                raise BadData(
                    f"split {split!r}, row {row}: {name!r} holds half of a surrogate pair, which is no valid Unicode "
                    "text: the data were decoded with the wrong encoding. Write them again as UTF-8."
                )


def shares(values: Sequence[Any], kept: np.ndarray) -> dict[str, dict[str, float]]:
    """Return for each value how many rows have it, how many of them are kept, and the rate."""
    read = Counter(map(str, values))
    stay = Counter(str(values[i]) for i in np.flatnonzero(kept).tolist())
    return {name: {"read": n, "kept": stay[name], "rate": stay[name] / n} for name, n in sorted(read.items())}
