"""Where a check's own runs stand, so that an interrupted one goes on where it stopped, and who hears of them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from brickyard.compare.plan import key_of
from brickyard.compare.run import Listener, versions
from brickyard.core.errors import RunFailed
from brickyard.core.files import read_json, write_json
from brickyard.core.jobs import Job, Local
from brickyard.core.locks import Lock
from brickyard.core.registry import code_digest

RUNS = Path("runs") / "checks"
# A measurement is a function of its claim; that somebody watches is not its business.
_LISTENER: ContextVar[Listener] = ContextVar("listener", default=lambda event: None)


@contextmanager
def heard_by(listen: Listener) -> Iterator[None]:
    """Send the events of the runs inside to `listen`."""
    token = _LISTENER.set(listen)
    try:
        yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def place_of(name: str, *what: Any) -> Iterator[Path]:
    """Yield the folder of a measurement of `name` that `what`, the code and the libraries decide; it goes at the end.

    A block that is left by an error or an interruption leaves its folder, which the next block that all of these are
    the same for finds again. Locked where another process is in it.
    """
    folder = (RUNS / f"{name}-{key_of([*map(str, what), code_digest(), versions()])}").absolute()
    with Lock(folder):
        yield folder
        shutil.rmtree(folder)


def finished(jobs: Sequence[Job], workers: int, folder: Path) -> dict[str, Any]:
    """Return key -> value of jobs that all finished; RunFailed names one that did not.

    What a job returned stands in `folder/finished`; one that is there with the same argument does not run again.
    """
    files = {job.key: folder / "finished" / f"{_slug(job.key)}.json" for job in jobs}
    arguments = {job.key: _digest([job.function, job.argument]) for job in jobs}
    values = {}
    for key, file in files.items():
        if file.is_file() and (kept := read_json(file))["argument"] == arguments[key]:
            values[key] = kept["value"]
    listen = _LISTENER.get()
    listen({"event": "jobs", "jobs": len(jobs) - len(values), "finished": len(values)})
    for outcome in Local(workers).run(job for job in jobs if job.key not in values):
        if outcome.status != "done":
            raise RunFailed(f"{outcome.key} {outcome.status}: {outcome.reason}")
        files[outcome.key].parent.mkdir(parents=True, exist_ok=True)
        write_json(files[outcome.key], {"argument": arguments[outcome.key], "value": outcome.value})
        # Read as the next block would read it, so that an interruption changes nothing that is judged.
        values[outcome.key] = read_json(files[outcome.key])["value"]
        listen({"event": "job", "key": outcome.key, "seconds": outcome.seconds, "value": values[outcome.key]})
    return values


def _slug(key: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", key)


def _digest(argument: Any) -> str:
    return hashlib.sha256(json.dumps(argument, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):  # the file of an image
        return hashlib.sha256(value).hexdigest()
    raise TypeError(f"a job's argument holds {type(value).__name__}; give plain values, bytes, paths or arrays.")
