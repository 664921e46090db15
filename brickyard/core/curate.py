"""Run a data step on a data set: train without test first, then the step, then a new folder with its data card.

The new folder holds every split of the old one (only train is changed), `data_card.json`, and `card/rows.parquet` with
one line for each row of train as it was read: how many copies of it were written, the rule that dropped it, what that
rule saw, and every score. A step that makes rows of what it is given defines `source(config, data, seed) -> Source`.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from brickyard.core import minhash, registry
from brickyard.core.errors import BadData, RunFailed, UsageError
from brickyard.core.files import complete_folder, sha256, write_json
from brickyard.core.pool import Outcome, Pool, read_pool, shares
from brickyard.core.readers import SPLITS, Source

SCHEMA = 1  # of data_card.json
EXAMPLES = 5  # of each rule that the card shows
EXCERPT = 120  # characters of a text that the card shows
IN_TEST, NEAR_TEST = "in test", "near a test row"
RANDOM, NOT_DRAWN = "random subset", "not drawn"
UNEVEN = 0.5  # a group that keeps less than this part of the overall rate is named


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run of a step: `brickyard data STEP`."""

    step: str
    data: Any
    out: str | Path
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    text_column: str = ""
    domain_column: str = ""
    base: str = "embedded:minilm"
    seed: int = 0
    device: str | None = None
    cache: bool = True
    contamination: str = "remove"
    baseline: str | Path | None = None
    """a second new folder: random rows of the same train split, with as many tokens of `base` as the step left"""


@dataclass(frozen=True)
class Budget:
    """What a random subset is drawn to."""

    tokens: int
    of: str


def curate(request: Request) -> dict[str, Any]:
    """Run one step and write its folder; return the data card.

    Raises:
        UsageError: an option, or the step, is unknown or out of range. BadData: the data cannot be used, or the step
        would leave train, or one of its classes, without any row. RunFailed: a step lost sight of a row.
    """
    started = time.monotonic()
    if request.contamination not in ("remove", "report"):
        raise UsageError(f"contamination={request.contamination!r}: remove or report was expected.")
    if request.seed < 0:
        raise UsageError(f"seed={request.seed}: a seed is not negative.")
    if request.baseline is not None and Path(request.baseline).resolve() == Path(request.out).resolve():
        raise UsageError(f"baseline and out are both {request.out}; the random subset needs a folder of its own.")
    for folder in (request.out, request.baseline):
        if folder is not None and Path(folder).is_dir() and any(Path(folder).iterdir()):
            raise UsageError(f"{folder} is not empty; give a new folder.")
    entry = registry.find(request.step, "data")
    if entry.record.slot:
        raise UsageError(f"{request.step} is used inside an arm (such as 'lora + {request.step}'), not as a step.")
    config = registry.config(request.step, request.options)
    step = registry.load(request.step)
    if make := getattr(step, "source", None):
        if request.text_column or request.domain_column:
            raise UsageError(f"{request.step} makes its own rows; leave out --text-column and --domain-column.")
        source = make(config, request.data, request.seed)
    else:
        source = read_pool(request.data, text_column=request.text_column, domain_column=request.domain_column)
    pool = Pool(
        source.splits["train"],
        source.splits.get("validation", {}),
        request.domain_column,
        request.base,
        request.seed,
        request.device,
        request.cache,
    )
    read_seconds = time.monotonic() - started
    drops, contamination = against_test(pool, source)
    if request.contamination == "report":
        drops = {}
    clean = np.setdiff1d(np.arange(len(pool)), [row for rows in drops.values() for row in rows])
    if not len(clean):
        raise BadData("every row of train also stands in test, exactly or nearly; there is nothing to choose from.")
    checked = time.monotonic()
    found = step.run(config, pool.take(clean))
    seconds = {"read": read_seconds, "contamination": checked - started - read_seconds}
    seconds["step"] = time.monotonic() - checked
    if not found.complete(len(clean)):
        raise RunFailed(f"{request.step} neither kept nor dropped some rows, or did both; nothing was written.")
    outcome = _in_numbers_of(pool, found, clean, drops)
    card = _card(request, config, source, pool, outcome, contamination, seconds)
    if request.baseline is not None:
        drawn = _random_subset(request, pool, clean, outcome, drops)
        budget = Budget(drawn.report["budget"], request.step)
        beside = _card(replace(request, step=RANDOM), budget, source, pool, drawn, contamination, seconds)
        _publish(request.baseline, beside, source, pool, drawn)
        card["baseline"] = {"folder": str(request.baseline), **drawn.report, "rows": len(drawn.rows)}
    _publish(request.out, card, source, pool, outcome)
    return card


def _publish(out: str | Path, card: dict[str, Any], source: Source, pool: Pool, outcome: Outcome) -> None:
    """Write a data folder with its card, complete or not at all."""
    with complete_folder(out) as folder:
        _write(folder, source, pool, outcome)
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        card["files"] = {p.relative_to(folder).as_posix(): sha256(p) for p in paths}
        write_json(folder / "data_card.json", card)


def _random_subset(
    request: Request, pool: Pool, clean: np.ndarray, outcome: Outcome, drops: dict[str, dict[int, str]]
) -> Outcome:
    """Draw rows that may be in train until they have as many tokens as the step left: what choosing must beat.

    Where the step repeats rows and left more tokens than there are, every row is drawn once before any twice.
    """
    from brickyard.core.base import open_base

    tokenizer: Any = open_base(request.base).tokenizer
    if tokenizer is None:
        raise UsageError(f"{request.base} has no tokenizer to count tokens by; give a --base for text.")
    encoded = tokenizer(pool.texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = np.array([len(ids) for ids in encoded], dtype=np.int64)
    budget, whole = int(tokens[outcome.rows].sum()), int(tokens[clean].sum())
    generator = np.random.Generator(np.random.PCG64([request.seed, *RANDOM.encode()]))
    rounds = 1 + budget // max(whole, 1)
    order = np.concatenate([generator.permutation(clean) for _ in range(rounds)])
    sums = np.concatenate([[0], np.cumsum(tokens[order])])
    count = max(1, int(np.abs(sums - budget).argmin()))
    rows = order[:count]
    left = np.setdiff1d(clean, rows)
    report = {"budget": budget, "tokens": int(tokens[rows].sum()), "counted_by": request.base}
    named = {**{rule: found for rule, found in drops.items() if found}}
    return Outcome(
        np.sort(rows), {**named, **({NOT_DRAWN: dict.fromkeys(left.tolist(), "")} if len(left) else {})}, {}, report
    )


def against_test(pool: Pool, source: Source) -> tuple[dict[str, dict[int, str]], dict[str, Any]]:
    """Find the rows of train that stand in test, exactly or nearly: (rule -> {row: what}, the report)."""
    if "test" not in source.splits:
        return {}, {"checked": False, "why": "the data have no test split"}
    near = minhash.Near(seed=pool.seed)
    test = Pool(source.splits["test"]).texts
    place = {text: row for row, text in reversed(list(enumerate(test)))}
    exact = {row: f"row {place[text] + 1} of test" for row, text in enumerate(pool.texts) if text in place}
    found = minhash.matches(pool.texts, test, near)
    alike = {int(row): f"near row {found[row] + 1} of test" for row in np.flatnonzero(found >= 0) if row not in exact}
    others = source.splits.get("validation")
    report = {
        "checked": True,
        "exact": len(exact),
        "near": len(alike),
        "near_means": f"Jaccard similarity of character {near.n}-grams of at least {near.threshold}",
        "test_rows": len(test),
        "validation_rows_in_or_near_test": int((minhash.matches(Pool(others).texts, test, near) >= 0).sum())
        if others
        else 0,
    }
    return {IN_TEST: exact, NEAR_TEST: alike}, report


def _in_numbers_of(pool: Pool, found: Outcome, clean: np.ndarray, drops: dict[str, dict[int, str]]) -> Outcome:
    """Return the outcome in the row numbers of the whole pool, with the contaminated rows among the dropped."""
    scores = {}
    for name, values in found.scores.items():
        scores[name] = np.full(len(pool), np.nan)  # a row taken out beforehand has no score
        scores[name][clean] = values
    named = {rule: {int(clean[row]): why for row, why in rows.items()} for rule, rows in found.drops.items()}
    return Outcome(clean[found.rows], {**{k: v for k, v in drops.items() if v}, **named}, scores, found.report)


def _card(
    request: Request,
    config: Any,
    source: Source,
    pool: Pool,
    outcome: Outcome,
    contamination: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    kept = np.zeros(len(pool), bool)
    kept[outcome.rows] = True
    if not kept.any():
        raise BadData(f"{request.step} would drop every row of train; the rules are too strict for these data.")
    groups = {}
    for name, values in (("label", pool.labels), ("domain", pool.domains)):
        if values is not None and not (name == "label" and any(isinstance(v, float) for v in values)):
            groups[name] = shares(values, kept)
            gone = [value for value, share in groups[name].items() if not share["kept"]]
            if gone:
                raise BadData(
                    f"{request.step} would leave no row of {name} {gone[0]!r} ({groups[name][gone[0]]['read']} were "
                    "read); loosen the rule, or remove that group yourself."
                )
    overall = float(kept.mean())
    uneven = [
        f"{name} {value!r} keeps {share['rate']:.0%}, all rows {overall:.0%}"
        for name, group in groups.items()
        for value, share in group.items()
        if share["rate"] < UNEVEN * overall
    ]
    rules = {}
    for rule, rows in outcome.drops.items():
        shown = [{"row": r + 1, "why": rows[r], "excerpt": pool.texts[r][:EXCERPT]} for r in sorted(rows)[:EXAMPLES]]
        rules[rule] = {"dropped": len(rows), "examples": shown}
    return {
        "schema": SCHEMA,
        "step": request.step,
        "options": dataclasses.asdict(config),
        "data": {"name": source.name, "origin": source.origin, "ignored_columns": _ignored(source)},
        "base": request.base,
        "seed": request.seed,
        "rows": {"read": len(pool), "kept": int(kept.sum()), "written": len(outcome.rows)},
        "skipped": {rule: {"count": len(of), "examples": of[:EXAMPLES]} for rule, of in source.skipped.items()},
        "rules": rules,
        "contamination": {**contamination, "removed": request.contamination == "remove" and contamination["checked"]},
        "groups": groups,
        "uneven": uneven,
        "report": outcome.report,
        "seconds": seconds,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _ignored(source: Source) -> list[str]:
    return sorted({c for found in source.found.values() for c in found if c not in source.wanted})


def _write(folder: Path, source: Source, pool: Pool, outcome: Outcome) -> None:
    written = {**source.splits, "train": {k: [v[i] for i in outcome.rows] for k, v in pool.columns.items()}}
    for split in (split for split in SPLITS if split in written):
        if source.formats[split] == "txt":  # a corpus stays one: a table of texts alone would lack its labels
            text = "\n".join(written[split]["text"]) + "\n"
            (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="")
        else:
            pq.write_table(pa.table(written[split]), folder / f"{split}.parquet")
    copies = np.bincount(outcome.rows, minlength=len(pool))
    rule, why = np.full(len(pool), None, object), np.full(len(pool), None, object)
    for name, rows in outcome.drops.items():
        for row, what in rows.items():
            rule[row], why[row] = name, what
    excerpt = [None if copies[i] else text[:EXCERPT] for i, text in enumerate(pool.texts)]
    lines: dict[str, Any] = {
        "row": np.arange(1, len(pool) + 1),
        "copies": copies,
        "rule": pa.array(rule, pa.string()),
        "why": pa.array(why, pa.string()),
        "excerpt": pa.array(excerpt, pa.string()),
    }
    (folder / "card").mkdir()
    pq.write_table(pa.table({**lines, **outcome.scores}), folder / "card" / "rows.parquet")
