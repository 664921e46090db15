"""Prompts labelled by capability, all of one length, in two halves that share no prompt.

What differs between capabilities must not be their length: a neuron that counts tokens would serve them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from brickyard.audit._neurons import Prompts, prompts_of, tokens_of
from brickyard.core.base import Base
from brickyard.core.data import Data
from brickyard.core.errors import BadData, Refused

FEWEST = 10  # prompts of a capability in a half
SHORTEST = 8  # tokens of a prompt, where they are not cut to one length


def halves(
    base: Base, data: Data, most: int, tokens: int, seed: int
) -> tuple[Prompts, Prompts, tuple[str, ...], dict[str, Any]]:
    """Return half A, half B, the capabilities' names and a report of what was left out.

    Half A is drawn from train and half B from test where the data have both, else each from a half of all rows. Every
    capability gives as many prompts to a half, at most `most` / 2. With `tokens` > 0 a prompt is cut to so many tokens
    and a shorter one left out; else up to the base's context. Prompts that read alike then count once.

    Raises BadData for rows without labels, fewer than two capabilities, or too few prompts of one.
    """
    names = data.labels
    if names is None:
        raise BadData(
            f"{data.name} does not say which capability a prompt belongs to; give rows with the columns text and label "
            "(the capability's name)."
        )
    if data.input != "text":
        raise BadData(f"{data.name} holds rows of {data.input}; prompts are rows with the columns text and label.")
    if base.input != "text":
        raise Refused(f"{base.spec} reads {base.input}; prompts are text, so give a language model.")
    rows, why = _tokenised(base, data, tokens)
    present = sorted({label for split in rows.values() for label, _ in split})
    if len(present) < 2:
        raise BadData(
            f"{data.name} has prompts of {len(present)} capability ({', '.join(names[c] for c in present) or 'none'}) "
            "that are long enough; localisation compares at least 2."
        )
    draw = np.random.Generator(np.random.PCG64(seed))
    if {"train", "test"} <= rows.keys():
        sides = [rows["train"], rows["test"]]
    else:
        sides = [[], []]
        every = [pair for split in rows.values() for pair in split]
        for c in present:
            own = [pair for pair in every if pair[0] == c]
            order = draw.permutation(len(own))
            for side in (0, 1):
                sides[side] += [own[i] for i in order[side::2]]
    counts = [{c: sum(label == c for label, _ in side) for c in present} for side in sides]
    few = [(names[c], a, b) for c in present if min(a := counts[0][c], b := counts[1][c]) < FEWEST]
    if few:
        told = ", ".join(f"{name} {a} and {b}" for name, a, b in few)
        wanted = f"of at least {tokens} tokens" if tokens else "that differ"
        raise BadData(
            f"{data.name} has too few prompts {wanted} to score neurons and to measure on others: {told}; expected "
            f"{FEWEST} of every capability in each half. Give more prompts, or fewer tokens."
        )
    out, sizes = [], []
    for side, count in zip(sides, counts, strict=True):
        size = min(most // 2, *count.values())
        chosen = []
        for place, c in enumerate(present):
            own = [ids for label, ids in side if label == c]
            chosen += [(place, own[i]) for i in sorted(draw.permutation(len(own))[:size])]
        out.append(prompts_of([ids for _, ids in chosen], [place for place, _ in chosen], base))
        sizes.append(size)
    report = {
        "of_each_capability": sizes,
        "halves": "train and test" if {"train", "test"} <= rows.keys() else "two halves of all rows",
        "tokens": tokens or None,
        **why,
        "sentence": (
            f"{sizes[0]} prompts of each capability scored the neurons and {sizes[1]} others measured, "
            f"{f'{tokens} tokens each' if tokens else 'of their own lengths'}; left out: {why['short']} shorter ones, "
            f"{why['alike']} that read like another"
        ),
    }
    return out[0], out[1], tuple(names[c] for c in present), report


def _tokenised(base: Base, data: Data, tokens: int) -> tuple[dict[str, list[tuple[int, np.ndarray]]], dict[str, int]]:
    """Return the capability and tokens of each prompt that is long enough and unlike all before it, by split."""
    limit = tokens or base.context
    if base.context is not None and tokens > base.context:
        raise BadData(f"prompts of {tokens} tokens do not fit into the base's context of {base.context}; give fewer.")
    seen: set[bytes] = set()
    count = {"short": 0, "alike": 0, "cut": 0}
    out: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, split in data.splits.items():
        kept = []
        for label, ids in zip(split["label"], tokens_of(split["text"], base), strict=True):
            if len(ids) < (tokens or SHORTEST):
                count["short"] += 1
                continue
            cut = ids[:limit]
            if (key := cut.tobytes()) in seen:
                count["alike"] += 1
                continue
            seen.add(key)
            count["cut"] += len(cut) < len(ids)
            kept.append((int(label), cut))
        out[name] = kept
    return out, count
