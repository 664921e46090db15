"""A comparison from end to end on a small base: its files, its verdict, failures as cells, and exact continuation."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import documents, text_data, write_data
from safetensors.numpy import load_file

import brickyard
from brickyard.compare import plan as planning
from brickyard.compare import run as running
from brickyard.compare.ledger import Ledger
from brickyard.compare.plan import Request
from brickyard.compare.report import render
from brickyard.compare.results import slug
from brickyard.compare.run import rank
from brickyard.core.arm import parse
from brickyard.core.errors import BadData, Changed, Locked, UsageError
from brickyard.core.files import Lock
from brickyard.core.influence import MINIMUM_EXAMPLES
from brickyard.core.jobs import Job, Outcome
from brickyard.core.task import Task

TRAINING = {"epochs": 4, "precision": "float32", "batch": 16}


def request(base: Path, data: Any, **changes: Any) -> dict[str, Any]:
    asked = {
        "base": str(base),
        "data": data,
        "methods": ["lora:r=4,lr=1e-2", "linear-probe"],
        "seeds": 2,
        "workers": 2,
        "device": "cpu",
    }
    return {**asked, "training": dict(TRAINING), **changes}


@pytest.fixture(scope="module")
def finished(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One comparison with a search, an arm twice, one that cannot fit, and overlap."""
    folder = tmp_path_factory.mktemp("compare")
    splits = text_data(160, 80)
    for column in ("text", "label"):
        splits["train"][column][:2] = splits["test"][column][:2]
    data = write_data(folder / "data", splits)
    methods = ["lora:r=4,lr=1e-2", "lora:r=4,lr=1e-2", "lora:r=64", "moment-probing:p=64"]
    asked = request(text_base, str(data), methods=methods, trials=2, retain=text_data(64, 40, pair=False))
    return brickyard.compare(out=folder / "run", **asked), folder / "run"


def test_result_has_the_schema_and_agrees_with_the_stored_answers(finished: tuple[dict[str, Any], Path]) -> None:
    result, folder = finished
    stored = json.loads((folder / "result.json").read_text())
    assert stored == json.loads(json.dumps({k: v for k, v in result.items() if k != "folder"}))
    rows = {row["arm"]: row for row in stored["methods"]}
    assert set(rows) == {
        "lora:lr=0.01,r=4",
        "lora:lr=0.01,r=4 (2)",
        "lora:r=64",
        "moment-probing:p=64",
        "linear-probe",
        "majority",
    }
    assert rows["lora:r=64"]["status"] == "refused" and "rank 64 exceeds" in rows["lora:r=64"]["reason"]
    assert (
        rows["linear-probe"]["trivial"] and rows["majority"]["trivial"] and not rows["moment-probing:p=64"]["trivial"]
    )
    for name, row in rows.items():
        if row["status"] != "done":
            continue
        assert row["score"]["low"] <= row["score"]["mean"] <= row["score"]["high"]
        assert row["cost"].keys() >= {
            "trainable_parameters",
            "saved_for_backward_bytes",
            "peak_bytes",
            "step_ms",
            "train_seconds",
            "forward_flops",
            "brick_bytes",
        }
        if name == "majority":
            continue
        per_seed = []
        for seed in row["seeds"]:
            answers = pq.read_table(folder / row["answers"] / f"seed{seed}.parquet")
            assert answers.column_names[:4] == ["index", "label", "prediction", "loss"]
            per_seed.append(np.mean(answers["label"].to_numpy() == answers["prediction"].to_numpy()))
        np.testing.assert_allclose(per_seed, row["score"]["per_seed"])
    assert rows["lora:lr=0.01,r=4"]["seeds"] == [1, 2] and rows["lora:lr=0.01,r=4 (2)"]["seeds"] == [1001, 1002]
    assert stored["budget"]["search_seconds"] > 0 and rows["majority"]["cost"]["step_ms"] is None
    assert len(stored["pairs"]) == 10 and stored["verdict"]["sentence"]
    assert re.search(r"full training, up to 2 settings an arm; about \d+ \w+ predicted$", stored["budget"]["sentence"])
    assert stored["confusion"]["arm"] == stored["verdict"]["recommended"]
    assert stored["without_overlap"]["removed"] == 2
    assert rows["lora:lr=0.01,r=4"]["retained"].keys() >= {"before", "after", "metric"}


def test_report_bricks_and_plan_are_there(finished: tuple[dict[str, Any], Path]) -> None:
    result, folder = finished
    assert (folder / "report.html").stat().st_size > 10_000
    for row in result["methods"]:
        if "brick" in row:
            assert brickyard.load(folder / row["brick"]).apply().model is not None
    assert not list(folder.glob("trials/*/brick")), "only the best brick of an arm is kept"
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["threads"] == 1 and [len(arm["settings"]) for arm in plan["arms"]] == [1, 1, 2, 2, 2]


def test_the_ledger_is_rebuilt_from_the_folder(finished: tuple[dict[str, Any], Path]) -> None:
    _, folder = finished
    (folder / "ledger.sqlite").write_bytes(b"not a database at all" * 100)
    ledger = Ledger(folder)
    import sqlite3

    rows = (
        sqlite3.connect(folder / "ledger.sqlite")
        .execute("select role, count(*), count(score) from trials group by role")
        .fetchall()
    )
    assert dict((role, n) for role, n, _ in rows)["final"] == 8 and ledger.rebuild() == sum(n for _, n, _ in rows)


def test_the_same_command_again_repeats_nothing(finished: tuple[dict[str, Any], Path], text_base: Path) -> None:
    result, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob("trials/*/result.json")}
    asked = json.loads((folder / "plan.json").read_text())["identity"]["request"]
    again = brickyard.compare(out=folder, **asked)
    assert {p: p.stat().st_mtime_ns for p in folder.glob("trials/*/result.json")} == before
    assert again["methods"] == json.loads(json.dumps(result["methods"])) and again["verdict"] == result["verdict"]


def test_another_request_in_the_same_folder_is_refused_with_the_differences(
    finished: tuple[dict[str, Any], Path],
) -> None:
    _, folder = finished
    asked = json.loads((folder / "plan.json").read_text())["identity"]["request"]
    with pytest.raises(Changed, match=r"request\.seeds: was 2, now 3.*--allow-change request\.seeds"):
        brickyard.compare(out=folder, **{**asked, "seeds": 3})


def test_too_few_test_rows_are_refused_before_anything_runs(text_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="19 test rows, too few"):
        brickyard.compare(out=tmp_path / "run", **request(text_base, text_data(40, 19)))
    assert not (tmp_path / "run").exists()


def test_a_probe_that_failed_gets_another_try(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    result, folder = finished
    copy = shutil.copytree(folder, tmp_path / "run")
    plan = json.loads((copy / "plan.json").read_text())
    for name in ("probes", "predicted_seconds"):
        del plan[name]["linear-probe"]
    plan["failed"]["linear-probe"] = {"status": "failed", "reason": "killed by the system"}
    (copy / "plan.json").write_text(json.dumps(plan))
    choices = json.loads((copy / "choices.json").read_text())
    del choices["linear-probe"]
    (copy / "choices.json").write_text(json.dumps(choices))
    again = brickyard.compare(out=copy, **plan["identity"]["request"])
    scores = [{row["arm"]: row["score"] for row in run["methods"]} for run in (result, again)]
    assert scores[0]["linear-probe"] is not None and scores[0] == scores[1]


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path: Path, text_base: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = str(tmp_path / "run" / "run.lock")
    code = (
        "import time; from brickyard.core.files import Lock\n"
        f"with Lock({lock!r}):\n print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    try:
        with pytest.raises(Locked, match=str(process.pid)):
            brickyard.compare(out=tmp_path / "run", **request(text_base, text_data(40, 24)))
    finally:
        process.kill()
        process.wait()
    with Lock(tmp_path / "run" / "run.lock"):  # a dead owner's lock is free
        pass


def command(base: Path, data: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "brickyard.cli",
        "compare",
        "--base",
        str(base),
        "--data",
        str(data),
        "--methods",
        "lora:r=4,lr=1e-2",
        "full",
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--workers",
        "1",
        "--out",
        str(out),
        "--json",
    ]


def test_killed_at_any_moment_and_run_again_gives_the_same_table(text_base: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", text_data(64, 40))
    alike = {"methods": ["lora:r=4,lr=1e-2", "full"], "seeds": 2, "workers": 1, "dtype": "float32"}
    whole = brickyard.compare(
        out=tmp_path / "whole", **{**request(text_base, str(data), **alike), "training": {"epochs": 2}}
    )
    run = tmp_path / "cut"
    marks = [
        lambda: (run / "plan.json").exists(),
        lambda: len(list(run.glob("trials/*/answers.parquet"))) >= 3,
    ]
    kept: set[str] = set()
    for mark in marks:
        process = subprocess.Popen(
            command(text_base, data, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 180
        while not mark() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = {p.read_text() for p in run.glob("trials/*/result.json")}
        assert kept <= now, "a finished trial was repeated or lost"
        kept = now
    final = json.loads(subprocess.run(command(text_base, data, run), capture_output=True, check=True).stdout)
    assert kept <= {p.read_text() for p in run.glob("trials/*/result.json")}
    for a, b in zip(whole["methods"], final["methods"], strict=True):
        assert a["arm"] == b["arm"] and a["score"] == b["score"] and a["setting"] == b["setting"]
    assert whole["pairs"] == final["pairs"] and whole["verdict"]["recommended"] == final["verdict"]["recommended"]


def test_settings_start_with_the_default_and_leave_out_what_the_arm_fixes() -> None:
    found = planning.settings(parse("lora"), 4)
    assert found[0] == {"lr": 1e-3, "lora.r": 8} and len(found) == 4 and len({str(s) for s in found}) == 4
    assert planning.settings(parse("lora"), 4) == found
    assert all("lr" not in s for s in planning.settings(parse("lora:lr=1e-4"), 9))
    assert planning.settings(parse("lora:lr=1e-4,r=2"), 9) == [{}]
    assert (
        planning.with_setting("lora + moment-probing:p=64", {"lr": 0.1, "lora.r": 4})
        == "lora:lr=0.1,r=4 + moment-probing:p=64"
    )


PROBE = {
    "training": {"steps": 0, "epochs": 3},
    "rows": 3200,
    "batch": 32,
    "mean_step_ms": 400,
    "states_ms_per_row": 0.0,
    "states_of": "",
    "validation_rows": 320,
    "test_rows": 320,
}


def test_minutes_become_steps_or_a_refusal() -> None:
    probe = PROBE
    full = planning.predict_seconds({"a": probe}, {"a": 1.0}, 1, 3, 1, "random")
    assert full > 3 * 300 * 0.4
    long = planning.shorten(Request(minutes=full / 60 + 1), {"a": probe}, 1)
    short = planning.shorten(Request(minutes=full / 120), {"a": probe}, 1)
    assert long[0] == {"a": 1.0} and 0.05 <= short[0]["a"] < 0.6
    more = planning.shorten(Request(minutes=4 * full / 60, trials=3), {"a": probe}, 1)
    assert more[1] == 3 and planning.shorten(Request(minutes=full / 60 + 1, trials=3), {"a": probe}, 1)[1] == 1
    with pytest.raises(UsageError, match=r"too short: .* minutes here, \d\.\d of them for slow\."):
        planning.shorten(Request(minutes=0.1), {"a": probe, "slow": probe | {"mean_step_ms": 4000}}, 1)


def test_a_slow_arm_does_not_shorten_the_fast_ones() -> None:
    slow = PROBE
    probes = {"slow": slow, "slower": slow | {"mean_step_ms": 800}, "fast": slow | {"mean_step_ms": 4}}
    shares, _, sentence = planning.shorten(Request(minutes=10), probes, 1)
    assert shares["fast"] == 1.0 and 0.2 < shares["slower"] < shares["slow"] < 1.0
    times = {name: planning.predict_seconds({name: probes[name]}, shares, 1, 3, 1, "random") for name in probes}
    assert 0.98 * 600 < sum(times.values()) <= 600 and abs(times["slow"] / times["slower"] - 1) < 0.05
    assert f"slow {100 * shares['slow']:.0f} %" in sentence and "fast" not in sentence
    reader = slow | {"mean_step_ms": 1, "states_ms_per_row": 10.0, "states_of": "mean"}
    one, both = planning.states_seconds({"a": reader}), planning.states_seconds({"a": reader, "b": reader})
    assert one == both == pytest.approx(38.4)
    assert planning.states_seconds({"a": reader, "b": reader | {"states_of": "None"}}) == pytest.approx(2 * 38.4)


def test_more_workers_than_runs_save_nothing() -> None:
    assert planning.makespan([10, 10, 10], 2) == 20 and planning.makespan([10, 10, 10], 16) == 10
    assert planning.makespan([5, 1, 1, 1], 2) == 5 and planning.makespan([], 4) == 0
    slow = PROBE | {"mean_step_ms": 10_000}
    one = planning.trial_seconds(slow, 1.0, 16)
    for workers in (3, 4, 16):
        assert planning.predict_seconds({"a": slow}, {"a": 1.0}, workers, 3, 1, "random") == one > 3600
    # A search is a stage of its own, and a rung of one setting none.
    assert planning.predict_seconds({"a": slow}, {"a": 1.0}, 16, 3, 4, "random") == 2 * one
    halving = planning.trial_seconds(slow, 1 / 6, 16) + one
    assert planning.predict_seconds({"a": slow}, {"a": 1.0}, 16, 3, 3, "halving") == halving
    both = {"a": slow, "b": slow | {"states_ms_per_row": 10.0}}
    shares, _, sentence = planning.shorten(Request(minutes=15), both, 16)
    assert 800 < planning.trial_seconds(slow, shares["a"], 16) < 900
    told = planning.parts(Request(minutes=15), both, shares, 1, 16)
    assert f"about {sum(told.values()) / 60:.1f} minutes" in sentence and told["a"] < told["b"]


class Told:
    """Stands in for the engine: probes and trials end as `ends` says of their jobs, and nothing is trained."""

    def __init__(self, ends: Callable[[Job], str] = lambda job: "done", **probe: Any) -> None:
        costs = dict.fromkeys(("trainable_parameters", "saved_for_backward_bytes", "peak_bytes", "forward_flops"), 1)
        self.probe = {**PROBE, **costs, "step_ms": 1.0, "how": {}, **probe}
        self.ends = ends
        self.jobs: list[Job] = []

    def __call__(self, *asked: Any) -> Told:
        self.asked = asked
        return self

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        for job in jobs:
            self.jobs.append(job)
            if (status := self.ends(job)) != "done":
                yield Outcome(key=job.key, status=status, reason="as told")
            else:
                value = self.probe if "role" not in job.argument else self._trial(job.argument)
                yield Outcome(key=job.key, status="done", value=value, seconds=1.0, peak=1)

    def _trial(self, argument: dict[str, Any]) -> dict[str, Any]:
        folder, seed = Path(argument["folder"]), argument["setting"]["seed"]
        index = np.arange(40)
        label = index % 2 + (argument["setting"]["task"] == "causal-lm")  # classes, or bytes
        columns = {"index": index, "label": label, "prediction": index % (5 + seed) % 2, "loss": index}
        pq.write_table(pa.table(columns), folder / "answers.parquet")
        (folder / "brick").mkdir()
        (folder / "brick" / "seed").write_text(str(seed))
        empty = {"training": {}, "receipt": None, "retained": None, "encoding": {}, "history": []}
        cost = {"train_seconds": 1.0, "brick_bytes": 1}
        return {**empty, "cost": cost, "validation": 1 / (1 + seed), "score": {"metric": "accuracy", "mean": 0.5}}


def told(monkeypatch: pytest.MonkeyPatch, engine: Told, out: Path, base: Path, data: Any, **asked: Any) -> Any:
    """Compare with an engine that trains nothing; return the result's rows by arm."""
    monkeypatch.setattr(running, "engine", engine)
    known = {"methods": ("lora:r=4,lr=1e-2",), "device": "cpu", "training": dict(TRAINING), **asked}
    result, _ = running.compare(Request(base=str(base), data=data, **known), out)
    return {row["arm"]: row for row in result["methods"]}


def test_a_run_may_take_many_times_what_is_predicted_for_it_alone(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Told(mean_step_ms=10_000, states_ms_per_row=10.0, states_of="mean")
    rows = told(monkeypatch, engine, tmp_path / "run", text_base, text_data(40, 40), workers=16, threads=2)
    assert rows["linear-probe"]["status"] == "done" and engine.asked == ("local", 16, 2)
    alone = planning.trial_seconds(engine.probe, 1.0, 16) + planning.states_seconds({"a": engine.probe})
    trials = [job for job in engine.jobs if "role" in job.argument]
    assert len(trials) == 6 and {job.seconds for job in trials} == {running.LIMIT * alone}
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert sum(plan["predicted_seconds"].values()) == pytest.approx(alone)


def test_an_arm_with_a_failed_seed_keeps_its_bricks_until_that_seed_is_done(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = lambda job: "failed" if job.argument["setting"]["arm"].startswith("lora") else "done"  # noqa: E731
    ends = lambda job: fails(job) if job.argument["setting"]["seed"] == 2 else "done"  # noqa: E731
    data, run = text_data(40, 40), tmp_path / "run"
    rows = told(monkeypatch, Told(ends), run, text_base, data)
    assert rows["lora:lr=0.01,r=4"]["status"] == "failed" and "brick" not in rows["lora:lr=0.01,r=4"]
    assert rows["linear-probe"]["brick"] == "bricks/linear-probe"
    assert len(list(run.glob("trials/*/brick"))) == 2  # none of the arm that is done
    engine = Told()
    rows = told(monkeypatch, engine, run, text_base, data)
    assert [job.argument["setting"]["seed"] for job in engine.jobs] == [2]
    assert (run / rows["lora:lr=0.01,r=4"]["brick"] / "seed").read_text() == "1"  # the best by validation
    assert not list(run.glob("trials/*/brick"))
    shutil.rmtree(run / "bricks" / "linear-probe")
    assert "brick" not in told(monkeypatch, Told(), run, text_base, data)["linear-probe"]


def test_too_few_pieces_of_test_documents_are_refused_before_anything_runs(
    causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, data = Told(), documents(test=6)
    asked = {"task": "causal-lm", "baselines": False}
    with pytest.raises(BadData, match=rf"6 test documents, \d+ pieces.* at least {MINIMUM_EXAMPLES} .*--max-length"):
        told(monkeypatch, engine, tmp_path / "run", causal_base, data, **asked)
    assert not engine.jobs and not (tmp_path / "run").exists()
    rows = told(monkeypatch, engine, tmp_path / "run", causal_base, data, max_length=8, **asked)
    assert [row["status"] for row in rows.values()] == ["done"]


def test_an_untouched_base_that_fails_says_why_and_gets_another_try(
    causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = lambda job: "out-of-memory" if job.argument.get("role") == "untouched" else "done"  # noqa: E731
    where = (tmp_path / "run", causal_base, documents())
    row = told(monkeypatch, Told(ends), *where, task="causal-lm")["untouched base"]
    assert (row["status"], row["reason"], row["trivial"], row["score"]) == ("out-of-memory", "as told", True, None)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "untouched base: out-of-memory: as told" in result["verdict"]["reasons"]
    assert "untouched base" in render(result, tmp_path / "report.html").read_text()
    row = told(monkeypatch, Told(), *where, task="causal-lm")["untouched base"]
    assert row["status"] == "done" and row["score"]["metric"] == "bits_per_byte"
    others = lambda job: "failed" if job.argument.get("role") == "final" else "done"  # noqa: E731
    rows = told(monkeypatch, Told(others), tmp_path / "none", causal_base, documents(), task="causal-lm")
    assert rows["lora:lr=0.01,r=4"]["status"] == "failed"  # and the comparison ends as any other


def test_a_probe_that_ran_out_of_time_gets_another_try(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = lambda job: "timeout" if job.argument["setting"]["arm"] == "linear-probe" else "done"  # noqa: E731
    where = (tmp_path / "run", text_base, text_data(40, 40))
    assert told(monkeypatch, Told(late), *where)["linear-probe"]["status"] == "timeout"
    rows = told(monkeypatch, Told(), *where)
    assert rows["linear-probe"]["score"] is not None
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["predicted_seconds"].keys() == plan["probes"].keys() == {"lora:lr=0.01,r=4", "linear-probe"}


def test_the_copies_of_an_a_a_comparison_have_their_own_seeds_and_places() -> None:
    arms = planning.contestants(Request(methods=("lora", "lora", "linear-probe"), seeds=2))
    assert [(a.name, a.seeds) for a in arms] == [("lora", (1, 2)), ("lora (2)", (1001, 1002)), ("linear-probe", (1, 2))]
    assert [slug(a.name, a.arm) for a in arms] == ["lora", "lora-2", "linear-probe"]


def test_ray_gives_the_numbers_of_the_local_engine(text_base: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    data = write_data(tmp_path / "data", text_data(48, 30))
    asked = request(text_base, str(data), methods=["lora:r=4,lr=1e-2"], baselines=False, seeds=1)
    asked["training"]["epochs"] = 1
    try:
        spread = brickyard.compare(out=tmp_path / "ray", engine="ray", **asked)
    finally:
        ray.shutdown()
    here = brickyard.compare(out=tmp_path / "local", **asked)
    assert [row["status"] for row in spread["methods"]] == ["done", "done"]
    assert [row["score"] for row in spread["methods"]] == [row["score"] for row in here["methods"]]
    assert spread["pairs"] == here["pairs"]


def test_costs_are_those_of_the_setting_that_was_chosen(text_base: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", text_data(96, 40))
    arm = planning.Contestant("lora", "lora", ({"lora.r": 1, "lr": 1e-7}, {"lora.r": 4, "lr": 1e-2}), (1,))
    asked = {**request(text_base, str(data), trials=2, seeds=1), "methods": ("lora",)}
    result, folder = running.compare(Request(**asked), tmp_path / "run", arms=[arm])
    row = next(row for row in result["methods"] if row["arm"] == "lora")
    assert row["setting"] == {"lora.r": 4, "lr": 1e-2}
    tensors = load_file(folder / row["brick"] / "adapter_model.safetensors")
    assert row["cost"]["trainable_parameters"] == sum(t.size for t in tensors.values())


def test_halving_spends_less_and_keeps_the_better(text_base: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", text_data(320, 40))
    asked = request(text_base, str(data), methods=["lora:r=4"], trials=3, seeds=1, search="halving", baselines=False)
    brickyard.compare(out=tmp_path / "run", **{**asked, "training": {**TRAINING, "epochs": 8}})
    trials = [json.loads(p.read_text()) for p in (tmp_path / "run").glob("trials/*/result.json")]
    searched, final = [t for t in trials if t["role"] == "search"], next(t for t in trials if t["role"] == "final")
    assert len(searched) == 3 and sum(t["value"]["steps"] for t in searched) <= 0.45 * 3 * final["value"]["steps"]


def test_short_trainings_are_ranked_by_loss_and_whole_ones_by_score() -> None:
    task = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
    settings = [
        {"validation": 0.5, "validation_loss": 0.69},
        {"validation": 0.5, "validation_loss": 0.60},
        {"validation": 0.52, "validation_loss": 0.68},
        {"validation": None, "validation_loss": None},
    ]
    order = lambda share: sorted(range(4), key=lambda i: rank(settings[i], share, task))  # noqa: E731
    assert order(1 / 6) == [1, 2, 0, 3] and order(1.0) == [2, 1, 0, 3]
    bits = Task("causal-lm", "bits_per_byte", None, 1, "text")
    assert rank({"validation": 1.0, "validation_loss": 1.0}, 1.0, bits) < rank(
        {"validation": 2.0, "validation_loss": 2.0}, 1.0, bits
    )
