"""Membership inference: can one tell from a tuned model which rows it was trained on?

Every row of train (a member) and of test (not one) gets a score, higher where the model knows it suspiciously well:

    s_i     = -loss(changed, i)                          a classifier's head is new, so the base has nothing to compare
    s_i     = loss(base, i) - loss(changed, i)           a language model: calibrated by how hard the row is anyway
    AUC     = P(s of a member > s of a non-member)       0.5: nothing can be told; 95 % interval by DeLong

and the share of members found where 1 % and 0.1 % of non-members are accused wrongly, for an attack that is sure of a
few rows is an attack. A lower bound on epsilon follows from guesses: the k highest scores of a balanced set are called
members, the k lowest strangers; of 2k guesses, v are right, and under (epsilon, 0)-privacy no more are than a coin with
heads e^eps / (1 + e^eps) gives. k is one of four sizes, each tested at a fourth of the error.

`brickyard audit membership --base B --brick A --data D`, with the data that the brick was trained on. Where its step
reports a certified epsilon, `holds` says whether the attack's bound stays below it.

Sources: Yeom et al. 2018, arXiv 1709.01604 (losses); Carlini et al. 2022, arXiv 2112.03570 (calibration; error rates
that matter); Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2 (one run); DeLong 1988. Left out: shadow
models. The attack is weak beside those, so what it does not find may still be there; and the split into train and test
was not drawn by the auditor, so the bound is an *estimate*: a test set of another kind looks like strangers, too.

Shapes: M members, N non-members.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, rankdata

from brickyard.audit._wants import Wants
from brickyard.core.answers import answer
from brickyard.core.batches import encode
from brickyard.core.brick import Applied
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.split import Split

if TYPE_CHECKING:
    import torch

    from brickyard.core.base import Base
    from brickyard.core.data import Data

RECORD = Record(
    name="membership",
    family="audit",
    title="whether a tuned model tells which rows it was trained on",
    paper="Privacy Risk in Machine Learning, arXiv 1709.01604",
    claims=(
        Claim(
            text="The attack detects a run that learned its rows by heart.",
            measure="leaks",
            part="leaky",
            train_rows=200,
            epochs=10,
            seeds=3,
            full={"train_rows": 300, "epochs": 30},
        ),
        Claim(
            text="On private runs its bound stays below the certified epsilon, and it finds less.",
            measure="leaks",
            part="private",
            train_rows=200,
            epochs=10,
            seeds=3,
            full={"train_rows": 300, "epochs": 30},
        ),
    ),
)
WANTS = Wants(kinds=("brick",), needed=True, labelled=True, as_trained=True, splits=("train", "test"))
_SHARES = (0.05, 0.1, 0.25, 0.5)  # of a balanced set's members that are called so
_Z = 1.959963984540054
_LARGEST = 30.0  # epsilon


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the attack; UsageError for values out of range."""

    rows: int = 5000
    """members and non-members looked at, at most so many of each, drawn with seed 0"""
    score: Literal["auto", "loss", "calibrated"] = "auto"
    """loss of the changed model; calibrated by the base's; auto: calibrated where the base has the same outputs"""
    confidence: float = 0.95
    """of the lower bound on epsilon"""

    def __post_init__(self) -> None:
        if self.rows < 20:
            raise UsageError(f"rows={self.rows}: give at least 20 of each kind.")
        if not 0.5 <= self.confidence < 1:
            raise UsageError(f"confidence={self.confidence}: give a share of at least 0.5 and below 1.")


@dataclass(frozen=True)
class Found:
    """What an attack found: the area under its curve with interval, members found at few errors, a bound on epsilon."""

    auc: float
    low: float
    high: float
    found_at_1_percent: float
    found_at_01_percent: float
    epsilon_lower: float

    @property
    def detected(self) -> bool:
        """Whether members score higher than chance allows."""
        return self.low > 0.5


def attack(member_M: np.ndarray, other_N: np.ndarray, *, confidence: float = 0.95) -> Found:
    """Judge scores of members and non-members; BadData for fewer than two of either, or scores that are not finite."""
    if min(len(member_M), len(other_N)) < 2:
        raise BadData(f"{len(member_M)} members and {len(other_N)} others: give at least 2 of each.")
    if not (np.isfinite(member_M).all() and np.isfinite(other_N).all()):
        raise BadData("a score is not finite; the model's losses must be.")
    auc, low, high = area(member_M, other_N)
    return Found(
        auc,
        low,
        high,
        caught(member_M, other_N, 0.01),
        caught(member_M, other_N, 0.001),
        epsilon_lower(member_M, other_N, confidence=confidence),
    )


def area(member_M: np.ndarray, other_N: np.ndarray) -> tuple[float, float, float]:
    """Return the AUC (ties count half) and its 95 % interval."""
    m, n = len(member_M), len(other_N)
    ranks = rankdata(np.concatenate([member_M, other_N]))
    # The share of others below each member, and of members above each other: DeLong's placements.
    below_M = (ranks[:m] - rankdata(member_M)) / n
    above_N = 1 - (ranks[m:] - rankdata(other_N)) / m
    auc = float(below_M.mean())
    spread = _Z * math.sqrt(below_M.var(ddof=1) / m + above_N.var(ddof=1) / n)
    return auc, max(0.0, auc - spread), min(1.0, auc + spread)


def caught(member_M: np.ndarray, other_N: np.ndarray, errors: float) -> float:
    """Return the share of members above the lowest threshold that at most a share `errors` of the others exceeds."""
    allowed = math.floor(errors * len(other_N) + 1e-9)
    threshold = np.sort(other_N)[::-1][allowed]
    return float((member_M > threshold).mean())


def epsilon_lower(member_M: np.ndarray, other_N: np.ndarray, *, confidence: float = 0.95) -> float:
    """Return the largest epsilon that the guesses refute at `confidence`, 0 if none; see the file's head.

    The larger side is cut to the smaller one's size with a fixed seed.
    """
    size = min(len(member_M), len(other_N))
    draw = np.random.Generator(np.random.PCG64(0))
    member, other = (draw.permutation(side)[:size] for side in (member_M, other_N))
    scores = np.concatenate([member, other])
    is_member = np.repeat([True, False], size)
    # Ties fall as the draw will have it, not members first.
    order = np.lexsort((draw.random(2 * size), scores))
    best, error = 0.0, (1 - confidence) / len(_SHARES)
    for share in _SHARES:
        k = max(1, round(share * size))
        right = int(is_member[order[-k:]].sum() + (~is_member[order[:k]]).sum())
        best = max(best, _refuted(right, 2 * k, error))
    return best


def _refuted(right: int, guesses: int, error: float) -> float:
    """Return the largest epsilon under which `right` or more of `guesses` come with probability at most `error`."""

    def gap(epsilon: float) -> float:
        return float(binom.sf(right - 1, guesses, 1 / (1 + math.exp(-epsilon)))) - error

    if gap(0.0) > 0:
        return 0.0
    return float(brentq(gap, 0.0, _LARGEST)) if gap(_LARGEST) > 0 else _LARGEST  # type: ignore[arg-type]


def measure(
    base: Base, changed: Base | Applied | None, config: Config, data: Data, *, device: torch.device
) -> dict[str, Any]:
    """Return {"table", "detected", "epsilon_lower", "detail"}, and "holds" where the brick has a certified epsilon.

    Raises UsageError without a brick, Refused where the data are not those that it was trained on.
    """
    if not isinstance(changed, Applied) or changed.brick is None:
        raise UsageError("membership looks at what a brick tells of its training rows; give it with --brick.")
    missing = {"train", "test"} - set(data.splits)
    if missing:
        raise UsageError(f"membership compares rows of train with rows of test; {data.name} has no {missing.pop()}.")
    manifest, task = changed.brick.manifest, changed.brick.task
    options = {"max_length": manifest.get("max_length"), "template": changed.brick.template}
    _same_data(manifest, data, lambda: len(encode(data.splits["train"], base, task, **options)))
    splits = {name: _some(data.splits[name], config.rows) for name in ("train", "test")}
    rows = {name: encode(split, base, task, **options) for name, split in splits.items()}
    model = changed.model.to(device)
    scores = {name: -answer(model, part, task).losses for name, part in rows.items()}
    calibrated = config.score == "calibrated" or (config.score == "auto" and task.generative)
    if calibrated:
        if not task.generative:
            raise Refused("the base has no head for this task, so its losses calibrate nothing; take score=loss.")
        plain = base.model(task, seed=0).to(device)
        scores = {name: s + answer(plain, rows[name], task).losses for name, s in scores.items()}
    found = attack(scores["train"], scores["test"], confidence=config.confidence)
    stated = manifest.get("step", {}).get("privacy", {})
    certified = stated.get("epsilon") if stated.get("kind") == "certified" else None
    said = f"; certified epsilon {certified:.3g} at delta {stated['delta']:g}" if certified is not None else ""
    out: dict[str, Any] = {
        "table": [
            {"figure": "AUC", "value": found.auc, "low": found.low, "high": found.high},
            {"figure": "members found at 1 % errors", "value": found.found_at_1_percent, "low": "", "high": ""},
            {"figure": "members found at 0.1 % errors", "value": found.found_at_01_percent, "low": "", "high": ""},
            {"figure": "epsilon, lower bound (estimate)", "value": found.epsilon_lower, "low": "", "high": ""},
        ],
        "detected": found.detected,
        "auc": found.auc,
        "epsilon_lower": {"value": found.epsilon_lower, "kind": "estimate", "confidence": config.confidence},
        "certified_epsilon": certified,
        "score": "calibrated" if calibrated else "loss",
        "members": len(scores["train"]),
        "others": len(scores["test"]),
        "detail": (
            f"{'membership shows' if found.detected else 'no membership seen'}: AUC {found.auc:.3f} "
            f"({found.low:.3f} to {found.high:.3f}) over {len(scores['train'])} members and {len(scores['test'])} "
            f"others; epsilon at least {found.epsilon_lower:.3g} (estimate){said}"
        ),
    }
    if certified is not None:
        out["holds"] = found.epsilon_lower <= certified
    return out


def _same_data(manifest: dict[str, Any], data: Data, blocks: Callable[[], int]) -> None:
    """Raise Refused where the brick was not trained on all rows of train, a language model on all `blocks()` of it."""
    trained = manifest.get("data", {})
    if trained.get("fingerprint") != data.fingerprint:
        raise Refused(
            f"the brick was trained on {trained.get('name')!r}, and {data.name!r} holds other rows; who is a member "
            "cannot be told. Give the brick's own data."
        )
    packed = manifest["task"]["kind"] == "causal-lm"
    count, what = (blocks(), "blocks of text") if packed else (len(data.splits["train"]), "rows")
    if trained.get("rows") != count:
        raise Refused(
            f"the brick was trained on {trained.get('rows')} of the {count} {what} of train, and does not say which; "
            "audit a run on all of them."
        )


def _some(split: Split, limit: int) -> Split:
    index = np.random.Generator(np.random.PCG64(0)).permutation(len(split))[:limit]
    return split.take(np.sort(index))
