"""When zeroth-order steps, in memory or streamed, give a run up."""

from __future__ import annotations

from brickyard.core.errors import NotFinite

IN_A_ROW = 20  # updates skipped one after another before a run is given up: such weights do not recover


def refuse_to_go_on(in_a_row: int, step: int) -> None:
    """Raise NotFinite where so many updates one after another, the last of them in step `step`, had no finite loss."""
    if in_a_row >= IN_A_ROW:
        raise NotFinite(
            f"the loss was not finite in {IN_A_ROW} zeroth-order updates in a row, up to step {step}; lower lr or "
            "check the data."
        )
