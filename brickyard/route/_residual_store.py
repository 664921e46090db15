"""Sparse residuals of experts against one dense model, in few bytes: exact in memory, on disk and back.

    r = theta_t - D                            one tensor, flattened [N]; D as it is stored, whatever its dtype
    S = the k entries of r that are largest in magnitude over a whole block, the rest 0
    index of S       bitmap: N bits,  or  gaps: g_i = place_i - place_(i-1) - 1 in bytes of 7 bits; whichever is smaller
    values of S      float32, or codes c with S = c scale: float16 (scale a power of two) or int8 (scale max|S| / 127)

Shapes: N elements of a tensor, K kept entries, B bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brickyard.core.errors import BadBrick, NotFinite, UnknownName, WrongBase
from brickyard.core.files import read_tensors, write_tensors

VALUES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
BITMAP, GAPS, CODES, SCALE = ":bitmap", ":gaps", ":values", ":scale"
_DENSE = "dense:sha256"  # of the dense model that the residuals belong to


@dataclass(frozen=True)
class Sparse:
    """A sparse tensor [N]: places rising [K] int64, codes [K], and the factor that makes values of them."""

    elements: int
    places_K: Tensor
    codes_K: Tensor
    scale: float

    @property
    def values_K(self) -> Tensor:
        """The kept entries in float32."""
        return self.codes_K.float() * self.scale

    def dense(self) -> Tensor:
        """The whole tensor [N] in float32."""
        return torch.zeros(self.elements).index_copy_(0, self.places_K, self.values_K)


@dataclass(frozen=True)
class Packed:
    """A `Sparse` as it is stored. form: BITMAP or GAPS; index_B: uint8."""

    elements: int
    form: str
    index_B: Tensor
    codes_K: Tensor
    scale: float

    @property
    def bytes(self) -> int:
        """Bytes of index, values and scale."""
        return self.index_B.numel() + self.codes_K.numel() * self.codes_K.element_size() + 4


def largest(residuals: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Return the rising places of the entries of a block that stay: [K_name] int64 for every tensor of it.

    density: the share of the block's entries that stays, in [0, 1]: exactly round(density * N) of them, fewer where the
    others are 0. Of equal magnitudes the first in the order of the names stay.
    """
    names = sorted(residuals)
    size_N = torch.cat([residuals[name].detach().reshape(-1).abs() for name in names])
    count = min(round(density * len(size_N)), int(torch.count_nonzero(size_N)))
    chosen_N = torch.zeros(len(size_N), dtype=torch.bool)
    if count:
        threshold = torch.kthvalue(size_N, len(size_N) - count + 1).values
        chosen_N = size_N > threshold
        # Differences of half-precision weights take few values: only so many of those at the threshold may stay.
        ties = (size_N == threshold).nonzero()[:, 0]
        chosen_N[ties[: count - int(chosen_N.sum())]] = True
    parts = chosen_N.split([residuals[name].numel() for name in names])
    return {name: part.nonzero()[:, 0] for name, part in zip(names, parts, strict=True)}


def quantised(residual_N: Tensor, places_K: Tensor, values: str, factor: float = 1.0) -> Sparse:
    """Return the chosen entries of a flat residual, times `factor`, as `values` stores them.

    Raises UnknownName for another kind of values, NotFinite where an entry is NaN or infinite.
    """
    if values not in VALUES:
        raise UnknownName.among("kind of values", values, VALUES)
    kept_K = residual_N.detach().reshape(-1)[places_K].float() * factor
    if not kept_K.isfinite().all():
        raise NotFinite("a residual holds NaN or infinity; an expert or the merge does.")
    most = float(kept_K.abs().max()) if len(kept_K) else 0.0
    scale = 1.0
    if values == "float16" and most > 0:
        scale = 2.0 ** np.floor(np.log2(most))  # exact to divide by, and small changes stay clear of subnormal codes
    elif values == "int8" and most > 0:
        scale = float(np.float32(most / 127))
    codes_K = kept_K / scale
    if values == "int8":
        codes_K = codes_K.round().clamp(-127, 127)
    return Sparse(residual_N.numel(), places_K, codes_K.to(VALUES[values]), float(scale))


def pack(sparse: Sparse) -> Packed:
    """Store a sparse tensor's places in the smaller of two forms."""
    gaps_B, bits = _to_gaps(sparse.places_K.numpy()), -(-sparse.elements // 8)
    if len(gaps_B) < bits:
        return Packed(sparse.elements, GAPS, torch.from_numpy(gaps_B), sparse.codes_K, sparse.scale)
    mask_N = np.zeros(sparse.elements, dtype=bool)
    mask_N[sparse.places_K.numpy()] = True
    return Packed(sparse.elements, BITMAP, torch.from_numpy(np.packbits(mask_N)), sparse.codes_K, sparse.scale)


def unpack(packed: Packed) -> Sparse:
    """Return the sparse tensor that `pack` was given, bit for bit; BadBrick where the index cannot be one."""
    index_B = packed.index_B.numpy()
    if packed.form == BITMAP:
        places_K = np.flatnonzero(np.unpackbits(index_B, count=packed.elements))
    else:
        places_K = _from_gaps(index_B)
    if len(places_K) != len(packed.codes_K) or (len(places_K) and places_K[-1] >= packed.elements):
        raise BadBrick(
            f"a sparse residual names {len(places_K)} places for {len(packed.codes_K)} values of a tensor of "
            f"{packed.elements} entries; the file is damaged. Route the models again."
        )
    return Sparse(packed.elements, torch.from_numpy(places_K), packed.codes_K, packed.scale)


def _to_gaps(places_K: np.ndarray) -> np.ndarray:
    """Write the gaps between rising places, lowest 7 bits first; the eighth bit says that more follow. uint8 [B]."""
    gap_K = np.diff(places_K, prepend=-1) - 1
    width_K = np.ones(len(gap_K), dtype=np.int64)
    limit, most = 2**7, int(gap_K.max(initial=0))
    while limit <= most:
        width_K += gap_K >= limit
        limit <<= 7
    first_K = np.cumsum(width_K) - width_K
    out_B = np.zeros(int(width_K.sum()), dtype=np.uint8)
    for part in range(int(width_K.max(initial=0))):  # at most nine: 63 bits
        has = width_K > part
        more = (width_K[has] > part + 1).astype(np.uint8) << 7
        out_B[first_K[has] + part] = (gap_K[has] >> (7 * part) & 127).astype(np.uint8) | more
    return out_B


def _from_gaps(index_B: np.ndarray) -> np.ndarray:
    """Read what `_to_gaps` wrote: places [K] int64. BadBrick where a gap has no end."""
    last_B = index_B < 128
    if len(index_B) and not last_B[-1]:
        raise BadBrick("the index of a sparse residual breaks off; the file is damaged. Route the models again.")
    first_K = np.flatnonzero(np.concatenate([[True], last_B[:-1]])) if len(index_B) else np.zeros(0, dtype=np.int64)
    part_B = np.arange(len(index_B)) - np.repeat(first_K, np.diff(first_K, append=len(index_B)))
    if part_B.max(initial=0) > 8:
        raise BadBrick("a gap in the index of a sparse residual is beyond 63 bits; the file is damaged.")
    pieces_B = (index_B & 127).astype(np.int64) << (7 * part_B)
    gap_K = np.add.reduceat(pieces_B, first_K) if len(first_K) else pieces_B
    return np.cumsum(gap_K + 1) - 1


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of tensors by name, dtype, shape and bytes: of the dense model they make up."""
    out = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        out.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        out.update(flat.view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def write_expert(path: Path, expert: Mapping[str, Packed], dense: str) -> None:
    """Write one expert's residuals as safetensors; `dense` is the SHA-256 of the model that they belong to."""
    tensors = {_DENSE: torch.frombuffer(bytearray(bytes.fromhex(dense)), dtype=torch.uint8)}
    for name, packed in expert.items():
        tensors |= {name + packed.form: packed.index_B, name + CODES: packed.codes_K}
        tensors[name + SCALE] = torch.tensor([packed.scale], dtype=torch.float32)
    write_tensors(path, tensors)


def read_expert(path: Path, elements: Mapping[str, int], dense: str, sha256: str | None = None) -> dict[str, Packed]:
    """Read what `write_expert` wrote.

    elements: size of every tensor of the dense model, `dense` its SHA-256; `sha256` is the file's own.

    Raises WrongBase where the residuals belong to another dense model, BadBrick where they are incomplete or name a
    tensor that it does not have, UnsafeFile where the file is damaged.
    """
    tensors = read_tensors(path, sha256)
    if _DENSE not in tensors:
        raise BadBrick(f"{path} does not say which dense model it belongs to; it holds no sparse expert.")
    belongs = bytes(tensors.pop(_DENSE).tolist()).hex()
    if belongs != dense:
        raise WrongBase(
            f"{path} belongs to another dense model (fingerprint {belongs[:12]}, the one given has {dense[:12]}): its "
            "values are differences from that one. Keep the files of one routed folder together."
        )
    out = {}
    for name in sorted({key.rpartition(":")[0] for key in tensors}):
        form = next((form for form in (BITMAP, GAPS) if name + form in tensors), "")
        if not form or name + CODES not in tensors or name + SCALE not in tensors or name not in elements:
            raise BadBrick(f"{path}: the residual of {name} is incomplete, or the dense model has no such tensor.")
        scale = float(tensors[name + SCALE][0])
        packed = Packed(elements[name], form, tensors[name + form], tensors[name + CODES], scale)
        unpack(packed)  # refuses what is damaged now, and not in the middle of a request
        out[name] = packed
    return out
