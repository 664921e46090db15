"""Do pre-training and distillation compound? The paper's arms at equal optimiser steps, on one text.

    F 3    PF 1+3    D 2    D+F 2+3    PD 1+2    PD+F 1+2+3         1 pre-train, 2 distil, 3 fine-tune

The teacher is tuned on the very labels that F and PF get, so no arm learns from more labels than another. All that is
pre-trained shares one stage 1; what follows runs once for each seed. All stages of all arms train at one rate: with
one for labels and another for soft labels, the rates would be compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from brickyard.checks._place import RUNS, finished
from brickyard.checks._takes import takes
from brickyard.checks.run import FINISHED, Answers, Inequality, judge
from brickyard.compare.plan import key_of
from brickyard.compare.run import versions
from brickyard.core import brick, registry, trial
from brickyard.core.answers import answer
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.data import Data, read_data
from brickyard.core.jobs import Job
from brickyard.core.method import Claim
from brickyard.core.registry import code_digest
from brickyard.core.task import task_of

NAME = "pretrained-distillation"
WANTED = ("PD >= PF", "PF >= F", "PD >= D", "D >= F", "PD >= F + 3.0")
GATE = "teacher > majority + 20.0"
CONTROL = "PD > control + 5.0"
STAGES = ("pretrain", "distil", "tune")


@takes("base", "data")
def compound(
    claim: Claim,
    *,
    steps: int = 600,
    pretrain: int = 300,
    tune: int = 100,
    lr: float = 1e-3,
    labelled: int = 500,
    teacher_steps: int = 160,
    teacher_lr: float = 1e-4,
    layers: int = 2,
    width: int = 128,
    heads: int = 2,
    vocabulary: int = 8000,
    batch: int = 32,
) -> dict[str, Any]:
    """Measure the arms of a classifier's student.

    Args:
        steps: optimiser steps of every arm in all; `pretrain` of them are stage 1 and `tune` stage 3 where an arm has
            those stages beside stage 2.
        lr: of all stages of the student.
        labelled: rows whose labels the teacher and stage 3 see; the text of all train rows is the unlabelled pool.
            With `claim.train_rows` every arm takes twice the steps, and PD is also measured on pools of so many rows
            and four times as many: its accuracy must not fall as they grow.
        teacher_steps, teacher_lr: of the teacher's tuning.
    """
    if claim.train_rows:
        steps, pretrain, tune = 2 * steps, 2 * pretrain, 2 * tune
    data = read_data(claim.data)
    splits = {name: dict(split.columns) for name, split in data.splits.items()}
    names = data.labels or ()
    for columns in splits.values():
        columns["label"] = [names[i] for i in columns["label"]]
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data.splits["train"]))
    chosen = np.sort(order[:labelled])
    # The recipe adds the labelled rows' text to the pool itself.
    pool = {"train": {"text": [splits["train"]["text"][i] for i in np.sort(order[labelled:])]}}
    splits["train"] = {k: [v[i] for i in chosen] for k, v in splits["train"].items()}
    sizes = {k: v for k, v in locals().items() if isinstance(v, int | float)}
    runs = _Runs(claim, _folder(claim, sizes), splits, pool, batch)
    teacher = runs.teacher(teacher_steps, teacher_lr)
    shape = {"layers": layers, "width": width, "heads": heads} | {f"{stage}_lr": lr for stage in STAGES}
    new = {**shape, "vocabulary": vocabulary}
    first = runs.student("stage1", 0, {**new, "pretrain_steps": pretrain, "distil_steps": 0, "tune_steps": 0}, [])
    ready = {"student": str(first / "stages" / "pretrain")} | {f"{stage}_lr": lr for stage in STAGES}
    left = steps - pretrain
    arms = {
        "F": (new, 0, steps),
        "PF": (ready, 0, left),
        "D": (new, steps, 0),
        "D+F": (new, steps - tune, tune),
        "PD": (ready, left, 0),
        "PD+F": (ready, left - tune, tune),
        "control": ({**ready, "shuffle": True}, left, 0),
    }
    answers = runs.answers(
        {
            arm: {**start, "pretrain_steps": 0, "distil_steps": soft, "tune_steps": hard}
            for arm, (start, soft, hard) in arms.items()
        },
        [teacher],
    )
    wanted = list(WANTED)
    if claim.train_rows:
        for rows in (claim.train_rows, 4 * claim.train_rows):
            more = pool["train"]["text"][: max(0, rows - labelled)]
            runs.pool = {"train": {"text": more}} if more else None
            options = {**ready, "pretrain_steps": 0, "distil_steps": left, "tune_steps": 0}
            answers |= runs.answers({f"PD-{rows}": options}, [teacher])
        wanted += [f"PD-{4 * claim.train_rows} >= PD-{claim.train_rows}", f"PD >= PD-{4 * claim.train_rows}"]
    answers["teacher"] = runs.of_teacher(claim.seeds)
    some = answers["teacher"]
    most = np.bincount(some.labels.astype(int)).argmax()
    answers["majority"] = Answers(some.labels, np.full_like(some.predictions, most))
    as_labels = {arm: Answers(some.predictions[0], answers[arm].predictions) for arm in ("PD", "PF")}
    figures = {text: judge(Inequality.read(text), answers, "accuracy") for text in wanted}
    figures["agreement with the teacher: PD > PF"] = judge(Inequality.read("PD > PF"), as_labels, "accuracy")
    out = _verdict(figures, judge(Inequality.read(GATE), answers, "accuracy"), GATE)
    out["control"] = _control(
        "soft labels of other rows", CONTROL, judge(Inequality.read(CONTROL), answers, "accuracy")
    )
    out["arms"] = {arm: _figures(found, runs.seconds.get(arm, 0.0)) for arm, found in answers.items()}
    out |= {"base": claim.base, "data": data.name, "rows": data.report["rows"], "sizes": sizes, "stage1": runs.stage1}
    (runs.folder / FINISHED).touch()
    return out


@takes("base", "data")
def language_model(
    claim: Claim,
    *,
    wanted: Sequence[str] = ("PF > PD", "F > D"),
    steps: int = 300,
    pretrain: int = 150,
    batch: int = 8,
    k: int = 32,
    lr: float = 1e-3,
    teacher_steps: int = 150,
    teacher_lr: float = 3e-4,
) -> dict[str, Any]:
    """Measure a language model's student of half its layers and width, in nats per token (fewer are better).

    It reads the first `claim.train_rows` documents (0: all, for four times the steps).

    F and PF learn the text alone, D and PD the teacher's soft labels in place of all steps or of those after
    `pretrain`; F and D have one schedule, PF and PD two. The teacher is `claim.base`, tuned on the same text: as it is
    it would teach what it thinks likely in text of another kind.
    """
    base = open_base(claim.base)
    data = read_data(claim.data, task="causal-lm")
    if not claim.train_rows:
        steps, pretrain, teacher_steps = 4 * steps, 4 * pretrain, 4 * teacher_steps
    sizes = {k: v for k, v in locals().items() if isinstance(v, int | float)}
    splits = {name: dict(split.columns) for name, split in data.splits.items()}
    splits["train"] = {"text": splits["train"]["text"][: claim.train_rows or None]}
    runs = _Runs(claim, _folder(claim, [sizes, list(wanted)]), splits, None, batch)
    heads = max(1, base.config.num_attention_heads // 2)
    shape = {
        "layers": max(1, base.config.num_hidden_layers // 2),
        "width": base.width // 2,
        "heads": heads,
        "k": k,
        **{f"{stage}_lr": lr for stage in STAGES},
    }
    arms = {
        "F": (0, 0, steps, False),
        "D": (0, steps, 0, False),
        "PF": (pretrain, 0, steps - pretrain, False),
        "PD": (pretrain, steps - pretrain, 0, False),
        "control": (0, steps, 0, True),
    }
    needed = {name for text in wanted for name in (Inequality.read(text).left, Inequality.read(text).right)}
    options = {
        arm: {**shape, "pretrain_steps": first, "distil_steps": soft, "tune_steps": hard, "shuffle": shuffle}
        for arm, (first, soft, hard, shuffle) in arms.items()
        if arm in needed | {"F", "D", "control"}
    }
    teacher = runs.teacher(teacher_steps, teacher_lr, task="causal-lm", metric="nats_per_token")
    answers = runs.answers(options, [teacher])
    answers |= {"teacher": runs.of_teacher(claim.seeds), "base": _of_base(base, data, claim)}
    metric, control, gate = "nats_per_token", "control > D", "F > teacher"
    figures = {text: judge(Inequality.read(text), answers, metric) for text in wanted}
    out = _verdict(figures, judge(Inequality.read(gate), answers, metric), gate, unit="hundredths of a nat")
    out["control"] = _control("soft labels of other tokens", control, judge(Inequality.read(control), answers, metric))
    out["arms"] = {arm: _figures(found, runs.seconds.get(arm, 0.0), metric) for arm, found in answers.items()}
    out |= {"base": claim.base, "data": data.name, "rows": data.report["rows"], "sizes": sizes}
    (runs.folder / FINISHED).touch()
    return out


class _Runs:
    """The runs of one check in one folder; each goes on where an interrupted check left it."""

    def __init__(self, claim: Claim, folder: Path, splits: dict[str, Any], pool: Any, batch: int) -> None:
        self.claim, self.folder, self.splits, self.pool, self.batch = claim, folder, splits, pool, batch
        self.seconds: dict[str, float] = {}
        self.stage1: dict[str, Any] = {}

    def teacher(self, steps: int, lr: float, **task: Any) -> Path:
        """Tune the base on the training rows; return its brick."""
        folder = self.folder / "teacher"
        if not (folder / "brick" / brick.MANIFEST).is_file():
            setting = trial.Setting(
                arm="full",
                base=self.claim.base,
                data=self.splits,
                max_length=self.claim.max_length or None,
                **task,
                training={"steps": steps, "lr": lr, "batch": self.batch, "evaluate_every": steps},
            )
            trial.run({"setting": asdict(setting), "folder": str(folder)})
        return folder / "brick"

    def of_teacher(self, seeds: int) -> Answers:
        """Return the teacher's answers, as often as there are seeds: it is one model, whose answers never change."""
        table = pq.read_table(self.folder / "teacher" / "answers.parquet", columns=["label", "prediction"])
        return Answers(table["label"].to_numpy(), np.stack([table["prediction"].to_numpy()] * seeds))

    def student(self, arm: str, seed: int, options: dict[str, Any], bricks: list[Path]) -> Path:
        """Run the recipe once, in this process; return its folder."""
        report = one(self.argument(arm, seed, options, bricks))
        self.stage1 = {k: report[k] for k in ("student", "steps", "seconds", "tokens", "text_rows")}
        return self.folder / arm / f"seed{seed}"

    def argument(self, arm: str, seed: int, options: dict[str, Any], bricks: list[Path]) -> dict[str, Any]:
        """Return what `one` takes."""
        return {
            "base": self.claim.base,
            "bricks": [str(path) for path in bricks],
            "options": options,
            "splits": self.splits,
            "text": self.pool,
            "folder": str((self.folder / arm / f"seed{seed}").absolute()),
            "seed": seed,
            "batch": self.batch,
            "max_length": self.claim.max_length or None,
        }

    def answers(self, arms: dict[str, dict[str, Any]], bricks: list[Path]) -> dict[str, Answers]:
        """Run arms (options by name) with every seed, two at a time; read what their students answer to the test rows.

        The first student that learns from soft labels runs alone: it leaves the teacher's answers for the others.
        """
        seeds = range(1, self.claim.seeds + 1)
        jobs = [
            Job(key=f"{arm}/seed{seed}", function=f"{__name__}:one", argument=self.argument(arm, seed, options, bricks))
            for arm, options in arms.items()
            for seed in seeds
        ]
        taught = [i for i, job in enumerate(jobs) if job.argument["options"]["distil_steps"]]
        for i in taught[:1]:
            jobs.insert(0, replace(jobs.pop(i), alone=True))
        for key, value in finished(jobs, 2, self.folder).items():
            arm = key.split("/")[0]
            self.seconds[arm] = self.seconds.get(arm, 0.0) + value["seconds"] / len(seeds)
        found = {}
        for arm in arms:
            tables = [
                pq.read_table(self.folder / arm / f"seed{seed}" / "answers.parquet", columns=["label", "prediction"])
                for seed in seeds
            ]
            predictions = np.stack([t["prediction"].to_numpy() for t in tables])
            found[arm] = Answers(tables[0]["label"].to_numpy(), predictions)
        return found


def one(argument: dict[str, Any]) -> dict[str, Any]:
    """Run the recipe once; return its report."""
    run: Callable[..., dict[str, Any]] = registry.load(NAME).run
    return run(
        open_base(argument["base"]),
        [brick.load(path) for path in argument["bricks"]],
        registry.config(NAME, argument["options"]),
        argument["splits"],
        folder=Path(argument["folder"]),
        text=argument["text"],
        **{name: argument[name] for name in ("seed", "batch", "max_length")},
    )


def _folder(claim: Claim, sizes: Any) -> Path:
    """Return the check's folder, emptied where the check had ended."""
    folder = RUNS / f"{NAME}-{key_of([str(claim), sizes, code_digest(), versions()])}"
    if (folder / FINISHED).exists():
        shutil.rmtree(folder)
    return folder


def _of_base(base: Base, data: Data, claim: Claim) -> Answers:
    """Return what the untouched base answers to the test documents, as often as there are seeds."""
    task = task_of(data, metric="nats_per_token")
    rows = encode(data.splits["test"], base, task, max_length=claim.max_length or None)
    found = answer(base.model(task, seed=0), rows, task)
    return Answers(rows.labels.numpy(), np.stack([found.predictions] * claim.seeds))


def _figures(found: Answers, seconds: float, metric: str = "accuracy") -> dict[str, Any]:
    per_seed = [
        float((p == found.labels).mean() if metric == "accuracy" else p.sum() / found.labels.sum())
        for p in found.predictions
    ]
    return {"mean": float(np.mean(per_seed)), "per_seed": per_seed, "train_seconds": seconds}


def _control(what: str, inequality: str, found: dict[str, Any]) -> dict[str, Any]:
    kept = {k: found[k] for k in ("measured", "low", "high")}
    return {"what": what, "inequality": inequality, **kept, "destroyed": found["holds"] is True}


def _verdict(
    figures: dict[str, dict[str, Any]], gate: dict[str, Any], text: str, unit: str = "points"
) -> dict[str, Any]:
    """Join the inequalities: false if one misses, true if all clear, else undecided; the gate comes first.

    `measured` and its interval are the first inequality's, the headline; `figures` has them all.
    """
    found = [f["holds"] for f in figures.values()]
    holds: Any = False if False in found else True if all(f is True for f in found) else "undecided"
    said = "; ".join(
        f"{name}: {f['measured']:+.2f} ({f['low']:+.2f} to {f['high']:+.2f})" for name, f in figures.items()
    )
    return {
        "inequality": "; ".join(figures),
        "holds": holds if gate["holds"] is True else "set-up invalid",
        **{k: next(iter(figures.values()))[k] for k in ("measured", "low", "high")},
        "figures": figures,
        "gate": {"inequality": text, **{k: gate[k] for k in ("measured", "low", "high", "holds")}},
        "unit": unit,
        "detail": f"in {unit}: {said}",
    }
