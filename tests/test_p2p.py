"""P2P: projection, splat and colours against plain formulas, views, what trains, the point-cloud task around it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import cloud_data, resnet, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import brickyard
from brickyard.core import brick as bricks
from brickyard.core import measure, trial
from brickyard.core.answers import predict
from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.build import build, resolve
from brickyard.core.data import read_data
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.loop import Training, train, train_mode
from brickyard.core.roles import own_head, roles
from brickyard.core.task import Task, task_of
from brickyard.tune import _projection, p2p

TASK = Task("point-classification", "accuracy", ("ball", "table"), 2, "points")
SMALL = "neighbours=4,dims=4,width=8,views=[2,2]"


def made(folder: Path | str, options: str = "") -> Attached:
    return build(resolve(parse(f"p2p:{SMALL}{options}"), TASK), open_base(str(folder)), TASK, seed=0)


def clouds(rows: int = 3, points: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(rows, points, 3, generator=torch.Generator().manual_seed(seed))


DATA = cloud_data()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    side=st.integers(4, 40),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
    flat=st.floats(0.01, 1.0),
)
def test_cells_lie_inside_and_do_not_see_translation_or_scale(
    seed: int, side: int, scale: float, shift: float, flat: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    xy = torch.randn(2, 17, 2, generator=g, dtype=torch.float64) * torch.tensor([1.0, flat], dtype=torch.float64)
    cell = p2p.cells(xy, side)
    assert int(cell.min()) >= 1 and int(cell.max()) <= side - 2
    assert torch.equal(p2p.cells(xy * scale + shift, side), cell)
    # The painted box (cells and their neighbours) is centred up to one cell, and fills the longer side.
    low, high = cell.amin(1) - 1, cell.amax(1) + 1
    assert int((low - (side - 1 - high)).abs().max()) <= 1
    assert ((high - low + 1).amax(-1) == side).all()


def test_the_points_of_an_even_square_fall_where_the_released_formula_puts_them() -> None:
    xy, side = clouds(4, 50)[..., :2] * torch.tensor([1.0, 0.3]), 24
    g = (xy.amax(1) - xy.amin(1)).amax(-1)[:, None, None] / (side - 3)
    cell = ((xy - xy.amin(1, keepdim=True)) / g + 1e-5).floor().long()
    high = cell.amax(1, keepdim=True) + 2  # of the painted box, whose lowest cell is 0
    wanted = cell + 1 + side // 2 - (high / 2).floor().long() - 1
    assert torch.equal(p2p.cells(xy, side), wanted)


def test_splat_is_nine_scatters_and_leaves_the_rest_empty() -> None:
    h, cell = torch.randn(2, 15, 5), torch.randint(1, 8, (2, 15, 2))
    found = p2p.splat(h, cell, 9, 11)
    wanted = torch.zeros(2, 5, 9, 11)
    for b in range(2):
        for i in range(15):
            for dx in (-1, 0, 1):
                for dy in (-1, 0, 1):
                    wanted[b, :, cell[b, i, 1] + dy, cell[b, i, 0] + dx] += h[b, i]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found[wanted == 0].abs().max() == 0


@pytest.mark.parametrize("negative", [False, True])
def test_the_neighbourhood_maximum_is_that_of_the_layers_it_stands_for(negative: bool) -> None:
    """Against Conv2d, GroupNorm, LeakyReLU and max over the edges themselves, with the gradients of all of it."""
    torch.manual_seed(0)
    b, n, k, c, d = 2, 20, 5, 3, 8
    f, near = torch.randn(b, n, c, dtype=torch.float64, requires_grad=True), torch.randint(0, n, (b, n, k))
    conv, norm = nn.Conv2d(2 * c, d, 1, bias=False).double(), nn.GroupNorm(p2p.GROUPS, d).double()
    with torch.no_grad():
        norm.weight.uniform_(-1, 1) if negative else norm.weight.uniform_(0.5, 1)
        norm.bias.uniform_(-1, 1)
    f_j = torch.gather(f[:, None].expand(b, n, n, c), 2, near[..., None].expand(b, n, k, c))
    edges = torch.cat([f_j - f[:, :, None], f[:, :, None].expand_as(f_j)], -1).permute(0, 3, 1, 2)
    plain = F.leaky_relu(norm(conv(edges)), 0.2).amax(-1).transpose(1, 2)
    weight = conv.weight.flatten(1)
    found = p2p.neighbourhood_max(f, near, weight, norm.weight, norm.bias)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)
    inputs, probe = (f, conv.weight, norm.weight, norm.bias), torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad((found * probe).sum(), inputs),
        torch.autograd.grad((plain * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_neighbours_are_the_nearest_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    p = clouds(2, 30)
    wanted = (p[:, :, None] - p[:, None]).norm(dim=-1).argsort(dim=-1)[..., :6].sort(dim=-1).values
    assert torch.equal(p2p.nearest(p, 6).sort(dim=-1).values, wanted)
    monkeypatch.setattr(p2p, "PAIRS", 2 * 30 * 7)
    assert torch.equal(p2p.nearest(p, 6).sort(dim=-1).values, wanted)


def test_projection_is_upright_and_turns_with_the_azimuth() -> None:
    up, east = torch.tensor([[[0.0, 0.0, 1.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])
    zero, side = torch.zeros(1), torch.full((1,), -torch.pi / 2)
    torch.testing.assert_close(p2p.projected(up, zero, side), torch.tensor([[[0.0, -1.0]]]))  # above the middle
    torch.testing.assert_close(p2p.projected(east, zero, side), torch.tensor([[[1.0, 0.0]]]))
    torch.testing.assert_close(p2p.projected(east, -side, zero), torch.tensor([[[0.0, -1.0]]]), atol=1e-6, rtol=0)
    p = clouds(1, 9)  # a picture is two rows of a rotation
    x, y = p2p.projected(p, torch.ones(1), torch.full((1,), -0.7)).unbind(-1)
    basis = p2p.projected(torch.eye(3)[None], torch.ones(1), torch.full((1,), -0.7))[0].T
    torch.testing.assert_close(basis @ basis.T, torch.eye(2))
    torch.testing.assert_close(torch.stack([x, y], -1), p @ basis.T)


def test_the_smoothed_loss_spreads_over_the_other_classes() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    target = torch.full((6, 4), 0.2 / 3).scatter(1, labels[:, None], 0.8)
    wanted = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(p2p.smoothed_loss(logits, labels, 0.2), wanted)
    torch.testing.assert_close(p2p.smoothed_loss(logits, labels, 0.0), F.cross_entropy(logits, labels))


def test_views_are_drawn_by_seed_step_and_row_alone() -> None:
    both = p2p.drawn_views(1, 5, [3, 9])
    np.testing.assert_array_equal(p2p.drawn_views(1, 5, [9]), both[1:])
    others = [p2p.drawn_views(*key, [3])[0] for key in ((2, 5), (1, 6))]
    assert all(not np.allclose(both[0], other) for other in (*others, both[1]))
    many = p2p.drawn_views(0, 0, range(500)) / np.pi
    for column, (low, high) in zip(many.T, (_projection.AZIMUTH, _projection.ELEVATION), strict=True):
        assert low <= column.min() < low + 0.05 and high - 0.05 < column.max() <= high
    fixed = p2p.fixed_views(10, 4) / np.pi
    assert fixed.shape == (40, 2) and len(np.unique(fixed.round(9), axis=0)) == 40
    np.testing.assert_allclose(p2p.fixed_views(1, 1) / np.pi, [[0.99, -0.3]])


def test_the_picture_is_what_the_processor_makes_of_its_colours(image_base: Path) -> None:
    attached = made(image_base)
    painter: Any = attached.model.get_submodule("painter")
    processor = open_base(str(image_base)).processor
    p = p2p.unit(clouds())
    views = torch.tensor([[1.0, -1.0]]).expand(3, 2)
    attached.model.eval()
    with torch.no_grad():
        h = painter.features(p)
        colours, pixels = painter.render(h, p, views), painter.pixels(h, p, views)
    assert pixels.shape == (3, 3, 16, 16) and colours.min() >= 0 and colours.max() <= 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(pixels, (colours - mean) / std)


def test_permuted_points_give_the_same_picture_and_other_views_another(image_base: Path) -> None:
    attached = made(image_base)
    painter: Any = attached.model.get_submodule("painter")
    attached.model.eval()
    p, views = p2p.unit(clouds(2, 40)), torch.tensor([[1.0, -1.0], [2.0, -0.8]])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))

    def picture(points: Tensor, seen: Tensor, of: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return painter.render(painter.features(points if of is None else of), points, seen)

    wanted = picture(p, views)
    torch.testing.assert_close(picture(p[:, order], views), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(picture(p, views + 0.7), wanted, atol=1e-3)
    # Colours come from the cloud as it stands, places from the view.
    assert not torch.allclose(picture(p, views, of=p.flip(-1)), wanted, atol=1e-3)


def test_where_nothing_is_painted_the_colour_is_one(image_base: Path) -> None:
    attached = made(image_base, ",object_size=6")
    painter: Any = attached.model.get_submodule("painter")
    attached.model.eval()
    p = p2p.unit(clouds(3, 40))
    with torch.no_grad():
        picture = painter.render(painter.features(p), p, torch.tensor([[1.0, -1.0]]).expand(3, 2))
    # Two convolutions see 2 cells beyond the object (cells 5 to 10 of 16) and 2 from the border.
    corner = picture[:, :, 2, 2][:, :, None]
    assert torch.equal(picture[:, :, 2, 2:14], corner.expand(3, 3, 12))
    assert (picture[:, :, 7, 7] - corner[..., 0]).abs().min() > 1e-4


def test_silhouette_is_black_and_white_and_has_nothing_to_learn(image_base: Path) -> None:
    attached = made(image_base, ",colour=silhouette,train=head")
    painter: Any = attached.model.get_submodule("painter")
    p = p2p.unit(clouds(2, 10))
    picture = painter.render(painter.features(p), p, torch.tensor([[1.0, -1.0]]).expand(2, 2))
    assert set(picture.unique().tolist()) == {0.0, 1.0} and not list(painter.parameters())
    names = {n for n, param in attached.model.named_parameters() if param.requires_grad}
    assert names == {"classifier.weight", "classifier.bias", "vit.embeddings.cls_token"}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_only_painter_head_token_and_norms_move(kind: str, image_base: Path, tmp_path: Path) -> None:
    """Weights and batch statistics of the image model stay, bit for bit; undoing gives the rest back."""
    folder = image_base if kind == "vit" else resnet(tmp_path)
    base = open_base(str(folder))
    attached = made(folder)
    model: Any = attached.model
    assert own_head(model) == own_head(base.model(TASK, seed=0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = read_data(DATA)
    task = task_of(data)
    rows = encode(data.splits["train"], base, task)
    settings = Training(lr=1e-2, steps=3, batch=8, seed=1)
    train(attached, rows, None, task, settings, device="cpu")
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    norms = tuple(f"{name}." for name, role in roles(model).items() if role == "norm")
    inside = {k for k in moved if not k.startswith(("painter.", "classifier"))}
    statistics = {k for k in before if k.endswith(("running_mean", "running_var")) and not k.startswith("painter.")}
    assert inside and all(k.startswith(norms) or k.endswith("cls_token") for k in inside)
    assert not inside & statistics and bool(statistics) == (kind == "resnet")
    assert {k for k in moved if k.startswith("painter.")} >= {
        f"painter.{name}"
        for name in ("lift.weight", "edge.weight", "mix.weight", "block.first.weight", "colour.1.weight")
    }
    assert {
        "painter.block.norm1.running_mean",
        "classifier.weight" if kind == "vit" else "classifier.1.weight",
    } <= moved
    attached.detach()
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if not k.startswith("painter."))
    assert not any(k.startswith("painter.") for k in after) and "forward" not in model.__dict__


def test_the_frozen_weights_get_no_gradient_and_the_painter_does(image_base: Path) -> None:
    attached = made(image_base, ",train=head")
    train_mode(attached.model)
    attached.model(points=clouds(), rows=torch.arange(3)).logits.square().sum().backward()
    grads = {n: p.grad for n, p in attached.model.named_parameters()}
    assert all(g is None for n, g in grads.items() if n.startswith("vit.") and not n.endswith("cls_token"))
    learned = [g for n, g in grads.items() if n.startswith("painter.") and not n.startswith("painter.block.norm")]
    assert all(g is not None and bool(g.any()) for g in learned)


def test_evaluation_averages_the_logits_of_fixed_views(image_base: Path) -> None:
    attached = made(image_base)
    model: Any = attached.model.eval()
    p, found = clouds(), p2p.painted(attached.model)
    with torch.no_grad():
        voted = model(points=p, rows=torch.arange(3)).logits
        q = p2p.unit(p)
        h = found.painter.features(q)
        seen = []
        for view in p2p.fixed_views(2, 2):
            pixels = found.painter.pixels(h, q, torch.from_numpy(view).expand(3, 2))
            seen.append(model(pixel_values=pixels).logits)
        torch.testing.assert_close(voted, torch.stack(seen).mean(0))
        with p2p.views(model, 1, 1):
            single = model(points=p, rows=torch.arange(3)).logits
        assert not torch.allclose(single, voted) and found.views == (2, 2)


def test_scores_during_training_look_once_and_votes_come_after(
    image_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = made(image_base)
    base, data = open_base(str(image_base)), read_data(DATA)
    task = task_of(data)
    rows = {split: encode(data.splits[split], base, task) for split in ("train", "validation")}
    seen: list[tuple[bool, int]] = []
    ordinary = p2p.Painted._views

    def watched(self: p2p.Painted, numbers: list[int]) -> Any:
        views = list(ordinary(self, numbers))
        seen.append((self.model.training, len(views)))
        return iter(views)

    monkeypatch.setattr(p2p.Painted, "_views", watched)
    train(attached, rows["train"], rows["validation"], task, Training(lr=1e-3, steps=2, batch=8), device="cpu")
    assert set(seen) == {(True, 1), (False, 1)}
    predict(attached.model, rows["validation"])
    assert seen[-1] == (False, 4)


def test_recomputed_blocks_keep_less_and_give_the_same_gradients(image_base: Path) -> None:
    grads, kept = [], []
    for option in ("", ",checkpoint=true"):
        attached = made(image_base, option)
        train_mode(attached.model)
        inputs = {"points": clouds(), "rows": torch.arange(3)}
        kept.append(measure.saved_for_backward_bytes(attached.model, inputs, lambda logits: logits.square().sum()))
        attached.model(**inputs).logits.square().sum().backward()
        grads.append({n: p.grad for n, p in attached.model.named_parameters() if p.grad is not None})
    assert kept[1] < 0.8 * kept[0]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_no_step_keeps_a_tensor_that_the_count_does_not_see(image_base: Path) -> None:
    attached = made(image_base)
    inputs = {"points": clouds(), "rows": torch.arange(3)}
    assert not measure.hidden_saves(attached.model, inputs, lambda logits: logits.square().sum())


def setting(base: Path, arm: str = f"p2p:{SMALL}", **training: Any) -> trial.Setting:
    chosen = {"epochs": 2, "batch": 8, "lr": 5e-3, **training}
    return trial.Setting(arm=arm, base=str(base), data=DATA, training=chosen, cache=False, device="cpu")


def test_a_run_leaves_a_brick_that_predicts_from_a_file(image_base: Path, tmp_path: Path) -> None:
    result = trial.run({"setting": asdict(setting(image_base)), "folder": str(tmp_path / "run")})
    matched = result["receipt"]["matched"]
    assert matched["painter"] and matched["head"] == ["classifier"] and len(matched["norms"]) == 5
    assert result["receipt"]["moved"] and all(
        n.startswith("painter.block.norm") for n in result["receipt"]["frozen_moved"]
    )
    # In parquet and in json, with labels and without, the same clouds give the same answers.
    folder = write_data(
        tmp_path / "data", {"test": {**DATA["test"], "points": [c.tolist() for c in DATA["test"]["points"]]}}
    )
    lines = [json.dumps({"points": c.tolist()}) for c in DATA["test"]["points"]]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    brick = tmp_path / "run" / "brick"
    found = brickyard.evaluate(brick=brick, data=str(folder), device="cpu", dtype="float32")
    assert found["score"]["mean"] == pytest.approx(result["score"]["mean"])
    brickyard.predict(
        brick=brick, data=str(tmp_path / "bare"), out=tmp_path / "p.parquet", device="cpu", dtype="float32"
    )
    made_up = pq.read_table(tmp_path / "p.parquet").to_pydict()
    stored = pq.read_table(tmp_path / "run" / "answers.parquet")["logits"].to_pylist()
    np.testing.assert_allclose(made_up["logits"], stored, atol=1e-5)
    assert set(made_up["prediction"]) <= {"ball", "table"}


def test_an_interrupted_run_sees_the_same_views_and_ends_in_the_same_bits(image_base: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class At:
        def after_step(self, state: Any) -> None:
            if state.step == 5:
                raise Stop

    found = []
    for name, stop in (("whole", False), ("cut", True)):
        if stop:
            with pytest.raises(Stop):
                trial.tune(trial.prepare(setting(image_base)), tmp_path / name, checkpoint_every=2, callbacks=(At(),))
        trial.tune(trial.prepare(setting(image_base)), tmp_path / name, checkpoint_every=2)
        found.append(bricks.load(tmp_path / name / "brick").tensors())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_accumulated_batches_show_the_same_views(image_base: Path) -> None:
    found = p2p.painted(made(image_base).model)
    found.model.train()
    whole = next(found._views([4, 8, 2]))
    np.testing.assert_array_equal(np.concatenate([next(found._views([4])), next(found._views([8, 2]))]), whole)


def test_other_methods_and_bases_are_refused_with_a_reason(text_base: Path, image_base: Path) -> None:
    for arm in ("lora:r=4", "full", f"p2p:{SMALL} + linear-probe"):
        with pytest.raises(Refused, match=r"no base reads points by itself; methods that turn .*: p2p"):
            trial.prepare(setting(image_base, arm))
    with pytest.raises(UsageError, match="the base reads text, the data hold points; choose a base that reads image"):
        trial.prepare(setting(text_base))
    image = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
    with pytest.raises(Refused, match="this task is image-classification: it paints"):
        resolve(parse("p2p"), image)
    with pytest.raises(UsageError, match="paints no point clouds"):
        p2p.painted(open_base(str(image_base)).model(image, seed=0))


def test_a_base_alone_is_not_scored_on_points(tmp_path: Path) -> None:
    folder = resnet(tmp_path / "net")
    data = {
        "test": {"points": DATA["test"]["points"], "label": ["LABEL_0", "LABEL_1"] * (len(DATA["test"]["label"]) // 2)}
    }
    with pytest.raises(UsageError, match="no base reads points by itself; give --brick"):
        brickyard.evaluate(base=folder, data=data, device="cpu")


def test_clouds_that_a_view_cannot_show_are_named_by_row(image_base: Path) -> None:
    line = torch.zeros(2, 4)
    flat = torch.stack([torch.stack([line, line], -1)[0], clouds(1, 4)[0, :, :2]])
    with pytest.raises(BadData, match=r"the cloud of row 31 \(counted from 0\) spans 0 in the picture"):
        p2p.cells(flat, 10, [31, 7])
    with pytest.raises(BadData, match=r"the cloud of row 1 .* spans nan"):
        p2p.cells(torch.stack([flat[1], torch.full_like(flat[1], torch.nan)]), 10)
    attached = made(image_base)
    with pytest.raises(BadData, match="a cloud has 3 points, fewer than neighbours=4"):
        attached.model(points=clouds(2, 3), rows=torch.arange(2))
    with pytest.raises(UsageError, match="an object of 17 pixels does not fit a picture of 16 x 16"):
        made(image_base, ",object_size=17")


@pytest.mark.parametrize(
    "options", ["neighbours=0", "width=6", "object_size=3", "views=[0,4]", "views=[4,4,4]", "smoothing=0.5", "dims=0"]
)
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(UsageError):
        resolve(parse(f"p2p:{options}"), TASK)
