"""What methods with a cloze share: label words read at the gaps of a sentence whose own words may be trained vectors.

    q(y | x) = softmax over classes of  mean over the words v of y of  sum_j o_j[ token j of v ]       o_j at gap j
    o_j      = the masked language model's logits at gap j, for the tokens of label words alone

Shapes: B rows, T tokens, d width, J gaps, V tokens that stand in a label word, W label words, C classes, M vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from brickyard.core.attached import Attached, attach_in_place, copy_into
from brickyard.core.base import Base
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.loop import Training, train
from brickyard.core.masked import MaskedRows, masked_loss
from brickyard.core.roles import blocks
from brickyard.core.task import Task
from brickyard.core.template import Template, label_tokens
from brickyard.core.wrap import attach_peft, check_rank, targets

BETWEEN = "|"  # of several label words of one class
HIDDEN = 0.15  # share of tokens that masked language modelling hides
_VECTORS = "vectors"


def at_gaps(x_BTd: Tensor, ids_BT: Tensor, mask_BT: Tensor, mask_id: int, gaps: int) -> Tensor:
    """Return the states at the gaps [B, J, d]; BadData for a row that has more or fewer of them."""
    gap_BT = (ids_BT == mask_id) & mask_BT.bool()
    count_B = gap_BT.sum(1)
    if bool((count_B != gaps).any()):
        row = int((count_B != gaps).nonzero()[0, 0])
        raise BadData(f"row {row} of the batch has {int(count_B[row])} gaps, {gaps} were expected.")
    return x_BTd[gap_BT].view(len(x_BTd), gaps, -1)


def word_scores(o_BJV: Tensor, place_WJ: Tensor) -> Tensor:
    """Return the score of each label word [B, W]: the sum over the gaps of the logit of its token there."""
    return o_BJV.gather(2, place_WJ.t().expand(len(o_BJV), -1, -1)).sum(1)


@dataclass(frozen=True)
class Verbalizer:
    """Label words as tokens.

    tokens: those that stand in a word, rising; place_WJ: the place among them of each word's token at each gap;
    average_WC: 1 / (words of the class) where the word is one of the class's, else 0.
    """

    tokens: list[int]
    place_WJ: Tensor
    average_WC: Tensor

    @classmethod
    def of(cls, words: Sequence[str], tokenizer: Any, gaps: int) -> Verbalizer:
        """Read the label words of each class, several joined by `|`.

        Raises UsageError where a word is not exactly `gaps` known tokens, or two words are the same tokens.
        """
        each = [[word.strip() for word in given.split(BETWEEN)] for given in words]
        flat = [word for given in each for word in given]
        ids = label_tokens(flat, tokenizer, gaps, whole=True)
        tokens = sorted({token for row in ids for token in row})
        place = torch.tensor([[tokens.index(token) for token in row] for row in ids])
        average = torch.zeros(len(flat), len(each))
        owner = torch.tensor([c for c, given in enumerate(each) for _ in given])
        average[torch.arange(len(flat)), owner] = 1 / torch.tensor([float(len(each[c])) for c in owner.tolist()])
        return cls(tokens, place, average)


class LabelRows(nn.Module):
    """The rows of an output layer that belong to label words: states [..., d] -> logits [..., V]."""

    def __init__(self, layer: nn.Linear, tokens: list[int]) -> None:
        super().__init__()
        bias = torch.zeros(len(tokens)) if layer.bias is None else layer.bias.detach()[tokens].clone()
        self.weight = nn.Parameter(layer.weight.detach()[tokens].clone())
        self.bias = nn.Parameter(bias.to(self.weight))

    def forward(self, x_BTd: Tensor) -> Tensor:
        return nn.functional.linear(x_BTd, self.weight, self.bias)


class PromptModel(nn.Module):
    """A masked language model that reads a class at the gaps of a template: a batch -> logits [B, C].

    With `trained`, each token of the template but its gaps and special tokens is a vector of its own, which begins at
    that token's embedding: then the model answers as without, bit for bit.
    """

    place_WJ: Tensor
    average_WC: Tensor
    frame: Tensor
    slots: Tensor

    def __init__(
        self, model: nn.Module, template: Template, words: Verbalizer, tokenizer: Any, *, trained: bool
    ) -> None:
        super().__init__()
        self.model, self.words, self.gaps, self.mask_id = model, words, template.masks, tokenizer.mask_token_id
        self.register_buffer("place_WJ", words.place_WJ, persistent=False)
        self.register_buffer("average_WC", words.average_WC, persistent=False)
        before, behind = template.frame(tokenizer)
        self.pattern, self.sides = template.pattern, (len(before), len(behind))
        frame_F = torch.tensor([*before, *behind])
        own_F = ~torch.isin(frame_F, torch.tensor(sorted(tokenizer.all_special_ids)))
        if trained and not bool(own_F.any()):
            raise UsageError(f"template {template.pattern!r} has no word of its own whose vector could be trained.")
        self.register_buffer("frame", frame_F, persistent=False)
        self.register_buffer("slots", torch.where(own_F, own_F.cumsum(0) - 1, -1), persistent=False)
        self.vectors: nn.Parameter | None = None
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        at = embedding.weight.device
        if trained:
            with torch.no_grad():
                self.vectors = nn.Parameter(embedding(frame_F[own_F].to(at)).clone())
        self.to(at)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **batch: Tensor) -> SequenceClassifierOutput:
        x_BTd = self.model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        if self.vectors is not None:
            slot_BT = self._slots(input_ids, attention_mask)
            x_BTd = torch.where((slot_BT >= 0)[..., None], self.vectors[slot_BT.clamp(min=0)].to(x_BTd), x_BTd)
        o_BTV = self.model(inputs_embeds=x_BTd, attention_mask=attention_mask, **batch).logits
        o_BJV = at_gaps(o_BTV, input_ids, attention_mask, self.mask_id, self.gaps)
        return SequenceClassifierOutput(logits=word_scores(o_BJV, self.place_WJ) @ self.average_WC.to(o_BJV))

    def _slots(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return which vector stands at each position [B, T]; -1 where the token's own embedding does."""
        before, behind = self.sides
        column_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        # Rows are padded on the right: what stands behind the text ends where the row does.
        from_end_BT = column_T - mask_BT.sum(1, keepdim=True) + behind
        place_BT = torch.where(column_T < before, column_T, before + from_end_BT)
        inside_BT = (column_T < before) | ((from_end_BT >= 0) & (from_end_BT < behind))
        place_BT = place_BT.clamp(0, len(self.frame) - 1)
        if not bool((self.frame[place_BT] == ids_BT)[inside_BT].all()):
            raise UsageError(
                f"template {self.pattern!r}: its words join with those of a text to other tokens; put spaces around "
                "the text."
            )
        return torch.where(inside_BT, self.slots[place_BT], -1)

    def state(self) -> dict[str, Tensor]:
        """The trained vectors by name, empty where the template is written in words."""
        return {} if self.vectors is None else {_VECTORS: self.vectors}


@dataclass(frozen=True)
class WarmStart:
    """Where a cloze head may begin: rows [V, d] and bias [V] of the vocabulary, and the layer and norm before them."""

    weight: Tensor
    bias: Tensor | None = None
    transform: tuple[nn.Linear, nn.LayerNorm] | None = None


def warm_start(base: Base) -> WarmStart:
    """Return the base's own masked-language head, its word embeddings alone where it has none.

    The layer and norm before the vocabulary are of use only to a head that computes as theirs does: one of each, of the
    base's width, with GELU between. Raises Refused where the vocabulary's rows have another width than the states.
    """
    if base.masked:
        model: Any = base.masked_model()
        rows = model.get_output_embeddings()
        head = [m for n, m in model.named_modules() if not f"{n}.".startswith(f"{model.base_model_prefix}.")]
        dense = [m for m in head if isinstance(m, nn.Linear) and m is not rows]
        norms = [m for m in head if isinstance(m, nn.LayerNorm)]
        config = base.config
        gelu = getattr(config, "hidden_act", getattr(config, "activation", None)) == "gelu"
        square = len(dense) == len(norms) == 1 and dense[0].weight.shape == (base.width, base.width)
        bias = None if rows.bias is None else rows.bias.detach()
        start = WarmStart(rows.weight.detach(), bias, (dense[0], norms[0]) if gelu and square else None)
    else:
        outer: Any = base.backbone()
        start = WarmStart(outer.get_input_embeddings().weight.detach())
    if start.weight.shape[1] != base.width:
        raise Refused(
            f"a warm cloze head needs rows of the states' width {base.width}; the vocabulary of {base.spec} has rows "
            f"of {start.weight.shape[1]}. Leave out warm=true."
        )
    return start


def masked_model(
    base: Base,
    rows: Encoded,
    task: Task,
    training: Training,
    *,
    top: int,
    seed: int,
    new: bool = False,
    attention: str = "sdpa",
    device: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the base as a masked language model, and how it came by its output layer.

    A base without one is lent Brickyard's own where there is one for it. Else, or with `new`, it gets a new one (of its
    architecture, tied to the word embeddings), trained together with the `top` blocks by masked language modelling on
    `rows`, whose labels are not read; the blocks below stay frozen. Raises Refused where the architecture is no
    encoder, or the tokenizer has no mask.
    """
    if base.tokenizer.mask_token is None:
        raise Refused(
            f"the tokenizer of {base.spec} has no mask token, so a template has no gap to read; use a base of the BERT "
            "kind, or score label words with a language model (task multiple-choice)."
        )
    if base.masked:
        return base.masked_model(attention).requires_grad_(False), {"head": "the base's own"}
    if base.lent_head and not new:
        return base.masked_model(attention, lent=True).requires_grad_(False), {"head": "lent by Brickyard"}
    model = base.masked_model(attention, new_head=seed)
    known = blocks(model)
    if not 0 <= top <= len(known):
        raise UsageError(f"{top} blocks were to train; {base.spec} has {len(known)}.")
    open_names = tuple(f"{name}." for name, _ in known[len(known) - top :])
    backbone = f"{model.base_model_prefix}."
    names = [n for n, _ in model.named_parameters() if not n.startswith(backbone) or n.startswith(open_names)]
    attached = attach_in_place(model, names, matched={"head": names})
    attached.objective = masked_loss
    found = train(attached, MaskedRows(rows, base.tokenizer, HIDDEN), None, task, training, device=device)
    losses = [point["train_loss"] for point in found.history]
    report = {"head": "new", "steps": found.steps, "blocks": top, "loss": [losses[0], losses[-1]], "rows": len(rows)}
    return model.requires_grad_(False), report


def attach_prompt(
    model: nn.Module,
    template: Template,
    words: Verbalizer,
    tokenizer: Any,
    *,
    trained: bool,
    rank: int,
    spread: float | None = None,
    vector_scale: float = 1.0,
) -> Attached:
    """Put a prompt model on a masked language model whose output layer is `LabelRows`; `detach` takes it off again.

    What trains is a LoRA change of query and value, the label rows and, with `trained`, the template's vectors, at
    `vector_scale` times the learning rate. spread: the vectors begin at N(0, spread) instead of words' embeddings.
    """
    rows: Any = model.get_output_embeddings()  # type: ignore[operator]
    began = {name: tensor.detach().clone() for name, tensor in rows.state_dict().items()}
    matched = targets(model, ("query", "value"))
    check_rank(model, matched, rank, "the prompt model")
    inner = attach_peft(model, LoraConfig(r=rank, lora_alpha=2 * rank), matched)
    prompt = PromptModel(inner.model, template, words, tokenizer, trained=trained)
    if prompt.vectors is not None and spread is not None:
        nn.init.normal_(prompt.vectors, std=spread)
    rows.requires_grad_(True)
    beside = {**{f"rows.{name}": p for name, p in rows.named_parameters()}, **prompt.state()}

    def load(tensors: dict[str, Tensor]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if name in beside}
        copy_into({name: p.data for name, p in beside.items()}, own, "prompt model")
        inner.load({name: tensor for name, tensor in tensors.items() if name not in beside})

    def detach() -> nn.Module:
        plain = inner.detach()
        rows.load_state_dict(began)
        return plain.requires_grad_(False)

    return Attached(
        model=prompt,
        parameter_groups=[
            *inner.parameter_groups,
            {"params": list(rows.parameters())},
            *([{"params": [prompt.vectors], "lr_scale": vector_scale}] if prompt.vectors is not None else []),
        ],
        tensors=lambda: {**inner.tensors(), **{name: p.detach().cpu().clone() for name, p in beside.items()}},
        load=load,
        detach=detach,
        matched=matched,
    )
