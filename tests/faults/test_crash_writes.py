"""Writers that fail, fill the disk or are killed at every single step leave the old artefact or the new one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from brickyard.core import atomic
from brickyard.core.errors import DiskFull
from brickyard.core.files import (
    complete_folder,
    read_json,
    read_tensors,
    sha256,
    write_bytes,
    write_json,
    write_tensors,
)

# Every call by which a writer changes the disk.
STEPS = ("write", "fsync", "replace", "rename", "open", "mkdir")


class Shim:
    """Lets the first `n - 1` steps of a writer pass and does `fault` at the n-th, after half of it where it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, fault: Callable[[], None]) -> None:
        self.left, self.fault = n, fault
        for name in STEPS:
            monkeypatch.setattr(os, name, self._around(getattr(os, name), name))
        monkeypatch.setattr(atomic, "_exchange", self._around(atomic._exchange, "exchange"))

    def _around(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    real(given[0], bytes(given[1])[: len(given[1]) // 2])
                self.fault()
            return real(*given, **named)

        return step


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(n: int, operation: Callable[[], None]) -> bool:
    """Run `operation` in a child that is killed at its n-th step; False where it had fewer."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            Shim(patch, n, kill)
            operation()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if "brickyard" in entry.name]


def tensors_of(version: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 5), float(version)), "b": torch.full((4,), version)}


def write_file(path: Path, version: int) -> None:
    write_tensors(path, tensors_of(version))


def file_version(path: Path) -> int:
    read = read_tensors(path)
    version = int(read["b"][0])
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors_of(version).items())
    return version


def write_brick(path: Path, version: int) -> None:
    with complete_folder(path) as temporary:
        write_tensors(temporary / "weights.safetensors", tensors_of(version))
        write_json(temporary / "brick.json", {"version": version, "sha256": sha256(temporary / "weights.safetensors")})


def brick_version(path: Path) -> int:
    known = read_json(path / "brick.json")
    read_tensors(path / "weights.safetensors", known["sha256"])
    assert {entry.name for entry in path.iterdir()} == {"brick.json", "weights.safetensors"}
    assert file_version(path / "weights.safetensors") == known["version"]
    return known["version"]


KINDS = [(write_file, file_version, "x.safetensors"), (write_brick, brick_version, "brick")]


@pytest.mark.parametrize(("write", "version_of", "name"), KINDS)
def test_killed_at_every_step(tmp_path, write, version_of, name):
    path = tmp_path / name
    seen = []
    n = 0
    while True:
        n += 1
        write(path, 1)
        assert leftovers(tmp_path) == []  # this write has swept what the one killed before it left
        killed = killed_at(n, lambda: write(path, 2))
        seen.append(version_of(path))
        if not killed:
            break
    assert n > 5 and seen[-1] == 2 and seen == sorted(seen)  # old until one moment, new from then on


@pytest.mark.parametrize(("write", "version_of", "name"), KINDS)
def test_killed_at_every_step_of_the_first_write(tmp_path, write, version_of, name):
    n = 0
    while True:
        n += 1
        folder = tmp_path / str(n)
        folder.mkdir()
        killed = killed_at(n, lambda folder=folder: write(folder / name, 1))
        assert not (folder / name).exists() or version_of(folder / name) == 1
        write(folder / name, 2)
        assert version_of(folder / name) == 2 and leftovers(folder) == []
        if not killed:
            break
    assert n > 5


def test_killed_at_every_step_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    path = tmp_path / "brick"
    n = 0
    while True:
        n += 1
        write_brick(path, 1)
        assert leftovers(tmp_path) == []
        killed = killed_at(n, lambda: write_brick(path, 2))
        atomic.recover(path)
        assert brick_version(path) in ((1, 2) if killed else (2,))
        if not killed:
            break
    assert n > 5


@pytest.mark.parametrize(("write", "version_of", "name"), KINDS)
@pytest.mark.parametrize(("code", "raised"), [(errno.EIO, OSError), (errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull)])
def test_failing_at_every_step(tmp_path, write, version_of, name, code, raised):
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / name
    n = 0
    while True:
        n += 1
        write(path, 1)
        assert leftovers(tmp_path) == []
        with pytest.MonkeyPatch.context() as patch:
            shim = Shim(patch, n, fail)
            try:
                write(path, 2)
            except raised as error:
                failed = True
                if raised is DiskFull:
                    assert "bytes needed" in str(error) and "free on its disk" in str(error)
            else:
                failed = False
        assert version_of(path) in ((1, 2) if failed else (2,))
        # A writer that lives cleans up after itself; what it could not delete is swept by the next.
        assert leftovers(tmp_path) == [] or not failed
        if shim.left > 0:  # it had fewer steps; failing to make a folder that is there is no fault
            break
    assert n > 5


def test_a_full_disk_names_the_bytes_needed(tmp_path, monkeypatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Shim(monkeypatch, 2, full)
    with pytest.raises(DiskFull, match=r"x\.bin: 12,345 bytes needed, [\d,]+ free"):
        write_bytes(tmp_path / "x.bin", b"x" * 12345)


def test_a_living_writers_temporary_is_not_swept(tmp_path):
    with complete_folder(tmp_path / "slow") as temporary:
        write_json(temporary / "brick.json", {})
        write_bytes(tmp_path / "quick.bin", b"1")
        with complete_folder(tmp_path / "other") as other:
            write_json(other / "brick.json", {})
        assert (temporary / "brick.json").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "quick.bin", "slow"]


WRITER = """
import sys
from pathlib import Path
from brickyard.core.files import complete_folder, sha256, write_bytes, write_json
root = Path(sys.argv[1])
for version in range(1, 10**9):
    with complete_folder(root / "brick") as temporary:
        write_bytes(temporary / "weights.bin", bytes([version % 251]) * 300_000)
        write_json(temporary / "brick.json", {"sha256": sha256(temporary / "weights.bin")})
    write_json(root / "result.json", {"version": version, "again": version})
    if version == 1:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("moment", (0.0, 0.003, 0.011, 0.027, 0.05))
def test_a_process_killed_at_any_moment(tmp_path, moment):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(moment)
    process.kill()
    process.wait()
    process.stdout.close()
    known = json.loads((tmp_path / "brick" / "brick.json").read_text())
    assert sha256(tmp_path / "brick" / "weights.bin") == known["sha256"]
    result = read_json(tmp_path / "result.json")
    assert result["version"] == result["again"]
    write_json(tmp_path / "result.json", {})
    assert leftovers(tmp_path) == []
