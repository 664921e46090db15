"""Members of a one-byte run as processes on this machine, over gloo on the loopback. Imports no transformers."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import struct
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core import noise
from brickyard.core.files import read_tensors
from brickyard.distribute.one_byte import Config, Member, fingerprint, trainable

BATCH = 16
_TCP_ACKED, _TCP_RECEIVED = 120, 128  # offsets in struct tcp_info (linux/tcp.h): tcpi_bytes_acked, tcpi_bytes_received


def network(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Return a perceptron of these widths with ReLU between, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def shard_loss(model: nn.Module, data: Mapping[str, Tensor], seed: int, shards: int) -> Callable[[int, int], Tensor]:
    """Return the loss of (round, estimate): cross entropy on rows of the shard that only this estimate's member has."""

    def loss(t: int, j: int) -> Tensor:
        x, labels = data["x"][j::shards], data["labels"][j::shards]
        g = torch.Generator().manual_seed(noise.key(seed, t, j) & (2**63 - 1))
        rows = torch.randint(len(x), (BATCH,), generator=g)
        return F.cross_entropy(model(x[rows]), labels[rows])

    return loss


def together(asked: Sequence[dict[str, Any]], folder: Path, *, seconds: float = 100) -> list[dict[str, Any]]:
    """Run one process a member and return what each reports; a member that died reports {"died": exit code}.

    asked: for each rank {"log", "data", "widths", "base", "config", "seed", "rounds"} and what is to go wrong (see
    `member`). The processes meet through a file in `folder`.
    """
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")  # nothing of it is needed
    try:
        processes = []
        for rank, given in enumerate(asked):
            out = folder / f"{meeting.name}-{rank}.json"
            process = context.Process(
                target=member, args=(rank, len(asked), str(meeting), str(out), given), daemon=True
            )
            process.start()
            processes.append((process, out))
    finally:
        sys.modules["__main__"] = main
    found = []
    for process, out in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        if out.exists():
            found.append(json.loads(out.read_text(encoding="utf-8")))
        else:
            found.append({"died": process.exitcode})
    return found


def member(rank: int, world: int, meeting: str, out: str, asked: dict[str, Any]) -> None:
    """Take part in a run and write a report to `out`.

    To go wrong: "die" (a round, in which this member ends like one whose power failed), "nudge" (a round, before which
    the weights of its second layer move by a unit in the last place), "version" (what it says its release is),
    "nothing" (rounds in which its loss is no number), "claim" (how many rounds it says it holds).
    "all_reduce" sends gradients instead.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{meeting}", timeout=datetime.timedelta(seconds=60), rank=rank, world_size=world
        )
        report = _all_reduce(asked) if asked.get("all_reduce") else _rounds(asked)
        dist.barrier()
    except Exception as error:
        report = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    Path(out).write_text(json.dumps(report), encoding="utf-8")
    os._exit(0)  # a group of which a member is gone would wait for it


def alone(asked: dict[str, Any]) -> dict[str, Any]:
    """Run all estimates in this process and report as a member does."""
    return _rounds(asked)


def _rounds(asked: dict[str, Any]) -> dict[str, Any]:
    model = network(asked["widths"], asked["base"])
    data = read_tensors(asked["data"])
    if "version" in asked:
        import brickyard

        brickyard.__version__ = asked["version"]
    if "claim" in asked:
        from brickyard.distribute import one_byte

        one_byte.Log.rounds = property(lambda self: asked["claim"])  # type: ignore[assignment,misc]
    config = Config(**asked["config"])
    worker = Member(trainable(model), config, seed=asked["seed"], log=Path(asked["log"]), model=model)
    caught_up = worker.log.rounds
    loss = shard_loss(model, data, asked["seed"], config.estimates)
    if "nothing" in asked:
        loss = _nothing(loss, asked["nothing"])
    before, sent, hashes, losses = socket_bytes(), worker.payload_bytes, [], []
    for t in range(caught_up, asked["rounds"]):
        if t == asked.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if t == asked.get("nudge"):
            with torch.no_grad():
                weight = worker.parameters["2.weight"]
                weight.copy_(torch.nextafter(weight, weight + 1))
                worker.remember()
        losses.append(worker.round(loss))
        if asked.get("hashes"):
            hashes.append(fingerprint(worker.parameters))
    with torch.no_grad():
        final = float(F.cross_entropy(model(data["test_x"]), data["test_labels"]))
    return {
        "rounds": worker.log.rounds,
        "caught_up": caught_up,
        "hash": fingerprint(worker.parameters),
        "hashes": hashes,
        "payload": worker.payload_bytes - sent,
        "socket": {key: value - before[key] for key, value in socket_bytes().items()},
        "clipped": worker.clipped,
        "skipped": worker.skipped,
        "log": bytes(worker.log.body).hex(),
        "losses": losses,
        "final": final,
        "numbers": sum(p.numel() for p in worker.parameters.values()),
    }


def _nothing(loss: Callable[[int, int], Tensor], rounds: Sequence[int]) -> Callable[[int, int], Tensor]:
    """Return a loss that is no number in the given rounds."""
    return lambda t, j: loss(t, j) * (math.nan if t in rounds else 1.0)


def _all_reduce(asked: dict[str, Any]) -> dict[str, Any]:
    numbers = sum(p.numel() for p in network(asked["widths"], asked["base"]).parameters())
    gradient = torch.ones(numbers)
    dist.barrier()
    before = socket_bytes()
    for _ in range(asked["rounds"]):
        dist.all_reduce(gradient)
    return {
        "payload": asked["rounds"] * gradient.nbytes,
        "socket": {key: value - before[key] for key, value in socket_bytes().items()},
        "numbers": numbers,
    }


def socket_bytes() -> dict[str, int]:
    """Return the bytes that this process's own TCP connections have sent and received, as the kernel counts them.

    They are the streams' bytes: gloo's own words are in them, the headers of TCP and IP are not. 0 where the system
    does not say.
    """
    sent = received = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as copy:
                if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        except OSError:
            continue
        if len(info) >= _TCP_RECEIVED + 8:
            sent += struct.unpack_from("<Q", info, _TCP_ACKED)[0]
            received += struct.unpack_from("<Q", info, _TCP_RECEIVED)[0]
    return {"sent": sent, "received": received}
