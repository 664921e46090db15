"""What each brick on a base improves and what it damages: every brick on every data set, against the bare base.

A data set of documents or completions is put to the language model itself. Rows with labels need a head: the base's is
fitted on its own states of the data's train rows and frozen, and a brick is read through the same head, except where it
was tuned for these very labels and brings its own. So a brick is never blamed, nor praised, for a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brickyard.bricks.adapters import PlainAdapter
from brickyard.bricks.adapters import installed as plain_adapters
from brickyard.compare.plan import key_of
from brickyard.core import brick as bricks
from brickyard.core.answers import answer
from brickyard.core.base import Base, HeadedModel, open_base
from brickyard.core.batches import encode
from brickyard.core.brick import Brick
from brickyard.core.data import read_data
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BrickyardError, DiskFull, Refused, UnsafeFile
from brickyard.core.files import cache_folder, read_json, write_json
from brickyard.core.fitted_head import FittedHead, fit_head
from brickyard.core.influence import LOWER_IS_BETTER
from brickyard.core.progress import tell
from brickyard.core.registry import code_digest
from brickyard.core.retention import inner
from brickyard.core.stats import holm, paired
from brickyard.core.task import Task, task_of

ROWS = 500  # of each data set
HEAD_ROWS = 2000  # of train on which a head is fitted
SURE = 0.05


@dataclass
class Course:
    """One data set as the base reads it, with the head that belongs to the base where it needs one."""

    spec: Any
    base: Base
    device: torch.device
    rows: int
    max_length: int | None

    @cached_property
    def data(self) -> Any:
        """The data, with a test split."""
        kind = "causal-lm" if self.base.generative and _documents(self.spec) else None
        return read_data(self.spec, need=("test",), task=kind)

    @cached_property
    def task(self) -> Task:
        return task_of(self.data)

    @cached_property
    def test(self) -> Encoded:
        """Up to `rows` rows of test, drawn with seed 0."""
        return self._encoded("test", self.rows)

    def _encoded(self, split: str, most: int) -> Encoded:
        whole = self.data.splits[split]
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(whole))[:most]
        return encode(whole.take(np.sort(order).tolist()), self.base, self.task, max_length=self.max_length)

    @cached_property
    def train(self) -> Encoded:
        """The rows on which the base's head is fitted; Refused where there are none."""
        if "train" not in self.data.splits:
            raise Refused(f"{self.data.name} has no train rows, on which a head for the bare base could be fitted.")
        return self._encoded("train", HEAD_ROWS)

    @cached_property
    def head(self) -> FittedHead:
        """The head that is fitted on the base's own states."""
        return fit_head(self.base.backbone().to(self.device), self.train, self.task)

    def at_home(self, brick: Brick | PlainAdapter) -> bool:
        """Whether a brick was tuned for the data's very labels, so that its own head is the right one."""
        if isinstance(brick, PlainAdapter):  # it tells no labels
            return False
        known = brick.task
        if self.task.generative or (known.kind, known.labels) != (self.task.kind, self.task.labels):
            return False
        return known.labels is not None or brick.manifest.get("data", {}).get("name") == self.data.name

    def answers(self, brick: Brick | PlainAdapter | None) -> np.ndarray:
        """Return what the base, or a brick on it, answers to the test rows: [N], remembered in the cache.

        Raises Refused where the two do not go together.
        """
        made = "" if brick is None else brick.made
        alone = self.task.generative or (brick is not None and self.at_home(brick))
        head = "" if alone else self.train.digest
        key = key_of([self.base.fingerprint, made, self.test.digest, head, str(self.task), code_digest()])
        kept = cache_folder() / "bricks" / f"{key}.json"
        with contextlib.suppress(OSError, UnsafeFile, KeyError, TypeError, ValueError):
            known = np.asarray(read_json(kept)["predictions"])
            if len(known) == len(self.test.labels):
                return known
        who = "the base" if brick is None else brick.folder
        tell(f"{self.data.name}: scoring {who} on {len(self.test):,} test rows ...")
        found = answer(self._model(brick).to(self.device), self.test, self.task).predictions
        with contextlib.suppress(OSError, DiskFull):  # only slower next time
            write_json(kept, {"predictions": found.tolist()})
        return found

    def _model(self, brick: Brick | PlainAdapter | None) -> nn.Module:
        if isinstance(brick, PlainAdapter):
            return brick.language_model(self.task) if self.task.generative else HeadedModel(brick.backbone(), self.head)
        if self.task.generative:
            if brick is None:
                return self.base.model(self.task, seed=0)
            if not brick.task.generative:
                raise Refused(f"a brick for {brick.task.kind} writes no text.")
            return brick.apply(self.base).model
        if brick is None:
            return HeadedModel(self.base.backbone(), self.head)
        if self.at_home(brick) and brick.template is not None:
            raise Refused("its own head wants a sentence around every text; score it with brickyard evaluate.")
        model = brick.apply(self.base).model
        return model if self.at_home(brick) else HeadedModel(inner(model), self.head)


def _documents(spec: Any) -> bool:
    """Whether rows of data are text without labels, which a language model reads as documents."""
    from brickyard.core import readers

    source = readers.read(spec)
    return all("text" in names and "label" not in names for names in source.found.values())


def scored(
    folder: str | Path,
    base: str,
    data: Sequence[Any],
    *,
    rows: int = ROWS,
    max_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    left_out: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of `brick.listed` and of plain PEFT adapters, with `data` each with "on": one entry a data set.

    An entry is {"data", "metric", "examples", "base", "brick", "difference", "low", "high", "p", "p_holm", "verdict",
    "head"}: the difference is oriented so that more is better, with its paired 95 % interval, and the verdict is
    "improves" or "damages" where Holm's p over the whole table is below 5 %, else "undecided" or "unchanged". Where a
    brick and data do not go together it is {"data", "verdict": "not scored", "why"}. What is damaged or unsafe is no
    row; why is written to `left_out`, by its folder.
    """
    opened = open_base(base, trust_remote_code=trust_remote_code)
    adapters = plain_adapters(folder, opened, left_out)
    found = bricks.listed(folder, opened.fingerprint) + [adapter.about() for adapter in adapters]
    made: list[Brick | PlainAdapter] = [*bricks.installed(folder, opened.fingerprint, left_out), *adapters]
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not data:
        return found
    courses = [Course(spec, opened, place, rows, max_length) for spec in data]
    for row, brick in zip(found, made, strict=True):
        row["on"] = [_entry(course, brick) for course in courses]
    entries = [entry for row in found for entry in row["on"] if "p" in entry]
    for entry, p in zip(entries, holm([entry["p"] for entry in entries]) if entries else (), strict=True):
        entry["p_holm"] = float(p)
        if entry["verdict"] != "unchanged":
            better = "improves" if entry["difference"] > 0 else "damages"
            entry["verdict"] = better if p < SURE else "undecided"
    return found


def _entry(course: Course, brick: Brick | PlainAdapter) -> dict[str, Any]:
    data, metric, labels = course.data.name, course.task.metric, course.test.labels.numpy()
    try:
        before_N, after_N = course.answers(None), course.answers(brick)
        pair = paired(labels, after_N, before_N, metric)
    except BrickyardError as error:
        return {"data": data, "verdict": "not scored", "why": str(error)}
    sign = -1 if metric in LOWER_IS_BETTER else 1
    low, high = sorted((sign * pair.low, sign * pair.high))
    score = lambda answers_N: float(course.task.score(labels, answers_N))  # noqa: E731
    return {
        "data": data,
        "metric": metric,
        "examples": len(labels),
        "base": score(before_N),
        "brick": score(after_N),
        "difference": sign * pair.difference,
        "low": low,
        "high": high,
        "p": pair.p,
        "verdict": "unchanged" if pair.test == "identical answers" else "undecided",
        "head": "" if course.task.generative else "its own" if course.at_home(brick) else "the base's",
    }
