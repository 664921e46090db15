"""What `evaluate --brick` and `predict --brick` do with a folder of `brickyard route`: every row is routed by its text.

The task's name is never given. Where several heads know the labels of the data, each row is read by the head of the
most probable of their tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from brickyard.core import readers, trial
from brickyard.core.answers import Answers, answer
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.data import Data, read_data
from brickyard.core.documents import EncodedBlocks
from brickyard.core.errors import Refused, UsageError, WrongBase
from brickyard.core.generate import Decoding
from brickyard.core.measure import environment, precision
from brickyard.core.split import Split
from brickyard.core.stats import interval
from brickyard.core.task import PER_TEXT, Task, task_of
from brickyard.route._routed_model import RoutedModel, load_routed, read_manifest
from brickyard.route._router import Routes


@dataclass(frozen=True)
class Judged:
    """Answers to rows with what they are judged by; `labels` are numbered as in `names` where there are classes."""

    answers: Answers
    labels: np.ndarray
    metric: str
    report: dict[str, Any]
    names: tuple[str, ...] = ()

    def score(self) -> dict[str, Any]:
        """Return {"metric", "mean", "low", "high"}."""
        found = interval(self.labels, self.answers.predictions[None], self.metric)
        return {"metric": self.metric, "mean": found.mean, "low": found.low, "high": found.high}


def texts_of(split: Split) -> list[str]:
    """Return what the router reads of each row: its prompt, its text, or its two texts on two lines."""
    if "prompt" in split.columns:
        return split["prompt"]
    if "text_pair" in split.columns:
        return [f"{one}\n{other}" for one, other in zip(split["text"], split["text_pair"], strict=True)]
    if "text" not in split.columns:
        raise Refused(f"a router reads text; the data hold {', '.join(split.columns)}.")
    return split["text"]


def kind_of(source: readers.Source, model_writes: bool, kind: str | None) -> str | None:
    """Say for which task data are read: text without labels is a language model's."""
    if kind is None and model_writes and all("label" not in names for names in source.found.values()):
        return "causal-lm" if any("text" in names for names in source.found.values()) else None
    return kind


def opened(folder: str | Path, base: str | None, force: bool, device: str | None) -> RoutedModel:
    """Open a routed folder and move it to a device; WrongBase where `base` is not the one it was made for."""
    known = read_manifest(Path(folder))["base"]
    if base is not None and not force and (found := open_base(base).fingerprint) != known["fingerprint"]:
        raise WrongBase(
            f"{folder} was routed from base {known['spec']} (fingerprint {known['fingerprint'][:12]}), the base given "
            f"is {base} ({found[:12]}). Leave out --base, for the folder holds all that is needed, or --force."
        )
    return load_routed(folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def evaluate(
    folder: str | Path,
    data: Any,
    *,
    base: str | None = None,
    scale: str | None = None,
    predictions: str | Path | None = None,
    dtype: str = "auto",
    force: bool = False,
    device: str | None = None,
    max_length: int | None = None,
    task: str | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """Score a routed folder on the test rows of `data`; arguments and result as of `api.evaluate`.

    The result also holds "routing": the share of rows by their most probable task, of those under several experts, and
    the mean uncertainty. Raises UsageError where no head knows the data's labels.
    """
    if scale is not None:
        raise UsageError("--scale sweeps the strength of one brick; a routed folder has an expert for each prompt.")
    model = opened(folder, base, force, device)
    source = readers.read(data)
    kind = kind_of(source, model.language is not None, task)
    rows = read_data(source, task=kind, metric=metric, need=("test",))
    routes = model.route(texts_of(rows.splits["test"]))
    wanted = task_of(rows, kind=kind, metric=metric)
    found = judge(model, rows, wanted, routes, routes.w_NT, max_length=max_length, kind=precision(dtype, device))
    score = found.score()
    if wanted.generative and found.metric in PER_TEXT:
        tokens = found.answers.weights.sum()
        score["nats_per_token"] = float(found.answers.predictions.sum() / tokens)
    if predictions is not None:
        if len(found.labels) != len(routes.best_N):
            raise UsageError("a handful of long documents is judged in pieces, out of order; leave out --predictions.")
        trial.write_answers(Path(predictions), found.answers, found.labels)
    return {
        "score": score,
        "examples": len(found.labels),
        "encoding": found.report,
        "routing": about(model, routes),
        "environment": environment(),
    }


def about(model: RoutedModel, routes: Routes) -> dict[str, Any]:
    """Say in numbers where prompts went."""
    shares = np.bincount(routes.best_N, minlength=len(model.tasks)) / len(routes.best_N)
    return {
        "most_probable": {task: float(share) for task, share in zip(model.tasks, shares, strict=True)},
        "blended": float(routes.blended_N.mean()),
        "uncertainty": float(routes.u_N.mean()),
        "prompts_cut": routes.truncated,
    }


def judge(
    model: RoutedModel,
    rows: Data,
    wanted: Task,
    routes: Routes | None,
    w_NT: np.ndarray,
    *,
    heads: Sequence[str] = (),
    max_length: int | None = None,
    kind: str = "float32",
) -> Judged:
    """Answer the test rows, each under its weights of experts (a row of zeros: the dense model alone).

    heads: tasks whose heads may read; by default all that know the labels, the most probable one of `routes` first.
    """
    test = rows.splits["test"]
    if wanted.kind == "preference":
        raise Refused("preferences are judged against the untouched base, which a routed folder does not hold.")
    if wanted.generative:
        return _written(model, test, wanted, w_NT, max_length, kind)
    fits = list(heads) or reading(model, wanted)
    numbers = [model.tasks.index(task) for task in fits]
    which_N = np.zeros(len(test), dtype=np.int64)
    if len(fits) > 1:
        assert routes is not None
        which_N = routes.p_NT[:, numbers].argmax(axis=1)
    names = list(wanted.labels or ())
    predictions = np.zeros(len(test), dtype=np.float64 if wanted.regression else np.int64)
    losses, logits, report = np.zeros(len(test), dtype=np.float32), None, {}
    labels = np.asarray(test["label"])
    for place, task in enumerate(fits):
        index = np.flatnonzero(which_N == place)
        if not len(index):
            continue
        own = model.heads[task].task
        encoded = model.encoded(task, test.take(index), max_length)
        report = {
            **encoded.report,
            "rows": len(test),
            "truncated": report.get("truncated", 0) + encoded.report["truncated"],
        }
        if own.labels is not None:
            encoded.labels = torch.tensor([own.labels.index(names[label]) for label in labels[index]])
        found = model.logits(task, encoded, w_NT[index], precision=kind)
        losses[index] = own.losses(torch.from_numpy(found), encoded.labels).numpy()
        logits = found if len(fits) == 1 else None
        answered = own.predict(found)
        if own.labels is not None:
            names += [label for label in own.labels if label not in names]
            answered = np.asarray([names.index(own.labels[int(a)]) for a in answered])
        predictions[index] = answered
    answers = Answers(predictions, losses, np.ones(len(test)), logits)
    return Judged(answers, labels, wanted.metric, report, tuple(names))


def reading(model: RoutedModel, wanted: Task) -> list[str]:
    """Return the tasks whose heads can read data of a task; UsageError, with what there is, where none can."""
    fits = [
        name
        for name, head in model.heads.items()
        if head.task.input == wanted.input
        and (head.task.labels is None) == (wanted.labels is None)
        and set(wanted.labels or ()) <= set(head.task.labels or ())
    ]
    if not fits:
        known = "; ".join(
            f"{name}: {', '.join(head.task.labels or ('numbers',))}" for name, head in model.heads.items()
        )
        asked = ", ".join(wanted.labels or (wanted.kind,))
        raise UsageError(f"no head of this routed model knows {asked[:200]}; it has {known or 'none'}.")
    return fits


def _written(
    model: RoutedModel, test: Split, wanted: Task, w_NT: np.ndarray, max_length: int | None, kind: str
) -> Judged:
    """Let the language model answer, one set of weights after the other.

    Documents are packed once, as for any other model. Pieces of a block do not see each other, so of the blocks that
    hold a group's documents only these documents' own nats count.
    """
    if model.language is None:
        raise UsageError(f"the data is for {wanted.kind}; this routed model is no language model.")
    whole = encode(test, model.base, wanted, max_length=max_length)
    if isinstance(whole, EncodedBlocks) and len(whole.labels) != len(test):
        return _pieces(model, test, wanted, w_NT, max_length, kind)
    joined: dict[str, np.ndarray] = {}
    for which, index in model.groups(w_NT):
        packed = isinstance(whole, EncodedBlocks)
        own = whole.take(np.flatnonzero(np.isin(whole.columns["units"], index).any(axis=1)) if packed else index)
        with model.activate(which) if which else nullcontext():
            found = answer(model.language, own, wanted, precision=kind)
        for name in ("predictions", "losses", "weights"):
            part = getattr(found, name)
            joined.setdefault(name, np.zeros(len(test), dtype=part.dtype))[index] = part[index] if packed else part
    return Judged(Answers(**joined, logits=None), whole.labels.numpy(), wanted.metric, whole.report)


def _pieces(
    model: RoutedModel, test: Split, wanted: Task, w_NT: np.ndarray, max_length: int | None, kind: str
) -> Judged:
    """Judge a handful of long documents piece by piece, each group packed by itself; pieces come group by group."""
    assert model.language is not None
    found, labels, report = [], [], {}
    for which, index in model.groups(w_NT):
        own = encode(test.take(index), model.base, wanted, max_length=max_length)
        report = report or own.report
        with model.activate(which) if which else nullcontext():
            found.append(answer(model.language, own, wanted, precision=kind))
        labels.append(own.labels.numpy())
    joined = {n: np.concatenate([getattr(part, n) for part in found]) for n in ("predictions", "losses", "weights")}
    return Judged(Answers(**joined, logits=None), np.concatenate(labels), wanted.metric, report)


def predict(
    folder: str | Path,
    data: Any,
    *,
    out: str | Path,
    base: str | None = None,
    dtype: str = "auto",
    force: bool = False,
    device: str | None = None,
    max_length: int | None = None,
    decoding: Decoding | None = None,
) -> dict[str, Any]:
    """Write index, task, prediction and uncertainty of unlabelled rows; arguments as of `api.predict`.

    Each row is answered by the head of its most probable task, or continued where that task is a language model's.
    """
    model = opened(folder, base, force, device)
    test = read_data(data, need=("test",), labelled=False).splits["test"]
    texts = texts_of(test)
    routes = model.route(texts)
    answers: list[Any] = [None] * len(texts)
    truncated = 0
    for number, task in enumerate(model.tasks):
        index = np.flatnonzero(routes.best_N == number)
        if not len(index):
            continue
        if task not in model.heads:
            if max_length is not None:
                raise UsageError("max_length cuts no prompt of a language model; shorten the prompts themselves.")
            chosen, chat = [texts[i] for i in index], "prompt" in test.columns
            made: Sequence[Any] = model.generate(chosen, decoding, chat=chat, w_NT=routes.w_NT[index])
        else:
            if decoding is not None:
                raise UsageError(f"decoding options belong to language models; task {task} has classes or numbers.")
            rows, known = model.encoded(task, test.take(index), max_length), model.heads[task].task
            truncated += rows.report["truncated"]
            found = known.predict(model.logits(task, rows, routes.w_NT[index], precision=precision(dtype, device)))
            made = [known.labels[int(a)] for a in found] if known.labels is not None else found.tolist()
        for i, value in zip(index, made, strict=True):
            answers[i] = value
    if len({type(value) for value in answers}) > 1:  # labels of one task, numbers of another
        answers = list(map(str, answers))
    columns = {
        "index": np.arange(len(texts)),
        "task": [model.tasks[i] for i in routes.best_N],
        "prediction": answers,
        "uncertainty": routes.u_N,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), out)
    return {
        "rows": len(texts),
        "out": str(out),
        "encoding": {"rows": len(texts), "truncated": truncated},
        "routing": about(model, routes),
    }
