"""`brickyard grow`: run a method that trains a growing model and leaves a model folder instead of a brick."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from brickyard.api import steps_for
from brickyard.core import registry, trial
from brickyard.core.arm import parse
from brickyard.core.data import read_data
from brickyard.core.errors import Refused, UsageError
from brickyard.core.files import Lock
from brickyard.core.measure import precision
from brickyard.core.registry import code_digest
from brickyard.core.trial import Setting


def grow(
    arm: str,
    *,
    base: str,
    data: Any,
    out: str | Path,
    seed: int = 0,
    minutes: float | None = None,
    dtype: str = "auto",
    training: dict[str, Any] | None = None,
    threads: int | None = None,
    checkpoint_every: int = 200,
    callbacks: Sequence[Any] = (),
    allow_change: Sequence[str] = (),
    **setting: Any,
) -> dict[str, Any]:
    """Run one method of the family grow, such as "spdf:sparsity=0.75"; `out` becomes a model folder; return its report.

    The keywords are those of `api.tune`, with the same meaning. Meanwhile `OUT.training` holds checkpoints: an
    interrupted run that is called again goes on where it stopped.
    """
    if threads:
        torch.set_num_threads(threads)
    wanted, folder = parse(arm), Path(out)
    if len(wanted.pieces) != 1:
        raise UsageError(f"grow takes one method, not {len(wanted.pieces)}: {arm!r}.")
    piece = wanted.pieces[0]
    record, config = registry.find(piece.name, "grow").record, registry.config(piece.name, piece.options)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty; give a new folder.")
    # Everything but the method is prepared as for full tuning: the same rows, batches and checks.
    fixed = {**record.training, "precision": precision(dtype, setting.get("device")), **(training or {})}
    asked = Setting(
        arm="full",
        base=base,
        data=data,
        seed=seed,
        training={**fixed, **wanted.training},
        # A method of one task reads the data as that; of several, the columns say which.
        **{**setting, "task": setting.get("task") or (record.needs[0] if len(record.needs) == 1 else None)},
    )
    known = read_data(data, task=asked.task, metric=asked.metric, need=("train",), allow_overlap=asked.allow_overlap)
    if known.kind not in record.needs:
        raise Refused(f"{piece.name} works on {', '.join(record.needs)}; this task is {known.kind}.")
    ready = trial.prepare(asked, ("train", "validation", *(("test",) if "test" in known.splits else ())))
    work = folder.with_name(f"{folder.name}.training")
    with Lock(work / "run.lock"):
        if minutes is not None:
            ready.training = replace(ready.training, steps=steps_for(minutes, asked, work))
        result = registry.load(piece.name).run(
            ready,
            config,
            folder,
            arm=str(wanted),
            code=code_digest(),
            checkpoints=work / "checkpoints",
            checkpoint_every=checkpoint_every,
            callbacks=callbacks,
            allow_change=allow_change,
        )
    shutil.rmtree(work)
    return result
