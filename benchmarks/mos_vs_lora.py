"""MoS against PEFT's LoRA of the same assembled rank on the same layers: step time and bytes kept for backward.

Both ratios come from one run on a BERT of the shape of all-MiniLM-L6-v2 with random weights (neither figure depends on
them), eager attention, AdamW included in the step. Limits: 1.05 in time (measured), 1.02 in bytes (counted).

    python benchmarks/mos_vs_lora.py --rounds 9
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig

from brickyard.core.inject import BrickyardConfig, register
from brickyard.core.measure import environment, interleaved, saved_for_backward_bytes

LAYERS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
TIME, BYTES = 1.05, 1.02


def adapted(kind: str, rank: int, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = AutoModelForSequenceClassification.from_config(shape, attn_implementation="eager")
    if kind == "mos":
        options = {"r": rank, "e": 2, "p": 1, "l": 4, "alpha": 16.0, "dropout": dropout}
        return get_peft_model(model, BrickyardConfig(method="mos", options=options, seed=0)).train()
    config = LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=LAYERS, exclude_modules=["pooler.dense"]
    )
    return get_peft_model(model, config).train()


def step(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Callable[[], None]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def kept_as_trained(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of the storages saved with dropout on, masks included; `saved_for_backward_bytes` turns it off."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    register()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, 1000, (given.batch, given.tokens), generator=generator),
        "attention_mask": torch.ones(given.batch, given.tokens, dtype=torch.int64),
    }
    labels = torch.randint(0, 2, (given.batch,), generator=generator)
    about = environment()
    print(f"batch {given.batch}, {given.tokens} tokens, rank {given.rank}, threads {torch.get_num_threads()}: {about}")
    for dropout in (0.0, 0.1):
        models = {kind: adapted(kind, given.rank, dropout) for kind in ("mos", "lora")}
        seconds = interleaved({k: step(m, inputs, labels) for k, m in models.items()}, given.rounds, warmup=2)
        kept = {
            k: saved_for_backward_bytes(m, inputs, lambda logits: nn.functional.cross_entropy(logits, labels))
            for k, m in models.items()
        }
        time, size = seconds["mos"] / seconds["lora"], kept["mos"] / kept["lora"]
        trained = kept_as_trained(models["mos"], inputs) / kept_as_trained(models["lora"], inputs)
        over = "" if time <= TIME and max(size, trained) <= BYTES else "  OVER THE LIMIT"
        print(
            f"dropout {dropout}: step {1e3 * seconds['mos']:.0f} ms / {1e3 * seconds['lora']:.0f} ms = {time:.3f} "
            f"(limit {TIME}, measured); kept {kept['mos']} / {kept['lora']} bytes = {size:.4f} (limit {BYTES}, counted)"
            f", with dropout on {trained:.4f}{over}"
        )


if __name__ == "__main__":
    main()
