"""SPDF: masks that hold, dense fine-tuning that begins where they end, counted FLOPs, exact resume, the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import documents
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from brickyard.core import measure
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split
from brickyard.core.errors import BadBrick, Refused, Unmatched, UsageError
from brickyard.core.files import read_tensors, write_tensors
from brickyard.core.loop import Backprop, State, Training, train
from brickyard.core.task import Task
from brickyard.grow._static_masks import FILE, StaticMasks, draw, pack, unpack
from brickyard.grow._training_flops import count_flops
from brickyard.grow.spdf import (
    Config,
    SparsityCallback,
    apply_static_sparsity,
    densify,
    densities,
    load_masks,
    masked_weights,
    support,
)

LM = Task("causal-lm", "nats_per_token", None, 1, "text")
SIZES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6
)
SPARSITY = st.floats(0, 0.95)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, tie_word_embeddings=True, use_cache=False, **{**sizes, **changes})
    )


def batch(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 40, (rows, 12), generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int = 0) -> None:
    ids = batch(seed=seed)
    LM.loss(model(input_ids=ids).logits, ids.roll(-1, 1)).backward()


def off_support(masks: StaticMasks, what: str = "data") -> torch.Tensor:
    return torch.cat([getattr(w, what)[~masks.mask(name)] for name, w in masks.weights.items()])


@settings(deadline=None, derandomize=True)
@given(SIZES, SPARSITY, st.sampled_from(["uniform", "erk"]))
def test_densities_keep_the_wanted_share_of_all_weights(shapes: dict, s: float, scheme: str) -> None:
    found, total = densities(shapes, s, scheme), sum(map(math.prod, shapes.values()))
    assert all(0 < share <= 1 + 1e-9 for share in found.values())
    assert sum(found[n] * math.prod(shapes[n]) for n in shapes) == pytest.approx((1 - s) * total)
    if scheme == "uniform":
        assert set(found.values()) == {1 - s}
    elif s:
        # Erdos-Renyi: shares of the matrices that are not dense go as (rows + columns) / (rows * columns).
        scale = [found[n] * math.prod(shapes[n]) / sum(shapes[n]) for n in shapes if found[n] < 1]
        assert max(scale, default=1) == pytest.approx(min(scale, default=1))


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), SPARSITY, st.integers(0, 5))
def test_a_mask_has_its_exact_number_of_ones_and_packs_into_bits(rows: int, columns: int, s: float, seed: int) -> None:
    kept = round((1 - s) * rows * columns)
    mask = draw((rows, columns), kept, seed=seed, name="a")
    assert int(mask.sum()) == kept and torch.equal(mask, draw((rows, columns), kept, seed=seed, name="a"))
    bits = pack(mask)
    assert bits.numel() == math.ceil(rows * columns / 8) and torch.equal(unpack(bits, (rows, columns)), mask)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SPARSITY)
def test_every_block_matrix_keeps_the_same_share_and_nothing_else_is_touched(s: float) -> None:
    model, whole = llama(), llama()
    masks = apply_static_sparsity(model, s) if s < 0.8 else None
    if masks is None:
        with pytest.warns(UserWarning, match="dead units"):
            masks = apply_static_sparsity(model, s)
    assert len(masks.weights) == 2 * 7
    assert masks.kept == {name: round((1 - s) * w.numel()) for name, w in masks.weights.items()}
    dense = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if name in masks.weights:
            assert torch.equal(parameter, dense[name].where(masks.mask(name), 0))
        else:
            assert torch.equal(parameter, dense[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head.weight" not in masks.weights


def test_masks_follow_from_the_seed_and_the_layers_name_alone() -> None:
    all_layers = apply_static_sparsity(llama(), 0.5, 3)
    some = apply_static_sparsity(llama(), 0.5, 3, ["query", "down"])
    other = apply_static_sparsity(llama(), 0.5, 4)
    assert len(some.weights) == 4
    for name in some.weights:
        assert torch.equal(some.mask(name), all_layers.mask(name)) and not torch.equal(
            some.mask(name), other.mask(name)
        )
    drawn = [all_layers.mask(n) for n in all_layers.weights if n.endswith("q_proj.weight")]
    assert not torch.equal(*drawn)


def adamw_steps(model: nn.Module, steps: int, optimiser: torch.optim.Optimizer, masks: StaticMasks | None) -> None:
    for step in range(steps):
        backward(model, step)
        if masks is not None:
            assert not off_support(masks, "grad").any()
        optimiser.step()
        if masks is not None:
            masks.after_step(None)
        optimiser.zero_grad()


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 100), (torch.bfloat16, 10)])
def test_masked_weights_stay_exactly_zero_through_a_hundred_steps_with_decay(dtype: torch.dtype, steps: int) -> None:
    model = llama().to(dtype)
    masks = apply_static_sparsity(model, 0.75)
    before = {name: w.detach().clone() for name, w in masks.weights.items()}
    adamw_steps(model, steps, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), masks)
    assert not off_support(masks).any()
    for name, w in masks.weights.items():
        assert ((w != before[name]) & masks.mask(name)).sum() > 0.9 * masks.kept[name]


def test_the_gradient_hook_alone_keeps_moments_clean_and_the_step_hook_alone_stops_old_momentum() -> None:
    model = llama()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    adamw_steps(model, 3, optimiser, None)
    masks = apply_static_sparsity(model, 0.5)
    backward(model)
    optimiser.step()
    assert off_support(masks).any()  # what was learned before moves on
    masks.after_step(None)
    assert not off_support(masks).any()
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimiser.zero_grad()
    backward(model)
    fresh.step()
    assert not off_support(masks).any()
    for name, w in masks.weights.items():
        assert not fresh.state[w]["exp_avg"][~masks.mask(name)].any()


def test_clipping_sees_only_gradients_of_weights_that_exist_over_several_micro_batches() -> None:
    model, dense = llama(), llama()
    masks = apply_static_sparsity(model, 0.75)
    dense.load_state_dict(model.state_dict())
    for seed in (1, 2, 3):
        backward(model, seed)
        backward(dense, seed)
    expected = 0.0
    for name, p in dense.named_parameters():
        assert p.grad is not None
        kept = p.grad.where(masks.mask(name), 0) if name in masks.weights else p.grad
        torch.testing.assert_close(model.get_parameter(name).grad, kept, rtol=1e-4, atol=1e-7)
        expected += float(kept.double().square().sum())
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    assert float(norm) == pytest.approx(math.sqrt(expected), rel=1e-5)
    blocks = [nn.utils.get_total_norm([m.get_parameter(n).grad for n in masks.weights]) for m in (model, dense)]  # type: ignore[misc]
    assert float(blocks[0]) < 0.7 * float(blocks[1])


def test_nan_off_the_support_is_cleared_and_on_it_is_seen() -> None:
    model = llama()
    masks = apply_static_sparsity(model, 0.5)
    name, weight = next(iter(masks.weights.items()))
    weight.register_hook(lambda g: g.masked_fill(~masks.mask(name), math.nan))
    backward(model)
    assert weight.grad is not None and weight.grad.isfinite().all()
    with torch.no_grad():
        weight.masked_fill_(~masks.mask(name), math.nan)
    masks.clear()
    assert weight.isfinite().all()
    weight.register_hook(lambda g: g.masked_fill(masks.mask(name), math.nan))
    backward(model)
    assert weight.grad.isnan().any()


def test_dense_fine_tuning_starts_from_the_same_function_and_trains_every_weight() -> None:
    model = llama()
    masks = apply_static_sparsity(model, 0.75)
    with torch.no_grad():
        before = model(input_ids=batch()).logits
        assert densify(model) is model
        assert torch.equal(model(input_ids=batch()).logits, before)
    assert not off_support(masks).any()
    backward(model)
    assert (off_support(masks, "grad") != 0).float().mean() > 0.9
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert off_support(masks).any()


def test_rescaling_restores_the_variance_of_a_layers_output() -> None:
    plain, wide = llama(hidden_size=256, intermediate_size=256), llama(hidden_size=256, intermediate_size=256)
    masks = apply_static_sparsity(wide, 0.75, rescale=True)
    x = torch.randn(512, 256)
    for name, weight in masks.weights.items():
        dense = plain.get_parameter(name)
        kept = masks.mask(name)
        torch.testing.assert_close(weight[kept], dense[kept] * (weight.numel() / masks.kept[name]) ** 0.5)
        if "layers.0" in name:
            assert float((x @ weight.detach().t()).var() / (x @ dense.detach().t()).var()) == pytest.approx(1, abs=0.1)


def test_dead_units_are_counted_and_warned_of() -> None:
    layer = nn.Linear(4, 3, bias=False)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1], mask[:, 2], mask[:, 3] = False, False, False
    assert StaticMasks({"w": layer.weight}, {"w": mask}).dead() == {"w": (1, 2)}
    with pytest.warns(UserWarning, match="dead units in .* lower it"):
        apply_static_sparsity(llama(), 0.97)


def test_flops_match_a_count_by_hand_and_the_forward_pass() -> None:
    context = 16
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            use_cache=False,
            tie_word_embeddings=True,
        )
    )
    masks = apply_static_sparsity(model, 0.5)
    found = count_flops(model, masks.kept, context)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # query, key and value, out; gate, up, down
    head, attention = 40 * 32, 2 * (2 * context * 4 * 8)  # scores and mixing, a multiply-add two operations
    assert (found.maskable, found.kept, found.fixed) == (block, block // 2, head)
    assert found.dense == 3 * (2 * (block + head) + attention)
    assert found.sparse == 3 * (2 * (block // 2 + head) + attention)
    forward = measure.forward_flops(model, {"input_ids": torch.zeros(2, context, dtype=torch.long)})
    assert 3 * forward == 2 * context * found.dense  # zeros are multiplied in full: the masks save nothing here
    report = found.compared(tokens=1000, steps=50, seconds=7.0)
    assert report["equal_steps"]["dense_flops"] == 1000 * found.dense
    assert report["equal_flops"]["dense_steps"] == math.floor(50 * found.sparse / found.dense)
    assert report["equal_time"]["dense_steps"] == 50 and "saved no time" in report["equal_time"]["note"]


def test_the_papers_largest_model_needs_two_and_a_half_times_fewer_flops() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=2048, n_layer=24, n_head=16, n_positions=2048))
    weights = masked_weights(model, "blocks")
    assert len(weights) == 24 * 4 and sum(w.numel() for w in weights.values()) == 24 * 12 * 2048**2
    kept = support({name: tuple(w.shape) for name, w in weights.items()}, 0.75, "uniform")
    assert count_flops(model, kept, 2048).ratio == pytest.approx(2.5, abs=0.05)


class Interrupt(Exception):
    pass


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: State) -> None:
        if state.step + 1 == self.step:
            raise Interrupt


def attached(seed: int, compact: bool) -> tuple[Attached, StaticMasks]:
    model = llama()
    masks = apply_static_sparsity(model, 0.75, seed, compact=compact)
    return masks.join(attach_in_place(model, [n for n, _ in model.named_parameters()], matched={})), masks


@pytest.mark.parametrize("compact", [False, True])
def test_resume_restores_the_masks_before_the_first_step_bit_for_bit(
    causal_base: Path, tmp_path: Path, compact: bool
) -> None:
    rows = encode(Split(documents()["train"]), open_base(str(causal_base)), LM, max_length=16)
    training = Training(lr=1e-2, wd=0.1, steps=14, batch=4, checkpoint_every=4)
    whole, masks = attached(0, compact)
    train(whole, rows, None, LM, training, device="cpu")
    with pytest.raises(Interrupt):
        train(attached(0, compact)[0], rows, None, LM, training, folder=tmp_path, callbacks=[StopAt(10)], device="cpu")
    again, restored = attached(9, compact)  # what a new process draws must not matter
    train(again, rows, None, LM, training, folder=tmp_path, device="cpu")
    expected, found = whole.tensors(), again.tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(restored.mask(name), masks.mask(name)) for name in masks.weights)
    assert not off_support(masks).any()


def test_compact_optimiser_state_gives_the_same_run_from_moments_of_existing_weights_alone(causal_base: Path) -> None:
    rows = encode(Split(documents()["train"]), open_base(str(causal_base)), LM, max_length=16)
    training = Training(lr=1e-2, wd=0.1, steps=10, batch=4, accumulation=2, clip=0.5)
    found, sizes = [], []

    class Kept(Backprop):
        def __init__(self, made: Attached, training: Training) -> None:
            super().__init__(made, training)
            steps.append(self)

    for compact in (False, True):
        made, masks = attached(0, compact)
        steps: list[Backprop] = []
        train(made, rows, None, LM, training, make_step=Kept, device="cpu")
        found.append(made.tensors())
        sizes.append(measure.optimiser_bytes(steps[0].optimiser))
        assert not off_support(masks).any()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)
    masked = sum(w.numel() for w in masks.weights.values())
    assert sizes[0] - sizes[1] == 2 * 4 * (masked - sum(masks.kept.values()))
    backward(made.model)
    assert all(w.grad is None for w in masks.weights.values())


def test_the_mask_file_is_an_eighth_of_a_byte_a_weight_and_is_read_back(tmp_path: Path) -> None:
    model = llama()
    masks = apply_static_sparsity(model, 0.75, scheme="erk")
    masks.write(tmp_path)
    stored = read_tensors(tmp_path / FILE)
    bits = sum(t.numel() for name, t in stored.items() if name.endswith(":bits"))
    assert bits == sum(math.ceil(w.numel() / 8) for w in masks.weights.values())
    fresh = llama()
    fresh.load_state_dict(model.state_dict())
    again = load_masks(fresh, tmp_path)
    assert all(torch.equal(again.mask(name), masks.mask(name)) for name in masks.weights)
    with pytest.raises(BadBrick, match="already trained dense"):
        load_masks(llama(), tmp_path)
    with pytest.raises(BadBrick, match="shape"):
        load_masks(llama(intermediate_size=56), tmp_path)
    with pytest.raises(BadBrick, match="does not have"):
        load_masks(llama(num_hidden_layers=1), tmp_path)
    write_tensors(tmp_path / FILE, {name: t for name, t in stored.items() if not name.endswith("q_proj.weight:shape")})
    with pytest.raises(BadBrick, match="incomplete"):
        load_masks(llama(), tmp_path)
    for name in list(stored):
        if name.endswith(":bits"):
            stored[name] = stored[name][:-1]
    write_tensors(tmp_path / FILE, stored)
    with pytest.raises(BadBrick, match="does not fit"):
        load_masks(llama(), tmp_path)


@pytest.mark.parametrize("s", [-0.1, 1.0, 1.5, math.nan])
def test_a_sparsity_outside_its_range_is_refused(s: float) -> None:
    with pytest.raises(UsageError, match="less than 1"):
        apply_static_sparsity(llama(), s)
    with pytest.raises(UsageError, match="less than 1"):
        Config(sparsity=s)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(Unmatched, match="q_prj"):
        apply_static_sparsity(llama(), 0.5, targets="q_prj")
    with pytest.raises(Refused, match="tied to"):
        apply_static_sparsity(llama(), 0.5, targets="head")
    with pytest.raises(Refused, match="leaves no weight"):
        apply_static_sparsity(llama(), 0.9999)
    with pytest.raises(UsageError, match="no masks"):
        densify(llama())
    with pytest.raises(UsageError, match="start=base"):
        Config(start="base", rescale=True)
    model = llama()
    masks = apply_static_sparsity(model, 0.5)
    with pytest.raises(UsageError, match="already carries"):
        apply_static_sparsity(model, 0.5)
    with pytest.raises(BadBrick, match="on one side only"):
        masks.load_state_dict(apply_static_sparsity(llama(), 0.5, targets="query").state_dict())
    with pytest.raises(BadBrick, match="shape"):
        masks.load_state_dict(apply_static_sparsity(llama(intermediate_size=56), 0.5).state_dict())


class Lines(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = batch(1, seed=i)[0]
        return {"input_ids": ids, "labels": ids}


def test_the_callback_keeps_masks_in_trainer_and_across_its_checkpoints(tmp_path: Path) -> None:
    def run(model: nn.Module, masks: StaticMasks, **options: Any) -> nn.Module:
        args = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=args, train_dataset=Lines(), callbacks=[SparsityCallback(masks)]).train(**options)
        return model

    model = llama()
    masks = apply_static_sparsity(model, 0.75)
    run(model, masks)
    assert not off_support(masks).any()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed = LlamaForCausalLM.from_pretrained(checkpoint)
    run(resumed, load_masks(resumed, checkpoint), resume_from_checkpoint=str(checkpoint))
    for name, p in model.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name
    other = llama()
    wrong = apply_static_sparsity(other, 0.75, 1)
    with pytest.raises(BadBrick, match="belong to other weights"):
        run(other, wrong, resume_from_checkpoint=str(checkpoint))
