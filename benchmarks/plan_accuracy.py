"""`brickyard plan` against what the run then counts and takes: saved-for-backward bytes and training seconds."""

from __future__ import annotations

import json
import sys
import tempfile

from brickyard import api, compare

ARMS = ("lora", "linear-probe", "bitfit")


def main() -> None:
    """Plan, run, and print the ratios of the arms given (default: ARMS)."""
    arms = sys.argv[1:] or list(ARMS)
    options = {"train_rows": 600}
    planned = {
        row["arm"]: row
        for row in api.plan(data="embedded:stdlib-topics", methods=arms, training={"epochs": 1}, **options)
    }
    with tempfile.TemporaryDirectory() as folder:
        result = compare(
            methods=arms, seeds=1, workers=1, baselines=False, training={"epochs": 1}, out=folder, **options
        )
    out = {}
    for row in result["methods"]:
        if row["arm"] in planned:
            cost, plan = row["cost"], planned[row["arm"]]
            out[row["arm"]] = {
                "saved_bytes_ratio": plan["saved_for_backward_bytes"] / cost["saved_for_backward_bytes"],
                "seconds_ratio": plan["train_seconds"] / cost["train_seconds"],
            }
    print(json.dumps({**out, "limits": {"saved_bytes": 0.20, "seconds": 0.30}}, indent=2))


if __name__ == "__main__":
    main()
