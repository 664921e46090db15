"""MediPhi: Breadcrumbs' mask and the repair as equations, the engine against them, its data, its check, its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import documents
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from brickyard.checks import mediphi as check
from brickyard.core import registry
from brickyard.core.errors import UsageError
from brickyard.core.files import write_json
from brickyard.embedded import _specialities, data, python_source
from brickyard.merge.mediphi import breadcrumbs, parts, products_with_change, ranks_kept, repair
from brickyard.merge.slerp import cosine_of, products_of, slerp
from brickyard.merging.merge import merge, resolve
from brickyard.recipe.steps import read
from brickyard.recipe.verbs import tries


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 1.0), st.floats(0.0, 0.5), st.integers(0, 10**6))
def test_breadcrumbs_keeps_the_ranks_between_its_two_ends(n: int, density: float, gamma: float, seed: int) -> None:
    tau = torch.from_numpy(np.random.default_rng(seed).permutation(n) + 1.0).float() * (-1) ** seed
    kept = breadcrumbs(tau, density, gamma)
    count = max(1, int(density * n))
    dropped = min(int(gamma * n), n - count)
    # An independent way: by rank, of distinct magnitudes.
    ranked = np.argsort(-np.abs(tau.numpy()))
    wanted = np.zeros(n, dtype=np.float32)
    wanted[ranked[dropped : dropped + count]] = tau.numpy()[ranked[dropped : dropped + count]]
    assert np.array_equal(kept.numpy(), wanted)
    assert int((kept != 0).sum()) == count


def test_breadcrumbs_at_its_edges() -> None:
    tau = noise(0, 50)
    assert torch.equal(breadcrumbs(tau, 1.0, 0.0), tau)
    assert torch.equal(breadcrumbs(tau, 1.0, 0.3), tau)  # density goes first: then no entry is an outlier
    assert torch.equal(breadcrumbs(torch.ones(7), 0.3, 0.5), torch.ones(7))  # of equals all stay
    assert int((breadcrumbs(noise(1, 3), 0.1, 0.01) != 0).sum()) == 1  # smaller than 1 / gamma and 1 / density
    assert ranks_kept(200, 0.9, 0.01) == (3, 182) and ranks_kept(1, 0.5, 0.9) == (1, 1)


@pytest.mark.parametrize("size", [1e-3, 1.5])  # a line, an arc
def test_the_repair_is_slerp_less_the_base(size: float) -> None:
    base, tau = noise(0, 40), size * noise(1, 40)
    torch.testing.assert_close(products_with_change(base, tau), products_of(base, base + tau), rtol=1e-5, atol=1e-5)
    cosine = cosine_of(products_with_change(base, tau).tolist())
    for t in (0.2, 0.7):
        found = repair(base, tau, *parts(cosine, t))
        torch.testing.assert_close(found, slerp(base, base + tau, t) - base, rtol=1e-4, atol=1e-6)
    if size < 1:
        assert torch.equal(repair(base, tau, *parts(cosine, 0.7)), 0.7 * tau)
    assert parts(1.0, 0.9)[0] == 0.0
    torch.testing.assert_close(repair(base, tau, *parts(cosine, 1.0)), tau)


def checkpoint(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    return folder


def models(folder: Path) -> tuple[Path, list[Path]]:
    """A base and three experts: one tensor moves a little, one far from the base, one is untouched in two of them."""
    shapes = {"layers.0.near.weight": (20, 30), "layers.1.far.weight": (40, 9), "layers.2.rare.weight": (11,)}
    start = {name: noise(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    out = []
    for k in range(3):
        moved = {}
        for i, (name, tensor) in enumerate(start.items()):
            size = (0.003, 0.6, 0.05 if k == 0 else 0.0)[i]
            moved[name] = tensor + size * noise(10 * k + i + 50, *tensor.shape)
        out.append(checkpoint(folder / f"expert{k}", moved))
    return checkpoint(folder / "base", start), out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_one_merge_does_what_repair_and_breadcrumbs_do_one_after_the_other(tmp_path: Path) -> None:
    base, experts = models(tmp_path)
    result = merge(
        "mediphi:t=0.6,density=0.7,gamma=0.05,scale=0.4",
        base=str(base),
        bricks=experts,
        out=tmp_path / "one",
        force=True,
    )
    for k, expert in enumerate(experts):
        merge("slerp:t=0.6", base=str(base), bricks=[expert], out=tmp_path / f"fixed{k}", force=True)
    arm = "breadcrumbs:density=0.7,gamma=0.05,scale=0.4"
    merge(arm, base=str(base), bricks=[tmp_path / f"fixed{k}" for k in range(3)], out=tmp_path / "two", force=True)
    start, found, wanted = weights(base), weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in start.items():
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(found[name], tensor)
        taus = [weights(tmp_path / f"fixed{k}")[name] - tensor for k in range(3)]
        summed = sum(breadcrumbs(tau.flatten(), 0.7, 0.05).view_as(tau) for tau in taus)
        torch.testing.assert_close(found[name], tensor + 0.4 * summed, rtol=1e-4, atol=1e-5)
    straight = {name: [one["straight"] for one in known] for name, known in result["known"].items()}
    assert straight["layers.0.near.weight"] == [True] * 3 and straight["layers.1.far.weight"] == [False] * 3


def test_without_a_mask_breadcrumbs_is_task_arithmetic_to_the_bit(tmp_path: Path) -> None:
    base, experts = models(tmp_path)
    given: dict[str, Any] = {"base": str(base), "bricks": experts, "force": True}
    merge("breadcrumbs:density=1.0,gamma=0.0,scale=0.3", out=tmp_path / "crumbs", **given)
    merge("task-arithmetic:scale=0.3", out=tmp_path / "sum", **given)
    found, wanted = weights(tmp_path / "crumbs"), weights(tmp_path / "sum")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    merge("breadcrumbs:density=1.0,gamma=0.0,scale=0.3", out=tmp_path / "threads", threads=1, **given)
    assert all(torch.equal(weights(tmp_path / "threads")[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("arm", ["mediphi:t=0", "mediphi:density=0", "breadcrumbs:gamma=1", "mediphi:t=1.5"])
def test_options_out_of_range_are_refused(arm: str) -> None:
    with pytest.raises(UsageError, match=r"mediphi: \w+=[\d.]+; expected"):
        resolve(arm.replace("=0", "=0.0").replace("gamma=1", "gamma=1.0"))


def test_specialities_are_apart_and_their_documents_are_whole_pieces() -> None:
    found = {name: data(f"python-{name}") for name in ("network", "numeric", "text", "general")}
    texts = {name: [t for split in splits.values() for t in split["text"]] for name, splits in found.items()}
    every = [text for some in texts.values() for text in some]
    assert len(set(every)) == len(every) and max(map(len, every)) <= _specialities.EXCERPT
    assert all(len(splits["test"]["text"]) >= _specialities.FEWEST for splits in found.values())
    assert any("socket" in t for t in texts["network"]) and any("Decimal" in t for t in texts["numeric"])
    # What is scored of general text lies in files that `python-source` holds out.
    held_out = "".join(python_source.splits()["test"]["text"])
    assert all(text in held_out for text in found["general"]["test"]["text"])
    body = "".join(f"line {i}\n" for i in range(700))
    pieces = _specialities.documents("import os\n\ndef f():\n" + body)
    assert len(pieces) > 2 and "".join(pieces) == ("def f():\n" + body)[: len("".join(pieces))]
    assert all(piece.endswith("\n") for piece in pieces) and _specialities.documents("x = 1\n" * 99) == []


TOKENS = np.random.default_rng(0).integers(200, 2000, 40)


def runs(noise_of: float = 0.002, **losses: float) -> check.Runs:
    """Answers of every model with the given mean losses in nats per token."""
    g, nats = np.random.default_rng(1), {}
    every = [*check.SPECIALITIES, "general"]
    known = {"base": 4.0, "raw": 3.5, "repaired": 3.55, "shuffled": 4.01, "unified": 3.7, "unrepaired": 3.72}
    general = {"base": 4.0, "raw": 4.2, "repaired": 4.03, "shuffled": 4.01, "unified": 4.0, "unrepaired": 4.05}
    for data_name in every:
        for model in ("base", "unified", "unrepaired", "shuffled"):
            mean = losses.get(f"{model}_{data_name}", (general if data_name == "general" else known)[model])
            nats[model, data_name] = TOKENS * (mean + g.normal(0, noise_of, (2, 40)))
    for name in check.SPECIALITIES:
        for kind in ("raw", "repaired", "shuffled"):
            for place, means in ((name, known), ("general", general)):
                key = f"{kind}_general" if place == "general" else f"{kind}_own"
                mean = losses.get(f"{name}_{key}", losses.get(key, means[kind]))
                nats[f"{name} {kind}", place] = TOKENS * (mean + g.normal(0, noise_of, (2, 40)))
    return check.Runs(dict.fromkeys(every, TOKENS), nats, {"seeds": {"seed 0": {"straight": [3, 4]}}})


@pytest.mark.parametrize(
    ("function", "losses", "holds", "destroyed"),
    [
        ("unified", {}, True, True),
        ("unified", {"unified_text": 4.1}, False, True),
        ("unified", {"numeric_raw_own": 4.1}, "set-up invalid", True),
        ("unified", {f"shuffled_{name}": 3.9 for name in check.SPECIALITIES}, True, False),
        ("repaired", {}, True, True),
        ("repaired", {"repaired_own": 3.7}, False, True),
        ("repaired", {"repaired_general": 4.1}, False, True),
        ("repaired", {"raw_general": 3.9}, "set-up invalid", True),
        ("repaired", {"shuffled_own": 3.5}, True, False),
        ("repaired_first", {}, True, True),
        ("repaired_first", {f"unified_{name}": 3.8 for name in check.SPECIALITIES}, False, True),
        ("repaired_first", {"noise_of": 0.4}, "undecided", None),
    ],
)
def test_the_check_judges_by_its_inequalities(
    function: str, losses: dict[str, float], holds: Any, destroyed: bool | None
) -> None:
    found = getattr(check, function)(runs(**losses))
    if destroyed is None:
        assert found["holds"] in ("undecided", "set-up invalid") and found["low"] < 0 < found["high"]
        return
    assert found["holds"] == holds and found["control"]["destroyed"] is destroyed
    assert found["low"] <= found["measured"] <= found["high"] and "3 of 4 tensors" in found["detail"]


def test_the_whole_check_runs_on_a_few_documents(causal_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {**documents(), "validation": documents(8, 8)["test"]}
    monkeypatch.setattr(check, "SPECIALITIES", {"network": splits, "text": splits})
    monkeypatch.setattr(check, "GENERAL", splits)
    scale = check.Scale(str(causal_base), epochs=4, block=32, batch=8, seeds=1, documents=40, lr=3e-3, held_out=12)
    found = check.world({"scale": check.asdict(scale), "seed": 0})
    tokens, nats = np.asarray(found["tokens"]["text"]), found["nats"]
    mean = {model: np.sum(of["text"]) / tokens.sum() for model, of in nats.items() if "text" in of}
    assert mean["text raw"] < mean["base"] - 0.05  # it learned something, and the shuffled change did not
    assert mean["text repaired"] < mean["base"] and mean["unified"] < mean["base"] < mean["shuffled"] + 0.02
    assert set(found["about"]["t"]) == {"network", "text"} and set(found["about"]["t"].values()) <= set(check.TS)
    assert nats["base"].keys() == {"network", "text", "general"}
    assert all(len(of[name]) == len(found["tokens"][name]) for of in nats.values() for name in of)
    again = check.world({"scale": check.asdict(scale), "seed": 0})
    assert again["nats"] == nats


def test_the_records_and_the_shipped_recipe_agree_with_the_card() -> None:
    record = registry.find("mediphi").record
    assert {claim.part for claim in record.claims} == {"unified", "repaired", "repaired first"}
    assert registry.find("breadcrumbs").record.part_of == "mediphi" and "t" not in registry.find("breadcrumbs").options
    steps = read("embedded:mediphi").steps
    assert [steps[f"{name}-repaired"].needs for name in check.SPECIALITIES] == [[name] for name in check.SPECIALITIES]
    assert steps["unified"].needs == [f"{name}-repaired" for name in check.SPECIALITIES]
    assert steps["unified-unrepaired"].needs == list(check.SPECIALITIES)
    assert len(tries(steps["unified"])) == 6 and steps["dpo"].needs == ["instructed"]
    for step in steps.values():
        for arm in tries(step) if step.verb == "merge" else []:
            assert resolve(arm).rule.weights in (True, False)
