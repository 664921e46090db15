"""Hold models of `train_pylm.py` against what they must beat, and write each with its card as an embedded base.

    python scripts/pylm_report.py runs/pylm/base/model brickyard/embedded/pylm [MODEL OUT ...]

What it must beat: xz, a 5-gram model on the same tokens, and itself untrained, in bits per byte of the held-out
packages; and the 5-gram in how many greedy completions of held-out function bodies parse.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from brickyard.compare.charts import tag
from brickyard.compare.scales import Axis
from brickyard.core.answers import answer
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split
from brickyard.core.files import sha256, write_json
from brickyard.core.task import Task

TASK = Task("causal-lm", "bits_per_byte", None, 1, "text")
BITS = 12  # of a token id: five of them fit into 64 bits
ORDER = 5
PROMPT, BODY = 384, 128  # tokens before a function body, and of its completion


@dataclass(frozen=True)
class Level:
    """The n-grams of one order: sorted keys, what each adds to its probability, and its contexts' back-off weights."""

    keys: np.ndarray
    share: np.ndarray
    contexts: np.ndarray
    starts: np.ndarray
    backoff: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray) -> Level:
        """Discount counts by modified Kneser-Ney (Chen and Goodman 1999, sec. 3.3)."""
        n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
        y = n1 / max(n1 + 2 * n2, 1)
        # Of few n-grams the formula may leave the range that makes sense, or divide by nothing.
        raw = [0.0, 1 - 2 * y * n2 / max(n1, 1), 2 - 3 * y * n3 / max(n2, 1), 3 - 4 * y * n4 / max(n3, 1)]
        discount = np.clip(raw, 0, np.arange(4))
        taken = discount[np.minimum(counts, 3)]
        contexts, starts = np.unique(keys >> np.uint64(BITS), return_index=True)
        total = np.add.reduceat(counts, starts)
        lengths = np.diff(np.append(starts, len(keys)))
        share = (counts - taken) / np.repeat(total, lengths)
        return cls(keys, share, contexts, starts, np.add.reduceat(taken, starts) / total)


class Ngrams:
    """An interpolated 5-gram model with modified Kneser-Ney smoothing."""

    def __init__(self, ids: np.ndarray, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        key = np.zeros(len(ids) - ORDER + 1, dtype=np.uint64)
        for i in range(ORDER):
            key = (key << np.uint64(BITS)) | ids[i : len(ids) - ORDER + 1 + i].astype(np.uint64)
        keys, counts = np.unique(key, return_counts=True)
        self.levels: list[Level] = []
        for n in range(ORDER, 1, -1):
            self.levels.append(Level.of(keys, counts))
            # Lower orders count in how many different contexts an n-gram stands, not how often.
            keys, counts = np.unique(keys & np.uint64(2 ** (BITS * (n - 1)) - 1), return_counts=True)
        self.levels.reverse()
        seen = np.zeros(vocabulary)
        seen[keys.astype(np.int64)] = counts
        self.unigram = (seen + 1) / (seen + 1).sum()

    def nats(self, ids: np.ndarray) -> np.ndarray:
        """Return -ln p of every token from the fifth on."""
        p = self.unigram[ids[ORDER - 1 :].astype(np.int64)]
        for n, level in enumerate(self.levels, 2):
            key = np.zeros(len(p), dtype=np.uint64)
            for i in range(n):
                key = (key << np.uint64(BITS)) | ids[ORDER - n + i : len(ids) - n + 1 + i].astype(np.uint64)
            own = _found(level.keys, key, level.share, 0.0)
            p = own + _found(level.contexts, key >> np.uint64(BITS), level.backoff, 1.0) * p
        return -np.log(p)

    def distribution(self, context: list[int]) -> np.ndarray:
        """Return p over the vocabulary after the last four tokens of `context`."""
        p = self.unigram
        for n, level in enumerate(self.levels, 2):
            if len(context) < n - 1:
                break
            key = 0
            for token in context[len(context) - n + 1 :]:
                key = key << BITS | int(token)
            at = int(np.searchsorted(level.contexts, np.uint64(key)))
            if at == len(level.contexts) or int(level.contexts[at]) != key:
                break
            stop = int(level.starts[at + 1]) if at + 1 < len(level.starts) else len(level.keys)
            rows = slice(int(level.starts[at]), stop)
            p = level.backoff[at] * p
            p[(level.keys[rows] & np.uint64(2**BITS - 1)).astype(np.int64)] += level.share[rows]
        return p

    def greedy(self, prompt: list[int], count: int, end: int) -> list[int]:
        """Continue `prompt` with the most probable token each time."""
        out = list(prompt)
        for _ in range(count):
            token = int(self.distribution(out[-4:]).argmax())
            if token == end:
                break
            out.append(token)
        return out[len(prompt) :]


def _found(keys: np.ndarray, wanted: np.ndarray, values: np.ndarray, absent: float) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], absent)


@dataclass(frozen=True)
class Body:
    """A function of held-out source: the text before its body, its own first line, and how far that is indented."""

    before: str
    first: str
    indent: int


def bodies(texts: list[str], count: int) -> list[Body]:
    """Return `count` functions whose body has at least three lines, drawn with seed 0."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.body[-1].end_lineno - node.body[0].lineno >= 2:  # type: ignore[operator]
                start = node.body[0].lineno - 1
                if node.body[0].lineno > node.lineno and lines[start - 1].rstrip().endswith(":"):
                    first = "".join(lines[node.lineno - 1 : start])
                    found.append(Body("".join(lines[:start]), first, node.col_offset))
    chosen = np.random.Generator(np.random.PCG64(0)).permutation(len(found))[:count]
    return [found[i] for i in chosen]


def parses(body: Body, completion: str) -> bool:
    """Whether the function parses with the completion as its body, up to where it dedents or its last whole line."""
    kept = []
    for line in completion.split("\n")[:-1] if "\n" in completion else [completion]:
        if line.strip() and len(line) - len(line.lstrip()) <= body.indent:
            break
        kept.append(line)
    # Indented source parses under a statement of its own.
    source = ("if True:\n" if body.indent else "") + body.first + "\n".join(kept) + "\n"
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return bool("".join(kept).strip())


def after_line_break(completion: str) -> str:
    """Return what a completion puts below the `def` line; nothing where it goes on in that line with code."""
    rest, _, below = completion.partition("\n")
    return "" if rest.strip() and not rest.strip().startswith("#") else below


def baselines(corpus: Path, texts: list[str], vocabulary: int) -> tuple[dict[str, float], Ngrams]:
    """Return the bits per byte of xz and of a 5-gram model of the training tokens, and that model.

    xz twice: in one stream it looks back over all files, which none of the models does; by itself a file has nothing
    before it, as for them.
    """
    size = sum(len(text.encode()) for text in texts)
    held = np.fromfile(corpus / "heldout.bin", dtype=np.uint16)
    grams = Ngrams(np.fromfile(corpus / "train.bin", dtype=np.uint16), vocabulary)
    padded = np.concatenate([np.full(ORDER - 1, held[-1], dtype=np.uint16), held])
    packed = lambda text: len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))  # noqa: E731
    return {
        "xz -9e, all files in one stream": 8 * packed("".join(texts)) / size,
        "xz -9e, every file by itself": 8 * sum(map(packed, texts)) / size,
        "5-gram, modified Kneser-Ney": float(grams.nats(padded).sum() / math.log(2) / size),
    }, grams


@dataclass(frozen=True)
class Yardsticks:
    """What every model is held against: the held-out texts, function bodies to complete, and the baselines' figures."""

    texts: list[str]
    chosen: list[Body]
    prompts: list[list[int]]
    bits: dict[str, float]
    parses: dict[str, int]

    @classmethod
    def of(cls, corpus: Path, folder: Path, completions: int) -> Yardsticks:
        """Measure the baselines with the tokenizer of one of the models; all of a corpus share it."""
        texts = [json.loads(line)["text"] for line in (corpus / "heldout.jsonl").open(encoding="utf-8")]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bits, grams = baselines(corpus, texts, len(tokenizer))
        chosen = bodies(texts, completions)
        # A line break and the indentation behind it are one token, so a prompt ends before the line break.
        starts = [body.before.rstrip("\n") for body in chosen]
        prompts = [tokenizer(start, add_special_tokens=False)["input_ids"][-PROMPT:] for start in starts]
        end = int(tokenizer.eos_token_id)
        parsed = parsing(tokenizer, chosen, prompts, lambda p: grams.greedy(p, BODY, end))
        return cls(texts, chosen, prompts, bits, {"5-gram, modified Kneser-Ney": parsed})


def parsing(tokenizer: Any, chosen: list[Body], prompts: list[list[int]], way: Callable[[list[int]], list[int]]) -> int:
    """Return how many of the completions that `way` makes of the prompts parse."""
    end = int(tokenizer.eos_token_id)
    return sum(
        parses(body, after_line_break(tokenizer.decode([t for t in way(prompt) if t != end])))
        for body, prompt in zip(chosen, prompts, strict=True)
    )


def measure(given: Yardsticks, folder: Path) -> dict[str, Any]:
    """Return bits per byte of everything, and the shares of completions that parse."""
    base = open_base(str(folder))
    model = base.model(TASK, seed=0)
    encoded = encode(Split({"text": given.texts}), base, TASK)

    def score(m: torch.nn.Module) -> float:
        return float(TASK.score(encoded.labels.numpy(), answer(m, encoded, TASK).predictions))

    torch.manual_seed(0)
    bits = {
        "this model, untrained": score(LlamaForCausalLM(base.config).eval()),
        "this model": score(model),
    }
    end = int(base.tokenizer.eos_token_id)

    def by_model(prompt: list[int]) -> list[int]:
        made = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=BODY, do_sample=False, use_cache=True, pad_token_id=end
        )
        return made[0, len(prompt) :].tolist()

    parsed = {"this model": parsing(base.tokenizer, given.chosen, given.prompts, by_model)}
    return {
        "bits_per_byte": given.bits | bits,
        "parses": given.parses | parsed,
        "completions": len(given.chosen),
    }


def curve_picture(points: Sequence[dict[str, Any]]) -> str:
    """Return the loss curve as SVG: nats a token over tokens seen, training pale, held-out dark."""
    w, h = 640, 300
    lines = {
        name: [(p["tokens"] / 1e6, p[name]) for p in points if p[name] is not None] for name in ("train", "held_out")
    }
    spots = [spot for line in lines.values() for spot in line]
    x_axis = Axis(0.0, max(x for x, _ in spots), 48, w - 16)
    low, high = math.floor(2 * min(y for _, y in spots)) / 2, math.ceil(2 * max(y for _, y in spots)) / 2
    y_axis = Axis(low, high, h - 40, 16)
    inner = [tag("rect", width=w, height=h, fill="#fff")]
    for tick in np.arange(low, high + 0.25, 0.5):
        y = y_axis.at(float(tick))
        inner.append(tag("path", d=f"M48 {y:.1f}H{w - 16}", stroke="#e7e9ec"))
        inner.append(tag("text", f"{tick:.1f}", x=42, y=y + 4, text_anchor="end"))
    for tick in np.linspace(0, x_axis.high, 6):
        inner.append(tag("text", f"{tick:.0f}", x=x_axis.at(float(tick)), y=h - 22, text_anchor="middle"))
    inner.append(tag("text", "million tokens seen", x=w / 2, y=h - 6, text_anchor="middle"))
    for (name, line), colour in zip(lines.items(), ("#b9c0c7", "#0060a8"), strict=True):
        path = "M" + "L".join(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}" for x, y in line)
        inner.append(tag("path", d=path, fill="none", stroke=colour, stroke_width=2))
        words = {"train": "training", "held_out": "held out"}[name]
        inner.append(tag("text", words, x=w - 90, y=32 if name == "train" else 50, fill=colour))
    frame = f"0 0 {w} {h}"
    style = {"font_family": "sans-serif", "font_size": 12, "fill": "#5a636d", "xmlns": "http://www.w3.org/2000/svg"}
    label = "Loss in nats a token over the tokens seen"
    return f"{tag('svg', *inner, viewBox=frame, width=w, height=h, role='img', aria_label=label, **style)}\n"


def card(folder: Path, about: dict[str, Any], found: dict[str, Any], sources: dict[str, Any]) -> str:
    """Return the model card: what it is, what it was trained on and how, and what was measured."""
    name = folder.name.replace("_", "-")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    share = "" if about["half"] is None else f", half {about['half']} of the documents"
    machine = about["environment"]
    curve = about["curve"]
    bits = "\n".join(f"| {who} | {value:.3f} |" for who, value in found["bits_per_byte"].items())
    parsed = "\n".join(f"| {who} | {n} of {found['completions']} |" for who, n in found["parses"].items())
    licences = "\n".join(
        f"| {s['package']} {s['version']} | {s['licence']} | {s['files']:,} | {s['bytes'] / 1e6:.1f} |"
        for s in sources["train"]
    )
    held = ", ".join(f"{s['package']} {s['version']}" for s in sources["heldout"])
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# {name}: a small language model of Python source

A `{config["architectures"][0]}`: {config["num_hidden_layers"]} layers, width {config["hidden_size"]},
{config["num_attention_heads"]} heads, feed-forward {config["intermediate_size"]}, a byte-level BPE of
{config["vocab_size"]:,} tokens, context {config["max_position_embeddings"]:,}. {about["parameters"]:,} parameters in
bfloat16, {weights.stat().st_size:,} bytes. It is a base for trying and comparing methods on a real language model, not
a tool that writes code.

sha256 of model.safetensors: `{sha256(weights)}`

## Training
{about["tokens"]:,} tokens of {about["corpus_tokens"]:,}{share} ({about["epochs"]:.2f} epochs), {sum(about["steps"]):,}
steps of {about["tokens"] // sum(about["steps"]):,} tokens: {about["steps"][0]:,} steps in blocks of 256 at the constant
rate {about["lr"]:g} after a warm-up, then {about["steps"][1]:,} in blocks of 1,024 while the rate falls to zero.
{about["precision"]}, seed {about["seed"]}, on {machine["cpu"]}. Scripts: `scripts/pylm_corpus.py`,
`scripts/train_pylm.py`, `scripts/pylm_report.py` (`make pylm`).

![Loss in nats a token over the tokens seen](loss.svg)

Held-out loss after {curve[-1]["tokens"]:,} tokens: {about["nats_per_token"]:.3f} nats a token
(untrained {about["untrained_nats_per_token"]:.3f}).

## Measured on held-out packages
{held}: {sources["counts"]["heldout"]["documents"]:,} files, {sources["counts"]["heldout"]["bytes"]:,} bytes, none of
them trained on.

| | bits per byte |
|---|---|
{bits}

Greedy completions of held-out function bodies ({PROMPT} tokens before, {BODY} after) that parse:

| | parse |
|---|---|
{parsed}

## Data
Python source without tests, split by package. The files that `embedded:python-source` holds out are left out.

| package | licence | files | MB |
|---|---|---|---|
{licences}
"""


def main() -> None:
    """Measure, and write the models with their cards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "pairs", type=Path, nargs="+", metavar="MODEL OUT", help="a training's `model`; the base's folder"
    )
    parser.add_argument("--corpus", type=Path, default=Path("runs/pylm/corpus"))
    parser.add_argument("--completions", type=int, default=200)
    args = parser.parse_args()
    if len(args.pairs) % 2:
        parser.error(f"{len(args.pairs)} folders were given; pairs of a model and its base were expected.")
    pairs = list(zip(args.pairs[::2], args.pairs[1::2], strict=True))
    given = Yardsticks.of(args.corpus, pairs[0][0], args.completions)
    sources = json.loads((args.corpus / "sources.json").read_text(encoding="utf-8"))
    for model, out in pairs:
        found = measure(given, model)
        print(out.name, json.dumps(found, indent=2))
        about = json.loads((model / "training.json").read_text(encoding="utf-8"))
        shutil.copytree(model, out, dirs_exist_ok=True)
        write_json(out / "training.json", about | {"report": found})
        (out / "loss.svg").write_text(curve_picture(about["curve"]), encoding="utf-8")
        (out / "README.md").write_text(card(out, about, found, sources), encoding="utf-8")


if __name__ == "__main__":
    main()
