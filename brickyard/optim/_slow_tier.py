"""Where the blocks of a model lie while they are not computed: host memory, or a pair of safetensors files.

A block is one packed run of bytes, so bringing it is one copy. The files: a step reads all of one and writes all of the
other, and a small state file, replaced in one rename, says which of the two counts. A process that dies at any write
loses the step it was in and nothing else; with `sync`, so does a machine that loses power.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from brickyard.core import noise
from brickyard.core.errors import BadBase, Changed, DiskFull, UnsafeFile, UsageError
from brickyard.core.files import check_safetensors, read_json, write_json
from brickyard.core.locks import Lock
from brickyard.core.safetensors_check import TensorInfo

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
STATE = "state.json"
_FILES = ("a.safetensors", "b.safetensors")
_CHUNK = 1 << 20  # elements rounded at once


@dataclass(frozen=True)
class Piece:
    """One tensor of a block: its name, shape, and the types in which it is computed and stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Block:
    """Tensors that travel together, packed without gaps; wider types first, so that each is aligned to its own size."""

    name: str
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, Tensor], stored: torch.dtype | None = None) -> Block:
        """Lay out `tensors`; floating-point ones are stored as `stored`, or as they are."""
        pieces = [
            Piece(n, tuple(t.shape), t.dtype, stored if stored is not None and t.is_floating_point() else t.dtype)
            for n, t in tensors.items()
        ]
        unknown = next((p for p in pieces if p.dtype not in NAMES), None)
        if unknown is not None:
            raise UsageError(
                f"{unknown.name} is {unknown.dtype}; zeroth-order steps change floating-point weights. Quantised "
                "weights take a tuner on top."
            )
        return cls(name, tuple(sorted(pieces, key=lambda p: (-p.dtype.itemsize, p.name))))

    @cached_property
    def bytes(self) -> int:
        """Bytes while it is computed."""
        return sum(p.elements * p.dtype.itemsize for p in self.pieces)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes in the slow tier."""
        return sum(p.elements * p.stored.itemsize for p in self.pieces)

    @property
    def converted(self) -> bool:
        """Whether it is stored in other types than it is computed in."""
        return any(p.stored != p.dtype for p in self.pieces)

    def views(self, packed: Tensor, *, stored: bool = False) -> list[Tensor]:
        """Return the tensors inside `packed`, uint8 [bytes or more], in the order of the pieces."""
        out, at = [], 0
        for p in self.pieces:
            dtype = p.stored if stored else p.dtype
            end = at + p.elements * dtype.itemsize
            out.append(packed[at:end].view(dtype).view(p.shape))
            at = end
        return out


class Tier(Protocol):
    """A place for blocks. `read` and `write` move block `i` between it and a slot of the fast tier, uint8 [bytes].

    `resting` is what a parameter of block `i` shows while its block is away. `key` of `write` decides random rounding.
    Of a tier `in_place`, a block that did not change need not be written.
    """

    in_place: bool
    blocks: Sequence[Block]
    reads: list[int]
    writes: list[int]
    bytes_read: int
    bytes_written: int
    staging_bytes: int

    def read(self, i: int, slot: Tensor) -> None: ...
    def write(self, i: int, slot: Tensor, key: int) -> None: ...
    def resting(self, i: int) -> list[Tensor]: ...
    def commit(self, ends: Tensor, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class HostTier:
    """Blocks in host memory, each in one buffer (pinned where the fast tier is an accelerator).

    It is as durable as the process; the checkpoints of the training loop are what survives.
    """

    in_place = True

    def __init__(self, blocks: Sequence[Block], tensors: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.reads, self.writes = [0] * len(blocks), [0] * len(blocks)
        self.bytes_read = self.bytes_written = self.staging_bytes = 0
        pinned = device.type == "cuda"
        self._packed = []
        for block, given in zip(blocks, tensors, strict=True):
            packed = torch.empty(block.bytes, dtype=torch.uint8, pin_memory=pinned)
            for view, tensor in zip(block.views(packed), given, strict=True):
                view.copy_(tensor.detach())
            self._packed.append(packed)

    def read(self, i: int, slot: Tensor) -> None:
        slot[: self.blocks[i].bytes].copy_(self._packed[i])
        self.reads[i] += 1
        self.bytes_read += self.blocks[i].bytes

    def write(self, i: int, slot: Tensor, key: int) -> None:
        self._packed[i].copy_(slot[: self.blocks[i].bytes])
        self.writes[i] += 1
        self.bytes_written += self.blocks[i].bytes

    def resting(self, i: int) -> list[Tensor]:
        return self.blocks[i].views(self._packed[i])

    def commit(self, ends: Tensor, state: dict[str, Any]) -> None:
        """Nothing to make lasting."""

    def close(self) -> None:
        """Nothing to let go of."""


class FileTier:
    """Blocks in two files of a folder that take turns; `ends`, what never leaves the fast tier, is kept there too.

    Opened on a folder that holds a run, it goes on with it (`state` says where) if `identity` is the run's, else
    Changed. On an empty one, it first copies `sources` (tensor name -> file and place), which stay as they are.
    Raises BadBase where a tensor is missing or has another shape, DiskFull before anything is written where the disk is
    too small, Locked where another process is at work.
    """

    in_place = False  # a step writes the file that it does not read

    def __init__(
        self,
        folder: Path,
        blocks: Sequence[Block],
        ends: Block,
        sources: Mapping[str, tuple[Path, TensorInfo]],
        identity: dict[str, Any],
        *,
        device: torch.device,
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        sync: bool = True,
    ) -> None:
        self.folder, self.blocks, self.device = folder, blocks, device
        self._ends, self._rounding, self._sync = ends, rounding, sync
        self.reads, self.writes = [0] * len(blocks), [0] * len(blocks)
        self.bytes_read = self.bytes_written = 0
        staged = any(b.converted for b in blocks) or device.type != "cpu"
        self.staging_bytes = max(b.stored_bytes for b in blocks) if staged else 0
        self._staging = torch.empty(self.staging_bytes, dtype=torch.uint8, pin_memory=staged and device.type == "cuda")
        self._lock = Lock(folder)
        self._lock.__enter__()
        try:
            if (folder / STATE).exists():
                self.state = self._resume(identity)
            else:
                self.state = {"current": 0, "step": 0, "pending": None, "identity": identity}
                self._create(sources)
            self._handles = [os.open(folder / name, os.O_RDWR | os.O_CLOEXEC) for name in _FILES]
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise

    @property
    def weights(self) -> Path:
        """The file that counts."""
        return self.folder / _FILES[self.state["current"]]

    def close(self) -> None:
        """Let go of the files and of the folder."""
        for handle in self._handles:
            os.close(handle)
        self._lock.__exit__(None, None, None)

    def read(self, i: int, slot: Tensor) -> None:
        block = self.blocks[i]
        direct = self.staging_bytes == 0
        packed = (slot if direct else self._staging)[: block.stored_bytes]
        _read_all(self._handles[self.state["current"]], packed, self._starts[i], self.weights)
        if not direct:
            for view, stored in zip(block.views(slot), block.views(packed, stored=True), strict=True):
                view.copy_(stored)
        self.reads[i] += 1
        self.bytes_read += block.stored_bytes

    def write(self, i: int, slot: Tensor, key: int) -> None:
        block = self.blocks[i]
        packed = slot[: block.bytes]
        if self.staging_bytes:
            packed = self._staging[: block.stored_bytes]
            for j, (stored, view) in enumerate(zip(block.views(packed, stored=True), block.views(slot), strict=True)):
                if stored.dtype != view.dtype and self._rounding == "stochastic":
                    round_stochastically(view, stored, noise.key(key, i, j))
                else:
                    stored.copy_(view)
        self._write(packed, self._starts[i])
        self.writes[i] += 1
        self.bytes_written += block.stored_bytes

    def resting(self, i: int) -> list[Tensor]:
        return [torch.empty(0, dtype=p.dtype, device=self.device) for p in self.blocks[i].pieces]

    def read_ends(self) -> Tensor:
        """Return what stays in the fast tier: uint8 [bytes]."""
        packed = torch.empty(self._ends.bytes, dtype=torch.uint8)
        _read_all(self._handles[self.state["current"]], packed, self._starts[-1], self.weights)
        return packed.to(self.device)

    def commit(self, ends: Tensor, state: dict[str, Any]) -> None:
        """Finish a step: the file just written counts from here on, with `state` (step, pending)."""
        target = 1 - self.state["current"]
        self._write(ends.cpu(), self._starts[-1])
        new = {**self.state, **state, "current": target}
        if self._sync:
            os.fsync(self._handles[target])
            write_json(self.folder / STATE, new)
        else:
            temporary = self.folder / f"{STATE}.tmp"
            temporary.write_text(json.dumps(new), encoding="utf-8")
            temporary.replace(self.folder / STATE)
        self.state = new

    def _write(self, packed: Tensor, start: int) -> None:
        with _room(self.folder, len(packed)):
            _write_all(self._handles[1 - self.state["current"]], packed, start)

    @cached_property
    def _header(self) -> bytes:
        """The header of both files; the tensors stand in the order of the blocks, then the ends."""
        header, at = {}, 0
        for block in (*self.blocks, self._ends):
            for p in block.pieces:
                end = at + p.elements * p.stored.itemsize
                header[p.name] = {"dtype": NAMES[p.stored], "shape": list(p.shape), "data_offsets": [at, end]}
                at = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw

    @cached_property
    def _starts(self) -> list[int]:
        """Where each block begins in the files, and the ends, and where the files end."""
        starts = [len(self._header)]
        for block in self.blocks:
            starts.append(starts[-1] + block.stored_bytes)
        return starts

    def _create(self, sources: Mapping[str, tuple[Path, TensorInfo]]) -> None:
        size = self._starts[-1] + self._ends.bytes
        free = shutil.disk_usage(self.folder).free
        if 2 * size > free:
            raise DiskFull(
                f"{self.folder}: two files of {size:,} bytes each are needed, {free:,} bytes are free on its disk; "
                "nothing was written. Free some space or choose another folder."
            )
        for name in _FILES:
            handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                with _room(self.folder, size):
                    os.posix_fallocate(handle, 0, size)
                    os.pwrite(handle, self._header, 0)
                    if name == _FILES[0]:
                        for block, start in zip((*self.blocks, self._ends), self._starts, strict=True):
                            for at, packed in _from_sources(block, sources):
                                _write_all(handle, packed, start + at)
                    os.fsync(handle)
            finally:
                os.close(handle)
        write_json(self.folder / STATE, self.state)

    def _resume(self, identity: dict[str, Any]) -> dict[str, Any]:
        state = read_json(self.folder / STATE)
        was, now = state["identity"], json.loads(json.dumps(identity))
        changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
        if changed:
            lines = "; ".join(_difference(key, was.get(key), now.get(key)) for key in changed)
            raise Changed(f"{self.folder} holds a run with other settings ({lines}); use another folder.")
        for name in _FILES:
            with open(self.folder / name, "rb") as file:
                found = file.read(len(self._header))
            size = (self.folder / name).stat().st_size
            if found != self._header or size != self._starts[-1] + self._ends.bytes:
                raise UnsafeFile(
                    f"{self.folder / name}: not the file that this run wrote; start again in a new folder."
                )
        return state


def _difference(key: str, was: Any, now: Any) -> str:
    """Say how a setting changed; of many names and values only the first."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return f"{key}: was {was!r}, now {now!r}"
    names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    before, after = (values.get(names[0], "left out") for values in (was, now))
    return f"{key}: {len(names)} differ, such as {names[0]} (was {before}, now {after})"


def sources_of(paths: Sequence[Path]) -> dict[str, tuple[Path, TensorInfo]]:
    """Return the tensors of safetensors files: name -> (file, place). Raises UnsafeFile; see `core.files`."""
    return {name: (path, info) for path in paths for name, info in check_safetensors(path).items()}


def round_stochastically(x: Tensor, out: Tensor, key: int) -> None:
    """Round `x` into bfloat16 `out` of the same shape, up or down so that the mean is x (of float64: x as a float32).

    An update below half a unit in the last place is lost when rounding to nearest; here it arrives with the right
    probability. The draws depend on `key` alone.
    """
    generator = torch.Generator(x.device).manual_seed(key & (2**63 - 1))
    flat, target = x.detach().view(-1), out.view(-1)
    for at in range(0, len(flat), _CHUNK):
        bits = flat[at : at + _CHUNK].float().view(torch.int32)
        dropped = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=x.device)
        target[at : at + _CHUNK] = (dropped.add_(bits) & -65536).view(torch.float32).to(torch.bfloat16)


def _from_sources(block: Block, sources: Mapping[str, tuple[Path, TensorInfo]]) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset in the block, bytes as stored) of each of its tensors."""
    at = 0
    for p in block.pieces:
        if p.name not in sources:
            raise BadBase(f"no tensor {p.name} is stored; the model has one of shape {p.shape}.")
        path, info = sources[p.name]
        if tuple(info.shape) != p.shape or info.dtype not in DTYPES:
            raise BadBase(f"{path}: {p.name} is {info.dtype} {list(info.shape)}, the model has {list(p.shape)}.")
        packed = torch.empty(info.end - info.start, dtype=torch.uint8)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _read_all(handle, packed, info.start, path)
        finally:
            os.close(handle)
        yield at, packed.view(DTYPES[info.dtype]).to(p.stored).view(torch.uint8)
        at += p.elements * p.stored.itemsize


def _memory(packed: Tensor) -> memoryview:
    array: Any = packed.numpy()
    return memoryview(array)


def _read_all(handle: int, packed: Tensor, start: int, path: Path) -> None:
    left = _memory(packed)
    while len(left):
        count = os.preadv(handle, [left], start)
        if count == 0:
            raise UnsafeFile(f"{path}: cut short at byte {start:,}; start again in a new folder.")
        left, start = left[count:], start + count


def _write_all(handle: int, packed: Tensor, start: int) -> None:
    left = _memory(packed)
    while len(left):
        count = os.pwrite(handle, left, start)
        left, start = left[count:], start + count


@contextlib.contextmanager
def _room(folder: Path, size: int) -> Iterator[None]:
    """Turn "no space left" into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFull(
            f"{folder}: no room for {size:,} bytes, {free:,} are free (a quota may allow less). The last finished step "
            "still counts; free some space and go on."
        ) from error
