"""one-byte as an arm's step: what it trains, how it resumes, its log as a brick, several members on their own data."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_data
from test_every_method import METHODS, TASKS, home, setting

from brickyard.cli import main
from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.attached import copy_into
from brickyard.core.build import build, step_of
from brickyard.core.errors import BadBrick, NotFinite, ParityBroken, Refused, WrongBase
from brickyard.core.export import export
from brickyard.core.files import read_json
from brickyard.core.loop import train
from brickyard.distribute._arm_step import OneByteStep
from brickyard.distribute.one_byte import Log

ARM = "lora:r=2,lr=1e-2 + one-byte:estimates=4,hash_every=4"
TASK = "text-classification"
REFUSED = {
    "dylora": "draws anew",
    "ce-ssl": "draws anew",
    "adalora": "works on gradients",
    "hst": "batch norm",
    "idpt": "batch norm",
    "loca": "one learning rate",
    "fourierft": "one learning rate",
}


@pytest.fixture(scope="module")
def run(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one-byte")
    return trial.run({"setting": asdict(setting(ARM, TASK, text_base)), "folder": str(folder)}), folder


def test_an_arm_sends_a_byte_an_estimate_and_its_brick_keeps_the_log(run: tuple[dict[str, Any], Path]) -> None:
    result, folder = run
    told, log = result["step"], Log(folder / "brick" / "run.zolog")
    assert result["receipt"]["moved"] and told["members"] == 1
    assert told["rounds"] == result["steps"] and told["payload_bytes"] == 4 * result["steps"]
    assert log.rounds == result["best_step"] and log.config.lr == 1e-2


def test_a_log_alone_rebuilds_the_brick_byte_for_byte(
    run: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, small, whole = run[1] / "brick", tmp_path / "log", tmp_path / "whole"
    assert main(["export", str(made), "--to", "log", "--out", str(small)]) == 0
    assert not (small / "adapter_model.safetensors").exists() and "bytes that rebuild" in capsys.readouterr().out
    with pytest.raises(BadBrick, match="--to brick"):
        bricks.load(small).tensors()
    assert main(["export", str(small), "--to", "brick", "--out", str(whole)]) == 0
    assert "same bytes as the run's" in capsys.readouterr().out
    for path in sorted(made.iterdir()):
        assert (whole / path.name).read_bytes() == path.read_bytes()
    raw = bytearray((small / "run.zolog").read_bytes())
    raw[-1] ^= 1
    (small / "run.zolog").write_bytes(raw)
    with pytest.raises(ParityBroken, match="is not the log"):
        export(small, "brick", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_keeps_no_log_or_has_another_base_is_refused(
    run: tuple[dict[str, Any], Path], text_base: Path, decoder_base: Path, tmp_path: Path
) -> None:
    trial.run({"setting": asdict(setting("lora:r=2", TASK, text_base)), "folder": str(tmp_path / "plain")})
    with pytest.raises(Refused, match="keeps no log"):
        export(tmp_path / "plain" / "brick", "log", tmp_path / "out")
    with pytest.raises(WrongBase, match="right --base"):
        export(run[1] / "brick", "brick", tmp_path / "out", base=str(decoder_base))


def test_an_interrupted_run_ends_with_the_same_bytes(
    run: tuple[dict[str, Any], Path], text_base: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    class At:
        def after_step(self, state: Any) -> None:
            if state.step == 7:
                raise Stop

    ready = trial.prepare(setting(ARM, TASK, text_base), ("train", "validation", "test"))
    with pytest.raises(Stop):
        trial.tune(ready, tmp_path, evaluate="test", callbacks=[At()], checkpoint_every=3)
    again = trial.prepare(setting(ARM, TASK, text_base), ("train", "validation", "test"))
    trial.tune(again, tmp_path, evaluate="test", callbacks=[object()], checkpoint_every=3)
    for name in ("run.zolog", "adapter_model.safetensors"):
        assert (tmp_path / "brick" / name).read_bytes() == (run[1] / "brick" / name).read_bytes()


def arm_step(base: Path) -> OneByteStep:
    ready = trial.prepare(setting(ARM, TASK, base), ("train",))
    return step_of(ready.plan, 96, ready.task)(build(ready.plan, ready.base, ready.task, seed=0), ready.training)


def at(step: int) -> Any:
    return SimpleNamespace(step=step)


def test_a_log_is_taken_up_where_the_loop_stands(text_base: Path) -> None:
    """A log of three rounds under a loop at step 1 ended with two rounds too many."""
    first = arm_step(text_base)
    first.attached.model.eval()
    member, seen = first._join(at(0)), []
    for _ in range(3):
        member.round(lambda t, j: sum(p.sum() for p in first.parameters.values()))
        seen.append({name: p.clone() for name, p in first.parameters.items()})
    kept = first.state_dict()

    def resumed(step: int, weights: dict[str, torch.Tensor]) -> Any:
        again = arm_step(text_base)
        again.attached.model.eval()
        again.load_state_dict(kept)
        copy_into(again.parameters, weights, "test")
        return again._join(at(step))

    for step in (1, 3):
        assert resumed(step, seen[step - 1]).log.rounds == step
    with pytest.raises(ParityBroken, match="of 1 rounds does not lead"):
        resumed(1, seen[1])
    with pytest.raises(Refused, match=r"stands at step 5, the log .* holds 3"):
        resumed(5, seen[2])


def test_members_whose_checkpoints_differ_are_refused_by_all(text_base: Path) -> None:
    step = arm_step(text_base)
    step.members = SimpleNamespace(world=3, rank=0, texts=lambda text: [text, "3", text])  # type: ignore[assignment]
    with pytest.raises(Refused, match=r"members \[0, 2\] at 0; members \[1\] at 3.*Delete"):
        step._join(at(0))


def test_a_first_round_without_a_number_is_judged_from_the_log_by_all(text_base: Path) -> None:
    step = arm_step(text_base)
    step.members = SimpleNamespace(world=2, rank=0)  # type: ignore[assignment]
    p_tn = torch.tensor([[1.0, 0.0, -0.0, -0.0]])
    member = SimpleNamespace(
        log=SimpleNamespace(scalars=lambda a, b: p_tn[a:b]), dealt=lambda rank: range(2 * rank, 2 * rank + 2)
    )
    with pytest.raises(NotFinite, match=r"members \[1\] is not finite in the first round"):
        step._refuse_to_begin(member)
    p_tn[0, 3] = 0.0
    step._refuse_to_begin(member)


@pytest.mark.parametrize("bad", [{"schedule": "linear"}, {"wd": 0.1}, {"warmup": 0.1}])
def test_what_the_log_could_not_tell_is_refused(bad: dict[str, Any], text_base: Path) -> None:
    ready = trial.prepare(setting(ARM, TASK, text_base, training=bad), ("train",))
    made = build(ready.plan, ready.base, ready.task, seed=0)
    with pytest.raises(Refused, match=next(iter(bad))):
        step_of(ready.plan, 96, ready.task)(made, ready.training)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"p2p", "s2a"}))
def test_every_tuner_takes_a_round_or_says_why_not(name: str, request: pytest.FixtureRequest) -> None:
    task, folder = home(name, request)
    ready = trial.prepare(setting(f"{METHODS[name]} + one-byte:estimates=2,codec=f32", task, folder), ("train",))
    made = build(ready.plan, ready.base, ready.task, seed=0)
    rows, _ = trial.examples(ready, made)
    plan = replace(ready.training, steps=2)
    if name in REFUSED:
        with pytest.raises(Refused, match=REFUSED[name]):
            train(made, rows["train"], None, ready.task, plan, make_step=step_of(ready.plan, 96, ready.task))
        return
    before = {id(p): p.detach().clone() for p in made.parameters()}
    found = train(
        made, rows["train"], None, ready.task, plan, make_step=step_of(ready.plan, 96, ready.task), device="cpu"
    )
    assert found.report["rounds"] == 2 and all(p.grad is None for p in made.parameters())
    assert any(not torch.equal(p, before[id(p)]) for p in made.parameters())


def test_two_processes_with_data_of_their_own_make_one_brick(text_base: Path, tmp_path: Path) -> None:
    """As two people would: the same command in two places, each with its rows, told only where the other is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    splits: Any = TASKS[TASK]
    root = Path(__file__).parent.parent
    shared = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "BRICKYARD_CACHE": str(tmp_path / "cache")}
    started = []
    for rank in range(2):
        own = {**splits, "train": {key: values[48 * rank : 48 * (rank + 1)] for key, values in splits["train"].items()}}
        data = write_data(tmp_path / f"data{rank}", own)
        command = [sys.executable, "-m", "brickyard", "tune", ARM, "--base", str(text_base), "--data", str(data)]
        command += ["--out", str(tmp_path / f"run{rank}"), "--batch-size", "16", "--epochs", "2"]
        started.append(
            subprocess.Popen(
                command, env=os.environ | shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    told = [process.communicate(timeout=240)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    steps = [read_json(tmp_path / f"run{rank}" / "brick" / "brick.json")["step"] for rank in range(2)]
    assert [step["members"] for step in steps] == [2, 2] and steps[0]["payload_bytes"] == 2 * steps[0]["rounds"]
    for name in ("run.zolog", "adapter_model.safetensors"):
        first, second = ((tmp_path / f"run{rank}" / "brick" / name).read_bytes() for rank in range(2))
        assert first == second
    log = Log(tmp_path / "run0" / "brick" / "run.zolog")
    p_tn = log.scalars(0, log.rounds)
    assert len(set(map(tuple, p_tn.tolist()))) == log.rounds and not torch.equal(p_tn[:, :2], p_tn[:, 2:])
