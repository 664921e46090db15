"""safetensors files from strangers: malformed or damaged ones are refused, by name and cause, before any allocation."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from brickyard.core.errors import UnsafeFile
from brickyard.core.files import check_safetensors, read_tensors
from brickyard.core.safetensors_check import BITS, MAX_HEADER


def raw_file(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


DATA = bytes(8)
HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "no header": (b"", b"", 0, "too short"),
    "huge header": (b"{}", DATA, MAX_HEADER + 1, "header has 16777217 bytes; the limit"),
    "absurd header": (b"{}", DATA, 2**63, "the limit is"),
    "truncated header": ({"a": entry()}, b"", 10_000, "truncated"),
    "not JSON": (b"{'a': 1}  ", DATA, None, "not JSON"),
    "a list": (b"[1, 2, 3]", DATA, None, "begins with"),
    "spaces before": (b'  {"a": 1}', DATA, None, "begins with"),
    "deep": (b'{"a":' + b"[" * 200_000, DATA, None, "not JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', DATA, None, "UTF-8"),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', DATA, None, "NaN"),
    "number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", DATA, None, "not JSON"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        DATA,
        None,
        "'a' is given twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
        DATA,
        None,
        "'shape' is given twice",
    ),
    "duplicate metadata": (
        b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        DATA,
        None,
        "'k'",
    ),
    "metadata of numbers": ({"__metadata__": {"k": 1}, "a": entry()}, DATA, None, "__metadata__"),
    "NUL in a name": ({"a\0b": entry()}, DATA, None, "unprintable"),
    "newline in a name": ({"a\nb": entry()}, DATA, None, "unprintable"),
    "bidi override in a name": ({"a\u202eb": entry()}, DATA, None, "unprintable"),
    "climbing name": ({"../../etc/passwd": entry()}, DATA, None, "looks like a path"),
    "dots in a name": ({"a..b": entry()}, DATA, None, "looks like a path"),
    "slash in a name": ({"a/b": entry()}, DATA, None, "looks like a path"),
    "backslash in a name": ({"a\\b": entry()}, DATA, None, "looks like a path"),
    "empty name": ({"": entry()}, DATA, None, "0 characters"),
    "endless name": ({"a" * 2000: entry()}, DATA, None, "2000 characters"),
    "unknown dtype": ({"a": entry("F31")}, DATA, None, "unknown dtype 'F31'"),
    "dtype of another type": ({"a": entry(["F32"])}, DATA, None, "unknown dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, DATA, None, "exactly dtype, shape and data_offsets"),
    "extra field": ({"a": entry(strides=[1])}, DATA, None, "exactly dtype"),
    "negative size": ({"a": entry(shape=[-2])}, DATA, None, "bad shape"),
    "fractional size": ({"a": entry(shape=[2.0])}, DATA, None, "bad shape"),
    "true as a size": ({"a": entry(shape=[True, 2])}, DATA, None, "bad shape"),
    "too many sizes": ({"a": entry(shape=[1] * 65)}, DATA, None, "bad shape"),
    "overflow": ({"a": entry(shape=[2**32, 2**32])}, DATA, None, "too large"),
    "overflow beside zero": ({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, b"", None, "too large"),
    "wrong byte count": ({"a": entry(shape=[3])}, DATA, None, "needs 12 bytes; its data_offsets .* hold 8"),
    "half a byte": ({"a": entry("F4", [3], [0, 1])}, b"\0", None, "needs 1.5 bytes"),
    "reversed offsets": ({"a": entry(offsets=[8, 0])}, DATA, None, "needs 8 bytes"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, DATA, None, "bad data_offsets"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), None, "'b' overlaps 'a'"),
    "twice the same bytes": ({"a": entry(), "b": entry()}, DATA, None, "'b' overlaps 'a'"),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), None, "'b' leaves a hole after 'a'"),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), None, "leaves a hole after the header"),
    "truncated data": ({"a": entry()}, bytes(5), None, "truncated"),
    "extended tail": ({"a": entry()}, bytes(9), None, "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_safetensors_file_is_refused_with_its_name_and_the_cause(tmp_path, case):
    header, data, length, cause = HOSTILE[case]
    path = raw_file(tmp_path / "model.safetensors", header, data, length)
    for read in (check_safetensors, read_tensors):
        with pytest.raises(UnsafeFile, match=cause) as caught:
            read(path)
        assert "model.safetensors" in str(caught.value)


def test_a_terabyte_is_refused_before_it_is_allocated(tmp_path):
    size = 2**40
    path = raw_file(tmp_path / "x.safetensors", {"a": entry("U8", [size], [0, size])}, bytes(16))
    with pytest.raises(UnsafeFile, match="truncated"):
        read_tensors(path)


def test_an_empty_or_missing_file_and_a_folder(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(UnsafeFile, match=r"empty\.safetensors: the file is empty"):
        check_safetensors(tmp_path / "empty.safetensors")
    with pytest.raises(UnsafeFile, match="no such file"):
        check_safetensors(tmp_path / "missing.safetensors")
    with pytest.raises(UnsafeFile, match="a folder"):
        check_safetensors(tmp_path)
    # A header of 640 bytes begins with the same two bytes as a pickle.
    raw = json.dumps({"a": entry()}).encode().ljust(640)
    assert list(check_safetensors(raw_file(tmp_path / "x.safetensors", raw, DATA))) == ["a"]


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, path)
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(UnsafeFile):
            check_safetensors(path)


numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**62, 2**63, 2**64]), st.floats(), st.booleans())
junk = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from([*BITS, "F31"]), junk),
            "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), junk),
            "data_offsets": st.one_of(st.tuples(st.integers(0, 40), st.integers(0, 40)), junk),
        }
    ),
    junk,
)


@settings(
    derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4)), entries, max_size=3),
    st.integers(0, 48),
)
def test_any_header_is_read_consistently_or_refused(tmp_path, header, size):
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    try:
        found = check_safetensors(path)
    except UnsafeFile:
        return
    start = 8 + len(json.dumps(header))
    for info in found.values():
        assert info.start == start and (info.end - info.start) * 8 == math.prod(info.shape) * BITS[info.dtype]
        start = info.end
    assert start == path.stat().st_size


@settings(
    derandomize=True, max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_what_we_accept_the_library_accepts_and_reads_alike(tmp_path, data):
    """Valid files with one byte changed, removed or added anywhere: never accepted here and refused there."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int16)}, path, {"k": "v"})
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    change = data.draw(st.sampled_from(["set", "remove", "insert"]))
    value = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b'{}[]",:0129.-abF'))))
    if change == "set":
        raw[at] = value
    elif change == "remove":
        del raw[at]
    else:
        raw.insert(at, value)
    path.write_bytes(raw)
    try:
        found = check_safetensors(path)
    except UnsafeFile:
        return
    assume(all(info.dtype not in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0") for info in found.values()))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(found)
        for name, info in found.items():
            assert (
                tuple(file.get_slice(name).get_shape()) == info.shape and file.get_slice(name).get_dtype() == info.dtype
            )
