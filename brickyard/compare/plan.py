"""Turn a request into a plan that is fixed before the first trial: arms, settings, steps, seeds, workers.

`--minutes` is read here once and never again; what follows only reads plan.json, so a resumed run cannot differ.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brickyard.core import registry
from brickyard.core.arm import Arm, Piece, parse
from brickyard.core.build import RULING, multiplied, times_lr
from brickyard.core.errors import UsageError
from brickyard.core.method import Record
from brickyard.core.trial import Setting

SIDE_BY_SIDE = 1.25  # a trial beside others runs this much slower than in its exclusive probe (memory bandwidth)
START = 3.0  # seconds to start a trial, open the base and read the data
SHORTEST = 0.05  # of an arm's full training, below which its score would say nothing
RUNGS = (1 / 6, 1 / 2)  # shares of the full training that successive halving spends: with KEEP, a third in all
KEEP = 3  # of a rung, one in KEEP goes on


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `brickyard compare` was asked for."""

    methods: tuple[str, ...] = ("linear-probe", "moment-probing", "lora")
    base: str = "embedded:minilm"
    data: Any = "embedded:stdlib-topics"
    minutes: float | None = None
    memory: int | None = None
    seeds: int = 3
    trials: int = 1
    search: str = "random"
    retain: Any = None
    engine: str = "local"
    threads: int = 1
    workers: int | None = None
    task: str | None = None
    metric: str | None = None
    max_length: int | None = None
    batch: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    train_rows: int = 0
    shots: int = 0
    device: str | None = None
    cache: bool = True
    allow_overlap: bool = False
    trust_remote_code: bool = False
    baselines: bool = True

    def __post_init__(self) -> None:
        for name in ("seeds", "trials", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: at least 1 was expected.")
        if self.shots and self.seeds < 2:
            raise UsageError(f"--shots with --seeds {self.seeds}: one draw of examples says little; give 2 or more.")
        if self.search not in ("random", "halving"):
            raise UsageError(f"--search {self.search}: random or halving was expected.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"--minutes {self.minutes}: a positive number was expected.")
        if not self.methods:
            raise UsageError("no arm was given; name at least one, e.g. --methods lora linear-probe.")

    def setting(self, arm: str, seed: int, **changes: Any) -> dict[str, Any]:
        """Return the JSON-like setting of one run."""
        known = {
            "arm": arm,
            "base": self.base,
            "data": self.data,
            "seed": seed,
            "task": self.task,
            "metric": self.metric,
            "max_length": self.max_length,
            "batch": self.batch,
            "training": self.training,
            "device": self.device,
            "train_rows": self.train_rows,
            "shots": self.shots,
            "cache": self.cache,
            "allow_overlap": self.allow_overlap,
            "trust_remote_code": self.trust_remote_code,
            "retain": self.retain,
        }
        return asdict(Setting(**{**known, **changes}))


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison: its name in the table, its arm, the settings to try, its seeds, and what differs."""

    name: str
    arm: str
    settings: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    trivial: bool = False
    changes: dict[str, Any] = field(default_factory=dict)  # of the setting, e.g. {"shuffle_labels": True} in a control


def contestants(request: Request) -> list[Contestant]:
    """Return the arms of a request with their settings; the linear probe joins as a baseline where it is missing."""
    out: list[Contestant] = []
    seen: dict[str, int] = {}
    arms = [parse(text) for text in request.methods]
    for arm in arms:
        for piece in arm.pieces:
            registry.check_options(piece.name, piece.options)
    for arm in arms:
        text = str(arm)
        copy = seen[text] = seen.get(text, 0) + 1
        # The same arm twice is an A/A comparison: its copies must not share their seeds.
        seeds = tuple(1000 * (copy - 1) + s for s in range(1, request.seeds + 1))
        name = text if copy == 1 else f"{text} ({copy})"
        out.append(Contestant(name, text, tuple(settings(arm, request.trials)), seeds))
    if request.baselines and not any(arm.pieces[0].name == "linear-probe" and len(arm.pieces) == 1 for arm in arms):
        probe = parse("linear-probe")
        out.append(
            Contestant(
                "linear-probe",
                "linear-probe",
                tuple(settings(probe, request.trials)),
                tuple(range(1, request.seeds + 1)),
                True,
            )
        )
    return out


def settings(arm: Arm, trials: int) -> list[dict[str, Any]]:
    """Return up to `trials` settings {option or training key: value}: the default first, the rest drawn from the grid.

    What the arm fixes is not searched. The draw is the same every time (seed 0).
    """
    axes: list[tuple[str, str, tuple[Any, ...]]] = []
    for piece in arm.pieces:
        for key, values in sorted(registry.find(piece.name).record.search.items()):
            if key != "lr" and key not in piece.options:
                axes.append((piece.name, key, values))
    # One learning rate serves the arm: the default and the grid of one piece, for what a rate means differs.
    rates = next((record.search.get("lr") for record in _ruling(arm) if "lr" in record.search | record.training), None)
    if rates and "lr" not in arm.training:
        axes.insert(0, ("", "lr", tuple(multiplied(rate, _times(arm)) for rate in rates)))
    grid = [
        dict(zip([(n, k) for n, k, _ in axes], point, strict=True))
        for point in itertools.product(*(v for _, _, v in axes))
    ]
    default = default_point(arm, [(n, k) for n, k, _ in axes])
    rest = [point for point in grid if point != default]
    chosen = np.random.Generator(np.random.PCG64(0)).permutation(len(rest))[: trials - 1]
    return [
        {f"{n}.{k}" if n else k: v for (n, k), v in point.items()}
        for point in [default, *(rest[i] for i in sorted(chosen))]
    ]


def default_point(arm: Arm, axes: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Return the point of the search space at which the methods' own defaults stand."""
    records = {piece.name: registry.find(piece.name) for piece in arm.pieces}
    lr = next((record.training["lr"] for record in _ruling(arm) if "lr" in record.training), 1e-3)
    lr = multiplied(lr, _times(arm))
    return {(n, k): lr if not n else records[n].options[k].default for n, k in axes}


def _ruling(arm: Arm) -> list[Record]:
    """Return the records of an arm's pieces that may say how it trains, the one that has the last word first."""
    found = _by_slot(arm)
    return [found[slot] for slot in reversed(RULING) if slot in found]


def _by_slot(arm: Arm) -> dict[str, Record]:
    return {str(record.slot): record for record in (registry.find(piece.name).record for piece in arm.pieces)}


def _times(arm: Arm) -> float:
    return times_lr(_by_slot(arm))


def with_setting(arm: str, point: Mapping[str, Any]) -> str:
    """Write a search point into an arm."""
    parsed = parse(arm)
    training = {**parsed.training, **{k: v for k, v in point.items() if "." not in k}}
    pieces = tuple(
        Piece(p.name, {**p.options, **{k.split(".", 1)[1]: v for k, v in point.items() if k.startswith(p.name + ".")}})
        for p in parsed.pieces
    )
    return str(Arm(pieces, training))


def record_of(arm: str) -> Record:
    """Return the record of an arm's first piece."""
    return registry.find(parse(arm).pieces[0].name).record


def trial_seconds(probe: Mapping[str, Any], share: float, workers: int) -> float:
    """Predict the seconds of one run of an arm at `share` of its full training, with `workers` runs side by side.

    Building the states it may read is not counted: see `states_seconds`.
    """
    training = probe["training"]
    per_epoch = math.ceil(probe["rows"] / probe["batch"])
    steps = training["steps"] or training["epochs"] * per_epoch
    slow = SIDE_BY_SIDE if workers > 1 else 1.0
    once = slow * steps * share * probe["mean_step_ms"] / 1000
    # Validation rows pass forward once an epoch, test rows once: about a third of a step's time each.
    times = max(1, math.ceil(share * steps / per_epoch))
    passed = times * probe["validation_rows"] + probe["test_rows"]
    evaluating = slow * passed / probe["batch"] * probe["mean_step_ms"] / 1000 / 3
    choosing = slow * probe.get("choosing_seconds", 0.0)
    return START + choosing + once + evaluating


def makespan(runs: Iterable[float], workers: int) -> float:
    """Return when the last of `runs` (seconds each) ends, if each starts as soon as one of `workers` is free."""
    free = [0.0] * workers
    for seconds in runs:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def predict_seconds(
    probes: Mapping[str, Mapping[str, Any]],
    shares: Mapping[str, float],
    workers: int,
    seeds: int,
    trials: int,
    search: str,
) -> float:
    """Predict the seconds until all runs of all arms have ended, each arm at its share of its full training.

    The stages of the search and the final one follow one another, and none is shorter than its longest run: workers
    beyond the number of runs save nothing. Building the states that arms may read is not counted: see
    `states_seconds`.
    """
    stages = [(trials, 1.0)] if search == "random" else [(trials, RUNGS[0]), (math.ceil(trials / KEEP), RUNGS[1])]
    total = 0.0
    for settings, rung in stages:
        if settings > 1:  # one alone needs no choosing
            once = [trial_seconds(probe, rung * shares[name], workers) for name, probe in probes.items()]
            total += makespan((seconds for seconds in once for _ in range(settings)), workers)
    once = [trial_seconds(probe, shares[name], workers) for name, probe in probes.items()]
    return total + makespan(seeds * once, workers)


def states_seconds(probes: Mapping[str, Mapping[str, Any]]) -> float:
    """Predict the seconds of building the states that arms read; arms that read the same ones wait for one building.

    What an objective prepares for the rows of train (a teacher's answers) is counted for each arm.
    """
    built: dict[str, float] = {}
    for probe in probes.values():
        rows = probe["rows"] + probe["validation_rows"] + probe["test_rows"]
        built[probe["states_of"]] = max(built.get(probe["states_of"], 0.0), probe["states_ms_per_row"] * rows / 1000)
    return sum(built.values()) + sum(p.get("prepare_ms_per_row", 0.0) * p["rows"] / 1000 for p in probes.values())


def parts(
    request: Request, probes: Mapping[str, Mapping[str, Any]], shares: Mapping[str, float], trials: int, workers: int
) -> dict[str, float]:
    """Divide the predicted seconds of the whole comparison among the arms, by what one run of each takes."""
    whole = states_seconds(probes)
    whole += predict_seconds(probes, shares, workers, request.seeds, trials, request.search)
    own = {n: states_seconds({n: p}) + trial_seconds(p, shares[n], workers) for n, p in probes.items()}
    return {name: whole * seconds / sum(own.values()) for name, seconds in own.items()}


def shorten(
    request: Request, probes: Mapping[str, Mapping[str, Any]], workers: int
) -> tuple[dict[str, float], int, str]:
    """Return (each arm's share of its full training, trials, a sentence) that fit `request.minutes`.

    Trials go first, then the length of training, down to a twentieth; below that the request is refused. Every arm may
    take the same time; what an arm does not need for its full training goes to the others, so that a slow arm does
    not shorten the fast ones.
    """
    assert request.minutes is not None
    limit = 60 * request.minutes
    full = dict.fromkeys(probes, 1.0)
    states = states_seconds(probes)

    def total(shares: Mapping[str, float], trials: int) -> float:
        return states + predict_seconds(probes, shares, workers, request.seeds, trials, request.search)

    trials = max((k for k in range(1, request.trials + 1) if total(full, k) <= limit), default=1)
    shortest = dict.fromkeys(probes, SHORTEST)
    least = total(shortest, trials)
    if least > limit:
        taken = parts(request, probes, shortest, trials, workers)
        slowest = max(taken, key=taken.__getitem__)
        raise UsageError(
            f"--minutes {request.minutes:g} is too short: a twentieth of the training with one setting and "
            f"{request.seeds} seeds takes about {least / 60:.1f} minutes here, {taken[slowest] / 60:.1f} of them for "
            f"{slowest}. Give more minutes, fewer methods or fewer seeds."
        )
    fixed = {name: trial_seconds(probe, 0.0, workers) for name, probe in probes.items()}
    slope = {name: trial_seconds(probe, 1.0, workers) - fixed[name] for name, probe in probes.items()}

    def within(level: float) -> dict[str, float]:
        # A run of each arm may take so many seconds; all arms have equally many runs.
        return {
            name: min(1.0, max(SHORTEST, math.floor(100 * (level - fixed[name]) / slope[name]) / 100))
            for name in probes
        }

    shares = full
    if total(full, trials) > limit:
        low, high = 0.0, limit
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if total(within(middle), trials) <= limit else (low, middle)
        shares = within(low)
    cut = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share < 1.0]
    said = f"full training of all arms but {', '.join(cut)} of its own" if cut else "full training"
    if len(cut) == len(shares):
        said = f"of the full training, {', '.join(cut)}"
    return (
        shares,
        trials,
        f"{request.minutes:g} minutes: {said}; {trials} of {request.trials} settings an arm, "
        f"about {total(shares, trials) / 60:.1f} minutes predicted",
    )


def key_of(value: Any) -> str:
    """Return a short stable name for a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def workers_of(request: Request) -> int:
    """Return how many trials run side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return request.workers or max(1, cores // request.threads)


def default_folder(request: Request, fingerprint: str) -> Path:
    """Return runs/<hash of the resolved command and data>, so that the same command finds its run again."""
    return Path("runs") / key_of({**asdict(request), "data": fingerprint})
