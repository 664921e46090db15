"""The table behind `brickyard merge --data`: the base, every input and the merge, on the test rows of every task.

The models of a row share one backbone's weights; each task has one head, the same in every row: that of the brick that
was tuned for it (`own`), or one fitted on the base's states and frozen (`base`). Under own heads a single input is at
home on its own task only, because no other backbone was trained with that head; under the base's heads all cells can be
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brickyard.core import brick as bricks
from brickyard.core import readers
from brickyard.core.answers import answer
from brickyard.core.base import open_base
from brickyard.core.base_files import ADAPTER
from brickyard.core.batches import encode
from brickyard.core.brick import Brick
from brickyard.core.data import Data, read_data
from brickyard.core.encoded import Encoded
from brickyard.core.errors import Refused, UsageError
from brickyard.core.fitted_head import fit_head
from brickyard.core.names import same_names
from brickyard.core.stats import interval
from brickyard.core.task import Task, task_of
from brickyard.merge._inputs import FLOATS, PIECE, Files, Source, whole
from brickyard.merging_inputs import Ground, Input, open_inputs

MERGE = "the merge"


@dataclass
class Column:
    """One task: its test rows, and a model with the task's head whose backbone is overwritten row by row."""

    data: Data
    task: Task
    rows: Encoded
    model: nn.Module
    head: str

    def about(self) -> dict[str, Any]:
        """Return what the table says of the task."""
        return {
            "data": self.data.name,
            "metric": self.task.metric,
            "head": self.head,
            "examples": len(self.rows),
            "encoding": self.rows.report,
        }


def columns_of(
    ground: Ground,
    inputs: Sequence[Input],
    data: Sequence[Any],
    *,
    heads: str = "own",
    task: str | None = None,
    metric: str | None = None,
    max_length: int | None = None,
) -> list[Column]:
    """Open every task's test rows and its head, so that what is wrong with them is known before anything is merged."""
    return [_column(ground, inputs, i, len(data), spec, heads, task, metric, max_length) for i, spec in enumerate(data)]


def score(
    ground: Ground,
    inputs: Sequence[Input],
    merged: Path,
    columns: Sequence[Column],
    *,
    device: str | None = None,
) -> dict[str, Any]:
    """Score every model on every task.

    Returns {"tasks": [{"data", "metric", "head", "examples"}], "rows": [{"model", "scores": [{"mean", "low", "high"}],
    "mean"}]}; `mean` is over the tasks, where they share a metric.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    (result,) = open_inputs([str(merged)], ground, mixed=True, force=True)
    models: list[tuple[str, Source | None]] = [
        ("the base", None),
        *((given.label, given.source) for given in inputs),
        (MERGE, result.source),
    ]
    same = len({column.task.metric for column in columns}) == 1
    rows = []
    for label, source in models:
        cells = []
        for column in columns:
            overwrite(column.model, ground, source)
            found = answer(column.model.to(place), column.rows, column.task)
            cell = interval(column.rows.labels.numpy(), found.predictions[None], column.task.metric)
            cells.append({"mean": cell.mean, "low": cell.low, "high": cell.high})
        mean = float(np.mean([cell["mean"] for cell in cells])) if same else None
        rows.append({"model": label, "scores": cells, "mean": mean})
    return {"tasks": [column.about() for column in columns], "rows": rows}


@torch.no_grad()
def overwrite(model: nn.Module, ground: Ground, source: Source | None) -> None:
    """Give the backbone of `model`, in place, the weights of a source (None: the base); its head stays as it is."""
    base = ground.stored
    floats = [name for name, (_, info) in base.places.items() if info.dtype in FLOATS and name not in ground.heads]
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    files, raw = Files(), torch.empty(8 * PIECE, dtype=torch.uint8)
    try:
        for name, own in same_names(floats, state).own.items():
            state[own].data.copy_(whole(files, base, source, name, raw))
    finally:
        files.close()


def _column(
    ground: Ground,
    inputs: Sequence[Input],
    index: int,
    count: int,
    spec: Any,
    heads: str,
    kind: str | None,
    metric: str | None,
    max_length: int | None,
) -> Column:
    base = ground.opened
    fitted = heads == "base"
    source = readers.read(spec)
    if kind is None and base.generative and all("label" not in names for names in source.found.values()):
        kind = "causal-lm" if any("text" in names for names in source.found.values()) else None
    rows = read_data(source, task=kind, metric=metric, need=("test",))
    task = task_of(rows, kind=kind, metric=metric)
    made = None if task.generative or fitted else _brick_of(inputs, rows, task, index, count)
    if made is not None:
        limit = max_length or made.manifest.get("max_length")
        test = encode(rows.splits["test"], base, made.task, max_length=limit, template=made.template)
        return Column(rows, made.task, test, _plain(made, ground), "its brick's")
    test = encode(rows.splits["test"], base, task, max_length=max_length)
    if task.generative:
        return Column(rows, task, test, base.model(task, seed=0), "the base's output layer")
    if "train" not in rows.splits:
        raise UsageError(f"{rows.name}: a head is fitted on the base's states, which needs train rows; it has none.")
    backbone = base.backbone()
    train = encode(rows.splits["train"], base, task, max_length=max_length)
    model = base.headed(fit_head(backbone, train, task))
    return Column(rows, task, test, model.eval(), "fitted on the base")


def _brick_of(inputs: Sequence[Input], rows: Data, task: Task, index: int, count: int) -> Brick | None:
    """Return the brick that was tuned for a task: by the name of its data, else by place; None without one."""
    known = {given.label: bricks.load(given.spec) for given in inputs if given.kind == "brick"}
    fits = {label: made for label, made in known.items() if made.task.labels == task.labels}
    named = [made for made in fits.values() if made.manifest.get("data", {}).get("name") == rows.name]
    if len(named) == 1:
        return named[0]
    if count == len(inputs) and inputs[index].label in fits:
        return fits[inputs[index].label]
    if len(fits) > 1:
        raise UsageError(
            f"{rows.name}: bricks {', '.join(fits)} all know its labels; give one --data for each brick, in their "
            "order, or --heads base."
        )
    return next(iter(fits.values()), None)


def _plain(made: Brick, ground: Ground) -> nn.Module:
    """Return a brick's model with its head, as plain modules whose weights can be overwritten."""
    model: Any = made.apply(open_base(ground.spec), force=True).model
    if (made.folder / ADAPTER).is_file():
        try:
            model = model.merge_and_unload()
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise Refused(f"{made.folder}: {made.manifest['arm']} is no change of weights: {error}") from error
    return model.eval()
