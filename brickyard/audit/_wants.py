"""What an audit cannot do without, as its file states it, so that a recipe is refused before a model is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What a method needs beside a base.

    kinds: what the second model may be ("brick", "model"); needed: whether it must be there; labelled: whether it reads
    the labels of its data; as_trained: whether it reads the rows as the brick's task does; splits: those that such data
    must have; files: the method's options that name a file; packages: what a value of an option needs installed, of the
    extra `audit`, by (option, value).
    """

    kinds: tuple[str, ...] = ("brick", "model")
    needed: bool = False
    labelled: bool = False
    as_trained: bool = False
    splits: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    packages: Mapping[tuple[str, str], str] = field(default_factory=dict)
