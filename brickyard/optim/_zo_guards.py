"""What zeroth-order steps, in memory or streamed, refuse, and when they give a run up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from brickyard.core.errors import NotFinite, UsageError

IN_A_ROW = 20  # steps skipped one after another before a run is given up: such weights do not recover


def refuse_to_go_on(in_a_row: int, step: int) -> None:
    """Raise NotFinite where so many steps one after another, the last of them `step`, had no finite loss."""
    if in_a_row >= IN_A_ROW:
        raise NotFinite(
            f"the loss was not finite in {IN_A_ROW} zeroth-order steps in a row, up to step {step}; lower lr or "
            "check the data."
        )


def check_eps(eps: float) -> None:
    """Raise UsageError unless `eps`, the smoothing radius, is a positive number."""
    if not (math.isfinite(eps) and eps > 0):
        raise UsageError(f"eps={eps} is out of range; expected a positive number such as 1e-3.")


def check_slots(slots: int, overlap: bool) -> None:
    """Raise UsageError where there are fewer slots than the copies need."""
    if slots < 1 + overlap:
        raise UsageError(
            f"slots={slots} with overlap={overlap}: expected at least {1 + overlap}, one block that computes"
            + (" and one on its way." if overlap else ".")
        )


@contextmanager
def own_casts() -> Iterator[None]:
    """Within it autocast keeps no casts of weights, in this thread.

    It would hold those of the first loss for the second, of weights that have moved in the meantime: it knows a weight
    by its tensor, and all threads share what it keeps.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
