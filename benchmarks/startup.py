"""How long reading commands take beyond a bare Python, and a trial's process against a fresh one. Ratios of medians."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from brickyard.core.jobs import Job, Local

ROUNDS = 7


def wall(*argv: str) -> float:
    """Return the seconds of one command."""
    started = time.monotonic()
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def nothing(argument: dict) -> dict:
    """The empty trial: what remains is its process."""
    return {}


def main() -> None:
    """Interleave the commands, so that noise on the machine hits all alike."""
    commands = {
        "bare": ["-c", "pass"],
        "help": ["-m", "brickyard.cli", "--help"],
        "methods": ["-m", "brickyard.cli", "methods"],
        "show": ["-m", "brickyard.cli", "show", "lora"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, argv in commands.items():
            seconds[name].append(wall(*argv))
    median = {name: statistics.median(s) for name, s in seconds.items()}
    out: dict[str, object] = {
        f"{name}_beyond_bare_s": median[name] - median["bare"] for name in commands if name != "bare"
    }

    engine = Local(1)
    fresh, forked = [], []
    job = Job(key="a", function="startup:nothing", argument={})
    started = time.monotonic()
    list(engine.run([job]))
    first = time.monotonic() - started
    for _ in range(3):
        fresh.append(wall("-c", "import brickyard.core.preload"))
        started = time.monotonic()
        list(engine.run([job]))
        forked.append(time.monotonic() - started)
    out |= {
        "first_trial_process_s": first,
        "trial_process_s": statistics.median(forked),
        "fresh_python_s": statistics.median(fresh),
        "fresh_over_trial": statistics.median(fresh) / statistics.median(forked),
        "kind": "measured",
    }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
