"""The rows of one split, and cutting a validation split from train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brickyard.core.errors import BadData, UsageError

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """The rows of one split, column by column.

    Attributes:
        columns: "text" (and "text_pair") as str, "image" as encoded bytes or "points" as float32 arrays [points, 3];
            "label" as class index (int) or float.
    """

    columns: dict[str, list]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list:
        return self.columns[name]

    def take(self, index: Iterable[int]) -> Split:
        """Return the rows at `index`, in its order."""
        index = [int(i) for i in index]
        return Split({name: [values[i] for i in index] for name, values in self.columns.items()})


def support(
    labels: Sequence[int] | np.ndarray, names: Sequence[str], shots: int, seed: int, *, all_of_few: bool = False
) -> np.ndarray:
    """Return the places, rising, of `shots` rows of each of the classes `names`, drawn from `seed`.

    Raises BadData where a class has fewer rows; with `all_of_few` such a class gives all that it has.
    """
    labels_N = np.asarray(labels)
    draw = np.random.Generator(np.random.PCG64([seed, shots]))
    chosen = []
    for value, name in enumerate(names):
        rows = draw.permutation(np.flatnonzero(labels_N == value))
        if len(rows) < shots and not all_of_few:
            raise BadData(f"class {name!r} has {len(rows)} rows in train; {shots} of each were asked for (--shots).")
        chosen.append(rows[:shots])
    return np.sort(np.concatenate(chosen))


def assert_shots(
    labels: Sequence[int] | np.ndarray | None, names: Sequence[str] | None, shots: int, train_rows: int
) -> None:
    """Raise UsageError or BadData where so many rows of each class cannot be drawn from rows of these labels."""
    if labels is None or names is None:
        raise UsageError("--shots counts rows of each class; this task has no classes.")
    if train_rows:
        raise UsageError("--shots and --train-rows both say how many rows train; give one.")
    support(labels, names, shots, 0)


def cut_rows(splits: dict[str, Split], keys: dict[str, list[bytes]], classes: list[int] | None) -> dict[str, Any]:
    """Move 10 % of the distinct inputs of train, with all their copies, to a new validation split.

    Each class gives its share (largest remainders) and keeps at least one input. The order of the rows stays.
    """
    strata: dict[int, list[int]] = {}
    first: dict[bytes, int] = {}
    for row, key in enumerate(keys["train"]):
        if first.setdefault(key, row) == row:
            strata.setdefault(0 if classes is None else classes[row], []).append(row)
    draw = np.random.Generator(np.random.PCG64(0))
    quota = {c: VALIDATION_SHARE * len(rows) for c, rows in sorted(strata.items()) if len(rows) > 1}
    taken = {c: int(share) for c, share in quota.items()}
    wanted = max(1, round(VALIDATION_SHARE * len(first)))
    for c in sorted(quota, key=lambda c: (taken[c] - quota[c], c))[: wanted - sum(taken.values())]:
        taken[c] += 1
    if not sum(taken.values()):
        raise BadData(
            f"train's {len(first)} distinct rows are too few to cut a validation split from"
            f"{'' if quota else ', for no class has two of them'}; add rows, or a validation file beside train."
        )
    chosen: set[bytes] = set()
    for c, rows in sorted(strata.items()):
        chosen.update(keys["train"][rows[i]] for i in draw.permutation(len(rows))[: taken.get(c, 0)])
    moved = np.array([key in chosen for key in keys["train"]])
    splits["validation"] = splits["train"].take(np.flatnonzero(moved))
    splits["train"] = splits["train"].take(np.flatnonzero(~moved))
    return {
        "split": "validation",
        "from": "train",
        "rows": int(moved.sum()),
        "share": VALIDATION_SHARE,
        "seed": 0,
        "stratified": classes is not None,
    }


def cut_ends(splits: dict[str, Split]) -> dict[str, Any]:
    """Move the last tenth of each of a few documents of train to a new validation split, cut at a line break."""
    heads, tails = [], []
    for text in splits["train"]["text"]:
        place = text.rfind("\n", 0, int((1 - VALIDATION_SHARE) * len(text))) + 1
        if not text[:place].strip() or not text[place:].strip():
            raise BadData(
                "train is too short, or has too few lines, to cut a validation split from; add a validation file."
            )
        heads.append(text[:place])
        tails.append(text[place:])
    splits["train"], splits["validation"] = Split({"text": heads}), Split({"text": tails})
    return {
        "split": "validation",
        "from": "the end of each document of train",
        "rows": len(tails),
        "share": VALIDATION_SHARE,
        "seed": 0,
        "stratified": False,
    }
