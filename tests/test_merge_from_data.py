"""Merges that read unlabelled rows: Fisher and RegMean against dense solutions, and what may reach them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import asked, documents, image_data, text_data, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import LANGUAGE, TASK, make_brick, weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from brickyard.cli import main
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.brick import Brick
from brickyard.core.data import read_data
from brickyard.core.errors import NotFinite, Refused, UsageError
from brickyard.core.task import Task
from brickyard.merge import fisher, regmean
from brickyard.merge._engine import Piece
from brickyard.merge._from_data import Expert, Made, Stage
from brickyard.merging.merge import merge

PIECE = Piece("w", 0, 12)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Rows:
    """Stands in for encoded rows: vectors [N, D], with or without a mask [N, T]."""

    def __init__(self, x: Tensor, mask: Tensor | None = None) -> None:
        self.x, self.mask = x, mask

    def __len__(self) -> int:
        return len(self.x)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        batch = {"x": self.x[torch.from_numpy(index)]}
        return batch if self.mask is None else {**batch, "attention_mask": self.mask[torch.from_numpy(index)]}


class Network(nn.Module):
    """A backbone of one or two linear layers with a head that no merge touches."""

    def __init__(self, body: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.head = body, head or nn.Identity()

    def forward(self, *, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.head(self.body(x)))


def expert(network: Network, rows: Rows, label: str = "e", task: Task = TASK) -> Expert:
    tensors = {f"body.{name}": tensor for name, tensor in network.body.named_parameters()}
    return Expert(label, network, tensors, task, rows, "rows")  # type: ignore[arg-type]


def linear(seed: int, n: int, m: int) -> nn.Linear:
    layer = nn.Linear(n, m)
    layer.load_state_dict({"weight": noise(seed, m, n), "bias": noise(seed + 50, m)})
    return layer


def test_fisher_information_of_a_softmax_is_its_closed_form() -> None:
    """Of logits W x it is E[x_d^2 p_k (1 - p_k)]; true labels, or the most probable ones, give something else."""
    x, layer = noise(0, 1500, 4), linear(1, 4, 3)
    p = (x @ layer.weight.T + layer.bias).softmax(-1).detach()
    found = fisher.information(expert(Network(layer), Rows(x)), fisher.Config(rows=1500))
    wanted = ((p * (1 - p)).T @ x.square()) / len(x)
    torch.testing.assert_close(found["body.weight"], wanted, rtol=0.2, atol=0.004)
    torch.testing.assert_close(found["body.bias"], (p * (1 - p)).mean(0), rtol=0.15, atol=0.004)


def test_fisher_information_of_a_number_is_its_squared_slope() -> None:
    x, layer = noise(0, 1000, 4), linear(1, 4, 1)
    number = Task("regression", "spearman", None, 1, "text")
    found = fisher.information(expert(Network(layer), Rows(x), task=number), fisher.Config(rows=1000))
    torch.testing.assert_close(found["body.weight"][0], x.square().mean(0), rtol=0.2, atol=0.01)


def test_rows_are_squared_before_they_are_added() -> None:
    """Two rows one by one, with their labels drawn again, by torch's own derivatives."""
    x, layer = noise(0, 2, 4), linear(1, 4, 3)
    found = fisher.information(expert(Network(layer), Rows(x)), fisher.Config(rows=2, seed=3))
    generator, total = torch.Generator().manual_seed(3), torch.zeros(3, 4)
    for row in x:
        y = int(torch.multinomial((layer(row)).softmax(-1).detach()[None], 1, generator=generator))
        slope = torch.func.grad(lambda w, r=row, k=y: (r @ w.T + layer.bias.detach()).log_softmax(-1)[k])
        total += slope(layer.weight.detach()).square()
    torch.testing.assert_close(found["body.weight"], total / 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_equal_information_is_the_average_and_order_does_not_matter(models: int, seed: int) -> None:
    thetas = [noise(seed + t, 12) for t in range(models)]
    equal = [noise(seed + 99, 12).square() + 1e-3] * models
    torch.testing.assert_close(fisher.merge(thetas, equal), torch.stack(thetas).mean(0), rtol=1e-4, atol=1e-5)
    others = [noise(seed + 20 + t, 12).square() + 1e-3 for t in range(models)]
    one, two = fisher.merge(thetas, others), fisher.merge(thetas[::-1], others[::-1])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    wanted = sum(f * t for f, t in zip(others, thetas, strict=True)) / sum(others)
    torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_the_floor_and_the_unit_of_the_information() -> None:
    found = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([[2.0, 2.0]])}
    plain = fisher.prepared(found, 1e-6, normalise=False)
    assert plain["a"].tolist() == [pytest.approx(1e-6), 4.0]
    scaled = fisher.prepared({name: 1000 * f for name, f in found.items()}, 1e-6, normalise=True)
    assert scaled["b"].tolist() == [[1.0, 1.0]] and scaled["a"].tolist() == [pytest.approx(1e-6), 2.0]
    # What nothing depends on is averaged; so is a tensor without gradients.
    made = fisher.Weighted([plain, plain])
    merged = made.combine(torch.zeros(2), [torch.tensor([1.0, 1.0]), torch.tensor([3.0, 5.0])], None, Piece("a", 0, 2))
    torch.testing.assert_close(merged, torch.tensor([2.0, 3.0]))
    merged = made.combine(torch.zeros(2), [torch.ones(2), 3 * torch.ones(2)], None, Piece("running", 0, 2))
    assert merged.tolist() == [2.0, 2.0]
    for options in ({"floor": 0.0}, {"rows": 0}, {"seed": -1}):
        with pytest.raises(UsageError, match="fisher: "):
            fisher.Config(**options)  # type: ignore[arg-type]


def two(x: list[Tensor], masks: list[Tensor | None] | None = None) -> list[Expert]:
    networks = [
        Network(nn.Sequential(linear(t, 4, 5), nn.Tanh(), linear(9 + t, 5, 3)), nn.Linear(3, 2)) for t in (1, 2)
    ]
    held = masks or [None, None]
    return [expert(n, Rows(r, m), f"e{i}") for i, (n, r, m) in enumerate(zip(networks, x, held, strict=True))]


def stage(experts: list[Expert]) -> Stage:
    return Stage(experts, dict)


def test_regmean_is_the_least_squares_solution_over_all_inputs() -> None:
    """With the whole Gram matrices it minimises what the experts' answers differ by, layer by layer."""
    experts = two([noise(0, 40, 4), 3 * noise(1, 30, 4)])
    made = regmean.RegMean(regmean.Config(off_diagonal=1.0, at_once=7)).from_data(stage(experts))
    assert isinstance(made, Made) and made.about["solved"] == ["body.0.weight", "body.2.weight"]
    assert made.about["rows"] == [40, 30] and "2 linear layers" in made.about["detail"]
    inputs: list[Any] = [e.rows.x for e in experts]  # type: ignore[attr-defined]
    for i, name in ((0, "body.0.weight"), (2, "body.2.weight")):
        layers: list[Any] = [e.model.body[i] for e in experts]  # type: ignore[union-attr,index]
        if i:
            inputs = [e.model.body[:2](x).detach() for e, x in zip(experts, inputs, strict=True)]  # type: ignore[union-attr,index]
        x = torch.cat(inputs).double().numpy()
        y = torch.cat([v @ layer.weight.T for v, layer in zip(inputs, layers, strict=True)]).detach().double().numpy()
        wanted = np.linalg.lstsq(x, y, rcond=None)[0].T
        np.testing.assert_allclose(made.tensors[name].numpy(), wanted, rtol=2e-4, atol=2e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.95), st.integers(2, 4), st.integers(0, 10**6))
def test_the_solution_is_that_of_a_dense_solver(a: float, models: int, seed: int) -> None:
    x = [noise(seed + t, 12, 5).double() for t in range(models)]
    w = [noise(seed + 10 + t, 5, 3).double() for t in range(models)]
    grams = [regmean.shrunk(v.T @ v, a) for v in x]
    dense = [a * (v.T @ v).numpy() + (1 - a) * np.diag(np.diag((v.T @ v).numpy())) for v in x]
    wanted = scipy.linalg.solve(sum(dense), sum(g @ v.numpy() for g, v in zip(dense, w, strict=True)))
    np.testing.assert_allclose(regmean.solve(grams, w).numpy(), wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(regmean.solve(grams[::-1], w[::-1]), regmean.solve(grams, w))


def test_identical_models_give_that_model_and_dead_inputs_the_average() -> None:
    x = [noise(t, 20, 4).double() for t in range(2)]
    same = noise(5, 4, 3).double()
    grams = [regmean.shrunk(v.T @ v, 0.9) for v in x]
    torch.testing.assert_close(regmean.solve(grams, [same, same]), same)
    for v in x:
        v[:, 2] = 0
    grams, w = [regmean.shrunk(v.T @ v, 0.9) for v in x], [noise(7 + t, 4, 3).double() for t in range(2)]
    found = regmean.solve(grams, w)
    torch.testing.assert_close(found[2], (w[0][2] + w[1][2]) / 2)
    assert not torch.allclose(found[1], (w[0][1] + w[1][1]) / 2)
    assert torch.equal(regmean.solve([torch.zeros(4, 4).double()] * 2, w), torch.stack(w).mean(0))


def test_inputs_that_determine_nothing_are_refused() -> None:
    experts = two([noise(0, 3, 4)[:, [0, 1, 2, 2]], noise(1, 3, 4)[:, [0, 1, 2, 2]]])
    with pytest.raises(Refused, match=r"body.0.weight: .* off_diagonal below 1"):
        regmean.RegMean(regmean.Config(off_diagonal=1.0)).from_data(stage(experts))
    regmean.RegMean(regmean.Config()).from_data(stage(experts))
    for options in ({"rows": 0}, {"off_diagonal": 1.1}, {"at_once": 0}):
        with pytest.raises(UsageError, match="regmean: "):
            regmean.Config(**options)  # type: ignore[arg-type]


def test_padding_and_shared_weights_do_not_count() -> None:
    x, mask = noise(0, 6, 3, 4), torch.tensor([[1, 1, 0]] * 6)
    experts = two([x, x], [mask, mask])
    layers = regmean.linear_layers(experts[0])
    assert layers.keys() == {"body.0.weight", "body.2.weight"}  # the head is no part of what is merged
    found = regmean.grams_of(experts[0], layers, regmean.Config(at_once=4))
    kept = x[:, :2].reshape(-1, 4).double()
    torch.testing.assert_close(found["body.0.weight"], kept.T @ kept, rtol=1e-5, atol=1e-5)
    assert not [hook for m in experts[0].model.modules() for hook in m._forward_pre_hooks.values()]
    tied: Any = experts[1].model.body  # type: ignore[union-attr]
    tied[0] = nn.Linear(4, 5)
    tied.append(nn.Linear(4, 5))
    tied[3].weight = tied[0].weight
    again = Expert("tied", experts[1].model, dict(tied.named_parameters()), TASK, experts[1].rows)
    assert regmean.linear_layers(again).keys() == {"2.weight"}


def test_layers_that_store_their_weight_turned_are_solved_alike() -> None:
    x, found = [noise(0, 30, 4), noise(1, 30, 4)], []
    for kind in (nn.Linear, Conv1D):
        experts = []
        for t in range(2):
            plain, turned = linear(t, 4, 5), Conv1D(5, 4)
            turned.load_state_dict({"weight": plain.weight.detach().T, "bias": plain.bias.detach()})
            experts.append(expert(Network(plain if kind is nn.Linear else turned), Rows(x[t])))
        found.append(regmean.RegMean(regmean.Config()).from_data(stage(experts)).tensors["body.weight"])
    assert torch.equal(found[0], found[1].T)


def test_numbers_that_are_not_finite_are_named() -> None:
    experts = two([noise(0, 8, 4), noise(1, 8, 4)])
    experts[1].rows.x[3, 1] = torch.inf  # type: ignore[attr-defined]
    with pytest.raises(NotFinite, match=r"e1: what enters the layer of body\.0\.weight"):
        regmean.RegMean(regmean.Config()).from_data(stage(experts))
    with pytest.raises(NotFinite, match=r"e1: the Fisher information of body\.0\.weight"):
        fisher.Fisher(fisher.Config()).from_data(stage(experts))
    experts[1].model.head.weight.data *= torch.inf  # type: ignore[union-attr,operator]
    with pytest.raises(NotFinite, match="e1: its answers to rows are not finite"):
        fisher.Fisher(fisher.Config()).from_data(stage(experts))


@pytest.fixture
def bricks(text_base: Path, tmp_path: Path) -> list[Brick]:
    return [make_brick(tmp_path / name, text_base, "full", seed, size=0.2) for seed, name in enumerate("ab", 1)]


def tasks() -> list[dict[str, dict[str, list]]]:
    other = text_data(train=80, test=50)
    other["train"] = {name: values[::-1] for name, values in other["train"].items()}
    return [text_data(train=40), other]


def run(arm: str, bricks: list[Brick], base: Path, out: Path, data: list[Any], **options: Any) -> dict[str, Any]:
    folders = [brick.folder for brick in bricks]
    return merge(arm, base=str(base), bricks=folders, out=out, data=data, device="cpu", force=True, **options)


def test_merged_checkpoints_are_those_of_the_pure_functions(
    bricks: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    """Every tensor of both merges, from experts that are put together here from the bricks themselves."""
    base, experts = open_base(str(text_base)), []
    for brick, data in zip(bricks, tasks(), strict=True):
        model: Any = brick.apply(base).model
        split = read_data(data, need=("train",)).splits["train"]
        tensors = {name: t for name, t in model.bert.state_dict(keep_vars=True).items() if t.is_floating_point()}
        experts.append(Expert(brick.folder.name, model, tensors, TASK, _unlabelled(encode(split, base, TASK))))
    thetas = {name: [e.tensors[name].detach().clone() for e in experts] for name in experts[0].tensors}
    result = run("fisher:rows=10", bricks, text_base, tmp_path / "fisher", tasks())
    config = fisher.Config(rows=10)
    found = [fisher.prepared(fisher.information(e, config), 1e-6, normalise=False) for e in experts]
    for name, tensor in weights(tmp_path / "fisher").items():
        if tensor.is_floating_point():
            wanted = fisher.merge(thetas[name], [f[name] for f in found])
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)
    assert [(t["rows"], t["train_rows"]) for t in result["data"]["tasks"]] == [(10, 40), (10, 80)]
    run("regmean", bricks, text_base, tmp_path / "regmean", tasks())
    made = regmean.RegMean(regmean.Config()).from_data(stage(experts))
    assert len(made.tensors) == 13  # six linear layers in each of two blocks, and the pooler
    for name, tensor in weights(tmp_path / "regmean").items():
        if tensor.is_floating_point():
            wanted = made.tensors.get(name, torch.stack(thetas[name]).mean(0))
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)


def _unlabelled(rows: Any) -> Any:
    rows.labelled = False
    return rows


@pytest.mark.parametrize("arm", ["fisher:rows=6", "regmean:rows=16"])
def test_neither_labels_nor_test_rows_reach_the_merge(
    arm: str, bricks: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    made = []
    for i, change in enumerate((None, "label", "test", "train")):
        data = copy.deepcopy(tasks())
        for splits in data:
            if change == "label":
                splits["train"]["label"] = splits["train"]["label"][::-1]
            elif change == "test":
                splits["test"] = {name: values[:30] for name, values in splits["test"].items()}
            elif change == "train":
                splits["train"]["text"] = splits["train"]["text"][::-1]
        run(arm, bricks, text_base, tmp_path / f"out{i}", data)
        made.append(weights(tmp_path / f"out{i}"))
    plain, *others = made
    same = [all(torch.equal(plain[name], other[name]) for name in plain) for other in others]
    assert same == [True, True, False]


@pytest.mark.parametrize("arm", ["fisher:rows=6", "regmean:rows=16"])
def test_the_order_of_tasks_does_not_matter(arm: str, bricks: list[Brick], text_base: Path, tmp_path: Path) -> None:
    run(arm, bricks, text_base, tmp_path / "one", tasks())
    run(arm, bricks[::-1], text_base, tmp_path / "two", tasks()[::-1])
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name].float(), two[name].float(), rtol=1e-4, atol=1e-5) for name in one)


def test_a_post_edit_and_its_search_stand_behind_a_merge_of_data(
    bricks: list[Brick], text_base: Path, tmp_path: Path
) -> None:
    run("regmean", bricks, text_base, tmp_path / "plain", tasks())
    result = run("regmean + lines:alpha=0,beta=search", bricks, text_base, tmp_path / "out", tasks())
    beta, base = result["search"]["chosen"], open_base(str(text_base))._stored()
    plain, found = weights(tmp_path / "plain"), weights(tmp_path / "out")
    name = "encoder.layer.1.attention.self.query.weight"
    torch.testing.assert_close(found[name], torch.lerp(base[name], plain[name], beta), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["encoder.layer.0.output.dense.weight"], base["encoder.layer.0.output.dense.weight"])
    assert result["arm"] == f"regmean + lines:alpha=0,beta={beta}"


def test_adapters_and_language_models_are_read_too(causal_base: Path, tmp_path: Path) -> None:
    made = [make_brick(tmp_path / f"m{s}", causal_base, arm, s, LANGUAGE, 0.2) for s, arm in ((1, "full"), (2, "lora"))]
    for arm in ("fisher:rows=4", "regmean:rows=8"):
        out = tmp_path / arm.partition(":")[0]
        result = run(arm, made, causal_base, out, [documents(), documents()], max_length=16)
        assert result["form"] == "model" and len(result["data"]["tasks"]) == 2
        base, found = open_base(str(causal_base))._stored(), weights(out)
        assert found.keys() == open_base(str(causal_base)).weights.keys()
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert "model.embed_tokens.weight" not in result["data"]["solved"]  # tied to the output layer


def test_images_are_read_too(image_base: Path, tmp_path: Path) -> None:
    task = Task("image-classification", "accuracy", ("bottom", "top"), 2, "image")
    made = [make_brick(tmp_path / f"m{seed}", image_base, "full", seed, task, 0.1) for seed in (1, 2)]
    for arm in ("fisher:rows=8", "regmean:rows=8"):
        result = run(arm, made, image_base, tmp_path / arm.partition(":")[0], [image_data(), image_data(train=48)])
        assert [t["rows"] for t in result["data"]["tasks"]] == [8, 8]


def test_data_that_do_not_fit_the_inputs_are_refused(bricks: list[Brick], text_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for data in ([], tasks()[:1]):
        with pytest.raises(UsageError, match=f"2 inputs and {len(data)} data sets"):
            run("fisher", bricks, text_base, out, data)
    # Both data sets bear the name of one brick's data: the other has no rows of its own.
    named = [write_data(tmp_path / str(i) / "a", data) for i, data in enumerate(tasks())]
    with pytest.raises(UsageError, match="belong to 1 of them"):
        run("fisher", bricks, text_base, out, [str(folder) for folder in named])
    assert not out.exists()


def test_tasks_that_a_method_cannot_read_are_refused(causal_base: Path, tmp_path: Path) -> None:
    made = [make_brick(tmp_path / f"m{seed}", causal_base, "full", seed, LANGUAGE) for seed in (1, 2)]
    data = [asked("multiple-choice"), asked("multiple-choice")]
    with pytest.raises(Refused, match="the task of python is multiple-choice"):
        run("regmean", made, causal_base, tmp_path / "out", data)


def test_the_command_says_what_was_read(
    bricks: list[Brick], text_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["merge", "fisher", "--rows", "20", "--base", str(text_base), "--force", "--bricks"]
    argv += [*(str(brick.folder) for brick in bricks), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "give one --data for each of the --bricks" in capsys.readouterr().err
    folders = [str(write_data(tmp_path / f"data{i}", data)) for i, data in enumerate(tasks())]
    assert main([*argv, "--data", *folders]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a read 20 of 40 train rows of data0, without labels" in said and "the merge" in said
    stored = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert stored["data"]["tasks"][1]["fingerprint"] and stored["arm"] == "fisher:rows=20"
