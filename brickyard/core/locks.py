"""One process at a time in a folder. Imports no torch.

`flock` is what decides: the kernel lets go of it when its owner dies, however it dies, so no lock is ever stale. What
stands in the lock file (pid, host, time) only tells the others who is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from brickyard.core.errors import Locked

LOCK = ".lock"


class Lock:
    """Hold `path` for this process, as a context manager.

    `path` is a folder (its `.lock` is used; the folder is made where it is missing), or the lock file itself where it
    is a file or ends in `.lock`. Entering raises Locked with the owner's pid and time when another process, or another
    Lock of this one, is there. A dead owner's lock is taken over: `took_over` then holds what it had written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        is_file = given.is_file() or (given.suffix == LOCK and not given.is_dir())
        self.file = given if is_file else given / LOCK
        self.took_over: dict[str, Any] | None = None
        self._handle: int | None = None

    def __enter__(self) -> Lock:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = _read(handle)
                os.close(handle)
                raise Locked(self._message(owner)) from None
            # The owner before may have removed the file between our open and our lock; then we hold nothing.
            if _same(handle, self.file):
                break
            os.close(handle)
        left = _read(handle)
        self.took_over = left or None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_myself()).encode(), 0)
        self._handle = handle
        # A forked child shares the lock; it must let go of it, or a killed owner's lock would outlive it.
        os.register_at_fork(after_in_child=_dropper(weakref.ref(self)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            if _same(self._handle, self.file):
                os.unlink(self.file)
        os.close(self._handle)
        self._handle = None

    def _message(self, owner: dict[str, Any]) -> str:
        if not owner:
            return f"{self.file.parent} is in use by another process; wait for it to end, or choose another folder."
        here = owner.get("pid") == os.getpid() and owner.get("host") == socket.gethostname()
        who = "this very process" if here else f"process {owner.get('pid')} on {owner.get('host')}"
        return (
            f"{self.file.parent} is in use by {who} (pid {owner.get('pid')}) since {owner.get('since')}; "
            "wait for it to end, or choose another folder."
        )

    def _drop(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _dropper(lock: weakref.ref[Lock]) -> Callable[[], None]:
    def drop() -> None:
        held = lock()
        if held is not None:
            held._drop()

    return drop


def _myself() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read(handle: int) -> dict[str, Any]:
    """What the owner wrote; empty while it is still writing, or where it is no JSON object."""
    try:
        known = json.loads(os.pread(handle, 4096, 0).decode())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _same(handle: int, path: Path) -> bool:
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


@contextlib.contextmanager
def waiting(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a lock, waiting for another process that has it: it is building just what we want."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(Lock(path))
                break
            except Locked:
                time.sleep(0.1)
        yield
