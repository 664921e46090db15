"""A decoder of plain torch modules, for checks that need a chain of blocks of any size and nobody's weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS = "blocks"


class Block(nn.Module):
    """Attention and a gated feed-forward layer, both behind a norm and beside the stream: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, h_BTD: Tensor) -> Tensor:
        B, T, D = h_BTD.shape
        q, k, v = self.qkv(self.norm1(h_BTD)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h_BTD = h_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        x_BTD = self.norm2(h_BTD)
        return h_BTD + self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Decoder(nn.Module):
    """Embedding -> blocks -> norm -> output layer: tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, *, vocabulary: int, width: int, layers: int, heads: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        h_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            h_BTD = block(h_BTD)
        return self.head(self.norm(h_BTD))

    @property
    def block_names(self) -> list[str]:
        """The names of the repeated blocks, in the order in which they compute."""
        return [f"{BLOCKS}.{i}" for i in range(len(self.blocks))]


def next_token_loss(model: Decoder, tokens_BT: Tensor) -> Tensor:
    """Return the mean cross entropy of every token after the first."""
    logits = model(tokens_BT[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())


def random_tokens(vocabulary: int, rows: int, length: int, seed: int = 0) -> Tensor:
    """Return tokens [rows, length], each mostly the one before plus one, so that there is something to learn."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary, (rows, 1), generator=g)
    rule = (first + torch.arange(length)) % vocabulary
    noise = torch.randint(vocabulary, (rows, length), generator=g)
    return torch.where(torch.rand(rows, length, generator=g) < 0.1, noise, rule)


def write_random(path: Path, model: nn.Module, *, seed: int = 0) -> None:
    """Write random weights for a model on the meta device as safetensors, with the memory of its largest tensor.

    A draw of 2^20 numbers (times 0.02; norms are ones) is repeated to a tensor's size, so that gigabytes take seconds.
    """
    header, at, names = {}, 0, {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        size = p.numel() * p.dtype.itemsize
        header[name] = {"dtype": names[p.dtype], "shape": list(p.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for p in parameters.values():
            file.write(_draw(p, seed))
        file.flush()
        os.fsync(file.fileno())


def _draw(p: nn.Parameter, seed: int) -> memoryview:
    g = torch.Generator().manual_seed(seed * 1_000_003 + p.numel())
    values = torch.ones(p.numel()) if p.ndim < 2 else torch.randn(min(p.numel(), 1 << 20), generator=g) * 0.02
    whole = values.repeat(-(-p.numel() // len(values)))[: p.numel()].to(p.dtype)
    flat: object = whole.view(torch.uint8).numpy()
    return memoryview(flat)  # type: ignore[arg-type]
