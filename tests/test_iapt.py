"""IAPT: prompts made from the instruction alone, read as keys and values, made once in generation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import text_data
from torch import nn
from torch.nn import functional as F

import brickyard
from brickyard.core import brick as bricks
from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadData, BadMix, Refused, UsageError
from brickyard.core.loop import train_mode
from brickyard.core.roles import blocks
from brickyard.core.task import Task
from brickyard.core.trial import Setting, prepare
from brickyard.tune import _prompts, iapt
from brickyard.tune._prompts import INSTRUCTION, PromptedLayer, Prompts, widened

TOPICS = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")
INSTRUCT = Task("instruct", "bits_per_byte", None, 1, "text")
KINDS = pytest.mark.parametrize("kind", ["text_base", "causal_base"])


def made(options: str, folder: Path, task: Task = TOPICS) -> Attached:
    return build(resolve(parse(f"iapt:bottleneck=8{options}"), task), open_base(str(folder)), task, seed=0)


def instruct(folder: Path, options: str = "") -> Any:
    return made(options, folder, INSTRUCT).model.eval()


def batch(rows: int = 3, tokens: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 20, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seen(model: Any) -> list[torch.Tensor]:
    """Record the prompts that the generator makes."""
    out: list[torch.Tensor] = []
    model.get_submodule("prompts").register_forward_hook(lambda m, args, p: out.append(p.detach()))
    return out


def test_the_rational_begins_as_gelu_and_has_no_pole() -> None:
    act = iapt.Rational()
    x = torch.linspace(-3, 3, 601)
    assert (act(x) - F.gelu(x)).abs().max() < 1e-2
    wide = torch.linspace(-1e3, 1e3, 10_001)
    with torch.no_grad():
        assert act(wide).isfinite().all()
        act.denominator.copy_(torch.randn(5))
        act.numerator.copy_(torch.randn(7))
        assert act(wide).isfinite().all()
        a, b = act.numerator, act.denominator
        by_hand = sum(a[j] * x**j for j in range(7)) / (1 + sum(b[i - 1] * x**i for i in range(1, 6)).abs())
        torch.testing.assert_close(act(x), by_hand, rtol=1e-3, atol=1e-3)


class Holder(nn.Module):
    base_model_prefix = "backbone"

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.config = backbone, backbone.config

    def forward(self, **batch: Any) -> Any:
        return self.backbone(**batch)


@KINDS
def test_prompts_are_keys_and_values_before_the_others(kind: str, request: pytest.FixtureRequest) -> None:
    """Against the definition: the block runs on [p; h] and what comes out at the prompts is dropped."""
    folder = request.getfixturevalue(kind)
    base = open_base(str(folder))
    backbone: Any = base.backbone().eval()
    plain: Any = base.backbone().eval()
    given = batch(2, 5)
    p = [torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(l)) for l in range(2)]
    holder = type(
        "Holder", (nn.Module,), {"base_model_prefix": "backbone", "forward": lambda self, **b: self.backbone(**b)}
    )()
    holder.backbone, holder.config = backbone, backbone.config
    prompts = Prompts(holder, lambda l, h, mask: p[l])
    found = holder(**given).last_hidden_state

    def run(block: nn.Module, h: torch.Tensor, l: int) -> torch.Tensor:
        joined = torch.cat([p[l], h], dim=1)
        size = joined.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool)
        if kind == "causal_base":  # every text token sees all prompts, whose own rows do not matter
            mask[3:, 3:] = torch.ones(5, 5, dtype=torch.bool).tril()
            places = torch.cat([torch.zeros(3, dtype=torch.int64), torch.arange(5)])[None].expand(2, -1)
            return block(joined, attention_mask=mask[None, None].expand(2, 1, -1, -1), position_ids=places,
                         position_embeddings=plain.rotary_emb(joined, places))  # fmt: skip
        return block(joined, attention_mask=mask[None, None].expand(2, 1, -1, -1))

    with torch.no_grad():
        h = plain.embed_tokens(given["input_ids"]) if kind == "causal_base" else plain.embeddings(given["input_ids"])
        for l, (_, block) in enumerate(blocks(plain)):
            out = run(block, h, l)
            h = (out if isinstance(out, torch.Tensor) else out[0])[:, 3:]
        wanted = plain.norm(h) if kind == "causal_base" else h
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    prompts.close()
    torch.testing.assert_close(holder(**given).last_hidden_state, plain(**given).last_hidden_state)


def test_masks_are_widened_by_keys_that_all_see() -> None:
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)
    assert widened(None, q, k, 2, causal=False) is None and widened(None, q[:, :, :1], k, 2, causal=True) is None
    causal = widened(None, q, k, 2, causal=True)
    assert causal is not None and causal.shape == (1, 1, 3, 7) and causal[..., :2].all()
    assert torch.equal(causal[0, 0, :, 2:], torch.ones(3, 5).tril(2).bool())
    added = widened(torch.full((2, 1, 3, 5), -9.0), q, k, 2, causal=True)
    assert added is not None and not added[..., :2].any() and (added[..., 2:] == -9).all()


def test_an_answer_changes_no_prompt_and_padding_changes_nothing(causal_base: Path) -> None:
    model = instruct(causal_base)
    prompts, given = seen(model), batch()
    given[INSTRUCTION] = torch.zeros(3, 7, dtype=torch.bool)
    given[INSTRUCTION][:, :4] = True
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 4:] = 5
    with torch.no_grad():
        a = model(**dict(given)).logits
        b = model(**dict(other)).logits
    first, second = prompts[:2], prompts[2:4]
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert first[0].shape == (3, 4, 32) and first[0].std(0).max() > 0  # and they differ between examples
    torch.testing.assert_close(a[:, :4], b[:, :4])
    other["input_ids"][:, 1] = 7
    with torch.no_grad():
        model(**dict(other))
    assert not torch.allclose(prompts[4], first[0])
    padded = {k: torch.cat([v, torch.zeros(3, 3, dtype=v.dtype)], 1) for k, v in given.items()}
    with torch.no_grad():
        c = model(**padded).logits
    torch.testing.assert_close(c[:, :7], a, rtol=1e-4, atol=1e-5)


def test_generation_makes_prompts_once_and_agrees_with_the_whole_pass(causal_base: Path) -> None:
    model, given = instruct(causal_base), batch()
    prompts = seen(model)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(**given, use_cache=True, **options)
    assert len(prompts) == 2  # one pass over two layers
    whole = out
    instruction = torch.zeros(whole.shape, dtype=torch.bool)
    instruction[:, :7] = True
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **{INSTRUCTION: instruction}).logits
    assert torch.equal(logits[:, 6:-1].argmax(-1), whole[:, 7:])
    first = model(**given, use_cache=True)
    assert first.past_key_values.get_seq_length() == 7  # prompts do not lengthen the cache of the text
    assert first.past_key_values.prompts[0][0].shape[1] == 4
    mask = torch.ones(3, 8, dtype=torch.int64)
    step = model(input_ids=whole[:, 7:8], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(step.logits[:, 0], logits[:, 7], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**given, num_beams=3, use_cache=True, **options)[:, :7], given["input_ids"])
    left = {
        "input_ids": torch.cat([torch.zeros(3, 2, dtype=torch.int64), given["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(3, 2, dtype=torch.int64), given["attention_mask"]], 1),
    }
    assert torch.equal(model.generate(**left, use_cache=True, **options)[:, 9:], whole[:, 7:])
    foreign = open_base(str(causal_base)).model(INSTRUCT, seed=0)(**given, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="without prompts"):
        model(input_ids=whole[:, 7:8], past_key_values=foreign)


def test_a_growing_cache_holds_the_prompts_before_its_tokens(
    causal_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = instruct(causal_base), batch()
    tokens = torch.tensor([[5, 6], [7, 8], [9, 10]])

    def decoded() -> tuple[Any, list[torch.Tensor]]:
        with torch.no_grad():
            cache = model(**given, use_cache=True).past_key_values
            parts = [tokens[:, :1], tokens[:, 1:], tokens]  # one token at a time, then two at once
            return cache, [model(input_ids=part, past_key_values=cache).logits for part in parts]

    cache, held = decoded()
    assert [type(layer) for layer in cache.layers] == [PromptedLayer, PromptedLayer]
    assert cache.get_seq_length() == 7 + 4 and cache.layers[0].keys.shape[2] == 4 + 7 + 4
    assert cache.get_mask_sizes(1, 0) == (12, 0)
    cache.crop(-2)
    assert cache.get_seq_length() == 9 and cache.layers[1].values.shape[2] == 13
    monkeypatch.setattr(_prompts, "DynamicLayer", type("Other", (), {}))  # no layer is of a known kind
    monkeypatch.setattr(_prompts, "PromptedLayer", type("None", (), {}))
    plain, beside = decoded()
    assert plain.layers[0].keys.shape[2] == 7 + 4
    for a, b in zip(held, beside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_cache_that_was_emptied_takes_new_prompts(causal_base: Path) -> None:
    model, given = instruct(causal_base), batch()
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(**given, past_key_values=cache, use_cache=True).logits
        assert torch.equal(again, model(**given, use_cache=True).logits)
    assert cache.get_seq_length() == 7 and cache.layers[0].keys.shape[2] == 11


def test_blocks_that_run_again_make_the_same_prompts(causal_base: Path) -> None:
    given, found = batch(), []
    given["attention_mask"][0, 4:] = 0
    for again in (False, True):
        model = instruct(causal_base).train()
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**dict(given)).logits.square().sum().backward()
        found.append([p.grad.clone() for n, p in model.named_parameters() if n.startswith("prompts.")])
    for plain, rerun in zip(*found, strict=True):
        torch.testing.assert_close(plain, rerun, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", ["", ",groups=1", ",activation=gelu", ",activation=relu", ",constant=true"])
def test_only_generators_and_the_head_train(options: str, text_base: Path) -> None:
    attached = made(options, text_base)
    model: Any = attached.model
    wanted = open_base(str(text_base)).model(TOPICS, seed=0)(**batch()).logits
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_mode(model)
    model(**batch()).logits.square().sum().backward()
    assert all(p.grad is not None for p in attached.parameters()), [
        n for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    ]
    torch.optim.SGD(attached.parameters(), lr=0.1).step()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert "prompts" in moved and not any(n.startswith("bert.encoder") for n in moved)
    prompts = seen(model)
    model.eval()(**batch())
    assert (prompts[0].std(0).max() > 1e-6) == (options != ",constant=true")
    back: Any = attached.detach()
    torch.testing.assert_close(back.eval()(**batch()).logits, wanted)


def test_a_run_on_instructions_learns_and_its_brick_answers(causal_base: Path, tmp_path: Path) -> None:
    rows = text_data()
    data = {
        split: {"prompt": [f"{t} is" for t in part["text"]], "completion": [str(v) for v in part["label"]]}
        for split, part in rows.items()
    }
    training = {"epochs": 6, "batch": 8, "lr": 1e-2}
    given: dict[str, Any] = {"base": str(causal_base), "data": data, "device": "cpu"}
    brick, result = brickyard.tune("iapt:bottleneck=8", training=training, out=tmp_path / "run", **given)
    losses = [point["validation_loss"] for point in result["history"]]
    assert losses[-1] < losses[0]
    assert all(name.startswith("prompts.") for name in brick.tensors())
    again = brickyard.evaluate(brick=brick.folder, data=data, device="cpu")
    assert again["score"]["mean"] == pytest.approx(result["score"]["mean"], rel=1e-4)
    with pytest.raises(Refused, match="prompts are made"):
        resolve(parse("iapt"), Task("causal-lm", "bits_per_byte", None, 1, "text"))


@pytest.fixture
def tenants(causal_base: Path, tmp_path: Path) -> dict[str, Path]:
    """Bricks of two tenants whose generators are unlike each other, and one of other widths."""
    out = {}
    for seed, (name, options) in enumerate((("ann", ""), ("bob", ""), ("cy", ",groups=1,activation=gelu"))):
        base, plan = open_base(str(causal_base)), resolve(parse(f"iapt:bottleneck=8{options}"), INSTRUCT)
        attached = build(plan, base, INSTRUCT, seed=seed)
        for p in attached.parameters():
            p.data += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        bricks.save(tmp_path / name, attached, plan, base, INSTRUCT, seed=seed, about={})
        out[name] = tmp_path / name
    return out


def test_tenants_share_a_backbone_and_every_row_answers_as_alone(tenants: dict[str, Path], causal_base: Path) -> None:
    base = open_base(str(causal_base))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = batch(rows=4)
    given["attention_mask"][1, :3] = 0
    names = ["bob", "ann", "cy", "bob"]
    alone: dict[str, Any] = {name: bricks.load(folder).apply(base).model for name, folder in tenants.items()}
    shared = iapt.share(base, tenants)
    with torch.no_grad(), shared.rows(names) as model:
        together = model(**given).logits  # type: ignore[operator]
        answers = model.generate(**given, use_cache=True, **options)  # type: ignore[operator]
        beams = model.generate(**given, use_cache=True, num_beams=2, **options)  # type: ignore[operator]
    with torch.no_grad():
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in given.items()}
            torch.testing.assert_close(together[row], alone[name](**one).logits[0], rtol=1e-4, atol=1e-5)
            assert torch.equal(answers[row], alone[name].generate(**one, use_cache=True, **options)[0])
            assert torch.equal(beams[row], alone[name].generate(**one, use_cache=True, num_beams=2, **options)[0])
        other = alone["ann"](**given).logits
    assert (together[0] - other[0]).abs().max() > 1e-3
    shared.close()
    with torch.no_grad():
        plain = base.model(INSTRUCT, seed=0).eval()(**given).logits
        torch.testing.assert_close(shared.model(**given).logits, plain)


def test_tenants_that_cannot_share_are_refused(
    tenants: dict[str, Path], causal_base: Path, text_base: Path, tmp_path: Path
) -> None:
    base = open_base(str(causal_base))
    shared = iapt.share(base, tenants)
    with pytest.raises(BadMix, match="one name for each row"), shared.rows(["ann", "eve"]):
        pass
    with pytest.raises(BadMix, match="3 rows came while 2"), shared.rows(["ann", "bob"]):
        shared.model(**batch())
    with pytest.raises(BadMix, match="0 tenants"):
        shared.model(**batch())
    shared.close()
    with pytest.raises(UsageError, match="no tenants"):
        iapt.share(base, {})
    for arm, task, folder, said in (
        ("iapt:bottleneck=8,tokens=2", INSTRUCT, causal_base, "different numbers"),
        ("lora:r=2", INSTRUCT, causal_base, "brick of lora"),
        ("iapt:bottleneck=8", TOPICS, text_base, "head of its own"),
    ):
        opened, plan = open_base(str(folder)), resolve(parse(arm), task)
        bricks.save(tmp_path / said, build(plan, opened, task, seed=0), plan, opened, task, seed=0, about={})
        with pytest.raises(Refused, match=said):
            iapt.share(opened, {**(tenants if task is INSTRUCT else {}), "odd": tmp_path / said})


def test_two_levels_learn_in_turn_on_rows_of_their_own(text_base: Path, tmp_path: Path) -> None:
    asked = Setting(
        arm="iapt:bottleneck=8,training=bilevel", base=str(text_base), data=text_data(), device="cpu",
        training={"epochs": 4, "batch": 8},
    )  # fmt: skip
    ready = prepare(asked)
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    plan: Any = trial.curriculum_of(ready, ready.encoded, attached)
    # The head is no activation, so it does not learn on their rows either.
    both = {id(p) for p in (*plan.omega, *plan.theta)}
    assert both == {id(p) for p in attached.parameters()} and len(plan.theta) < len(plan.omega)
    assert not set(plan.halves[0]) & set(plan.halves[1]) and len(plan.all) == sum(map(len, plan.halves))
    moved: list[tuple[str, bool, bool]] = []

    class Watch:
        def before_step(self, state: Any) -> None:
            self.old = [p.detach().clone() for p in (*plan.omega, *plan.theta)]

        def after_step(self, state: Any) -> None:
            now = [not torch.equal(a, b) for a, b in zip(self.old, (*plan.omega, *plan.theta), strict=True)]
            moved.append((plan.log[-1]["learns"], any(now[: len(plan.omega)]), any(now[len(plan.omega) :])))

    rows, watch = ready.encoded["train"], (Watch(),)
    trial.train(attached, rows, None, ready.task, ready.training, curriculum=plan, callbacks=watch, device="cpu")
    expected = {"activations": (False, True), "generators": (True, False)}
    assert {learns for learns, _, _ in moved} == set(expected)
    # The rate of the very first step is 0.
    assert not any(moved[0][1:]) and all((o, t) == expected[learns] for learns, o, t in moved[1:])
    assert {e["learns"] for e in plan.log if 2 * e["step"] >= len(moved)} == {"generators"}
    result = trial.tune(ready, tmp_path / "run")
    assert [e["learns"] for e in result["curriculum"]["epochs"]][:2] == ["generators", "activations"]
    with pytest.raises(Refused, match="which rows an epoch holds"):
        trial.tune(prepare(replace(asked, arm=f"{asked.arm} + curriculum:by=length")), tmp_path / "no")


def test_too_few_rows_for_two_levels_learn_jointly_and_say_so(text_base: Path) -> None:
    for rows, said in ((15, True), (16, False)):
        asked = Setting(
            arm="iapt:bottleneck=8,training=bilevel", base=str(text_base), data=text_data(train=rows), device="cpu",
            training={"epochs": 1, "batch": 8},
        )  # fmt: skip
        ready = prepare(asked)
        attached = build(ready.plan, ready.base, ready.task, seed=0)
        with pytest.warns(UserWarning, match="half of 15 training rows") if said else nullcontext():
            plan = trial.curriculum_of(ready, ready.encoded, attached)
        assert (plan is None) == said


def test_images_are_prompted_too(image_base: Path) -> None:
    task = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
    base = open_base(str(image_base))
    attached = build(resolve(parse("iapt:bottleneck=8"), task), base, task, seed=0)
    size = int(base.config.image_size)
    x = torch.randn(2, 3, size, size)
    plain = base.model(task, seed=0)(pixel_values=x).logits
    assert not torch.allclose(attached.model.eval()(pixel_values=x).logits, plain)


def test_what_cannot_work_is_refused(text_base: Path, causal_base: Path) -> None:
    for options in ({"tokens": 0}, {"bottleneck": 0}, {"groups": -1}, {"training": "bilevel", "activation": "gelu"}):
        with pytest.raises(UsageError):
            iapt.Config(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="this base has 2 layers"):
        made(",groups=3", text_base)
    model = instruct(causal_base)
    empty = batch() | {INSTRUCTION: torch.zeros(3, 7, dtype=torch.bool)}
    with pytest.raises(BadData, match="row 0"):
        model(**empty)
    assert np.isfinite(iapt.gelu_coefficients()[0]).all()
