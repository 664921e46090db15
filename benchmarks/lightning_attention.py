"""Tokens a second of lightning attention, forward and backward, to 16K positions, beside SDPA and the N x N form.

    python benchmarks/lightning_attention.py [--threads 2] [--rounds 5] [--longest 16384]

All runs alternate in one process; figures are medians, ratios are those of the same round. Resident memory is that of
a process of its own for each length. On a GPU flash-linear-attention stands beside them where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from brickyard.checks.lightning_attention import (
    HEADS,
    WIDTH,
    Form,
    ratio,
    softmax_form,
    step,
    tiled_form,
    timed,
)
from brickyard.core.measure import environment, resident_high_water
from brickyard.models.lightning_attention import geometric_slopes, matrix_form

FLAT, FASTER = 1.3, 5.0  # limits: growth of the time per token from 1K to 16K, and SDPA's over ours at 4K
MATRIX_MOST, SDPA_MOST = 4096, 8192  # positions: beyond them the CPU's memory or patience ends


def matrix(device: str) -> Form:
    """The N x N form."""
    slopes_H = torch.tensor(geometric_slopes(HEADS), device=device)
    return lambda q, k, v: matrix_form(q, k, v, slopes_H)[0]


def flash_linear_attention(device: str) -> Form:
    """fla's chunked form with our decays; it takes [B, N, H, d], log decays and a scale."""
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

    log_decay_H = -torch.tensor(geometric_slopes(HEADS), device=device)

    def form(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return chunk_simple_gla(q, k, v, g=log_decay_H.expand(*q.shape[:3]), scale=1.0)[0].transpose(1, 2)

    return form


def resident(length: int, threads: int) -> int:
    """Bytes that a process of its own needs at most for two steps at `length`."""
    command = [sys.executable, __file__, "--resident", str(length), "--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--resident", type=int, help="only run this length and print the process's peak memory")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiled = tiled_form(device=device)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    if args.resident:
        for _ in range(2):
            step(tiled, args.resident, **options)()
        print(resident_high_water())
        return
    lengths = [n for n in (1024 * 2**i for i in range(8)) if n <= args.longest]
    runs: dict[tuple[str, int], tuple[Form, int]] = {("tiled", n): (tiled, n) for n in lengths}
    far = device == "cuda"
    runs |= {("sdpa", n): (softmax_form, n) for n in lengths if far or n <= SDPA_MOST}
    runs |= {("matrix", n): (matrix(device), n) for n in lengths if n <= MATRIX_MOST}
    if far and importlib.util.find_spec("fla") is not None:
        runs |= {("fla", n): (flash_linear_attention(device), n) for n in lengths}
    taken = timed(runs, args.rounds, at_least=4096, **options)
    speeds = {f"{name} {n}": round(1 / float(np.median(found))) for (name, n), found in taken.items()}
    grows = ratio(taken["tiled", lengths[-1]], taken["tiled", lengths[0]])
    faster = ratio(taken["sdpa", 4096], taken["tiled", 4096])
    out: dict[str, Any] = {
        "shape": f"[1, {HEADS}, N, {WIDTH}], {options['dtype']}, {device}, {args.threads} threads, kind: measured",
        "tokens_per_second": speeds,
        f"time a token at {lengths[-1]} over {lengths[0]}": {"mean, low, high": grows, "limit": f"<= {FLAT}"},
        "times the speed of SDPA at 4096": {"mean, low, high": faster, "limit": f">= {FASTER}"},
    }
    if device == "cpu":
        memory = [resident(n, args.threads) for n in lengths[-3:]]
        growth = (memory[2] - memory[1]) / (2 * (memory[1] - memory[0]))
        limit = "1 where memory is linear in the length"
        out["resident megabytes"] = dict(zip(lengths[-3:], (m // 2**20 for m in memory), strict=True))
        out["growth of resident memory over twice the one before"] = {"found": growth, "limit": limit}
    print(json.dumps({**out, "environment": environment()}, indent=2))


if __name__ == "__main__":
    main()
