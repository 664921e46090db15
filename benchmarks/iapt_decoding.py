"""What prompts cost while decoding: seconds a token of `iapt`, of an un-merged LoRA and of the bare base, in turn.

    python benchmarks/iapt_decoding.py [--rounds 9] [--tokens 100] [--batch 8]

Limits: iapt <= 1.05 times the bare base, and below LoRA. The prefill is left out: every pass begins with its cache.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import nn

from brickyard.checks._steps import in_turn, mean_ratio
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.task import Task

TASK = Task("instruct", "bits_per_byte", None, 1, "text")
ARMS = {"bare": "", "iapt": "iapt:bottleneck=64", "lora": "lora:r=8,target=[query,value]"}


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="embedded:pylm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    base = open_base(args.base)
    prompt = torch.randint(
        16, int(base.config.vocab_size), (args.batch, 64), generator=torch.Generator().manual_seed(0)
    )

    def decoding(arm: str) -> Callable[[], None]:
        made = build(resolve(parse(arm), TASK), base, TASK, seed=0).model if arm else base.model(TASK, seed=0)
        model: nn.Module = made.eval()
        with torch.no_grad():
            filled = model(input_ids=prompt, use_cache=True).past_key_values

        def run() -> None:
            cache = copy.deepcopy(filled)
            token = prompt[:, -1:]
            with torch.no_grad():
                for _ in range(args.tokens):
                    out = model(input_ids=token, past_key_values=cache, use_cache=True)
                    token = out.logits[:, -1:].argmax(-1)

        return run

    taken = in_turn({name: decoding(arm) for name, arm in ARMS.items()}, args.rounds)
    for name, of in (("iapt", "bare"), ("lora", "bare"), ("iapt", "lora")):
        mean, low, high = mean_ratio(torch.tensor(taken[name]).numpy() / torch.tensor(taken[of]).numpy())
        print(f"{name} / {of}: {mean:.3f} ({low:.3f} to {high:.3f}) a token, B={args.batch}, {args.tokens} tokens")


if __name__ == "__main__":
    main()
