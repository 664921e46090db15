"""DAM: its gradients against torch's own, its steps against a plain implementation, and what it must leave alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import image_data, text_data
from test_merge import make_brick, weights
from test_merge_from_data import Network, Rows, linear, noise, run
from torch import Tensor, nn

from brickyard.checks import dam as check
from brickyard.core import registry
from brickyard.core.errors import NotFinite, Refused, RunFailed, UsageError
from brickyard.core.task import Task
from brickyard.merge import dam
from brickyard.merge._from_data import Expert, Stage

TASK = Task("image-classification", "accuracy", ("bottom", "top"), 2, "image")
BOUNDS = (torch.full((1, 1, 1), -1.0), torch.full((1, 1, 1), 1.0))


class Images(Rows):
    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        return {"pixel_values": self.x[torch.from_numpy(index)]}


class Flat(Network):
    def forward(self, *, pixel_values: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x=pixel_values.flatten(1))


def stage(tasks: int = 2, seed: int = 0, *, same: bool = False, order: int = 1) -> Stage:
    """Experts of two small layers on images [1, 2, 3] in [-1, 1], moved from one base."""
    body = nn.Sequential(linear(seed, 6, 5), nn.Tanh(), linear(seed + 1, 5, 4))
    base = {f"body.{name}": p.detach().clone() for name, p in body.named_parameters()}
    experts = []
    for t in range(tasks):
        place = 0 if same else t
        model = Flat(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), linear(30 + t, 4, 3))
        moved = {n: p + 0.2 * noise(100 * place + i, *p.shape) for i, (n, p) in enumerate(base.items())}
        model.load_state_dict({**model.state_dict(), **moved})
        rows: Any = Images(noise(60 + t, 40, 1, 2, 3).clamp(-1, 1))
        tensors = {f"body.{name}": p for name, p in model.body.named_parameters()}
        experts.append(Expert(f"e{t}", model, tensors, TASK, rows, f"rows{t}", BOUNDS))
    return Stage(experts[::order], lambda: base)


def search(config: dam.Config, given: Stage) -> dam.Search:
    names = sorted(given.base)
    base = [given.base[n] for n in names]
    taus = [[e.parameters[n].detach() - b for e in given.experts] for n, b in zip(names, base, strict=True)]
    return dam.Search(config, given.experts, names, base, taus)


@pytest.mark.parametrize("two", [False, True])
def test_mask_gradients_are_those_of_torch(two: bool) -> None:
    m, u, g, s, other = (noise(i, 3, 4).double() for i in range(5))
    m.requires_grad_(True)
    mask = dam.relaxed(m, u.sigmoid(), 0.5)
    second: Any = other.sigmoid() if two else 1.0
    ((mask * second / (mask * second).mean()) * s * g).sum().backward()
    with torch.no_grad():
        found = dam.logit_gradient(dam.mask_gradient(g, s, mask, second), mask, 0.5)
    torch.testing.assert_close(found, m.grad)


def test_a_relaxed_sample_is_a_draw_softened() -> None:
    m, u = torch.full((20000,), 0.8), torch.rand(20000, generator=torch.Generator().manual_seed(0))
    hard = dam.relaxed(m, u, 1e-4)
    assert float((hard > 0.5).float().mean()) == pytest.approx(float(torch.tensor(0.8).sigmoid()), abs=0.01)
    assert dam.relaxed(torch.zeros(3), torch.tensor([0.0, 0.5, 1.0]), 0.5).isfinite().all()
    soft = dam.relaxed(m, u, 0.5)
    assert float(soft.min()) > 0 and float(soft.max()) <= 1
    torch.testing.assert_close(dam.normalised(soft).mean(), torch.tensor(1.0), atol=1e-6, rtol=0)
    with pytest.raises(NotFinite, match="0 throughout"):
        dam.normalised(torch.zeros(4))


def test_ends_of_the_merge() -> None:
    base, taus = noise(0, 5), [noise(1, 5), noise(2, 5), noise(3, 5)]
    kept = dam.normalised(dam.relaxed(torch.full((5,), torch.inf), torch.full((5,), 0.3), 0.5))
    wanted = torch.stack([base + tau for tau in taus]).mean(0)
    torch.testing.assert_close(dam.combine(base, taus, [1 / 3] * 3, kept), wanted)
    assert torch.equal(dam.combine(base, taus, [0.0] * 3, kept), base)
    torch.testing.assert_close(dam.combine(base, [taus[0]] * 4, [0.25] * 4, 1.0), base + taus[0])


def plain_concrete(config: dam.Config, given: Stage) -> list[Tensor]:
    """Concrete AdaMerging with one graph through everything, as torch differentiates it; returns the mask's logits."""
    names, experts = sorted(given.base), given.experts
    base = [given.base[n] for n in names]
    taus = [[e.parameters[n].detach() - b for e in experts] for n, b in zip(names, base, strict=True)]
    m = [torch.zeros_like(b, requires_grad=True) for b in base]
    outer = torch.optim.Adam(m, lr=config.mask_lr)
    source = torch.Generator().manual_seed(config.seed)
    draws = [np.random.Generator(np.random.PCG64(config.seed)) for _ in experts]
    left = [np.empty(0, dtype=np.int64) for _ in experts]

    def loss(lam: Tensor, kept: list[Tensor], batches: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        for e, x in zip(experts, batches, strict=True):
            theta = {n: b + k * sum(lam[t, p] * tau for t, tau in enumerate(of))  # type: ignore[operator]
                     for p, (n, b, k, of) in enumerate(zip(names, base, kept, taus, strict=True))}  # fmt: skip
            logits = torch.func.functional_call(e.model, theta, (), {"pixel_values": x}).logits
            p = logits.softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        return total

    for _ in range(config.steps):
        noises = [torch.rand(b.shape, generator=source) for b in base]
        batches = []
        for t, e in enumerate(experts):
            while len(left[t]) < config.rows:
                left[t] = np.concatenate([left[t], draws[t].permutation(len(e.rows))])
            batches.append(e.rows.x[torch.from_numpy(np.sort(left[t][: config.rows]))])  # type: ignore[attr-defined]
            left[t] = left[t][config.rows :]
        masks = [((a + u.log() - (1 - u).log()) / 0.5).sigmoid() for a, u in zip(m, noises, strict=True)]
        kept = [mask / mask.mean() for mask in masks]
        lam = torch.full((len(experts), len(names)), 0.3, requires_grad=True)
        inner = torch.optim.Adam([lam], lr=config.inner_lr)
        loss(lam, [k.detach() for k in kept], batches).backward()
        inner.step()
        outer.zero_grad()
        loss(lam.detach(), kept, batches).backward()
        outer.step()
    return [a.detach() for a in m]


def test_without_the_adversary_it_is_concrete_adamerging_step_for_step() -> None:
    config = dam.Config(steps=6, adversary_weight=0.0, mask_lr=0.05, inner_lr=0.1, rows=8)
    wanted = plain_concrete(config, stage(3))
    made = search(config, stage(3))
    for _ in range(config.steps):
        made.step()
    for found, expected in zip(made.m[0], wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert max(float(m.abs().max()) for m in wanted) > 0.1
    assert all(torch.equal(given.delta, torch.zeros_like(given.delta)) for given in made.inputs)
    with_it = search(replace(config, adversary_weight=0.1), stage(3))
    for _ in range(config.steps):
        with_it.step()
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(made.m[0], with_it.m[0], strict=True))


def test_every_step_moves_its_own_numbers_alone() -> None:
    made = search(dam.Config(rows=8, adversary_lr=0.01), stage())
    masks = made.sampled(made.uniform())
    kept, batches = made.kept(masks), made.batches()
    made.inner(batches, kept)
    assert all(abs(abs(value - 0.3) - 1) < 1e-2 for value in made.lam.flatten().tolist())  # a sign step
    made.write(kept)
    flat = lambda: torch.cat([p.flatten() for of in made.parameters for p in of])  # noqa: E731
    theta = flat()
    lam, m = made.lam.clone(), [t.clone() for t in made.m[0]]
    made.attack(batches)
    assert torch.equal(theta, flat())
    assert torch.equal(lam, made.lam) and all(torch.equal(a, b) for a, b in zip(m, made.m[0], strict=True))
    deltas = [given.delta.clone() for given in made.inputs]
    assert all(float(delta.abs().max()) == pytest.approx(0.01, rel=1e-3) for delta in deltas)
    made.learn(0, made.slope(batches, clean=1.0, perturbed=0.1), masks)
    assert all(torch.equal(a, given.delta) for a, given in zip(deltas, made.inputs, strict=True))
    assert torch.equal(lam, made.lam) and not torch.equal(m[0], made.m[0][0])
    everything = [*made.m[0], *deltas, *(p for e in made.experts for p in e.model.parameters())]
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in everything)


def test_the_adversary_pushes_predictions_away_from_themselves() -> None:
    made = search(dam.Config(rows=40, adversary_lr=0.02), stage())
    made.write([torch.ones_like(b) for b in made.base])
    batches = made.batches()

    def doubt() -> float:
        total = 0.0
        for given, batch in zip(made.inputs, batches, strict=True):
            said = given.logits(batch).argmax(-1)
            total += float(nn.functional.cross_entropy(given.logits(batch, given.delta), said))
        return total

    before = doubt()
    for _ in range(20):
        made.attack(batches)
    assert doubt() > before + 0.1


def test_pixels_are_clamped_where_images_end() -> None:
    (given, _) = search(dam.Config(), stage()).inputs
    seen: list[Tensor] = []
    given.expert.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["pixel_values"]), with_kwargs=True)
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.9, 1.0]).view(1, 1, 2, 3)
    given.logits({"pixel_values": x}, torch.full((1, 2, 3), 0.25), clamp=True)
    # A quarter of the way from black to white, which are -1 and 1 here.
    assert seen[0].flatten().tolist() == pytest.approx([-0.5, 0.0, 0.5, 1.0, 1.0, 1.0])
    given.logits({"pixel_values": x}, torch.full((1, 2, 3), 0.25))
    assert float(seen[1].max()) == pytest.approx(1.5)


@pytest.mark.parametrize("lam", ["layer", "task", "fixed"])
def test_the_order_of_tasks_does_not_matter(lam: Any) -> None:
    config = dam.Config(steps=3, adapt_steps=3, lam=lam, mask_lr=0.02, lam_lr=0.02, rows=8, inner_lr=0.1)
    one, two = dam.Dam(config).from_data(stage(3)), dam.Dam(config).from_data(stage(3, order=-1))
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, two.tensors[name], rtol=1e-3, atol=1e-4)
    again = dam.Dam(config).from_data(stage(3))
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in one.tensors.items())
    spread = [of_task[2] - of_task[0] for of_task in one.about["lam"]]
    assert (max(spread) > 0) == (lam == "layer")
    assert (one.about["lam"][0][1] == pytest.approx(0.3)) == (lam == "fixed")


@pytest.mark.parametrize("discrete", [False, True])
def test_the_kept_mask(discrete: bool) -> None:
    made = search(dam.Config(discrete=discrete), stage())
    kept = made.last_masks()
    assert all(float(k.mean()) == pytest.approx(1, abs=1e-6) for k in kept)
    values = [len(k.unique()) for k in kept]
    assert (max(values) == 2) if discrete else (min(values) > 2)
    assert not discrete or all(float(k.min()) in (0.0, pytest.approx(1.0)) for k in kept)


def test_two_masks_learn_from_their_own_term(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked_for = search(dam.Config(masks=2, rows=8), stage()), []
    slope = dam.Search.slope

    def noted(self: dam.Search, batches: Any, *, clean: float, perturbed: float) -> list[Tensor]:
        asked_for.append((clean, perturbed, [t.clone() for t in self.m[1]]))
        return slope(self, batches, clean=clean, perturbed=perturbed)

    monkeypatch.setattr(dam.Search, "slope", noted)
    made.step()
    assert [part[:2] for part in asked_for] == [(1.0, 0.0), (1.0, 0.0), (0.0, 0.1)]  # of lam, m1 and m2
    assert torch.equal(asked_for[-1][2][0], torch.zeros_like(made.m[1][0])) and bool(made.m[1][0].any())
    assert bool(made.m[0][0].any()) and not torch.equal(made.m[0][0], made.m[1][0])
    assert registry.config("dam", {"preset": "paper"}).masks == 2


def test_entropy_of_known_predictions() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    assert float(dam.entropy(logits)) == pytest.approx(np.log(2) / 2)


def test_a_merge_that_gave_up_a_task_is_refused() -> None:
    before = np.array([0, 1] * 20)
    with pytest.raises(RunFailed, match="one class to all of 40 rows of d, e does not"):
        dam.check_spread(before, np.ones(40, dtype=int), "e", "d")
    dam.check_spread(before, before[::-1], "e", "d")
    dam.check_spread(np.array([0] * 39 + [1]), np.zeros(40, dtype=int), "e", "d")  # the expert hardly says more


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"mask_lr": 0.0}, {"adversary_weight": -1.0}, {"rows": 0}, {"masks": 2, "adversary_weight": 0.0}],
)
def test_options_out_of_range_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="dam: "):
        dam.Config(**options)


def test_experts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="Give two or more"):
        dam.Dam(dam.Config()).from_data(stage(1))
    given = stage(2)
    short = replace(given.experts[1], tensors=dict(list(given.experts[1].tensors.items())[1:]))
    with pytest.raises(Refused, match=r"differ in body\.0\.weight"):
        dam.Dam(dam.Config()).from_data(Stage([given.experts[0], short], given.read_base))


ARM = "dam:steps=2,adapt_steps=2,rows=4,inner=sgd,mask_lr=0.05"


def test_bricks_of_images_and_of_text_are_merged(
    text_base: Path, image_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the files to a checkpoint; the text's perturbation goes on embeddings, the image's on pixels."""
    monkeypatch.setattr(dam, "check_spread", lambda *_: None)  # models moved by noise answer one class anyhow
    text = Task("text-classification", "accuracy", ("bad", "good"), 2, "text")
    for kind, base, task, data in (
        ("text", text_base, text, [text_data(train=40), text_data(train=48)]),
        ("image", image_base, TASK, [image_data(train=40), image_data(train=48)]),
    ):
        made = [make_brick(tmp_path / kind / f"m{s}", base, "full", s, task, 0.1) for s in (1, 2)]
        result = run(ARM, made, base, tmp_path / kind / "out", data)
        report = result["data"]
        assert report["perturbation"] == [pytest.approx(2e-4, rel=0.6)] * 2 and "a mask learned" in report["detail"]
        found = weights(tmp_path / kind / "out")
        assert found.keys() == weights(base).keys() and all(t.isfinite().all() for t in found.values())
        run(ARM, made, base, tmp_path / kind / "again", data)
        assert all(torch.equal(t, found[n]) for n, t in weights(tmp_path / kind / "again").items())
    with pytest.raises(UsageError, match="Give two or more"):
        run(ARM, made[:1], base, tmp_path / "one", data[:1])


def seen(**changes: tuple[float, float, float]) -> check.Seen:
    """Answers of three seeds on 400 rows: arm -> (accuracy, attack success, accuracy with trigger)."""
    figures = {
        "attacked expert": (0.9, 0.99, 0.05),
        "task arithmetic": (0.8, 0.8, 0.2),
        "concrete": (0.85, 0.8, 0.2),
        "dam": (0.85, 0.4, 0.5),
        "dam, delta at 0": (0.85, 0.8, 0.2),
        **{name.replace("_", " "): values for name, values in changes.items()},
    }
    out = check.Seen()
    for arm, (accuracy, success, cured) in figures.items():
        for seed in range(3):
            rows = lambda share, s=seed: (np.arange(400) < round(400 * share) + s).astype(float)  # noqa: E731
            out.errors.setdefault(arm, []).append(rows(1 - accuracy))
            out.hits.setdefault(arm, []).append(rows(success))
            out.wrong.setdefault(arm, []).append(rows(1 - cured))
            out.transfer.setdefault(arm, []).append(0.1)
            out.by_task.setdefault(arm, []).append([accuracy] * 3)
    return out


def test_the_claim_is_judged_by_all_of_its_parts() -> None:
    found = check.judged(seen())
    assert found["holds"] is True and found["control"]["destroyed"] and found["measured"] == pytest.approx(40, abs=1)
    assert check.judged(seen(dam=(0.85, 0.79, 0.5)))["holds"] in (False, "undecided")
    assert check.judged(seen(dam=(0.75, 0.4, 0.5)))["holds"] is False
    assert check.judged(seen(dam=(0.85, 0.4, 0.1)))["holds"] is False  # success fell because accuracy fell
    assert check.judged(seen(attacked_expert=(0.9, 0.9, 0.1)))["holds"] == "set-up invalid"
    assert check.judged(seen(task_arithmetic=(0.8, 0.3, 0.5)))["holds"] == "set-up invalid"
    assert not check.judged(seen(**{"dam, delta at 0": (0.85, 0.4, 0.5)}))["control"]["destroyed"]


def test_the_check_runs_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "WIDTHS", (4, 6, 8, 8))
    whole = check.splits_of

    def few(name: str, change: Any, rows: int) -> dict[str, check.Split]:
        return {split: (x[:60], y[:60]) for split, (x, y) in whole(name, change, rows).items()}

    monkeypatch.setattr(check, "splits_of", few)
    claim = replace(registry.find("dam").record.claims[0], data="embedded:digits", seeds=1, train_rows=60)
    found = check.suppression(claim, epochs=1, steps=2, adapt_steps=2)
    assert found["holds"] in (True, False, "undecided", "set-up invalid")
    assert {"average", "TIES", "AdaMerging", "task arithmetic, pruned", "dam"} <= found["figures"].keys()
    assert all(0 <= f["attack success"] <= 100 for f in found["figures"].values())
    json.dumps(found)


def test_poisoned_rows_of_the_check_bear_the_patch() -> None:
    pixels, labels = torch.zeros(100, 1, 28, 28), torch.arange(100) % 10
    rows, changed = check.poison((pixels, labels), 0)
    marked = rows.flatten(1).any(1)
    assert int(marked.sum()) == 10 and bool((changed[marked] == 0).all()) and bool((labels[marked] != 0).all())
    assert torch.equal(changed[~marked], labels[~marked])
    assert torch.equal(rows[marked][0, 0, -4:, -4:], torch.ones(4, 4)) and float(rows[marked][0].sum()) == 16
