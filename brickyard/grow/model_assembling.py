"""Deep Incubation: train a deep network's parts separately, each inside a shallow meta network, then assemble them.

    M = M_K o ... o M_1            the target, cut by its blocks; the stem goes with M_1, norm and head with M_K
    m = m_K o ... o m_1            the meta network: the same interfaces, `meta_depth` blocks for each part

    1 pre-train    min over m      L(m(x), y)                                         end to end, but shallow
    2 incubate     min over M_i    L(m_K o ... m_{i+1} o M_i o m_{i-1} ... o m_1(x), y)      every m_j frozen
    3 fine-tune    min over M      L(M(x), y)                                         from the M_i of 2, no warm-up

L is the task's own loss. M_i starts from random weights, not from m_i. The K jobs of phase 2 share nothing but the meta
network, so that they run side by side or on different machines and give the same bits either way; they fit each other
because all of them were trained against the same neighbours. Below M_i there is no graph, and above it the gradient
passes through but no weight gradient is computed. Frozen neighbours are in evaluation mode. A tensor that several parts
read, such as a tied embedding, stays in phase 2 as phase 1 left it. With K = 1 it is ordinary training.

Costs are *counted* in block-steps, blocks x optimiser steps, a block that is passed forward only as a third:
    1: K d S1        2: sum_i (n_i + (K - i) d + (i - 1) d / 3) S2        3: depth S3        end to end: depth S
`--epochs` or `--steps` are the S of training end to end; all phases together spend `budget` of its block-steps.

`meta=distil` is an extension to a base that is trained already: in phase 1 each stand-in learns to answer as its part
of the base does (which is passed forward for that: depth / 3 block-steps a step more), and in phase 2 the parts begin
as they are stored. With `tune=0` the optimiser never holds more than one part.

Source: Ni et al., "Deep Model Assembling", arXiv 2212.04129, sec. 3 ("Deep Incubation", ICCV 2023). Headline claim:
ViT-H on ImageNet-1K gains 2.7 points over end-to-end training at 43 % less training cost. Where the paper differs: its
learning rate is 5e-4 batch / 512 and falls to 1e-5, here it is the one given and falls to 0; its frozen neighbours keep
drop-path. Left out: drop-path and image augmentation; networks in stages of unequal widths (Swin, ConvNets).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brickyard.core import measure, trial
from brickyard.core.base_config import quiet
from brickyard.core.errors import Refused, UsageError
from brickyard.core.files import complete_folder, write_json
from brickyard.core.jobs import Job
from brickyard.core.loop import Training
from brickyard.core.method import Claim, Record
from brickyard.core.trial import Prepared, Setting
from brickyard.grow._assembling_parts import Hybrid, Shard, assemble, hybrid, meta, meta_shard, train_part
from brickyard.grow._assembling_plan import Plan, plan
from brickyard.grow._assembling_run import Assembly, told

__all__ = ["Hybrid", "Plan", "Shard", "assemble", "hybrid", "meta", "meta_shard", "plan", "run", "train_part"]

RECORD = Record(
    name="model-assembling",
    family="grow",
    title="Train a deep network's parts separately inside a shallow meta network, then assemble them",
    paper="Deep Model Assembling, arXiv 2212.04129 (Deep Incubation, ICCV 2023)",
    needs=("image-classification", "text-classification", "pair-classification", "regression", "causal-lm"),
    training={"lr": 1e-3, "wd": 0.05, "schedule": "cosine"},
    claims=(
        Claim(
            text="Assembled parts work before any fine-tuning, at least 40 points above the majority class; parts that "
            "were trained within different meta networks do not.",
            measure="images",
            part="before",
            data="mnist|embedded:digits",
            epochs=8,
            train_rows=10_000,
            batch=64,
            lrs=(1e-3,),
            full={"epochs": 40, "train_rows": 20_000, "batch": 256, "lrs": (2e-3,), "seeds": 5},
        ),
        Claim(
            text="Assembled and fine-tuned, the network is at most 0.3 points below one that was trained end to end "
            "for as many block-steps.",
            measure="images",
            part="equal budget",
            data="mnist|embedded:digits",
            epochs=8,
            train_rows=10_000,
            batch=64,
            lrs=(1e-3,),
            full={"epochs": 40, "train_rows": 20_000, "batch": 256, "lrs": (2e-3,), "seeds": 5},
        ),
        Claim(
            text="With at most 60 % of the block-steps it is at least as good as the network trained end to end.",
            measure="images",
            part="full budget",
            data="mnist|embedded:digits",
            epochs=8,
            train_rows=10_000,
            batch=64,
            lrs=(1e-3,),
            full={"epochs": 40, "train_rows": 20_000, "batch": 256, "lrs": (2e-3,), "seeds": 5},
        ),
        Claim(
            text="A language model, assembled and fine-tuned, needs no more nats per token than one that was trained "
            "end to end for as many block-steps.",
            measure="language",
            data="embedded:python-source",
            epochs=0,
            batch=16,
            max_length=256,
            lrs=(1e-3,),
            full={"epochs": 4},
        ),
    ),
)
REPORT = "model_assembling.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the cut and of how the budget is divided."""

    parts: int = 4
    """K: parts that are trained separately"""
    splits: tuple[int, ...] = ()
    """blocks of each part, such as [4,4,2,2]; empty: depth / parts each"""
    meta_depth: int = 1
    """blocks of each part's stand-in in the meta network"""
    meta: Literal["train", "distil"] = "train"
    """train: from random weights, as in the paper; distil, an extension: from the weights of the base"""
    budget: float = 0.6
    """block-steps of all phases together, as a share of those of training end to end"""
    pretrain: float = 3.0
    """optimiser steps of the meta network, in proportion to `incubate` and `tune`"""
    incubate: float = 1.0
    """optimiser steps of each part, likewise"""
    tune: float = 1.0
    """optimiser steps of the assembled network, likewise; 0 leaves it as it is assembled"""
    tune_lr: float = 0.0
    """learning rate of the fine-tuning; 0: that of the other phases"""

    def __post_init__(self) -> None:
        if min(self.parts, self.meta_depth) < 1:
            raise UsageError(f"model-assembling: parts={self.parts} and meta_depth={self.meta_depth} must be above 0.")
        shares = (self.budget, self.pretrain, self.incubate)
        if min(shares) <= 0 or min(self.tune, self.tune_lr) < 0 or not all(map(math.isfinite, (*shares, self.tune))):
            raise UsageError(
                f"model-assembling: budget, pretrain, incubate {shares} must be above 0 and finite, tune={self.tune} "
                f"and tune_lr={self.tune_lr} 0 or more: no part can be trained without a meta network."
            )


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of each phase, and of training end to end."""

    pretrain: int
    incubate: int
    tune: int
    end_to_end: int


def hybrid_cost(splits: Sequence[int], meta_depth: int, part: int) -> Fraction:
    """Return the block-steps of one optimiser step of hybrid `part`: a frozen block below the part is passed forward
    only, which counts a third; one above it counts in full, although its weight gradients are not computed."""
    above, below = len(splits) - part, part - 1
    return splits[part - 1] + above * meta_depth + Fraction(below * meta_depth, 3)


def block_steps(splits: Sequence[int], meta_depth: int, steps: Steps, *, distil: bool = False) -> dict[str, Fraction]:
    """Return the block-steps of each phase, of all of them together ("total"), and of training end to end.

    With `distil` the whole network is passed forward in each step of the first phase.
    """
    depth, parts = sum(splits), len(splits)
    spent = {
        "pretrain": (parts * meta_depth + (Fraction(depth, 3) if distil else 0)) * Fraction(steps.pretrain),
        "incubate": sum((hybrid_cost(splits, meta_depth, i) for i in range(1, parts + 1)), Fraction()) * steps.incubate,
        "tune": Fraction(depth * steps.tune),
    }
    return {**spent, "total": sum(spent.values(), Fraction()), "end_to_end": Fraction(depth * steps.end_to_end)}


def divide(
    end_to_end: int,
    splits: Sequence[int],
    meta_depth: int,
    budget: float,
    ratio: tuple[float, float, float],
    *,
    distil: bool = False,
) -> Steps:
    """Return the steps of each phase in the proportions `ratio`, so that they spend at most `budget` of the block-steps
    of `end_to_end` steps. Refused where a phase would get none. One part needs no meta network, and gets none."""
    shares = [Fraction(value) for value in ratio]
    if len(splits) == 1:
        shares[0] = Fraction(0)
    one = block_steps(splits, meta_depth, Steps(1, 1, 1, end_to_end), distil=distil)
    unit = (
        Fraction(budget)
        * one["end_to_end"]
        / sum(share * one[name] for share, name in zip(shares, ("pretrain", "incubate", "tune"), strict=True))
    )
    counts = [int(share * unit) for share in shares]
    if any(count == 0 for count, share in zip(counts, shares, strict=True) if share):
        raise Refused(
            f"{budget:g} of the block-steps of {end_to_end} optimiser steps leave {counts} steps for pre-training, "
            "parts and fine-tuning; give more --steps or --epochs."
        )
    return Steps(counts[0], counts[1], counts[2], end_to_end)


def assembly(
    ready: Prepared, config: Config, folder: Path, identity: Mapping[str, Any], **more: Any
) -> tuple[Assembly, Steps]:
    """Cut the base's architecture and divide the budget; nothing is trained or written yet.

    `more` are further attributes of `Assembly`.
    """
    skeleton = ready.base.skeleton(ready.task, attention=ready.setting.attention)
    batch = {k: v for k, v in ready.encoded["train"].collate(np.arange(1)).items() if k != "labels"}
    cut = plan(skeleton, config.parts, config.splits, meta_depth=config.meta_depth, batch=batch)
    total = ready.training.total_steps(len(ready.encoded["train"]))
    ratio = (config.pretrain, config.incubate, config.tune)
    distil = config.meta == "distil"
    steps = divide(total, cut.splits, cut.meta_depth, config.budget, ratio, distil=distil)
    known = {**identity, "data": ready.encoded["train"].digest, "plan": cut.digest, "seed": ready.setting.seed}
    kept = {key: more[key] for key in ("checkpoint_every", "allow_change") if key in more}

    def job(part: int, threads: int) -> Job:
        argument = {
            "setting": asdict(ready.setting),
            "training": asdict(ready.training),
            "config": asdict(config),
            "folder": str(folder),
            "identity": dict(identity),
            "plan": cut.digest,
            "part": part,
            **kept,
        }
        return Job(key=f"part {part}", function=f"{__name__}:incubate_job", argument=argument, threads=threads)

    return Assembly(ready, cut, asdict(steps), folder, known, job, config.tune_lr, distil, **more), steps


def incubate_job(argument: dict[str, Any]) -> dict[str, Any]:
    """Train one part in a process of its own: opens base and data again, and leaves the part's shard in the folder."""
    ready = trial.prepare(Setting(**argument["setting"]), ("train",))
    ready.training = Training(**argument["training"])
    config = Config(**{**argument["config"], "splits": tuple(argument["config"]["splits"])})
    more = {key: argument[key] for key in ("checkpoint_every", "allow_change") if key in argument}
    made, _ = assembly(ready, config, Path(argument["folder"]), argument["identity"], **more)
    if made.plan.digest != argument["plan"]:
        raise Refused("this process cuts the model by another plan than its caller; run both with the same versions.")
    return {"part": made.incubate(argument["part"]).part}


def run(
    ready: Prepared,
    config: Config,
    out: Path,
    *,
    arm: str,
    code: str,
    checkpoints: Path,
    checkpoint_every: int = 0,
    callbacks: Sequence[Any] = (),
    allow_change: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a new network of the base's architecture part by part; write the model folder `out` whole or not at all.

    Returns its `model_assembling.json`: who owns what, what each phase cost, the interfaces, scores. An interrupted run
    goes on from `checkpoints`: phases and parts that are done are not repeated. `callbacks` see the parts only where
    they train one after the other in this process; one with `phase(said)` is told when a phase ends.
    """
    identity = {"arm": arm, "base": ready.base.fingerprint, "code": code}
    more = {"checkpoint_every": checkpoint_every, "allow_change": allow_change, "callbacks": callbacks}
    made, steps = assembly(ready, config, checkpoints, identity, **more)
    cut = made.plan
    made.tell(cut.sentence())
    started = time.monotonic()
    standing = made.pretrain()
    if standing.report:
        made.tell(told(standing))
    shards = made.incubate_all()
    model = assemble(cut, shards)
    scores = {"assembled": made.score(model)}
    states = {"assembled": made.statistics(model)}
    if made.distil and ready.task.generative:  # with a new head the base has nothing to say yet
        scores = {"base": made.score(made.stored()), **scores}
    if standing.report:
        scores = {"meta": standing.report["score"], **scores}
        states = {"meta": standing.report["interfaces"], **states}
    phases: dict[str, Any] = {"pretrain": standing.report, "incubate": [shard.report for shard in shards]}
    if steps.tune:
        phases["tune"] = made.tune(model)
        scores["tuned"], states["tuned"] = made.score(model), made.statistics(model)
    final = scores[next(reversed(scores))]
    spent = {k: float(v) for k, v in block_steps(cut.splits, cut.meta_depth, steps, distil=made.distil).items()}
    known: dict[str, Any] = {
        "arm": arm,
        "base": {"spec": ready.base.spec, "fingerprint": ready.base.fingerprint},
        "data": {"name": ready.data.name, "fingerprint": ready.data.fingerprint},
        "seed": ready.setting.seed,
        "training": asdict(ready.training),
        "plan": cut.report(),
        "steps": asdict(steps),
        "block_steps": spent,
        "phases": phases,
        "parameters": sum(p.numel() for p in model.parameters()),
        "shard_bytes": [made.file(part).stat().st_size for part in range(1, cut.parts + 1)],
        "seconds_of_this_call": time.monotonic() - started,
        "scores": scores,
        "interfaces": states,
        "encoding": {name: rows.report for name, rows in ready.encoded.items()},
        "environment": measure.environment(),
        **({"score": final} if final["split"] == "test" else {}),
    }
    known["summary"] = _summary(known)
    with complete_folder(out) as temporary, quiet():
        cached = getattr(ready.base.config, "use_cache", None)
        if cached is not None:
            model.config.use_cache = cached  # type: ignore[union-attr]  # off while training; generation is slow without
        model.cpu().save_pretrained(temporary)  # type: ignore[operator]
        side = ready.base.tokenizer if ready.base.input == "text" else ready.base.processor
        side.save_pretrained(temporary)
        write_json(temporary / REPORT, known)
    return known


def _summary(known: dict[str, Any]) -> str:
    """Say what the phases cost, how the interfaces fit, and what assembling alone gave."""
    spent, steps, phases = known["block_steps"], known["steps"], known["phases"]
    parts = [report["seconds"] for report in phases["incubate"]]
    lines = [f"{'phase':<28} {'steps':>10} {'block-steps':>12} {'seconds':>9}"]

    def row(name: str, phase: str, seconds: float, times: str = "") -> None:
        lines.append(f"{name:<28} {times + format(steps[phase], ','):>10} {spent[phase]:>12,.0f} {seconds:>9,.1f}")

    if steps["pretrain"]:
        row("meta network", "pretrain", phases["pretrain"]["seconds"])
    row(f"parts (longest {max(parts):,.1f} s)", "incubate", sum(parts), f"{len(parts)} x ")
    if steps["tune"]:
        row("fine-tuning", "tune", phases["tune"]["seconds"])
    share = spent["total"] / spent["end_to_end"]
    lines.append(
        f"{spent['total']:,.0f} block-steps together, {share:.1%} of the {spent['end_to_end']:,.0f} of "
        f"{steps['end_to_end']:,} steps end to end (counted)"
    )
    trained = max(report["trainable_parameters"] for report in phases["incubate"])
    lines.append(f"a part trains at most {trained:,} of {known['parameters']:,} parameters at a time")
    names = {"meta": "meta network", "base": "base", "assembled": "assembled", "tuned": "fine-tuned"}
    lines.append(f"states behind each part, mean / std: {', '.join(names[name] for name in known['interfaces'])}")
    for part, states in enumerate(zip(*known["interfaces"].values(), strict=True), 1):
        lines.append(f"  part {part}: " + ", ".join(f"{state['mean']:+.3f} / {state['std']:.3f}" for state in states))
    some = next(iter(known["scores"].values()))
    shown = ", ".join(f"{names[name]} {score['mean']:.4f}" for name, score in known["scores"].items())
    lines.append(f"{some['split']} {some['metric']}: {shown}")
    return "\n".join(lines)
