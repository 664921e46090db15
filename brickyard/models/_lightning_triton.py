"""Lightning attention as Triton kernels, with `lightning_attention.Tiled` as their reference.

The same two levels: the sums of all blocks side by side, a scan over the states [d, e] of each sequence, then all
blocks side by side again. One program holds one block of C positions and one tile of channels; wider heads are split
and their products summed. Products take the inputs' own precision and add up in float32 (float32 multiplies as IEEE,
not as TF32); states are float32. The states are worked out again in the backward pass, so that q, k and v are all that
is kept.

Shapes: R = B * H rows of N positions, cut into G blocks that are ordered as in `lightning_attention.Blocks`; S
sequences of a row. C and the tiles are powers of two of at least 16, as Triton's products need; what lies outside a
tensor is masked.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from brickyard.core.errors import UsageError
from brickyard.models.lightning_attention import Blocks

TILE = 64  # channels of a tile at most: two tiles of states and the scores then stay in registers


@triton.jit
def _block(start_G, length_G, slopes_H, G, H):
    """Row, block, first position, positions and slope of this program's block."""
    row, block = tl.program_id(0) // G, tl.program_id(0) % G
    return row.to(tl.int64), block, tl.load(start_G + block), tl.load(length_G + block), tl.load(slopes_H + row % H)


@triton.jit
def _tile(x, row, N, start, length, width, channel, C: tl.constexpr, W: tl.constexpr):
    """Pointers and mask of the tile [C, W] of a block, from `channel` on."""
    i, c = tl.arange(0, C)[:, None], channel + tl.arange(0, W)[None, :]
    return x + (row * N + start + i) * width + c, (i < length) & (c < width)


@triton.jit
def _state(x, row, G, block, d, e, first_d, first_e, BD: tl.constexpr, BE: tl.constexpr):
    """Pointers and mask of the tile [BD, BE] of a block's state."""
    i, j = first_d + tl.arange(0, BD)[:, None], first_e + tl.arange(0, BE)[None, :]
    return x + (row * G + block) * d * e + i * e + j, (i < d) & (j < e)


@triton.jit
def _mask(slope, C: tl.constexpr):
    """lambda^(t-j) for t >= j, else 0: [C, C]."""
    steps = tl.arange(0, C)[:, None] - tl.arange(0, C)[None, :]
    return tl.where(steps >= 0, tl.exp(-slope * tl.maximum(steps, 0)), 0.0)


@triton.jit
def _query_weight(slope, C: tl.constexpr):
    """lambda^(i+1): [C, 1]."""
    return tl.exp(-slope * (tl.arange(0, C) + 1))[:, None]


@triton.jit
def _key_weight(slope, length, C: tl.constexpr):
    """lambda^(n-1-i): [C, 1]; 1 behind the block's end, where everything is zero."""
    return tl.exp(-slope * tl.maximum(length - 1 - tl.arange(0, C), 0))[:, None]


@triton.jit
def _sums(a, b, out, start_G, length_G, slopes_H, N, G, H, d, e, QUERIES: tl.constexpr, C: tl.constexpr,
          BD: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """The blocks' sums: out = sum_i w_i a_i b_i^T, with the weights of queries or of keys."""
    row, block, start, length, slope = _block(start_G, length_G, slopes_H, G, H)
    first_d, first_e = tl.program_id(1) * BD, tl.program_id(2) * BE
    a_at, a_in = _tile(a, row, N, start, length, d, first_d, C, BD)
    b_at, b_in = _tile(b, row, N, start, length, e, first_e, C, BE)
    a_CD, b_CE = tl.load(a_at, mask=a_in, other=0.0), tl.load(b_at, mask=b_in, other=0.0)
    weight = _query_weight(slope, C) if QUERIES else _key_weight(slope, length, C)
    sum_DE = tl.dot(tl.trans((a_CD * weight).to(b_CE.dtype)), b_CE, input_precision="ieee")
    at, inside = _state(out, row, G, block, d, e, first_d, first_e, BD, BE)
    tl.store(at, sum_DE, mask=inside)


@triton.jit
def _scan(sums, first, last, rank_start, count_S, length_G, slopes_H, G, H, S, size, BACKWARDS: tl.constexpr,
          W: tl.constexpr):  # fmt: skip
    """Turn the sums of a sequence's blocks, in place, into the states before them; `last` is the state behind all."""
    row, sequence = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    place = tl.program_id(1) * W + tl.arange(0, W)
    inside, own = place < size, (row * S + sequence) * size + place
    slope, count = tl.load(slopes_H + row % H), tl.load(count_S + sequence)
    state = tl.load(first + own, mask=inside, other=0.0)
    for step in range(count):
        block = tl.load(rank_start + (count - 1 - step if BACKWARDS else step)) + sequence
        at = sums + (row * G + block) * size + place
        added = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        state = state * tl.exp(-slope * tl.load(length_G + block)) + added
    tl.store(last + own, state, mask=inside)


@triton.jit
def _outputs(q, k, v, states, o, start_G, length_G, slopes_H, N, G, H, d, e, C: tl.constexpr, BD: tl.constexpr,
             BE: tl.constexpr):  # fmt: skip
    """o = ((Q K^T) * M) V + lambda^(i+1) Q P, a tile of e at a time."""
    row, block, start, length, slope = _block(start_G, length_G, slopes_H, G, H)
    first_e = tl.program_id(1) * BE
    v_at, v_in = _tile(v, row, N, start, length, e, first_e, C, BE)
    v_CE = tl.load(v_at, mask=v_in, other=0.0)
    scores, past = tl.zeros((C, C), tl.float32), tl.zeros((C, BE), tl.float32)
    for first_d in range(0, d, BD):
        q_at, qk_in = _tile(q, row, N, start, length, d, first_d, C, BD)
        k_at, _ = _tile(k, row, N, start, length, d, first_d, C, BD)
        q_CD, k_CD = tl.load(q_at, mask=qk_in, other=0.0), tl.load(k_at, mask=qk_in, other=0.0)
        state_at, state_in = _state(states, row, G, block, d, e, first_d, first_e, BD, BE)
        state_DE = tl.load(state_at, mask=state_in, other=0.0).to(q_CD.dtype)
        scores = tl.dot(q_CD, tl.trans(k_CD), scores, input_precision="ieee")
        past = tl.dot(q_CD, state_DE, past, input_precision="ieee")
    scores = (scores * _mask(slope, C)).to(v_CE.dtype)
    out_CE = tl.dot(scores, v_CE, past * _query_weight(slope, C), input_precision="ieee")
    o_at, _ = _tile(o, row, N, start, length, e, first_e, C, BE)
    tl.store(o_at, out_CE.to(o.dtype.element_ty), mask=v_in)


@triton.jit
def _grad_qk(q, k, v, do, states, dstates, dq, dk, start_G, length_G, slopes_H, N, G, H, d, e, C: tl.constexpr,
             BD: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """dQ = ((dO V^T) * M) K + lambda^(i+1) dO P^T and dK = ((dO V^T) * M)^T Q + lambda^(n-1-i) V D^T, a tile of d."""
    row, block, start, length, slope = _block(start_G, length_G, slopes_H, G, H)
    first_d = tl.program_id(1) * BD
    dscores = tl.zeros((C, C), tl.float32)
    before, after = tl.zeros((C, BD), tl.float32), tl.zeros((C, BD), tl.float32)
    for first_e in range(0, e, BE):
        v_at, v_in = _tile(v, row, N, start, length, e, first_e, C, BE)
        do_at, _ = _tile(do, row, N, start, length, e, first_e, C, BE)
        v_CE, do_CE = tl.load(v_at, mask=v_in, other=0.0), tl.load(do_at, mask=v_in, other=0.0)
        state_at, state_in = _state(states, row, G, block, d, e, first_d, first_e, BD, BE)
        dstate_at, _ = _state(dstates, row, G, block, d, e, first_d, first_e, BD, BE)
        state_DE = tl.load(state_at, mask=state_in, other=0.0).to(v_CE.dtype)
        dstate_DE = tl.load(dstate_at, mask=state_in, other=0.0).to(v_CE.dtype)
        dscores = tl.dot(do_CE, tl.trans(v_CE), dscores, input_precision="ieee")
        before = tl.dot(do_CE, tl.trans(state_DE), before, input_precision="ieee")
        after = tl.dot(v_CE, tl.trans(dstate_DE), after, input_precision="ieee")
    q_at, q_in = _tile(q, row, N, start, length, d, first_d, C, BD)
    k_at, _ = _tile(k, row, N, start, length, d, first_d, C, BD)
    q_CD, k_CD = tl.load(q_at, mask=q_in, other=0.0), tl.load(k_at, mask=q_in, other=0.0)
    dscores = (dscores * _mask(slope, C)).to(q_CD.dtype)
    dq_CD = tl.dot(dscores, k_CD, before * _query_weight(slope, C), input_precision="ieee")
    dk_CD = tl.dot(tl.trans(dscores), q_CD, after * _key_weight(slope, length, C), input_precision="ieee")
    dq_at, _ = _tile(dq, row, N, start, length, d, first_d, C, BD)
    dk_at, _ = _tile(dk, row, N, start, length, d, first_d, C, BD)
    tl.store(dq_at, dq_CD.to(dq.dtype.element_ty), mask=q_in)
    tl.store(dk_at, dk_CD.to(dk.dtype.element_ty), mask=q_in)


@triton.jit
def _grad_v(q, k, do, dstates, dv, start_G, length_G, slopes_H, N, G, H, d, e, C: tl.constexpr, BD: tl.constexpr,
            BE: tl.constexpr):  # fmt: skip
    """dV = ((Q K^T) * M)^T dO + lambda^(n-1-i) K D, a tile of e at a time."""
    row, block, start, length, slope = _block(start_G, length_G, slopes_H, G, H)
    first_e = tl.program_id(1) * BE
    scores, after = tl.zeros((C, C), tl.float32), tl.zeros((C, BE), tl.float32)
    for first_d in range(0, d, BD):
        q_at, q_in = _tile(q, row, N, start, length, d, first_d, C, BD)
        k_at, _ = _tile(k, row, N, start, length, d, first_d, C, BD)
        q_CD, k_CD = tl.load(q_at, mask=q_in, other=0.0), tl.load(k_at, mask=q_in, other=0.0)
        dstate_at, dstate_in = _state(dstates, row, G, block, d, e, first_d, first_e, BD, BE)
        dstate_DE = tl.load(dstate_at, mask=dstate_in, other=0.0).to(k_CD.dtype)
        scores = tl.dot(q_CD, tl.trans(k_CD), scores, input_precision="ieee")
        after = tl.dot(k_CD, dstate_DE, after, input_precision="ieee")
    do_at, do_in = _tile(do, row, N, start, length, e, first_e, C, BE)
    do_CE = tl.load(do_at, mask=do_in, other=0.0)
    scores = (scores * _mask(slope, C)).to(do_CE.dtype)
    dv_CE = tl.dot(tl.trans(scores), do_CE, after * _key_weight(slope, length, C), input_precision="ieee")
    dv_at, _ = _tile(dv, row, N, start, length, e, first_e, C, BE)
    tl.store(dv_at, dv_CE.to(dv.dtype.element_ty), mask=do_in)


class TritonTiled(torch.autograd.Function):
    """The tiled form on a GPU; kept for the backward pass are the inputs alone."""

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
        if blocks.size < 16 or blocks.size & (blocks.size - 1):
            raise UsageError(f"block={blocks.size}; on a GPU expected a power of two of at least 16.")
        q, k, v = (x.contiguous() for x in (q_BHNd, k_BHNd, v_BHNe))
        slopes_H, o_BHNe = slopes_H.float(), torch.empty_like(v)
        launch = _Launch(blocks, q, v, slopes_H)
        states, last = launch.states(k, v, blocks.by_row(first_SHde))
        launch.tiles(_outputs, (q, k, v, states, o_BHNe), over_e=True)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, slopes_H, first_SHde)
        return o_BHNe, blocks.by_sequence(last, len(slopes_H))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BHNe: Tensor, dfinal_SHde: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes_H, first_SHde = ctx.saved_tensors
        blocks, do = ctx.blocks, do_BHNe.contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        launch = _Launch(blocks, q, v, slopes_H)
        states, _ = launch.states(k, v, blocks.by_row(first_SHde))
        dstates, dfirst = launch.states(q, do, blocks.by_row(dfinal_SHde), backwards=True)
        launch.tiles(_grad_qk, (q, k, v, do, states, dstates, dq, dk), over_e=False)
        launch.tiles(_grad_v, (q, k, do, dstates, dv), over_e=True)
        return dq, dk, dv, None, blocks.by_sequence(dfirst, len(slopes_H)), None


class _Launch:
    """The sizes and the table of blocks that all kernels of one call share."""

    def __init__(self, blocks: Blocks, q_BHNd: Tensor, v_BHNe: Tensor, slopes_H: Tensor) -> None:
        rows, heads, positions, d = q_BHNd.shape
        self.blocks, self.slopes_H, self.d, self.e = blocks, slopes_H, d, v_BHNe.shape[3]
        self.rows, self.count = rows * heads, len(blocks.start_G)
        self.table = (blocks.start_G.int(), blocks.length_G.int(), slopes_H)
        self.sizes = (positions, self.count, heads, d, self.e)
        self.widths = {
            "C": blocks.size,
            "BD": min(TILE, max(16, triton.next_power_of_2(d))),
            "BE": min(TILE, max(16, triton.next_power_of_2(self.e))),
        }

    def tiles(self, kernel: Any, tensors: tuple[Tensor, ...], *, over_e: bool) -> None:
        """Run a kernel once for each block and tile of channels."""
        tiles = triton.cdiv(self.e, self.widths["BE"]) if over_e else triton.cdiv(self.d, self.widths["BD"])
        with torch.cuda.device_of(tensors[0]):
            kernel[(self.rows * self.count, tiles)](*tensors, *self.table, *self.sizes, **self.widths)

    def states(
        self, a_BHNd: Tensor, b_BHNe: Tensor, first_RSde: Tensor, *, backwards: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the states before (or, backwards, behind) all blocks [R, G, d, e] and the last ones [R, S, d, e]."""
        states = first_RSde.new_empty(self.rows, self.count, self.d, self.e)
        first_RSde = first_RSde.contiguous()
        last = torch.empty_like(first_RSde)
        running = torch.tensor(self.blocks.running)
        sequences, size, width = first_RSde.shape[1], self.d * self.e, 1024
        rank_start = (running.cumsum(0) - running).int().to(states.device)
        count_S = (running[:, None] > torch.arange(sequences)).sum(0).int().to(states.device)
        tiles = (triton.cdiv(self.d, self.widths["BD"]), triton.cdiv(self.e, self.widths["BE"]))
        with torch.cuda.device_of(states):
            sums: Any = _sums[(self.rows * self.count, *tiles)]
            sums(a_BHNd, b_BHNe, states, *self.table, *self.sizes, QUERIES=backwards, **self.widths)
            scan: Any = _scan[(self.rows * sequences, triton.cdiv(size, width))]
            scan(
                states, first_RSde, last, rank_start, count_S, *self.table[1:], self.count, len(self.slopes_H),
                sequences, size, BACKWARDS=backwards, W=width,
            )  # fmt: skip
        return states, last
