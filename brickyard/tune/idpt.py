"""IDPT: one prompt token made from the example's own tokens, put before the last blocks.

    block p and those above run on [cls; P; tokens],  P = generator(tokens that enter block p)        [B, 1, d]

    edgeconv: three times   e_ij = [f_j - f_i ; f_i],  j among the k nearest of i in feature space, i itself included
                            f_i  = max_j LeakyReLU( BatchNorm( W e_ij ) )
              then          P    = max_i LeakyReLU( BatchNorm( W_5 [f^1; f^2; f^3] ) )
    mlp: the same without neighbours;   mean: a linear map of the mean;   static: one trained token (the control)
    none: no prompt (the baseline)

    head  = MLP( [cls ; P ; max over tokens] ), all after the last norm; without a prompt the mean stands in P's place

W e_ij = A f_j + (B - A) f_i, so two products per token stand for k per edge. All below block p is frozen and a pure
function of the input, and is computed once for all epochs.

Source: "Instance-aware Dynamic Prompt Tuning for Pre-trained Point Cloud Models", ICCV 2023, arXiv 2304.07221.
Headline claim: with 1.7M of 22M parameters above full tuning on scanned objects (90.0 against 88.3). Here on sentences
and images. Left out: training the cls token, which would send gradients through every block; drop path.
Legend: B rows, T tokens, d width, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.headed import HeadedModel
from brickyard.core.method import Claim, Record
from brickyard.core.prefix import Prefix, keep_at_rest
from brickyard.core.side import backbone_of, stack
from brickyard.core.task import Task
from brickyard.tune._batch_norm import BatchNorm

RECORD = Record(
    name="idpt",
    family="tune",
    title="Instance-aware dynamic prompt: one token made from the example's own",
    paper="Instance-aware Dynamic Prompt Tuning, ICCV 2023, arXiv 2304.07221",
    needs=("text-classification", "pair-classification", "regression", "image-classification"),
    because="its prompt is made from all tokens of a row, which would show a language model what it is to predict",
    slot="tuner",
    head="linear-probe",
    search={"lr": (5e-4, 1e-3), "generator": ("edgeconv", "mlp")},
    training={"lr": 1e-3, "wd": 0.05},
    presets={"paper": {"generator": "edgeconv", "k": 20, "layer": -1}},
    claims=(
        Claim(
            text="A prompt made from the example beats a static one with the same head by a point.",
            inequality="idpt >= static + 1.0",
            arms={"idpt": "idpt", "static": "idpt:generator=static", "mlp": "idpt:generator=mlp"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "idpt",
                "labels": "shuffled",
                "inequality": "idpt > control + 10.0",
            },
            gate="static > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=6,
            train_rows=1000,
            batch=16,
            full={"train_rows": 2000, "max_length": 0, "epochs": 10},
        ),
        Claim(
            text="IDPT beats the same head without a prompt (cls, mean and maximum) by 2 points.",
            inequality="idpt >= bare + 2.0",
            arms={"idpt": "idpt", "bare": "idpt:generator=none", "probe": "linear-probe:lr=1e-2,wd=0"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "idpt",
                "labels": "shuffled",
                "inequality": "idpt > control + 10.0",
            },
            gate="bare > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=6,
            train_rows=1000,
            batch=16,
            full={"train_rows": 2000, "max_length": 0, "epochs": 10},
        ),
        Claim(
            text="A prompt made from the example is at most 2 points below full tuning with the same head.",
            inequality="idpt >= full - 2.0",
            arms={"idpt": "idpt", "full": "idpt:generator=none,base=trained,lr=1e-4"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "idpt",
                "labels": "shuffled",
                "inequality": "idpt > control + 10.0",
            },
            gate="full > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=6,
            train_rows=1000,
            batch=16,
            lr_factors=(0.3, 1.0, 3.0),
            full={"train_rows": 2000, "max_length": 0, "epochs": 10},
        ),
    ),
)
PROMPT = "prompt"  # name of the generator in the model
_WIDE = 256  # hidden width of the head


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the generator; UsageError for values out of range."""

    generator: Literal["edgeconv", "mlp", "mean", "static"] | None = "edgeconv"
    """what makes the prompt; static is the negative control, none leaves the head alone"""
    layer: int = -1
    """block before which it is put, counted from 0, or from the last by -1, -2, ..."""
    k: int = 8
    """neighbours of a token (edgeconv); rows of fewer tokens use those they have"""
    depth: int = 3
    """layers of edgeconv or mlp"""
    dropout: float = 0.5
    """in the head"""
    base: Literal["frozen", "trained"] = "frozen"
    """trained: every weight of the base learns too, at the same lr; with no generator full tuning under this head"""
    cache: bool = True
    """compute what enters the block once, not in every epoch"""
    store: Literal["float16", "float32"] = "float32"
    """type in which it is kept; rounded to half, other tokens may be nearest"""

    def __post_init__(self) -> None:
        if self.k < 1 or self.depth < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"idpt: k={self.k}, depth={self.depth}, dropout={self.dropout}: out of range.")


def neighbours(f_BTd: Tensor, mask_BT: Tensor, k: int) -> Tensor:
    """Return the places of the k nearest valid tokens of each token, itself first: [B, T, k].

    Where a row has fewer, the token itself fills up: a maximum does not notice, but a batch norm in training counts it
    as often as it stands there.
    """
    near = min(k, f_BTd.shape[1])
    away_BTT = torch.cdist(f_BTd.float(), f_BTd.float()).masked_fill(~mask_BT[:, None], torch.inf)
    own = torch.arange(f_BTd.shape[1], device=f_BTd.device)
    away_BTT[:, own, own] = -1.0
    found = away_BTT.topk(near, dim=-1, largest=False)
    return torch.where(found.values.isinf(), own[None, :, None], found.indices)


def others(mask_BT: Tensor) -> Tensor:
    """Return the mask [B, T - 1] of the tokens behind the first; BadData for a row that has none."""
    rest = mask_BT[:, 1:]
    if bool((empty := ~rest.any(1)).any()):
        row = int(empty.nonzero()[0, 0])
        raise BadData(f"idpt: row {row} of the batch has no token behind the first to read; drop such rows.")
    return rest


class Normed(nn.Module):
    """A batch norm over the valid entries, and a leaky ReLU; entries that are not valid become 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x [..., d], valid [...]."""
        out = x.new_zeros(x.shape)
        out[valid] = F.leaky_relu(self.norm(x[valid]), 0.2)
        return out


class EdgeLayer(nn.Module):
    """max over neighbours of LeakyReLU(BatchNorm(W [f_j - f_i ; f_i])); with k = 0 a plain layer without neighbours."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.near = nn.Linear(width, width, bias=False) if k else None
        self.own = nn.Linear(width, width, bias=False)
        self.normed = Normed(width)

    def forward(self, f_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        if self.near is None:
            return self.normed(self.own(f_BTd), mask_BT)
        index_BTk = neighbours(f_BTd.detach(), mask_BT, self.k)
        # With W = [A, C]: A (f_j - f_i) + C f_i = A f_j + (C - A) f_i.
        moved_BTd = self.near(f_BTd)
        rows = torch.arange(len(f_BTd), device=f_BTd.device)[:, None, None]
        edges = moved_BTd[rows, index_BTk] + (self.own(f_BTd) - moved_BTd)[:, :, None]
        return self.normed(edges, mask_BT[..., None].expand(index_BTk.shape)).amax(dim=2)


class Generator(nn.Module):
    """Makes P [B, 1, d] from the tokens [B, T, d] that a mask calls valid."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.method_module, self.kind = True, config.generator
        k = config.k if config.generator == "edgeconv" else 0
        if config.generator in ("edgeconv", "mlp"):
            self.layers = nn.ModuleList(EdgeLayer(width, k) for _ in range(config.depth))
            self.join, self.normed = nn.Linear(config.depth * width, width, bias=False), Normed(width)
        elif config.generator == "mean":
            self.join = nn.Linear(width, width)
        else:
            self.token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))

    def forward(self, f_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        if self.kind == "static":
            return self.token.expand(len(f_BTd), -1, -1)
        if self.kind == "mean":
            weight_BT1 = (mask_BT / mask_BT.sum(1, keepdim=True).clamp_min(1))[..., None]
            return self.join((f_BTd * weight_BT1).sum(1, keepdim=True))
        found, x = [], f_BTd
        for layer in self.layers:
            x = layer(x, mask_BT)
            found.append(x)
        g_BTd = self.normed(self.join(torch.cat(found, dim=-1)), mask_BT)
        return g_BTd.masked_fill(~mask_BT[..., None], -torch.inf).amax(dim=1, keepdim=True)


class Head(nn.Module):
    """MLP on [cls ; P ; max over the other tokens]; `prompt` holds P's last state during a pass.

    With `mean` there is no P, and the mean over the other tokens stands in its place. BadData for a row without others.
    """

    frozen_pool = None

    def __init__(self, width: int, classes: int, dropout: float, *, mean: bool = False) -> None:
        super().__init__()
        self.mean = mean
        layers: list[nn.Module] = []
        for inside in (3 * width, _WIDE):
            layers += [nn.Linear(inside, _WIDE), BatchNorm(_WIDE), nn.ReLU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(_WIDE, classes))
        self.prompt: Tensor | None = None

    def forward(self, x_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        rest_BT1, x = others(mask_BT)[..., None], x_BTd[:, 1:]
        middle = (x * rest_BT1).sum(1) / rest_BT1.sum(1) if self.mean else self.prompt
        assert middle is not None
        most = x.masked_fill(~rest_BT1, -torch.inf).amax(dim=1)
        return self.mlp(torch.cat([x_BTd[:, 0], middle, most], dim=-1))


class _Inserted:
    """Puts P behind the first token before block p, widens the masks of the blocks from there on, takes P out again."""

    def __init__(self, model: HeadedModel, generator: Generator, head: Head, first: int) -> None:
        self.generator, self.head = generator, head
        self.mask: Tensor | None = None
        found = [block for _, block in stack(model)]
        backbone = backbone_of(model)
        self.handles = [
            backbone.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
            backbone.register_forward_hook(self._take_out),
            *(
                b.register_forward_pre_hook(self._before(i == first), with_kwargs=True)
                for i, b in enumerate(found)
                if i >= first
            ),
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _before(self, insert: bool) -> Any:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if insert:
                x = args[0] if args else kwargs["hidden_states"]
                mask = x.new_ones(x.shape[:2], dtype=torch.bool) if self.mask is None else self.mask.bool()
                p = self.generator(x[:, 1:], others(mask)).to(x.dtype)
                x = torch.cat([x[:, :1], p, x[:, 1:]], dim=1)
                args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
            return tuple(_wider(a) if i else a for i, a in enumerate(args)), {
                name: _wider(value) if name == "attention_mask" else value for name, value in kwargs.items()
            }

        return before

    def _take_out(self, backbone: nn.Module, args: Any, output: Any) -> None:
        x = output.last_hidden_state
        self.head.prompt = x[:, 1]
        output.last_hidden_state = torch.cat([x[:, :1], x[:, 2:]], dim=1)

    def _end(self, *_: Any) -> None:
        # The mask stays: a block that is run again in the backward pass makes the prompt a second time.
        self.head.prompt = None


def _wider(mask: Any) -> Any:
    """An attention mask [.., T, T] for one more token, behind the first, which all see and which sees what it sees."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask
    columns = torch.cat([mask[..., :1], mask[..., :1], mask[..., 1:]], dim=-1)
    return columns if mask.shape[-2] == 1 else torch.cat([columns[..., :1, :], columns], dim=-2)


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put the generator before block p of `model`; Refused where the base has no first token of its own."""
    if not isinstance(model, HeadedModel) or type(model.head).__name__ != "Probe":
        raise Refused("idpt brings its own head, on the prompt's last state; name none beside it.")
    names = [name for name, _ in stack(model)]
    first = config.layer + len(names) if config.layer < 0 else config.layer
    if not 0 <= first < len(names):
        raise UsageError(f"idpt: layer={config.layer}: this base has blocks 0 to {len(names) - 1}.")
    if getattr(model.backbone.config, "is_decoder", False) or hasattr(model.backbone.config, "rope_parameters"):
        raise Refused("idpt puts a token into the middle of a row, which a causal or rotary model reads otherwise.")
    former, device = model.head, next(model.parameters()).device
    base: Any = model.config
    width = int(base.hidden_size)
    generator = None if config.generator is None else Generator(width, config).to(device)
    model.head = head = Head(width, task.width, config.dropout, mean=generator is None).to(device)
    inserted = None
    if generator is not None:
        model.add_module(PROMPT, generator)
        inserted = _Inserted(model, generator, head, first)
    frozen = config.base == "frozen"
    found = [n for n, _ in model.named_parameters() if not frozen or n.startswith((f"{PROMPT}.", "head."))]
    flat = [n for n, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, found, matched={"before": [names[first]]}, no_decay=flat)
    resting = keep_at_rest(model, [backbone_of(model)] if frozen else [])
    if first and config.cache and frozen:
        attached.prefix = Prefix(model, names[:first], store=config.store)
    put_back = attached.detach

    def detach() -> nn.Module:
        put_back()
        resting.remove()
        if inserted is not None:
            inserted.close()
            delattr(model, PROMPT)
        if attached.prefix is not None:
            attached.prefix.close()
        model.head = former
        return model

    attached.detach = detach
    return attached
