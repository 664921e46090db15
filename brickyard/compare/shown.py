"""How a name, a score, an interval or a cost is written, alike in the terminal and in the report. Imports no torch."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

KINDS = {
    "counted": "exact: bytes, parameters, tokens or operations that were counted",
    "measured": "observed in this run: scores, times and memory peaks; another run differs a little",
    "emulated": "a link or a device was stood in for",
    "predicted": "computed from a model or an extrapolation, not observed",
}
MISSING = "–"
ALPHA = 0.05  # a pair differs when its Holm-adjusted p is at most this
_JOINERS = "\u200c\u200d"  # needed to write Persian, Indic scripts and many emoji; neither reorders nor hides a letter
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"))  # control, format, surrogate, unassigned, line breaks


def visible(text: object) -> str:
    """Return `text` with every control, bidirectional or otherwise unprintable character escaped, as in `\\u202e`."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _printable(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _printable(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in _HIDDEN


def number(value: Any) -> float | None:
    """Return `value` as a finite float; None for anything else (None, NaN, infinity, text, a truth value)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def digits(value: float, significant: int = 3) -> str:
    """Return `value` with about `significant` digits, never with an exponent: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0:
        return "0"
    value = float(f"{value:.{significant - 1}e}") if abs(value) < 10 ** (significant - 1) else value
    places = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(places, 0), 9)}f}"


def _scaled(value: float, step: float, units: Sequence[str]) -> str:
    unit = 0
    while abs(value) >= step * 0.9995 and unit < len(units) - 1:
        value, unit = value / step, unit + 1
    return f"{digits(value)}\u00a0{units[unit]}".rstrip("\u00a0")


def count(value: float | None) -> str:
    """Return a number of things: 850, 14,788, 1.23 M, 4.5 G."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) < 100_000 else _scaled(value / 1000, 1000, ("k", "M", "G", "T", "P", "E"))


def size(value: float | None) -> str:
    """Return bytes in B, KiB, MiB, GiB or TiB."""
    if value is None:
        return MISSING
    return f"{value:.0f}\u00a0B" if abs(value) < 1000 else _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def mebibytes(value: float | None) -> str:
    """Return bytes as a bare number of MiB; very few are only said to be few."""
    if value is None:
        return MISSING
    return "< 0.01" if 0 < value < 0.01 * 2**20 else digits(value / 2**20)


def milliseconds(value: float | None) -> str:
    """Return milliseconds with their unit; from ten seconds on, as a duration."""
    if value is None:
        return MISSING
    return f"{digits(value)}\u00a0ms" if value < 10_000 else duration(value / 1000)


def duration(seconds: float | None) -> str:
    """Return a duration: 850 ms, 12.3 s, 4 min 5 s, 2 h 7 min."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return "0\u00a0s" if seconds == 0 else f"{digits(seconds * 1000)}\u00a0ms"
    if seconds < 100:
        return f"{digits(seconds)}\u00a0s"
    whole = round(seconds)
    if whole < 6000:
        large, small, names = whole // 60, whole % 60, ("min", "s")
    else:
        large, small, names = whole // 3600, whole % 3600 // 60, ("h", "min")
    return f"{large:,}\u00a0{names[0]}" + (f"\u00a0{small}\u00a0{names[1]}" if small else "")


@dataclass(frozen=True)
class Cost:
    """One figure of a method's `cost`: its key, its name, the name within a sentence, how it was found, its unit."""

    key: str
    title: str
    phrase: str
    kind: Literal["counted", "measured", "emulated", "predicted"]
    unit: Literal["things", "bytes", "ms", "s"]

    def show(self, value: float | None) -> str:
        """Return `value` with its unit."""
        return {"things": count, "bytes": size, "ms": milliseconds, "s": duration}[self.unit](value)


COSTS = (
    Cost("trainable_parameters", "Trainable parameters", "trainable parameters", "counted", "things"),
    Cost("saved_for_backward_bytes", "Saved for backward", "memory saved for the backward pass", "counted", "bytes"),
    Cost("peak_bytes", "Peak memory", "peak memory", "measured", "bytes"),
    Cost("step_ms", "Step time", "time of one step", "measured", "ms"),
    Cost("train_seconds", "Training time", "training time", "measured", "s"),
    Cost("forward_flops", "Forward operations", "operations of one forward pass", "counted", "things"),
    Cost("brick_bytes", "Brick size", "size of the brick", "counted", "bytes"),
)


@dataclass(frozen=True)
class Metric:
    """How scores of one metric are written: `factor` times the stored fraction, `places` decimals, then `unit`."""

    title: str
    factor: float = 1
    unit: str = ""
    places: int = 3
    lower_is_better: bool = False

    def show(self, value: float | None, *, unit: bool = True, sign: bool = False) -> str:
        """Return a score or, with `sign`, a difference of scores (whose unit is points)."""
        if value is None:
            return MISSING
        shown = f"{value * self.factor:{'+' if sign else ''}.{self.places}f}"
        if not shown.strip("+-0."):
            shown = f"{0:.{self.places}f}"  # no sign on a zero
        shown = shown.replace("-", "−")
        return f"{shown}\u00a0{self.unit}" if unit and self.unit and not sign else shown

    def interval(self, low: float | None, high: float | None, *, sign: bool = False) -> str:
        """Return `[low, high]`, or nothing where a bound is missing."""
        if low is None or high is None:
            return ""
        return f"[{self.show(low, unit=False, sign=sign)},\u00a0{self.show(high, unit=False, sign=sign)}]"

    @property
    def difference_unit(self) -> str:
        """Return the unit of a difference: percentage points, or the metric's own."""
        return "points" if self.unit == "%" else self.unit


_METRICS = {
    "accuracy": Metric("Accuracy", 100, "%", 1),
    "accuracy_norm": Metric("Accuracy by length", 100, "%", 1),
    "macro-f1": Metric("Macro F1", 100, "%", 1),
    "matthews": Metric("Matthews correlation"),
    "spearman": Metric("Spearman correlation"),
    "bits_per_byte": Metric("Bits per byte", lower_is_better=True),
    "nats_per_token": Metric("Nats per token", lower_is_better=True),
    "loss": Metric("Loss", lower_is_better=True),
}


def in_nats(result: Mapping[str, Any]) -> str:
    """Return what one of a comparison's bits per byte is in nats per token; "" for other metrics."""
    each = number((result.get("task") or {}).get("nats_per_token"))
    return "" if each is None else f"One bit per byte is {each:.3f} nats per token of these test texts."


def metric(name: Any) -> Metric:
    """Return how to write the metric `name`; an unknown one is written as a plain number, higher taken as better."""
    return _METRICS.get(str(name)) or Metric(visible(name) if name else "Score")


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval and the scores of the seeds, all fractions; None where it was not found."""

    mean: float | None
    low: float | None
    high: float | None
    per_seed: tuple[float, ...]


def score(method: Mapping[str, Any]) -> Score:
    """Return the score of one entry of `result["methods"]`."""
    given = method.get("score") or {}
    seeds = given.get("per_seed") or ()
    values = seeds.values() if isinstance(seeds, Mapping) else seeds
    return Score(
        number(given.get("mean")),
        number(given.get("low")),
        number(given.get("high")),
        tuple(v for v in map(number, values) if v is not None),
    )


def metric_of(result: Mapping[str, Any]) -> Metric:
    """Return the metric of the comparison."""
    named = [m["score"].get("metric") for m in result["methods"] if m.get("score")]
    return metric((result.get("task") or {}).get("metric") or next(iter(named), None))


def in_order(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the methods, best score first, then those without a score in the order given."""
    sign = 1 if metric_of(result).lower_is_better else -1
    scored = [m for m in result["methods"] if score(m).mean is not None]
    rest = [m for m in result["methods"] if score(m).mean is None]
    return sorted(scored, key=lambda m: sign * (score(m).mean or 0.0)) + rest


def without_overlap(result: Mapping[str, Any]) -> str:
    """Return what the verdict is without the test rows that also stand in train; nothing where there are none."""
    given = result.get("without_overlap") or {}
    verdict = given.get("verdict") or {}
    sentence = given.get("sentence") or (verdict.get("sentence") if isinstance(verdict, Mapping) else verdict) or ""
    removed = number(given.get("removed"))
    rows = (
        f"the {removed:,.0f} test rows that also stand" if removed and removed > 1 else "the test row that also stands"
    )
    return f"Without {rows if removed else 'the test rows that also stand'} in train: {sentence}" if given else ""


def pair_word(pair: Mapping[str, Any], lower_is_better: bool = False) -> Literal["better", "worse", "cannot tell"]:
    """Return what the data say of `pair["a"]` against `pair["b"]`.

    A difference counts when the Holm-adjusted p is at most 0.05 and the 95 % interval keeps clear of zero.
    """
    difference, p = number(pair.get("difference")), number(pair.get("p_holm"))
    low, high = number(pair.get("low")), number(pair.get("high"))
    if not difference or p is None or p > ALPHA or (low is not None and high is not None and low <= 0 <= high):
        return "cannot tell"
    return "better" if (difference > 0) != lower_is_better else "worse"


def probability(value: float | None) -> str:
    """Return a p-value with two digits that matter; below 0.001 only that."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"


def width(text: str) -> int:
    """Return how many terminal cells `text` takes: two for wide East Asian characters, none for combining marks."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def short_names(names: Iterable[str], limit: int) -> dict[str, str]:
    """Return for each name a visible text of at most `limit` cells; two names never share one."""
    shown: dict[str, str] = {}
    for name in names:
        text = visible(name)
        choices = [text] if width(text) <= limit else [_cut(text, limit, tail) for tail in (0, limit // 2, limit // 3)]
        free = [c for c in choices if c not in shown.values()]
        shown[name] = free[0] if free else f"{_cut(text, limit - 4, 0)} {len(shown) + 1}"
    return shown


def _cut(text: str, limit: int, tail: int) -> str:
    """Shorten `text` to `limit` cells: an ellipsis, with `tail` cells of the end behind it."""
    end = text[len(text) - tail :] if tail else ""
    while width(end) > tail:
        end = end[1:]
    head = text
    while head and width(head) + 1 + width(end) > limit:
        head = head[:-1]
    return f"{head.rstrip(' :,+')}…{end}"
