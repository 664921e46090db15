"""Digests of what steps read and leave: files, folders and rows. Imports no torch.

A file is hashed once for as long as its size, times and inode stay the same; what is known lies in one JSON file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from brickyard.core.errors import DiskFull, UnsafeFile
from brickyard.core.files import read_json, sha256, write_json

_PASSING = ("run.lock", ".lock")  # files of a run under way
_ABOUT = ("merge.json", "README.md")  # say where a model comes from, and are read by nothing that uses it


class Hashes:
    """Remembers the SHA-256 of files in `path`, a JSON file that is made when it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, str] = {}
        with contextlib.suppress(OSError, UnsafeFile):
            found = read_json(path)
            self.known = found if isinstance(found, dict) else {}

    def file(self, path: Path) -> str:
        """Return the SHA-256 of one file in hex."""
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        if key not in self.known:
            self.known[key] = sha256(path)
        return self.known[key]

    def files(self, place: Path) -> dict[str, str]:
        """Return the SHA-256 of every file in a folder by its path in there; of a file, its own under `.`."""
        if place.is_file():
            return {".": self.file(place)}
        paths = (path for path in sorted(place.rglob("*")) if path.is_file() and path.name not in _PASSING)
        return {path.relative_to(place).as_posix(): self.file(path) for path in paths}

    def digest(self, place: Path) -> str:
        """Return one digest of a file or of a whole folder: names and contents, not where it lies or comes from."""
        return digest_of({name: found for name, found in self.files(place).items() if name not in _ABOUT})

    def keep(self) -> None:
        """Write what is known, without what is gone."""
        self.known = {key: value for key, value in self.known.items() if os.path.exists(key.rsplit(" ", 4)[0])}
        with contextlib.suppress(OSError, DiskFull):  # only slower next time
            write_json(self.path, self.known)


def digest_of(value: Any) -> str:
    """Return the SHA-256, in hex, of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_rows(splits: dict[str, dict[str, list]], names: Any = None) -> str:
    """Return the SHA-256, in hex, of the columns of every split: their names and values, bytes as they stand."""
    digest = hashlib.sha256(json.dumps(names, default=str).encode())
    for split, columns in sorted(splits.items()):
        for column, values in sorted(columns.items()):
            digest.update(json.dumps([split, column, len(values)]).encode())
            for value in values:
                raw = value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
                digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
