"""core.files: strict reading, atomic writing, locks, the cache folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from brickyard.core import cache
from brickyard.core.errors import DiskFull, Locked, NotFinite, UnsafeFile, UsageError
from brickyard.core.files import (
    Lock,
    cache_clear,
    cache_folder,
    cache_list,
    check_safetensors,
    complete_folder,
    plain_file,
    read_json,
    read_tensors,
    sha256,
    write_bytes,
    write_json,
    write_tensors,
)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.float8_e4m3fn,
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sample() -> dict[str, torch.Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2], dtype=torch.int64)}


@settings(derandomize=True, max_examples=12, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,4}){0,2}", fullmatch=True),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_what_is_written_is_read_back_by_us_and_by_the_library(tmp_path_factory, layout):
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, (dtype, shape) in layout.items()
    }
    write_tensors(path, tensors, {"z": "1", "a": "2"})
    for read in (read_tensors(path), read_tensors(path, mapped=True), load_file(path)):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert bits(read[name]) == bits(tensor)
    info = check_safetensors(path)
    assert {name: info[name].shape for name in info} == {name: tuple(t.shape) for name, t in tensors.items()}


def test_the_same_content_gives_the_same_bytes(tmp_path):
    one, two = sample(), dict(reversed(sample().items()))
    write_tensors(tmp_path / "1.safetensors", one, {"a": "1", "b": "2"})
    write_tensors(tmp_path / "2.safetensors", two, {"b": "2", "a": "1"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_files_of_the_library_are_read(tmp_path):
    save_file(sample(), tmp_path / "x.safetensors", {"format": "pt"})
    read = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in sample().items())


def test_scattered_and_shared_tensors_are_written_by_value(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "x.safetensors", {"t": whole.T, "w": whole, "row": whole[1]})
    read = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(read["t"], whole.T) and torch.equal(read["row"], whole[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_never_written(tmp_path, bad, dtype):
    write_tensors(tmp_path / "x.safetensors", sample())
    before = sha256(tmp_path / "x.safetensors")
    with pytest.raises(NotFinite, match=r"layer\.weight"):
        write_tensors(tmp_path / "x.safetensors", {"layer.weight": torch.tensor([0.0, bad], dtype=dtype)})
    assert sha256(tmp_path / "x.safetensors") == before
    write_tensors(tmp_path / "y.safetensors", {"mask": torch.tensor([bad])}, finite=False)
    assert torch.equal(read_tensors(tmp_path / "y.safetensors")["mask"].isfinite(), torch.tensor([False]))


def test_a_flipped_bit_inside_a_tensor_is_caught_by_its_digest(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, sample())
    digest = sha256(path)
    assert torch.equal(read_tensors(path, digest)["a"], sample()["a"])
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    check_safetensors(path)  # the header still is what it was
    for mapped in (False, True):
        with pytest.raises(UnsafeFile, match=r"x\.safetensors.*SHA-256"):
            read_tensors(path, digest, mapped=mapped)


def test_a_mapped_tensor_changes_in_private(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, sample())
    before = path.read_bytes()
    read_tensors(path, mapped=True)["b.weight"].zero_()
    assert path.read_bytes() == before


def test_names_that_no_reader_accepts_are_not_written(tmp_path):
    for name in ("", "a/b", "a..b", "a\\b", "a\0b", "a\nb"):
        with pytest.raises(UnsafeFile):
            write_tensors(tmp_path / "x.safetensors", {name: torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_json_keeps_order_text_and_numbers(tmp_path):
    value = {"z": 1, "a": [1.5, None, True], "Übung": "naïve \ud800 \U0001f9f1", "path": Path("x/y"), "n": np.int64(3)}
    write_json(tmp_path / "Ordner é" / "x.json", value)
    raw = (tmp_path / "Ordner é" / "x.json").read_text(encoding="utf-8")
    assert raw.endswith("}\n") and "Übung" in raw
    assert read_json(tmp_path / "Ordner é" / "x.json") == {**value, "path": "x/y", "n": 3}
    assert list(json.loads(raw)) == list(value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float64("nan")])
def test_json_refuses_what_is_not_a_number(tmp_path, bad):
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(NotFinite, match=r"methods\[1\]\.score"):
        write_json(tmp_path / "x.json", {"methods": [{"score": 1.0}, {"score": bad}]})
    assert read_json(tmp_path / "x.json") == {"old": 1}
    with pytest.raises(TypeError, match="set"):
        write_json(tmp_path / "x.json", {"a": {1}})


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is given twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, raw, cause):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(UnsafeFile, match=cause) as caught:
        read_json(tmp_path / "x.json")
    assert "x.json" in str(caught.value)


def test_json_with_windows_newlines_and_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{\r\n"a": Infinity\r\n}')
    assert read_json(tmp_path / "x.json", constants=True) == {"a": math.inf}
    with pytest.raises(UnsafeFile, match="more than 10 bytes"):
        read_json(tmp_path / "x.json", limit=10)


def test_only_plain_files_inside_the_folder(tmp_path):
    folder = tmp_path / "base"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (folder / "a.txt").write_text("a")
    (folder / "sub" / "b.txt").write_text("b")
    (folder / "inside").symlink_to("a.txt")
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "way").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    for name in ("a.txt", "sub/b.txt", "inside"):
        assert plain_file(folder, name).read_text() in "ab"
    bad = ["../secret", str(tmp_path / "secret"), "sub/../a.txt", "./a.txt", "sub//b.txt", "", "a\0", "sub\\b.txt"]
    for name in [*bad, "outside", "way/secret", "sub", "pipe", "missing"]:
        with pytest.raises(UnsafeFile):
            plain_file(folder, name)


def test_links_of_the_hub_cache_are_followed_and_no_others(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc123").write_text("blob")
    (repository / "other").write_text("other")
    (snapshot / "config.json").symlink_to("../../blobs/abc123")
    (snapshot / "escape").symlink_to("../../other")
    assert plain_file(snapshot, "config.json").read_text() == "blob"
    with pytest.raises(UnsafeFile, match="link out of its folder"):
        plain_file(snapshot, "escape")


def test_a_folder_appears_whole_and_replaces_the_older_one(tmp_path):
    target = tmp_path / "runs" / "brick"
    for version in (1, 2):
        with complete_folder(target) as temporary:
            assert temporary.parent == target.parent and list(temporary.iterdir()) == []
            write_json(temporary / f"only{version}.json", {})
            write_json(temporary / "brick.json", {"version": version})
            assert not (target / f"only{version}.json").exists()
        assert {p.name for p in target.iterdir()} == {"brick.json", f"only{version}.json"}
        assert [p.name for p in target.parent.iterdir()] == ["brick"]


def test_a_folder_whose_writer_fails_leaves_the_old_one(tmp_path):
    target = tmp_path / "brick"
    with complete_folder(target) as temporary:
        write_json(temporary / "brick.json", {"version": 1})
    with pytest.raises(KeyError), complete_folder(target) as temporary:
        write_json(temporary / "brick.json", {"version": 2})
        raise KeyError
    assert read_json(target / "brick.json") == {"version": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["brick"]


def test_somebody_elses_folder_is_never_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"), complete_folder(home) as temporary:
        write_json(temporary / "brick.json", {})
    assert (home / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"), complete_folder(tmp_path / "file"):
        pass
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    with complete_folder(tmp_path / "link") as temporary:
        write_json(temporary / "brick.json", {})
    assert (empty / "brick.json").is_file() and (tmp_path / "link").is_symlink()


def test_a_disk_too_small_is_said_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskFull, match=r"x\.bin.*11 bytes needed, 10 free"):
        write_bytes(tmp_path / "x.bin", b"01234567890")
    assert list(tmp_path.iterdir()) == []
    write_bytes(tmp_path / "x.bin", b"0123456789")


def test_a_second_lock_says_who_is_there(tmp_path):
    with Lock(tmp_path / "run") as lock:
        assert lock.took_over is None
        with (
            pytest.raises(Locked, match=rf"this very process.*pid {os.getpid()}.*since 20\d\d-"),
            Lock(tmp_path / "run"),
        ):
            pass
        code = (
            "import sys; from brickyard.core.files import Lock\n"
            "from brickyard.core.errors import Locked\n"
            "try:\n    Lock(sys.argv[1]).__enter__()\n"
            "except Locked as error:\n    sys.exit(str(error))"
        )
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
        assert other.returncode == 1 and f"process {os.getpid()} on" in other.stderr
    assert list((tmp_path / "run").iterdir()) == []
    with Lock(tmp_path / "run"), Lock(tmp_path / "other.lock"):
        assert (tmp_path / "other.lock").is_file()


def test_a_dead_owners_lock_is_taken_over_even_while_its_child_lives(tmp_path):
    code = (
        "import os, sys, time; from brickyard.core.files import Lock\n"
        "lock = Lock(sys.argv[1]); lock.__enter__()\n"
        "if os.fork() == 0:\n    print(os.getpid(), flush=True); time.sleep(60); os._exit(0)\n"
        "time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(Locked, match=f"process {owner.pid} "), Lock(tmp_path):
            pass
        owner.kill()
        owner.wait()
        with Lock(tmp_path) as lock:
            assert lock.took_over is not None and lock.took_over["pid"] == owner.pid
    finally:
        os.kill(child, 9)
        owner.stdout.close()


def test_the_cache_is_listed_and_cleared_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    folder = cache_folder()
    assert folder == tmp_path / "cache" and cache_list() == []
    write_bytes(folder / "states" / "a", b"12345")
    write_bytes(folder / "fingerprints" / "b", b"1")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("keep")
    (folder / "link").symlink_to(outside)
    assert [(e.name, e.bytes, e.files) for e in cache_list() if e.name != "link"] == [
        ("fingerprints", 1, 1),
        ("states", 5, 1),
    ]
    assert str(cache_list()[0]).startswith("fingerprints: 1 bytes in 1 file, last written 20")
    assert cache_clear() >= 6
    assert cache_list() == [] and (outside / "keep").read_text() == "keep"


def test_a_folder_with_other_things_only_lends_a_subfolder(tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_text("mine")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    write_bytes(cache_folder() / "x", b"1")
    assert cache_folder() == tmp_path / "brickyard"
    cache_clear()
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_a_home_that_cannot_be_written_to_falls_back_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file, so that nothing can be made below it")
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match=cache.VARIABLE):
        folder = cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    # A folder that somebody else could have prepared under that name is not trusted.
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match=cache.VARIABLE):
        assert cache_folder() != folder
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "home" / "x"))
    with pytest.raises(UsageError, match=cache.VARIABLE):
        cache_folder()


def test_no_torch_is_imported():
    code = "import sys, brickyard.core.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
