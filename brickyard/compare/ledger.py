"""The ledger of a run folder: one JSON a finished trial is the truth, SQLite (WAL) is an index that can be rebuilt."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import Any

from brickyard.core.errors import BadBrick
from brickyard.core.files import write_json
from brickyard.core.spent import PLANNED

_TABLE = """create table if not exists trials (
  key text primary key, name text, role text, seed integer, arm text, status text, reason text, score real,
  validation real, seconds real, finished text)"""


class Ledger:
    """The finished trials of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        self.database = folder / "ledger.sqlite"
        try:
            self.rebuild()
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                self.database.with_name(self.database.name + suffix).unlink(missing_ok=True)
            self.rebuild()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.database, timeout=30)
        connection.execute("pragma journal_mode=wal")
        connection.execute(_TABLE)
        return connection

    def trial(self, key: str) -> Path:
        """Return the folder of a trial."""
        return self.folder / "trials" / key

    def begin(self, key: str) -> Path:
        """Make an empty folder for a trial; what an earlier attempt at it may have spent of privacy stays on record."""
        folder = self.trial(key)
        if (folder / PLANNED).is_file():
            (self.folder / "attempts").mkdir(exist_ok=True)
            count = len(list((self.folder / "attempts").glob(f"{key}-*.json")))
            (folder / PLANNED).replace(self.folder / "attempts" / f"{key}-{count}.json")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return the result of a finished trial, or None."""
        path = self.trial(key) / "result.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadBrick(
                f"{path} is damaged ({error}); delete it, and the same command repeats that trial."
            ) from None

    def write(self, key: str, row: dict[str, Any]) -> None:
        """Store a finished trial: first its JSON, then its row in the index."""
        write_json(self.trial(key) / "result.json", row)
        connection = self._open()
        with connection:
            self._insert(connection, key, row)
        connection.close()

    def rebuild(self) -> int:
        """Fill the index from the folder; return how many trials there are."""
        connection = self._open()
        paths = sorted((self.folder / "trials").glob("*/result.json"))
        with connection:
            connection.execute("delete from trials")
            for path in paths:
                row = self.finished(path.parent.name)
                if row is not None:
                    self._insert(connection, path.parent.name, row)
        connection.close()
        return len(paths)

    @staticmethod
    def _insert(connection: sqlite3.Connection, key: str, row: dict[str, Any]) -> None:
        value = row.get("value") or {}
        connection.execute(
            "insert or replace into trials values (?,?,?,?,?,?,?,?,?,?,?)",
            (
                key,
                row["name"],
                row["role"],
                row["seed"],
                row["arm"],
                row["status"],
                row["reason"],
                (value.get("score") or {}).get("mean"),
                value.get("validation"),
                row["seconds"],
                row["finished"],
            ),
        )

    def seconds(self, role: str) -> float:
        """Sum the seconds of all finished trials of a role, "search" or "final"."""
        with contextlib.closing(self._open()) as connection:
            return connection.execute("select total(seconds) from trials where role = ?", (role,)).fetchone()[0]

    def started(self) -> list[dict[str, Any]]:
        """Return all trials that were started: the finished ones, and attempts that were repeated or cut short.

        Each has, under "planned", what a private one would have spent (None: it is not private, or ended before that
        was known); an attempt without a result has the status "unfinished" and no arm.
        """
        rows = []
        for folder in sorted((self.folder / "trials").glob("*")):
            row, planned = self.finished(folder.name), folder / PLANNED
            plan = _read(planned) if planned.is_file() else None
            if row is not None:
                rows.append({**row, "planned": plan})
            elif plan is not None:
                rows.append({"status": "unfinished", "arm": "", "value": None, "planned": plan})
        for path in sorted((self.folder / "attempts").glob("*.json")):
            rows.append({"status": "unfinished", "arm": "", "value": None, "planned": _read(path)})
        return rows

    def forget_bricks(self, held: Collection[str] = ()) -> None:
        """Delete the bricks and checkpoints of all trials but `held`; their numbers and answers are kept."""
        for name in ("brick", "checkpoints"):
            for folder in (self.folder / "trials").glob(f"*/{name}"):
                if folder.parent.name not in held:
                    shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
