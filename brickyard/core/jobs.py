"""Run work in isolated processes: a forkserver that has imported torch, time-outs, memory limits, no retries.

A job names a function as `module:function`; it takes one JSON-like dictionary and returns another. A crash, a hang, a
full memory or a refusal ends that job alone; the caller gets an `Outcome` for each.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import multiprocessing.util
import os
import resource
import signal
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from brickyard.core.errors import BrickyardError, OutOfMemory, UnknownName, UsageError
from brickyard.core.process import settle

_PRELOAD = "brickyard.core.preload"
_FULL = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call. `seconds` and `memory` (bytes of private data) are limits; `alone` keeps other jobs away meanwhile."""

    key: str
    function: str
    argument: dict[str, Any]
    threads: int = 1
    seconds: float | None = None
    memory: int | None = None
    log: str | None = None
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one job ended: done, failed, timeout, out-of-memory or refused. `peak` is its high water in bytes."""

    key: str
    status: str
    value: Any = None
    reason: str = ""
    seconds: float = 0.0
    peak: int = 0


class Engine(Protocol):
    """Where jobs run."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]: ...


def execute(job: Job) -> Outcome:
    """Run a job in this very process and classify how it ended."""
    import torch

    started = time.monotonic()
    torch.set_num_threads(job.threads)
    status, value, reason = "done", None, ""
    try:
        module, _, name = job.function.partition(":")
        value = getattr(importlib.import_module(module), name)(job.argument)
    except (MemoryError, OutOfMemory) as error:
        status, reason = "out-of-memory", str(error)
    except BrickyardError as error:
        # What is wrong with the input or the combination was refused; what broke on the way has failed.
        status, reason = ("refused" if error.exit_code == 2 else "failed"), str(error)
    except Exception as error:
        full = isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _FULL)
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        status, reason = ("out-of-memory" if full else "failed"), f"{type(error).__name__} at {where}: {error}"
        traceback.print_exc()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if status == "out-of-memory":
        limit = f" under a limit of {job.memory / 2**20:,.0f} MiB" if job.memory else ""
        reason = (
            f"out of memory{limit} (high water {peak / 2**20:,.0f} MiB); "
            f"use a smaller --batch-size or a larger --memory. {reason.splitlines()[0] if reason else ''}".rstrip()
        )
    return Outcome(
        key=job.key, status=status, value=value, reason=reason, seconds=time.monotonic() - started, peak=peak
    )


def _child(job: Job, pipe: Connection) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its children itself
    if job.log:
        with open(job.log, "ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    if job.memory:
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory, job.memory))
    try:
        settle()
        pipe.send(execute(job))
    except MemoryError:
        pipe.send(Outcome(key=job.key, status="out-of-memory", reason="out of memory while reporting"))
    sys.stdout.flush()
    sys.stderr.flush()
    # Locks that libraries made (tqdm makes one) are given back, or the owner's end would be told of leaked semaphores.
    multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # what the interpreter itself calls at exit
    os._exit(0)  # a model's destructors and atexit hooks have nothing to say here, and take time


def _end_with_owner() -> None:
    """End this job and what it started when the process that wants its result is gone, by `kill -9` too.

    A job that outlived its owner would go on writing into the folder in which the same command starts it again.
    """
    owner = multiprocessing.parent_process()
    if owner is not None:
        wait([owner.sentinel])
        os.killpg(0, signal.SIGKILL)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Keep multiprocessing from importing the user's script again in each child; it needs nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Local:
    """Jobs on this machine, `workers` at a time."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise UsageError(f"workers={workers}; at least 1 was expected.")
        self.workers = workers
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([_PRELOAD])

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yield outcomes as jobs end. Ending the iteration early ends the running jobs."""
        waiting, running = deque(jobs), {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers and not self._blocked(waiting[0], running):
                    pipe, process, job, started = self._start(waiting.popleft())
                    running[pipe] = (process, job, started)
                yield from self._ended(running)
        finally:
            for process, _, _ in running.values():
                _end(process)

    @staticmethod
    def _blocked(job: Job, running: dict[Any, Any]) -> bool:
        return bool(running) and (job.alone or any(other.alone for _, other, _ in running.values()))

    def _start(self, job: Job) -> tuple[Connection, Any, Job, float]:
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_child, args=(job, there), daemon=True)
        with _no_main():
            process.start()
        there.close()
        return here, process, job, time.monotonic()

    def _ended(self, running: dict[Connection, tuple[Any, Job, float]]) -> Iterator[Outcome]:
        now = time.monotonic()
        limits = [started + job.seconds - now for _, job, started in running.values() if job.seconds]
        ready = set(wait(list(running), timeout=max(0.0, min(limits)) if limits else None))
        for pipe, (process, job, started) in list(running.items()):
            elapsed = time.monotonic() - started
            if pipe in ready:
                yield self._collect(pipe, process, job, elapsed)
            elif job.seconds and elapsed >= job.seconds:
                _end(process)
                reason = f"no result after its limit of {job.seconds:.0f} s; it was ended"
                yield Outcome(key=job.key, status="timeout", reason=reason, seconds=elapsed)
            else:
                continue
            del running[pipe]

    @staticmethod
    def _collect(pipe: Connection, process: Any, job: Job, elapsed: float) -> Outcome:
        try:
            outcome = pipe.recv()
        except (EOFError, OSError):
            process.join(10)
            code = process.exitcode
            died = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            hint = " (often the system's memory guard)" if code == -signal.SIGKILL else ""
            outcome = Outcome(key=job.key, status="failed", reason=f"its process died by {died}{hint}", seconds=elapsed)
        process.join(10)
        if process.is_alive():
            _end(process)
        return outcome


def _end(process: Any) -> None:
    """Kill a job and whatever it started."""
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    process.join(10)


def _apart(job: Job) -> Outcome:
    [outcome] = Local(1).run([job])
    return outcome


class OnRay:
    """Jobs over a Ray cluster (extra `ray`): the same numbers, more machines.

    A worker of Ray starts each job as `Local` does, so limits, logs and the ways of ending are the same; the seconds of
    a job's limit begin when it does, not while it waits for a free worker.
    """

    def __init__(self, workers: int | None = None, threads: int = 1) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--engine ray needs the extra `ray`: pip install 'brickyard[ray]'.") from None
        self.ray: Any = ray  # the stubs of ray lack `exceptions`
        if not ray.is_initialized():
            # By default Ray's workers yield to everything else (niceness 15), and their times would say so.
            os.environ.setdefault("RAY_worker_niceness", "0")
            cpus = None if workers is None else workers * threads
            ray.init(num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Yield outcomes as jobs end. Ending the iteration early ends the running jobs."""
        remote = self.ray.remote(max_retries=0)(_apart)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        waiting, pending = deque(jobs), {}
        try:
            while waiting or pending:
                while waiting and not any(waiting[0].alone or other.alone for other in pending.values()):
                    job = waiting.popleft()
                    asked = {
                        "num_cpus": _at_most(job.threads, "CPU", nodes),
                        "memory": None if job.memory is None else _at_most(job.memory, "memory", nodes),
                    }
                    pending[remote.options(**asked).remote(job)] = job
                for done in self.ray.wait(list(pending), num_returns=1)[0]:
                    yield self._collect(done, pending.pop(done))
        finally:
            for task in pending:
                self.ray.cancel(task, force=True)

    def _collect(self, done: Any, job: Job) -> Outcome:
        try:
            return self.ray.get(done)
        except self.ray.exceptions.RayError as error:
            reason = f"its Ray worker died: {str(error).splitlines()[0]}"
            return Outcome(key=job.key, status="failed", reason=reason)


def _at_most(asked: int, what: str, nodes: list[dict[str, float]]) -> int:
    """Return what to ask of Ray: no more than the largest node has, or the job would wait for ever."""
    return min(asked, int(max((node.get(what, 0.0) for node in nodes), default=0.0)) or asked)


def engine(name: str, workers: int, threads: int = 1) -> Engine:
    """Return the engine called `local` or `ray`, for `workers` jobs of so many threads side by side."""
    if name == "local":
        return Local(workers)
    if name == "ray":
        return OnRay(workers, threads)
    raise UnknownName.among("engine", name, ("local", "ray"))
