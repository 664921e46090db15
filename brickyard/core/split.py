"""The rows of one split, and cutting a validation split from train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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


def places(
    rows: int,
    labels: Sequence[int] | None,
    names: Sequence[str] | None,
    *,
    train_rows: int,
    shots: int,
    seed: int,
) -> np.ndarray:
    """Return which of train's rows train, rising: `train_rows` at random, the same for all seeds, or `shots` a class.

    0: all of them. Raises as `assert_shots`.
    """
    if shots:
        assert_shots(labels, names, shots, train_rows)
        return support(labels or (), names or (), shots, seed)
    if not 0 < train_rows < rows:
        return np.arange(rows)
    return np.sort(np.random.Generator(np.random.PCG64(0)).permutation(rows)[:train_rows])


def drawn(
    splits: Mapping[str, Split], names: Sequence[str] | None, *, train_rows: int, shots: int, seed: int
) -> tuple[dict[str, Split], np.ndarray]:
    """Return the splits with the rows of train that train, and their places; see `places`.

    With `shots` validation keeps at most so many rows of each class too: who has few labels has few for choosing.
    """
    kept, index = dict(splits), np.empty(0, dtype=np.int64)
    if "train" in kept:
        train = kept["train"]
        index = places(len(train), train.columns.get("label"), names, train_rows=train_rows, shots=shots, seed=seed)
        kept["train"] = train if len(index) == len(train) else train.take(index)
    if shots and "validation" in kept:
        few = support(kept["validation"]["label"], names or (), shots, seed, all_of_few=True)
        kept["validation"] = kept["validation"].take(few)
    return kept, index


def units(keys: Sequence[bytes], groups: Sequence[str] | None) -> list[int]:
    """Return a number for each row: rows of one input, or of one group (speaker, article), belong together."""
    _, input_N = np.unique(np.asarray(keys, dtype=object), return_inverse=True)
    if groups is None:
        return input_N.tolist()
    _, group_N = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    count = int(input_N.max()) + 1
    size = count + int(group_N.max()) + 1
    edges = coo_array((np.ones(len(input_N)), (input_N, count + group_N)), shape=(size, size))
    return connected_components(edges, directed=False)[1][input_N].tolist()


def cut_rows(
    splits: dict[str, Split], keys: Sequence[bytes], classes: list[int] | None, groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """Move 10 % of the distinct inputs of train, with all their copies, to a new validation split.

    keys, classes, groups: of train's rows. With groups it is 10 % of these, and no group is on both sides. Each class
    gives its share (largest remainders) and keeps at least one input. The order of the rows stays.
    """
    strata: dict[int, list[int]] = {}
    first: dict[int, int] = {}
    unit_of = units(keys, groups)
    for row, key in enumerate(unit_of):
        if first.setdefault(key, row) == row:
            strata.setdefault(0 if classes is None else classes[row], []).append(row)
    draw = np.random.Generator(np.random.PCG64(0))
    quota = {c: VALIDATION_SHARE * len(rows) for c, rows in sorted(strata.items()) if len(rows) > 1}
    taken = {c: int(share) for c, share in quota.items()}
    wanted = max(1, round(VALIDATION_SHARE * len(first)))
    for c in sorted(quota, key=lambda c: (taken[c] - quota[c], c))[: wanted - sum(taken.values())]:
        taken[c] += 1
    if not sum(taken.values()):
        named = "rows" if groups is None else "groups"
        raise BadData(
            f"train's {len(first)} distinct {named} are too few to cut a validation split from"
            f"{'' if quota else ', for no class has two of them'}; add rows, or a validation file beside train."
        )
    chosen: set[int] = set()
    for c, rows in sorted(strata.items()):
        chosen.update(unit_of[rows[i]] for i in draw.permutation(len(rows))[: taken.get(c, 0)])
    moved = np.array([key in chosen for key in unit_of])
    if groups is not None and classes is not None:
        gone = set(classes) - set(np.asarray(classes)[~moved].tolist())
        if gone:
            raise BadData(
                f"cutting a validation split by group would leave train without {len(gone)} of its classes, whose rows "
                "are in few groups; add a validation file beside train, or leave the column group out."
            )
    splits["validation"] = splits["train"].take(np.flatnonzero(moved))
    splits["train"] = splits["train"].take(np.flatnonzero(~moved))
    return {
        "split": "validation",
        "from": "train",
        "rows": int(moved.sum()),
        "share": VALIDATION_SHARE,
        "seed": 0,
        "stratified": classes is not None,
        "by_group": groups is not None,
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
