"""Prompts with their answers, for language models: one completion each, a preferred and a rejected one, or choices.

Shapes: N examples, S texts (N completions, 2N of a preference set, all choices of a multiple-choice set), T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from brickyard.core.documents import boundary
from brickyard.core.encoded import IGNORED, Encoded, known_to
from brickyard.core.errors import BadData, UsageError
from brickyard.core.split import Split

if TYPE_CHECKING:
    from brickyard.core.base import Base
    from brickyard.core.task import Task


class EncodedCompletions(Encoded):
    """Texts of a prompt and an answer; only the answer and the end token behind it are targets.

    A row is one example. For training it gives its completion; its chosen and its rejected text; or its right choice.

    Attributes:
        labels: [N] the denominators of the metric (bytes or tokens of the completion), 1 for preference pairs (the
            chosen text should win), or the place of the right choice.
        lengths: [N] positions of the longest text that training reads of each example.
        bytes, tokens: [S] of each answer (the end token is a token).
        reference: [S] nats of each answer by the untouched base, once `trial` has measured them; preference sets only.
        instructions: batches say which tokens are the prompt's (`instruction_mask`), for models that read them apart.
    """

    def __init__(
        self,
        flat: dict[str, np.ndarray],
        count_N: np.ndarray,
        labels: Tensor,
        *,
        kind: str,
        pad: int,
        report: dict[str, Any],
    ) -> None:
        self.flat, self.count_N, self.labels = flat, count_N, labels
        self.kind, self.pad, self.report = kind, pad, report
        self.labelled = True
        self.bytes, self.tokens = flat["bytes"], flat["lengths"] - flat["prompts"]
        self.first_N = np.cumsum(count_N) - count_N
        self._starts = np.cumsum(flat["lengths"] + 1) - (flat["lengths"] + 1)
        self.reference: np.ndarray | None = None
        self.instructions = False
        self.swapped = np.zeros(len(count_N), dtype=bool)
        read_KN = self._read(np.arange(len(count_N)))
        self.lengths = flat["lengths"][read_KN].max(axis=0)

    def __len__(self) -> int:
        return len(self.count_N)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Return the texts that training reads: [1, n], or of pairs [2, n]."""
        if self.kind == "preference":
            swapped = self.swapped[rows]
            return np.stack([self.first_N[rows] + swapped, self.first_N[rows] + ~swapped])
        offset = self.labels.numpy()[rows] if self.kind == "multiple-choice" else 0
        return (self.first_N[rows] + offset)[None]

    def shuffle(self, seed: int) -> None:
        """Take away what the examples say: a fair coin says which text of a pair was chosen, or which choice is right.

        Raises UsageError for completions, which have no label.
        """
        if self.kind == "instruct":
            raise UsageError("completions have no labels that could be shuffled; as a control, use other prompts.")
        g = np.random.Generator(np.random.PCG64(seed))
        if self.kind == "preference":
            self.swapped = g.random(len(self)) < 0.5
        else:
            self.labels = torch.from_numpy((g.random(len(self)) * self.count_N).astype(np.int64))
        self.lengths = self.flat["lengths"][self._read(np.arange(len(self)))].max(axis=0)

    def collate(self, index: ArrayLike) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, all [n, T]; of pairs [2n, T], the chosen texts first.

        -100 marks what is not predicted.
        """
        return self.texts(self._read(np.asarray(index, dtype=np.int64)).ravel())

    def texts(self, index: ArrayLike) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` of the texts at `index`: [s, T]."""
        s = np.asarray(index, dtype=np.int64)
        length_S = self.flat["lengths"][s]
        column_T = np.arange(length_S.max())
        inside_ST = column_T < length_S[:, None]
        place_ST = np.where(inside_ST, self._starts[s][:, None] + column_T, 0)
        ids_ST = np.where(inside_ST, self.flat["ids"][place_ST], self.pad)
        asked_ST = inside_ST & (column_T >= self.flat["prompts"][s][:, None])
        targets_ST = np.where(asked_ST, self.flat["ids"][place_ST + 1], IGNORED)
        out = {
            "input_ids": torch.from_numpy(ids_ST.astype(np.int64)),
            "attention_mask": torch.from_numpy(inside_ST.astype(np.int64)),
            "labels": torch.from_numpy(targets_ST.astype(np.int64)),
        }
        if self.instructions:  # the last token of a prompt predicts the first of the answer
            out["instruction_mask"] = torch.from_numpy(inside_ST & (column_T <= self.flat["prompts"][s][:, None]))
        return out

    def units(self, index: ArrayLike) -> Tensor:
        """Return the text of every position of `texts(index)`: [s, T]."""
        s = np.asarray(index, dtype=np.int64)
        return torch.from_numpy(np.repeat(s[:, None], self.flat["lengths"][s].max(), axis=1))

    def parts(self, positions: int) -> list[np.ndarray]:
        """Cut the texts, sorted by length, into batches of about so many positions."""
        length_S = self.flat["lengths"]
        order = np.argsort(length_S, kind="stable")
        batch = np.cumsum(length_S[order]) // positions
        return np.split(order, np.flatnonzero(np.diff(batch)) + 1)

    def by_example(self, values_S: np.ndarray) -> np.ndarray:
        """Lay values of texts out by example: [S] -> [N, most choices]; -inf where an example has fewer."""
        out = np.full((len(self), int(self.count_N.max())), -np.inf)
        example_S = np.repeat(np.arange(len(self)), self.count_N)
        out[example_S, np.arange(len(values_S)) - self.first_N[example_S]] = values_S
        return out

    def margin(self, nats_S: np.ndarray) -> np.ndarray:
        """Return by how many nats the chosen text gained on the rejected one, against the untouched base: [N]."""
        if self.reference is None:
            raise UsageError("a preference is judged against the untouched base, whose nats were not measured.")
        gain_N2 = self.by_example(self.reference - nats_S)
        return gain_N2[:, 0] - gain_N2[:, 1]

    def take(self, index: ArrayLike) -> EncodedCompletions:
        rows = np.asarray(index, dtype=np.int64)
        count = self.count_N[rows]
        s = np.repeat(self.first_N[rows] - (np.cumsum(count) - count), count) + np.arange(count.sum())
        size_S = self.flat["lengths"] + 1
        place = np.repeat(self._starts[s] - (np.cumsum(size_S[s]) - size_S[s]), size_S[s]) + np.arange(size_S[s].sum())
        flat = {name: self.flat[name][s] for name in ("lengths", "prompts", "bytes")}
        flat["ids"] = self.flat["ids"][place]
        made = EncodedCompletions(
            flat, count, self.labels[torch.from_numpy(rows)], kind=self.kind, pad=self.pad, report=self.report
        )
        made.swapped, made.instructions = self.swapped[rows], self.instructions
        made.reference = None if self.reference is None else self.reference[s]
        return made

    def _inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {k: v for k, v in self.collate(rows).items() if k != "labels"}

    @property
    def _content(self) -> str:
        digest = hashlib.sha256(f"completions {self.kind} {self.pad}".encode())
        for name, values in {**self.flat, "count": self.count_N, "swapped": self.swapped}.items():
            digest.update(f" {name} {values.dtype} {values.shape} ".encode() + values.tobytes())
        return digest.hexdigest()


def prompt_ids(base: Base, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Tokenise prompts: the start token and the text; with `chat` a user's turn in the chat template, if there is one.

    A prompt is tokenised by itself, as it will be when the model is asked, so no token straddles prompt and answer.
    """
    tokenizer = base.tokenizer
    if chat and tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in prompts]
        return [
            list(ids) for ids in tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ]
    start, _ = boundary(base)
    return [[start, *ids] for ids in tokenizer(list(prompts), verbose=False, add_special_tokens=False)["input_ids"]]


def encode_completions(split: Split, base: Base, task: Task, max_length: int | None) -> EncodedCompletions:
    """Tokenise prompts and their answers. An answer too long for `max_length` (the context at most) is cut and counted.

    Raises BadData where a prompt alone fills the limit, UsageError for a limit below 8.
    """
    tokenizer = base.tokenizer
    _, end = boundary(base)
    limit = min((n for n in (max_length, base.context) if n is not None), default=None)
    if limit is not None and limit < 8:
        raise UsageError(f"max_length={max_length}: texts of a language model need at least 8 positions.")
    answers: list[list[str]] = {
        "instruct": lambda: [[text] for text in split["completion"]],
        "preference": lambda: [[*pair] for pair in zip(split["chosen"], split["rejected"], strict=True)],
        "multiple-choice": lambda: split["choices"],
    }[task.kind]()
    count_N = np.fromiter(map(len, answers), dtype=np.int64)
    prompts = prompt_ids(base, split["prompt"], chat=True)
    texts = list(chain.from_iterable(answers))
    replies = tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    prompt_S, length_S = np.empty(len(texts), dtype=np.int64), np.empty(len(texts), dtype=np.int64)
    bytes_S = np.fromiter((len(text.encode()) for text in texts), dtype=np.int64)
    truncated = longest = 0
    for s, row in enumerate(np.repeat(np.arange(len(prompts)), count_N)):
        prompt, reply = prompts[row], [*replies[s], end]
        longest = max(longest, len(prompt) + len(reply) - 1)
        if limit is not None and len(prompt) + len(reply) - 1 > limit:
            if len(prompt) > limit:
                raise BadData(
                    f"row {row + 1}: the prompt alone has {len(prompt)} tokens, and {limit} positions are all there "
                    f"are{'' if max_length is None else ' (--max-length)'}; shorten the prompt"
                    f"{'' if max_length is None else ' or give a larger --max-length'}."
                )
            reply = reply[: limit + 1 - len(prompt)]
            truncated += 1
            # Only what is left of an answer is scored; its bytes by its share of the tokens, as of pieces of documents.
            bytes_S[s] = round(bytes_S[s] * len(reply) / len(replies[s]))
        # The last token of the prompt predicts the first of the reply; the end token is never an input.
        prompt_S[s], length_S[s] = len(prompt) - 1, len(prompt) + len(reply) - 1
        ids += prompt
        ids += reply
    flat = np.asarray(ids, dtype=np.int32)
    known_to(int(flat.max()), tokenizer.pad_token_id, base)
    columns = {"ids": flat, "lengths": length_S, "prompts": prompt_S, "bytes": bytes_S}
    tokens_S = length_S - prompt_S
    labels = {
        "instruct": lambda: torch.from_numpy(
            np.asarray(np.maximum(bytes_S, 1) if task.metric == "bits_per_byte" else tokens_S, dtype=np.float64)
        ),
        "preference": lambda: torch.ones(len(prompts), dtype=torch.int64),
        "multiple-choice": lambda: torch.tensor(split.columns.get("label", [0] * len(prompts)), dtype=torch.int64),
    }[task.kind]()
    report = {
        "rows": len(prompts),
        "tokens": len(flat),
        "answer_tokens": int(tokens_S.sum()),
        "chat_template": bool(tokenizer.chat_template),
        "unit": "answer",
        "truncated": truncated,
        "longest": longest,
        "max_length": limit,
    }
    return EncodedCompletions(columns, count_N, labels, kind=task.kind, pad=tokenizer.pad_token_id, report=report)
