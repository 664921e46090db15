"""A step of ZO2 from files against a step of ZO-SGD in memory, timed in turn in one run.

Both train the same weights with the same noise. The limit is 1.3 with the files in the page cache; `--sync` also waits
for the disk at every step, which is then what is measured. Larger batches hide more of the copies.

    python benchmarks/zo2.py --rows 4 --length 64 --rounds 10
"""

from __future__ import annotations

import argparse

from brickyard.checks.zo2 import SLOWER, speed
from brickyard.core.measure import environment
from brickyard.core.method import Claim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sync", action="store_true", help="wait for the disk at every step")
    given = parser.parse_args()
    sizes = {"vocabulary": 2000, "width": given.width, "layers": given.layers}
    found = speed(
        Claim(text="speed"), sizes=sizes, rounds=given.rounds, rows=given.rows, length=given.length, sync=given.sync
    )
    print(environment())
    print(f"{found['detail']} (measured){'' if found['measured'] <= SLOWER else '  OVER THE LIMIT'}")


if __name__ == "__main__":
    main()
