"""ZO2: bit-equal to ZO-SGD in memory, every block moved once a step, two passes in turns, and a step of the loop."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import documents, text_data
from safetensors.torch import load_file
from streaming import EPS, LAYERS, LR, TOKENS, decoder, from_file, from_host, in_memory, same, train, values
from torch import Tensor, nn

from brickyard.checks._decoder import Decoder, next_token_loss
from brickyard.core import brick as bricks
from brickyard.core import measure, noise, trial
from brickyard.core.build import build, step_of
from brickyard.core.errors import NotFinite, Refused, RunFailed
from brickyard.optim._lockstep import Lockstep
from brickyard.optim._streaming import Chain, Streamed
from brickyard.optim._zo_optimizer import ZerothOrder
from brickyard.optim.zo2 import Config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("slots", "overlap"), [(1, False), (2, True), (3, True)])
def test_weights_equal_zo_sgd_in_memory_bit_for_bit(slots: int, overlap: bool, tied: bool, tmp_path: Path) -> None:
    model = decoder(tied=tied)
    expected = in_memory(model, 3, decay=0.1)
    empty, streamed = from_file(model, tmp_path, Config(slots=slots, overlap=overlap), decay=0.1)
    train(empty, streamed, 3)
    streamed.flush()
    assert same(load_file(streamed.weights), expected)
    assert not same(expected, values(model))


@pytest.mark.filterwarnings("ignore:eps=")  # most of eps z rounds away in bfloat16: that both do alike is the point
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_memory_serves_as_well_as_files(dtype: torch.dtype) -> None:
    model = decoder(dtype=dtype)
    expected = in_memory(model, 3)
    streamed = from_host(model)
    train(model, streamed, 3)
    streamed.flush()
    assert same(values(model), expected)


@pytest.mark.parametrize("where", ["inside the loss", "around the step"])
def test_both_passes_compute_under_the_same_autocast_and_with_their_own_casts(where: str) -> None:
    """The second computed in float32, or with what autocast kept of the first's weights."""

    def autocast(active: bool) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=active)

    def loss_of(model: Decoder, inside: bool) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with autocast(inside or torch.is_autocast_enabled("cpu")):
                return next_token_loss(model, TOKENS)

        return loss

    found = []
    for inside in (True, where == "inside the loss"):
        held = decoder()
        optimiser = ZerothOrder(list(held.parameters()), lr=LR, eps=EPS, seed=7)
        for _ in range(2):
            with autocast(not inside):
                optimiser.step(loss_of(held, inside))
        found.append(values(held))
    model = decoder()
    streamed = from_host(model)
    for _ in range(2):
        with autocast(where == "around the step"):
            streamed.step(loss_of(model, where == "inside the loss"), LR)
    streamed.flush()
    assert same(values(model), found[0]) and same(found[1], found[0])


def test_a_model_that_drops_out_is_refused_and_memory_that_is_out_is_no_chain_s_fault() -> None:
    model = decoder()
    model.blocks[1].extra = nn.Dropout(0.5)
    streamed = from_host(model)
    model.blocks[1].train()
    with pytest.raises(Refused, match="drops out"):
        train(model, streamed, 1)
    model.eval()

    def full() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        streamed.step(full, LR)
    assert not getattr(raised.value, "__notes__", [])


def test_an_update_waits_until_its_weight_is_read_and_is_carried_out_once() -> None:
    model = decoder()
    start, expected = values(model), in_memory(model, 1)
    streamed = from_host(model)
    train(model, streamed, 1)
    assert streamed.pending is not None and not same(values(model), expected)
    # Until then a weight is where the second forward left it.
    assert all((values(model)[n] - start[n]).abs().max() < 6 * EPS for n in start)
    streamed.flush()
    assert same(values(model), expected)
    streamed.flush()
    assert same(values(model), expected)


def test_any_other_forward_finds_the_weights_up_to_date() -> None:
    model = decoder()
    expected = copy.deepcopy(model)
    expected.load_state_dict({**expected.state_dict(), **in_memory(model, 2)})
    streamed = from_host(model)
    train(model, streamed, 2)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), expected(TOKENS))
    streamed.close()
    with torch.no_grad():
        assert torch.equal(model(TOKENS), expected(TOKENS))


def test_each_block_is_read_once_and_written_once_a_step(tmp_path: Path) -> None:
    model = decoder()
    empty, streamed = from_file(model, tmp_path)
    train(empty, streamed, 3)
    assert streamed.tier.reads == streamed.tier.writes == [3] * LAYERS
    size = streamed.tier.blocks[0].bytes
    assert streamed.tier.bytes_read == streamed.tier.bytes_written == 3 * LAYERS * size
    streamed.flush()
    assert streamed.tier.reads == streamed.tier.writes == [4] * LAYERS


@pytest.mark.parametrize("tied", [False, True])
def test_no_more_than_ends_and_three_blocks_are_in_memory(tied: bool, tmp_path: Path) -> None:
    """Counted over all tensors that live, not only by the streaming's own word."""
    model = decoder(tied=tied, layers=12)
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    ends = 2 * model.embedding.weight.nbytes + model.norm.weight.nbytes  # embedding and head
    everything = ends + 12 * block
    del model
    seen = []

    def look(*_: Any) -> None:
        alive = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors()}
        seen.append(sum(alive.values()))

    noise.table(torch.device("cpu"))
    gc.collect()
    gc.freeze()  # what was there before is not looked at again
    try:
        empty, streamed = from_file(decoder(tied=tied, layers=12), tmp_path)
        for layer in empty.blocks:
            layer.register_forward_hook(look)
        train(empty, streamed, 1)
    finally:
        gc.unfreeze()
    activations = 10 * TOKENS[::3].numel() * 16 * 4
    assert len(seen) == 2 * 12
    assert 2 * block < max(seen) <= ends + 3 * block + activations < everything / 2
    assert streamed.fast_bytes <= ends + 3 * block


def _tensors() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and not x.is_meta]


def test_a_loss_that_is_no_number_changes_nothing_then_or_later() -> None:
    model, twin = decoder(), decoder()
    streamed, plain = from_host(model), from_host(twin)
    streamed.step(lambda: next_token_loss(model, TOKENS) * float("nan"), LR)
    plain.steps = 1
    assert streamed.skipped == 1
    train(model, streamed, 1)
    train(twin, plain, 1)
    streamed.flush()
    plain.flush()
    close = {name: (p - values(twin)[name]).abs().max() for name, p in values(model).items()}
    assert max(close.values()) < 1e-5  # the way to theta - eps z and back rounds


def test_both_forwards_are_made_with_both_signs_of_one_noise() -> None:
    """On a loss that is linear in the weights, the slope is <a, z> whatever eps is."""
    model = decoder()
    block = model.blocks[2]
    a = torch.randn(block.down.weight.shape, generator=torch.Generator().manual_seed(3))
    streamed = from_host(model)
    forward, sums, calls = block.forward, [], []

    def summing(h: Tensor) -> Tensor:
        sums.append((a * block.down.weight).sum())
        return forward(h)

    block.forward = summing

    def loss() -> Tensor:
        calls.append(len(calls))
        place = calls[-1]
        model(TOKENS)
        return sums[place]

    streamed.step(loss, LR)
    number = [name for name, _ in model.named_parameters()].index("blocks.2.down.weight")
    z = noise.normal(noise.key(7, 0, 0, 0), number, 0, a.numel())
    assert streamed.pending is not None
    assert streamed.pending.slope == pytest.approx(float((a.flatten() * z).sum()), rel=1e-2)


def test_a_run_of_losses_that_are_no_numbers_is_given_up_and_the_weights_stay() -> None:
    model = decoder()
    start, streamed = values(model), from_host(model)
    broken = lambda: next_token_loss(model, TOKENS) * float("nan")  # noqa: E731
    for _ in range(19):
        streamed.step(broken, LR)
    train(model, streamed, 1)  # one that is a number begins the count anew
    assert streamed.in_a_row == 0
    for _ in range(19):
        streamed.step(broken, LR)
    with pytest.raises(NotFinite, match="in 20 zeroth-order steps in a row, up to step 40"):
        streamed.step(broken, LR)
    streamed.close()
    assert all((values(model)[n] - p).abs().max() < 0.5 for n, p in start.items())


class Stopped(BaseException):
    pass


def interrupted(model: Decoder, streamed: Streamed, *, block: int = 1) -> None:
    """Take a step that breaks off in one of the blocks, in the second forward."""
    calls = []

    def stop(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise Stopped

    hook = model.blocks[block].register_forward_hook(stop)
    with pytest.raises(Stopped):
        train(model, streamed, 1)
    hook.remove()


def test_an_interrupted_run_neither_flushes_nor_computes_nor_takes_other_weights() -> None:
    model = decoder()
    streamed = from_host(model)
    train(model, streamed, 1)
    interrupted(model, streamed)
    ends = [tensor.clone() for unit in streamed.chain.ends for tensor in unit.tensors]
    for act in (streamed.flush, streamed.forget, lambda: model(TOKENS), lambda: train(model, streamed, 1)):
        for _ in range(2):
            with pytest.raises(RunFailed, match="interrupted"), torch.no_grad():
                act()
    streamed.close()
    now = [tensor for unit in streamed.chain.ends for tensor in unit.tensors]
    assert all(torch.equal(a, b) for a, b in zip(ends, now, strict=True)), "no second update of the ends"
    assert not streamed.chain.blocks[0].module._forward_pre_hooks


def twice(model: Decoder) -> Tensor:
    next_token_loss(model, TOKENS)
    return next_token_loss(model, TOKENS)


def backwards(model: Decoder) -> Tensor:
    h = model.embedding(TOKENS)
    for block in reversed(model.blocks):
        h = block(h)
    return h.mean()


def without_one(model: Decoder) -> Tensor:
    h = model.embedding(TOKENS)
    for block in list(model.blocks)[:-1]:
        h = block(h)
    return h.mean()


class Wanders:
    """Takes another way in the second forward."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Decoder) -> Tensor:
        self.calls += 1
        return next_token_loss(model, TOKENS) if self.calls == 1 else backwards(model)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(twice, "computes twice"), (backwards, "out of its turn"), (without_one, "left out 1"), (Wanders(), "same way")],
)
def test_what_is_no_chain_is_refused(loss: Callable[[Decoder], Tensor], message: str) -> None:
    model = decoder()
    with pytest.raises(Refused, match=message):
        from_host(model).step(lambda: loss(model), LR)


def test_a_weight_read_behind_its_modules_back_is_an_error_and_not_a_wrong_sign() -> None:
    model = decoder()

    def tied_by_hand() -> Tensor:
        h = model.embedding(TOKENS)
        for block in model.blocks:
            h = block(h)
        return nn.functional.linear(h, model.embedding.weight).mean()

    with pytest.raises(RuntimeError) as raised:
        from_host(model).step(tied_by_hand, LR)
    assert "is empty while" in raised.value.__notes__[0]


def test_a_block_that_shares_a_weight_is_refused() -> None:
    model = decoder()
    model.blocks[1].down.weight = model.blocks[2].down.weight
    with pytest.raises(Refused, match=r"held by blocks.1 and blocks.2"):
        Chain.of(model, model.block_names)
    with pytest.raises(Refused, match="no chain"):
        Chain.of(model, ["blocks.0"])


class Twice(nn.Module):
    def __init__(self, turns: Lockstep) -> None:
        super().__init__()
        self.turns = turns

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.turns.run(lambda: a @ a)


def test_two_passes_take_turns_and_the_first_error_is_the_one_reported() -> None:
    steps: list[tuple[int, int]] = []
    turns = Lockstep()

    def walk() -> int:
        for place in range(3):
            steps.append((place, turns.current))
            turns.hand_over()
        return turns.current

    assert turns.run(walk) == (0, 1)
    assert steps == [(place, number) for place in range(3) for number in (0, 1)]
    a = torch.ones(3, 3)
    assert measure.forward_flops(Twice(turns), {"a": a}) == 2 * 2 * 3**3  # who counts operators sees both passes
    for faulty in (0, 1):

        def fail(faulty: int = faulty) -> None:
            turns.hand_over()
            if turns.current == faulty:
                raise ValueError(f"pass {faulty}")
            turns.hand_over()

        with pytest.raises(ValueError, match=f"pass {faulty}"):
            turns.run(fail)


def run(arm: str, base: Path, folder: Path, **changes: Any) -> dict[str, Tensor]:
    training = {"steps": 6, "batch": 8, "lr": 1e-3, "precision": "float32", **changes.pop("training", {})}
    data = changes.pop("data", text_data(48, 20))
    asked = trial.Setting(arm=arm, base=str(base), data=data, training=training, cache=False, device="cpu", **changes)
    trial.tune(trial.prepare(asked), folder, checkpoint_every=changes.get("checkpoint_every", 0))
    return bricks.load(folder / "brick").tensors()


@pytest.mark.parametrize("tuner", ["full", "lora:r=4"])
def test_an_arm_on_the_loop_equals_zo_sgd(tuner: str, text_base: Path, tmp_path: Path) -> None:
    expected = run(f"{tuner} + zo-sgd", text_base, tmp_path / "sgd", training={"wd": 0.1})
    found = run(f"{tuner} + zo2", text_base, tmp_path / "zo2", training={"wd": 0.1})
    assert same(found, expected)


def test_a_language_model_with_a_tied_head_equals_zo_sgd(causal_base: Path, tmp_path: Path) -> None:
    options = {"data": documents(), "task": "causal-lm", "training": {"batch": 4}}
    expected = run("full + zo-sgd", causal_base, tmp_path / "sgd", **copy.deepcopy(options))
    assert same(run("full + zo2", causal_base, tmp_path / "zo2", **options), expected)


def test_a_checkpoint_on_the_loop_resumes_exactly(text_base: Path, tmp_path: Path) -> None:
    asked = trial.Setting(
        arm="full + zo2",
        base=str(text_base),
        data=text_data(48, 20),
        training={"steps": 6, "batch": 8, "lr": 1e-3, "evaluate_every": 4},
        cache=False,
        device="cpu",
    )

    class Stop:
        def point(self, state: Any) -> None:
            if state.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.tune(trial.prepare(asked), tmp_path / "a", checkpoint_every=3, callbacks=(Stop(),))
    trial.tune(trial.prepare(asked), tmp_path / "a", checkpoint_every=3)
    result = trial.tune(trial.prepare(asked), tmp_path / "b")
    assert same(bricks.load(tmp_path / "a" / "brick").tensors(), bricks.load(tmp_path / "b" / "brick").tensors())
    assert result["step"]["blocks"] == 2 and result["step"]["updates_skipped"] == 0
    assert result["receipt"]["moved"] and asdict(asked)["arm"] == result["arm"]


def test_a_checkpoint_of_an_interrupted_step_is_refused(text_base: Path) -> None:
    made, step, state, batch = ready_to_step("full + zo2", text_base)
    step(state, [(1.0, batch)])
    hook = made.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(Stopped()))
    with pytest.raises(Stopped):
        step(state, [(1.0, batch)])
    hook.remove()
    with pytest.raises(RunFailed, match="interrupted"):
        made.tensors()


def ready_to_step(arm: str, base: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    asked = trial.Setting(
        arm=arm, base=str(base), data=text_data(48, 20), training={"steps": 6, "batch": 8}, cache=False, device="cpu"
    )
    ready = trial.prepare(asked, ("train",))
    made = build(ready.plan, ready.base, ready.task, seed=0)
    step = step_of(ready.plan, 48, ready.task)(made, ready.training)
    state = trial._bare_state(made, ready, torch.device("cpu"))
    return made, step, state, ready.encoded["train"].collate(np.arange(8))


def test_the_count_of_skipped_steps_travels_with_a_checkpoint(text_base: Path) -> None:
    broken = {"extra_loss": lambda: torch.tensor(float("nan"))}
    made, step, state, batch = ready_to_step("full + zo2", text_base)
    step(state, [(1.0, batch)])
    step.attached = replace(made, **broken)
    for _ in range(12):
        step(state, [(1.0, batch)])
    made, again, state, batch = ready_to_step("full + zo2", text_base)
    again.load_state_dict(step.state_dict())
    assert again.report()["updates_skipped"] == 12
    again.attached = replace(made, **broken)
    for _ in range(7):
        again(state, [(1.0, batch)])
    with pytest.raises(NotFinite, match="20 zeroth-order steps in a row"):
        again(state, [(1.0, batch)])


@pytest.mark.parametrize(("arm", "message"), [("ce-ssl", "draws anew"), ("adalora:tinit=0.1", "works on gradients")])
def test_tuners_that_fit_no_zeroth_order_step_are_refused(
    arm: str, message: str, text_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=message):
        run(f"{arm} + zo2", text_base, tmp_path)


def test_accumulated_batches_are_refused(text_base: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="accumulation=2"):
        run("full + zo2", text_base, tmp_path, training={"accumulation": 2})
