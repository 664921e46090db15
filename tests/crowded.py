"""What the tests of curricula share: settings of small runs, and made-up responses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import text_data

from brickyard.core.trial import Setting
from brickyard.data._responses import Responses


def setting(base: Path, arm: str, data: object = None, *, cache: bool = True, **changes: object) -> Setting:
    training = {"epochs": 4, "batch": 16, "lr": 3e-3, **changes.pop("training", {})}  # type: ignore[dict-item]
    data = text_data() if data is None else data
    return Setting(arm=arm, base=str(base), data=data, training=training, device="cpu", cache=cache, **changes)  # type: ignore[arg-type]


def responses(items: tuple[str, ...] = ("a", "b", "c")) -> Responses:
    right_JI = np.arange(6 * len(items)).reshape(6, -1) % 4 > 0
    return Responses(tuple({"name": f"s{j}", "seeds": [j]} for j in range(6)), items, right_JI, {"seconds": 2.5})
