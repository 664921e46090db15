"""What routing costs in serving: a switch of experts against a generation of 128 tokens, the router against a forward.

    python benchmarks/mediator.py [--rounds 5] [--tokens 128] [--density 0.1]

Ratios of times taken in turn within one process, all blocks routed (the worst case). Limits: a switch, there and back,
below 5 % of the generation; the router reads its prompt in one forward of the dense model and a small product more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from brickyard.checks._steps import in_turn, mean_ratio
from brickyard.core.base import open_base
from brickyard.core.generate import Decoding
from brickyard.core.measure import environment
from brickyard.route._conflict import block_tensors
from brickyard.route._routed_model import RoutedModel, network_of
from brickyard.route._router import fit_router, states_of
from brickyard.route.mediator import Config, decompose

SWITCH = 0.05  # of a generation, by the method's card
PROMPT = "def read(path):\n    with open(path) as file:\n        return file"


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
    width = base.width
    states = [torch.randn(40, width, generator=draw) + shift for shift in (0.0, 1.0)]
    router = fit_router(states, states, tokens=128)
    model = RoutedModel(base, network, packed, router, language=language)
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
        states_of(network, base, [PROMPT], 128)

    taken = in_turn(
        {
            "switch": switch("one"),
            "blended switch": switch(both),
            "generation": generate,
            "forward": forward,
            "router": lambda: model.route([PROMPT]),
        },
        args.rounds,
    )
    print(environment())
    size = sum(tensor.numel() for tensor in dense.values())
    print(f"{size:,} routed weights, density {args.density:g}, {args.tokens} tokens (measured)")
    for name, of, limit in (
        ("switch", "generation", SWITCH),
        ("blended switch", "generation", None),
        ("router", "forward", None),
        ("router", "generation", None),
    ):
        mean, low, high = mean_ratio(np.asarray(taken[name]) / np.asarray(taken[of]))
        over = "  OVER THE LIMIT" if limit is not None and mean > limit else ""
        print(f"{name} / {of}: {mean:.4f} ({low:.4f} to {high:.4f}){over}")


if __name__ == "__main__":
    main()
