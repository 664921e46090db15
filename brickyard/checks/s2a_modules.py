"""The claim of s2a-modules that is counted: what its modules keep for the backward pass beside full tuning and LoRA."""

from __future__ import annotations

from typing import Any

from brickyard.checks._takes import takes
from brickyard.checks.s2a import BATCH, TOKENS, Rows
from brickyard.core.method import Claim

FULL, LORA, BIAS = "full", "lora", "s2a-modules:kind=bias"
CODED = f"{BIAS} + s2a:preset=paper"
BESIDE = ("bitfit", "s2a-modules:kind=side + s2a:preset=paper", "s2a-modules:kind=prompt + s2a:preset=paper")
OF_FULL, OF_LORA = 1 / 4, 1 / 2.5  # that may be kept at most, as the card has it


@takes("base", "data")
def saved_bytes(claim: Claim, *, batch: int = BATCH, tokens: int = TOKENS) -> dict[str, Any]:
    """Count what arms keep for backward (eager attention, dropout off); the bias module in 4 bits is judged.

    It holds where both shares are small enough and nothing is kept out of the counter's sight. Control: the same module
    with everything kept as it is, which must miss one of them.
    """
    rows = Rows(claim, batch, tokens)
    sizes = {arm: rows.kept(arm) for arm in (FULL, LORA, BIAS, CODED, *BESIDE)}
    kept = {arm: saved.bytes for arm, saved in sizes.items()}

    # Of the two shares the one nearer to its limit says how much room is left: at most 1 where both are kept to.
    def used(arm: str) -> float:
        return max(kept[arm] / kept[FULL] / OF_FULL, kept[arm] / kept[LORA] / OF_LORA)

    mib = ", ".join(f"{arm} {size / 2**20:.1f}" for arm, size in kept.items())
    return {
        "inequality": f"bytes(bias + s2a) <= {OF_FULL:g} bytes(full) and <= {OF_LORA:g} bytes(lora)",
        "holds": used(CODED) <= 1 and not sizes[CODED].hidden,
        **dict.fromkeys(("measured", "low", "high"), used(CODED)),
        "detail": (
            f"{kept[CODED] / kept[FULL]:.3f} of full tuning's bytes, {kept[CODED] / kept[LORA]:.3f} of LoRA's "
            f"(counted); MiB at B={batch}, T={tokens}, eager: {mib}"
        ),
        "gate": None,
        "control": {
            "what": "the bias module alone: what it keeps is not coded",
            "inequality": f"bytes(bias) > {OF_FULL:g} bytes(full) or > {OF_LORA:g} bytes(lora)",
            "measured": used(BIAS),
            "destroyed": used(BIAS) > 1,
        },
        "figures": {"bytes": kept, "hidden": [str(h) for h in sizes[CODED].hidden]},
    }
