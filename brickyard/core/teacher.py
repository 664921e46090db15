"""A teacher's soft labels: a model run once over the rows of train, its answers kept on disk for every epoch.

The teacher runs in float32, in evaluation mode and without gradient; only what a loss needs is kept:

    a classifier       its logits [K] for each row, in float32: few numbers
    a language model   at each token that is predicted, log q of its k most probable tokens and of all others together
                       (the tail, one bucket more, so that the k + 1 probabilities sum to one), in float16

q = softmax(logits / temperature). float16 moves a log-probability by at most 0.05 %; what is read back is normalised
again. The folder of an entry is named after a digest of all that decides its content, as in `states`.
Shapes: N rows, M answers (rows, or predicted tokens), K classes, k kept tokens, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from brickyard.core import brick as bricks
from brickyard.core import files
from brickyard.core.answers import Examples, to_device
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadBase, DiskFull, NotFinite, Refused, UnsafeFile
from brickyard.core.locks import waiting
from brickyard.core.objective import check_head, language_model, states
from brickyard.core.split import Split
from brickyard.core.states import LIMIT_VARIABLE, entry_limit
from brickyard.core.task import Task

_FORMAT = 1  # of an entry on disk; part of its key
_ROWS, _TOKENS = 64, 4096  # of one forward pass; part of the key, because sums depend on them
_LOGITS = 1 << 22  # of a language model computed at once: 16 MiB in float32
_LEAST = -65504.0  # float16's; stands for log 0
_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls classes that nobody named
_DOUBT = 3.0  # standard errors by which a teacher must beat the most frequent class


@dataclass(frozen=True)
class Teacher:
    """A trained model that teaches. `digest` says which weights it has; `max_length` is its brick's own."""

    spec: str
    model: nn.Module
    base: Base
    task: Task
    digest: str
    max_length: int | None


def open_teacher(spec: str, task: Task, *, trust_remote_code: bool = False, attention: str = "sdpa") -> Teacher:
    """Open a brick's folder, or a base with its own output layer, as a teacher of `task`.

    Raises BadBase or BadBrick where there is none, Refused where it was trained for another kind of task or for other
    classes.
    """
    max_length = None
    if (Path(spec) / bricks.MANIFEST).is_file():
        made = bricks.load(spec)
        base = open_base(made.manifest["base"]["spec"], trust_remote_code=trust_remote_code)
        model, known = made.apply(base, attention=attention).model, made.task
        max_length = made.manifest.get("max_length")
        content = [made.manifest["arm"], made.manifest["files"], base.fingerprint]
    else:
        try:
            base = open_base(spec, trust_remote_code=trust_remote_code)
            known = base.own_task
        except BadBase as error:
            raise BadBase(f"the teacher cannot be opened: {error}") from error
        model = base.model(known, seed=0, attention=attention, stored_head=True)
        content = [base.fingerprint]
    if known.generative != task.generative or (known.labels is None) != (task.labels is None):
        raise Refused(f"teacher {spec} was trained for {known.kind}; it cannot teach {task.kind}.")
    if task.labels is not None:
        class_order(known.labels or (), task.labels, spec)
    digest = hashlib.sha256(json.dumps([content, known.labels, attention], sort_keys=True).encode()).hexdigest()
    return Teacher(spec, model.requires_grad_(False).eval(), base, known, digest, max_length)


def class_order(theirs: tuple[str, ...], ours: tuple[str, ...], spec: str) -> list[int]:
    """Return where each of our classes stands among a teacher's; Refused where the sets differ.

    Classes that nobody named (LABEL_0, ...) are taken in their order, which its accuracy will prove or disprove.
    """
    if len(theirs) == len(ours) and all(map(_UNNAMED.fullmatch, theirs)):
        return list(range(len(ours)))
    if set(theirs) != set(ours):
        more, fewer = sorted(set(theirs) - set(ours))[:5], sorted(set(ours) - set(theirs))[:5]
        raise Refused(
            f"teacher {spec} knows other classes than the data: it alone has {more}, the data alone {fewer}; "
            "give a teacher that was tuned on these labels."
        )
    return [theirs.index(name) for name in ours]


def same_vocabulary(teacher: Base, base: Base, spec: str) -> None:
    """Refuse a teacher whose token ids mean other tokens than the base's."""
    theirs, ours = teacher.tokenizer.get_vocab(), base.tokenizer.get_vocab()
    different = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if different:
        shown = ", ".join(f"{token!r} ({theirs.get(token)} there, {ours.get(token)} here)" for token in different[:3])
        raise Refused(
            f"teacher {spec} has another vocabulary ({len(theirs):,} tokens, the base {len(ours):,}): "
            f"{len(different):,} tokens have other ids, such as {shown}. Give a teacher with the base's own tokenizer."
        )


def truncate(logits_MV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log q [M, k+1] of the k most probable tokens and of the tail, and the tokens [M, k].

    q = softmax(logits / temperature); the tail is log(0) = -inf where k is the whole vocabulary.
    """
    log_q = (logits_MV.float() / temperature).log_softmax(1)
    top_Mk, tokens_Mk = log_q.topk(min(k, log_q.shape[1]), dim=1)
    tail_M = log_q.scatter(1, tokens_Mk, -torch.inf).logsumexp(1)
    return torch.cat([top_Mk, tail_M[:, None]], 1), tokens_Mk


@dataclass
class SoftLabels:
    """A teacher's answers to the rows of train, as `objective.Columns`.

    Attributes:
        report: positions, bytes, seconds (what building cost, also when the entry was found), streamed; of classes,
            where rows have labels, `accuracy`; unless streamed also `entropy` (mean, in nats) and of tokens
            `kept_mass`, the mean probability that the k tokens hold together.
        digest: of the teacher, the rows and the options.
    """

    digest: str
    counts: np.ndarray  # [N] answers of each row
    report: dict[str, Any]
    values: np.ndarray | None = None  # [M, K] logits, or [M, k+1] log q
    tokens: np.ndarray | None = None  # [M, k]
    order: np.ndarray | None = None  # [M] whose answers each place gets, where they are shuffled
    path: Path | None = None
    _stream: Callable[[np.ndarray], tuple[Tensor, ...]] | None = field(default=None, repr=False)

    @property
    def seconds(self) -> float:
        return self.report["seconds"]

    def collate(self, index: np.ndarray) -> tuple[Tensor, ...]:
        """Return the answers to the rows `index`, one behind the other: logits [m, K]; or log q [m, k+1], tokens."""
        index = np.asarray(index, dtype=np.int64)
        if self._stream is not None:
            return self._stream(index)
        assert self.values is not None
        place = _places(self.counts, index)
        if self.order is not None:
            place = self.order[place]
        found = (torch.from_numpy(self.values[place]),)
        return found if self.tokens is None else (*found, torch.from_numpy(self.tokens[place].astype(np.int64)))

    def shuffled(self, seed: int) -> SoftLabels:
        """Return the same answers given to other rows (or tokens) at random: nothing can be learned from them."""
        if self._stream is not None:
            raise Refused("answers that are streamed cannot be shuffled; raise their limit to keep them.")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(int(self.counts.sum()))
        return replace(self, order=order, digest=f"{self.digest} shuffled {seed}")


def soft_labels(
    teacher: Teacher,
    split: Split | None,
    encoded: Encoded,
    base: Base,
    task: Task,
    *,
    k: int = 32,
    temperature: float = 1.0,
    max_length: int | None = None,
    device: torch.device | None = None,
    cache: bool = True,
) -> SoftLabels:
    """Run the teacher over rows, or take its answers from the cache.

    Args:
        split: the raw rows that `encoded` holds: a classifier reads them with its own tokenizer. Where they have
            labels, its accuracy must show that it knows the task. Not read for language models.
        encoded, base: the rows as the student reads them: a language model reads the same token ids.
        k, temperature: of a language model; see `truncate`.
        max_length: tokens to which a classifier's rows are cut, where its brick does not say.

    Raises Refused for another vocabulary, a context that is too short, or a teacher near chance; DiskFull.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.model.to(device)
    source: _Classes | _Tokens
    if task.generative:
        source = _Tokens(teacher, encoded, base, k, temperature, device)
    else:
        assert split is not None and task.labels is not None
        rows = encode(split, teacher.base, teacher.task, max_length=teacher.max_length or max_length)
        source = _Classes(teacher, rows, class_order(teacher.task.labels or (), task.labels, teacher.spec), device)
    made = _kept(source, cache)
    if isinstance(source, _Classes):
        if made.values is not None:
            logits = torch.from_numpy(np.array(made.values))
            made.report["entropy"] = float(torch.distributions.Categorical(logits=logits).entropy().mean())
        if split is not None and "label" in split.columns:
            made.report["accuracy"] = _knows(_said(made, source), torch.tensor(split["label"]), teacher.spec)
    return made


def _said(made: SoftLabels, source: _Classes) -> Tensor:
    """Return the most probable class [N] of each row; where answers are streamed the teacher runs for it here."""
    if made.values is not None:
        return torch.from_numpy(np.array(made.values)).argmax(1)
    started = time.monotonic()
    said_N = torch.empty(len(source.counts), dtype=torch.int64)
    for rows in _plan(source.rows.lengths):
        said_N[torch.from_numpy(rows)] = source.run(rows)[0].argmax(1)
    made.report["seconds"] += time.monotonic() - started
    return said_N


def _knows(said_N: Tensor, labels_N: Tensor, spec: str) -> float:
    """Return the teacher's accuracy; Refused where it does not clearly beat the most frequent class."""
    hits = float((said_N == labels_N).double().mean())
    majority = float(labels_N.bincount().max()) / len(labels_N)
    needed = majority + _DOUBT * (majority * (1 - majority) / len(labels_N)) ** 0.5
    if hits <= min(needed, 1 - 1e-9):
        raise Refused(
            f"teacher {spec} is right on {hits:.1%} of the {len(labels_N):,} labelled rows, and the most frequent "
            f"class alone on {majority:.1%}: its outputs stand in another order than the labels, or it learned nothing."
        )
    return hits


def _places(counts: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return where the answers of the rows `index` lie when those of all rows lie one behind the other."""
    starts = np.cumsum(counts) - counts
    wanted = counts[index]
    return np.repeat(starts[index] - (np.cumsum(wanted) - wanted), wanted) + np.arange(wanted.sum())


def _plan(lengths: np.ndarray) -> list[np.ndarray]:
    """Cut the rows, sorted by length, into batches of about equal work."""
    rows, out, at = np.argsort(-lengths, kind="stable"), [], 0
    while at < len(rows):
        take = int(max(1, min(_ROWS, _TOKENS // max(1, lengths[rows[at]]))))
        out.append(rows[at : at + take])
        at += take
    return out


class _Classes:
    """A classifier with rows in its own encoding; its outputs in the order of our classes."""

    def __init__(self, teacher: Teacher, rows: Examples, order: list[int], device: torch.device) -> None:
        self.teacher, self.rows, self.order, self.device = teacher, rows, order, device
        self.counts = np.ones(len(rows), dtype=np.int64)
        self.widths = (len(order), 0)
        self.dtype = np.dtype(np.float32)
        self.options: dict[str, Any] = {"order": order}

    @torch.no_grad()
    def run(self, index: np.ndarray) -> tuple[Tensor, ...]:
        """Return float32 logits [n, K] of the rows `index`."""
        batch = {k: v for k, v in self.rows.collate(index).items() if k != "labels"}
        logits = self.teacher.model(**to_device(batch, self.device)).logits.float()[:, self.order]
        return (_finite(logits, self.teacher.spec).cpu(),)


class _Tokens:
    """A language model with rows in the student's encoding, which is its own."""

    def __init__(
        self, teacher: Teacher, rows: Encoded, base: Base, k: int, temperature: float, device: torch.device
    ) -> None:
        same_vocabulary(teacher.base, base, teacher.spec)
        longest = int(rows.lengths.max())
        if teacher.base.context is not None and longest > teacher.base.context:
            raise Refused(
                f"teacher {teacher.spec} reads at most {teacher.base.context} tokens, the rows have up to {longest}; "
                f"say --max-length {teacher.base.context}."
            )
        check_head(teacher.model, to_device(rows.collate(np.arange(1)), device))
        self.teacher, self.rows, self.device, self.temperature = teacher, rows, device, temperature
        # An output layer may be padded beyond the vocabulary, by other amounts in a model's several sizes.
        self.known = max(base.tokenizer.get_vocab().values()) + 1
        self.k = min(k, self.known)
        plan = _plan(rows.lengths)
        self.counts = np.zeros(len(rows), dtype=np.int64)
        for part in plan:
            self.counts[part] = (rows.collate(part)["labels"] >= 0).sum(1).numpy()
        self.widths = (self.k + 1, self.k)
        self.dtype = np.dtype(np.float16)
        self.options = {"k": self.k, "temperature": temperature, "known": self.known}

    @torch.no_grad()
    def run(self, index: np.ndarray) -> tuple[Tensor, ...]:
        """Return log q [m, k+1] in float16 and tokens [m, k] at the predicted places of the rows `index`."""
        batch = to_device(self.rows.collate(index), self.device)
        plain = language_model(self.teacher.model)
        head: nn.Linear = plain.get_output_embeddings()  # type: ignore[operator,assignment]
        hidden_MD = states(plain, batch)[batch["labels"] >= 0]
        step = max(1, _LOGITS // head.out_features)
        parts = [
            truncate(_finite(head(part).float()[:, : self.known], self.teacher.spec), self.k, self.temperature)
            for part in hidden_MD.split(step)
        ]
        log_q = torch.cat([log_q for log_q, _ in parts]).clamp(min=_LEAST).half()
        return log_q.cpu(), torch.cat([tokens for _, tokens in parts]).cpu()


def _finite(logits: Tensor, spec: str) -> Tensor:
    if not logits.isfinite().all():
        raise NotFinite(f"teacher {spec} answers with NaN or infinity; it is damaged, or was trained too fast.")
    return logits


def _kept(source: _Classes | _Tokens, cache: bool) -> SoftLabels:
    """Return the answers from their cache entry, built where it is missing, or streamed where it would be too large."""
    made = SoftLabels(_digest(source), source.counts, {})
    total = int(source.counts.sum())
    need = total * (source.widths[0] * source.dtype.itemsize + 4 * source.widths[1])
    if need > entry_limit():
        warnings.warn(
            f"the teacher's answers to {len(source.counts):,} rows take {need:,} bytes, beyond the limit of "
            f"{entry_limit():,}: it will run for every batch of every epoch. Raise {LIMIT_VARIABLE} to keep them.",
            stacklevel=4,
        )
        made._stream = source.run
        made.report = {"positions": total, "bytes": 0, "seconds": 0.0, "streamed": True}
        return made
    if not cache:
        return _build(made, source, total)
    folder = files.cache_folder() / "teachers"
    folder.mkdir(exist_ok=True)
    entry = folder / _key(made.digest, source)
    with waiting(entry.with_suffix(".lock")):
        if _opened(made, entry, source, total):
            return made
        free = shutil.disk_usage(folder).free
        if need > free:
            raise DiskFull(
                f"the teacher's answers need {need:,} bytes in {folder}, where {free:,} are free; free some, set "
                "BRICKYARD_CACHE to another disk, or keep them in memory with --no-cache."
            )
        _build(made, source, total)
        with files.complete_folder(entry) as temporary:
            assert made.values is not None
            made.values.tofile(temporary / "values.bin")
            if made.tokens is not None:
                made.tokens.tofile(temporary / "tokens.bin")
            digests = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
            files.write_json(temporary / "answers.json", {"report": made.report, "sha256": digests})
    made.path = entry
    return made


def _build(made: SoftLabels, source: _Classes | _Tokens, total: int) -> SoftLabels:
    """Run the teacher over all rows into memory."""
    started = time.monotonic()
    made.values = np.empty((total, source.widths[0]), source.dtype)
    made.tokens = np.empty((total, source.widths[1]), np.int32) if source.widths[1] else None
    for rows in _plan(source.rows.lengths):
        place = _places(source.counts, rows)
        values, *tokens = source.run(rows)
        made.values[place] = values.numpy()
        if made.tokens is not None:
            made.tokens[place] = tokens[0].numpy()
    size = made.values.nbytes + (0 if made.tokens is None else made.tokens.nbytes)
    made.report = {"positions": total, "bytes": size, "seconds": time.monotonic() - started, "streamed": False}
    if made.tokens is not None:
        made.report |= _spread(made.values)
    return made


def _spread(log_q: np.ndarray) -> dict[str, float]:
    """Return the mean probability outside the tail and the mean entropy of the kept distribution, in nats."""
    mass = entropy = 0.0
    for part in np.array_split(log_q, -(-len(log_q) // 65536)):
        normal = torch.from_numpy(part).float().log_softmax(1).double()
        mass += float((1 - normal[:, -1].exp()).sum())
        entropy -= float((normal.exp() * normal).sum())
    return {"kept_mass": mass / len(log_q), "entropy": entropy / len(log_q)}


def _opened(made: SoftLabels, entry: Path, source: _Classes | _Tokens, total: int) -> bool:
    """Map an entry that is there; a damaged one is left to be built again, with a warning."""
    if not (entry / "answers.json").is_file():
        return False
    try:
        about = files.read_json(files.plain_file(entry, "answers.json"))
        for name, digest in about["sha256"].items():
            if files.sha256(files.plain_file(entry, name)) != digest:
                raise ValueError(f"the checksum of {name} differs")
        made.report = dict(about["report"])
        made.values = np.memmap(entry / "values.bin", source.dtype, "r", shape=(total, source.widths[0]))
        if source.widths[1]:
            made.tokens = np.memmap(entry / "tokens.bin", np.int32, "r", shape=(total, source.widths[1]))
    except (UnsafeFile, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"the teacher's answers in {entry} are damaged ({error}); it runs again.", stacklevel=4)
        return False
    made.path = entry
    return True


def _digest(source: _Classes | _Tokens) -> str:
    parts = [source.teacher.digest, source.rows.digest, source.options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _key(digest: str, source: _Classes | _Tokens) -> str:
    """Digest of everything that decides the answers, down to what decides the order of their sums."""
    parts = {
        "format": _FORMAT,
        "batch": [_ROWS, _TOKENS],
        "answers": digest,
        "device": source.device.type,
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
