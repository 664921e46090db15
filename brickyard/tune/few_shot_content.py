"""A cloze head for few labels: the class is read where the text, put into a sentence, has a gap.

    text -> template, e.g. "[MASK] News: {text}"               only the text is cut where a row is too long
    u_j      = LN( GELU( W1 h_j + b1 ) )                        h_j [d], the last state at gap j = 1..J
    o_j      = E u_j + c                                        E has one row for each token of a label word, no more
    score(y) = sum_j o_j[ token j of y's word ]                 loss: cross entropy over the classes

The head is new, as in the released runs. `warm` begins it at the base's own masked-language head, and where it has none
(a sentence encoder) E at the base's embeddings of those tokens. It stands beside any tuner: `bottleneck-adapter +
few-shot-content`, `lora:r=8,alpha=16 + few-shot-content`. Label words are the classes' names unless `words` gives
others.

Source: "Few-shot learning for automated content analysis", arXiv 2312.16975, and PETapter, arXiv 2412.04975. Headline
claim: with 100 and 250 texts far above the same module with an ordinary head, and on par with full PET.
Legend: B rows, T tokens, d width, J gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.base import Base
from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.core.template import Template, label_tokens
from brickyard.tune._cloze import WarmStart, at_gaps, warm_start, word_scores

RECORD = Record(
    name="few-shot-content",
    family="tune",
    title="Cloze head: the class is read at a gap in a sentence around the text",
    paper="Few-shot learning for automated content analysis, arXiv 2312.16975",
    needs=("text-classification",),
    because="it reads a class where a sentence around one text has a gap",
    slot="head",
    search={"lr": (5e-4, 1e-3, 2e-3)},
    claims=(
        Claim(
            text="With 16 texts a class LoRA with a cloze head beats LoRA with an ordinary head by 2 points of "
            "macro-F1.",
            measure="heads",
            part="lora",
            data="trec|embedded:stdlib-topics",
            epochs=10,
            seeds=5,
            shots=16,
            batch=8,
            lrs=(3e-4, 1e-3, 3e-3),
            full={"shots": 40, "max_length": 0, "seeds": 9},
        ),
        Claim(
            text="With 16 texts a class a bottleneck adapter with a cloze head beats it with an ordinary head by 2 "
            "points of macro-F1.",
            measure="heads",
            part="adapter",
            data="trec|embedded:stdlib-topics",
            epochs=10,
            seeds=5,
            shots=16,
            batch=8,
            lrs=(3e-4, 1e-3, 3e-3),
            full={"shots": 40, "max_length": 0, "seeds": 9},
        ),
        Claim(
            text="With 5 texts a class a module that began on a near task beats a new one by 3 points of macro-F1.",
            measure="pretuned",
            data="cr",
            epochs=2,
            seeds=9,
            shots=5,
            batch=8,
            lrs=(3e-4, 1e-3, 3e-3),
            full={"max_length": 0, "seeds": 25},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the head; UsageError for a template without a gap."""

    template: str = "[MASK] : {text}"
    """the sentence around the text: {text} once, [MASK] at least once"""
    words: tuple[str, ...] = ()
    """label words in the order of the classes; empty: the classes' names"""
    warm: bool = False
    """begin at the base's masked-language head, or where it has none at its embeddings of the words' tokens"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(str(word) for word in self.words))
        Template(self.template)


class ClozeHead(nn.Module):
    """Logits [B, classes] from states [B, T, d], a mask and the tokens [B, T]; BadData for a row without its gaps.

    tokens: for each class the token of its word at every gap; mask_id: the gap's token; start: what E, c and the
    transform begin at, of the whole vocabulary.
    """

    frozen_pool = None
    reads_ids = True

    def __init__(self, width: int, tokens: list[list[int]], mask_id: int, start: WarmStart | None = None) -> None:
        super().__init__()
        self.mask_id, self.gaps = mask_id, len(tokens[0])
        known = sorted({token for row in tokens for token in row})
        place = [[known.index(token) for token in row] for row in tokens]
        self.register_buffer("place", torch.tensor(place), persistent=False)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.rows = nn.Linear(width, len(known))
        nn.init.zeros_(self.rows.bias)
        if start is None:
            nn.init.normal_(self.rows.weight, std=0.02)
            return
        with torch.no_grad():
            self.rows.weight.copy_(start.weight[known])
            if start.bias is not None:
                self.rows.bias.copy_(start.bias[known])
        if start.transform is not None:
            dense, norm = start.transform
            own_dense, _, own_norm = self.transform
            own_dense.load_state_dict(dense.state_dict())
            own_norm.load_state_dict(norm.state_dict())
            own_norm.eps = norm.eps  # type: ignore[assignment]

    def forward(self, x_BTd: Tensor, mask_BT: Tensor, ids_BT: Tensor) -> Tensor:
        h_BJd = at_gaps(x_BTd, ids_BT, mask_BT, self.mask_id, self.gaps)
        return word_scores(self.rows(self.transform(h_BJd)), self.place)  # type: ignore[arg-type]


def head(config: Config, task: Task, width: int, *, base: Base) -> ClozeHead:
    """Return the head for the classes of `task` on `base`; UsageError where the label words do not fit."""
    words = config.words or task.labels or ()
    if len(words) != task.width:
        raise UsageError(f"few-shot-content: {len(words)} label words for {task.width} classes; give one for each.")
    tokens = label_tokens(words, base.tokenizer, Template(config.template).masks)
    return ClozeHead(width, tokens, base.tokenizer.mask_token_id, warm_start(base) if config.warm else None)


def krippendorff(codes_RN: np.ndarray) -> float:
    """Return Krippendorff's alpha of nominal codes by R coders of N units without gaps: 1 - observed / expected.

    Source: Krippendorff, "Content Analysis", chapter 11. 1 where all agree, also if they use a single code.
    """
    codes_RN = np.asarray(codes_RN)
    if codes_RN.ndim != 2 or len(codes_RN) < 2:
        raise UsageError(f"codes of shape {codes_RN.shape}: at least two coders of the same units were expected.")
    values = np.unique(codes_RN)
    counts_NV = (codes_RN.T[:, :, None] == values).sum(1)
    coders, total = len(codes_RN), codes_RN.size
    agree = (counts_NV * (counts_NV - 1)).sum() / (coders - 1)
    observed = 1 - agree / total
    by_value = counts_NV.sum(0)
    expected = 1 - (by_value * (by_value - 1)).sum() / (total * (total - 1))
    return float(1 - observed / expected) if expected else 1.0
