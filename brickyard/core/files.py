"""Reading files from strangers and writing our own so that they are complete or absent. Imports no torch when loaded.

Reading: plain files inside their folder, JSON without duplicate keys, safetensors after `check_safetensors`; never a
pickle. Writing: see `atomic`. Locks and the cache folder are offered from here too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brickyard.core.atomic import complete_folder, write_chunks
from brickyard.core.cache import CacheEntry, cache_clear, cache_folder, cache_list
from brickyard.core.errors import NotFinite, UnsafeFile
from brickyard.core.locks import Lock
from brickyard.core.safetensors_check import BITS, TensorInfo, check_name, check_safetensors, unique_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CacheEntry",
    "Lock",
    "TensorInfo",
    "cache_clear",
    "cache_folder",
    "cache_list",
    "check_safetensors",
    "complete_folder",
    "plain_file",
    "read_json",
    "read_tensors",
    "sha256",
    "write_bytes",
    "write_json",
    "write_tensors",
]

MAX_JSON = 64 * 2**20


def plain_file(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the path of the file that `folder` calls `name`, a relative path with forward slashes.

    Raises UnsafeFile where `name` is absolute, climbs (`..`), holds control characters or backslashes, or where what it
    names is missing, not a plain file, or a link that leads out of the folder. Links into the blobs of the same
    repository, as the hub's cache lays them out (`snapshots/REVISION/NAME -> ../../blobs/HASH`), are followed.
    """
    folder = Path(folder)
    pieces = name.split("/")
    if not name or not name.isprintable() or "\\" in name or not all(piece not in ("", ".", "..") for piece in pieces):
        raise UnsafeFile(
            f"{folder}: the file name {name!r} leads out of the folder or is malformed; expected plain names"
        )
    path = folder.joinpath(*pieces)
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root) and not _is_blob(root, real):
        raise UnsafeFile(f"{path}: a link out of its folder, to {real}; copy the file into the folder")
    try:
        mode = os.stat(real).st_mode
    except OSError as error:
        raise UnsafeFile(f"{path}: no such file in {folder} ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise UnsafeFile(f"{path}: not a plain file")
    return path


def _is_blob(root: Path, real: Path) -> bool:
    """Whether `real` is a blob of the hub repository whose snapshot `root` is."""
    if root.parent.name != "snapshots" or real.parent != root.parent.parent / "blobs":
        return False
    return re.fullmatch("[0-9a-f]+", real.name) is not None


def read_json(path: str | os.PathLike[str], *, limit: int = MAX_JSON, constants: bool = False) -> Any:
    """Read a JSON file strictly: UTF-8 (a byte-order mark is accepted), no duplicate keys, at most `limit` bytes.

    `constants` accepts NaN and Infinity, which Python's writers produce. Raises UnsafeFile with the file and the cause.
    """
    path = Path(path)

    def constant(text: str) -> float:
        if not constants:
            raise ValueError(f"{text} is not a JSON number")
        return float(text.replace("Infinity", "inf"))

    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise UnsafeFile(f"{path}: more than {limit:,} bytes of JSON; expected a small file")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_keys(path), parse_constant=constant)
    except UnicodeDecodeError as error:
        raise UnsafeFile(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UnsafeFile(f"{path}: not JSON: {error}") from None


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, complete or not at all. Raises DiskFull."""
    write_chunks(path, [data], len(data))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` to `path` as indented UTF-8 JSON, complete or not at all.

    Paths become text and numpy scalars become numbers; anything else that JSON cannot hold raises TypeError, and NaN or
    infinity raises NotFinite with the place where it stands.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError as error:
        if "Circular" in str(error):
            raise
        where = next(_not_finite(obj, ""), "somewhere")
        raise NotFinite(f"{path}: the value at {where} is NaN or infinite; nothing was written") from None
    write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    finite: bool = True,
) -> None:
    """Write `tensors` to `path` as safetensors, complete or not at all.

    The same tensors and metadata give the same bytes, whatever their order. Nothing is copied but what lies scattered
    or on another device. Raises NotFinite at the first NaN or infinity (unless `finite` is off), UnsafeFile for a name
    that no reader would accept, DiskFull.
    """
    names = _dtype_names()
    entries: list[tuple[str, str, Tensor]] = []
    for name, tensor in tensors.items():
        check_name(path, name)
        if tensor.dtype not in names:
            raise UnsafeFile(f"{path}: tensor {name!r} is {tensor.dtype}, which safetensors cannot hold")
        if finite and (tensor.is_floating_point() or tensor.is_complex()) and not _is_finite(tensor):
            raise NotFinite(f"tensor {name} holds NaN or infinity; nothing was written to {path}")
        entries.append((name, names[tensor.dtype], tensor))
    # Wide types first keeps every tensor aligned to its own size, which readers that map the file rely on.
    entries.sort(key=lambda entry: (-BITS[entry[1]], entry[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, dtype, tensor in entries:
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    start = len(raw).to_bytes(8, "little") + raw
    write_chunks(path, _chunks(start, [tensor for _, _, tensor in entries]), len(start) + at)


def read_tensors(
    path: str | os.PathLike[str], expect_sha256: str | None = None, *, mapped: bool = False
) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, after `check_safetensors`, in the order of their bytes.

    With `expect_sha256` the bytes must have that digest: a flipped bit inside a tensor raises UnsafeFile. `mapped` maps
    the file into memory instead of reading it (changes to the tensors stay private, and cost memory only where made);
    such a file must not be cut short while it is in use. Raises UnsafeFile.
    """
    import torch

    path = Path(path)
    known = check_safetensors(path)
    dtypes = {name: dtype for dtype, name in _dtype_names().items()}
    for name, info in known.items():
        if info.dtype not in dtypes:
            raise UnsafeFile(f"{path}: tensor {name!r} is {info.dtype}, which torch cannot hold")
    if mapped:
        from safetensors import safe_open

        if expect_sha256 is not None:
            _compare(path, sha256(path), expect_sha256)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in known}
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(min((info.start for info in known.values()), default=-1)))
        for name, info in known.items():
            raw = torch.empty(info.end - info.start, dtype=torch.uint8)
            if file.readinto(_view(raw)) != len(raw):
                raise UnsafeFile(f"{path}: cut short while it was read; fetch or write it again")
            digest.update(_view(raw))
            tensors[name] = raw.view(dtypes[info.dtype]).reshape(info.shape)
    if expect_sha256 is not None:
        _compare(path, digest.hexdigest(), expect_sha256)
    return tensors


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UnsafeFile(
            f"{path}: damaged or changed: its SHA-256 is {found[:16]}..., the manifest says {expected[:16]}...; "
            "fetch or write it again"
        )


def _dtype_names() -> dict[torch.dtype, str]:
    import torch

    return {
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.int16: "I16",
        torch.uint16: "U16",
        torch.int32: "I32",
        torch.uint32: "U32",
        torch.int64: "I64",
        torch.uint64: "U64",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float64: "F64",
        torch.complex64: "C64",
        torch.float8_e5m2: "F8_E5M2",
        torch.float8_e4m3fn: "F8_E4M3",
    }


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no isfinite for 8-bit floats
    return bool(wide.isfinite().all())


def _chunks(start: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    import torch

    yield start
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield _view(flat.view(torch.uint8))


def _view(flat: Tensor) -> memoryview:
    """The bytes of a one-dimensional uint8 tensor, not copied."""
    array: Any = flat.numpy()
    return memoryview(array)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON; expected text, numbers, lists and dictionaries")


def _not_finite(value: Any, at: str) -> Iterator[str]:
    """The dotted places of the values in `value` that are NaN or infinite."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, f"{at}[{index}]")
    else:
        number = _plain(value) if hasattr(value, "item") else value
        if isinstance(number, float) and not math.isfinite(number):
            yield at or "the top"
