"""`embedded:docstring-choice`: which of four summaries belongs to a function (multiple choice).

The three wrong ones are those of other functions of the same file that are nearest in length; their order depends on
the prompt alone. Prompts and splits are those of `embedded:docstrings`.
"""

from __future__ import annotations

from pathlib import Path

from brickyard.embedded._functions import draw, functions, neighbours

CHOICES = 4


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"prompt": [...], "choices": [[...]], "label": [...]}}.

    Args:
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: the interpreter comes without its library's sources.
    """
    out = {}
    for split, rows in functions("docstring-choice", library).items():
        columns: dict[str, list] = {"prompt": [], "choices": [], "label": []}
        for own, others in neighbours(rows, CHOICES - 1):
            place = draw(own.prompt + own.summary, CHOICES)
            choices = [other.summary for other in others]
            choices.insert(place, own.summary)
            for values, value in zip(columns.values(), (own.prompt, choices, place), strict=True):
                values.append(value)
        out[split] = columns
    return out
