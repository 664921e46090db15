"""S2A: codes keep what they promise; coded operations have the plain forward and nearly the plain gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.activations import ACT2FN

from brickyard.checks.s2a import enable_checkpoints
from brickyard.core import brick as bricks
from brickyard.core import measure, trial
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.loop import Training, train
from brickyard.core.task import Task
from brickyard.core.wrap import attach_peft
from brickyard.tune._coded import Dropped, Elementwise, Once, Recomputed, Softmax, Trained
from brickyard.tune._codes import EXACT, Bounded, Grouped
from brickyard.tune.s2a import Config, convert, slope_code
from brickyard.tune.s2a_modules import Side

TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
WIDE = {"group": 16}  # the small bases are 32 wide
EXACTLY = {"group": 16, "bits": 32, "slope_bits": 32, "operand_bits": 32}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Operations


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("gelu", -0.13, 1.13), ("silu", -0.1, 1.1), ("sigmoid", 0.0, 0.25), ("tanh", 0.0, 1.0), ("gelu_new", -0.13, 1.13)],
)
def test_derivatives_lie_on_a_grid_over_their_range(name: str, low: float, high: float) -> None:
    phi = ACT2FN[name]
    code = slope_code(phi, Config(slope_bits=4))
    assert isinstance(code, Bounded) and (code.low, code.high) == pytest.approx((low, high), abs=5e-3)
    exact, found = gaussian(4000).requires_grad_(), gaussian(4000).requires_grad_()
    y = Elementwise.apply(found, phi, code)
    assert torch.equal(y, phi(exact))
    y.sum().backward()
    phi(exact).sum().backward()
    assert (found.grad - exact.grad).abs().max() <= (code.high - code.low) / 30 + 1e-6
    assert cosine(found.grad, exact.grad) > 0.99


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_relu_takes_one_bit_and_is_exact(act: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(64, 64), act)
    for p in model.parameters():
        p.requires_grad_(False)
    x = gaussian(9, 64).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    restore = convert(model, Config())
    y = model(x)
    assert sum(t.numel() for t in y.grad_fn.saved_tensors) == 9 * 64 // 8
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)
    restore()


def test_an_unbounded_derivative_is_coded_by_groups() -> None:
    assert isinstance(slope_code(ACT2FN["relu2"], Config()), Grouped)
    assert isinstance(slope_code(nn.ELU(), Config()), Bounded)
    with pytest.raises(Refused, match="nothing that could be coded"):
        convert(nn.Sequential(ACT2FN["linear"]), Config())


@pytest.mark.parametrize("norm", [nn.LayerNorm(96), nn.RMSNorm(96), nn.LayerNorm(96, elementwise_affine=False)])
@pytest.mark.parametrize("trained", [False, True])
def test_norms_have_their_own_forward_and_nearly_their_gradient(norm: nn.Module, trained: bool) -> None:
    model = nn.Sequential(copy.deepcopy(norm))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * gaussian(*p.shape)).requires_grad_(trained)
    x, weigh = (gaussian(40, 96, seed=1) * 2 + 1).requires_grad_(), gaussian(40, 96, seed=2)
    asked = [x, *(p for p in model.parameters() if trained)]
    y = model(x)
    expected = torch.autograd.grad((y * weigh).sum(), asked)
    restore = convert(model, Config())
    found_y = model(x)
    found = torch.autograd.grad((found_y * weigh).sum(), asked)
    restore()
    assert torch.equal(y, found_y)
    assert cosine(found[0], expected[0]) > 0.999
    assert all(cosine(a, b) > 0.98 for a, b in zip(found[1:], expected[1:], strict=True))
    assert float(found[0].norm() / expected[0].norm()) == pytest.approx(1, abs=5e-3)


def test_dropout_draws_as_it_would_and_keeps_one_bit() -> None:
    x, exact = gaussian(33, 5).requires_grad_(), gaussian(33, 5).requires_grad_()
    torch.manual_seed(3)
    y = Dropped.apply(x, 0.3)
    torch.manual_seed(3)
    expected = F.dropout(exact, 0.3)
    assert torch.equal(y, expected)
    assert [t.numel() for t in y.grad_fn.saved_tensors] == [-(-33 * 5 // 8)]
    y.cos().sum().backward()
    expected.cos().sum().backward()
    torch.testing.assert_close(x.grad, exact.grad)


@given(st.integers(1, 5), st.integers(1, 40), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_operation_is_right_where_its_code_is_exact(rows: int, width: int, bias: bool, transposed: bool) -> None:
    x = gaussian(rows, width, seed=rows).double().requires_grad_()
    w = gaussian(*((width, 3) if transposed else (3, width)), seed=1).double().requires_grad_()
    b = gaussian(3, seed=2).double().requires_grad_() if bias else None
    exact = Grouped(EXACT)
    layer = lambda t: F.linear(t, w.t() if transposed else w, b)  # noqa: E731
    checks: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (lambda t: Elementwise.apply(t, F.gelu, exact), (x,)),
        (lambda t: Softmax.apply(t, -1, exact), (x,)),
        (lambda t, w, b: Trained.apply(t, w, b, layer, transposed, Once(exact)), (x, w, b)),
        (lambda t: Recomputed.apply(lambda t: (t.sin() * t, None), [exact], False, t)[0], (x,)),
    ]
    for function, inputs in checks:
        assert torch.autograd.gradcheck(function, inputs)


def test_softmax_keeps_its_result_in_codes() -> None:
    model = nn.Sequential(nn.Softmax(dim=-1))
    x, weigh = gaussian(20, 64).requires_grad_(), gaussian(20, 64, seed=1)
    (expected,) = torch.autograd.grad((model(x) * weigh).sum(), x)
    restore = convert(model, Config())
    y = model(x)
    assert (
        torch.equal(y, torch.softmax(x, -1)) and cosine(torch.autograd.grad((y * weigh).sum(), x)[0], expected) > 0.99
    )
    restore()


def test_an_input_that_two_layers_read_is_coded_once_and_not_kept_when_it_dies() -> None:
    once = Once(Grouped(4))
    x = gaussian(8, 64)
    first = once.keep(x)
    assert once.keep(x) is first
    x.mul_(2)
    assert once.keep(x) is not first
    del x
    assert once._kept is None


# Whole models


def classifier(base: Path, attention: str = "eager", arm: str = "lora:r=4") -> Any:
    attached = build(resolve(parse(arm), TASK), open_base(str(base)), TASK, seed=0, attention=attention)
    with torch.no_grad():
        for i, p in enumerate(attached.parameters()):
            if not p.any():
                p.add_(0.1 * gaussian(*p.shape, seed=i))
    return attached


def batch(rows: int = 6, tokens: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(4, 27, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, tokens * 2 // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gradient(attached: Any, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """(logits, gradient) of a training step with dropout."""
    model = attached.model.train()
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(**batch()).logits
    F.cross_entropy(logits.float().flatten(0, -2), torch.arange(logits[..., 0].numel()) % 2).backward()
    return logits.detach(), torch.cat([p.grad.float().flatten() for p in attached.parameters() if p.grad is not None])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "arm",
    [
        *("lora:r=4", "full", "mos:r=3,e=2,p=1,l=2", "bitfit", "ia3", "adalora", "s2a-modules"),
        "s2a-modules:kind=prompt,tokens=3",
    ],
)
def test_logits_are_equal_and_gradients_nearly_so_under_any_tuner(
    arm: str, attention: str, precision: str, text_base: Path
) -> None:
    attached = classifier(text_base, attention, arm)
    logits, exact = gradient(attached, precision)
    before = {name: (type(m), dict(vars(m))) for name, m in attached.model.named_modules()}
    attached.convert = lambda model: convert(model, Config(**WIDE))
    with attached.saving():
        found_logits, found = gradient(attached, precision)
    assert torch.equal(logits, found_logits)
    assert cosine(exact, found) > 0.995
    after = {name: (type(m), dict(vars(m))) for name, m in attached.model.named_modules()}
    for name, (kind, state) in before.items():
        assert after[name][0] is kind and after[name][1].keys() == state.keys()
        assert all(after[name][1][k] is v for k, v in state.items() if k in ("config", "forward"))
    again_logits, again = gradient(attached, precision)
    assert torch.equal(again_logits, logits) and torch.equal(again, exact)


@pytest.mark.parametrize("kind", ["encoder", "llama", "gpt2"])
def test_exact_codes_give_the_gradient_of_the_plain_model(kind: str, text_base: Path, causal_base: Path) -> None:
    """With 32 bits only the arrangement differs: every gradient must agree, dropout's draws included."""
    torch.manual_seed(0)
    if kind == "encoder":
        model: Any = AutoModelForSequenceClassification.from_pretrained(text_base, attn_implementation="eager")
    elif kind == "llama":
        model = AutoModelForCausalLM.from_pretrained(causal_base)
    else:
        shape = GPT2Config(
            vocab_size=27, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
        )
        model = GPT2LMHeadModel(shape)
    attached: Any = type("Attached", (), {"model": model, "parameters": staticmethod(lambda: list(model.parameters()))})
    logits, exact = gradient(attached)
    restore = convert(model, Config(**EXACTLY))
    found_logits, found = gradient(attached)
    restore()
    assert torch.equal(logits, found_logits)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def kept(attached: Any) -> measure.Saved:
    return measure.saved_for_backward(attached.model, batch(), lambda logits: logits.float().square().mean())


def minilm_shaped(attention: str) -> Any:
    """Two layers of the shape of all-MiniLM-L6-v2, LoRA on query and value, as `Attached` wants to see it."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=27, hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536
    )
    model = AutoModelForSequenceClassification.from_config(shape, attn_implementation=attention)
    targets = {"query": [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]}
    targets["value"] = [name.replace("query", "value") for name in targets["query"]]
    attached = attach_peft(model, peft.LoraConfig(r=8, lora_alpha=16), targets)
    with torch.no_grad():
        for name, p in attached.model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.02 * gaussian(*p.shape))
    return attached


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_quarter_is_kept_nothing_out_of_sight_and_lora_learns_the_same(attention: str) -> None:
    attached = minilm_shaped(attention)
    inputs, labels = batch(rows=4, tokens=64), torch.arange(4) % 2
    loss = lambda logits: F.cross_entropy(logits, labels)  # noqa: E731
    found = {}
    for bits in (None, Config(), Config(bits=4, slope_bits=4, operand_bits=4)):
        attached.convert = None if bits is None else lambda model, bits=bits: convert(model, bits)
        with attached.saving():
            saved = measure.saved_for_backward(attached.model, inputs, loss)
            attached.model.zero_grad()
            torch.manual_seed(1)
            loss(attached.model.train()(**inputs).logits).backward()
        adapter = [p.grad.flatten() for n, p in attached.model.named_parameters() if "lora" in n]
        found[bits] = (saved, torch.cat(adapter))
    (plain, exact), (usual, near), (small, rough) = found.values()
    assert usual.bytes * 4 <= plain.bytes and small.bytes * 6 <= plain.bytes, (plain, usual, small)
    assert not usual.hidden and not small.hidden
    assert cosine(exact, near) > 0.998 and cosine(exact, rough) > 0.98


@pytest.mark.parametrize("arm", ["full", "mos:r=3,e=2,p=1,l=2"])
def test_other_tuners_keep_less_too(arm: str, text_base: Path) -> None:
    attached = classifier(text_base, "eager", arm)
    plain = kept(attached).bytes
    attached.convert = lambda model: convert(model, Config(bits=4, slope_bits=4, operand_bits=4, group=32))
    with attached.saving():
        coded = kept(attached)
    assert coded.bytes * 4 <= plain and not coded.hidden, (plain, coded)


def test_a_gated_network_keeps_its_product_in_codes(causal_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(causal_base)
    for name, p in model.named_parameters():
        p.requires_grad_("input_layernorm" in name)
    attached: Any = type("Attached", (), {"model": model})
    loss = lambda logits: logits[..., 0].sum()  # noqa: E731
    plain = measure.saved_for_backward(attached.model, batch(), loss).bytes
    restore = convert(model, Config(bits=4, slope_bits=4, operand_bits=4, group=32))
    coded = measure.saved_for_backward(attached.model, batch(), loss)
    restore()
    assert coded.bytes * 4 <= plain and not coded.hidden, (plain, coded)


@pytest.mark.parametrize("stochastic", [False, True])
def test_activation_checkpointing_gives_the_same_gradient(stochastic: bool, text_base: Path) -> None:
    attached = classifier(text_base)
    attached.convert = lambda model: convert(model, Config(stochastic=stochastic, **WIDE))
    with attached.saving():
        logits, expected = gradient(attached)
        enable_checkpoints(attached.model, {"use_reentrant": False})
        found_logits, found = gradient(attached)
    assert torch.equal(logits, found_logits) and torch.equal(found, expected)


def test_nothing_is_coded_where_no_gradient_flows(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = classifier(text_base)
    attached.convert = lambda model: convert(model, Config(**WIDE))

    def never(*_: Any) -> None:
        raise AssertionError("coded")

    attached.model.eval()
    with torch.no_grad():
        expected = attached.model(**batch()).logits
    monkeypatch.setattr(Grouped, "encode", never)
    monkeypatch.setattr(Bounded, "encode", never)
    with attached.saving(), torch.no_grad():
        assert torch.equal(attached.model(**batch()).logits, expected)


# Arms


def setting(arm: str, base: Path, **training: Any) -> trial.Setting:
    given = {"epochs": 2, "precision": "float32", "batch": 16, **training}
    return trial.Setting(arm=arm, base=str(base), data=text_data(), training=given, cache=False, device="cpu")


def test_the_brick_is_the_tuners_own(text_base: Path, tmp_path: Path) -> None:
    """Trained with exact codes it holds what the tuner alone learns; with 4 bits the same tensors, near these."""
    found = {}
    for name, arm in {
        "plain": "lora:r=4",
        "32": "lora:r=4 + s2a:bits=32,slope_bits=32,operand_bits=32",
        "4": "lora:r=4 + s2a:group=16",
    }.items():
        trial.run({"setting": asdict(setting(arm, text_base)), "folder": str(tmp_path / name)})
        found[name] = bricks.load(tmp_path / name / "brick").tensors()
    assert found["plain"].keys() == found["32"].keys() == found["4"].keys()
    for name, tensor in found["plain"].items():
        torch.testing.assert_close(found["32"][name], tensor, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(found["4"][n], t) for n, t in found["plain"].items())
    applied = bricks.load(tmp_path / "4" / "brick").apply()
    assert not any("forward" in vars(m) for m in applied.model.modules())


def test_a_run_that_fails_leaves_the_model_as_it_was(text_base: Path) -> None:
    ready = trial.prepare(setting("lora:r=4 + s2a", text_base), ("train",))
    attached = build(ready.plan, ready.base, ready.task, seed=0)
    with torch.no_grad():
        attached.parameters()[0].fill_(float("nan"))
    with pytest.raises(NotFinite):
        train(attached, ready.encoded["train"], None, ready.task, Training(steps=2), device="cpu")
    assert not any("forward" in vars(m) for m in attached.model.modules())


def test_the_cost_of_an_arm_is_counted_as_it_trains(text_base: Path) -> None:
    cost = {a: trial.probe({"setting": asdict(setting(a, text_base))}) for a in ("lora:r=4", "lora:r=4 + s2a:group=16")}
    plain, coded = cost.values()
    assert coded["saved_for_backward_bytes"] * 2 < plain["saved_for_backward_bytes"]
    assert coded["peak_bytes"] < plain["peak_bytes"] and not coded["hidden_saves"]


def test_bad_options_and_arms_are_refused(text_base: Path) -> None:
    for options in ({"bits": 3}, {"slope_bits": 6}, {"operand_bits": 5}, {"group": 1}):
        with pytest.raises(UsageError, match="s2a"):
            Config(**options)
    with pytest.raises(Refused, match="stands beside a tuner"):
        resolve(parse("linear-probe + s2a"))
    with pytest.raises(Refused, match="trains nothing"):
        resolve(parse("s2a"))
    with pytest.raises(Refused, match="converted twice"):
        model = AutoModelForSequenceClassification.from_pretrained(text_base)
        restore = convert(model, Config())
        try:
            convert(model, Config())
        finally:
            restore()


def test_what_cannot_be_coded_is_named_and_left_alone_if_asked() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.PReLU(), nn.BatchNorm1d(64), nn.GELU())
    with pytest.raises(Refused, match=r"1 \(PReLU\), 2 \(BatchNorm1d\)"):
        convert(model, Config())
    assert not any("forward" in vars(m) for m in model)
    restore = convert(model, Config(strict=False))
    assert [("forward" in vars(m)) for m in model] == [True, False, False, True]
    restore()
    with pytest.raises(Refused, match="nothing that could be coded"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 1)), Config())


# Modules


def test_fresh_modules_change_nothing_and_keep_little(text_base: Path, causal_base: Path) -> None:
    base = open_base(str(text_base))
    plain = base.model(TASK, seed=0).eval()
    for kind in ("bias", "side"):
        attached = build(resolve(parse(f"s2a-modules:kind={kind}"), TASK), base, TASK, seed=0)
        with torch.no_grad():
            assert torch.equal(attached.model.eval()(**batch()).logits, plain(**batch()).logits)
        names = {n for n, _ in attached.model.named_parameters()}
        attached.detach()
        assert {n for n, _ in attached.model.named_parameters()} == {n for n, _ in plain.named_parameters()}
        assert kind == "bias" or len(names) == len(list(plain.named_parameters())) + 4


def test_prompts_train_alone_are_read_by_every_block_and_go_again(text_base: Path) -> None:
    base = open_base(str(text_base))
    plain = base.model(TASK, seed=0).eval()
    attached = build(resolve(parse("s2a-modules:kind=prompt,tokens=3"), TASK), base, TASK, seed=0)
    trained = {n: p for n, p in attached.model.named_parameters() if p.requires_grad}
    [prompts] = [p for n, p in trained.items() if not n.startswith("classifier.")]
    width, layers = base.width, prompts.shape[0]
    assert prompts.shape == (layers, 3, width) and layers == attached.model.config.num_hidden_layers
    attached.model.eval()
    attached.model(**batch()).logits.square().sum().backward()
    assert prompts.grad is not None and (prompts.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert attached.model(**batch()).logits.shape == plain(**batch()).logits.shape
    with torch.no_grad():
        assert not torch.equal(attached.model(**batch()).logits, plain(**batch()).logits)
        attached.detach()
        assert torch.equal(attached.model.eval()(**batch()).logits, plain(**batch()).logits)


def test_a_base_without_biases_is_refused_until_some_are_added(causal_base: Path) -> None:
    from brickyard.tune.s2a_modules import Config as Modules
    from brickyard.tune.s2a_modules import attach

    model = AutoModelForCausalLM.from_pretrained(causal_base)
    before = {n for n, _ in model.named_parameters()}
    with pytest.raises(Refused, match="add_bias=true"):
        attach(model, Modules(kind="bias"), TASK)
    logits = model.eval()(**batch()).logits
    attached = attach(model, Modules(kind="bias", add_bias=True), TASK)
    assert torch.equal(model(**batch()).logits, logits)
    assert len(attached.parameters()) == 2 * 7  # every linear layer of two blocks, not the output layer
    attached.detach()
    assert {n for n, _ in model.named_parameters()} == before
    for options in ({"r": 0}, {"tokens": 0}, {"bits": 3}, {"kind": "side", "add_bias": True}):
        with pytest.raises(UsageError, match="s2a-modules"):
            Modules(**options)


@pytest.mark.parametrize("grad", [True, False])
def test_a_branch_in_full_precision_runs_beside_a_base_in_half(grad: bool) -> None:
    side = Side(16, 4, 4)
    nn.init.normal_(side.up.weight)
    x = gaussian(2, 5, 16).bfloat16().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = side(x)
    torch.testing.assert_close(y, side(x.float()), rtol=0, atol=0)
    if grad:
        y.sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.bfloat16 and side.down.weight.grad.any()  # type: ignore[union-attr]
