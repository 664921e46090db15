"""Look at a data set with several steps side by side, and drop nothing: a report before anything is thrown away.

    overlap_ab = |dropped by a & dropped by b| / |dropped by a | dropped by b|

Every step named in `steps` runs on the same rows, with its defaults (`NAME:option=value` sets others). The report holds
how many rows each rule of each step would drop, the keep rate of every label and domain, how far any two steps agree,
and every score. Train is written as it was, but for rows that also stand in test.

The family's steps: dedup, quality-filter, select, mix. Each is `run(config, pool) -> rows that stay, a reason for each
other row, scores, report`; the pool is the train split, and the test split never reaches a step.

Source: Wang et al., "Data management for training large language models: a survey", arXiv 2312.01700. The survey makes
no measured claim; those below are of what a tool must at least be able to do on a pool with planted defects. Left out:
toxicity and age filters, DoGE, LESS, and re-selection while training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.pool import Outcome, Pool, shares

RECORD = Record(
    name="data-management",
    family="data",
    title="report what each data step would drop, side by side",
    paper="arXiv 2312.01700",
    needs=("text-classification", "pair-classification", "regression", "causal-lm"),
    claims=(
        Claim(
            text="De-duplication finds at least 90 % of planted near duplicates, and 95 % of what it drops are such.",
            measure="near_duplicates",
            full={"seeds": 10},
        ),
        Claim(
            text="Cross-validated loss on frozen states ranks planted label noise with an AUC of at least 0.8.",
            measure="label_noise",
            full={"seeds": 10},
        ),
        Claim(
            text="A classifier against the validation split and DSIR rank off-domain rows with an AUC of at least 0.9.",
            measure="off_domain",
            full={"seeds": 10},
        ),
        Claim(
            text="Noise-aware selection of 30 % beats a random 30 % by 1 point at equal training steps.",
            measure="selection",
            full={"seeds": 10},
        ),
        Claim(text="The scaling-law fit recovers planted exponents within 5 %.", measure="scaling_law", seeds=8),
        Claim(
            text="DoReMi's weights give a lower excess loss on the worst domain than uniform ones.",
            measure="doremi_worst_domain",
            full={"seeds": 6},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the report; UsageError for fewer than one step."""

    steps: tuple[str, ...] = ("quality-filter", "dedup")
    """steps to look with, e.g. ['dedup:threshold=0.7', 'select:by=loss,budget=0.5']"""

    def __post_init__(self) -> None:
        if not self.steps or "data-management" in self.steps:
            raise UsageError("steps: name at least one data step, and not this one.")


def agreement(a: set[int], b: set[int]) -> float:
    """Return the share of the rows dropped by either step that both drop; 1 where neither drops any."""
    return len(a & b) / len(a | b) if a | b else 1.0


def run(config: Config, pool: Pool) -> Outcome:
    """Report what each step would do to a pool; every row stays."""
    dropped: dict[str, set[int]] = {}
    scores: dict[str, np.ndarray] = {}
    report: dict[str, Any] = {}
    for text in config.steps:
        piece = parse(text).pieces[0]
        entry = registry.find(piece.name, "data")
        if entry.record.slot:
            raise UsageError(f"steps: {piece.name} is used inside an arm, not as a step.")
        found = registry.load(piece.name).run(registry.config(piece.name, piece.options), pool)
        kept = np.zeros(len(pool), bool)
        kept[found.rows] = True
        dropped[text] = set(np.flatnonzero(~kept).tolist())
        scores |= {f"{text} {name}": values for name, values in found.scores.items()}
        groups = {"label": pool.labels, "domain": pool.domains}
        report[text] = {
            "would_drop": {rule: len(rows) for rule, rows in found.drops.items()},
            "groups": {name: shares(values, kept) for name, values in groups.items() if values is not None},
            "report": found.report,
        }
    names = list(dropped)
    report["agreement"] = {
        f"{a} and {b}": agreement(dropped[a], dropped[b]) for i, a in enumerate(names) for b in names[i + 1 :]
    }
    return Outcome(np.arange(len(pool)), {}, scores, {"steps": report})
