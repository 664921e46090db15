"""Select a budget of rows: at random, by importance, by losses, by training dynamics, by coverage or by nearness.

    dsir         s(x) = sum_j c_j(x) log(p_target,j / p_pool,j), rows drawn without replacement with P ~ exp(s) by the
                 Gumbel top-k of s + g; c: hashed counts of words and bigrams
    ifd          s = nats(answer | question) / nats(answer); high is hard to follow, 1 and above is left for last
    loss         s = -log p(y | v) by a linear head on frozen states that never saw the row; low is clean
    confidence   mean over epochs of p(y), variability: its deviation, forgetting: how often a right row became wrong
    k-centre     next row = argmax_i min_{j chosen} |v_i - v_j|
    deita        in the order of p(y) log(1 + words): add a row if its cosine to every chosen one is below tau
    nearest      s = max_j cos(v, v_target,j)

`score` gives one number a row, high is preferred; `select` turns scores, a budget and groups into unique rows, exactly
as many as asked. With labels every class keeps its share by default. `noisy` first leaves out the rows with the highest
cross-validated loss, whatever selects among the rest.

Source: Xie et al. (DSIR), arXiv 2302.03169; Li et al. (IFD), arXiv 2308.12032; Swayamdipta et al. (cartography), arXiv
2009.10795; Toneva et al. (forgetting), arXiv 1812.05159; Sener and Savarese (k-centre), arXiv 1708.00489; Liu et al.
(DEITA), arXiv 2312.15685; boxes of the survey arXiv 2312.01700. Survey: no measured claim. Left out: LESS, whose
gradients cost a backward pass a row, and judges that are themselves large models.

Shapes: N rows, D channels, K of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.method import Record
from brickyard.core.pool import Outcome, Pool, joined, read_pool
from brickyard.data._frozen import FOLDS, dynamics, embeddings, head_losses
from brickyard.data._language import nats_per_token
from brickyard.data._ngrams import counts, log_shares
from brickyard.data._options import belong

RECORD = Record(
    name="select",
    family="data",
    title="select a budget of rows by importance, loss, training dynamics, coverage or nearness",
    paper="arXiv 2312.01700",
    needs=("text-classification", "pair-classification", "causal-lm"),
    part_of="data-management",
)

By = Literal["random", "dsir", "ifd", "loss", "confidence", "variability", "forgetting", "k-centre", "deita", "nearest"]
LABELLED = ("loss", "confidence", "variability", "forgetting", "deita")
EMBEDDED = ("loss", "confidence", "variability", "forgetting", "k-centre", "deita", "nearest")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of selection; UsageError outside their ranges."""

    by: Literal[
        "random", "dsir", "ifd", "loss", "confidence", "variability", "forgetting", "k-centre", "deita", "nearest"
    ] = "random"
    """what decides"""
    budget: float = 0.1
    """up to 1: share of the rows given; above: rows"""
    balance: Literal["natural", "equal", "free"] = "natural"
    """shares of the classes: those of the pool, equal ones, or whatever the scores give"""
    noisy: float = 0.0
    """share of the rows, those with the highest cross-validated loss, that are left out first"""
    target: str = "validation"
    """what dsir and nearest aim at: the validation split, or another data set (its split train)"""
    tau: float = 0.9
    """deita: cosine from which a row adds nothing"""
    l2: float = 1e-3
    """penalty of the linear heads behind loss, deita and noisy"""
    epochs: int = 100
    """epochs behind confidence, variability and forgetting"""
    lr: float = 0.05
    """learning rate behind confidence, variability and forgetting"""

    def __post_init__(self) -> None:
        if not self.budget > 0 or (self.budget > 1 and self.budget != int(self.budget)):
            raise UsageError(f"budget={self.budget}: a share up to 1, or a whole number of rows, was expected.")
        if not 0 <= self.noisy < 1:
            raise UsageError(f"noisy={self.noisy}: a share from 0 to below 1 was expected.")
        if not -1 < self.tau <= 1 or self.l2 <= 0 or self.epochs < 2 or self.lr <= 0:
            raise UsageError(
                f"tau={self.tau}, l2={self.l2}, epochs={self.epochs}, lr={self.lr}: a cosine, a positive penalty, at "
                "least 2 epochs and a positive learning rate were expected."
            )
        belong(self, ("target",), "by=dsir and by=nearest", used=self.by in ("dsir", "nearest"))
        belong(self, ("tau",), "by=deita", used=self.by == "deita")
        belong(self, ("l2",), "by=loss, by=deita and noisy=", used=self.by in ("loss", "deita") or self.noisy > 0)
        dynamic = self.by in ("confidence", "variability", "forgetting")
        belong(self, ("epochs", "lr"), "by=confidence, by=variability and by=forgetting", used=dynamic)


def size_of(budget: float, rows: int, pool: int) -> int:
    """Return the rows of a budget: a share of `rows`, rounded, at least 1; UsageError where `pool` has fewer."""
    size = max(1, round(budget * rows)) if budget <= 1 else int(budget)
    if size > pool:
        raise UsageError(f"budget={budget:g} asks for {size:,} rows, but only {pool:,} can be chosen; ask for fewer.")
    return size


def quotas(available: np.ndarray, weights: np.ndarray, budget: int) -> np.ndarray:
    """Share `budget` among groups by `weights` [G], none above what is `available` [G], by largest remainders: [G].

    What a group cannot give is shared among the others in the same way. Sums to `budget`.
    """
    quota = np.zeros(len(available), np.int64)
    while (left := budget - int(quota.sum())) > 0:
        open_groups = quota < available
        if not open_groups.any():
            raise UsageError(f"a budget of {budget:,} rows was asked of {int(available.sum()):,}; ask for fewer.")
        weight = np.where(open_groups, weights, 0.0)
        weight = np.where(open_groups, 1.0, 0.0) if not weight.sum() else weight
        ideal = left * weight / weight.sum()
        step = np.minimum(np.floor(ideal).astype(np.int64), available - quota)
        if not step.any():
            best = np.argsort(-np.where(open_groups, ideal, -1.0), kind="stable")[: min(left, int(open_groups.sum()))]
            step[best] = 1
        quota += step
    return quota


def select(
    scores: np.ndarray, budget: int, groups: np.ndarray | None = None, *, balance: str = "natural"
) -> np.ndarray:
    """Return the `budget` rows of the highest scores [K], in their own order; of equal ones the first.

    Args:
        scores: [N]; -inf marks rows that cannot be chosen.
        groups: [N] integers from 0, within which the budget is shared by `balance`; None: one group.

    Raises UsageError where the budget is above what can be chosen, BadData where a score is NaN.
    """
    if np.isnan(scores).any():
        raise BadData(f"the score of row {int(np.isnan(scores).argmax()) + 1} is NaN; no row can be preferred to it.")
    group = np.zeros(len(scores), np.int64) if groups is None or balance == "free" else groups
    able = scores > -np.inf
    sizes = np.bincount(group)
    wanted = quotas(
        np.bincount(group[able], minlength=len(sizes)), sizes if balance == "natural" else sizes > 0, budget
    )
    order = np.lexsort((np.arange(len(scores)), -scores, group))
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place < wanted[group[order]]])


def gumbel(size: int, seed: int) -> np.ndarray:
    """Draw standard Gumbel noise [N]: adding it to log weights and taking the top k draws without replacement."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, size])).random_raw(size)
    return -np.log(-np.log((raw >> np.uint64(11)).astype(np.float64) / 2**53 + 2.0**-54))


def k_centre(v_ND: np.ndarray, budget: int) -> np.ndarray:
    """Return `budget` rows in the order of the greedy 2-approximation of k-centre; the first is nearest to the mean."""
    square_N = (v_ND**2).sum(1)
    chosen = np.empty(budget, np.int64)
    away_N = square_N - 2 * v_ND @ v_ND.mean(0)
    chosen[0] = at = int(away_N.argmin())
    away_N = np.full(len(v_ND), np.inf)
    for k in range(1, budget):
        away_N = np.minimum(away_N, square_N + square_N[at] - 2 * v_ND @ v_ND[at])
        away_N[at] = -np.inf
        chosen[k] = at = int(away_N.argmax())
    return chosen


def diverse(scores: np.ndarray, v_ND: np.ndarray, budget: int, tau: float) -> tuple[np.ndarray, int]:
    """Return `budget` rows in the order of their scores, without those whose cosine to a chosen one is tau or more.

    Where too few are left, the best of those left out fill the budget; their number is the second result.
    """
    nearest_N, order, chosen, spare = np.full(len(scores), -1.0), np.argsort(-scores, kind="stable"), [], []
    for row in order.tolist():
        if len(chosen) == budget:
            break
        if nearest_N[row] >= tau:
            spare.append(row)
            continue
        chosen.append(row)
        nearest_N = np.maximum(nearest_N, v_ND @ v_ND[row])
    filled = budget - len(chosen)
    return np.array(chosen + spare[:filled], np.int64), filled


def forgotten(p_EN: np.ndarray) -> np.ndarray:
    """Return how often each row went from a probability of its label above one half to one below: [N]."""
    right_EN = p_EN > 0.5
    return (right_EN[:-1] & ~right_EN[1:]).sum(0).astype(np.float64)


def score(config: Config, pool: Pool) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any], np.ndarray | None]:
    """Return the score that decides [N], all scores, a report, and the embeddings where there are any."""
    by, size = config.by, len(pool)
    report: dict[str, Any] = {}
    v_ND, found = None, {}
    if by in EMBEDDED or config.noisy:
        pool.must_have_words(f"select --by {by}")
        v_ND, report["embeddings"] = embeddings(pool)
    if by in LABELLED or config.noisy:
        found.update(_labelled(config, pool, v_ND, report))
    if by == "dsir":
        x_NM = counts(pool.texts)
        ratio_M = log_shares(counts(_target(config.target, pool))) - log_shares(x_NM)
        found["dsir"] = x_NM @ ratio_M
        return found["dsir"] + gumbel(size, pool.seed), found, report, v_ND
    if by == "nearest":
        target_TD, _ = embeddings(pool, _target(config.target, pool))
        parts = np.array_split(np.arange(size), size // 1024 + 1)
        found["nearest"] = np.concatenate([(v_ND[part] @ target_TD.T).max(1) for part in parts])  # type: ignore[index]
        return found["nearest"], found, report, v_ND
    if by == "ifd":
        return (*_ifd(pool, report), v_ND)
    if by == "deita":
        lengths = np.array([len(text.split()) for text in pool.texts])
        return np.exp(-found["loss"]) * np.log1p(lengths), found, report, v_ND
    if by in ("random", "k-centre"):
        return gumbel(size, pool.seed), found, report, v_ND
    return -found["loss"] if by == "loss" else found[by], found, report, v_ND


def _labelled(config: Config, pool: Pool, v_ND: Any, report: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the scores that compare a row's label with what its text says; report the rows that have no such loss."""
    names = sorted(set(pool.labels or ()))
    if len(names) < 2 or any(isinstance(name, float) for name in names):
        raise Refused(f"select --by {config.by} compares classes; these data have no labels that are classes.")
    y_N = np.array([names.index(label) for label in pool.labels or ()])
    if config.by in ("confidence", "variability", "forgetting"):
        p_EN = dynamics(v_ND, y_N, len(names), epochs=config.epochs, lr=config.lr)
        found = {"confidence": p_EN.mean(0), "variability": p_EN.std(0), "forgetting": forgotten(p_EN)}
    else:
        found = {}
    if config.by in ("loss", "deita") or config.noisy:
        found["loss"], unknown_N = head_losses(v_ND, y_N, pool.folds(FOLDS), len(names), l2=config.l2)
        report["label_not_in_other_folds"] = int(unknown_N.sum())
    return found


def _ifd(pool: Pool, report: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any]]:
    """Return instruction-following difficulty; rows of 1 and above, whose question does not help, come last."""
    if not {"prompt", "completion"} <= pool.columns.keys():
        raise Refused("select --by ifd compares answers with and without their question: columns prompt, completion.")
    answers = pool.columns["completion"]
    after, report["conditional"] = nats_per_token(pool, answers, pool.columns["prompt"])
    alone, report["alone"] = nats_per_token(pool, answers)
    ifd = after / alone
    report["of_1_and_above"] = int((ifd >= 1).sum())
    return np.where(ifd < 1, ifd, -ifd), {"ifd": ifd, "nats_after": after, "nats_alone": alone}, report


def _target(name: str, pool: Pool) -> list[str]:
    if name != "validation":
        return joined(read_pool(name).splits["train"])
    if not pool.wanted_texts:
        raise BadData("these data have no validation split to aim at; name a data set with --target.")
    return pool.wanted_texts


def run(config: Config, pool: Pool) -> Outcome:
    """Select the rows of a pool; the others stand under "noisy" or "not selected"."""
    size = len(pool)
    out = int(config.noisy * size)
    budget = size_of(config.budget, size, size - out)
    value, found, report, v_ND = score(config, pool)
    drops: dict[str, dict[int, str]] = {}
    if out:
        noisy = np.argsort(-found["loss"], kind="stable")[:out]
        value = value.astype(np.float64)
        value[noisy] = -np.inf
        drops["noisy"] = {int(row): f"loss {found['loss'][row]:.4g}" for row in noisy}
    labels = pool.labels
    classes = labels is not None and not any(isinstance(label, float) for label in labels)
    names = sorted(set(labels)) if labels is not None and classes else [None]
    group = (
        np.array([names.index(label) for label in labels]) if labels is not None and classes else np.zeros(size, int)
    )
    group = np.zeros(size, int) if config.balance == "free" else group
    if config.by in ("k-centre", "deita"):
        value, report["filled"] = _by_coverage(config, value, v_ND, group, budget)
    rows = select(value, budget, group, balance=config.balance)
    rest = np.setdiff1d(np.flatnonzero(value > -np.inf), rows)
    if len(rest):
        drops["not selected"] = {int(row): f"score {value[row]:.4g}" for row in rest}
    return Outcome(rows, drops, {**found, "score": value}, {**report, "budget": budget})


def _by_coverage(
    config: Config, value: np.ndarray, v_ND: Any, group: np.ndarray, budget: int
) -> tuple[np.ndarray, int]:
    """Return scores that put the rows which a greedy cover of each group takes first, in its order; and how many
    rows had to be filled in."""
    able = value > -np.inf
    sizes = np.bincount(group)
    weights = sizes if config.balance == "natural" else sizes > 0
    wanted = quotas(np.bincount(group[able], minlength=len(sizes)), weights, budget)
    out, filled = np.where(able, -1.0, -np.inf), 0
    for g, quota in enumerate(wanted.tolist()):
        rows = np.flatnonzero(able & (group == g))
        if not quota:
            continue
        if config.by == "k-centre":
            order = k_centre(v_ND[rows], quota)
        else:
            order, missing = diverse(value[rows], v_ND[rows], quota, config.tau)
            filled += missing
        out[rows[order]] = np.arange(quota, 0, -1)
    return out, filled
