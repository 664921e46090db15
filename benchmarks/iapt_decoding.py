"""What prompts cost while decoding: seconds a token of `iapt`, of an un-merged LoRA and of the bare base, in turn.

    python benchmarks/iapt_decoding.py [--rounds 9] [--tokens 100] [--batch 8] [--tenants 4]

Limits: iapt <= 1.05 times the bare base, and below LoRA; so too where the rows of a batch belong to several tenants
(`iapt.share`, and PEFT's `adapter_names`). The prefill is left out: every pass begins with its cache.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from brickyard.checks._steps import in_turn, mean_ratio
from brickyard.core import brick as bricks
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.task import Task
from brickyard.tune.iapt import share

TASK = Task("instruct", "bits_per_byte", None, 1, "text")
ARMS = {"bare": "", "iapt": "iapt:bottleneck=64", "lora": "lora:r=8,target=[query,value]"}


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="embedded:pylm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tenants", type=int, default=4)
    args = parser.parse_args()
    base = open_base(args.base)
    prompt = torch.randint(
        16, int(base.config.vocab_size), (args.batch, 64), generator=torch.Generator().manual_seed(0)
    )

    names = [f"t{row % args.tenants}" for row in range(args.batch)]

    def decoding(arm: str) -> Callable[[], None]:
        made = build(resolve(parse(arm), TASK), base, TASK, seed=0).model if arm else base.model(TASK, seed=0)
        return steps(made.eval())

    def steps(
        model: nn.Module, prefill: AbstractContextManager[Any] | None = None, **options: Any
    ) -> Callable[[], None]:
        with torch.no_grad(), prefill or nullcontext():
            filled = model(input_ids=prompt, use_cache=True, **options).past_key_values

        def run() -> None:
            cache = copy.deepcopy(filled)
            token = prompt[:, -1:]
            with torch.no_grad():
                for _ in range(args.tokens):
                    out = model(input_ids=token, past_key_values=cache, use_cache=True, **options)
                    token = out.logits[:, -1:].argmax(-1)

        return run

    def tenants(arm: str, place: Path) -> Callable[[], None]:
        folders = {}
        for seed, name in enumerate(dict.fromkeys(names)):
            plan = resolve(parse(arm), TASK)
            bricks.save(place / name, build(plan, base, TASK, seed=seed), plan, base, TASK, seed=seed, about={})
            folders[name] = place / name
        if arm == ARMS["iapt"]:
            shared = share(base, folders)
            return steps(shared.model, shared.rows(names))
        first, *rest = folders
        model = PeftModel.from_pretrained(base.model(TASK, seed=0), str(folders[first]), adapter_name=first)
        for name in rest:
            model.load_adapter(str(folders[name]), adapter_name=name)
        return steps(model.eval(), adapter_names=names)

    runs = {name: decoding(arm) for name, arm in ARMS.items()}
    pairs = [("iapt", "bare"), ("lora", "bare"), ("iapt", "lora")]
    with tempfile.TemporaryDirectory() as place:
        for name in ("iapt", "lora"):
            runs[f"{name}, {args.tenants} tenants"] = tenants(ARMS[name], Path(place) / name)
    mixed = [name for name in runs if name not in ARMS]
    pairs += [(mixed[0], "bare"), (mixed[1], "bare"), (mixed[0], mixed[1])]
    taken = in_turn(runs, args.rounds)
    for name, of in pairs:
        mean, low, high = mean_ratio(torch.tensor(taken[name]).numpy() / torch.tensor(taken[of]).numpy())
        print(f"{name} / {of}: {mean:.3f} ({low:.3f} to {high:.3f}) a token, B={args.batch}, {args.tokens} tokens")


if __name__ == "__main__":
    main()
