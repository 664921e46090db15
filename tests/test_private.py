"""Private steps: gradients of rows against autograd's and Opacus's, sampling, noise, resume, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core import registry, trial
from brickyard.core.arm import parse
from brickyard.core.attached import Attached, attach_in_place
from brickyard.core.build import resolve
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.loop import State, Training, train
from brickyard.core.privacy import Mechanism, compose, epsilon_of
from brickyard.core.spent import PLANNED
from brickyard.core.task import Task
from brickyard.private import _step
from brickyard.private._engines import Hooked, RowByRow, Vectorised, choose
from brickyard.private._per_sample import Lookup, Made, Outer, cheaper, clip_factors, together
from brickyard.private._step import Poisson, PrivateStep

TASK = Task("text-classification", "accuracy", ("a", "b", "c"), 3, "text")


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), st.integers(0, 99)
)
def test_terms_agree_with_gradients_that_were_made(b: int, t: int, p: int, d: int, r: int, seed: int) -> None:
    left, right, c = tensor(b, t, p, seed=seed), tensor(b, t, d, seed=seed + 1), tensor(b, seed=seed + 2).abs()
    ids = torch.randint(p, (b, t), generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(b)[:, None].expand(b, t)
    table = torch.zeros(b, p, d).index_put_((rows, ids), right, accumulate=True)
    brute = torch.einsum("btp,btd->bpd", left, right)
    l_PR, r_RD = tensor(p, r, seed=seed + 3), tensor(r, d, seed=seed + 4)
    for term, made in (
        (Outer(left, right), brute),
        (cheaper(Outer(left, right)), brute),
        (Lookup(right, ids, p), table),
    ):
        torch.testing.assert_close(term.made(), made, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(term.squares(), made.square().sum((1, 2)), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(term.weighted(c), torch.einsum("b,bpd->pd", c, made), atol=1e-4, rtol=1e-4)
        for found, expected in zip(term.through(l_PR, r_RD), (made @ r_RD.mT, l_PR.mT @ made), strict=True):
            torch.testing.assert_close(found.made(), expected, atol=1e-3, rtol=1e-3)
    twice = together([Outer(left, right), Outer(2 * left, right)])
    torch.testing.assert_close(twice.squares(), (3 * brute).square().sum((1, 2)), atol=1e-2, rtol=1e-3)
    mixed = together([Lookup(right, ids, p), Made(brute)])
    torch.testing.assert_close(mixed.made(), table + brute, atol=1e-4, rtol=1e-4)


def test_a_ghost_norm_is_never_smaller_than_the_gradients_own() -> None:
    """Terms that cancel leave rounding errors; the norm that clipping uses lies above them."""
    left, right = tensor(64, 40, 30), tensor(64, 40, 30, seed=1)
    left = torch.cat([left, -left + 1e-4 * tensor(64, 40, 30, seed=2)], 1)
    term = Outer(left, torch.cat([right, right], 1))
    exact = torch.einsum("btp,btd->bpd", term.left_BTP.double(), term.right_BTD.double()).square().sum((1, 2))
    assert (term.squares().double() >= exact * (1 - 1e-6)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_no_row_exceeds_the_clipping_norm(b: int, clip: float, seed: int) -> None:
    gradient = tensor(b, 7, seed=seed) * torch.logspace(-6, 6, b)[:, None]
    norm = gradient.norm(dim=1)
    clipped = (clip_factors(norm, clip)[:, None] * gradient).norm(dim=1)
    assert (clipped <= clip * (1 + 1e-6)).all()
    kept = norm <= clip
    torch.testing.assert_close(clipped[kept], norm[kept])
    assert (clip_factors(torch.zeros(2), clip) == 1).all() and (clip_factors(norm, math.inf) == 1).all()


class Net(nn.Module):
    """Positions shared by all rows, a table with padding, one layer used twice, a norm, a convolution, a drop-out."""

    def __init__(self, *, alone: bool = False, mixing: bool = False, twice: bool = True) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(6, 8)
        self.body, self.norm, self.convolution = nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 3, padding=1)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8)) if alone else None
        self.mixing, self.twice = mixing, twice

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.table(input_ids) + self.places(torch.arange(input_ids.shape[1])[None])
        for _ in range(1 + self.twice):
            x = self.norm(self.drop(self.body(x)).tanh() + x)
        x = self.convolution(x.mT).mT
        if self.scale is not None:
            x = x * self.scale
        if self.mixing:
            x = x - x.mean(0, keepdim=True)
        return SimpleNamespace(logits=self.head(x.mean(1)))


class Rows:
    """Forty rows of six tokens whose class can be learned."""

    def __init__(self, n: int = 40, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(11, (n, 6), generator=g)
        self.labels = ((self.ids > 5).sum(1) // 2).clamp_max(2)
        self.lengths, self.digest = np.full(n, 6), f"rows{seed}"

    def __len__(self) -> int:
        return len(self.labels)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        i = torch.as_tensor(np.asarray(index))
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def attached(**options: bool) -> Attached:
    torch.manual_seed(0)
    net = Net(**options)
    return attach_in_place(net, [n for n, _ in net.named_parameters()], matched={"all": ["body"]})


def losses(call: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    return TASK.losses(call(input_ids=inputs["input_ids"]).logits, inputs["labels"])


@pytest.mark.parametrize("kind", [Hooked, Vectorised, RowByRow])
def test_every_engine_gives_what_autograd_gives_row_by_row(kind: Any) -> None:
    net = attached().model.eval()
    named = dict(net.named_parameters())
    inputs = Rows(9).collate(np.arange(9))
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    _, norms = kind(net, named).add(losses, inputs, lambda norm: clip_factors(norm, 0.7), sums)
    expected = {name: torch.zeros_like(p) for name, p in named.items()}
    for row in range(9):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        found = torch.autograd.grad(losses(net, one).sum(), list(named.values()))
        norm = torch.cat([g.flatten() for g in found]).norm()
        assert norms[row].item() == pytest.approx(norm.item(), rel=1e-4)
        for name, g in zip(named, found, strict=True):
            expected[name] += g * min(1.0, 0.7 / norm.item())
    for name in named:
        torch.testing.assert_close(sums[name], expected[name], atol=2e-5, rtol=1e-3)
    assert all(p.requires_grad and p.grad is None for p in named.values())


@pytest.mark.filterwarnings("ignore")
def test_opacus_finds_the_same_clipped_sums() -> None:
    """An independent implementation, on layers that it knows."""
    opacus = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    ids, labels = torch.randint(11, (12, 5)), torch.randint(3, (12, 5))

    def rows(call: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(call(inputs["ids"]).flatten(0, 1), inputs["labels"].flatten(), reduction="none").view(
            len(inputs["labels"]), -1
        ).sum(1)  # fmt: skip

    inputs = {"ids": ids, "labels": labels}
    named = dict(net.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    _, norms = Hooked(net, named).add(rows, inputs, lambda norm: clip_factors(norm, 1.0), sums)
    theirs = opacus.GradSampleModule(net, loss_reduction="sum")
    rows(theirs, inputs).sum().backward()
    gradients = {name.removeprefix("_module."): p.grad_sample for name, p in theirs.named_parameters()}
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    torch.testing.assert_close(norms, norm, rtol=1e-4, atol=1e-5)
    for name, g in gradients.items():
        clipped = torch.tensordot(clip_factors(norm, 1.0), g, dims=1)
        torch.testing.assert_close(sums[name], clipped, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, Hooked), ({"alone": True}, Vectorised), ({"mixing": True}, Vectorised)],
)
def test_an_engine_that_would_be_wrong_is_not_chosen(options: dict[str, bool], expected: type) -> None:
    """Parameters without a layer, and layers that mix rows: there the rules would give wrong norms in silence."""
    net = attached(**options).model.train()
    named = dict(net.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    state = torch.get_rng_state()
    assert type(choose(net, named, losses, Rows(2).collate(np.arange(2)))) is expected
    assert all(torch.equal(before[name], p) for name, p in named.items()) and net.training and net.drop.training
    assert torch.equal(state, torch.get_rng_state())


def test_control_flow_on_values_leaves_row_by_row() -> None:
    class Branching(Net):
        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            return super().forward(input_ids) if input_ids.sum() > 0 else super().forward(input_ids + 1)

    net = Branching(alone=True)
    assert type(choose(net, dict(net.named_parameters()), losses, Rows(2).collate(np.arange(2)))) is RowByRow


BASIC = Training(lr=1e-2, steps=6, batch=8, precision="float32", warmup=0.0, schedule="constant")


def private(made: Attached, training: Training, *, noise: float = 1.0, **options: Any) -> PrivateStep:
    given = {"clip": 1.0, "delta": 1e-5, "microbatch": 5, "keep": "last", **options}
    return PrivateStep(made, training, rows=40, task=TASK, noise_for=lambda rate, steps: noise, **given)


def run(made: Attached, training: Training = BASIC, **options: Any) -> tuple[Any, PrivateStep]:
    steps: list[PrivateStep] = []

    def make(a: Attached, t: Training) -> PrivateStep:
        steps.append(private(a, t, **options))
        return steps[-1]

    return train(made, Rows(), None, TASK, training, make_step=make, device="cpu"), steps[0]


class Fixed:
    """The batches of a test in place of random ones."""

    def __init__(self, *batches: list[int]) -> None:
        self.batches = [np.array(batch, dtype=np.int64) for batch in batches]

    def epoch(self, k: int) -> list[np.ndarray]:
        return self.batches


def test_without_noise_and_clipping_it_is_the_ordinary_step(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Fixed(*(list(range(i, i + 8)) for i in range(0, 40, 8)))
    monkeypatch.setattr(PrivateStep, "sampler", lambda self, lengths, training: batches)
    monkeypatch.setattr("brickyard.core.loop.Order", lambda *args, **options: batches)
    made, plain = attached(), attached()
    for a in (made, plain):
        a.model.drop.p = 0.0
    run(made, noise=0.0, clip=math.inf)
    train(plain, Rows(), None, TASK, replace(BASIC, clip=0.0), device="cpu")
    for name, found in made.tensors().items():
        torch.testing.assert_close(found, plain.tensors()[name], atol=1e-5, rtol=1e-4)


def test_an_empty_batch_adds_noise_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateStep, "sampler", lambda self, lengths, training: Fixed([], [], [], [], []))
    made = attached()
    before = made.tensors()
    done, step = run(made)
    found = step.report()["privacy"]
    assert done.steps == found["steps"] == 6
    assert all(not torch.equal(before[name], t) for name, t in made.tensors().items())
    quiet = attached()
    run(quiet, noise=0.0)
    assert all(torch.equal(before[name], t) for name, t in quiet.tensors().items())


def test_noise_has_the_clipping_norms_size_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every number: sigma C over the expected batch, not over the rows that were drawn."""
    grads: list[Tensor] = []

    class Watch:
        def before_step(self, state: State) -> None:
            grads.append(torch.cat([p.grad.flatten() for p in state.attached.parameters()]))

    for batch in ([], [0]):
        grads.clear()
        monkeypatch.setattr(PrivateStep, "sampler", lambda self, lengths, training, b=batch: Fixed(*[b] * 5))
        made = attached()
        made.callbacks = (Watch(),)
        run(made, replace(BASIC, steps=5), noise=3.0, clip=0.5)
        spread = torch.cat(grads).std().item()
        assert spread == pytest.approx(3.0 * 0.5 / 8, rel=0.08)
        assert not torch.equal(grads[0], grads[1])


def test_noise_and_batches_do_not_come_from_the_seed() -> None:
    """Two runs with one seed differ; who knows the seed must not be able to take the noise off."""
    found = []
    for _ in range(2):
        made = attached()
        run(made, replace(BASIC, seed=3))
        found.append(made.tensors())
    assert all(not torch.equal(found[0][k], found[1][k]) for k in found[0])
    first, second = (Poisson(1000, 0.1).epoch(0) for _ in range(2))
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_take_each_row_by_itself() -> None:
    sizes, hits, pairs = [], np.zeros(50), 0
    for batch in (b for k in range(100) for b in Poisson(50, 0.1).epoch(k)):
        sizes.append(len(batch))
        hits[batch] += 1
        pairs += {3, 4} <= set(batch.tolist())
        assert (np.diff(batch) > 0).all()
    assert len(sizes) == 1000 and min(sizes) <= 1 and np.var(sizes) == pytest.approx(50 * 0.1 * 0.9, rel=0.2)
    assert (abs(hits - 100) < 55).all() and pairs < 35  # a shuffle would give each row exactly 100
    assert any(len(b) == 0 for b in Poisson(3, 0.01).epoch(0))


def test_microbatches_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateStep, "sampler", lambda self, lengths, training: Fixed(list(range(23))))
    found = []
    for microbatch, accumulation in ((64, 1), (1, 1), (7, 3)):
        made = attached()
        made.model.drop.p = 0.0
        run(made, replace(BASIC, steps=1, accumulation=accumulation), noise=0.0, microbatch=microbatch)
        found.append(made.tensors())
    for other in found[1:]:
        for name, tensor_found in other.items():
            torch.testing.assert_close(tensor_found, found[0][name], atol=2e-4, rtol=1e-3)


class Interrupt(Exception):
    pass


def test_a_resumed_run_goes_on_with_its_account(tmp_path: Path) -> None:
    class Stop:
        def after_step(self, state: State) -> None:
            if state.step == 3:
                raise Interrupt

    steps: list[PrivateStep] = []
    training = replace(BASIC, checkpoint_every=2)

    def go(noise: float, *callbacks: Any, allow: tuple[str, ...] = ()) -> PrivateStep:
        make = lambda a, t: steps.append(private(a, t, noise=noise)) or steps[-1]  # noqa: E731
        train(
            attached(), Rows(), None, TASK, training, folder=tmp_path, callbacks=callbacks, make_step=make, device="cpu"
        )
        return steps[-1]

    with pytest.raises(Interrupt):
        go(1.0, Stop())
    assert next(p.name for p in tmp_path.glob("step-*")) == "step-2"
    # Resumed with more noise, what the first steps spent stays spent.
    found = go(2.0).report()["privacy"]
    assert found["steps"] == 6 and found["epsilon"] > epsilon_of([Mechanism(2.0, 0.2, 6)], 1e-5)
    expected = epsilon_of([Mechanism(1.0, 0.2, 2), Mechanism(2.0, 0.2, 4)], 1e-5)
    assert found["epsilon"] == pytest.approx(expected) and found["estimate"]["epsilon"] is None
    again = private(attached(), training, noise=2.0)
    again.load_state_dict(steps[-1].state_dict())
    assert again.report() == {"privacy": {**steps[-1].report()["privacy"], "per_sample_gradients": None}}
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in steps[-1].state_dict().items())


def test_the_last_weights_are_kept_unless_validation_is_public() -> None:
    assert [_step.LastWeights().ready(State(*[None] * 3, 6, None, step=k)) for k in (1, 5, 6)] == [False, False, True]  # type: ignore[arg-type]
    held = Rows(30, seed=1)
    for keep, kept in (("last", 40), ("best", None)):
        made = attached()
        make = lambda a, t, keep=keep: private(a, t, noise=5.0, keep=keep)  # noqa: E731
        done = train(made, Rows(), held, TASK, replace(BASIC, steps=40, evaluate_every=1), make_step=make, device="cpu")
        best = max(done.history, key=lambda p: (p["validation_score"], -p["validation_loss"]))["step"]
        assert done.best_step == (kept or best)


@pytest.mark.parametrize(
    ("arm", "training", "expected", "message"),
    [
        ("lora:r=4 + dp", {"batch": 500}, UsageError, "more than the 96 rows"),
        ("lora:r=4 + dp:delta=0.02", {}, UsageError, "1/n"),
        ("lora:r=4 + dp:epsilon=0", {}, UsageError, "above 0"),
        ("lora:r=4 + dp:epsilon=0.1,delta=1e-15", {}, UsageError, "cannot be reached"),
        ("lora:r=4 + dp:clip=0.0", {}, UsageError, "clip"),
        ("lora:r=4 + dp:microbatch=0", {}, UsageError, "microbatch"),
        ("lora:r=4 + dp", {"patience": 2}, UsageError, "keep=best"),
        ("lora:r=4 + dp + s2a:group=16", {}, Refused, "save memory"),
        ("lora:r=4 + dp + curriculum:by=random,min_size=16", {}, Refused, "curriculum"),
        ("telly:k=-1 + dp", {}, Refused, "does not cover"),
        ("adalora:init_r=4,target_r=2,every=2 + dp", {}, Refused, "no row's own"),
        ("dp", {}, Refused, "beside a tuner"),
    ],
)
def test_what_cannot_be_private_is_refused_with_the_fix(
    arm: str, training: dict[str, Any], expected: type[Exception], message: str, text_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(expected, match=message):
        trial.tune(trial.prepare(setting(arm, text_base, **training)), tmp_path / "run")


def setting(arm: str, base: Path, **training: Any) -> trial.Setting:
    given = {"steps": 3, "batch": 16, "precision": "float32", **training}
    return trial.Setting(arm=arm, base=str(base), data=text_data(), training=given, cache=False, device="cpu")


def test_batch_norms_are_refused_unless_frozen() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    every = [name for name, _ in net.named_parameters()]
    with pytest.raises(Refused, match="batch norm"):
        private(attach_in_place(net, every, matched={}), BASIC)
    private(attach_in_place(net, ["0.weight"], matched={}), BASIC)


def test_a_row_without_a_finite_gradient_stops_the_run() -> None:
    made = attached()
    with torch.no_grad():
        made.model.head.weight[0, 0] = torch.inf
    with pytest.raises(NotFinite, match="of train"):
        run(made, replace(BASIC, batch=40))


@pytest.mark.parametrize("arm", ["lora:r=4 + dp", "full + dp", "linear-probe + dp", "mos:r=3,e=2,p=1,l=2 + dp"])
def test_private_arms_leave_bricks_that_say_what_they_cost(arm: str, text_base: Path, tmp_path: Path) -> None:
    asked = setting(arm, text_base)
    result = trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    found = result["step"]["privacy"]
    assert found["kind"] == "certified" and 7.9 < found["epsilon"] <= 8.0 and found["steps"] == 3
    assert found["estimate"]["kind"] == "estimate" and found["sample_rate"] == pytest.approx(16 / 96)
    assert found["per_sample_gradients"] == ("RowByRow" if "mos" in arm else "Hooked")
    assert compose([result["step"]] * 2)["epsilon"] > found["epsilon"]
    planned = json.loads((tmp_path / PLANNED).read_text())
    assert planned["adjacency"] == found["adjacency"] == "add-or-remove"
    assert planned["mechanisms"] == found["mechanisms"] and compose([planned])["epsilon"] == found["epsilon"]
    manifest = json.loads((tmp_path / "brick" / "brick.json").read_text())
    assert manifest["step"]["privacy"]["epsilon"] == found["epsilon"]


def test_a_private_run_learns_where_there_is_room() -> None:
    """With a budget so large that noise is small, private training learns what training learns."""
    made = attached(twice=False)
    made.model.drop.p = 0.0
    done, step = run(made, replace(BASIC, steps=200, batch=20), noise=0.1, microbatch=40)
    assert done.history[-1]["train_loss"] < 0.6 * done.history[0]["train_loss"]
    assert step.report()["privacy"]["epsilon"] > 100


def test_what_is_private_is_found_in_the_registry() -> None:
    record = registry.find("dp").record
    assert record.slot == "step" and record.family == "private"
    task = Task("causal-lm", "bits_per_byte", None, 1, "text")
    with pytest.raises(Refused, match="packed from several"):
        resolve(parse("lora + dp"), task)
    assert _step.Whole({}).state_dict() == {}


def test_the_memory_of_a_step_is_that_of_its_micro_batches(text_base: Path) -> None:
    costs = {
        arm: trial.probe({"setting": asdict(setting(arm, text_base)), "batches": 1})["saved_for_backward_bytes"]
        for arm in ("lora:r=4", "lora:r=4 + dp:delta=1e-3,microbatch=4")
    }
    plain, parts = costs.values()
    assert 0 < parts <= plain / 3
