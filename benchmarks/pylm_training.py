"""How much of the machine's matrix rate the training of `embedded:pylm` reaches, and what packing wastes.

    python benchmarks/pylm_training.py [--threads 2] [--rounds 7]

One training step (forward, backward, clipping, AdamW; the loop of `scripts/train_pylm.py`) alternates with products of
square matrices in bfloat16 and float32 in one process. FLOPs are counted, attention and head included; the backward
pass is twice the forward. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from brickyard.core.attached import attach_in_place
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import read_data
from brickyard.core.loop import Training, train
from brickyard.core.measure import cpu_bfloat16_is_fast, environment, forward_flops, interleaved

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from train_pylm import BATCH_TOKENS, LONG, SHORT, TASK, Stream, language_model

SIDE = 2048  # of the square matrices
STEPS = 4  # of the loop in one measurement


def matrix_products(dtype: torch.dtype) -> tuple[object, int]:
    """Return a function that multiplies two square matrices, and its FLOPs."""
    a_NN, b_NN = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    return lambda: a_NN @ b_NN, 2 * SIDE**3


def wasted() -> dict[str, float]:
    """Return the share of positions that packing `embedded:python-source` leaves without a target."""
    base = open_base("embedded:pylm")
    found = {}
    for name, split in read_data("embedded:python-source", task="causal-lm").splits.items():
        encoded = encode(split, base, TASK)
        labels = encoded.collate(np.arange(len(encoded)))["labels"]
        found[name] = float((labels == -100).float().mean())
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    precision = "bfloat16" if torch.cuda.is_available() or cpu_bfloat16_is_fast() else "float32"
    ids = np.random.Generator(np.random.PCG64(0)).integers(0, 4096, 2**20).astype(np.uint16)
    runs, flops = {}, {}
    for name, size, compiled in (
        ("blocks of 256", SHORT, False),
        ("blocks of 256, compiled", SHORT, True),
        ("blocks of 1,024, compiled", LONG, True),
    ):
        model = language_model("base", "llama", end=0)
        stream = Stream(ids, 0, size)
        training = Training(steps=STEPS, batch=BATCH_TOKENS // size, lr=1e-4, precision=precision, evaluate_every=10**9)
        batch = stream.collate(np.arange(training.batch))
        flops[name] = 3 * STEPS * forward_flops(model, {k: v for k, v in batch.items() if k != "labels"})
        if compiled:
            model.compile()
        attached = attach_in_place(model, [n for n, _ in model.named_parameters()], matched={}, no_decay=[])

        def step(attached=attached, stream=stream, training=training) -> None:
            train(attached, stream, None, TASK, training)

        runs[name] = step
    for name, dtype in (("bfloat16 products", torch.bfloat16), ("float32 products", torch.float32)):
        runs[name], flops[name] = matrix_products(dtype)
    seconds = interleaved(runs, args.rounds, warmup=2)
    rates = {name: flops[name] / seconds[name] / 1e9 for name in runs}
    best = max(rates["bfloat16 products"], rates["float32 products"])
    print(
        json.dumps(
            {
                "gflops": {name: round(rate, 1) for name, rate in rates.items()},
                "tokens_per_second": {
                    n: round(STEPS * BATCH_TOKENS / seconds[n]) for n in runs if n.startswith("blocks")
                },
                "share_of_bfloat16_products": {n: round(r / rates["bfloat16 products"], 3) for n, r in rates.items()},
                "share_of_the_faster_products": {n: round(r / best, 3) for n, r in rates.items()},
                "positions_without_target": wasted(),
                "threads": args.threads,
                "environment": environment(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
