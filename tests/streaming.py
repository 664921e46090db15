"""Streamed models that the tests of zo2 share, and what ZO-SGD in memory makes of the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from brickyard.checks._decoder import Decoder, next_token_loss, random_tokens
from brickyard.optim._slow_tier import HostTier
from brickyard.optim._streaming import Chain, Streamed, Trained
from brickyard.optim._zo_optimizer import ZerothOrder
from brickyard.optim.zo2 import Config, stream

VOCABULARY, LAYERS = 40, 3
LR, EPS = 1e-2, 1e-3
TOKENS = random_tokens(VOCABULARY, 6, 12)


def decoder(*, tied: bool = False, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Decoder:
    torch.manual_seed(0)
    return Decoder(vocabulary=VOCABULARY, width=16, layers=layers, tied=tied).to(dtype).eval()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def in_memory(model: Decoder, steps: int, *, decay: float = 0.0) -> dict[str, Tensor]:
    """Train with the project's own ZO-SGD and return the weights."""
    model = copy.deepcopy(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    # One group, so that parameters have the numbers that `stream` gives them; decay is set by tensor afterwards.
    optimiser = ZerothOrder(list(model.parameters()), lr=LR, eps=EPS, seed=7)
    if decay:
        rates = optimiser.rates()
        decayed = {id(p) for p in matrices}
        rates = {i: rates[i]._replace(decay=decay if id(p) in decayed else 0.0) for i, p in optimiser.numbered}
        optimiser.rates = lambda: rates  # type: ignore[method-assign]
    for k in range(steps):
        optimiser.step(lambda k=k: next_token_loss(model, TOKENS[k % 3 :: 3]))
    return values(model)


def from_host(model: Decoder, **options: Any) -> Streamed:
    chain = Chain.of(model, model.block_names)
    layout = chain.layout()
    given = [[u.parameters[p.name] for p in b.pieces] for u, b in zip(chain.blocks, layout, strict=True)]
    trained = {name: Trained(i) for i, (name, _) in enumerate(model.named_parameters())}
    cpu = torch.device("cpu")
    return Streamed(chain, HostTier(layout, given, cpu), trained=trained, seed=7, eps=EPS, device=cpu, **options)


def from_file(
    model: Decoder, folder: Path, config: Config | None = None, *, frozen: str | None = None, **options: Any
) -> tuple[Decoder, Streamed]:
    """Store the weights of `model` and open a model without memory on them, in `folder` / run; `frozen` stays."""
    folder.mkdir(exist_ok=True)
    path = folder / "base.safetensors"
    if not path.exists():
        save_file({name: p.detach() for name, p in model.named_parameters()}, path)
    tied = model.head.weight is model.embedding.weight
    with torch.device("meta"):
        empty = Decoder(vocabulary=VOCABULARY, width=16, layers=len(model.blocks), tied=tied)
    empty = empty.to(model.norm.weight.dtype).eval()
    if frozen is not None:
        empty.get_parameter(frozen).requires_grad_(False)
    made = stream(
        empty, path, folder / "run", config or Config(), seed=7, blocks=empty.block_names, **{"sync": False, **options}
    )
    return empty, made


def train(model: Decoder, streamed: Streamed, steps: int) -> None:
    for _ in range(steps):
        k = streamed.steps
        streamed.step(lambda k=k: next_token_loss(model, TOKENS[k % 3 :: 3]), LR)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
