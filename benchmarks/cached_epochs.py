"""Epochs of a head on cached states against epochs of LoRA on the same rows: seconds (measured) and bytes (counted).

The arms take turns, one epoch each, in one process and with the same batches. Building the states is timed apart and
then charged in full to each head. Limits: an epoch of a head takes at most 1/20 of LoRA's; ten epochs and the building
together at most 1/8 of ten epochs of LoRA; MP keeps at most 6.6 MiB for backward at B=32, T=64.

    python benchmarks/cached_epochs.py --rows 512 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.arm import parse
from brickyard.core.base import Base, open_base
from brickyard.core.batches import Encoded, encode
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.files import cache_folder
from brickyard.core.loop import Training, train
from brickyard.core.measure import environment, saved_for_backward_bytes
from brickyard.core.states import States
from brickyard.core.task import Task, task_of

LORA = "lora:r=8"
HEADS = ("linear-probe", "moment-probing:p=128,h=4")
EPOCH, TEN_EPOCHS, BYTES = 20.0, 8.0, 6.6 * 2**20


def states_for(arm: str, base: Base, task: Task, rows: Encoded, *, cache: bool) -> States:
    """The states that one head reads: all tokens, or one vector per row where that is all it needs."""
    model: Any = build(resolve(parse(arm), task), base, task, seed=0).model
    return States.of(
        model.backbone, rows, base=base.fingerprint, pool=getattr(model.head, "frozen_pool", None), cache=cache
    )


def epoch(arm: str, base: Base, task: Task, rows: Any, batch: int, seed: int) -> float:
    """Seconds of one epoch, without set-up."""
    attached = build(resolve(parse(arm), task), base, task, seed=seed)
    training = Training(lr=1e-3, epochs=1, batch=batch, seed=seed)
    return train(attached, rows, None, task, training).seconds


def kept_bytes(arm: str, base: Base, task: Task, batch: int, tokens: int) -> int:
    """Bytes that one forward keeps for backward on full batches, eager attention, dropout off."""
    model: Any = build(resolve(parse(arm), task), base, task, seed=0, attention="eager").model
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    if arm == LORA:
        ids = torch.randint(1000, 2000, (batch, tokens), generator=generator)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    else:
        inputs = {"states": (torch.randn(batch, tokens, base.width, generator=generator), mask.bool())}
    labels = torch.arange(batch) % task.width

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)

    return saved_for_backward_bytes(model, inputs, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="embedded:minilm")
    parser.add_argument("--data", default="embedded:stdlib-topics")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    base, data = open_base(given.base), read_data(given.data)
    task = task_of(data)
    everything = encode(data.splits["train"], base, task, max_length=given.max_length)
    rows = everything.take(np.arange(min(given.rows, len(everything))))
    print(
        f"{len(rows)} rows of {given.data}, {rows.lengths.mean():.1f} tokens on average, at most {given.max_length}; "
        f"batch {given.batch}, threads {torch.get_num_threads()}: {environment()}"
    )
    cached = {arm: states_for(arm, base, task, rows, cache=False) for arm in HEADS}
    seconds: dict[str, list[float]] = {arm: [] for arm in (*HEADS, LORA)}
    for arm in seconds:  # a first epoch warms caches and allocators
        few = np.arange(min(2 * given.batch, len(rows)))
        warm = rows.take(few)
        epoch(arm, base, task, warm if arm == LORA else states_for(arm, base, task, warm, cache=False), given.batch, 0)
    for seed in range(given.rounds):
        for arm in seconds:
            seconds[arm].append(epoch(arm, base, task, cached.get(arm, rows), given.batch, seed))
    took = {arm: statistics.median(found) for arm, found in seconds.items()}
    print(f"{LORA}: {took[LORA]:.3f} s an epoch")
    for arm in HEADS:
        ratio = took[LORA] / took[arm]
        ten = 10 * took[LORA] / (10 * took[arm] + cached[arm].seconds)
        spread = [a / b for a, b in zip(seconds[LORA], seconds[arm], strict=True)]
        print(
            f"{arm}: {took[arm]:.3f} s an epoch, {ratio:.1f}x faster ({min(spread):.1f} to {max(spread):.1f}; limit "
            f"{EPOCH:g}); states {cached[arm].bytes:,} bytes built in {cached[arm].seconds:.2f} s; ten epochs with "
            f"building {ten:.1f}x faster (limit {TEN_EPOCHS:g})"
            f"{'' if ratio >= EPOCH and ten >= TEN_EPOCHS else '  OVER THE LIMIT'}"
        )
    with tempfile.TemporaryDirectory() as folder:
        reopened(base, task, rows, Path(folder))
    kept = {arm: kept_bytes(arm, base, task, 32, 64) for arm in (*HEADS, LORA)}
    for arm, size in kept.items():
        over = "  OVER THE LIMIT" if arm.startswith("moment-probing") and size > BYTES else ""
        print(f"{arm}: {size / 2**20:.2f} MiB kept for backward at B=32, T=64 (counted){over}")


def reopened(base: Base, task: Task, rows: Encoded, folder: Path) -> None:
    """Time building an entry on disk and finding it again."""
    os.environ["BRICKYARD_CACHE"] = str(folder)
    first = states_for(HEADS[1], base, task, rows, cache=True)
    model: Any = build(resolve(parse(HEADS[1]), task), base, task, seed=0).model
    started = time.monotonic()
    again = States.of(model.backbone, rows, base=base.fingerprint)
    took = time.monotonic() - started
    assert not again.built and again.forwards == 0 and cache_folder() == folder
    print(f"an entry on disk: built in {first.seconds:.2f} s, found again and checked in {took:.3f} s")


if __name__ == "__main__":
    main()
