"""HALO under FSDP2: shards share one scale, travel as one byte a value, and train as one process does."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_halo import gaussian, products
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from brickyard.core.errors import Refused
from brickyard.optim._halo_shards import GatheredWeight, How, ShardedWeight, gathered, quantise_shard
from brickyard.optim._low_precision import Codes
from brickyard.optim.halo import Config, convert, gather_codes, over_inputs

STEPS, RATE = 3, 0.05


def on_two_ranks(work: Callable[..., Any], tmp_path: Path, *given: Any) -> list[Any]:
    """What `work(rank, *given)` returns in each of two processes of one gloo group."""
    tmp_path.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    ranks = [context.Process(target=_rank, args=(work, i, str(tmp_path / "m"), given, out)) for i in range(2)]
    for rank in ranks:
        rank.start()
    found = dict(out.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert all(ok for ok, _ in found.values()), found
    return [found[0][1], found[1][1]]


def _rank(work: Callable[..., Any], rank: int, meeting: str, given: tuple[Any, ...], out: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        out.put((rank, (True, work(rank, *given))))
        dist.destroy_process_group()
    except BaseException as error:  # the other process waits for nobody, and the test says why
        out.put((rank, (False, repr(error))))
        raise


def shard(rank: int, w: np.ndarray) -> tuple[float, np.ndarray]:
    """Quantise a rank's rows and gather everybody's."""
    part = torch.from_numpy(w)[rank * 6 : rank * 6 + 6]
    codes = quantise_shard(F.pad(part, (0, 0, 0, 6 - len(part))), How(2, "int8"))
    parts = [torch.empty(6, 24, dtype=torch.int8) for _ in range(2)]
    dist.all_gather(parts, codes.values)
    whole = gathered(torch.cat(parts), codes.scale, len(w))
    return float(codes.scale), whole.values.numpy()


def test_two_shards_have_one_scale_and_give_the_codes_of_the_whole(tmp_path: Path) -> None:
    w = gaussian(11, 24)  # one row fewer than two shards hold
    w[8] *= 50  # the largest value is the second rank's
    whole = over_inputs(w, Config())
    found = on_two_ranks(shard, tmp_path, w.numpy())
    assert {scale for scale, _ in found} == {float(whole.scale)}
    x, e = gaussian(5, 24, seed=1), gaussian(5, 11, seed=2)
    for scale, values in found:
        np.testing.assert_array_equal(values, whole.values)
        ready = Codes(torch.from_numpy(values), torch.tensor(scale))
        for a, b in zip(products(x, w, e, Config(), ready), products(x, w, e, Config()), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(Refused, match="gave 11 rows of a weight of 12"):
        gathered(whole.values, whole.scale, 12)


def model_of(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train()


def ids_of(step: int, rank: int) -> torch.Tensor:
    return torch.randint(4, 27, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: Any, step: int, rank: int) -> torch.Tensor:
    ids = ids_of(step, rank)
    return model(input_ids=ids, labels=ids).loss


class Carried:
    """The all-gather of FSDP's own, which counts what a rank sends."""

    def __init__(self) -> None:
        self.bytes = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        self.bytes += input_tensor.nbytes
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


def sharded(rank: int, folder: str, config: Config, frozen: str, as_codes: bool) -> dict[str, Any]:
    """Train a few steps under FSDP2; the losses, the weights, and what the all-gathers carried."""
    model = model_of(folder)
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    convert(model, config)
    names = gather_codes(model) if as_codes else []
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    carried = Carried()
    for block in model.model.layers:
        block.set_custom_all_gather(carried)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, step, rank)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    sent = carried.bytes
    locals_ = {name: type(model.get_parameter(name)._local_tensor) for name in names}
    weights = {name: p.full_tensor().detach().numpy().copy() for name, p in model.named_parameters()}
    with torch.no_grad():
        at_rest = float(loss_of(model.eval(), 0, 0))
    return {
        "losses": losses,
        "weights": weights,
        "carried": sent,
        "kinds": {kind.__name__ for kind in locals_.values()},
        "at_rest": at_rest,
    }


@pytest.mark.parametrize(
    ("config", "frozen"), [(Config(level=2), ""), (Config(level=0, dtype="fp8"), ""), (Config(level=1), "mlp")]
)
def test_two_ranks_train_as_one_process_does_with_a_byte_a_value(
    config: Config, frozen: str, causal_base: Path, tmp_path: Path
) -> None:
    alone = model_of(str(causal_base))
    for name, p in alone.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    convert(alone, config)
    optimiser = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for step in range(STEPS):
        both = [loss_of(alone, step, rank) for rank in range(2)]
        torch.stack(both).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append([float(loss.detach()) for loss in both])
    ranks = on_two_ranks(sharded, tmp_path, str(causal_base), config, frozen, True)
    exact = on_two_ranks(sharded, tmp_path / "exact", str(causal_base), config, frozen, False)[0]
    for rank, found in enumerate(ranks):
        np.testing.assert_allclose(found["losses"], [pair[rank] for pair in losses], rtol=1e-5)
        for name, p in alone.named_parameters():
            np.testing.assert_allclose(found["weights"][name], p.detach().numpy(), atol=2e-5, err_msg=name)
        assert found["kinds"] == {"ShardedWeight"}
    inside = sum(p.numel() for name, p in alone.named_parameters() if "layers" in name and p.ndim == 2)
    # Forward and backward gather a block's weights once each; every rank sends its half.
    assert exact["carried"] - ranks[0]["carried"] == pytest.approx(2 * STEPS * inside * 3 / 2, rel=0.05)


def test_at_rest_the_weights_are_read_as_rounded(causal_base: Path, tmp_path: Path) -> None:
    found = on_two_ranks(sharded, tmp_path, str(causal_base), Config(level=1), "", True)[0]
    model = model_of(str(causal_base)).eval()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in found["weights"].items()}, strict=False)
    with torch.no_grad():
        assert found["at_rest"] == pytest.approx(float(loss_of(model, 0, 0)), rel=0.02)


def test_a_shard_cuts_copies_and_is_stored_as_what_it_holds(tmp_path: Path) -> None:
    w = gaussian(6, 8)
    mine = ShardedWeight(w, How(1, "int8"))
    for part in (*mine.split(2), mine.clone(), mine[1:4], mine.view(8, 6), mine.to(torch.float64)):
        assert isinstance(part, ShardedWeight) and part.how.level == 1
    assert torch.equal(mine[4:] + 0, w[4:])
    assert type(mine + 1) is torch.Tensor and torch.equal(mine + 1, w + 1)
    before = mine.held
    assert mine.add_(1) is mine and mine.held is before
    torch.save(mine, tmp_path / "stored")  # as distributed checkpoints do, which are read without Brickyard
    stored = torch.load(tmp_path / "stored", weights_only=True)
    assert type(stored) is torch.Tensor and torch.equal(stored, before)
    codes = over_inputs(w, Config(level=1))
    back = GatheredWeight(codes, How(1, "int8"), torch.float32)
    assert float((back @ torch.eye(8) - w).abs().max()) <= 2 * float(codes.scale)
    assert repr(mine).startswith("ShardedWeight") and repr(back).startswith("GatheredWeight")


def test_what_cannot_be_gathered_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, n_positions=16))
    with pytest.raises(Refused, match="convert"):
        gather_codes(gpt2)
    convert(gpt2, Config())
    with pytest.raises(Refused, match="Conv1D"):
        gather_codes(gpt2)


def test_a_weight_of_two_layers_stays_one(causal_base: Path) -> None:
    model = model_of(str(causal_base))
    first, second = (layer.mlp.up_proj for layer in model.model.layers[:2])
    second.weight = first.weight
    convert(model, Config())
    names = gather_codes(model)
    assert first.weight is second.weight and isinstance(first.weight, ShardedWeight)
    assert isinstance(first.weight, nn.Parameter) and first.weight.requires_grad
    assert set(names) <= set(dict(model.named_parameters(remove_duplicate=False)))
