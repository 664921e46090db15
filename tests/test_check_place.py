"""An interrupted check goes on where it stopped: what finished is kept, as long as what was asked is the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from brickyard.checks import _place
from brickyard.checks._place import finished, heard_by, place_of
from brickyard.console import Live
from brickyard.core.errors import Locked, RunFailed
from brickyard.core.jobs import Job


def counted(argument: dict[str, Any]) -> dict[str, Any]:
    """Leave a mark of every call; fail while the file `broken` is there."""
    if argument["x"] == 2 and Path(argument["broken"]).exists():
        raise KeyError("lost")
    with Path(argument["marks"]).open("a") as marks:
        marks.write(f"{argument['x']}\n")
    return {"score": {"metric": "accuracy", "mean": argument["x"] / 10}, "pair": (1, 2)}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def jobs(tmp_path: Path, *, scale: float = 1.0) -> list[Job]:
    common = {"marks": str(tmp_path / "marks"), "broken": str(tmp_path / "broken"), "scale": scale}
    return [Job(key=f"run {x}", function="test_check_place:counted", argument={"x": x, **common}) for x in (1, 2)]


def marks(tmp_path: Path) -> list[str]:
    return (tmp_path / "marks").read_text().split()


def test_only_what_did_not_finish_runs_again(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(RunFailed, match="run 2 failed"), place_of("some", "claim") as folder:
        finished(jobs(tmp_path), 1, folder)
    assert folder.is_dir() and marks(tmp_path) == ["1"]

    (tmp_path / "broken").unlink()
    with place_of("some", "claim") as again:
        values = finished(jobs(tmp_path), 1, again)
    assert again == folder and marks(tmp_path) == ["1", "2"]
    assert values["run 1"] == values["run 2"] | {"score": {"metric": "accuracy", "mean": 0.1}}
    assert values["run 2"]["pair"] == [1, 2], "a kept value and a fresh one must read alike"


def test_what_was_asked_otherwise_runs_again(tmp_path: Path) -> None:
    with place_of("some", "claim") as folder:
        finished(jobs(tmp_path), 1, folder)
        finished(jobs(tmp_path), 1, folder)
        assert marks(tmp_path) == ["1", "2"]
        finished(jobs(tmp_path, scale=2.0), 1, folder)
    assert marks(tmp_path) == ["1", "2", "1", "2"]


def test_a_finished_measurement_leaves_nothing_and_is_measured_anew(tmp_path: Path) -> None:
    with place_of("some", "claim") as folder:
        finished(jobs(tmp_path), 1, folder)
    assert not folder.exists()
    with place_of("some", "claim") as folder:
        finished(jobs(tmp_path), 1, folder)
    assert marks(tmp_path) == ["1", "2", "1", "2"]


def test_another_claim_or_other_code_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with place_of("some", "claim", 1) as first, place_of("some", "claim", 2) as second:
        assert first != second
        with pytest.raises(Locked), place_of("some", "claim", 1):
            pass
    monkeypatch.setattr(_place, "code_digest", lambda: "changed")
    with place_of("some", "claim", 1) as third:
        assert third not in (first, second)


def test_a_person_sees_every_run_and_what_was_kept(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    out = io.StringIO()

    def measure() -> None:
        with Live(Console(file=out, width=100)) as live, heard_by(live), place_of("some", "claim") as folder:
            finished(jobs(tmp_path), 1, folder)

    with pytest.raises(RunFailed):
        measure()
    (tmp_path / "broken").unlink()
    measure()
    said = out.getvalue()
    assert said.count("run 1: accuracy 0.100") == said.count("run 2: accuracy 0.200") == 1
    assert "1 run was already finished" in said


def test_jobs_on_images_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    files = (b"\x89PNG one", b"\x89PNG two")
    assert len({_place._digest({"data": {"train": {"image": [file]}}}) for file in files}) == 2
    assert _place._digest([files[0]]) == _place._digest([files[0]])


def test_an_argument_that_cannot_be_told_apart_is_an_error(tmp_path: Path) -> None:
    odd = Job(key="odd", function="test_check_place:counted", argument={"x": object()})
    with pytest.raises(TypeError, match="holds object"):
        finished([odd], 1, tmp_path)


def test_the_search_of_a_control_is_told_from_that_of_its_method() -> None:
    out = io.StringIO()
    with Live(Console(file=out, width=100)) as live:
        live.plan = {"predicted_seconds": {}, "seeds": 1, "workers": 1}
        live({"event": "start", "jobs": 3, "finished": 0})
        for name, arm in (("ia3", "ia3:lr=0.1"), ("control", "ia3:lr=0.1"), ("lora + dp", "lora:lr=0.1 + dp")):
            row = {"name": name, "arm": arm, "seed": 0, "status": "done", "role": "search", "seconds": 1.0}
            live({"event": "trial", "row": {**row, "value": {"validation": 0.5}}})
    said = [line.strip() for line in out.getvalue().splitlines() if "validation" in line]
    told = [line.partition(": validation")[0] for line in said]
    assert told == ["ia3:lr=0.1", "control, ia3:lr=0.1", "lora:lr=0.1 + dp"]
