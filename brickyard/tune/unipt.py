"""UniPT: one light network that reads all layers of a frozen backbone at once, the last one asking the others.

    z_i = LN_i(W_i H_i + b_i)                                   [B, T, k], i = 0..N; N is the anchor
    A_i = relu(z_N z_i^T * mask);  A_i = A_i / (sum_j A_ij + e)  [B, T, T], no scaling, no softmax; e = 1e-8
    m_i = (A_i + I) z_i                                          i = 0..N-1
    c   = softmax_i( w . (mean z_N * mean z_i) + b )             [B, N], means over valid tokens; of this example
    out = z_N + LN(W_p sum_i c_i m_i + b_p);   y = W_up relu(out) + b_up      [B, T, d], what the head reads

All layers are treated alike and independently ("parallel"). A row of A without a positive entry is 0, so only the
token itself is left of it. The products of all layers are one batched product, and the identity is added, not made.
The backbone runs in evaluation mode without gradient; kept states make an epoch run none of it. Nothing can be merged.

A ConvNet has maps of falling size, stage by stage. There each map h_i is first pooled to the anchor's grid, window by
window, with weights that the anchor sets, and LN(W_i h_i) becomes BatchNorm(conv1x1):

    w_i = relu( sum_c relu(conv1x1 h_N)^ * h_i ),  w_i / (its sum in the window + e) + 1 / window;   sum of w_i h_i

Source: Diao et al., "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory", CVPR
2024, arXiv 2308.14316, section 3. Headline claim: lower training memory than methods that go backward through the
backbone, and better scores than LST at as much. Left out: the two-tower (CLIP) variant.
Legend: B rows, T tokens, d width, k of the parallel network, N blocks or stages, C channels of a map, S its window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core.attached import Attached
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.roles import blocks
from brickyard.core.side import attach_side, backbone_of, stack, valid_tokens
from brickyard.core.task import Task

RECORD = Record(
    name="unipt",
    family="tune",
    title="Parallel tuning: a light network over the states of all frozen layers",
    paper="UniPT: Universal Parallel Tuning, CVPR 2024, arXiv 2308.14316",
    needs=("text-classification", "pair-classification", "regression", "image-classification"),
    because="its anchor tokens look at all others, which would show a language model what it is to predict",
    slot="tuner",
    head="linear-probe",
    search={"lr": (5e-4, 1e-3, 2e-3), "width": (64, 128)},
    training={"lr": 1e-3},
    presets={"paper": {"factor": 2}},
    claims=(
        Claim(
            text="UniPT is at most half a point below LST.",
            inequality="unipt >= lst - 0.5",
            arms={"unipt": "unipt:width=64", "lst": "lst:r=8,init=random", "probe": "linear-probe:lr=1e-2"},
            control={
                "what": "one layer beside the anchor, the first: there is nothing to weigh",
                "arm": "unipt:width=64,layers=[0]",
                "inequality": "unipt > control",
            },
            gate="lst > probe + 1.0",
            data="trec|embedded:stdlib-topics",
            epochs=8,
            train_rows=1000,
            batch=16,
            full={"train_rows": 2000, "max_length": 0, "lrs": (1e-3, 3e-3)},
        ),
        Claim(
            text="UniPT beats a linear probe on the last layer by 3 points.",
            inequality="unipt >= probe + 3.0",
            arms={"unipt": "unipt:width=64", "probe": "linear-probe:lr=1e-2"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "unipt:width=64",
                "labels": "shuffled",
                "inequality": "unipt > control + 10.0",
            },
            gate="probe > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=8,
            train_rows=1000,
            batch=16,
            full={"train_rows": 2000, "max_length": 0},
        ),
        Claim(
            text="UniPT keeps at most 0.4 times LoRA's bytes for backward, and 1.1 times LST's.",
            measure="saved_bytes",
            kind="counted",
        ),
        Claim(text="From kept states an epoch takes at most a quarter of LoRA's.", measure="epoch_time"),
        Claim(
            text="The learned weights of the layers are not equal, and differ between texts.",
            measure="confidence",
            data="trec|embedded:stdlib-topics",
            epochs=4,
            seeds=1,
            train_rows=1000,
            batch=16,
        ),
    ),
)
_EPS = 1e-8
FLAT = ("down_bias", "scale", "shift")  # of Parallel: biases and gains, of all layers in one tensor


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the parallel network; UsageError for values out of range."""

    width: int = 0
    """k; 0: the backbone's width over `factor`"""
    factor: int = 2
    """what the backbone's width is divided by where no width is given"""
    layers: tuple[int, ...] = ()
    """layers beside the last that are read (0: what enters the first block); empty: all"""
    cache: bool = True
    """compute the states once, not in every epoch"""
    store: Literal["float16", "float32"] = "float16"
    """type in which they are kept"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.width < 0 or self.factor < 1:
            raise UsageError(
                f"unipt: width={self.width} and factor={self.factor} must be positive (width 0: by factor)."
            )
        if list(self.layers) != sorted(set(self.layers)) or (self.layers and self.layers[0] < 0):
            raise UsageError(f"unipt: layers={list(self.layers)}: name layers from 0 on, each once, rising.")


class Mixer(nn.Module):
    """What both networks share: confidences, interaction, and the way back to width d."""

    def __init__(self, d: int, k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(k, 1)
        self.project, self.norm, self.up = nn.Linear(k, k), nn.LayerNorm(k), nn.Linear(k, d)

    def mixed(self, z_NBTk: Tensor, mask_BT: Tensor) -> Tensor:
        """Return y [B, T, d] from the reduced states, the anchor's last."""
        anchor_BTk = z_NBTk[-1]
        c_BN = self._confidence(z_NBTk, mask_BT)
        m_NBTk = interaction(anchor_BTk, z_NBTk[:-1], mask_BT)
        mixed_BTk = torch.einsum("bn,nbtk->btk", c_BN, m_NBTk)
        return self.up(torch.relu(anchor_BTk + self.norm(self.project(mixed_BTk))))

    def _confidence(self, z_NBTk: Tensor, mask_BT: Tensor) -> Tensor:
        count_B1 = mask_BT.sum(1, keepdim=True)
        if bool((count_B1 == 0).any()):
            row = int((count_B1 == 0).nonzero()[0, 0])
            raise BadData(f"row {row} of the batch has no valid token; drop such rows.")
        mean_NBk = torch.einsum("nbtk,bt->nbk", z_NBTk, mask_BT / count_B1)
        return self.gate(mean_NBk[-1] * mean_NBk[:-1]).squeeze(-1).t().softmax(dim=1)


class Parallel(Mixer):
    """The parallel network over `count` layers of width d, the last of them the anchor.

    Called with their states, each [B, T, d], and the batch, it returns [B, T, d]. BadData for a row of padding alone.
    """

    def __init__(self, d: int, k: int, count: int) -> None:
        super().__init__(d, k)
        bound = d**-0.5
        self.down = nn.Parameter(torch.empty(count, d, k).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.empty(count, 1, k).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.ones(count, 1, 1, k))
        self.shift = nn.Parameter(torch.zeros(count, 1, 1, k))

    def forward(self, states: list[Tensor], batch: dict[str, Any]) -> Tensor:
        return self.mixed(self.reduced(states), valid_tokens(states, batch))

    def reduced(self, states: list[Tensor]) -> Tensor:
        """Return z [N + 1, B, T, k]."""
        h_NBTd = torch.stack(states)
        n, b, t, d = h_NBTd.shape
        z_NBTk = torch.baddbmm(self.down_bias, h_NBTd.view(n, b * t, d), self.down).view(n, b, t, -1)
        return torch.addcmul(self.shift, F.layer_norm(z_NBTk, z_NBTk.shape[-1:]), self.scale)

    def confidence(self, states: list[Tensor], batch: dict[str, Any]) -> Tensor:
        """Return c [B, N], what each layer counts for each row."""
        return self._confidence(self.reduced(states), valid_tokens(states, batch))


class Pyramid(Mixer):
    """The parallel network over the stages of a ConvNet, whose maps have `channels`; the last stage is the anchor.

    Called with the maps [B, C_i, H_i, W_i] it returns [B, T, d], T the positions of the anchor. Refused where a map is
    no whole multiple of the anchor's.
    """

    def __init__(self, channels: list[int], k: int) -> None:
        super().__init__(channels[-1], k)
        self.ask = nn.ModuleList(nn.Conv2d(channels[-1], c, 1) for c in channels[:-1])
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(c, k, 1), nn.BatchNorm2d(k)) for c in channels)

    def forward(self, states: list[Tensor], batch: dict[str, Any]) -> Tensor:
        anchor = states[-1]
        maps = [self.pooled(i, x, anchor) for i, x in enumerate(states[:-1])] + [anchor]
        z = torch.stack([down(x).flatten(2).transpose(1, 2) for down, x in zip(self.down, maps, strict=True)])
        return self.mixed(z, torch.ones(z.shape[1:3], dtype=torch.bool, device=z.device))

    def pooled(self, i: int, x_BCHW: Tensor, anchor: Tensor) -> Tensor:
        """Return the map of stage i on the anchor's grid [B, C_i, h, w]."""
        (high, wide), (h, w) = x_BCHW.shape[-2:], anchor.shape[-2:]
        if high % h or wide % w:
            raise Refused(f"unipt: a map of {high} x {wide} is no whole multiple of the last one's {h} x {w}.")
        windows = x_BCHW.unflatten(3, (w, wide // w)).unflatten(2, (h, high // h))  # [B, C, h, S, w, S]
        asked = torch.relu(self.ask[i](anchor))[:, :, :, None, :, None]
        weight = torch.relu((asked * windows).sum(1, keepdim=True))
        weight = weight / (weight.sum((3, 5), keepdim=True) + _EPS) + 1 / (windows.shape[3] * windows.shape[5])
        return (weight * windows).sum((3, 5))


def interaction(anchor_BTk: Tensor, z_NBTk: Tensor, mask_BT: Tensor) -> Tensor:
    """Return m = (A + I) z of every layer: [N, B, T, k]; a padded key has weight 0."""
    with torch.autocast(z_NBTk.device.type, enabled=False):
        # Sums over keys without a softmax may pass what half precision holds.
        keys_NBTk = z_NBTk.float() * mask_BT[..., None]
        a_NBTT = torch.relu(torch.matmul(anchor_BTk.float(), keys_NBTk.transpose(-1, -2)))
        a_NBTT = a_NBTT / (a_NBTT.sum(-1, keepdim=True) + _EPS)
        return torch.matmul(a_NBTT, keys_NBTk) + z_NBTk


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Put the parallel network beside the backbone of `model`."""
    backbone: Any = backbone_of(model)
    stages = last_blocks(model)
    pyramid = len(stages) > 1
    count = len(stages) - 1 if pyramid else len(stack(model))
    beside = list(config.layers) or list(range(count))
    if beside[-1] >= count:
        raise UsageError(f"unipt: layers={beside}: this base has layers 0 to {count - 1} beside the last.")
    channels = _channels(backbone, [module for _, module in stages]) if pyramid else [int(backbone.config.hidden_size)]
    k = config.width or channels[-1] // config.factor
    if k < 1:
        raise UsageError(f"unipt: factor={config.factor} leaves nothing of the width {channels[-1]}.")
    if pyramid:
        made: nn.Module = Pyramid([channels[i] for i in (*beside, count)], k)
        layers = [*(i + 1 for i in beside), count + 1]
        return attach_side(model, made, layers, cache=False, modules=stages)
    made = Parallel(channels[-1], k, len(beside) + 1)
    return attach_side(model, made, [*beside, count], cache=config.cache, store=config.store, no_decay=FLAT)


def last_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the last block of every stage; of a model of one stack its last block alone."""
    return list({name.rpartition(".")[0]: (name, module) for name, module in blocks(model)}.values())


@torch.no_grad()
def _channels(backbone: nn.Module, stages: list[nn.Module]) -> list[int]:
    """Return the channels of each stage's map; Refused where one is no map."""
    seen: list[tuple[int, ...]] = []
    handles = [m.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape))) for m in stages]
    training, device = backbone.training, next(backbone.parameters()).device
    backbone.eval()(
        pixel_values=torch.zeros(1, int(getattr(backbone.config, "num_channels", 3)), 64, 64, device=device)
    )
    backbone.train(training)
    for handle in handles:
        handle.remove()
    if any(len(shape) != 4 for shape in seen):
        raise Refused("unipt reads a stack of blocks, or the maps of a ConvNet; this base's stages give neither.")
    return [shape[1] for shape in seen]
