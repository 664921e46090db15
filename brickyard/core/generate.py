"""Continuations of prompts by a language model, with whatever brick lies on it; by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from brickyard.core.base import Base
from brickyard.core.completions import prompt_ids
from brickyard.core.documents import boundary
from brickyard.core.errors import BadData, UsageError


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen. `temperature` 0 is greedy; `beams` above 1 searches instead of sampling."""

    new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "new_tokens": self.new_tokens >= 1,
            "temperature": 0.0 <= self.temperature <= 100.0,
            "top_p": 0.0 < self.top_p <= 1.0,
            "beams": self.beams >= 1,
        }
        for name, ok in checks.items():
            if not ok:
                raise UsageError(f"decoding {name}={getattr(self, name)!r} is out of range.")
        if self.temperature == 0.0 and self.top_p < 1.0:
            raise UsageError(f"top_p={self.top_p} has no meaning at temperature 0 (greedy); give a temperature.")
        if self.beams > 1 and self.temperature > 0.0:
            raise UsageError(f"beams={self.beams} search and temperature={self.temperature} samples; give one of both.")

    def options(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        known: dict[str, Any] = {"max_new_tokens": self.new_tokens, "num_beams": self.beams, "use_cache": True}
        if self.temperature > 0.0:
            return {**known, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**known, "do_sample": False}


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt, and whether it stopped at its end token or was cut by the limit on tokens."""

    text: str
    ended: bool


def continuations(
    model: nn.Module, base: Base, prompts: Sequence[str], decoding: Decoding, *, chat: bool = False, batch: int = 16
) -> list[str]:
    """Return what `model` writes after each prompt, without the prompt, up to its end token; see `continued`."""
    return [found.text for found in continued(model, base, prompts, decoding, chat=chat, batch=batch)]


@torch.no_grad()
def continued(
    model: nn.Module, base: Base, prompts: Sequence[str], decoding: Decoding, *, chat: bool = False, batch: int = 16
) -> list[Continuation]:
    """Return what `model` writes after each prompt, without the prompt, up to its end token, and whether that was met.

    A prompt is the beginning of a document, or, with `chat`, a user's turn in the tokenizer's chat template, if it has
    one. Prompts of a batch are of about equal length and padded on the left, so that all of them end where the
    continuation begins.

    Raises:
        BadData: a prompt that leaves no room for the continuation in the base's context.
        BadBase: the tokenizer has no end-of-text token.
    """
    tokenizer, context = base.tokenizer, base.context
    _, end = boundary(base)
    rows = prompt_ids(base, prompts, chat=chat)
    for number, ids in enumerate(rows, 1):
        if context is not None and len(ids) + decoding.new_tokens > context:
            raise BadData(
                f"row {number}: the prompt has {len(ids)} tokens; with {decoding.new_tokens} new ones it does not fit "
                f"into the base's context of {context}. Shorten the prompt or give fewer --new-tokens."
            )
    model.eval()
    device = next(model.parameters()).device
    out = [Continuation("", False)] * len(rows)
    order = np.argsort([len(ids) for ids in rows], kind="stable")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(decoding.seed)
        for part in np.array_split(order, -(-len(order) // batch)):
            width = max(len(rows[i]) for i in part)
            ids = torch.full((len(part), width), end, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for k, i in enumerate(part):
                ids[k, width - len(rows[i]) :] = torch.tensor(rows[i])
                mask[k, width - len(rows[i]) :] = 1
            made = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pad_token_id=end,
                eos_token_id=end,
                **decoding.options(),
            )
            for k, i in enumerate(part):
                found = made[k, width:].tolist()
                ended = end in found
                stop = found.index(end) if ended else len(found)
                out[i] = Continuation(tokenizer.decode(found[:stop], skip_special_tokens=False), ended)
    return out
