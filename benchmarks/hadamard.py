"""The Hadamard transform against a copy of the same bytes, both into new memory. Limit: 3 times for powers of two.

    python benchmarks/hadamard.py [--threads 1] [--rounds 9]

"over inputs" transforms the rows of [B, M] (activations and weights), "over tokens" its columns (the error of level 2).
Sizes with a base other than 1 multiply by that base as a whole and have no limit. Ratios are of medians, the two taking
turns in one process.
"""

from __future__ import annotations

import argparse

from brickyard.core.process import settle

SIZES = ((65536, 128), (32768, 256), (16384, 512), (8192, 1024), (4096, 2048), (2048, 4096))
OTHERS = ((8192, 688), (8192, 768), (2048, 1376))
LIMIT = 3.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    settle()
    import torch

    from brickyard.core.measure import environment, interleaved
    from brickyard.optim._hadamard import transform

    torch.set_num_threads(given.threads)
    print(environment())
    for tokens, inputs in (*SIZES, *OTHERS):
        x_BM = torch.randn(tokens, inputs)
        runs = {
            "copy": x_BM.clone,
            "over inputs": lambda x=x_BM: transform(x),
            "over tokens": lambda x=x_BM: transform(x, 0),
        }
        took = interleaved(runs, given.rounds, warmup=2)
        ratio = {name: took[name] / took["copy"] for name in took if name != "copy"}
        said = ", ".join(f"{name} {value:.2f} of a copy" for name, value in ratio.items())
        over = (tokens, inputs) in SIZES and ratio["over inputs"] > LIMIT
        print(f"{tokens} x {inputs}: {said}{'  OVER THE LIMIT' if over else ''}")


if __name__ == "__main__":
    main()
