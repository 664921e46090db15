"""`brickyard run`: a graph of steps from one YAML file, of which only what changed runs again.

    key(step) = SHA-256 of its verb and options, the contents of its inputs, and the package's source

A finished step lies in OUT/steps/NAME-KEY with `step.json`, written last. A step whose folder is there, with every file
as it was left, is kept; one that was under way goes on where its verb can. What a step reads from another counts by its
contents: a step that comes out the same as before lets everything behind it stand.
"""

from __future__ import annotations

import re
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from brickyard.core.errors import BrickyardError, UnsafeFile
from brickyard.core.files import Lock, read_json, write_bytes, write_json
from brickyard.core.measure import environment
from brickyard.recipe.checks import check
from brickyard.recipe.contents import Hashes, digest_of
from brickyard.recipe.steps import Recipe, Step, read
from brickyard.recipe.verbs import perform, place, settings
from brickyard.recipe.work import Thing, Work

SCHEMA = 1
FINISHED = "step.json"
FAILED, DOUBTFUL = 1, 3  # exit codes, as of the command line
Listener = Callable[[dict[str, Any]], None]


@dataclass
class _Row:
    """What became of one step: kept, done, failed, waiting (it was not reached, or needs one that failed)."""

    step: Step
    state: str = "waiting"
    seconds: float = 0.0
    key: str = ""
    reason: str = ""
    folder: str = ""
    result: dict[str, Any] | None = None
    exit_code: int = 0

    def about(self) -> dict[str, Any]:
        """Return the row as result.json holds it."""
        return {
            "name": self.step.name,
            "verb": self.step.verb,
            "what": self.step.what,
            "line": self.step.line,
            "needs": self.step.needs,
            "leaves": self.step.leaves,
            "options": self.step.options,
            "status": self.state,
            "reason": self.reason,
            "seconds": self.seconds,
            "key": self.key,
            "folder": self.folder,
            "result": self.result,
        }


def run(
    recipe: str | Path,
    *,
    out: str | Path | None = None,
    dry: bool = False,
    prune: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Run a recipe, or what of it is not done yet; return what is in OUT/result.json.

    Args:
        recipe: a YAML file, or `embedded:NAME`.
        out: the folder; by default `runs/recipe-NAME`, so that the same recipe finds its steps again.
        dry: check everything and say what would run; run nothing and write no result.
        prune: delete the folders of steps, and scores, that this recipe no longer uses.
        trust_remote_code: let a hub model run its own Python here.
        listen: called with {"event": "plan" | "start" | "progress" | "end", ...}.

    Returns {"recipe", "file", "folder", "steps": [{"name", "what", "needs", "status": "done" | "kept" | "failed" |
    "waiting", "seconds", "result", ...}], "exit_code", "seconds", "environment"}. A step that fails stops what needs it
    and nothing else. Errors in the recipe, in its models and in its data are raised before any step runs: UsageError.
    """
    started, known = time.monotonic(), read(recipe)
    folder = Path(out) if out else Path("runs") / f"recipe-{re.sub(r'[^A-Za-z0-9_.-]+', '-', known.file.stem)}"
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "run.lock"):
        work = Work(known, folder.resolve(), Hashes(folder / "hashes.json"), trust_remote_code)
        try:
            check(work)
            rows = {name: _Row(step) for name, step in known.steps.items()}
            ahead = _ahead(work, rows)
            listen({"event": "plan", "recipe": known, "folder": str(folder), "rows": _about(rows), "ahead": ahead})
            if not dry:
                _write_recipe(known, folder)
                for row in rows.values():
                    _one(work, rows, row, listen)
                if prune:
                    _prune(work.folder, rows)
        finally:
            work.hashes.keep()
        result = {
            "schema": SCHEMA,
            "recipe": known.title,
            "file": str(known.file),
            "folder": str(folder),
            "steps": _about(rows),
            "exit_code": _exit_code(rows),
            "seconds": time.monotonic() - started,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
        }
        if not dry:
            from brickyard.recipe.report import render

            write_json(folder / "result.json", result)
            render(result, known.text, folder / "report.html")
    return result


def _about(rows: dict[str, _Row]) -> list[dict[str, Any]]:
    return [row.about() for row in rows.values()]


def _exit_code(rows: dict[str, _Row]) -> int:
    """Return 1 where a step failed, 3 where all finished but one says that something does not hold, else 0."""
    codes = {row.exit_code for row in rows.values()} - {0}
    return DOUBTFUL if codes == {DOUBTFUL} else FAILED if codes else 0


def _ahead(work: Work, rows: dict[str, _Row]) -> list[str]:
    """Find the finished steps, as far as that can be known, and return the names of those still to run."""
    for row in rows.values():
        if all(need in work.left for need in row.step.needs):
            _find(work, row)
    return [name for name, row in rows.items() if row.state != "kept"]


def _find(work: Work, row: _Row) -> Path:
    """Take a step as it was left, where it is finished and whole; return its folder."""
    step = row.step
    row.key = digest_of(settings(work, step))
    folder = work.folder / "steps" / f"{step.name}-{row.key[:16]}"
    row.folder = str(folder)
    known = _finished(work, folder, row.key, place(step, folder))
    if known is not None:
        row.state, row.seconds, row.result = "kept", known["seconds"], known["result"]
        row.exit_code = known["exit_code"]
        _leave(work, step, folder, known["output"])
    return folder


def _finished(work: Work, folder: Path, key: str, output: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished step; None where there is none, or where its output is not as it was left."""
    try:
        known = read_json(folder / FINISHED)
    except (OSError, UnsafeFile):
        return None
    if not isinstance(known, dict) or known.get("key") != key or known.get("schema") != SCHEMA:
        return None
    if known["files"] and (not output.exists() or work.hashes.files(output) != known["files"]):
        return None
    return known


def _leave(work: Work, step: Step, folder: Path, digest: str) -> None:
    """Offer what a step has made to the steps behind it."""
    base = work.spec(step, "base") if step.leaves == "brick" else None
    work.left[step.name] = Thing(step.leaves, str(place(step, folder)), digest, step.name, base)


def _one(work: Work, rows: dict[str, _Row], row: _Row, listen: Listener) -> None:
    """Run one step, unless it is finished or something that it needs is missing."""
    step = row.step
    if row.state == "kept":
        return
    missing = [need for need in step.needs if need not in work.left]
    if missing:
        row.reason = f"it needs {', '.join(missing)}"
        listen({"event": "end", "row": row.about()})
        return
    folder = _find(work, row)
    if row.state == "kept":
        listen({"event": "end", "row": row.about()})
        return
    listen({"event": "start", "row": row.about(), "again": folder.is_dir()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)
    began = time.monotonic()
    try:
        row.result = perform(work, step, folder, listen)
        output = place(step, folder)
        files = work.hashes.files(output) if output.exists() else {}
        row.exit_code = DOUBTFUL if row.result.get("holds") is False else 0
        row.state, row.seconds = "done", time.monotonic() - began
        digest = work.hashes.digest(output) if files else digest_of(row.result)
        write_json(
            folder / FINISHED,
            {
                "schema": SCHEMA,
                "key": row.key,
                "name": step.name,
                "verb": step.verb,
                "settings": settings(work, step),
                "files": files,
                "output": digest,
                "seconds": row.seconds,
                "exit_code": row.exit_code,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "result": row.result,
            },
        )
        _leave(work, step, folder, digest)
    except Exception as error:  # whatever a library raises: it ends this step, and the others still have their turn
        row.state, row.seconds, row.reason = "failed", time.monotonic() - began, _said(error)
        row.exit_code = error.exit_code if isinstance(error, BrickyardError) and error.exit_code != 2 else FAILED
        write_bytes(folder / "error.txt", traceback.format_exc().encode("utf-8", "backslashreplace"))
    listen({"event": "end", "row": row.about()})


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, BrickyardError) else f"{type(error).__name__}: {error}"


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    write_bytes(folder / "recipe.yaml", recipe.text.encode("utf-8"))


def _prune(folder: Path, rows: dict[str, _Row]) -> None:
    """Delete what lies in the folder of steps and belongs to none of these; nothing where a step failed."""
    if any(row.state in ("failed", "waiting") for row in rows.values()):
        return
    used = {Path(row.folder).name for row in rows.values()}
    for path in sorted((folder / "steps").iterdir()):
        if path.is_dir() and path.name not in used:
            shutil.rmtree(path)
