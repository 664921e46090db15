"""Distillation: learn the probabilities that a teacher gives, and not only the labels.

    p_s = softmax(z_s / T),  p_t = softmax(z_t / T)                      z: logits of student and teacher, T temperature
    soft = - sum_c p_t(c) log p_s(c) = KL(p_t || p_s) + H(p_t)           d soft / d (z_s / T) = p_s - p_t
    loss = weight T^2 mean(soft) + (1 - weight) mean(hard)               hard: the task's own cross entropy, T = 1

Cross entropy and KL differ by the teacher's entropy H and have the same gradient; the first is minimised, and both are
logged. T^2 keeps the size of the gradient where T changes. A classifier's logits come whole. Of a language model the k
most probable tokens are kept at each predicted token, and the rest of the vocabulary (the tail) is one bucket: with
K the set of those k,

    soft = - sum_{c in K} p_t(c) log p_s(c) - p_t(tail) log p_s(tail)    p(tail) = sum of p over the tokens outside of K

which is a cross entropy over k + 1 events, hence minimal exactly where they agree. Its gradient in z_s / T is
p_s(c) - p_t(c) inside K and p_s(c) (1 - p_t(tail) / p_s(tail)) outside. The teacher runs once, and only over train.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2; soft labels alone
(weight 1): Turc et al., "Well-Read Students Learn Better", arXiv 1908.08962, section 3. What they claim: a small model
learns more from a teacher's probabilities than from the labels. Left out: matching hidden states or attention, and
regression. Shapes: B rows, K classes, N predicted tokens, D width, V vocabulary, k kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.objective import PREPARED, Found, Reference
from brickyard.core.teacher import SoftLabels, open_teacher, soft_labels
from brickyard.core.trial import Prepared
from brickyard.objective._tokens import CHUNK, compute_dtype, logits_of

RECORD = Record(
    name="distil",
    family="objective",
    title="Soft labels of a teacher, cached; of a language model its top-k tokens and their tail",
    paper="arXiv 1503.02531",
    needs=("text-classification", "pair-classification", "image-classification", "causal-lm", "instruct"),
    slot="objective",
    search={"temperature": (1.0, 2.0, 4.0), "weight": (0.5, 1.0)},
    claims=(
        Claim(
            text="A small language model that learns the cached top-32 probabilities of a teacher tuned on the same "
            "text needs fewer nats per token than one that learns from that text alone, at equal steps.",
            measure="soft_labels",
            base="embedded:pylm",
            data="embedded:python-tests",
            train_rows=300,
            max_length=128,
            full={"max_length": 256, "train_rows": 0},
        ),
    ),
)
WITH_REFERENCE = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of distil; UsageError where one is out of its range or no teacher is given."""

    teacher: str = ""
    """a brick's folder, or a base with its own output layer; quote what is no plain word: teacher="embedded:pylm" """
    k: int = 32
    """tokens kept of a language model's vocabulary; the others are one bucket. Classes are all kept"""
    temperature: float = 1.0
    """divides the logits of both; above 1 the less probable classes count for more"""
    weight: float = 1.0
    """share of the soft labels in the loss; the rest are the labels of the data"""
    shuffle: bool = False
    """negative control: every row gets another row's soft labels"""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise UsageError("distil: teacher=... is missing; give a brick's folder or a base: distil:teacher=runs/big")
        if self.k < 1 or not self.temperature > 0 or not 0 < self.weight <= 1:
            raise UsageError(
                f"distil k={self.k}, temperature={self.temperature}, weight={self.weight}: expected k of at least 1, a "
                "positive temperature and a weight above 0 and up to 1."
            )


def soft_cross_entropy(logits_BK: Tensor, teacher_BK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return each row's cross entropy [B] with the teacher's probabilities, and their entropy [B]; nats, at T."""
    log_p = (logits_BK / temperature).log_softmax(1)
    log_q = (teacher_BK / temperature).log_softmax(1)
    q = log_q.exp()
    return -(q * log_p).sum(1), -(q * log_q).sum(1)


def entropy(log_q_NB: Tensor) -> Tensor:
    """Return the entropy [N] of distributions given as (rounded, hence not quite normal) log-probabilities."""
    log_q = log_q_NB.float().log_softmax(1)
    return -(log_q.exp() * log_q).sum(1)


def soft_token_terms(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    log_q_NB: Tensor,
    tokens_Nk: Tensor,
    temperature: float,
    *,
    hard: bool = True,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return soft [N] and hard [N] cross entropies in float32, differentiable in hidden, weight and bias.

    The vocabulary's logits exist for a chunk of positions at a time, forward and backward; none are kept.

    Args:
        hidden_ND, weight_VD, bias_V: the student's states and its output layer.
        labels_N: the tokens of the data.
        log_q_NB, tokens_Nk: the teacher's log-probabilities of k tokens and of the tail [N, k+1] at `temperature`, and
            those tokens. A row must not name a token twice.
        hard: compute the second; else it is 0 and costs nothing.
        chunk: numbers of a chunk of logits, which decides memory and changes results by rounding only.
    """
    rows = max(1, chunk // weight_VD.shape[0])
    found = _SoftTokens.apply(hidden_ND, weight_VD, bias_V, labels_N, log_q_NB, tokens_Nk, temperature, hard, rows)
    assert found is not None
    return found


class _SoftTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, labels, log_q, tokens, temperature, hard, rows):
        ctx.save_for_backward(hidden, weight, bias, labels, log_q, tokens)
        ctx.temperature, ctx.hard, ctx.rows, ctx.dtype = temperature, hard, rows, compute_dtype(hidden)
        soft_N = hidden.new_zeros(len(labels), dtype=torch.float32)
        hard_N = torch.zeros_like(soft_N)
        for at in range(0, len(labels), rows):
            part = slice(at, at + rows)
            z = logits_of(hidden[part], weight, bias, ctx.dtype)
            if hard:
                hard_N[part] = z.logsumexp(1) - z.gather(1, labels[part, None])[:, 0]
            u = z.div_(temperature)
            q = log_q[part].float().softmax(1)
            top = u.gather(1, tokens[part])
            rest = _tail(u, tokens[part])
            lse = torch.logaddexp(top.logsumexp(1), rest)
            soft_N[part] = lse - (q[:, :-1] * top).sum(1) - q[:, -1] * rest
        return soft_N, hard_N

    @staticmethod
    def backward(ctx: Any, grad_soft, grad_hard):
        hidden, weight, bias, labels, log_q, tokens = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for at in range(0, len(labels), ctx.rows):
            part = slice(at, at + ctx.rows)
            z = logits_of(hidden[part], weight, bias, ctx.dtype)
            u = z / ctx.temperature
            q, kept = log_q[part].float().softmax(1), tokens[part]
            rest = _tail(u, kept)
            lse = torch.logaddexp(u.gather(1, kept).logsumexp(1), rest)
            grad = (u - lse[:, None]).exp_()
            # Outside of the kept tokens p_s loses p_t(tail) p_s / p_s(tail); inside, p_t is taken off.
            inside = grad.gather(1, kept) - q[:, :-1]
            grad.sub_((u - rest[:, None]).exp_().mul_(q[:, -1:])).scatter_(1, kept, inside)
            grad.mul_(grad_soft[part, None] / ctx.temperature)
            if ctx.hard:
                grad += (z - z.logsumexp(1, keepdim=True)).exp_().mul_(grad_hard[part, None])
                grad.scatter_add_(1, labels[part, None], -grad_hard[part, None])
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


def _tail(u_NV: Tensor, tokens_Nk: Tensor) -> Tensor:
    """Return the log of the sum of exp(u) over the tokens that are not named [N]; finite where there are none."""
    return u_NV.scatter(1, tokens_Nk, -torch.inf).logsumexp(1).clamp(min=u_NV.amin(1) - 80.0)


def prepare(config: Config, ready: Prepared) -> SoftLabels:
    """Run the teacher over the rows of train, or take its answers from the cache."""
    setting = ready.setting
    teacher = open_teacher(
        config.teacher, ready.task, trust_remote_code=setting.trust_remote_code, attention=setting.attention
    )
    made = soft_labels(
        teacher,
        None if ready.task.generative else ready.data.splits["train"].take(ready.train_index),
        ready.encoded["train"],
        ready.base,
        ready.task,
        k=config.k,
        temperature=config.temperature,
        max_length=setting.max_length,
        device=ready.device,
        cache=setting.cache,
    )
    return made.shuffled(setting.seed) if config.shuffle else made


def loss(config: Config, hidden: Tensor, head: nn.Linear, batch: dict[str, Any], reference: Reference | None) -> Found:
    """Return the loss of a batch of texts, the mean over its predicted tokens, with what to log."""
    log_q, tokens = batch[PREPARED]
    asked = batch["labels"] >= 0
    soft_N, hard_N = soft_token_terms(
        hidden[asked],
        head.weight,
        head.bias,
        batch["labels"][asked],
        log_q,
        tokens,
        config.temperature,
        hard=config.weight < 1,
    )
    return _weighed(config, soft_N, entropy(log_q), hard_N)


def loss_of_logits(config: Config, logits: Tensor, batch: dict[str, Any]) -> Found:
    """Return the loss of a batch of rows from the student's logits [B, K], with what to log."""
    (teacher,) = batch[PREPARED]
    soft_B, entropy_B = soft_cross_entropy(logits, teacher, config.temperature)
    hard_B = F.cross_entropy(logits, batch["labels"], reduction="none") if config.weight < 1 else soft_B
    return _weighed(config, soft_B, entropy_B, hard_B)


def _weighed(config: Config, soft: Tensor, entropy: Tensor, hard: Tensor) -> Found:
    mean = soft.mean()
    total = config.weight * config.temperature**2 * mean
    if config.weight < 1:
        total = total + (1 - config.weight) * hard.mean()
    return total, {"soft_cross_entropy": mean.detach(), "divergence": (soft - entropy).mean().detach()}
