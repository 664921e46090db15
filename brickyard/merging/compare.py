"""`brickyard merge ties dare slerp ...`: several merges of the same inputs, and one table that says which keeps what.

    kept(merge, task) = (score(merge) - score(base)) / (score(expert) - score(base)),   expert: the input at home there

so 1 is all that its own tuning gained on a task and 0 nothing; a merge is ranked by the mean over the tasks that count:
those where the paired 95 % interval of expert minus base lies on the better side of 0, because a share of a gain that
may be chance says nothing. Two merges are told apart by the difference of these means, with paired intervals over the
test rows of every task (the experts' scores taken as given), after Holm's correction over all that are set beside the
best.

Inputs and tasks are opened once, and the base and every input answer once. `OUT` gets a folder for every merge; a call
with the same inputs and other arms adds to what is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as distributions

from brickyard.core.errors import BrickyardError, Changed, UsageError
from brickyard.core.files import Lock, read_json, write_json
from brickyard.core.progress import tell
from brickyard.core.registry import code_digest
from brickyard.core.stats import holm, paired
from brickyard.core.task import LOWER_IS_BETTER
from brickyard.merging.files import files_of
from brickyard.merging.inputs import MANIFEST
from brickyard.merging.merge import Wanted, carry_out, prepare, want
from brickyard.merging.scores import Answered, Column, answered, in_words, source_of

TABLE = "merges.json"
LEVEL = 0.05


def merge_all(
    arms: Sequence[str],
    *,
    base: str,
    bricks: Sequence[str | Path],
    data: Sequence[Any],
    out: str | Path,
    form: str = "auto",
    dtype: str | None = None,
    heads: str = "own",
    threads: int | None = None,
    force: bool = False,
    device: str | None = None,
    task: str | None = None,
    metric: str | None = None,
    max_length: int | None = None,
    audit: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Merge `bricks` by every one of `arms` into folders of `out`; return the table, which lies in OUT/merges.json.

    The keywords are those of `merging.merge`; every row is told as it ends. A merge that cannot be made of
    these inputs stands in the table with the reason, and the others go on.

    Returns {"tasks", "rows": [{"model", "scores", "kept", "mean_kept", "seconds", "folder"}], "failed": [{"arm",
    "why"}], "best", "alike": [...], "about"}; rows are the base, the inputs, and the merges, best first. A task holds
    {"expert", "gain", "gain_low", "gain_high", "counts"}; `best` is None where no task counts. `seconds` is None for a
    merge that an earlier call made.

    Raises UsageError for arms that do not parse, are given twice, or cannot be set beside others, without data, and
    where no input is at home on a task; Changed where OUT holds merges of other inputs.
    """
    texts = [str(arm) for arm in arms]
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise UsageError(f"{twice[0]!r} is given twice.")
    if not data:
        raise UsageError("Several merges are set beside each other by their scores; give one --data a task.")
    if audit is not None:
        raise UsageError("--audit looks at one merge; give one arm with it.")
    wanted = [want(text, bricks=len(bricks), data=len(data)) for text in texts]
    folder, names = Path(out), _folders(wanted)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        return _merge_all(
            wanted,
            folder,
            names,
            data,
            threads,
            base=base,
            bricks=bricks,
            form=form,
            dtype=dtype,
            heads=heads,
            force=force,
            device=device,
            reading={"task": task, "metric": metric, "max_length": max_length},
            trust_remote_code=trust_remote_code,
        )


def _merge_all(
    wanted: Sequence[Wanted],
    folder: Path,
    names: Sequence[str],
    data: Sequence[Any],
    threads: int | None,
    **opened: Any,
) -> dict[str, Any]:
    prepared = prepare(wanted, data=data, audit=None, **opened)
    columns: list[Column] = prepared.columns
    if homeless := [column.data.name for column in columns if not column.at_home]:
        raise UsageError(
            f"no input is known to be at home on {homeless[0]}: {len(opened['bricks'])} inputs and {len(data)} data "
            "sets were given, and a merge is judged by what an input gained on its own task. Give one --data for each "
            "of the --bricks, in their order."
        )
    about = {
        "base": prepared.ground.spec,
        "inputs": [{"label": i.label, "spec": i.spec, "kind": i.kind} for i in prepared.inputs],
        "files": files_of(prepared.ground, prepared.inputs),
        "data": [column.data.fingerprint for column in columns],
        **{key: opened[key] for key in ("form", "dtype", "heads", "reading")},
        "code": code_digest(),
    }
    if not _same_inputs(folder, about):  # an earlier table stays until the new one is whole
        write_json(folder / TABLE, {"schema": 1, "about": about})
    ground, device = prepared.ground, prepared.device
    models = [("the base", None), *((given.label, given.source) for given in prepared.inputs)]
    rows, failed, merges = [], [], []
    for label, source in models:
        rows.append(_row(label, answered(ground, source, columns, device=device)))
        tell(f"{label}: {in_words(rows[-1]['answers'])}")
    for arm, name in zip(wanted, names, strict=True):
        began, place, seconds = time.monotonic(), folder / name, None
        if place.exists():  # made by an earlier call: how long it took is not known here
            made = read_json(place / MANIFEST)
        else:
            try:
                arm.check(len(prepared.inputs))
                made = carry_out(arm, prepared, place, threads=threads)
            except BrickyardError as error:
                failed.append({"arm": arm.arm, "why": str(error)})
                tell(f"{arm.arm}: cannot be made of these inputs")
                continue
            seconds = time.monotonic() - began
        row = _row(made["arm"], answered(ground, source_of(place, ground), columns, device=device))
        merges.append({**row, "seconds": seconds, "folder": name, "form": made["form"]})
        tell(f"{arm.arm}: {in_words(row['answers'])} ({'made before' if seconds is None else f'{seconds:.1f} s'})")
    table = _judged(rows, merges, columns)
    result = {
        "schema": 1,
        "about": about,
        "tasks": [
            {**column.about(), "expert": prepared.inputs[column.owner].label, **gain}
            for column, gain in zip(columns, table.pop("gains"), strict=True)
        ],
        **table,
        "failed": failed,
    }
    write_json(folder / TABLE, result)
    return result


def _folders(wanted: Sequence[Wanted]) -> list[str]:
    """Return a folder's name for every arm, none twice: its text without what file systems dislike."""
    names: list[str] = []
    for arm in wanted:
        name = re.sub(r"[^\w.=-]+", "-", arm.arm).strip("-")
        names.append(f"{name}-{len(names)}" if name in names or name == TABLE else name)
    return names


def _same_inputs(folder: Path, about: dict[str, Any]) -> bool:
    """Return whether the folder holds merges of these inputs; Changed or UsageError where it holds anything else."""
    if (folder / TABLE).is_file():
        was = read_json(folder / TABLE)["about"]
        if other := [key for key in about if was.get(key) != about[key]]:
            raise Changed(f"{folder} holds merges made with another {', '.join(other)}; give another --out.")
        return True
    if any(path.name != ".lock" for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and holds no merges; give a new folder.")
    return False


def _row(model: str, answers: list[Answered]) -> dict[str, Any]:
    return {"model": model, "answers": answers}


def _judged(
    models: Sequence[dict[str, Any]], merges: Sequence[dict[str, Any]], columns: Sequence[Column]
) -> dict[str, Any]:
    """Rank the merges, and say which are not told apart from the best; `models` are the base and the inputs.

    Where no task counts there is no ranking: `best` is None, and merges stand in the order in which they were given.
    """
    signs = [-1 if column.task.metric in LOWER_IS_BETTER else 1 for column in columns]
    base = [found.cell["mean"] for found in models[0]["answers"]]
    gains = [_gain(column, i, models, sign) for i, (column, sign) in enumerate(zip(columns, signs, strict=True))]

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        answers: list[Answered] = row["answers"]
        kept = [
            sign * (found.cell["mean"] - start) / gain["gain"] if gain["counts"] else None
            for sign, found, start, gain in zip(signs, answers, base, gains, strict=True)
        ]
        known = [share for share in kept if share is not None]
        cells = [
            {**found.cell, **_beside(column, found, models[1 + column.owner]["answers"][i])}
            for i, (column, found) in enumerate(zip(columns, answers, strict=True))
        ]
        rest = {key: value for key, value in row.items() if key != "answers"}
        return {**rest, "scores": cells, "kept": kept, "mean_kept": float(np.mean(known)) if known else None}

    ranked = bool(merges) and any(gain["counts"] for gain in gains)
    order = sorted(merges, key=lambda row: -(shown(row)["mean_kept"] or 0.0))
    compared = [_p_value(columns, gains, signs, order[0], other) for other in order[1:]] if ranked else []
    adjusted = holm(compared) if compared else np.ones(len(order[1:]))
    return {
        "rows": [shown(row) for row in (*models, *order)],
        "gains": gains,
        "best": order[0]["model"] if ranked else None,
        "alike": [row["model"] for row, p in zip(order[1:], adjusted, strict=True) if ranked and p >= LEVEL],
    }


def _gain(column: Column, place: int, models: Sequence[dict[str, Any]], sign: int) -> dict[str, Any]:
    """Return what the expert of a task gained over the base there, by the metric's direction, and whether it counts."""
    start, expert = models[0]["answers"][place], models[1 + column.owner]["answers"][place]
    found = paired(column.rows.labels.numpy(), expert.predictions[None], start.predictions[None], column.task.metric)
    low, high = sorted((sign * found.low, sign * found.high))
    return {
        "gain": sign * (expert.cell["mean"] - start.cell["mean"]),
        "gain_low": low,
        "gain_high": high,
        "counts": bool(low > 0),
    }


def _beside(column: Column, found: Answered, expert: Answered) -> dict[str, float]:
    """Return how far an answer's score is from that of the expert of its task, with its 95 % interval."""
    metric = column.task.metric
    gap = paired(column.rows.labels.numpy(), found.predictions[None], expert.predictions[None], metric)
    return {"to_expert": gap.difference, "to_expert_low": gap.low, "to_expert_high": gap.high}


def _p_value(
    columns: Sequence[Column],
    gains: Sequence[dict[str, Any]],
    signs: Sequence[int],
    best: dict[str, Any],
    other: dict[str, Any],
) -> float:
    """Return the two-sided p of `best` keeping as much as `other`: a sum over tasks, whose test rows are independent.

    The half-width of a task's paired interval stands for its standard error, so that few rows count as few.
    """
    difference = variance = 0.0
    for i, (column, gain, sign) in enumerate(zip(columns, gains, signs, strict=True)):
        if not gain["counts"]:
            continue
        a, b = (row["answers"][i].predictions[None] for row in (best, other))
        found = paired(column.rows.labels.numpy(), a, b, column.task.metric)
        difference += sign * found.difference / gain["gain"]
        variance += ((found.high - found.low) / 2 / distributions.norm.ppf(0.975) / gain["gain"]) ** 2
    return float(2 * distributions.norm.sf(abs(difference) / variance**0.5)) if variance else 1.0
