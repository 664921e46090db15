"""Side networks beside a frozen backbone (lst, unipt): what they read, what trains, kept states, slices, generation."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import resnet, text_data
from torch import nn

import brickyard
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import Base, open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.export import export
from brickyard.core.generate import Decoding, continuations
from brickyard.core.loop import train_mode
from brickyard.core.prefix import ENTERING
from brickyard.core.roles import blocks
from brickyard.core.side import SIDE, attach_side, backbone_of
from brickyard.core.task import Task
from brickyard.core.trial import Setting, prepare
from brickyard.tune import lst, unipt
from brickyard.tune._slices import Shape, has_last_norm, narrow, sliced

TOPICS = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")
CAUSAL = Task("causal-lm", "bits_per_byte", None, 1, "text")
ARMS = ("lst:r=4,init=random", "unipt:width=8")


def made(arm: str, folder: Path, task: Task = TOPICS) -> tuple[Attached, Base]:
    base = open_base(str(folder))
    return build(resolve(parse(arm), task), base, task, seed=0), base


def batch(rows: int = 3, tokens: int = 6, padded: int = 0, vocabulary: int = 20) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids = torch.cat([ids, torch.zeros(rows, padded, dtype=torch.int64)], dim=1)
        mask = torch.cat([mask, torch.zeros(rows, padded, dtype=torch.int64)], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


def digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("arm", ARMS)
def test_nothing_flows_back_through_the_backbone(arm: str, text_base: Path) -> None:
    attached, _ = made(arm, text_base)
    model, backbone = attached.model, backbone_of(attached.model)
    for p in backbone.parameters():
        p.requires_grad_()  # even if somebody asks for it
    train_mode(model)
    before = digest(backbone)
    model(**batch()).logits.square().sum().backward()
    assert not any(p.grad is not None for p in backbone.parameters()) and not backbone.training
    side: Any = model.get_submodule(SIDE)
    assert all(p.grad is not None for n, p in model.named_parameters() if any(p is q for q in attached.parameters())), [
        n for n, p in side.named_parameters() if p.grad is None
    ]
    optimiser = torch.optim.SGD(attached.parameters(), lr=0.1)
    optimiser.step()
    assert digest(backbone) == before


@pytest.mark.parametrize("arm", ARMS)
def test_kept_states_give_the_same_logits_and_run_no_block(arm: str, text_base: Path) -> None:
    attached, _ = made(arm, text_base)
    reader: Any = attached.prefix
    given = batch()
    with torch.no_grad():
        plain = attached.model.eval()(**given).logits
        states = reader(**given).last_hidden_state
    ran = []
    handle = blocks(backbone_of(attached.model))[0][1].register_forward_hook(lambda *_: ran.append(1))
    passes = reader.passes
    kept = attached.model(**given, **{ENTERING: states}).logits
    handle.remove()
    torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-6)
    assert not ran and reader.passes == passes
    torch.testing.assert_close(attached.model(**given).logits, plain)  # the next batch is not taken for kept


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_computes_states_once_and_its_brick_opens_elsewhere(arm: str, text_base: Path, tmp_path: Path) -> None:
    asked = Setting(
        arm=arm, base=str(text_base), data=text_data(), device="cpu", training={"epochs": 6, "batch": 8, "lr": 1e-2}
    )
    ready = prepare(asked)
    result = trial.tune(ready, tmp_path / "run")
    # Both splits that training reads and the test rows were computed, each row once, whatever the epochs.
    assert result["cost"]["states_bytes"] > 0 and "layers" in result["cost"]["states_of"]
    assert result["score"]["mean"] > 0.5, result["score"]
    backbone_parameters = sum(p.numel() for p in open_base(str(text_base)).backbone().parameters())
    assert result["cost"]["trainable_parameters"] < backbone_parameters
    brick = brickyard.load(tmp_path / "run" / "brick")
    assert not any(name.startswith("backbone.") for name in brick.tensors())
    found = brickyard.evaluate(brick=tmp_path / "run" / "brick", data=text_data(), device="cpu")
    assert found["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=0.05)
    without = trial.tune(prepare(replace(asked, arm=f"{arm},cache=false")), tmp_path / "again")
    assert "states_bytes" not in without["cost"]
    assert without["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=0.1)
    with pytest.raises(Refused, match="beside"):
        export(tmp_path / "run" / "brick", "merged", tmp_path / "merged")


@pytest.mark.parametrize("arm", ARMS)
def test_detached_the_model_is_as_it_was(arm: str, text_base: Path) -> None:
    base = open_base(str(text_base))
    plain = base.backbone().eval()
    wanted = plain(**batch()).last_hidden_state
    attached, _ = made(arm, text_base)
    changed = attached.model.states(**batch())[0]  # type: ignore[operator]
    assert not torch.allclose(changed, wanted)
    model: Any = attached.detach()
    torch.testing.assert_close(model.states(**batch())[0], wanted)
    assert not hasattr(model, SIDE) and "forward" not in backbone_of(model).__dict__


@pytest.mark.parametrize("arm", ARMS)
def test_padding_changes_nothing(arm: str, text_base: Path) -> None:
    attached, _ = made(arm, text_base)
    attached.model.eval()
    with torch.no_grad():
        short, long = (attached.model(**batch(padded=n)).logits for n in (0, 5))
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)


def test_gates_decide_between_the_ladder_and_the_side(text_base: Path) -> None:
    attached, _ = made("lst:r=4,init=random", text_base)
    side: Any = attached.model.get_submodule(SIDE).eval()
    assert torch.equal(side.gates, torch.full((2,), 0.5))
    states = [torch.randn(2, 5, 32) for _ in range(3)]
    others = [states[0], *(torch.randn(2, 5, 32) for _ in range(2))]
    given = {"attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    with torch.no_grad():
        assert not torch.allclose(side(states, given), side(others, given))
        side.alpha.fill_(torch.inf)  # g = 1: the ladder is not read
        torch.testing.assert_close(side(states, given), side(others, given))
        assert not torch.allclose(side([others[1], *states[1:]], given), side(states, given))
        side.alpha.fill_(-torch.inf)  # g = 0: only the last rung counts
        torch.testing.assert_close(side(states, given), side([others[1], others[2], states[2]], given))
        assert not torch.allclose(side([*states[:2], others[2]], given), side(states, given))


def test_parameters_are_counted_by_the_formula(text_base: Path) -> None:
    attached, _ = made("lst:r=4,init=random", text_base)
    head = sum(p.numel() for n, p in attached.model.named_parameters() if n.startswith("head."))
    counted = sum(p.numel() for p in attached.parameters()) - head
    assert counted == lst.parameter_count(d=32, inner=64, r=4, layers=2)


def test_side_layers_may_be_left_out(text_base: Path) -> None:
    attached, _ = made("lst:r=4,init=random,layers=[1]", text_base)
    side: Any = attached.model.get_submodule(SIDE)
    assert side.layers == [1] and len(side.rungs) == 1 and attached.prefix.layers == (0, 2)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="blocks 0 to 1"):
        made("lst:layers=[2]", text_base)


@pytest.mark.parametrize("kind", ["text_base", "causal_base", "image_base"])
def test_slices_are_rows_and_columns_of_the_backbone(kind: str, request: pytest.FixtureRequest) -> None:
    backbone = open_base(str(request.getfixturevalue(kind))).backbone()
    small, shape, r = narrow(backbone, 2, [0, 1]), Shape.of(backbone.config), 2
    assert int(small.config.hidden_size) == shape.width // r and len(blocks(small)) == 2
    importance = {n: p.detach().abs() for n, p in backbone.named_parameters()}
    cut = sliced(backbone, small, [0, 1], importance, torch.arange(shape.width, dtype=torch.float32))
    targets = dict(small.named_parameters())
    inside = tuple(f"{name}." for name, _ in blocks(small))
    assert set(cut) == {n for n in targets if n.startswith(inside)}
    wide = dict(backbone.named_parameters())
    for name, tensor in cut.items():
        assert tensor.shape == targets[name].shape, name
        if tensor.ndim == 2:  # every row of the narrow weight is a row of the wide one at common columns
            where = [(wide[name] == value).nonzero()[0] for value in tensor[:, 0]]
            rows, column = torch.stack(where)[:, 0], torch.stack(where)[:, 1]
            assert (column == column[0]).all() and (rows.diff() > 0).all()
            columns = torch.stack([(wide[name][rows[0]] == value).nonzero()[0, 0] for value in tensor[0]])
            assert (columns.diff() > 0).all() and torch.equal(tensor, wide[name][rows][:, columns])
    first = next(n for n in cut if ("query" in n or "q_proj" in n) and n.endswith("weight"))
    # The first channels are those of the largest scores: the upper half.
    assert torch.equal(
        cut[first][0], wide[first][(wide[first] == cut[first][0, 0]).nonzero()[0, 0]][shape.width // r :]
    )
    if shape.rotary:
        rows = [int((wide[first] == value).nonzero()[0, 0]) for value in cut[first][:, 0]]
        kept = sorted({row % shape.head for row in rows})
        half = shape.head // 2
        assert {d + half for d in kept if d < half} == {d for d in kept if d >= half} and len(kept) == shape.head // r
        assert len(rows) == shape.heads * len(kept)


def test_fisher_cuts_by_squared_gradients_of_single_rows(text_base: Path, tmp_path: Path) -> None:
    ready = prepare(Setting(arm="lst:r=4,fisher_samples=5", base=str(text_base), data=text_data(), device="cpu"))
    config = ready.plan.configs["lst"]
    importance, rows = lst.fisher(config, ready)
    assert rows == 5 and all((t >= 0).all() for t in importance.values())
    again, _ = lst.fisher(config, ready)
    assert all(torch.equal(importance[n], again[n]) for n in importance)
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    before = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
    report = lst.initialise(config, ready, attached)
    assert report is not None and report["rows"] == 5 and report["seconds"] > 0
    changed = [n for n, p in attached.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed and all(".small." in n for n in changed)
    random, _ = made("lst:r=4,init=random", text_base)
    magnitude, _ = made("lst:r=4,init=magnitude", text_base)
    weights = [
        next(p for n, p in m.named_parameters() if n.endswith("query.weight") and ".small." in n).detach()
        for m in (random.model, magnitude.model, attached.model)
    ]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    result = trial.tune(ready, tmp_path / "run")
    assert result["chosen"]["lst"]["init"] == "fisher"
    assert result["cost"]["train_seconds"] > result["chosen"]["lst"]["seconds"]


def test_a_language_model_generates_with_a_second_cache(causal_base: Path) -> None:
    attached, base = made("lst:r=2,init=magnitude", causal_base, CAUSAL)
    model: Any = attached.model.eval()
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    given = batch(rows=3, tokens=7)
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        with_cache, without = (
            model.generate(
                **given, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0, eos_token_id=None, **options
            )
            for use in (True, False)
        )
        assert torch.equal(with_cache, without), options
    assert continuations(model, base, ["red apple"], Decoding(new_tokens=4))
    # A pass in two parts equals one pass.
    whole = model(**given).logits
    first = model(input_ids=given["input_ids"][:, :4], use_cache=True)
    second = model(
        input_ids=given["input_ids"][:, 4:],
        attention_mask=given["attention_mask"],
        past_key_values=first.past_key_values,
    )
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [{}, {"use_cache": True}])
def test_a_pass_goes_on_from_the_cache_of_another(asked: dict[str, Any], causal_base: Path) -> None:
    attached, _ = made("lst:r=2,init=magnitude", causal_base, CAUSAL)
    model: Any = attached.model.eval()
    model.config.use_cache = True  # as a checkpoint's configuration has it by default
    ids = batch(rows=3, tokens=7)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, 4:]
        begun = model(input_ids=ids[:, :4], **asked).past_key_values
        copied = copy.deepcopy(begun)
        for cache, more in ((begun, {}), (copied, {"use_cache": False})):
            found = model(input_ids=ids[:, 4:], past_key_values=cache, **more).logits
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
            assert cache.get_seq_length() == cache.side.get_seq_length() == 7
        # What is done to the copy happens to its own second cache, and not to that of the first.
        copied.reorder_cache(torch.tensor([2, 0, 1]))
        copied.crop(-1)
        assert copied.side.get_seq_length() == 6 and begun.side.get_seq_length() == 7
        torch.testing.assert_close(copied.side.layers[0].keys, begun.side.layers[0].keys[[2, 0, 1], :, :6])
        again = model(input_ids=ids[[2, 0, 1], 6:], past_key_values=copied).logits
        torch.testing.assert_close(again, whole[[2, 0, 1], 2:], rtol=1e-4, atol=1e-5)


def test_a_cache_without_the_side_blocks_is_refused(causal_base: Path) -> None:
    attached, base = made("lst:r=2,init=magnitude", causal_base, CAUSAL)
    ids = batch(rows=2, tokens=5)["input_ids"]
    plain: Any = base.model(CAUSAL, seed=0).eval()
    with torch.no_grad():
        cache = plain(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(UsageError, match="5 tokens of the backbone and 0 of its side blocks"):
            attached.model.eval()(input_ids=ids, past_key_values=cache)


def test_without_the_ladder_side_blocks_read_what_enters_alone(text_base: Path) -> None:
    attached, _ = made("lst:r=4,init=random,ladder=false", text_base)
    side: Any = attached.model.get_submodule(SIDE)
    assert len(blocks(side.small)) == 2 and len(side.rungs) == 0  # unlike layers=[0], which has one side block
    assert attached.prefix is not None and attached.prefix.layers == (0,)  # type: ignore[attr-defined]
    model = attached.model.eval()
    given = batch()
    with torch.no_grad():
        before = model(**given).logits
        for name, p in backbone_of(model).named_parameters():
            if "embeddings" not in name:
                p.mul_(0.5)
        assert torch.equal(model(**given).logits, before)
    train_mode(model)
    model(**given).logits.square().sum().backward()
    assert all(p.grad is not None for p in attached.parameters())
    # The ladder is what reads the blocks.
    whole, _ = made("lst:r=4,init=random", text_base)
    given_up = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in attached.parameters())
    assert given_up == 2 * (32 * 8 + 8 + 1)


def test_a_language_model_learns_through_its_frozen_output_layer(causal_base: Path, tmp_path: Path) -> None:
    texts = {split: {"text": rows["text"]} for split, rows in text_data().items()}
    asked = Setting(
        arm="lst:r=2,init=random", base=str(causal_base), data=texts, task="causal-lm", device="cpu",
        training={"steps": 60, "batch": 8, "lr": 1e-2},
    )  # fmt: skip
    result = trial.tune(prepare(asked), tmp_path / "run")
    losses = [point["validation_loss"] for point in result["history"]]
    assert losses[-1] < losses[0] and result["cost"]["states_bytes"] > 0
    names = brickyard.load(tmp_path / "run" / "brick").tensors()
    assert all(name.startswith("side.") for name in names)


def test_documents_of_a_block_do_not_see_each_other(causal_base: Path) -> None:
    attached, _ = made("lst:r=2,init=random", causal_base, CAUSAL)
    model: Any = attached.model.eval()
    ids = torch.randint(4, 20, (1, 8), generator=torch.Generator().manual_seed(2))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    changed = ids.clone()
    changed[0, :4] = 5
    with torch.no_grad():
        a, b = (model(input_ids=x, position_ids=places).logits for x in (ids, changed))
    torch.testing.assert_close(a[:, 4:], b[:, 4:])
    assert not torch.allclose(a[:, :4], b[:, :4])


def test_unipts_rows_of_attention_sum_to_one_or_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    anchor, z = torch.randn(2, 5, 4, generator=g), torch.randn(3, 2, 5, 4, generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    ones = unipt.interaction(anchor, torch.cat([z, torch.ones(3, 2, 5, 1)], -1)[..., :4], mask)
    by_hand = torch.empty_like(z)
    for n in range(3):
        for b in range(2):
            a = torch.relu(anchor[b] @ z[n, b].T * mask[b])
            a = a / (a.sum(-1, keepdim=True) + 1e-8)
            total = a.sum(-1)
            assert ((total - 1).abs() < 1e-4).logical_or(total == 0).all() and not a[:, ~mask[b]].any()
            by_hand[n, b] = (a + torch.eye(5)) @ z[n, b]
    torch.testing.assert_close(ones, by_hand, rtol=1e-4, atol=1e-5)
    nothing = unipt.interaction(-z[0].abs(), z.abs(), mask)  # all products negative: only the token itself is left
    torch.testing.assert_close(nothing, z.abs())


def test_weight_decay_leaves_unipts_gains_and_biases_alone(text_base: Path) -> None:
    attached, _ = made("unipt:width=8", text_base)
    names = {id(p): n for n, p in attached.model.named_parameters()}
    spared = {names[id(p)] for g in attached.parameter_groups if g.get("weight_decay") == 0.0 for p in g["params"]}
    assert {f"{SIDE}.{name}" for name in ("down_bias", "scale", "shift", "norm.weight", "gate.bias")} <= spared
    assert not {f"{SIDE}.{name}" for name in ("down", "project.weight", "up.weight", "gate.weight")} & spared


def test_unipt_treats_its_layers_alike_and_weighs_them_by_example() -> None:
    torch.manual_seed(0)
    net = unipt.Parallel(12, 6, 4)
    states = [torch.randn(3, 5, 12) for _ in range(4)]
    given = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])}
    wanted = net(states, given)
    c = net.confidence(states, given)
    torch.testing.assert_close(c.sum(1), torch.ones(3))
    assert not torch.allclose(c[0], c[1], atol=1e-3) and (c - 1 / 3).abs().max() > 1e-3
    order = [2, 0, 1, 3]
    with torch.no_grad():
        for name in ("down", "down_bias", "scale", "shift"):
            getattr(net, name).copy_(getattr(net, name)[order].clone())
    torch.testing.assert_close(net([states[i] for i in order], given), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadData, match="row 1"):
        net(states, {"attention_mask": torch.tensor([[1] * 5, [0] * 5, [1] * 5])})


def test_maps_are_pooled_window_by_window_as_the_anchor_asks() -> None:
    torch.manual_seed(0)
    net = unipt.Pyramid([3, 5], 4)
    x, anchor = torch.rand(2, 3, 4, 6), torch.rand(2, 5, 2, 2)
    found = net.pooled(0, x, anchor)
    asked = torch.relu(net.ask[0](anchor))
    for b in range(2):
        for i in range(2):
            for j in range(2):
                window = x[b, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
                weight = torch.relu((asked[b, :, i, j, None, None] * window).sum(0))
                weight = weight / (weight.sum() + 1e-8) + 1 / 6
                torch.testing.assert_close(found[b, :, i, j], (weight * window).sum((1, 2)))
    assert net([x, anchor], {}).shape == (2, 4, 5)
    with pytest.raises(Refused, match="no whole multiple"):
        net.pooled(0, torch.rand(2, 3, 5, 6), anchor)


def test_a_convnet_is_read_stage_by_stage(tmp_path: Path) -> None:
    base = open_base(resnet(tmp_path))
    task = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
    attached = build(resolve(parse("unipt:width=6"), task), base, task, seed=0)
    model: Any = attached.model
    assert isinstance(model.get_submodule(SIDE), unipt.Pyramid) and attached.prefix is None
    assert len(attached.matched["read"]) == 2
    train_mode(model)
    x = torch.randn(4, 3, 16, 16)
    before = digest(backbone_of(model))
    model(pixel_values=x).logits.square().sum().backward()
    assert all(p.grad is not None for p in attached.parameters()) and digest(backbone_of(model)) == before
    plain: Any = base.backbone().eval()
    wanted = plain(pixel_values=x).last_hidden_state
    back: Any = attached.detach()
    torch.testing.assert_close(backbone_of(back).eval()(pixel_values=x).last_hidden_state, wanted)


def test_a_head_of_choice_and_images(image_base: Path, text_base: Path) -> None:
    task = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
    base = open_base(str(image_base))
    size = int(base.config.image_size)
    pixels = torch.randn(2, 3, size, size)
    for arm in ARMS:
        attached = build(resolve(parse(arm), task), base, task, seed=0)
        train_mode(attached.model)
        attached.model(pixel_values=pixels).logits.sum().backward()
        assert all(p.grad is not None for p in attached.parameters())
        composed, _ = made(f"{arm} + moment-probing:p=28", text_base)
        assert "Moment" in type(composed.model.head).__name__


def test_what_cannot_work_is_refused(text_base: Path, causal_base: Path) -> None:
    with pytest.raises(UsageError, match="possible: 1, 2, 4"):
        made("lst:r=3", text_base)
    with pytest.raises(Refused, match="show a language model"):
        resolve(parse("unipt"), CAUSAL)
    for arm, said in (("unipt:layers=[2]", "layers 0 to 1"), ("unipt:factor=64", "nothing of the width")):
        with pytest.raises(UsageError, match=said):
            made(arm, text_base)
    for options in ({"r": 0}, {"temperature": 0.0}, {"layers": (1, 0)}, {"fisher_samples": 0}):
        with pytest.raises(UsageError):
            lst.Config(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        unipt.Config(width=-1)
    attached, _ = made("unipt:width=8", text_base)
    with pytest.raises(Refused, match="already has a side network"):
        attach_side(attached.model, nn.Identity(), [0])
    fresh, _ = made("linear-probe", text_base)
    for layers in ((), (1, 0), (0, 9)):
        with pytest.raises(UsageError, match="layers"):
            attach_side(fresh.model, nn.Identity(), layers)
        if hasattr(fresh.model, SIDE):
            delattr(fresh.model, SIDE)
    assert not has_last_norm(open_base(str(text_base)).backbone())
    assert has_last_norm(open_base(str(causal_base)).backbone())
