"""TransNormer: a decoder language model on lightning attention, whose memory of the past is a state of constant size.

Each block, with SRMSNorm(x) = x / (||x||_2 / sqrt(D)) without weights, on states X [T, D] of H heads:

    X <- X + GLA(SRMSNorm(X)),   GLA: Q, K = swish(X W_q), swish(X W_k);  V = X W_v;  U = X W_u
                                 o_t = sum_{j <= t} lambda^(t-j) (q_t . k_j) v_j  in each head
                                 out = (SRMSNorm(O) * U) W_o,  O all heads beside one another
    X <- X + SGLU(SRMSNorm(X)),  SGLU = ((X W_gate) * (X W_up)) W_down,  no activation

Positions: the decay lambda = exp(-s) of each head and layer (`lightning_attention.layer_slopes`) everywhere, and in the
first layer alone a rotation of queries and keys (LRPE: q_t . k_j turns by the angles theta (t - j)).

The state of a row is H matrices [d, d] in float32 a layer, however long the text. Padding is left out of it, neither
added nor decayed. Documents packed into one row are kept apart by `position_ids` that start anew, if no attention mask
is given: the rule by which transformers keeps them apart.

Source: Qin et al. 2023, TransNormerLLM (arXiv 2307.14995). Claim: quality on a par with a Llama of equal size, at a
cost per token that does not grow with the length.
Left out: learned angles; biases; the sigmoid around U of later versions.
Importing this module registers the classes with transformers' Auto classes; `open_base` does so where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.configuration_utils import PretrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from brickyard.core.errors import UsageError
from brickyard.core.method import Claim, Record
from brickyard.models.lightning_attention import decode_step, layer_slopes, lightning_attention

RECORD = Record(
    name="transnormer",
    family="models",
    title="a decoder language model on lightning attention: a state of constant size instead of a growing cache",
    paper="Qin et al., TransNormerLLM: A Faster and Better Large Language Model (2023), arXiv 2307.14995",
    needs=("causal-lm", "text-classification", "pair-classification", "regression"),
    claims=(
        Claim(
            text="Trained on the same tokens, its loss is within 5 % of that of a Llama of equal size; at four times "
            "the length of training its loss stays within 5 %, where the Llama's does not.",
            measure="quality",
            data="embedded:python-source",
            seeds=3,
            full={"seeds": 5},
        ),
        Claim(
            text="Its cache is as large after 1,000 tokens as after one, and greedy text is the same token by token "
            "whether the past is read at once or step by step.",
            measure="decode",
            kind="counted",
        ),
    ),
)


@strict
class TransNormerConfig(PretrainedConfig):
    """The sizes of a TransNormer. `max_position_embeddings` is the length of training, not a limit of the network."""

    model_type = "transnormer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (read as an attribute by transformers)

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads or self.num_hidden_layers < 1:
            raise UsageError(
                f"hidden_size={self.hidden_size} is not divided by num_attention_heads={self.num_attention_heads}, or "
                f"num_hidden_layers={self.num_hidden_layers} is not positive."
            )
        if self.hidden_size // self.num_attention_heads % 2:
            raise UsageError(
                f"heads of {self.hidden_size // self.num_attention_heads} channels cannot be rotated; expected an even "
                "number, so choose another hidden_size or num_attention_heads."
            )


class _StateLayer(LinearAttentionLayer):
    """The state of one layer, [B, H, d, d]; it has no other cache."""

    is_compileable = False  # `generate` would compile, and our tiled form is a function of its own

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:
        """Keep the new state; `has_previous_state` is set only by convolutions otherwise."""
        self.device = recurrent_states.device
        self.has_previous_state[state_idx] = True
        return super().update_recurrent_state(recurrent_states, state_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row's state."""
        state: Any = self.recurrent_states[0]
        self.recurrent_states[0] = state.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the states of some rows."""
        state: Any = self.recurrent_states[0]
        self.recurrent_states[0] = state[indices]


class TransNormerCache(Cache):
    """The state of every layer, and how many positions it has seen; its size does not depend on them."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(layers=[_StateLayer() for _ in range(config.num_hidden_layers)])
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, padding included."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0

    @property
    def bytes(self) -> int:
        """Bytes of all states."""
        layers: list[Any] = list(self.layers)
        return sum(s.nbytes for layer in layers for s in layer.recurrent_states.values() if s is not None)


@dataclass(frozen=True)
class Sequences:
    """The sequences in a batch [B, T]: without padding, and a packed row's documents apart.

    Attributes:
        cu_seqlens: [S + 1] where sequences begin among the tokens that count.
        kept: [tokens] the places in B * T that count; None: all.
        first_B, last_B: first and last sequence of each row.
    """

    cu_seqlens: Tensor
    kept: Tensor | None
    first_B: Tensor
    last_B: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor | None, position_BT: Tensor | None) -> Sequences | None:
        """Find them; None where each row is one sequence, without padding."""
        if mask_BT is not None:
            if mask_BT.all():
                return None
            ends = mask_BT.sum(1).cumsum(0)
            rows = torch.arange(len(mask_BT), device=mask_BT.device)
            return cls(F.pad(ends, (1, 0)), mask_BT.flatten().nonzero()[:, 0], rows, rows)
        if position_BT is None or position_BT.shape[1] == 1:
            return None
        begins_BT = F.pad(position_BT.diff() != 1, (1, 0), value=True)
        count_B = begins_BT.sum(1)
        if (count_B == 1).all():
            return None
        last_B = count_B.cumsum(0) - 1
        starts = begins_BT.flatten().nonzero()[:, 0]
        return cls(F.pad(starts, (0, 1), value=begins_BT.numel()), None, last_B - count_B + 1, last_B)

    def attend(
        self, q_BHTd: Tensor, k_BHTd: Tensor, v_BHTe: Tensor, slopes_H: Tensor, state_BHde: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Lightning attention of every sequence for itself; a state continues in the first one of its row."""
        rows, _, tokens, _ = v_BHTe.shape
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q_BHTd, k_BHTd, v_BHTe)]
        q, k, v = (x.transpose(0, 1)[None] for x in (flat if self.kept is None else [x[self.kept] for x in flat]))
        first = None
        if state_BHde is not None:
            first = state_BHde.new_zeros(len(self.cu_seqlens) - 1, *state_BHde.shape[1:])
            first = first.index_copy(0, self.first_B, state_BHde)
        o_1HNe, final = lightning_attention(q, k, v, slopes_H, first, keep, self.cu_seqlens)
        o_NHe = o_1HNe[0].transpose(0, 1)
        if self.kept is not None:
            o_NHe = o_NHe.new_zeros(rows * tokens, *o_NHe.shape[1:]).index_copy(0, self.kept, o_NHe)
        return o_NHe.unflatten(0, (rows, tokens)).transpose(1, 2), None if final is None else final[self.last_B]


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), without weights, in float32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotate(x_BHTd: Tensor, position_BT: Tensor, base: float) -> Tensor:
    """Turn channel pairs (i, i + d/2) of position p by p base^(-2i/d), so that products depend on distances alone."""
    half = x_BHTd.shape[-1] // 2
    theta = base ** (-torch.arange(half, device=x_BHTd.device, dtype=torch.float32) / half)
    angle_B1Td = position_BT[:, None, :, None].float() * theta
    a, b = x_BHTd.float().chunk(2, dim=-1)
    cos, sin = angle_B1Td.cos(), angle_B1Td.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTd.dtype)


class GatedLinearAttention(nn.Module):
    """GLA: lightning attention between swish projections, normalised over all heads and gated."""

    slopes: Tensor

    def __init__(self, config: TransNormerConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.layer_idx, self.heads = config, layer_idx, config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = SimpleRMSNorm(config.rms_norm_eps)
        self.register_buffer("slopes", self.fixed_slopes(), persistent=False)

    def fixed_slopes(self) -> Tensor:
        """The slopes of this layer's heads, float32."""
        return torch.tensor(layer_slopes(self.heads, self.layer_idx, self.config.num_hidden_layers))

    def forward(
        self, x_BTD: Tensor, position_BT: Tensor, sequences: Sequences | None, past_key_values: TransNormerCache | None
    ) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (F.silu(self.q_proj(x_BTD)), F.silu(self.k_proj(x_BTD)), self.v_proj(x_BTD))
        )
        if self.layer_idx == 0:
            q, k = (rotate(y, position_BT, self.config.rope_theta) for y in (q, k))
        cache, keep = past_key_values, past_key_values is not None
        state = cache.get_recurrent_state(self.layer_idx) if cache is not None else None
        if sequences is not None:
            o, state = sequences.attend(q, k, v, self.slopes, state, keep)
        elif state is not None and q.shape[2] == 1:
            o, state = decode_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], self.slopes, state)
            o = o[:, :, None]
        else:
            o, state = lightning_attention(q, k, v, self.slopes, state, keep)
        if cache is not None:
            layer: Any = cache.layers[self.layer_idx]
            layer.update_recurrent_state(state)
        o_BTD = self.norm(o.transpose(1, 2).flatten(2))
        return self.o_proj(o_BTD * self.gate_proj(x_BTD))


class SimpleGatedLinearUnit(nn.Module):
    """SGLU: ((X W_gate) * (X W_up)) W_down."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x_BTD) * self.up_proj(x_BTD))


class TransNormerBlock(GradientCheckpointingLayer):
    """One block: token mixing and channel mixing, each normalised before and added to what it saw."""

    def __init__(self, config: TransNormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GatedLinearAttention(config, layer_idx)
        self.mlp = SimpleGatedLinearUnit(config)
        self.norm = SimpleRMSNorm(config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        sequences: Sequences | None = None,
        past_key_values: TransNormerCache | None = None,
    ) -> Tensor:
        attended = self.self_attn(self.norm(hidden_states), position_ids, sequences, past_key_values)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm(hidden_states))


class TransNormerPreTrainedModel(PreTrainedModel):
    """What the model classes share with transformers."""

    config: TransNormerConfig
    config_class = TransNormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransNormerBlock"]  # noqa: RUF012 (the type that transformers gives it)
    _is_stateful = True  # a state cannot be rolled back, so there is no assisted generation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedLinearAttention):
            init.copy_(module.slopes, module.fixed_slopes())  # no file holds them

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` then takes the cache that the first forward pass returns


class TransNormerModel(TransNormerPreTrainedModel):
    """The network without its output layer."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(TransNormerBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = SimpleRMSNorm(config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransNormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Return the last token states [B, T, D].

        Args:
            input_ids or inputs_embeds: [B, T], or [B, T, D].
            attention_mask: [B, T] or [B, past + T]; 0 marks padding on either side, which leaves the state alone.
            position_ids: [B, T]; without a mask, a position that does not follow the one before it starts a document.
            past_key_values: what an earlier pass returned.

        Raises:
            UsageError: none or both of the inputs, another kind of cache or mask, or attention weights asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give exactly one of input_ids and inputs_embeds.")
        if output_attentions:
            raise UsageError("lightning attention has no matrix of attention weights to return.")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = TransNormerCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, TransNormerCache):
            raise UsageError(f"past_key_values is a {type(past_key_values).__name__}; expected a TransNormerCache.")
        rows, tokens, _ = x_BTD.shape
        seen = 0 if past_key_values is None else past_key_values.seen
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[1] not in (tokens, seen + tokens):
                raise UsageError(
                    f"attention_mask is {list(attention_mask.shape)}; expected [{rows}, {tokens}] or [{rows}, "
                    f"{seen + tokens}]: lightning attention knows padding, no other mask."
                )
            attention_mask = attention_mask[:, -tokens:].bool()
        sequences = Sequences.of(attention_mask, position_ids)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens, device=x_BTD.device)[None]
        states = [x_BTD]
        for layer in self.layers:
            x_BTD = layer(x_BTD, position_ids, sequences, past_key_values=past_key_values)
            states.append(x_BTD)
        if past_key_values is not None:
            past_key_values.seen += tokens
        x_BTD = states[-1] = self.norm(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class TransNormerForCausalLM(TransNormerPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransNormerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V] (of the last `logits_to_keep` positions, if not 0) and, with labels, their loss.

        Arguments and errors are those of `TransNormerModel`; labels [B, T] are shifted inside, -100 is not predicted.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class TransNormerForSequenceClassification(GenericForSequenceClassification, TransNormerPreTrainedModel):
    """A classifier on the state of the last token that is no padding."""


AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig)
AutoModel.register(TransNormerConfig, TransNormerModel)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerForCausalLM)
AutoModelForSequenceClassification.register(TransNormerConfig, TransNormerForSequenceClassification)
