"""P2P: paint a point cloud as an image, in colours that are learned, for a frozen image model.

    view      P' = turn(P, azimuth, elevation);  (x, y) of P': to the right and down in the picture      [B, N, 2]
    cells     c = floor((R - 3) (xy - min xy) / max range) + 1, the painted box put in the middle     in [1, R - 2]
    colours   f_i = A P_i;   e_ij = W [f_j - f_i ; f_i], j among the k nearest points of i in space      A [8, 3]
              h_i = V max_j LeakyReLU(GroupNorm(e_ij))                                          W [64, 16], V [64, 64]
    painting  map = sum of h_i over the 3 x 3 cells around c_i, zero elsewhere; R x R within the picture  [B, 64, S, S]
              colour = sigmoid(Q Z block(map));  picture = black + colour (white - black)      Z [64, 64], Q [3, 64]
    logits    of the image model on the picture; in evaluation the mean over fixed views
    loss      cross entropy against 1 - s for the label and s / (K - 1) for each other class

Trained: A, W, V, block (two convolutions with batch norms around a shortcut), Z, Q, the head, the class token and, by
default, the image model's norms; its batch statistics stay as they are. P is the cloud as it is, centred and scaled to
the unit ball; only the places in the picture come from P'. The 3 x 3 sum is one scatter and a box filter, and e_ij is
never formed: a_j + b_i = e_ij with a = W1 f, b = (W2 - W1) f, and max_j passes through what follows it.
`black` and `white` are what the base's own processor makes of such pictures.

Each training step shows a cloud from one view, drawn from (seed, step, row). Scores taken while it trains are of one
view too, the middle one; afterwards all fixed views vote. `brickyard.tune.p2p.views` changes their number.

Source: "P2P: Tuning Pre-trained Image Models for Point Cloud Analysis with Point-to-Pixel Prompting", arXiv 2208.02812,
section 3, and its released code. Headline claim: accuracy rises with the image model (ScanObjectNN: ResNet-18 82.6,
-50 85.8, -101 87.4). The paper trains 300 epochs with lr 5e-4. Left out: part segmentation, augmentations other than
the view, the MLP head of the largest model.
Legend: B clouds, N points, k neighbours, c features, D width, R side of the object, S (H, W) of the picture, V views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import ImageClassifierOutput

from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.base import Base
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.core.prefix import keep_at_rest
from brickyard.core.roles import blocks, own_head, roles
from brickyard.core.task import Task
from brickyard.tune._projection import cells, drawn_views, fixed_views, projected, splat, unit

if TYPE_CHECKING:
    from brickyard.core.loop import State

RECORD = Record(
    name="p2p",
    family="tune",
    title="Point-to-pixel prompting: point clouds painted for a frozen image model",
    paper="P2P: Tuning Pre-trained Image Models for Point Cloud Analysis with Point-to-Pixel Prompting, "
    "arXiv 2208.02812",
    needs=("point-classification",),
    because="it paints point clouds; a base of images reads images itself",
    slot="tuner",
    search={"lr": (5e-4, 2e-3, 5e-3)},
    training={"lr": 2e-3, "wd": 0.05, "epochs": 20, "schedule": "cosine", "warmup": 0.0},
    claims=(
        Claim(
            text="On a trained image model P2P beats P2P on the same network with random weights by 3 points.",
            measure="by_image_model",
            part="random",
            data="embedded:shapes",
            epochs=8,
            train_rows=600,
            batch=16,
            seeds=3,
            full={"epochs": 30, "train_rows": 1000},
        ),
        Claim(
            text="P2P is at least as good on a well trained image model as on an under-trained one.",
            measure="by_image_model",
            part="weak",
            data="embedded:shapes",
            epochs=8,
            train_rows=600,
            batch=16,
            seeds=3,
            full={"epochs": 30, "train_rows": 1000},
        ),
        Claim(
            text="Learned colours beat a plain silhouette with a tuned head by 2 points.",
            measure="by_image_model",
            part="silhouette",
            data="embedded:shapes",
            epochs=8,
            train_rows=600,
            batch=16,
            seeds=3,
            full={"epochs": 30, "train_rows": 1000},
        ),
        Claim(
            text="At most a quarter of the parameters of image model and encoder train.",
            measure="by_image_model",
            part="parameters",
            kind="counted",
            data="embedded:shapes",
            epochs=8,
            train_rows=600,
            batch=16,
            seeds=3,
            full={"epochs": 30, "train_rows": 1000},
        ),
    ),
)
GROUPS, SLOPE = 4, 0.2
PAIRS = 2**24  # distances held at once while neighbours are sought
_TOKENS = ("cls_token", "class_token", "class_embedding")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the painter; UsageError for sizes out of range."""

    neighbours: int = 32
    """k, points in a neighbourhood, the point itself among them"""
    dims: int = 8
    """features of a point before its neighbourhood is seen"""
    width: int = 64
    """D, features of a point and of a cell"""
    object_size: int = 0
    """R, side of the square that an object fills; 0: six sevenths of the picture, as 192 of 224"""
    views: tuple[int, int] = (10, 4)
    """azimuths and elevations from which a cloud is seen in evaluation, their logits averaged"""
    colour: Literal["learned", "silhouette"] = "learned"
    """silhouette: painted cells are white, the rest black, nothing of it trains; a control"""
    train: Literal["norm", "head"] = "norm"
    """of the image model: head, class token and norms, or head and class token alone"""
    smoothing: float = 0.2
    """s, share of the label that the other classes get"""
    checkpoint: bool = False
    """compute the image model's blocks a second time in the backward pass instead of keeping what they need"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        least = {"neighbours": 1, "dims": 1, "width": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"p2p: {name}={getattr(self, name)}; expected at least {lowest}.")
        if self.width % GROUPS:
            raise UsageError(f"p2p: width={self.width}; expected a multiple of {GROUPS}, the groups of its norm.")
        if self.object_size != 0 and self.object_size < 4:
            raise UsageError(f"p2p: object_size={self.object_size}; expected 0 or at least 4 pixels.")
        if len(self.views) != 2 or min(self.views) < 1:
            raise UsageError(f"p2p: views={list(self.views)}; expected [azimuths, elevations], at least 1 each.")
        if not 0 <= self.smoothing < 0.5:
            raise UsageError(f"p2p: smoothing={self.smoothing}; expected at least 0 and below 0.5.")


def nearest(points_BN3: Tensor, k: int) -> Tensor:
    """Return the k nearest points of each point, itself among them, in no order: int64 [B, N, k].

    Raises BadData for a cloud of fewer points.
    """
    b, n, _ = points_BN3.shape
    if n < k:
        raise BadData(
            f"a cloud has {n} points, fewer than neighbours={k}; give neighbours={n} or less, or more points."
        )
    step = max(1, PAIRS // (b * n))
    exact = "donot_use_mm_for_euclid_dist"  # a product of matrices loses the distances of near points
    found = [
        torch.cdist(part, points_BN3, compute_mode=exact).topk(k, dim=-1, largest=False, sorted=False).indices
        for part in points_BN3.split(step, dim=1)
    ]
    return torch.cat(found, dim=1)


def neighbourhood_max(
    f_BNc: Tensor, near_BNk: Tensor, weight: Tensor, gamma_D: Tensor, beta_D: Tensor, eps: float = 1e-5
) -> Tensor:
    """Return max_j LeakyReLU(GroupNorm(weight [f_j - f_i ; f_i])) over the neighbours j of each point i: [B, N, D].

    weight: [D, 2c]. The norm's statistics are over all pairs (i, j) and the channels of a group. As each channel's norm
    and the LeakyReLU are monotone, only max_j (min_j where gamma < 0) and sums over j of W1 f_j are taken: nothing of
    the size [B, N, k, D] is held.
    """
    b, n, k = near_BNk.shape
    d = len(weight)
    flat = (near_BNk + n * torch.arange(b, device=near_BNk.device)[:, None, None]).view(b * n, k)
    difference, own = weight.chunk(2, dim=1)
    full = torch.promote_types(f_BNc.dtype, torch.float32)  # sums over all pairs are no work for half precision
    a = F.linear(f_BNc, difference).to(full)
    b_BND = F.linear(f_BNc, own - difference).to(full)
    # How often a point is a neighbour: weights of the mean over all pairs.
    share_BN1 = (torch.bincount(flat.flatten(), minlength=b * n).to(full) / (n * k)).view(b, n, 1)

    def over_groups(mean_BD: Tensor) -> Tensor:
        return mean_BD.unflatten(1, (GROUPS, -1)).mean(dim=-1).repeat_interleave(d // GROUPS, dim=1)

    # Centred first, so that the variance is no difference of large numbers.
    a = a - over_groups((share_BN1 * a).sum(dim=1) + b_BND.mean(dim=1))[:, None]
    sums = F.embedding_bag(flat, a.reshape(b * n, d), mode="sum").view(b, n, d)
    crossed = (b_BND.square() + 2 / k * b_BND * sums).mean(dim=1)
    variance_BD = over_groups((share_BN1 * a.square()).sum(dim=1) + crossed)
    sign_D = torch.where(gamma_D < 0, -1.0, 1.0)
    top = sign_D * F.embedding_bag(flat, (sign_D * a).reshape(b * n, d), mode="max").view(b, n, d) + b_BND
    return F.leaky_relu(gamma_D * top * (variance_BD + eps).rsqrt()[:, None] + beta_D, SLOPE)


def smoothed_loss(logits_BK: Tensor, labels_B: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross entropy against 1 - smoothing for the label and the rest spread over the other classes."""
    count = logits_BK.shape[-1]
    # torch spreads over all classes, the label too.
    return F.cross_entropy(logits_BK.float(), labels_B, label_smoothing=smoothing * count / (count - 1))


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norms around a shortcut: [B, D, H, W] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return torch.relu(x_BDHW + self.norm2(self.second(torch.relu(self.norm1(self.first(x_BDHW))))))


class Painter(nn.Module):
    """Turns clouds into pictures as an image model reads them.

    Args:
        config: the options.
        black_C, white_C: what the model's processor makes of a black and of a white picture, by channel.
        size: height and width of the picture.
    """

    def __init__(self, config: Config, black_C: Tensor, white_C: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        self.method_module = True
        self.k, self.size = config.neighbours, size
        self.side = config.object_size or round(min(size) * 6 / 7)
        if not 4 <= self.side <= min(size):
            raise UsageError(
                f"p2p: an object of {self.side} pixels does not fit a picture of {size[0]} x {size[1]}; expected "
                f"object_size from 4 to {min(size)}."
            )
        self.black: Tensor
        self.white: Tensor
        self.register_buffer("black", black_C[:, None, None], persistent=False)
        self.register_buffer("white", white_C[:, None, None], persistent=False)
        self.learned = config.colour == "learned"
        if self.learned:
            self.lift = nn.Linear(3, config.dims)
            self.edge = nn.Linear(2 * config.dims, config.width, bias=False)
            self.norm = nn.GroupNorm(GROUPS, config.width)
            self.mix = nn.Linear(config.width, config.width)
            self.block = Block(config.width)
            self.colour = nn.Sequential(
                nn.Conv2d(config.width, config.width, 1), nn.Conv2d(config.width, len(black_C), 1)
            )

    def features(self, points_BN3: Tensor) -> Tensor:
        """Return h of every point of clouds in the unit ball, whatever the view: [B, N, D]; of a silhouette ones."""
        if not self.learned:
            return points_BN3.new_ones(*points_BN3.shape[:2], 1)
        f, near = self.lift(points_BN3), nearest(points_BN3, self.k)
        return self.mix(neighbourhood_max(f, near, self.edge.weight, self.norm.weight, self.norm.bias))

    def render(self, h_BND: Tensor, points_BN3: Tensor, views_B2: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return pictures in colours from 0 to 1, [B, C, H, W], seen from `views_B2` (azimuth, elevation)."""
        flat = projected(points_BN3, *views_B2.to(points_BN3).unbind(dim=-1))
        border = torch.tensor([(s - self.side) // 2 for s in reversed(self.size)], device=flat.device)
        map_BDHW = splat(h_BND, cells(flat, self.side, rows) + border, *self.size)
        if not self.learned:
            return (map_BDHW > 0).to(h_BND.dtype).expand(-1, len(self.black), -1, -1)
        return self.colour(self.block(map_BDHW)).sigmoid()

    def pixels(self, h_BND: Tensor, points_BN3: Tensor, views_B2: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return the same as the image model reads them."""
        return self.black + self.render(h_BND, points_BN3, views_B2, rows) * (self.white - self.black)


class Painted:
    """Stands before an image model's forward: `points` [B, N, 3] and `rows` [B] come in, pixels go on to the model.

    Also a callback of the loop, which tells it the step. A batch of `pixel_values` takes the ordinary way.
    """

    def __init__(self, model: nn.Module, painter: Painter, views: tuple[int, int]) -> None:
        self.model, self.painter, self.views = model, painter, views
        self.ordinary = model.forward
        self.run: State | None = None
        model.forward = self.forward

    def begin(self, state: State) -> None:
        self.run = state

    def end(self, state: State) -> None:
        self.run = None

    def forward(self, points: Tensor | None = None, rows: Tensor | None = None, **batch: Any) -> Any:
        if points is None:
            return self.ordinary(**batch)
        numbers = list(range(len(points))) if rows is None else rows.tolist()
        points = unit(points)
        h = self.painter.features(points)
        seen = []
        for views_B2 in self._views(numbers):
            pixels = self.painter.pixels(h, points, torch.from_numpy(views_B2), numbers)
            seen.append(self.ordinary(pixel_values=pixels, **batch).logits)
        return ImageClassifierOutput(logits=torch.stack(seen).mean(dim=0))  # type: ignore[arg-type]

    def _views(self, rows: list[int]) -> Iterator[np.ndarray]:
        """Give views of the clouds [B, 2], one after the other."""
        if self.model.training:
            seed, step = (self.run.training.seed, self.run.step) if self.run else (0, 0)
            yield drawn_views(seed, step, rows)
        else:
            for view in fixed_views(*(self.views if self.run is None else (1, 1))):
                yield np.broadcast_to(view, (len(rows), 2)).copy()

    def close(self) -> None:
        """Give the model its own forward back."""
        self.model.__dict__.pop("forward", None)


def painted(model: nn.Module) -> Painted:
    """Return what paints for a model that `p2p` was attached to; UsageError where it was not."""
    found = getattr(model.__dict__.get("forward"), "__self__", None)
    if not isinstance(found, Painted):
        raise UsageError("this model paints no point clouds; attach p2p, or apply a brick of it, first.")
    return found


@contextmanager
def views(model: nn.Module, azimuths: int, elevations: int) -> Iterator[None]:
    """Within it, let `model` see each cloud from so many fixed sides in evaluation; (1, 1) is a single view."""
    found = painted(model)
    before, found.views = found.views, (azimuths, elevations)
    try:
        yield
    finally:
        found.views = before


def black_and_white(base: Base) -> Tensor:
    """Return a black and a white picture as the base reads them: [2, C, H, W]. Refused where pixels are not alike."""
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
    made = torch.from_numpy(np.asarray(base.processor(images=pictures, return_tensors="np")["pixel_values"])).float()
    if (made.amax(dim=(2, 3)) - made.amin(dim=(2, 3))).max() > 1e-4:
        raise Refused(f"the processor of base {base.spec} treats the pixels of one picture differently; use another.")
    return made


def attach(model: nn.Module, config: Config, task: Task, base: Base) -> Attached:
    """Put the painter before the image model, in place; it, the head and the chosen parts of the model train."""
    backbone = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    if not isinstance(backbone, nn.Module):
        raise Refused(f"p2p: {type(model).__name__} has no backbone below its head; use another base.")
    pictures = black_and_white(base)
    heads = own_head(model)
    inside = [name for name, kind in roles(model).items() if kind == "norm"] if config.train == "norm" else []
    tokens = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] in _TOKENS]
    painter = Painter(config, pictures[0, :, 0, 0], pictures[1, :, 0, 0], (pictures.shape[2], pictures.shape[3]))
    model.add_module("painter", painter.to(next(model.parameters()).device))
    named = tuple(f"{name}." for name in ("painter", *heads, *inside))
    names = [name for name, _ in model.named_parameters() if name.startswith(named) or name in tokens]
    flat = [name for name, p in model.named_parameters() if p.ndim < 2 or name in tokens]
    matched = {"painter": ["painter"] if painter.learned else [], "head": heads, "norms": inside, "class token": tokens}
    attached = attach_in_place(model, names, matched={k: v for k, v in matched.items() if v}, no_decay=flat)
    resting = keep_at_rest(model, [backbone])  # batch statistics would follow the paintings
    before = Painted(model, painter, config.views)
    again = [block for _, block in blocks(model)] if config.checkpoint else []
    for block in again:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    put_back = attached.detach

    def detach() -> nn.Module:
        put_back()
        for block in again:
            block.__dict__.pop("forward", None)
        resting.remove()
        before.close()
        delattr(model, "painter")
        return model

    def objective(whole: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = whole(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return smoothed_loss(logits, batch["labels"], config.smoothing)

    attached.detach, attached.objective, attached.callbacks = detach, objective, (before,)
    return attached
