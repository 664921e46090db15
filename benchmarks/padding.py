"""Examples a second of LoRA: padded to 64 in float32, dynamic padding, bfloat16, length buckets; and what each scores.

`python benchmarks/padding.py [DATA] [--seeds N]` trains N seeds of each and prints speeds (ratios to the padded float32
loop, measured interleaved in this run) and mean accuracies.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from brickyard.core import measure, trial
from brickyard.core.answers import predict
from brickyard.core.base import open_base
from brickyard.core.batches import Order
from brickyard.core.build import build
from brickyard.core.loop import Backprop, Hooks, State, Training, train, train_mode

WAYS = {
    "padded float32": ("float32", False, True),
    "dynamic float32": ("float32", False, False),
    "bucketed float32": ("float32", True, False),
    "dynamic bfloat16": ("bfloat16", False, False),
    "bucketed bfloat16": ("bfloat16", True, False),
}


def padded(batch: dict[str, Any], length: int = 64) -> dict[str, Any]:
    """Pad every row to `length`, as a loop that does not look at its data does."""
    grow = lambda v: torch.nn.functional.pad(v, (0, length - v.shape[1])) if v.ndim == 2 else v  # noqa: E731
    return {k: grow(v) for k, v in batch.items()}


def main() -> None:
    """Measure speed interleaved over all ways, then train where seeds are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", default="embedded:stdlib-topics")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--train-rows", type=int, default=0)
    args = parser.parse_args()
    ready = trial.prepare(trial.Setting(arm="lora", data=args.data, max_length=64, train_rows=args.train_rows))
    rows = ready.encoded["train"]
    runs, counts = {}, 6
    for name, (precision, bucket, full) in WAYS.items():
        attached = build(ready.plan, ready.base, ready.task, seed=0)
        training = Training(precision=precision, bucket=bucket)
        step = Backprop(attached, training)

        state = State(attached, ready.task, training, 1000, Accelerator(cpu=True), hooks=Hooks([]))
        batches = [rows.collate(i) for i in Order(rows.lengths, 32, seed=0, bucket=bucket).epoch(0)[:counts]]
        batches = [padded(b) for b in batches] if full else batches
        train_mode(attached.model)

        def once(step: Any = step, state: Any = state, batches: Any = batches) -> None:
            for batch in batches:
                step(state, [(1.0, batch)])

        runs[name] = once
    seconds = measure.interleaved(runs, 3)
    base = seconds["padded float32"]
    out: dict[str, Any] = {
        name: {"examples_per_s": 32 * counts / s, "times_padded": base / s, "kind": "measured"}
        for name, s in seconds.items()
    }
    for name, (precision, bucket, full) in WAYS.items():
        scores = []
        if full or (precision == "bfloat16" and not measure.cpu_bfloat16_is_fast()):
            continue  # padding changes no number; emulated bfloat16 would take hours to say what fast bfloat16 scores
        for seed in range(1, args.seeds + 1):
            attached = build(ready.plan, open_base("embedded:minilm"), ready.task, seed=seed)
            training = replace(ready.training, precision=precision, bucket=bucket, seed=seed, epochs=args.epochs)
            train(attached, rows, ready.encoded["validation"], ready.task, training, device="cpu")
            logits = predict(attached.model, ready.encoded["test"], precision=precision)
            scores.append(ready.task.score(ready.encoded["test"].labels.numpy(), ready.task.predict(logits)))
        if scores:
            out[name] |= {"accuracy": float(np.mean(scores)), "per_seed": scores}
    print(json.dumps({"data": args.data, "bfloat16_is_fast_here": measure.cpu_bfloat16_is_fast(), **out}, indent=2))


if __name__ == "__main__":
    main()
