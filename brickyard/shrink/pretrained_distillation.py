"""Pre-trained distillation: pre-train a small network, distil a teacher into it on unlabelled text, then fine-tune it.

    1 pre-train   L1 = - sum over hidden tokens log p(w)              (of a decoder: over all tokens, from the left)
    2 distil      L2 = - sum_c p_t(c | x) log p_s(c | x)              on unlabelled x: soft labels alone, T = 1
    3 fine-tune   L3 = - log p_s(y | x)                               on the labelled rows; optional

A stage of 0 steps is left out, which gives the paper's arms: F = 3, PF = 1+3, D = 2, D+F = 2+3, PD = 1+2, PD+F = 1+2+3.
The student is a network of the base's own class with fewer layers and a smaller width, drawn at random: nothing is
taken over from the teacher, which it meets through raw text and the names of the classes only. Stages 1 and 2 read the
same text: that of `--text` and of the data's train rows, without their labels. Of a language model the classes are the
tokens (see the objective `distil`), and stages 1 and 3 are the same loss.

Source: Turc, Chang, Lee, Toutanova, "Well-Read Students Learn Better: On the Importance of Pre-training Compact
Models", arXiv 1908.08962, sections 2-3. What it claims: pre-training and distillation compound, even on one text, and
PD >= PF >= F. Left out: next-sentence prediction, and the truncation of the teacher, which the paper finds worse.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brickyard.core import registry, trial
from brickyard.core.answers import Answers, Examples, answer
from brickyard.core.attached import Attached
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.brick import Brick
from brickyard.core.checkpoint import same_or_refuse
from brickyard.core.data import Data, read_data
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadData, Refused, UsageError, WrongBase
from brickyard.core.files import complete_folder, read_json, write_json
from brickyard.core.influence import MINIMUM_EXAMPLES
from brickyard.core.loop import Training, train
from brickyard.core.masked import MaskedRows, check_hidden, masked_loss
from brickyard.core.method import Claim, Record
from brickyard.core.objective import Objective, WithColumns, check_head
from brickyard.core.split import Split
from brickyard.core.stats import interval
from brickyard.core.task import Task, task_of
from brickyard.core.teacher import SoftLabels, Teacher, open_teacher, soft_labels
from brickyard.shrink._student import (
    cut_vocabulary,
    pretrained_as,
    save_model,
    scaled_config,
    unknown_share,
    write_student,
)

RECORD = Record(
    name="pretrained-distillation",
    family="shrink",
    title="Pre-train a small network, distil a teacher into it on unlabelled text, then fine-tune it",
    paper="arXiv 1908.08962",
    needs=("text-classification", "pair-classification", "causal-lm"),
    claims=(
        Claim(
            text="At equal optimiser steps PD >= PF >= F, PD is 3 points above F, and pre-training and distillation "
            "compound although both read the same text (PD > D).",
            measure="compound",
            data="embedded:stdlib-topics",
            max_length=64,
            full={"max_length": 128, "train_rows": 500},
        ),
        Claim(
            text="A language model's student that is pre-trained and then distilled from a teacher tuned on the same "
            "text needs fewer nats per token than one trained on that text for as many steps.",
            measure="language_model",
            base="embedded:pylm",
            data="embedded:python-tests",
            train_rows=300,
            max_length=128,
            full={"max_length": 256, "train_rows": 0},
        ),
    ),
)
STUDENT, REPORT = "student", "report.json"
STAGES = ("pretrain", "distil", "tune")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the recipe; UsageError where sizes do not fit each other or no stage has a step."""

    layers: int = 2
    """layers of the student; at most the base's"""
    width: int = 128
    """numbers of each of the student's token states"""
    heads: int = 0
    """attention heads; 0: one for each 64 of the width"""
    feed_forward: int = 0
    """width inside the feed-forward parts; 0: four times the width"""
    vocabulary: int = 0
    """tokens of a vocabulary learned anew from the text; 0 keeps the base's. Not for language models"""
    student: str = ""
    """start from this folder (a public miniature, an earlier OUT/stages/pretrain) in place of a new network"""
    pretrain_steps: int = 1000
    """optimiser steps of stage 1; 0 leaves it out"""
    distil_steps: int = 1000
    """optimiser steps of stage 2; 0 leaves it out"""
    tune_steps: int = 300
    """optimiser steps of stage 3; 0 leaves it out"""
    pretrain_lr: float = 1e-3
    """learning rate of stage 1; small networks want larger ones than their teachers"""
    distil_lr: float = 1e-3
    """learning rate of stage 2"""
    tune_lr: float = 3e-4
    """learning rate of stage 3"""
    mask: float = 0.15
    """share of the tokens hidden in stage 1"""
    temperature: float = 1.0
    """of the soft labels"""
    k: int = 32
    """tokens kept of a language model's soft labels"""
    shuffle: bool = False
    """negative control: every row gets another row's soft labels"""

    def __post_init__(self) -> None:
        heads = self.heads or max(1, self.width // 64)
        if min(self.layers, self.width, heads) < 1 or self.width % heads:
            raise UsageError(
                f"pretrained-distillation: width={self.width} is not divisible by heads={heads}, or layers="
                f"{self.layers} is below 1."
            )
        steps = (self.pretrain_steps, self.distil_steps, self.tune_steps)
        if min(*steps, self.vocabulary, self.feed_forward) < 0 or not sum(steps):
            raise UsageError(f"pretrained-distillation: steps {steps} must be 0 or more, and not all 0.")
        if not 0 < self.mask < 1 or min(self.pretrain_lr, self.distil_lr, self.tune_lr) <= 0:
            raise UsageError(f"pretrained-distillation: mask={self.mask} must lie in (0, 1), and rates above 0.")
        if self.k < 1 or not self.temperature > 0:
            raise UsageError(
                f"pretrained-distillation: k={self.k} must be at least 1, and temperature={self.temperature} above 0."
            )
        if self.student and self.vocabulary:
            raise UsageError("pretrained-distillation: student=... has its own vocabulary; leave vocabulary out.")


@dataclass(frozen=True, kw_only=True)
class Running:
    """How to run, beside the method's own options; `allow_change` names settings that may differ on resuming."""

    seed: int = 0
    batch: int = 32
    max_length: int | None = None
    precision: str = "float32"
    device: str | None = None
    cache: bool = True
    checkpoint_every: int = 200
    allow_change: tuple[str, ...] = ()

    @property
    def place(self) -> torch.device:
        """Where to run."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


class _Tokens:
    """Counts the tokens that a stage read."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths, self.read = lengths, 0

    def after_step(self, state: Any) -> None:
        self.read += int(self.lengths[state.batch_rows].sum())

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


@dataclass
class Recipe:
    """One student in the making: what its stages read, and the folder where each leaves a complete model."""

    base: Base
    config: Config
    running: Running
    task: Task
    data: Data
    text: Split
    teacher: str
    folder: Path

    def start(self) -> Path:
        """Return the folder of the network that the first stage trains, written where it is missing."""
        if self.config.student:
            return Path(self.config.student)
        folder, config = self.folder / "stages" / "start", self.config
        if not folder.is_dir():
            heads = config.heads or max(1, config.width // 64)
            sizes = (config.layers, config.width, heads, config.feed_forward or 4 * config.width)
            tokenizer = self.base.tokenizer
            if config.vocabulary:
                if self.task.generative:
                    raise Refused("a language model's student reads its teacher's tokens; leave vocabulary out.")
                tokenizer, _ = cut_vocabulary(self.base, self.texts, config.vocabulary)
            shaped = scaled_config(self.base.config, *sizes)
            write_student(folder, self.base, shaped, tokenizer, self.running.seed)
        return folder

    @cached_property
    def taught_by(self) -> Teacher:
        """The teacher, opened."""
        return open_teacher(self.teacher, self.task)

    @cached_property
    def teacher_accuracy(self) -> float:
        """The teacher's accuracy on the labelled rows; Refused where it is near chance."""
        labelled = self.data.splits["train"]
        return self._soft(labelled, self._encoded(labelled, self.base), self.base).report["accuracy"]

    @property
    def texts(self) -> list[str]:
        """All texts of the unlabelled pool; both of a pair."""
        return [text for column in self.text.columns.values() for text in column]

    def pretrain(self, student: Base) -> tuple[Attached, Examples, Task, Any]:
        """Stage 1: hidden tokens of the pool, or of a decoder all of them."""
        causal = Task("causal-lm", "nats_per_token", None, 1, "text")
        if student.generative:
            rows = encode(Split({"text": self.texts}), student, causal, max_length=self.running.max_length)
            return _full(student.model(causal, seed=0), causal), rows, causal, {}
        hidden = MaskedRows(self._encoded(self.text, student), student.tokenizer, self.config.mask)
        attached = _full(student.masked_model(), self.task)
        with torch.random.fork_rng(devices=[]):
            check_hidden(attached.model, hidden.collate(np.arange(min(4, len(hidden)))))
        attached.objective = masked_loss
        return attached, hidden, self.task, {}

    def distil(self, student: Base) -> tuple[Attached, Examples, Task, Any]:
        """Stage 2: the teacher's soft labels on the pool, whose own labels nobody reads."""
        rows = self._encoded(self.text, student)
        soft = self._soft(self.text, rows, student)
        if self.config.shuffle:
            soft = soft.shuffled(self.running.seed)
        attached = _full(student.model(self.task, seed=self.running.seed), self.task)
        if self.task.generative:
            check_head(attached.model, rows.collate(np.arange(1)))
        options = {"teacher": self.teacher, "k": self.config.k, "temperature": self.config.temperature}
        attached.objective = Objective(
            registry.load("distil"), registry.config("distil", options), attached, generative=self.task.generative
        )
        report = {**soft.report, "teacher": self.teacher}
        if self.task.labels is not None:
            report["accuracy"] = self.teacher_accuracy
        return attached, WithColumns(rows, soft), self.task, report

    def tune(self, student: Base) -> tuple[Attached, Examples, Task, Any]:
        """Stage 3: the labelled rows, with the output layer that stage 2 left."""
        stored = next(iter(student.config.architectures or []), "").endswith("ForSequenceClassification")
        model = student.model(self.task, seed=self.running.seed, stored_head=stored)
        return _full(model, self.task), self._encoded(self.data.splits["train"], student), self.task, {}

    def _soft(self, split: Split, rows: Encoded, student: Base) -> SoftLabels:
        options = {"k": self.config.k, "temperature": self.config.temperature}
        run = {"max_length": self.running.max_length, "device": self.running.place, "cache": self.running.cache}
        return soft_labels(self.taught_by, split, rows, student, self.task, **options, **run)

    def _encoded(self, split: Split, student: Base) -> Encoded:
        return encode(split, student, self.task, max_length=self.running.max_length)

    def stage(self, name: str, start: Path) -> tuple[Path, dict[str, Any]]:
        """Train one stage on the model in `start` and leave a complete model; return its folder and its report."""
        folder = self.folder / "stages" / name
        if (folder / REPORT).is_file():
            return folder, read_json(folder / REPORT)
        student = open_base(str(start))
        make: Callable[[Base], tuple[Attached, Examples, Task, Any]] = getattr(self, name)
        attached, rows, task, more = make(student)
        running = self.running
        training = Training(
            lr=getattr(self.config, f"{name}_lr"),
            wd=0.01,
            steps=getattr(self.config, f"{name}_steps"),
            batch=min(running.batch, len(rows)),
            seed=running.seed,
            bucket=not task.generative,
            precision=running.precision,  # type: ignore[arg-type]
            checkpoint_every=running.checkpoint_every,
        )
        counted = _Tokens(rows.lengths)
        checkpoints = self.folder / "checkpoints" / name
        trained = train(
            attached,
            rows,
            None,
            task,
            training,
            folder=checkpoints,
            identity={"stage": name, "student": student.fingerprint},
            allow_change=running.allow_change,
            callbacks=(counted,),
            device=running.device,
        )
        report = {
            "steps": trained.steps,
            "seconds": trained.seconds + more.get("seconds", 0.0),
            "tokens": counted.read,
            "rows": len(rows),
            "lr": training.lr,
            "batch": training.batch,
            "history": trained.history,
            **{("teacher" if k == "teacher" else f"teacher_{k}"): v for k, v in more.items()},
        }
        save_model(folder, attached.model.cpu(), student.tokenizer, {REPORT: report})
        shutil.rmtree(checkpoints, ignore_errors=True)
        return folder, report


def run(
    base: Base, bricks: Sequence[Brick], config: Config, data: Any, *, folder: Path, text: Any = None, **running: Any
) -> dict[str, Any]:
    """Make a student in `folder/student`, a complete model, and return the report that stands beside it.

    Args:
        base: what the student is a smaller copy of. With one brick in `bricks`, that brick on it is the teacher; with
            none, the base itself is (a language model, or a classifier with its own output layer).
        data: labelled rows (train, and test if the student shall be scored), or documents of a language model.
        text: more rows or documents without labels, for stages 1 and 2; without it train's own, labels left out.
        running: see `Running`. An interrupted run goes on where it stopped: stage by stage, and inside a stage at its
            last checkpoint.

    Raises Refused where base, task and student do not fit, Changed where `folder` holds another student.
    """
    how = Running(**running)
    known = read_data(data, need=("train",), task="causal-lm" if base.generative else None)
    task = task_of(known, metric="nats_per_token" if base.generative else None)
    if task.kind not in RECORD.needs:
        raise Refused(f"{RECORD.name} works on {', '.join(RECORD.needs)}; this task is {task.kind}.")
    pool = _pool_of(known, text)
    teacher = _teacher_of(base, bricks)
    pretrained_as(base)
    recipe = Recipe(base, config, how, task, known, pool, teacher, folder)
    if config.distil_steps:  # a teacher that does not fit or does not know the task is refused before any training
        _ = recipe.taught_by if task.labels is None else recipe.teacher_accuracy
        recipe.taught_by.model.cpu()  # leaves the device to stage 1
    identity = {
        "config": asdict(config),
        "running": {k: v for k, v in asdict(how).items() if k in ("seed", "batch", "max_length", "precision")},
        "base": base.fingerprint,
        "data": known.fingerprint,
        "teacher": [made.manifest["files"] for made in bricks],
        "text": hashlib.sha256(json.dumps(pool.columns).encode()).hexdigest(),
    }
    _same(folder / "recipe.json", identity, how)
    at, stages = recipe.start(), {}
    for name in STAGES:
        if getattr(config, f"{name}_steps"):
            at, stages[name] = recipe.stage(name, at)
    return _finish(recipe, at, stages)


def _pool_of(data: Data, text: Any) -> Split:
    """Return the unlabelled rows: those of `text` and train's; BadData where they are of different kinds."""
    own = {name: values for name, values in data.splits["train"].columns.items() if name != "label"}
    if text is None:
        return Split(own)
    kind = "causal-lm" if data.kind == "causal-lm" else None
    more = read_data(text, need=("train",), labelled=False, task=kind)
    if more.input != data.input:
        raise BadData(f"the unlabelled text holds {more.input}, the data {data.input}; give the same columns.")
    parts = [more.splits["train"], *([more.splits["validation"]] if more.report["cut"] else [])]
    columns = {name: [v for part in parts for v in part[name]] + own[name] for name in own}
    return Split(columns)


def _in_text(data: Data, text: Split) -> float | None:
    """Return which share of the test rows also stands in the unlabelled text, which a reader must know."""
    if "test" not in data.splits:
        return None
    names = list(text.columns)
    known = set(zip(*(text[name] for name in names), strict=True))
    rows = list(zip(*(data.splits["test"][name] for name in names), strict=True))
    return sum(row in known for row in rows) / len(rows)


def _teacher_of(base: Base, bricks: Sequence[Brick]) -> str:
    if len(bricks) > 1:
        raise UsageError(f"{RECORD.name} learns from one teacher; {len(bricks)} bricks were given.")
    if not bricks:
        return base.spec
    made = bricks[0].manifest["base"]
    if made["fingerprint"] != base.fingerprint:
        raise WrongBase(f"brick {bricks[0].folder} was made for base {made['spec']}, the base given is {base.spec}.")
    return str(bricks[0].folder)


def _same(path: Path, identity: dict[str, Any], how: Running) -> None:
    """Write what decides the student, or refuse a folder that holds another one."""
    if path.is_file():
        same_or_refuse(read_json(path), identity, how.allow_change, str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def _full(model: nn.Module, task: Task) -> Attached:
    return registry.load("full").attach(model, registry.config("full", {}), task)


def _finish(recipe: Recipe, at: Path, stages: dict[str, Any]) -> dict[str, Any]:
    """Copy the last stage's model to its place, score it where there are test rows, and write the report."""
    with complete_folder(recipe.folder / STUDENT) as temporary:  # first, so that no fault of the score costs the model
        for path in at.iterdir():
            if path.is_file() and path.name != REPORT:
                shutil.copyfile(path, temporary / path.name)
    student = open_base(str(at))
    model = _answering(student, recipe.task)
    report: dict[str, Any] = {
        "student": {
            "parameters": sum(p.numel() for p in model.parameters()) if model is not None else None,
            "layers": student.config.num_hidden_layers,
            "width": student.width,
            "vocabulary": len(student.tokenizer),
            "unknown_share": unknown_share(student.tokenizer, recipe.texts),
        },
        "base": recipe.base.spec,
        "data": recipe.data.name,
        "text_rows": len(recipe.text),
        "test_in_text": _in_text(recipe.data, recipe.text),
        "stages": stages,
        "steps": sum(s["steps"] for s in stages.values()),
        "seconds": sum(s["seconds"] for s in stages.values()),
        "tokens": sum(s["tokens"] for s in stages.values()),
    }
    if model is not None and "test" in recipe.data.splits:
        rows = encode(recipe.data.splits["test"], student, recipe.task, max_length=recipe.running.max_length)
        answers: Answers = answer(model.to(recipe.running.place), rows, recipe.task)
        trial.write_answers(recipe.folder / "answers.parquet", answers, rows.labels.numpy())
        report["score"] = _score(recipe.task, rows.labels.numpy(), answers.predictions)
    write_json(recipe.folder / REPORT, report)
    return report


def _score(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
    """Return the test score with its interval; of too few examples the mean alone, and a note that says so."""
    if len(labels) < MINIMUM_EXAMPLES:
        note = f"{len(labels)} test examples are too few for an interval; it takes at least {MINIMUM_EXAMPLES}."
        mean = task.score(labels, predictions)
        return {"metric": task.metric, "mean": mean, "low": None, "high": None, "note": note}
    found = interval(labels, predictions[None], task.metric)
    return {"metric": task.metric, **{k: getattr(found, k) for k in ("mean", "low", "high")}}


def _answering(student: Base, task: Task) -> nn.Module | None:
    """Return the student as it answers the task; None after stage 1 alone, when an encoder has no classes yet."""
    if not task.generative and "Classification" not in next(iter(student.config.architectures or []), ""):
        return None
    return student.model(task, seed=0, stored_head=True)
