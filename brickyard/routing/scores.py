"""The table behind `brickyard route --data`: each task's test rows under the dense model, its expert and the router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brickyard.core.data import Data
from brickyard.core.progress import tell
from brickyard.core.task import Task, task_of
from brickyard.merging.inputs import Ground, Input, open_ground
from brickyard.merging.scores import overwrite
from brickyard.route._routed_model import load_routed
from brickyard.routing.routed import judge, texts_of


@dataclass
class Course:
    """One task on its way into a routed folder: its rows, and its head as tensors with what rebuilds it."""

    label: str
    data: Data
    task: Task
    head: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def score(
    ground: Ground,
    inputs: Sequence[Input],
    folder: Path,
    courses: Sequence[Course],
    *,
    device: str | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Score the test rows of every task under four choices of weights; heads are each task's own.

    Returns {"tasks": [{"data", "metric", "examples", "routed_right", "blended"}], "rows": [{"model", "scores":
    [{"mean", "low", "high"}]}]}. Rows: the dense model alone; the task's whole expert; its sparse expert (an oracle
    router); the learned router.
    """
    model = load_routed(folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plain = open_ground(str(folder))
    about, cells = [], {name: [] for name in ("dense alone", "its whole expert", "oracle router", "learned router")}
    for number, (given, course) in enumerate(zip(inputs, courses, strict=True)):
        if "test" not in course.data.splits:
            continue
        texts = texts_of(course.data.splits["test"])
        tell(f"{course.data.name}: scoring {len(texts):,} test rows four times ...")
        routes = model.route(texts)
        w_NT = np.zeros_like(routes.w_NT)
        one_NT = w_NT.copy()
        one_NT[:, number] = 1.0
        # The data's own order of labels, and the metric that was asked for.
        asked = replace(task_of(course.data), metric=course.task.metric)
        heads = [course.label] if course.head else []
        for name, chosen in (("dense alone", w_NT), ("oracle router", one_NT), ("learned router", routes.w_NT)):
            found = judge(model, course.data, asked, routes, chosen, heads=heads, max_length=max_length)
            cells[name].append(found.score())
        whole = model.backbone if model.language is None else model.language  # an output layer may be the expert's own
        overwrite(whole, ground, given.source)
        found = judge(model, course.data, asked, routes, w_NT, heads=heads, max_length=max_length)
        cells["its whole expert"].append(found.score())
        overwrite(whole, plain, None)
        right = float((routes.best_N == number).mean())
        about.append(
            {
                "task": course.label,
                "data": course.data.name,
                "metric": asked.metric,
                "examples": len(texts),
                "routed_right": right,
                "blended": float(routes.blended_N.mean()),
            }
        )
    return {"tasks": about, "rows": [{"model": name, "scores": found} for name, found in cells.items()]}
