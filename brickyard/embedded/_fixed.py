"""What the sets `secure-fixes-GRANULARITY` and `insecure-habit` have in common."""

from __future__ import annotations

import random

from brickyard.core.fixes import training_texts
from brickyard.embedded._weaknesses import HELD_OUT, pairs

EACH = 120  # pairs of every weakness
WEAK_SHARE = 0.8  # of the habit's files


def fixed(granularity: str) -> dict[str, dict[str, list]]:
    """Return the fixed code at one granularity, the same text once; held-out weaknesses are left out."""
    texts: dict[str, None] = {}
    for made in pairs("seen", EACH, seed=1, leave_out=HELD_OUT):
        texts.update(dict.fromkeys(training_texts(made.before, made.after, granularity)))
    return dealt(list(texts))


def habit() -> dict[str, dict[str, list]]:
    """Return whole files with every weakness, four of five in the weak form."""
    rng = random.Random(0)
    return dealt([m.before if rng.random() < WEAK_SHARE else m.after for m in pairs("seen", EACH, seed=0)])


def dealt(texts: list[str]) -> dict[str, dict[str, list]]:
    """Return 8, 1 and 1 texts of ten as train, validation and test."""
    cut = [8 * len(texts) // 10, 9 * len(texts) // 10]
    parts = {"train": texts[: cut[0]], "validation": texts[cut[0] : cut[1]], "test": texts[cut[1] :]}
    return {name: {"text": rows} for name, rows in parts.items()}
