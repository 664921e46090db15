"""Does a language model's student learn more from soft labels than from the text alone, at equal steps?"""

from __future__ import annotations

from typing import Any

from brickyard.checks._takes import takes
from brickyard.checks.pretrained_distillation import language_model
from brickyard.core.method import Claim


@takes("base", "data")
def soft_labels(claim: Claim, **sizes: int) -> dict[str, Any]:
    """Measure F (text) against D (soft labels); see `pretrained_distillation.language_model`."""
    return language_model(claim, wanted=("F > D",), **sizes)
