"""Private steps against the plain one and Opacus's: time, and peak bytes counted over tensor storages.

    python benchmarks/dp.py [--rounds 5] [--batch 256] [--full-batch 32] [--tokens 32]

A BERT of the shape of all-MiniLM-L6-v2 with random weights (no figure depends on them); every ratio is of one run, the
steps taking turns, AdamW included. Limits: LoRA on query and value at batch 256: 1.15 of the plain step's time, 0.6 of
Opacus's memory; all parameters at batch 32: a third of Opacus's memory. Opacus is given positions row by row, without
which its rule for embeddings fails on such models.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig

from brickyard.checks._steps import in_turn, mean_ratio
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.build import resolve
from brickyard.core.loop import Backprop, Hooks, State, Training, train_mode
from brickyard.core.measure import environment, peak_bytes
from brickyard.core.registry import load
from brickyard.core.task import Task
from brickyard.private import dp

TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
TIME, LORA_MEMORY, FULL_MEMORY = 1.15, 0.6, 1 / 3


def attached(arm: str) -> Attached:
    """Return an arm on the base."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    plan = resolve(parse(arm), TASK)
    name = plan.arm.pieces[0].name
    return load(name).attach(AutoModelForSequenceClassification.from_config(shape), plan.configs[name], TASK)


def batch_of(batch: int, tokens: int) -> dict[str, Tensor]:
    """Return full rows of random tokens with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30522, (batch, tokens), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(2, (batch,), generator=generator),
    }


def ours(arm: str, inputs: dict[str, Tensor], microbatch: int) -> Callable[[], Any]:
    """Return the loop's plain step (microbatch 0) or the private one."""
    made, batch = attached(arm), len(inputs["labels"])
    training = Training(batch=batch, steps=1000, lr=1e-5, precision="float32")
    step: Any = Backprop(made, training)
    if microbatch:
        config = dp.Config(delta=1e-7, microbatch=microbatch)
        step = dp.step(config, made, training, rows=100 * batch, task=TASK)
    state = State(made, TASK, training, 1000, Accelerator(cpu=True), hooks=Hooks([]))
    train_mode(made.model)
    return lambda: step(state, [(1.0, inputs)])


def opacus_step(arm: str, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """Return a step of Opacus with its own per-sample gradients."""
    made = attached(arm)
    model = GradSampleModule(made.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    batch, tokens = inputs["input_ids"].shape
    optimiser = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch)
    given = {k: v for k, v in inputs.items() if k != "labels"}
    given["position_ids"] = torch.arange(tokens).repeat(batch, 1)
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    model.train()

    def step() -> None:
        nn.functional.cross_entropy(model(**given).logits, inputs["labels"]).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def compared(arm: str, inputs: dict[str, Tensor], rounds: int, microbatch: int) -> dict[str, Any]:
    """Return times and peak bytes of the three steps, and the private one's ratios to the others."""
    steps = {
        "plain": ours(arm, inputs, 0),
        "private": ours(arm, inputs, microbatch),
        "opacus": opacus_step(arm, inputs),
    }
    taken = in_turn(steps, rounds)
    peaks = {name: peak_bytes(step).bytes for name, step in steps.items()}
    return {
        "seconds": {name: round(float(np.median(each)), 4) for name, each in taken.items()},
        "peak_bytes": peaks,
        "time": {
            other: [round(r, 3) for r in mean_ratio(np.array(taken["private"]) / np.array(taken[other]))]
            for other in ("plain", "opacus")
        },
        "memory": {other: round(peaks["private"] / peaks[other], 3) for other in ("plain", "opacus")},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--full-batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--microbatch", type=int, default=64)
    parser.add_argument("--full-microbatch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    lora = compared("lora", batch_of(args.batch, args.tokens), args.rounds, args.microbatch)
    full = compared("full", batch_of(args.full_batch, args.tokens), args.rounds, args.full_microbatch)
    over = {
        f"lora: time {lora['time']['plain'][0]} of the plain step's": lora["time"]["plain"][0] > TIME,
        f"lora: memory {lora['memory']['opacus']} of Opacus's": lora["memory"]["opacus"] > LORA_MEMORY,
        f"full: memory {full['memory']['opacus']} of Opacus's": full["memory"]["opacus"] > FULL_MEMORY,
    }
    print(json.dumps({"lora": lora, "full": full, "asked": vars(args), "environment": environment()}, indent=2))
    for what, too_much in over.items():
        print(f"{what}{'  OVER THE LIMIT' if too_much else ''}")


if __name__ == "__main__":
    main()
