"""The merge engine: streams every tensor of a base and of T models through a rule, piece by piece, into new shards.

    tau      = rule(tau_1, ..., tau_T)         tau_t = theta_t - theta_0, or rule(theta_1, ...) - theta_0
    theta    = theta_0 + s_name tau            s: the rule's own final scale, or what a post-edit makes of it

A worker reads one piece of a tensor from all models, combines it in float32, rounds it once to the stored dtype and
writes it to its place in a shard whose size is known beforehand; several workers do so side by side. Pieces never
depend on each other, and sums over them are taken in their order, so that the result has the same bits whatever the
number of threads. What a rule must know of a whole tensor, or of the whole model, is surveyed first by reading it once
more. Memory does not grow with the model: a few buffers a worker.

Shards are flushed and renamed one by one: whoever is killed finds the complete ones again. Imports neither transformers
nor peft.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from brickyard.core.atomic import room
from brickyard.core.errors import NoEffect, NotFinite, UsageError
from brickyard.core.files import read_json, write_json
from brickyard.merge._inputs import FLOATS, PIECE, Buffers, Files, Source, Stored
from brickyard.merge._layout import INDEX, SHARD, shards, size_of


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + count) of one flattened tensor; `start` is a multiple of PIECE."""

    name: str
    start: int
    count: int


class Survey(Protocol):
    """What a rule must know before it combines: numbers that add up over pieces, read in one or more rounds.

    `scope`: of each tensor by itself, or of the whole model. What is known is JSON-like; it is None before round 0.
    """

    @property
    def scope(self) -> str: ...
    @property
    def rounds(self) -> int: ...
    def count(self, turn: int, base_n: Tensor, models: Sequence[Tensor], known: Any) -> Tensor: ...
    def settle(self, turn: int, total: Tensor, elements: int, known: Any) -> Any: ...


class Rule(Protocol):
    """One way of combining T models, as a frozen object.

    `weights`: it takes and gives weights; else changes of the base's. `scale`: the final scale of the merged change.
    `coefficients` are those of a rule that is a fixed weighted sum of the changes (None: it is not one).
    """

    @property
    def weights(self) -> bool: ...
    @property
    def scale(self) -> float: ...
    def check(self, models: int) -> None: ...
    def survey(self) -> Survey | None: ...
    def combine(self, base_n: Tensor, models: list[Tensor], known: Any, piece: Piece) -> Tensor: ...
    def coefficients(self, models: int) -> tuple[float, ...] | None: ...


@dataclass(frozen=True)
class Norms:
    """L1 norms of the flattened vectors: of the plain sum of the T changes, and of the merged change."""

    models: int
    summed: float
    merged: float


class Edit(Protocol):
    """A post-edit of the merged change: one scale for each tensor. `norms` says whether it must know them.

    `shapes` are those of all floating-point tensors of the base, changed or not; `about` says what was found in them.
    """

    @property
    def norms(self) -> bool: ...
    def check(self, models: int) -> None: ...
    def about(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]: ...
    def scales(self, shapes: Mapping[str, tuple[int, ...]], scale: float, norms: Norms | None) -> dict[str, float]: ...


@dataclass
class Notes:
    """What was seen on the way: which models changed anything, which pairs are equal, what the rule found by tensor."""

    moved: list[bool]
    equal: dict[tuple[int, int], bool]
    known: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, models: int) -> Notes:
        return cls([False] * models, dict.fromkeys(combinations(range(models), 2), True))

    def add(self, other: Notes) -> None:
        """Join what was seen in another part of the model."""
        self.moved = [a or b for a, b in zip(self.moved, other.moved, strict=True)]
        self.equal = {pair: same and other.equal[pair] for pair, same in self.equal.items()}
        self.known |= other.known

    def stored(self) -> dict[str, Any]:
        return {"moved": self.moved, "equal": [p for p, same in self.equal.items() if same], "known": self.known}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Notes:
        equal = {tuple(pair) for pair in stored["equal"]}
        pairs = combinations(range(len(stored["moved"])), 2)
        return cls(list(stored["moved"]), {pair: pair in equal for pair in pairs}, dict(stored["known"]))


class _Workers:
    """Threads with buffers of their own, which run pieces and hand their results back in order."""

    def __init__(self, threads: int, models: int) -> None:
        self.ahead = 2 * threads
        self.files = Files()
        self.kept: dict[Piece, tuple[Tensor, list[Tensor]]] | None = None  # what was read of the tensor in hand
        self._own = threading.local()
        self._models = models
        # Each thread computes alone: pieces are too small to be cut again, and sums must not depend on the count.
        self.pool = ThreadPoolExecutor(threads, "merge", initializer=torch.set_num_threads, initargs=(1,))

    @property
    def buffers(self) -> Buffers:
        if not hasattr(self._own, "buffers"):
            self._own.buffers = Buffers.of(self._models)
        return self._own.buffers

    @contextmanager
    def keeping(self, wanted: bool) -> Iterator[None]:
        """Keep in memory what is read meanwhile, where that is wanted."""
        self.kept = {} if wanted else None
        try:
            yield
        finally:
            self.kept = None

    def run(self, work: Callable[[Piece], Any], pieces: Iterable[Piece]) -> Iterator[Any]:
        """Yield the result of every piece in order; only a few are in memory."""
        waiting: deque[Future[Any]] = deque()
        try:
            for piece in pieces:
                waiting.append(self.pool.submit(work, piece))
                if len(waiting) >= self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def pieces_of(name: str, elements: int) -> Iterator[Piece]:
    """Cut a tensor into pieces."""
    for start in range(0, elements, PIECE):
        yield Piece(name, start, min(PIECE, elements - start))


@dataclass(frozen=True)
class Merge:
    """One merge: a base, its models, the rule and the post-edits. Reads as little of them at a time as it can.

    `fixed` names tensors of the base that no model may change (a task's head, which is never merged).
    """

    base: Stored
    models: Sequence[Source]
    rule: Rule
    edits: Sequence[Edit] = ()
    threads: int = 2
    fixed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("a merge needs at least one model; give them with --bricks.")
        for part in (self.rule, *self.edits):
            part.check(len(self.models))
        if not self.changed:
            raise NoEffect("no model holds a tensor of the base; there is nothing to merge.")

    @property
    def changed(self) -> list[str]:
        """The tensors that any model may change: floating-point ones that one of them holds."""
        return [
            name
            for name, (_, info) in sorted(self.base.places.items())
            if info.dtype in FLOATS
            and info.elements
            and name not in self.fixed
            and any(name in model for model in self.models)
        ]

    @cached_property
    def may_hold(self) -> int:
        """Bytes of weights that may be in memory at once, so that nothing has to be read twice."""
        return 12 * max(info.elements for _, info in self.base.places.values()) + 2**25

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every floating-point tensor of the base that a merge might change, and its shape."""
        places = sorted(self.base.places.items())
        return {name: i.shape for name, (_, i) in places if i.dtype in FLOATS and name not in self.fixed}

    def vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each changed tensor's name and its merged change before the final scale, float32, in its shape."""
        with self._working() as work:
            shared = self._survey_model(work)
            for name in self.changed:
                known = shared if shared is not None else self._survey_tensor(work, name)
                out = torch.empty(self.base.places[name][1].elements)

                def fill(piece: Piece, known: Any = known, out: Tensor = out) -> None:
                    out[piece.start : piece.start + piece.count] = self._change(work, piece, known)

                deque(work.run(fill, pieces_of(name, len(out))), maxlen=0)
                yield name, out.reshape(self.base.places[name][1].shape)

    def scales(self) -> dict[str, float]:
        """Return the final scale of each changed tensor: the rule's own, or what the post-edits make of it."""
        with self._working() as work:
            return self._scales(work, self._survey_model(work))

    def norms(self) -> Norms:
        """Return the L1 norms that a post-edit may ask for."""
        with self._working() as work:
            return self._norms(work, self._survey_model(work))

    def write(self, folder: Path, *, dtype: str | None = None, shard_bytes: int = SHARD) -> dict[str, Any]:
        """Write the merged model's shards and index into `folder`; return what was seen.

        Complete shards that already lie there are kept: the caller vouches that they are of this very merge. `dtype`
        (float32, bfloat16, float16) is that of the result; by default each tensor keeps the base's.

        Returns {"scales", "moved": [T], "identical": [[label, label]], "known", "changed", "copied", "shards"}. Raises
        NotFinite with the tensor's name, NoEffect where a model's change is zero everywhere, DiskFull.
        """
        layout = shards(self.base.places, dtype, shard_bytes)
        with self._working() as work:
            shared = self._survey_model(work)
            scales, notes = self._scales(work, shared), Notes.of(len(self.models))
            for file, header in layout.items():
                notes.add(_Shard(self, work, folder, file, header, scales).write(shared))
        for model, moved in zip(self.models, notes.moved, strict=True):
            if not moved:
                raise NoEffect(
                    f"{model.label} is the base: its change is zero in every tensor, so it would only thin out the "
                    "others. Leave it out."
                )
        if len(layout) > 1:
            places = {name: file for file, header in layout.items() for name in header}
            total = sum(size_of(header) for header in layout.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
        labels = [model.label for model in self.models]
        return {
            "scales": scales,
            "identical": [[labels[a], labels[b]] for (a, b), same in notes.equal.items() if same],
            "known": {"": shared} if shared is not None else notes.known,
            "changed": len(scales),
            "copied": sorted(self.base.places.keys() - scales.keys()),
            "shards": list(layout),
        }

    @contextmanager
    def _working(self) -> Iterator[_Workers]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a second thread of torch's own would spin between the small sums of this one
        work = _Workers(self.threads, len(self.models))
        try:
            yield work
        finally:
            work.pool.shutdown(cancel_futures=True)
            work.files.close()
            torch.set_num_threads(threads)

    def _load(self, work: _Workers, piece: Piece, *, change: bool) -> tuple[Tensor, list[Tensor]]:
        """Read a piece of the base and of every model: weights, or changes; NotFinite names what holds NaN."""
        if work.kept is not None and piece in work.kept:
            return work.kept[piece]
        own = work.buffers if work.kept is None else work.buffers.another(piece.count)
        base_n = own.base[: piece.count]
        self.base.weights(work.files, piece.name, piece.start, base_n, own.raw)
        _assert_finite(base_n, piece.name, self.base.label)
        out = []
        for model, buffer in zip(self.models, own.models, strict=True):
            model_n = buffer[: piece.count]
            if piece.name in model:
                model.read(work.files, piece.name, piece.start, base_n, model_n, own.raw, change=change)
                _assert_finite(model_n, piece.name, model.label)
            elif change:
                model_n.zero_()
            else:
                model_n.copy_(base_n)
            out.append(model_n)
        if work.kept is not None:
            work.kept[piece] = base_n, out
        return base_n, out

    def _change(self, work: _Workers, piece: Piece, known: Any) -> Tensor:
        """Return a piece of the merged change before its final scale."""
        base_n, models = self._load(work, piece, change=not self.rule.weights)
        merged_n = self.rule.combine(base_n, models, known, piece)
        return merged_n - base_n if self.rule.weights else merged_n

    def _survey(self, work: _Workers, names: Sequence[str]) -> Any:
        """Run the rule's survey over some tensors together; None where it has none."""
        survey = self.rule.survey()
        if survey is None:
            return None
        known: Any = None
        elements = sum(self.base.places[name][1].elements for name in names)
        for turn in range(survey.rounds):

            def count(piece: Piece, turn: int = turn, known: Any = known) -> Tensor:
                return survey.count(turn, *self._load(work, piece, change=not self.rule.weights), known)

            total: Tensor | None = None
            for part in work.run(count, (p for n in names for p in pieces_of(n, self.base.places[n][1].elements))):
                total = part if total is None else total.add_(part)
            assert total is not None
            known = survey.settle(turn, total, elements, known)
        return known

    def _survey_model(self, work: _Workers) -> Any:
        survey = self.rule.survey()
        return self._survey(work, self.changed) if survey is not None and survey.scope == "model" else None

    def _survey_tensor(self, work: _Workers, name: str) -> Any:
        survey = self.rule.survey()
        return self._survey(work, [name]) if survey is not None and survey.scope == "tensor" else None

    def _scales(self, work: _Workers, shared: Any) -> dict[str, float]:
        shapes = self.shapes
        scales = dict.fromkeys(shapes, self.rule.scale)
        for edit in self.edits:
            scales = edit.scales(shapes, self.rule.scale, self._norms(work, shared) if edit.norms else None)
        return {name: scales[name] for name in self.changed}

    def _norms(self, work: _Workers, shared: Any) -> Norms:
        """Add up the L1 norms, in float64 and in the order of the pieces."""
        summed = merged = 0.0

        def both(piece: Piece, known: Any) -> tuple[float, float]:
            _, models = self._load(work, piece, change=True)
            total = torch.stack(models).sum(0).abs().sum(dtype=torch.float64)
            change_n = self._change(work, piece, known)
            return float(total), float(change_n.abs().sum(dtype=torch.float64))

        for name in self.changed:
            known = shared if shared is not None else self._survey_tensor(work, name)
            found = work.run(lambda p, k=known: both(p, k), pieces_of(name, self.base.places[name][1].elements))
            for one, other in found:
                summed, merged = summed + one, merged + other
        return Norms(len(self.models), summed, merged)


@dataclass(frozen=True)
class _Shard:
    """One file of the result: written beside its name, flushed, and renamed when it is complete."""

    merge: Merge
    work: _Workers
    folder: Path
    file: str
    header: dict[str, Any]
    scales: Mapping[str, float]

    def write(self, shared: Any) -> Notes:
        """Write the shard, or find it written; return what was seen in it."""
        done, seen = self.folder / self.file, self.folder / f"{self.file}.json"
        if done.is_file() and seen.is_file():
            return Notes.read(read_json(seen))
        raw = json.dumps(self.header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        start = len(raw).to_bytes(8, "little") + raw
        size = len(start) + size_of(self.header)
        part = self.folder / f"{self.file}.part"
        notes = Notes.of(len(self.merge.models))
        with room(done, size):
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.truncate(handle, size)
                _write(handle, memoryview(start), 0)
                for name in self.header:
                    self._tensor(handle, name, len(start) + self.header[name]["data_offsets"][0], shared, notes)
                os.fsync(handle)
            finally:
                os.close(handle)
            write_json(seen, notes.stored())
            os.replace(part, done)
        return notes

    def _tensor(self, handle: int, name: str, at: int, shared: Any, notes: Notes) -> None:
        # What is surveyed tensor by tensor is read several times in a row, which few bytes allow to do once.
        merge, elements = self.merge, self.merge.base.places[name][1].elements
        again = shared is None and name in self.scales and merge.rule.survey() is not None
        with self.work.keeping(again and 4 * elements * (len(merge.models) + 1) <= merge.may_hold):
            self._combined(handle, name, at, shared, notes)

    def _combined(self, handle: int, name: str, at: int, shared: Any, notes: Notes) -> None:
        info, merge, work = self.merge.base.places[name][1], self.merge, self.work
        if name not in self.scales and self.header[name]["dtype"] == info.dtype:
            self._copy(handle, name, at)
            return
        known = shared
        if shared is None and name in self.scales:
            known = merge._survey_tensor(work, name)
            if known is not None:
                notes.known[name] = known
        dtype = FLOATS[self.header[name]["dtype"]]

        def one(piece: Piece) -> Notes:
            # What earlier pieces settled need not be asked again: one that moved, one that differed, is enough.
            seen = Notes(list(notes.moved), dict(notes.equal))
            out_n = self._piece(piece, known, seen)
            raw = work.buffers.raw[: piece.count * dtype.itemsize]
            raw.view(dtype).copy_(out_n)
            _assert_fits(out_n, name, dtype)
            array: Any = raw.numpy()
            _write(handle, memoryview(array), at + piece.start * dtype.itemsize)
            return seen

        for found in work.run(one, pieces_of(name, info.elements)):
            notes.add(found)

    def _piece(self, piece: Piece, known: Any, seen: Notes) -> Tensor:
        """Return a piece of the result in float32."""
        merge, rule = self.merge, self.merge.rule
        base_n, models = merge._load(self.work, piece, change=not rule.weights)
        if piece.name not in self.scales:
            return base_n
        for i, model_n in enumerate(models):
            if not seen.moved[i]:
                seen.moved[i] = not torch.equal(model_n, base_n) if rule.weights else bool(model_n.any())
        seen.equal = {(a, b): same and torch.equal(models[a], models[b]) for (a, b), same in seen.equal.items()}
        scale = self.scales[piece.name]
        merged_n = rule.combine(base_n, models, known, piece)
        if rule.weights:
            return merged_n if scale == 1 else torch.lerp(base_n, merged_n, scale)
        return base_n.add_(merged_n, alpha=scale)

    def _copy(self, handle: int, name: str, at: int) -> None:
        """Copy a tensor's bytes from the base."""
        path, info = self.merge.base.places[name]
        raw = torch.empty(8 * PIECE, dtype=torch.uint8)
        for start in range(info.start, info.end, len(raw)):
            chunk = raw[: min(len(raw), info.end - start)]
            self.work.files.read(path, start, chunk)
            array: Any = chunk.numpy()
            _write(handle, memoryview(array), at + start - info.start)


def _assert_finite(tensor_n: Tensor, name: str, label: str) -> None:
    low, high = tensor_n.aminmax()  # NaN comes through both
    if not (low > -torch.inf and high < torch.inf):
        raise NotFinite(f"{label}: tensor {name} holds NaN or infinity; nothing is merged. Mend or leave out {label}.")


def _assert_fits(out_n: Tensor, name: str, dtype: torch.dtype) -> None:
    """Raise NotFinite where a piece of the result, in float32, is no number or too large for what it is stored as."""
    low, high = out_n.aminmax()
    most = torch.finfo(dtype).max
    if not (low >= -most and high <= most):
        wider = " or give --dtype bfloat16 or float32" if dtype == torch.float16 else ""
        said = str(dtype).removeprefix("torch.")
        raise NotFinite(f"tensor {name} of the merge exceeds {said}; take a smaller scale{wider}. Nothing is kept.")


def _write(handle: int, data: memoryview, at: int) -> None:
    while len(data):
        count = os.pwrite(handle, data, at)
        data, at = data[count:], at + count
