"""Folders from strangers: nothing in them runs, reaches the network or leads out, and each refusal names its cause."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import socket
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from brickyard.core.base import open_base
from brickyard.core.errors import BadBase, BrickyardError, UnsafeFile

CANARY = "BRICKYARD_CANARY"
EVIL = f"import os\nos.environ[{CANARY!r}] = 'ran'\n"


@pytest.fixture(autouse=True)
def offline_and_clean(monkeypatch, tmp_path):
    """Fail on any connection, and on any code of a hostile folder that ran."""
    tried = []

    def refuse(*given: Any, **named: Any) -> None:
        tried.append(given)
        raise OSError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the user may be online
    monkeypatch.delenv(CANARY, raising=False)
    path, modules = list(sys.path), set(sys.modules)
    yield tried
    assert tried == [], "the network was tried"
    assert CANARY not in os.environ and sys.path == path
    assert not [
        name for name in set(sys.modules) - modules if "evil" in name or name.startswith("transformers_modules")
    ]


def test_the_guard_sees_what_it_should(offline_and_clean):
    with pytest.raises(Exception, match="the network was tried"):
        huggingface_hub.get_session().get("https://evil.example/repo")
    assert offline_and_clean
    offline_and_clean.clear()


@pytest.fixture
def base(text_base, tmp_path) -> Path:
    return Path(shutil.copytree(text_base, tmp_path / "base"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (EVIL,))


def bomb(path: Path, how: str) -> None:
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(), protocol=2))
    elif how == "torch":
        torch.save({"a": Payload()}, path)
    elif how == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
    else:
        path.write_bytes({"7z": b"7z\xbc\xaf\x27\x1c", "gzip": b"\x1f\x8b\x08\x00"}[how] + bytes(100))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl", "model.pth", "w.7z", "w.zip"]
)
def test_a_pickle_is_never_opened_and_the_message_says_how_to_convert(base, name):
    (base / "model.safetensors").unlink()
    bomb(base / name, "torch")
    for spec in (base, base / name):
        with pytest.raises(UnsafeFile, match=rf"(?s){name}.*never opens.*save_pretrained\('converted'\).*safetensors"):
            open_base(str(spec))


@pytest.mark.parametrize("how", ["pickle", "torch", "zip", "7z", "gzip"])
def test_a_pickle_renamed_to_safetensors_is_recognised(base, how):
    bomb(base / "model.safetensors", how)
    with pytest.raises(
        UnsafeFile, match=r"(?s)model\.safetensors: the content is a.*, not safetensors.*save_pretrained"
    ):
        open_base(str(base))


def test_a_pickle_beside_good_weights_is_left_alone(base):
    bomb(base / "pytorch_model.bin", "torch")
    bomb(base / "training_args.bin", "pickle")
    bomb(base / "adapter_model.bin", "pickle")
    open_base(str(base)).backbone()


@pytest.fixture
def sharded(base) -> Path:
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    (base / "model.safetensors").unlink()
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, base / f"part{i}.safetensors")
        places |= dict.fromkeys(part, f"part{i}.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return base


def move(folder: Path, to: str) -> None:
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    moved = {name: to if place == "part1.safetensors" else place for name, place in known["weight_map"].items()}
    index.write_text(json.dumps({**known, "weight_map": moved}))


def test_shards_open(sharded):
    open_base(str(sharded)).backbone()


@pytest.mark.parametrize(
    "to",
    [
        "../part1.safetensors",
        "/etc/passwd",
        "sub/../../part1.safetensors",
        "link.safetensors",
        "part1.safetensors\0",
        "missing.safetensors",
        "pytorch_model.bin",
        "",
        "pipe",
    ],
)
def test_an_index_names_only_plain_files_of_its_folder(sharded, to):
    shutil.copy(sharded / "part1.safetensors", sharded.parent / "part1.safetensors")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "part1.safetensors")
    os.mkfifo(sharded / "pipe")
    bomb(sharded / "pytorch_model.bin", "torch")
    move(sharded, to)
    with pytest.raises(UnsafeFile):
        open_base(str(sharded))


@pytest.mark.parametrize("known", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_of_another_form_is_refused(sharded, known):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(known))
    with pytest.raises(UnsafeFile, match="expected weight_map"):
        open_base(str(sharded))


def test_an_index_and_its_shards_must_agree(sharded):
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    places = dict(good["weight_map"])
    first, second = sorted(places)[:2]
    for changed, cause in (
        ({**places, "ghost.weight": "part0.safetensors"}, r"no shard holds, such as 'ghost\.weight'"),
        ({name: place for name, place in places.items() if name != first}, "does not name it"),
        ({**places, first: places[second], second: places[first]}, r"says part"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(UnsafeFile, match=cause):
            open_base(str(sharded))
    index.write_text(json.dumps(good)[:-1] + ', "weight_map": {}}')
    with pytest.raises(UnsafeFile, match="'weight_map' is given twice"):
        open_base(str(sharded))


def test_a_base_of_links_out_of_the_folder_is_refused(base):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (base / name).rename(base.parent / name)
        (base / name).symlink_to(base.parent / name)
        with pytest.raises(UnsafeFile, match="link out of its folder"):
            assert open_base(str(base)).tokenizer
        (base / name).unlink()
        (base.parent / name).rename(base / name)
    assert open_base(str(base)).tokenizer


numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**62, 2**63, 2**64]), st.floats(), st.booleans())
junk = st.recursive(
    st.one_of(st.none(), numbers, st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)

STRIPPED: dict[str, dict[str, Any]] = {
    "auto_map": {
        "auto_map": {
            "AutoConfig": "evil.EvilConfig",
            "AutoModel": "evil.EvilModel",
            "AutoModelForSequenceClassification": "evil.EvilModel",
        }
    },
    "auto_map of a repository": {"auto_map": {"AutoConfig": "evil/repo--evil.C", "AutoModel": "evil/repo--evil.M"}},
    "trust_remote_code": {"trust_remote_code": True, "auto_map": {"AutoModel": "evil.EvilModel"}},
    "attention from the hub": {
        "_attn_implementation_internal": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "_experts_implementation_internal": "evil/kernel",
    },
    "other repositories": {
        "_name_or_path": "evil/repo",
        "name_or_path": "evil/repo",
        "base_model_name_or_path": "evil/repo",
    },
    "weights elsewhere": {"transformers_weights": "../../evil.safetensors", "revision": "evil", "subfolder": "evil"},
    "pipelines": {"custom_pipelines": {"evil": {"impl": "evil.Pipe"}}, "custom_generate": "evil/repo"},
    "devices and kernels": {
        "device_map": "auto",
        "use_kernels": True,
        "kernel_config": {"x": "evil/kernel"},
        "distributed_config": {"x": 1},
        "fusion_config": {"x": "evil"},
        "dtype": "load",
    },
    "nested": {"task_specific_params": {"x": {"auto_map": {"AutoModel": "evil.M"}, "_name_or_path": "evil/repo"}}},
}


def plain_dict(config: Any) -> str:
    return json.dumps(config.to_dict(), default=str)


@pytest.mark.parametrize("case", STRIPPED)
def test_a_configuration_cannot_choose_code_files_or_repositories(base, case):
    (base / "evil.py").write_text(EVIL)
    clean = open_base(str(base))
    expected = clean.backbone()(**clean.tokenizer(["good film"], return_tensors="pt")).last_hidden_state
    edit(base / "config.json", **STRIPPED[case])
    opened = open_base(str(base))
    assert "evil" not in plain_dict(opened.config)
    model = opened.backbone()
    assert "evil" not in plain_dict(model.config) and model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**opened.tokenizer(["good film"], return_tensors="pt")).last_hidden_state, expected)
    assert opened.fingerprint == clean.fingerprint


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizers_configuration_cannot_choose_code_or_files(base, name):
    expected = open_base(str(base)).tokenizer(["good film"])["input_ids"]
    (base / "evil.py").write_text(EVIL)
    (base / name).touch()
    known = json.loads((base / name).read_text() or "{}")
    hostile = {
        "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        "trust_remote_code": True,
        "vocab_file": "/etc/passwd",
        "merges_file": "/etc/passwd",
        "tokenizer_file": "/etc/passwd",
        "fast_tokenizer_files": ["../evil.json"],
        "name_or_path": "evil/repo",
        "init_inputs": ["/etc/passwd"],
    }
    (base / name).write_text(json.dumps({**known, **hostile}))
    tokenizer = open_base(str(base)).tokenizer
    assert tokenizer(["good film"])["input_ids"] == expected
    assert "evil" not in repr(tokenizer.init_kwargs) and "/etc/passwd" not in repr(tokenizer.init_kwargs)


def test_a_processors_configuration_cannot_choose_code(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    edit(tmp_path / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"}, trust_remote_code=True)
    assert open_base(str(tmp_path)).processor.size["height"] == 16


def test_an_adapters_configuration_beside_the_base_is_not_followed(base):
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/repo"}))
    model = open_base(str(base)).backbone()
    assert not hasattr(model, "peft_config")
    (base / "config.json").unlink()
    with pytest.raises(BadBase, match="an adapter, not a base"):
        open_base(str(base))


@pytest.mark.parametrize(
    ("change", "raised", "message"),
    [
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, BadBase, "--trust-remote-code"),
        ({"model_type": "bertt"}, BadBase, "unknown architecture 'bertt'; did you mean .*bert"),
        ({"model_type": None}, BadBase, "no model_type"),
        ({"model_type": ["bert"]}, BadBase, "no model_type"),
        ({"quantization_config": {"quant_method": "evil"}}, UnsafeFile, "quantised"),
        ({"backbone": "evil/repo"}, UnsafeFile, "another model, 'evil/repo'"),
        ({"backbone_config": {"use_pretrained_backbone": True}}, UnsafeFile, "another model"),
        ({"use_timm_backbone": True}, UnsafeFile, "timm"),
        ({"to_dict": "evil"}, UnsafeFile, "'to_dict' would replace a function"),
        ({"num_hidden_layers": 10**9}, BadBase, r"num_hidden_layers is 1,000,000,000"),
        ({"hidden_size": "32"}, BadBase, "no valid bert configuration"),
        ({"hidden_size": -32}, BadBase, "hidden_size|configuration"),
        ({"hidden_act": "evil"}, BadBase, "cannot build it"),
        ({"vocab_size": 10**12}, BadBase, "describes .* numbers, its weights hold"),
        ({"hidden_size": 64}, BadBase, "another size"),
        ({"num_hidden_layers": 1}, BadBase, "have no place"),
        ({"num_hidden_layers": 3}, BadBase, "are missing"),
        ({"num_attention_heads": 5}, BadBase, "multiple of the number of attention"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(base, change, raised, message):
    (base / "evil.py").write_text(EVIL)
    edit(base / "config.json", **change)
    with pytest.raises(raised, match=message):
        open_base(str(base)).backbone()


@settings(derandomize=True, max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    change=st.dictionaries(
        st.sampled_from(
            [
                "hidden_size",
                "num_attention_heads",
                "num_hidden_layers",
                "intermediate_size",
                "hidden_act",
                "hidden_dropout_prob",
                "layer_norm_eps",
                "max_position_embeddings",
                "vocab_size",
                "pad_token_id",
                "type_vocab_size",
                "architectures",
                "is_decoder",
                "model_type",
                "id2label",
            ]
        ),
        st.one_of(junk, st.sampled_from([0, 1, 2, 10**6, "llama", "gelu", math.inf])),
        min_size=1,
        max_size=2,
    )
)
def test_any_configuration_opens_or_is_refused_with_a_reason(text_base, tmp_path, change):
    folder = Path(shutil.copytree(text_base, tmp_path / "base", dirs_exist_ok=True))
    edit(folder / "config.json", **change)
    try:
        open_base(str(folder)).backbone()
    except BrickyardError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"neither model\.safetensors nor"),
        ("tokenizer.json", "no usable tokenizer"),
    ],
)
def test_a_missing_file_is_named(base, remove, message):
    (base / remove).unlink()
    (base / "other.safetensors").touch()
    with pytest.raises(BadBase, match=message):
        assert open_base(str(base)).tokenizer


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"model_type": "bert", "model_type": "evil"}', b"\xff"])
def test_a_damaged_configuration_is_refused(base, raw):
    (base / "config.json").write_bytes(raw)
    with pytest.raises((UnsafeFile, BadBase), match=r"config\.json"):
        open_base(str(base))


def test_a_damaged_tokenizer_is_refused(base):
    (base / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')
    with pytest.raises(BadBase, match="no usable tokenizer"):
        assert open_base(str(base)).tokenizer
