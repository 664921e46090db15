"""Unlabelled rows through the batch norms: they move the statistics, and are dropped before anything is judged.

    every training step:  x = [labelled; augmented unlabelled]  ->  encoder (batch norms in training mode)
                          h = encoder(x)[labelled]              ->  the rest of the model, the loss

Batch statistics, running averages and, through them, the gradient of the encoder see the unlabelled rows; every layer
after it and the loss do not. No pseudo-labels, no teacher, no consistency loss. A weak augmentation is drawn for each
unlabelled row: a flip along the last axis, bursts of zeros in each channel, noise, or another order of the channels.

Source: the semi-supervised piece of "CE-SSL: Computation-Efficient Semi-Supervised Learning for ECG-based
Cardiovascular Diseases Detection", arXiv 2406.14377 (`ce-ssl` has the other two). Left out: Cutmix of labelled rows.
Headline claim: more from few labels than without unlabelled rows, at less memory than pseudo-labels cost.
Legend: B labelled and U unlabelled rows of a step, C channels, T the last axis (time, or the width of an image).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from brickyard.core.batches import encode
from brickyard.core.data import read_data
from brickyard.core.errors import Refused, UsageError
from brickyard.core.loop import State
from brickyard.core.method import Claim, Record

if TYPE_CHECKING:
    from brickyard.core.trial import Prepared

RECORD = Record(
    name="semi-bn",
    family="data",
    title="Unlabelled rows through the batch norms",
    paper="CE-SSL: Computation-Efficient Semi-Supervised Learning for ECG, arXiv 2406.14377",
    needs=("image-classification",),
    because="it works through batch norms, which models of text do not have",
    slot="data",
    search={"ratio": (1.0, 3.0)},
    presets={"paper": {"ratio": 1.0, "augment": ["flip", "burst", "noise", "channels"]}},
    claims=(
        Claim(
            text="Under a shift of domain unlabelled rows gain at least a point over training without them.",
            measure="under_shift",
            part="gain",
            seeds=5,
        ),
        Claim(
            text="They cost at most 1.6 times the peak memory of a supervised step, which pseudo-labels exceed.",
            measure="under_shift",
            part="memory",
            kind="counted",
            seeds=5,
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    unlabelled: str = ""
    """data set whose train rows are used without labels; empty: the training rows that train_rows leaves out"""
    ratio: float = 1.0
    """unlabelled rows for each labelled row of a step"""
    after: str = ""
    """module behind which they are dropped; empty: the smallest one that holds every batch norm"""
    augment: tuple[str, ...] = ("flip", "noise")
    """what one is drawn from for each row: flip, burst, noise, channels; empty: rows stay as they are"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment", tuple(self.augment))
        if not 0 < self.ratio <= 64:
            raise UsageError(f"semi-bn: ratio={self.ratio}; expected more than 0 and at most 64.")
        if unknown := [name for name in self.augment if name not in AUGMENTATIONS]:
            raise UsageError(f"semi-bn: augment={unknown[0]!r}; expected some of {', '.join(AUGMENTATIONS)}.")


def flip(x_BCT: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows turned around along the last axis."""
    return x_BCT.flip(-1)


def burst(x_BCT: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows with one run of zeros in each channel, a tenth of the last axis long."""
    rows, channels, size = len(x_BCT), x_BCT.shape[1], x_BCT.shape[-1]
    length = max(1, size // 10)
    start = torch.randint(size - length + 1, (rows, channels, 1), generator=generator)
    place = torch.arange(size)
    gone = (place >= start) & (place < start + length)
    shape = (rows, channels, *(1,) * (x_BCT.ndim - 3), size)
    return x_BCT.masked_fill(gone.view(shape).to(x_BCT.device), 0.0)


def noise(x_BCT: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows with Gaussian noise of 0.05."""
    return x_BCT + 0.05 * torch.randn(x_BCT.shape, generator=generator).to(x_BCT)


def channels(x_BCT: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows whose channels stand in another order, one for each row."""
    order_BC = torch.rand(x_BCT.shape[:2], generator=generator).argsort(dim=1).to(x_BCT.device)
    return x_BCT.gather(1, order_BC.view(*order_BC.shape, *(1,) * (x_BCT.ndim - 2)).expand_as(x_BCT))


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "flip": flip,
    "burst": burst,
    "noise": noise,
    "channels": channels,
}


def weakly(x_BCT: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Return each row under one augmentation drawn among `names`."""
    if not names:
        return x_BCT
    which_B = torch.randint(len(names), (len(x_BCT),), generator=generator)
    out = x_BCT.clone()
    for i, name in enumerate(names):
        rows = (which_B == i).nonzero().flatten().to(x_BCT.device)
        if len(rows):
            out[rows] = AUGMENTATIONS[name](x_BCT[rows], generator)
    return out


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def splitting_module(model: nn.Module, after: str) -> str:
    """Return the name of the module behind which rows are dropped; Refused, UsageError where there is none.

    By default the smallest module that holds every batch norm.
    """
    found = norms(model)
    if not found:
        raise Refused(
            "semi-bn: the model has no batch norm, so unlabelled rows would change nothing; use another method."
        )
    if all(not any(p.requires_grad for p in norm.parameters()) for norm in found.values()):
        raise Refused(
            "semi-bn: every batch norm is frozen by this tuner; use full or bitfit, which train their shifts."
        )
    if not after:
        parts = [name.split(".") for name in found]
        shared = 0
        while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
            shared += 1
        after = ".".join(parts[0][:shared])
    modules = dict(model.named_modules())
    if after not in modules or not after:
        some = ", ".join(list(dict(model.named_children()))[:6])
        raise UsageError(
            f"semi-bn: after={after!r} names no module inside the model; give the last module that unlabelled rows "
            f"should go through ({some}, ...)."
        )
    if late := [name for name in found if name != after and not name.startswith(f"{after}.")]:
        raise UsageError(f"semi-bn: the batch norm {late[0]} stands outside after={after!r}; name a module around it.")
    return after


class SplitAfter(AbstractContextManager):
    """While it is entered, training forwards of `model` carry unlabelled rows up to a module and drop them there.

    Args:
        model: called with the inputs as keywords, rows first in each tensor.
        after: name of the module behind which rows are dropped.
        unlabelled: n -> the inputs of unlabelled rows for a batch of n, by the same keywords.

    Outside training mode the model is what it was. Raises UsageError where the two batches do not fit together.
    """

    def __init__(self, model: nn.Module, after: str, unlabelled: Callable[[int], dict[str, Tensor]]) -> None:
        self.model, self.after, self.unlabelled = model, after, unlabelled
        self.rows = (0, 0)  # labelled, and both together
        self._stack = ExitStack()

    def __enter__(self) -> SplitAfter:
        inner = self.model.get_submodule(self.after)
        for handle in (
            self.model.register_forward_pre_hook(self._join, with_kwargs=True),
            inner.register_forward_hook(self._drop),
        ):
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _join(self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        self.rows = (0, 0)
        if not model.training:
            return None
        tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        if args or not tensors:
            raise UsageError("semi-bn: the model must be called with its inputs as keywords.")
        count = len(next(iter(tensors.values())))
        more = self.unlabelled(count)
        for name, tensor in tensors.items():
            if name not in more or more[name].shape[1:] != tensor.shape[1:]:
                has = tuple(more[name].shape[1:]) if name in more else "nothing"
                raise UsageError(
                    f"semi-bn: labelled rows have {name} of {tuple(tensor.shape[1:])}, unlabelled rows {has}; "
                    "both need the same inputs."
                )
        self.rows = (count, count + len(more[next(iter(tensors))]))
        return args, given | {name: torch.cat([t, more[name].to(t)]) for name, t in tensors.items()}

    def _drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        kept, together = self.rows
        if not together:
            return None
        return tree_map(lambda t: t[:kept] if isinstance(t, Tensor) and t.ndim and len(t) == together else t, output)


class Unlabelled:
    """Draws the unlabelled rows of each training forward; a callback of the loop, whose checkpoint holds its place."""

    def __init__(self, config: Config, rows: Any, model: nn.Module, device: torch.device, seed: int) -> None:
        self.config, self.pool, self.device, self.seed = config, rows, device, seed
        self.count = 0  # forwards so far; each has a generator of its own
        self.split = SplitAfter(model, splitting_module(model, config.after), self.draw)

    @property
    def digest(self) -> str:
        """What a resumed run must find unchanged."""
        return self.pool.digest

    def draw(self, batch: int) -> dict[str, Tensor]:
        """Return round(ratio * batch) rows, each drawn anew, without their labels."""
        drawn = np.random.SeedSequence([self.seed, self.count]).generate_state(1)
        generator = torch.Generator().manual_seed(int(drawn[0]))
        self.count += 1
        number = max(1, round(self.config.ratio * batch))
        index = torch.randint(len(self.pool), (number,), generator=generator).numpy()
        inputs = self.pool.collate(index)
        inputs.pop("labels", None)
        return {name: weakly(x.to(self.device), self.config.augment, generator) for name, x in inputs.items()}

    def begin(self, state: State) -> None:
        self.split.__enter__()

    def end(self, state: State) -> None:
        self.split.__exit__()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        self.count = kept["count"]


def join(config: Config, ready: Prepared, model: nn.Module) -> Unlabelled:
    """Return the callback that carries unlabelled rows through `model`; UsageError where there are none."""
    if config.unlabelled:
        data = read_data(config.unlabelled, need=("train",), labelled=False)
        rows: Any = encode(data.splits["train"], ready.base, ready.task)
    else:
        whole = encode(ready.data.splits["train"], ready.base, ready.task)
        rows = whole.take(np.setdiff1d(np.arange(len(whole)), ready.train_index))
    if not len(rows):
        raise UsageError(
            "semi-bn: no unlabelled rows: every training row is used with its label. Give unlabelled=DATA, or fewer "
            "labelled rows by --train-rows."
        )
    return Unlabelled(config, rows, model, ready.device, ready.setting.seed)
