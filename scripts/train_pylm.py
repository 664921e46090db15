"""Train `embedded:pylm` (or its smaller size) on the corpus of `scripts/pylm_corpus.py`; interrupted, it goes on.

    python scripts/train_pylm.py --corpus runs/pylm/corpus --out runs/pylm/base [--size small] [--seed 0] [--half 0|1]
        [--arch transnormer]

Nine tenths of the tokens are read in blocks of 256 at a constant rate after a warm-up, the rest in blocks of 1,024
while the rate falls to zero. The model and its tokenizer end in --out in bfloat16, with training.json beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from brickyard.core.attached import attach_in_place
from brickyard.core.files import read_tensors, write_json, write_tensors
from brickyard.core.loop import State, Training, train
from brickyard.core.measure import cpu_bfloat16_is_fast, environment
from brickyard.core.task import Task
from brickyard.models.transnormer import TransNormerConfig, TransNormerForCausalLM

TASK = Task("causal-lm", "nats_per_token", None, 1, "text")
SIZES: dict[str, dict[str, Any]] = {
    "base": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 688,
        "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 256,
        "tie_word_embeddings": True,
    },
}
# TransNormer has a gate of the width squared more in each block; a narrower feed-forward pays for it.
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {size: options["intermediate_size"] for size, options in SIZES.items()}),
    "transnormer": (TransNormerConfig, TransNormerForCausalLM, {"base": 600, "small": 224}),
}
SHORT, LONG = 256, 1024  # positions of a block
LONG_SHARE = 0.1  # of the tokens
BATCH_TOKENS = 4096  # twice as many are slower on two cores and leave half of the steps
EVERY = 400  # steps between points of the curve, and between checkpoints


class Stream:
    """Token ids of documents behind one another as blocks of T positions; the end token stands before each document.

    What `brickyard.core.batches.EncodedBlocks` does for a data set, on a file that need not fit into memory.
    """

    def __init__(self, ids: np.ndarray, end: int, size: int) -> None:
        self.ids, self.end, self.size = ids, end, size
        self.lengths = np.full((len(ids) - 1) // size, size, dtype=np.int64)
        self.labels = torch.empty(0)

    @property
    def digest(self) -> str:
        """What decides the batches."""
        return f"{len(self.ids)} ids, sum {int(self.ids.astype(np.int64).sum())}, blocks of {self.size}"

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, index: ArrayLike) -> dict[str, Tensor]:
        """Return input_ids, position_ids and labels [n, T]."""
        rows = np.asarray(index, dtype=np.int64)
        place = rows[:, None] * self.size + np.arange(self.size + 1)
        found = self.ids[place].astype(np.int64)
        given = found[:, :-1]
        column = np.arange(self.size)
        # A block's first position counts as a start, whatever stands before it.
        start = np.maximum.accumulate(np.where((given == self.end) | (column == 0), column, 0), axis=1)
        return {
            "input_ids": torch.from_numpy(given),
            "position_ids": torch.from_numpy(column - start),
            "labels": torch.from_numpy(found[:, 1:]),
        }


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: Stream, blocks: int) -> float:
    """Return nats a token over the first blocks of held-out text."""
    model.eval()
    losses = []
    blocks = min(blocks, len(stream))
    for rows in np.array_split(np.arange(blocks), -(-blocks * stream.size // BATCH_TOKENS)):
        batch = stream.collate(rows)
        labels = batch.pop("labels")
        losses.append(float(TASK.loss(model(**batch).logits, labels)) * len(rows))
    model.train()
    return sum(losses) / blocks


class Progress:
    """Prints and stores a point of the loss curve every so many steps."""

    def __init__(self, path: Path, held_out: Stream, every: int, tokens_a_step: int, done: int) -> None:
        self.path, self.held_out, self.every = path, held_out, every
        self.tokens_a_step, self.done = tokens_a_step, done
        self.mark = (time.monotonic(), 0)

    def after_step(self, state: State) -> None:
        """Measure on held-out text now and then."""
        step = state.step + 1
        if step % self.every and step != state.total:
            return
        now = time.monotonic()
        began, before = self.mark
        point = {
            "tokens": self.done + step * self.tokens_a_step,
            "train": float(np.mean(state.losses[-self.every :])) if state.losses else None,
            "held_out": held_out_loss(state.attached.model, self.held_out, 2**16 // self.held_out.size),
            "tokens_per_second": (step - before) * self.tokens_a_step / (now - began) if before else None,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point), flush=True)
        self.mark = (time.monotonic(), step)


def phase(
    model: PreTrainedModel,
    ids: np.ndarray,
    held_out: np.ndarray,
    end: int,
    training: Training,
    *,
    size: int,
    done: int,
    folder: Path,
    identity: dict[str, Any],
) -> None:
    """Train in blocks of `size`; an interrupted phase goes on, a finished one is read."""
    finished = folder / "weights.safetensors"
    if not finished.is_file():
        flat = [name for name, p in model.named_parameters() if p.ndim < 2]
        attached = attach_in_place(model, [n for n, _ in model.named_parameters()], matched={}, no_decay=flat)
        progress = Progress(
            folder.parent / "curve.jsonl", Stream(held_out, end, size), EVERY, training.batch * size, done
        )
        train(
            attached,
            Stream(ids, end, size),
            None,
            TASK,
            replace(training, evaluate_every=10**9),
            folder=folder / "checkpoints",
            identity=identity | {"size": size},
            # At a constant rate the number of steps only says where the phase ends.
            allow_change=("training.steps",) if training.schedule == "constant" else (),
            callbacks=(progress,),
        )
        write_tensors(finished, {n: p.detach().clone() for n, p in model.named_parameters()})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    stored = read_tensors(finished)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(stored[name])


def language_model(size: str, arch: str, end: int) -> PreTrainedModel:
    """Return an untrained model; `end` is the token that stands between documents."""
    make_config, make_model, feed_forward = ARCHITECTURES[arch]
    config = make_config(
        vocab_size=4096,
        max_position_embeddings=LONG,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=False,
        **SIZES[size] | {"intermediate_size": feed_forward[size]},
    )
    model = make_model._from_config(config, attn_implementation="sdpa" if arch == "llama" else "eager")
    # The token between documents pads too, so torch would keep its embedding as it is, at zero: a vector at which
    # RMSNorm multiplies gradients by 1 / sqrt(eps), layer after layer.
    table: Any = model.get_input_embeddings()
    table.padding_idx = None
    with torch.no_grad():
        table.weight[end].normal_(std=config.initializer_range)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or go on training, and write the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("runs/pylm/corpus"))
    parser.add_argument("--out", type=Path, default=Path("runs/pylm/base"))
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--tokens", type=float, default=24e6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="by torch.compile: a fifth faster, needs a C++ compiler")
    parser.add_argument("--half", type=int, choices=(0, 1), help="train on one half of the corpus only")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    ids = np.memmap(args.corpus / "train.bin", dtype=np.uint16, mode="r")
    held_out = np.memmap(args.corpus / "heldout.bin", dtype=np.uint16, mode="r")
    if args.half is not None:
        middle = len(ids) // 2
        ids = ids[:middle] if args.half == 0 else ids[middle:]
    end = int(held_out[-1])
    torch.manual_seed(args.seed)
    arch = {} if args.arch == "llama" else {"arch": args.arch}
    model = language_model(args.size, args.arch, end)
    if args.compile:
        model.compile()
    precision = "bfloat16" if torch.cuda.is_available() or cpu_bfloat16_is_fast() else "float32"
    long_tokens = LONG_SHARE * args.tokens
    common = {"lr": args.lr, "wd": 0.1, "seed": args.seed, "precision": precision, "checkpoint_every": EVERY}
    first = Training(
        steps=int((args.tokens - long_tokens) // BATCH_TOKENS),
        batch=BATCH_TOKENS // SHORT,
        warmup=0.02,
        schedule="constant",
        **common,
    )
    second = Training(
        steps=max(1, int(long_tokens // BATCH_TOKENS)),
        batch=BATCH_TOKENS // LONG,
        warmup=0.0,
        schedule="linear",
        **common,
    )
    untrained = held_out_loss(model, Stream(held_out, end, LONG), 128)
    phase(model, ids, held_out, end, first, size=SHORT, done=0, folder=args.out / "short", identity=arch)
    done = first.steps * BATCH_TOKENS
    phase(model, ids, held_out, end, second, size=LONG, done=done, folder=args.out / "long", identity=arch)
    about = {
        **arch,
        "size": args.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": (first.steps + second.steps) * BATCH_TOKENS,
        "corpus_tokens": len(ids),
        "epochs": (first.steps + second.steps) * BATCH_TOKENS / len(ids),
        "steps": [first.steps, second.steps],
        "seed": args.seed,
        "half": args.half,
        "lr": args.lr,
        "precision": precision,
        "untrained_nats_per_token": untrained,
        "nats_per_token": held_out_loss(model, Stream(held_out, end, LONG), len(held_out) // LONG),
        "curve": [json.loads(line) for line in (args.out / "curve.jsonl").read_text(encoding="utf-8").splitlines()],
        "environment": environment(),
    }
    target = args.out / "model"
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(target)  # type: ignore[arg-type]
    for path in (args.corpus / "tokenizer").iterdir():
        shutil.copyfile(path, target / path.name)
    write_json(target / "training.json", about)


if __name__ == "__main__":
    # Before the first parallel operation, for threads inherit it: half-trained models meet many denormal numbers.
    torch.set_flush_denormal(True)
    main()
