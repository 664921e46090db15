"""The embedded language models: the scripts that make them, what they are held against, and the shipped folders."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from brickyard import embedded
from brickyard.core.answers import answer
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split
from brickyard.core.task import Task

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
training = importlib.import_module("train_pylm")
report = importlib.import_module("pylm_report")

LM = Task("causal-lm", "bits_per_byte", None, 1, "text")
SHIPPED = [name for name in embedded.BASES if name.startswith("pylm")]
END = 7


def corpus(folder: Path, seed: int = 0) -> Path:
    """A corpus of made-up ids in which every token follows from the one before, most of the time."""
    g = np.random.Generator(np.random.PCG64(seed))
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}", "utf-8")
    for name, size in (("train", 60_000), ("heldout", 20_000)):
        ids = np.empty(size, dtype=np.uint16)
        ids[0] = 1
        for i, jump in enumerate(g.random(size - 1) < 0.2):
            ids[i + 1] = g.integers(64) if jump else (5 * int(ids[i]) + 3) % 64
        ids[-1] = END
        ids.tofile(folder / f"{name}.bin")
    return folder


def test_blocks_hold_every_token_once_and_documents_apart() -> None:
    ids = np.array([1, 2, 3, END, 4, 5, END, 6, 1, 2, 3, 4, 5, 6, END, 9, 9], dtype=np.uint16)
    stream = training.Stream(ids, END, 8)
    batch = stream.collate(np.arange(len(stream)))
    assert len(stream) == 2 and batch["input_ids"].flatten().tolist() == ids[:16].tolist()
    assert batch["labels"].flatten().tolist() == ids[1:17].tolist()
    # A document begins at the end token before it, which stands for "nothing before".
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1]]


def test_the_ngrams_probabilities_sum_to_one_and_agree_with_what_a_text_costs() -> None:
    g = np.random.Generator(np.random.PCG64(1))
    ids = np.where(g.random(30_000) < 0.3, g.integers(0, 20, 30_000), np.arange(30_000) % 7).astype(np.uint16)
    grams = report.Ngrams(ids, 24)
    text = np.concatenate([ids[100:140], g.integers(0, 24, 40)]).astype(np.uint16)
    costs = grams.nats(text)
    for place in (4, 10, 39, 45, 70):
        p = grams.distribution(text[:place].tolist())
        assert p.sum() == pytest.approx(1.0) and (p > 0).all()
        assert -np.log(p[int(text[place])]) == pytest.approx(costs[place - 4])
    assert grams.distribution([]).sum() == pytest.approx(1.0)
    assert report.Ngrams(ids[:20_000], 24).nats(ids[20_000:]).mean() < np.log(20)
    assert len(grams.greedy([0, 1, 2, 3], 5, 99)) == 5


@pytest.mark.parametrize(
    ("completion", "good"),
    [
        ("    x = 1\n    return x\n", True),
        ("    x = 1\nimport os\n", True),  # it dedents: the body ends there
        ("    x = (1\n    return x\n", False),
        ("    return\n      x\n", False),
        ("", False),
        ("    return 1\n    y = (2, ", True),  # cut within a line: the last whole line counts
    ],
)
def test_a_completion_parses_as_the_body_of_its_function(completion: str, good: bool) -> None:
    assert report.parses(report.Body("", "def f(a):\n", 0), completion) is good


def test_bodies_are_functions_of_at_least_three_lines() -> None:
    body = "        a = 1\n        b = 2\n        return a + b\n"
    text = "def short():\n    return 1\n\nclass A:\n    def long(self):\n" + body
    found = report.bodies([text, "def broken(:\n"], 5)
    assert [(b.first, b.indent) for b in found] == [("    def long(self):\n", 4)]
    assert found[0].before == text[: text.index("        a = 1")]


def test_an_interrupted_training_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus(tmp_path / "corpus")
    monkeypatch.setattr(training, "EVERY", 2)
    monkeypatch.setattr(training, "BATCH_TOKENS", 1024)
    tokens = str(20 * 1024)
    given = ["--corpus", str(source), "--size", "small", "--lr", "1e-3", "--tokens", tokens, "--out"]

    def ask(name: str) -> list[str]:
        return [*given, str(tmp_path / name)]

    training.main(ask("whole"))
    plain = training.Progress.after_step

    def stop(self: object, state: object) -> None:
        plain(self, state)
        if state.step == 5:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Progress, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        training.main(ask("cut"))
    monkeypatch.setattr(training.Progress, "after_step", plain)
    training.main(ask("cut"))
    one, other = (LlamaForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    about = json.loads((tmp_path / "cut" / "model" / "training.json").read_text(encoding="utf-8"))
    assert about["steps"] == [18, 2] and about["nats_per_token"] < about["untrained_nats_per_token"] - 0.5
    assert "<svg" in report.curve_picture(about["curve"])
    package = {"package": "some", "version": "1.0", "licence": "MIT", "files": 3, "bytes": 4000}
    sources = {"train": [package], "heldout": [package], "counts": {"heldout": {"documents": 2, "bytes": 4000}}}
    found = {"bits_per_byte": {"this model": 1.5}, "parses": {"this model": 1}, "completions": 2}
    card = report.card(tmp_path / "cut" / "model", about, found, sources)
    assert "| this model | 1.500 |" in card and "1 of 2" in card and about["environment"]["cpu"] in card


def test_a_completion_counts_from_the_line_below_its_def() -> None:
    assert report.after_line_break("\n    return 1\n") == "    return 1\n"
    assert report.after_line_break("  # why\n    return 1") == "    return 1"
    assert report.after_line_break(" return 1\n    x\n") == "" == report.after_line_break("")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_whole_and_the_one_its_card_describes(name: str) -> None:
    folder = embedded.base_folder(name)
    weights = folder / "model.safetensors"
    card = (folder / "README.md").read_text(encoding="utf-8")
    about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert weights.stat().st_size <= 40_000_000 and hashlib.sha256(weights.read_bytes()).hexdigest() in card
    assert f"{about['tokens']:,} tokens" in card and "![" in card and (folder / "loss.svg").is_file()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == about["parameters"]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    # na\u00efve \U0001f40d\n\treturn x  +1\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == model.config.vocab_size == 4096


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_knows_python_that_it_never_saw(name: str) -> None:
    base = open_base(f"embedded:{name}")
    texts = sorted(embedded.data("python-source")["test"]["text"], key=len)[20:40]
    rows = encode(Split({"text": texts}), base, LM)

    def bits(model: torch.nn.Module) -> float:
        return float(LM.score(rows.labels.numpy(), answer(model, rows, LM).predictions))

    torch.manual_seed(0)
    assert bits(base.model(LM, seed=0)) < 0.75 * bits(LlamaForCausalLM(base.config).eval())


@pytest.mark.skipif("pylm" not in SHIPPED, reason="embedded:pylm is still in training")
def test_pylm_beats_what_it_was_held_against() -> None:
    about = json.loads((embedded.base_folder("pylm") / "training.json").read_text(encoding="utf-8"))["report"]
    bits, parsed = about["bits_per_byte"], about["parses"]
    assert bits["this model"] < 0.97 * bits["5-gram, modified Kneser-Ney"] < bits["this model, untrained"]
    assert parsed["this model"] > 1.5 * parsed["5-gram, modified Kneser-Ney"]
