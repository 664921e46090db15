"""`brickyard check`: re-measure a method's headline claims here, with their gates and negative controls."""

from __future__ import annotations

import importlib
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from brickyard.checks._data import at_hand, same_input
from brickyard.checks._place import RUNS, heard_by
from brickyard.checks._takes import left_alone, refuse, taken
from brickyard.compare import shown
from brickyard.compare.plan import Contestant, Request, default_point, key_of
from brickyard.compare.results import UNTOUCHED
from brickyard.compare.run import Listener, compare, versions
from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.data import read_data
from brickyard.core.errors import BadData, RunFailed, UsageError
from brickyard.core.files import read_json, write_json
from brickyard.core.locks import Lock
from brickyard.core.measure import cpu_bfloat16_is_fast, environment
from brickyard.core.method import Claim
from brickyard.core.registry import code_digest
from brickyard.core.stats import examples_needed, paired
from brickyard.core.task import PER_TEXT

RESULTS = Path("claims") / "results"  # of the current folder; in a checkout a link to what the package ships
SETUP = (
    "base",
    "data",
    "epochs",
    "seeds",
    "lrs",
    "lr_factors",
    "train_rows",
    "shots",
    "batch",
    "max_length",
)  # of a claim
# What a claim says of its own measurement where that is not the last one, of which the file says it for all its claims.
OWN = ("environment", "full", "seconds", "date")
FINISHED = "finished"  # a mark in the folder of a run whose check ended: the next one measures anew
_INEQUALITY = re.compile(r"\s*([\w-]+)\s*(>=|>)\s*(?:(0\.\d+)\s+)?([\w-]+)\s*(?:([+-])\s*([\d.]+))?\s*\Z")
BASE = "base"  # in an inequality: the base as it is, where it answers the task itself (a language model)


@dataclass(frozen=True)
class Inequality:
    """`left >= share right + margin`, or with `strict` `left > ...`; margin in points (hundredths of the metric).

    With `share` 0.9 the left one has at least 90 % of the right one's gain over the untouched base; see `judge`.
    """

    left: str
    right: str
    margin: float
    share: float = 1.0
    strict: bool = False

    @classmethod
    def read(cls, text: str) -> Inequality:
        """Read `"mos >= lora - 0.7"` or `"mos >= 0.9 lora"`; UsageError when it is not of that form."""
        match = _INEQUALITY.match(text)
        if match is None:
            raise UsageError(f"{text!r} is no inequality of the form 'a >= b + 1.0' or 'a >= 0.9 b'.")
        left, operator, share, right, sign, margin = match.groups()
        points = float(margin or 0) * (-1 if sign == "-" else 1)
        return cls(left, right, points, float(share or 1), strict=operator == ">")


@dataclass(frozen=True)
class Answers:
    """What one arm answered: predictions [seeds, examples] and the labels [examples]."""

    labels: np.ndarray
    predictions: np.ndarray


def judge(
    inequality: Inequality,
    answers: dict[str, Answers],
    metric: str,
    *,
    together: bool = False,
    base: Answers | None = None,
) -> dict[str, Any]:
    """Measure an inequality: the difference in points with its 95 % interval, and whether it holds.

    True when the interval clears the margin, False when it misses it, else "undecided" with the examples needed.
    together: seed s of both arms shares its labelled rows or its model; see `stats.paired`. Seeds beyond those of the
    other arm are left out, but against a single seed, whose noise the others show.
    base: of bits or nats per text, what the untouched base answers; the sides are then gains over it, of which more is
    better. Without it they are the metric's own values.
    RunFailed names a side that answered nothing.
    """
    for name in (inequality.left, inequality.right):
        if name not in answers:
            asked = f"{inequality.left} and {inequality.right}"
            raise RunFailed(f"arm {name} has no answers, so {asked} cannot be compared: it failed, or was not run.")
    a, b = answers[inequality.left], answers[inequality.right]
    if base is not None:
        # Sums over texts are linear, so a share of a gain is a mixture; what is less is better. The untouched base
        # answers the same in every row, so as many of its rows are taken as the other one has.
        untouched = base.predictions[: len(b.predictions)]
        mixed = inequality.share * b.predictions + (1 - inequality.share) * untouched
        a, b = Answers(a.labels, mixed), a
    elif inequality.share != 1:
        raise UsageError(f"there is no gain over an untouched base in {metric} to take {inequality.share:g} of.")
    least = min(len(a.predictions), len(b.predictions))
    if together and least > 1:
        a, b = (Answers(arm.labels, arm.predictions[:least]) for arm in (a, b))
    together = together and len(a.predictions) == len(b.predictions)
    found = paired(a.labels, a.predictions, b.predictions, metric, together=together)
    points = {k: 100 * float(getattr(found, k)) for k in ("difference", "low", "high")}
    # Identical answers leave no room for doubt: the interval is a point, which reaches its own value and is not above.
    margin, strict = inequality.margin, inequality.strict
    if points["low"] > margin or (points["low"] == margin and not strict):
        holds: Any = True
    elif points["high"] < margin or (points["high"] == margin and strict):
        holds = False
    else:
        holds = "undecided"
    out = {"measured": points["difference"], "low": points["low"], "high": points["high"], "holds": holds}
    if holds == "undecided":
        shifted = abs(points["difference"] - margin) / 100
        out["needed"] = examples_needed(
            a.labels, a.predictions, b.predictions, metric, difference=max(shifted, 1e-4), together=together
        )
    return out


def check(
    name: str,
    *,
    base: str | None = None,
    data: Any = None,
    full: bool = False,
    only: Sequence[int] = (),
    out: str | Path | None = None,
    listen: Listener = lambda event: None,
) -> dict[str, Any]:
    """Re-measure the claims of a method and write `NAME.json`; return what was written.

    `only` are the numbers of the claims that are measured, from 1 as `brickyard show` gives them (default: all); what
    the file says of the others stays, with when, where and how each was measured.

    `base` stands in place of the claims' own, `data` in place of that of the claims whose kind of input it has; a claim
    that takes one of them not says so in its `detail`. An interrupted check goes on where it stopped, as long as the
    code, the libraries, the base and the data are the same; a finished one is measured anew. A claim whose own data are
    not here is skipped, and says why. RunFailed names an arm that did not finish; UsageError an option that no claim of
    the method takes.
    """
    entry, started = registry.find(name), time.monotonic()
    if not entry.record.claims and entry.record.part_of:
        owner = entry.record.part_of
        raise UsageError(f"the claims of {name} stand with {owner}, which it is a part of: brickyard check {owner}.")
    if not entry.record.claims:
        raise UsageError(f"{name} makes no claim that could be checked.")
    folder = Path(out) if out else RESULTS
    if wrong := [number for number in only if not 1 <= number <= len(entry.record.claims)]:
        raise UsageError(f"{name} has no claim {wrong[0]}; they count from 1 to {len(entry.record.claims)}.")
    stated = [c for i, c in enumerate(entry.record.claims, 1) if not only or i in only]
    kept = _before(folder / f"{name}.json", [c.text for c in entry.record.claims if c not in stated])
    claims = [replace(c, **c.full) if full else c for c in stated]
    given: dict[str, Any] = {k: v for k, v in {"base": base, "data": data}.items() if v is not None}
    measures = {c.measure: _measure(entry.path.stem, c.measure) for c in claims if c.measure}
    used = [taken(measures[c.measure]) if c.measure else frozenset(given) for c in claims]
    refuse(name, set(given), set().union(*used))
    measured: list[dict[str, Any] | None] = [None] * len(claims)
    for i, named in enumerate(claims):
        claims[i], used[i], absent = _placed(named, given, used[i])
        if absent:
            measured[i] = _skipped(named, absent)
    if "data" in given and not any("data" in names for names in used):
        raise UsageError(
            f"--data holds another kind of input than what {name} is measured on; see brickyard show {name}."
        )
    # Claims with one set-up share their runs: an arm that stands in several is trained once.
    groups: dict[str, list[int]] = {}
    shared: dict[str, dict[str, Any]] = {}
    for i, claim in enumerate(claims):
        if measured[i] is not None:
            continue
        if claim.measure:
            key = f"{claim.measure} {setup_of(claim)}"
            if key not in shared:
                with heard_by(listen):
                    shared[key] = measures[claim.measure](claim)
            found = shared[key][claim.part] if claim.part else shared[key]
            own = stated[i].data
            chosen = {"data": Path(claim.data).name} if "|" in own and "data" not in used[i] else {}
            measured[i] = {"text": claim.text, "kind": claim.kind, **chosen, **found}
        else:
            groups.setdefault(setup_of(claim), []).append(i)
    folders = []
    for members in groups.values():
        run = _Run.of(name, [claims[i] for i in members], listen, material=_material(claims[members[0]]))
        folders.append(run.folder)
        for i in members:
            measured[i] = run.judge(claims[i])
    for found, names in zip(measured, used, strict=True):
        if found is not None and (left := given.keys() - names):
            found["detail"] = f"{found['detail']} ({left_alone(left)})"
    last: dict[str, Any] = {
        "environment": environment(),
        "full": full,
        "seconds": time.monotonic() - started,
        "date": datetime.now(UTC).date().isoformat(),
    }
    now = {claim.text: {**found, "date": last["date"]} for claim, found in zip(stated, measured, strict=True) if found}
    for text, claim in kept.items():
        kept[text] = {k: v for k, v in claim.items() if k == "date" or k not in OWN or v != last[k]}
    result = {
        "method": name,
        "claims": [{**kept, **now}[c.text] for c in entry.record.claims if c.text in kept or c.text in now],
        **last,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", result)
    for done in folders:
        (done / FINISHED).touch()
    return result


def _before(path: Path, texts: list[str]) -> dict[str, dict[str, Any]]:
    """Return what a file of results says of the claims with these texts, and of the measurement of each."""
    if not texts or not path.is_file():
        return {}
    found = read_json(path)
    shared = {key: found[key] for key in OWN}
    own = [c | {k: v for k, v in shared.items() if k not in c} for c in found["claims"]]
    return {c["text"]: c for c in own if c["text"] in texts}


def setup_of(claim: Claim) -> str:
    """Return what two claims must have in common to share their runs."""
    return str([getattr(claim, name) for name in SETUP])


def _material(claim: Claim) -> tuple[str, str]:
    """Return what identifies the rows and the base of a claim, however they are named."""
    return read_data(claim.data).fingerprint, open_base(claim.base).fingerprint


def _measure(module: str, name: str) -> Callable[[Claim], dict[str, Any]]:
    return getattr(importlib.import_module(f"brickyard.checks.{module}"), name)


@dataclass(frozen=True)
class _Run:
    """The finished comparison behind one or more claims with the same set-up."""

    folder: Path
    result: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    answers: dict[str, Answers]
    controls: dict[str, str]  # (arm, labels) of a control -> its name in the table

    @classmethod
    def of(cls, name: str, claims: list[Claim], listen: Listener, *, material: Sequence[str] = ()) -> _Run:
        """Run every arm and control that the claims name, once each; RunFailed names one that did not finish.

        An interrupted run is found again where all that decides its numbers is the same: `material` identifies the
        data and the base (see `_material`), whose names may come to mean others.
        """
        first = claims[0]
        seeds = tuple(range(1, first.seeds + 1))
        arms: dict[str, Contestant] = {}
        controls: dict[str, str] = {}
        for claim in claims:
            for label, text in claim.arms.items():
                found = Contestant(label, str(parse(text)), _settings(first, text), seeds)
                if arms.setdefault(label, found) != found:
                    raise UsageError(
                        f"the claims of {name} mean two arms by {label!r}: {arms[label].arm} and {found.arm}."
                    )
            if "arm" in claim.control and _control(claim) not in controls:
                label = controls[_control(claim)] = f"control{len(controls) + 1 if controls else ''}"
                changes = {"shuffle_labels": True} if claim.control.get("labels") == "shuffled" else {}
                text = claim.control["arm"]
                few = seeds[: claim.control_seeds or None]
                arms[label] = Contestant(label, str(parse(text)), _settings(first, text), few, changes=changes)
        request = Request(
            methods=tuple(a.arm for a in arms.values()),
            base=first.base,
            data=first.data,
            seeds=first.seeds,
            trials=len(first.lrs or first.lr_factors) or 1,
            train_rows=first.train_rows,
            shots=first.shots,
            max_length=first.max_length or None,
            batch=first.batch or None,
            baselines=any(BASE in (named.left, named.right) or named.share != 1 for named in _inequalities(claims)),
            training={"epochs": first.epochs, "precision": "bfloat16" if cpu_bfloat16_is_fast() else "float32"},
        )
        listed = sorted((a.name, a.arm, str(a.settings), str(a.seeds), str(a.changes)) for a in arms.values())
        folder = RUNS / f"{name}-{key_of([listed, str(request), code_digest(), versions(), *material])}"
        if (folder / FINISHED).exists():
            with Lock(folder / "run.lock"):  # nobody else measures there
                shutil.rmtree(folder)
        result, folder = compare(request, folder, arms=list(arms.values()), listen=listen)
        rows = {row["arm"]: row for row in result["methods"]}
        for label, row in rows.items():
            if row["status"] != "done":
                raise RunFailed(f"check {name}: arm {label} {row['status']}: {row['reason']}")
        answers = {label: _read(folder, row["answers"]) for label, row in rows.items() if "answers" in row}
        some = next(iter(answers.values()))
        if UNTOUCHED in answers:
            answers[BASE] = Answers(some.labels, np.tile(answers[UNTOUCHED].predictions, (first.seeds, 1)))
        elif result["task"]["metric"] in PER_TEXT:
            raise RunFailed(f"check {name}: arm {BASE} (the untouched base) did not finish; see {folder / 'trials'}.")
        else:
            most = int(np.bincount(some.labels.astype(int)).argmax())
            constant = {"coin": np.arange(len(some.labels)) % 2, "majority": np.full(len(some.labels), most)}
            answers |= {k: Answers(some.labels, np.tile(row, (first.seeds, 1))) for k, row in constant.items()}
        return cls(folder, result, rows, answers, controls)

    def _compare(self, claim: Claim, inequality: str, answers: dict[str, Answers]) -> dict[str, Any]:
        together = bool(claim.shots)  # a seed draws its labelled rows, the same for every arm
        metric = self.result["task"]["metric"]
        base = answers.get(BASE) if metric in PER_TEXT else None
        return judge(Inequality.read(inequality), answers, metric, together=together, base=base)

    def judge(self, claim: Claim) -> dict[str, Any]:
        """Judge one claim with its gate and its control."""
        metric = self.result["task"]["metric"]
        names = [*claim.arms, *([self.controls[_control(claim)]] if "arm" in claim.control else [])]
        out: dict[str, Any] = {
            "text": claim.text,
            "inequality": claim.inequality,
            "kind": claim.kind,
            "metric": metric,
            "arms": {label: _arm(self.rows[label]) for label in names},
            "base": self.result["base"]["spec"],
            "data": self.result["data"]["name"],
            "rows": self.result["data"]["rows"],
            "train_rows": claim.train_rows,
            "max_length": claim.max_length or None,
            **self._compare(claim, claim.inequality, self.answers),
            "control": None,
            "gate": None,
        }
        if claim.control:
            answers = dict(self.answers)
            if "arm" in claim.control:
                answers["control"] = answers[self.controls[_control(claim)]]
            found = self._compare(claim, claim.control["inequality"], answers)
            out["control"] = {
                "what": claim.control["what"],
                "inequality": claim.control["inequality"],
                "measured": found["measured"],
                "low": found["low"],
                "high": found["high"],
                "destroyed": found["holds"] is True,
            }
        if claim.gate:
            found = self._compare(claim, claim.gate, self.answers)
            out["gate"] = {"inequality": claim.gate, **{k: found[k] for k in ("measured", "low", "high", "holds")}}
            if found["holds"] is not True:
                out["holds"] = "set-up invalid"
        needed = f"; {out['needed']['sentence']}" if out.get("needed") else ""
        out["at_end_of_grid"] = [label for label in claim.arms if self._at_end(claim, label)]
        unit = f"hundredths of {shown.metric(metric).title.lower()}" if metric in PER_TEXT else "points"
        out["detail"] = f"measured {out['measured']:+.2f} {unit} ({out['low']:+.2f} to {out['high']:+.2f}){needed}"
        if metric in PER_TEXT:
            bare = self.rows[UNTOUCHED]["score"]["mean"]
            gains = {label: 100 * (bare - self.rows[label]["score"]["mean"]) for label in claim.arms}
            out["gains"] = gains
            out["detail"] += f"; gains over the untouched base: {', '.join(f'{k} {v:.2f}' for k, v in gains.items())}"
        if out["at_end_of_grid"]:
            ends = ", ".join(out["at_end_of_grid"])
            out["detail"] += f"; {ends}: the best learning rate is the last of those tried, others may do better"
        return out

    def _at_end(self, claim: Claim, label: str) -> bool:
        """Whether an arm's learning rate is the smallest or the largest of several that were searched."""
        tried = [setting["lr"] for setting in _settings(claim, claim.arms[label]) if setting]
        chosen = parse(self.rows[label]["setting_arm"]).training.get("lr")
        return len(tried) > 1 and chosen in (min(tried), max(tried))


def _placed(claim: Claim, given: dict[str, Any], takes: frozenset[str]) -> tuple[Claim, frozenset[str], str]:
    """Return the claim on the base and data to measure it on, which of `given` it took, and why it cannot be measured.

    Data of another kind of input than the claim's own are not taken, nor any where that kind is not known.
    """
    own, absent = claim.data, ""
    try:
        own = at_hand(claim.data)
    except BadData as error:
        absent = str(error)
    names = takes & given.keys()
    if "data" in names and (absent or not same_input(given["data"], own)):
        names -= {"data"}
    changes = {"data": own, **{name: given[name] for name in names}}
    return replace(claim, **changes), frozenset(names), absent


def _skipped(claim: Claim, why: str) -> dict[str, Any]:
    return {
        "text": claim.text,
        "inequality": claim.inequality or claim.measure,
        "kind": claim.kind,
        "holds": "skipped",
        **dict.fromkeys(("measured", "low", "high", "gate", "control")),
        "detail": why,
    }


def _inequalities(claims: list[Claim]) -> list[Inequality]:
    texts = [text for claim in claims for text in (claim.inequality, claim.gate, claim.control.get("inequality", ""))]
    return [Inequality.read(text) for text in texts if text]


def _control(claim: Claim) -> str:
    return f"{claim.control['arm']}|{claim.control.get('labels', '')}"


def _arm(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "arm": row["setting_arm"],
        "mean": row["score"]["mean"],
        "per_seed": row["score"]["per_seed"],
        "trainable_parameters": row["cost"]["trainable_parameters"],
        "train_seconds": row["cost"]["train_seconds"],
    }


def _settings(claim: Claim, text: str) -> tuple[dict[str, Any], ...]:
    """Return the learning rates that a claim searches for one arm; none for an arm that fixes its own."""
    arm = parse(text)
    if "lr" in arm.training or not (claim.lrs or claim.lr_factors):
        return ({},)
    own = default_point(arm, [("", "lr")])["", "lr"]
    return tuple({"lr": lr} for lr in claim.lrs or [float(f"{own * factor:.6g}") for factor in claim.lr_factors])


def _read(folder: Path, place: str) -> Answers:
    tables = [
        pq.read_table(path, columns=["label", "prediction"]) for path in sorted((folder / place).glob("seed*.parquet"))
    ]
    return Answers(tables[0]["label"].to_numpy(), np.stack([t["prediction"].to_numpy() for t in tables]))
