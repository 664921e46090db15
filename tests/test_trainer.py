"""Our arms inside transformers.Trainer: the same numbers as in our own loop, what is cut in training included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import asked, text_data
from transformers import TrainingArguments

from brickyard.core import trial
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.batches import Order, encode
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.errors import UsageError
from brickyard.core.loop import Training, train
from brickyard.core.task import task_of
from brickyard.core.trainer import ArmTrainer, TrainersTraining
from brickyard.tune import dsee
from brickyard.tune.sora import Sparsifier

ADALORA = "adalora:init_r=4,target_r=2,every=2,target=[query,key,value,out,up,down]"
SORA = "sora:r=4,k=0.12,compact=2"
DSEE = "dsee:r=2,n_sparse=8,heads=0.5,neurons=0.5"


def ready(base: Path, arm: str, **training: object) -> trial.Prepared:
    known = {"epochs": 2, "precision": "float32", "batch": 16, "lr": 5e-3, "clip": 1.0, **training}
    return trial.prepare(
        trial.Setting(arm=arm, base=str(base), data=text_data(), training=known, cache=False, device="cpu")
    )


def in_trainer(known: trial.Prepared, folder: Path, **changes: Any) -> Attached:
    """Train the arm in Trainer on the batches of our loop, in their order, with the same settings."""
    made = build(known.plan, known.base, known.task, seed=0)
    order = Order(known.encoded["train"].lengths, 16, seed=0, bucket=False)
    batches = [known.encoded["train"].collate(rows) for k in range(2) for rows in order.epoch(k)]

    class Ready(ArmTrainer):
        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False, generator=torch.Generator())  # type: ignore[arg-type]

    settings = {
        "max_steps": len(batches),
        "learning_rate": known.training.lr,
        "weight_decay": known.training.wd,
        "max_grad_norm": known.training.clip,
        "lr_scheduler_type": "linear",
        "warmup_steps": int(np.ceil(known.training.warmup * len(batches))),
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **changes})
    trainer = Ready(made, known.task, args=arguments, train_dataset=batches)  # type: ignore[arg-type]
    torch.manual_seed(0)
    trainer.train()
    return made


def same(a: Attached, b: Attached) -> None:
    ours, theirs = a.tensors(), b.tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-6, msg=name)


def in_loop(known: trial.Prepared) -> Attached:
    made = build(known.plan, known.base, known.task, seed=0)
    train(made, known.encoded["train"], None, known.task, known.training, device="cpu")
    return made


@pytest.mark.parametrize("arm", ["lora:r=4,dropout=0.1", "full", ADALORA, SORA, DSEE])
def test_the_trainer_of_transformers_gives_the_same_numbers(
    arm: str, text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batches, schedule and seed: the same weights after training, to rounding."""
    cuts = []
    for module, name in ((dsee, "take"), (Sparsifier, "cut")):
        plain = getattr(module, name)

        def counted(*given: Any, plain: Any = plain) -> Any:
            cuts.append(given[-1])
            return plain(*given)

        monkeypatch.setattr(module, name, counted)
    known = ready(text_base, arm)
    ours = in_loop(known)
    here = len(cuts)
    theirs = in_trainer(known, tmp_path)
    same(ours, theirs)
    assert len(cuts) == 2 * here and bool(cuts) == (arm in (SORA, DSEE))
    assert all(isinstance(optimiser, torch.optim.AdamW) for optimiser in cuts), "moments are cut along"


@pytest.mark.parametrize(
    ("options", "schedule", "warmup"),
    [("k=0.12", "constant", 0.0), ("k=0.12", "cosine", 0.2), ("schedule=[0.05,0.1]", "linear", 0.2)],
)
def test_soras_threshold_follows_the_learning_rate_of_trainer(
    options: str, schedule: str, warmup: float, text_base: Path, tmp_path: Path
) -> None:
    known = ready(text_base, f"sora:r=4,{options}", schedule=schedule, warmup=warmup)
    steps = known.training.total_steps(len(known.encoded["train"]))
    theirs = in_trainer(
        known, tmp_path, lr_scheduler_type=schedule, warmup_steps=int(np.ceil(warmup * steps)), max_steps=steps
    )
    same(in_loop(known), theirs)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warm", [0, 1, 7, 0.3])
def test_trainers_arguments_are_read_as_ours(kind: str, warm: float, tmp_path: Path) -> None:
    from transformers import get_scheduler

    total = 23
    args = TrainingArguments(
        str(tmp_path), lr_scheduler_type=kind, warmup_steps=warm, gradient_accumulation_steps=2, max_grad_norm=0.1
    )
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    scheduler = get_scheduler(kind, optimiser, args.get_warmup_steps(total), total)
    found = TrainersTraining.of(args, total, scheduler)
    assert (found.clip, found.accumulation, found.batch, found.steps) == (0.1, 2, 2 * args.train_batch_size, total)
    for step in range(total):  # from our own words alone, without the scheduler
        assert found.factor(step, total) == pytest.approx(Training.factor(found, step, total), abs=1e-12)


def test_a_schedule_that_depends_on_scores_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    found = TrainersTraining.of(
        TrainingArguments(str(tmp_path)), 10, torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser)
    )
    with pytest.raises(UsageError, match="ReduceLROnPlateau"):
        found.factor(0, 10)


def test_an_objective_is_what_trainer_trains(causal_base: Path, tmp_path: Path) -> None:
    data = asked("preference", train=16)
    base = open_base(str(causal_base))
    task = task_of(read_data(data))
    made = build(resolve(parse("lora + tdpo"), task), base, task, seed=0)
    rows = encode(read_data(data).splits["train"], base, task)
    trainer = ArmTrainer(made, task, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    loss = trainer.compute_loss(made.model, rows.collate(np.arange(16)))
    assert loss.item() == pytest.approx(np.log(2), abs=1e-5), "before the first step no answer is preferred"
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())
