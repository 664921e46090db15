"""Train one perceptron on the digits in several processes at one byte per gradient, and show what travels.

Each process is a member with its own shards of the digits. The last line compares the bytes with those of an all-reduce
of gradients in the same processes. End a member (kill -9) and torchrun starts all of them again: they go on where the
longest log ends. The logs stay in --out; a second run with more --rounds goes on too.

    torchrun --nproc-per-node 4 --max-restarts 3 scripts/one_byte_demo.py --rounds 300

Members that come and go: start this on one machine, and any time later the same line on another, with the first one's
address; torchrun starts everybody again, and the newcomers catch up from the others' logs. (The variable is torchrun's:
without it torch 2.13 leaves a newcomer waiting for an address that was told before it came.)

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes 1:2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        --rdzv-conf last_call_timeout=5 scripts/one_byte_demo.py --rounds 300 --pause 0.1
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from brickyard.checks._federation import network, shard_loss, socket_bytes
from brickyard.checks.one_byte import PLAIN, WIDTHS, digits_tensors
from brickyard.distribute._members import join
from brickyard.distribute.one_byte import Config, Member, fingerprint, trainable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--codec", choices=("byte", "f16", "f32"), default="byte")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0, help="seconds after each round, to have time to end a member")
    parser.add_argument("--out", type=Path, default=Path("runs") / "one-byte")
    given = parser.parse_args()
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # one machine talks to itself
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    join("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data, model = digits_tensors(), network(WIDTHS, given.seed)
    config = Config(**{**PLAIN, "codec": given.codec, "hash_every": 50})
    log = given.out / f"{given.codec}-seed{given.seed}-member{rank}.zolog"
    worker = Member(trainable(model), config, seed=given.seed, log=log)
    loss = shard_loss(model, data, given.seed, config.estimates)
    first, before = worker.log.rounds, socket_bytes()["sent"]
    if rank == 0 and first:
        print(f"caught up with {first} rounds from the logs")
    for t in range(first, given.rounds):
        worker.round(loss)
        time.sleep(given.pause)
        if rank == 0 and (t + 1) % 50 == 0:
            with torch.no_grad():
                logits = model(data["test_x"])
            right = float((logits.argmax(1) == data["test_labels"]).float().mean())
            tested = float(F.cross_entropy(logits, data["test_labels"]))
            print(f"round {t + 1}: test loss {tested:.3f}, accuracy {100 * right:.1f} %")
    rounds = max(1, given.rounds - first)
    byte_sent = (socket_bytes()["sent"] - before) / rounds
    gradient, before = torch.zeros(sum(p.numel() for p in model.parameters())), socket_bytes()["sent"]
    for _ in range(20):
        dist.all_reduce(gradient)
    reduce_sent = (socket_bytes()["sent"] - before) / 20
    if rank == 0:
        payload = worker.payload_bytes / rounds
        print(
            f"a round, each of {world} members: payload {payload:g} bytes for {config.estimates} estimates in all "
            f"(counted on the tensor given to the collective), {byte_sent:,.0f} bytes at the socket (measured, with "
            f"gloo's own words and the comparisons of hashes)\n"
            f"an all-reduce of the gradient: payload {gradient.nbytes:,} bytes (counted), {reduce_sent:,.0f} at the "
            f"socket (measured)\n"
            f"log: {log.stat().st_size:,} bytes; weights {fingerprint(worker.parameters)[:12]}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
