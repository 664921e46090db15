"""Mediator's mathematics: conflict, choice of blocks, sparse residuals, the router, and weights that come and go."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from brickyard.core import registry
from brickyard.core.base import open_base
from brickyard.core.errors import BadBrick, BadData, NotFinite, UnknownName, UsageError, WrongBase
from brickyard.core.fitted_head import fit_on
from brickyard.core.task import Task
from brickyard.route._conflict import block_tensors, conflict
from brickyard.route._residual_store import (
    BITMAP,
    GAPS,
    Sparse,
    digest,
    largest,
    pack,
    quantised,
    read_expert,
    unpack,
    write_expert,
)
from brickyard.route._routed_model import RoutedModel, network_of
from brickyard.route._router import blend, fit_router, temperature_of, uncertainty
from brickyard.route.mediator import Config, choose, decompose, within_budget

RULES = ("sign", "magnitude", "cosine")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score(taus: list[Tensor], rule: str, trim: float = 1.0) -> float:
    base = draw(taus[0].numel(), seed=99)
    experts = [{"w": base + tau} for tau in taus]
    return conflict({"w": base}, experts, {"block": ["w"]}, rule=rule, trim=trim)["block"]


@pytest.mark.parametrize("rule", RULES)
def test_identical_experts_do_not_conflict_and_opposed_ones_do_throughout(rule: str) -> None:
    tau = draw(400)
    assert score([tau, tau, tau], rule) == pytest.approx(0, abs=1e-6)
    assert score([tau, tau], rule, trim=0.2) == pytest.approx(0, abs=1e-6)
    assert score([tau, -tau], rule) == pytest.approx(1, abs=1e-5)


def test_the_sign_score_is_the_share_of_all_weights_that_disagree() -> None:
    taus = [draw(500, seed=seed) for seed in range(3)]
    kept = [torch.where(tau.abs() >= tau.abs().sort(descending=True).values[99], tau, 0.0) for tau in taus]
    wanted = np.mean([any(a[j] * b[j] < 0 for a in kept for b in kept) for j in range(500)])
    assert score(taus, "sign", trim=0.2) == pytest.approx(wanted, abs=0.005) and 0 < wanted < 0.2
    # After trimming only a fifth is left that could disagree.
    assert score([taus[0], -taus[0]], "sign", trim=0.2) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("trim", [0.2, 1.0])
def test_conflict_does_not_change_when_a_change_is_scaled(trim: float) -> None:
    base, taus = torch.zeros(300), [draw(300, seed=seed) for seed in range(3)]
    for rule in ("sign", "cosine"):
        scores = []
        for factor in (1.0, 0.25, 8.0):
            experts = [{"w": taus[0] * factor}, {"w": taus[1]}, {"w": taus[2]}]
            scores.append(conflict({"w": base}, experts, {"b": ["w"]}, rule=rule, trim=trim)["b"])
        assert scores == pytest.approx([scores[0]] * 3, abs=1e-9) and scores[0] > 0


def test_blocks_are_scored_in_one_pass_with_one_tensor_of_each_model() -> None:
    alive: set[int] = set()
    most, reads = [0], []

    class Disk(Mapping[str, Tensor]):
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def __getitem__(self, name: str) -> Tensor:
            made = draw(64, seed=self.seed + int(name))
            key = len(reads)
            reads.append((self.seed, name))
            alive.add(key)
            weakref.finalize(made, alive.discard, key)
            most[0] = max(most[0], len(alive))
            return made

        def __iter__(self) -> Iterator[str]:
            return iter("0123")

        def __len__(self) -> int:
            return 4

    found = conflict(Disk(0), [Disk(100), Disk(200)], {"a": ["0", "1"], "b": ["2", "3"]}, rule="sign", trim=0.5)
    assert found.keys() == {"a", "b"} and len(reads) == len(set(reads)) == 12
    assert most[0] <= 3


def test_a_tensor_that_is_not_finite_is_named() -> None:
    with pytest.raises(NotFinite, match=r"tensor w of expert 2"):
        conflict({"w": draw(4)}, [{"w": draw(4)}, {"w": draw(4) / 0}], {"b": ["w"]}, rule="sign", trim=1.0)


def test_blocks_above_the_mean_are_routed_or_as_many_as_are_asked_for() -> None:
    scores = [0.1, 0.5, 0.4, 0.1]
    assert choose(scores) == [1, 2] and choose(scores, k=1.2) == [1] and choose(scores, k=5.0) == []
    assert choose(scores, 0) == [] and choose(scores, 1) == [1] and choose(scores, 3) == [0, 1, 2]
    assert choose(scores, (3, 0)) == [0, 3]
    assert choose([0.3] * 4) == []  # no block stands out
    for wrong in (5, (4,), (1, 1)):
        with pytest.raises(UsageError, match="layers="):
            choose(scores, wrong)


def test_a_budget_routes_by_falling_score_as_far_as_it_reaches() -> None:
    scores, elements = [0.1, 0.5, 0.4], [8000, 8000, 8000]
    each = 2 * (800 * 2 + 1000)  # two experts: fp16 values and a bit an entry
    for blocks, wanted in ((0, []), (1, [1]), (2, [1, 2]), (3, [0, 1, 2])):
        config = Config(budget=1 + (blocks * each + 1) / 96000)
        assert within_budget(scores, elements, config, experts=2, dense_bytes=96000) == wanted


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.3, 0.9, 1.0])
def test_packing_and_unpacking_is_the_identity(values: str, density: float) -> None:
    residual = 1e-3 * draw(20000)
    kept = largest({"w": residual}, density)["w"]
    made = quantised(residual, kept, values)
    packed = pack(made)
    back = unpack(packed)
    assert torch.equal(back.places_K, made.places_K) and torch.equal(back.codes_K, made.codes_K)
    assert back.scale == made.scale and torch.equal(back.dense(), made.dense())
    assert packed.index_B.numel() <= 2500 and packed.form == (BITMAP if density > 0.12 else GAPS)
    error = (made.dense()[kept] - residual[kept]).abs().max() if len(kept) else 0.0
    assert error <= {"float32": 0, "float16": 2.0**-11, "int8": 0.004}[values] * float(residual.abs().max())


def test_a_sparse_tensor_is_what_scipy_makes_of_the_same_places() -> None:
    residual = draw(3000)
    made = quantised(residual, largest({"w": residual}, 0.1)["w"], "float32")
    wanted = sparse.coo_array(
        (residual.numpy()[made.places_K], (np.zeros(300, int), made.places_K.numpy())), shape=(1, 3000)
    )
    assert np.array_equal(unpack(pack(made)).dense().numpy(), wanted.toarray()[0])


def test_far_apart_places_and_empty_tensors_survive() -> None:
    far = torch.tensor([0, 1, 127, 128, 300, 20_000, 3_000_000])
    packed = pack(Sparse(3_000_001, far, torch.ones(7), 1.0))
    assert packed.form == GAPS and packed.index_B.numel() == 4 * 1 + 2 + 3 + 4
    assert torch.equal(unpack(packed).places_K, far)
    none = pack(Sparse(10, torch.zeros(0, dtype=torch.int64), torch.zeros(0), 1.0))
    assert unpack(none).dense().tolist() == [0.0] * 10


def test_exactly_the_largest_of_a_block_stay_also_among_equals() -> None:
    tensors = {"a": draw(300), "b": 5 * draw(700, seed=1)}
    places = largest(tensors, 0.1)
    kept = torch.cat([tensors[name][places[name]].abs() for name in ("a", "b")])
    everything = torch.cat([tensors["a"], tensors["b"]]).abs().sort(descending=True).values
    assert torch.equal(kept.sort(descending=True).values, everything[:100])
    assert len(places["b"]) > 90  # the threshold is the block's, not each tensor's
    equal = {"a": torch.ones(50), "b": torch.zeros(50)}
    assert len(largest(equal, 0.3)["a"]) == 30 and len(largest(equal, 0.8)["a"]) == 50
    assert len(largest(equal, 0.8)["b"]) == 0  # zeros are nothing to keep


def test_sparse_files_know_their_dense_model(tmp_path: Path) -> None:
    dense = {"w": draw(100)}
    own = {"w": pack(quantised(draw(100, seed=1), largest({"w": draw(100, seed=1)}, 0.2)["w"], "float16"))}
    path = tmp_path / "expert.safetensors"
    write_expert(path, own, digest(dense))
    back = read_expert(path, {"w": 100}, digest(dense))["w"]
    assert torch.equal(unpack(back).dense(), unpack(own["w"]).dense())
    with pytest.raises(WrongBase, match="belongs to another dense model"):
        read_expert(path, {"w": 100}, digest({"w": draw(100, seed=5)}))
    with pytest.raises(BadBrick, match="no such tensor"):
        read_expert(path, {"v": 100}, digest(dense))
    with pytest.raises(BadBrick, match="damaged"):
        read_expert(path, {"w": 20}, digest(dense))


def test_uncertainty_and_blends() -> None:
    p_NT = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.6, 0.35, 0.05], [0.05, 0.9, 0.05]])
    u_N = uncertainty(p_NT)
    assert u_N[0] == 0.0 and u_N[1] == pytest.approx(1.0) and ((u_N >= 0) & (u_N <= 1)).all()
    w_NT = blend(p_NT, 0.0)
    assert w_NT.sum(axis=1).tolist() == pytest.approx([1.0] * 4)
    assert w_NT[2].tolist() == pytest.approx([0.6 / 0.95, 0.35 / 0.95, 0.0])
    assert w_NT[3].tolist() == [0.0, 1.0, 0.0]  # 0.9 is enough
    assert blend(p_NT, 1.0).max(axis=1).tolist() == [1.0] * 4  # never blended
    assert np.count_nonzero(blend(p_NT, 0.0, top_k=2), axis=1).tolist() == [1, 2, 2, 2]
    assert uncertainty(np.ones((2, 1))).tolist() == [0.0, 0.0] and blend(np.ones((2, 1)), 0.0).tolist() == [[1.0]] * 2


def test_the_blend_is_the_smallest_set_that_holds_the_mass() -> None:
    draw_NT = np.random.Generator(np.random.PCG64(0)).dirichlet(np.ones(5), size=200)
    for p_T, w_T in zip(draw_NT, blend(draw_NT, 0.0), strict=True):
        kept = w_T > 0
        assert p_T[kept].sum() >= 0.9 - 1e-9 > p_T[kept].sum() - p_T[kept].min()
        assert w_T[kept] == pytest.approx(p_T[kept] / p_T[kept].sum())


def clouds(seed: int, apart: float = 3.0) -> list[Tensor]:
    return [draw(60, 4, seed=10 * seed + t) + apart * torch.eye(4)[t] for t in range(3)]


def test_the_router_is_a_calibrated_logistic_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    router = fit_router(clouds(1), clouds(2))
    assert router.report["accuracy"] > 0.8 and router.report["nats"] <= router.report["nats_uncalibrated"] + 0.01
    p_NT = router.probabilities(torch.cat(clouds(2)))
    assert p_NT.sum(axis=1) == pytest.approx(np.ones(180))
    assert router.u0 == pytest.approx(np.percentile(uncertainty(p_NT), 95)) and 0 < router.u0 < 1
    assert router.report["blended"] == pytest.approx(0.05, abs=0.006)
    # Without smoothing, the fit is the one of another implementation.
    x_ND, y_N = torch.cat(clouds(1)).double(), torch.arange(3).repeat_interleave(60)
    scaled = ((x_ND - x_ND.mean(0)) / x_ND.std(0)).numpy()
    other = linear.LogisticRegression(C=1 / (1e-3 * 180), tol=1e-8, max_iter=5000).fit(scaled, y_N.numpy())
    task = Task("text-classification", "accuracy", ("0", "1", "2"), 3, "text")
    head = fit_on(x_ND.float(), y_N, task)
    z_NT = (x_ND.float() @ head.weight_KD.T + head.bias_K).softmax(-1).numpy()
    assert np.abs(z_NT - other.predict_proba(scaled)).max() < 2e-3
    smooth = fit_on(x_ND.float(), y_N, task, smoothing=0.1)
    assert float(smooth.weight_KD.norm()) < 0.8 * float(head.weight_KD.norm())


def test_the_temperature_is_the_best_of_a_grid_and_cools_what_is_too_sure() -> None:
    z_NT = np.random.Generator(np.random.PCG64(1)).normal(size=(300, 3))
    truth = (z_NT + np.random.Generator(np.random.PCG64(2)).gumbel(size=z_NT.shape)).argmax(axis=1)
    assert temperature_of(z_NT, truth) == pytest.approx(1.0, abs=0.3)
    assert temperature_of(5 * z_NT, truth) == pytest.approx(5 * temperature_of(z_NT, truth), rel=1e-3)

    def loss(t: float) -> float:
        log_p = torch.from_numpy(z_NT / t).log_softmax(-1).numpy()
        target = np.full(z_NT.shape, 1 / 303)
        target[np.arange(300), truth] = 301 / 303
        return -(target * log_p).sum()

    grid = np.geomspace(0.1, 10, 400)
    assert temperature_of(z_NT, truth) == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=0.02)
    # A router that makes no error on few held-out prompts is still not sure of everything.
    assert temperature_of(10 * np.eye(3)[[0, 1, 2]], np.arange(3)) > 1


def test_a_router_of_one_task_or_without_prompts_is_refused() -> None:
    with pytest.raises(UsageError, match="1 was given"):
        fit_router(clouds(1)[:1], clouds(2)[:1])
    with pytest.raises(BadData, match="task 2 has 60 prompts to fit the router on and 0 held out"):
        fit_router(clouds(1), [clouds(2)[0], torch.zeros(0, 4), clouds(2)[2]])


@pytest.mark.parametrize(
    "options",
    [
        {"u0": 1.5},
        {"u0": -0.1},
        {"density": 1.2},
        {"trim": 0.0},
        {"mass": 0.0},
        {"budget": 0.5},
        {"layers": 2, "k": 1.0},
    ],
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(UsageError, match="mediator: "):
        registry.config("mediator", options)


@pytest.fixture(scope="module")
def family(text_base: Path) -> dict:
    """A base of two blocks and three experts, each as all tensors by the base's names; D is their mean."""
    base = open_base(str(text_base))
    backbone, _ = network_of(base)
    start = {name: tensor.clone() for name, tensor in backbone.state_dict().items() if name in base.weights}
    experts = {
        f"t{t}": {
            name: tensor + 0.02 * draw(*tensor.shape, seed=7 * t + i) for i, (name, tensor) in enumerate(start.items())
        }
        for t in range(3)
    }
    dense = {name: torch.stack([e[name] for e in experts.values()]).mean(0) for name in start}
    blocks = block_tensors(base)
    return {"base": base, "backbone": backbone, "experts": experts, "dense": dense, "blocks": blocks}


def served(family: dict, chosen: list[int], **options: object) -> RoutedModel:
    family["backbone"].load_state_dict(family["dense"])
    names = list(family["blocks"].values())
    config = registry.config("mediator", options)
    packed = decompose(family["dense"], family["experts"], [names[i] for i in chosen], config)
    return RoutedModel(family["base"], family["backbone"], packed)


def state(model: RoutedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}


@pytest.mark.parametrize("chosen", [[1], [0, 1], []])
def test_whole_residuals_give_each_expert_in_routed_blocks_and_the_dense_model_elsewhere(
    family: dict, chosen: list[int]
) -> None:
    model = served(family, chosen, density=1.0, values="float32")
    routed = {name for i in chosen for name in list(family["blocks"].values())[i]}
    assert len(family["blocks"]) == 2 and not any("embeddings" in n or "pooler" in n for n in routed)
    for task, expert in family["experts"].items():
        with model.activate(task):
            for name, found in state(model).items():
                if name in routed:
                    assert (found - expert[name]).abs().max() < 1e-6
                else:
                    assert torch.equal(found, family["dense"][name])


def test_a_single_expert_is_its_own_dense_model(family: dict) -> None:
    only = {**family, "experts": {"t1": family["experts"]["t1"]}, "dense": family["experts"]["t1"]}
    model = served(only, [0, 1])
    with model.activate("t1"):
        assert all(torch.equal(found, only["dense"][name]) for name, found in state(model).items())
    assert model.bytes_held()["experts"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaving_an_expert_leaves_the_dense_model_bit_for_bit(family: dict, dtype: torch.dtype) -> None:
    model = served(family, [0, 1], density=0.3)
    try:
        model.backbone.to(dtype)
        before = state(model)
        for which in ("t0", {"t0": 0.5, "t1": 0.2, "t2": 0.3}):
            with model.activate(which):
                assert any(not torch.equal(found, before[name]) for name, found in state(model).items())
            assert all(torch.equal(found, before[name]) for name, found in state(model).items())
        with pytest.raises(ZeroDivisionError), model.activate("t1"):
            raise ZeroDivisionError
        assert all(torch.equal(found, before[name]) for name, found in state(model).items())
        assert model.active is None
    finally:
        model.backbone.to(torch.float32)


def test_blended_experts_add_up(family: dict) -> None:
    model = served(family, [0, 1], density=1.0, values="float32")
    with model.activate({"t0": 0.25, "t2": 0.75}):
        found = state(model)
    for names in family["blocks"].values():
        for name in names:
            wanted = 0.25 * family["experts"]["t0"][name] + 0.75 * family["experts"]["t2"][name]
            torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-5)


def test_residuals_are_of_the_dense_model_and_may_be_rescaled(family: dict) -> None:
    name = next(iter(family["blocks"].values()))[-1]
    for rescale in (False, True):
        model = served(family, [0], density=0.1, values="float32", rescale=rescale)
        kept = {n: unpack(p).dense() for n, p in model.experts["t0"].items()}
        whole = {
            n: (family["experts"]["t0"][n] - family["dense"][n]).flatten()
            for n in next(iter(family["blocks"].values()))
        }
        norm = lambda parts: float(torch.cat(list(parts)).norm())  # noqa: E731
        count = sum(int(part.count_nonzero()) for part in kept.values())
        assert count == round(0.1 * sum(part.numel() for part in whole.values()))
        if rescale:
            assert norm(kept.values()) == pytest.approx(norm(whole.values()), rel=1e-5)
        else:
            places = kept[name].nonzero()[:, 0]
            assert len(places) and torch.equal(kept[name][places], whole[name][places])


def test_wrong_weights_of_experts_are_refused(family: dict) -> None:
    model = served(family, [0])
    for which in ({"t0": 0.5}, {"t0": 1.5, "t1": -0.5}, {}):
        with pytest.raises(UsageError, match="sum of 1"), model.activate(which):
            pass
    with pytest.raises(UnknownName, match="did you mean"), model.activate("t9"):
        pass
    with model.activate("t0"), pytest.raises(UsageError, match="active already"), model.activate("t1"):
        pass
    with pytest.raises(UsageError, match="no router"):
        model.route(["good"])
