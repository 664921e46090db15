"""core.base and core.roles: opening bases, building models on them, finding their parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from brickyard.core.base import HeadedModel, blocks, match, open_base, own_head, roles
from brickyard.core.errors import BadBase, NotFinite, Refused, Unmatched, UsageError
from brickyard.core.task import Task

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 40}
WORDS = [*(f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "EOS")), *(f"w{i}" for i in range(94))]

# name -> (configuration, class that the checkpoint is saved from)
ZOO: dict[str, tuple[Any, Any]] = {
    "bert": (hf.BertConfig(**TEXT), hf.BertModel),
    "bert-mlm": (hf.BertConfig(**TEXT), hf.BertForMaskedLM),
    "roberta": (hf.RobertaConfig(**TEXT, pad_token_id=1), hf.RobertaForMaskedLM),
    "distilbert": (
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=99, max_position_embeddings=40),
        hf.DistilBertForMaskedLM,
    ),
    "modernbert": (
        hf.ModernBertConfig(**TEXT, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
        hf.ModernBertForMaskedLM,
    ),
    "llama": (hf.LlamaConfig(**TEXT, num_key_value_heads=2), hf.LlamaForCausalLM),
    "gpt2": (
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=40, bos_token_id=4, eos_token_id=4),
        hf.GPT2LMHeadModel,
    ),
    "vit": (hf.ViTConfig(**SIZES, image_size=16, patch_size=8), hf.ViTModel),
    "resnet": (
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="bottleneck"),
        hf.ResNetForImageClassification,
    ),
    "convnext": (hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 1], num_stages=2), hf.ConvNextModel),
}
IMAGES = ("vit", "resnet", "convnext")
CLASSES = Task("text-classification", "accuracy", ("no", "yes", "maybe"), 3, "text")
PICTURES = Task("image-classification", "accuracy", ("0", "1", "2"), 3, "image")
NUMBER = Task("regression", "spearman", None, 1, "pair")


def write_tokenizer(folder: Path, eos: bool = False) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "[EOS]"} if eos else {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **named).save_pretrained(folder)


def write_base(folder: Path, name: str, **saving: Any) -> Path:
    config, kind = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder, **saving)
    if name in IMAGES:
        hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        write_tokenizer(folder, eos=name in ("llama", "gpt2"))
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("zoo")
    return {name: write_base(root / name, name) for name in ZOO}


def batch_of(base) -> dict[str, torch.Tensor]:
    if base.input == "image":
        pictures = [Image.fromarray(np.full((20, 20, 3), value, dtype=np.uint8)) for value in (10, 200)]
        return dict(base.processor(pictures, return_tensors="pt"))
    return dict(base.tokenizer(["w1 w2 w3 w4", "w5"], return_tensors="pt", padding=True))


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_opens_and_answers(zoo, name):
    base = open_base(str(zoo[name]))
    assert base.input == ("image" if name in IMAGES else "text")
    assert base.context == (None if name in IMAGES else 38 if name == "roberta" else 40)
    batch = batch_of(base)
    task = PICTURES if name in IMAGES else CLASSES
    before = torch.random.get_rng_state()
    one, again, other = (base.model(task, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not one.training and {p.dtype for p in one.parameters()} == {torch.float32}
    logits = one(**batch).logits
    assert logits.shape == (2, 3) and torch.equal(logits, again(**batch).logits)
    assert not torch.equal(logits, other(**batch).logits)
    # Only the head depends on the seed: everything else is the checkpoint's.
    heads = tuple(f"{head}." for head in own_head(one))
    stored = base.backbone().state_dict()
    prefix = one.base_model_prefix
    for (key, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if not key.startswith(heads):
            assert torch.equal(tensor, twin) and torch.equal(tensor, stored[key.removeprefix(f"{prefix}.")]), key


@pytest.mark.parametrize("name", ZOO)
def test_token_states_have_the_width_and_mask_that_heads_expect(zoo, name):
    base = open_base(str(zoo[name]))

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(base.width, 3)

        def forward(self, x_BTD, mask_BT):
            assert mask_BT.dtype == torch.bool and mask_BT.shape == x_BTD.shape[:2]
            weight_BT1 = mask_BT[:, :, None]
            return self.out((x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1))

    model = base.headed(Mean())
    batch = batch_of(base)
    logits = model(**batch, labels=torch.tensor([0, 1])).logits
    assert logits.shape == (2, 3) and own_head(model) == ["head"]
    x_BTD, mask_BT = model.states(**batch)
    tokens = {"vit": 5, "resnet": 4, "convnext": 4}.get(name, 4)
    assert x_BTD.shape == (2, tokens, base.width)
    assert mask_BT.tolist() == [[True] * tokens, [True] * tokens if name in IMAGES else [True, False, False, False]]
    model.backbone = nn.Module()  # with states given, the backbone is not called
    assert torch.equal(model(states=(x_BTD, mask_BT)).logits, logits)


def test_maps_become_tokens_in_reading_order(zoo):
    base = open_base(str(zoo["resnet"]))
    batch = batch_of(base)
    model = base.headed(nn.Identity())
    maps_BDHW = model.backbone(**batch).last_hidden_state
    x_BTD, _mask = model.states(**batch)
    assert torch.equal(x_BTD[:, 1 * maps_BDHW.shape[3] + 0], maps_BDHW[:, :, 1, 0])


def test_a_decoder_reads_the_last_token_that_is_not_padding(zoo):
    for name in ("llama", "gpt2"):
        base = open_base(str(zoo[name]))
        model = base.model(CLASSES, seed=0)
        padded = base.tokenizer(["w1 w2 w3 w4", "w5"], return_tensors="pt", padding=True)
        alone = base.tokenizer(["w5"], return_tensors="pt")
        assert padded["input_ids"][1].tolist() == [10, 4, 4, 4] and model.config.pad_token_id == 4
        assert torch.allclose(model(**padded).logits[1], model(**alone).logits[0], atol=1e-6)


def test_the_tokenizer_pads_with_the_number_that_the_model_skips(zoo):
    base = open_base(str(zoo["roberta"]))
    assert base.config.pad_token_id == 1 and base.tokenizer.pad_token_id == 1


def test_regression_and_labels(zoo):
    base = open_base(str(zoo["bert"]))
    assert base.model(CLASSES, seed=0).config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    model = base.model(NUMBER, seed=0)
    assert model.config.problem_type == "regression" and model(**batch_of(base)).logits.shape == (2, 1)
    with pytest.raises(Refused, match="reads text"):
        base.model(PICTURES, seed=0)
    with pytest.raises(UsageError, match="hub"):
        base.model(CLASSES, seed=0, attention="kernels-community/flash-attn")
    assert base.model(CLASSES, seed=0, attention="eager").config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 with transformers 5.23
def test_a_pooler_that_the_checkpoint_lacks_counts_as_part_of_the_head(zoo):
    with_pooler, without = (open_base(str(zoo[name])).model(CLASSES, seed=0) for name in ("bert", "bert-mlm"))
    assert own_head(with_pooler) == ["classifier"]
    assert own_head(without) == ["classifier", "bert.pooler"]
    assert roles(without)["bert.pooler.dense"] == "head" and roles(with_pooler)["bert.pooler.dense"] == "other"
    wrapped = peft.get_peft_model(without, peft.LoraConfig(target_modules=["query"], modules_to_save=own_head(without)))
    assert any("pooler.modules_to_save" in name for name, p in wrapped.named_parameters() if p.requires_grad)


def test_a_pretrained_part_of_the_head_is_kept_and_the_output_layer_is_new(zoo, tmp_path):
    base = open_base(str(zoo["modernbert"]))
    model, other = base.model(CLASSES, seed=0), base.model(CLASSES, seed=1)
    assert own_head(model) == ["head", "classifier"]
    stored = load_file(zoo["modernbert"] / "model.safetensors")
    assert torch.equal(model.get_parameter("head.dense.weight"), stored["head.dense.weight"])
    assert not torch.equal(model.get_parameter("classifier.weight"), other.get_parameter("classifier.weight"))
    # A checkpoint that was fine-tuned for three classes of its own does not bring their output layer along.
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tuned = open_base(str(tmp_path))
    assert not torch.equal(
        tuned.model(CLASSES, seed=1).get_parameter("classifier.weight"), model.get_parameter("classifier.weight")
    )


def test_a_fingerprint_knows_content_and_not_layout(zoo, tmp_path):
    base = open_base(str(zoo["bert"]))
    again = shutil.copytree(zoo["bert"], tmp_path / "renamed é")
    sharded = write_base(tmp_path / "sharded", "bert", max_shard_size="20kB")
    assert len(list(sharded.glob("*.safetensors"))) > 3 and not (sharded / "model.safetensors").exists()
    assert base.fingerprint == open_base(str(again)).fingerprint == open_base(str(sharded)).fingerprint
    assert len(base.fingerprint) == 64
    sharded_logits = open_base(str(sharded)).model(CLASSES, seed=0)(**batch_of(base)).logits
    assert torch.equal(sharded_logits, base.model(CLASSES, seed=0)(**batch_of(base)).logits)


def test_a_fingerprint_changes_with_one_bit_of_a_weight_and_with_the_architecture(zoo, tmp_path):
    folder = shutil.copytree(zoo["bert"], tmp_path / "base")
    first = open_base(str(folder)).fingerprint
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    second = open_base(str(folder)).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    third = open_base(str(folder)).fingerprint
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0", "_name_or_path": "x"}))
    assert len({first, second, third}) == 3 and open_base(str(folder)).fingerprint == second


def test_a_fingerprint_changes_with_names_and_shapes(zoo, tmp_path):
    folder = shutil.copytree(zoo["bert"], tmp_path / "base")
    one, other = (f"encoder.layer.0.attention.self.{role}.weight" for role in ("query", "key"))

    def swap(tensors):
        tensors[one], tensors[other] = tensors[other], tensors[one]

    def rename(tensors):
        tensors["encoder.layer.0.attention.self.other.weight"] = tensors.pop(other)

    def reshape(tensors):
        tensors[one] = tensors[one].reshape(16, 64)

    seen = [open_base(str(folder)).fingerprint]
    for change in (swap, rename, reshape):
        change_weights(folder, change)
        seen.append(open_base(str(folder)).fingerprint)
    assert len(set(seen)) == 4


def test_a_fingerprint_is_remembered_until_the_file_changes(zoo, monkeypatch):
    base = open_base(str(zoo["bert"]))
    known = base.fingerprint
    path = next(iter(base.weights.values()))[0]
    real = open

    def refuse(file, *rest, **named):
        assert Path(file) != path, "the weights were read again"
        return real(file, *rest, **named)

    other = open_base(str(zoo["bert"]))
    monkeypatch.setattr("builtins.open", refuse)
    assert other.fingerprint == known


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def remove(tensors):
    del tensors["encoder.layer.1.attention.self.query.weight"]


def add_layer(tensors):
    tensors["encoder.layer.2.output.dense.weight"] = torch.zeros(32, 48)


def add_bias(tensors):
    tensors["embeddings.LayerNorm.scale"] = torch.zeros(32)


def resize(tensors):
    tensors["encoder.layer.0.output.dense.weight"] = torch.zeros(32, 47)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"1 tensors are missing .*encoder\.layer\.1\.attention\.self\.query\.weight"),
        (add_layer, r"have no place .*encoder\.layer\.2\.output\.dense\.weight"),
        (add_bias, r"have no place .*embeddings\.LayerNorm\.scale"),
        (resize, r"another size .*\[32, 47\] stored, \[32, 48\] expected"),
    ],
)
def test_weights_that_do_not_fit_are_never_replaced_by_random_ones(zoo, tmp_path, change, message):
    folder = shutil.copytree(zoo["bert"], tmp_path / "base")
    change_weights(folder, change)
    base = open_base(str(folder))
    for build in (lambda: base.model(CLASSES, seed=0), base.backbone):
        with pytest.raises(BadBase, match=message):
            build()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(zoo, tmp_path, value):
    folder = shutil.copytree(zoo["bert"], tmp_path / "base")
    change_weights(folder, lambda tensors: tensors["encoder.layer.0.output.dense.bias"].__setitem__(3, value))
    with pytest.raises(NotFinite, match=r"encoder\.layer\.0\.output\.dense\.bias"):
        open_base(str(folder)).backbone()


def test_half_precision_is_widened_exactly_and_double_is_refused(zoo, tmp_path):
    folder = shutil.copytree(zoo["bert"], tmp_path / "base")
    change_weights(folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    model = open_base(str(folder)).backbone()
    name = "encoder.layer.0.output.dense.weight"
    assert model.get_parameter(name).dtype == torch.float32
    assert torch.equal(model.get_parameter(name), load_file(zoo["bert"] / "model.safetensors")[name].bfloat16().float())
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].double()}))
    with pytest.raises(BadBase, match="F64"):
        open_base(str(folder))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "bert",
            {
                "query": "attention.self.query",
                "out": "attention.output.dense",
                "up": "intermediate.dense",
                "down": "layer.0.output.dense",
                "norm": "attention.output.LayerNorm",
            },
        ),
        ("roberta", {"key": "attention.self.key", "value": "attention.self.value", "head": "classifier.out_proj"}),
        (
            "distilbert",
            {
                "query": "attention.q_lin",
                "out": "out_lin",
                "up": "ffn.lin1",
                "down": "ffn.lin2",
                "norm": "sa_layer_norm",
            },
        ),
        (
            "llama",
            {
                "query": "q_proj",
                "out": "o_proj",
                "gate": "gate_proj",
                "up": "up_proj",
                "down": "down_proj",
                "norm": "input_layernorm",
                "embedding": "embed_tokens",
                "head": "score",
            },
        ),
        ("gpt2", {"other": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}),
        ("modernbert", {"other": "attn.Wqkv", "out": "attn.Wo", "down": "mlp.Wo"}),
        (
            "vit",
            {
                "query": "attention.q_proj",
                "out": "attention.o_proj",
                "up": "mlp.fc1",
                "down": "mlp.fc2",
                "embedding": "patch_embeddings.projection",
            },
        ),
        ("resnet", {"other": "layer.0.convolution", "norm": "layer.0.normalization", "head": "classifier.1"}),
        ("convnext", {"up": "pwconv1", "down": "pwconv2", "other": "dwconv"}),
    ],
)
def test_roles_follow_from_types_and_names(zoo, name, expected):
    base = open_base(str(zoo[name]))
    model = base.model(PICTURES if name in IMAGES else CLASSES, seed=0)
    found = roles(model)
    leaves = {
        path
        for path, module in model.named_modules()
        if not list(module.children()) and list(module.parameters(recurse=False))
    }
    assert set(found) == leaves
    for role, ending in expected.items():
        names = [path for path in found if path.endswith(ending)]
        assert names and {found[path] for path in names} == {role}, (role, ending, names)
    inside = [path for path, _ in blocks(model)]
    assert len(inside) == {"resnet": 3, "convnext": 3}.get(name, 2)
    assert inside == sorted(inside) and len({type(module) for _, module in blocks(model)}) == 1


def test_a_matrix_that_fuses_two_roles_has_none():
    config = hf.ModernBertConfig(**TEXT, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
    found = roles(hf.ModernBertModel(config))
    assert found["layers.0.mlp.Wi"] == "other"  # twice as wide as what Wo takes: gate and up in one


def test_patterns(zoo):
    model = open_base(str(zoo["bert"])).model(CLASSES, seed=0)
    layer = "bert.encoder.layer"
    found = match(
        model, ["query", "value", "self.key", f"{layer}.0.*.dense", "all-linear", "head", f"{layer}.1.output.dense"]
    )
    assert found["query"] == [f"{layer}.{i}.attention.self.query" for i in (0, 1)]
    assert found["value"] == [f"{layer}.{i}.attention.self.value" for i in (0, 1)]
    assert found["self.key"] == [f"{layer}.{i}.attention.self.key" for i in (0, 1)]
    assert found[f"{layer}.0.*.dense"] == [
        f"{layer}.0.{n}.dense" for n in ("attention.output", "intermediate", "output")
    ]
    assert len(found["all-linear"]) == 13 and "classifier" not in found["all-linear"]  # 2 x 6 and the pooler
    assert found["head"] == ["classifier"] and found[f"{layer}.1.output.dense"] == [f"{layer}.1.output.dense"]
    assert match(open_base(str(zoo["gpt2"])).backbone(), ["c_attn"])["c_attn"] == ["h.0.attn.c_attn", "h.1.attn.c_attn"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_proj", r"matches no module; (did you mean|roles here)"),
        ("quary", "did you mean .*query"),
        ("attention", r"only modules that hold others, such as bert\.encoder\.layer\.0\.attention"),
        ("classifier", "only the task's own head"),
        ("gate", "no module of this model has the role 'gate'; roles here: query"),
        ("bert.encoder.layer.7.*", "matches no module"),
        ("", "matches no module"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_near(zoo, pattern, message):
    model = open_base(str(zoo["bert"])).model(CLASSES, seed=0)
    with pytest.raises(Unmatched, match=message):
        match(model, ["query", pattern])


def test_a_pattern_that_matches_by_half_is_an_error(zoo):
    model = open_base(str(zoo["bert"])).model(CLASSES, seed=0)
    with pytest.raises(Unmatched, match=r"2 of 8 .*LayerNorm.*expected Linear"):
        match(model, ["*.layer.0.*"], types=(nn.Linear,))
    with pytest.raises(Unmatched, match="c_attn"):
        match(open_base(str(zoo["gpt2"])).backbone(), ["query"])


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "resnet", "gpt2"])
def test_peft_wraps_a_headed_model(zoo, name):
    base = open_base(str(zoo[name]))

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(base.width, 3)

        def forward(self, x_BTD, mask_BT):
            return self.out(x_BTD[:, 0])

    model = base.headed(First())
    batch = batch_of(base)
    before = model(**batch).logits
    pattern = {"llama": "query", "gpt2": "c_attn", "resnet": "*.layer.1.convolution"}.get(name, "query")
    targets = match(model, [pattern])[pattern]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, modules_to_save=["head"], r=2, fan_in_fan_out=name == "gpt2")
    )
    trainable = {key for key, p in wrapped.named_parameters() if p.requires_grad}
    assert (
        all("lora_" in key or "head.modules_to_save" in key for key in trainable)
        and len(trainable) == 2 * len(targets) + 2
    )
    assert torch.allclose(wrapped(**batch, labels=torch.tensor([0, 1])).logits, before, atol=1e-6)
    wrapped(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    assert own_head(wrapped) == ["head"] and isinstance(wrapped.unload(), HeadedModel)
