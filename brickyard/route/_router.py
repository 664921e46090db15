"""Which task a prompt belongs to, how sure that is, and the weights of the experts that follow from it.

    z(x) = W v(x) + b           v: mean over the prompt's tokens, of the rows of a frozen model's table of input
                                embeddings (no layer is run) or of its last states; W, b: logistic regression with
                                label smoothing
    p(t|x) = softmax(z / temperature)       temperature: least negative log-likelihood on prompts held out of the fit
    u(x) = - sum_t p log p / log T          in [0, 1]
    u <= u0:  w = 1 for the most probable task
    u >  u0:  w = p over the fewest tasks that hold `mass` of it, divided by their sum

u0 is the 95th percentile of u on the held-out prompts. There the calibration takes Platt's targets, (n + 1) / (n + T)
for the right task of n prompts, so that a router without an error among them does not become sure of everything.

Source of the targets: Platt 1999, "Probabilistic outputs for support vector machines", sec. 2.2. Shapes: N prompts,
T tasks, D width of what is read, V rows of a table of embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import entr, log_softmax
from torch import Tensor, nn

from brickyard.core.base import Base
from brickyard.core.batches import EncodedText, encode
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadBrick, BadData, Refused, UsageError
from brickyard.core.fitted_head import fit_on, pooled_states
from brickyard.core.split import Split
from brickyard.core.task import Task

PERCENTILE = 95  # of u on held-out prompts
READS = ("embeddings", "dense", "encoder")  # what v is the mean of; the last: the states of a second, small model
_L2 = 1e-3  # on scaled features
_TEMPERATURES = (1e-2, 1e2)
_PROMPTS = Task("text-classification", "accuracy", ("0", "1"), 2, "text")  # how prompts are encoded: without labels


def temperature_of(z_NT: np.ndarray, tasks_N: np.ndarray) -> float:
    """Return the temperature that makes softmax(z / temperature) most likely on labelled prompts, in [0.01, 100]."""
    n, tasks = z_NT.shape
    target_NT = np.full(z_NT.shape, 1 / (n + tasks))
    target_NT[np.arange(n), tasks_N] = (n + 1) / (n + tasks)

    def loss(log_temperature: float) -> float:
        return -float((target_NT * log_softmax(z_NT / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    # Convex in 1 / temperature, so it has one minimum in its logarithm too.
    found: Any = minimize_scalar(loss, bounds=tuple(np.log(_TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def uncertainty(p_NT: np.ndarray) -> np.ndarray:
    """Return the entropy of every row over log T: [N] in [0, 1]; 0 where there is one task."""
    if p_NT.shape[1] == 1:
        return np.zeros(len(p_NT))
    return (entr(p_NT).sum(axis=1) / math.log(p_NT.shape[1])).clip(0.0, 1.0)


def blend(
    p_NT: np.ndarray, u0: float, *, mass: float = 0.9, top_k: int = 0, u_N: np.ndarray | None = None
) -> np.ndarray:
    """Return the weights of the experts for every prompt, rows that sum to 1: [N, T].

    Args:
        p_NT: probabilities of the tasks.
        u0: uncertainty above which experts are blended, in [0, 1].
        mass: what the blended tasks hold together at least, in (0, 1].
        top_k: blend so many tasks instead; 0: as many as `mass` asks for.
        u_N: uncertainty, where it is known already.
    """
    # Rows of a handful of numbers, and mostly one row: Python is done before numpy has begun.
    u_N = uncertainty(p_NT) if u_N is None else u_N
    enough, out = math.inf if top_k else mass - 1e-12, []
    for p_T, u in zip(p_NT.tolist(), u_N.tolist(), strict=True):
        most = 1 if u <= u0 else top_k or len(p_T)
        kept: dict[int, float] = {}
        held = 0.0
        for task in sorted(range(len(p_T)), key=p_T.__getitem__, reverse=True):
            if kept and (len(kept) >= most or held >= enough):
                break
            kept[task] = p_T[task]
            held += p_T[task]
        out.append([kept.get(task, 0.0) / held for task in range(len(p_T))])
    return np.array(out).reshape(p_NT.shape)


@dataclass(frozen=True)
class Routes:
    """What the router says of N prompts: p_NT, u_N, and the weights of the experts w_NT."""

    p_NT: np.ndarray
    u_N: np.ndarray
    w_NT: np.ndarray
    truncated: int

    @property
    def best_N(self) -> np.ndarray:
        """The most probable task of each prompt."""
        return self.p_NT.argmax(axis=1)

    @property
    def blended_N(self) -> np.ndarray:
        """Whether several experts act at once."""
        return np.count_nonzero(self.w_NT, axis=1) > 1


@dataclass(frozen=True)
class Router:
    """A fitted router; `report` says what it was fitted on and how it does on held-out prompts."""

    weight_TD: Tensor
    bias_T: Tensor
    temperature: float
    u0: float
    mass: float
    top_k: int
    tokens: int
    report: dict[str, Any]
    reads: str = "dense"

    def probabilities(self, v_ND: Tensor) -> np.ndarray:
        """Return p(t|x) from what was read: [N, T] in float64, rows sum to 1."""
        return _softmax(nn.functional.linear(v_ND, self.weight_TD, self.bias_T), self.temperature)

    def routes(self, v_ND: Tensor, truncated: int = 0) -> Routes:
        """Return what follows from what was read."""
        p_NT = self.probabilities(v_ND)
        u_N = uncertainty(p_NT)
        return Routes(p_NT, u_N, blend(p_NT, self.u0, mass=self.mass, top_k=self.top_k, u_N=u_N), truncated)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight_TD, "bias": self.bias_T}

    def about(self) -> dict[str, Any]:
        """Return all but the tensors and what is read."""
        known = ("temperature", "u0", "mass", "top_k", "tokens", "report")
        return {name: getattr(self, name) for name in known}


def read_router(tensors: Mapping[str, Tensor], about: Mapping[str, Any], tasks: int, reads: str = "dense") -> Router:
    """Return a stored router; BadBrick where it does not fit the tasks, or reads what this release does not know."""
    if reads not in READS:
        raise BadBrick(f"the router reads {reads!r}; this release knows {', '.join(READS)}. Update Brickyard.")
    if tensors.keys() != {"weight", "bias"} or tensors["weight"].shape[0] != tasks != 0:
        raise BadBrick(f"the router's tensors do not fit {tasks} tasks; the folder is damaged. Route the models again.")
    return Router(tensors["weight"], tensors["bias"], **about, reads=reads)


def fit_router(
    states: Sequence[Tensor],
    held: Sequence[Tensor],
    *,
    smoothing: float = 0.1,
    u0: float | None = None,
    mass: float = 0.9,
    top_k: int = 0,
    tokens: int = 0,
    reads: str = "dense",
) -> Router:
    """Fit a router on what was read of each task's prompts, and calibrate it on held-out ones.

    Args:
        states: [N_t, D] of every task.
        held: [M_t, D] of every task, of other prompts.
        u0: uncertainty above which experts are blended; None: the 95th percentile on the held-out prompts.
        smoothing, mass, top_k, tokens: as in mediator's Config; reads: its `router`.

    Raises UsageError where there is only one task, BadData where a task has no prompt or no held-out prompt.
    """
    tasks = len(states)
    if tasks < 2:
        raise UsageError(f"a router chooses among tasks; {tasks} was given. Give at least two experts with their data.")
    for place, (own, kept) in enumerate(zip(states, held, strict=True)):
        if not len(own) or not len(kept):
            raise BadData(
                f"task {place + 1} has {len(own)} prompts to fit the router on and {len(kept)} held out; expected at "
                "least one of each."
            )
    known = Task("text-classification", "accuracy", tuple(map(str, range(tasks))), tasks, "text")
    head = fit_on(torch.cat(list(states)), _numbers(states), known, l2=_L2, smoothing=smoothing)
    v_ND, truth_N = torch.cat(list(held)), _numbers(held).numpy()
    logits_NT = nn.functional.linear(v_ND, head.weight_KD, head.bias_K)
    z_NT = logits_NT.double().numpy()
    temperature = temperature_of(z_NT, truth_N)
    p_NT = _softmax(logits_NT, temperature)
    found = float(np.percentile(uncertainty(p_NT), PERCENTILE)) if u0 is None else u0
    report = {
        "prompts": [len(part) for part in states],
        "held_out": [len(part) for part in held],
        "accuracy": float((p_NT.argmax(axis=1) == truth_N).mean()),
        "nats": float(-np.log(p_NT[np.arange(len(truth_N)), truth_N].clip(1e-300)).mean()),
        "nats_uncalibrated": float(-log_softmax(z_NT, axis=1)[np.arange(len(truth_N)), truth_N].mean()),
        "blended": float((uncertainty(p_NT) > found).mean()),
    }
    return Router(head.weight_KD.data, head.bias_K.data, temperature, found, mass, top_k, tokens, report, reads)


def _softmax(z_NT: Tensor, temperature: float) -> np.ndarray:
    return (z_NT.double() / temperature).softmax(dim=1).numpy()


def _numbers(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(part),), task, dtype=torch.int64) for task, part in enumerate(parts)])


def states_of(
    network: nn.Module, base: Base, texts: Sequence[str], tokens: int, reads: str = "dense"
) -> tuple[Tensor, int]:
    """Return what a router reads of prompts, [N, D] (see `pooled`), and how many of them were cut to `tokens`."""
    limit = tokens if base.context is None else min(tokens, base.context)
    rows = encode(Split({"text": list(texts)}), base, _PROMPTS, max_length=limit)
    return pooled(network, rows, reads), int(rows.report["truncated"])


def pooled(network: nn.Module, rows: Encoded, reads: str) -> Tensor:
    """Return what a router reads of encoded prompts, on the CPU in float32: [N, D].

    reads: "embeddings": the mean of each prompt's rows of the network's table; else the mean of its last states.
    """
    return pooled_embeddings(network, rows) if reads == "embeddings" else pooled_states(network, rows)


def pooled_embeddings(network: nn.Module, rows: Encoded) -> Tensor:
    """Return the mean input embedding of every prompt's tokens, on the CPU in float32: [N, D].

    Prompts lie behind one another, each with its own length, so padding is never looked up. Positions and whatever else
    the network adds to its table are left out: no module of it is called.

    Raises Refused where the network has no such table.
    """
    assert isinstance(rows, EncodedText)
    table_VD = _table(network)
    lengths_N = torch.from_numpy(rows.lengths)
    starts_N = (lengths_N.cumsum(0) - lengths_N).to(table_VD.device)
    ids = torch.from_numpy(rows.ids).to(table_VD.device)
    # On a CPU torch sums bags by a fast kernel; its own mean takes three times as long.
    sum_ND = nn.functional.embedding_bag(ids, table_VD, starts_N, mode="sum").to("cpu", torch.float32)
    return sum_ND / lengths_N.unsqueeze(1)


def _table(network: nn.Module) -> Tensor:
    """Return the weights of the network's input embeddings [V, D]."""
    try:
        found = network.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # what transformers raises where it finds none
        found = None
    if not isinstance(found, nn.Embedding):
        raise Refused(
            f"{type(network).__name__} has no table of input embeddings that a router could read; give router=dense, "
            "which reads its last states."
        )
    return found.weight.detach()
