"""The claim of configurable-bricks: functions are localised in a small language model, at both ends of 1-3 %.

Neurons are scored on half A of the prompts and cut on half B, whose files are others. Control: scored by labels that
were dealt out anew, so that the sets mean nothing; they must not pass for a capability's own.
"""

from __future__ import annotations

from typing import Any

import torch

from brickyard.audit._localised import NONE, OTHERS, RANDOM, judged
from brickyard.audit._prompts import halves
from brickyard.audit.configurable_bricks import Config, Scored, kept, localise, model_of, per_layer, scored
from brickyard.checks._takes import takes
from brickyard.core.base import open_base
from brickyard.core.data import read_data
from brickyard.core.ffn import every_ffn
from brickyard.core.method import Claim

SHARES = (0.01, 0.03)  # of each layer's neurons: both ends of the card's range


@takes("base", "data")
def kinds_of_python(claim: Claim, *, shares: tuple[float, ...] = SHARES) -> dict[str, Any]:
    """Score, cut and judge at every share; the claim holds where it does at all of them.

    Of a claim, `train_rows` are the prompts of each capability in both halves, `max_length` the tokens of each.
    """
    base, data = open_base(claim.base), read_data(claim.data, need=())
    config = Config(prompts=claim.train_rows or Config.prompts, tokens=claim.max_length)
    half_a, half_b, names, report = halves(base, data, config.prompts, config.tokens, config.seed)
    model = model_of(base, None).to(torch.device("cpu"))
    ffns = every_ffn(model, "configurable-bricks")
    known, again, shuffled = (
        scored(model, ffns, prompts, len(names), config.pool, shuffle)
        for prompts, shuffle in ((half_a, None), (half_b, None), (half_a, 1))
    )

    def at(share: float, scores: Scored) -> dict[str, Any]:
        found = localise(model, ffns, half_b, scores, share, config.draws, config.seed)
        return judged(found, names, *kept(again, scores.sets(share)))

    found = {share: at(share, known) for share in shares}
    control = at(max(shares), shuffled)
    cut = {share: f"{per_layer(share, ffns[0].neurons)} of {ffns[0].neurons}" for share in shares}
    return {**verdict(found, control, cut), "prompts": report, "base": base.spec, "data": data.name}


def verdict(found: dict[float, dict[str, Any]], control: dict[str, Any], cut: dict[float, str]) -> dict[str, Any]:
    """Return the claim's result from what was judged at each share, and with meaningless sets.

    cut: the neurons of a layer that a share is, in words.
    """
    every = [row["holds"] for row in found.values()]
    holds: Any = False if False in every else True if all(v is True for v in every) else "undecided"
    gate = found[min(found)]["gate"]
    if not gate["holds"]:
        holds = "set-up invalid"
    rows = [row for judgement in found.values() for row in judgement["comparisons"].values()]
    worst = min(rows, key=lambda row: row["low"])
    said = "; ".join(
        f"{share:.0%} ({cut[share]} neurons a layer): own {j['diagonal']:+.4f}, others {j['off_diagonal']:+.4f}, "
        f"random {j['random_mean']:+.4f} nats a token"
        for share, j in found.items()
    )
    shuffled = control["comparisons"]["others"]
    return {
        "inequality": f"own >= {OTHERS:g} x others, own >= {RANDOM:g} x random and own > 0, "
        f"at {' and '.join(f'{share:.0%}' for share in found)}",
        "holds": holds,
        **{key: worst[key] for key in ("measured", "low", "high")},
        "metric": "nats per token",
        "gate": gate,
        "control": {
            "what": "neurons scored by labels dealt out anew: their sets mean nothing",
            **{key: shuffled[key] for key in ("inequality", "measured", "low", "high")},
            "destroyed": shuffled["holds"] is not True,
        },
        "figures": {f"{share:g}": judgement for share, judgement in found.items()} | {"shuffled": control},
        "detail": said if holds is True else f"{NONE}; {said}",
    }
