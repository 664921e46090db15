"""Hold `embedded:pylm` against what it must beat: xz, a 5-gram model on the same tokens, and itself untrained.

    python scripts/pylm_report.py --corpus runs/pylm/corpus --model runs/pylm/base/model

Prints bits per byte of the held-out packages, and how many greedy completions of held-out function bodies parse.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from brickyard.core.answers import answer
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split
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
        y = n1 / (n1 + 2 * n2)
        discount = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
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


def main() -> None:
    """Measure and print everything as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("runs/pylm/corpus"))
    parser.add_argument("--model", type=Path, default=Path("runs/pylm/base/model"))
    parser.add_argument("--completions", type=int, default=200)
    args = parser.parse_args()
    texts = [json.loads(line)["text"] for line in (args.corpus / "heldout.jsonl").open(encoding="utf-8")]
    size = sum(len(text.encode()) for text in texts)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = np.fromfile(args.corpus / "train.bin", dtype=np.uint16)
    held = np.fromfile(args.corpus / "heldout.bin", dtype=np.uint16)
    packed = lzma.compress("".join(texts).encode(), preset=9 | lzma.PRESET_EXTREME)
    out: dict[str, Any] = {"bits_per_byte": {"xz -9e": 8 * len(packed) / size}}
    grams = Ngrams(train, len(tokenizer))
    padded = np.concatenate([np.full(ORDER - 1, held[-1], dtype=np.uint16), held])
    out["bits_per_byte"]["5-gram"] = float(grams.nats(padded).sum() / math.log(2) / size)
    base = open_base(str(args.model))
    model = base.model(TASK, seed=0)
    encoded = encode(Split({"text": texts}), base, TASK)
    score = lambda m: TASK.score(encoded.labels, answer(m, encoded, TASK).predictions)  # noqa: E731
    torch.manual_seed(0)
    out["bits_per_byte"]["untrained"] = score(LlamaForCausalLM(base.config).eval())
    out["bits_per_byte"]["pylm"] = score(model)
    chosen = bodies(texts, args.completions)
    end = int(tokenizer.eos_token_id)
    prompts = [tokenizer(body.before, add_special_tokens=False)["input_ids"][-PROMPT:] for body in chosen]

    def by_model(prompt: list[int]) -> list[int]:
        made = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=BODY, do_sample=False, use_cache=True, pad_token_id=end
        )
        return made[0, len(prompt) :].tolist()

    ways: dict[str, Callable[[list[int]], list[int]]] = {
        "5-gram": lambda p: grams.greedy(p, BODY, end),
        "pylm": by_model,
    }
    out["parses"] = {
        name: sum(
            parses(body, tokenizer.decode([t for t in way(prompt) if t != end]))
            for body, prompt in zip(chosen, prompts, strict=True)
        )
        / len(chosen)
        for name, way in ways.items()
    }
    out["completions"] = len(chosen)
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
