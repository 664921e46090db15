"""What a method file declares: its record, its claims, and the shapes of the plug points. Imports no torch.

Records are read from the source by `ast` (see `registry`), so every value in them is a literal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FAMILIES = (
    "tune",
    "optim",
    "private",
    "objective",
    "data",
    "merge",
    "route",
    "grow",
    "shrink",
    "audit",
    "serve",
    "distribute",
    "models",  # layers and small architectures: known to the registry, run by no verb
)
# Tasks of language models, which use the base's own output layer.
LANGUAGE_TASKS = ("causal-lm", "instruct", "preference", "multiple-choice")
# Tasks of inputs that a base reads by itself: what a method works on where it does not say so.
READ_TASKS = ("text-classification", "pair-classification", "regression", "image-classification", *LANGUAGE_TASKS)
# Tasks of inputs that no base reads: only a method that turns them into what a base reads names them.
FOREIGN_TASKS = ("point-classification",)
TASKS = (*READ_TASKS, *FOREIGN_TASKS)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One inequality of a method's paper, re-measured by `brickyard check`.

    Either `inequality` between the scores of `arms` (`"mos >= lora + 1.0"`, in points of the metric; the names are the
    keys of `arms`), or `measure`, the name of a function in `brickyard/checks/NAME.py`.
    """

    text: str
    inequality: str = ""
    arms: dict[str, str] = field(default_factory=dict)
    # {"what": why it must destroy the gain, "arm": ..., "inequality": ...}
    control: dict[str, str] = field(default_factory=dict)
    control_seeds: int = 0  # of its arm, where one that fails by a wide margin needs few; 0: as many as the others
    gate: str = ""  # inequality that must hold for the set-up to be valid
    data: str = "embedded:stdlib-topics"  # or several, "trec|embedded:stdlib-topics": the first at hand
    base: str = "embedded:minilm"
    measure: str = ""
    part: str = ""  # key of this claim in what `measure` returns, where claims share one measurement
    kind: Literal["counted", "measured", "emulated", "predicted"] = "measured"
    epochs: float = 3
    seeds: int = 3
    lrs: tuple[float, ...] = ()  # searched on validation with seed 0 by every arm alike; empty: each arm's own default
    lr_factors: tuple[float, ...] = ()  # the same, times each arm's own default: where arms live on different scales
    train_rows: int = 0  # 0: all
    shots: int = 0  # rows of each class, drawn anew for every seed; 0: all
    batch: int = 0  # 0: each method's own
    max_length: int = 32  # tokens a text is cut to, so that a check takes minutes; 0: the base's context
    full: dict[str, Any] = field(default_factory=dict)  # fields replaced under --full


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `brickyard methods` and `show` print of a method.

    `needs` lists the tasks it works on (`because`: why no others); `slot` says which place of an arm it fills (`memory`
    is how the layers run in training: what they keep for backward, in what arithmetic they compute; `structure` which
    part of them runs, in training and at serving; `start` what the tuner begins with); `search` maps an option (or lr)
    to the values that a search tries; `presets` maps a preset to the options that it sets. `head` names the head that a
    tuner stands on where an arm names none, if not the base's own. `fixed` sets options by which the records of one
    file differ, and which are no options of this record. `part_of` names the record whose claims cover this one too. A
    step that wants other learning rates than backpropagation in small batches, but whose rates are still the tuner's in
    kind, multiplies those by `times_lr`.
    """

    name: str
    family: str
    title: str
    paper: str = ""
    needs: tuple[str, ...] = READ_TASKS
    because: str = ""
    slot: Literal["tuner", "head", "step", "objective", "data", "memory", "structure", "start", ""] = ""
    status: Literal["stable", "trial"] = "stable"
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    search: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # defaults of lr, wd, epochs, batch for this method
    claims: tuple[Claim, ...] = ()
    times_lr: float = 1.0
    head: str = ""
    part_of: str = ""
    ancestry: Literal["same base", "independent"] = "same base"
