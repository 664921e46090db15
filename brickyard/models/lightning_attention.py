"""Lightning attention: exact causal linear attention with decay, at constant speed in the length.

With a slope s_h > 0 and the decay lambda_h = exp(-s_h) of each head, q_t, k_t [d] and v_t [e]:

    o_t = sum_{j <= t} lambda^(t-j) (q_t . k_j) v_j          no softmax, no 1/sqrt(d)
    O   = ((Q K^T) * M) V,  M_tj = lambda^(t-j) for t >= j, else 0                            matrix form, O(N^2)
    S_t = lambda S_(t-1) + k_t v_t^T,  o_t = q_t S_t,  S [d, e]                               recurrent form

Tiled, with blocks of C positions, i = 0..n-1 inside a block of n <= C, and P the state before the block's first token:

    O_i = ((Q K^T) * M)_i V + lambda^(i+1) q_i P              inside the block + everything before it
    P  <- lambda^n P + sum_i lambda^(n-1-i) k_i v_i^T

and backward, with D the gradient of the state after the block, swept from the last block to the first:

    dQ_i = ((dO V^T) * M)_i K + lambda^(i+1) dO_i P^T         dK_i = ((dO V^T) * M)^T_i Q + lambda^(n-1-i) v_i D^T
    dV_i = ((Q K^T) * M)^T_i dO + lambda^(n-1-i) k_i D        D <- lambda^n D + sum_i lambda^(i+1) q_i dO_i^T

No exponent is negative, so nothing overflows at any length. The blocks' own sums are batched products; only the
states [d, e] go from block to block. Slopes get no gradient. Half-precision inputs are computed in float32 (on CUDA: in
float32 accumulators), and states are float32.

Source: Qin et al. 2024, "Various Lengths, Constant Speed" (arXiv 2405.17381) and "Lightning Attention-2" (arXiv
2401.04658). Claim: the time per token does not grow with the length, where that of softmax attention does.
Left out: learnable slopes. Shapes: B batch, H heads, N positions, S sequences, G blocks, C positions of a block.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record

RECORD = Record(
    name="lightning-attention",
    family="models",
    title="exact causal linear attention with decay, in blocks: the time per token does not grow with the length",
    paper="Qin et al., Various Lengths, Constant Speed (ICML 2024), arXiv 2405.17381; arXiv 2401.04658",
    needs=("causal-lm",),
    claims=(
        Claim(
            text="The tiled form is exact: its outputs and gradients are those of the matrix and recurrent forms.",
            measure="agreement",
        ),
        Claim(
            text="The time per token, forward and backward, stays flat from 1K to 8K where that of SDPA grows.",
            measure="speed",
        ),
    ),
)
BLOCK = 64  # positions; larger blocks multiply more zeros of the mask, smaller ones move more states
_GROUP = 2**21  # bytes of scores held at once: what stays in a core's cache at every length


def geometric_slopes(heads: int) -> tuple[float, ...]:
    """Return s_h = 2^(-8h/H), h = 1..H; where H is no power of two, those of the next lower one and, between them, of
    the next higher one (ALiBi, Press et al. 2022)."""
    if heads < 1:
        raise UsageError(f"{heads} heads; expected at least 1.")
    power = 2 ** (heads.bit_length() - 1)
    lower = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return (*lower, *between[: heads - power])


def layer_slopes(heads: int, layer: int, layers: int) -> tuple[float, ...]:
    """Return the slopes of layer `layer` = 0..layers-1: the geometric ones, fading to nearly none in the last layer."""
    if not 0 <= layer < layers:
        raise UsageError(f"layer {layer} of {layers}; expected 0 to {layers - 1}.")
    factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return tuple(slope * factor for slope in geometric_slopes(heads))


def matrix_form(
    q_BHNd: Tensor, k_BHNd: Tensor, v_BHNe: Tensor, slopes_H: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (o_BHNe, final state [B, H, d, e]) by the N x N matrix: the reference, for short sequences."""
    place, slopes_H = torch.arange(q_BHNd.shape[2], device=q_BHNd.device), slopes_H.double()
    mask_HNN = _power(slopes_H, (place[:, None] - place).clamp(min=0)).tril().to(q_BHNd.dtype)
    o_BHNe = (q_BHNd @ k_BHNd.transpose(2, 3) * mask_HNN) @ v_BHNe
    state = (k_BHNd * _power(slopes_H, place.flip(0)).to(q_BHNd.dtype)[..., None]).transpose(2, 3) @ v_BHNe
    if initial_state is not None:
        since_HN1 = _power(slopes_H, place + 1).to(q_BHNd.dtype)[..., None]
        o_BHNe = o_BHNe + since_HN1 * (q_BHNd @ initial_state)
        state = state + since_HN1[:, -1:] * initial_state
    return o_BHNe, state


def decode_step(
    q_BHd: Tensor, k_BHd: Tensor, v_BHe: Tensor, slopes_H: Tensor, state_BHde: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (o_BHe, the next state) of the recurrent form, for one token; the state keeps its own precision."""
    dtype = state_BHde.dtype
    decay_H11 = torch.exp(-slopes_H.to(dtype))[:, None, None]
    state = decay_H11 * state_BHde + k_BHd.to(dtype)[..., None] * v_BHe.to(dtype)[..., None, :]
    return (q_BHd.to(dtype)[..., None, :] @ state)[..., 0, :].to(v_BHe.dtype), state


def lightning_attention(
    q_BHNd: Tensor,
    k_BHNd: Tensor,
    v_BHNe: Tensor,
    slopes_H: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor | None]:
    """Return (o_BHNe, final state or None); exact, differentiable in q, k, v and the initial state.

    Args:
        q_BHNd, k_BHNd, v_BHNe: queries, keys and values [batch, heads, positions, width]; e may differ from d.
        slopes_H: s_h > 0; the decay of a head is exp(-s_h). A slope of 1e-12 is as good as no decay.
        initial_state: [B, H, d, e], the state before the first token; None: zero.
        output_final_state: whether to return the state after the last token, float32 (float64 for such inputs).
        cu_seqlens: [S + 1] integers 0 = c_0 <= ... <= c_S = N: B is 1 and its positions are S sequences behind one
            another that do not see each other; states are then [S, H, d, e].
        block: positions computed at once; the result does not depend on it beyond rounding.

    Raises:
        UsageError: shapes or dtypes that do not fit, no position, slopes that want a gradient or, on the CPU, one that
            is not positive. On CUDA, where reading them would stall the device, such a slope is a device-side
            assertion: a RuntimeError at some later call, after which the process cannot use the device any more.
    """
    sequences = _checked(q_BHNd, k_BHNd, v_BHNe, slopes_H, cu_seqlens, block)
    state = torch.float64 if q_BHNd.dtype == torch.float64 else torch.float32
    shape = (sequences, q_BHNd.shape[1], q_BHNd.shape[3], v_BHNe.shape[3])
    if initial_state is not None and initial_state.shape != shape:
        raise UsageError(
            f"initial_state is {list(initial_state.shape)}; expected [sequences, H, d, e] = {list(shape)}."
        )
    first_SHde = q_BHNd.new_zeros(shape, dtype=state) if initial_state is None else initial_state.to(state)
    form = Tiled
    if q_BHNd.is_cuda and q_BHNd.dtype != torch.float64 and _has_triton():
        form = importlib.import_module("brickyard.models._lightning_triton").TritonTiled
    blocks = Blocks.of(q_BHNd, cu_seqlens, block)
    o_BHNe, final = form.apply(q_BHNd, k_BHNd, v_BHNe, slopes_H, first_SHde, blocks)
    return o_BHNe, final if output_final_state else None


@dataclass(frozen=True)
class Blocks:
    """How positions are cut into blocks, for R = B * H rows of one sequence each, or R = H rows of S sequences each.

    The blocks [G] of a row are ordered by their rank in their sequence, and at each rank from the longest sequence to
    the shortest: those that still run are the first ones, and one rank is one slice.

    Attributes:
        size: C.
        running: the sequences that have a block of each rank; their sum is G.
        order: [S] the sequences from the longest to the shortest; None where rows hold one sequence each.
        start_G, length_G: first position and positions of each block.
    """

    size: int
    running: tuple[int, ...]
    order: Tensor | None
    start_G: Tensor
    length_G: Tensor

    @classmethod
    def of(cls, x_BHNd: Tensor, cu_seqlens: Tensor | None, size: int) -> Blocks:
        """Cut the rows of a batch, or the sequences of its only row."""
        device = x_BHNd.device
        ends = torch.tensor([0, x_BHNd.shape[2]]) if cu_seqlens is None else cu_seqlens.cpu().long()
        length_S, order = ends.diff().sort(descending=True, stable=True)
        first = torch.arange(-(-int(length_S[0]) // size))[:, None] * size
        inside = first < length_S
        start_G, length_G = (ends[order] + first)[inside], (length_S - first).clamp(max=size)[inside]
        running = tuple(inside.sum(1).tolist())
        return cls(
            size, running, None if cu_seqlens is None else order.to(device), start_G.to(device), length_G.to(device)
        )

    def cut(self, x_BHNd: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the blocks [R, G, C, d] of positions in `dtype`, contiguous; zeros behind the end of a sequence."""
        if self.order is None:
            padded = F.pad(x_BHNd, (0, 0, 0, missing)) if (missing := -x_BHNd.shape[2] % self.size) else x_BHNd
            return padded.to(dtype).contiguous().flatten(0, 1).unflatten(1, (-1, self.size))
        place_GC, inside_GC = self._places()
        x_HNd = x_BHNd[0].index_select(1, place_GC.where(inside_GC, 0).flatten()).to(dtype)
        return x_HNd.unflatten(1, (-1, self.size)).masked_fill_(~inside_GC[..., None], 0)

    def join(self, x_RGCd: Tensor, like_BHNd: Tensor) -> Tensor:
        """Undo `cut`: positions from blocks, in the batch and the dtype of `like_BHNd`."""
        rows, heads, positions, _ = like_BHNd.shape
        x_RNd = x_RGCd.flatten(1, 2)
        if self.order is not None:
            place_GC, inside_GC = self._places()
            x_RNd = x_RNd.index_select(1, inside_GC.flatten().nonzero()[place_GC[inside_GC].argsort(), 0])
        return x_RNd.unflatten(0, (rows, heads))[:, :, :positions].to(like_BHNd.dtype)

    def by_row(self, state_SHde: Tensor) -> Tensor:
        """Return the states of sequences as [R, sequences of a row, d, e], in the order of the blocks."""
        if self.order is None:
            return state_SHde.flatten(0, 1)[:, None]
        return state_SHde[self.order].transpose(0, 1)

    def by_sequence(self, state_RSde: Tensor, heads: int) -> Tensor:
        """Undo `by_row`."""
        if self.order is None:
            return state_RSde[:, 0].unflatten(0, (-1, heads))
        return state_RSde.transpose(0, 1)[self.order.argsort()]

    def scan(self, sum_RGde: Tensor, decay_RG: Tensor, state_RSde: Tensor, *, backwards: bool = False) -> Tensor:
        """Turn the blocks' sums, in place, into the states before the blocks: P <- decay P + sum; return the last P.

        With `backwards` from the last block to the first: what stands "before" a block is then the state behind it.
        """
        state_RSde = state_RSde.clone()
        ranks = [x.split(self.running, dim=1) for x in (sum_RGde, decay_RG[..., None, None])]
        for added, decay in list(zip(*ranks, strict=True))[:: -1 if backwards else 1]:
            state = state_RSde[:, : added.shape[1]]
            after = torch.addcmul(added, decay, state)
            added.copy_(state)
            state.copy_(after)
        return state_RSde

    def _places(self) -> tuple[Tensor, Tensor]:
        """The position of each place in the blocks, and whether it is one."""
        offset_C = torch.arange(self.size, device=self.start_G.device)
        return self.start_G[:, None] + offset_C, offset_C < self.length_G[:, None]


@dataclass(frozen=True)
class Decays:
    """Powers of the decay of each row: lambda^(t-j) inside a block [R, 1, C, C], lambda^(i+1) for queries
    [R, 1, C, 1], lambda^(n-1-i) for keys [R, G, C, 1], lambda^n over a block [R, G]."""

    mask_R1CC: Tensor
    query_R1C1: Tensor
    key_RGC1: Tensor
    block_RG: Tensor

    @classmethod
    def of(cls, slopes_H: Tensor, blocks: Blocks, dtype: torch.dtype, rows: int) -> Decays:
        """Work them out in float64, so that lambda^n of a long block is as exact as `dtype` allows."""
        slopes_H, place = slopes_H.double(), torch.arange(blocks.size, device=slopes_H.device)
        made = (
            _power(slopes_H, (place[:, None] - place).clamp(min=0)).tril()[:, None],
            _power(slopes_H, place + 1)[:, None, :, None],
            _power(slopes_H, (blocks.length_G[:, None] - 1 - place).clamp(min=0))[..., None],
            _power(slopes_H, blocks.length_G),
        )
        times = rows // len(slopes_H)
        return cls(*(t.to(dtype).repeat(times, *[1] * (t.ndim - 1)) for t in made))


def _power(slopes_H: Tensor, steps: Tensor) -> Tensor:
    """Return lambda^steps [H, *steps.shape]; steps are not negative."""
    return torch.exp(-slopes_H.view(-1, *[1] * steps.ndim) * steps)


class Tiled(torch.autograd.Function):
    """The tiled form in PyTorch. Kept for the backward pass: q, k, v, the slopes and the states before the blocks.

    Scores are held for a few blocks at a time, so that they stay in the processor's cache at every length. Second
    factors are laid out transposed beforehand: small products of the form A B^T are far slower than A B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHNd: Tensor,
        k_BHNd: Tensor,
        v_BHNe: Tensor,
        slopes_H: Tensor,
        first_SHde: Tensor,
        blocks: Blocks,
    ) -> tuple[Tensor, Tensor]:
        dtype = first_SHde.dtype
        q_RGCd, k_RGCd, v_RGCe = (blocks.cut(x, dtype) for x in (q_BHNd, k_BHNd, v_BHNe))
        decays = Decays.of(slopes_H, blocks, dtype, len(q_RGCd))
        state_RGde = first_SHde.new_empty(*q_RGCd.shape[:2], *first_SHde.shape[2:])
        o_RGCe = torch.empty_like(v_RGCe)
        for rows, part in _groups(q_RGCd):
            k = k_RGCd[rows, part] * decays.key_RGC1[rows, part]
            _product(k.mT, v_RGCe[rows, part], out=state_RGde[rows, part])
        final = blocks.scan(state_RGde, decays.block_RG, blocks.by_row(first_SHde))
        for rows, part in _groups(q_RGCd):
            q, k, v, state, o = (x[rows, part] for x in (q_RGCd, k_RGCd, v_RGCe, state_RGde, o_RGCe))
            _product(_scores(q, k, decays.mask_R1CC[rows]), v, out=o)
            _add_product(q * decays.query_R1C1[rows], state, out=o)
        ctx.blocks = blocks
        ctx.save_for_backward(q_BHNd, k_BHNd, v_BHNe, slopes_H, state_RGde)
        return blocks.join(o_RGCe, v_BHNe), blocks.by_sequence(final, len(slopes_H))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BHNe: Tensor, dfinal_SHde: Tensor) -> tuple[Tensor | None, ...]:
        q_BHNd, k_BHNd, v_BHNe, slopes_H, state_RGde = ctx.saved_tensors
        blocks, dtype = ctx.blocks, state_RGde.dtype
        q_RGCd, k_RGCd, v_RGCe, do_RGCe = (blocks.cut(x, dtype) for x in (q_BHNd, k_BHNd, v_BHNe, do_BHNe))
        decays = Decays.of(slopes_H, blocks, dtype, len(q_RGCd))
        dq_RGCd, dk_RGCd, dv_RGCe = (torch.empty_like(x) for x in (q_RGCd, k_RGCd, v_RGCe))
        dstate_RGde = torch.empty_like(state_RGde)
        for rows, part in _groups(q_RGCd):
            q = q_RGCd[rows, part] * decays.query_R1C1[rows]
            _product(q.mT, do_RGCe[rows, part], out=dstate_RGde[rows, part])
        dfirst = blocks.scan(dstate_RGde, decays.block_RG, blocks.by_row(dfinal_SHde), backwards=True)
        for rows, part in _groups(q_RGCd):
            q, k, v, do = (x[rows, part] for x in (q_RGCd, k_RGCd, v_RGCe, do_RGCe))
            dq, dk, dv = (x[rows, part] for x in (dq_RGCd, dk_RGCd, dv_RGCe))
            state, dstate = state_RGde[rows, part], dstate_RGde[rows, part]
            mask, query, key = decays.mask_R1CC[rows], decays.query_R1C1[rows], decays.key_RGC1[rows, part]
            _product(_scores(q, k, mask).mT, do, out=dv)
            _add_product(k * key, dstate, out=dv)
            dscores = _scores(do, v, mask)
            _product(dscores.mT, q, out=dk)
            _add_product(v * key, _flipped(dstate), out=dk)
            _product(dscores, k, out=dq)
            _add_product(do * query, _flipped(state), out=dq)
        given = ((dq_RGCd, q_BHNd), (dk_RGCd, k_BHNd), (dv_RGCe, v_BHNe))
        first = blocks.by_sequence(dfirst, len(slopes_H))
        return *(blocks.join(grad, like) for grad, like in given), None, first, None


def _groups(x_RGCd: Tensor) -> Iterator[tuple[slice, slice]]:
    """Whole rows, or parts of one, whose scores are held at once; contiguous either way."""
    rows, count, size, _ = x_RGCd.shape
    most = max(1, _GROUP // (size * size * x_RGCd.itemsize))
    if count <= most:
        step = most // count
        yield from ((slice(start, start + step), slice(None)) for start in range(0, rows, step))
    else:
        for row in range(rows):
            yield from ((slice(row, row + 1), slice(start, start + most)) for start in range(0, count, most))


def _flipped(x: Tensor) -> Tensor:
    return x.mT.contiguous()


def _scores(a_RGCd: Tensor, b_RGCd: Tensor, mask_R1CC: Tensor) -> Tensor:
    """Return (A B^T) * M of a few blocks."""
    made = a_RGCd.new_empty(*a_RGCd.shape[:3], b_RGCd.shape[2])
    _product(a_RGCd, _flipped(b_RGCd), out=made)
    return made.mul_(mask_R1CC)


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    # bmm on views, for matmul copies factors of four dimensions; with `out`, so that autocast leaves it alone.
    torch.bmm(_stacked(a), _stacked(b), out=_stacked(out))


def _add_product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    _stacked(out).baddbmm_(_stacked(a), _stacked(b))


def _stacked(x: Tensor) -> Tensor:
    return x.view(-1, *x.shape[2:])


def _checked(
    q_BHNd: Tensor, k_BHNd: Tensor, v_BHNe: Tensor, slopes_H: Tensor, cu_seqlens: Tensor | None, block: int
) -> int:
    """Return the number of sequences; UsageError where the inputs do not fit together."""
    given = (q_BHNd, k_BHNd, v_BHNe)
    shapes = ", ".join(str(list(x.shape)) for x in given)
    if any(x.ndim != 4 for x in given) or q_BHNd.shape != k_BHNd.shape or q_BHNd.shape[:3] != v_BHNe.shape[:3]:
        raise UsageError(f"q, k, v are {shapes}; expected [B, H, N, d] twice and [B, H, N, e].")
    if not all(q_BHNd.shape) or not v_BHNe.shape[3]:
        raise UsageError(f"q, k, v are {shapes}; expected at least one row, head, position and channel.")
    if len({(x.dtype, x.device) for x in given}) > 1 or not q_BHNd.is_floating_point():
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in given)
        raise UsageError(f"q, k, v are {kinds}; expected one floating-point type and one device.")
    if slopes_H.shape != q_BHNd.shape[1:2] or slopes_H.requires_grad or slopes_H.device != q_BHNd.device:
        raise UsageError(
            f"slopes are {list(slopes_H.shape)} on {slopes_H.device}, requires_grad={slopes_H.requires_grad}; expected "
            f"[{q_BHNd.shape[1]}] on {q_BHNd.device}, fixed: the decay is not learned."
        )
    if slopes_H.is_cuda:
        torch._assert_async((slopes_H > 0).all(), "a slope is not positive")  # reading it would stall the device
    elif not (slopes_H > 0).all():
        raise UsageError(f"slopes are {slopes_H.tolist()}; expected every one above 0 (1e-12 is as good as no decay).")
    if block < 1:
        raise UsageError(f"block={block}; expected at least 1.")
    if cu_seqlens is None:
        return len(q_BHNd)
    ends = cu_seqlens.tolist() if cu_seqlens.ndim == 1 and not cu_seqlens.is_floating_point() else []
    if len(q_BHNd) != 1 or len(ends) < 2 or ends != sorted(ends) or (ends[0], ends[-1]) != (0, q_BHNd.shape[2]):
        raise UsageError(
            f"cu_seqlens do not cut a batch of {len(q_BHNd)} rows of {q_BHNd.shape[2]} positions; expected one row and "
            "integers that rise from 0 to its positions."
        )
    return len(ends) - 1


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
