"""Run an audit method: open what it looks at, read its rows as it wants them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from brickyard.audit._wants import Wants
from brickyard.core import brick as bricks
from brickyard.core import readers, registry
from brickyard.core.arm import parse
from brickyard.core.base import Base, open_base
from brickyard.core.brick import Applied, load
from brickyard.core.data import Data, read_data
from brickyard.core.errors import BadData, UsageError

_WORDS = {"brick": "a brick", "model": "a model", "adapter": "a PEFT adapter"}


def audit(
    method: str,
    *,
    base: str = "embedded:minilm",
    brick: str | Path | None = None,
    data: Any,
    force: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Run an audit method, such as "similarity:sample=500"; return its findings, at least "table" and "detail".

    `brick` is a brick, or another checkpoint as `base` names them. Raises WrongBase for a brick of another base, unless
    `force`.
    """
    name, config = chosen(method)
    opened = open_base(base, trust_remote_code=trust_remote_code)
    changed: Base | Applied | None = None
    if brick is not None and (Path(brick) / bricks.MANIFEST).is_file():
        changed = load(brick).apply(opened, force=force)
    elif brick is not None:
        changed = open_base(str(brick), trust_remote_code=trust_remote_code)
    rows = _audited(data, name, changed)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return registry.load(name).measure(opened, changed, config, rows, device=place)


def chosen(method: str) -> tuple[str, Any]:
    """Return the name and the Config of "similarity:sample=500"; UsageError for anything but one audit method."""
    found = parse(method)
    if len(found.pieces) != 1 or found.training:
        raise UsageError(f"audit takes one method and no training settings; {method!r} was given.")
    piece = found.pieces[0]
    registry.find(piece.name, "audit")
    return piece.name, registry.config(piece.name, piece.options)


def wants(name: str) -> Wants:
    """Return what the method of that name cannot do without."""
    return getattr(registry.load(name), "WANTS", Wants())


def check_beside(name: str, kinds: Iterable[str]) -> None:
    """Raise UsageError where the method does not take what stands in `brick`: "brick", "model", "adapter", or none."""
    given, wanted = list(kinds), wants(name)
    expected = " or ".join(_WORDS[kind] for kind in wanted.kinds)
    if wanted.needed and not given:
        raise UsageError(f"{name} looks at {expected} beside the base; name it under brick.")
    odd = next((kind for kind in given if kind not in wanted.kinds), None)
    if odd is not None:
        raise UsageError(f"{_WORDS[odd]} was given; {name} takes {expected} beside the base.")


def check_installed(method: str) -> None:
    """Raise UsageError where the options of "secure-code:judge=bandit" need a package that is not there."""
    name, config = chosen(method)
    for (option, value), package in wants(name).packages.items():
        if getattr(config, option) == value and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{option}={value} needs the package {package}, which is not installed. Run "
                "`pip install brickyard[audit]`."
            )


def check_rows(name: str, source: readers.Source) -> None:
    """Raise BadData where the method cannot read the rows of `source`, as far as no model decides that."""
    if wants(name).as_trained:
        missing = [split for split in wants(name).splits if split not in source.splits]
        if missing:
            raise BadData(f"{name} reads the rows of {' and '.join(missing)}; {source.name} has none.")
    else:
        _audited(source, name, None)


def _audited(data: Any, name: str, changed: Base | Applied | None) -> Data:
    """Read the rows of an audit, with labels where the method wants them, and as the brick's task reads them."""
    wanted = wants(name)
    source = data if isinstance(data, readers.Source) else readers.read(data)
    if not wanted.as_trained:
        columns = sorted({name for names in source.found.values() for name in names})
        if wanted.labelled and "label" not in columns:
            raise BadData(
                f"{source.name} has no labels, and {name} compares rows by theirs; found the columns "
                f"{', '.join(columns)}. Give rows that have a column label too."
            )
        return read_data(source, need=(), labelled=wanted.labelled)
    known = changed.brick.task if isinstance(changed, Applied) and changed.brick is not None else None
    # Where there is a train split, validation is cut from it as it was for training: by that a brick's rows are known.
    need = ("train",) if "train" in source.splits else ()
    return read_data(source, need=need, task=known.kind if known else None, metric=known.metric if known else None)
