"""CCA Merge of plain networks: invariants, where they are aligned, what is refused, and that B is really merged."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brickyard.core.errors import NotFinite, Refused, UnknownName, Unmatched, UsageError
from brickyard.merge import _align, cca_merge
from brickyard.merge._align_measure import measured
from brickyard.merge._align_points import by_name, discover, rewritten
from brickyard.merge._align_weights import weight_matching
from brickyard.merge.cca_merge import Config, align, average, distance, merge, merged, recalibrate


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perceptron(width: int = 12, act: type[nn.Module] = nn.ReLU, seed: int = 0) -> Any:
    """A perceptron of two hidden layers in float64: [B, 8] -> [B, 5]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise([8, width, width, 5]):
            layers += [nn.Linear(a, b), act()]
        return nn.Sequential(*layers[:-1]).double()


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual stream, a shortcut, a flatten: [B, 3, 6, 6] -> [B, 4]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.inner, self.inner_norm = nn.Conv2d(6, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
            self.outer = nn.Conv2d(7, 6, 3, padding=1)
            self.last, self.head = nn.Linear(6 * 9, 10), nn.Linear(10, 4)
            for norm in (self.stem_norm, self.inner_norm):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, 0.2, 1.0)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
                nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(self.last.bias, 1.0, 2.0)  # so that nothing is dead
        self.drop = nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + self.outer(nn.functional.relu(self.inner_norm(self.inner(x))))
        x = torch.flatten(nn.functional.max_pool2d(x.relu(), 2), 1)
        return self.head(self.drop(self.last(x).relu()))


def shuffled(model: Any, orders: dict[str, Tensor]) -> Any:
    """A copy of a network with the features of each point in another order."""
    out = copy.deepcopy(model)
    maps = {name: _align.permutation(order) for name, order in orders.items()}
    out.load_state_dict(rewritten(out.state_dict(), discover(model), maps))
    return out.eval()


def orders_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    draw_ = torch.Generator().manual_seed(seed)
    return {p.name: torch.randperm(p.width, generator=draw_) for p in discover(model)}


def test_without_activations_the_mapped_network_has_the_same_outputs() -> None:
    a, b = (perceptron(act=nn.Identity, seed=s) for s in (0, 1))
    x = draw(0, 200, 8)
    done = align([a, b], x, gamma=0.1)
    other = copy.deepcopy(b)
    other.load_state_dict(done.states[1])
    torch.testing.assert_close(other(x), b(x), atol=1e-8, rtol=0)
    assert not torch.allclose(other[0].weight, b[0].weight)
    again = align([a, b], x, method="orthogonal")
    other.load_state_dict(again.states[1])
    torch.testing.assert_close(other(x), b(x), atol=1e-8, rtol=0)


def test_without_activations_a_map_passes_a_batchnorm_exactly() -> None:
    def linear(seed: int) -> Any:
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(6)
        nn.init.normal_(norm.weight)  # negative scales too
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 3.0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()

    with torch.random.fork_rng(devices=[]):
        a, b = linear(0).eval(), linear(1).eval()
        with torch.no_grad():
            a[1].weight[2] = 0  # the reference's norm switches a channel off
    x = draw(0, 60, 3, 6, 6)
    other = copy.deepcopy(b)
    for points in (None, {"0": (["0", "1"], ["2"]), "2": (["2"], ["4"])}):
        other.load_state_dict(align([a, b], x, gamma=0.1, points=points).states[1])
        torch.testing.assert_close(other(x), b(x), atol=1e-8, rtol=0)
    other.load_state_dict(align([a, b], x, gamma=0.1, folds=False).states[1])
    assert not torch.allclose(other(x), b(x), atol=1e-2)
    for model in (a, b):
        model[1].weight.data.abs_().add_(0.1)
    kept = align([a, b], x, gamma=0.1).states[1]
    assert torch.equal(kept["1.weight"], a[1].weight) and torch.equal(kept["1.running_var"], a[1].running_var)


@pytest.mark.parametrize("method", ["cca", "permute", "weight-matching"])
@pytest.mark.parametrize("gamma", [1e-3, 10.0])
def test_a_permuted_copy_is_brought_back_and_the_merge_is_the_reference(method: str, gamma: float) -> None:
    a = perceptron(width=7, act=nn.GELU)  # no feature is dead, so that the covariances are not singular
    b = shuffled(a, orders_of(a))
    x = draw(0, 500, 8)
    torch.testing.assert_close(a(x), b(x))
    done = align([a, b], x, method, gamma)
    for name, tensor in average(done.states).items():
        torch.testing.assert_close(tensor, a.state_dict()[name], atol=1e-6, rtol=0)
    assert not torch.allclose(average([a.state_dict(), b.state_dict()])["0.weight"], a[0].weight, atol=1e-2)


@pytest.mark.parametrize("method", ["permute", "weight-matching"])
def test_permutations_go_through_convolutions_norms_streams_and_flattening(method: str) -> None:
    a = Residual().eval()
    b = shuffled(a, orders_of(a))
    x = draw(0, 60, 3, 6, 6)
    torch.testing.assert_close(a(x), b(x))
    done = align([a, b], x, method)
    for name, tensor in done.states[1].items():
        torch.testing.assert_close(tensor, a.state_dict()[name])


def test_cca_follows_convolutions_and_their_norms_to_the_reference() -> None:
    a = Residual().eval()
    b = shuffled(a, orders_of(a))
    done = align([a, b], draw(0, 80, 3, 6, 6), gamma=0.01)
    assert all(found.dead == (0, 0) for found in done.found)
    for name, tensor in done.states[1].items():
        torch.testing.assert_close(tensor, a.state_dict()[name], atol=1e-6, rtol=1e-6)


def test_copies_of_one_network_merge_to_it_even_with_dead_features() -> None:
    a = perceptron()
    with torch.no_grad():
        a[0].bias[:3] = -100.0
    x = draw(0, 100, 8)
    done = align([a] * 4, x, gamma=0.1, force=True)
    assert all(found.dead == (3, 3) for found in done.found if found.point == "0")
    for name, tensor in average(done.states).items():
        torch.testing.assert_close(tensor, a.state_dict()[name], atol=1e-8, rtol=0)
    found, _ = merge([a, a], x, force=True)
    torch.testing.assert_close(found(x), a(x), atol=1e-7, rtol=0)


@pytest.mark.parametrize("method", ["cca", "permute"])
def test_the_order_of_the_others_does_not_matter(method: str) -> None:
    a, b, c = (perceptron(seed=s) for s in range(3))
    x = draw(0, 200, 8)
    one, two = (average(align(models, x, method).states) for models in ([a, b, c], [a, c, b]))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-6, rtol=0)


def test_correlations_of_an_alignment_are_sorted_and_within_bounds() -> None:
    done = align([perceptron(seed=0), perceptron(seed=1)], draw(0, 100, 8), gamma=1e-3)
    assert {f.point for f in done.found} == {"0", "2"}
    for found in done.found:
        s = np.array(found.correlations)
        assert (np.diff(s) <= 0).all() and s[0] <= 1 + 1e-6 and s[-1] >= 0
        assert found.samples == 100 and found.width == 12 and found.condition >= 1


def test_cca_is_neither_a_permutation_nor_a_rotation_nor_the_reference() -> None:
    a, b = (perceptron(seed=s) for s in (0, 1))
    x = draw(0, 300, 8)
    t = align([a, b], x, gamma=0.01).maps[0]["0"].forward
    assert not torch.allclose(t @ t.T, torch.eye(12, dtype=torch.float64), atol=0.1)
    one, two = (merge([a, other], x, gamma=0.01)[0](x) for other in (b, perceptron(seed=2)))
    assert not torch.allclose(one, a(x), atol=1e-2) and not torch.allclose(one, two, atol=1e-2)


def test_the_ridge_is_chosen_by_agreement_with_the_ensemble() -> None:
    a, b = (perceptron(seed=s) for s in (0, 1))
    x = draw(0, 300, 8)
    done = align([a, b], x)
    target = (a(x).softmax(-1) + b(x).softmax(-1)).argmax(-1)
    shares = {g: float((merge([a, b], x, gamma=g)[0](x).argmax(-1) == target).double().mean()) for g in cca_merge.GRID}
    assert done.agreement == pytest.approx(shares)
    assert shares[done.gamma] == max(shares.values())  # type: ignore[index]
    assert align([a, b], x, gamma=0.1).agreement == {}
    fixed = align([a, b], x, gamma=0.1 * 2.0, relative=False)
    scale = float(a[:2](x).detach().var(0, correction=0).mean())
    torch.testing.assert_close(
        fixed.maps[0]["0"].forward, align([a, b], x, gamma=0.2 / scale).maps[0]["0"].forward, atol=1e-9, rtol=1e-9
    )


def test_batches_give_the_same_as_one_tensor_and_models_stay_as_they_are() -> None:
    models = [Residual(seed=s).train() for s in (0, 1)]
    before = [copy.deepcopy(m.state_dict()) for m in models]
    x = draw(0, 80, 3, 6, 6)
    whole = align(models, x, gamma=0.1)
    parts = align(models, [(part,) for part in x.split(20)], gamma=0.1)
    for name, tensor in whole.states[1].items():
        torch.testing.assert_close(tensor, parts.states[1][name])
    assert all(m.training and m.drop.training for m in models)  # dropout was off meanwhile, or batches would differ
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_batchnorm_statistics_are_the_plain_average_over_the_inputs() -> None:
    a, b = (Residual(seed=s) for s in (0, 1))
    x = draw(0, 80, 3, 6, 6)
    found, done = merge([a, b], x, gamma=0.1)
    stem = found.stem(x)  # type: ignore[operator]
    torch.testing.assert_close(found.stem_norm.running_mean, stem.mean((0, 2, 3)))
    torch.testing.assert_close(found.stem_norm.running_var, stem.transpose(0, 1).flatten(1).var(1))
    assert found.stem_norm.momentum == 0.1 and not found.training
    halves = merged(a, done.states, [x[:40], x[40:]])
    torch.testing.assert_close(halves.stem_norm.running_mean, stem.mean((0, 2, 3)))
    small = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with pytest.raises(UsageError, match="two values a channel"):
        recalibrate(small, [draw(0, 1, 8)])


# Points.


def test_points_are_found_where_spaces_are() -> None:
    found = {p.name: p for p in discover(Residual())}
    assert found.keys() == {"stem", "inner", "last"}
    stream = found["stem"]
    assert {u.tensor for u in stream.uses if not u.inward} == {
        "stem.weight",
        "stem_norm.weight",
        "stem_norm.bias",
        "stem_norm.running_mean",
        "stem_norm.running_var",
        "outer.weight",
        "outer.bias",
    }
    assert {(u.tensor, u.block) for u in stream.uses if u.inward} == {("inner.weight", 1), ("last.weight", 9)}
    assert not any(u.tensor.startswith("head.") and not u.inward for p in found.values() for u in p.uses)
    named = by_name(
        Residual(),
        {
            "stem": (["stem", "stem_norm", "outer"], ["inner", "last"]),
            "inner": {"producers": ["inner", "inner_norm"], "consumers": ["outer"]},
            "last": (["last"], ["head"]),
        },
    )
    for point in named:
        assert set(point.uses) == set(found[point.name].uses) and point.sites == found[point.name].sites


def test_products_and_layer_norms_bear_permutations_only() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.norm, self.down = (
                nn.Linear(4, 6),
                nn.Linear(4, 6),
                nn.LayerNorm(6),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(torch.tanh(self.gate(x)) * self.up(x)))

    torch.manual_seed(0)
    a, b = Gated().double(), Gated().double()
    (point,) = discover(a)
    assert point.kind == "permute"
    done = align([a, b], draw(0, 100, 4))
    assert done.found[0].map == "permute" and done.gamma is None
    other = copy.deepcopy(b)
    other.load_state_dict(done.states[1])
    x = draw(1, 10, 4)
    torch.testing.assert_close(other(x), b(x))


def test_what_cannot_be_traced_or_followed_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x if x.sum() > 0 else -x)

    with pytest.raises(Refused, match=r"cannot be traced .* in: 0\); .*points="):
        discover(nn.Sequential(Branching(), nn.ReLU()))
    with pytest.raises(Refused, match=r"1 \(GRU\)"):
        discover(nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4)))
    with pytest.raises(Refused, match="2 groups"):
        discover(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)))
    with pytest.raises(Refused, match="no hidden space"):
        discover(nn.Sequential(nn.Linear(4, 4)))
    named = {"hidden": (["0.first"], ["0.second"])}
    torch.manual_seed(0)
    a, b = (nn.Sequential(Branching()).double() for _ in range(2))
    assert align([a, b], draw(0, 30, 4), points=named, method="permute").points[0].name == "hidden"


def test_points_by_name_are_checked() -> None:
    model = perceptron()
    with pytest.raises(Unmatched, match="did you mean"):
        by_name(model, {"x": (["00"], ["2"])})
    with pytest.raises(UsageError, match="one point with one map"):
        by_name(model, {"x": (["0"], ["2"]), "y": (["0"], ["4"])})
    with pytest.raises(UsageError, match="two lists"):
        by_name(model, {"x": ("0", "2")})
    with pytest.raises(UsageError, match="one width"):
        by_name(model, {"x": (["0", "4"], ["2"])})
    with pytest.raises(Refused, match="consumers are Linear or Conv"):
        by_name(model, {"x": (["0"], ["1"])})
    with pytest.raises(Refused, match="writes no features"):
        by_name(model, {"x": (["0", "1"], ["2"])})


# What is refused.


def test_models_that_do_not_fit_are_named() -> None:
    a, x = perceptron(), draw(0, 100, 8)
    with pytest.raises(Refused, match=r"0.weight is \[9, 8\], in the reference \[12, 8\]"):
        align([a, perceptron(width=9)], x)
    with pytest.raises(Refused, match=r"1 is a GELU, in the reference a ReLU"):
        align([a, perceptron(act=nn.GELU, seed=1)], x)
    with pytest.raises(UsageError, match="at least one other"):
        align([a], x)
    with pytest.raises(UnknownName, match="zipt"):
        align([a, a], x, method="zipt")
    with pytest.raises(UsageError, match="gamma=-1"):
        align([a, a], x, gamma=-1)


def test_networks_of_one_ancestor_are_refused_unless_forced() -> None:
    a = perceptron()
    b = copy.deepcopy(a)
    with torch.no_grad():
        for p in b.parameters():
            p += 0.02 * draw(1, *p.shape)
    x = draw(0, 100, 8)
    assert distance(a.state_dict(), perceptron(seed=1).state_dict()) > 1.2
    with pytest.raises(Refused, match="task-arithmetic"):
        align([a, b], x)
    assert len(align([a, b], x, force=True, gamma=0.1).states) == 2


def test_activations_and_inputs_that_make_no_sense_are_refused() -> None:
    a, b = (perceptron(seed=s) for s in (0, 1))
    x = draw(0, 100, 8)
    bad = x.clone()
    bad[3, 2] = torch.inf
    with pytest.raises(NotFinite, match=r"point 0: activations of model 0"):
        align([a, b], bad)
    with pytest.raises(UsageError, match="several times"):
        align([a, b], iter([x]))
    with pytest.raises(UsageError, match="without labels"):
        align([a, b], [(x, x)])
    with pytest.raises(UsageError, match="no batch"):
        align([a, b], [])
    with pytest.warns(UserWarning, match="10 samples for 12 features"):
        align([a, b], x[:10], gamma=0.1)
    with torch.no_grad():
        b[0].bias[0] = -1000.0
    with pytest.raises(Refused, match="larger gamma"):
        align([a, b], x, gamma=0)
    with torch.no_grad():
        a[0].bias.fill_(-1000.0)
    with pytest.raises(Refused, match="none of the reference's 12 features changes"):
        align([a, b], x)


def test_only_one_batch_of_the_reference_is_held() -> None:
    models = [perceptron(seed=s) for s in range(3)]
    found = measured(models, discover(models[0]), list(draw(0, 90, 8).split(30)))["0"]
    x, y, z = (m[:2](draw(0, 90, 8)).detach().numpy() for m in models)
    for k, other in enumerate((y, z), 1):
        wanted = np.cov(np.hstack([x, other]).T, bias=True)
        np.testing.assert_allclose(found.covariances(k).xy, wanted[:12, 12:], atol=1e-12)
    assert len(found._own) == 3 and len(found._with) == 3  # 2 K - 1 blocks: the first of _with stays empty
    assert not found._with[0].any()


def test_weight_matching_makes_the_weights_closer_and_moves_no_head() -> None:
    a, b = (perceptron(seed=s) for s in (0, 1))
    points = discover(a)
    state = rewritten(b.state_dict(), points, weight_matching(a.state_dict(), b.state_dict(), points))
    assert distance(a.state_dict(), state) < distance(a.state_dict(), b.state_dict())
    other = copy.deepcopy(b)
    other.load_state_dict(state)
    x = draw(0, 20, 8)
    torch.testing.assert_close(other(x), b(x))


def test_options_are_checked() -> None:
    assert Config().gamma == "auto"
    with pytest.raises(UnknownName, match="permute"):
        Config(method="permutes")
    with pytest.raises(UnknownName, match="orthogonal"):
        Config(residual="rotated")
    with pytest.raises(UsageError, match="rows=-1"):
        Config(rows=-1)
    with pytest.raises(UsageError, match="gamma='much'"):
        Config(gamma="much")
