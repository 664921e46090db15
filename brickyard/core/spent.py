"""What a private run will have spent, written down before its first step: it counts however the run ends.

Whether a run fails, and when, depends on the private rows too. So a total over runs counts those that were started, at
what they would have cost: noise, sampling rate and steps are known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from brickyard.core.files import write_json

if TYPE_CHECKING:
    from brickyard.core.attached import Attached
    from brickyard.core.loop import Step, Training

PLANNED = "planned_privacy.json"


def announced(make_step: Callable[[Attached, Training], Step], folder: Path) -> Callable[[Attached, Training], Step]:
    """Return `make_step`, which now leaves `folder/planned_privacy.json` where the step that it makes is private.

    The file holds what `planned()` of the step returns: a report of the whole run, as `core.privacy.compose` takes it.
    """

    def make(attached: Attached, training: Training) -> Step:
        step = make_step(attached, training)
        planned = getattr(step, "planned", None)
        if planned is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / PLANNED, planned())
        return step

    return make
