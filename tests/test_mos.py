"""MoS against its equations: index plan, assembly, gradients, parameter counts, and plain LoRA as the special case."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from bridged import bert, logits, same, stir, words
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import Refused, UnknownName, UsageError
from brickyard.core.inject import BrickyardConfig, Leaf, Part, register, to_lora
from brickyard.core.inject_layer import BrickyardLinear
from brickyard.core.measure import saved_for_backward
from brickyard.core.task import Task
from brickyard.tune import mos

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
register()


def group(count: int, n: int = 16, m: int = 16, name: str = "block") -> tuple[Leaf, ...]:
    made = [(f"{name}.{i}.lin", i) for i in range(count)]
    return tuple(
        Leaf(name=path, group=f"{name}.lin.{m}x{n}", in_features=n, out_features=m, position=i, count=count)
        for path, i in made
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int = 1, **options: object) -> PeftModel:
    given = {"r": 4, "e": 2, "p": 1, "l": 4, "dropout": 0.0, **options}
    return get_peft_model(bert(), BrickyardConfig(method="mos", options=given, seed=seed)).eval()


def layers(peft_model: nn.Module) -> list[BrickyardLinear]:
    return [module for module in peft_model.modules() if isinstance(module, BrickyardLinear)]


@st.composite
def legal(draw):
    """(count, config) that the paper's conditions allow."""
    count, l = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 4]))
    e = draw(st.integers(1, 4))
    p = draw(st.integers(0, e))
    r = e if p == e else draw(st.integers(max(p, 1), count * (e - p) + p))
    return count, mos.Config(r=r, e=e, p=p, l=l, paired=draw(st.booleans()))


@given(legal(), st.integers(0, 2**31 - 1))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_layer_draws_public_rows_without_repeats_and_owns_its_private_rows(case, seed):
    count, config = case
    leaves = group(count, 16, 32)
    if config.r > 16:
        with pytest.raises(Refused, match="rank"):
            mos.plan(config, leaves, generator(seed))
        return
    plan = mos.plan(config, leaves, generator(seed))
    public, total = mos.rows(count, config)
    private = config.p * config.l
    pools = plan.shared[leaves[0].group]
    assert pools["pool_a"].shape == (total, 16 // config.l) and pools["pool_b"].shape == (total, 32 // config.l)
    assert total == count * config.e * config.l
    assert sum(p.numel() for p in pools.values()) == count * config.e * (16 + 32)
    for side in ("index_a", "index_b"):
        owners: Counter[int] = Counter()
        for leaf in leaves:
            index = plan.fixed[leaf.name][side]
            assert index.dtype == torch.int32 and index.shape == (config.r * config.l,)
            assert len(set(index.tolist())) == len(index), "drawn without replacement"
            assert all(0 <= i < public for i in index[: len(index) - private].tolist())
            own = index[len(index) - private :].tolist()
            assert own == list(range(public + leaf.position * private, public + (leaf.position + 1) * private))
            owners.update(i for i in index.tolist() if i >= public)
        assert all(times == 1 for times in owners.values()) and len(owners) == count * private
    again = mos.plan(config, leaves, generator(seed))
    for leaf in leaves:
        for side in ("index_a", "index_b"):
            assert same(plan.fixed[leaf.name][side], again.fixed[leaf.name][side])
        assert not config.paired or same(plan.fixed[leaf.name]["index_a"], plan.fixed[leaf.name]["index_b"])
        mos.check(config, Part(leaf, {**pools, **plan.fixed[leaf.name]}, None, False, None))


@given(st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(1, 5), st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_assembly_is_concatenation_and_scatter_is_its_adjoint(rank, l, width, seed):
    pool = torch.randn(4 * l + 3, width, generator=generator(seed), dtype=torch.float64)
    index = torch.randperm(len(pool), generator=generator(seed))[: rank * l].to(torch.int32)
    made = mos.assemble(pool, index, rank)
    for j in range(rank):
        shards = [pool[int(index[j * l + s])] for s in range(l)]
        assert same(made[j], torch.cat(shards))
    gradient = torch.randn(rank, l * width, generator=generator(seed + 1), dtype=torch.float64)
    back = mos.scatter(pool, index, gradient)
    torch.testing.assert_close((made * gradient).sum(), (pool * back).sum())
    assert not back[[i for i in range(len(pool)) if i not in index.tolist()]].any()


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_the_step_is_the_equation_and_its_gradient_is_exact(shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*shape[:-1], 6, dtype=torch.float64, requires_grad=True)
    pool_a = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    pool_b = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    index_a, index_b = torch.randperm(9)[:6].to(torch.int32), torch.randperm(9)[:6].to(torch.int32)
    step = mos.Assembled.apply
    a = pool_a[index_a.long()].reshape(3, 8)
    b = pool_b[index_b.long()].reshape(3, 6).t()
    torch.testing.assert_close(step(x, y, pool_a, pool_b, index_a, index_b, 3, 0.7), y + 0.7 * x @ a.t() @ b.t())
    assert torch.autograd.gradcheck(
        lambda x, y, pool_a, pool_b: step(x, y, pool_a, pool_b, index_a, index_b, 3, 0.7), (x, y, pool_a, pool_b)
    )
    loss = step(x, y, pool_a, pool_b, index_a, index_b, 3, 0.7).pow(2).sum()
    first = torch.autograd.grad(loss, pool_a, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.pow(2).sum().backward()


def test_a_fresh_adapter_starts_as_the_paper_says():
    fresh = model()
    assert same(logits(fresh), logits(bert()))
    for name, pool in fresh.named_parameters():
        if "brick_pool_a" in name:
            n = int(name.rsplit(".", 1)[0].rsplit("x", 1)[1])
            bound = 1 / math.sqrt(n)  # of the whole vector, not of a shard of it
            assert pool.abs().max() <= bound and pool.abs().max() > 0.9 * bound
        if "brick_pool_b" in name:
            assert not pool.any()
    layer = layers(fresh)[0]
    _, _, scaling = layer.factors("default")
    assert scaling == 16 / 4, "alpha over the assembled rank r, not over e"


def test_layers_differ_and_sides_are_drawn_apart():
    tuned = model()
    stir(tuned, "default")
    query = [layer for layer in layers(tuned) if layer.bound["default"].leaf.name.endswith("query")]
    for one in query:
        part = one.part("default")
        assert not same(part["index_a"], part["index_b"])
        assert sum(torch.allclose(one.change("default"), other.change("default")) for other in query) == 1
    sharing = model(r=8, p=0, l=1, paired=True)
    stir(sharing, "default")
    changes = [x.change("default") for x in layers(sharing) if x.bound["default"].leaf.name.endswith("query")]
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0])


def test_the_gradient_of_a_shard_is_the_sum_over_every_place_that_uses_it():
    tuned = model(p=0)
    stir(tuned, "default")
    for layer in layers(tuned):
        layer.base_layer.weight.requires_grad_(True)
    tuned(**words()).logits.pow(2).sum().backward()
    pool = dict(tuned.named_parameters())["base_model.brick_pool_a-bert-encoder-layer-output-dense-16x32.default"]
    expected, uses = torch.zeros_like(pool), torch.zeros(len(pool), dtype=torch.int64)
    for layer in layers(tuned):
        leaf, part = layer.bound["default"].leaf, layer.part("default")
        if leaf.group != "bert.encoder.layer.output.dense.16x32":
            continue
        _, b_mr, scaling = layer.factors("default")
        # d loss / d (s B A) = d loss / d W, because the layer computes (W + s B A) x.
        grad_a = scaling * b_mr.detach().t() @ layer.base_layer.weight.grad
        for k, row in enumerate(part["index_a"].tolist()):
            width = pool.shape[1]
            expected[row] += grad_a[k // 4, (k % 4) * width : (k % 4 + 1) * width]
            uses[row] += 1
    assert uses.max() > 1, "some shard must be used by more than one layer"
    torch.testing.assert_close(pool.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_sharing_it_is_lora_to_the_gradient(dropout):
    options = {"r": 3, "e": 3, "p": 3, "l": 1, "dropout": dropout}
    tuned = get_peft_model(bert().double(), BrickyardConfig(method="mos", options=options, seed=1))
    stir(tuned, "default")
    config = LoraConfig(
        r=3, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS, exclude_modules=["pooler.dense"]
    )
    lora = get_peft_model(bert().double(), config)
    twins = {name: m for name, m in lora.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert twins.keys() == {name for name, _ in tuned.base_model.layers()}
    with torch.no_grad():
        for name, layer in tuned.base_model.layers():
            a_rn, b_mr, _ = layer.factors("default")
            twins[name].lora_A["default"].weight.copy_(a_rn)
            twins[name].lora_B["default"].weight.copy_(b_mr)
    found = []
    for each in (tuned, lora):
        each.train()
        torch.manual_seed(4)
        out = each(**words()).logits
        out.pow(2).sum().backward()
        found.append(out)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    for name, layer in tuned.base_model.layers():
        part, rows = layer.part("default"), layer.part("default")["index_a"].long()
        for pool, twin in ((part["pool_a"], twins[name].lora_A), (part["pool_b"], twins[name].lora_B)):
            gradient = twin["default"].weight.grad
            gradient = gradient if twin is twins[name].lora_A else gradient.t()
            torch.testing.assert_close(pool.grad[rows], gradient, rtol=1e-9, atol=1e-9)


def test_several_forwards_add_up_in_one_gradient():
    tuned = model(p=0).train()
    stir(tuned, "default")
    losses = []
    for row in range(2):
        torch.manual_seed(row)
        losses.append(tuned(input_ids=words()["input_ids"][row : row + 1]).logits.pow(2).sum())
    pools = [p for n, p in tuned.named_parameters() if "brick_pool" in n]
    apart = [torch.autograd.grad(loss, pools, retain_graph=True) for loss in losses]
    (losses[0] + losses[1]).backward()
    for pool, first, second in zip(pools, *apart, strict=True):
        torch.testing.assert_close(pool.grad, first + second)


def test_what_trains_and_what_is_stored_is_counted_once():
    tuned = model()
    trained = [(n, p) for n, p in tuned.named_parameters() if p.requires_grad]
    n_plus_m = 4 * (16 + 16) + 2 * (16 + 32)
    assert sum(p.numel() for _, p in trained) == 4 * 2 * n_plus_m
    lora = get_peft_model(
        bert(), LoraConfig(r=2, target_modules=TARGETS, exclude_modules=["pooler.dense"])
    )  # LoRA of rank e
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == 4 * 2 * n_plus_m
    assert len(trained) == 2 * 6 == len({id(p) for _, p in trained}), "two pools for each of six groups"
    stored = get_peft_model_state_dict(tuned)
    assert len(stored) == 2 * 6 + 2 * 24
    assert all(t.dtype == torch.int32 and t.shape == (16,) for k, t in stored.items() if "index" in k)
    assert sum("index" in k for k in stored) == 48
    assert not any(t.requires_grad for k, t in stored.items() if "index" in k)


def test_the_published_parameter_counts_of_llama_2_7b():
    shapes = {**dict.fromkeys("qkvo", (4096, 4096)), "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    leaves = [leaf for name, (n, m) in shapes.items() for leaf in group(32, n, m, name)]
    config = mos.Config(r=8, e=2, p=1, l=4)
    counted = sum(
        pool.numel() for pools in mos.plan(config, leaves, generator()).shared.values() for pool in pools.values()
    )
    assert counted == 4_997_120


def test_the_adapter_file_is_smaller_than_the_lora_it_expands_to(tmp_path):
    tuned = model(r=5, l=1)
    stir(tuned, "default")
    tuned.save_pretrained(tmp_path / "mos")
    to_lora(tuned, "default", tmp_path / "lora")
    size = {name: sum(t.nbytes for t in tensors(tmp_path / name).values()) for name in ("mos", "lora")}
    assert size["lora"] / size["mos"] > 2.0, "5 / 2 but for the indices"


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_it_keeps_no_more_for_backward_than_lora_of_the_assembled_rank_and_hides_nothing():
    lora = get_peft_model(bert(), LoraConfig(r=4, target_modules=TARGETS, exclude_modules=["pooler.dense"]))
    inputs = words(8)
    kept = {
        name: saved_for_backward(each.train(), inputs, lambda out: out.pow(2).sum())
        for name, each in (("mos", model()), ("lora", lora))
    }
    assert kept["mos"].bytes <= kept["lora"].bytes and kept["mos"].hidden == ()


def test_merging_and_exporting_agree_with_the_adapter(tmp_path):
    tuned = model(r=7, e=3, l=2)
    stir(tuned, "default")
    adapted = logits(tuned)
    written = to_lora(tuned, "default", tmp_path)
    assert written.exact and set(written.ranks.values()) == {7}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), tmp_path)), adapted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "at least 0"),
        ({"e": 0}, "at least 1"),
        ({"l": 0}, "at least 1"),
        ({"p": -1}, "at least 0"),
        ({"p": 3, "e": 2}, "p=3 exceeds e=2; use p <= 2"),
        ({"p": 2, "e": 2, "r": 1}, "p=2 exceeds r=1; use p <= 1"),
        ({"p": 2, "e": 2, "r": 4}, "leaves no public shards"),
        ({"alpha": 0.0}, "positive"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        mos.Config(**options)


def test_layers_that_the_options_do_not_fit_are_named():
    with pytest.raises(Refused, match=r"l=3 .* 16 and 16 of layer bert\.encoder\.layer\.0\.attention\.self\.query"):
        model(l=3)
    with pytest.raises(Refused, match=r"cannot select more public shards than exist.*needs 20.*share 16; use r <= 5"):
        model(r=6)
    with pytest.raises(Refused, match="rank r=17 exceeds layer"):
        model(r=17, e=8)
    with pytest.raises(Refused, match=r"1 layers like bert\.pooler\.dense"):
        get_peft_model(bert(), BrickyardConfig(method="mos", options={"r": 4}, target_modules=["pooler.dense"]))


def test_every_arm_of_the_claims_is_legal_on_six_layers():
    record = registry.find("mos").record
    claims = [claim for claim in record.claims if claim.base == "embedded:minilm"]
    assert record.search["lr"] == (5e-4, 1e-3, 2e-3) and len(claims) == 3
    leaves = [*group(6, 384, 384, "query"), *group(6, 384, 1536, "up"), *group(6, 1536, 384, "down")]
    counts = {}
    for claim in claims:
        for name, text in {**claim.arms, claim.control["what"]: claim.control["arm"]}.items():
            piece = parse(text).pieces[0]
            if piece.name != "mos":
                continue
            plan = mos.plan(registry.config("mos", piece.options), leaves, generator())
            counts[name] = sum(p.numel() for pools in plan.shared.values() for p in pools.values())
    assert len(counts) == 4 and len(set(counts.values())) == 1, "every arm trains the same number of values"
    assert counts["mos"] * 8 == 6 * 16 * (768 + 2 * 1920), "1/8 of LoRA r=16"
    assert registry.config("mos", {"preset": "paper"}).r == 8
    assert registry.config("mos", {}) == mos.Config()
    with pytest.raises(UnknownName):
        registry.config("mos", {"rank": 3})


def test_the_claims_on_a_language_model_compare_arms_of_as_many_parameters():
    base, task = open_base("embedded:pylm"), Task("causal-lm", "bits_per_byte", None, 1, "text")
    arms: dict[str, str] = {}
    for claim in registry.find("mos").record.claims:
        arms |= claim.arms if claim.base == "embedded:pylm" else {}
    made = {name: build(resolve(parse(text), task), base, task, seed=0) for name, text in arms.items()}
    counts = {name: sum(p.numel() for p in attached.parameters()) for name, attached in made.items()}
    assert counts["mos"] == counts["sharing"] == counts["lora2"] == counts["lora16"] / 8


def test_without_a_rank_the_layers_say_how_many_shards_there_are(tmp_path):
    assert [mos.fitted(mos.Config(), group(count, 64, 64)).r for count in (2, 4, 6, 12)] == [3, 5, 7, 7]
    assert mos.fitted(mos.Config(r=2), group(12, 64, 64)).r == 2
    assert mos.fitted(mos.Config(p=2), group(12, 64, 64)).r == 2  # p = e: nothing is shared
    assert mos.fitted(mos.Config(e=8, l=1), group(12, 4, 64)).r == 4  # the narrower side
    model = get_peft_model(bert(), BrickyardConfig(method="mos", options={}, seed=1))
    layers = len(model.base_model.model.bert.encoder.layer)
    assert model.peft_config["default"].options == {"r": layers + 1}
    stir(model, "default")
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), str(tmp_path)).eval()
    assert again.peft_config["default"].options == {"r": layers + 1} and same(logits(again), logits(model))


def test_a_larger_budget_gets_a_larger_rank_and_errors_name_what_was_given():
    assert [mos.fitted(mos.Config(e=e), group(12, 64, 64)).r for e in (2, 3, 4, 8)] == [7, 12, 16, 32]
    assert mos.fitted(mos.Config(e=8), group(2, 64, 64)).r == 15  # no more shards than there are
    assert mos.fitted(mos.Config(e=8, p=8), group(12, 64, 64)).r == 8  # LoRA of rank 8
    with pytest.raises(Refused, match=r"p=5 private ranks exceed layer .* \(4 in, 64 out\); use p <= 4"):
        mos.fitted(mos.Config(e=8, p=5), group(12, 4, 64))
