"""Small bases and data sets that the tests share: made here, offline, in a second."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = [
    "good",
    "fine",
    "great",
    "lovely",
    "superb",
    "bad",
    "awful",
    "poor",
    "dull",
    "broken",
    "the",
    "a",
    "film",
    "book",
    "room",
    "meal",
    "was",
    "is",
    "very",
    "quite",
    "not",
    "and",
    "it",
]


def make_text_base(
    folder: Path, *, seed: int = 0, layers: int = 2, decoder: bool = False, causal: bool = False
) -> Path:
    """Write a small BERT (or Llama, with `causal` a language model) with a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    if causal:
        fast.eos_token = "[SEP]"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if decoder or causal:
            config = LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
                tie_word_embeddings=True,
            )
            model = LlamaForCausalLM(config) if causal else LlamaModel(config)
        else:
            config = BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=layers,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
            model = BertModel(config)
        model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_image_base(folder: Path, *, seed: int = 0) -> Path:
    """Write a small ViT with its processor."""
    import torch
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    source = Path(__file__).parent.parent / "brickyard" / "embedded" / "tiny_vit" / "preprocessor_config.json"
    text = source.read_text(encoding="utf-8").replace("32", "16")
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return folder


def text_rows(rows: int, seed: int, *, pair: bool = False, regression: bool = False) -> dict[str, list]:
    """Sentences of which two adjectives decide the class; no two alike."""
    g = np.random.Generator(np.random.PCG64(seed))
    good, bad, rest = WORDS[:5], WORDS[5:10], WORDS[10:]
    out: dict[str, list] = {"text": [], "label": [], **({"text_pair": []} if pair else {})}
    for i in range(rows):
        label = i % 2
        words = [*g.choice(good if label else bad, 2), *g.choice(rest, 5)]
        g.shuffle(words)
        out["text"].append(" ".join(map(str, words)))
        if pair:
            out["text_pair"].append(" ".join(map(str, g.choice(rest, 3))))
        out["label"].append(float(label) + float(g.normal()) * 0.1 if regression else ("bad", "good")[label])
    return out


def text_data(train: int = 96, test: int = 60, **options: bool) -> dict[str, dict[str, list]]:
    """Return splits as a dictionary, which `read_data` takes."""
    return {
        "train": text_rows(train, 0, **options),
        "validation": text_rows(40, 1, **options),
        "test": text_rows(test, 2, **options),
    }


def documents(train: int = 60, test: int = 40) -> dict[str, dict[str, list]]:
    """Documents in which a word is mostly followed by the next one of the list: a language to be learned."""

    def rows(n: int, seed: int) -> dict[str, list]:
        g = np.random.Generator(np.random.PCG64(seed))
        out = []
        for _ in range(n):
            at, words = int(g.integers(len(WORDS))), []
            for _ in range(int(g.integers(5, 40))):
                words.append(WORDS[at])
                at = (at + 1) % len(WORDS) if g.random() < 0.9 else int(g.integers(len(WORDS)))
            out.append(" ".join(words))
        return {"text": out}

    return {"train": rows(train, 0), "validation": rows(20, 1), "test": rows(test, 2)}


def asked(kind: str, train: int = 120) -> dict[str, dict[str, list]]:
    """Prompts to which the next words of the list are the right answer: as completions, pairs, or choices."""

    def rows(n: int, seed: int) -> dict[str, list]:
        g = np.random.Generator(np.random.PCG64(seed))
        out: dict[str, list] = {name: [] for name in ("prompt", "completion", "chosen", "rejected", "choices", "label")}
        for _ in range(n):
            at, count = int(g.integers(len(WORDS))), int(g.integers(2, 6))
            right = " ".join(WORDS[(at + 1 + k) % len(WORDS)] for k in range(count))
            wrong = " ".join(WORDS[(at - 1 - k) % len(WORDS)] for k in range(count))
            other = " ".join(WORDS[(at + 7 * (k + 1)) % len(WORDS)] for k in range(count))
            place = int(g.integers(3))
            choices = [wrong, other]
            choices.insert(place, right)
            row = (" ".join([*map(str, g.choice(WORDS, 3)), WORDS[at]]), right, right, wrong, choices, place)
            for values, value in zip(out.values(), row, strict=True):
                values.append(value)
        columns = {
            "instruct": ("prompt", "completion"),
            "preference": ("prompt", "chosen", "rejected"),
            "multiple-choice": ("prompt", "choices", "label"),
        }
        return {name: out[name] for name in columns[kind]}

    return {"train": rows(train, 0), "validation": rows(20, 1), "test": rows(60, 2)}


def image_data(train: int = 64, test: int = 40) -> dict[str, dict[str, list]]:
    """Noise images that are bright at the top or at the bottom."""
    import io

    from PIL import Image

    def rows(n: int, seed: int) -> dict[str, list]:
        g = np.random.Generator(np.random.PCG64(seed))
        images, labels = [], []
        for i in range(n):
            pixels = g.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[(slice(0, 8) if i % 2 else slice(8, 16))] += 110
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            images.append(out.getvalue())
            labels.append(("bottom", "top")[i % 2])
        return {"image": images, "label": labels}

    return {"train": rows(train, 0), "validation": rows(24, 1), "test": rows(test, 2)}


def cloud_data(train: int = 80, test: int = 48) -> dict[str, dict[str, list]]:
    """Clouds of 32 points on generated ellipsoids and tables."""
    from brickyard.embedded import shapes

    def rows(n: int, seed: int) -> dict[str, list]:
        points, labels = shapes.draw(5 * n, seed=seed, points=32)
        kept = [i for i, label in enumerate(labels) if shapes.FAMILIES[label] in ("ball", "table")]
        return {"points": [points[i] for i in kept], "label": [shapes.FAMILIES[labels[i]] for i in kept]}

    return {"train": rows(train, 1), "validation": rows(32, 2), "test": rows(test, 3)}


def write_data(folder: Path, splits: dict[str, dict[str, list]]) -> Path:
    """Write splits as parquet files, as a user would hold them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in splits.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_base(tmp_path_factory.mktemp("text-base"))


@pytest.fixture(scope="session")
def masked_base(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder whose tokenizer has a mask, and whose checkpoint holds an output layer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("masked")
    tokenizer = AutoTokenizer.from_pretrained(text_base)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.add_tokens([":", ".", ","])
    config = BertConfig.from_pretrained(text_base)
    config.vocab_size, config.initializer_range = len(tokenizer), 0.2  # so large that tokens see one another
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_base(tmp_path_factory.mktemp("decoder-base"), decoder=True)


@pytest.fixture(scope="session")
def causal_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_base(tmp_path_factory.mktemp("causal-base"), causal=True)


@pytest.fixture(scope="session")
def image_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_base(tmp_path_factory.mktemp("image-base"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("BRICKYARD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _own_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two tests measure in one folder, nor in the user's."""
    if place := sys.modules.get("brickyard.checks._place"):  # else the test checks nothing in this process
        monkeypatch.setattr(place, "RUNS", tmp_path / "checks")


@pytest.fixture
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' own notices, raised while a test builds its models."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)


def resnet(folder: Path) -> str:
    """Write a small ResNet of two stages, whose configuration names no image size."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    hf.ResNetForImageClassification(config).save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


class Here:
    """Stands in for `core.jobs.Local`: runs each job in this process, which need not be started."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """Yield each job's outcome in turn."""
        from brickyard.core.jobs import execute

        yield from map(execute, jobs)
