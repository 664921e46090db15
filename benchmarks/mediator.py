"""What routing costs in serving: a switch of experts against a generation of 128 tokens, the router against a forward.

    python benchmarks/mediator.py [--rounds 5] [--tokens 128] [--density 0.1]

Ratios of times taken in turn within one process, all blocks routed (the worst case). Limits: a switch, there and back,
below 5 % of the generation; a router that reads input embeddings decides within 3 % of one forward of its prompt. That
is measured from token ids on either side, on a short prompt and on one as long as a router reads: its cost is fixed, so
the smaller the network and the shorter the prompt, the larger its share. A router of last states runs such a forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from brickyard.checks._steps import in_turn, mean_ratio
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.generate import Decoding
from brickyard.core.measure import environment, interleaved
from brickyard.core.split import Split
from brickyard.core.task import Task
from brickyard.route._conflict import block_tensors
from brickyard.route._routed_model import RoutedModel, network_of
from brickyard.route._router import Router, fit_router, pooled, states_of
from brickyard.route.mediator import Config, decompose

SWITCH = 0.05  # of a generation, by the method's card
READING = 0.03  # of a forward of the prompt
READERS = ("embedded:pylm-small", "embedded:pylm", "embedded:minilm")
TOKENS = 128  # of a prompt that a router reads, at most
PLAIN = Task("text-classification", "accuracy", ("0", "1"), 2, "text")  # text with nothing around it
READS = 50  # interleaved readings and forwards behind each median
PROMPT = "def read(path):\n    with open(path) as file:\n        return file"


def some_router(width: int, reads: str) -> Router:
    """Return a router of two made-up tasks."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(40, width, generator=draw) + shift for shift in (0.0, 1.0)]
    return fit_router(states, states, tokens=TOKENS, reads=reads)


def reading(base: Base, text: str, rounds: int) -> tuple[int, float, np.ndarray]:
    """Return a text's tokens, the median milliseconds of its forward, and the router's ratio to it in each round."""
    network: nn.Module = network_of(base)[0].eval()
    rows = encode(Split({"text": [text]}), base, PLAIN, max_length=TOKENS)
    inputs = {name: tensor for name, tensor in rows.collate(np.arange(1)).items() if name != "labels"}
    router = some_router(pooled(network, rows, "embeddings").shape[1], "embeddings")

    def forward() -> None:
        with torch.no_grad():
            network(**inputs)

    steps = {"forward": forward, "router": lambda: router.routes(pooled(network, rows, "embeddings"))}
    taken = [interleaved(steps, READS) for _ in range(rounds)]
    ratios_R = np.array([one["router"] / one["forward"] for one in taken])
    return int(rows.lengths[0]), 1e3 * float(np.median([one["forward"] for one in taken])), ratios_R


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="embedded:pylm-small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.1)
    args = parser.parse_args()
    base = open_base(args.base)
    network, language = network_of(base)
    assert language is not None
    draw = torch.Generator().manual_seed(0)
    blocks, held = block_tensors(base), language.state_dict()
    dense = {name: held[name].clone() for names in blocks.values() for name in names}
    changed = {
        task: {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=draw) for name, tensor in dense.items()}
        for task in ("one", "other")
    }
    packed = decompose(dense, changed, list(blocks.values()), Config(density=args.density))
    model, reader = (
        RoutedModel(base, network, packed, some_router(base.width, reads), language=language)
        for reads in ("dense", "embeddings")
    )
    both = {"one": 0.5, "other": 0.5}

    def switch(which: str | dict[str, float]) -> Callable[[], None]:
        def run() -> None:
            with model.activate(which):
                pass

        return run

    def generate() -> None:
        # No end token: every round writes as many tokens.
        ids = base.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            language.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=args.tokens,
                pad_token_id=0,
                **Decoding(new_tokens=args.tokens).options(),
            )

    def forward() -> None:
        states_of(network, base, [PROMPT], TOKENS)

    taken = in_turn(
        {
            "switch": switch("one"),
            "blended switch": switch(both),
            "generation": generate,
            "forward": forward,
            "router of last states": lambda: model.route([PROMPT]),
            "router of embeddings": lambda: reader.route([PROMPT]),
        },
        args.rounds,
    )
    print(environment())
    size = sum(tensor.numel() for tensor in dense.values())
    print(f"{size:,} routed weights, density {args.density:g}, {args.tokens} tokens (measured)")
    for name, of, limit in (
        ("switch", "generation", SWITCH),
        ("blended switch", "generation", None),
        ("router of last states", "forward", None),
        ("router of last states", "generation", None),
        ("router of embeddings", "forward", READING),
        ("router of embeddings", "generation", None),
    ):
        show(f"{name} / {of}", np.asarray(taken[name]) / np.asarray(taken[of]), limit)
    print(f"router of embeddings / forward, both from token ids, medians of {READS} (measured)")
    for spec in READERS:
        opened = open_base(spec)
        for text in (PROMPT, "\n".join([PROMPT] * TOKENS)):
            tokens, forward_ms, ratios_R = reading(opened, text, args.rounds)
            show(f"{spec}, {tokens} tokens, forward {forward_ms:.1f} ms", ratios_R, READING)


def show(what: str, ratios_R: np.ndarray, limit: float | None) -> None:
    mean, low, high = mean_ratio(ratios_R)
    over = "  OVER THE LIMIT" if limit is not None and mean > limit else ""
    print(f"{what}: {mean:.4f} ({low:.4f} to {high:.4f}){over}")


if __name__ == "__main__":
    main()
