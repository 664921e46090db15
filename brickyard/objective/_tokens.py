"""Log-probabilities of given tokens, and their KL divergence from a reference, with the vocabulary in chunks.

Shapes: N positions, D width, V vocabulary. With policy logits p_NV = hidden W^T, reference logits q_NV, P = softmax(p),
Q = softmax(q), e_y the one-hot of the given token:

    m_n  = log P_n[y] - log Q_n[y]                  d m_n / d p_n  = e_y - P_n
    k_n  = KL(Q_n || P_n) = sum_v Q_v (q_v - p_v) - lse(q) + lse(p)          d k_n / d p_n  = P_n - Q_n

Nothing of size [N, V] is kept: the forward pass walks over chunks of positions, and so does the backward pass, which
computes a chunk's logits again and writes the gradients from the closed form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22  # logits computed at once: 16 MiB in float32


def token_terms(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    reference: tuple[Tensor, Tensor, Tensor | None] | None = None,
    *,
    divergence: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return m [N] and k [N] in float32, differentiable in hidden, weight and bias.

    Args:
        hidden_ND: last hidden states of the policy at the positions that count.
        weight_VD, bias_V: its output layer.
        labels_N: the given tokens.
        reference: the same three of the reference, which gets no gradient; without it m is log P[y].
        divergence: compute k; else it is 0 and costs nothing.
        chunk: numbers of a chunk of logits, which decides memory and changes results by rounding only.
    """
    rows = max(1, chunk // weight_VD.shape[0])
    found = _TokenTerms.apply(hidden_ND, weight_VD, bias_V, labels_N, *(reference or (None,) * 3), divergence, rows)
    assert found is not None
    return found


class _TokenTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, q_hidden, q_weight, q_bias, divergence, rows):
        ctx.save_for_backward(hidden, weight, bias, labels, q_hidden, q_weight, q_bias)
        ctx.divergence, ctx.rows = divergence, rows
        ctx.dtype = compute_dtype(hidden)
        m_N = hidden.new_zeros(len(labels), dtype=torch.float32)
        k_N = torch.zeros_like(m_N)
        for at in range(0, len(labels), rows):
            part = slice(at, at + rows)
            label = labels[part, None]
            p = logits_of(hidden[part], weight, bias, ctx.dtype)
            lse_p = p.logsumexp(1)
            m_N[part] = p.gather(1, label)[:, 0] - lse_p
            if q_hidden is None:
                continue
            q = logits_of(q_hidden[part], q_weight, q_bias, ctx.dtype)
            lse_q = q.logsumexp(1)
            m_N[part] -= q.gather(1, label)[:, 0] - lse_q
            if divergence:
                k_N[part] = ((q - lse_q[:, None]).exp() * (q - p)).sum(1) - lse_q + lse_p
        return m_N, k_N

    @staticmethod
    def backward(ctx: Any, grad_m, grad_k):
        hidden, weight, bias, labels, q_hidden, q_weight, q_bias = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for at in range(0, len(labels), ctx.rows):
            part = slice(at, at + ctx.rows)
            p = logits_of(hidden[part], weight, bias, ctx.dtype)
            # (k - m) e = the weight of P; what m gives to the label and k takes by Q comes on top.
            grad = (p - p.logsumexp(1, keepdim=True)).exp_().mul_((grad_k[part] - grad_m[part])[:, None])
            grad.scatter_add_(1, labels[part, None], grad_m[part, None])
            if ctx.divergence:
                q = logits_of(q_hidden[part], q_weight, q_bias, ctx.dtype)
                grad -= (q - q.logsumexp(1, keepdim=True)).exp_().mul_(grad_k[part, None])
            low = grad.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = low @ weight.to(ctx.dtype)
            if grad_weight is not None:
                grad_weight += (low.T @ hidden[part].to(ctx.dtype)).float()
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 6,
        )


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type in which logits are multiplied here: autocast's, or that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return logits in float32, multiplied in `dtype`."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (hidden.to(dtype) @ weight.to(dtype).T).float()
        return logits if bias is None else logits + bias.float()
