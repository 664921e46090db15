"""HUT: the transformed weight, its tiled gradients, and PEFT's HiRA, with which one form of it coincides."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from bridged import bert, logits, words
from bridged import stir as stir_adapter
from peft import HiraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F

from brickyard.checks.hut import RANK, WIDTH, flops
from brickyard.core import registry
from brickyard.core.errors import Refused, UsageError
from brickyard.core.inject import BrickyardConfig, BrickyardLinear, register, to_lora
from brickyard.core.measure import saved_for_backward_bytes
from brickyard.core.task import Task
from brickyard.tune import hut

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
register()


def model(variant: str = "one-plus", stirred: bool = True, **options: object) -> PeftModel:
    given = {"r": 3, "variant": variant, **options}
    made = get_peft_model(bert(), BrickyardConfig(method="hut", options=given, seed=1))
    if stirred:
        stir_adapter(made, "default")
    return made.eval()


def layer_of(made: PeftModel) -> BrickyardLinear:
    return next(m for m in made.modules() if isinstance(m, BrickyardLinear))


@pytest.mark.parametrize("variant", hut.VARIANTS)
def test_a_new_adapter_changes_nothing(variant: str) -> None:
    torch.testing.assert_close(logits(model(variant, stirred=False)), logits(bert()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", hut.VARIANTS)
def test_one_product_equals_the_dense_form_in_value_and_gradients(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hut, "ROWS", 5)  # tiles that do not divide the layer
    layer = layer_of(model(variant)).double()
    part = layer.part("default")
    x = torch.randn(2, 7, layer.in_features, dtype=torch.float64, requires_grad=True)
    a_rn, b_mr, scale, offset = hut.gain(layer.bound["default"].config, part)
    dense = F.linear(x, part.weight * (offset + scale * b_mr @ a_rn), layer.base_layer.bias)  # type: ignore[arg-type]
    found = layer(x)
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-12)
    pull = torch.randn_like(found)
    trained = [x, part["a"], part["b"]]
    for mine, theirs in zip(
        torch.autograd.grad(found, trained, pull), torch.autograd.grad(dense, trained, pull), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_it_takes_the_steps_of_pefts_hira() -> None:
    ours = get_peft_model(bert(), BrickyardConfig(method="hut", options={"r": 3}, seed=1)).train()
    theirs = get_peft_model(bert(), HiraConfig(r=3, target_modules=["query", "value"])).train()
    for m in (*ours.modules(), *theirs.modules()):
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    pairs = []
    for (name, mine), (_, other) in zip(
        ((n, m) for n, m in ours.named_modules() if isinstance(m, BrickyardLinear)),
        ((n, m) for n, m in theirs.named_modules() if hasattr(m, "hira_A")),
        strict=True,
    ):
        a, b = other.hira_A["default"], other.hira_B["default"]
        with torch.no_grad():
            a.copy_(mine.get_parameter("brick_a.default"))
        assert a.shape == mine.get_parameter("brick_a.default").shape and not b.any() and name
        pairs.append(((mine.get_parameter("brick_a.default"), a), (mine.get_parameter("brick_b.default"), b)))
    losses = []
    for made in (ours, theirs):
        optimiser = torch.optim.AdamW([p for n, p in made.named_parameters() if p.requires_grad], lr=3e-2)
        losses.append([])
        for _ in range(20):
            loss = F.cross_entropy(made(**words()).logits, torch.tensor([0, 1, 2, 0]))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_merging_is_exact_and_zero_weights_stay_zero(tmp_path: Path) -> None:
    for variant in hut.VARIANTS:
        made = model(variant)
        layer = layer_of(made)
        with torch.no_grad():
            layer.base_layer.weight[2:5, 1:4] = 0.0  # type: ignore[index]
        before = logits(made)
        made.merge_adapter()
        assert not layer.base_layer.weight[2:5, 1:4].any()  # type: ignore[index]
        torch.testing.assert_close(logits(made), before, rtol=1e-5, atol=1e-5)
        made.unmerge_adapter()
        exported = to_lora(made, "default", tmp_path / variant)
        plain = PeftModel.from_pretrained(bert(), str(tmp_path / variant))
        assert not exported.exact and exported.error < 1e-5 and plain is not None


def test_rows_of_a_batch_may_have_different_adapters() -> None:
    made = model()
    other = BrickyardConfig(
        method="hut", options={"r": 2, "variant": "pure"}, seed=2, target_modules=["query", "value"]
    )
    made.add_adapter("other", other)
    stir_adapter(made, "other", seed=9)
    alone = {}
    for name in ("default", "other"):
        made.set_adapter(name)
        alone[name] = logits(made.eval())
    mixed = logits(made, adapter_names=["default", "other", "default", "__base__"])
    torch.testing.assert_close(mixed[0], alone["default"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone["other"][1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[3], logits(bert())[3], rtol=1e-5, atol=1e-5)


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    loss = lambda found: found.square().mean()  # noqa: E731
    found = {
        name: saved_for_backward_bytes(made.train(), words(), loss)
        for name, made in (
            ("ours", get_peft_model(bert(), BrickyardConfig(method="hut", options={"r": 3}))),
            ("hira", get_peft_model(bert(), HiraConfig(r=3, target_modules=["query", "value"]))),
        )
    }
    assert found["ours"] < found["hira"]


def test_the_flops_are_counted_both_ways() -> None:
    claim = registry.find("hut").record.claims[1]
    found = flops(claim)
    whole, ahead = found["figures"]["step"], found["figures"]["forward"]
    assert ahead[4096] < 1 < ahead[16]  # the forward pass alone does get cheap
    assert whole[4096] > 1 and found["holds"] is False  # but the gradient of the weight is dense
    assert found["control"]["destroyed"] and found["figures"]["hira"][4096] > whole[4096]
    # By hand, for m = n = d and T tokens. LoRA: x W^T and g W, then 2 r d T for each of A x, B u and their 4 gradients.
    d, r, t = WIDTH, RANK, 512
    lora, rank_1 = 4 * d * d * t + 12 * r * d * t, 4 * d * d * t
    one_plus = 6 * d * d * t + 8 * r * d * d  # g^T x besides; B A twice, and the gradients of A and B
    assert {name: found["figures"]["flops"][name][t][1] for name in ("lora", "hut", "rank-1")} == {
        "lora": lora,
        "hut": one_plus,
        "rank-1": rank_1,
    }
    assert whole[t] == pytest.approx(1.44, abs=5e-3) and found["figures"]["rank-1"][t] == pytest.approx(0.94, abs=5e-3)


def test_the_detail_says_where_it_is_cheaper_and_where_not() -> None:
    detail = flops(registry.find("hut").record.claims[1])["detail"]
    step, ahead, rank_1 = detail.split("; ")
    assert step.endswith("(cheaper nowhere)") and rank_1.endswith("(cheaper everywhere)")
    assert ahead.endswith("(cheaper at 256, 512, 1024, 4096)")


@pytest.mark.parametrize("options", [{"variant": "other"}, {"r": 0}, {"scale": 0.0}], ids=str)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        hut.Config(**options)
    with pytest.raises(Refused, match="exceeds layer"):
        model(r=17)


@pytest.mark.parametrize("variant", hut.VARIANTS)
def test_small_changes_survive_autocast(variant: str) -> None:
    layer = layer_of(model(variant, stirred=False))
    part = layer.part("default")
    x = torch.randn(2, 7, layer.in_features)

    def under_autocast() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    before = under_autocast()
    with torch.no_grad():
        part["b"].copy_(torch.randn_like(part["b"]) * 1e-3)  # far below what bfloat16 can add to 1
        if variant == "rank-1":
            part["a"].copy_(torch.randn_like(part["a"]) * 1e-3)
    a_rn, b_mr, scale, offset = hut.gain(layer.bound["default"].config, part)
    bias = layer.base_layer.bias.bfloat16()  # type: ignore[union-attr,operator]
    weight = part.weight
    if variant == "rank-1":
        y = F.linear((x.bfloat16() * a_rn[0]).bfloat16(), weight.bfloat16())
        expected = (y * b_mr[:, 0]).bfloat16() + bias
    else:
        expected = F.linear(x.bfloat16(), (weight * (offset + scale * b_mr @ a_rn)).bfloat16()) + bias
    found = under_autocast()
    assert found.dtype == torch.bfloat16 and not torch.equal(found, before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    change = hut.weight(layer.bound["default"].config, part)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hut.weight(layer.bound["default"].config, part), change, rtol=0, atol=0)


@pytest.mark.parametrize("variant", hut.VARIANTS)
def test_a_backward_pass_under_autocast_is_that_outside_it(variant: str) -> None:
    layer = layer_of(model(variant))
    part = layer.part("default")
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.linspace(-1, 1, 3 * layer.in_features).view(3, -1)).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(y, [part["a"], part["b"]]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_whole_rows_and_columns_of_zeros_are_named() -> None:
    task = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hut.attach(bert(), hut.Config(r=2), task)
    base = bert()
    with torch.no_grad():
        layer = base.get_submodule("bert.encoder.layer.1.attention.self.query")
        layer.weight[3:5] = 0.0  # type: ignore[index,operator]
        layer.weight[:, 7] = 0.0  # type: ignore[index,operator]
        base.get_submodule("bert.encoder.layer.2.attention.self.value").weight[0, 0] = 0.0  # type: ignore[index,operator]
    told = r"stay zero: bert\.encoder\.layer\.1\.attention\.self\.query has 2 outputs and 1 inputs"
    with pytest.warns(UserWarning, match=told) as seen:
        hut.attach(base, hut.Config(r=2), task)
    assert "layer.2" not in str(seen[0].message)


@pytest.mark.parametrize("variant", hut.VARIANTS)
def test_the_export_of_a_base_in_double_precision_keeps_it(variant: str, tmp_path: Path) -> None:
    exported = to_lora(model(variant).double(), "default", tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for n, t in stored.items() if "lora_" in n} == {torch.float64} and exported.error < 1e-13
