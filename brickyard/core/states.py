"""Hidden states of a frozen backbone: computed once, kept in half precision, read in every epoch.

The backbone runs without gradients and in evaluation mode (no dropout, fixed batch statistics), so that its states are
a pure function of the input. Only valid tokens are stored, one row of the data after the other, in a file that is
mapped into memory: nothing is read twice and nothing is padded on disk. The file's name is a digest of all that decides
its content, so an entry is never stale; what damages it is found by its checksum, and it is built again.

The states are computed in float32 and rounded when stored. On sentences through all-MiniLM-L6-v2 float16 moves them by
0.02 % (relative norm); bfloat16 autocast in the backbone would by 0.56 %, and is slower on a CPU without units for it.

Beyond its limit an entry is not built: the backbone then runs for every batch (streaming), with the same rounding, and
a warning says so. Nothing is evicted inside a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from brickyard.core import files
from brickyard.core.errors import BadData, DiskFull, NotFinite, Refused, UnknownName, UnsafeFile, UsageError
from brickyard.core.forwards import evaluating
from brickyard.core.locks import waiting

LIMIT = 4 * 2**30  # bytes of one entry
LIMIT_VARIABLE = "BRICKYARD_STATES_LIMIT"
_FORMAT = 1  # of an entry on disk; part of its key
_BATCH_TOKENS, _BATCH_ROWS = 4096, 64  # of one forward pass when building; part of the key, because sums depend on them
_LARGEST = {"float16": 65504.0, "float32": 3.4028234663852886e38}

Dtype = Literal["float16", "float32"]
Pool = Literal["mean", "cls"]


class Rows(Protocol):
    """Encoded rows: what `batches.encode` returns."""

    labels: Tensor
    lengths: np.ndarray

    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def collate(self, index: np.ndarray) -> dict[str, Tensor]: ...


@dataclass(kw_only=True)
class Report:
    """What building did to the states.

    `overflowed` values were beyond the stored type and were set to its largest (a warning says so);
    `largest_rounding` is the largest absolute difference between a state and what is stored of it. `seconds` is what
    building cost, also when the entry was found: who uses a shared entry is charged for it in full.
    """

    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    overflowed: int = 0
    largest_rounding: float = 0.0
    seconds: float = 0.0
    width: int = 0


@dataclass
class States:
    """States of the rows of one split; stands in for `Encoded` in the loop (`collate`, `labels`, `lengths`, `digest`).

    `built`: this call ran the backbone over all rows. `streamed`: it will run for every batch. `forwards`: how often it
    ran so far on behalf of this object. `seconds`, `bytes`: see Report. `path`: the entry on disk, None in memory.
    """

    labels: Tensor
    lengths: np.ndarray
    digest: str
    layers: tuple[int, ...]
    dtype: Dtype
    report: Report
    built: bool = False
    streamed: bool = False
    forwards: int = 0
    path: Path | None = None
    _pieces: list[np.ndarray] = field(default_factory=list, repr=False)  # each [tokens, layers * width]
    _where: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64), repr=False)  # piece, start, count
    _stream: Callable[[np.ndarray], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        backbone: nn.Module,
        encoded: Rows,
        *,
        base: str,
        attention: str = "sdpa",
        layers: Sequence[int] = (-1,),
        pool: Pool | None = None,
        dtype: Dtype | None = None,
        limit: int | None = None,
        cache: bool = True,
    ) -> States:
        """Return the states of every row of `encoded`, from the cache or by running `backbone` on its own device.

        base: fingerprint of the base. layers: -1 is the final state, normalised where the backbone does so; i >= 0 is
        entry i of its `hidden_states` (0: the embeddings). pool: keep one vector per row instead of all its tokens, the
        mean over valid tokens or the first token. dtype: as stored; default float16 for tokens, float32 for pooled
        vectors. limit: bytes; default BRICKYARD_STATES_LIMIT, else 4 GiB. cache: False keeps the states in memory only.
        Raises NotFinite where a state is NaN or infinite, DiskFull where the entry does not fit on the disk, Refused
        where the backbone has no such layers, BadData where there is no row.
        """
        if len(encoded) == 0:
            raise BadData("there is no row whose hidden states could be computed; give at least one.")
        layers = tuple(layers)
        if not layers:
            raise UsageError("layers=(): name at least one layer; -1 is the final state.")
        if pool not in (None, "mean", "cls"):
            raise UnknownName.among("pool of states", str(pool), ("mean", "cls"))
        stored: Dtype = dtype or ("float32" if pool else "float16")
        source = _Source(backbone, encoded, layers, pool, stored)
        made = cls(encoded.labels, encoded.lengths, encoded.digest, layers, source.dtype, Report(rows=len(encoded)))
        limit = entry_limit() if limit is None else limit
        if not cache:
            return made._build(source, limit, None)
        folder = files.cache_folder() / "states"
        folder.mkdir(exist_ok=True)
        entry = folder / source.key(base, attention)
        if made._open(entry):
            return made
        with waiting(entry.with_suffix(".lock")):
            # Whoever held the lock before us may have built just this entry.
            return made if made._open(entry) else made._build(source, limit, entry)

    def __len__(self) -> int:
        return self.report.rows

    @property
    def seconds(self) -> float:
        """Seconds that building cost, in this run or when the entry was made."""
        return self.report.seconds

    @property
    def bytes(self) -> int:
        """Bytes stored; 0 when streamed."""
        return self.report.bytes

    def collate(self, index: np.ndarray) -> dict[str, Any]:
        """Return {"states": (x, mask_BT), "labels"} of the rows `index`, padded with zeros to the longest of them.

        Blocks of documents have no labels, for theirs are the documents'.

        x is float32: x_BTD for one layer, x_LBTD for several (x[i] belongs to layers[i]); T is 1 for pooled states.
        """
        index = np.asarray(index, dtype=np.int64)
        labels = {"labels": self.labels[torch.from_numpy(index)]} if len(self.labels) == len(self) else {}
        if self._stream is not None:
            return {"states": self._stream(index), **labels}
        where = self._where[index]
        longest = int(where[:, 2].max())
        flat = np.zeros((len(index), longest, self._pieces[0].shape[1]), self._pieces[0].dtype)
        mask_BT = torch.from_numpy(np.arange(longest) < where[:, 2:])
        for b, (piece, start, count) in enumerate(where.tolist()):
            flat[b, :count] = self._pieces[piece][start : start + count]
        x = torch.from_numpy(flat).float()
        if len(self.layers) > 1:
            x = x.unflatten(-1, (len(self.layers), -1)).permute(2, 0, 1, 3).contiguous()
        return {"states": (x, mask_BT), **labels}

    def batches(self, order: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        """Collate each array of row numbers in `order`, for example one epoch of `batches.Order`."""
        return (self.collate(index) for index in order)

    def _build(self, source: _Source, limit: int, entry: Path | None) -> States:
        """Run the backbone over all rows into `entry` (None: memory), or set up streaming beyond `limit` bytes."""
        need = source.bytes_needed()
        if need > limit:
            warnings.warn(
                f"the hidden states of {len(self)} rows take {need:,} bytes, beyond the limit of {limit:,}: the "
                f"backbone will run for every batch of every epoch. Raise {LIMIT_VARIABLE} to keep them.",
                stacklevel=3,
            )
            self.streamed, self._stream = True, lambda index: self._count(source, index)
            self.forwards = source.forwards
            return self
        self.built = True
        if entry is None:
            self._fill(source, self._pieces.append)
            return self
        free = shutil.disk_usage(entry.parent).free
        if need > free:
            raise DiskFull(
                f"the hidden states of {len(self)} rows need {need:,} bytes in {entry.parent}, where {free:,} are "
                "free; free some, set BRICKYARD_CACHE to another disk, or keep them in memory with --no-cache."
            )
        with files.complete_folder(entry) as folder:
            with open(folder / "states.bin", "wb") as out:
                self._fill(source, lambda piece: out.write(piece.tobytes()))
            # On disk the pieces stand one after the other.
            starts = np.cumsum([0, *source.piece_tokens[:-1]])
            self._where[:, 1] += starts[self._where[:, 0]]
            self._where[:, 0] = 0
            np.save(folder / "where.npy", self._where, allow_pickle=False)
            about = {"format": _FORMAT, "dtype": self.dtype, "report": asdict(self.report), "layers": list(self.layers)}
            about["sha256"] = {name: files.sha256(folder / name) for name in ("states.bin", "where.npy")}
            files.write_json(folder / "states.json", about)
        self._map(entry)
        return self

    def _fill(self, source: _Source, keep: Callable[[np.ndarray], Any]) -> None:
        """Run the backbone over all rows and hand the stored tokens of each batch to `keep`."""
        started = time.monotonic()
        self._where = np.zeros((len(self), 3), np.int64)
        report = self.report
        for number, rows in enumerate(source.plan):
            x_BTN, mask_BT = source.states(rows, report)
            counts = mask_BT.sum(1).cpu().numpy()
            ends = np.cumsum(counts)
            self._where[rows, 0] = number
            self._where[rows, 1] = ends - counts
            self._where[rows, 2] = counts
            piece = x_BTN[mask_BT].cpu().numpy()
            source.piece_tokens.append(len(piece))
            keep(piece)
            report.bytes += piece.nbytes
            report.tokens += len(piece)
        report.width = source.width
        report.seconds = time.monotonic() - started
        self.forwards = source.forwards
        _warn_overflow(report, self.dtype)

    def _count(self, source: _Source, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Stream the rows `index`: run the backbone and round as storing would."""
        before = self.report.overflowed
        x_BTN, mask_BT = source.states(index, self.report)
        x = x_BTN.float().masked_fill(~mask_BT.unsqueeze(-1), 0)
        self.forwards = source.forwards
        if self.report.overflowed and not before:
            _warn_overflow(self.report, self.dtype)
        if len(self.layers) > 1:
            x = x.unflatten(-1, (len(self.layers), -1)).permute(2, 0, 1, 3).contiguous()
        return x, mask_BT

    def _open(self, entry: Path) -> bool:
        """Map an entry that is there; a damaged one is left to be built again, with a warning."""
        if not (entry / "states.json").is_file():
            return False
        try:
            about = files.read_json(files.plain_file(entry, "states.json"))
            for name, digest in about["sha256"].items():
                if files.sha256(files.plain_file(entry, name)) != digest:
                    raise ValueError(f"the checksum of {name} differs")
            self.report = Report(**about["report"])
            self._where = np.load(entry / "where.npy", allow_pickle=False)
            if self._where.shape != (len(self), 3):
                raise ValueError(f"it holds {len(self._where)} rows, {len(self)} were expected")
            self._map(entry)
        except (UnsafeFile, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"the cached states in {entry} are damaged ({error}); they are built again.", stacklevel=3)
            self.report = Report(rows=len(self))
            return False
        _warn_overflow(self.report, self.dtype)
        return True

    def _map(self, entry: Path) -> None:
        wide = len(self.layers) * self.report.width
        self._pieces = [np.memmap(entry / "states.bin", self.dtype, "r", shape=(self.report.tokens, wide))]
        self.path = entry


class _Source:
    """The backbone with the rows to run: yields states as they will be stored."""

    def __init__(
        self, backbone: nn.Module, encoded: Rows, layers: tuple[int, ...], pool: Pool | None, dtype: Dtype
    ) -> None:
        self.backbone, self.encoded, self.layers, self.pool = backbone, encoded, layers, pool
        self.dtype: Dtype = dtype
        self.parameter = next(backbone.parameters())
        self.forwards, self.width = 0, 0
        self.piece_tokens: list[int] = []
        self._first: tuple[np.ndarray, Tensor, Tensor] | None = None

    def key(self, base: str, attention: str) -> str:
        """Digest of everything that decides the states, down to what decides the order of their sums."""
        parts = {
            "format": _FORMAT,
            "batch": [_BATCH_TOKENS, _BATCH_ROWS],
            "base": base,
            # Labels decide nothing here, where the rows can tell their content apart from them.
            "rows": getattr(self.encoded, "content", self.encoded.digest),
            "layers": list(self.layers),
            "pool": self.pool,
            "dtype": self.dtype,
            "computed in": str(self.parameter.dtype),
            "attention": attention,
            "device": self.parameter.device.type,
            "threads": torch.get_num_threads(),
            "matmul": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def plan(self) -> list[np.ndarray]:
        """The rows, sorted by length, in batches of about equal work; long rows first, so that memory peaks early."""
        rows = np.argsort(-self.encoded.lengths, kind="stable")
        out, at = [], 0
        while at < len(rows):
            take = int(max(1, min(_BATCH_ROWS, _BATCH_TOKENS // max(1, self.encoded.lengths[rows[at]]))))
            out.append(rows[at : at + take])
            at += take
        return out

    def bytes_needed(self) -> int:
        """Bytes of the whole entry, from the shape of the first batch and the lengths of the rows."""
        first = self.plan[0]
        x_BTN, mask_BT = self._run(first)
        # The pass is not lost: `states` takes it over.
        self._first = first, x_BTN, mask_BT
        if self.pool:
            tokens = len(self.encoded)
        elif int(mask_BT.sum()) == int(self.encoded.lengths[first].sum()):
            tokens = int(self.encoded.lengths.sum())
        else:  # images: as many tokens in each
            tokens = len(self.encoded) * mask_BT.shape[1]
        return tokens * x_BTN.shape[-1] * np.dtype(self.dtype).itemsize

    def states(self, rows: np.ndarray, report: Report) -> tuple[Tensor, Tensor]:
        """Return the states [B,T,layers*width] of `rows` in the stored type, and mask_BT; T is 1 when pooled."""
        if self._first is not None and np.array_equal(rows, self._first[0]):
            _, x_BTN, mask_BT = self._first
        else:
            x_BTN, mask_BT = self._run(rows)
        self._first = None
        valid = mask_BT.unsqueeze(-1)
        finite = (x_BTN.isfinite() | ~valid).flatten(1).all(1)
        if not finite.all():
            row = int(rows[int((~finite).nonzero()[0])])
            raise NotFinite(f"the hidden states of row {row} hold NaN or infinity; the base or that row is damaged.")
        if self.pool == "cls":
            x_BTN, mask_BT = x_BTN[:, :1], mask_BT[:, :1]
        elif self.pool == "mean":
            x_BTN = x_BTN.masked_fill(~valid, 0).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
            mask_BT = torch.ones_like(mask_BT[:, :1])
        largest = _LARGEST[self.dtype]
        kept = x_BTN.clamp(-largest, largest).to(getattr(torch, self.dtype))
        inside = x_BTN.abs() <= largest
        valid = mask_BT.unsqueeze(-1)
        report.overflowed += int((~inside & valid).sum())
        rounding = ((kept.float() - x_BTN).abs() * (inside & valid)).max().item()
        report.largest_rounding = max(report.largest_rounding, rounding)
        return kept, mask_BT

    @torch.no_grad()
    def _run(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Run the backbone on `rows`: float32 states [B,T,layers*width] and mask_BT."""
        inputs = {k: v.to(self.parameter.device) for k, v in self.encoded.collate(rows).items() if k != "labels"}
        with evaluating(self.backbone):
            output = self.backbone(**inputs, **({"output_hidden_states": True} if self.layers != (-1,) else {}))
        self.forwards += 1
        found = [_layer(output, layer) for layer in self.layers]
        if len({x.shape for x in found}) > 1:
            raise Refused(
                f"layers {self.layers} have states of different shapes {[tuple(x.shape[1:]) for x in found]}; "
                "choose layers of one shape."
            )
        self.width = found[0].shape[-1]
        mask = inputs.get("attention_mask")
        b, t = found[0].shape[:2]
        mask_BT = torch.ones(b, t, dtype=torch.bool, device=self.parameter.device) if mask is None else mask.bool()
        empty = (~mask_BT.any(1)).nonzero()
        if mask_BT.shape != (b, t) or len(empty):
            what = f"row {int(rows[int(empty[0])])} has none" if len(empty) else f"the mask is {tuple(mask_BT.shape)}"
            raise BadData(f"each row needs a valid token among its states [{b}, {t}]; {what}.")
        return torch.cat(found, dim=-1).float(), mask_BT


def tokens(state: Tensor) -> Tensor:
    """Return a state as tokens [B,T,D]: a map [B,C,H,W] becomes H*W tokens of C channels."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


def _layer(output: Any, layer: int) -> Tensor:
    if layer == -1:
        return tokens(output.last_hidden_state)
    hidden = output.hidden_states
    if hidden is None or not -len(hidden) <= layer < len(hidden):
        many = "none" if hidden is None else f"0 to {len(hidden) - 1}"
        raise Refused(f"the backbone has no hidden state {layer}; it gives {many}, and -1 for the final state.")
    return tokens(hidden[layer])


def entry_limit() -> int:
    """Return how many bytes one cache entry may take; beyond them it is not built."""
    given = os.environ.get(LIMIT_VARIABLE, "")
    if not given:
        return LIMIT
    if not given.isdecimal():
        raise UsageError(f"{LIMIT_VARIABLE}={given!r}: a whole number of bytes was expected, e.g. {LIMIT}.")
    return int(given)


def _warn_overflow(report: Report, dtype: str) -> None:
    if report.overflowed:
        warnings.warn(
            f"{report.overflowed} hidden values lay beyond {dtype} and were set to its largest, {_LARGEST[dtype]:g}; "
            "store these states as float32.",
            stacklevel=4,
        )
