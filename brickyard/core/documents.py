"""Documents packed into blocks of tokens, for language models.

Shapes: D documents, U units of the statistics, N blocks of T positions.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from brickyard.core.encoded import IGNORED, Encoded, chunks, known_to
from brickyard.core.errors import BadBase, BadData, UsageError
from brickyard.core.influence import MINIMUM_EXAMPLES
from brickyard.core.task import Task

if TYPE_CHECKING:
    from brickyard.core.base import Base

_BLOCK = 1024  # positions of a block, where the base allows as many


class EncodedBlocks(Encoded):
    """Documents behind one another, cut into blocks of T positions, for language models.

    Each document starts with the start token (`boundary`) and its last target is the end token. A
    document that crosses into the next block goes on there as a new piece: it sees nothing before the cut, and no
    piece ever sees another (`position_ids` start at 0 in each, by which transformers keeps them apart). Only the last
    block may have positions without a target.

    Attributes:
        labels: [U] bytes (or tokens, as the metric wants) of each unit, the denominators of the metric. A unit is a
            document, or a piece where there are too few documents for statistics (`report["unit"]`).
        bytes, tokens: [U] of each unit.
        lengths: [N] T for every block.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        sizes: tuple[np.ndarray, np.ndarray],
        labels: Tensor,
        *,
        report: dict[str, Any],
    ) -> None:
        self.columns, self.labels, self.report, self.labelled = columns, labels, report, True
        self.bytes, self.tokens = sizes
        self.lengths = np.full(columns["ids"].shape[0], columns["ids"].shape[1], dtype=np.int64)

    def collate(self, index: ArrayLike) -> dict[str, Tensor]:
        """Return `input_ids`, `position_ids` and `labels` of blocks, all [n, T]; -100 marks what is not predicted."""
        rows = np.asarray(index, dtype=np.int64)
        targets = torch.from_numpy(self.columns["targets"][rows].astype(np.int64))
        return self._entered({**self._inputs(rows), "labels": targets}, rows)

    def shuffle(self, seed: int) -> None:
        """Take away what tokens say of the next one: deal the targets of every block out anew among its positions."""
        targets_NT = self.columns["targets"].copy()
        draw = np.random.Generator(np.random.PCG64(seed))
        for targets_T in targets_NT:
            predicted_T = targets_T != IGNORED
            targets_T[predicted_T] = draw.permutation(targets_T[predicted_T])
        self.columns = {**self.columns, "targets": targets_NT}
        vars(self).pop("_content", None)

    def parts(self, positions: int) -> list[np.ndarray]:
        """Cut the blocks into batches of about so many positions."""
        return np.array_split(np.arange(len(self)), -(-len(self) // max(1, positions // int(self.lengths[0]))))

    def texts(self, index: ArrayLike) -> dict[str, Tensor]:
        """Return what `collate` does: each position of a block is scored."""
        return self.collate(index)

    def units(self, index: ArrayLike) -> Tensor:
        """Return the unit of every position of blocks: [n, T]."""
        return torch.from_numpy(self.columns["units"][np.asarray(index, dtype=np.int64)].astype(np.int64))

    def _inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        names = {"input_ids": "ids", "position_ids": "positions"}
        return {name: torch.from_numpy(self.columns[key][rows].astype(np.int64)) for name, key in names.items()}

    def take(self, index: ArrayLike) -> EncodedBlocks:
        rows = np.asarray(index, dtype=np.int64)
        columns = {name: values[rows] for name, values in self.columns.items()}
        return EncodedBlocks(columns, (self.bytes, self.tokens), self.labels, report=self.report)

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256(b"blocks")
        for name, values in self.columns.items():
            digest.update(f" {name} {values.dtype} {values.shape} ".encode() + values.tobytes())
        return digest.hexdigest()


def boundary(base: Base) -> tuple[int, int]:
    """Return the tokens that stand before and behind a text.

    Where the tokenizer has no token for the beginning, the end token stands for "nothing before". Raises BadBase where
    it has none for the end.
    """
    tokenizer = base.tokenizer
    end = next((t for t in (tokenizer.eos_token_id, tokenizer.bos_token_id) if t is not None), None)
    if end is None:
        raise BadBase("the base's tokenizer has no end-of-text token; a language model needs one between texts.")
    return end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, end


def encode_documents(texts: list[str], base: Base, task: Task, max_length: int | None) -> EncodedBlocks:
    """Tokenise documents and pack them into blocks of `max_length` positions (the context at most).

    Raises BadBase where the tokenizer has no end token or does not fit the base, BadData where the documents together
    are shorter than one block.
    """
    tokenizer = base.tokenizer
    start, end = boundary(base)
    size = min(max_length or _BLOCK, base.context or _BLOCK)
    if size < 8:
        raise UsageError(f"max_length={max_length}: a block of a language model needs at least 8 positions.")
    parts: list[np.ndarray] = []
    for part in chunks(len(texts)):
        made = tokenizer(texts[part], verbose=False, return_attention_mask=False, add_special_tokens=False)
        parts += [np.fromiter(ids, dtype=np.int32, count=len(ids)) for ids in made["input_ids"]]
    flat = np.concatenate(parts)
    known_to(int(flat.max(initial=0)), max(start, end), base)
    length_D = np.fromiter(map(len, parts), dtype=np.int64) + 1  # positions: every token and the end is a target
    total = int(length_D.sum())
    if total < size:
        raise BadData(
            f"all {len(texts):,} documents together have {total:,} tokens, fewer than one block of {size}; give more "
            "text, or a smaller --max-length."
        )
    start_D = np.cumsum(length_D) - length_D
    document = np.repeat(np.arange(len(parts)), length_D)
    target = np.empty(total, dtype=np.int32)
    last = start_D + length_D - 1
    inside = np.ones(total, dtype=bool)
    inside[last] = False
    target[inside], target[last] = flat, end
    given = np.empty(total, dtype=np.int32)
    given[1:], given[start_D] = target[:-1], start
    place = np.arange(total)
    position = place - np.maximum(start_D[document], place // size * size)
    blocks = -(-total // size)
    unit, names, weights = document, "document", (np.fromiter(map(_size, texts), dtype=np.int64), length_D)
    if len(texts) < MINIMUM_EXAMPLES:
        # A handful of long documents: their pieces are the sample.
        unit = np.cumsum(position == 0) - 1
        tokens = np.bincount(unit)
        share = weights[0][document[position == 0]] * tokens / length_D[document[position == 0]]
        names, weights = "piece of a document", (share, tokens)
    columns = {"ids": given, "targets": target, "positions": position.astype(np.int32), "units": unit.astype(np.int32)}
    fill = {"ids": end, "targets": IGNORED, "positions": 0, "units": 0}
    for name, values in columns.items():
        padded = np.full(blocks * size, fill[name], dtype=np.int32)
        padded[:total] = values
        columns[name] = padded.reshape(blocks, size)
    spare = blocks * size - total
    columns["positions"][-1, size - spare :] = np.arange(spare)  # a piece of its own, so nothing attends to it
    labels = torch.from_numpy(np.asarray(weights[0] if task.metric == "bits_per_byte" else weights[1], np.float64))
    report = {
        "rows": blocks,
        "documents": len(texts),
        "tokens": total,
        "bytes": int(sum(map(_size, texts))),
        "unit": names,
        "units": len(labels),
        "cut": int((position == 0).sum()) - len(texts),
        "wasted": spare / (blocks * size),
        "truncated": 0,
        "longest": size,
        "max_length": size,
    }
    return EncodedBlocks(columns, weights, labels, report=report)


def _size(text: str) -> int:
    return len(text.encode())
