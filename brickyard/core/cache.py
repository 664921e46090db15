"""The cache folder: what Brickyard may delete at any time. Imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from brickyard.core.errors import UsageError

# The mark of a folder that holds nothing but cache (bford.info/cachedir). Only what carries it is ever cleared.
TAG = "CACHEDIR.TAG"
_TAGGED = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is Brickyard's cache; `brickyard cache clear`.\n"
VARIABLE = "BRICKYARD_CACHE"


@dataclass(frozen=True)
class CacheEntry:
    """One kind of thing in the cache: its name, its size in bytes, how many files, when one was last written."""

    name: str
    bytes: int
    files: int
    newest: datetime

    def __str__(self) -> str:
        files = f"{self.files} file{'' if self.files == 1 else 's'}"
        return f"{self.name}: {self.bytes:,} bytes in {files}, last written {self.newest:%Y-%m-%d %H:%M} UTC"


def cache_folder() -> Path:
    """Return the cache folder, made where it is missing: `BRICKYARD_CACHE`, else `~/.cache/brickyard`.

    Where the variable names a folder that already holds other things, its subfolder `brickyard` is used, so that
    clearing the cache can never take anything else with it. Where the home cannot be written to, a private folder among
    the temporary files is used, with a warning. Raises UsageError where the variable's folder cannot be used.
    """
    given = os.environ.get(VARIABLE, "")
    if given:
        chosen = Path(given).expanduser().absolute()
        try:
            return _ready(chosen if _ours(chosen) else chosen / "brickyard")
        except OSError as error:
            raise UsageError(
                f"{VARIABLE}={given} cannot be used as the cache folder: {error}. Name a folder that can be written to."
            ) from error
    try:
        return _ready(Path.home() / ".cache" / "brickyard")
    except (OSError, RuntimeError) as error:
        fallback = _temporary()
        warnings.warn(
            f"the home folder cannot be written to ({error}); caching in {fallback}, which may not outlive a restart. "
            f"Set {VARIABLE} to choose another folder.",
            stacklevel=2,
        )
        return fallback


def cache_list() -> list[CacheEntry]:
    """Return what the cache holds, one entry for each kind, sorted by name."""
    entries = []
    for child in sorted(cache_folder().iterdir()):
        if child.name == TAG:
            continue
        inside = child.rglob("*") if child.is_dir() and not child.is_symlink() else [child]
        stats = [path.lstat() for path in inside if path.is_file() or path.is_symlink()]
        newest = max((stat.st_mtime for stat in stats), default=child.lstat().st_mtime)
        entries.append(
            CacheEntry(child.name, sum(s.st_size for s in stats), len(stats), datetime.fromtimestamp(newest, UTC))
        )
    return entries


def cache_clear() -> int:
    """Delete everything in the cache and return the bytes freed. Links are removed, never followed."""
    folder = cache_folder()
    freed = sum(entry.bytes for entry in cache_list())
    for child in folder.iterdir():
        if child.name == TAG:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    return freed


def _ours(folder: Path) -> bool:
    """Whether `folder` is a cache of ours, or empty, or not there yet."""
    return not folder.exists() or (folder / TAG).is_file() or (folder.is_dir() and not any(folder.iterdir()))


def _ready(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tag = folder / TAG
    if not tag.is_file():
        tag.write_text(_TAGGED, encoding="utf-8")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return folder


def _temporary() -> Path:
    """A folder of our own under the system's temporary files; nobody else may have prepared it for us."""
    wanted = Path(tempfile.gettempdir()) / f"brickyard-cache-{os.getuid()}"
    try:
        wanted.mkdir(mode=0o700, exist_ok=True)
        stat = wanted.lstat()
        if wanted.is_symlink() or stat.st_uid != os.getuid() or stat.st_mode & 0o077:
            raise PermissionError(wanted)
        return _ready(wanted)
    except OSError:
        return _ready(Path(tempfile.mkdtemp(prefix="brickyard-cache-")))
