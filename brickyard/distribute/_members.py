"""What members of a run say to each other: bytes through torch.distributed, and nothing that would be a pickle."""

from __future__ import annotations

import json
import os
import secrets
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from brickyard.core.errors import Refused, RunFailed

LONGEST = 2**26  # bytes of a text: digests of a million tensors; what claims to be longer is not allocated


def join(backend: str = "gloo", *, timeout_s: float = 300) -> None:
    """Form the process group of a torchrun launch, also when torchrun has started its members again.

    Since torch 2.5 the store that torchrun hands to its members outlives a restart, with the addresses of members that
    are gone: `init_process_group` then connects to those and fails. Here the members first agree on a part of the store
    that nobody has used. RunFailed where they do not find each other within `timeout_s` seconds.
    """
    limit = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=limit)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=limit)
    fresh = dist.PrefixStore(agree(dist.PrefixStore("brickyard", store), rank, world, timeout_s=timeout_s), store)
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=world, timeout=limit)


def launched(backend: str = "gloo") -> None:
    """Form the process group where the environment says that this process is one of several; else do nothing."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join(backend)


def agree(store: dist.Store, rank: int, world: int, *, timeout_s: float) -> str:
    """Return a word that all `world` members of this start have in common and no earlier start had.

    Each member says a word of its own; the first repeats all that it hears, its own first, until every member has
    answered with that one. So what an earlier start has left in the store is never taken for an answer.
    """
    mine, end = secrets.token_hex(8), time.monotonic() + timeout_s
    store.set(f"word{rank}", mine)
    while time.monotonic() < end:
        if rank == 0:
            heard = [mine, *(_said(store, f"word{other}") for other in range(1, world))]
            store.set("heard", json.dumps(heard))
            if all(_said(store, f"answer{other}") == mine for other in range(1, world)):
                return mine
        else:
            heard = json.loads(_said(store, "heard") or "[]")
            if len(heard) == world and heard[rank] == mine:
                store.set(f"answer{rank}", heard[0])
                return heard[0]
        time.sleep(0.02)
    raise RunFailed(f"member {rank} of {world} found the others missing for {timeout_s:g} s; look at their messages.")


def _said(store: dist.Store, key: str) -> str:
    """Return what lies under a key, "" where there is nothing yet."""
    return store.get(key).decode() if store.check([key]) else ""


class Members:
    """The members of a process group; one alone where there is none.

    With NCCL what travels is put on `device`; gloo takes it from the CPU.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if together else 0
        self.world = dist.get_world_size(group) if together else 1
        nccl = together and dist.get_backend(group) == "nccl"
        self._device = device if nccl else torch.device("cpu")

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all members, in the order of their ranks; all of one shape and type."""
        if self.world == 1:
            return [tensor]
        tensor = tensor.to(self._device)
        out = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(out, tensor, group=self.group)
        return [found.cpu() for found in out]

    def texts(self, text: str) -> list[str]:
        """Return the texts of all members; Refused, on all alike, where one claims a length that no text has."""
        raw = text.encode()
        lengths = [int(n) for n in torch.cat(self.gather(torch.tensor([len(raw)])))]
        for rank, length in enumerate(lengths):
            if not 0 <= length <= LONGEST:
                raise Refused(f"member {rank} claims a text of {length} bytes; expected at most {LONGEST}.")
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        if raw:
            padded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return [t[:n].numpy().tobytes().decode() for t, n in zip(self.gather(padded), lengths, strict=True)]

    def from_one(self, source: int, raw: bytes, size: int) -> bytes:
        """Return the first `size` bytes of the member `source`."""
        if self.world == 1 or not size:
            return raw[:size]
        sent = torch.zeros(size, dtype=torch.uint8, device=self._device)
        if self.rank == source:
            sent.copy_(torch.frombuffer(bytearray(raw[:size]), dtype=torch.uint8))
        src = source if self.group is None else dist.get_global_rank(self.group, source)
        dist.broadcast(sent, src, group=self.group)
        return sent.cpu().numpy().tobytes()
