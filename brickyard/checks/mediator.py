"""The claims of `mediator`: one sentence encoder, four tasks, heads fitted on the base, every rival in one table.

Each expert fine-tunes the whole encoder on one task under that task's head. The router reads texts of train alone and
is calibrated on validation; test texts reach it without their task. A fifth task, whose head was fitted on the base
too, has no expert: its texts are routed all the same, once to the most probable expert and once blended.

An example is one test text, its error 0 or 1; every task gives as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from brickyard.checks._sentence_tasks import Course, Experts, State, courses_of, task_sets
from brickyard.checks._takes import takes
from brickyard.checks.lines import Errors
from brickyard.core.base import Base, open_base
from brickyard.core.fitted_head import pooled_states
from brickyard.core.method import Claim
from brickyard.route._conflict import block_tensors, conflict
from brickyard.route._routed_model import RoutedModel
from brickyard.route._router import Router, fit_router, pooled
from brickyard.route.mediator import Config, choose, decompose

SCALES = (0.25, 0.5, 1.0)  # of task arithmetic, tried on validation
DENSITY = 0.1
BYTES = 1.5  # of a weight's own that a kept value with its place may take, by the card


class Routed(Experts):
    """One seed, with a model whose blocks hold sparse experts; the last course is the unseen task."""

    def __init__(self, base: Base, courses: Sequence[Course], claim: Claim, seed: int) -> None:
        self.unseen = courses[-1]
        super().__init__(base, courses[:-1], claim, seed, unseen=courses[-1:])
        self.blocks = block_tensors(base)

    def routed(self, dense: State, chosen: Sequence[int], config: Config) -> RoutedModel:
        """Load the dense model, and return it with sparse experts on the chosen blocks."""
        self.load(dense)
        names = list(self.blocks.values())
        return RoutedModel(self.base, self.network, decompose(dense, self.experts, [names[i] for i in chosen], config))

    def oracle(self, model: RoutedModel, shift: int = 0) -> np.ndarray:
        """Return the errors with each task's own expert active, or (the control) that of a task further on."""
        tasks, out = list(model.tasks), []
        for place, course in enumerate(self.seen):
            with model.activate(tasks[(place + shift) % len(tasks)]):
                out.append(self.of(course))
        return np.concatenate(out)

    def learned(self, model: RoutedModel, course: Course, router: Router) -> np.ndarray:
        """Return a task's errors with experts chosen text by text."""
        w_NT = router.routes(pooled(self.network, course.test, router.reads)).w_NT
        wrong_N = np.zeros(len(course.test))
        for which, index in model.groups(w_NT):
            with model.activate(which):
                rows = course.test.take(index)
                wrong_N[index] = course.wrong(pooled_states(self.network, rows), rows)
        return wrong_N

    @contextmanager
    def low_rank(self, dense: State, chosen: Sequence[int], task: str, bytes_: int) -> Iterator[None]:
        """The rival at equal bytes: the expert's residual in the chosen blocks by fp16 factors of one rank."""
        names = [name for i in chosen for name in list(self.blocks.values())[i] if self.start[name].ndim == 2]
        rank = max(1, bytes_ // (2 * sum(sum(self.start[name].shape) for name in names)))
        state = dict(dense)
        for name in names:
            u_mk, s_k, vh_kn = torch.linalg.svd(self.experts[task][name] - dense[name], full_matrices=False)
            state[name] = dense[name] + (u_mk[:, :rank] * s_k[:rank]).half().float() @ vh_kn[:rank].half().float()
        self.load(state)
        try:
            yield
        finally:
            self.load(dense)


@takes("base")
def by_tasks(
    claim: Claim, *, held: int = 80, test: int = 0, prompts: int = 200, draws: int = 5, routed: int = 0
) -> dict[str, Any]:
    """Measure all claims; see the module's docstring for the set-up. `routed` blocks (0: half of them) are routed.
    Of each task `test` texts are judged (0: a third as many as it trains on, at least 120).

    Random choices are drawn from all sets of as many blocks but the one that the conflict score chose.
    """
    sets, test = task_sets(), test or max(120, claim.train_rows // 3)
    base = open_base(claim.base)
    rows, other = Errors(), Errors()
    counted: list[dict[str, Any]] = []
    config = Config(density=DENSITY)
    for seed in range(1, claim.seeds + 1):
        world = Routed(base, courses_of(sets, base, claim, seed, held, test), claim, seed)
        count = routed or len(world.blocks) // 2
        experts = list(world.experts.values())
        scores = conflict(world.start, experts, world.blocks, rule=config.conflict, trim=config.trim)
        chosen = choose(list(scores.values()), count)
        rows.add("base", world.score(world.start))
        own = []
        for course in world.seen:
            world.load(world.experts[course.name])
            own.append(world.of(course))
        rows.add("experts", np.concatenate(own))
        dense = world.merged("average")
        rows.add("average", world.score(dense))
        rows.add("TIES", world.score(world.merged("TIES")))
        rows.add("task arithmetic", world.score(_best(world)))
        whole = world.routed(dense, range(len(world.blocks)), replace(config, density=1.0, values="float32"))
        rows.add("full routing", world.oracle(whole))
        random = []
        sets_of = [pick for pick in combinations(range(len(world.blocks)), count) if list(pick) != chosen]
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(sets_of))[:draws]
        for pick in order:
            random.append(world.oracle(world.routed(dense, sets_of[int(pick)], config)))
        rows.add("random blocks", np.mean(random, axis=0))
        model = world.routed(dense, chosen, config)
        rows.add("oracle", world.oracle(model))
        rows.add("another task's expert", world.oracle(model, shift=1))
        router = _router(world, prompts, config.router, None)
        rows.add("learned", np.concatenate([world.learned(model, course, router) for course in world.seen]))
        lost = _router(world, prompts, config.router, seed)
        rows.add("router of shuffled tasks", np.concatenate([world.learned(model, c, lost) for c in world.seen]))
        other.add("blended", world.learned(model, world.unseen, router))
        other.add("most probable", world.learned(model, world.unseen, replace(router, u0=1.0)))
        other.add("average", world.of(world.unseen))
        size = model.bytes_held()["experts"] // len(experts)
        svd = []
        for course in world.seen:
            with world.low_rank(dense, chosen, course.name, size):
                svd.append(world.of(course))
        rows.add("low rank at equal bytes", np.concatenate(svd))
        counted.append(_counted(world, model, chosen, router))
        counted[-1] |= {"blocks": chosen, "conflict": list(scores.values())}
        routes = router.routes(pooled(world.network, world.unseen.test, router.reads))
        counted[-1]["blended"] = float(routes.blended_N.mean())
    return judged(rows, other, counted)


def _best(world: Routed) -> State:
    """Return task arithmetic at the scale that is best on validation."""
    found = []
    for scale in SCALES:
        state = world.merged("sum", scale)
        world.load(state)
        found.append((float(world.errors("held").mean()), state))
    return min(found, key=lambda pair: pair[0])[1]


def _router(world: Routed, prompts: int, reads: str, shuffle: int | None) -> Router:
    """Fit the router on texts of train under the dense model; `shuffle` deals the tasks out anew (a control)."""
    parts = [pooled(world.network, c.train.take(np.arange(min(prompts, len(c.train)))), reads) for c in world.seen]
    held = [pooled(world.network, course.held, reads) for course in world.seen]
    if shuffle is not None:
        draw = torch.Generator().manual_seed(shuffle)
        mixed = torch.cat(parts)
        parts = list(mixed[torch.randperm(len(mixed), generator=draw)].split([len(part) for part in parts]))
    return fit_router(parts, held, reads=reads)


def _counted(world: Routed, model: RoutedModel, chosen: Sequence[int], router: Router) -> dict[str, Any]:
    held, names = model.bytes_held(), list(world.blocks.values())
    routed = sum(world.start[name].numel() for i in chosen for name in names[i])
    share = routed / sum(tensor.numel() for tensor in world.start.values())
    one = sum(tensor.numel() * tensor.element_size() for tensor in world.start.values())
    router_bytes = sum(tensor.numel() * tensor.element_size() for tensor in router.tensors().values())
    return {
        "stored": (one + held["experts"] + router_bytes) / one,
        "limit": 1 + BYTES * len(world.experts) * DENSITY * share,
        "stored dense": 1 + len(world.experts) * share,
        "router": router.report["accuracy"],
        "u0": router.u0,
    }


def judged(rows: Errors, other: Errors, counted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the five parts from the errors of every arm and from what was counted."""
    halfway = [0.5 * (a + b) for a, b in zip(rows.rows["average"], rows.rows["experts"], strict=True)]
    rows = Errors({**rows.rows, "halfway": halfway})
    gate = {"inequality": "experts >= base + 1 on their own tasks", **rows.compare("experts", "base", 1.0)}
    figures = {"accuracy": rows.means(), "unseen": other.means(), "counted": list(counted)}
    shown = ", ".join(f"{name} {mean:.1f}" for name, mean in rows.means().items() if name != "halfway")

    def part(inequality: str, found: dict[str, Any], control: dict[str, Any] | None, said: str = "") -> dict[str, Any]:
        span = f"{found['measured']:+.2f} points ({found['low']:+.2f} to {found['high']:+.2f})"
        return {
            "inequality": inequality,
            **found,
            "holds": found["holds"] if gate["holds"] is True else "set-up invalid",
            "detail": f"{span}; {said or f'accuracy: {shown}'}",
            "gate": gate,
            "control": control,
            "figures": figures,
        }

    def against(what: str, arm: str, rival: str, margin: float = 0.0) -> dict[str, Any]:
        found = rows.compare(arm, rival, margin)
        # Equal answers clear a margin of 0, but show no gain that could be gone.
        destroyed = found.pop("holds") is True and found["measured"] > margin
        return {"what": what, "inequality": f"{arm} >= {rival} {margin:+g}", "destroyed": destroyed, **found}

    better = rows.compare("oracle", "random blocks", -0.3)
    if better["holds"] is True and better["measured"] <= 0:
        better["holds"] = False
    stored, limit = (max(float(c[name]) for c in counted) for name in ("stored", "limit"))
    small = {
        "measured": stored,
        "low": stored,
        "high": stored,
        "holds": all(c["stored"] <= c["limit"] for c in counted),
    }
    unseen = ", ".join(f"{name} {mean:.1f}" for name, mean in other.means().items())
    blended = float(np.mean([c["blended"] for c in counted]))
    unseen_part = part(
        "blended >= most probable - 0.5 on an unseen task",
        other.compare("blended", "most probable", -0.5),
        None,
        f"{100 * blended:.0f} % of its texts are blended; accuracy on the unseen task: {unseen}",
    )
    if not blended:  # then both answer alike, whatever blending does
        unseen_part["holds"] = "set-up invalid"
    bytes_part = part("stored <= 1 + 1.5 T density share", small, None)
    return {
        "half the gap": part(
            "oracle >= average + half of (experts - average)",
            rows.compare("oracle", "halfway", 0.0),
            against("each task gets another task's expert", "halfway", "another task's expert"),
        ),
        "conflict": part(
            "conflict >= random blocks - 0.3, and above them in the mean",
            better,
            against("blocks drawn at random", "oracle", "random blocks"),
        ),
        "bytes": {
            **bytes_part,
            "detail": f"{stored:.3f} models are stored, {limit:.3f} are allowed, {len(counted)} seeds",
            "control": {
                "what": "experts' routed blocks stored dense",
                "inequality": "stored dense <= limit",
                **dict.fromkeys(("measured", "low", "high"), float(counted[0]["stored dense"])),
                "destroyed": all(c["stored dense"] > c["limit"] for c in counted),
            },
        },
        "router": part(
            "learned >= oracle - 1.0",
            rows.compare("learned", "oracle", -1.0),
            against("the router's tasks shuffled", "learned", "router of shuffled tasks", 1.0),
        ),
        "unseen": unseen_part,
    }
