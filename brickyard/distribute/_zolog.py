"""The file of a one-byte run: magic, the header's length (8 bytes, little-endian), the header (JSON), codes.

A round that was appended is on the disk: it survives a power cut, after which the weights are rebuilt from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brickyard.core.errors import BadBrick, BrickyardError, Refused
from brickyard.core.files import write_bytes

MAGIC = b"zolog1\n\0"


class LogFile:
    """A header and a body that only grows, by whole rounds.

    Opened on a file that is there, it keeps its whole rounds and drops a torn last one; Refused where its header is not
    the one given, BadBrick where it is no log. `round_bytes` reads from a header how many bytes a round has.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None, round_bytes: Callable[[dict[str, Any]], int]) -> None:
        self.path = path
        if path.exists():
            raw = path.read_bytes()
            self.header, start = _read_header(path, raw)
            if header is not None:
                same_header(str(path), self.header, header)
        elif header is None:
            raise BadBrick(f"{path} does not exist; give the log of a run.")
        else:
            text = json.dumps(header, sort_keys=True).encode()
            raw = MAGIC + len(text).to_bytes(8, "little") + text
            start, self.header = len(raw), header
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, raw)
        try:
            self.round_bytes = round_bytes(self.header)
        except (KeyError, TypeError, ValueError, BrickyardError) as error:
            raise BadBrick(f"{path}: its header is not one of a run ({error}).") from None
        whole = (len(raw) - start) // self.round_bytes * self.round_bytes
        self._start = start
        self.body = bytearray(raw[start : start + whole])
        if len(raw) > start + whole:
            os.truncate(path, start + whole)

    @property
    def rounds(self) -> int:
        """Rounds that it holds."""
        return len(self.body) // self.round_bytes

    def append(self, codes: bytes) -> None:
        """Add the codes of whole rounds; they are on the disk when this returns."""
        with open(self.path, "r+b") as file:
            # A write that failed has left a part of its codes, which would shift all that follow.
            file.truncate(self._start + len(self.body))
            file.seek(0, os.SEEK_END)
            file.write(codes)
            file.flush()
            os.fsync(file.fileno())
        self.body += codes

    def drop(self, rounds: int) -> None:
        """Take the last `rounds` rounds off again."""
        cut = rounds * self.round_bytes
        if cut:
            os.truncate(self.path, self._start + len(self.body) - cut)
            del self.body[-cut:]


def same_header(whose: str, other: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise Refused, naming the first key, unless two headers are the same."""
    here = json.loads(json.dumps(mine))  # tuples become lists
    for key in sorted(here.keys() | other.keys()):
        if other.get(key) != here.get(key):
            raise Refused(
                f"{whose} has another {key} ({other.get(key)}) than this member ({here.get(key)}); all members of a "
                "run need the same base, configuration, seed and release."
            )


def _read_header(path: Path, raw: bytes) -> tuple[dict[str, Any], int]:
    """Return the header of a log and where its codes begin."""
    at = len(MAGIC) + 8
    size = int.from_bytes(raw[len(MAGIC) : at], "little")
    if not raw.startswith(MAGIC) or len(raw) < at + size:
        raise BadBrick(f"{path} is no .zolog file, or its beginning is cut off.")
    try:
        header = json.loads(raw[at : at + size].decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadBrick(f"{path}: its header is damaged ({error}).") from None
    if not isinstance(header, dict):
        raise BadBrick(f"{path}: its header is of type {type(header).__name__}; expected an object.")
    return header, at + size
