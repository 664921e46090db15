"""What every kind of encoded rows has in common: labels, lengths, batches, a digest."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from brickyard.core.errors import BadBase

if TYPE_CHECKING:
    from brickyard.core.base import Base
    from brickyard.core.states import States

IGNORED = -100  # label of unlabelled rows: the index that torch's cross entropy skips
_CHUNK = 2048  # rows given to the tokenizer or image processor at once


class Encoded(ABC):
    """The rows of a split as a model reads them.

    Attributes:
        labels: [N] class indices (int64) or values (float32); -100 throughout where the split has no labels.
        lengths: [N] tokens of each row (1 for images).
        report: rows, truncated, longest, max_length, ...: what encoding did; JSON-serialisable.
        entering: states kept of a frozen bottom (see `prefix`), which batches then hold beside the inputs.
    """

    labels: Tensor
    lengths: np.ndarray
    report: dict[str, Any]
    labelled: bool
    entering: States | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, index: ArrayLike) -> dict[str, Tensor]:
        """Return the model inputs of the rows at `index` and, of labelled rows, their "labels"."""
        rows = np.asarray(index, dtype=np.int64)
        inputs = self._inputs(rows)
        if self.labelled:
            inputs["labels"] = self.labels[torch.from_numpy(rows)]
        return self._entered(inputs, rows)

    def keeping(self, states: States) -> Self:
        """Return these rows with the states that a frozen bottom makes of them: batches gain "entering" [n, T, D]."""
        kept = copy.copy(self)
        kept.entering = states
        return kept

    def _entered(self, inputs: dict[str, Tensor], rows: np.ndarray) -> dict[str, Tensor]:
        if self.entering is not None:
            x_NTD = self.entering.collate(rows)["states"][0]
            # The states end with the longest row, the inputs at a multiple.
            width = inputs["input_ids"].shape[1] if "input_ids" in inputs else x_NTD.shape[1]
            short = width - x_NTD.shape[1]
            inputs["entering"] = nn.functional.pad(x_NTD, (0, 0, 0, short)) if short else x_NTD  # pad always copies
        return inputs

    def shuffle(self, seed: int) -> None:
        """Take away what the labels say of the rows: deal them out anew, in place (a negative control)."""
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self))
        self.labels = self.labels[torch.from_numpy(order)]

    @property
    def digest(self) -> str:
        """sha256 over everything that a batch can hold."""
        labels = self.labels.numpy()
        return hashlib.sha256(f"{self._content} {labels.dtype} ".encode() + labels.tobytes()).hexdigest()

    @abstractmethod
    def take(self, index: ArrayLike) -> Encoded:
        """Return the rows at `index`, in its order; the report stays that of the whole."""

    @property
    @abstractmethod
    def _content(self) -> str: ...

    @abstractmethod
    def _inputs(self, rows: np.ndarray) -> dict[str, Tensor]: ...


def known_to(highest: int, pad: int, base: Base) -> None:
    """Stop where the tokenizer gives ids that the base has no embedding for."""
    vocabulary = getattr(base.config, "vocab_size", None)
    if vocabulary is not None and max(highest, pad) >= vocabulary:
        raise BadBase(
            f"the tokenizer gives the id {max(highest, pad)}, but the base has embeddings for {vocabulary} ids only: "
            "the tokenizer belongs to another model. Put the right tokenizer files into the base's folder."
        )


def chunks(rows: int) -> Iterator[slice]:
    """Cut `rows` into slices that are worked on at once."""
    for start in range(0, rows, _CHUNK):
        yield slice(start, min(rows, start + _CHUNK))
