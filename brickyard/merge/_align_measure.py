"""What networks make of the same inputs, as covariances: one pass, through hooks, nothing of it kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from brickyard.core.errors import NotFinite, UsageError
from brickyard.merge._align import Moments
from brickyard.merge._align_points import Point

BATCH = 256  # rows of a batch where the inputs are one tensor


def batches_of(inputs: Any) -> Iterable[Any]:
    """Return inputs as batches that can be gone through again; UsageError for what cannot, or holds labels."""
    if isinstance(inputs, Tensor):
        inputs = list(inputs.split(BATCH))
    if isinstance(inputs, Iterator) or not isinstance(inputs, Iterable):
        raise UsageError(
            f"inputs={type(inputs).__name__}; expected a tensor, or batches that can be gone through several times (a "
            "list or a DataLoader)."
        )
    return inputs


def measured(models: Sequence[nn.Module], points: Sequence[Point], batches: Iterable[Any]) -> dict[str, Moments]:
    """Return the moments of every point, from one pass of every model over the batches.

    Of the activations only those of the reference's current batch are held, and of the others none.
    """
    moments = {point.name: Moments(len(models)) for point in points}
    rows = 0
    for batch in batches:
        held: dict[tuple[str, int], Tensor] = {}
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        for k, model in enumerate(models):
            with _hooks(model, points, _taker(moments, held, k, None if mask is None else mask.bool())):
                output_of(model, batch)
        rows += 1
    if not rows:
        raise UsageError("inputs hold no batch; give a few thousand unlabelled rows.")
    for point in points:
        m = moments[point.name].samples
        if m < 2 * point.width:
            warnings.warn(
                f"point {point.name}: {m} samples for {point.width} features; with fewer than twice as many, chance "
                "correlations pass for shared features. Give more inputs.",
                stacklevel=3,
            )
    return moments


def _taker(moments: dict[str, Moments], held: dict[tuple[str, int], Tensor], k: int, mask: Tensor | None) -> Any:
    def take(point: Point, index: int, value: Any) -> None:
        x_mn = point.sites[index].rows(value, point.width, mask)
        if not bool(x_mn.sum(dtype=torch.float64).isfinite()):  # one number tells: NaN and infinity stay in a sum
            raise NotFinite(f"point {point.name}: activations of model {k} hold NaN or infinity; nothing is merged.")
        kept = moments[point.name].add(k, x_mn, held.get((point.name, index)))
        if k == 0:
            held[point.name, index] = kept

    return take


@contextmanager
def _hooks(model: nn.Module, points: Sequence[Point], take: Any) -> Iterator[None]:
    """Call `take(point, site, value)` whenever a site's value passes."""
    handles = []
    for point in points:
        for i, site in enumerate(point.sites):
            module = model.get_submodule(site.module)
            if site.output:
                made = module.register_forward_hook(lambda m, given, out, p=point, i=i: take(p, i, out))
            else:
                made = module.register_forward_pre_hook(lambda m, given, p=point, i=i: take(p, i, given[0]))
            handles.append(made)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """Run a model on a batch; its logits, or else its last states."""
    if isinstance(batch, Mapping):
        if "labels" in batch:
            raise UsageError("a batch holds labels, which an alignment does not read; give the inputs alone.")
        out = model(**batch)
    elif isinstance(batch, Tensor):
        out = model(batch)
    elif isinstance(batch, tuple | list) and len(batch) == 1:
        out = model(batch[0])  # as a DataLoader of a TensorDataset gives them
    else:
        held = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise UsageError(
            f"a batch is a {type(batch).__name__}{held}; expected a tensor, or keyword arguments in a dictionary: "
            "inputs alone, without labels."
        )
    if isinstance(out, Tensor):
        return out
    found = getattr(out, "logits", None)
    return found if found is not None else out.last_hidden_state
