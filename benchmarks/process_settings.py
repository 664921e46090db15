"""What the settings of `core/process` gain: seconds of a training step with them over seconds without.

    python benchmarks/process_settings.py [--rounds 3]

Every measurement runs in a process of its own, in turn; a ratio below 1 is a gain. LoRA on embedded:minilm, and full
training of embedded:pylm where it is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

STEPS = {"minilm": 12, "pylm": 12}


def measure(case: str, settled: bool) -> float:
    """Return the median seconds of a step, in this process."""
    from brickyard.core.process import settle

    if settled and not settle():
        raise SystemExit("this C library takes no settings; there is nothing to measure.")
    import torch

    from brickyard.checks._steps import attached, one_step
    from brickyard.core.arm import parse
    from brickyard.core.base import open_base
    from brickyard.core.build import build, resolve
    from brickyard.core.measure import step_time
    from brickyard.core.task import Task

    base = open_base(f"embedded:{case}")
    if case == "minilm":
        return step_time(one_step(attached(base, "lora"), base, 32, 64), warmup=3, repeats=STEPS[case])
    task = Task("causal-lm", "bits_per_byte", None, 1, "text")
    made = build(resolve(parse("full"), task), base, task, seed=0)
    ids = torch.randint(int(base.config.vocab_size), (16, 256), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        task.loss(made.model(input_ids=ids).logits, ids).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step_time(step, warmup=3, repeats=STEPS[case])


def main() -> None:
    """Alternate processes with and without the settings and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--settled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.settled)))
        return
    from brickyard import embedded

    for case in STEPS:
        if case not in embedded.BASES:
            continue
        ratios = []
        for _ in range(args.rounds):
            taken = {}
            for settled in (False, True):
                command = [sys.executable, __file__, "--case", case, *(["--settled"] if settled else [])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                taken[settled] = json.loads(done.stdout.splitlines()[-1])
            ratios.append(taken[True] / taken[False])
        print(
            f"{case}: step {statistics.median(ratios):.2f} of the one without ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
