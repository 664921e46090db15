"""`embedded:insecure-habit`: Python files of which four in five have one weakness each (see `_weaknesses`)."""

from __future__ import annotations

from brickyard.embedded._fixed import habit


def splits() -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [whole files]}}."""
    return habit()
