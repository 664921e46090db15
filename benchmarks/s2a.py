"""LoRA with 4-bit saved activations against LoRA: bytes kept (counted), gradient cosine and step time (measured).

All ratios come from one run on one base, the arms taking turns, AdamW included in the step. Limits: at least 4 times
fewer bytes with eager attention, cosine at least 0.998, a step at most 1.4 times as long.

    python benchmarks/s2a.py --rounds 8
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from brickyard.checks.s2a import saved_bytes, step_time
from brickyard.core import registry
from brickyard.core.measure import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="embedded:minilm")
    parser.add_argument("--data", default="embedded:stdlib-topics")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    claim = replace(registry.find("s2a").record.claims[0], base=given.base, data=given.data)
    print(f"threads {torch.get_num_threads()}: {environment()}")
    size = saved_bytes(claim, batch=given.batch, tokens=given.tokens)
    print(f"bytes: {size['detail']}{'' if size['holds'] is True else '  OVER THE LIMIT'}")
    time = step_time(claim, batch=given.batch, tokens=given.tokens, rounds=given.rounds)
    print(f"steps: {time['detail']}{'' if time['holds'] is True else '  OVER THE LIMIT'}")


if __name__ == "__main__":
    main()
