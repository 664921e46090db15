"""Train a masked-language head for `embedded:minilm`, which comes without one; interrupted, it goes on.

    python scripts/train_masked_head.py --out runs/masked-head [--steps 1000]

What trains is the head that its architecture names (a linear layer, GELU, LayerNorm, and a bias on logits that are tied
to the word embeddings) and the top blocks, for the states of a sentence encoder no longer tell words apart; everything
below stays as it is. It reads the prose of the standard library: docstrings, comments
and the language reference. Files with a validation or test row of `embedded:stdlib-topics` are left out, and these rows
say how well it guesses. --out/model holds model.safetensors, training.json and README.md for brickyard/embedded.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brickyard.core.attached import attach_in_place
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split
from brickyard.core.encoded import IGNORED, Encoded
from brickyard.core.files import write_json, write_tensors
from brickyard.core.loop import State, Training, train
from brickyard.core.masked import MaskedRows, check_hidden, hidden_logits, masked_loss
from brickyard.core.measure import cpu_bfloat16_is_fast, environment
from brickyard.core.roles import blocks
from brickyard.core.task import Task
from brickyard.embedded import stdlib_topics

BASE = "embedded:minilm"
TASK = Task("text-classification", "accuracy", ("text", "other"), 2, "text")  # reads text; no label is looked at
LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})  # encodings: tables of names
WORDS = 40  # of a passage: with special tokens seldom over `TOKENS`
FEWEST = 6  # words of a passage
TOKENS = 80
HIDDEN = 0.15
TOP = 2  # blocks that train with the head
BATCH = 32
EVERY = 100  # steps between points of the curve, and between checkpoints


def passages(text: str) -> Iterator[str]:
    """Cut prose into passages of whole paragraphs where they fit; a longer paragraph gives several."""
    pending: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = [w for w in paragraph.split() if re.search(r"\w", w)]
        if len(pending) + len(words) > WORDS and len(pending) >= FEWEST:
            yield " ".join(pending)
            pending = []
        pending += words
        while len(pending) > WORDS:
            yield " ".join(pending[:WORDS])
            pending = pending[WORDS:]
    if len(pending) >= FEWEST:
        yield " ".join(pending)


def comments(source: bytes) -> str:
    """Return the comments of a source file, those of neighbouring lines as one paragraph."""
    paragraphs: list[list[str]] = []
    last = -2
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] > last + 1:
                paragraphs.append([])
            paragraphs[-1].append(token.string.lstrip("#!: "))
            last = token.start[0]
    return "\n\n".join(" ".join(lines) for lines in paragraphs)


def prose(library: Path, held_out: set[str]) -> list[str]:
    """Return the distinct passages of the library's files, in an order that is a function of the passages alone."""
    found: dict[str, None] = {}
    for path in sorted(library.rglob("*.py")):
        if not LEFT_OUT.isdisjoint(path.parts):
            continue
        source = path.read_bytes()
        try:
            docstrings = list(stdlib_topics.docstrings(source))
            noted = comments(source)
        except (SyntaxError, tokenize.TokenError, UnicodeDecodeError, ValueError):
            continue  # files that test the parser with what is no Python
        if held_out.isdisjoint(stdlib_topics.opening(text) for text in docstrings):
            for text in (*docstrings, noted):
                found.update(dict.fromkeys(passages(text)))
    from pydoc_data.topics import topics

    for text in topics.values():
        found.update(dict.fromkeys(passages(text)))
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())


def encoded(texts: list[str], base: Base) -> Encoded:
    """Return the texts as token ids, cut to `TOKENS`."""
    return encode(Split({"text": texts}), base, TASK, max_length=TOKENS)


class HeldOut:
    """Rows hidden once, the same for every measurement."""

    def __init__(self, rows: Encoded, tokenizer: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hidden = MaskedRows(rows, tokenizer, HIDDEN)
            parts = np.array_split(np.arange(len(rows)), -(-len(rows) // BATCH))
            self.batches = [hidden.collate(part) for part in parts]
        self.targets = torch.cat([b["labels"][b["labels"] != IGNORED] for b in self.batches])

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """Return nats a hidden token, and per cent of them guessed right first and among five."""
        was_training = model.training
        model.eval()
        nats, first, of_five = [], [], []
        for batch in self.batches:
            targets_M = batch["labels"][batch["labels"] != IGNORED]
            logits_MV = hidden_logits(model, batch)
            nats.append(torch.nn.functional.cross_entropy(logits_MV, targets_M, reduction="none"))
            right_M5 = logits_MV.topk(5).indices == targets_M[:, None]
            first.append(right_M5[:, 0])
            of_five.append(right_M5.any(1))
        model.train(was_training)
        return {
            "nats": float(torch.cat(nats).mean()),
            "first": 100 * float(torch.cat(first).double().mean()),
            "of_five": 100 * float(torch.cat(of_five).double().mean()),
        }

    def commonest(self, rows: Encoded) -> dict[str, float]:
        """Return what always guessing the commonest tokens of the training rows gives."""
        counts = Counter(int(t) for i in range(len(rows)) for t in rows.collate(np.array([i]))["input_ids"][0, 1:-1])
        five = [token for token, _ in counts.most_common(5)]
        among = torch.isin(self.targets, torch.tensor(five))
        return {
            "first": 100 * float((self.targets == five[0]).double().mean()),
            "of_five": 100 * float(among.double().mean()),
        }


class Progress:
    """Stores and prints a point of the curve every so many steps."""

    def __init__(self, path: Path, held_out: HeldOut) -> None:
        self.path, self.held_out, self.began = path, held_out, time.monotonic()

    def after_step(self, state: State) -> None:
        """Measure on held-out rows now and then."""
        step = state.step + 1
        if step % EVERY and step != state.total:
            return
        point = {"step": step, "train": float(np.mean(state.losses[-EVERY:])) if state.losses else None}
        point |= self.held_out.measure(state.attached.model)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point | {"seconds": round(time.monotonic() - self.began)}), flush=True)


def trained_names(model: Any, top: int) -> list[str]:
    """Return the parameters of the head and the top blocks; the logits' weights are the word embeddings, which stay."""
    tied, known = model.get_output_embeddings().weight, blocks(model)
    top_blocks = tuple(f"{name}." for name, _ in known[len(known) - top :])
    below = f"{model.base_model_prefix}."
    return [
        name
        for name, p in model.named_parameters()
        if name.startswith(top_blocks) or (not name.startswith(below) and p is not tied)
    ]


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: fill-mask
---
# A masked-language head for embedded:minilm

A sentence encoder comes without the layer that guesses hidden words. This is one for `all-MiniLM-L6-v2`, by the names
of `BertForMaskedLM`: a linear layer, LayerNorm and a bias for each token, and new weights for the top {blocks} blocks,
whose states of a sentence encoder no longer tell words apart: {parameters:,} parameters in bfloat16. The logits'
weights are the word embeddings of the base; they and the blocks below are the base's own. Brickyard lends it to the
base with the fingerprint `{base_sha256}` and to
no other: `mpt` labels a pool of texts with it.

## Training
Command: `python scripts/train_masked_head.py --steps {steps}`. Text: docstrings, comments and the language reference of
the Python standard library (PSF-2.0), without files that hold a validation or test row of `embedded:stdlib-topics`:
{passages:,} passages, {tokens:,} tokens. {batch} passages a step ({epochs:.1f} epochs), 15 % of the tokens hidden,
learning rate {lr:g} falling to 0, {minutes:.0f} minutes on one thread beside other work ({cpu}).

## Measured
On the {rows:,} test rows of `embedded:stdlib-topics`, {hidden_tokens:,} hidden tokens:

| | nats a token | right first, % | right among five, % |
|---|---|---|---|
{table}

Loss on the validation rows, nats a token, by steps: {curve}.

It has read about Python and little else, and the base's states were made for whole sentences: it is here for methods
that need a gap to read, not to fill gaps in earnest.
"""


def card(about: dict[str, Any]) -> str:
    """Return the model card."""
    test = about["test"]
    named = {
        "always the commonest tokens": test["commonest"],
        "head as drawn, untrained": test["untrained"],
        "**trained head**": test["trained"],
    }
    rows = [
        f"| {name} | {'' if 'nats' not in v else format(v['nats'], '.2f')} | {v['first']:.1f} | {v['of_five']:.1f} |"
        for name, v in named.items()
    ]
    return CARD.format(
        **{
            k: about[k]
            for k in ("parameters", "blocks", "base_sha256", "steps", "passages", "tokens", "batch", "epochs", "lr")
        },
        minutes=about["seconds"] / 60,
        cpu=about["environment"]["cpu"],
        rows=test["rows"],
        hidden_tokens=test["hidden_tokens"],
        table="\n".join(rows),
        curve=", ".join(f"{point['nats']:.2f} ({point['step']:,})" for point in about["curve"]),
    )


def main() -> None:
    """Gather, train, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/masked-head"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = open_base(BASE)
    splits = stdlib_topics.splits()
    held_texts = {text for name in ("validation", "test") for text in splits[name]["text"]}
    texts = prose(Path(sysconfig.get_paths()["stdlib"]), held_texts)
    rows = encoded(texts, base)
    sides = {name: HeldOut(encoded(splits[name]["text"], base), base.tokenizer) for name in ("validation", "test")}
    model = base.masked_model(new_head=args.seed)
    check_hidden(model, sides["validation"].batches[0])
    untrained = sides["test"].measure(model)
    names = trained_names(model, TOP)
    attached = attach_in_place(model, names, matched={"head": names})
    attached.objective = masked_loss
    began = time.monotonic()
    train(
        attached,
        MaskedRows(rows, base.tokenizer, HIDDEN),
        None,
        TASK,
        Training(
            lr=args.lr,
            steps=args.steps,
            batch=BATCH,
            seed=args.seed,
            precision="bfloat16" if torch.cuda.is_available() or cpu_bfloat16_is_fast() else "float32",
            checkpoint_every=EVERY,
            evaluate_every=10**9,
        ),
        folder=args.out / "checkpoints",
        callbacks=(Progress(args.out / "curve.jsonl", sides["validation"]),),
    )
    # Half the bytes; what is measured below is what ships.
    tensors = {n: p.detach().to(torch.bfloat16) for n, p in model.named_parameters() if n in set(names)}
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    about = {
        "base": BASE,
        "base_sha256": base.fingerprint,
        "blocks": TOP,
        "parameters": sum(t.numel() for t in tensors.values()),
        "passages": len(rows),
        "tokens": int(np.sum(rows.lengths)),
        "steps": args.steps,
        "batch": BATCH,
        "epochs": args.steps * BATCH / len(rows),
        "lr": args.lr,
        "seed": args.seed,
        "seconds": time.monotonic() - began,
        "test": {
            "rows": len(splits["test"]["text"]),
            "hidden_tokens": len(sides["test"].targets),
            "trained": sides["test"].measure(model),
            "untrained": untrained,
            "commonest": sides["test"].commonest(rows),
        },
        "curve": [json.loads(line) for line in (args.out / "curve.jsonl").read_text(encoding="utf-8").splitlines()],
        "environment": environment(),
    }
    target = args.out / "model"
    target.mkdir(exist_ok=True)
    write_tensors(target / "model.safetensors", tensors, {"base_sha256": base.fingerprint})
    write_json(target / "training.json", about)
    (target / "README.md").write_text(card(about), encoding="utf-8")
    print(json.dumps(about["test"], indent=2))


if __name__ == "__main__":
    main()
