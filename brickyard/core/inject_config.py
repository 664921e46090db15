"""The PEFT config of an adapter of ours, and which layers it means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from peft import PeftConfig, PeftType
from torch import nn

from brickyard.core import registry, wrap
from brickyard.core.adapter_type import TYPE
from brickyard.core.errors import BadBrick, Unmatched, UsageError
from brickyard.core.inject_layer import PREFIX

FORMAT = 1  # layout of the stored tensors; a file of a later one is refused


def resolve(name: str, options: dict[str, Any]) -> tuple[ModuleType, Any]:
    """Return a method's module and its Config; UnknownName or UsageError where either does not exist."""
    return registry.load(name), registry.config(name, options)


def find(model: nn.Module, target: str | Sequence[str]) -> dict[str, list[str]]:
    """Return pattern -> layers for a method's `target`; Unmatched where a pattern matches nothing."""
    return wrap.targets(model, [target] if isinstance(target, str) else list(target))


@dataclass
class BrickyardConfig(PeftConfig):
    """PEFT config of one adapter of one of our methods.

    `method` and `options` are what an arm names; `seed` draws everything random (None: taken from torch's generator
    when the adapter is made, and stored). With `target_modules=None` the method's own `target` is used; lists of names
    or endings, a regular expression and "all-linear" mean what they mean in PEFT, but an entry that matches nothing is
    an error. `init_weights=False` fills tensors that start at zero with small noise, for tests. `rank_pattern` maps
    layers to the ranks they have left where a method removes ranks in training (`core.ranks`).
    """

    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(TYPE)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if self.bias not in ("none", "all", f"{PREFIX}only"):
            raise UsageError(f"bias={self.bias!r}: expected 'none', 'all' or '{PREFIX}only'.")
        if self.format > FORMAT:
            raise BadBrick(f"adapter of format {self.format}; this release reads up to {FORMAT}. Update Brickyard.")
        if self.method:
            resolve(self.method, self.options)

    def to_dict(self) -> dict[str, Any]:
        # PEFT writes a set in hash order, so that the same adapter would give other bytes in the next process.
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}


def check_matched(config: BrickyardConfig, matched: list[str], names: list[str]) -> None:
    """Raise Unmatched for each entry of the config that matches no layer; PEFT accepts those if another one does."""

    def ends(entry: str, among: list[str]) -> bool:
        return any(name == entry or name.endswith(f".{entry}") for name in among)

    for option, among in (("target_modules", matched), ("exclude_modules", names)):
        given = getattr(config, option)
        entries = [] if given is None else [given] if isinstance(given, str) else sorted(given)
        for entry in entries:
            hit = any(re.fullmatch(entry, name) for name in among) if isinstance(given, str) else ends(entry, among)
            if not hit:
                known = {name.rsplit(".", 1)[-1] for name in names if name} | set(names)
                near = get_close_matches(entry, sorted(known), n=3, cutoff=0.5)
                hint = f"nearest: {', '.join(near)}" if near else "see the names in model.named_modules()"
                raise Unmatched(f"{option} entry {entry!r} matches no layer to adapt; {hint}.")
    numbers = config.layers_to_transform
    wanted = {str(number) for number in ([numbers] if isinstance(numbers, int) else numbers or [])}
    for number in sorted(wanted):
        if not any(number in name.split(".") for name in matched):
            raise Unmatched(f"layers_to_transform holds {number}, but no target layer has that number.")
    beside = [name for name in matched if wanted and not wanted & set(name.split("."))]
    if beside:
        # PEFT applies the numbers to endings only, and adapts what full names or an expression match in any case.
        raise UsageError(f"layers_to_transform does not hold for {beside[0]}; give target_modules as endings of names.")
    if not matched:
        raise Unmatched(f"{config.method} matches no layer: target_modules={config.target_modules}.")
