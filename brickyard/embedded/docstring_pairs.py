"""`embedded:docstring-pairs`: prefer a function's own summary to that of another one (preference pairs).

The rule: chosen is the function's own summary; rejected is, of the other functions of the same file, the summary that
is nearest in length. So neither the subject of the file nor the length tells which is which. Prompts and splits are
those of `embedded:docstrings`.
"""

from __future__ import annotations

from pathlib import Path

from brickyard.embedded._functions import functions, neighbours


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"prompt": [...], "chosen": [...], "rejected": [...]}}.

    Args:
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: the interpreter comes without its library's sources.
    """
    out = {}
    for split, rows in functions("docstring-pairs", library).items():
        pairs = list(neighbours(rows, 1))
        out[split] = {
            "prompt": [own.prompt for own, _ in pairs],
            "chosen": [own.summary for own, _ in pairs],
            "rejected": [other.summary for _, [other] in pairs],
        }
    return out
