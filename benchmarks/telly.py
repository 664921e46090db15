"""Telly-K against full tuning: a step, an epoch with and without kept states (measured), and saved bytes (counted).

Ratios to full tuning within one process, the arms taking turns. "kept" reads the states that leave the frozen layers;
building them is timed apart and charged in full to the first epochs (`ten epochs`). The limit of the paper's own form,
where frozen layers still run: a step at K = 2L/3 takes at most 0.65 of full tuning's.

    python benchmarks/telly.py --rows 256 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from brickyard.checks.telly import HEAD, RATIO, depths, saved_bytes, step_time
from brickyard.core import registry, trial
from brickyard.core.build import build
from brickyard.core.loop import train
from brickyard.core.measure import environment
from brickyard.core.roles import blocks


def epochs(given: argparse.Namespace, arms: dict[str, str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of one epoch of each arm, by round, and of building the states that it reads."""
    took: dict[str, list[float]] = {name: [] for name in arms}
    building = dict.fromkeys(arms, 0.0)
    runs: dict[str, Any] = {}
    for name, arm in arms.items():
        training = {"epochs": 1, "batch": given.batch, "precision": "float32"}
        asked = trial.Setting(
            arm=arm, base=given.base, data=given.data, max_length=given.max_length, train_rows=given.rows,
            training=training, cache=False,
        )  # fmt: skip
        ready = trial.prepare(asked, ("train",))
        attached = build(ready.plan, ready.base, ready.task, seed=0)
        attached.model.to(ready.device)
        sets, cost = trial.examples(ready, attached)
        building[name] = cost.get("states_seconds", 0.0)
        runs[name] = (ready, attached, sets["train"])
    for turn in range(-1, given.rounds):  # the first warms up
        for name in np.roll(list(runs), -turn):
            ready, attached, rows = runs[name]
            seconds = train(attached, rows, None, ready.task, replace(ready.training, seed=turn + 1)).seconds
            if turn >= 0:
                took[name].append(seconds)
    return took, building


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="embedded:minilm")
    parser.add_argument("--data", default="embedded:stdlib-topics")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    claims = {claim.measure: replace(claim, base=given.base) for claim in registry.find("telly").record.claims}
    print(f"batch {given.batch}, threads {torch.get_num_threads()}: {environment()}")
    step = step_time(claims["step_time"], batch=given.batch, tokens=given.max_length, rounds=given.rounds)
    print(f"steps: {step['detail']}{'' if step['measured'] <= RATIO else '  OVER THE LIMIT'}")
    print(f"bytes: {saved_bytes(claims['saved_bytes'], batch=given.batch, tokens=given.max_length)['detail']}")
    count = len(blocks(trial.open_base(given.base).backbone()))
    arms = {"full": "full" + HEAD}
    for k in depths(count)[1:]:
        arms |= {f"k={k}": f"telly:k={k},cache=false{HEAD}", f"k={k} kept": f"telly:k={k}{HEAD}"}
    took, building = epochs(given, arms)
    once = {name: statistics.median(found) for name, found in took.items()}
    print(f"full: {once['full']:.2f} s an epoch of {given.rows} rows")
    for name in list(arms)[1:]:
        spread = sorted(a / b for a, b in zip(took[name], took["full"], strict=True))
        ten = (10 * once[name] + building[name]) / (10 * once["full"])
        print(
            f"{name}: an epoch {once[name] / once['full']:.2f} of full ({spread[0]:.2f} to {spread[-1]:.2f}), states "
            f"built in {building[name]:.2f} s, ten epochs with building {ten:.2f} of full"
        )


if __name__ == "__main__":
    main()
