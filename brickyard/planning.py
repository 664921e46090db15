"""`brickyard plan`: what arms would cost, from a short probe of each; nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from brickyard.compare.plan import states_seconds
from brickyard.core.arm import parse
from brickyard.core.build import resolve
from brickyard.core.jobs import Job, Local
from brickyard.core.measure import precision
from brickyard.core.trial import Setting


def plan(
    *,
    base: str = "embedded:minilm",
    data: Any,
    methods: Sequence[str],
    dtype: str = "auto",
    threads: int = 1,
    training: dict[str, Any] | None = None,
    **setting: Any,
) -> list[dict[str, Any]]:
    """Estimate memory and time of arms from a short probe on the longest batch; nothing is trained."""
    training = {"precision": precision(dtype, setting.get("device")), **(training or {})}
    out = []
    jobs = []
    for text in methods:
        resolve(parse(text))
        asked = Setting(arm=str(parse(text)), base=base, data=data, training=training, **setting)
        jobs.append(
            Job(
                key=text,
                function="brickyard.core.trial:probe",
                argument={"setting": asdict(asked)},
                threads=threads,
                alone=True,
            )
        )
    for outcome in Local(1).run(jobs):
        row: dict[str, Any] = {"arm": outcome.key, "status": outcome.status, "reason": outcome.reason}
        if outcome.status == "done":
            p = outcome.value
            known = p["training"]
            steps = known["steps"] or math.ceil(known["epochs"] * math.ceil(p["rows"] / p["batch"]))
            row |= {
                k: p[k]
                for k in (
                    "trainable_parameters",
                    "saved_for_backward_bytes",
                    "peak_bytes",
                    "step_ms",
                    "longest",
                    "batch",
                )
            }
            # A run builds the states of every split before it trains, and its training time says so.
            row |= {
                "steps": steps,
                "train_seconds": states_seconds({outcome.key: p})
                + p["curriculum_seconds"]
                + steps * p["mean_step_ms"] / 1000,
            }
        out.append(row)
    return out
