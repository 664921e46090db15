"""Several sentence tasks on one encoder: a head each, fitted on the base and frozen, and an expert each, tuned whole.

An example is one test text, its error 0 or 1; every task gives as many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from brickyard.checks._data import at_hand
from brickyard.core import readers, registry
from brickyard.core.attached import attach_in_place
from brickyard.core.base import Base, HeadedModel
from brickyard.core.batches import encode
from brickyard.core.data import Data, read_data
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadData
from brickyard.core.fitted_head import FittedHead, fit_head, pooled_states
from brickyard.core.loop import Training, train
from brickyard.core.method import Claim
from brickyard.core.names import same_names
from brickyard.core.task import Task, task_of
from brickyard.merge.task_arithmetic import add_up
from brickyard.merge.ties import ties

PUBLIC = ("trec", "sst2", "cola", "embedded:stdlib-topics", "cr")
FALLBACK = "embedded:stdlib-topics"  # whose topics are dealt out where the public sets are not here
TIES_DENSITY = 0.2
RATE = 3e-4  # at full tuning's own 1e-4 experts gained five or six points, of which merging had little to lose

State = dict[str, Tensor]


@dataclass
class Course:
    """One task's rows for one seed, and its head."""

    name: str
    task: Task
    train: Encoded
    held: Encoded
    test: Encoded
    head: FittedHead | None = None

    def wrong(self, v_ND: Tensor, rows: Encoded) -> np.ndarray:
        """Whether each row is answered wrongly by the head, from pooled states: [N]."""
        assert self.head is not None
        guessed = (v_ND @ self.head.weight_KD.T + self.head.bias_K).argmax(-1)
        return (guessed != rows.labels).double().numpy()


def task_sets(names: Sequence[str] = PUBLIC) -> list[Data]:
    """Return the tasks' data: the public sets, or as many groups of the embedded topics."""
    try:
        return [read_data(at_hand(name), need=("train", "validation", "test")) for name in names]
    except BadData:
        splits = readers.read(FALLBACK).splits
    topics = sorted(set(splits["train"]["label"]))
    groups = [set(topics[place :: len(names)]) for place in range(len(names))]
    if min(map(len, groups)) < 2:
        raise BadData(f"{FALLBACK} has {len(topics)} topics; two for each of {len(names)} tasks were expected.")
    return [read_data(_only(splits, group), need=("train", "validation", "test")) for group in groups]


def _only(splits: Mapping[str, Mapping[str, list]], labels: set[str]) -> dict[str, dict[str, list]]:
    out = {}
    for split, columns in splits.items():
        kept = [i for i, label in enumerate(columns["label"]) if label in labels]
        out[split] = {name: [columns[name][i] for i in kept] for name in ("text", "label")}
    return out


def courses_of(sets: Sequence[Data], base: Base, claim: Claim, seed: int, held: int, test: int) -> list[Course]:
    """Draw a seed's train rows, and the same held-out and test rows for all seeds."""
    out = []
    for place, data in enumerate(sets):
        task = task_of(data)
        rows = {}
        for split, count, draw in (("train", claim.train_rows, seed), ("validation", held, 0), ("test", test, 0)):
            order = np.random.Generator(np.random.PCG64([draw, place])).permutation(len(data.splits[split]))
            part = data.splits[split].take(order[: count or None])
            rows[split] = encode(part, base, task, max_length=claim.max_length or None)
        out.append(Course(f"{place} {data.name}", task, rows["train"], rows["validation"], rows["test"]))
    fewest = min(len(course.test) for course in out)
    for course in out:
        course.test = course.test.take(np.arange(fewest))  # every task weighs the same
    return out


class Experts:
    """One seed: base, heads, experts, and a network that any of their combinations can be loaded into.

    A course of `unseen` gets a head, but no expert.
    """

    def __init__(
        self, base: Base, courses: Sequence[Course], claim: Claim, seed: int, unseen: Sequence[Course] = ()
    ) -> None:
        self.base, self.network = base, base.backbone().requires_grad_(False)
        held = self.network.state_dict()
        self.own = {b: own for b, own in same_names(base.weights, held).own.items() if held[own].is_floating_point()}
        self.start = {name: held[own].clone() for name, own in self.own.items()}
        self.seen = list(courses)
        self.experts: dict[str, State] = {}
        for course in (*courses, *unseen):
            course.head = fit_head(self.network, course.train, course.task)
        preferred = registry.find("full").record.training
        length = {"epochs": claim.epochs, "batch": claim.batch or 16, "seed": seed, "lr": RATE}
        for course in self.seen:
            assert course.head is not None
            model = HeadedModel(base.backbone(), course.head)
            names = [name for name, _ in model.named_parameters() if name.startswith("backbone.")]
            attached = attach_in_place(model, names, matched={"backbone": names})
            training = Training(**{**preferred, **length})
            train(attached, course.train, None, course.task, training, device="cpu")
            trained = model.backbone.state_dict()
            self.experts[course.name] = {name: trained[own].detach().clone() for name, own in self.own.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        held = self.network.state_dict()
        for name, tensor in state.items():
            held[self.own[name]].copy_(tensor)

    def taus(self, name: str) -> list[Tensor]:
        return [(expert[name] - self.start[name]).flatten() for expert in self.experts.values()]

    def merged(self, how: str, scale: float = 1.0) -> State:
        """Return the base with the experts' merged change: their mean, their sum, or TIES of each tensor."""
        out = {}
        for name, start in self.start.items():
            taus = self.taus(name)
            change = (
                ties(taus, TIES_DENSITY) if how == "TIES" else add_up(taus) / (len(taus) if how == "average" else 1)
            )
            out[name] = start + scale * change.view_as(start)
        return out

    def errors(self, split: str = "test") -> np.ndarray:
        """Return every task's errors behind one another, with the network as it is loaded."""
        return np.concatenate([self.of(course, split) for course in self.seen])

    def of(self, course: Course, split: str = "test") -> np.ndarray:
        rows = getattr(course, split)
        return course.wrong(pooled_states(self.network, rows), rows)

    def score(self, state: Mapping[str, Tensor]) -> np.ndarray:
        self.load(state)
        return self.errors()
