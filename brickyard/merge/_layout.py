"""Which tensors go into which file of a model, and where each lies in it: the headers of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from brickyard.core.safetensors_check import BITS
from brickyard.merge._inputs import FLOATS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes, as other writers cut them
_SUFFIX = {"F16": "F16", "BF16": "BF16", "F32": "F32", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def shards(places: Mapping[str, tuple[Path, Any]], dtype: str | None, limit: int) -> dict[str, dict[str, Any]]:
    """Return file name -> safetensors header of a model with the base's tensors, as files of at most `limit` bytes.

    Tensors go to the files in the order of their names; inside a file the wide types come first, which keeps every
    tensor aligned to its own size.
    """
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (_, info) in sorted(places.items()):
        kind = _SUFFIX[dtype] if dtype and info.dtype in FLOATS else info.dtype
        size = info.elements * BITS[kind] // 8
        if groups[-1] and filled + size > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = (kind, info.shape)
        filled += size
    names = [SINGLE] if len(groups) == 1 else _numbered(len(groups))
    out: dict[str, dict[str, Any]] = {}
    for file, group in zip(names, groups, strict=True):
        header, at = {}, 0
        for name, (kind, shape) in sorted(group.items(), key=lambda item: (-BITS[item[1][0]], item[0])):
            end = at + torch.Size(shape).numel() * BITS[kind] // 8
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        out[file] = header
    return out


def _numbered(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def size_of(header: Mapping[str, Any]) -> int:
    """Return the bytes of a file's tensors."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)
