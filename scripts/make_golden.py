"""Write the golden brick of the present schema: a tiny base, a brick on it, and the answers that it must give for ever.

    python scripts/make_golden.py

Run it once when `brick.SCHEMA` rises. Folders of older schemas are never written again; tests/test_golden.py reads all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_text_base  # noqa: E402
from test_golden import TEXTS, logits  # noqa: E402

from brickyard.core import brick as bricks  # noqa: E402
from brickyard.core.arm import parse  # noqa: E402
from brickyard.core.base import open_base  # noqa: E402
from brickyard.core.build import build, resolve  # noqa: E402
from brickyard.core.errors import UsageError  # noqa: E402
from brickyard.core.files import write_json  # noqa: E402
from brickyard.core.task import Task  # noqa: E402

ARMS = {"lora": "lora:r=2", "mos": "mos:r=2,e=2,l=1 + moment-probing:p=14,h=2", "bitfit": "bitfit"}


def main() -> None:
    """Write tests/golden/schemaN."""
    folder = ROOT / "tests" / "golden" / f"schema{bricks.SCHEMA}"
    if folder.exists():
        raise UsageError(f"{folder} exists; a golden brick is written once and kept.")
    make_text_base(folder / "base", layers=1)
    os.chdir(ROOT)  # the manifest keeps the base's path as given
    opened = open_base(str((folder / "base").relative_to(ROOT)))
    task = Task(kind="text-classification", metric="accuracy", labels=("a", "b", "c"), width=3, input="text")
    for name, arm in ARMS.items():
        plan = resolve(parse(arm), task)
        attached = build(plan, opened, task, seed=0)
        generator = torch.Generator().manual_seed(0)
        for parameter in attached.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        made = bricks.save(folder / name, attached, plan, opened, task, seed=0, about={})
        answers = logits(made.apply(opened).model, opened)
        write_json(folder / f"{name}.json", {"texts": TEXTS, "logits": answers.tolist()})


if __name__ == "__main__":
    main()
