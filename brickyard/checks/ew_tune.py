"""EW-Tune's accounts against each other, and its low-rank views against whole gradients."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.checks._place import place_of
from brickyard.checks._runs import answers, arm_row, asked_by, majority, trained, tuned, with_training
from brickyard.checks._takes import takes
from brickyard.checks.run import Inequality, judge
from brickyard.core import measure
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.errors import Refused
from brickyard.core.method import Claim
from brickyard.core.privacy import Mechanism, epsilon_of
from brickyard.core.roles import blocks, roles
from brickyard.private._engines import Hooked
from brickyard.private._per_sample import Term
from brickyard.private._step import Whole
from brickyard.private.ew_tune import Config, LowRank, noise_of
from brickyard.private.ew_tune import edgeworth_epsilon as estimate

# noise, rate, steps of the settings that the claims are judged in
SETTINGS = ((0.8, 0.01, 1000), (1.0, 0.0297, 660), (0.7, 0.0297, 660), (2.0, 0.05, 200), (1.0, 0.00509, 3920))
DELTA = 1e-5
NEAR = 0.08
EPSILON, RATE, STEPS = 3.0, 0.01, 1000
SAVED = 0.02  # share of Rényi's noise
MARGIN, SHARE = -1.5, 1.2
DROWNED = 0.02  # an epsilon whose noise leaves nothing to learn from


def noise(claim: Claim) -> dict[str, Any]:
    """Return {"less": noise needed by each account at epsilon 3, "near": the estimate beside the certified bound}."""
    asked = {"rdp": {"accountant": "rdp"}, "pld": {"accountant": "pld"}, "edgeworth, order 2": {"order": 2}}
    needed = {
        name: noise_of(Config(epsilon=EPSILON, delta=DELTA, **options), RATE, STEPS) for name, options in asked.items()
    }  # type: ignore[arg-type]
    saved = {name: 1 - sigma / needed["rdp"] for name, sigma in needed.items() if name != "rdp"}
    table = []
    for setting in SETTINGS:
        mechanism = Mechanism(*setting)
        found = {"certified": epsilon_of([mechanism], DELTA), "estimate": estimate(mechanism, DELTA, 2)}
        table.append({"setting": setting, **found, "off": found["estimate"] / found["certified"] - 1})
    # An account that is merely wrong asks for less noise, too: what it calls 3 must be 3 by the certified bound.
    half = noise_of(Config(epsilon=EPSILON, delta=DELTA, order=2), RATE, STEPS // 2)
    honest = {name: epsilon_of([Mechanism(sigma, RATE, STEPS)], DELTA) for name, sigma in needed.items()}
    halved = epsilon_of([Mechanism(half, RATE, STEPS)], DELTA)
    worst = max(abs(row["off"]) for row in table)
    under = sum(row["estimate"] < row["certified"] for row in table)
    # Fifty steps leave no normal law to expand about: an estimate that still agreed would be a copy of the bound.
    few = Mechanism(0.8, 0.01, 50)
    try:
        control = abs(estimate(few, DELTA, 2) / epsilon_of([few], DELTA) - 1)
    except Refused:
        control = None
    return {
        "less": {
            "inequality": f"noise(Edgeworth), noise(PLD) < {1 - SAVED:g} noise(Rényi), each epsilon being certified",
            "holds": min(saved.values()) > SAVED and max(honest.values()) <= EPSILON * (1 + NEAR),
            "measured": min(saved.values()),
            "figures": {"noise": needed, "saved": saved, "certified": honest},
            "control": {
                "what": "an account of half the steps needs less noise, and spends more than it says",
                "measured": halved,
                "destroyed": 1 - half / needed["rdp"] > SAVED and halved > EPSILON * (1 + NEAR),
            },
            "gate": None,
            "detail": "noise " + ", ".join(f"{name} {sigma:.4g}" for name, sigma in needed.items()),
        },
        "near": {
            "inequality": f"|estimate / certified - 1| <= {100 * NEAR:g} %",
            "holds": worst <= NEAR,
            "measured": worst,
            "figures": {"table": table, "under-reported": under},
            "control": {
                "what": "50 steps leave no normal law: the estimate is off, or refused",
                "measured": control,
                "destroyed": control is None or control > NEAR,
            },
            "gate": None,
            "detail": f"off by {100 * worst:.1f} % at most; below the bound in {under} of {len(table)} settings",
        },
    }


@takes("base", "data")
def low_rank(claim: Claim, *, epsilon: float = 8.0, workers: int = 2) -> dict[str, Any]:
    """Judge rank-1 views against whole gradients of the last block's query and value, and count their rows' bytes.

    Each has its own learning rate, from validation: without views noise falls on many more numbers.
    """
    step = "ew-tune:epsilon={},accountant=pld,clip=1.0,rank={}"
    layers = f"full:target={json.dumps(last_projections(claim.base))}"
    arms = {name: f"{layers} + {step.format(epsilon, rank)}" for name, rank in (("views", 1), ("whole", 0))}
    asked = asked_by(claim)
    with place_of("ew-tune", claim, epsilon) as folder:
        arms = tuned(claim, arms, asked, folder, workers)
        drowned = f"{layers} + {step.format(DROWNED, 1)}"
        arms["drowned"] = with_training(drowned, **parse(arms["views"]).training)
        seeds = {name: claim.seeds for name in arms} | {"drowned": claim.control_seeds or claim.seeds}
        runs = {name: trained({name: arms[name]}, asked, seeds[name], folder, workers)[name] for name in arms}
        given = {name: answers(folder, name, seeds[name]) for name in arms}
    given["majority"] = majority(given["whole"])
    metric = runs["whole"][0]["score"]["metric"]
    found = judge(Inequality("views", "whole", MARGIN), given, metric)
    gate = judge(Inequality("whole", "majority", 5.0), given, metric)
    control = judge(Inequality("views", "drowned", 5.0), given, metric)
    outputs, inputs = 384, 1536
    bound = SHARE * (outputs + inputs) / (outputs * inputs)
    share, unseen = gradient_share(outputs, inputs, 1), gradient_share(outputs, inputs, 0)
    holds = found["holds"] if share <= bound else False
    return {
        **found,
        "inequality": f"views >= whole {MARGIN:+g} points, and bytes(views) <= {100 * bound:.2f} % of the gradients'",
        "holds": holds if gate["holds"] is True else "set-up invalid",
        "arms": {name: arm_row(text, runs[name]) for name, text in arms.items()},
        "figures": {"share of bytes of a 384 x 1536 matrix": share, "whole gradients' share": unseen, "limit": bound},
        "control": {
            "what": f"noise for epsilon {DROWNED} drowns what the rows say; without views the bytes exceed the limit",
            "measured": control["measured"],
            "destroyed": control["holds"] is True and unseen > bound,
        },
        "gate": {"what": "whole gradients learn the task", **gate},
        "detail": (
            f"views {found['measured']:+.2f} points against whole gradients "
            f"({found['low']:+.2f} to {found['high']:+.2f}); rows' gradients take {100 * share:.2f} % of their bytes "
            f"(limit {100 * bound:.2f} %), without views {100 * unseen:.2f} %"
        ),
    }


def last_projections(base: str) -> list[str]:
    """Return the names of the query and value layers of the last block, as a target takes them."""
    outline = open_base(base).outline()
    last, _ = blocks(outline)[-1]
    return [n for n, role in roles(outline).items() if role in ("query", "value") and n.startswith(f"{last}.")]


class _Watched(Hooked):
    """The engine, which notes how many bytes stand for the rows' gradients of each of its layers."""

    held = 0

    def _take(self, terms: dict[str, list[Term]], module: nn.Module, x: Tensor, g: Tensor) -> None:
        super()._take(terms, module, x, g)
        kept = [value for found in terms.values() for term in found for value in vars(term).values()]
        self.held = measure.distinct_bytes([value for value in kept if isinstance(value, Tensor)])


class _Layer(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(x_BTD)


def gradient_share(outputs: int, inputs: int, rank: int, *, rows: int = 4, tokens: int = 32) -> float:
    """Return the bytes that the engine keeps for the gradients of `rows` rows, as a share of these gradients' own.

    Counted on the tensors of a backward pass through one matrix; `rank` 0: seen whole.
    """
    model = _Layer(outputs, inputs)
    named = dict(model.named_parameters())
    view = LowRank(rank, named) if rank else Whole(named)
    engine = _Watched(model, named)
    engine.factors = view.factors(named)
    sums = {name: torch.zeros(shape) for name, shape in view.shapes(named).items()}
    x_BTD = torch.randn(rows, tokens, inputs, generator=torch.Generator().manual_seed(0))
    losses = lambda call, given: call(given["x"]).square().mean((1, 2))  # noqa: E731
    engine.add(losses, {"x": x_BTD, "labels": torch.zeros(rows)}, torch.ones_like, sums)
    return engine.held / (rows * model.linear.weight.nbytes)
