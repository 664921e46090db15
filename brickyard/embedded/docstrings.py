"""`embedded:docstrings`: write the summary of a standard-library function from its signature (instruction tuning).

A prompt is the `def` line with the opening of the docstring, the completion its first paragraph on one line. A
function's split is that of its file in `embedded:python-source`.
"""

from __future__ import annotations

from pathlib import Path

from brickyard.embedded._functions import functions


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"prompt": [...], "completion": [...]}}.

    Args:
        library: folder of the standard library's sources; by default the running interpreter's own.

    Raises:
        BadData: the interpreter comes without its library's sources.
    """
    return {
        split: {"prompt": [f.prompt for f in rows], "completion": [f.summary for f in rows]}
        for split, rows in functions("docstrings", library).items()
    }
