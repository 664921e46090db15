"""Texts put into a sentence with a gap: a template is never cut, the text in it may be.

A pattern has `{text}` once and `[MASK]` at least once, in any order: "[MASK] News: {text}", "{text} It was [MASK]."
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from brickyard.core.errors import BadData, Refused, UsageError

TEXT, MASK = "{text}", "[MASK]"


@dataclass(frozen=True)
class Template:
    """A pattern around a text; UsageError where it has no gap, or not exactly one place for the text."""

    pattern: str

    def __post_init__(self) -> None:
        if self.pattern.count(TEXT) != 1 or MASK not in self.pattern:
            raise UsageError(
                f"template {self.pattern!r}: {TEXT} once and {MASK} at least once were expected, as in "
                f"'{MASK} News: {TEXT}'."
            )

    @property
    def masks(self) -> int:
        """How many gaps there are."""
        return self.pattern.count(MASK)

    def around(self, text: str, tokenizer: Any) -> str:
        """Return the text in the pattern, with the tokenizer's own mask."""
        before, after = self.pattern.replace(MASK, tokenizer.mask_token).split(TEXT)
        return f"{before}{text}{after}"

    def frame(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Return the tokens before and behind the text, special tokens included."""
        first = len(self.pattern.replace(MASK, tokenizer.mask_token).split(TEXT)[0])
        made = tokenizer(self.around("a", tokenizer), verbose=False, return_offsets_mapping=True)
        ids = made["input_ids"]
        inside = [i for i, (start, end) in enumerate(made["offset_mapping"]) if start <= first < end]
        if not inside:
            raise UsageError(
                f"template {self.pattern!r}: no token of its own stands where {TEXT} does; put spaces there."
            )
        return ids[: inside[0]], ids[inside[-1] + 1 :]

    def fill(self, texts: Sequence[str], tokenizer: Any, limit: int | None) -> tuple[list[str], int]:
        """Return the texts in the pattern, and how many of them were cut so that all fit into `limit` tokens.

        Raises Refused where the tokenizer has no mask, BadData where a text holds the mask itself or the pattern alone
        fills the limit.
        """
        if tokenizer.mask_token is None:
            raise Refused(
                "this base's tokenizer has no mask token, so a template has no gap to read; use a base of the BERT "
                "kind, or score label words with a language model (task multiple-choice)."
            )
        if held := next((row for row, text in enumerate(texts, 1) if tokenizer.mask_token in text), None):
            raise BadData(f"row {held} holds {tokenizer.mask_token} itself; remove it, for it would be read as a gap.")
        filled = [self.around(text, tokenizer) for text in texts]
        if limit is None:
            return filled, 0
        sizes = [len(ids) for ids in tokenizer(filled, verbose=False, return_attention_mask=False)["input_ids"]]
        cut = [row for row, size in enumerate(sizes) if size > limit]
        for row in cut:
            filled[row] = self._shortened(texts[row], tokenizer, limit, sizes[row] - limit)
        return filled, len(cut)

    def _shortened(self, text: str, tokenizer: Any, limit: int, over: int) -> str:
        ends = tokenizer(text, verbose=False, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept = len(ends) - over
        # Where text and pattern meet, tokens may join or part, so the length is looked at again.
        while kept >= 1:
            made = self.around(text[: ends[kept - 1][1]], tokenizer)
            if len(tokenizer(made, verbose=False)["input_ids"]) <= limit:
                return made
            kept -= 1
        raise BadData(f"the template {self.pattern!r} alone fills {limit} tokens; give a shorter one or more tokens.")


def label_tokens(words: Sequence[str], tokenizer: Any, masks: int, *, whole: bool = False) -> list[list[int]]:
    """Return the first `masks` tokens of each label word, as they stand behind a space.

    Raises UsageError where a word has fewer (with `whole`, also where it has more), an unknown one, or the same as
    another.
    """
    found = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    for word, ids in zip(words, found, strict=True):
        if len(ids) < masks:
            raise UsageError(
                f"label word {word!r} has {len(ids)} tokens and the template {masks} gaps; choose longer words or "
                "fewer gaps."
            )
        if whole and len(ids) > masks:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            raise UsageError(
                f"label word {word!r} splits into {len(ids)} tokens ({pieces}) and the template has {masks} gaps; "
                "choose a shorter word, or a template with as many gaps."
            )
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids[:masks]:
            raise UsageError(f"label word {word!r} is not in the base's vocabulary; choose another.")
    cut = [ids[:masks] for ids in found]
    for i, ids in enumerate(cut):
        if ids in cut[:i]:
            raise UsageError(
                f"label words {words[cut.index(ids)]!r} and {words[i]!r} begin with the same {masks} tokens, so the "
                "gaps cannot tell them apart; choose other words or more gaps."
            )
    return cut
