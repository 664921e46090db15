"""Whether functions are localised: what the cuts cost, as paired differences over prompts.

Shapes: N prompts of half B, as many of every capability; C capabilities; D draws of random neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import f_oneway

from brickyard.core.stats import interval, paired

OTHERS, RANDOM = 2.0, 3.0  # times which a capability's own loss must exceed the others' and that of random neurons
FAR = 1 / 3  # of the way from the base rate to 1: an average precision that tells a capability from the rest
SURE = 0.001  # p of the losses of all capabilities being alike
NONE = "no localisation found at this size"


@dataclass(frozen=True)
class Found:
    """What cutting cost on half B, in nats per token.

    loss_N: of the whole model; increase_CN: with the neurons of each capability cut; random_DN: with random neurons of
    the prompt's own capability cut; norm_ratio: norm of the random neurons over that of the chosen, by capability.
    """

    loss_N: np.ndarray
    increase_CN: np.ndarray
    random_DN: np.ndarray
    label_N: np.ndarray
    norm_ratio: tuple[float, ...]

    @property
    def matrix_CC(self) -> np.ndarray:
        """D: a row is the capability that was cut, a column the one that was measured."""
        return np.stack([self.increase_CN[:, self.label_N == c].mean(1) for c in range(len(self.increase_CN))], 1)

    @property
    def random_CD(self) -> np.ndarray:
        """What each draw of random neurons cost its capability."""
        return np.stack([self.random_DN[:, self.label_N == c].mean(1) for c in range(len(self.increase_CN))])

    @property
    def own_N(self) -> np.ndarray:
        """What each prompt lost with its own capability cut."""
        return self.increase_CN[self.label_N, np.arange(len(self.label_N))]

    @property
    def others_N(self) -> np.ndarray:
        """What each prompt lost on average with another capability cut."""
        return (self.increase_CN.sum(0) - self.own_N) / (len(self.increase_CN) - 1)


def judged(found: Found, names: Sequence[str], kept: Sequence[float], best: Sequence[float]) -> dict[str, Any]:
    """Judge the two inequalities, with 95 % intervals over prompts.

    kept: the mean average precision on half B of the neurons chosen on half A, by capability; best: the highest.
    Returns {"table", "matrix", "random", "diagonal", "off_diagonal", "comparisons", "gate", "holds", "sentence", ...};
    "holds" is True, False, "undecided", or "set-up invalid" where the model tells no capability apart.
    """
    own_N, others_N, random_N = found.own_N, found.others_N, found.random_DN.mean(0)
    own = interval(None, own_N[None], "loss")
    against = {
        "others": (OTHERS, paired(None, own_N, OTHERS * others_N, "loss")),
        "random": (RANDOM, paired(None, own_N, RANDOM * random_N, "loss")),
    }
    comparisons = {
        name: {
            "inequality": f"own >= {times:g} x {name}",
            "measured": p.difference,
            "low": p.low,
            "high": p.high,
            "holds": _verdict(p.low, p.high),
        }
        for name, (times, p) in against.items()
    }
    # Twice a negative number is smaller than it: a cut that costs nothing at all would pass.
    hurts = {"inequality": "own > 0", "measured": own.mean, "low": own.low, "high": own.high}
    comparisons["own"] = {**hurts, "holds": True if own.low > 0 else False if own.high <= 0 else "undecided"}
    verdicts = [row["holds"] for row in comparisons.values()]
    holds: Any = False if False in verdicts else True if all(v is True for v in verdicts) else "undecided"
    gate = _gate(found, names, best)
    if not gate["holds"]:
        holds = "set-up invalid"
    matrix_CC, random_CD = found.matrix_CC, found.random_CD
    rows = [
        {
            "neurons of": name,
            **{other: float(v) for other, v in zip(names, matrix_CC[c], strict=True)},
            "random": float(random_CD[c].mean()),
            "AP": float(kept[c]),
        }
        for c, name in enumerate(names)
    ]
    figures = (
        f"cutting a capability's own neurons costs it {own.mean:+.4f} nats a token, those of another "
        f"{others_N.mean():+.4f}, random ones of the same norm {random_N.mean():+.4f}"
    )
    word = {True: "localised", "undecided": f"{NONE}: undecided"}.get(holds, NONE)
    if holds == "set-up invalid":
        word = f"{NONE}: the model does not tell these capabilities apart, neither by its loss nor by any neuron"
    return {
        "table": rows,
        "capabilities": list(names),
        "loss": [float(found.loss_N[found.label_N == c].mean()) for c in range(len(names))],
        "matrix": matrix_CC.tolist(),
        "random": random_CD.tolist(),
        "diagonal": own.mean,
        "off_diagonal": float(others_N.mean()),
        "random_mean": float(random_N.mean()),
        "norm_ratio": list(found.norm_ratio),
        "comparisons": comparisons,
        "gate": gate,
        "holds": holds,
        "sentence": f"{word}; {figures}",
    }


def _gate(found: Found, names: Sequence[str], best: Sequence[float]) -> dict[str, Any]:
    """Whether there is anything to localise: the model tells capabilities apart by its loss or by single neurons."""
    base_rate = 1 / len(names)
    bound = base_rate + FAR * (1 - base_rate)
    p = float(f_oneway(*(found.loss_N[found.label_N == c] for c in range(len(names)))).pvalue)
    return {
        "what": f"the capabilities' losses differ (p < {SURE:g}), or each has a neuron chosen on half A whose average "
        f"precision on half B is at least {bound:.2f} (base rate {base_rate:.2f})",
        "p": p,
        "precision": dict(zip(names, map(float, best), strict=True)),
        "holds": bool(p < SURE or min(best) >= bound),
    }


def _verdict(low: float, high: float) -> Any:
    return True if low >= 0 else False if high < 0 else "undecided"
