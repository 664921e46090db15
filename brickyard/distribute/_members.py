"""What members of a run say to each other: bytes through torch.distributed, and nothing that would be a pickle."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from brickyard.core.errors import Refused

LONGEST = 2**26  # bytes of a text: digests of a million tensors; what claims to be longer is not allocated


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
