"""Plain PEFT adapters among the bricks of a base: anybody's, by whatever tool they were trained.

An adapter does not tell its base's weights, so those are listed that fit: every stored tensor has its place, and its
shape, where PEFT puts the adapter on this base. What an adapter names as its base is shown beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from brickyard.core.adapted import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Adapted,
    Stored,
    head_width,
    model_class,
    open_model,
    outline,
    put_on,
    read_adapter,
)
from brickyard.core.base import Base
from brickyard.core.brick import KEPT_ASIDE, MANIFEST
from brickyard.core.errors import BrickyardError, Refused, UnsafeFile
from brickyard.core.files import sha256
from brickyard.core.measure import folder_bytes
from brickyard.core.retention import inner
from brickyard.core.task import Task

KIND = "PEFT adapter"


@dataclass(frozen=True)
class PlainAdapter:
    """One plain PEFT adapter that fits a base."""

    folder: Path
    base: Base
    stored: Stored
    layers: tuple[str, ...]  # of the base's, that it changes

    @cached_property
    def made(self) -> list[Any]:
        """What tells it from others: its bytes, and what PEFT is told to do with them."""
        return [sha256(self.folder / WEIGHTS), self.stored.config]

    @property
    def arm(self) -> str:
        """PEFT's name of its type, with the rank where there is one."""
        config = self.stored.config or {}
        rank = config.get("r")
        return f"{self.stored.kind} r={rank}" if isinstance(rank, int) else self.stored.kind

    def about(self) -> dict[str, Any]:
        """Return its row of the table, with the keys of `brick.listed` and "made_for": the base that it names."""
        config, tensors = self.stored.config or {}, self.stored.tensors
        size = sum((self.folder / name).stat().st_size for name in (CONFIG, WEIGHTS))
        return {
            "folder": str(self.folder),
            "arm": self.arm,
            "bytes": size,
            "task": config.get("task_type"),
            "data": None,
            "scores": {},
            "measured": folder_bytes(self.folder),
            "kind": KIND,
            "method": self.stored.kind.lower(),
            "requires": None,
            "made_for": config.get("base_model_name_or_path"),
            "attach_points": list(self.layers),
            "cost": {
                "bytes": size,
                "trainable_parameters": sum(t.numel() for t in tensors.values()),
                "rows": None,
            },
        }

    def backbone(self) -> nn.Module:
        """Return the base's layers with the adapter in them, in float32; Refused where it stands before them."""
        auto = model_class(self.base, self.stored)
        model, fresh = open_model(auto, self.base, head_width(auto, self.base, self.stored))
        return inner(self._put_on(model, fresh))

    def language_model(self, task: Task) -> nn.Module:
        """Return the base as a language model with the adapter in its layers; Refused as `backbone`."""
        return self._put_on(self.base.model(task, seed=0), frozenset())

    def _put_on(self, model: nn.Module, fresh: frozenset[str]) -> nn.Module:
        adapted = _adapted(model, self.stored, fresh)
        if adapted is None:
            named = (self.stored.config or {}).get("task_type")
            raise Refused(f"{self.arm} was made for another kind of model ({named}).")
        if adapted.config.is_prompt_learning:
            raise Refused(f"{self.arm} writes trained tokens before the text; only changes of layers are scored here.")
        adapted.load(self.stored.tensors)
        return adapted.model


def installed(folder: str | Path, base: Base, left_out: dict[str, str] | None = None) -> list[PlainAdapter]:
    """Return the plain adapters under `folder` that fit the base, by their paths.

    What is no whole and safe adapter is none; why it is not is written to `left_out`, by its folder.
    """
    out = []
    for path in sorted(Path(folder).rglob(CONFIG)):
        place = path.parent
        if KEPT_ASIDE in path.relative_to(folder).parts or (place / MANIFEST).is_file():
            continue
        try:
            stored = read_adapter(place)
        except BrickyardError as error:
            _note(left_out, place, error)
            continue
        try:
            if (stored.config or {}).get("task_type") == "CAUSAL_LM" and not base.generative:
                continue
            auto = model_class(base, stored)
            empty = outline(auto, base.config, head_width(auto, base, stored))
            adapted = None if empty is None else _adapted(empty, stored, frozenset())
        except BrickyardError as error:
            if isinstance(error, UnsafeFile):  # the others say that it was made for another base
                _note(left_out, place, error)
            continue
        if adapted is not None:
            layers = sorted(name.removeprefix(PREFIX) for name in adapted.layers())
            out.append(PlainAdapter(place, base, stored, tuple(layers)))
    return out


def _note(left_out: dict[str, str] | None, place: Path, error: BrickyardError) -> None:
    if left_out is not None:
        left_out[str(place)] = str(error)


def _adapted(model: nn.Module, stored: Stored, fresh: frozenset[str]) -> Adapted | None:
    """Put the adapter on the model, with its starting values; None where a stored tensor has no place there."""
    try:
        adapted = put_on(model, stored, fresh)
    except UnsafeFile:
        raise
    except Exception:  # PEFT raises whatever it likes on a config that does not fit
        return None
    fits = all(name in adapted.start and adapted.start[name].shape == t.shape for name, t in stored.tensors.items())
    return adapted if fits else None
