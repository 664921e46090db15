"""A brick as nothing but the log of its run, which rebuilds the weights: a fine-tuning of a few kilobytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from brickyard.core import registry
from brickyard.core.arm import parse
from brickyard.core.base import Base
from brickyard.core.brick import Brick
from brickyard.core.build import build, resolve
from brickyard.core.errors import ParityBroken, Refused, WrongBase
from brickyard.core.files import complete_folder, plain_file, sha256, write_tensors


def log_of(made: Brick) -> str:
    """Return the name of a brick's log; Refused where it has none."""
    beside = [name for name in made.manifest["files"] if name != made.manifest["weights"]]
    if not beside:
        raise Refused(
            f"{made.manifest['arm']}: this brick keeps no log that rebuilds it; only runs such as 'lora + one-byte' do."
        )
    return beside[0]


def write_log(made: Brick, out: Path) -> dict[str, Any]:
    """Copy a brick without its weights to `out`."""
    name, weights = log_of(made), made.manifest["weights"]
    with complete_folder(out) as temporary:
        for path in sorted(made.folder.iterdir()):
            if path.is_file() and path.name != weights:
                shutil.copyfile(plain_file(made.folder, path.name), temporary / path.name)
    size, before = (out / name).stat().st_size, (made.folder / weights).stat().st_size
    return {
        "max_gap": 0.0,
        "error": 0.0,
        "sentence": f"{name} alone: {size:,} bytes that rebuild {before:,} bytes of weights; --to brick does it.",
    }


def write_weights(made: Brick, base: Base, out: Path) -> dict[str, Any]:
    """Replay a brick's log on its base and write the brick whole; ParityBroken unless its bytes are the run's own.

    Raises WrongBase where the arm does not begin here at the weights that the run began with.
    """
    name, weights = log_of(made), made.manifest["weights"]
    if base.fingerprint != made.manifest["base"]["fingerprint"]:
        raise WrongBase(
            f"{made.folder} was made for base {made.manifest['base']['spec']}, and its log leads to its weights from "
            f"there only; the base given is {base.spec}. Give the right --base."
        )
    path = plain_file(made.folder, name)
    if sha256(path) != made.manifest["files"][name]:
        raise ParityBroken(f"{path} is not the log that this brick was written with; fetch it again.")
    plan = resolve(parse(made.manifest["arm"]), made.task)
    attached = build(plan, base, made.task, seed=made.manifest["seed"], objective=False)
    registry.load(plan.step or "").rebuild(attached, path)
    with complete_folder(out) as temporary:
        for source in sorted(made.folder.iterdir()):
            if source.is_file() and source.name != weights:
                shutil.copyfile(plain_file(made.folder, source.name), temporary / source.name)
        write_tensors(temporary / weights, attached.tensors())
        if sha256(temporary / weights) != made.manifest["files"][weights]:
            raise ParityBroken(f"replaying {path} made other weights than the run's; nothing was written.")
    return {
        "max_gap": 0.0,
        "error": 0.0,
        "sentence": f"rebuilt from {path.stat().st_size:,} bytes of log; {weights} has the same bytes as the run's.",
    }
