"""Artefacts that are complete or absent, whatever kills the writer. Imports no torch.

A file or folder is written under a temporary name beside its target, flushed to the disk, and renamed; then the folder
that holds it is flushed too. Whoever dies on the way leaves the old artefact as it was and a `.brickyard-*` leftover.
Each temporary is locked (`flock`) by its writer, so the next writer can tell a leftover from work in progress.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from brickyard.core.errors import DiskFull, UsageError
from brickyard.core.locks import LOCK

PREFIX = ".brickyard-"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


def write_chunks(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview], size: int) -> None:
    """Write `chunks`, `size` bytes in all, to `path`: after a crash at any point it holds the old or the new.

    Raises DiskFull, with the bytes needed and free, before anything is written where the disk is known to be too small.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    with room(path, size):
        handle, temporary = _new_file(path.parent)
        try:
            for chunk in chunks:
                _write_all(handle, chunk)
            os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        finally:
            os.close(handle)
        _sync_folder(path.parent)


@contextlib.contextmanager
def complete_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a whole artefact folder: yields an empty temporary folder, which becomes `path` when the block ends.

    Where `path` exists, the two change places in one step and the old one is deleted afterwards; when the block raises,
    nothing has happened to it. Write the manifest last. A non-empty `path` that shares no file name with the new folder
    is somebody's data and not an older version: UsageError, and it stays. A full disk raises DiskFull.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; expected a folder, or a name that is not taken.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent)
    with room(path, 0, temporary):
        recover(path)
        sweep(path.parent)
        handle = _new_folder(temporary)
        try:
            yield temporary
            _same_kind(temporary, path)
            _sync_tree(temporary)
            _swap(temporary, path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what writers that died have left in `folder`; the temporaries of living writers stay."""
    with os.scandir(folder) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
    for path in left:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _lock(handle):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def recover(path: Path) -> None:
    """Finish or undo a swap that was interrupted, where the system could not do it in one step (see `_swap`)."""
    before = _before(path)
    if before.is_dir():
        if path.exists():
            shutil.rmtree(before)
        else:
            os.rename(before, path)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _temporary(folder: Path) -> Path:
    return folder / f"{PREFIX}{secrets.token_hex(8)}.tmp"


def _new_file(folder: Path) -> tuple[int, Path]:
    """Create and lock a temporary file; again where a sweeper came between the two."""
    while True:
        path = _temporary(folder)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _lock(handle) and os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)


def _new_folder(path: Path) -> int:
    while True:
        os.mkdir(path)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError:
            os.rmdir(path)
            raise
        if _lock(handle) and path.is_dir():
            return handle
        os.close(handle)


def _write_all(handle: int, chunk: bytes | memoryview) -> None:
    left = memoryview(chunk).cast("B") if not isinstance(chunk, bytes) else memoryview(chunk)
    while len(left):
        left = left[os.write(handle, left) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, whoever wrote them."""
    for root, _folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(root, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                _sync_folder(Path(path))
        _sync_folder(Path(root))


def _same_kind(new: Path, old: Path) -> None:
    if not old.is_dir():
        return
    there = {entry.name for entry in os.scandir(old)} - {LOCK}
    there = {name for name in there if not name.startswith(PREFIX)}
    if there and not there & {entry.name for entry in os.scandir(new)}:
        raise UsageError(
            f"{old} holds other things ({', '.join(sorted(there)[:3])}, ...) and would be replaced as a whole; "
            "name a new folder, or empty this one."
        )


def _swap(new: Path, path: Path) -> None:
    """Put the folder `new` at `path`; where something is there already, it ends up at `new`."""
    if not path.exists() or not any(os.scandir(path)):
        os.rename(new, path)  # POSIX: an empty folder is replaced
        return
    if _exchange(new, path):
        return
    # Not one step here, so that a crash between the two leaves no `path`; the next write brings it back (`recover`).
    before = _before(path)
    os.rename(path, before)
    os.rename(new, path)
    shutil.rmtree(before)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.brickyard-before")


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextlib.contextmanager
def room(path: Path, size: int, written: Path | None = None) -> Iterator[None]:
    """Turn "no space left" into DiskFull with the bytes needed and free; ask for `size` bytes beforehand."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise DiskFull(_full(path, f"{size:,}", free))
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        needed = f"{size:,}" if written is None else f"more than {_bytes_below(written):,}"
        raise DiskFull(_full(path, needed, free)) from error


def _full(path: Path, needed: str, free: int) -> str:
    return (
        f"no room to write {path}: {needed} bytes needed, {free:,} free on its disk (a quota may allow less). "
        "What was there before is untouched; free some space or choose another folder."
    )


def _bytes_below(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
