"""Training steps with EMoE against dense ones: time (measured) and bytes kept for the backward pass (counted).

Both take turns in one run, AdamW included in the step, so the ratio is of one machine at one moment. The limit is a
step at most 1.05 times as long. No speed is claimed: neurons that a mask switches off are multiplied all the same.

    python benchmarks/emoe.py --tuner full --rounds 12
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from brickyard.checks.s2a import Rows, _ratio, _step
from brickyard.core import measure, registry

LIMIT = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="embedded:minilm")
    parser.add_argument("--data", default="embedded:stdlib-topics")
    parser.add_argument("--tuner", default="full")
    parser.add_argument("--emoe", default="emoe:experts=32,topk=16,layers=4")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    claim = replace(registry.find("emoe").record.claims[0], base=given.base, data=given.data)
    print(f"threads {torch.get_num_threads()}: {measure.environment()}")
    rows = Rows(claim, given.batch, given.tokens)
    arms = {"dense": given.tuner, "emoe": f"{given.tuner} + {given.emoe}"}
    kept = {name: rows.kept(arm).bytes for name, arm in arms.items()}
    with ExitStack() as stack:
        steps = {}
        for name, arm in arms.items():
            attached = rows.attached(arm, "sdpa")
            stack.enter_context(attached.saving())
            steps[name] = _step(attached, rows, rows.batches[0])
            steps[name]()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(given.rounds):
            for name in np.roll(list(steps), turn):
                seconds[name].append(measure.step_time(steps[name], warmup=0, repeats=1))
    mean, low, high = _ratio(np.array(seconds["emoe"]) / np.array(seconds["dense"]))
    least = min(seconds["emoe"]) / min(seconds["dense"])
    print(
        f"step time emoe / dense, {given.tuner}, B={given.batch}, T={given.tokens}: {mean:.3f} ({low:.3f} to "
        f"{high:.3f}), of the least times {least:.3f} (measured){'' if low <= LIMIT else '  OVER THE LIMIT'}"
    )
    print(
        f"kept for backward: dense {kept['dense']:,} bytes, emoe {kept['emoe']:,} "
        f"({kept['emoe'] / kept['dense']:.4f} times; counted)"
    )


if __name__ == "__main__":
    main()
