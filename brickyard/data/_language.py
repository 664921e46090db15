"""What a causal language model needs for each text: its nats per token, alone or after a prompt.

Shapes: N texts, B of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from brickyard.core.base import open_base
from brickyard.core.errors import BadData, Refused
from brickyard.core.pool import Pool
from brickyard.core.task import Task

_TOKENS = 4096  # of one batch
_IGNORED = -100


def nats_per_token(pool: Pool, texts: list[str], prompts: list[str] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the mean nats of the tokens of each text, given its prompt where there are any: [N], and a report.

    Every text starts after the end token. Tokens beyond the base's context are left out at the end of the text, and
    counted. Raises Refused where the base is no causal language model or has no end token, BadData where a prompt
    leaves no room for its text.
    """
    base = open_base(pool.base)
    if base.input != "text" or not base.generative:
        raise Refused(f"base {pool.base} is not a causal language model; give one with --base.")
    tokenizer = base.tokenizer
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if end is None:
        raise Refused(f"the tokenizer of base {pool.base} has no end token, after which a text could start.")
    model = base.model(Task("causal-lm", "nats_per_token", None, 1, "text"), seed=0)
    device = "cuda" if pool.device != "cpu" and torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    given = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"] if prompts else [[]] * len(texts)
    room = base.context or max(len(a) + len(b) + 1 for a, b in zip(ids, given, strict=True))
    for row, (prompt, text) in enumerate(zip(given, ids, strict=True)):
        if not text or len(prompt) + 1 >= room:
            why = "has no token" if not text else f"comes after a prompt of {len(prompt)} tokens; the context is {room}"
            raise BadData(f"row {pool.numbered[row]}: the text {why}. Drop or shorten it.")
    rows = [([end, *p, *t][:room], len(p)) for p, t in zip(given, ids, strict=True)]
    cut = sum(len(p) + len(t) + 1 > room for p, t in zip(given, ids, strict=True))
    out = np.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    while order:
        widest = len(rows[order[-1]][0])
        part, order = order[-max(1, _TOKENS // widest) :], order[: -max(1, _TOKENS // widest)]
        input_BT = torch.full((len(part), widest), end)
        target_BT = torch.full((len(part), widest), _IGNORED)
        for b, i in enumerate(part):
            sequence, prompt = rows[i]
            input_BT[b, : len(sequence)] = torch.tensor(sequence)
            target_BT[b, prompt : len(sequence) - 1] = torch.tensor(sequence[prompt + 1 :])
        with torch.no_grad():
            logits_BTV = model(input_ids=input_BT.to(device)).logits.float()
        losses_BT = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten().to(device), reduction="none")
        losses_BT = losses_BT.view(target_BT.shape).cpu()
        out[part] = (losses_BT.sum(1) / (target_BT != _IGNORED).sum(1)).double().numpy()
    return out, {"base": pool.base, "truncated": cut}
