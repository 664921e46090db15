"""Successive halving against the exhaustive search: the same winner, within a point, at a share of its compute."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from brickyard import compare
from brickyard.core.files import read_json


def main() -> None:
    """Search LoRA's grid both ways and print the scores and the training steps spent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--train-rows", type=int, default=600)
    args = parser.parse_args()
    out = {}
    for search in ("random", "halving"):
        with tempfile.TemporaryDirectory() as folder:
            compare(
                methods=["lora"],
                trials=args.trials,
                seeds=1,
                search=search,
                train_rows=args.train_rows,
                max_length=32,
                batch=8,
                baselines=False,
                out=folder,
            )
            chosen = read_json(Path(folder) / "choices.json")["lora"]
            trials = [read_json(path) for path in Path(folder).glob("trials/*/result.json")]
            searched = [row for row in trials if row["role"] == "search"]
            out[search] = {
                "setting": chosen["setting"],
                "steps": sum(row["value"]["steps"] for row in searched),
                "seconds": sum(row["seconds"] for row in searched),
                "final_validation": next(row["value"]["validation"] for row in trials if row["role"] == "final"),
            }
    gap = 100 * (out["random"]["final_validation"] - out["halving"]["final_validation"])
    share = out["halving"]["steps"] / out["random"]["steps"]
    print(
        json.dumps(
            {**out, "gap_points": gap, "steps_share": share, "limits": {"gap_points": 1.0, "steps_share": 0.35}},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
