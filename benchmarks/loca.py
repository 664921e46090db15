"""LoCA at the paper's budget against PEFT's LoRA on the same layers: step time and bytes kept for backward.

Both ratios come from one run on a BERT of the shape of all-MiniLM-L6-v2 with random weights (neither figure depends on
them), eager attention, AdamW included in the step. 1000 coefficients for each query and value matrix, LoRA of rank 8.
Steps that train coefficients, positions, and both (as without the loop's turns) are timed apart; the first are nine
tenths of a training and more. Limits: 2 in time (measured), 1.02 in bytes (counted).

    python benchmarks/loca.py --rounds 9
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig

from brickyard.core.inject import BrickyardConfig, register
from brickyard.core.measure import environment, interleaved, saved_for_backward_bytes
from brickyard.core.wrap import ADAPTER
from brickyard.tune._cosines import COEFFICIENTS, POSITIONS

LAYERS = ["query", "value"]
TIME, BYTES = 2.0, 1.02
LEARNS = {"coefficients": COEFFICIENTS, "positions": POSITIONS, "both": None}


def adapted(frequencies: int, mode: str = "auto") -> nn.Module:
    """LoCA, or LoRA for 0 frequencies."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = AutoModelForSequenceClassification.from_config(shape, attn_implementation="eager")
    if not frequencies:
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS)).train()
    options = {"n_frequency": frequencies, "mode": mode}
    return get_peft_model(model, BrickyardConfig(method="loca", options=options, seed=0)).train()


def step(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, learns: str | None = None) -> Callable[[], None]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tuner: Any = model.base_model

    def run() -> None:
        if hasattr(tuner, "layers"):
            for _, layer in tuner.layers():
                layer.drawn[ADAPTER] = learns
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--frequencies", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    register()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, 1000, (given.batch, given.tokens), generator=generator),
        "attention_mask": torch.ones(given.batch, given.tokens, dtype=torch.int64),
    }
    labels = torch.randint(0, 2, (given.batch,), generator=generator)
    print(
        f"batch {given.batch}, {given.tokens} tokens, {given.frequencies} frequencies, threads "
        f"{torch.get_num_threads()}: {environment()}"
    )
    lora = adapted(0)
    kept = saved_for_backward_bytes(lora, inputs, lambda logits: nn.functional.cross_entropy(logits, labels))
    runs = {"lora": step(lora, inputs, labels)}
    sizes = {}
    for mode in ("auto", "tokens", "dense"):
        model = adapted(given.frequencies, mode)
        size = saved_for_backward_bytes(model, inputs, lambda logits: nn.functional.cross_entropy(logits, labels))
        sizes[mode] = size / kept
        timed = LEARNS if mode == "auto" else {"both": None}
        runs |= {f"{mode}, {name}": step(model, inputs, labels, learns) for name, learns in timed.items()}
    seconds = interleaved(runs, given.rounds, warmup=2)
    for name in list(runs)[1:]:
        mode = name.partition(",")[0]
        time, size = seconds[name] / seconds["lora"], sizes[mode]
        over = "  OVER THE LIMIT" if mode == "auto" and (time > TIME or size > BYTES) else ""
        print(
            f"{name}: step {1e3 * seconds[name]:.0f} ms / {1e3 * seconds['lora']:.0f} ms = {time:.3f} (limit {TIME}, "
            f"measured); kept {size:.4f} of {kept} bytes (limit {BYTES}, counted){over}"
        )


if __name__ == "__main__":
    main()
