"""Merges of independently trained checkpoints: open them as networks, align them, and hand them on to the merge engine.

Unlike the other merges this one runs the models: all of them are in memory, in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core import readers
from brickyard.core.answers import answer
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.data import read_data
from brickyard.core.encoded import Encoded
from brickyard.core.errors import BadBase, Refused, UsageError
from brickyard.core.fitted_head import fit_head
from brickyard.core.headed import HeadedModel
from brickyard.core.stats import interval
from brickyard.core.task import Task, task_of
from brickyard.merge._align import average
from brickyard.merge._align_transformer import Transformer, assert_same, transformer, untie
from brickyard.merge._inputs import FLOATS, Held
from brickyard.merge.cca_merge import Alignment, Config, align
from brickyard.merging.inputs import Ground, Input, open_inputs

MERGE, PLAIN = "the merge", "average, not aligned"
_POSITIONS = 4096  # tokens of a batch
_IMAGES = 64


@dataclass(frozen=True)
class Rows:
    """Encoded rows as batches of inputs without labels, which can be gone through again."""

    encoded: Encoded
    device: torch.device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        longest = max(int(self.encoded.lengths.max()), 1)
        size = _IMAGES if longest == 1 else max(1, _POSITIONS // longest)
        for part in np.array_split(np.arange(len(self.encoded)), -(-len(self.encoded) // size)):
            given = self.encoded.collate(part)
            yield {name: value.to(self.device) for name, value in given.items() if name != "labels"}


@dataclass
class Aligned:
    """Opened checkpoints in the reference's features. `about` goes into merge.json.

    ground: as the merge has it: with an output layer of its own where the alignment unties it. networks: in the order
    of the labels, the reference first.
    """

    ground: Ground
    inputs: list[Input]
    about: dict[str, Any]
    networks: dict[str, nn.Module]
    base: Base
    source: Any
    reading: dict[str, Any]

    def scorer(self) -> Callable[[Path], dict[str, Any]] | None:
        """Return what scores a written merge beside its inputs and their plain average; None without test rows."""
        if "test" not in self.source.splits:
            return None
        column = _column(self.base, self.source, self.reading)
        return None if column is None else lambda folder: _scores(self, folder, column)


def open_aligned(
    config: Config,
    ground: Ground,
    specs: Sequence[str],
    data: Sequence[Any],
    reading: dict[str, Any],
    force: bool,
    device: str | None,
    *,
    mixed: bool,
) -> Aligned:
    """Open checkpoints of the base's architecture and bring them into its features on the training rows of `data`.

    `mixed` lets them be stored in other dtypes than the base.

    Raises UsageError without exactly one data set, Refused for what is no full checkpoint, has another vocabulary or
    other classes, or looks fine-tuned from the base (unless forced), ParityBroken where a rewritten network does not
    answer as before.
    """
    if len(data) != 1:
        raise UsageError(
            f"cca-merge compares features on the training rows of one data set (no label is read); {len(data)} were "
            "given. Give --data D."
        )
    opened = open_inputs(specs, ground, mixed=mixed, force=True)
    for given in opened:
        if given.kind != "checkpoint":
            raise Refused(
                f"{given.label} is a {given.kind}, a change of one base; cca-merge takes full checkpoints that were "
                "trained apart. Merge bricks by ties or task-arithmetic, or export it first (brickyard export --to "
                "merged)."
            )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bases = [ground.opened, *(open_base(spec, trust_remote_code=ground.trust_remote_code) for spec in specs)]
    labels = ["the base", *(given.label for given in opened)]
    checked = [_same_meaning(bases[0], other, label, force) for other, label in zip(bases[1:], labels[1:], strict=True)]
    networks = dict(zip(labels, (_network(base).to(place) for base in bases), strict=True))
    source = readers.read(data[0])
    rows, picked = _rows(bases[0], source, config.rows, reading)
    batches = Rows(rows, place)
    models, probe = list(networks.values()), next(iter(batches))
    layout = transformer(models[0], probe, residual=_residual(config), judged=_has_logits(bases[0]))
    unties = layout.unties
    for model in models if unties else ():
        untie(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = align(
            models,
            batches,
            method=config.method,
            gamma=config.gamma,
            points=layout,
            relative=config.relative,
            force=force,
        )
    gaps = [assert_same(m, layout, done.states[0], maps, probe) for m, maps in zip(models[1:], done.maps, strict=True)]
    ground, names = _placed(ground, models[0], unties)
    inputs = []
    for given, state, said in zip(opened, done.states[1:], checked, strict=True):
        held = Held(given.label, {names[own]: tensor.cpu() for own, tensor in state.items() if own in names})
        inputs.append(replace(given, source=held, heads={}, checked=said))
    told = [str(w.message) for w in caught]
    about = _about(done, layout, gaps, told, rows, picked, source.name)
    return Aligned(ground, inputs, about, networks, bases[0], source, reading)


def _has_logits(base: Base) -> bool:
    """Whether the network that is aligned ends in logits."""
    return base.generative or _classifies(base)


def _classifies(base: Base) -> bool:
    return "Classification" in next(iter(base.config.architectures or []), "")


def _residual(config: Config) -> str:
    if config.residual != "auto":
        return config.residual
    return {"permute": "permute", "identity": "identity"}.get(config.method, "auto")


def _network(base: Base) -> nn.Module:
    """Build the checkpoint as it was trained: with its output layer or its head, else bare."""
    if base.masked:
        raise Refused(
            f"{base.spec} is a masked language model, whose head shares the embeddings behind a layer of its own; "
            "give the bare encoder."
        )
    if base.generative:
        return base.model(base.own_task, seed=0)
    if _classifies(base):
        return base.model(base.own_task, seed=0, stored_head=True)
    return base.backbone()


def _same_meaning(base: Base, other: Base, label: str, force: bool) -> str:
    """Refuse a checkpoint whose tokens or classes mean something else; return what could not be checked."""
    if _classifies(base) and base.own_task.labels != other.own_task.labels:
        raise Refused(
            f"{label} tells the classes {', '.join(other.own_task.labels or ())} apart, the base "
            f"{', '.join(base.own_task.labels or ())}; merge networks of the same classes."
        )
    if base.input != "text":
        return ""
    try:
        same = base.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    except BadBase as error:
        return f"its tokens were not compared with the base's: {error}"
    if not same and not force:
        raise Refused(
            f"{label} has another vocabulary than the base: the same number stands for different tokens. Merge "
            "networks of one tokenizer, or --force."
        )
    return ""


def _rows(base: Base, source: Any, count: int, reading: Mapping[str, Any]) -> tuple[Encoded, int]:
    """Return the training rows that features are compared on, encoded without labels, and how many there were."""
    kind = "causal-lm" if base.generative else None
    read = read_data(source, task=kind, need=("train",), labelled=False)
    if base.generative:
        task = base.own_task
    else:
        task = Task(f"{'image' if base.input == 'image' else 'text'}-classification", "accuracy", (), 0, read.input)
    whole = encode(read.splits["train"], base, task, max_length=reading["max_length"])
    if not count or len(whole) <= count:
        return whole, len(whole)
    index = np.linspace(0, len(whole) - 1, count).round().astype(np.int64)
    return whole.take(index), len(whole)


def _placed(ground: Ground, model: nn.Module, unties: bool) -> tuple[Ground, dict[str, str]]:
    """Return the ground of the merge, and the stored name of every tensor of the network's state."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    reverted: Any = revert_weight_conversion(model, dict(state))  # type: ignore[arg-type]
    by_place = {tensor.data_ptr(): own for own, tensor in reversed(state.items())}
    stored = ground.stored.places
    names: dict[str, str] = {}
    extra: dict[str, str] = {}
    for name, tensor in reverted.items():
        own = by_place.get(tensor.data_ptr())
        if own is None:
            raise Refused(f"{name} is stored in another form than the network holds it; such weights are not merged.")
        (names if name in stored else extra)[own] = name
    tied = [own for own in extra if own not in names and unties]
    if unties:
        first: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedding = names[by_place[first.weight.data_ptr()]]
        ground = replace(
            ground,
            stored=replace(ground.stored, places={**stored, **{extra[own]: stored[embedding] for own in tied}}),
            config={**ground.config, "tie_word_embeddings": False},
        )
        names |= {own: extra[own] for own in tied}
    floats = {name for name, (_, info) in ground.stored.places.items() if info.dtype in FLOATS}
    left = sorted(floats - set(names.values()))
    if left:
        raise Refused(
            f"{left[0]} of the base has no place in its network ({len(left)} such tensors); none is left out."
        )
    return ground, names


def _about(
    done: Alignment,
    layout: Transformer,
    gaps: Sequence[float],
    told: list[str],
    rows: Encoded,
    picked: int,
    name: str,
) -> dict[str, Any]:
    return {
        "method": done.method,
        "gamma": done.gamma,
        "agreement": {f"{gamma:g}": share for gamma, share in done.agreement.items()},
        "data": name,
        "rows": len(rows),
        "of_rows": picked,
        "encoding": rows.report,
        "points": [found.said() for found in done.found],
        "unties": layout.unties,
        "parity": max(gaps, default=0.0),
        "warnings": told,
    }


@dataclass(frozen=True)
class _Column:
    name: str
    task: Task
    test: Encoded
    train: Encoded | None  # where a head must be fitted on every network's own states
    head: str


def _column(base: Base, source: Any, reading: Mapping[str, Any]) -> _Column | None:
    """Open the test rows; None where they have no labels to score by."""
    limit, metric = reading["max_length"], reading["metric"]
    if base.generative:
        rows = read_data(source, task="causal-lm", metric=metric, need=("test",))
        task = task_of(rows, kind="causal-lm", metric=metric)
        test = encode(rows.splits["test"], base, task, max_length=limit)
        return _Column(rows.name, task, test, None, "each network's own output layer")
    if any("label" not in columns for columns in source.found.values()):
        return None
    if _classifies(base):
        own = base.own_task
        rows = read_data(source, task=own.kind, metric=metric, need=("test",), labels=own.labels)
        task = task_of(rows, kind=own.kind, metric=metric)
        test = encode(rows.splits["test"], base, task, max_length=limit)
        return _Column(rows.name, task, test, None, "each network's own")
    rows = read_data(source, task=reading["task"], metric=metric, need=("train", "test"))
    task = task_of(rows, kind=reading["task"], metric=metric)
    test, train = (encode(rows.splits[split], base, task, max_length=limit) for split in ("test", "train"))
    return _Column(rows.name, task, test, train, "fitted on each network's own states")


def _scores(aligned: Aligned, folder: Path, column: _Column) -> dict[str, Any]:
    """Score the inputs, their plain average and the merge, in the form of `merging.scores.score`."""
    place = next(next(iter(aligned.networks.values())).parameters()).device
    mean = _network(open_base(aligned.base.spec, trust_remote_code=aligned.base.trust_remote_code)).to(place)
    if aligned.about["unties"]:
        untie(mean)
    mean.load_state_dict(average([network.state_dict() for network in aligned.networks.values()]))
    merged = _network(open_base(str(folder), trust_remote_code=aligned.base.trust_remote_code)).to(place)
    rows = []
    for label, model in [*aligned.networks.items(), (PLAIN, mean), (MERGE, merged)]:
        if column.train is not None:
            model = HeadedModel(model, fit_head(model, column.train, column.task)).eval().to(place)
        found = answer(model, column.test, column.task)
        cell = interval(column.test.labels.numpy(), found.predictions[None], column.task.metric)
        rows.append(
            {
                "model": label,
                "scores": [{"mean": cell.mean, "low": cell.low, "high": cell.high}],
                "mean": cell.mean,
            }
        )
    task = {
        "data": column.name,
        "metric": column.task.metric,
        "head": column.head,
        "examples": len(column.test),
        "encoding": column.test.report,
    }
    return {"tasks": [task], "rows": rows}
