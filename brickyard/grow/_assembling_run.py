"""The three phases of model-assembling over one folder: each leaves a file, and what is done is not repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brickyard.core.answers import answer, to_device
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.checkpoint import same_or_refuse
from brickyard.core.errors import Refused, RunFailed
from brickyard.core.jobs import Job, Local
from brickyard.core.loop import Training, train
from brickyard.core.receipt import assert_effect, receipt, snapshot
from brickyard.core.trial import Prepared
from brickyard.grow._assembling_distil import beginnings, distilled
from brickyard.grow._assembling_parts import Shard, ends, meta, meta_shard, statistics, train_part
from brickyard.grow._assembling_plan import META, Plan

PROBE = 64  # rows whose states are compared at the interfaces


@dataclass
class Assembly:
    """One run: what it reads, and where its phases leave their files.

    Attributes:
        ready: base, data, task and training.
        plan: the cut.
        steps: optimiser steps of the phases "pretrain", "incubate" and "tune".
        folder: holds the shards of what is done, and the checkpoints of what is under way.
        identity: what decides the result, beside each phase's training.
        job: makes the job that trains a part, by its number, elsewhere with so many threads.
        tune_lr: learning rate of the fine-tuning; 0: that of the other phases.
        distil: the base is trained already: stand-ins learn from its parts, which begin as they are stored.
    """

    ready: Prepared
    plan: Plan
    steps: Mapping[str, int]
    folder: Path
    identity: dict[str, Any]
    job: Callable[[int, int], Job]
    tune_lr: float = 0.0
    distil: bool = False
    checkpoint_every: int = 0
    allow_change: Sequence[str] = ()
    callbacks: Sequence[Any] = ()

    def training(self, phase: str) -> Training:
        """Return how a phase is trained; the assembled network is not warmed up."""
        made = replace(self.ready.training, steps=self.steps[phase], checkpoint_every=self.checkpoint_every)
        return replace(made, warmup=0.0, lr=self.tune_lr or made.lr) if phase == "tune" else made

    def file(self, part: int) -> Path:
        """Return where the shard of a part, or the meta network, lies."""
        return self.folder / ("meta.safetensors" if part == META else f"part-{part}.safetensors")

    def kept(self, part: int) -> Shard | None:
        """Return what an earlier run left of a part or of the meta network; Changed where it was another run."""
        if not self.file(part).is_file():
            return None
        shard = Shard.read(self.file(part))
        same_or_refuse(shard.identity, self._identity(part), self.allow_change, str(self.file(part)))
        return shard

    def _identity(self, part: int) -> dict[str, Any]:
        known = {**self.identity, "training": asdict(self.training("pretrain" if part == META else "incubate"))}
        return {**known, **self._chosen_on} if part == META else known

    @property
    def _chosen_on(self) -> dict[str, Any]:
        """The rows by which a phase chooses its weights; parts are not scored and do not depend on them."""
        rows = self.ready.encoded.get("validation")
        return {"validation": None if rows is None else rows.digest}

    def _train(self, attached: Attached, phase: str, name: str, *, score: bool) -> dict[str, Any]:
        """Train a phase from its last checkpoint, if there is one; with `score` validation rows choose the weights."""
        encoded = self.ready.encoded
        done = train(
            attached,
            encoded["train"],
            encoded.get("validation") if score else None,
            self.ready.task,
            self.training(phase),
            folder=self.folder / "steps" / name,
            identity={**self.identity, **(self._chosen_on if score else {})},
            allow_change=self.allow_change,
            callbacks=self.callbacks,
            device=self.ready.setting.device,
        )
        return {
            "steps": done.steps,
            "best_step": done.best_step,
            "seconds": done.seconds,
            "trainable_parameters": sum(p.numel() for p in attached.parameters()),
            "history": done.history,
        }

    def pretrain(self) -> Shard:
        """Phase 1, or what is there of it."""
        if (found := self.kept(META)) is not None:
            return found
        attached = self._meta()
        model: Any = attached.model
        report: dict[str, Any] = {}
        if self.steps["pretrain"]:
            before = snapshot(model)
            report = self._train(attached, "pretrain", "meta", score=True)
            assert_effect(receipt(before, model, attached))
            report["score"] = self.score(model)
            report["interfaces"] = self.statistics(model, stand_ins=True)
        shard = meta_shard(self.plan, model, identity=self._identity(META), report=report)
        shard.write(self.file(META))
        return shard

    def _meta(self) -> Attached:
        """Return the meta network before phase 1."""
        seed = self.ready.setting.seed
        if self.distil:
            return distilled(self.plan, self.stored(), self.ready.task, seed=seed)
        return _whole(meta(self.plan, seed=seed))

    def stored(self) -> nn.Module:
        """Return the base itself, with the task's head; read anew, so that nobody holds it longer than needed."""
        made, setting = self.ready, self.ready.setting
        return made.base.model(made.task, seed=setting.seed, attention=setting.attention).to(made.device)

    def incubate(self, part: int) -> Shard:
        """Phase 2 of one part, or what is there of it."""
        if (found := self.kept(part)) is not None:
            return found
        standing = Shard.read(self.file(META))
        return train_part(
            self.plan,
            part,
            standing,
            lambda attached: self._train(attached, "incubate", f"part-{part}", score=False),
            self.file(part),
            seed=self.ready.setting.seed,
            identity=self._identity(part),
            device=self.ready.device,
            begin=beginnings(self.plan, part, self.stored(), standing.tensors) if self.distil else None,
        )

    def incubate_all(self) -> list[Shard]:
        """Phase 2 of all parts: side by side in processes of their own where there are threads for it."""
        parts, threads = range(1, self.plan.parts + 1), torch.get_num_threads()
        if self.ready.device.type != "cpu" or min(threads, len(parts)) == 1:
            out = []
            for part in parts:
                out.append(self.incubate(part))
                self.tell(told(out[-1]))
            return out
        # How many threads a part has must not depend on how many parts are left to do: it decides the last bits.
        each = max(1, threads // len(parts))
        jobs = [self.job(part, each) for part in parts if self.kept(part) is None]
        for outcome in Local(min(len(parts), threads // each)).run(jobs):
            if outcome.status != "done":
                kind = Refused if outcome.status == "refused" else RunFailed
                raise kind(f"{outcome.key} {outcome.status}: {outcome.reason} What is finished is kept.")
            self.tell(told(Shard.read(self.file(outcome.value["part"]))))
        return [Shard.read(self.file(part)) for part in parts]

    def tune(self, model: nn.Module) -> dict[str, Any]:
        """Phase 3, in place."""
        attached, before = _whole(model), snapshot(model)
        report = self._train(attached, "tune", "tune", score=True)
        proof = receipt(before, model, attached)
        assert_effect(proof)
        return {**report, "receipt": proof}

    def score(self, model: nn.Module) -> dict[str, Any]:
        """Return the task's metric on test rows, or on validation rows where there are no test rows."""
        split = "test" if "test" in self.ready.encoded else "validation"
        rows, task = self.ready.encoded[split], self.ready.task
        answers = answer(model.to(self.ready.device), rows, task, precision=self.ready.training.precision)
        return {"metric": task.metric, "mean": task.score(rows.labels.numpy(), answers.predictions), "split": split}

    def statistics(self, model: nn.Module, *, stand_ins: bool = False) -> list[dict[str, float]]:
        """Return mean and standard deviation of the states behind every part, over a few rows of train."""
        rows = self.ready.encoded["train"]
        batch = to_device(rows.collate(np.arange(min(PROBE, len(rows)))), self.ready.device)
        return statistics(model.to(self.ready.device), self.plan.path, ends(self.plan, stand_ins=stand_ins), batch)

    def tell(self, said: str) -> None:
        """Tell whoever listens how far the run is."""
        for callback in self.callbacks:
            if (method := getattr(callback, "phase", None)) is not None:
                method(said)


def _whole(model: nn.Module) -> Attached:
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    return attach_in_place(model, [n for n, _ in model.named_parameters()], matched={}, no_decay=flat)


def told(shard: Shard) -> str:
    """Say what training a part, or the meta network, took."""
    report = shard.report
    what = "meta network" if shard.part == META else f"part {shard.part}"
    loss = report["history"][-1]["train_loss"]
    said = f"{what}: {report['steps']:,} steps in {report['seconds']:.1f} s, train loss {loss:.4f}"
    if "score" in report:
        said += f", {report['score']['split']} {report['score']['metric']} {report['score']['mean']:.4f}"
    return said
