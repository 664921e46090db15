"""The rows behind a merge that reads data: which input is at home on which task, and what it may read there.

Every input gets the unlabelled train rows of one task and reads them through that task's head; which one belongs to
which is found as for the table of scores (`merging.scores`). No test row and no label is handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brickyard.core.errors import Refused, UsageError
from brickyard.merge._engine import Merge, Rule
from brickyard.merge._from_data import Expert, OfData, Stage
from brickyard.merge._inputs import PIECE, Files, whole
from brickyard.merging.scores import Column, overwrite, shared

if TYPE_CHECKING:
    from brickyard.merging.inputs import Ground, Input


def made_of_data(
    waiting: OfData,
    plan: Merge,
    ground: Ground,
    inputs: Sequence[Input],
    columns: Sequence[Column],
    *,
    arm: str,
    device: str | None = None,
) -> tuple[Rule, dict[str, Any]]:
    """Run a method of data; return the rule that it made, and what it read and found for the report.

    The report is {"device", "tasks": [{"input", "data", "fingerprint", "head", "train_rows", "rows"}], ...}. Raises
    UsageError where not every input has a task of its own, Refused for tasks that the method cannot read.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    owned = {column.owner: column for column in columns}
    if len(columns) != len(inputs) or len(owned) != len(inputs):
        raise UsageError(
            f"{arm} reads the unlabelled train rows of every input's own task: {len(inputs)} inputs and "
            f"{len(columns)} data sets were given, which belong to {len(owned)} of them. Give one --data for each of "
            "the --bricks, in their order."
        )
    experts = []
    for index, given in enumerate(inputs):
        column = owned[index]
        if column.task.kind not in waiting.kinds:
            raise Refused(
                f"{arm} works on {', '.join(waiting.kinds)}; the task of {column.data.name} is {column.task.kind}."
            )
        assert column.train is not None
        overwrite(column.model, ground, given.source)
        model, names = column.model.to(place).eval(), set(plan.changed)
        tensors = {name: tensor for name, tensor in shared(model, ground).items() if name in names}
        bounds = _bounds(ground.opened.processor) if column.task.reads == "image" else None
        experts.append(Expert(given.label, model, tensors, column.task, column.train, column.data.name, bounds))
    rule = waiting.from_data(Stage(experts, lambda: _base(plan, ground, place)))
    about: dict[str, Any] = dict(getattr(rule, "about", {}))
    rows = about.pop("rows")
    tasks = [
        {
            "input": expert.label,
            "data": expert.data,
            "fingerprint": owned[i].data.fingerprint,
            "head": owned[i].head,
            "train_rows": len(expert.rows),
            "rows": rows[i],
        }
        for i, expert in enumerate(experts)
    ]
    return rule, {"device": place.type, "tasks": tasks, **about}


def _bounds(processor: Any) -> tuple[Tensor, Tensor]:
    """Return what a processor makes of black and of white pixels: [C, 1, 1] each."""
    ends = [Image.new("RGB", (32, 32), (level,) * 3) for level in (0, 255)]
    low, high = torch.from_numpy(np.asarray(processor(images=ends, return_tensors="np")["pixel_values"])).float()
    return low.amin((1, 2), keepdim=True), high.amax((1, 2), keepdim=True)


def _base(plan: Merge, ground: Ground, place: torch.device) -> dict[str, Tensor]:
    files, raw = Files(), torch.empty(8 * PIECE, dtype=torch.uint8)
    try:
        return {name: whole(files, ground.stored, None, name, raw).to(place) for name in plan.changed}
    finally:
        files.close()
