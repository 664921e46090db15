"""One byte: the codec, the log, and four processes of which one dies and one joins."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brickyard.checks._federation import alone, network, together
from brickyard.core.errors import BadBrick, NotFinite, Refused, RunFailed, UnknownName, UsageError, WrongBase
from brickyard.core.files import write_tensors
from brickyard.distribute.one_byte import (
    STEPS,
    Config,
    Log,
    Member,
    bound_of,
    decode,
    encode,
    encode_found,
    fingerprint,
    largest,
    replay,
    skipped,
    terms_of,
    trainable,
)

WIDTHS = (8, 12, 3)
CONFIG: dict[str, Any] = {"lr": 2e-2, "estimates": 8, "hash_every": 2, "codec": "byte"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which a fixed linear map decides the class."""
    g = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(600, WIDTHS[0], generator=g), torch.randn(WIDTHS[0], WIDTHS[-1], generator=g)
    labels = (x @ teacher).argmax(1)
    path = tmp_path_factory.mktemp("data") / "data.safetensors"
    write_tensors(path, {"x": x[:400], "labels": labels[:400], "test_x": x[400:], "test_labels": labels[400:]})
    return path


def asked(data: Path, log: Path, **changes: Any) -> dict[str, Any]:
    plain = {"data": str(data), "log": str(log), "widths": WIDTHS, "base": 0, "config": CONFIG, "seed": 5, "rounds": 6}
    return {**plain, **changes}


def weights(seed: int = 0) -> dict[str, Tensor]:
    return trainable(network(WIDTHS, seed))


@settings(max_examples=200, deadline=None)
@given(st.floats(4e-4, 2.5e3), st.sampled_from([1, -1]))
def test_a_byte_keeps_a_scalar_to_within_its_relative_error(size: float, sign: int) -> None:
    codes = encode([sign * size])
    assert codes.dtype == torch.uint8 and codes.numel() == 1
    found = float(decode(codes))
    assert math.copysign(1, found) == sign
    assert abs(found / (sign * size) - 1) <= math.exp(1 / (2 * STEPS)) - 1 + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e5, 1e5), min_size=2, max_size=9), st.sampled_from(["byte", "f16", "f32"]))
def test_every_codec_is_monotone_odd_and_of_its_width(p: list[float], codec: str) -> None:
    p = sorted(p)
    codes = encode(p, codec)
    assert codes.numel() == len(p) * {"byte": 1, "f16": 2, "f32": 4}[codec]
    found = decode(codes, codec)
    assert (found.diff() >= 0).all()
    assert torch.equal(decode(encode([-x for x in p], codec), codec), -found)
    assert torch.equal(encode(found.tolist(), codec), codes) or 0.0 in found  # what was restored stays itself


def test_zero_stays_zero_and_no_number_is_refused() -> None:
    for codec in ("byte", "f16", "f32"):
        assert float(decode(encode([0.0], codec), codec)) == 0
        for bad in (math.nan, math.inf, -math.inf):
            with pytest.raises(NotFinite, match="p of estimate 1"):
                encode([0.0, bad], codec)
    ends = math.exp(63 / 8)
    found = decode(encode([1e-4, 3e-4, 1e9, -1e9])).tolist()
    assert found == pytest.approx([0.0, 1 / ends, ends, -ends])
    assert largest() == pytest.approx(math.exp(63 / 8))


def test_what_a_byte_stands_for_does_not_depend_on_a_machines_exponential() -> None:
    """No value lies so near to the middle between two float32 that an error of one double could move it across."""
    getcontext().prec = 40
    values = decode(torch.arange(1, 128, dtype=torch.uint8)).numpy()
    for e, value in zip(range(-63, 64), values, strict=True):
        exact = (Decimal(e) / STEPS).exp()
        middles = [(Decimal(float(value)) + Decimal(float(np.nextafter(value, to)))) / 2 for to in (0, np.inf)]
        distance = min(abs(exact - middle) for middle in middles)
        assert distance > exact * Decimal(2) ** -50


def test_a_bound_is_a_multiple_of_the_median_and_false_values_do_not_move_it_far() -> None:
    honest = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.25])
    assert bound_of(honest, 5.0) == 5 * 0.5  # the lower median of 0.25, 0.5, 1, 2
    attacked = torch.cat([honest, torch.tensor([2634.0, -2634.0, 2634.0])])
    assert bound_of(attacked, 5.0) <= 5 * float(honest.abs().max())
    assert bound_of(honest, 0.0) == bound_of(torch.zeros(3), 5.0) == math.inf


def test_an_update_is_the_sum_over_the_estimates_in_their_order() -> None:
    from brickyard.core import noise

    p_n = torch.tensor([1.0, 0.0, -3.0, 100.0])
    for reduction, divisor in (("sqrt", 2.0), ("mean", 4.0)):
        terms = terms_of(p_n, 5.0, 9, 2, 0.1, reduction)
        assert terms == [
            (noise.key(9, 2, j), pytest.approx(-0.1 / divisor * p)) for j, p in ((0, 1.0), (2, -3.0), (3, 5.0))
        ]


def test_the_log_alone_rebuilds_the_weights_in_one_go_or_in_pieces(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.zolog"
    report = alone(asked(data, path, rounds=9))
    log = Log(path)
    assert log.rounds == 9 and len(log.body) == 9 * 8  # a byte an estimate
    assert path.stat().st_size < 1000
    whole, pieces = weights(), weights()
    replay(whole, log)
    assert fingerprint(whole) == report["hash"] != fingerprint(weights())
    for first, end in ((0, 4), (4, 5), (5, 9)):
        replay(pieces, log, first=first, end=end)
    assert fingerprint(pieces) == report["hash"]
    with pytest.raises(WrongBase, match="start from the base"):
        replay(weights(1), log)
    with pytest.raises(WrongBase):
        replay(dict(reversed(weights().items())), log)


def test_training_learns_and_estimates_leave_the_weights_exactly_where_they_were(data: Path, tmp_path: Path) -> None:
    early = alone(asked(data, tmp_path / "a.zolog", rounds=1))
    late = alone(asked(data, tmp_path / "a.zolog", rounds=50))
    assert late["caught_up"] == 1 and late["final"] < 0.9 * early["final"]
    still = alone(asked(data, tmp_path / "b.zolog", config={**CONFIG, "lr": 0.0}, rounds=3))
    assert still["hash"] == fingerprint(weights())


def test_a_torn_log_keeps_its_whole_rounds_and_a_damaged_one_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.zolog"
    expected = alone(asked(data, tmp_path / "whole.zolog", rounds=7))
    alone(asked(data, path, rounds=5))
    path.write_bytes(path.read_bytes()[:-3])
    assert Log(path).rounds == 4 and path.stat().st_size % 8 == (tmp_path / "whole.zolog").stat().st_size % 8
    resumed = alone(asked(data, path, rounds=7))
    assert resumed["caught_up"] == 4 and resumed["hash"] == expected["hash"]
    with pytest.raises(Refused, match="another seed"):
        alone(asked(data, path, seed=6))
    with pytest.raises(Refused, match="another config"):
        alone(asked(data, path, config={**CONFIG, "lr": 1.0}))
    with pytest.raises(BadBrick, match="does not exist"):
        Log(tmp_path / "nothing.zolog")
    for damage in (b"PK" + path.read_bytes(), path.read_bytes()[:20], path.read_bytes().replace(b'"lr"', b'"xx"')):
        path.write_bytes(damage)
        with pytest.raises(BadBrick):
            Log(path)


def test_options_and_too_many_members_are_refused(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"eps": 0.0}, {"lr": math.nan}, {"estimates": 0}, {"clip": 0.5}, {"unit": 0.0}]
    for bad in [*wrong, {"window": 0}]:
        with pytest.raises(UsageError, match="out of range"):
            Config(**bad)
    for name, value, near in (("codec", "bytes", "did you mean byte"), ("reduction", "sum", "known: mean, sqrt")):
        unknown: dict[str, Any] = {name: value}
        with pytest.raises(UnknownName, match=near):
            Config(**unknown)
    with pytest.raises(UsageError, match="no parameter"):
        trainable(network(WIDTHS, 0).requires_grad_(False))


def test_scalars_beyond_the_codec_stop_a_run_and_a_larger_unit_helps(tmp_path: Path) -> None:
    def steep(_: int, j: int) -> Tensor:
        return 1e6 * theta["0.bias"].sum()

    for unit in (1.0, 1e4):
        theta = weights()
        config = Config(**{**CONFIG, "lr": 1e-9, "estimates": 40, "unit": unit})
        worker = Member(theta, config, seed=1, log=tmp_path / f"{unit}.zolog")
        if unit == 1.0:
            with pytest.raises(RunFailed, match="exceed the range of codec 'byte'; raise unit"):
                for _ in range(6):
                    worker.round(steep)
        else:
            for _ in range(6):
                worker.round(steep)
            assert worker.log.scalars(0, 6).abs().max() > 1e5


@pytest.mark.parametrize("clip", [5.0, 0.0])
def test_garbage_from_a_quarter_of_the_members_is_bounded(clip: float, data: Path, tmp_path: Path) -> None:
    from brickyard.checks._federation import shard_loss
    from brickyard.core.files import read_tensors

    rows = read_tensors(data)
    model = network(WIDTHS, 0)
    config = Config(**{**CONFIG, "clip": clip})
    honest = shard_loss(model, rows, 5, 8)
    calls = [0]

    def loss(t: int, j: int) -> Tensor:
        calls[0] += 1
        return torch.tensor(1e9 * (calls[0] % 2)) if j < 2 else honest(t, j)

    worker = Member(trainable(model), config, seed=5, log=tmp_path / "run.zolog")
    with torch.no_grad():
        before = float(torch.nn.functional.cross_entropy(model(rows["test_x"]), rows["test_labels"]))
    if clip == 0:  # without a bound the false scalars are what moves the weights, until their number is noticed
        with pytest.raises(RunFailed, match="exceed"):
            for _ in range(50):
                worker.round(loss)
        return
    for _ in range(50):
        worker.round(loss)
    with torch.no_grad():
        after = float(torch.nn.functional.cross_entropy(model(rows["test_x"]), rows["test_labels"]))
    assert worker.clipped >= 50 * 2 and after < 0.9 * before


def test_four_members_are_one_machine_and_one_may_die_and_one_may_join(data: Path, tmp_path: Path) -> None:
    logs = [tmp_path / f"{rank}.zolog" for rank in range(5)]
    config = {**CONFIG, "hash_every": 2}
    expected = alone(asked(data, tmp_path / "alone.zolog", rounds=12, hashes=True))
    four = [asked(data, log, rounds=12, hashes=True, config=config) for log in logs[:4]]
    # Member 2 ends like one whose power failed, in the middle of round 5; the others notice and stop.
    first = together([*four[:2], {**four[2], "die": 5}, four[3]], tmp_path)
    assert first[2] == {"died": -9}
    assert all("error" in report for i, report in enumerate(first) if i != 2), first
    assert {Log(log).rounds for log in logs[:4]} == {5}
    # Restarted, three go on; then a fourth joins that has no log.
    three = together([{**four[i], "rounds": 8} for i in (0, 1, 3)], tmp_path)
    assert [r["caught_up"] for r in three] == [5, 5, 5] and {r["hash"] for r in three} == {expected["hashes"][7]}
    assert [r["payload"] for r in three] == [3 * 3] * 3  # 8 estimates on three members: 3 bytes each, one of them idle
    last = together([{**four[0], "log": str(log)} for log in (logs[4], logs[1], logs[3], logs[0])], tmp_path)
    assert [r["caught_up"] for r in last] == [8] * 4
    assert {r["hash"] for r in last} == {expected["hash"]}
    assert all(r["hashes"] == expected["hashes"][8:] for r in last)  # equal after every round
    assert {r["log"] for r in last} == {expected["log"]}
    assert [r["payload"] for r in last] == [4 * 2] * 4  # two estimates a member and round, a byte each


def test_every_member_has_an_estimate_however_many_there_are(data: Path, tmp_path: Path) -> None:
    """Of 16 estimates in shares of four the fifth member had none, and no loss to tell."""
    config = {**CONFIG, "estimates": 16}
    expected = alone(asked(data, tmp_path / "alone.zolog", rounds=3, config=config))
    found = together([asked(data, tmp_path / f"{r}.zolog", rounds=3, config=config) for r in range(5)], tmp_path)
    assert {report["hash"] for report in found} == {expected["hash"]}, found
    assert {report["log"] for report in found} == {expected["log"]}
    assert [report["payload"] for report in found] == [3 * 4] * 5
    assert all(math.isfinite(loss) for report in found for loss in report["losses"])


@pytest.mark.parametrize("joins", [pytest.param(False, marks=pytest.mark.slow), True])
def test_torchrun_starts_members_again_and_takes_in_another(joins: bool, tmp_path: Path) -> None:
    """The demo under torchrun: of four members one is killed; then, where `joins`, a fifth comes from another agent."""
    from brickyard.checks._federation import shard_loss
    from brickyard.checks.one_byte import PLAIN, digits_tensors
    from brickyard.checks.one_byte import WIDTHS as DEMO

    rounds, repository = 160, Path(__file__).parent.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2" if joins else "1"]
    launch += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", endpoint]
    launch += ["--rdzv-conf", "last_call_timeout=1"]
    demo = [str(repository / "scripts" / "one_byte_demo.py"), "--rounds", str(rounds), "--pause", "0.05"]
    paths = {"PYTHONPATH": str(repository), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    # Without the variable torch shares one store among the starts: what `join` is for.
    shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if joins else {}
    agents: list[subprocess.Popen[bytes]] = []

    def start(members: int) -> None:
        out = (tmp_path / f"agent{len(agents)}.txt").open("wb")
        command = [*launch, "--nproc-per-node", str(members), *demo, "--out", str(tmp_path)]
        agents.append(subprocess.Popen(command, env=os.environ | paths | shared, stdout=out, stderr=out))
        out.close()

    def said() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("agent*.txt"))

    def wait(reached: int) -> None:
        log, end = tmp_path / "byte-seed1-member0.zolog", time.monotonic() + 200
        while not (log.exists() and Log(log).rounds >= reached):
            assert time.monotonic() < end and agents[0].poll() is None, said()
            time.sleep(0.1)

    try:
        start(4)
        wait(10)
        (member,) = (p for p in psutil.Process(agents[0].pid).children() if p.environ().get("LOCAL_RANK") == "2")
        member.kill()
        wait(40)
        if joins:
            start(1)
        assert [agent.wait(timeout=240) for agent in agents] == [0] * len(agents), said()
    finally:
        for agent in agents:
            agent.kill()
    assert "caught up with" in said() and f"each of {4 + joins} members" in said()
    data, model = digits_tensors(), network(DEMO, 1)
    config = Config(**{**PLAIN, "codec": "byte", "hash_every": 50})
    one = Member(trainable(model), config, seed=1, log=tmp_path / "alone.zolog")
    for _ in range(rounds):
        one.round(shard_loss(model, data, 1, config.estimates))
    logs = {(tmp_path / f"byte-seed1-member{rank}.zolog").read_bytes() for rank in range(4 + joins)}
    assert logs == {(tmp_path / "alone.zolog").read_bytes()}
    assert fingerprint(one.parameters)[:12] in said()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": 1}, "Refused", "another base"),
        ({"version": "9.9"}, "Refused", "another version"),
        ({"config": {**CONFIG, "lr": 0.5}}, "Refused", "another config"),
        ({"nudge": 2}, "ParityBroken", r"members \[1\] are not those of the others, from 2.weight"),
    ],
)
def test_a_member_that_differs_is_found_by_all(
    change: dict[str, Any], error: str, message: str, data: Path, tmp_path: Path
) -> None:
    import re

    plain = [asked(data, tmp_path / f"{rank}.zolog") for rank in range(3)]
    found = together([plain[0], {**plain[1], **change}, plain[2]], tmp_path)
    assert [report.get("error") for report in found] == [error] * 3, found
    assert all(re.search(message, report["message"]) for report in found)


@pytest.mark.parametrize("codec", ["byte", "f16", "f32"])
def test_a_loss_that_is_no_number_moves_nothing_and_is_counted(codec: str, data: Path, tmp_path: Path) -> None:
    codes = encode_found([1.0, math.nan, 0.0, -math.inf, -1e-30], codec)
    found = decode(codes, codec)
    assert skipped(found).tolist() == [False, True, False, True, False]
    assert not skipped(decode(encode([0.0, -0.0, -1e-30], codec), codec)).any()  # a scalar that is zero is one
    assert float(found[0]) == 1 and not found[1:4].any()
    config = {**CONFIG, "codec": codec}
    report = alone(asked(data, tmp_path / "run.zolog", rounds=4, config=config, nothing=[0, 2]))
    assert (report["rounds"], report["skipped"]) == (4, 16)
    assert [math.isnan(value) for value in report["losses"]] == [True, False, True, False]
    again = weights()
    replay(again, Log(tmp_path / "run.zolog"))
    assert fingerprint(again) == report["hash"]


def test_a_member_without_a_finite_loss_is_carried_and_all_stop_when_nobody_has_one(data: Path, tmp_path: Path) -> None:
    logs = [tmp_path / f"{rank}.zolog" for rank in range(2)]
    plain = [asked(data, log, rounds=30) for log in logs]
    found = together([plain[0], {**plain[1], "nothing": list(range(30))}], tmp_path)
    assert [report["skipped"] for report in found] == [30 * 4] * 2 and len({r["hash"] for r in found}) == 1
    found = together([{**given, "rounds": 60, "nothing": list(range(30, 60))} for given in plain], tmp_path)
    assert [report.get("error") for report in found] == ["NotFinite"] * 2, found
    assert all("20 rounds in a row, up to round 50" in report["message"] for report in found)
    assert {Log(log).rounds for log in logs} == {50}


def test_rounds_are_on_the_disk_before_they_are_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def watched(handle: int) -> None:
        synced.append(os.fstat(handle).st_size)
        real(handle)

    theta = weights()
    worker = Member(theta, Config(**CONFIG), seed=1, log=tmp_path / "run.zolog")
    monkeypatch.setattr(os, "fsync", watched)
    for _ in range(2):
        worker.round(lambda t, j: theta["0.bias"].sum())
    size = (tmp_path / "run.zolog").stat().st_size
    assert synced == [size - 8, size]


def test_a_write_that_failed_leaves_nothing_in_the_log(tmp_path: Path) -> None:
    theta = weights()
    worker = Member(theta, Config(**CONFIG), seed=1, log=tmp_path / "run.zolog")
    for torn in (b"", b"xxx"):
        with (tmp_path / "run.zolog").open("ab") as file:
            file.write(torn)
        worker.round(lambda t, j: theta["0.bias"].sum())
    assert Log(tmp_path / "run.zolog").body == worker.log.body and worker.log.rounds == 2
    with (tmp_path / "run.zolog").open("ab") as file:
        file.write(b"xxx")
    worker.log.drop(1)
    assert (tmp_path / "run.zolog").read_bytes().endswith(bytes(worker.log.body)) and worker.log.rounds == 1


def test_a_loss_that_raises_leaves_the_weights_where_they_were(tmp_path: Path) -> None:
    theta = weights()
    worker = Member(theta, Config(**CONFIG), seed=1, log=tmp_path / "run.zolog")
    with pytest.raises(ZeroDivisionError):
        worker.round(lambda t, j: theta["0.bias"].sum() / (1 // 0))
    assert fingerprint(theta) == fingerprint(weights())


def test_what_exceeds_the_codec_is_counted_in_the_log_also_after_a_restart(tmp_path: Path) -> None:
    theta = weights()
    config = Config(**{**CONFIG, "lr": 1e-9, "estimates": 40})

    def loss(t: int, j: int) -> Tensor:
        return (1e6 if t == 0 else 1.0) * theta["0.bias"].sum()

    first = Member(theta, config, seed=1, log=tmp_path / "run.zolog")
    for _ in range(4):
        first.round(loss)
    theta = weights()
    with pytest.raises(RunFailed, match="of 200 scalars exceed"):
        Member(theta, config, seed=1, log=tmp_path / "run.zolog").round(loss)


def test_forwards_that_would_differ_are_refused(tmp_path: Path) -> None:
    """Otherwise p is the difference of two drop-out masks over 2 eps."""
    for layer, said in ((torch.nn.Dropout(0.1), "drops out"), (torch.nn.BatchNorm1d(12), "batch norm")):
        model = torch.nn.Sequential(network(WIDTHS, 0), layer)
        with pytest.raises(Refused, match=said):
            trainable(model)
        parameters = trainable(model.eval())
        log = tmp_path / f"{type(layer).__name__}.zolog"
        worker = Member(parameters, Config(**CONFIG), seed=1, log=log, model=model)
        model.train()
        with pytest.raises(Refused, match=said):
            worker.round(lambda t, j, p=parameters: p["0.0.bias"].sum())
        assert worker.log.rounds == 0


def test_an_interrupted_round_is_dropped_and_more_of_one_member_is_refused(data: Path, tmp_path: Path) -> None:
    """What a single member holds it could have invented; the longest log used to be everybody's."""
    whole = alone(asked(data, tmp_path / "whole.zolog", rounds=12, hashes=True))
    logs = [tmp_path / f"{rank}.zolog" for rank in range(3)]

    def lengths(*rounds: int) -> None:
        for log, count in zip(logs, rounds, strict=True):
            log.unlink(missing_ok=True)
            if count:
                alone(asked(data, log, rounds=count))

    def invent(log: Path, rounds: int) -> None:
        log.write_bytes(log.read_bytes() + bytes([64 + 40]) * 8 * rounds)

    lengths(6, 6, 6)
    invent(logs[2], 1)
    found = together([asked(data, log, rounds=9) for log in logs], tmp_path)
    assert [r.get("caught_up") for r in found] == [6] * 3, found
    assert {r["hash"] for r in found} == {whole["hashes"][8]} and {Log(log).rounds for log in logs} == {9}
    invent(logs[1], 3)
    found = together([asked(data, log, rounds=12) for log in logs], tmp_path)
    assert [r.get("error") for r in found] == ["Refused"] * 3
    assert all("member 1 holds 3 rounds more than any other" in r["message"] for r in found)
    assert [Log(log).rounds for log in logs] == [9, 12, 9]  # nobody took them over
    # Rounds that two hold are everybody's, also a newcomer's; those of one survivor are copied by hand.
    lengths(8, 0, 8)
    found = together([asked(data, log, rounds=9) for log in logs], tmp_path)
    assert [r.get("caught_up") for r in found] == [8] * 3 and {r["hash"] for r in found} == {whole["hashes"][8]}


@pytest.mark.parametrize("claim", [10**12, -1])
def test_a_claim_of_no_runs_length_is_refused_before_anything_is_allocated(
    claim: int, data: Path, tmp_path: Path
) -> None:
    plain = [asked(data, tmp_path / f"{rank}.zolog") for rank in range(2)]
    found = together([plain[0], {**plain[1], "claim": claim}], tmp_path)
    assert [report.get("error") for report in found] == ["Refused"] * 2, found
    assert all(f"member 1 claims a log of '{claim}' rounds" in report["message"] for report in found)


def test_logs_that_forked_are_refused_by_all(data: Path, tmp_path: Path) -> None:
    alone(asked(data, tmp_path / "0.zolog", rounds=4))
    alone(asked(data, tmp_path / "1.zolog", rounds=3))
    raw = bytearray((tmp_path / "1.zolog").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "1.zolog").write_bytes(raw)
    found = together([asked(data, tmp_path / f"{rank}.zolog") for rank in range(2)], tmp_path)
    assert [report.get("error") for report in found] == ["Refused"] * 2
    assert all("logs of members [1]" in report["message"] for report in found), json.dumps(found)
