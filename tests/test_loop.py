"""The training loop on a small model: schedules, accumulation, exact resume at any step, and what must stop it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_scheduler

from brickyard.core.answers import predict
from brickyard.core.arm import parse
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.errors import Changed, NotFinite, UsageError
from brickyard.core.loop import Backprop, State, Training, train, train_mode
from brickyard.core.task import Task, task_of

TASK = Task(kind="text-classification", metric="accuracy", labels=("a", "b", "c"), width=3, input="text")


class Rows:
    """Forty rows of eight numbers whose class can be learned."""

    def __init__(self, n: int = 40, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 8, generator=g)
        self.labels = (self.x[:, :3] + 0.3 * torch.randn(n, 3, generator=g)).argmax(dim=1)
        self.lengths = np.full(n, 8)
        self.digest = f"rows{seed}"

    def __len__(self) -> int:
        return len(self.labels)

    def collate(self, index: np.ndarray) -> dict:
        i = torch.as_tensor(np.asarray(index))
        return {"x": self.x[i], "labels": self.labels[i]}


class Net(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.body, self.norm, self.drop, self.head = (
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(dropout),
            nn.Linear(16, 3),
        )

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.drop(self.norm(self.body(x).relu()))))


def attached(dropout: float = 0.2, seed: int = 0) -> Attached:
    torch.manual_seed(seed)
    net = Net(dropout)
    return attach_in_place(net, [n for n, _ in net.named_parameters()], matched={"all": ["body"]})


def tensors(model: Attached) -> dict[str, torch.Tensor]:
    return model.tensors()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


BASIC = Training(lr=1e-2, epochs=4, batch=8, wd=0.01)


def test_learns_and_keeps_the_best_evaluated_weights() -> None:
    model, rows, held = attached(), Rows(), Rows(60, seed=1)
    done = train(model, rows, held, TASK, replace(BASIC, epochs=12), device="cpu")
    scores = [p["validation_score"] for p in done.history]
    assert max(scores) > 0.6 and scores[0] < max(scores)
    logits = predict(model.model, held)
    assert TASK.score(held.labels.numpy(), TASK.predict(logits)) == max(scores)
    best = max(done.history, key=lambda p: (p["validation_score"], -p["validation_loss"]))
    assert done.best_step == best["step"]


def test_the_learning_curve_counts_rows_and_not_steps_of_whole_batches() -> None:
    training = replace(BASIC, epochs=2, batch=len(Rows()) - 2)
    done = train(attached(), Rows(), Rows(20, seed=1), TASK, training, device="cpu")
    assert [point["examples"] for point in done.history] == [len(Rows()), 2 * len(Rows())] and done.steps == 4


def test_same_seed_same_numbers_and_another_seed_others() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = attached()
        train(model, Rows(), None, TASK, replace(BASIC, seed=seed), device="cpu")
        runs.append(tensors(model))
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


class Interrupt(Exception):
    pass


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: State) -> None:
        if state.step + 1 == self.step:
            raise Interrupt


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 7, 11, 16, 19])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop: int, accumulation: int) -> None:
    training = replace(BASIC, accumulation=accumulation, checkpoint_every=3, evaluate_every=4, patience=50)
    whole = attached()
    expected = train(whole, Rows(), Rows(20, seed=1), TASK, training, device="cpu")
    with pytest.raises(Interrupt):
        train(
            attached(),
            Rows(),
            Rows(20, seed=1),
            TASK,
            training,
            folder=tmp_path,
            callbacks=[StopAt(stop)],
            device="cpu",
        )
    torch.manual_seed(999)  # whatever the new process drew before must not matter
    again = attached(seed=5 if stop > 3 else 0)  # from the first checkpoint on, all that counts lies in it
    found = train(again, Rows(), Rows(20, seed=1), TASK, training, folder=tmp_path, device="cpu")
    assert equal(tensors(whole), tensors(again))
    assert found.history == expected.history and found.best_step == expected.best_step


def test_time_before_an_interruption_counts_and_the_pause_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def tick(state: State) -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr("brickyard.core.loop.time.monotonic", lambda: now)
    training = replace(BASIC, epochs=1, checkpoint_every=3, evaluate_every=100)
    counted = SimpleNamespace(after_step=tick)
    total = training.total_steps(len(Rows()))
    whole = train(attached(), Rows(), None, TASK, training, callbacks=[counted], device="cpu")
    assert whole.seconds == 2.0 * total
    with pytest.raises(Interrupt):
        train(attached(), Rows(), None, TASK, training, folder=tmp_path, callbacks=[counted, StopAt(4)], device="cpu")
    now += 1000.0
    found = train(attached(), Rows(), None, TASK, training, folder=tmp_path, callbacks=[counted], device="cpu")
    assert found.seconds == whole.seconds


def test_a_checkpoint_that_was_not_finished_is_ignored(tmp_path: Path) -> None:
    training = replace(BASIC, checkpoint_every=3)
    with pytest.raises(Interrupt):
        train(attached(), Rows(), None, TASK, training, folder=tmp_path, callbacks=[StopAt(8)], device="cpu")
    (tmp_path / "step-18").mkdir()
    (tmp_path / "step-18" / "tensors.safetensors").write_bytes(b"half")
    whole, again = attached(), attached()
    train(whole, Rows(), None, TASK, training, device="cpu")
    train(again, Rows(), None, TASK, training, folder=tmp_path, device="cpu")
    assert equal(tensors(whole), tensors(again))


def test_resume_with_other_settings_or_data_is_refused_and_lists_them(tmp_path: Path) -> None:
    training = replace(BASIC, checkpoint_every=3)
    with pytest.raises(Interrupt):
        train(attached(), Rows(), None, TASK, training, folder=tmp_path, callbacks=[StopAt(8)], device="cpu")
    with pytest.raises(Changed, match=r"training\.lr: was 0\.01, now 0\.02.*--allow-change training\.lr"):
        train(attached(), Rows(), None, TASK, replace(training, lr=0.02), folder=tmp_path, device="cpu")
    with pytest.raises(Changed, match="data: was 'rows0', now 'rows7'"):
        train(attached(), Rows(seed=7), None, TASK, training, folder=tmp_path, device="cpu")
    train(
        attached(),
        Rows(),
        None,
        TASK,
        replace(training, lr=0.02),
        folder=tmp_path,
        allow_change=["training.lr"],
        device="cpu",
    )


def test_a_flipped_bit_in_a_checkpoint_is_caught(tmp_path: Path) -> None:
    training = replace(BASIC, checkpoint_every=3)
    with pytest.raises(Interrupt):
        train(attached(), Rows(), None, TASK, training, folder=tmp_path, callbacks=[StopAt(8)], device="cpu")
    path = next(tmp_path.glob("step-*")) / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"tensors\.safetensors"):
        train(attached(), Rows(), None, TASK, training, folder=tmp_path, device="cpu")


def test_accumulation_gives_the_update_of_the_whole_batch() -> None:
    runs = []
    for accumulation in (1, 4):
        model = attached(dropout=0.0)
        model.model.norm = nn.Identity()  # batch statistics do see the micro-batch
        model = attach_in_place(model.model, [n for n, _ in model.model.named_parameters()], matched={})
        train(model, Rows(), None, TASK, replace(BASIC, accumulation=accumulation), device="cpu")
        runs.append(tensors(model))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["instruct", "preference"])
def test_a_micro_batch_weighs_what_the_loss_is_a_mean_over(causal_base: Path, kind: str) -> None:
    rows = {"prompt": ["good film", "the plot", "a", "the"], "completion": ["fine", "dull " * 30, "great film", "bad"]}
    if kind == "preference":
        rows = {"prompt": rows["prompt"], "chosen": rows["completion"], "rejected": ["poor"] * 4}
    task = task_of(read_data({"train": rows}, need=("train",)))
    base, runs, losses = open_base(str(causal_base)), [], []
    for accumulation in (1, 4):
        made = build(resolve(parse("full + dpo" if kind == "preference" else "full"), task), base, task, seed=0)
        training = Training(lr=1e-3, batch=4, steps=1, warmup=0.0, accumulation=accumulation, clip=0.0)
        encoded = encode(read_data({"train": rows}, need=("train",)).splits["train"], base, task)
        losses.append(train(made, encoded, None, task, training, device="cpu").history[-1]["train_loss"])
        runs.append(tensors(made))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_schedules_are_those_of_transformers(schedule: str, warmup: float) -> None:
    total, training = 37, replace(BASIC, schedule=schedule, warmup=warmup)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    steps = int(np.ceil(warmup * total))
    reference = get_scheduler(name, optimiser, num_warmup_steps=steps, num_training_steps=total)
    for step in range(total):
        assert training.factor(step, total) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-9)
        optimiser.step()
        reference.step()


class Poison:
    """Makes the gradient of one tensor NaN at one step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def begin(self, state: State) -> None:
        model = state.attached.model
        if self.what == "gradient":
            model.body.weight.register_hook(lambda g: g * float("nan") if state.step == 3 else g)
        else:
            model.register_forward_hook(
                lambda m, i, o: SimpleNamespace(logits=o.logits * (float("inf") if state.step == 3 else 1))
            )


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_the_first_nan_stops_the_run_and_is_named(what: str) -> None:
    expected = (
        r"gradient of body\.weight is not finite at step 4, rows \["
        if what == "gradient"
        else r"loss is \w+ at step 4, rows \["
    )
    with pytest.raises(NotFinite, match=expected):
        train(attached(), Rows(), None, TASK, BASIC, callbacks=[Poison(what)], device="cpu")


def test_weights_that_have_not_moved_are_no_outcome() -> None:
    """Training on shuffled labels only gets worse, so the start would be kept, as the first warm-up step leaves it."""
    rows, held = Rows(), Rows(60, seed=1)
    model = attached()
    train(model, rows, None, TASK, replace(BASIC, epochs=12), device="cpu")
    learned = model.tensors()
    rows.labels = rows.labels[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    again = attach_in_place(model.model, [n for n in learned], matched={"all": ["body"]})
    done = train(again, rows, held, TASK, replace(BASIC, steps=20, warmup=0.1, evaluate_every=1), device="cpu")
    assert done.history[0]["validation_score"] == max(p["validation_score"] for p in done.history)
    assert done.best_step > 1 and not torch.equal(again.tensors()["head.weight"], learned["head.weight"])


def test_patience_stops_early() -> None:
    model = attach_in_place(Net(), ["head.weight", "head.bias"], matched={})  # nothing moves at lr 0
    done = train(model, Rows(), Rows(20, seed=1), TASK, replace(BASIC, lr=0.0, epochs=30, patience=2), device="cpu")
    assert done.steps == 15 and "2 evaluations" in done.stopped


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    net = Net()
    model = attach_in_place(net, ["head.weight", "head.bias"], matched={})
    before = net.norm.running_mean.clone()
    train(model, Rows(), None, TASK, BASIC, device="cpu")
    assert torch.equal(net.norm.running_mean, before)
    train_mode(net)
    assert not net.norm.training and net.drop.training


def test_undo_restores_every_bit_batch_statistics_included() -> None:
    model = attached()
    before = {k: v.clone() for k, v in model.model.state_dict().items() if "num_batches" not in k}
    train(model, Rows(), None, TASK, BASIC, device="cpu")
    assert not torch.equal(model.model.norm.running_mean, before["norm.running_mean"])
    after = model.detach().state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize(
    "bad", [{"lr": -1}, {"batch": 0}, {"accumulation": 9}, {"warmup": 1.0}, {"lr": float("nan")}, {"epochs": 0}]
)
def test_training_settings_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        replace(BASIC, **bad)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UsageError, match="no trainable parameter"):
        train(attach_in_place(Net(), [], matched={}), Rows(), None, TASK, BASIC, device="cpu")


def test_checkpoints_hold_no_more_than_the_newest(tmp_path: Path) -> None:
    train(attached(), Rows(), None, TASK, replace(BASIC, checkpoint_every=3), folder=tmp_path, device="cpu")
    kept = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert kept == ["step-18"]
    assert json.loads((tmp_path / "step-18" / "state.json").read_text())["step"] == 18


class Alternating:
    """Every other batch is empty."""

    def epoch(self, k: int) -> list[np.ndarray]:
        return [np.arange(8) if i % 2 else np.empty(0, dtype=np.int64) for i in range(5)]


class Counting(Backprop):
    """A step with a sampler of its own that says how many batches it saw, and how many of them held no row."""

    def __init__(self, attached: Attached, training: Training) -> None:
        super().__init__(attached, training)
        self.seen, self.empty = 0, 0

    def sampler(self, lengths: np.ndarray, training: Training) -> Alternating:  # type: ignore[override]
        return Alternating()

    def __call__(self, state: State, batches: list) -> float:
        self.seen, self.empty = self.seen + 1, self.empty + (not batches)
        return super().__call__(state, batches) if batches else 0.0

    def report(self) -> dict:
        return {"seen": self.seen, "empty": self.empty}


def test_a_step_may_bring_its_sampler_and_is_called_for_empty_batches() -> None:
    made = attached()
    found = train(made, Rows(), None, TASK, Training(steps=7, batch=8), make_step=Counting, device="cpu")
    assert found.steps == 7 and found.report == {"seen": 7, "empty": 4}
    assert train(attached(), Rows(), None, TASK, Training(steps=2, batch=8), device="cpu").report == {}
