"""Replace and remove installed bricks, with a record of each change, so that it can be taken back bit for bit.

    IN/.bricks/0001/record.json    what was done to which folder, the sha256 of every file, and whether it was undone
    IN/.bricks/0001/brick          the brick that lay there before, moved as it is

A folder is moved in one step; a kill between two steps leaves the old brick in one of the two places, and the record
that says which.
"""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from brickyard.core import brick as bricks
from brickyard.core.base import open_base
from brickyard.core.brick import KEPT_ASIDE, MANIFEST
from brickyard.core.errors import BadBrick, UsageError, WrongBase
from brickyard.core.files import Lock, complete_folder, read_json, sha256, write_json

RECORD, OLD, NEW = "record.json", "brick", "replaced-by"


def remove(folder: str | Path, brick: str | Path, base: str) -> dict[str, Any]:
    """Take a brick out of the folder where bricks are installed; return the record. Its files are kept aside."""
    return _change(Path(folder), Path(brick), base, None)


def replace(folder: str | Path, brick: str | Path, by: str | Path, base: str) -> dict[str, Any]:
    """Put a copy of the brick `by` in the place of `brick`, which is kept aside; return the record.

    Raises WrongBase where one of the two was made for another base.
    """
    return _change(Path(folder), Path(brick), base, Path(by))


def _change(folder: Path, brick: Path, base: str, by: Path | None) -> dict[str, Any]:
    fingerprint = open_base(base).fingerprint
    inside = _inside(folder, brick)
    for path in (brick, *((by,) if by else ())):
        if bricks.load(path).requires != fingerprint:
            raise WrongBase(f"{path} was made for another base than {base}; give the base that it belongs to.")
    if by is not None and os.path.realpath(by) == os.path.realpath(brick):
        raise UsageError(f"{brick} cannot replace itself; give another brick.")
    aside = folder / KEPT_ASIDE
    with Lock(aside):
        # A kill may have left a folder without its record; its number is taken all the same.
        number = 1 + max((int(path.name) for path in aside.glob("[0-9]*") if path.name.isdecimal()), default=0)
        place = aside / f"{number:04d}"
        place.mkdir(parents=True)
        record = {
            "number": number,
            "operation": "remove" if by is None else "replace",
            "brick": inside.as_posix(),
            "by": None if by is None else str(by),
            "base": {"spec": base, "fingerprint": fingerprint},
            "files": _files(brick),
            "by_files": None if by is None else _files(by),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "undone": False,
        }
        write_json(place / RECORD, record)
        os.rename(brick, place / OLD)
        if by is not None:
            _copy(by, brick)
    return record


def undo(folder: str | Path) -> dict[str, Any]:
    """Take back the last change that was not taken back yet; return its record.

    Raises UsageError where there is none, BadBrick where what was kept aside is not what it was, or something else now
    lies in its place.
    """
    folder = Path(folder)
    aside = folder / KEPT_ASIDE
    if not _records(aside):
        raise UsageError(f"nothing was replaced or removed under {folder}; give the folder with --in.")
    with Lock(aside):
        open_changes = [path for path in _records(aside) if not read_json(path / RECORD)["undone"]]
        if not open_changes:
            raise UsageError(f"every change under {folder} was taken back already.")
        place = open_changes[-1]
        record = read_json(place / RECORD)
        brick, old = folder / record["brick"], place / OLD
        if old.is_dir():
            if _files(old) != record["files"]:
                raise BadBrick(f"{old} is not what was kept aside: its files changed. Nothing was moved.")
            if brick.exists():
                if record["operation"] == "remove" or _files(brick) != record["by_files"]:
                    raise BadBrick(f"{brick} holds something else by now; move it away first. Nothing was moved.")
                os.rename(brick, place / NEW)
            os.rename(old, brick)
        elif not brick.is_dir() or _files(brick) != record["files"]:
            raise BadBrick(f"{old} is gone, so {brick} cannot be put back.")
        record["undone"] = True
        write_json(place / RECORD, record)
    return record


def records(folder: str | Path) -> list[dict[str, Any]]:
    """Return the records of every change under `folder`, the oldest first."""
    return [read_json(path / RECORD) for path in _records(Path(folder) / KEPT_ASIDE)]


def _records(aside: Path) -> list[Path]:
    return sorted(path for path in aside.glob("[0-9]*") if (path / RECORD).is_file()) if aside.is_dir() else []


def _inside(folder: Path, brick: Path) -> Path:
    real, root = Path(os.path.realpath(brick)), Path(os.path.realpath(folder))
    if not (brick / MANIFEST).is_file():
        raise BadBrick(f"{brick} is not a brick: it has no {MANIFEST}. See: brickyard bricks BASE --in {folder}")
    if real == root or not real.is_relative_to(root) or KEPT_ASIDE in real.relative_to(root).parts:
        raise UsageError(
            f"{brick} is not installed under {folder}; give a brick from the table, or its folder by --in."
        )
    return real.relative_to(root)


def _files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _copy(source: Path, target: Path) -> None:
    with complete_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
