"""The PEFT bridge: all that PEFT offers must work for our methods, and what PEFT ignores silently must be an error."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from bridged import MOS, bert, config, gpt2, logits, made_up_methods, same, stir, stirred, wrapped
from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from brickyard.core import inject, inject_tuner
from brickyard.core.errors import BadBrick, BadMix, NotFinite, Refused, UnknownName, Unmatched, UsageError
from brickyard.core.inject import BrickyardConfig, BrickyardLinear

__all__ = ["made_up_methods"]
pytestmark = [
    pytest.mark.usefixtures("made_up_methods"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def test_the_type_is_registered_once_and_is_a_full_member_of_the_enum():
    before = list(PeftType)
    inject.register()
    assert list(PeftType) == before and before.count("BRICKYARD") == 1
    member = PeftType("BRICKYARD")
    assert member is PeftType.BRICKYARD and member is pickle.loads(pickle.dumps(member)) and member.name == "BRICKYARD"  # type: ignore[attr-defined]  # noqa: S301
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is BrickyardConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member].prefix == "brick_"
    assert isinstance(PeftType.LORA, PeftType) and json.dumps(member) == '"BRICKYARD"'


def test_a_name_taken_by_someone_else_is_refused(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("BRICKYARD"), LoraConfig)
    with pytest.raises(Refused, match="another library"):
        inject.register()


@pytest.mark.parametrize("name", ["mos", "scaled", "dense", "nested"])
def test_a_new_adapter_changes_nothing_and_only_it_trains(name):
    plain = bert()
    before = logits(plain)
    model = wrapped(name, model=plain)
    assert same(logits(model), before)
    training = [n for n, p in model.named_parameters() if p.requires_grad]
    assert training and all(".brick_" in n for n in training)
    stir(model, "default")
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with model.disable_adapter():
        assert same(logits(model), before)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("name", ["mos", "scaled", "dense", "nested"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_stored_adapter_loads_bit_for_bit_under_another_name(name, low_memory, tmp_path):
    model = stirred(name, modules_to_save=["classifier"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_memory)
    assert same(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    third = wrapped(name, model=bert(), modules_to_save=["classifier"])
    result = third.load_adapter(tmp_path, "second")
    assert not [key for key in result.missing_keys if "brick_" in key or "classifier" in key]
    third.set_adapter("second")
    assert same(logits(third), expected)
    ours = {k: t for k, t in get_peft_model_state_dict(third, adapter_name="second").items() if "brick_" in k}
    assert ours and all(same(t, get_peft_model_state_dict(model)[k]) for k, t in ours.items())


def test_the_stored_config_is_the_same_bytes_every_time_and_holds_the_seed(tmp_path):
    torch.manual_seed(11)
    model = wrapped(seed=None)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(stored["seed"], int) and stored["method"] == "mos" and stored["options"]["r"] == 4
    assert stored["target_modules"] == sorted(stored["target_modules"]) and stored["peft_type"] == "BRICKYARD"
    fresh = wrapped(seed=stored["seed"])
    for key, tensor in get_peft_model_state_dict(fresh).items():
        assert same(tensor, get_peft_model_state_dict(model)[key])


def test_two_methods_live_in_one_model_and_do_not_touch_each_other(tmp_path):
    plain = bert()
    base = logits(plain)
    model = stirred("mos", "first", plain)
    alone = logits(model)
    model.add_adapter("second", config("scaled", target_modules=["key", "value"]))
    assert same(logits(model), alone), "an adapter that is not active must not act"
    stir(model, "second", seed=6)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, alone) and not torch.allclose(second, base)
    model.save_pretrained(tmp_path)
    assert same(logits(PeftModel.from_pretrained(bert(), tmp_path / "second")), second)
    model.base_model.set_adapter(["first", "second"])
    assert not torch.allclose(logits(model), second)
    model.set_adapter("first")
    assert same(logits(model), alone)
    model.delete_adapter("second")
    assert same(logits(model), alone) and not [n for n, _ in model.named_parameters() if "second" in n]
    model.add_adapter("second", config(seed=8))
    model.set_adapter("second")
    assert same(logits(model), base)
    model.delete_adapter("first")
    assert not [n for n, _ in model.named_parameters() if "first" in n.split(".")]


def test_loading_a_second_adapter_for_inference_leaves_the_first_trainable(tmp_path):
    stirred().save_pretrained(tmp_path)
    model = wrapped()
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(tmp_path, "second")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    model.set_adapter("second")
    assert {n.replace("second", "default") for n, p in model.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize("name", ["mos", "dense", "nested", "scaled-weight"])
def test_merging_agrees_and_unmerging_gives_the_weights_back_bit_for_bit(name):
    plain = bert()
    before = {n: p.clone() for n, p in plain.named_parameters()}
    model = stirred(name, model=plain)
    adapted = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert same(logits(model), adapted)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, BrickyardLinear)]
    torch.testing.assert_close(logits(merged), adapted, rtol=0, atol=1e-5)
    unloaded = model.unload()
    assert all(same(p, before[n]) for n, p in unloaded.named_parameters())


def test_a_merge_that_cannot_be_whole_changes_nothing():
    model = stirred()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "pool_b-bert-encoder-layer-inter" in n)[0, 0] = float("inf")
    weights = [layer.base_layer.weight.clone() for _, layer in model.base_model.layers()]
    with pytest.raises(NotFinite, match="intermediate"):
        model.merge_adapter(safe_merge=True)
    layers = [layer for _, layer in model.base_model.layers()]
    assert all(same(w, layer.base_layer.weight) for w, layer in zip(weights, layers, strict=True))
    with pytest.raises(Refused, match="no change of the weight"):
        stirred("scaled").merge_and_unload()
    with pytest.raises(UnknownName, match="adapter 'defalt'"):
        stirred().merge_adapter(["defalt"])
    both = stirred("scaled-weight", "first")
    both.add_adapter("second", config("scaled-weight"))
    both.base_model.set_adapter(["first", "second"])
    with pytest.raises(Refused, match="merge it alone"):
        both.merge_adapter()


def test_a_weight_that_two_modules_share_is_not_merged_into():
    plain = bert()
    layers = plain.bert.encoder.layer
    layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    with pytest.raises(Refused, match="tied"):
        stirred(model=plain).merge_adapter()


def test_each_row_of_a_batch_is_served_by_its_own_adapter():
    plain = bert()
    base = logits(plain)
    model = stirred("mos", "one", plain, modules_to_save=["classifier"])
    model.add_adapter("two", config("scaled", target_modules=["key"]))
    stir(model, "two", seed=9)
    rows = {"__base__": base, "one": logits(model)}
    model.set_adapter("two")
    rows["two"] = logits(model)
    names = ["two", "__base__", "one", "two"]
    mixed = logits(model, adapter_names=names)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], rows[name][i], rtol=0, atol=1e-6)
    assert same(logits(model), rows["two"]), "the hooks must be gone after the call"


def test_a_mixed_batch_that_cannot_be_served_is_an_error():
    model = stirred()
    with pytest.raises(ValueError, match="do not exist"):
        logits(model, adapter_names=["default", "typo", "default", "default"])
    with pytest.raises(BadMix, match="2 adapter_names were given for a batch of 4"):
        logits(model, adapter_names=["default", "default"])
    with pytest.raises(BadMix, match="one name per row"):
        logits(model, adapter_names="default")
    with pytest.raises(BadMix, match="training mode"):
        logits(model.train(), adapter_names=["default"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(BadMix, match="merged"):
        logits(model, adapter_names=["default"] * 4)


def test_beam_search_repeats_the_names_of_a_mixed_batch():
    plain = gpt2(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    made = BrickyardConfig(method="mos", options=MOS, target_modules=["c_attn", "c_fc"], seed=1, task_type="CAUSAL_LM")
    ids = torch.tensor([[1, 4, 5], [1, 7, 8]])
    more = {"attention_mask": torch.ones_like(ids), "num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    base = plain.generate(input_ids=ids, **more)
    model = get_peft_model(plain, made).eval()
    stir(model, "default", size=3.0)
    own_ids = model.generate(input_ids=ids, **more)
    assert not same(own_ids, base)
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__"], **more)
    assert same(mixed[0], own_ids[0]) and same(mixed[1], base[1])


def test_a_transposed_layer_is_adapted_merged_and_exported(tmp_path):
    plain = gpt2()
    ids = torch.arange(12).view(2, 6)
    copied = copy.deepcopy(plain)
    model = stirred(model=plain, target_modules=["c_attn", "mlp.c_proj"])
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        inject.to_lora(model, "default", tmp_path)
        again = PeftModel.from_pretrained(copied, tmp_path)
        torch.testing.assert_close(again(input_ids=ids).logits, adapted, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["query", "valeu"]}, "'valeu' matches no layer.*value"),
        ({"target_modules": ["nothing"]}, "'nothing' matches no layer"),
        ({"target_modules": r".*\.nothing"}, "matches no layer"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules entry 'nothing'"),
        ({"layers_to_transform": [1, 9]}, "layers_to_transform holds 9"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, "'query' matches no layer"),
    ],
)
def test_a_pattern_that_matches_nothing_or_only_partly_is_an_error(changes, message):
    plain = bert()
    before = [n for n, _ in plain.named_modules()]
    with pytest.raises(Unmatched, match=message):
        wrapped(model=plain, **changes)
    assert [n for n, _ in plain.named_modules()] == before, "a refused adapter leaves the model as it was"


def test_layer_numbers_and_exclusions_hold_for_every_way_of_naming_targets():
    for targets in (None, r".*\.query", ["bert.encoder.layer.0.attention.self.query", "value"]):
        with pytest.raises(UsageError, match="layers_to_transform does not hold"):
            wrapped(target_modules=targets, layers_to_transform=[1], options={**MOS, "r": 2})
    few = wrapped(target_modules=None, exclude_modules=["query", "key"])
    assert len(few.base_model.targeted_module_names) == 4 * 4
    assert not [name for name, _ in few.base_model.layers() if name.endswith(("query", "key"))]
    by_role = wrapped(target_modules=None, options={**MOS, "target": ["query", "up"]})
    assert len(by_role.base_model.targeted_module_names) == 4 * 2


def test_pefts_own_status_and_task_types_work_with_ours(tmp_path):
    model = wrapped(target_modules=None, task_type="SEQ_CLS")
    stir(model, "default")
    status = model.get_model_status()
    assert status.enabled is True and status.requires_grad == {"default": True} and status.merged_adapters == []
    layers = [layer for layer in get_layer_status(model) if layer.module_type == "BrickyardLinear"]
    assert len(layers) == 4 * 6 and all(layer.available_adapters == ["default"] for layer in layers)
    model.save_pretrained(tmp_path)
    assert same(
        logits(PeftModel.from_pretrained(bert(1), tmp_path)), logits(PeftModel.from_pretrained(bert(1), tmp_path))
    )
    assert same(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model)), "the head travels"
    with pytest.raises(ValueError, match="shared"):
        inject_adapter_in_model(config(), bert())


@pytest.mark.parametrize("name", ["brick", "_", "query", "weight", "model", "keys", "__base__"])
def test_an_adapter_name_that_would_lose_tensors_is_refused(name):
    with pytest.raises(Refused, match="adapter name"):
        inject_tuner.BrickyardTuner(bert(), {name: config()}, name)


def test_layers_that_are_no_matrix_product_are_refused_with_the_reason():
    with pytest.raises(Refused, match="embedding"):
        wrapped(target_modules=["word_embeddings"])
    with pytest.raises(Refused, match="BertAttention"):
        wrapped(target_modules=["attention"])
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(Refused, match="convolution"):
        get_peft_model(convolution, config(target_modules=["0"]))
    adapted = get_peft_model(bert(), LoraConfig(target_modules=["query"]), adapter_name="plain").base_model.model
    del adapted.peft_config
    with pytest.raises(Refused, match="another PEFT type"):
        inject_tuner.BrickyardTuner(adapted, {"mine": config(target_modules=["query"])}, "mine")
    with pytest.raises(UsageError, match="bias"):
        config(bias="some")
    with pytest.raises(BadBrick, match="format 99"):
        config(format=99)


class Quantised(nn.Linear):
    """Stands for a quantised layer: integers in `weight`, a scale beside them."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features)
        self.bias = plain.bias
        self.scale = plain.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.float() * self.scale, self.bias)


def test_a_quantised_base_is_adapted_but_never_merged_into():
    plain = bert()
    for block in plain.bert.encoder.layer:
        block.attention.self.query = Quantised(block.attention.self.query)
    base = logits(plain)
    model = wrapped(model=plain, target_modules=["query"])
    assert same(logits(model), base)
    stir(model, "default")
    assert not torch.allclose(logits(model), base)
    with pytest.raises(Refused, match="quantised"):
        model.merge_adapter()
    assert same(logits(model.unload()), base)
