"""Zeroth-order steps in arms: on every tuner, in the loop and in Trainer, interrupted, by blocks, beside backprop."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import documents
from test_every_method import METHODS, home, setting
from torch import Tensor, nn
from transformers import TrainingArguments

from brickyard.core import brick as bricks
from brickyard.core import measure, registry, trial
from brickyard.core.answers import answer
from brickyard.core.arm import parse
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.batches import Order
from brickyard.core.build import build, resolve, step_of
from brickyard.core.errors import NoEffect, NotFinite, Refused, UnknownName, UsageError
from brickyard.core.loop import Backprop, State, Training, train
from brickyard.core.task import Task
from brickyard.core.trainer import ClosureTrainer
from brickyard.optim import zo
from brickyard.optim._zo_blocks import late, parts_of
from brickyard.optim._zo_optimizer import Rule, ZerothOrder

TASK = Task(kind="text-classification", metric="accuracy", labels=("a", "b", "c"), width=3, input="text")
# One row a record, each with another of the options that compose.
STEPS = {
    "zo-sgd": "full:lr=1e-3 + zo-sgd:direction=sphere",
    "zo-momentum": "lora:r=4,lr=1e-3 + zo-momentum:blocks=half,order=joint",
    "zo-sign": "linear-probe:lr=1e-2 + zo-sign:preset=released,estimator=one-point",
    "zo-conservative": "bitfit:lr=1e-2 + zo-conservative:blocks=block",
    "zo-adam": "lora:r=4,lr=1e-3 + zo-adam:q=2,sparsity=0.5,resample=4",
    "forward-grad": "full:lr=1e-3 + forward-grad:rule=adam,direction=rademacher",
}
REFUSED = {
    "dylora": "draws anew",
    "ce-ssl": "draws anew",
    "adalora": "works on gradients",
    "loca": "works on gradients",
    "hst": "batch norm",
    "idpt": "batch norm",
}


class Net(nn.Module):
    """Three layers that come in two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))  # noqa: E731
        self.blocks, self.drop, self.head = nn.ModuleList([block(), block()]), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        for block in self.blocks:
            x = x + block(x)
        return SimpleNamespace(logits=self.head(self.drop(x)))


class Rows:
    """Rows of eight numbers whose class can be learned; `broken` ones make the loss NaN."""

    def __init__(self, n: int = 64, broken: tuple[int, ...] = ()) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 8, generator=g)
        self.labels = self.x[:, :3].argmax(dim=1)
        self.x[list(broken)] = math.nan
        self.lengths, self.digest = np.full(n, 8), "rows"

    def __len__(self) -> int:
        return len(self.labels)

    def collate(self, index: np.ndarray) -> dict[str, Any]:
        rows = torch.as_tensor(np.asarray(index))
        return {"x": self.x[rows], "labels": self.labels[rows]}


def attached() -> Attached:
    net = Net()
    return attach_in_place(net, [n for n, _ in net.named_parameters()], matched={"all": ["head"]})


def maker(**options: Any) -> Any:
    return partial(zo.step, zo.Config(**options), rows=64, task=TASK)


BASIC = Training(lr=1e-2, steps=12, batch=16, schedule="constant", warmup=0.0)


def test_every_record_has_its_row() -> None:
    assert STEPS.keys() == {record.name for record in zo.RECORDS}


@pytest.mark.parametrize("name", STEPS)
def test_an_arm_trains_proves_reports_and_its_brick_answers_alike(name: str, text_base: Path, tmp_path: Path) -> None:
    asked = setting(STEPS[name], "text-classification", text_base)
    result = trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    assert result["receipt"]["moved"] and not result["receipt"]["not_finite"]
    told, steps = result["step"], result["steps"]
    assert told["updates_skipped"] == 0 and told["rule"] == ("adam" if name == "forward-grad" else name[3:])
    parts = 4 if name == "zo-momentum" else 1
    evaluated = {"zo-sgd": 2, "zo-sign": 2, "zo-adam": 4, "forward-grad": 1}
    if name in evaluated:
        assert told["losses_evaluated"] == evaluated[name] * steps and told["updates"] == steps
    else:
        assert told["losses_evaluated"] % steps == 0 and told["updates"] > steps * (parts > 1)
    assert told.get("sign") == ("scalar" if name == "zo-sign" else None)
    ready = trial.prepare(asked, ("train", "test"))
    again = answer(bricks.load(tmp_path / "brick").apply().model, ready.encoded["test"], ready.task).predictions
    kept = pq.read_table(tmp_path / "answers.parquet")["prediction"].to_numpy()
    np.testing.assert_allclose(again, kept, atol=1e-3)


def test_a_language_model_trains_with_its_last_block_by_backpropagation(causal_base: Path, tmp_path: Path) -> None:
    asked = trial.Setting(
        arm="full:lr=1e-4 + zo-sgd:first=1,first_lr=3e-3",
        base=str(causal_base),
        data=documents(),
        task="causal-lm",
        training={"epochs": 2, "batch": 4, "precision": "float32"},
        cache=False,
        device="cpu",
    )
    result = trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    losses = [point["train_loss"] for point in result["history"]]
    assert losses[-1] < losses[0] and result["step"]["first"] == 1


def test_clouds_of_points_are_refused(request: pytest.FixtureRequest) -> None:
    task, folder = home("p2p", request)
    with pytest.raises(Refused, match="this task is point-classification"):
        trial.prepare(setting(f"{METHODS['p2p']} + zo-sgd", task, folder), ("train",))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"p2p", "s2a"}))
def test_every_tuner_takes_a_step_or_says_why_not(name: str, request: pytest.FixtureRequest) -> None:
    task, folder = home(name, request)
    ready = trial.prepare(setting(f"{METHODS[name]} + zo-sgd", task, folder, training={"lr": 1e-2}), ("train",))
    made = build(ready.plan, ready.base, ready.task, seed=0)
    rows, _ = trial.examples(ready, made)
    before = [p.detach().clone() for p in made.parameters()]
    go = lambda: train(  # noqa: E731
        made,
        rows["train"],
        None,
        ready.task,
        replace(ready.training, steps=2),
        make_step=step_of(ready.plan, 96, ready.task),
        device="cpu",
    )
    if name in REFUSED:
        with pytest.raises(Refused, match=REFUSED[name]):
            go()
        return
    found = go()
    assert found.report["updates"] == 2 and all(p.grad is None for p in made.parameters())
    assert len(made.parameters()) != len(before) or any(
        not torch.equal(p, old) for p, old in zip(made.parameters(), before, strict=True)
    )


def test_what_a_record_fixes_is_no_option_of_it() -> None:
    assert "rule" not in registry.find("zo-adam").options and "beta" in registry.find("zo-adam").options
    assert registry.config("zo-adam", {"beta": 0.8}) == zo.Config(rule="adam", beta=0.8)
    assert registry.config("forward-grad", {}).estimator == "jvp"
    assert registry.config("zo-sign", {"preset": "released"}).sign == "scalar"
    assert registry.config("zo-sign", {}).sign == "elementwise"
    with pytest.raises(UnknownName, match="option of zo-sgd"):
        registry.config("zo-sgd", {"rule": "adam"})


@pytest.mark.parametrize(
    "bad",
    [
        {"eps": 0.0},
        {"q": 0},
        {"sparsity": 1.0},
        {"rule": "adamw"},
        {"blocks": "layer"},
        {"mask": "random"},
        {"beta": 1.0},
        {"first": -1},
        {"resample": 0},
    ],
)
def test_options_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        zo.Config(**bad)


@pytest.mark.parametrize(
    "options", [{"rule": "adam", "blocks": "block"}, {"rule": "momentum", "first": 1, "sparsity": 0.2, "resample": 5}]
)
@pytest.mark.parametrize("stop", [2, 7, 11])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop: int, options: dict) -> None:
    class Interrupt(Exception):
        pass

    class StopAt:
        def after_step(self, state: State) -> None:
            if state.step + 1 == stop:
                raise Interrupt

    training, make = replace(BASIC, checkpoint_every=3), maker(**options)
    whole, again = attached(), attached()
    expected = train(whole, Rows(), None, TASK, training, make_step=make, device="cpu")
    with pytest.raises(Interrupt):
        train(
            attached(),
            Rows(),
            None,
            TASK,
            training,
            folder=tmp_path,
            callbacks=[StopAt()],
            make_step=make,
            device="cpu",
        )
    torch.manual_seed(99)
    found = train(again, Rows(), None, TASK, training, folder=tmp_path, make_step=make, device="cpu")
    a, b = whole.tensors(), again.tensors()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert found.history == expected.history and found.report == expected.report


@pytest.mark.parametrize("options", [{}, {"rule": "adam", "estimator": "jvp", "q": 2}])
def test_the_trainer_of_transformers_gives_the_same_numbers(options: dict, text_base: Path, tmp_path: Path) -> None:
    ready = trial.prepare(setting("full:lr=1e-3,wd=0.01 + zo-sgd", "text-classification", text_base), ("train",))
    training, rows = replace(ready.training, schedule="linear", warmup=0.2), ready.encoded["train"]
    order = Order(rows.lengths, 16, seed=0, bucket=False)
    batches = [rows.collate(index) for k in range(2) for index in order.epoch(k)]
    ours, theirs = (build(ready.plan, ready.base, ready.task, seed=0) for _ in range(2))
    train(ours, rows, None, ready.task, training, make_step=maker(**options), device="cpu")

    class Ready(ClosureTrainer):
        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False, generator=torch.Generator())  # type: ignore[arg-type]

    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": len(batches),
        "learning_rate": training.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": math.ceil(training.warmup * len(batches)),
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    groups = [{"params": g["params"], "weight_decay": g.get("weight_decay", 0.01)} for g in theirs.parameter_groups]
    config = zo.Config(**options)
    optimiser = ZerothOrder(groups, lr=training.lr, q=config.q, estimator=config.estimator, rule=Rule(name=config.rule))
    made = lambda **changes: Ready(  # noqa: E731
        theirs,
        ready.task,
        args=TrainingArguments(**{**arguments, **changes}),
        train_dataset=batches,
        optimizers=(optimiser, None),  # type: ignore[arg-type]
    )
    with pytest.raises(UsageError, match="gradient_accumulation_steps=2"):
        made(gradient_accumulation_steps=2)
    with pytest.raises(UsageError, match="update"):
        Ready(theirs, ready.task, args=TrainingArguments(**arguments))
    made().train()
    a, b = ours.tensors(), theirs.tensors()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)
    assert optimiser.counts["steps"] == len(batches)


@pytest.mark.parametrize(
    "options", [{"rule": "adam"}, {"estimator": "jvp", "rule": "adam"}, {"rule": "sign", "sign": "scalar"}]
)
def test_it_learns(options: dict) -> None:
    made, rows = attached(), Rows()
    found = train(
        made,
        rows,
        None,
        TASK,
        replace(BASIC, lr=3e-2, steps=60, evaluate_every=10),
        make_step=maker(**options),
        device="cpu",
    )
    losses = [point["train_loss"] for point in found.history]
    assert losses[-1] < 0.75 * losses[0]


def test_learning_rate_zero_is_no_effect(text_base: Path, tmp_path: Path) -> None:
    asked = setting("linear-probe + zo-sgd:eps=1e-9", "text-classification", text_base, training={"lr": 0.0})
    with pytest.raises(NoEffect, match="no trainable tensor moved"):
        trial.run({"setting": asdict(asked), "folder": str(tmp_path)})


def test_the_late_part_is_backpropagation_s_and_the_graph_is_cut_before_it() -> None:
    """With lr=0 for the early part the late one ends where Backprop alone takes it, dropout off."""
    mixed, plain = attached(), attached()
    training = replace(BASIC, lr=0.0)
    train(mixed, Rows(), None, TASK, training, make_step=maker(first=1, first_lr=1e-2, eps=1e-6), device="cpu")
    plain.model.drop = nn.Identity()
    behind = {id(p) for p in late(plain.model, plain.parameters(), 1)}
    plain.parameter_groups = zo._only(plain.parameter_groups, behind, True)
    for p in plain.model.parameters():
        p.requires_grad_(id(p) in behind)
    train(plain, Rows(), None, TASK, replace(training, lr=1e-2), make_step=Backprop, device="cpu")
    a, b = mixed.tensors(), plain.tensors()
    assert not torch.equal(a["head.weight"], attached().tensors()["head.weight"])
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)
    assert all(p.requires_grad and p.grad is None for p in mixed.parameters())


def test_blocks_and_late_parameters_by_structure(text_base: Path) -> None:
    arms = {}
    for text in ("full", "lora:r=4"):
        ready = trial.prepare(setting(text, "text-classification", text_base), ("train",))
        made = build(ready.plan, ready.base, ready.task, seed=0)
        arms[text] = made
        every = made.parameters()
        for unit in ("block", "half", "leaf"):
            parts = parts_of(made.model, every, unit)
            assert sorted(id(p) for part in parts for p in part) == sorted(map(id, every))
    names = {id(p): name for name, p in arms["full"].model.named_parameters()}
    count = {u: len(parts_of(arms["full"].model, arms["full"].parameters(), u)) for u in ("block", "half", "leaf")}
    assert count["block"] == 4 and count["half"] == 6 and count["leaf"] > 12
    lora = parts_of(arms["lora:r=4"].model, arms["lora:r=4"].parameters(), "leaf")
    assert [len(part) for part in lora[:4]] == [2, 2, 2, 2]  # A and B of a layer are one part
    behind = {names[id(p)] for p in late(arms["full"].model, arms["full"].parameters(), 1)}
    assert all(".layer.1." in n or "pooler" in n or "classifier" in n for n in behind) and any(
        ".layer.1." in n for n in behind
    )
    with pytest.raises(Refused, match="has 2 repeated blocks"):
        late(arms["full"].model, arms["full"].parameters(), 3)
    with pytest.raises(Refused, match="to the zeroth-order step"):
        late(arms["lora:r=4"].model, arms["lora:r=4"].parameters(), 2)
    with pytest.raises(Refused, match="no repeated blocks"):
        parts_of(nn.Linear(2, 2), list(nn.Linear(2, 2).parameters()), "block")


def test_batch_norm_that_would_move_is_refused() -> None:
    net = Net()
    net.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))  # type: ignore[assignment]
    for names, refused in ((["head.0.weight", "head.1.weight"], True), (["head.1.weight"], False)):
        made = attach_in_place(net, names, matched={})
        if refused:
            with pytest.raises(Refused, match=r"head\.0 is a batch norm that trains"):
                train(made, Rows(), None, TASK, BASIC, make_step=maker(), device="cpu")
        else:
            train(made, Rows(), None, TASK, BASIC, make_step=maker(), device="cpu")
            assert not net.head[0].running_mean.any()  # type: ignore[index, union-attr]


def test_a_batch_whose_loss_is_no_number_is_skipped_and_told_unless_it_is_the_first() -> None:
    order = Order(Rows().lengths, 16, seed=0, bucket=False).epoch(0)
    found = train(
        attached(),
        Rows(broken=(int(order[2][0]),)),
        None,
        TASK,
        replace(BASIC, steps=4),
        make_step=maker(),
        device="cpu",
    )
    assert found.report["updates_skipped"] == 1 and found.report["updates"] == 3
    assert all(math.isfinite(point["train_loss"]) for point in found.history)
    with pytest.raises(NotFinite, match="first zeroth-order step"):
        train(attached(), Rows(broken=(int(order[0][0]),)), None, TASK, BASIC, make_step=maker(), device="cpu")


def test_the_cost_of_an_arm_is_counted_by_its_own_step(text_base: Path) -> None:
    costs = {}
    for step in ("zo-adam", "zo-sgd:first=1"):
        asked = setting(f"full + {step}", "text-classification", text_base)
        costs[step] = trial.probe({"setting": asdict(asked), "batches": 1})
    numbers = costs["zo-adam"]["trainable_parameters"]
    assert costs["zo-adam"]["saved_for_backward_bytes"] == costs["zo-adam"]["gradient_bytes"] == 0
    assert 8 * numbers <= costs["zo-adam"]["optimiser_bytes"] < 8 * numbers + 1000
    assert costs["zo-sgd:first=1"]["saved_for_backward_bytes"] > 0


@pytest.mark.parametrize("memory", ["halo", "s2a"])
def test_ways_to_run_the_layers_in_training_have_no_place_where_nothing_runs_backward(
    memory: str, text_base: Path
) -> None:
    for step in (*STEPS, "zo2"):
        with pytest.raises(Refused, match=f"{step} runs no backward pass.* Leave out {memory}"):
            resolve(parse(f"full + {memory} + {step}"), TASK)
    # The last block trains by backpropagation, and there they count.
    rows, found = {}, {}
    for arm in ("full + zo-sgd:first=1", f"full + {memory} + zo-sgd:first=1"):
        ready = trial.prepare(setting(arm, "text-classification", text_base, training={"lr": 1e-4}), ("train",))
        made = build(ready.plan, ready.base, ready.task, seed=0)
        rows[arm] = ready.encoded["train"]
        make = step_of(ready.plan, 96, ready.task)
        train(made, rows[arm], None, ready.task, replace(ready.training, steps=2), make_step=make, device="cpu")
        found[arm] = made.tensors()
    plain, coded = found.values()
    late_ones = [name for name in plain if ".layer.1." in name]
    assert late_ones and any(not torch.equal(plain[name], coded[name]) for name in late_ones)


def test_arms_with_two_steps_or_none_to_train_are_refused() -> None:
    with pytest.raises(Refused, match="both a step"):
        resolve(parse("full + zo-sgd + zo-adam"), TASK)
    with pytest.raises(Refused, match="trains nothing"):
        resolve(parse("zo-sgd"), TASK)


def test_the_memory_of_a_step_is_that_of_inference(text_base: Path) -> None:
    ready = trial.prepare(setting("lora:r=4 + zo-sgd", "text-classification", text_base), ("train",))
    made = build(ready.plan, ready.base, ready.task, seed=0)
    batch = ready.encoded["train"].collate(np.arange(64))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    made.model.eval()
    step = step_of(ready.plan, 96, ready.task)(made, ready.training)
    state = trial._bare_state(made, ready, torch.device("cpu"))
    step(state, [(1.0, batch)])
    with torch.no_grad():
        forward = measure.peak_bytes(lambda: made.model(**inputs)).bytes
    assert measure.peak_bytes(lambda: step(state, [(1.0, batch)])).bytes <= forward + 2**20
