"""A strict reading of the safetensors header, before a byte of tensor data is touched. Imports no torch.

The safetensors library accepts duplicate keys (the last one wins), any tensor name, and headers of 100 MB. A folder
from a stranger must not be able to use any of these, so every header passes through here first.

Format: 8 bytes, little-endian length N; N bytes of JSON `{"name": {"dtype", "shape", "data_offsets"}, ...}`; the data.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brickyard.core.errors import UnsafeFile

# 16 MiB describe about 150,000 tensors in one file; the largest published shards stay far below.
MAX_HEADER = 16 * 2**20
MAX_NAME = 1024
MAX_RANK = 64  # numpy's and torch's limit

# Bits per element, as in the format's own list of types.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}

# Suffixes that promise a pickle, or an archive that usually holds one.
PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".zip", ".7z", ".tar", ".gz"}
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `dtype` as the format spells it, `shape`, and its bytes `[start, end)` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def conversion(path: str | os.PathLike[str]) -> str:
    """How to turn a pickled checkpoint into safetensors; the end of every refusal of a pickle."""
    folder = Path(path).parent
    return (
        "pickles can run code, so Brickyard never opens them. If you trust where it came from, convert it once: "
        f'python -c "from transformers import AutoModel; '
        f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained('converted')\" "
        "(it writes converted/model.safetensors), or write its tensors with safetensors.torch.save_file"
    )


def refuse_pickle(path: str | os.PathLike[str], start: bytes = b"") -> None:
    """Raise UnsafeFile where the suffix of `path`, or the first bytes `start` of the file, say pickle or archive."""
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise UnsafeFile(f"{path}: a {path.suffix} file, expected .safetensors; {conversion(path)}")
    found = _disguise(start)
    if found:
        raise UnsafeFile(f"{path}: the content is {found}, not safetensors, whatever its name says; {conversion(path)}")


def _disguise(start: bytes) -> str:
    """What a file really is, judged by its first 16 bytes; empty where they could begin a safetensors file."""
    if start[8:9] == b"{":  # a safetensors header of 640 bytes also begins with the pickle magic 80 02
        return ""
    for magic, what in (
        (b"PK\x03\x04", "a zip archive (a torch pickle)"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\x93NUMPY", "a numpy file"),
        (b"GGUF", "a GGUF file"),
        (b"version https://git-lfs", "a git-lfs pointer (run `git lfs pull`)"),
    ):
        if start.startswith(magic):
            return what
    if len(start) >= 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return "a pickle"
    return ""


def unique_keys(path: str | os.PathLike[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """An `object_pairs_hook` that refuses a key given twice: two readers of such a file may see two different files."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key, value in pairs:
            if key in built:
                raise UnsafeFile(f"{path}: the key {key!r} is given twice; expected each key once")
            built[key] = value
        return built

    return build


def check_name(path: str | os.PathLike[str], name: str) -> None:
    """Refuse a tensor name that could be mistaken for a path or that no module can have."""
    if not name or len(name) > MAX_NAME:
        raise UnsafeFile(f"{path}: a tensor name of {len(name)} characters; expected 1 to {MAX_NAME}")
    if not name.isprintable():
        raise UnsafeFile(f"{path}: the tensor name {name!r} holds unprintable characters")
    if ".." in name or "/" in name or "\\" in name:
        raise UnsafeFile(f"{path}: the tensor name {name!r} looks like a path; expected dotted module names")


def check_safetensors(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read and validate the header of a safetensors file without allocating anything for its tensors.

    Returns each tensor's TensorInfo in the order of their bytes. Raises UnsafeFile, naming file and cause, where
    the file is a pickle, empty, truncated or longer than its header says; the header is larger than 16 MiB, not JSON,
    or has duplicate keys; a name looks like a path, a dtype is unknown, a byte count does not follow from dtype and
    shape; or the tensors overlap or leave holes.
    """
    path = Path(path)
    refuse_pickle(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(16)
            length = _header_length(path, start, size)
            file.seek(8)
            raw = file.read(length)
    except FileNotFoundError:
        raise UnsafeFile(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UnsafeFile(f"{path}: a folder, expected a safetensors file") from None
    header = _parse(path, raw)
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _contiguous(path, ordered, 8 + length, size)
    return ordered


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size == 0:
        raise UnsafeFile(f"{path}: the file is empty; fetch or write it again")
    refuse_pickle(path, start)
    if size < 10:
        raise UnsafeFile(f"{path}: {size} bytes, too short for a safetensors file; fetch or write it again")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER:
        raise UnsafeFile(f"{path}: says that its header has {length} bytes; the limit is {MAX_HEADER}")
    if length > size - 8:
        raise UnsafeFile(f"{path}: truncated: a header of {length} bytes in a file of {size}; fetch or write it again")
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise UnsafeFile(f"{path}: the header begins with {raw[:1]!r}, expected '{{': not a safetensors file")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys(path), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise UnsafeFile(f"{path}: the header is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UnsafeFile(f"{path}: the header is not JSON: {error}") from None
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeFile(f"{path}: __metadata__ must map text to text")
    return header


def _no_constant(text: str) -> Hashable:
    raise ValueError(f"{text} is not a JSON number")


def _entry(path: Path, name: str, value: Any, base: int) -> TensorInfo:
    """Validate one entry of the header; `base` is where the data begins."""
    check_name(path, name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise UnsafeFile(f"{path}: tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UnsafeFile(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}; known: {', '.join(BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_count(size) for size in shape):
        raise UnsafeFile(f"{path}: tensor {name!r} has a bad shape; expected up to {MAX_RANK} sizes from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(offset) for offset in offsets):
        raise UnsafeFile(f"{path}: tensor {name!r} has bad data_offsets; expected two numbers from 0 to 2^63 - 1")
    # Also with a zero among the sizes, the product of the others must not overflow in whoever multiplies them.
    if math.prod(size or 1 for size in shape) * BITS[dtype] >= 2**63:
        raise UnsafeFile(f"{path}: tensor {name!r} of shape {shape} is too large for any machine")
    bits = math.prod(shape) * BITS[dtype]
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        raise UnsafeFile(
            f"{path}: tensor {name!r} ({dtype}, shape {shape}) needs {bits / 8:g} bytes; "
            f"its data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), base + begin, base + end)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _contiguous(path: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """The tensors must fill the file from `base` to its end, each byte belonging to one of them."""
    at, before = base, "the header"
    for name, info in tensors.items():
        if info.start != at:
            fault = "overlaps" if info.start < at else "leaves a hole after"
            raise UnsafeFile(f"{path}: tensor {name!r} {fault} {before}; expected tensors end to end")
        at, before = info.end, repr(name)
    if at > size:
        raise UnsafeFile(
            f"{path}: truncated: its tensors end at byte {at}, the file at {size}; fetch or write it again"
        )
    if at < size:
        raise UnsafeFile(f"{path}: {size - at} bytes follow the last tensor; expected none")
