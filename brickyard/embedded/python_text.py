"""`embedded:python-text`: library code that reads and writes text formats (see `_specialities`)."""

from __future__ import annotations

from pathlib import Path

from brickyard.embedded import _specialities


def splits(library: Path | None = None) -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [documents]}}; BadData where the library is incomplete."""
    return _specialities.splits_of("text", library)
