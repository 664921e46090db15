"""From the answers of all arms to pairs, and from pairs to one recommendation in plain English.

The rule: every pair is tested (`core.stats.paired`) and corrected by Holm over all pairs. The arms that cannot be told
apart from the one with the best score are candidates. Where few seeds scatter, that is said of arms far below it, too;
so the cheapest is recommended of those candidates whose observed loss is at most two standard errors of its difference:
what nobody can see is not worth paying for. Cheap means fewest trainable parameters; equals go by the brick's size, by
what a step saves for its backward pass, by training time. Scores and differences are fractions.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from brickyard.compare import shown
from brickyard.core.errors import UnknownName, UsageError
from brickyard.core.stats import examples_needed, holm, paired

NEAR = 2.0  # standard errors
COSTS = {
    "trainable_parameters": "trainable parameters",
    "brick_bytes": "brick size",
    "saved_for_backward_bytes": "memory saved for the backward pass",
    "train_seconds": "training time",
}


def pairs_table(
    labels: np.ndarray, answers: Mapping[str, np.ndarray], metric: str, *, together: bool = False
) -> list[dict[str, Any]]:
    """Test every pair of arms.

    To judge a part of the test rows, give that part of the labels and of the answers.

    Args:
        labels: [N].
        answers: arm -> predictions [S, N], all on the same examples in the same order.
        metric: see `stats.paired`.
        together: seed s of all arms saw the same few labelled rows; see `stats.paired`.

    Returns:
        One {"a", "b", "difference", "low", "high", "error", "p", "p_holm", "test", "note", "needed"} per pair in the
        arms' order. `low` and `high` are the 95 % interval of this pair alone. `needed` (see `stats.examples_needed`)
        is what it would take to see the observed difference despite the correction; None where it is seen already.

    Raises:
        As `stats.paired`.
    """
    names = list(itertools.combinations(answers, 2))
    # An arm that finished fewer seeds has no partner for the others' last ones.
    alike = {(a, b): together and len(answers[a]) == len(answers[b]) for a, b in names}
    found = [paired(labels, answers[a], answers[b], metric, together=alike[a, b]) for a, b in names]
    raw = np.array([pair.p for pair in found])
    corrected = holm(raw)
    # Holm asks 5 % / M of the smallest p, 5 % / (M - 1) of the next, ...: that is what more data would have to reach.
    among = np.empty(len(raw))
    among[np.argsort(raw, kind="stable")] = np.arange(len(raw), 0, -1)
    how, out = shown.metric(metric), []
    for (a, b), pair, p_holm, share in zip(names, found, corrected, among, strict=True):
        row: dict[str, Any] = {
            "a": a,
            "b": b,
            "difference": pair.difference,
            "low": pair.low,
            "high": pair.high,
            "error": pair.error,
            "p": pair.p,
            "p_holm": float(p_holm),
            "test": pair.test,
            "note": pair.note,
            "needed": None,
        }
        if shown.pair_word(row, how.lower_is_better) == "cannot tell":
            level = 1 - shown.ALPHA / float(share)
            row["needed"] = examples_needed(labels, answers[a], answers[b], metric, level=level, together=alike[a, b])
        out.append(row)
    return out


def verdict(
    methods: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    *,
    metric: str = "accuracy",
    costs: Iterable[str] = tuple(COSTS),
    chance: float | None = None,
) -> dict[str, Any]:
    """Recommend an arm.

    Args:
        methods: rows of result.json; those with status "done" and a score count.
        pairs: what `pairs_table` returned for them.
        metric: of the scores.
        costs: keys of COSTS, the one that decides first.
        chance: the score of a coin, where no baseline stands for it.

    Returns:
        {"recommended": arm or None, "sentence", "indistinguishable": the other arms that cannot be told apart from the
        best score, best first, "reasons": what each other arm did, a sentence each}.
    """
    how = shown.metric(metric)
    order = tuple(costs)
    if not order:
        raise UsageError(f"no cost was given; expected at least one of {', '.join(COSTS)}.")
    for key in order:
        if key not in COSTS:
            raise UnknownName.among("cost", key, COSTS)
    done = [m for m in methods if m.get("status") == "done" and shown.score(m).mean is not None]
    lost = [m for m in methods if not any(m is d for d in done)]
    failures = [f"{_name(m)}: {m.get('status')}: {m.get('reason') or 'no reason was given'}" for m in lost]
    if not done:
        return {"recommended": None, "sentence": _nothing(lost), "indistinguishable": [], "reasons": failures}
    view = _View(pairs, how, order)
    ranked = sorted(done, key=view.rank)
    best = ranked[0]
    close = [best, *(m for m in ranked[1:] if view.word(best, m) == "cannot tell")]
    # An arm that few seeds leave undecided against the best may still have lost to another of those that are close.
    beaten_by = {id(m): next((o for o in close if view.word(o, m) == "better"), None) for m in close}
    candidates = [m for m in close if beaten_by[id(m)] is None]
    near = [m for m in candidates if view.near(m, best)]
    chosen = min(near, key=view.price)
    sentences = [view.lead(chosen, near, candidates, ranked), *view.trivial(chosen, ranked)]
    sentences += [*view.by_chance(ranked, chance), *_few_seeds(candidates), *_cut_short(ranked)]
    return {
        "recommended": chosen["arm"],
        "sentence": " ".join(sentences),
        "indistinguishable": [m["arm"] for m in candidates if m is not chosen],
        "reasons": [*(view.reason(m, best, beaten_by.get(id(m))) for m in ranked[1:]), *failures],
    }


class _View:
    """The pairs, and how they and the scores and costs of methods are put into words."""

    def __init__(self, pairs: Sequence[Mapping[str, Any]], how: shown.Metric, costs: tuple[str, ...]) -> None:
        self.how, self.costs = how, costs
        self.pairs = {(pair["a"], pair["b"]): pair for pair in pairs}

    def rank(self, method: Mapping[str, Any]) -> tuple[Any, ...]:
        """Sort the best score first, then the cheaper, then by name."""
        mean = shown.score(method).mean or 0.0
        return (mean if self.how.lower_is_better else -mean, *self.price(method), str(method["arm"]))

    def price(self, method: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the costs in the order in which they decide; an unknown one counts as the highest."""
        known = [shown.number((method.get("cost") or {}).get(key)) for key in self.costs]
        return tuple(math.inf if value is None else value for value in known)

    def pair(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        """Return the pair as `a` against `b`; empty where the two were not compared."""
        if (a["arm"], b["arm"]) in self.pairs:
            return dict(self.pairs[a["arm"], b["arm"]])
        other = self.pairs.get((b["arm"], a["arm"]))
        if other is None:
            return {}
        flipped = {"difference": -other["difference"], "low": -other["high"], "high": -other["low"]}
        return {**other, "a": a["arm"], "b": b["arm"], **flipped}

    def word(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> Literal["better", "worse", "cannot tell"]:
        """Return what the data say of `a` against `b`."""
        return shown.pair_word(self.pair(a, b), self.how.lower_is_better)

    def near(self, method: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
        """Tell whether a method's loss against the best score is at most `NEAR` standard errors, or that is unknown."""
        pair = self.pair(method, best)
        error = pair.get("error")
        return method is best or error is None or abs(pair["difference"]) <= NEAR * error

    def gap(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
        """Write the difference a - b, its interval, and what decided or would decide."""
        pair = self.pair(a, b)
        if not pair:
            return "not compared"
        if pair.get("test") == "identical answers":
            return "identical answers"
        unit = f" {self.how.difference_unit}" if self.how.difference_unit else ""
        text = f"difference {self.how.show(pair['difference'], sign=True)}{unit}, 95 % interval {self._range(pair)}"
        corrected = f"p {_p(pair['p_holm'])} after Holm's correction for {len(self.pairs)} pairs"
        if self.word(a, b) != "cannot tell":
            return text if len(self.pairs) == 1 else f"{text}, {corrected}"
        if not pair["low"] <= 0 <= pair["high"]:
            text += f", but {corrected}"
        more = pair.get("needed") or {}
        return f"{text}; {more['sentence']}" if more.get("limited_by") in _MORE else text

    def reason(self, method: Mapping[str, Any], best: Mapping[str, Any], winner: Mapping[str, Any] | None) -> str:
        """Write how a method did against the best score, and against the `winner` over it that is not the best."""
        lost = f"; {_name(winner)} is better than it ({self.gap(winner, method)})" if winner is not None else ""
        return f"{_name(method)} against {_name(best)}: {self.gap(method, best)}{lost}."

    def figure(self, method: Mapping[str, Any]) -> str:
        """Write an arm's name, score and interval."""
        found = shown.score(method)
        title = self.how.title
        if not title.startswith(("Matthews", "Spearman")):
            title = title[:1].lower() + title[1:]
        value = _plain(self.how.show(found.mean))
        between = "" if found.low is None else f" ({self._range({'low': found.low, 'high': found.high})})"
        return f"{_name(method)}: {f'{value} {title}' if self.how.unit == '%' else f'{title} {value}'}{between}"

    def lead(
        self,
        chosen: Mapping[str, Any],
        near: Sequence[Mapping[str, Any]],
        candidates: Sequence[Mapping[str, Any]],
        ranked: Sequence[Mapping[str, Any]],
    ) -> str:
        """Say which arm and why; `near` are the candidates among which costs decided."""
        best = ranked[0]
        if len(ranked) == 1:
            return f"{self.figure(chosen)}. It is the only arm that finished, so it was compared with nothing."
        if len(candidates) == 1:
            following = f"{_name(ranked[1])} ({self.gap(best, ranked[1])})"
            return f"{self.figure(chosen)}, better than every other arm; the next is {following}."
        order = ", then ".join(COSTS[key] for key in self.costs)
        alike = "that cannot be told apart" if near == candidates else "within two standard errors of the best score"
        by = f"the cheapest of the {len(near)} arms {alike} (by {order})"
        if chosen is best:
            other, gap = _name(candidates[1]), self.gap(best, candidates[1])
            lower = ""
            if near == [best]:
                by, lower = "although not beyond chance", ", but scored lower by more than two standard errors"
            return (
                f"{self.figure(chosen)}, the best score{', ' if lower else ' and '}{by}. The next, {other}, is "
                f"indistinguishable from it on your data ({gap}){lower}."
            )
        share = self.share(chosen, best)
        return (
            f"{self.figure(chosen)}, indistinguishable from {_name(best)} on your data ({self.gap(chosen, best)})"
            f"{f', {share}' if share else ''}. It is {by}."
        )

    def share(self, chosen: Mapping[str, Any], best: Mapping[str, Any]) -> str:
        """Write what `chosen` costs as a share of `best`, for parameters and memory where both are known."""
        parts = []
        for key, words in (("trainable_parameters", "trainable parameters"), ("saved_for_backward_bytes", "memory")):
            mine, theirs = (shown.number((m.get("cost") or {}).get(key)) for m in (chosen, best))
            if mine is not None and theirs:
                parts.append(f"{_ratio(mine / theirs)} its {words}")
        return f"at {' and '.join(parts)}" if parts else ""

    def trivial(self, chosen: Mapping[str, Any], ranked: Sequence[Mapping[str, Any]]) -> list[str]:
        """Say so where no method beats the strongest trivial baseline, or some do not even beat the weakest."""
        plain = [m for m in ranked if m.get("trivial")]
        real = [m for m in ranked if not m.get("trivial")]
        if not plain:
            return []
        if not real:
            return ["Only trivial baselines finished."]
        if any(self.word(m, plain[0]) == "better" for m in real):
            idle = [m for m in real if self.word(m, plain[-1]) != "better"]
            names = ", ".join(map(_name, idle))
            return [f"Nothing was learned by {names}: not above {_name(plain[-1])}."] if idle else []
        told = f"No method here beats the trivial baseline {_name(plain[0])}"
        return [f"{told}." if chosen is plain[0] else f"{told} ({self.figure(plain[0]).split(': ', 1)[1]})."]

    def by_chance(self, ranked: Sequence[Mapping[str, Any]], chance: float | None) -> list[str]:
        """Say so where no method's interval lies above what a coin scores."""
        if chance is None or any((shown.score(m).low or 0.0) > chance for m in ranked):
            return []
        return [f"No method here is surely above chance, {_plain(self.how.show(chance))}."]

    def _range(self, found: Mapping[str, Any]) -> str:
        return _plain(" to ".join(self.how.show(found[key], unit=False) for key in ("low", "high")))


_MORE = ("examples", "seeds", "both")  # what `examples_needed` says where more data would help


def _few_seeds(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = min(len(shown.score(m).per_seed) for m in candidates)
    if seeds == 1:
        return ["With one seed this speaks of trained models, not of methods: run at least 3 seeds."]
    return ["With two seeds the noise between seeds is hardly known: run at least 3."] if seeds == 2 else []


def _cut_short(ranked: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the arms that the minutes given cut short: more of them might change the order."""
    cut = [(m, share) for m in ranked if (share := m.get("trained_share", 1.0)) < 1.0]
    if not cut:
        return []
    told = ", ".join(f"{_name(m)} for {100 * share:.0f} %" for m, share in cut)
    return [f"The minutes given cut the training short: {told} of its full length; more might change the order."]


def _nothing(lost: Sequence[Mapping[str, Any]]) -> str:
    if not lost:
        return "No arm was given, so there is nothing to recommend."
    counts = Counter(str(m.get("status")) for m in lost)
    told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    return f"No arm finished ({told}), so there is nothing to recommend."


def _name(method: Mapping[str, Any]) -> str:
    return shown.visible(method["arm"])


def _plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def _p(value: float) -> str:
    text = shown.probability(value)
    return text if text.startswith("<") else f"= {text}"


def _ratio(value: float) -> str:
    if value > 1.05:
        return f"{shown.digits(value, 2)} times"
    return f"{100 * value:.0f} % of" if value >= 0.01 else "under 1 % of"
