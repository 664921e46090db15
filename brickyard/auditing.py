"""Run an audit method: open what it looks at, read its rows as it wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from brickyard.core import brick as bricks
from brickyard.core import readers, registry
from brickyard.core.arm import parse
from brickyard.core.base import Base, open_base
from brickyard.core.brick import Applied, load
from brickyard.core.data import Data, read_data
from brickyard.core.errors import BadData, UsageError


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
    pieces, training = (found := parse(method)).pieces, found.training
    if len(pieces) != 1 or training:
        raise UsageError(f"audit takes one method and no training settings; {method!r} was given.")
    registry.find(pieces[0].name, "audit")
    config = registry.config(pieces[0].name, pieces[0].options)
    opened = open_base(base, trust_remote_code=trust_remote_code)
    changed: Base | Applied | None = None
    if brick is not None and (Path(brick) / bricks.MANIFEST).is_file():
        changed = load(brick).apply(opened, force=force)
    elif brick is not None:
        changed = open_base(str(brick), trust_remote_code=trust_remote_code)
    method_file = registry.load(pieces[0].name)
    rows = _audited(data, method_file, changed)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return method_file.measure(opened, changed, config, rows, device=place)


def _audited(data: Any, method_file: Any, changed: Base | Applied | None) -> Data:
    """Read the rows of an audit, with labels where the method wants them, and as the brick's task reads them."""
    labelled = getattr(method_file, "LABELLED", False)
    if not labelled or not getattr(method_file, "TASK_OF_BRICK", False):
        source = readers.read(data)
        columns = sorted({name for names in source.found.values() for name in names})
        if labelled and "label" not in columns:
            name = method_file.RECORD.name
            raise BadData(
                f"{source.name} has no labels, and {name} compares rows by theirs; found the columns "
                f"{', '.join(columns)}. Give rows that have a column label too."
            )
        return read_data(source, need=(), labelled=labelled)
    known = changed.brick.task if isinstance(changed, Applied) and changed.brick is not None else None
    # Where there is a train split, validation is cut from it as it was for training: by that a brick's rows are known.
    need = ("train",) if "train" in readers.read(data).splits else ()
    return read_data(data, need=need, task=known.kind if known else None, metric=known.metric if known else None)
