"""ZO2 from files: whole after a crash at any write, exact after a resume, within a limit of memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from streaming import TOKENS, decoder, from_file, in_memory, same, train
from torch import nn

from brickyard.checks._decoder import next_token_loss
from brickyard.core.errors import BadBase, Changed, DiskFull, Locked, Refused, RunFailed, UsageError
from brickyard.optim import _slow_tier
from brickyard.optim._slow_tier import round_stochastically
from brickyard.optim._streaming import Chain
from brickyard.optim.zo2 import Config


class Crash(BaseException):
    pass


def dying_at(fatal: int, write: Callable[..., int]) -> Callable[..., int]:
    """A write of which call number `fatal` puts half of its bytes on the disk and then ends the process."""
    left = fatal

    def pwrite(handle: int, view: memoryview, start: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            write(handle, view[: len(view) // 2], start)
            raise Crash
        return write(handle, view, start)

    return pwrite


def test_a_crash_at_any_write_loses_the_step_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(layers=2)
    expected = in_memory(model, 2)
    real, crashes = os.pwrite, 0
    for fatal in range(10):
        folder = tmp_path / str(fatal)
        empty, streamed = from_file(model, folder)
        monkeypatch.setattr(os, "pwrite", dying_at(fatal, real))
        done = 0
        try:
            for _ in range(2):
                train(empty, streamed, 1)
                done += 1
            streamed.flush()
        except Crash:
            crashes += 1
            if done < 2:
                with pytest.raises(RunFailed, match="interrupted"):
                    train(empty, streamed, 1)
        monkeypatch.setattr(os, "pwrite", real)
        streamed.tier.close()
        again, streamed = from_file(model, folder)
        assert streamed.steps == done
        train(again, streamed, 2 - done)
        streamed.flush()
        assert same(load_file(streamed.weights), expected), f"after a crash at write {fatal}"
    assert crashes == 9  # two steps and a flush of three writes each; then one run that nothing ends


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    model = decoder()
    expected = in_memory(model, 5)
    empty, streamed = from_file(model, tmp_path)
    train(empty, streamed, 2)
    with pytest.raises(Locked):
        from_file(model, tmp_path)
    streamed.tier.close()
    with pytest.raises(Changed, match=r"eps: was 0\.001, now 0\.01"):
        from_file(model, tmp_path, Config(eps=1e-2))
    empty, streamed = from_file(model, tmp_path)
    train(empty, streamed, 3)
    streamed.flush()
    assert same(load_file(streamed.weights), expected)


def test_a_run_goes_on_only_with_its_own_parameters_decay_and_weights(tmp_path: Path) -> None:
    model = decoder()
    empty, streamed = from_file(model, tmp_path)
    train(empty, streamed, 1)
    streamed.close()
    with pytest.raises(Changed, match=r"trained: 1 differ, such as norm\.weight \(was 0\.0, now left out\)"):
        from_file(model, tmp_path, frozen="norm.weight")
    with pytest.raises(Changed, match=r"decay: was 0\.0, now 0\.1.*trained: \d+ differ"):
        from_file(model, tmp_path, decay=0.1)
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] += 1
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(Changed, match=r"weights: was '[0-9a-f]{64}', now"):
        from_file(model, tmp_path)


def test_the_count_of_skipped_steps_is_in_the_files(tmp_path: Path) -> None:
    empty, streamed = from_file(decoder(), tmp_path)
    train(empty, streamed, 1)
    for _ in range(2):
        streamed.step(lambda: next_token_loss(empty, TOKENS) * float("nan"), 1e-2)
    streamed.close()
    _, streamed = from_file(decoder(), tmp_path)
    assert (streamed.steps, streamed.skipped, streamed.in_a_row) == (3, 2, 2)


def test_options_and_files_out_of_range_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ({"slots": 1}, {"slots": 0, "overlap": False}, {"eps": 0.0}, {"eps": float("nan")}):
        with pytest.raises(UsageError, match="expected"):
            Config(**bad)
    model = decoder()
    save_file(
        {n: p.detach() for n, p in model.named_parameters() if "blocks.2" not in n}, tmp_path / "base.safetensors"
    )
    with pytest.raises(BadBase, match=r"no tensor blocks\.2"):
        from_file(model, tmp_path)
    save_file({n: p.detach().flatten() for n, p in model.named_parameters()}, tmp_path / "base.safetensors")
    with pytest.raises(BadBase, match="the model has"):
        from_file(model, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(_slow_tier.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(DiskFull, match=r"two files of .* 1,000 bytes are free"):
            from_file(model, tmp_path / "small")
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Embedding(4, 4))
        nowhere.register_buffer("angles", torch.zeros(4))
        nowhere.append(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    with pytest.raises(Refused, match="buffer angles"):
        Chain.of(nowhere, ["1.0", "1.1"]).off_meta(nowhere, torch.device("cpu"))


def test_a_full_disk_in_the_middle_of_a_step_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    empty, streamed = from_file(model, tmp_path)
    train(empty, streamed, 1)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(DiskFull, match="last finished step"):
        patched.setattr(os, "pwrite", full)
        train(empty, streamed, 1)
    streamed.tier.close()
    empty, streamed = from_file(model, tmp_path)
    assert streamed.steps == 1
    train(empty, streamed, 1)
    streamed.flush()
    assert same(load_file(streamed.weights), in_memory(model, 2))


@pytest.mark.parametrize("act", ["flush", "close"])
@pytest.mark.parametrize("fatal", range(3))
def test_what_is_stored_outlives_a_flush_and_a_close_after_an_interrupted_step(
    tmp_path: Path, act: str, fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(layers=2)
    empty, streamed = from_file(model, tmp_path)
    train(empty, streamed, 2)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(os, "pwrite", dying_at(fatal, os.pwrite))
        train(empty, streamed, 1)
    if act == "flush":
        with pytest.raises(RunFailed, match="interrupted"):
            streamed.flush()
    streamed.close()
    again, streamed = from_file(model, tmp_path)  # the folder is free again
    assert streamed.steps == 2 and streamed.pending is not None
    train(again, streamed, 1)
    streamed.close()
    assert same(load_file(streamed.weights), in_memory(model, 3))


@pytest.mark.parametrize("fatal", range(3))
def test_a_flush_that_failed_is_not_carried_out_twice(
    tmp_path: Path, fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(layers=2)
    empty, streamed = from_file(model, tmp_path)
    train(empty, streamed, 2)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(os, "pwrite", dying_at(fatal, os.pwrite))
        streamed.flush()
    with pytest.raises(RunFailed, match="interrupted"):
        streamed.flush()
    streamed.close()
    _, streamed = from_file(model, tmp_path)
    streamed.close()
    assert same(load_file(streamed.weights), in_memory(model, 2))


def test_half_precision_in_the_slow_tier_halves_the_bytes_and_still_trains(tmp_path: Path) -> None:
    model = decoder()
    moved, found = {}, {}
    for store in ("same", "bfloat16"):
        empty, streamed = from_file(model, tmp_path / store, store=store)
        train(empty, streamed, 4)
        moved[store] = streamed.tier.bytes_read + streamed.tier.bytes_written
        with torch.no_grad():
            found[store] = float(next_token_loss(empty, TOKENS))
        assert load_file(streamed.weights)["blocks.0.down.weight"].dtype == (
            torch.float32 if store == "same" else torch.bfloat16
        )
    assert moved["bfloat16"] * 2 == moved["same"]
    assert found["bfloat16"] == pytest.approx(found["same"], rel=0.01)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e3, 1e3, width=32), st.integers(0, 2**64 - 1))
def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_on_average(x: float, key: int) -> None:
    x_n = torch.full((4000,), x)
    out_n = torch.empty(4000, dtype=torch.bfloat16)
    round_stochastically(x_n, out_n, key)
    bits = int(torch.tensor(x).view(torch.int32))
    down, up = torch.tensor([bits & -65536, (bits & -65536) + 65536], dtype=torch.int32).view(torch.float32)
    went_up = out_n.float() == up
    assert (went_up | (out_n.float() == down)).all()
    chance = (bits & 65535) / 65536
    # Five standard deviations, and a few draws more where the chance is next to nothing.
    assert abs(float(went_up.float().mean()) - chance) <= 5 * (chance * (1 - chance) / 4000) ** 0.5 + 3 / 4000
    again = torch.empty_like(out_n)
    round_stochastically(x_n, again, key)
    assert torch.equal(out_n, again)


@pytest.mark.filterwarnings("ignore:eps=")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_than_float32_are_rounded_stochastically_too(dtype: torch.dtype, tmp_path: Path) -> None:
    x_n = torch.full((4000,), 1.00390625, dtype=dtype)  # in the middle of two neighbours
    out_n = torch.empty(4000, dtype=torch.bfloat16)
    round_stochastically(x_n, out_n, 1)
    assert set(out_n.tolist()) == {1.0, 1.0078125}
    assert float(out_n.double().mean()) == pytest.approx(1.00390625, abs=3e-4)
    empty, streamed = from_file(decoder(dtype=dtype), tmp_path, store="bfloat16")
    train(empty, streamed, 1)
    streamed.close()


LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from brickyard.checks._decoder import Decoder, next_token_loss, random_tokens, write_random
from brickyard.optim.zo2 import Config, stream

folder = Path(sys.argv[1])
with torch.device("meta"):
    model = Decoder(vocabulary=200, width=256, layers=20)
base = folder / "base.safetensors"
write_random(base, model)
tokens = random_tokens(200, 2, 6)
made = stream(model.eval(), base, folder / "run", Config(), seed=1, blocks=model.block_names, sync=False)
made.step(lambda: next_token_loss(model, tokens), 1e-6)  # what the libraries take for themselves, they have taken
now = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + base.stat().st_size // 2,) * 2)
made.step(lambda: next_token_loss(model, tokens), 1e-6)
made.flush()
print("streamed", made.steps, base.stat().st_size)
try:
    held = load_file(made.weights)
    held = {name: tensor.clone() for name, tensor in held.items()}
except (RuntimeError, MemoryError) as error:
    print("in memory:", "memory" in str(error))
"""


def test_it_trains_under_a_limit_under_which_the_weights_do_not_fit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("streamed 2 ") and int(first.split()[-1]) > 50e6
    assert second == "in memory: True"
