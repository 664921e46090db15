"""The models that a merge reads, as tensors by the base's names; and the refusal of those that do not fit together.

A source gives any run of elements of any tensor, as weights or as a change of the base's, into a buffer of float32, so
that nobody needs a whole model. Reads are plain (`preadv`): mapped files would count as memory of this process.
Imports neither transformers nor peft.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from brickyard.core.errors import Refused, UnsafeFile
from brickyard.core.files import TensorInfo
from brickyard.core.names import Names

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # what is merged
_READ = {  # what a head may hold besides
    **FLOATS,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_COUNTER = "num_batches_tracked"  # of a batch norm: how long it trained, which no output depends on
PIECE = 2**18  # elements that are worked on at once: a megabyte of float32, which stays in a core's cache
_SAMPLE = 2**16  # elements of a tensor that tell how far a model is from the base
_FIRST = 1024  # bytes of a tensor that go into the digest by which a base is known again
_TABLE = 10  # lines of a refusal

Places = Mapping[str, tuple[Path, TensorInfo]]


class Files:
    """Open files by path, for reading from several threads at once."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, start: int, into: Tensor) -> None:
        """Fill the uint8 tensor `into` with the bytes of a file from `start` on; UnsafeFile where it ends before."""
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            handle = self._handles[path]
        array: Any = into.numpy()
        left = memoryview(array)
        while len(left):
            count = os.preadv(handle, [left], start)
            if not count:
                raise UnsafeFile(f"{path}: cut short while it was read; fetch or write it again")
            left, start = left[count:], start + count

    def close(self) -> None:
        """Close all of them."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


@dataclass
class Buffers:
    """What one thread works in: the base's piece, one piece a model, and the bytes that are read or written."""

    base: Tensor
    models: list[Tensor]
    raw: Tensor

    @classmethod
    def of(cls, models: int) -> Buffers:
        pieces = [torch.empty(PIECE) for _ in range(models + 1)]
        return cls(pieces[0], pieces[1:], torch.empty(8 * PIECE, dtype=torch.uint8))

    def another(self, count: int) -> Buffers:
        """Return pieces of `count` elements that nobody else writes to, with the same bytes to read through."""
        return Buffers(torch.empty(count), [torch.empty(count) for _ in self.models], self.raw)


class Source(Protocol):
    """One fine-tuned model. A tensor that it does not hold is as in the base."""

    @property
    def label(self) -> str: ...

    def __contains__(self, name: object) -> bool: ...

    def read(
        self, files: Files, name: str, start: int, base_n: Tensor, out_n: Tensor, raw: Tensor, *, change: bool
    ) -> None:
        """Fill `out_n` with the elements of a tensor from `start` on: weights, or with `change` weights - base."""
        ...


@dataclass(frozen=True)
class Stored:
    """A model in safetensors files; `places` says where each tensor lies, by the base's names."""

    label: str
    places: Places

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def weights(self, files: Files, name: str, start: int, out_n: Tensor, raw: Tensor) -> None:
        """Fill `out_n` (float32) with the weights from element `start` on."""
        path, info = self.places[name]
        dtype = FLOATS[info.dtype]
        size = dtype.itemsize
        read = raw[: len(out_n) * size]
        files.read(path, info.start + start * size, read)
        out_n.copy_(read.view(dtype))

    def read(
        self, files: Files, name: str, start: int, base_n: Tensor, out_n: Tensor, raw: Tensor, *, change: bool
    ) -> None:
        self.weights(files, name, start, out_n, raw)
        if change:
            out_n -= base_n


@dataclass(frozen=True)
class Held:
    """A model whose tensors are in memory, by the base's names."""

    label: str
    tensors: Mapping[str, Tensor]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(
        self, files: Files, name: str, start: int, base_n: Tensor, out_n: Tensor, raw: Tensor, *, change: bool
    ) -> None:
        out_n.copy_(self.tensors[name].detach().reshape(-1)[start : start + len(out_n)])
        if change:
            out_n -= base_n


@dataclass(frozen=True)
class Factors:
    """A low-rank change of one weight [m, n]: scaling * b_mr @ a_rn; `transposed` where the weight is stored [n, m]."""

    a_rn: Tensor
    b_mr: Tensor
    scaling: float
    transposed: bool = False

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """The two factors in the order of the weight as it is stored: [rows, r] and [r, columns]."""
        return (self.a_rn.T, self.b_mr.T) if self.transposed else (self.b_mr, self.a_rn)

    def change(self, start: int, out_n: Tensor) -> None:
        """Fill `out_n` with the elements of the flattened change from `start` on."""
        left, right = self.sides
        width = right.shape[1]
        first, last = start // width, -(-(start + len(out_n)) // width)
        rows = (left[first:last].float() @ right.float()).mul_(self.scaling)
        skip = start - first * width
        out_n.copy_(rows.reshape(-1)[skip : skip + len(out_n)])


@dataclass(frozen=True)
class LowRank:
    """An adapter: low-rank changes of some of the base's weights."""

    label: str
    factors: Mapping[str, Factors]

    def __contains__(self, name: object) -> bool:
        return name in self.factors

    def read(
        self, files: Files, name: str, start: int, base_n: Tensor, out_n: Tensor, raw: Tensor, *, change: bool
    ) -> None:
        self.factors[name].change(start, out_n)
        if not change:
            out_n += base_n


def heads_among(names: Names) -> list[str]:
    """Return the extra tensors that lie outside of every module the base has: a task's head."""
    inside = {own.split(".")[0] for own in names.own.values()}
    return [name for name in names.extra if name.split(".")[0] not in inside]


def misfits(base: Places, model: Places, label: str, names: Names, *, whole: bool, mixed: bool) -> list[list[str]]:
    """Return the rows (input, tensor, of the base, of the input) in which a model does not fit the base.

    names: of the model's tensors; `whole`: it must hold every floating-point tensor of the base, and besides no more
    than a head; `mixed`: floating-point dtypes may differ.
    """
    rows = []
    say = lambda info: f"{info.dtype} {list(info.shape)}"  # noqa: E731
    heads = set(heads_among(names))
    same_class = all(own == name for name, own in names.own.items())
    vocabulary = max((info.shape for _, info in base.values() if len(info.shape) == 2), default=None)
    for name, (_, info) in base.items():
        if name not in names.own:
            if whole and (info.dtype in FLOATS or info.dtype.startswith("F")):
                rows.append([label, name, say(info), "missing"])
            continue
        found = model[names.own[name]][1]
        floats = {found.dtype in FLOATS, info.dtype in FLOATS}
        same = floats == {False} or (floats == {True} and (mixed or found.dtype == info.dtype))
        if found.shape != info.shape or not same:
            rows.append([label, name, say(info), say(found)])
    for name in names.extra if whole else ():
        info = model[name][1]
        if name not in heads:
            rows.append([label, name, "missing", say(info)])
        elif same_class and info.shape == vocabulary:
            rows.append([label, name, "tied to its embeddings", say(info)])
    return rows


def unmergeable(base: Places, model: Places, label: str, names: Names) -> list[list[str]]:
    """Return rows, as `misfits` does, of tensors of other types than are merged whose bytes are not the base's.

    The merge holds the base's bytes there: quantised weights, float64 or masks that were changed would be lost in
    silence. Counters of batch norms are the base's.
    """
    rows, files = [], Files()
    try:
        for name, own in sorted(names.own.items()):
            (path, info), (other, found) = base[name], model[own]
            fits = found.dtype == info.dtype and found.shape == info.shape  # else `misfits` has a row of it
            if info.dtype in FLOATS or not fits or name.endswith(_COUNTER):
                continue
            if not _same_bytes(files, (path, info), (other, found)):
                say = f"{info.dtype} {list(info.shape)}"
                rows.append([label, name, say, f"{say}, other values"])
    finally:
        files.close()
    return rows


def _same_bytes(files: Files, one: tuple[Path, TensorInfo], other: tuple[Path, TensorInfo]) -> bool:
    """Compare two tensors of one size on disk, piece by piece."""
    size = one[1].end - one[1].start
    pieces = [torch.empty(min(8 * PIECE, size), dtype=torch.uint8) for _ in range(2)]
    for at in range(0, size, 8 * PIECE):
        count = min(8 * PIECE, size - at)
        for (path, info), piece in zip((one, other), pieces, strict=True):
            files.read(path, info.start + at, piece[:count])
        if not torch.equal(pieces[0][:count], pieces[1][:count]):
            return False
    return True


def tensors_at(places: Places, names: Iterable[str]) -> dict[str, Tensor]:
    """Read some small tensors whole, in the dtype in which they are stored; Refused for one that torch has not."""
    files, out = Files(), {}
    try:
        for name in names:
            path, info = places[name]
            if info.dtype not in _READ:
                raise Refused(f"{path}: tensor {name} is of type {info.dtype}; store it in a type of torch's own.")
            raw = torch.empty(info.end - info.start, dtype=torch.uint8)
            files.read(path, info.start, raw)
            out[name] = raw.view(_READ[info.dtype]).reshape(info.shape)
    finally:
        files.close()
    return out


def whole(files: Files, base: Stored, model: Source | None, name: str, raw: Tensor) -> Tensor:
    """Return one tensor of a model (None: of the base) in float32 and in its shape; `raw` is as in Buffers."""
    info = base.places[name][1]
    out, base_n = torch.empty(info.elements), torch.empty(min(PIECE, info.elements))
    for start in range(0, info.elements, PIECE):
        out_n = out[start : start + PIECE]
        if model is None or name not in model:
            base.weights(files, name, start, out_n, raw)
        else:
            base.weights(files, name, start, base_n[: len(out_n)], raw)
            model.read(files, name, start, base_n[: len(out_n)], out_n, raw, change=False)
    return out.reshape(info.shape)


def distance(base: Stored, model: Source) -> float:
    """Return mean |theta - theta_0| / mean |theta_0| over the first elements of every floating-point tensor."""
    buffers, files, moved, size = Buffers.of(1), Files(), 0.0, 0.0
    try:
        for name, (_, info) in base.places.items():
            if info.dtype not in FLOATS or name not in model:
                continue
            count = min(_SAMPLE, info.elements)
            base_n, tau_n = buffers.base[:count], buffers.models[0][:count]
            base.weights(files, name, 0, base_n, buffers.raw)
            model.read(files, name, 0, base_n, tau_n, buffers.raw, change=True)
            moved += float(torch.linalg.vector_norm(tau_n, 1))
            size += float(torch.linalg.vector_norm(base_n, 1))
    finally:
        files.close()
    return moved / size if size else 0.0


def sample_of(places: Places) -> str:
    """Return a digest of every tensor's name, type, shape and first bytes, by which a base is known again."""
    files, found = Files(), hashlib.sha256()
    try:
        for name, (path, info) in sorted(places.items()):
            raw = torch.empty(min(_FIRST, info.end - info.start), dtype=torch.uint8)
            files.read(path, info.start, raw)
            found.update(f"{name} {info.dtype} {info.shape} ".encode() + raw.numpy().tobytes())
    finally:
        files.close()
    return found.hexdigest()


def refuse(rows: Sequence[Sequence[str]]) -> None:
    """Raise Refused with a table of at most ten of the rows, where there are any."""
    if not rows:
        return
    shown = [["input", "tensor", "base", "input has"], *rows[:_TABLE]]
    widths = [max(len(row[i]) for row in shown) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    more = f"\n... and {len(rows) - _TABLE} more" if len(rows) > _TABLE else ""
    raise Refused(
        f"{len(rows)} tensors do not fit the base, and none is cropped, cast or left out:\n"
        + "\n".join(lines)
        + more
        + "\nGive models fine-tuned from this base with its vocabulary, depth and dtype (--dtype lets dtypes differ).\n"
        "Only float16, bfloat16 and float32 are merged: dequantise quantised weights, and store float64 as float32."
    )
