"""IDPT: a prompt made from the example's tokens, inserted before the last block, read by its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import text_data
from safetensors.torch import load_file
from torch import nn

import brickyard
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.loop import train, train_mode
from brickyard.core.prefix import ENTERING
from brickyard.core.roles import blocks
from brickyard.core.side import backbone_of
from brickyard.core.task import Task
from brickyard.core.trial import Setting, prepare
from brickyard.tune import idpt
from brickyard.tune._batch_norm import BatchNorm

TOPICS = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")
GENERATORS = pytest.mark.parametrize("generator", ["edgeconv", "mlp", "mean", "static"])


def made(folder: Path, generator: str = "edgeconv", task: Task = TOPICS, **more: Any) -> Attached:
    options = "".join(f",{k}={str(v).lower()}" for k, v in {"k": 3, **more}.items())
    return build(resolve(parse(f"idpt:generator={generator}{options}"), task), open_base(str(folder)), task, seed=0)


def batch(rows: int = 4, tokens: int = 7, padded: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 20, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    pad = torch.zeros(rows, padded, dtype=torch.int64)
    return {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([mask, pad], 1)}


def test_edges_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    layer = idpt.EdgeLayer(6, 3).eval()
    f, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    found = layer(f, mask)
    assert layer.near is not None
    w = torch.cat([layer.near.weight, layer.own.weight], dim=1)
    for b in range(2):
        for i in range(int(mask[b].sum())):
            away = (f[b] - f[b, i]).norm(dim=1).masked_fill(~mask[b], torch.inf)
            edges = torch.stack([torch.cat([f[b, j] - f[b, i], f[b, i]]) for j in away.topk(3, largest=False).indices])
            wanted = nn.functional.leaky_relu(layer.normed.norm(edges @ w.T), 0.2).amax(0)
            torch.testing.assert_close(found[b, i], wanted, rtol=1e-4, atol=1e-5)
    assert not found[1, 3:].any()


def test_neighbours_are_valid_tokens_and_the_token_itself() -> None:
    f, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    found = idpt.neighbours(f, mask, 3)
    assert (found[:, :, 0] == torch.arange(4)).all()
    assert found[1, :2].max() <= 1 and set(found[1, 0].tolist()) == {0, 1}
    assert idpt.neighbours(f, mask, 99).shape == (2, 4, 4)


@GENERATORS
def test_the_prompt_does_not_depend_on_the_order_of_tokens_or_on_padding(generator: str) -> None:
    torch.manual_seed(0)
    net = idpt.Generator(6, idpt.Config(generator=generator, k=3)).eval()  # type: ignore[arg-type]
    f, mask = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)
    wanted = net(f, mask)
    torch.testing.assert_close(net(f[:, [3, 0, 4, 1, 2]], mask), wanted, rtol=1e-4, atol=1e-5)
    longer = torch.cat([f, torch.randn(3, 4, 6)], 1), torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(net(*longer), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted.std(0).max() > 1e-4) == (generator != "static")


@GENERATORS
def test_the_sequence_is_longer_by_one_from_the_block_on(generator: str, text_base: Path) -> None:
    attached = made(text_base, generator)
    model: Any = attached.model
    lengths: list[int] = []

    def enters(module: Any, args: Any, output: Any) -> None:
        lengths.append((output if isinstance(output, torch.Tensor) else output[0]).shape[1])

    for _, block in blocks(backbone_of(model)):
        block.register_forward_hook(enters)
    train_mode(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(**batch(padded=2)).logits.square().sum().backward()
    assert lengths == [9, 10]
    assert all(p.grad is not None for p in attached.parameters())
    torch.optim.SGD(attached.parameters(), lr=0.1).step()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"prompt", "head"}
    assert not any(p.grad is not None for p in backbone_of(model).parameters())


def test_padding_changes_nothing_and_kept_states_give_the_same(text_base: Path) -> None:
    attached = made(text_base)
    attached.model.eval()
    prefix: Any = attached.prefix
    with torch.no_grad():
        short, long = (attached.model(**batch(padded=n)).logits for n in (0, 3))
        states = prefix(**batch()).last_hidden_state
        ran: list[int] = []
        first = blocks(backbone_of(attached.model))[0][1]
        handle = first.attention.register_forward_hook(lambda *_: ran.append(1))  # type: ignore[union-attr, operator]
        attached.model(**batch(), **{ENTERING: states})
        ran.clear()
        kept = attached.model(**batch(), **{ENTERING: states}).logits
        handle.remove()
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept, short, rtol=1e-4, atol=1e-5)
    assert not ran


def test_blocks_that_run_again_make_the_same_prompt(text_base: Path) -> None:
    found = []
    for again in (False, True):
        attached = made(text_base, "mlp", dropout=0.0)
        train_mode(attached.model)
        if again:
            attached.model.gradient_checkpointing_enable()  # type: ignore[operator]
        attached.model(**batch(padded=2)).logits.square().sum().backward()
        found.append([p.grad.clone() for p in attached.parameters() if p.grad is not None])
    for plain, rerun in zip(*found, strict=True):
        torch.testing.assert_close(plain, rerun, rtol=1e-4, atol=1e-5)


def test_masks_make_room_for_one_more_token() -> None:
    mask = torch.arange(9.0).view(1, 1, 3, 3)
    wide = idpt._wider(mask)
    assert wide.shape == (1, 1, 4, 4) and torch.equal(wide[0, 0, 0], torch.tensor([0.0, 0.0, 1.0, 2.0]))
    assert torch.equal(wide[0, 0, 1], wide[0, 0, 0]) and torch.equal(wide[0, 0, 2:, 1:], mask[0, 0, 1:])
    assert idpt._wider(torch.zeros(2, 1, 1, 3)).shape == (2, 1, 1, 4) and idpt._wider(None) is None


def test_a_run_learns_and_its_brick_answers(text_base: Path, image_base: Path, tmp_path: Path) -> None:
    training = {"epochs": 8, "batch": 8, "lr": 1e-2}
    given: dict[str, Any] = {"base": str(text_base), "data": text_data(), "device": "cpu"}
    brick, result = brickyard.tune("idpt:k=3", training=training, out=tmp_path / "run", **given)
    assert result["score"]["mean"] > 0.5 and result["cost"]["states_bytes"] > 0
    again = brickyard.evaluate(brick=brick.folder, data=text_data(), device="cpu")
    assert again["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=0.05)
    task = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
    attached = made(image_base, task=task)
    size = int(open_base(str(image_base)).config.image_size)
    train_mode(attached.model)
    attached.model(pixel_values=torch.randn(3, 3, size, size)).logits.sum().backward()
    assert all(p.grad is not None for p in attached.parameters())


def test_a_last_batch_of_one_row_trains_by_the_running_statistics(text_base: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": str(text_base), "data": text_data(train=17), "device": "cpu"}
    training = {"epochs": 2, "batch": 8, "evaluate_every": 3}
    found = []
    for stop in (False, True):  # it also resumes there to the same bits
        ready = prepare(Setting(arm="idpt:k=3", training={**training, "checkpoint_every": 3}, **given))
        attached = build(ready.plan, ready.base, ready.task, seed=0)
        folder, asked = tmp_path / str(stop), ready.training

        class Interrupt:
            def after_step(self, state: Any) -> None:
                if state.step == 4:
                    raise KeyboardInterrupt

        if stop:
            with pytest.raises(KeyboardInterrupt):
                train(attached, ready.encoded["train"], None, ready.task, asked, folder=folder, callbacks=[Interrupt()])
            attached = build(ready.plan, ready.base, ready.task, seed=0)
        done = train(attached, ready.encoded["train"], None, ready.task, asked, folder=folder, device="cpu")
        assert done.steps == 6
        found.append(attached.tensors())
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_a_norm_of_one_row_is_that_of_evaluation() -> None:
    torch.manual_seed(0)
    norm, plain = BatchNorm(4), nn.BatchNorm1d(4)
    many, one = torch.randn(8, 4) * 3 + 1, torch.randn(1, 4, requires_grad=True)
    torch.testing.assert_close(norm(many), plain(many))
    kept = {n: t.clone() for n, t in norm.state_dict().items()}
    out = norm(one)
    torch.testing.assert_close(out, plain.eval()(one))
    assert all(torch.equal(t, kept[n]) for n, t in norm.state_dict().items())
    out.square().sum().backward()
    assert norm.weight.grad is not None and one.grad is not None and bool(one.grad.any())


def test_detached_the_model_is_as_it_was(text_base: Path) -> None:
    wanted = open_base(str(text_base)).backbone().eval()(**batch()).last_hidden_state
    model: Any = made(text_base).detach()
    torch.testing.assert_close(model.eval().states(**batch())[0], wanted)
    assert type(model.head).__name__ == "Probe" and not hasattr(model, "prompt")


def test_what_cannot_work_is_refused(text_base: Path, causal_base: Path) -> None:
    with pytest.raises(UsageError, match="blocks 0 to 1"):
        made(text_base, layer=2)
    with pytest.raises(Refused, match="causal or rotary"):
        made(causal_base)
    with pytest.raises(Refused, match="own head"):
        build(resolve(parse("idpt + moment-probing:p=64"), TOPICS), open_base(str(text_base)), TOPICS, seed=0)
    for options in ({"k": 0}, {"depth": 0}, {"dropout": 1.0}):
        with pytest.raises(UsageError):
            idpt.Config(**options)  # type: ignore[arg-type]


def test_without_a_generator_the_same_head_reads_the_mean_in_the_prompts_place(text_base: Path, tmp_path: Path) -> None:
    bare, whole = made(text_base, "none"), made(text_base, "static")
    sizes = [{n: tuple(p.shape) for n, p in a.model.named_parameters() if n.startswith("head.")} for a in (bare, whole)]
    assert sizes[0] == sizes[1] and sizes[0].keys() <= bare.tensors().keys()
    model: Any = bare.model.eval()
    assert not hasattr(model, "prompt")
    given = batch(padded=2)
    x = open_base(str(text_base)).backbone().eval()(**given).last_hidden_state
    rest = x[:, 1:7]
    wanted = model.head.mlp(torch.cat([x[:, 0], rest.mean(1), rest.amax(1)], dim=1))
    torch.testing.assert_close(model(**given).logits, wanted)
    assert type(bare.detach().head).__name__ == "Probe"  # type: ignore[union-attr]
    rows: dict[str, Any] = {"base": str(text_base), "data": text_data(), "device": "cpu"}
    training = {"epochs": 1, "batch": 8}
    brick, result = brickyard.tune("idpt:generator=none", training=training, out=tmp_path / "run", **rows)
    again = brickyard.evaluate(brick=brick.folder, data=text_data(), device="cpu")
    assert again["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=0.05)


def test_full_tuning_under_the_same_head_trains_every_weight_of_the_base(text_base: Path, tmp_path: Path) -> None:
    whole, frozen = made(text_base, "none", base="trained"), made(text_base, "none")
    assert whole.model.head.mlp[0].in_features == frozen.model.head.mlp[0].in_features  # type: ignore[union-attr]
    every = dict(whole.model.named_parameters()).keys()
    assert every <= whole.tensors().keys() and not every <= frozen.tensors().keys()
    train_mode(whole.model), train_mode(frozen.model)
    for attached, dropping in ((whole, True), (frozen, False)):
        attached.model(**batch())
        assert backbone_of(attached.model).training is dropping
    rows: dict[str, Any] = {"base": str(text_base), "data": text_data(), "device": "cpu"}
    training = {"epochs": 1, "batch": 8, "lr": 1e-3}
    brick, result = brickyard.tune("idpt:k=3,base=trained", training=training, out=tmp_path / "run", **rows)
    plain = dict(open_base(str(text_base)).backbone().named_parameters())
    kept = load_file(brick.folder / "weights.safetensors")
    queries = [name for name in kept if name.endswith("query.weight")]
    assert queries and not any(torch.equal(kept[n], plain[n.removeprefix("backbone.")]) for n in queries)
    again = brickyard.evaluate(brick=brick.folder, data=text_data(), device="cpu")
    assert again["score"]["mean"] == pytest.approx(result["score"]["mean"], abs=0.05)


@pytest.mark.parametrize("generator", ["edgeconv", "mlp", "mean", "static", "none"])
def test_a_row_with_no_token_behind_the_first_is_named(generator: str, text_base: Path) -> None:
    attached = made(text_base, generator)
    attached.model.eval()
    given = batch()
    given["attention_mask"][2, 1:] = 0
    for inputs, row in ((given, 2), ({n: t[:, :1] for n, t in batch().items()}, 0)):
        with pytest.raises(BadData, match=f"row {row} of the batch has no token behind the first"):
            attached.model(**inputs)


def test_the_claims_hold_idpt_against_heads_of_its_own_kind() -> None:
    assert [claim.inequality.split()[2] for claim in idpt.RECORD.claims] == ["static", "bare", "full"]
    assert all(claim.arms[claim.inequality.split()[2]].startswith("idpt:") for claim in idpt.RECORD.claims)
