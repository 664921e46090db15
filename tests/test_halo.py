"""HALO: rotations change nothing by themselves, spread outliers before quantising, and the integers are exact."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

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

from brickyard.checks.halo import low_precision_share, make_outliers, one_layer
from brickyard.checks.s2a import enable_checkpoints
from brickyard.core import brick as bricks
from brickyard.core import measure, registry, trial
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import ParityBroken, Refused, Unmatched, UsageError
from brickyard.core.task import Task
from brickyard.optim import halo
from brickyard.optim._hadamard import next_size, transform
from brickyard.optim._low_precision import Codes, aligned, fp8_product, int8_product, multiply, quantise
from brickyard.optim.halo import Config, HaloForward, LowPrecision, convert, layers

TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
LEVELS = (0, 1, 2)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(tokens: int = 512, width: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """X with large channels, W, and E with large tokens."""
    x, w, e = gaussian(tokens, width), 0.02 * gaussian(width, width, seed=1), gaussian(tokens, width, seed=2)
    x[:, [3, 50, 90, 200]] *= 30
    e[[0, 17, 40, 66]] *= 30
    return x, w, e


def products(x: Tensor, w: Tensor, e: Tensor, config: Config, ready: Codes | None = None) -> tuple[Tensor, ...]:
    """(Y, E_X, G) of one layer."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = LowPrecision.apply(x, w, ready, config)
    return (y.detach(), *torch.autograd.grad(y, (x, w), e))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# Quantising and products


@given(st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_code_is_half_a_step_away_at_most_and_uses_the_range(n: int, size: float, seed: int) -> None:
    x = size * gaussian(n, seed=seed)
    codes = quantise(x, "int8")
    assert codes.values.dtype == torch.int8 and codes.scale.ndim == 0
    assert int(codes.values.abs().max()) == 127
    assert ((codes.values * codes.scale - x).abs() <= codes.scale * 0.5001).all()
    small = quantise(x, "fp8")
    assert small.values.dtype == torch.float8_e4m3fn and float(small.values.float().abs().max()) == 448
    # 3 bits behind the leading one; below 2^-6 steps of 2^-9
    assert ((small.values.float() * small.scale - x).abs() <= x.abs() / 16 + small.scale * 2**-10).all()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_zero_nothing_and_nan_keep_their_meaning(dtype: str) -> None:
    zero = quantise(torch.zeros(3, 4), dtype)
    assert not multiply(zero, zero.t(), torch.float32).any()
    assert quantise(torch.zeros(0, 4), dtype).values.shape == (0, 4)
    for bad in (float("nan"), float("inf")):
        spoiled = quantise(torch.tensor([[1.0, bad]]), dtype)
        assert multiply(spoiled, spoiled.t(), torch.float32).isnan().all()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 40, 5), (33, 16, 48), (2, 5000, 3)])
def test_int8_products_are_exact_by_either_path(m: int, k: int, n: int) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for shape in ((m, k), (n, k)))
    a[0], b[0] = 127, 127
    a[0, 0] = 126  # an odd sum beyond 2^24, which float32 has no number for
    exact = a.long() @ b.t().long()
    for found in (int8_product(a, b.t()), aligned(torch._int_mm, a, b.t())):
        assert found.dtype == torch.int32 and torch.equal(found.long(), exact)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 40, 5), (33, 16, 48)])
def test_float8_products_fit_the_kernel_of_accelerators(m: int, k: int, n: int) -> None:
    a, b = (gaussian(*shape, seed=i).to(torch.float8_e4m3fn) for i, shape in enumerate(((m, k), (n, k))))
    one = torch.ones(())
    kernel = lambda a, b: torch._scaled_mm(a, b, one, one, out_dtype=torch.float32)  # noqa: E731
    torch.testing.assert_close(aligned(kernel, a, b.t()), fp8_product(a, b.t()))


# One layer


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_without_quantising_all_three_products_are_the_plain_ones(level: int, tokens: int) -> None:
    if level == 2 and tokens == 1:
        return  # refused, below
    x, w, e = gaussian(tokens, 24), gaussian(20, 24, seed=1), gaussian(tokens, 20, seed=2)
    for found, exact in zip(
        products(x, w, e, Config(level=level, dtype="exact")), (x @ w.t(), e @ w, e.t() @ x), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(level: int) -> None:
    x = gaussian(2, 3, 12).double().requires_grad_()
    w = gaussian(5, 12, seed=1).double().requires_grad_()
    config = Config(level=level, dtype="exact")
    assert torch.autograd.gradcheck(lambda x, w: LowPrecision.apply(x, w, None, config), (x, w))


@pytest.mark.parametrize("level", LEVELS)
def test_int8_is_its_simulation_bit_for_bit(level: int) -> None:
    """The equations once more, in float64 products of rounded numbers, with no integer in sight."""
    x, w, e = with_outliers(tokens=70, width=1152)

    def q(t: Tensor) -> tuple[Tensor, Tensor]:
        s = t.abs().max() / 127
        return torch.round(t / s).double(), s

    def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return (a[0] @ b[0]).float() * (a[1] * b[1])

    xr, wr = (transform(t, transpose=True) if level else t for t in (x, w))
    (xq, sx), (wq, sw), eq = q(xr), q(wr), q(e)
    y = product((xq, sx), (wq.t(), sw))
    if level == 2:
        rotated = product(q(transform(F.pad(e, (0, 0, 0, 2)), 0)), (wq, sw))
        ex = transform(rotated, 0, transpose=True)[:70]
    else:
        ex = product(eq, (wq, sw))
    g = product((eq[0].t(), eq[1]), (xq, sx))
    expected = (y, transform(ex) if level else ex, transform(g) if level else g)
    assert next_size(70) == 72
    for found, wanted in zip(products(x, w, e, Config(level=level)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_rotations_lower_the_error_where_outliers_are_and_only_there() -> None:
    x, w, e = with_outliers()
    exact = (x @ w.t(), e @ w, e.t() @ x)

    def errors(level: int, dtype: Any = "int8") -> list[float]:
        found = products(x, w, e, Config(level=level, dtype=dtype))
        return [relative(a, b) for a, b in zip(found, exact, strict=True)]

    plain, inputs, both = (errors(level) for level in LEVELS)
    assert plain[0] > 4 * inputs[0] and inputs[0] == both[0]  # X H against channels
    assert plain[1] < 1.5 * inputs[1] and plain[1] > 4 * both[1]  # H_b E against tokens
    assert inputs[2] == both[2]
    small, rotated = errors(0, "fp8"), errors(2, "fp8")
    assert all(a < 1.5 * b for a, b in zip(small, rotated, strict=True))


def test_the_backward_pass_reads_the_codes_of_the_forward() -> None:
    x, w = gaussian(6, 16).requires_grad_(), gaussian(8, 16, seed=1).requires_grad_()
    saved = LowPrecision.apply(x, w, None, Config()).grad_fn.saved_tensors
    assert [(t.dtype, tuple(t.shape)) for t in saved] == [
        (torch.int8, (8, 16)),
        (torch.float32, ()),
        (torch.int8, (6, 16)),
        (torch.float32, ()),
    ]
    weight_only = LowPrecision.apply(x.detach(), w, None, Config()).grad_fn.saved_tensors
    inputs_only = LowPrecision.apply(x, w.detach(), None, Config()).grad_fn.saved_tensors
    assert [t is None for t in weight_only] == [True, True, False, False]
    assert [t is None for t in inputs_only] == [False, False, True, True]


def test_one_token_is_refused_where_tokens_are_rotated() -> None:
    with pytest.raises(Refused, match="this batch has one"):
        products(gaussian(1, 8), gaussian(4, 8), gaussian(1, 4), Config(level=2))
    products(gaussian(1, 8), gaussian(4, 8), gaussian(1, 4), Config(level=1))


# Whole models


def batch(rows: int = 5, tokens: int = 13) -> dict[str, Tensor]:
    ids = torch.randint(4, 27, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gradient(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients) of a step in evaluation mode: dropout would hide what is compared."""
    model.zero_grad()
    logits = model.eval()(**batch()).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def model_of(kind: str, text_base: Path, causal_base: Path) -> Any:
    if kind == "encoder":
        return AutoModelForSequenceClassification.from_pretrained(text_base)
    if kind == "llama":
        return AutoModelForCausalLM.from_pretrained(causal_base)
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=27, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3)
    return GPT2LMHeadModel(shape)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["encoder", "llama", "gpt2"])
def test_exact_operands_give_the_plain_model_and_undoing_gives_it_back(
    kind: str, level: int, text_base: Path, causal_base: Path
) -> None:
    model = model_of(kind, text_base, causal_base)
    logits, exact = gradient(model)
    restore = convert(model, Config(level=level, dtype="exact"))
    replaced = {n for n, m in model.named_modules() if isinstance(vars(m).get("forward"), HaloForward)}
    found_logits, found = gradient(model)
    restore()
    assert len(replaced) == {"encoder": 12, "llama": 14, "gpt2": 8}[kind] and "lm_head" not in replaced
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(m) for m in model.modules())


def test_int8_runs_in_training_and_checkpoints_and_never_at_rest(causal_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(causal_base).eval()
    with torch.no_grad():
        plain = model(**batch()).logits
    plain_gradient = gradient(model)[1]
    restore = convert(model, Config())
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, plain)
        coded = model.train()(**batch()).logits
    logits, found = gradient(model)
    assert torch.equal(coded, logits) and not torch.equal(coded, plain)
    for name, exact in plain_gradient.items():
        assert F.cosine_similarity(found[name].flatten(), exact.flatten(), dim=0) > 0.99, name
    enable_checkpoints(model.train(), {"use_reentrant": True})
    model.enable_input_require_grads()
    again = model(**batch()).logits
    model.zero_grad()
    again.square().mean().backward()
    restore()
    assert torch.equal(again, logits)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, found[name], rtol=1e-4, atol=1e-7)


def test_under_an_adapter_the_base_layers_change_and_are_quantised_once(
    causal_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task("causal-lm", "nats_per_token", None, 1, "text")
    attached = build(resolve(parse("lora:r=4 + halo"), task), open_base(str(causal_base)), task, seed=0)
    model = attached.model.train()
    with attached.saving():
        names = list(layers(model))
        assert len(names) == 14 and sum(name.endswith(".base_layer") for name in names) == 4
        assert not any("lora" in name for name in names)
        share = low_precision_share(model, lambda: model(**batch()).logits.sum())
        shapes: list[tuple[int, ...]] = []
        turn = halo.transform
        monkeypatch.setattr(
            halo, "transform", lambda x, *args, **named: (shapes.append(tuple(x.shape)), turn(x, *args, **named))[1]
        )
        first = model(**batch()).logits
        assert set(shapes) == {(65, 32), (65, 64)}  # inputs only
        with torch.no_grad():
            next(iter(layers(model).values())).weight.mul_(1.5)
        assert not torch.equal(model(**batch()).logits, first) and (32, 32) in shapes
        saved = measure.saved_for_backward(model, batch(), lambda logits: logits.sum())
        assert not saved.hidden
    # By hand: 65 tokens; all base layers but the first block's first three pass the error on, adapters learn, the head
    # (27 x 32) passes it on too.
    block = [32 * 32, 32 * 16, 32 * 16, 32 * 32, 32 * 64, 32 * 64, 64 * 32]
    low = 2 * 2 * sum(block) - sum(block[:3])
    adapters = [4 * 32 + 4 * 32, 4 * 32 + 4 * 16] * 2
    first_a = 4 * 32 + 4 * 32
    assert share == pytest.approx(low / (low + 3 * sum(adapters) - first_a + 2 * 27 * 32))


def test_under_autocast_operands_are_quantised_from_bfloat16(text_base: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(text_base)
    exact = gradient(model)[1]
    for config in (Config(), Config(level=0, dtype="fp8"), Config(level=1, dtype="exact")):
        restore = convert(model, config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer = next(iter(layers(model).values()))
            assert layer(gaussian(4, 32)).dtype == torch.bfloat16
            found = gradient(model)[1]
        restore()
        for name, wanted in exact.items():
            assert found[name].dtype == torch.float32
            if float(wanted.norm()) > 1e-4:
                assert F.cosine_similarity(found[name].flatten(), wanted.flatten(), dim=0) > 0.98, (config, name)


# Arms


@pytest.mark.parametrize("tuner", ["full:lr=3e-3", "lora:r=4,lr=2e-2"])
def test_an_arm_learns_and_stores_the_brick_of_its_tuner(tuner: str, text_base: Path, tmp_path: Path) -> None:
    training = {"epochs": 6, "precision": "float32", "batch": 16}
    asked = trial.Setting(
        arm=f"{tuner} + halo", base=str(text_base), data=text_data(), training=training, cache=False, device="cpu"
    )
    result = trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    assert result["score"]["mean"] > 0.8
    made, base = bricks.load(tmp_path / "brick"), open_base(str(text_base))
    assert made.tensors().keys() == build(resolve(parse(tuner), TASK), base, TASK, seed=0).tensors().keys()
    assert not any("forward" in vars(m) for m in made.apply().model.modules())


def test_codes_are_kept_in_place_of_inputs_and_nothing_out_of_sight(text_base: Path) -> None:
    sizes = {}
    for arm in ("full", "full + halo"):
        attached = build(resolve(parse(arm), TASK), open_base(str(text_base)), TASK, seed=0)
        with attached.saving():
            saved = measure.saved_for_backward(attached.model, batch(20, 40), lambda logits: logits.sum())
        sizes[arm] = saved.bytes
        assert not saved.hidden
    assert sizes["full + halo"] < 0.95 * sizes["full"]


def test_what_does_not_fit_is_refused_with_a_reason(text_base: Path, causal_base: Path) -> None:
    wrong: list[dict[str, Any]] = [{"level": 3}, {"dtype": "int4"}]
    for options in wrong:
        with pytest.raises(UsageError, match="halo"):
            Config(**options)
    with pytest.raises(UsageError, match="dtype"):
        registry.config("halo", {"dtype": "fp4"})
    assert registry.config("halo", {"preset": "halo0_fp8"}) == Config(level=0, dtype="fp8")
    with pytest.raises(Refused, match="both a way to run the layers"):
        resolve(parse("full + s2a + halo"))
    with pytest.raises(Refused, match="stands beside a tuner"):
        resolve(parse("linear-probe + halo"))
    model: Any = AutoModelForSequenceClassification.from_pretrained(text_base)
    restore = convert(model, Config())
    with pytest.raises(Refused, match="converted twice"):
        convert(model, Config())
    restore()
    with pytest.raises(Unmatched, match="nosuch"):
        convert(model, Config(skip=("nosuch",)))
    assert len(layers(model, ("query", "down"))) == 8
    with pytest.raises(Refused, match="no linear layer in repeated blocks"):
        convert(nn.Sequential(nn.Linear(8, 8)), Config())
    first = model.bert.encoder.layer[0].attention.self
    kept = first.query
    first.query = nn.LazyLinear(32)
    first.query.weight, first.query.bias = kept.weight, kept.bias
    with pytest.raises(Refused, match=r"query is a LazyLinear.*skip"):
        convert(model, Config())
    first.query = copy.deepcopy(kept)
    first.query.weight = nn.Parameter(kept.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(Refused, match=r"torch.uint8, a quantised weight"):
        convert(model, Config())
    assert not any("forward" in vars(m) for m in model.modules())


def test_widths_without_a_rotation_are_named_and_can_be_left_out() -> None:
    shape = BertConfig(vocab_size=27, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=34)
    model = AutoModelForSequenceClassification.from_config(shape)
    with pytest.raises(Refused, match=r"output.dense has 34 inputs.*32 and 36.*level=0"):
        convert(model, Config())
    for config in (Config(level=0), Config(skip=("down",))):
        convert(model, config)()


@pytest.mark.parametrize(
    "arm", ["mos:r=3,e=2,p=1,l=2", "ia3", "adalora", "bitfit", "s2a-modules:kind=side,r=4", "iapt"]
)
def test_it_stands_beside_any_tuner(arm: str, text_base: Path) -> None:
    attached = build(resolve(parse(arm), TASK), open_base(str(text_base)), TASK, seed=0)
    with torch.no_grad():
        for i, p in enumerate(attached.parameters()):
            p.add_(0.05 * gaussian(*p.shape, seed=i))
    logits, exact = gradient(attached.model)
    attached.convert = lambda model: convert(model, Config(dtype="exact"))
    with attached.saving():
        found_logits, found = gradient(attached.model)
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5)
    attached.convert = lambda model: convert(model, Config())
    with attached.saving():
        assert not torch.equal(gradient(attached.model)[0], logits)


@pytest.mark.parametrize("arm", ["hut:r=2", "lst:r=2,init=random"])
def test_tuners_that_go_past_the_layers_are_refused(arm: str, text_base: Path) -> None:
    attached = build(resolve(parse(f"{arm} + halo"), TASK), open_base(str(text_base)), TASK, seed=0)
    with pytest.raises(Refused, match="halo: "), attached.saving():
        pass


def test_float8_must_be_there(text_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise TypeError("no such type here")

    model = AutoModelForSequenceClassification.from_pretrained(text_base)
    monkeypatch.setattr(halo.torch, "ones", missing)
    with pytest.raises(Refused, match="no float8 type"):
        convert(model, Config(dtype="fp8"))


# The check


def test_the_check_of_one_layer_finds_what_it_claims() -> None:
    found = one_layer(registry.find("halo").record.claims[0], tokens=512, width=256, draws=8)
    assert found["holds"] is True and found["gate"]["holds"] and found["control"]["destroyed"], found["detail"]
    assert found["low"] >= 4 and found["figures"]["fp8_gain"]["Y"][0] < 1.5


def test_outliers_change_no_output_and_hurt_plain_int8_more(causal_base: Path, text_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(causal_base)
    before = gradient(model)[0]
    readers = make_outliers(model, batch())
    assert sorted(len(of) for of in readers.values()) == [2, 2, 3, 3]
    exact = gradient(model)[0]
    torch.testing.assert_close(exact, before, rtol=1e-3, atol=1e-4)
    error = {}
    for level in (0, 1):
        restore = convert(model, Config(level=level))
        error[level] = relative(gradient(model)[0], exact)
        restore()
    assert error[0] > 1.2 * error[1]
    with pytest.raises(ParityBroken, match="feeds more"):  # an encoder's norm is read by the residual sum too
        make_outliers(AutoModelForSequenceClassification.from_pretrained(text_base), batch())
