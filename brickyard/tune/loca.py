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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from brickyard.core import inject
from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, Refused, UsageError
from brickyard.core.inject import BrickyardLinear, Leaf, Part, Plan
from brickyard.core.method import Claim, Record
from brickyard.core.task import Task
from brickyard.core.wrap import ADAPTER
from brickyard.tune._dct import LARGEST_TABLE, cost, dct, dct2, idct, idct2, rows

if TYPE_CHECKING:
    from brickyard.core.loop import State

RECORD = Record(
    name="loca",
    family="tune",
    title="Location-aware cosine adaptation: a few DCT coefficients at learned places",
    paper="LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning, ICLR 2025, arXiv 2502.06820",
    slot="tuner",
    search={"lr": (2e-3, 5e-3, 1e-2)},
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
COEFFICIENTS, POSITIONS = "coefficients", "positions"
WAYS = TOKENS, SPECTRUM, DENSE = "tokens", "spectrum", "dense"
GATHERED = 100  # multiplications of a matrix product in the time of gathering and adding one number (measured, a CPU)


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


def nearest(places_2K: Tensor) -> Tensor:
    """Return the int64 positions [2, K] of real ones; those that are whole already stay as they are."""
    return (places_2K.round() if places_2K.is_floating_point() else places_2K).long()


def change(a_K: Tensor, index_2K: Tensor, m: int, n: int) -> Tensor:
    """Return C_m^T S C_n [m, n]; coefficients at one position add up."""
    s_L = a_K.new_zeros(m * n).index_add_(0, index_2K[0] * n + index_2K[1], a_K)
    return idct2(s_L.view(m, n))


def position_gradient(a_K: Tensor, slope_2K: Tensor) -> Tensor:
    """Return dL/d(row, col) [2, K] for the differences of Z between the neighbours on both sides."""
    return (a_K / 2 * slope_2K).clamp(-1, 1)


def neighbours(index_K: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the indices after and before each of `index_K`; at a border the border itself."""
    return (index_K + 1).clamp(max=n - 1), (index_K - 1).clamp(min=0)


def cheapest(tokens: int, count: int, m: int, n: int) -> str:
    """Return the way that takes least for T tokens and K coefficients, in multiplications of a matrix product."""
    takes = {
        TOKENS: tokens * count * (m + n),
        SPECTRUM: tokens * (m * cost(m) + n * cost(n) + GATHERED * count),
        DENSE: m * n * (tokens + cost(m) + cost(n)),
    }
    return min(takes, key=takes.__getitem__)


def _blocks(index_2K: Tensor, a_K: Tensor, m: int, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split K so that the gathered cosines of one block are no larger than the layer's own matrix."""
    size = min(m, n)
    for index_2B, a_B in zip(index_2K.split(size, dim=1), a_K.split(size), strict=True):
        yield index_2B[0], index_2B[1], a_B


def by_tokens(x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, m: int) -> Tensor:
    """Return x (C_m^T S C_n)^T [T, m] without that matrix."""
    n = x_Tn.shape[1]
    y_Tm = x_Tn.new_zeros(len(x_Tn), m)
    for row_B, col_B, a_B in _blocks(index_2K, a_K, m, n):
        u_TB = x_Tn @ rows(col_B, n, x_Tn.dtype).t()
        y_Tm.addmm_(u_TB * a_B.to(u_TB.dtype), rows(row_B, m, x_Tn.dtype))
    return y_Tm


def by_spectrum(x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, m: int) -> Tensor:
    """Return x (C_m^T S C_n)^T [T, m] by the transforms of the tokens."""
    x_Tn, kind = dct(_wide(x_Tn)), x_Tn.dtype
    return idct(_wide(_scattered(x_Tn, a_K, index_2K[0], index_2K[1], m))).to(kind)


def _wide(x: Tensor) -> Tensor:
    """Return `x` in a type that `dct` takes; half precision is enough for a table, not for an FFT."""
    return x if x.shape[-1] <= LARGEST_TABLE else x.to(torch.promote_types(x.dtype, torch.float32))


def _scattered(x_Tn: Tensor, a_K: Tensor, to_K: Tensor, from_K: Tensor, m: int) -> Tensor:
    """Return x S^T [T, m] for S that takes a_k of entry from_k to entry to_k."""
    y_Tm = x_Tn.new_zeros(len(x_Tn), m)
    size = min(m, x_Tn.shape[1])
    for to_B, from_B, a_B in zip(to_K.split(size), from_K.split(size), a_K.to(x_Tn.dtype).split(size), strict=True):
        y_Tm.index_add_(1, to_B, x_Tn.index_select(1, from_B).mul_(a_B))
    return y_Tm


@dataclass
class Gradients:
    """What one layer's backward pass gives: dL/dx [T, n], Z at the positions [K], its differences there [2, K]."""

    x_Tn: Tensor | None = None
    z_K: Tensor | None = None
    slope_2K: Tensor | None = None


def gradients_by_tokens(
    g_Tm: Tensor, x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, *, of_x: bool, of_a: bool, of_places: bool
) -> Gradients:
    """Return the wanted `Gradients` for G = g^T x, each entry of Z as a sum over the tokens."""
    m, n, dtype, wide = g_Tm.shape[1], x_Tn.shape[1], x_Tn.dtype, a_K.dtype
    found = Gradients(torch.zeros_like(x_Tn) if of_x else None)
    z, slopes = [], []
    for row_B, col_B, a_B in _blocks(index_2K, a_K, m, n):
        cosines_Bn = rows(col_B, n, dtype)
        v_TB = g_Tm @ rows(row_B, m, dtype).t()
        if found.x_Tn is not None:
            found.x_Tn.addmm_(v_TB * a_B.to(dtype), cosines_Bn)
        if not (of_a or of_places):
            continue
        u_TB = x_Tn @ cosines_Bn.t()
        z.append((u_TB * v_TB).sum(0, dtype=wide))
        if of_places:
            # Z is linear in the cosines, so the difference of two entries takes one product with their difference.
            by_row_TB = g_Tm @ _steps(row_B, m, dtype).t()
            by_col_TB = x_Tn @ _steps(col_B, n, dtype).t()
            slopes.append(torch.stack([(u_TB * by_row_TB).sum(0, dtype=wide), (by_col_TB * v_TB).sum(0, dtype=wide)]))
    found.z_K = torch.cat(z) if of_a else None
    found.slope_2K = torch.cat(slopes, dim=1) if of_places else None
    return found


def _steps(index_K: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    after_K, before_K = neighbours(index_K, n)
    return rows(after_K, n, dtype) - rows(before_K, n, dtype)


def gradients_by_spectrum(
    g_Tm: Tensor, x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, *, of_x: bool, of_a: bool, of_places: bool
) -> Gradients:
    """Return the wanted `Gradients` for G = g^T x, by the transforms of both."""
    m, n = g_Tm.shape[1], x_Tn.shape[1]
    g_Tm = dct(_wide(g_Tm))
    row_K, col_K = index_2K
    found = Gradients()
    if of_x:
        found.x_Tn = idct(_wide(_scattered(g_Tm, a_K, col_K, row_K, n))).to(x_Tn.dtype)
    if not (of_a or of_places):
        return found
    x_Tn = dct(_wide(x_Tn))
    z, slopes = [], []
    for row_B, col_B, _ in _blocks(index_2K, a_K, m, n):
        v_TB, u_TB = g_Tm.index_select(1, row_B), x_Tn.index_select(1, col_B)
        if of_places:
            (below_B, above_B), (right_B, left_B) = neighbours(row_B, m), neighbours(col_B, n)
            by_row_TB = g_Tm.index_select(1, below_B).sub_(g_Tm.index_select(1, above_B))
            by_col_TB = x_Tn.index_select(1, right_B).sub_(x_Tn.index_select(1, left_B))
            slopes.append(
                torch.stack([(u_TB * by_row_TB).sum(0, dtype=a_K.dtype), (by_col_TB * v_TB).sum(0, dtype=a_K.dtype)])
            )
        z.append(v_TB.mul_(u_TB).sum(0, dtype=a_K.dtype))
    found.z_K = torch.cat(z) if of_a else None
    found.slope_2K = torch.cat(slopes, dim=1) if of_places else None
    return found


def gradients_by_matrix(
    g_Tm: Tensor, x_Tn: Tensor, a_K: Tensor, index_2K: Tensor, *, of_x: bool, of_a: bool, of_places: bool
) -> Gradients:
    """Return the wanted `Gradients` for G = g^T x, by the whole of G and Z."""
    m, n = g_Tm.shape[1], x_Tn.shape[1]
    found = Gradients(g_Tm @ change(a_K, index_2K, m, n).to(g_Tm.dtype) if of_x else None)
    if of_a or of_places:
        z_mn = dct2((g_Tm.t() @ x_Tn).to(a_K.dtype))
        row_K, col_K = index_2K
        found.z_K = z_mn[row_K, col_K] if of_a else None
        if of_places:
            (below_K, above_K), (right_K, left_K) = neighbours(row_K, m), neighbours(col_K, n)
            found.slope_2K = torch.stack(
                [z_mn[below_K, col_K] - z_mn[above_K, col_K], z_mn[row_K, right_K] - z_mn[row_K, left_K]]
            )
    return found


FORWARD = {
    TOKENS: by_tokens,
    SPECTRUM: by_spectrum,
    DENSE: lambda x_Tn, a_K, index_2K, m: x_Tn @ change(a_K, index_2K, m, x_Tn.shape[1]).to(x_Tn.dtype).t(),
}
BACKWARD = {TOKENS: gradients_by_tokens, SPECTRUM: gradients_by_spectrum, DENSE: gradients_by_matrix}


class Cosines(torch.autograd.Function):
    """y' = alpha x (C_m^T S C_n)^T. Kept for the way back are x, a and the positions; all else is made anew.

    `learns` says whose gradient is wanted (None: both); the other's is undefined, so the optimiser leaves it alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_K: Tensor, places_2K: Tensor, m: int, alpha: float, mode: str, learns: str | None
    ) -> Tensor:
        n, index_2K = x.shape[-1], nearest(places_2K)
        x_Tn = x.reshape(-1, n)
        ctx.m, ctx.alpha, ctx.learns = m, alpha, learns
        ctx.way = cheapest(len(x_Tn), len(a_K), m, n) if mode == "auto" else mode
        ctx.save_for_backward(x, a_K, index_2K.int())
        return FORWARD[ctx.way](x_Tn, a_K * alpha, index_2K, m).view(*x.shape[:-1], m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a_K, index_2K = ctx.saved_tensors
        of_x, of_a, of_places = ctx.needs_input_grad[:3]
        of_a, of_places = of_a and ctx.learns != POSITIONS, of_places and ctx.learns != COEFFICIENTS
        found = BACKWARD[ctx.way](
            grad.reshape(-1, ctx.m).to(x.dtype),
            x.reshape(-1, x.shape[-1]),
            a_K * ctx.alpha,
            index_2K.long(),
            of_x=of_x,
            of_a=of_a,
            of_places=of_places,
        )
        to_x = None if found.x_Tn is None else found.x_Tn.view(x.shape)
        to_a = None if found.z_K is None else found.z_K * ctx.alpha
        to_places = None if found.slope_2K is None else position_gradient(a_K, found.slope_2K * ctx.alpha)
        return to_x, to_a, to_places, None, None, None, None


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

    def __init__(self, config: Config, layers: Sequence[BrickyardLinear], u: Sequence[nn.Parameter]) -> None:
        self.cycle, self.share, self.layers, self.u = config.cycle, config.locate, layers, u
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
