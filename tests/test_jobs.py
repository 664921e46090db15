"""Isolated jobs: each way of ending is told apart, the others go on, and nothing of the parent leaks into a child."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from brickyard.core.errors import NoEffect, Refused
from brickyard.core.jobs import Job, Local, engine

LOCKS: list[Any] = []


def fine(argument: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {"twice": 2 * argument["x"], "threads": torch.get_num_threads(), "pid": os.getpid()}


def refuse(argument: dict[str, Any]) -> None:
    raise Refused("not on this base")


def nothing(argument: dict[str, Any]) -> None:
    raise NoEffect("no trainable tensor moved")


def crash(argument: dict[str, Any]) -> None:
    raise KeyError("lost")


def die(argument: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(argument: dict[str, Any]) -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    time.sleep(300)


def swallow(argument: dict[str, Any]) -> int:
    import torch

    return sum(torch.ones(2**26).numel() for _ in range(4)) + torch.ones(2**29).numel()


def lock(argument: dict[str, Any]) -> None:
    LOCKS.append(multiprocessing.get_context("spawn").RLock())


def say(argument: dict[str, Any]) -> None:
    sys.stdout.write("to the log\n")


def job(name: str, **options: Any) -> Job:
    return Job(key=name, function=f"test_jobs:{name}", argument={"x": 21}, **options)


def test_every_ending_is_told_apart_and_the_others_go_on(tmp_path: Any) -> None:
    jobs = [
        job("fine", threads=1),
        job("refuse"),
        job("nothing"),
        job("crash"),
        job("die"),
        job("hang", seconds=3),
        job("swallow", memory=2**30),
        job("say", log=str(tmp_path / "log")),
    ]
    ended = {outcome.key: outcome for outcome in Local(4).run(jobs)}
    assert {k: o.status for k, o in ended.items()} == {
        "fine": "done",
        "refuse": "refused",
        "nothing": "failed",
        "crash": "failed",
        "die": "failed",
        "hang": "timeout",
        "swallow": "out-of-memory",
        "say": "done",
    }
    assert ended["fine"].value["twice"] == 42 and ended["fine"].value["threads"] == 1
    assert ended["fine"].value["pid"] != os.getpid() and ended["fine"].peak > 2**20
    assert "KeyError" in ended["crash"].reason and "test_jobs.py" in ended["crash"].reason
    assert "SIGKILL" in ended["die"].reason and "3 s" in ended["hang"].reason
    assert "1,024 MiB" in ended["swallow"].reason and "--batch-size" in ended["swallow"].reason
    assert (tmp_path / "log").read_text() == "to the log\n"


def test_a_job_that_wants_to_be_alone_is() -> None:
    jobs = [Job(key=str(i), function="test_jobs:times", argument={}, alone=i == 1) for i in range(3)]
    ended = {o.key: o.value for o in Local(3).run(jobs)}
    lonely = ended.pop("1")
    assert all(other["end"] <= lonely["start"] or lonely["end"] <= other["start"] for other in ended.values())


def times(argument: dict[str, Any]) -> dict[str, float]:
    start = time.monotonic()
    time.sleep(0.3)
    return {"start": start, "end": time.monotonic()}


def test_leaving_early_ends_the_running_jobs() -> None:
    running = Local(2).run([Job(key="a", function="test_jobs:fine", argument={"x": 1}), job("hang")])
    assert next(running).key == "a"
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 10


def report_and_hang(argument: dict[str, Any]) -> None:
    Path(argument["pid"]).write_text(str(os.getpid()))
    time.sleep(300)


def test_a_job_ends_with_its_owner_even_when_that_is_killed(tmp_path: Any) -> None:
    place = tmp_path / "pid"
    code = (
        "from brickyard.core.jobs import Job, Local\n"
        f"job = Job(key='a', function='test_jobs:report_and_hang', argument={{'pid': {str(place)!r}}})\n"
        "list(Local(1).run([job]))\n"
    )
    root = os.path.dirname(os.path.abspath(__file__))
    owner = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root})
    deadline = time.monotonic() + 120
    while not (place.exists() and place.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(place.read_text())
    assert Path(f"/proc/{child}").exists()
    owner.kill()
    owner.wait()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_an_interrupt_while_jobs_are_being_made_ready_is_left_to_their_owner(tmp_path: Any) -> None:
    """The forkserver spends seconds on imports, and Ctrl-C reaches the whole group: no traceback may come of it."""
    (tmp_path / "accelerate.py").write_text(
        "import os, signal, sys\nos.kill(os.getpid(), signal.SIGINT)\nsys.exit(7)\n", "utf-8"
    )
    root = str(Path(__file__).resolve().parent.parent)
    code = [sys.executable, "-c", "import brickyard.core.preload"]
    done = subprocess.run(code, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "open('count', 'a').write('x')\n"
        "from brickyard.core.jobs import Job, Local\n"
        "job = Job(key='a', function='test_jobs:fine', argument={'x': 1})\n"
        "assert [o.status for o in Local(1).run([job])] == ['done']\n"
    )
    root = os.path.dirname(os.path.abspath(__file__))
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, check=True)
    assert (tmp_path / "count").read_text() == "x"


def test_a_lock_that_a_job_made_is_not_told_as_leaked() -> None:
    code = "from test_jobs import Local, job; assert [o.status for o in Local(1).run([job('lock')])] == ['done']"
    root = os.path.dirname(os.path.abspath(__file__))
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ray_gives_the_same_answers() -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        # A worker imports the functions of this file by name.
        runtime_env={"env_vars": {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}},
    )
    try:
        ended = {o.key: o for o in engine("ray", 2).run([job("fine"), job("refuse"), job("die")])}
        # More threads and memory than the machine has: such a job would never find a place.
        large = {"threads": 64, "memory": 2**50}
        limited = [*engine("ray", 2).run([job("hang", seconds=1, alone=True), job("fine", **large)])]
    finally:
        ray.shutdown()
    assert ended["fine"].value["twice"] == 42
    assert {k: o.status for k, o in ended.items()} == {"fine": "done", "refuse": "refused", "die": "failed"}
    assert [(o.key, o.status) for o in limited] == [("hang", "timeout"), ("fine", "done")]


class LostWorker(Exception):
    """Stands in for `ray.exceptions.RayError`."""


@dataclass(eq=False)
class Task:
    """A job given to `Ray`, and what was asked for it."""

    function: Callable[[Job], Any]
    job: Job
    asked: dict[str, Any]


class Ray:
    """Stands in for the module `ray`: a task runs when its result is fetched, and what was asked is kept."""

    exceptions = SimpleNamespace(RayError=LostWorker)

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.tasks: list[Task] = []
        self.beside: list[list[str]] = []
        self.cancelled: list[tuple[str, bool]] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        self.begun = options

    def nodes(self) -> list[dict[str, Any]]:
        here, gone = {"CPU": 4.0, "memory": 2.0**40}, {"CPU": 64.0, "memory": 2.0**50}
        return [{"Alive": True, "Resources": here}, {"Alive": False, "Resources": gone}]

    def remote(self, **options: Any) -> Any:
        assert options["max_retries"] == 0

        def submit(function: Callable[[Job], Any], asked: dict[str, Any], job: Job) -> Task:
            self.tasks.append(Task(function, job, asked))
            return self.tasks[-1]

        return lambda function: SimpleNamespace(
            options=lambda **asked: SimpleNamespace(remote=partial(submit, function, asked))
        )

    def wait(self, tasks: list[Task], num_returns: int) -> tuple[list[Task], list[Task]]:
        self.beside.append([task.job.key for task in tasks])
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task: Task) -> Any:
        if task.job.function == "lost":
            raise LostWorker("the node died\nat length")
        return task.function(task.job)

    def cancel(self, task: Task, force: bool) -> None:
        self.cancelled.append((task.job.key, force))


@pytest.fixture
def ray_told(monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setitem(sys.modules, "ray", told := Ray())
    return told


def test_a_worker_of_ray_keeps_the_limits_of_a_job_and_its_log(ray_told: Ray, tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [job("hang", seconds=1), job("swallow", memory=2**30), job("die"), job("say", log=str(log)), job("crash")]
    lost = Job(key="lost", function="lost", argument={})
    ended = {o.key: o for o in engine("ray", 2).run([*jobs, lost])}
    status = {"hang": "timeout", "swallow": "out-of-memory", "die": "failed", "say": "done", "crash": "failed"}
    assert {k: o.status for k, o in ended.items()} == {**status, "lost": "failed"}
    assert "1 s" in ended["hang"].reason and "1,024 MiB" in ended["swallow"].reason
    assert "SIGKILL" in ended["die"].reason and "KeyError" in ended["crash"].reason
    assert ended["lost"].reason == "its Ray worker died: the node died"
    assert log.read_text() == "to the log\n" and ray_told.cancelled == []


def test_on_ray_too_a_job_that_wants_to_be_alone_is(ray_told: Ray) -> None:
    jobs = [Job(key=str(i), function="lost", argument={}, alone=i in (0, 3)) for i in range(6)]
    assert len(list(engine("ray", 4).run(jobs))) == 6
    assert ray_told.beside == [["0"], ["1", "2"], ["2"], ["3"], ["4", "5"], ["5"]]


def test_ray_has_room_for_every_job_it_is_given(ray_told: Ray) -> None:
    jobs = [Job(key=str(n), function="lost", argument={}, threads=n, memory=2**n) for n in (2, 48)]
    list(engine("ray", 3, threads=2).run(jobs))
    assert ray_told.begun["num_cpus"] == 6
    # No more than the largest node has, else the job would never begin.
    assert [t.asked for t in ray_told.tasks] == [{"num_cpus": 2, "memory": 4}, {"num_cpus": 4, "memory": 2**40}]


def test_leaving_early_ends_the_jobs_on_ray(ray_told: Ray) -> None:
    outcomes = engine("ray", 2).run([Job(key=key, function="lost", argument={}) for key in "abc"])
    next(outcomes)
    outcomes.close()
    assert ray_told.cancelled == [("b", True), ("c", True)]
