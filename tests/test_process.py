"""What a process that computes on the CPU sets for itself, in the jobs and at the command line, and in no other."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from brickyard.core import process
from brickyard.core.jobs import Job, Local

PROBE = """
import torch, resource
from brickyard.core.process import settle
{call}
x = torch.ones(1) * 1e-38
small = float((x * torch.tensor(1e-3)).item())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(48 * 2**18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(small, faults())
"""


def probe(call: str) -> tuple[float, int]:
    done = subprocess.run([sys.executable, "-c", PROBE.format(call=call)], capture_output=True, text=True, check=True)
    small, faults = done.stdout.split()
    return float(small), int(faults)


def test_freed_memory_is_kept_and_denormals_are_flushed() -> None:
    small, faults = probe("")
    assert small > 0  # a denormal number
    flushed, fewer = probe("took = settle()")
    assert flushed == 0.0
    if sys.platform == "linux":
        assert fewer < faults / 4 or faults < 1000


def denormal(argument: Any) -> float:
    """A job that multiplies down to a number too small for full precision."""
    return float((torch.ones(1) * 1e-38 * torch.tensor(1e-3)).item())


def test_jobs_settle_their_process_and_the_caller_stays_as_it_was() -> None:
    (outcome,) = Local(1).run([Job(key="a", function="test_process:denormal", argument={})])
    assert outcome.status == "done", outcome.reason
    assert outcome.value == 0.0 and denormal(None) > 0


def test_a_command_settles_only_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from brickyard import cli, commands

    called: list[bool] = []
    monkeypatch.setattr(process, "settle", lambda: called.append(True))
    monkeypatch.setattr(commands, "plan", lambda args, argv: 0)
    command = ["plan", "--methods", "lora"]
    assert cli.main(command) == 0 and not called
    monkeypatch.setattr(sys, "argv", ["brickyard", *command])
    assert cli.main() == 0 and called == [True]
