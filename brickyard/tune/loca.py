"""LoCA: weight changes made of a few cosines, whose coefficients and whose places in the spectrum are learned.

    dW = alpha C_m^T S C_n                 y = W x + dW x        S [m, n] is zero but S[row_k, col_k] += a_k, k = 1 .. K
    row_k = round((m - 1) u_1k)            col_k = round((n - 1) u_2k)              C_N: the orthonormal DCT-II [N, N]

a [K] starts at zero, so a fresh adapter changes nothing; u [2, K] ~ U(0, 1), held in [0, 0.999]. Both train, by
Z = C_m G C_n^T, where G = alpha g^T x [m, n] is the gradient of C_m^T S C_n (x [T, n] inputs, g [T, m] gradient of y):

    dL/da_k   = Z[row_k, col_k]
    dL/drow_k = clip(a_k / 2 (Z[row_k + 1, col_k] - Z[row_k - 1, col_k]), -1, 1),      dL/du_1k = (m - 1) dL/drow_k

straight through the rounding, and so for columns; an index beyond the border is the border. They take turns: of every
30 steps the first 10 train a, the other 20 train u, until a tenth of all steps is over; from then on only a trains. Who
rests keeps its optimiser's moments and does not move. A layer goes the cheapest of three ways for its batch. Tokens:
y' = alpha ((x C_n[col]^T) * a) C_m[row], and the wanted entries of Z are sums over tokens of the same products.
Spectrum: y' = alpha (S (x C_n^T)^T)^T C_m, K additions between two transforms. Neither sees an [m, n] matrix. Dense: dW
and Z of one layer at a time are made, and made anew on the way back.

Source: "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", ICLR 2025, arXiv 2502.06820.
Headline claim: LoRA's and FourierFT's quality with a fraction of LoRA's parameters. In the released code each layer
counts its own forwards to take turns; here the loop's steps count, so accumulation and evaluation cannot shift them.
K values train where positions are fixed (`locate=0`), 3 K where they learn. 0.999 (m - 1) rounds below m - 1 from
m = 502 on, as in the paper: the last row and column of larger layers are out of reach.
Legend: m out, n in, T tokens of the batch, K coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, Refused, UsageError
from brickyard.core.inject import BrickyardLinear, Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.core.wrap import ADAPTER
from brickyard.tune._cosines import (
    COEFFICIENTS,
    POSITIONS,
    SPECTRUM,
    WAYS,
    Cosines,
    by_spectra,
    change,
    cheapest,
    nearest,
)

if TYPE_CHECKING:
    from brickyard.core.loop import State

RECORD = Record(
    name="loca",
    family="tune",
    title="Location-aware cosine adaptation: a few DCT coefficients at learned places",
    paper="LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning, ICLR 2025, arXiv 2502.06820",
    slot="tuner",
    search={"lr": (5e-3, 3e-2, 1.5e-1)},
    training={"lr": 5e-3, "wd": 0.0},
    claims=(
        Claim(
            text="LoCA with 300 coefficients a matrix is at most 1 point below LoRA r=8, with 1/6 of its values.",
            inequality="loca >= lora - 1.0",
            arms={"loca": "loca:n_frequency=300", "lora": "lora"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "loca:n_frequency=300",
                "labels": "shuffled",
                "inequality": "loca > control + 5.0",
            },
            gate="lora > majority + 10.0",
            epochs=2,
            lr_factors=(3.0, 10.0, 30.0),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "lr_factors": (0.3, 1.0, 3.0)},
        ),
        Claim(
            text="LoCA is at least as good as FourierFT with as many coefficients.",
            inequality="loca >= fourierft",
            arms={"loca": "loca:n_frequency=300", "fourierft": "fourierft:n_frequency=300,zero=true"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "loca:n_frequency=300",
                "labels": "shuffled",
                "inequality": "loca > control + 5.0",
            },
            gate="fourierft > majority + 10.0",
            epochs=2,
            lr_factors=(3.0, 10.0, 30.0),
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "lr_factors": (0.3, 1.0, 3.0)},
        ),
        Claim(
            text="On a language model it keeps at least 90 % of the gain of LoRA r=8 over the untouched base.",
            inequality="loca >= 0.9 lora",
            arms={
                "loca": "loca:n_frequency=300",
                "lora": "lora",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "loca:n_frequency=300",
                "labels": "shuffled",
                "inequality": "loca > control + 0.5",
            },
            gate="lora > base + 1.0",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0, 100.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="On a language model it gains at least as much as FourierFT with as many coefficients.",
            inequality="loca >= fourierft",
            arms={
                "loca": "loca:n_frequency=300",
                "fourierft": "fourierft:n_frequency=300,zero=true",
            },
            control={
                "what": "every next token dealt out anew within its block: there is nothing left to learn",
                "arm": "loca:n_frequency=300",
                "labels": "shuffled",
                "inequality": "loca > control + 0.5",
            },
            gate="fourierft > base + 0.5",
            base="embedded:pylm",
            data="embedded:python-tests",
            epochs=4,
            lr_factors=(3.0, 10.0, 30.0, 100.0),
            train_rows=200,
            batch=4,
            max_length=128,
            full={"epochs": 1, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="Learned positions move, fit the training rows better than fixed random ones, and new rows no worse.",
            measure="location",
            epochs=2,
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0, "batch": 0, "max_length": 0, "seeds": 5},
        ),
        Claim(
            text="Of nearly random matrices the best cosines keep more than singular vectors, random ones keep less.",
            measure="reconstruction",
            epochs=1,
            seeds=8,
            train_rows=600,
            batch=8,
            full={"epochs": 3, "train_rows": 0},
        ),
    ),
)

LAST = 0.999  # largest u: the paper's


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LoCA; UsageError for values out of range. That K fits a layer is checked when the base is known."""

    n_frequency: int = 1000
    """K, coefficients of each matrix"""
    alpha: float = 1.0
    """scale of the change"""
    locate: float = 0.1
    """share of the steps in which positions learn, at least one cycle; 0: fixed random positions"""
    cycle: tuple[int, int] = (10, 20)
    """steps that train coefficients, then steps that train positions, in turns while positions learn"""
    position_lr: float = 0.02
    """learning rate of the positions, as a share of that of the coefficients"""
    head_lr: float = 0.2
    """learning rate of the task's head, as a share of that of the coefficients"""
    mode: Literal["auto", "tokens", "spectrum", "dense"] = "auto"
    """through K cosines of the tokens, through their whole spectra, through one layer's matrix, or the cheapest"""
    target: str | tuple[str, ...] = ("query", "value")
    """`blocks` (all linear layers of the repeated blocks), roles, `all-linear`, or patterns of layer names"""

    def __post_init__(self) -> None:
        if self.n_frequency < 1:
            raise UsageError(f"loca: n_frequency={self.n_frequency}; at least 1 coefficient a matrix is needed.")
        if not self.alpha > 0 or not self.position_lr > 0 or not self.head_lr > 0:
            raise UsageError(
                f"loca: alpha={self.alpha}, position_lr={self.position_lr} and head_lr={self.head_lr} must be positive."
            )
        if not 0 <= self.locate <= 1:
            raise UsageError(f"loca: locate={self.locate} is a share of the steps, from 0 to 1.")
        if min(self.cycle) < 1:
            raise UsageError(f"loca: cycle={self.cycle}; give at least 1 step to coefficients and 1 to positions.")
        if self.mode not in ("auto", *WAYS):
            raise UsageError(f"loca: mode={self.mode!r}; auto, {', '.join(WAYS[:-1])} or {WAYS[-1]} were expected.")


def learning(step: int, until: int, cycle: tuple[int, int]) -> str:
    """Return what trains in optimiser step `step` (from 0): POSITIONS or COEFFICIENTS; positions end before `until`."""
    return POSITIONS if step < until and step % sum(cycle) >= cycle[0] else COEFFICIENTS


def places(u_2K: Tensor, m: int, n: int) -> Tensor:
    """Return real positions [2, K], rows in 0 .. m - 1 and columns in 0 .. n - 1, for u [2, K] held in [0, 0.999]."""
    held_2K = u_2K.clamp(0, LAST)
    return torch.stack([held_2K[0] * (m - 1), held_2K[1] * (n - 1)])


def plan(config: Config, leaves: Sequence[Leaf], generator: torch.Generator) -> Plan:
    """Lay out coefficients and positions; Refused where a layer has fewer than K entries."""
    made = Plan()
    for leaf in leaves:
        m, n = leaf.out_features, leaf.in_features
        if config.n_frequency > m * n:
            raise Refused(
                f"loca: n_frequency={config.n_frequency} exceeds the {m * n} entries of layer {leaf.name} ({n} in, {m} "
                f"out); use at most {m * n}, or leave it out of target."
            )
        made.own[leaf.name] = {COEFFICIENTS: torch.zeros(config.n_frequency)}
        u_2K = torch.rand(2, config.n_frequency, generator=generator).clamp_(max=LAST)
        if config.locate:
            made.own[leaf.name][POSITIONS] = u_2K
        else:
            made.fixed[leaf.name] = {POSITIONS: nearest(places(u_2K, m, n)).int()}
    return made


def positions(part: Part) -> Tensor:
    """Return the positions [2, K] of one layer: real where they learn, int32 where they are fixed."""
    stored_2K = part[POSITIONS]
    if not stored_2K.is_floating_point():
        return stored_2K
    return places(stored_2K, part.leaf.out_features, part.leaf.in_features)


def weight(config: Config, part: Part) -> Tensor:
    """Return dW_mn of one layer."""
    m, n = part.leaf.out_features, part.leaf.in_features
    return change(part[COEFFICIENTS] * config.alpha, nearest(positions(part)), m, n)


def delta(config: Config, part: Part, x: Tensor) -> Tensor:
    """Return dW x; the path of every forward that is not merged."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # Products with tokens are made in autocast's type; cosine transforms would lose too much in it.
    with torch.autocast(kind, enabled=False):
        return Cosines.apply(  # type: ignore[return-value]
            x.to(dtype),
            part[COEFFICIENTS],
            positions(part),
            part.leaf.out_features,
            config.alpha,
            config.mode,
            part.drawn,
        )


def together(configs: Sequence[Config], parts: Sequence[Part], x: Tensor) -> Tensor | None:
    """Return dW_i x_i for every row x_i [..., n] of x; one transform serves the tokens of all adapters."""
    m, n = parts[0].leaf.out_features, parts[0].leaf.in_features
    counts = [len(part[COEFFICIENTS]) for part in parts]
    tokens = x[0].numel() // n
    if torch.is_grad_enabled() or any(c.mode != "auto" for c in configs):
        return None  # the gradient of positions is that of `Cosines`
    if any(cheapest(tokens, count, m, n) != SPECTRUM for count in counts):
        return None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        a_L = torch.cat([part[COEFFICIENTS] * config.alpha for config, part in zip(configs, parts, strict=True)])
        index_2L = torch.cat([nearest(positions(part)) for part in parts], dim=1)
        row_L = torch.arange(len(x), device=x.device).repeat_interleave(torch.tensor(counts, device=x.device))
        return by_spectra(x.to(dtype).reshape(len(x), tokens, n), a_L, index_2L, row_L, m).view(*x.shape[:-1], m)


def check(config: Config, part: Part) -> None:
    """Raise BadBrick for stored whole positions outside the layer."""
    stored_2K = part[POSITIONS]
    sides_21 = torch.tensor([[part.leaf.out_features], [part.leaf.in_features]], device=stored_2K.device)
    if not stored_2K.is_floating_point() and ((stored_2K < 0) | (stored_2K >= sides_21)).any():
        raise BadBrick(
            f"loca: the positions of {part.leaf.name} in the file lie outside its {sides_21.flatten().tolist()} "
            f"(out, in) entries."
        )


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put LoCA on the target layers of `model`; coefficients, positions and head learn at rates of their own."""
    made = inject.attach(model, RECORD.name, config, task)
    tuner: Any = made.model.base_model
    layers = [layer for _, layer in tuner.layers()]
    parts = [layer.part(ADAPTER) for layer in layers]
    a = [part[COEFFICIENTS] for part in parts]
    u = [part[POSITIONS] for part in parts] if config.locate else []
    ours = {id(p) for p in (*a, *u)}
    groups = [
        {"params": a},
        # Decay would pull every position to the lowest frequency.
        {"params": u, "lr_scale": config.position_lr, "weight_decay": 0.0},
        {"params": [p for p in made.parameters() if id(p) not in ours], "lr_scale": config.head_lr},
    ]
    return replace(
        made,
        parameter_groups=[group for group in groups if group["params"]],
        callbacks=(Turns(config, layers, u),) if u else (),
    )


class Turns:
    """Lets coefficients and positions learn in turns, by the loop's count of optimiser steps.

    Without it (a Trainer that knows nothing of it) both learn in every step.
    """

    needs_gradients = True  # a step that moves tensors without one would move those that rest

    def __init__(self, config: Config, layers: Sequence[BrickyardLinear], u: Sequence[nn.Parameter]) -> None:
        self.cycle, self.share, self.layers, self.u = config.cycle, config.locate, layers, u
        self.a = [layer.part(ADAPTER)[COEFFICIENTS] for layer in layers]
        self.until = self.step = 0

    def begin(self, state: State) -> None:
        """Set the schedule for the run's steps; UsageError when they are too few for positions to learn at all."""
        self.until = min(state.total, max(round(self.share * state.total), sum(self.cycle)))
        if self.until <= self.cycle[0]:
            raise UsageError(
                f"loca: {state.total} optimiser steps leave none to the positions, which wait for {self.cycle[0]}; "
                "train longer, shorten cycle, or fix them with locate=0."
            )
        self.at(state.step)

    def before_step(self, state: State) -> None:
        """Leave those that rest without a gradient: a private step gives everybody noise for one."""
        for tensor in self.a if learning(self.step, self.until, self.cycle) == POSITIONS else self.u:
            tensor.grad = None

    def after_step(self, state: State) -> None:
        """Bring positions that stepped over the edge back to it, and prepare the next step."""
        with torch.no_grad():
            for u_2K in self.u:
                u_2K.clamp_(0, LAST)
        self.at(state.step + 1)

    def at(self, step: int) -> None:
        """Tell every layer what learns in optimiser step `step`."""
        self.step = step
        for layer in self.layers:
            layer.drawn[ADAPTER] = learning(step, self.until, self.cycle)

    def end(self, state: State) -> None:
        """Leave no schedule behind in the layers."""
        for layer in self.layers:
            layer.drawn.pop(ADAPTER, None)

    def state_dict(self) -> dict[str, Any]:
        """The step from which a resumed run goes on."""
        return {"step": self.step}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Take `state_dict` back."""
        self.at(kept["step"])
