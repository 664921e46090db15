"""Hierarchical side-tuning: a pyramid of scales beside a ViT, fed by one trained token and the patches of every block.

    block l of the ViT runs on [e_l; cls; patches]; its token G_l and patch map F_l are read, the token is taken out
    stage j works on a finer or coarser grid than the patches, side block b of it reads block l:
        p_l = LN_l(T_j G_l)                                     [B, M, m_j]     T_j [m_j, D], one linear map a stage
        f_l = resize(T_j F_l)                                   [B, HW_j, m_j]  bilinear, after the map: they commute
        u   = u + Attention(q = LN u, kv = [p_l; mean f_l])     M + 1 keys
        u   = u + f_l;  u = u + MLP(LN u)
    stage 1 begins with convolutions on the image, each later one with a convolution of stride 2 on the one before
    logits = W BatchNorm(mean over the tokens of the last stage)

Trained: the pyramid, the tokens e_l, the head, and the norms inside the ViT's blocks, so that a step goes backward
through the whole ViT. `detach` leaves out tokens and norms: then nothing flows back and the states can be kept.
`maps` gives those of all stages, finest first, for dense tasks.

Source: "Hierarchical Side-Tuning for Vision Transformers", arXiv 2310.05393. Headline claim: 76.0 % on VTAB-1k with
0.78M parameters. Left out: drop path, and detectors on the maps.
Legend: B images, M tokens e_l, D width of the ViT, m_j of stage j, HW_j positions of its grid, N patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.errors import Refused, UsageError
from brickyard.core.headed import HeadedModel
from brickyard.core.method import Claim, Record
from brickyard.core.roles import roles
from brickyard.core.side import SIDE, attach_side, backbone_of, stack
from brickyard.core.task import Task
from brickyard.tune._batch_norm import BatchNorm

RECORD = Record(
    name="hst",
    family="tune",
    title="Hierarchical side-tuning: a pyramid of scales beside a ViT",
    paper="Hierarchical Side-Tuning for Vision Transformers, arXiv 2310.05393",
    needs=("image-classification",),
    because="it works on grids of patches",
    slot="tuner",
    head="linear-probe",
    search={"lr": (1e-3, 3e-3, 1e-2)},
    training={"lr": 3e-3, "wd": 5e-4},
    presets={"paper": {"widths": [32, 48, 64, 72], "heads": [2, 4, 8, 12], "stem": 4}},
    claims=(
        Claim(
            text="HST beats the same pyramid without the ladder, which sees the image alone, by a point.",
            measure="beside_the_pyramid",
            part="ladder",
            base="embedded:tiny-vit",
            data="cifar10|generated:textures",
            seeds=3,
        ),
        Claim(
            text="HST beats tuning of the norms with a linear head by 2 points.",
            measure="beside_the_pyramid",
            part="norms",
            base="embedded:tiny-vit",
            data="cifar10|generated:textures",
            seeds=3,
        ),
        Claim(
            text="HST is at most a point below LoRA.",
            measure="beside_the_pyramid",
            part="lora",
            base="embedded:tiny-vit",
            data="cifar10|generated:textures",
            seeds=3,
        ),
        Claim(
            text="The pyramid's maps find the pixels of a digit under noise better than a linear decoder.",
            measure="digit_masks",
            base="embedded:tiny-vit",
            data="mnist|embedded:digits",
            seeds=3,
        ),
        Claim(
            text="On classes that its base did not learn HST beats its pyramid alone by a point and is at most a point "
            "below LoRA; moment probing beats a linear probe by a point.",
            measure="to_other_classes",
            base="embedded:tiny-vit",
            data="cifar10|embedded:digits",
            seeds=3,
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the pyramid; UsageError for sizes that do not fit each other."""

    widths: tuple[int, ...] = (16, 24, 32)
    """m_j of the stages; the blocks of the ViT are shared out evenly among them"""
    heads: tuple[int, ...] = (2, 3, 4)
    """attention heads of the stages"""
    stem: Literal[1, 2, 4] = 2
    """stride of the first stage's convolutions on the image"""
    tokens: int = 1
    """M, trained tokens for each block"""
    ladder: bool = True
    """false: the pyramid sees the image alone, p_l = f_l = 0; the negative control"""
    detach: bool = False
    """no tokens, frozen norms: nothing flows back through the ViT"""
    cache: bool = True
    """with detach: compute the states once, not in every epoch"""
    store: Literal["float16", "float32"] = "float16"
    """type in which they are kept"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "heads", tuple(self.heads))
        if not self.widths or len(self.widths) != len(self.heads) or self.tokens < 1:
            raise UsageError(
                f"hst: widths={list(self.widths)}, heads={list(self.heads)}, tokens={self.tokens}: one number of heads "
                "for each width was expected, and at least one token."
            )
        for width, count in zip(self.widths, self.heads, strict=True):
            if width < 1 or count < 1 or width % count:
                raise UsageError(f"hst: {count} heads do not divide the width {width}.")
        if self.stem not in (1, 2, 4):
            raise UsageError(f"hst: stem={self.stem}; expected 1, 2 or 4.")


class SideBlock(nn.Module):
    """One block of a stage: attention to a few keys, the patches' features, an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2, self.norm_token = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, u_BPm: Tensor, p_BMm: Tensor | None, f_BPm: Tensor | None) -> Tensor:
        if f_BPm is not None:
            keys = f_BPm.mean(dim=1, keepdim=True)
            if p_BMm is not None:
                keys = torch.cat([self.norm_token(p_BMm), keys], dim=1)
            u_BPm = u_BPm + self._attend(self.norm1(u_BPm), keys) + f_BPm
        return u_BPm + self.mlp(self.norm2(u_BPm))

    def _attend(self, u_BPm: Tensor, kv_BKm: Tensor) -> Tensor:
        q = self.query(u_BPm).unflatten(-1, (self.heads, -1))
        k, v = self.key_value(kv_BKm).unflatten(-1, (2, self.heads, -1)).unbind(2)
        weights = (torch.einsum("bphd,bkhd->bphk", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out(torch.einsum("bphk,bkhd->bphd", weights, v).flatten(2))


class Stage(nn.Module):
    """One scale: its entry convolution, the bridge from the ViT, and its blocks."""

    def __init__(self, entry: nn.Module, d: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.entry, self.bridge = entry, nn.Linear(d, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(SideBlock(width, heads) for _ in range(depth))

    def forward(
        self, x_BCHW: Tensor, maps: list[Tensor] | None, tokens: list[Tensor] | None, grid: tuple[int, int]
    ) -> Tensor:
        """Return the stage's map [B, m, H', W']."""
        map_BmHW = self.entry(x_BCHW)
        size = map_BmHW.shape[-2:]
        u = self.norm_in(map_BmHW.flatten(2).transpose(1, 2))
        for i, block in enumerate(self.blocks):
            f = None
            if maps is not None:
                small = self.bridge(maps[i]).transpose(1, 2).unflatten(-1, grid)
                f = F.interpolate(small, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
            u = block(u, None if tokens is None else self.bridge(tokens[i]), f)
        return self.norm_out(u).transpose(1, 2).unflatten(-1, size)


class Pyramid(nn.Module):
    """The side network; called with the states that leave the ViT's blocks it returns the last stage's tokens."""

    def __init__(self, backbone: Any, config: Config) -> None:
        super().__init__()
        count, d = len(stack(backbone)), int(backbone.config.hidden_size)
        if count % len(config.widths):
            raise UsageError(f"hst: {count} blocks cannot be shared out evenly among {len(config.widths)} stages.")
        size, patch = backbone.config.image_size, backbone.config.patch_size
        size, patch = ((v, v) if isinstance(v, int) else tuple(v) for v in (size, patch))
        self.method_module = True
        self.grid = (size[0] // patch[0], size[1] // patch[1])
        self.depth, self.ladder, self.read_tokens = count // len(config.widths), config.ladder, not config.detach
        channels, stages = int(getattr(backbone.config, "num_channels", 3)), []
        for j, (width, heads) in enumerate(zip(config.widths, config.heads, strict=True)):
            entry = _stem(channels, width, config.stem) if j == 0 else nn.Conv2d(config.widths[j - 1], width, 3, 2, 1)
            stages.append(Stage(entry, d, width, heads, self.depth))
        self.stages = nn.ModuleList(stages)
        self.tokens = nn.Parameter(torch.empty(count, config.tokens, d)) if self.read_tokens else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.tokens is not None:
            for l in range(count):  # each e_l [1, M, D] by itself: a block's token knows nothing of how many blocks
                nn.init.xavier_uniform_(self.tokens.detach()[l : l + 1])

    def features(self, states: list[Tensor], pixels: Tensor, tokens: list[Tensor] | None = None) -> list[Tensor]:
        """Return the maps of all stages [B, m_j, H_j, W_j], finest first. states: [B, prefix + N, D] of every block."""
        patches = [x[:, x.shape[1] - self.grid[0] * self.grid[1] :] for x in states]
        x, out = pixels, []
        for j, stage in enumerate(self.stages):
            part = slice(j * self.depth, (j + 1) * self.depth)
            maps = patches[part] if self.ladder else None
            x = stage(x, maps, tokens[part] if tokens is not None and self.ladder else None, self.grid)
            out.append(x)
        return out

    def forward(self, states: list[Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the tokens of the last stage [B, P, m]; `batch` holds pixel_values, and tokens where they are read."""
        return self.features(states, batch["pixel_values"], batch.get("tokens"))[-1].flatten(2).transpose(1, 2)


class Head(nn.Module):
    """Mean over tokens, a BatchNorm and a linear layer.

    The paper's BatchNorm has no weights; with the linear layer behind it they add no function, and a brick keeps the
    statistics of norms that train.
    """

    frozen_pool = None

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.output = BatchNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_BPm: Tensor, mask_BP: Tensor | None = None) -> Tensor:
        return self.output(self.norm(x_BPm.mean(dim=1)))


def maps(model: nn.Module, pixels_BCHW: Tensor) -> list[Tensor]:
    """Return what the stages of a model with a pyramid make of images [B, m_j, H_j, W_j], finest first.

    Gradients flow to all that trains, so that a decoder for dense tasks can be trained on the maps.
    """
    pyramid: Any = model.get_submodule(SIDE)
    found: list[Tensor] = []
    handles = [stage.register_forward_hook(lambda *given: found.append(given[2])) for stage in pyramid.stages]
    try:
        backbone_of(model)(pixel_values=pixels_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _stem(channels: int, width: int, stride: int) -> nn.Sequential:
    first = nn.Conv2d(channels, width, 3, 1 if stride == 1 else 2, 1, bias=False)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(width), nn.ReLU()]
    if stride == 4:
        layers.append(nn.Conv2d(width, width, 2, 2))
    return nn.Sequential(*layers)


class _Tokens:
    """Puts e_l before the tokens of each block, and reads and takes it out behind it."""

    def __init__(self, model: nn.Module, pyramid: Pyramid) -> None:
        self.backbone: Any = backbone_of(model)
        self.pyramid, self.states, self.seen = pyramid, [], []
        self.ordinary = self.backbone.forward
        self.backbone.forward = self._forward
        self.handles = []
        for i, (_, block) in enumerate(stack(model)):
            self.handles.append(block.register_forward_pre_hook(self._prepend(i), with_kwargs=True))
            self.handles.append(block.register_forward_hook(self._strip))

    def _prepend(self, i: int) -> Any:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            assert self.pyramid.tokens is not None
            e = self.pyramid.tokens[i].to(x.dtype).expand(len(x), -1, -1)
            joined = torch.cat([e, x], dim=1)
            return ((joined, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": joined})

        return before

    def _strip(self, block: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        assert self.pyramid.tokens is not None
        count = self.pyramid.tokens.shape[1]
        self.seen.append(x[:, :count])
        self.states.append(x[:, count:])
        return x[:, count:] if isinstance(output, Tensor) else (x[:, count:], *output[1:])

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        self.states, self.seen = [], []
        try:
            out = self.ordinary(*args, **kwargs)
            out.last_hidden_state = self.pyramid(self.states, {"pixel_values": pixels, "tokens": self.seen})
        finally:
            self.states, self.seen = [], []
        return out

    def close(self) -> None:
        self.backbone.__dict__.pop("forward", None)
        for handle in self.handles:
            handle.remove()


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put the pyramid beside the ViT of `model`; Refused where the base is no plain ViT or the arm names a head."""
    backbone: Any = backbone_of(model)
    found = getattr(backbone.config, "image_size", None), getattr(backbone.config, "patch_size", None)
    if None in found:
        raise Refused("hst works on a plain ViT, whose configuration names image_size and patch_size.")
    if not isinstance(model, HeadedModel) or type(model.head).__name__ != "Probe":
        raise Refused("hst brings its own head, on its last stage; name none beside it.")
    pyramid = Pyramid(backbone, config)
    former, device = model.head, next(model.parameters()).device
    model.head = Head(config.widths[-1], task.width).to(device)
    if config.detach:
        layers = range(1, len(stack(model)) + 1)
        attached, close = attach_side(model, pyramid, layers, cache=config.cache, store=config.store), None
    else:
        model.add_module(SIDE, pyramid.to(device))
        blocks = tuple(f"{name}." for name, _ in stack(model))
        norms = [n for n, kind in roles(model).items() if kind == "norm" and n.startswith(blocks)]
        inside = (f"{SIDE}.", "head.", *(f"{n}." for n in norms))
        names = [n for n, _ in model.named_parameters() if n.startswith(inside)]
        flat = [n for n, p in model.named_parameters() if p.ndim < 2 or n == f"{SIDE}.tokens"]
        attached = attach_in_place(model, names, matched={"norms": norms}, no_decay=flat)
        close = _Tokens(model, pyramid)
    put_back = attached.detach

    def detach() -> nn.Module:
        put_back()
        if close is not None:
            close.close()
            delattr(model, SIDE)
        model.head = former
        return model

    attached.detach = detach
    return attached
