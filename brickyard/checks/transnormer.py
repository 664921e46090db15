"""The claims of TransNormer: its loss beside that of a Llama of equal size, at more than its length, and decoding."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from brickyard.checks._takes import takes
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.base import open_base
from brickyard.core.base_config import quiet
from brickyard.core.batches import encode
from brickyard.core.data import Split, read_data
from brickyard.core.documents import EncodedBlocks
from brickyard.core.loop import Training, train
from brickyard.core.method import Claim
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.models.transnormer import GatedLinearAttention, TransNormerConfig, TransNormerForCausalLM

TASK = Task("causal-lm", "nats_per_token", None, 1, "text")
NEAR = 5.0  # percent
LONGER = 4  # times the length of training
END = "<|end|>"
_NO_PAST = 1e4  # a slope with which nothing of the token before is left


@dataclass(frozen=True)
class Size:
    """What is trained: sizes of the network, positions of a block, and how much of the data."""

    width: int = 96
    layers: int = 3
    heads: int = 3
    length: int = 128
    tokens: int = 1_000_000
    batch: int = 32
    documents: int = 80
    document_bytes: int = 2048
    lr: float = 3e-3


@takes("data")
def quality(claim: Claim, size: Size = Size()) -> dict[str, Any]:
    """Train both on the same bytes in the same order and compare their nats on the same held-out excerpts.

    Tokens are bytes. Each of `claim.seeds` seeds draws the weights and the order of the blocks. Control: slopes so
    steep that no token sees another. Gate: the Llama beats pairs of bytes counted on its training data, so that there
    was something to learn from the past.
    """
    splits = read_data(claim.data, task="causal-lm").splits
    cut = [text[: size.document_bytes] for text in splits["test"]["text"]]
    test = Split({"text": cut[:: max(1, len(cut) // size.documents)][: size.documents]})
    arms = {"transnormer": range(claim.seeds), "llama": range(claim.seeds), "no past": range(1)}
    with tempfile.TemporaryDirectory() as folder:
        _save(_make("llama", size, 0), Path(folder))
        base = open_base(folder)
        data = encode(_some(splits["train"], size.tokens), base, TASK, max_length=size.length)
        near, far = (encode(test, base, TASK, max_length=n) for n in (size.length, LONGER * size.length))
    assert isinstance(data, EncodedBlocks) and isinstance(near, EncodedBlocks) and isinstance(far, EncodedBlocks)
    nats: dict[tuple[str, str], np.ndarray] = {}
    parameters = {}
    for arm, seeds in arms.items():
        found: dict[str, list[np.ndarray]] = {"near": [], "far": []}
        for seed in seeds:
            model = _trained(arm, data, size, seed)
            parameters[arm] = sum(p.numel() for p in model.parameters())
            for place, blocks in (("near", near), ("far", far)):
                found[place].append(answer(model, blocks, TASK).predictions)
        nats |= {(arm, place): np.stack(rows) for place, rows in found.items()}
    tokens = near.tokens
    level = {key: float(rows.sum(1).mean() / tokens.sum()) for key, rows in nats.items()}

    def percent(above: tuple[str, str], below: tuple[str, str]) -> tuple[float, float, float]:
        # At two lengths the same models are asked.
        difference = paired(tokens, nats[above], nats[below], TASK.metric, together=above[0] == below[0])
        return tuple(100 * x / level[below] for x in (difference.difference, difference.low, difference.high))  # type: ignore[return-value]

    equal = percent(("transnormer", "near"), ("llama", "near"))
    own, other = (percent((arm, "far"), (arm, "near")) for arm in ("transnormer", "llama"))
    blind = percent(("no past", "near"), ("llama", "near"))
    pairs = _pairs_of_bytes(data, near)
    gate = level["llama", "near"] < pairs
    parts = [_at_most(equal), _at_most(own), _at_least(other)]
    holds: Any = False if False in parts else "undecided" if "undecided" in parts else True
    losses = ", ".join(f"{arm} {level[arm, 'near']:.3f} and {level[arm, 'far']:.3f}" for arm in arms)
    show = lambda p: f"{p[0]:+.1f} % ({p[1]:+.1f} to {p[2]:+.1f})"  # noqa: E731
    return {
        "inequality": f"loss(transnormer) <= {1 + NEAR / 100:g} loss(llama); {LONGER} times the length: its own only",
        "holds": holds if gate else "set-up invalid",
        "measured": equal[0],
        "low": equal[1],
        "high": equal[2],
        "detail": (
            f"transnormer over llama {show(equal)}; at {LONGER} times the length of training over that length: "
            f"transnormer {show(own)}, llama {show(other)}; nats a byte at {size.length} and {LONGER * size.length} "
            f"positions: {losses}; pairs of bytes {pairs:.3f}; {parameters['transnormer']:,} and "
            f"{parameters['llama']:,} parameters, "
            f"{_steps(size) * size.batch * size.length:,} bytes, {claim.seeds} seeds, {len(tokens)} excerpts"
        ),
        "gate": {
            "inequality": "loss(llama) < loss(pairs of bytes)",
            "measured": pairs - level["llama", "near"],
            "low": None,
            "high": None,
            "holds": gate,
        },
        "control": {
            "what": "slopes so steep that no token sees another",
            "inequality": f"loss(no past) > {1 + NEAR / 100:g} loss(llama)",
            "measured": blind[0],
            "low": blind[1],
            "high": blind[2],
            "destroyed": blind[1] > NEAR,
        },
    }


def decode(claim: Claim, *, prompts: int = 8, prompt: int = 100, new: int = 150, size: Size = Size()) -> dict[str, Any]:
    """Generate greedily from the state and by reading everything anew; count tokens that differ, and bytes of caches.

    Control: the same count of bytes on a Llama of that size, whose cache must grow.
    """
    models_of = {arm: _make(arm, size, 0).eval() for arm in ("transnormer", "llama")}
    with torch.no_grad():
        for p in models_of["transnormer"].parameters():
            p.mul_(8)  # at their small initial values the logits are all but tied
    ids = torch.randint(1, 256, (prompts, prompt), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, : prompt // 4] = (torch.arange(prompts) % 2)[:, None]  # every other prompt is shorter
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    made = [
        models_of["transnormer"].generate(input_ids=ids, attention_mask=mask, use_cache=cached, **options)
        for cached in (True, False)
    ]
    differ = int((made[0] != made[1]).sum())
    kept = {arm: [_cache_bytes(model, n) for n in (1, 1000)] for arm, model in models_of.items()}
    own, other = (kept[arm][1] / kept[arm][0] for arm in ("transnormer", "llama"))
    return {
        "inequality": "tokens that differ = 0, and cache bytes after 1,000 tokens = those after one",
        "holds": differ == 0 and own == 1.0,
        "measured": float(differ),
        "low": float(differ),
        "high": float(differ),
        "detail": (
            f"{differ} of {prompts * new:,} greedy tokens differ between the state and reading anew (random weights, "
            f"padded prompts); cache of one row after 1 and 1,000 tokens: transnormer {kept['transnormer'][0]:,} and "
            f"{kept['transnormer'][1]:,} bytes, llama {kept['llama'][0]:,} and {kept['llama'][1]:,}"
        ),
        "gate": None,
        "control": {
            "what": "a Llama of that size: its cache must grow",
            "inequality": "cache bytes after 1,000 tokens > those after one",
            "measured": other,
            "low": other,
            "high": other,
            "destroyed": other > 1.0,
        },
    }


def _at_most(percent: tuple[float, float, float]) -> bool | str:
    return True if percent[2] <= NEAR else False if percent[1] > NEAR else "undecided"


def _at_least(percent: tuple[float, float, float]) -> bool | str:
    return True if percent[1] > NEAR else False if percent[2] <= NEAR else "undecided"


def _make(arm: str, size: Size, seed: int) -> Any:
    """Return a new model of `size`, drawn from `seed`; the Llama's wider feed-forward pays for TransNormer's gate."""
    shared: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": max(1024, LONGER * size.length),
        "pad_token_id": 256,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "tie_word_embeddings": True,
    }
    forward = 7 * size.width // 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arm == "llama":
            return LlamaForCausalLM(LlamaConfig(intermediate_size=forward + size.width // 3, **shared))
        model = TransNormerForCausalLM(TransNormerConfig(intermediate_size=forward, **shared))
    if arm == "no past":
        for module in model.modules():
            if isinstance(module, GatedLinearAttention):
                module.slopes.fill_(_NO_PAST)
    return model


def _save(model: Any, folder: Path) -> None:
    """Write a base whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
        model.save_pretrained(folder)


def _some(split: Split, size: int) -> Split:
    """The first documents that have `size` bytes together."""
    ends = np.cumsum([len(text.encode()) for text in split["text"]])
    return Split({"text": split["text"][: int(np.searchsorted(ends, size)) + 1]})


def _steps(size: Size) -> int:
    return max(1, size.tokens // (size.batch * size.length))


def _trained(arm: str, data: EncodedBlocks, size: Size, seed: int) -> nn.Module:
    model = _make(arm, size, seed)
    model.config.use_cache = False
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, [name for name, _ in model.named_parameters()], matched={}, no_decay=flat)
    training = Training(lr=size.lr, wd=0.1, steps=_steps(size), batch=size.batch, warmup=0.1, seed=seed)
    return train(attached, data, None, TASK, training, device="cpu") and model


def _pairs_of_bytes(data: EncodedBlocks, test: EncodedBlocks) -> float:
    """Nats a token of the table of successors counted in `data`, one added to each count."""
    counts = np.ones((257, 257))
    ids, targets = data.columns["ids"], data.columns["targets"]
    np.add.at(counts, (ids[targets >= 0], targets[targets >= 0]), 1)
    share = np.log(counts / counts.sum(1, keepdims=True))
    ids, targets = test.columns["ids"], test.columns["targets"]
    return float(-share[ids[targets >= 0], targets[targets >= 0]].mean())


@torch.no_grad()
def _cache_bytes(model: Any, tokens: int) -> int:
    """Bytes of the cache of one row after `tokens` tokens."""
    past = model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    if isinstance(past, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)  # type: ignore[union-attr]
    return past.bytes
