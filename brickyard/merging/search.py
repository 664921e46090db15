"""The strength of a merge, chosen on validation rows: `ties:scale=search`, `task-arithmetic + lines:beta=search`.

    s*    = argmax over the grid of the mean over tasks of score(theta_0 + s tau, validation rows)
    lines:  the grid is that of the scale of the merge before it, so that both cost as many evaluations

tau is made once and kept beside theta_0, in float32; a point of the grid is theta_0 + s tau written into the models
that are already open, rounded as it would be stored. No test row is read here. Of equal scores the smallest strength
wins: it is nearest to the base.

Source: Wang et al., arXiv 2410.17146, section 4 (one scalar for every merge, chosen over one grid).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core import registry
from brickyard.core.arm import Arm, parse
from brickyard.core.errors import UsageError
from brickyard.merge._engine import Edit, Merge, Norms, Rule
from brickyard.merge._inputs import FLOATS, PIECE, Files, Stored, whole

if TYPE_CHECKING:
    from brickyard.merging.inputs import Ground
    from brickyard.merging.scores import Column

SEARCH = "search"


@dataclass(frozen=True)
class Asked:
    """An arm whose strength is to be searched: which piece's option, over which grid."""

    arm: Arm
    piece: str
    option: str
    grid: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.piece}:{self.option}"

    def at(self, strength: float) -> str:
        """Return the arm with its strength set."""
        pieces = [replace(p, options={**p.options, self.option: strength}) if p.name == self.piece else p
                  for p in self.arm.pieces]  # fmt: skip
        return str(replace(self.arm, pieces=tuple(pieces)))


def asked(arm: str) -> Asked | None:
    """Return what of an arm is to be searched, None where nothing is; UsageError where that is no one strength."""
    wanted = parse(arm)
    found = [(p.name, key) for p in wanted.pieces for key, value in p.options.items() if value == SEARCH]
    if not found:
        return None
    if len(found) > 1:
        both = " and ".join(f"{name}:{key}" for name, key in found)
        raise UsageError(f"{arm!r}: {both} are both searched; a search chooses one number, so fix the other.")
    strengths = {p.name: getattr(registry.load(p.name), "STRENGTH", None) for p in wanted.pieces}
    (name, option) = found[0]
    if strengths[name] != option:
        known = [f"{e.record.name}:{s}" for e in registry.records("merge") if (s := _strength(e.record.name))]
        raise UsageError(f"{arm!r}: {name}:{option} is no strength of a merge; searched can be {', '.join(known)}.")
    last = wanted.pieces[-1].name
    if name != last and hasattr(registry.load(last), "edit"):
        raise UsageError(
            f"{arm!r}: behind {last} the scale of {name} has no part in the result; search {last}:{strengths[last]}."
        )
    first = wanted.pieces[0].name
    owner = first if strengths[first] else name
    grid = registry.find(owner).record.search[strengths[owner] or ""]
    return Asked(wanted, name, option, grid)


def _strength(name: str) -> str | None:
    return getattr(registry.load(name), "STRENGTH", None)


def search(
    wanted: Asked,
    plan: Merge,
    parts_at: Callable[[str], tuple[Rule, tuple[Edit, ...]]],
    ground: Ground,
    columns: Sequence[Column],
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Score every point of the grid on the validation rows of every task.

    Args:
        wanted: of `asked`.
        plan: the merge, at any strength.
        parts_at: an arm's rule and post-edits.
        columns: the tasks, with validation rows.
        dtype: of the result; None: the base's own.

    Returns {"option", "grid": [G], "tasks": [{"data", "metric", "rows", "cut"}], "scores": [[G of a task]], "means":
    [G], "chosen", "edge"}; `cut` where the validation rows were cut from train, `edge` where the best point is the last
    of the grid, beyond which a better one may lie. Raises UsageError where the tasks share no metric, NoEffect and
    NotFinite as the merge.
    """
    metrics = sorted({column.task.metric for column in columns})
    if len(metrics) > 1:
        raise UsageError(
            f"{wanted.arm}: the tasks are scored by {', '.join(metrics)}, whose mean says nothing; give one --metric "
            "that fits all, or fix the strength."
        )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    norms = plan.norms() if any(edit.norms for edit in plan.edits) else None
    held = Held.of(plan, ground, dtype, place)
    models = [opened(column, ground, place) for column in columns]
    scores: list[list[float]] = [[] for _ in columns]
    for strength in wanted.grid:
        rule, edits = parts_at(wanted.at(strength))
        scales = scales_of(replace(plan, rule=rule, edits=edits), norms)
        for column, (model, targets), out in zip(columns, models, scores, strict=True):
            held.put(targets, scales)
            out.append(scored(model, column))
    means = np.mean(scores, axis=0)
    goodness = [columns[0].task.goodness(float(mean)) for mean in means]
    best = max(range(len(goodness)), key=lambda i: goodness[i])  # the first of equals
    return {
        "option": wanted.name,
        "grid": list(wanted.grid),
        "tasks": [_about(column) for column in columns],
        "scores": scores,
        "means": [float(mean) for mean in means],
        "chosen": wanted.grid[best],
        "edge": best == len(goodness) - 1,
    }


def _about(column: Column) -> dict[str, Any]:
    rows, cut = column.validation or (), column.data.report["cut"]
    return {"data": column.data.name, "metric": column.task.metric, "rows": len(rows), "cut": cut is not None}


def scales_of(plan: Merge, norms: Norms | None) -> dict[str, float]:
    """Return the final scale of each changed tensor, as `Merge.scales`, from norms that are known."""
    scales = dict.fromkeys(plan.shapes, plan.rule.scale)
    for edit in plan.edits:
        scales = edit.scales(plan.shapes, plan.rule.scale, norms)
    return {name: scales[name] for name in plan.changed}


@dataclass(frozen=True)
class Held:
    """theta_0 and tau of every changed tensor, and the dtype in which the sum will be stored."""

    base: Mapping[str, Tensor]
    tau: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, plan: Merge, ground: Ground, dtype: str | None, place: torch.device) -> Held:
        """Read both, once."""
        tau = {name: tau.to(place) for name, tau in plan.vectors()}
        stored: Stored = ground.stored
        files, raw = Files(), torch.empty(8 * PIECE, dtype=torch.uint8)
        try:
            base = {name: whole(files, stored, None, name, raw).to(place) for name in tau}
        finally:
            files.close()
        kinds = {name: getattr(torch, dtype) if dtype else FLOATS[stored.places[name][1].dtype] for name in tau}
        return cls(base, tau, kinds)

    @torch.no_grad()
    def put(self, targets: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        """Write theta_0 + s tau into the tensors of a model, in place."""
        for name, target in targets.items():
            if name in self.base:
                made = torch.add(self.base[name], self.tau[name], alpha=scales[name])
                target.data.copy_(made.to(self.dtypes[name]))


def opened(column: Column, ground: Ground, place: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    """Give a task's model the base's weights; return it and its tensors by the base's names."""
    from brickyard.merging.scores import overwrite, shared

    overwrite(column.model, ground, None)
    model = column.model.to(place)
    return model, shared(model, ground)


def scored(model: nn.Module, column: Column) -> float:
    """Return the score of a model on the validation rows of a task."""
    from brickyard.core.answers import answer

    rows = column.validation
    assert rows is not None
    return column.task.score(rows.labels.numpy(), answer(model, rows, column.task).predictions)
