"""The covariance pass of CCA Merge, as ratios to one forward pass of the same networks and to its own products alone.

`python benchmarks/cca_merge.py [--width 512] [--rows 4096] [--models 2] [--rounds 5]` streams rows through perceptrons.
The products alone are 2 m n^2 operations for each of the 2 K - 1 blocks of every point, in float64. A convolutional
network stands beside, whose samples are pixels. Memory is counted: what the moments hold, and what storing all
activations would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from brickyard.merge._align_measure import measured
from brickyard.merge._align_points import discover


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convnet(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def seconds(work: Callable[[], object], rounds: int) -> float:
    work()
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        out.append(time.perf_counter() - start)
    return statistics.median(out)


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    out = {}
    rows, conv_rows = torch.randn(args.rows, 64), torch.randn(max(args.rows // 32, args.width // 4), 3, 16, 16)
    for name, make, inputs in (("perceptron", perceptron, rows), ("convolutions", convnet, conv_rows)):
        models = [make(args.width if name == "perceptron" else args.width // 8).eval() for _ in range(args.models)]
        out[name] = _one(models, inputs, args.rounds)
    print(json.dumps(out, indent=2))


def _one(models: list[nn.Module], inputs: Tensor, rounds: int) -> dict[str, object]:
    batches = list(inputs.split(256))
    points = discover(models[0])
    moments = measured(models, points, batches)
    blocks = 2 * len(models) - 1
    samples = {p.name: moments[p.name].samples for p in points}
    features = {p.name: torch.randn(min(samples[p.name], 16384), p.width, dtype=torch.float64) for p in points}

    @torch.no_grad()
    def forward() -> None:
        for model in models:
            for batch in batches:
                model(batch)

    def products() -> None:
        for x_mn in features.values():
            for _ in range(blocks):
                x_mn.T @ x_mn

    whole = seconds(lambda: measured(models, points, batches), rounds)
    once = seconds(forward, rounds)
    share = sum(len(x) for x in features.values()) / sum(samples.values())
    alone = seconds(products, rounds) / share
    return {
        "points": {p.name: {"features": p.width, "samples": samples[p.name]} for p in points},
        "flops_of_products": sum(2 * blocks * samples[p.name] * p.width**2 for p in points),
        "seconds": {"pass": whole, "forward": once, "products alone": alone},
        "ratios": {
            "pass / forward": whole / once,
            "pass / (forward + products alone)": whole / (once + alone),
        },
        "bytes": {
            "moments": sum(8 * blocks * p.width**2 for p in points),
            "all activations in float32": sum(4 * len(models) * samples[p.name] * p.width for p in points),
        },
        "kinds": {"seconds": "measured", "flops_of_products": "counted", "bytes": "counted"},
    }


if __name__ == "__main__":
    main()
