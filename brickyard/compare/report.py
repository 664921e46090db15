"""`render` writes a comparison's result as one HTML file that needs nothing else; `report_picture` draws it as an SVG.

Everything that came from outside (arm names, labels, reasons, warnings) is escaped, and control or bidirectional
characters in it are written as visible escapes. The page may load and send nothing, by its content security policy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from brickyard.compare import charts, details, scales, shown
from brickyard.compare.charts import Point
from brickyard.compare.shown import COSTS, Cost, Metric, Score, number
from brickyard.core.errors import UsageError
from brickyard.core.files import write_bytes


def render(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report of `result` (the content of OUT/result.json) to `path`, atomically, and return the path.

    Raises UsageError when `result` is not the result of a comparison.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page(result).encode("utf-8"))
    return path


def page(result: Mapping[str, Any]) -> str:
    """Return the report as HTML text."""
    return _template().render(view(result))


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown.visible(value),
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("report.html.j2")


def breakable(text: object) -> Markup:
    """Return `text` escaped, with places where a line may break behind `:`, `,` and `/`."""
    return Markup(re.sub(r"([:,/])(?=\S)", r"\1<wbr>", str(escape(shown.visible(text)))))


def report_picture(result: Mapping[str, Any], cost: str = "") -> str:
    """Return quality against `cost` (a key of the costs; by default the first that was found) as an SVG of its own."""
    _check(result)
    metric = shown.metric_of(result)
    keys = [cost] if cost else ["saved_for_backward_bytes", *(c.key for c in COSTS)]
    for chosen in (c for key in keys for c in COSTS if c.key == key):
        points = [p for p in _points(result, chosen) if p.cost is not None and p.score.mean is not None]
        if points:
            title = f"{metric.title} on {shown.visible(_data_name(result))} against {chosen.phrase}"
            return charts.picture(charts.quality_cost(points, metric, chosen, 760, 440), title, 760, 440)
    raise UsageError(f"no arm has both a score and {cost or 'a cost'}; a picture needs at least one that finished.")


def view(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the template prints, already in words."""
    _check(result)
    metric = shown.metric_of(result)
    verdict = result.get("verdict") or {}
    content = {
        "question": _question(result),
        "headline": _headline(verdict),
        "reasons": details.lines(verdict.get("reasons")),
        "metric": metric,
        "nats": shown.in_nats(result),
        "kinds": shown.KINDS,
        "keys": [(charts.key_icon(look, shape), words) for look, shape, words in charts.KEYS],
        "facts": _facts(result, metric),
        "tied": list(verdict.get("indistinguishable") or []),
        "without_overlap": _without_overlap(result),
        "privacy": shown.visible((result.get("privacy") or {}).get("sentence") or ""),
        "table": _table(result, metric),
        "quality": _quality(result, metric),
        "seeds": _seeds(result, metric),
        "curves": _curves(result, metric),
        "pairs": _pairs(result, metric),
        "confusion": details.confusion(result.get("confusion")),
        "retained": _retained(result),
        "receipts": details.receipts(shown.in_order(result)),
        "data": details.data_report(result.get("data") or {}),
        "environment": details.tree(result.get("environment") or {}),
        "budget": details.tree(result.get("budget") or {}),
        "base": details.tree(
            {**(result.get("base") or {}), **{f"task {k}": v for k, v in (result.get("task") or {}).items()}}
        ),
        "command": result.get("command") or "",
    }
    titles = {
        "table": "Results",
        "quality": "Quality and cost",
        "seeds": "Seeds",
        "curves": "Learning",
        "pairs": "Pairs",
        "confusion": "Confusion",
        "retained": "Retained",
        "receipts": "Receipts",
        "data": "Data",
    }
    sections = {key: title for key, title in titles.items() if content[key]}
    return {**content, "sections": {**sections, "setup": "Set-up"}}


def _headline(verdict: Mapping[str, Any]) -> dict[str, str]:
    """Return the answer in a few words, set large, and the verdict's sentences below it."""
    sentence = str(verdict.get("sentence") or "No verdict was reached.")
    if verdict.get("recommended") is None:
        return {"large": sentence, "below": ""}
    below = shown.visible(sentence).removeprefix(f"{shown.visible(verdict['recommended'])}: ")
    return {"large": f"Use {verdict['recommended']}.", "below": below[:1].upper() + below[1:]}


def _check(result: Mapping[str, Any]) -> None:
    methods = result.get("methods") if isinstance(result, Mapping) else None
    if not isinstance(methods, list) or not all(isinstance(m, Mapping) and "arm" in m for m in methods):
        raise UsageError(
            "this is not the result of a comparison: expected an object whose 'methods' is a list of arms; "
            "give the result.json (or its folder) that `brickyard compare` wrote."
        )


def _data_name(result: Mapping[str, Any]) -> str:
    return str((result.get("data") or {}).get("name") or "these data")


def _question(result: Mapping[str, Any]) -> str:
    arms = len(result["methods"])
    base = (result.get("base") or {}).get("spec") or "the base model"
    if arms == 1:
        return f"Does {result['methods'][0]['arm']} work for {base} on {_data_name(result)}?"
    return f"Which of {arms} ways of adapting {base} should be used on {_data_name(result)}?"


def _points(result: Mapping[str, Any], cost: Cost | None = None, limit: int = 26) -> list[Point]:
    methods = shown.in_order(result)
    labels = shown.short_names((m["arm"] for m in methods), limit)
    recommended = (result.get("verdict") or {}).get("recommended")
    return [
        Point(
            m["arm"],
            labels[m["arm"]],
            shown.score(m),
            number((m.get("cost") or {}).get(cost.key)) if cost else None,
            recommended=m["arm"] == recommended,
            trivial=bool(m.get("trivial")),
        )
        for m in methods
    ]


def _facts(result: Mapping[str, Any], metric: Metric) -> list[dict[str, str]]:
    """Return the recommended arm's score, its lead over the best trivial baseline, and its costs."""
    recommended = (result.get("verdict") or {}).get("recommended")
    found = [m for m in result["methods"] if m["arm"] == recommended]
    if not found:
        return []
    s, cost = shown.score(found[0]), found[0].get("cost") or {}
    facts = [_fact(metric.title, metric.show(s.mean), f"95 % interval {metric.interval(s.low, s.high)}", "measured")]
    trivial = [m for m in shown.in_order(result) if m.get("trivial") and shown.score(m).mean is not None]
    if trivial and s.mean is not None and not found[0].get("trivial"):
        best = shown.score(trivial[0]).mean or 0.0
        lead = f"{metric.show(s.mean - best, sign=True)}\u00a0{metric.difference_unit}".strip()
        facts.append(_fact("Over the best baseline", lead, trivial[0]["arm"], "measured"))
    for c in (c for c in COSTS if c.key != "forward_flops"):
        value = number(cost.get(c.key))
        if value is not None:
            facts.append(_fact(c.title, c.show(value), "", kind_of(c, found)))
    return facts


def _fact(name: str, value: str, note: str, kind: str) -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "kind": kind}


def kind_of(cost: Cost, methods: Iterable[Mapping[str, Any]]) -> str:
    """Return how a cost was found: what the run says in `cost["how"]`, else what it usually is."""
    for method in methods:
        how = (method.get("cost") or {}).get("how")
        word = str(how.get(cost.key, "") if isinstance(how, Mapping) else "").partition(":")[0]
        if word in shown.KINDS:
            return word
    return cost.kind


def _table(result: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    methods = shown.in_order(result)
    verdict = result.get("verdict") or {}
    used = [c for c in COSTS if any(number((m.get("cost") or {}).get(c.key)) is not None for m in methods)]
    reach = scales.focus([shown.score(m) for m in methods], metric.lower_is_better)
    rows, notes = [], {}
    for m in methods:
        s, cost, status = shown.score(m), m.get("cost") or {}, str(m.get("status") or "done")
        recommended = m["arm"] == verdict.get("recommended")
        badges = [("best", "recommended")] if recommended else []
        badges += [("tie", "cannot be told apart")] if m["arm"] in (verdict.get("indistinguishable") or ()) else []
        badges += [("plain", "baseline")] if m.get("trivial") else []
        badges += [("bad", status.replace("-", " "))] if status != "done" else []
        setting = m.get("setting") or {}
        if note := (m.get("score") or {}).get("note"):
            notes.setdefault(str(note), []).append(str(m["arm"]))
        rows.append(
            {
                "arm": m["arm"],
                "badges": badges,
                "reason": m.get("reason") or "" if status != "done" else "",
                "setting": ", ".join(f"{k}={v}" for k, v in setting.items()),
                "failed": status != "done" and s.mean is None,
                "look": "best"
                if recommended
                else "failed"
                if status != "done"
                else "trivial"
                if m.get("trivial")
                else "",
                "mean": s.mean,
                "score": metric.show(s.mean, unit=False),
                "interval": metric.interval(s.low, s.high),
                "bar": charts.interval_bar(
                    s, reach, "best" if recommended else "rest" if m.get("trivial") else "front"
                ),
                "costs": [(number(cost.get(c.key)), c.show(number(cost.get(c.key)))) for c in used],
            }
        )
    columns = [(c.title, kind_of(c, methods)) for c in used]
    done = sum(row["mean"] is not None for row in rows)
    return {"rows": rows, "columns": columns, "done": done, "notes": list(notes.items())} if rows else {}


def _quality(result: Mapping[str, Any], metric: Metric) -> list[dict[str, Any]]:
    pictures = []
    for cost in COSTS:
        points = [p for p in _points(result, cost) if p.score.mean is not None]
        have = [p for p in points if p.cost is not None]
        if not have or (len(have) > 1 and len({p.cost for p in have}) == 1):
            continue  # a cost that is the same for all arms tells nothing apart
        small = [p for p in _points(result, cost, 17) if p.score.mean is not None and p.cost is not None]
        pictures.append(
            {
                "name": cost.title,
                "phrase": cost.phrase,
                "kind": kind_of(cost, result["methods"]),
                "missing": [p.arm for p in points if p.cost is None],
                "wide": charts.quality_cost(have, metric, cost),
                "narrow": charts.quality_cost(small, metric, cost, 340, 380),
            }
        )
    return pictures


def _seeds(result: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    points = [p for p in _points(result, limit=30) if p.score.mean is not None]
    if not any(p.score.per_seed for p in points):
        return {}
    points = [p if p.recommended or p.trivial else charts.replace(p, front=True) for p in points]
    return {"wide": charts.strip(points, metric), "narrow": charts.strip(points, metric, 340)}


def _curves(result: Mapping[str, Any], metric: Metric) -> list[dict[str, Any]]:
    given = result.get("curves") or {}
    order = [m["arm"] for m in shown.in_order(result) if given.get(m["arm"])]
    recommended = (result.get("verdict") or {}).get("recommended")
    views = []
    for key, title, show in (
        ("validation_score", f"{metric.title} on validation", lambda v: metric.show(v, unit=False)),
        ("train_loss", "Training loss", shown.digits),
    ):
        lines = {arm: [c for seed in given[arm] if (c := _line_of(seed, key))] for arm in order}
        lines = {arm: seeds for arm, seeds in lines.items() if seeds}
        if lines:
            shared, panels = charts.curve_panels(lines, f"all-{key.replace('_', '-')}", show, recommended)
            longest = max(len(c) for seeds in lines.values() for c in seeds)
            views.append({"name": title, "shared": shared, "panels": panels, "thinned": longest > charts.MOST_POINTS})
    return views


def _line_of(seed: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    found = ((number(p.get("examples", p.get("step"))), number(p.get(key))) for p in seed.get("points") or ())
    return [(x, y) for x, y in found if x is not None and y is not None]


def _pairs(result: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    recommended = (result.get("verdict") or {}).get("recommended")
    pairs = [_turned(p) if p.get("b") == recommended else dict(p) for p in result.get("pairs") or ()]
    first = [p for p in pairs if p.get("a") == recommended]
    rest = [p for p in pairs if p.get("a") != recommended]
    tests = sorted({str(p["test"]) for p in pairs if p.get("test")})
    groups = [(True, first), (False, rest)] if first else [(True, rest)]
    return (
        {
            "groups": [(is_open, _pair_rows(group, metric)) for is_open, group in groups if group],
            "tests": tests,
            "unit": metric.difference_unit,
        }
        if pairs
        else {}
    )


def _pair_rows(pairs: Sequence[Mapping[str, Any]], metric: Metric) -> list[dict[str, Any]]:
    """Return the rows, on one scale on which at least 60 % of the intervals fit; a few far baselines do not set it."""
    reach = sorted(max(abs(number(p.get(k)) or 0.0) for k in ("difference", "low", "high")) for p in pairs)
    pairs = sorted(pairs, key=lambda p: (number(p.get("difference")) or 0.0) * (-1 if metric.lower_is_better else 1))
    most = 1.15 * reach[min(len(reach) - 1, int(0.6 * len(reach)))] or 1.0
    return [_pair(p, most, metric) for p in pairs]


def _turned(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same comparison seen from the other arm."""
    flipped = {k: None if (v := number(pair.get(k))) is None else -v for k in ("difference", "low", "high")}
    return {
        **pair,
        "a": pair["b"],
        "b": pair["a"],
        "difference": flipped["difference"],
        "low": flipped["high"],
        "high": flipped["low"],
    }


def _pair(pair: Mapping[str, Any], most: float, metric: Metric) -> dict[str, Any]:
    word = shown.pair_word(pair, metric.lower_is_better)
    s = Score(number(pair.get("difference")), number(pair.get("low")), number(pair.get("high")), ())
    look = {"better": "front", "worse": "warn", "cannot tell": "rest"}[word]
    return {
        "a": pair.get("a"),
        "b": pair.get("b"),
        "word": word,
        "look": look,
        "difference": metric.show(s.mean, sign=True),
        "interval": metric.interval(s.low, s.high, sign=True),
        "bar": charts.interval_bar(s, (-most, most), look, zero=True),
        "needed": (pair.get("needed") or {}).get("sentence") or "" if word == "cannot tell" else "",
        "p": shown.probability(number(pair.get("p_holm"))),
        "sort": (s.mean, number(pair.get("p_holm"))),
    }


def _retained(result: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for m in shown.in_order(result):
        kept = m.get("retained")
        if not kept:
            continue
        metric = shown.metric(kept.get("metric"))
        before, after = number(kept.get("before")), number(kept.get("after"))
        change = None if before is None or after is None else after - before
        drift = number(kept.get("drift"))
        rows.append(
            {
                "arm": m["arm"],
                "what": kept.get("what") or "",
                "metric": metric.title if kept.get("metric") else "",
                "before": metric.show(before),
                "after": metric.show(after),
                "change": metric.show(change, sign=True),
                "word": _kept(change, metric),
                "drift": shown.MISSING if drift is None else shown.digits(drift),
                "sort": (before, after, change, drift),
            }
        )
    scored = any(row["sort"][0] is not None or row["sort"][1] is not None for row in rows)
    return {"rows": rows, "scored": scored, "drifted": any(row["sort"][3] is not None for row in rows)} if rows else {}


def _kept(change: float | None, metric: Metric) -> str:
    """Return what a change is called; one that is written as zero is none."""
    if change is None:
        return ""
    if metric.show(change, sign=True) == metric.show(0.0, sign=True):
        return "as before"
    return "forgot" if (change > 0) == metric.lower_is_better else "gained"


def _without_overlap(result: Mapping[str, Any]) -> dict[str, Any]:
    given = result.get("without_overlap")
    if not given:
        return {}
    rest = {k: v for k, v in given.items() if k not in ("sentence", "verdict", "methods", "pairs")}
    sentence, verdict = shown.without_overlap(result), given.get("verdict")
    recommended = (result.get("verdict") or {}).get("recommended")
    same = recommended is not None and isinstance(verdict, Mapping) and verdict.get("recommended") == recommended
    short = f"{sentence.partition(':')[0]}, the recommendation stays {recommended}." if same else sentence
    return {"short": short, "sentence": sentence, "tree": details.tree(rest)}
