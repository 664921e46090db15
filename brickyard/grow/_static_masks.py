"""Masks that say which weights of a model exist: drawn once, held through training, stored as packed bits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick
from brickyard.core.files import plain_file, read_tensors, write_tensors

FILE = "masks.safetensors"  # beside the weights


def draw(shape: tuple[int, ...], kept: int, *, seed: int, name: str) -> Tensor:
    """Return a bool mask with exactly `kept` ones, drawn uniformly from (seed, name) alone.

    So it is the same on every device and every rank, whatever other weights are masked.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:kept]] = True
    return mask


def pack(mask: Tensor) -> Tensor:
    """Return a bool mask of n entries as ceil(n / 8) bytes (uint8), the first entry in the highest bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool mask that `pack` packed; BadBrick where the number of bytes does not fit the shape."""
    count = int(np.prod(shape, dtype=np.int64))
    if min(shape, default=0) < 1 or bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        raise BadBrick(f"a packed mask is {bits.dtype} {tuple(bits.shape)}; a mask of shape {shape} does not fit it.")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(shape)


class StaticMasks:
    """The masks of some weights of a model, in force from when they are made until `lift`.

    Weights off the support are set to zero. Each backward pass clears their gradients as soon as these are accumulated,
    so that neither the clipping norm nor the optimiser's moments hold anything of them, and data-parallel ranks average
    cleared gradients. `after_step` (the training loop calls it) clears the weights again, whatever the optimiser did to
    them: moments from before the masks, or an update that has noise of its own.

    Entries are written with masked_fill, not by a product: 0 * NaN is NaN.

    Attributes:
        weights: the masked parameters by name, each [out, in] (or [in, out] for Conv1D).
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self._off = {name: _excluded(name, weight, masks[name]) for name, weight in self.weights.items()}
        self.clear()
        self._hooks = [
            weight.register_post_accumulate_grad_hook(partial(self._clear_gradient, name))
            for name, weight in self.weights.items()
        ]

    def join(self, attached: Attached) -> Attached:
        """Return `attached` with these masks among its callbacks: cleared after each step, kept in checkpoints."""
        return replace(attached, callbacks=(*attached.callbacks, self))

    def _place(self, name: str, device: torch.device) -> Tensor:
        # A model may move to another device after its masks were made.
        if self._off[name].device != device:
            self._off[name] = self._off[name].to(device)
        return self._off[name]

    def _clear_gradient(self, name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            weight.grad.masked_fill_(self._place(name, weight.grad.device), 0)

    @torch.no_grad()
    def clear(self) -> None:
        """Set the weights off the support to zero, in place."""
        for name, weight in self.weights.items():
            weight.masked_fill_(self._place(name, weight.device), 0)

    def after_step(self, state: Any) -> None:
        """Clear the weights after the optimiser's step."""
        self.clear()

    def lift(self) -> None:
        """Let every weight train from now on; their values stay as they are, exactly zero off the support."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def mask(self, name: str) -> Tensor:
        """Return the bool mask of one weight: True where it exists."""
        return ~self._off[name]

    @property
    def kept(self) -> dict[str, int]:
        """How many entries of each weight exist."""
        return {name: off.numel() - int(off.sum()) for name, off in self._off.items()}

    @property
    def sparsity(self) -> float:
        """The share of all masked weights' entries that do not exist."""
        return 1 - sum(self.kept.values()) / sum(off.numel() for off in self._off.values())

    def dead(self) -> dict[str, tuple[int, int]]:
        """Return {name: (rows, columns)} of the weights in which whole rows or columns are gone: units cut off."""
        lines = {
            name: (int(off.flatten(1).all(dim=1).sum()), int(off.flatten(1).all(dim=0).sum()))
            for name, off in self._off.items()
        }
        return {name: found for name, found in lines.items() if any(found)}

    def assert_kept(self) -> None:
        """Raise BadBrick where a weight off the support is not zero: masks and weights do not belong together."""
        for name, weight in self.weights.items():
            _assert_zero(name, weight, self._place(name, weight.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks as packed bits with their shapes; what checkpoints and the mask file hold."""
        out = {}
        for name, off in self._off.items():
            out[f"{name}:bits"], out[f"{name}:shape"] = pack(~off), torch.tensor(off.shape)
        return out

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored masks of the same weights; BadBrick where names or shapes differ."""
        masks = _unpacked(tensors)
        if masks.keys() != self.weights.keys():
            different = sorted(masks.keys() ^ self.weights.keys())
            raise BadBrick(
                f"stored masks do not fit the targets: {different[:3]} stand on one side only; use the target with "
                "which they were made."
            )
        self._off = {name: _excluded(name, self.weights[name], mask) for name, mask in masks.items()}

    def write(self, folder: Path) -> None:
        """Write the mask file into `folder`, complete or not at all."""
        write_tensors(folder / FILE, self.state_dict())


def read_masks(model: nn.Module, folder: Path, kind: type[StaticMasks] = StaticMasks) -> StaticMasks:
    """Put the masks stored in `folder` on `model`, whose weights must be those that they were trained with.

    Raises UnsafeFile where there is no mask file or it is damaged, BadBrick where it does not fit the model.
    """
    masks = _unpacked(read_tensors(plain_file(folder, FILE)))
    known = dict(model.named_parameters())
    missing = sorted(masks.keys() - known.keys())
    if missing:
        raise BadBrick(f"{folder / FILE} masks {missing[0]}, which the model does not have; they do not fit it.")
    weights = {name: known[name] for name in masks}
    # All of them before any weight is cleared: a wrong mask would destroy what it covers.
    off = {name: _excluded(name, weights[name], mask) for name, mask in masks.items()}
    for name in masks:
        _assert_zero(name, weights[name], off[name])
    return kind(weights, masks)


def _excluded(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    """Return where a weight does not exist, on its device."""
    if mask.shape != weight.shape:
        raise BadBrick(
            f"the mask of {name} has the shape {list(mask.shape)}, its weight {list(weight.shape)}; "
            "the masks belong to another model."
        )
    return ~mask.to(weight.device)


def _assert_zero(name: str, weight: Tensor, off: Tensor) -> None:
    found = int(weight.detach()[off].count_nonzero())
    if found:
        raise BadBrick(
            f"{found:,} entries of {name} that its mask excludes are not zero: the masks belong to other weights, or "
            "these were already trained dense."
        )


def _unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = sorted({name.rpartition(":")[0] for name in tensors})
    if set(tensors) != {f"{name}:{part}" for name in names for part in ("bits", "shape")} or not names:
        raise BadBrick("stored masks are incomplete: each needs its bits and its shape.")
    return {name: unpack(tensors[f"{name}:bits"], tuple(tensors[f"{name}:shape"].tolist())) for name in names}
