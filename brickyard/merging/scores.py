"""The table behind `brickyard merge --data`: the base, every input and the merge, on the test rows of every task.

The models of a row share one backbone's weights; each task has one head, the same in every row: that of the brick that
was tuned for it (`own`), or one fitted on the base's states and frozen (`base`). Under own heads a single input is at
home on its own task only, because no other backbone was trained with that head; under the base's heads all cells can be
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.audit.backdoor import Config, judge, target_of, triggered
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
from brickyard.core.progress import tell
from brickyard.core.split import Split
from brickyard.core.stats import interval
from brickyard.core.task import Task, task_of
from brickyard.merge._inputs import FLOATS, PIECE, Files, Source, whole
from brickyard.merging.inputs import Ground, Input, open_inputs

MERGE = "the merge"


@dataclass
class Column:
    """One task: its test rows, and a model with the task's head whose backbone is overwritten row by row.

    `validation` are the rows on which a strength is chosen, `train` those of which a method of data reads the inputs,
    without their labels, `triggered` the test rows with a backdoor's trigger; None where nobody asked. `owner` is the
    input that is at home on the task, where one is: found by its brick, or by its place among as many data sets.
    """

    data: Data
    task: Task
    rows: Encoded
    model: nn.Module
    head: str
    owner: int
    at_home: bool = True
    validation: Encoded | None = None
    train: Encoded | None = None
    triggered: Encoded | None = None

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
    splits: Sequence[str] = (),
    attack: Config | None = None,
) -> list[Column]:
    """Open every task's test rows and its head, so that what is wrong with them is known before anything is merged.

    `splits` names what is wanted besides: "validation" (cut from train where there is none), or "train", unlabelled.
    With `attack` every task that has its target class gets triggered rows; UsageError where none has.
    """
    columns = [
        _column(ground, inputs, i, len(data), spec, heads, task, metric, max_length, tuple(splits), attack)
        for i, spec in enumerate(data)
    ]
    if attack is not None and all(column.triggered is None for column in columns):
        target_of(attack, tuple(sorted({name for column in columns for name in column.task.labels or ()})))
    return columns


def score(
    ground: Ground,
    inputs: Sequence[Input],
    merged: Path,
    columns: Sequence[Column],
    *,
    device: str | None = None,
    attack: Config | None = None,
) -> dict[str, Any]:
    """Score every model on every task, and with `attack` what its trigger does to them.

    Returns {"tasks": [{"data", "metric", "head", "examples"}], "rows": [{"model", "scores": [{"mean", "low", "high"}],
    "mean"}]}; `mean` is over the tasks, where they share a metric. A score of a triggered task holds "attack" besides:
    {"success", "without", "triggered_accuracy"}, as `audit.backdoor` has them.
    """
    models: list[tuple[str, Source | None]] = [
        ("the base", None),
        *((given.label, given.source) for given in inputs),
        (MERGE, source_of(merged, ground)),
    ]
    rows = []
    for label, source in models:
        rows.append(answered(ground, source, columns, device=device, attack=attack))
        tell(f"{label}: {in_words(rows[-1])}")
    cells = [[found.cell for found in row] for row in rows]
    same = len({column.task.metric for column in columns}) == 1
    means = [float(np.mean([cell["mean"] for cell in row])) if same else None for row in cells]
    return {
        "tasks": [column.about() for column in columns],
        "rows": [
            {"model": label, "scores": row, "mean": mean}
            for (label, _), row, mean in zip(models, cells, means, strict=True)
        ],
    }


@dataclass(frozen=True)
class Answered:
    """What one model answers on the test rows of one task: predictions [N, ...] and the cell of the table."""

    predictions: np.ndarray
    cell: dict[str, Any]


def in_words(row: Sequence[Answered]) -> str:
    """Return a model's scores in the order of the tasks."""
    return ", ".join(f"{found.cell['mean']:.4f}" for found in row)


def source_of(merged: Path, ground: Ground) -> Source:
    """Return the weights of a merge that lies in a folder, as a model or as an adapter."""
    (result,) = open_inputs([str(merged)], ground, mixed=True, force=True)
    return result.source


def answered(
    ground: Ground,
    source: Source | None,
    columns: Sequence[Column],
    *,
    device: str | None = None,
    attack: Config | None = None,
) -> list[Answered]:
    """Answer the test rows of every task with the weights of a source (None: the base), and score the answers."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = []
    for column in columns:
        overwrite(column.model, ground, source)
        found = answer(column.model.to(place), column.rows, column.task).predictions
        score = interval(column.rows.labels.numpy(), found[None], column.task.metric)
        cell: dict[str, Any] = {"mean": score.mean, "low": score.low, "high": score.high}
        if attack is not None and column.triggered is not None:
            cell["attack"] = _attacked(column, found, attack)
        out.append(Answered(found, cell))
    return out


def _attacked(column: Column, clean_N: np.ndarray, attack: Config) -> dict[str, float]:
    """Return what the trigger does to the model that a task now holds, whose answers without it are known."""
    assert column.triggered is not None
    answers_N = answer(column.model, column.triggered, column.task).predictions
    found = judge(column.rows.labels.numpy(), clean_N, answers_N, target_of(attack, column.task.labels))
    return {"success": found.success[0], "without": found.without[0], "triggered_accuracy": found.triggered[0]}


@torch.no_grad()
def overwrite(model: nn.Module, ground: Ground, source: Source | None) -> None:
    """Give the backbone of `model`, in place, the weights of a source (None: the base); its head stays as it is."""
    files, raw = Files(), torch.empty(8 * PIECE, dtype=torch.uint8)
    try:
        for name, tensor in shared(model, ground).items():
            tensor.data.copy_(whole(files, ground.stored, source, name, raw))
    finally:
        files.close()


def shared(model: nn.Module, ground: Ground) -> dict[str, Tensor]:
    """Return the live tensors of `model` that a merge may change, by the base's names."""
    floats = [n for n, (_, info) in ground.stored.places.items() if info.dtype in FLOATS and n not in ground.heads]
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    return {name: state[own] for name, own in same_names(floats, state).own.items()}


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
    splits: tuple[str, ...],
    attack: Config | None,
) -> Column:
    base = ground.opened
    fitted = heads == "base"
    source = readers.read(spec)
    if kind is None and base.generative and all("label" not in names for names in source.found.values()):
        kind = "causal-lm" if any("text" in names for names in source.found.values()) else None
    need = ("train",) * ("train" in splits or ("validation" in splits and "validation" not in source.splits))
    rows = read_data(source, task=kind, metric=metric, need=(*need, *splits, "test"))
    task = task_of(rows, kind=kind, metric=metric)
    found = None if task.generative or fitted else _brick_of(inputs, rows, task, index, count)
    if found is not None:
        owner, made = found
        limit = max_length or made.manifest.get("max_length")
        own = made.task if metric is None else replace(made.task, metric=task.metric)
        read = partial(encode, base=base, task=own, max_length=limit, template=made.template)
        parts = {split: read(part) for split, part in _wanted(rows, splits, attack).items()}
        return Column(rows, own, parts.pop("test"), _plain(made, ground), "its brick's", owner, **parts)
    owner, at_home = min(index, len(inputs) - 1), count == len(inputs)
    parts: dict[str, Any] = {"at_home": at_home}
    parts |= {
        name: encode(part, base, task, max_length=max_length) for name, part in _wanted(rows, splits, attack).items()
    }
    test = parts.pop("test")
    if task.generative:
        return Column(rows, task, test, base.model(task, seed=0), "the base's output layer", owner, **parts)
    if "train" not in rows.splits:
        raise UsageError(f"{rows.name}: a head is fitted on the base's states, which needs train rows; it has none.")
    backbone = base.backbone()
    train = encode(rows.splits["train"], base, task, max_length=max_length)
    tell(f"{rows.name}: fitting a head on the base's states of {len(train):,} rows ...")
    model = base.headed(fit_head(backbone, train, task))
    return Column(rows, task, test, model.eval(), "fitted on the base", owner, **parts)


def _wanted(rows: Data, splits: Sequence[str], attack: Config | None) -> dict[str, Split]:
    """Return the test rows and those of `splits`; a train split is handed on without its labels."""
    out = {split: rows.splits[split] for split in ("test", *splits)}
    if "train" in out:
        out["train"] = Split({name: column for name, column in out["train"].columns.items() if name != "label"})
    if attack is not None and str(attack.target) in (rows.labels or ()):
        out["triggered"] = triggered(out["test"], attack)
    return out


def _brick_of(inputs: Sequence[Input], rows: Data, task: Task, index: int, count: int) -> tuple[int, Brick] | None:
    """Return the brick that was tuned for a task, and its place: by the name of its data, else by its own place."""
    known = {place: bricks.load(given.spec) for place, given in enumerate(inputs) if given.kind == "brick"}
    fits = {place: made for place, made in known.items() if made.task.labels == task.labels}
    named = [item for item in fits.items() if item[1].manifest.get("data", {}).get("name") == rows.name]
    if len(named) == 1:
        return named[0]
    if count == len(inputs) and index in fits:
        return index, fits[index]
    if len(fits) > 1:
        raise UsageError(
            f"{rows.name}: bricks {', '.join(inputs[place].label for place in fits)} all know its labels; give one "
            "--data for each brick, in their order, or --heads base."
        )
    return next(iter(fits.items()), None)


def _plain(made: Brick, ground: Ground) -> nn.Module:
    """Return a brick's model with its head, as plain modules whose weights can be overwritten."""
    model: Any = made.apply(open_base(ground.spec), force=True).model
    if (made.folder / ADAPTER).is_file():
        try:
            model = model.merge_and_unload()
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise Refused(f"{made.folder}: {made.manifest['arm']} is no change of weights: {error}") from error
    return model.eval()
