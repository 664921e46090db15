"""What the columns of a source say about its inputs, and whether their values can be used.

Row numbers in messages count from 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from brickyard.core.errors import BadData
from brickyard.core.readers import Source
from brickyard.core.split import Split

EMPTY_LIMIT = 0.01  # of a split's rows; more blank texts (or pairs without a difference) mean a broken column
# The columns of each kind of input, and the task that they pose.
INPUTS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "pair": ("text", "text_pair"),
    "image": ("image",),
    "points": ("points",),
    "completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "choice": ("prompt", "choices"),
    "prompt": ("prompt",),
}
KINDS = {
    "text": "text-classification",
    "pair": "pair-classification",
    "image": "image-classification",
    "points": "point-classification",
    "completion": "instruct",
    "preference": "preference",
    "choice": "multiple-choice",
    "prompt": "instruct",
}
UNLABELLED = ("completion", "preference", "prompt")
_EXPECTED = (
    "text[, text_pair], label; image, label; points, label; prompt, completion; prompt, chosen, rejected; or prompt, "
    "choices, label"
)

_BARE = "; for a language model's documents, which have none, say --task causal-lm"
_ALSO = {  # what public data sets call these columns
    "text": (
        "sentence",
        "sentence1",
        "premise",
        "question1",
        "content",
        "document",
        "review",
        "body",
        "tweet",
        "utterance",
        "question",
    ),
    "text_pair": ("sentence2", "hypothesis", "question2"),
    "image": ("img", "picture", "pixels"),
    "label": ("labels", "target", "class", "category", "intent", "sentiment", "coarse_label"),
    "completion": ("response", "output", "answer"),
    "chosen": ("preferred", "win"),
    "rejected": ("dispreferred", "lose"),
}


def plain(source: Source) -> bool:
    """Whether all splits are of a kind that has no labels: documents for a language model.

    A table with a column `text` alone may as well lack its labels, so there `task="causal-lm"` must be said.
    """
    bare = all(names == ["text"] for names in source.found.values())
    return bare and set(source.formats.values()) <= {"txt", "embedded"}


def whole_files(source: Source) -> None:
    """Make one document of each .txt file, whose lines were read as rows."""
    for split, columns in source.splits.items():
        if source.formats.get(split) == "txt" and columns["text"]:
            columns["text"] = ["\n".join(columns["text"]) + "\n"]


def input_of(source: Source, labelled: bool) -> str:
    """Say what the inputs are, once every split is known to have the same columns; BadData else."""
    first, found = next(iter(source.found.items()), ("", []))
    several = [name for name in ("text", "image", "points") if name in found]
    if len(several) > 1:
        raise BadData(f"split {first!r} has the columns {' and '.join(several)}; expected one kind of input.")
    kind = _kind(set(found), labelled)
    for split, names in source.found.items():
        for wanted in (*INPUTS[kind], *(("label",) if labelled and kind not in UNLABELLED else ())):
            if wanted not in names:
                also = [name for name in _ALSO.get(wanted, ()) if name in names]
                bare = _BARE if wanted == "label" else ""
                near = also or get_close_matches(wanted, names, n=1, cutoff=0.4)
                raise BadData(
                    f"split {split!r} of {source.name} has no column {wanted!r}; found: {', '.join(names) or 'none'}."
                    f"{f' Rename {near[0]!r} to {wanted!r}?' if near else ''} Expected {_EXPECTED}{bare}."
                )
        if kind == "text" and "text_pair" in names:
            raise BadData(f"split {split!r} has a column text_pair, split {first!r} has none; give it to all or none.")
    return kind


def _kind(found: set[str], labelled: bool) -> str:
    if "prompt" in found and not found & {"text", "image", "points"}:
        if "choices" in found or not labelled:
            return "choice" if "choices" in found else "prompt"
        return "preference" if found & {"chosen", "rejected"} else "completion"
    if "points" in found:
        return "points"
    return "image" if "image" in found else "pair" if "text_pair" in found else "text"


def check_inputs(split: str, columns: dict[str, list], wanted: Sequence[str], fewest: int, limit: int) -> int:
    """Stop at what cannot be used; return how many texts are blank, of which a few are kept as they are."""
    rows = len(columns[wanted[0]])
    if rows < fewest:
        raise BadData(f"split {split!r} has {rows or 'no'} row{'s' * (rows != 1)}; expected {fewest} or more.")
    empty = 0
    for name in wanted:
        if name == "choices":
            _check_choices(split, columns[name], limit)
        if name in ("choices", "points"):  # clouds were checked when they became arrays
            continue
        kind, values = (bytes if name == "image" else str), columns[name]
        absent = [row for row, value in enumerate(values, 1) if _missing(value)]
        blank = [row for row, value in enumerate(values, 1) if isinstance(value, str) and not value.strip()]
        if absent or len(blank) > EMPTY_LIMIT * rows:
            rows_shown = shown(sorted(absent + blank))
            raise BadData(f"split {split!r}: the column {name!r} is empty in {rows_shown}. Remove or fill them.")
        empty += len(blank)
        for row, value in enumerate(values, 1):
            if not isinstance(value, kind):
                expected = "text" if kind is str else "the bytes of an image file"
                raise BadData(f"split {split!r}, row {row}: {name!r} is {type(value).__name__}; expected {expected}.")
            _check_size(split, row, name, value, limit)
    return empty


def _missing(value: Any) -> bool:
    nan = isinstance(value, float) and value != value
    return value is None or nan or (isinstance(value, bytes) and not value)


def _check_size(split: str, row: int, name: str, value: str | bytes, limit: int) -> None:
    # A character has four bytes at most, so only suspects are encoded.
    if isinstance(value, str) and len(value) * 4 > limit and (size := _bytes(value)) > limit:
        raise BadData(
            f"split {split!r}, row {row}: {name!r} has {size:,} bytes, above the limit of {limit:,} for one "
            "row. Split it into shorter rows."
        )


def _check_choices(split: str, values: list, limit: int) -> None:
    for row, value in enumerate(values, 1):
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v.strip() for v in value):
            raise BadData(
                f"split {split!r}, row {row}: 'choices' is {value!r:.80}; expected a list of two or more texts."
            )
        if len(set(value)) < len(value):
            raise BadData(f"split {split!r}, row {row}: two of the choices are the same text; make them differ.")
        for text in value:
            _check_size(split, row, "choices", text, limit)


def undecided(split: str, columns: dict[str, list]) -> int:
    """Return how many pairs have the same text as chosen and as rejected; BadData above a few, which teach nothing."""
    same = [row for row, (a, b) in enumerate(zip(columns["chosen"], columns["rejected"], strict=True), 1) if a == b]
    if len(same) > EMPTY_LIMIT * len(columns["chosen"]):
        raise BadData(
            f"split {split!r}: chosen and rejected are the same text in {shown(same)}; such pairs prefer nothing. "
            "Remove them."
        )
    return len(same)


def chosen_of(raw: dict[str, list], splits: dict[str, dict[str, list]]) -> dict[str, list[int]]:
    """Return the labels of multiple-choice rows, the place of the right choice counted from 0; BadData else."""
    for split, values in raw.items():
        for row, (value, choices) in enumerate(zip(values, splits[split]["choices"], strict=True), 1):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
                raise BadData(
                    f"split {split!r}, row {row}: the label is {value!r:.80}; expected the place of the right one of "
                    f"{len(choices)} choices, counted from 0."
                )
    return raw


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def keys(split: str, columns: dict[str, list], wanted: Sequence[str]) -> list[bytes]:
    """Return sha256 over the exact bytes of each row's inputs, each with its length in front."""
    found: list[bytes] = []
    for row, values in enumerate(zip(*(columns[name] for name in wanted), strict=True), 1):
        digest = hashlib.sha256()
        for name, value in zip(wanted, values, strict=True):
            for item in value if isinstance(value, list) else (value,):
                try:
                    part = item.encode() if isinstance(item, str) else bytes(item)
                except UnicodeEncodeError as error:
                    raise BadData(
                        f"split {split!r}, row {row}: {name!r} holds half of a surrogate pair at character "
                        f"{error.start}, which is no valid Unicode text. Write the data again as UTF-8."
                    ) from error
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        found.append(digest.digest())
    return found


def shown(rows: Sequence[int]) -> str:
    """Name the first few of some rows."""
    first = ", ".join(map(str, rows[:5]))
    return f"row{'s' * (len(rows) > 1)} {first}{f' and {len(rows) - 5} more' if len(rows) > 5 else ''}"


def largest(rows: Split, wanted: Sequence[str]) -> int:
    """Return the bytes of the largest row's inputs."""
    columns = [[_value_bytes(v) for v in rows[name]] for name in wanted]
    return max(map(sum, zip(*columns, strict=True)))


def _value_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return _bytes(value) if isinstance(value, str) else memoryview(value).nbytes
