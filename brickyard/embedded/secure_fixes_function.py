"""`embedded:secure-fixes-function`: the fixed code of made-up fixes, the functions they change (see `_weaknesses`)."""

from __future__ import annotations

from brickyard.embedded._fixed import fixed


def splits() -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"text": [fixed code]}}."""
    return fixed("function")
