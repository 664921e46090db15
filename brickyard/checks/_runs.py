"""Runs of a check that wants more of its arms than their answers to the test rows: every seed's brick stays at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from peft.tuners.lora import LoraLayer
from torch import nn

from brickyard.checks._place import finished
from brickyard.checks.run import Answers
from brickyard.core import brick as bricks
from brickyard.core.answers import answer
from brickyard.core.arm import parse
from brickyard.core.jobs import Job
from brickyard.core.method import Claim
from brickyard.core.trial import Prepared, Setting
from brickyard.core.wrap import ADAPTER

_NEVER = 2**31 - 1  # steps; no run is as long


def asked_by(claim: Claim) -> dict[str, Any]:
    """Return the keywords of `Setting` that a claim fixes for all of its arms."""
    training = {"epochs": claim.epochs, **({"batch": claim.batch} if claim.batch else {})}
    return {
        "base": claim.base,
        "data": claim.data,
        "max_length": claim.max_length or None,
        "train_rows": claim.train_rows,
        "shots": claim.shots,
        "training": training,
    }


def to_the_end(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return `asked` for runs that are evaluated after their last step alone, whose weights are therefore kept."""
    return {**asked, "training": {**asked.get("training", {}), "evaluate_every": _NEVER}}


def with_training(text: str, **training: Any) -> str:
    """Return the arm `text` with training settings that it does not fix itself."""
    arm = parse(text)
    return str(replace(arm, training={**training, **arm.training}))


def tuned(
    claim: Claim,
    arms: Mapping[str, str],
    asked: Mapping[str, Any],
    folder: Path,
    workers: int,
    *,
    lower_is_better: bool = False,
) -> dict[str, str]:
    """Return the arms with the learning rate of `claim.lrs` that validates best with seed 0."""
    if len(claim.lrs) < 2:
        return {name: with_training(text, **({"lr": claim.lrs[0]} if claim.lrs else {})) for name, text in arms.items()}
    every = {(name, lr): with_training(text, lr=lr) for name, text in arms.items() for lr in claim.lrs}
    jobs = []
    for (name, lr), text in every.items():
        setting = asdict(Setting(arm=text, seed=0, **asked))
        argument = {"setting": setting, "folder": str(folder / f"search-{name}-{lr}"), "role": "search"}
        jobs.append(Job(key=f"{name} {lr}", function="brickyard.core.trial:run", argument=argument))
    found = finished(jobs, workers, folder)

    def rank(name: str, lr: float) -> tuple[float, float]:
        # Validation scores tie often on small sets; the loss of the same rows then decides.
        one = found[f"{name} {lr}"]
        return -one["validation"] if lower_is_better else one["validation"], -one["validation_loss"]

    return {name: every[name, max(claim.lrs, key=lambda lr: rank(name, lr))] for name in arms}


def trained(
    arms: Mapping[str, str],
    asked: Mapping[str, Any],
    seeds: int,
    folder: Path,
    workers: int = 2,
    *,
    but: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run every arm with seeds 1..`seeds` in processes of their own; RunFailed names one that did not finish.

    `asked` holds what all settings have in common, `but` what is different in those of an arm. Returns name -> results;
    the bricks stand in `folder/NAME-SEED/brick`.
    """
    jobs = []
    for name, text in arms.items():
        for seed in range(1, seeds + 1):
            argument = {
                "setting": asdict(Setting(arm=text, seed=seed, **{**asked, **(but or {}).get(name, {})})),
                "folder": str(folder / f"{name}-{seed}"),
            }
            jobs.append(Job(key=f"{name}-{seed}", function="brickyard.core.trial:run", argument=argument))
    found = finished(jobs, workers, folder)
    return {name: [found[f"{name}-{seed}"] for seed in range(1, seeds + 1)] for name in arms}


def answers(folder: Path, name: str, seeds: int) -> Answers:
    """Return what the seeds of an arm answered to the test rows."""
    tables = [pq.read_table(folder / f"{name}-{seed}" / "answers.parquet") for seed in range(1, seeds + 1)]
    return Answers(tables[0]["label"].to_numpy(), np.stack([table["prediction"].to_numpy() for table in tables]))


def opened_answers(ready: Prepared, folder: Path, name: str, changes: Sequence[Callable[[nn.Module], None]]) -> Answers:
    """Return what the seeds of an arm answer to the test rows once each opened brick went through its change."""
    found = []
    for seed, change in enumerate(changes, 1):
        model = bricks.load(folder / f"{name}-{seed}" / "brick").apply(ready.base).model
        change(model)
        found.append(answer(model, ready.encoded["test"], ready.task).predictions)
    return Answers(ready.encoded["test"].labels.numpy(), np.stack(found))


def lora_factors(model: nn.Module) -> list[tuple[Any, Any, Any]]:
    """Return (layer, A [r, n], B [m, r]) of every layer that PEFT's LoRA adapts, the live parameters."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    return [(layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for layer in layers]


def untouched(ready: Prepared, seeds: int) -> Answers:
    """Return what the base says without any training, once a seed."""
    found = answer(ready.base.model(ready.task, seed=0), ready.encoded["test"], ready.task).predictions
    return Answers(ready.encoded["test"].labels.numpy(), np.tile(found, (seeds, 1)))


def majority(of: Answers) -> Answers:
    """Return the answers of one who always gives the most frequent class."""
    most = np.bincount(of.labels.astype(int)).argmax()
    return Answers(of.labels, np.full_like(of.predictions, most))


def arm_row(text: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a check's JSON says of an arm."""
    scores = [run["score"]["mean"] for run in runs]
    return {
        "arm": text,
        "mean": float(np.mean(scores)),
        "per_seed": scores,
        "trainable_parameters": runs[0]["cost"]["trainable_parameters"],
        "train_seconds": float(np.median([run["cost"]["train_seconds"] for run in runs])),
    }


def all_hold(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one verdict on several inequalities, true if all hold, false if one does not; the first's interval."""
    said = [row["holds"] for row in rows]
    holds: Any = False if False in said else True if all(h is True for h in said) else "undecided"
    return {
        "inequality": " and ".join(row["inequality"] for row in rows),
        "holds": holds,
        "comparisons": list(rows),
        **{k: rows[0][k] for k in ("measured", "low", "high")},
    }


def in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return inequalities and what was measured of them, in points, as one line."""
    return "; ".join(f"{r['inequality']}: {r['measured']:+.1f} ({r['low']:+.1f} to {r['high']:+.1f})" for r in rows)
