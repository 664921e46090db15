"""Representation similarity: which layers did a change leave as they were?

N rows, L blocks, widths D; H_l [N,T,D] is the state at layer l = 0..L, 0 being what enters the first block.

    r_l     = mean over the valid tokens of H_l                       [N,D]; with paper_mean over all positions
    S_l     = R_l R_l^T,   R_l = r_l with rows of unit length         [N,N] cosines
    rho_l   = Pearson(u_l of the base, u_l of the changed model)      u_l: the upper triangle of S_l with its diagonal
    cka_l   = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)                     X, Y: r_l of the two models, columns centred

rho near 1 means that tuning did not change the layer's geometry: it could have been frozen (see telly). Neither index
changes when all states of a model are turned by one rotation. S_l is made in blocks of rows and only sums are kept, so
no [N,N] matrix is ever held. The mathematics is in `core/similarity.py`, because telly chooses its layers by it.

Source: "Towards Efficient Fine-tuning of Pre-trained Code Models: An Experimental Study and Beyond", ISSTA 2023, arXiv
2304.05216, section 3; CKA: arXiv 1905.00414. Headline: on UniXcoder rho stays above 0.95 up to layer 8 (clone
detection) or 6 (code search) of 12, and falls to 0.37 and 0.27 at the top. Their code averages over all 256 positions
of a row, padding included: `preset=released`. Left out: the layer-wise probes of the same paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from brickyard.audit._wants import Wants
from brickyard.core.batches import encode
from brickyard.core.brick import Applied
from brickyard.core.errors import Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.retention import inner
from brickyard.core.similarity import bottom_alike, cka, layer_means, rho
from brickyard.core.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from brickyard.core.base import Base
    from brickyard.core.data import Data

RECORD = Record(
    name="similarity",
    family="audit",
    title="how alike two checkpoints represent the same rows, layer by layer",
    paper="ISSTA 2023, arXiv 2304.05216",
    needs=("text-classification", "pair-classification", "regression", "image-classification", "causal-lm"),
    presets={"released": {"paper_mean": True, "length": 256}},
    claims=(
        Claim(
            text="After full tuning rho does not rise with depth by more than 0.02, and the top layer's is the lowest.",
            measure="rho_curve",
            seeds=3,
            epochs=2,
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "max_length": 0},
        ),
    ),
)
WANTS = Wants(needed=True)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the comparison; UsageError for sizes out of range."""

    sample: int = 5000
    """rows compared, drawn with seed 0 where the data hold more"""
    paper_mean: bool = False
    """average over all positions of rows padded to `length`, as the released code does, not over valid tokens"""
    length: int = 0
    """tokens a row is cut to; 0: the base's context (for paper_mean at most 256)"""
    threshold: float = 0.95
    """layers below the first with a lower rho are called alike"""

    def __post_init__(self) -> None:
        if self.sample < 2 or self.length < 0 or 0 < self.length < 4:
            raise UsageError(f"sample={self.sample}, length={self.length}: give at least 2 rows and 4 tokens (0: all).")
        if not -1 <= self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold}: rho lies between -1 and 1.")


def measure(
    base: Base, changed: Base | Applied | None, config: Config, data: Data, *, device: torch.device
) -> dict[str, Any]:
    """Return {"table": one row a layer with rho and cka, "alike": bottom blocks before rho falls, "rows", ...}.

    changed: a brick on `base`, or another checkpoint of as many layers with the same vocabulary. Both models see the
    same rows of `data` (its test split, else the first there is). Raises UsageError without a second model, Refused
    where the two cannot read the same rows.
    """
    if changed is None:
        raise UsageError("similarity compares two models; give the second one with --brick (a brick or a checkpoint).")
    split = data.splits["test"] if "test" in data.splits else next(iter(data.splits.values()))
    limit = config.length or (256 if config.paper_mean else None)
    # Rows of a language model are compared as texts of their own, not as packed blocks.
    task = Task("regression", "spearman", None, 1, data.input)
    rows = encode(split, base, task, max_length=limit)
    index = np.random.Generator(np.random.PCG64(0)).permutation(len(rows))[: config.sample]
    pad_to = min(limit or 0, base.context or limit or 0) if config.paper_mean and data.input != "image" else 0
    model = inner(changed.model) if isinstance(changed, Applied) else _other(base, changed)
    before = layer_means(base.backbone().to(device), rows, index, pad_to=pad_to)
    after = layer_means(model.to(device), rows, index, pad_to=pad_to)
    if len(before) != len(after):
        raise Refused(f"the base has {len(before)} states, the other model {len(after)}; they must be as deep.")
    table = [
        {"layer": i, "rho": rho(x, y), "cka": cka(x, y)} for i, (x, y) in enumerate(zip(before, after, strict=True))
    ]
    alike = bottom_alike([row["rho"] for row in table], config.threshold)
    return {
        "table": table,
        "alike": alike,
        "rows": len(index),
        "truncated": rows.report["truncated"],
        "mean": f"all {pad_to} positions" if pad_to else "valid tokens",
        "detail": (
            f"the bottom {alike} of {len(table) - 1} layers kept rho >= {config.threshold:g} on {len(index)} rows"
            f"{f' ({n} cut to {limit or base.context} tokens)' if (n := rows.report['truncated']) else ''}"
        ),
    }


def _other(base: Base, changed: Base) -> nn.Module:
    """The backbone of another checkpoint; Refused where it cannot read the rows of `base`."""
    if base.input != changed.input:
        raise Refused(f"{base.spec} reads {base.input}, {changed.spec} reads {changed.input}.")
    if base.input == "text" and base.tokenizer.get_vocab() != changed.tokenizer.get_vocab():
        raise Refused(f"{base.spec} and {changed.spec} have different vocabularies, so they cannot read the same ids.")
    return changed.backbone()
