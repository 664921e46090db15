"""Mediator: average the blocks on which experts agree, route those on which they conflict, keep experts sparse.

    tau_t   = theta_t - theta_0                              theta_0: the base; theta_t: one of T fully tuned experts
    c_l     = (1/N_l) #{j : exists s, t with tau_s[j] tau_t[j] < 0}       over block l, after keeping the largest 20 %
              of each tau_t (see `_conflict`); block l is routed where c_l > mean + k std, else averaged
    D       = theta_0 + (1/T) sum_t tau_t                    the dense model, in all tensors; or another merge: `inner`
    S_t,l   = the fraction `density` of theta_t,l - D_l that is largest in magnitude, of routed blocks alone
    p(t|x)  = router(x), once per prompt                     u(x) = entropy(p) / log T           (see `_router`)
    u <= u0:  W = D + S_t* for the most probable task
    u >  u0:  W = D + sum_t w_t S_t                          w: p over the fewest tasks that hold 0.9 of it, normalised

W is written in place at the touched entries and taken back afterwards, so that one set of weights is active per
request and generation keeps its cache. Embeddings, final norm and output layer are averaged. Residuals are taken
against D as it is stored: against theta_0 they would count the average twice.

A routed folder is a plain model folder (D) with `experts/TASK.safetensors`, `router.safetensors`, `heads/` and
`route.json`; `brickyard evaluate --brick` and `predict --brick` take it, and `RoutedModel` is its Python form.

Source: Lai, Tang, Pan et al., "Mediator: Memory-efficient LLM Merging with Less Parameter Conflicts and Uncertainty
Based Routing", arXiv 2502.04411. A reconstruction: no code of the authors was found, so the conflict score, the
threshold and the router are options. Headline claim: better than static and dynamic merging and close to the experts,
at far lower storage. Left out: token-level routing (it breaks the cache), mixed batches as sparse products on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record
from brickyard.route._conflict import Tensors
from brickyard.route._residual_store import VALUES, Packed, largest, pack, quantised
from brickyard.route._routed_model import RoutedModel, load_routed

__all__ = ["RECORD", "Config", "RoutedModel", "choose", "decompose", "load_routed", "within_budget"]

RECORD = Record(
    name="mediator",
    family="route",
    title="Agreeing blocks averaged, conflicting ones routed to sparse experts",
    paper="arXiv 2502.04411",
    needs=("text-classification", "pair-classification", "regression", "causal-lm", "instruct", "multiple-choice"),
    because="its router reads a prompt's text",
    claims=(
        Claim(
            text="With an oracle router, half of the gap between the average and the experts is closed.",
            measure="by_tasks",
            part="half the gap",
            train_rows=800,
            epochs=3,
            full={"train_rows": 1500},
        ),
        Claim(
            text="Blocks chosen by conflict are better than random ones, and by no more than 0.3 points worse.",
            measure="by_tasks",
            part="conflict",
            train_rows=800,
            epochs=3,
            full={"train_rows": 1500},
        ),
        Claim(
            text="Stored bytes are at most 1 + 1.5 T density (share of routed weights) models.",
            measure="by_tasks",
            part="bytes",
            kind="counted",
            train_rows=800,
            epochs=3,
            full={"train_rows": 1500},
        ),
        Claim(
            text="The learned router is within 1 point of the oracle.",
            measure="by_tasks",
            part="router",
            train_rows=800,
            epochs=3,
            full={"train_rows": 1500},
        ),
        Claim(
            text="On an unseen task, blending experts is no more than 0.5 points below the most probable one.",
            measure="by_tasks",
            part="unseen",
            train_rows=800,
            epochs=3,
            full={"train_rows": 1500},
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the method; the paper's own are not known, so these are a reconstruction's."""

    layers: Literal["auto"] | int | tuple[int, ...] = "auto"
    """blocks that are routed: auto (by the conflict score), how many of the most conflicting, or a list from 0 on"""
    k: float = 0.0
    """with layers=auto: standard deviations above the mean score from which on a block is routed"""
    budget: float | None = None
    """with layers=auto: most that is stored, in models; blocks are routed by falling score as far as it reaches"""
    conflict: Literal["sign", "magnitude", "cosine"] = "sign"
    """the score: share of entries with opposed signs, cancelled magnitude, or pairwise angle"""
    trim: float = 0.2
    """share of each change, by magnitude within a tensor, that the score looks at, in (0, 1]"""
    inner: str = "average"
    """the merge that makes the dense model, any arm of brickyard merge, such as 'ties:density=0.3'"""
    density: float = 0.1
    """share of a routed block's residual that an expert keeps, in [0, 1]"""
    values: Literal["float16", "int8", "float32"] = "float16"
    """how kept values are stored"""
    rescale: bool = False
    """scale each kept residual to the norm of the whole"""
    router: Literal["embeddings", "dense", "encoder"] = "embeddings"
    """what the router takes the mean of: the dense model's input embeddings (no layer is run), its last states (one
    forward of the prompt), or the last states of the embedded sentence encoder (a second model)"""
    prompts: int = 400
    """prompts of each task, at most, that the router is fitted on, and again that are held out"""
    tokens: int = 128
    """tokens of a prompt that the router reads; what is longer is cut for it alone, and counted"""
    smoothing: float = 0.1
    """label smoothing of the router's fit, in [0, 1)"""
    u0: float | None = None
    """uncertainty above which experts are blended, in [0, 1]; none: its 95th percentile on held-out prompts"""
    mass: float = 0.9
    """probability that blended tasks hold together at least, in (0, 1]"""
    top_k: int = 0
    """blend so many tasks instead; 0: as many as mass asks for"""

    def __post_init__(self) -> None:
        expected = {
            "k": (math.isfinite(self.k), "a finite number"),
            "budget": (self.budget is None or self.budget >= 1, "at least 1: the dense model itself"),
            "trim": (0 < self.trim <= 1, "above 0 and at most 1"),
            "density": (0 <= self.density <= 1, "from 0 to 1"),
            "prompts": (self.prompts >= 1, "at least 1"),
            "tokens": (self.tokens >= 4, "at least 4"),
            "smoothing": (0 <= self.smoothing < 1, "from 0 to below 1"),
            "u0": (self.u0 is None or 0 <= self.u0 <= 1, "from 0 (blend always) to 1 (never)"),
            "mass": (0 < self.mass <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
        }
        for name, (ok, what) in expected.items():
            if not ok:
                raise UsageError(f"mediator: {name}={getattr(self, name)}; expected {what}.")
        if self.layers != "auto" and (self.k != 0 or self.budget is not None):
            raise UsageError(f"mediator: layers={self.layers} says which blocks are routed; leave out k and budget.")
        if self.budget is not None and self.k != 0:
            raise UsageError("mediator: k and budget both say how many blocks are routed; give one.")


def choose(scores: Sequence[float], layers: str | int | Sequence[int] = "auto", k: float = 0.0) -> list[int]:
    """Return the rising numbers of the blocks that are routed.

    scores: c_l of every block; layers, k: as in Config. Of equal scores the first blocks go first. With "auto" and
    equal scores throughout, no block stands out and none is routed.

    Raises UsageError for more blocks than there are, or for one that is not there.
    """
    count = len(scores)
    if isinstance(layers, str):
        limit = float(np.mean(scores) + k * np.std(scores))
        return [place for place, score in enumerate(scores) if score > limit + 1e-12]
    if isinstance(layers, int):
        if not 0 <= layers <= count:
            raise UsageError(f"mediator: layers={layers}; the base has {count} blocks, expected 0 to {count}.")
        return sorted(falling(scores)[:layers])
    wrong = [place for place in layers if not 0 <= place < count]
    if wrong or len(set(layers)) < len(layers):
        raise UsageError(
            f"mediator: layers={list(layers)}; expected different numbers from 0 to {count - 1}, as the base has "
            f"{count} blocks."
        )
    return sorted(layers)


def falling(scores: Sequence[float]) -> list[int]:
    """Return the blocks' numbers by falling score, the first of equals first."""
    return [int(place) for place in np.argsort(-np.asarray(scores), kind="stable")]


def within_budget(
    scores: Sequence[float], elements: Sequence[int], config: Config, *, experts: int, dense_bytes: int
) -> list[int]:
    """Return the most conflicting blocks whose sparse experts fit into config.budget - 1 dense models, at most.

    elements: N_l of every block. An index is taken to need a bit for every entry, which no index exceeds.
    """
    assert config.budget is not None
    left, out = (config.budget - 1) * dense_bytes, []
    for place in falling(scores):
        kept = round(config.density * elements[place])
        left -= experts * (kept * VALUES[config.values].itemsize + -(-elements[place] // 8))
        if left < 0:
            break
        out.append(place)
    return sorted(out)


def decompose(
    dense: Tensors, experts: Mapping[str, Tensors], blocks: Sequence[Sequence[str]], config: Config
) -> dict[str, dict[str, Packed]]:
    """Return S_t of every expert, packed, by the name of the tensor; a block of one expert is held at a time.

    Args:
        dense: D, as it is stored.
        experts: theta_t by task, every tensor of it, changed or not: D differs from the base everywhere.
        blocks: the names of the tensors of every routed block.
    """
    out: dict[str, dict[str, Packed]] = {task: {} for task in experts}
    for names in blocks:
        for task, expert in experts.items():
            residual = {name: (expert[name] - dense[name]).reshape(-1) for name in names}
            places = largest(residual, config.density)
            factor = 1.0
            if config.rescale:
                whole = math.sqrt(sum(float(r.double().square().sum()) for r in residual.values()))
                kept = math.sqrt(sum(float(r[places[n]].double().square().sum()) for n, r in residual.items()))
                factor = whole / kept if kept else 1.0
            for name, residual_N in residual.items():
                if len(places[name]):
                    out[task][name] = pack(quantised(residual_N, places[name], config.values, factor))
    return out
