"""Continuations that say whether the model stopped by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import WORDS

from brickyard.core.base import open_base
from brickyard.core.generate import Continuation, Decoding, continuations, continued
from brickyard.core.task import Task


def test_a_continuation_says_whether_the_end_token_was_met(causal_base: Path, monkeypatch: Any) -> None:
    base = open_base(str(causal_base))
    model = base.model(Task("causal-lm", "bits_per_byte", None, 1, "text"), seed=0)
    end, word = base.tokenizer.eos_token_id, base.tokenizer.convert_tokens_to_ids("good")
    # What is written after prompts of one, two and three words: cut, ended early (and padded), ended in the last place.
    written = {2: [word, word, word], 3: [word, end, end], 4: [word, word, end]}

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = [written[int(n)] for n in attention_mask.sum(1)]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    prompts = [" ".join(WORDS[:n]) for n in (3, 1, 2)]
    asked = Decoding(new_tokens=3)
    ended, cut, early = continued(model, base, prompts, asked)
    assert ended == Continuation("good good", True) and early == Continuation("good", True)
    assert cut == Continuation("good good good", False)
    assert continuations(model, base, prompts, asked) == [ended.text, cut.text, early.text]
