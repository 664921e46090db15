"""The PEFT bridge in use: drawing per step, precision, kept factors, damaged files, LoRA export, `attach`, imports."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bridged import MOS, Options, bert, config, logits, made_up_methods, same, stir, stirred, words, wrapped
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from brickyard.core import inject, registry
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadBrick, BadMix, NotFinite, Refused, UnknownName, Unmatched, UsageError
from brickyard.core.inject import BrickyardConfig, BrickyardLinear
from brickyard.core.roles import match
from brickyard.core.task import Task
from brickyard.tune import mos

__all__ = ["made_up_methods"]
ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.usefixtures("made_up_methods"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def drawn(model: nn.Module, steps: int) -> list[set[int]]:
    """What each of `steps` training forwards drew, as the set over the layers."""
    model.train()
    out = []
    for _ in range(steps):
        model(**words())
        out.append({layer.drawn["default"] for layer in model.modules() if isinstance(layer, BrickyardLinear)})
    return out


def test_a_method_draws_once_a_step_for_all_layers_and_goes_on_after_a_resume(tmp_path):
    options = {"rank": 8}
    model = wrapped("nested", options=options)
    first = drawn(model, 6)
    assert all(len(ranks) == 1 for ranks in first) and len(set.union(*first)) > 1
    assert drawn(wrapped("nested", options=options), 6) == first
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    assert drawn(resumed, 5) == drawn(model, 5)
    assert drawn(wrapped("nested", options=options, seed=2), 6) != first
    stir(model, "default")
    model.eval()
    assert same(logits(model), logits(model)), "evaluation never draws"
    full = logits(model)
    names = [name for name, _ in model.base_model.layers()]
    model.base_model.choose("default", dict.fromkeys(names, 2))
    assert not same(logits(model), full)
    small = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), small, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    model.base_model.choose("default", None)
    assert same(logits(model), full)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model(**words()).logits.pow(2).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["mos", "nested"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    plain = stirred(name, model=bert(hidden_dropout_prob=0.0)).train()
    again = stirred(name, model=bert(hidden_dropout_prob=0.0)).train()
    inner = again.base_model.model
    getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)({"use_reentrant": False})
    expected, found = gradients(plain), gradients(again)
    assert expected.keys() == found.keys() and expected
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


@pytest.mark.parametrize("name", ["mos", "dense", "nested", "scaled"])
def test_bfloat16_autocast_trains_and_stays_near_full_precision(name):
    model = stirred(name).train()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model)
    for key, gradient in exact.items():
        assert rough[key].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(rough[key].flatten(), gradient.flatten(), dim=0) > 0.98
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), logits(model).float())


def test_an_adapter_of_a_half_precision_base_is_kept_in_full_precision(tmp_path):
    model = stirred(model=bert().to(torch.bfloat16), modules_to_save=["classifier"])
    ours = [t for k, t in get_peft_model_state_dict(model).items() if "brick_pool" in k]
    assert ours and all(t.dtype == torch.float32 for t in ours)
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "base_layer" in n)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert same(logits(again), logits(model))
    assert all(t.dtype == torch.float32 for n, t in again.named_parameters() if "brick_pool" in n)


def test_kept_factors_follow_every_change_of_what_they_come_from():
    model = stirred()
    layer = next(m for m in model.modules() if isinstance(m, BrickyardLinear))
    first = logits(model)
    kept = layer._factors["default"][1]
    logits(model)
    assert layer._factors["default"][1] is kept, "nothing changed, so nothing is assembled again"
    pool = layer.shared["default"]["pool_b"]
    with torch.no_grad():
        pool.mul_(2)
    doubled = logits(model)
    assert not same(doubled, first)
    pool.data = pool.data / 2
    assert same(logits(model), first)
    pool.data = pool.data * 3
    pool.data = pool.data / 3 * 2  # the first of two new storages may be freed and its address used again
    torch.testing.assert_close(logits(model), doubled)
    model.train()
    assert not layer._factors, "training never uses kept factors"
    model.zero_grad()
    before = gradients(model)
    assert any(".brick_pool" in key for key in before)


def test_a_model_with_adapters_can_be_copied_and_pickled():
    model = stirred(modules_to_save=["classifier"])
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    for other in (twin, again):
        assert same(logits(other), logits(model))
        pools = {id(p) for n, p in other.named_parameters() if "brick_pool" in n}
        layer = next(m for m in other.modules() if isinstance(m, BrickyardLinear))
        assert all(id(p) in pools for p in layer.shared["default"].parameters()), "its layers see its own pools"
    stir(twin, "default", seed=9)
    assert not same(logits(twin), logits(model))


def damage(folder: Path, change) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def pick(tensors: dict[str, torch.Tensor], word: str) -> str:
    return next(key for key in sorted(tensors) if word in key)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(pick(t, "pool_b")), BadBrick, "lacks"),
        (lambda t: t.update({"base_model.brick_more": torch.zeros(1)}), BadBrick, "unknown"),
        (lambda t: t.update({pick(t, "pool_a"): torch.zeros(3, 3)}), BadBrick, r"\(3, 3\)"),
        (lambda t: t[pick(t, "pool_a")].fill_(float("nan")), NotFinite, "NaN"),
        (lambda t: t.update({pick(t, "index_a"): t[pick(t, "index_a")].long()}), BadBrick, "int64"),
        (lambda t: t[pick(t, "index_a")].fill_(10**6), BadBrick, "does not fit"),
        (lambda t: t[pick(t, "index_b")].fill_(0), BadBrick, "does not fit"),
    ],
)
def test_a_damaged_adapter_is_refused_and_never_partly_loaded(change, error, message, tmp_path):
    model = stirred()
    model.save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(bert(), damage(tmp_path, change))
    attached = inject.attach(bert(), "mos", mos.Config(**MOS), None)
    tensors = attached.tensors()
    try:
        change(tensors)
    except RuntimeError:  # an in-place change of a tensor that is no parameter's copy
        return
    before = logits(attached.model)
    with pytest.raises(error, match=message):
        attached.load(tensors)
    assert same(logits(attached.model), before)


def test_a_missing_method_or_option_is_named():
    with pytest.raises(UnknownName, match="method 'mo'"):
        inject.BrickyardConfig(method="mo")
    with pytest.raises(UnknownName, match="option of mos 'rr'"):
        inject.BrickyardConfig(method="mos", options={"rr": 3})
    with pytest.raises(UsageError, match="method='mos'"):
        inject.BrickyardTuner(bert(), {"default": inject.BrickyardConfig(target_modules=["query"])}, "default")


def test_positions_are_counted_within_the_group_and_not_read_from_the_name():
    model = wrapped(layers_to_transform=[1, 3], options={**MOS, "r": 3})
    leaves = [layer.bound["default"].leaf for _, layer in model.base_model.layers()]
    assert [(leaf.position, leaf.count) for leaf in leaves if leaf.name.endswith("query")] == [(0, 2), (1, 2)]
    groups = {leaf.group for leaf in leaves}
    assert "bert.encoder.layer.attention.self.query.16x16" in groups and len(groups) == 3
    assert ["1" in leaf.name.split(".") for leaf in leaves if leaf.position == 0] == [True] * 3


def test_a_truncated_export_says_how_much_it_misses(tmp_path):
    model = stirred("dense")
    written = inject.to_lora(model, "default", tmp_path / "dense", max_rank=3)
    assert set(written.ranks.values()) == {3} and not written.exact
    lost = whole = 0.0
    tensors = load_file(tmp_path / "dense" / "adapter_model.safetensors")
    for name, layer in model.base_model.layers():
        low = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        change = layer.change("default").detach()
        lost, whole = lost + (change - low).pow(2).sum().item(), whole + change.pow(2).sum().item()
        best = torch.linalg.svdvals(change)[3]
        torch.testing.assert_close(torch.linalg.matrix_norm(change - low, 2), best, rtol=1e-4, atol=0)
    assert written.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4) and written.error > 0.05
    assert inject.to_lora(stirred(), "default", tmp_path / "mos", max_rank=2).error > 0.05
    with pytest.raises(Refused, match="no change of the weight"):
        inject.to_lora(stirred("scaled"), "default", tmp_path / "scaled")
    with pytest.raises(Refused, match="changes no layer"):
        inject.to_lora(wrapped("dense"), "default", tmp_path / "zero")
    with pytest.raises(UnknownName, match="adapter"):
        inject.to_lora(model, "defalt", tmp_path / "typo")
    with pytest.raises(UsageError, match="max_rank=0"):
        inject.to_lora(model, "default", tmp_path / "none", max_rank=0)
    assert not (tmp_path / "scaled").exists() and not (tmp_path / "zero").exists()


@pytest.mark.parametrize(
    "name, options", [("lora", {}), ("adalora", {}), ("fourierft", {"n_frequency": 9}), ("mos", {}), ("hut", {})]
)
def test_blocks_means_the_same_layers_to_every_tuner(name: str, options: dict[str, int]) -> None:
    """Else no tuner whose default it is could stand beside LoRA on the same layers."""
    model = bert()
    expected = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
    task = Task(kind="text-classification", metric="accuracy", labels=("a", "b"), width=2, input="text")
    module = registry.load(name)
    attached = module.attach(model, module.Config(target="blocks", **options), task)
    assert attached.matched == {"blocks": expected} and len(expected) == 4 * 6
    with pytest.raises(Unmatched, match="no repeated blocks with linear layers"):
        match(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ["blocks"])


def test_attach_gives_the_loop_all_it_needs_and_detach_gives_the_model_back():
    plain = bert()
    for parameter in plain.bert.embeddings.parameters():
        parameter.requires_grad_(False)
    trained = {n: p.requires_grad for n, p in plain.named_parameters()}
    weights = {n: p.clone() for n, p in plain.named_parameters()}
    before = logits(plain)
    attached = inject.attach(plain, "mos", mos.Config(**MOS), None)
    assert attached.peft and list(attached.matched) == ["blocks"] and len(attached.matched["blocks"]) == 4 * 6
    assert same(logits(attached.model.eval()), before)
    parameters = attached.parameters()
    assert len({id(p) for p in parameters}) == len(parameters) == 2 * 6 + 2, "each pool once, and the head"
    assert {id(p) for p in parameters} == {id(p) for p in attached.model.parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(attached.parameter_groups, lr=0.05)
    for _ in range(3):
        attached.model.train()(**words()).logits.pow(2).sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    after = logits(attached.model.eval())
    tensors = attached.tensors()
    assert not torch.allclose(after, before) and all(not t.requires_grad for t in tensors.values())
    other = inject.attach(bert(), "mos", mos.Config(**MOS), None)
    other.load(tensors)
    assert same(logits(other.model.eval()), after)
    attached.model.merge_adapter()
    gone = attached.detach()
    assert gone is plain and same(logits(gone), before)
    assert {n: p.requires_grad for n, p in gone.named_parameters()} == trained
    assert all(same(p, weights[n]) for n, p in gone.named_parameters())
    assert not hasattr(gone, "peft_config") and isinstance(gone.classifier, nn.Linear)


# Each child of a process that has imported transformers already meets peft and us in another order, or never us.
FRESH = """
import os, sys, torch, accelerate, pydantic, transformers.models.bert.modeling_bert
from transformers import AutoModelForSequenceClassification
assert "peft" not in sys.modules and "brickyard" not in sys.modules
kept = torch.load(sys.argv[1], weights_only=True)

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "brickyard":
            raise ImportError("brickyard must not be needed")

first = {
    "hook": "import brickyard; assert 'peft' not in sys.modules; import peft",
    "method": "import brickyard.tune.mos",
    "wrap": "import brickyard.core.wrap",
    "without": "sys.meta_path.insert(0, Blocked())",
}
for order, statement in first.items():
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, order
        print(order, flush=True)
        continue
    exec(statement)
    from peft import PeftModel
    for name in ("mos", "ragged", "dense") if order == "without" else ("adapter",):
        model = AutoModelForSequenceClassification.from_pretrained(kept["folder"] + "/base")
        model = PeftModel.from_pretrained(model.eval(), kept["folder"] + "/" + name)
        assert model.peft_config["default"].peft_type == ("LORA" if order == "without" else "BRICKYARD")
        with torch.no_grad():
            gap = (model(**kept["inputs"]).logits - kept["logits"][name]).abs().max().item()
        assert gap < 1e-4, (name, gap)
    assert ("brickyard" in sys.modules) == (order != "without")
    os._exit(0)
"""


def test_fresh_processes_answer_the_same_with_us_imported_in_any_order_and_as_lora_without_us(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    expected = {}
    for name, exact in (("mos", True), ("ragged", True), ("dense", False)):
        model = stirred(name, modules_to_save=["classifier"])
        expected[name] = logits(model)
        written = inject.to_lora(model, "default", tmp_path / name)
        assert written.exact is exact and written.error < 1e-6
        if name == "ragged":
            assert sorted(set(written.ranks.values())) == [1, 2] and len(written.ranks) == 6
        if name == "mos":
            model.save_pretrained(tmp_path / "adapter")
            expected["adapter"] = expected[name]
    torch.save({"folder": str(tmp_path), "inputs": words(), "logits": expected}, tmp_path / "expected.pt")
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["hook", "method", "wrap", "without"]


def test_a_model_may_be_trained_on_its_biases_too_but_says_what_that_costs(tmp_path):
    model = wrapped(bias="all")
    biases = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")]
    assert any("LayerNorm" in n for n in biases)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in biases:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    assert same(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model))
    with pytest.raises(Refused, match="biases"):
        inject.to_lora(model, "default", tmp_path / "lora")


@pytest.mark.parametrize("method", ["mos", "sora", "dylora"])
def test_what_is_kept_does_not_grow_with_the_adapters_on_a_base(method):
    options = MOS if method == "mos" else {"r": 4}
    model = get_peft_model(bert(), BrickyardConfig(method=method, options=options, seed=0), adapter_name="a0").eval()
    names = [f"a{i}" for i in range(4)]
    for i, name in enumerate(names):
        if i:
            model.add_adapter(name, BrickyardConfig(method=method, options=options, seed=i))
        stir(model, name, seed=i)
    layers = [m for m in model.modules() if isinstance(m, BrickyardLinear)]
    own = {}
    for name in names:
        model.set_adapter(name)
        own[name] = logits(model)
        assert all(set(layer._factors) <= {name} for layer in layers)
    kept = extra_bytes(model)
    mixed = logits(model, adapter_names=names)
    assert extra_bytes(model) <= kept
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], own[name][row], rtol=0, atol=1e-5)
    with torch.no_grad():
        for layer in layers:
            layer.change("a1")
    assert extra_bytes(model) <= kept, "neither do merges and exports keep what they made"
    if method != "mos":
        assert not kept, "sora's gate and dylora's slices need no copy"


def extra_bytes(model):
    """Bytes of kept factors that are no storage of a parameter."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = [t for m in model.modules() if isinstance(m, BrickyardLinear) for _, f in m._factors.values() for t in f[:2]]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in sizes.items() if place not in known)


def test_noise_in_place_of_zeros_is_there_for_tests_only():
    noisy = wrapped(init_weights=False)
    assert not torch.allclose(logits(noisy), logits(bert()), atol=1e-4)
    assert Options().rank == 2 and config(init_weights=False).init_weights is False


@pytest.mark.parametrize("arm", ["mos:r=3", "sora:r=4", "lora"])
def test_an_arm_serves_a_mixed_batch(arm: str, text_base: Path) -> None:
    task = Task(kind="text-classification", metric="accuracy", labels=("a", "b"), width=2, input="text")
    model = build(resolve(parse(arm), task), open_base(str(text_base)), task, seed=0).model.eval()
    inputs = {"input_ids": torch.arange(8).view(2, 4) + 1}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        base = model(**inputs).logits
        for name, p in model.named_parameters():
            if "brick_" in name or "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
        own, mixed = model(**inputs).logits, model(**inputs, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.stack([own[0], base[1]]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own, base, atol=1e-3)


@pytest.mark.parametrize("arm", ["ia3", "fourierft:n_frequency=20"])
def test_pefts_own_types_refuse_a_mixed_batch_that_they_would_ignore(arm: str, text_base: Path) -> None:
    task = Task(kind="text-classification", metric="accuracy", labels=("a", "b"), width=2, input="text")
    attached = build(resolve(parse(arm), task), open_base(str(text_base)), task, seed=0)
    model = attached.model.eval()
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    assert model(**inputs).logits.shape == (2, 2)
    with pytest.raises(BadMix, match="one adapter at a time"):
        model(**inputs, adapter_names=["default", "__base__"])
