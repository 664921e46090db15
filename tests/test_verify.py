from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from brickyard.core import brick as bricks
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadBase, BadBrick, UnsafeFile
from brickyard.core.task import Task
from brickyard.core.verify import PROBE_TEXTS, verify

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = sorted({word for text in PROBE_TEXTS for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)})
pytestmark = pytest.mark.usefixtures("quiet_libraries")


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    ).save_pretrained(folder)


def write_input(folder: Path, kind: str) -> Path:
    if kind == "vit":
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        write_tokenizer(folder)
    return folder


def write_base(folder: Path, kind: str, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        if kind == "vit":
            config = transformers.ViTConfig(**shape, image_size=16, patch_size=8, initializer_range=0.2)
            transformers.ViTModel(config).save_pretrained(folder)
            return write_input(folder, kind)
        text = {**shape, "vocab_size": len(WORDS) + 4, "max_position_embeddings": 64, "initializer_range": 0.2}
        if kind == "bert":
            transformers.BertModel(transformers.BertConfig(**text)).save_pretrained(folder)
        else:
            config = transformers.LlamaConfig(**text, num_key_value_heads=2, eos_token_id=3, bos_token_id=2)
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return write_input(folder, kind)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {kind: write_base(root / kind, kind) for kind in ("bert", "llama", "vit")}
    return {**made, "other": write_base(root / "other", "bert", seed=1)}


AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "other": transformers.AutoModelForSequenceClassification,
    "llama": transformers.AutoModelForCausalLM,
    "vit": transformers.AutoModelForImageClassification,
}
LORA = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])


def adapted(base: Path, config: peft.PeftConfig = LORA, *, noise: float = 0.1) -> peft.PeftModel:
    """A base with an adapter and a head of three classes that look trained: every trainable tensor is moved."""
    options = {} if base.name == "llama" else {"num_labels": 3}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(AUTO[base.name].from_pretrained(base, **options), config)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def good(bases, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    adapted(bases["bert"]).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(good, tmp_path) -> Path:
    """A good adapter for the test to spoil."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def alter(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    path = folder / "adapter_model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def configure(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def failed(result: dict[str, Any]) -> dict[str, str]:
    json.dumps(result, allow_nan=False)
    assert result["holds"] == all(row["ok"] is not False for row in result["findings"])
    return {row["check"]: row["detail"] for row in result["findings"] if row["ok"] is False}


def unknown(result: dict[str, Any]) -> dict[str, str]:
    return {row["check"]: row["detail"] for row in result["findings"] if row["ok"] is None}


def write_merged(model: peft.PeftModel, folder: Path, kind: str = "bert", dtype: torch.dtype | None = None) -> Path:
    merged = model.merge_and_unload()
    (merged.to(dtype) if dtype else merged).save_pretrained(folder)
    return write_input(folder, kind)


KINDS = {
    "lora": ("bert", LORA),
    "dora": ("bert", peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", use_dora=True)),
    "patterns": (
        "bert",
        peft.LoraConfig(
            task_type="SEQ_CLS",
            r=2,
            target_modules=r".*layer\.1\..*(query|key)",
            rank_pattern={"1.*key": 4},
            alpha_pattern={"1.*query": 5},
        ),
    ),
    "ia3": (
        "bert",
        peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "adalora": ("bert", peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_r=4, total_step=9)),
    "vera": ("bert", peft.VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])),
    "backbone": ("bert", peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query"])),
    "llama": ("llama", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])),
    "untyped": ("llama", peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])),
    "vit": ("vit", peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_good_adapter_and_its_merge_hold(name, bases, tmp_path):
    kind, config = KINDS[name]
    base = bases[kind]
    if name == "backbone":
        model = peft.get_peft_model(transformers.AutoModel.from_pretrained(base), config)
        for parameter in model.parameters():
            parameter.data += 0.1 * parameter.requires_grad
    else:
        model = adapted(base, config)
    model.save_pretrained(tmp_path / "adapter")
    merged = write_merged(model, tmp_path / "merged", kind)
    result = verify(str(base), tmp_path / "adapter", merged)
    assert failed(result) == {} and unknown(result) == {}
    checks = [row["check"] for row in result["findings"]]
    for check in (
        "every tensor loads",
        "every tensor trained",
        "every layer acts",
        "outputs change",
        "merged model agrees",
    ):
        assert check in checks
    assert result["adapter"]["type"] in ("LORA", "IA3", "ADALORA", "VERA")


def test_prompts_have_no_layers_but_an_effect(bases, tmp_path):
    adapted(bases["bert"], peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "a"
    )
    result = verify(str(bases["bert"]), tmp_path / "a")
    assert failed(result) == {}
    assert "every layer acts" not in [row["check"] for row in result["findings"]]


def test_renamed_layers_match_nothing(bases, adapter):
    rename(adapter, lambda name: name.replace("query", "q_proj").replace("value", "v_proj"))
    configure(adapter, target_modules=["q_proj", "v_proj"])
    found = failed(verify(str(bases["bert"]), adapter))
    assert "q_proj" in found["adapter fits the base"] and "query" in found["adapter fits the base"]


def test_a_pattern_that_matches_nothing_beside_one_that_does(bases, adapter):
    configure(adapter, target_modules=["query", "value", "valeu"], alpha_pattern={"attn.query": 32})
    found = failed(verify(str(bases["bert"]), adapter))
    assert set(found) == {"every pattern matches"}
    assert "target_modules 'valeu'" in found["every pattern matches"] and "value" in found["every pattern matches"]
    assert "alpha_pattern 'attn.query'" in found["every pattern matches"]


def test_half_of_the_tensors_have_no_place(bases, adapter):
    rename(adapter, lambda name: name.replace("layer.1.attention", "layer.1.attn"))
    found = failed(verify(str(bases["bert"]), adapter))
    assert "4 tensors of the file have no place" in found["every tensor loads"]
    assert "4 tensors of the model are not in the file" in found["every tensor loads"]
    assert "2 of 4 adapted layers" in found["every layer acts"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda n: n.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"), "extra 'default'"),
        (lambda n: n.replace("base_model.model.", "base_model.model.module."), "extra 'module'"),
        (lambda n: n.replace("base_model.model.", "base_model.model.backbone."), "extra 'backbone'"),
        (lambda n: n.replace("base_model.model.", "base_model.model.base_model.model."), "extra 'base_model.model'"),
        (lambda n: n.removeprefix("base_model.model."), "lack 'base_model.model'"),
    ],
)
def test_names_of_a_wrapped_model_are_explained(bases, adapter, change, part):
    rename(adapter, change)
    found = failed(verify(str(bases["bert"]), adapter))
    assert part in found["every tensor loads"]
    assert "every layer acts" in found and "silent no-op" in found["outputs change"]


def test_zero_matrices_are_a_silent_no_op(bases, adapter):
    alter(adapter, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor)
    found = failed(verify(str(bases["bert"]), adapter))
    assert "4 of 10 tensors are as before training" in found["every tensor trained"]
    assert "4 of 4 adapted layers" in found["every layer acts"] and "silent no-op" in found["outputs change"]
    assert set(found) == {"every tensor trained", "every layer acts", "outputs change"}


def test_one_dead_layer_is_named(bases, adapter):
    alter(adapter, lambda name, tensor: tensor * 0 if "layer.1" in name and "query.lora_B" in name else tensor)
    found = failed(verify(str(bases["bert"]), adapter))
    assert "1 of 4" in found["every layer acts"] and "layer.1.attention.self.query" in found["every layer acts"]
    assert set(found) == {"every tensor trained", "every layer acts"}


def test_a_scaling_of_zero_is_a_silent_no_op(bases, adapter):
    configure(adapter, lora_alpha=0)
    assert set(failed(verify(str(bases["bert"]), adapter))) == {"every layer acts", "outputs change"}


def test_a_head_that_the_base_had_must_have_moved(bases, tmp_path):
    base = tmp_path / "bert"
    AUTO["bert"].from_pretrained(bases["bert"], num_labels=3).save_pretrained(base)
    write_tokenizer(base)
    model = adapted(base)
    start = AUTO["bert"].from_pretrained(base, num_labels=3).classifier
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.load_state_dict(start.state_dict())
    model.save_pretrained(tmp_path / "adapter")
    found = failed(verify(str(base), tmp_path / "adapter"))
    assert set(found) == {"every tensor trained"} and "classifier.weight" in found["every tensor trained"]


def test_the_wrong_base(bases, adapter):
    found = failed(verify(str(bases["other"]), adapter))
    assert set(found) == {"made for this base"} and "fingerprint" in found["made for this base"]
    configure(adapter, base_model_name_or_path="someone/some-model")
    told = unknown(verify(str(bases["other"]), adapter))
    assert "someone/some-model" in told["made for this base"]
    configure(adapter, base_model_name_or_path="x" * 5000)
    assert "made for this base" in unknown(verify(str(bases["bert"]), adapter))


def test_nan_is_named(bases, adapter):
    def poison(name, tensor):
        tensor.view(-1)[3] = torch.nan if "layer.0" in name and "value.lora_B" in name else tensor.view(-1)[3]
        return tensor

    alter(adapter, lambda name, tensor: poison(name, tensor) if tensor.numel() > 3 else tensor)
    found = failed(verify(str(bases["bert"]), adapter))
    assert "layer.0.attention.self.value.lora_B.weight" in found["finite tensors"] and "finite outputs" in found


def test_shapes_and_ranks(bases, adapter, tmp_path):
    configure(adapter, r=2)
    found = failed(verify(str(bases["bert"]), adapter))
    assert "is (4, 32), expected (2, 32)" in found["shapes"] and "8 differ" in found["shapes"]
    adapted(bases["bert"], peft.LoraConfig(task_type="SEQ_CLS", r=40, target_modules=["query"])).save_pretrained(
        tmp_path / "b"
    )
    found = failed(verify(str(bases["bert"]), tmp_path / "b"))
    assert set(found) == {"rank fits the layers"} and "rank 40 on a layer of 32 x 32" in found["rank fits the layers"]


def test_a_missing_head_is_found(bases, adapter):
    alter(adapter, lambda name, tensor: None if "classifier" in name else tensor)
    result = verify(str(bases["bert"]), adapter)
    assert "classifier.bias" in failed(result)["every tensor loads"]
    assert "classifier" in unknown(result)["head is stored"]


def test_merges_that_are_wrong(bases, adapter, tmp_path):
    base = bases["bert"]

    def merged(name: str, change: Callable[[peft.PeftModel], None]) -> dict[str, str]:
        model = adapted(base)
        change(model)
        return failed(verify(str(base), adapter, write_merged(model, tmp_path / name)))

    def layers(model):
        return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]

    def unscaled(model):
        for layer in layers(model):
            layer.scaling["default"] = 1.0  # alpha / r is 2

    def nothing(model):
        for layer in layers(model):
            layer.lora_B["default"].weight.data.zero_()

    def one_left_out(model):
        layers(model)[2].lora_B["default"].weight.data.zero_()

    def other_head(model):
        model.base_model.model.classifier.modules_to_save["default"].weight.data.add_(0.5)

    found = merged("unscaled", unscaled)
    assert (
        set(found) == {"merged model agrees"} and "hold 0.5 times the adapter's change" in found["merged model agrees"]
    )
    found = merged("nothing", nothing)
    assert "the merge did nothing: 4 of 4" in found["merge changed the weights"] and "merged model agrees" in found
    found = merged("left-out", one_left_out)
    assert "left layers out: 1 of 4" in found["merge changed the weights"]
    assert "worst layer bert.encoder.layer.1.attention.self.query" in found["merged model agrees"]
    found = merged("head", other_head)
    assert set(found) == {"merged model agrees"} and "worst layer classifier" in found["merged model agrees"]


def test_a_merge_in_half_precision(bases, tmp_path):
    base = bases["bert"]
    model = adapted(base)
    model.save_pretrained(tmp_path / "a")
    merged = write_merged(model, tmp_path / "m", dtype=torch.bfloat16)
    result = verify(str(base), tmp_path / "a", merged)
    assert failed(result) == {} and "(bfloat16)" in result["findings"][-1]["detail"]
    # An adapter so weak that rounding to bfloat16 swallows it: no gap is large, and yet the merge lost it
    weak = adapted(base, noise=0.0)
    for module in weak.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_B["default"].weight.data.fill_(1e-6)
    weak.save_pretrained(tmp_path / "weak")
    found = failed(verify(str(base), tmp_path / "weak", write_merged(weak, tmp_path / "n", dtype=torch.bfloat16)))
    assert "whole effect is" in found["merged model agrees"]


def test_a_merged_model_without_its_head(bases, adapter, tmp_path):
    write_merged(adapted(bases["bert"]), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "classifier" not in n}, path, {"format": "pt"})
    found = failed(verify(str(bases["bert"]), adapter, tmp_path / "m"))
    assert "classifier.bias" in found["merged model is complete"] and "merged model agrees" in found
    with pytest.raises(BadBase):
        verify(str(bases["bert"]), adapter, adapter)


def test_an_adapter_of_a_language_model_that_names_no_task(bases, tmp_path):
    model = adapted(bases["llama"], peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "a")
    assert failed(verify(str(bases["llama"]), tmp_path / "a", write_merged(model, tmp_path / "m"))) == {}


def test_rows_of_a_data_set_as_probe(bases, adapter, tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"text": f"the river number {index} ", "label": index % 2} for index in range(40)]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = verify(str(bases["bert"]), adapter, data=str(tmp_path / "data"))
    assert failed(result) == {} and result["probe"]["rows"] == 16 and "test" in result["probe"]["what"]


def test_images_of_a_data_set_as_probe(bases, tmp_path):
    model = adapted(bases["vit"], peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path / "a")
    with_pixels = verify(str(bases["vit"]), tmp_path / "a")
    assert failed(with_pixels) == {} and with_pixels["probe"]["what"] == "random pixels"
    images = []
    for index in range(4):
        file = io.BytesIO()
        Image.new("RGB", (20, 20), (9 * index, 40, 200)).save(file, "PNG")
        images.append(file.getvalue())
    data = {"test": {"image": images, "label": [0, 1, 0, 1]}}
    assert verify(str(bases["vit"]), tmp_path / "a", data=data)["probe"]["rows"] == 4


def test_what_is_not_safe_or_not_complete_is_refused(bases, adapter, tmp_path):
    base, weights = str(bases["bert"]), adapter / "adapter_model.safetensors"
    with pytest.raises(BadBrick, match="not a folder"):
        verify(base, tmp_path / "absent")
    with pytest.raises(BadBrick, match=r"no adapter_config\.json"):
        verify(base, bases["bert"])
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UnsafeFile):
        verify(base, adapter)
    weights.unlink()
    with pytest.raises(BadBrick, match="incomplete"):
        verify(base, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02never opened")
    with pytest.raises(UnsafeFile, match="pickle"):
        verify(base, adapter)
    weights.write_bytes(whole)
    configure(adapter, megatron_config={"a": 1}, megatron_core="evil_module")
    with pytest.raises(UnsafeFile, match="megatron_config"):
        verify(base, adapter)


def test_nothing_that_a_config_names_is_run_or_fetched(bases, adapter, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    configure(
        adapter,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"},
        revision="main",
        a_new_option={"x": 1},
    )
    result = verify(str(bases["bert"]), adapter)
    assert failed(result) == {} and "evil_module" not in sys.modules
    assert unknown(result) == {"options known": "this PEFT release does not know, and ignores: a_new_option"}
    configure(adapter, peft_type="XLORA")
    assert "verify those one by one" in failed(verify(str(bases["bert"]), adapter))["adapter fits the base"]
    configure(adapter, peft_type="LORRA")
    assert "did you mean LORA" in failed(verify(str(bases["bert"]), adapter))["adapter fits the base"]
    (adapter / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(BadBrick, match="peft_type"):
        verify(str(bases["bert"]), adapter)


def write_brick(base: Path, folder: Path, arm: str, *, noise: float) -> Path:
    opened, plan = open_base(str(base)), resolve(parse(arm))
    task = Task(kind="text-classification", metric="accuracy", labels=("a", "b", "c"), width=3, input="text")
    attached = build(plan, opened, task, seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in attached.parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    bricks.save(folder, attached, plan, opened, task, seed=0, about={})
    return folder


@pytest.mark.parametrize("arm", ["lora:r=4", "full", "lora:r=2 + linear-probe"])
def test_bricks(arm, bases, tmp_path):
    moved = write_brick(bases["bert"], tmp_path / "moved", arm, noise=0.1)
    result = verify(str(bases["bert"]), moved)
    assert failed(result) == {} and unknown(result) == {}
    assert set(failed(verify(str(bases["other"]), moved))) == {"made for this base"}
    found = failed(verify(str(bases["bert"]), write_brick(bases["bert"], tmp_path / "still", arm, noise=0.0)))
    assert "silent no-op" in found["outputs change"] and "as before training" in found["every tensor trained"]
    if arm == "full":
        whole = bricks.load(moved).apply().model
        whole.save_pretrained(tmp_path / "whole")
        write_tokenizer(tmp_path / "whole")
        assert failed(verify(str(bases["bert"]), moved, tmp_path / "whole")) == {}
    elif "probe" in arm:
        told = unknown(verify(str(bases["bert"]), moved, bases["other"]))
        assert "head of its own" in told["merged model agrees"]
    else:  # such a brick is a PEFT adapter too
        merged = peft.PeftModel.from_pretrained(AUTO["bert"].from_pretrained(bases["bert"], num_labels=3), moved)
        assert failed(verify(str(bases["bert"]), moved, write_merged(merged, tmp_path / "merged"))) == {}
        (moved / "brick.json").unlink()
        assert failed(verify(str(bases["bert"]), moved)) == {}


def test_layers_of_a_method_of_ours(bases, tmp_path):
    moved = write_brick(bases["bert"], tmp_path / "moved", "mos:r=2,e=2,l=1", noise=0.1)
    assert failed(verify(str(bases["bert"]), moved)) == {}
    (moved / "brick.json").unlink()
    result = verify(str(bases["bert"]), moved)
    assert failed(result) == {} and result["adapter"]["type"] == "BRICKYARD"
    rename(moved, lambda name: name.replace("brick_pool_a", "brick_pool_x"))
    assert "brick_pool_x" in failed(verify(str(bases["bert"]), moved))["every tensor loads"]
