"""Moment probing: classify from the first and second moments of frozen tokens (MP, and MP+ with recalibrated blocks).

B batch, T tokens, D width of the base, p projected channels, H heads, Q = p/H channels of a head, P pairs of heads,
K logits. X [B,T,D] are the final tokens of a frozen base and v [B,D] its pooled vector (their mean, or the cls token).

    Z       = X W + b                              W [D,p], split into H heads [B,T,Q]; all share one LayerNorm
    Zc^(i)  = Z^(i) - mean of its valid tokens     per example and channel
    C_i     = Zc^(i)^T Zc^(j) / T                  [Q,Q] for neighbouring heads j = i+1, with unit l2 columns
    u       = flatten(conv3x3/2(GELU(conv3x3/2(C))))    the P matrices are channels of one image; no padding, no bias
    logits  = (V1 v + V2 u) / 2

The mean is the linear probe, the covariance its next moment. MP+ also trains, in every block of the frozen base,
x <- x + (1 + w) MLP(LN(x)) + beta with t = relu(x A), w = t Uw, beta = t Ub (A [D,16], Uw and Ub [16,D], no bias).

Source: "Tuning Pre-trained Model via Moment Probing", ICCV 2023, arXiv 2307.11342. Headline: ViT-B/16 on ImageNet-1K,
linear probe 82.04, full tuning 83.58, MP 83.15 with 3.65 M trained parameters as reported, MP+ 83.62 with 4.10 M.
The released code subtracts one number per example and head, the mean over tokens and channels (`preset="released"`);
the text describes the mean per channel, which is the default here. Uw and Ub start at zero, so that MP+ starts at the
base exactly; `init="paper"` draws them. Left out: mixup, cutmix, label smoothing and EMA, which are the loop's matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.errors import Refused, UsageError
from brickyard.core.method import Claim, Record
from brickyard.tune._rescale import install, sites

if TYPE_CHECKING:
    from brickyard.core.states import States
    from brickyard.core.task import Task

RECORD = Record(
    name="moment-probing",
    family="tune",
    title="head on the mean and the covariance of frozen tokens",
    paper="arXiv 2307.11342",
    needs=("text-classification", "pair-classification", "regression", "image-classification"),
    slot="head",
    presets={
        "paper": {"p": 512, "h": 4, "pooled": "cls", "init": "paper"},
        "released": {"p": 512, "h": 4, "pooled": "cls", "center": "scalar", "init": "paper"},
    },
    search={"lr": (1e-3, 2e-3, 5e-3), "center": ("channel", "scalar")},
    training={"lr": 2e-3, "wd": 0.05, "epochs": 10, "batch": 32},
    claims=(
        Claim(
            text="On frozen text tokens MP beats a linear probe, tuned alike, by 3 points.",
            inequality="mp >= probe + 3.0",
            arms={"mp": "moment-probing:p=128,h=4", "probe": "linear-probe"},
            control={
                "what": "without the second moment (V2 = 0) the gain is gone",
                "arm": "moment-probing:second_order=false",
                "inequality": "mp > control + 1.5",
            },
            gate="probe > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=10,
            train_rows=1000,
            lrs=(2e-3, 5e-3, 1e-2, 3e-2),
            full={"train_rows": 2000, "max_length": 0, "seeds": 5, "lrs": (1e-3, 2e-3, 5e-3, 1e-2, 3e-2)},
        ),
        Claim(
            text="On frozen text tokens MP beats an MLP head with as many parameters.",
            inequality="mp > mlp",
            arms={
                "mp": "moment-probing:p=128,h=4",
                "mlp": "linear-probe:hidden=135",
                "unscaled": "moment-probing:l2=false",
            },
            control={
                "what": "shuffled training labels leave nothing to learn",
                "arm": "moment-probing:p=128,h=4",
                "labels": "shuffled",
                "inequality": "mp > control + 10.0",
            },
            gate="mlp > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=10,
            train_rows=1000,
            lrs=(1e-3, 2e-3, 5e-3),
            full={"train_rows": 2000, "max_length": 0, "seeds": 5, "lrs": (1e-3, 2e-3, 5e-3, 1e-2)},
        ),
        Claim(
            text="On frozen image tokens MP beats a linear probe, tuned alike, by 1 point.",
            inequality="mp >= probe + 1.0",
            arms={"mp": "moment-probing:p=128,h=4", "probe": "linear-probe"},
            control={
                "what": "without the second moment (V2 = 0) the gain is gone",
                "arm": "moment-probing:second_order=false",
                "inequality": "mp > control + 0.5",
            },
            gate="probe > majority + 10.0",
            data="cifar10|embedded:digits",
            base="embedded:tiny-vit",
            epochs=10,
            train_rows=3000,
            lrs=(2e-3, 5e-3, 1e-2, 3e-2),
            full={"train_rows": 0, "seeds": 5, "lrs": (1e-3, 2e-3, 5e-3, 1e-2, 3e-2)},
        ),
        Claim(
            text="MP+ is no worse than MP by more than 0.3 points (it needs a pass backward through the base).",
            inequality="plus >= mp - 0.3",
            arms={"plus": "moment-probing:plus=true,lr=2e-3", "mp": "moment-probing:lr=2e-3"},
            gate="mp > majority + 10.0",
            data="trec|embedded:stdlib-topics",
            epochs=2,
            train_rows=1000,
            batch=8,
            full={"train_rows": 2000, "batch": 0, "max_length": 0, "epochs": 10, "seeds": 5},
        ),
        Claim(
            text="On frozen tokens of handwritten digits, which its base saw, MP beats a linear probe by 1 point.",
            inequality="mp >= probe + 1.0",
            arms={"mp": "moment-probing:p=128,h=4", "probe": "linear-probe"},
            control={
                "what": "training labels shuffled: there is nothing left to learn",
                "arm": "moment-probing:p=128,h=4",
                "labels": "shuffled",
                "inequality": "mp > control + 10.0",
            },
            gate="probe > majority + 10.0",
            data="mnist|embedded:digits",
            base="embedded:tiny-vit",
            epochs=10,
            train_rows=3000,
            lrs=(2e-3, 5e-3, 1e-2, 3e-2),
            full={"train_rows": 0, "seeds": 5, "lrs": (1e-3, 2e-3, 5e-3, 1e-2, 3e-2)},
        ),
    ),
)

Pairs = Literal["near", "half", "all"]
Center = Literal["channel", "scalar"]
Pooled = Literal["mean", "cls"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of moment probing; UsageError where the covariance image would be empty."""

    p: int = 128
    """channels of the projection W (the paper: 512)"""
    h: int = 4
    """heads; must divide p"""
    pairs: Literal["near", "half", "all"] = "near"
    """heads that are crossed: neighbours (i, i+1), (i, i+h/2), or all pairs"""
    center: Literal["channel", "scalar"] = "channel"
    """subtract the mean per channel (the paper's text) or one scalar per head (its released code)"""
    pooled: Literal["mean", "cls"] = "mean"
    """v is the mean of all tokens, or the first (cls) token, which then leaves X"""
    interleaved: bool = False
    """channel c belongs to head c mod h (the released code for convolutional nets) rather than to head c // Q"""
    second_order: bool = True
    """false leaves V1 v / 2, a linear probe: the negative control"""
    l2: bool = True
    """unit l2 columns of each covariance matrix"""
    plus: bool = False
    """MP+: also train a recalibration of every block's MLP; needs a pass backward through the base"""
    width: int = 16
    """bottleneck of the recalibration"""
    init: Literal["zero", "paper"] = "zero"
    """Uw and Ub start at zero, or truncated normal with std 0.02 as released"""

    def __post_init__(self) -> None:
        features(self.p, self.h, self.pairs)
        if self.width < 1:
            raise UsageError(f"width={self.width}: the recalibration needs at least 1 channel.")


_EPS = 1e-12  # l2 normalisation of the columns, as released
_STD = 0.02  # truncated normal of the linear layers, as released


def head_pairs(h: int, pairs: Pairs) -> list[tuple[int, int]]:
    """Return the pairs (i, j) of heads whose cross-covariance is taken; UsageError when `h` has none."""
    if h < 2:
        raise UsageError(f"h={h}: covariance is taken between heads; give h >= 2.")
    if pairs == "near":
        return [(i, i + 1) for i in range(h - 1)]
    if pairs == "half":
        if h % 2:
            raise UsageError(f"h={h} with pairs=half: the heads must come in two halves; give an even h.")
        return [(i, i + h // 2) for i in range(h // 2)]
    return [(i, j) for i in range(h) for j in range(i + 1, h)]


def features(p: int, h: int, pairs: Pairs = "near") -> int:
    """Return the length of u, P * q2^2, after two 3x3 convolutions of stride 2 over [Q,Q]; UsageError if that is 0."""
    count = len(head_pairs(h, pairs))
    if p < 1 or p % h:
        legal = max(7, -(-p // h)) * h
        raise UsageError(f"p={p} does not split into h={h} equal heads; the next p that does is {legal}.")
    q = p // h
    if q < 7:
        raise UsageError(
            f"p={p}, h={h} gives heads of {q} channels, too few for two 3x3 convolutions of stride 2; "
            f"the smallest p for h={h} is {7 * h}."
        )
    q1 = (q - 3) // 2 + 1
    return count * ((q1 - 3) // 2 + 1) ** 2


def cross_covariance(
    z_HBTQ: Tensor, valid_BT: Tensor | None = None, pairs: Pairs = "near", center: Center = "channel"
) -> Tensor:
    """Return the cross-covariances [B,P,Q,Q] of pairs of heads over the valid tokens (ddof 0), in float32.

    `z_HBTQ` holds the heads as its first dimension, so that neighbours are two views of one tensor and all pairs are
    one batched product: nothing but the centred heads is kept for the backward pass. `valid_BT` is 1 on tokens and 0
    on padding; each row needs at least one valid token. `center` "channel" subtracts the mean per example and channel,
    "scalar" one mean over tokens and channels per example and head.
    """
    with torch.autocast(z_HBTQ.device.type, enabled=False):
        z_HBTQ = z_HBTQ.float()
        h, b, t, _ = z_HBTQ.shape
        valid_BT = z_HBTQ.new_ones(b, t) if valid_BT is None else valid_BT.to(z_HBTQ.dtype)
        valid_BT1 = valid_BT.unsqueeze(-1)
        n_B11 = valid_BT1.sum(1, keepdim=True)
        mean = (z_HBTQ * valid_BT1).sum(2, keepdim=True) / n_B11
        if center == "scalar":
            mean = mean.mean(3, keepdim=True)
        # Both sides carry 1/sqrt(n), so that the product is divided by n without a pass over it.
        zc_HBTQ = (z_HBTQ - mean) * (valid_BT1 * n_B11.rsqrt())
        if pairs == "near":
            left, right = zc_HBTQ[:-1], zc_HBTQ[1:]
        elif pairs == "half":
            left, right = zc_HBTQ[: h // 2], zc_HBTQ[h // 2 :]
        else:
            i, j = zip(*head_pairs(h, "all"), strict=True)
            left, right = zc_HBTQ[list(i)], zc_HBTQ[list(j)]
        c = torch.bmm(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1))
        return c.unflatten(0, (-1, b)).transpose(0, 1)


def unit_columns(c_BPQQ: Tensor) -> Tensor:
    """Divide each column (fixed last index) of each matrix by its l2 norm; a column of zeros stays zero."""
    # The reciprocal root of a clamped sum has no division by zero in its backward pass and is cheaper than a norm.
    return c_BPQQ * c_BPQQ.square().sum(2, keepdim=True).clamp_min(_EPS**2).rsqrt()


class MomentProbe(nn.Module):
    """Head on token states: logits = (V1 v + V2 u) / 2.

    `in_dim`: width D of the tokens; `classes`: number of logits K; `proj_dim`, `heads`, `pairs`, `pooled`, `center`,
    `interleaved`, `second_order`, `l2`: see Config. Called with x_BTD and mask_BT (true on tokens; None: all are) it
    returns [B,K]. UsageError for sizes that leave no features, Refused for an example with fewer than two tokens.
    """

    frozen_pool = None  # needs every token of cached states

    def __init__(
        self,
        in_dim: int,
        classes: int,
        proj_dim: int = 128,
        heads: int = 4,
        pairs: Pairs = "near",
        pooled: Pooled = "mean",
        *,
        center: Center = "channel",
        interleaved: bool = False,
        second_order: bool = True,
        l2: bool = True,
    ) -> None:
        super().__init__()
        size, count = features(proj_dim, heads, pairs), len(head_pairs(heads, pairs))
        self.heads = heads
        self.pairs: Pairs = pairs
        self.pooled: Pooled = pooled
        self.center: Center = center
        self.interleaved, self.second_order, self.l2 = interleaved, second_order, l2
        self.first = nn.Linear(in_dim, classes)
        if second_order:
            self.projection = nn.Linear(in_dim, proj_dim)
            self.norm = nn.LayerNorm(proj_dim // heads)
            self.convolutions = nn.Sequential(
                nn.Conv2d(count, count, 3, stride=2, bias=False),
                nn.GELU(),
                nn.Conv2d(count, count, 3, stride=2, bias=False),
            )
            self.second = nn.Linear(size, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                nn.init.zeros_(module.bias)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        _enough(x_BTD, mask_BT, (2 if self.second_order else 0) + (self.pooled == "cls"))
        v_BD, x_BTD, valid_BT = pool(x_BTD, mask_BT, self.pooled)
        logits_BK = self.first(v_BD)
        if self.second_order:
            logits_BK = logits_BK + self.second(self.moments(x_BTD, valid_BT).to(v_BD.dtype))
        return logits_BK / 2

    def moments(self, x_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Return u [B, P q2^2] of tokens X [B,T,D] (without the cls token), valid_BT true on those that count."""
        z_BTp = self.projection(x_BTD)
        if self.interleaved:
            z_BTHQ = z_BTp.unflatten(-1, (-1, self.heads)).transpose(2, 3)
        else:
            z_BTHQ = z_BTp.unflatten(-1, (self.heads, -1))
        z_HBTQ = self.norm(z_BTHQ).permute(2, 0, 1, 3).contiguous()
        c_BPQQ = cross_covariance(z_HBTQ, valid_BT, self.pairs, self.center)
        if self.l2:
            c_BPQQ = unit_columns(c_BPQQ)
        return self.convolutions(c_BPQQ).flatten(1)


def pool(x_BTD: Tensor, mask_BT: Tensor | None, pooled: Pooled) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return v [B,D], the tokens X and their validity; padding becomes 0, and "cls" takes the first token out of X."""
    valid_BT = None if mask_BT is None else mask_BT.bool()
    if pooled == "cls":
        v_BD, x_BTD = x_BTD[:, 0], x_BTD[:, 1:]
        valid_BT = None if valid_BT is None else valid_BT[:, 1:]
    if valid_BT is not None:
        x_BTD = x_BTD.masked_fill(~valid_BT.unsqueeze(-1), 0)
    if pooled == "mean":
        count_B1 = x_BTD.shape[1] if valid_BT is None else valid_BT.sum(1, keepdim=True)
        v_BD = x_BTD.sum(1) / count_B1
    return v_BD, x_BTD, valid_BT


def _enough(x_BTD: Tensor, mask_BT: Tensor | None, need: int) -> None:
    """Refuse an example with fewer than `need` valid tokens: its mean or covariance would be made of nothing."""
    counts = [x_BTD.shape[1]] * len(x_BTD) if mask_BT is None else mask_BT.bool().sum(1).tolist()
    short = [row for row, n in enumerate(counts) if n < max(1, need)]
    if short:
        raise Refused(
            f"row {short[0]} of the batch has {counts[short[0]]} valid token(s), rows like it: {len(short)}; moment "
            f"probing needs {max(1, need)} in every example. Drop such rows, or take linear-probe, which needs one."
        )


def head(config: Config, task: Task, width: int) -> MomentProbe:
    """Return the head for `task.width` logits on tokens of `width` channels."""
    return MomentProbe(
        width,
        task.width,
        config.p,
        config.h,
        config.pairs,
        config.pooled,
        center=config.center,
        interleaved=config.interleaved,
        second_order=config.second_order,
        l2=config.l2,
    )


class Recalibration(nn.Module):
    """PSRP of one block: (x, m) -> (1 + t Uw) m + t Ub with t = relu(x A), x [..,D] the residual and m [..,D] the MLP.

    `down` is A, shared by both outputs; `scale` is Uw and `shift` Ub. With init "zero" it gives m itself at the start.
    """

    def __init__(self, dim: int, width: int = 16, init: Literal["zero", "paper"] = "zero") -> None:
        super().__init__()
        self.down = nn.Linear(dim, width, bias=False)
        self.scale = nn.Linear(width, dim, bias=False)
        self.shift = nn.Linear(width, dim, bias=False)
        nn.init.trunc_normal_(self.down.weight, std=_STD)
        for out in (self.scale, self.shift):
            if init == "zero":
                nn.init.zeros_(out.weight)
            else:
                nn.init.trunc_normal_(out.weight, std=_STD)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        t = self.down(x).relu()
        return (1 + self.scale(t)) * m + self.shift(t)


def attach(model: nn.Module, config: Config, task: Task) -> Attached:
    """Train the head of `model` (base.headed(head(...))), and with `plus` a recalibration in each backbone block.

    Without `plus` cached states may stand in for the backbone. Refused where a block has no MLP branch to rescale.
    """
    matched = {"head": [name for name, _ in model.named_parameters() if name.startswith("head.")]}
    if not config.plus:
        attached = attach_in_place(model, matched["head"], matched=matched, no_decay=_undecayed(model))
        attached.frozen_states = True
        return attached
    if hasattr(model, "psrp"):
        raise Refused("this model carries a recalibration already; detach it first.")
    backbone = model.get_submodule("backbone")
    places = sites(backbone)
    like: Any = next(backbone.parameters())
    modules = nn.ModuleList(Recalibration(place.width, config.width, config.init) for place in places)
    model.add_module("psrp", modules.to(device=like.device, dtype=like.dtype))
    removers = [install(backbone, place, module) for place, module in zip(places, modules, strict=True)]
    matched["down"] = [f"backbone.{place.branch}" for place in places]
    trained = [name for name, _ in model.named_parameters() if name.startswith(("head.", "psrp."))]
    attached = attach_in_place(model, trained, matched=matched, no_decay=_undecayed(model))
    restore = attached.detach

    def detach() -> nn.Module:
        for remove in removers:
            remove()
        restore()
        del model.psrp
        return model

    attached.detach = detach
    return attached


def _undecayed(model: nn.Module) -> list[str]:
    """Biases and norms, which weight decay leaves alone."""
    return [name for name, p in model.named_parameters() if p.ndim < 2]


class MomentProbeClassifier:
    """Fit and predict on cached features, in the manner of scikit-learn; AdamW, linear decay, cross-entropy.

    `x` is `core.states.States`, or an array of tokens [n,T,D] with an optional `mask` [n,T]; `y` holds class labels of
    any sortable type (with States they default to its labels). Deterministic in `seed`. Raises UsageError for sizes
    that leave no features, Refused for an example with fewer than two tokens.
    """

    def __init__(
        self,
        *,
        p: int = 128,
        h: int = 4,
        pairs: Pairs = "near",
        center: Center = "channel",
        pooled: Pooled = "mean",
        lr: float = 2e-3,
        wd: float = 0.05,
        epochs: int = 10,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self.config = Config(p=p, h=h, pairs=pairs, center=center, pooled=pooled)
        self.lr, self.wd, self.epochs, self.batch, self.seed = lr, wd, epochs, batch, seed

    def fit(self, x: States | np.ndarray, y: Any = None, mask: np.ndarray | None = None) -> MomentProbeClassifier:
        """Train on the rows of `x`."""
        read, rows, known = _reader(x, mask)
        labels = np.asarray(known if y is None else y)
        if labels.shape != (rows,):
            raise UsageError(f"{rows} rows came with labels of shape {labels.shape}; give one label for each row.")
        self.classes_, codes = np.unique(labels, return_inverse=True)
        target = torch.from_numpy(codes)
        width, steps = read(np.arange(1))[0].shape[-1], self.epochs * -(-rows // self.batch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            c = self.config
            self.module_ = MomentProbe(width, len(self.classes_), c.p, c.h, c.pairs, c.pooled, center=c.center)
        skip = set(_undecayed(self.module_))
        parts = {free: [q for n, q in self.module_.named_parameters() if (n in skip) == free] for free in (False, True)}
        groups = [{"params": parts[False]}, {"params": parts[True], "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.wd)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        order = np.random.Generator(np.random.PCG64(self.seed))
        for _ in range(self.epochs):
            shuffled = order.permutation(rows)
            for at in range(0, rows, self.batch):
                index = shuffled[at : at + self.batch]
                nn.functional.cross_entropy(self.module_(*read(index)), target[index]).backward()
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
        return self

    @torch.no_grad()
    def predict_proba(self, x: States | np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Return probabilities [n, classes] in the order of `classes_`."""
        read, rows, _ = _reader(x, mask)
        parts = [np.arange(at, min(rows, at + 256)) for at in range(0, rows, 256)]
        return torch.cat([self.module_(*read(part)).softmax(-1) for part in parts]).numpy()

    def predict(self, x: States | np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the most probable class of each row."""
        return self.classes_[self.predict_proba(x, mask).argmax(1)]

    def score(self, x: States | np.ndarray, y: Any = None, mask: np.ndarray | None = None) -> float:
        """Return the accuracy on rows with labels `y`."""
        truth = np.asarray(_reader(x, mask)[2] if y is None else y)
        return float((self.predict(x, mask) == truth).mean())


def _reader(x: Any, mask: np.ndarray | None) -> tuple[Any, int, Any]:
    """Return (rows -> (x_BTD, mask_BT)), the number of rows, and the labels that `x` knows."""
    if hasattr(x, "collate"):
        return (lambda index: x.collate(index)["states"]), len(x), x.labels
    tokens = torch.as_tensor(x)
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    if tokens.ndim != 3 or valid.shape != tokens.shape[:2]:
        given = f"features of shape {tuple(tokens.shape)} and mask {tuple(valid.shape)}"
        raise UsageError(f"{given}: [n,T,D] and [n,T] were expected.")
    return (lambda index: (tokens[index].float(), valid[index])), len(tokens), None
