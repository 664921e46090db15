"""A zeroth-order step against one forward of the same batch, and the noise against torch's own generator.

All ratios come from one run, on a BERT of the shape of all-MiniLM-L6-v2 with random weights (no figure depends on
them). A step makes two forwards and three passes of noise. Limits (measured): 2.3 with LoRA parameters, 2.6 with all;
noise, which reads and writes what it is added to, at 1.5 of the rate of `Tensor.normal_`, which only writes.

    python benchmarks/zo.py --rounds 7
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig

from brickyard.core import noise
from brickyard.core.measure import environment, interleaved
from brickyard.optim.zo import ZerothOrder

LORA, FULL, NOISE = 2.3, 2.6, 1.5


def bert(vocabulary: int) -> nn.Module:
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=vocabulary, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return AutoModelForSequenceClassification.from_config(shape, attn_implementation="sdpa").eval()


def step(
    model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, estimator: str = "two-point"
) -> Callable[[], object]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = ZerothOrder(trained, lr=1e-6, estimator=estimator)
    return lambda: optimiser.step(lambda: nn.functional.cross_entropy(model(**inputs).logits, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--numbers", type=int, default=1 << 24, help="of the tensor that takes the noise")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(0, given.vocabulary, (given.batch, given.tokens), generator=generator),
        "attention_mask": torch.ones(given.batch, given.tokens, dtype=torch.int64),
    }
    labels = torch.randint(0, 2, (given.batch,), generator=generator)
    full = bert(given.vocabulary)
    lora = get_peft_model(bert(given.vocabulary), LoraConfig(r=8, target_modules=["query", "value"])).eval()

    def forward(model: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: nn.functional.cross_entropy(model(**inputs).logits, labels))

    seconds = interleaved(
        {
            "forward, lora": forward(lora),
            "lora": step(lora, inputs, labels),
            "forward, full": forward(full),
            "full": step(full, inputs, labels),
        },
        given.rounds,
    )
    print(f"batch {given.batch}, {given.tokens} tokens, threads {torch.get_num_threads()}: {environment()}")
    for name, limit in (("lora", LORA), ("full", FULL)):
        plain, taken = seconds[f"forward, {name}"], seconds[name]
        over = "  OVER THE LIMIT" if taken / plain > limit else ""
        ratio = f"{1e3 * taken:.0f} ms / forward {1e3 * plain:.0f} ms = {taken / plain:.3f}"
        print(f"{name}: step {ratio} (limit {limit}){over}")
    theta, key = torch.zeros(given.numbers), noise.key(0)
    rates = interleaved(
        {"torch": lambda: theta.normal_(), "ours": lambda: noise.add_(theta, [(key, 1e-3)], parameter=0)}, given.rounds
    )
    ratio = rates["torch"] / rates["ours"]
    under = "  UNDER THE LIMIT" if ratio < NOISE else ""
    ours, theirs = (given.numbers / rates[name] / 1e6 for name in ("ours", "torch"))
    print(f"noise: {ours:.0f} M/s / normal_ {theirs:.0f} M/s = {ratio:.2f} (limit {NOISE}){under}")


if __name__ == "__main__":
    main()
