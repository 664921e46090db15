"""Tensor names of one architecture in two models: a checkpoint, a bare backbone and a model with a head differ in them.

Imports nothing: names are all that is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Names:
    """How a model's tensor names correspond to the base's: `own` by the base's name; `extra` have no counterpart."""

    own: dict[str, str]
    extra: list[str] = field(default_factory=list)


def same_names(base: Iterable[str], own: Iterable[str]) -> Names:
    """Match names that differ by the first part at most (`bert.encoder.x`, `backbone.encoder.x`, `encoder.x`)."""
    base, own = sorted(base), sorted(own)
    first = lambda names: ["", *sorted({f"{name.split('.')[0]}." for name in names if "." in name})]  # noqa: E731
    best: dict[str, str] = {}
    for p_base in first(base):
        for p_own in first(own):
            rest = {name.removeprefix(p_own): name for name in own if name.startswith(p_own)}
            found = {n: rest[r] for n in base if n.startswith(p_base) and (r := n.removeprefix(p_base)) in rest}
            if len(found) > len(best):
                best = found
    matched = set(best.values())
    # What lies beside the matched part but has the base's full name is the same tensor too (an output layer).
    best |= {name: name for name in base if name in own and name not in best and name not in matched}
    matched = set(best.values())
    return Names(best, [name for name in own if name not in matched])
