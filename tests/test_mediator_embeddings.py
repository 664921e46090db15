"""The router of `mediator` that reads mean input embeddings: no padding, no layer, the same answer after a reload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_data
from test_merge import make_brick
from test_route import FILMS, GIVEN, ROOMS, task_rows
from torch import Tensor, nn

from brickyard.core import registry
from brickyard.core.base import Base, open_base
from brickyard.core.batches import EncodedText, encode
from brickyard.core.errors import BadBrick, BrickyardError, Refused, UnsafeFile, UsageError
from brickyard.core.split import Split
from brickyard.core.task import Task
from brickyard.route._routed_model import network_of
from brickyard.route._router import Router, fit_router, pooled, read_router, states_of
from brickyard.route.mediator import load_routed
from brickyard.routing.route import route

TASK = Task("text-classification", "accuracy", ("bad", "good"), 2, "text")
TEXTS = ["film", "good book was very bad", "room", "the meal is not good and the room is not good at all", "book"]


@pytest.fixture(scope="module")
def opened(text_base: Path) -> tuple[Base, nn.Module]:
    base = open_base(str(text_base))
    return base, network_of(base)[0]


def encoded(base: Base, texts: list[str], multiple: int = 1) -> EncodedText:
    rows = encode(Split({"text": texts}), base, TASK, multiple=multiple)
    assert isinstance(rows, EncodedText) and len(set(rows.lengths)) == len(set(map(len, map(str.split, texts))))
    return rows


def by_padding(network: nn.Module, rows: EncodedText) -> Tensor:
    """The same mean the long way round: a padded batch, looked up in whole, of which the mask takes its part."""
    batch = rows.collate(np.arange(len(rows)))
    mask_NT1 = batch["attention_mask"].unsqueeze(-1)
    assert len(rows) == 1 or not mask_NT1.all()
    x_NTD = network.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
    return (x_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)


@pytest.mark.parametrize("multiple", [1, 16])
def test_what_is_read_is_the_masked_mean_of_input_embeddings(opened: tuple[Base, nn.Module], multiple: int) -> None:
    base, network = opened
    rows = encoded(base, TEXTS, multiple)
    found = pooled(network, rows, "embeddings")
    torch.testing.assert_close(found, by_padding(network, rows), atol=1e-6, rtol=1e-5)
    assert found.shape == (len(TEXTS), base.width) and found.dtype == torch.float32 and not found.requires_grad
    assert not torch.allclose(found, pooled(network, rows, "dense"), atol=1e-3)


def test_a_prompt_is_read_alike_alone_and_in_any_company(opened: tuple[Base, nn.Module]) -> None:
    base, network = opened
    whole = pooled(network, encoded(base, TEXTS), "embeddings")
    for place, text in enumerate(TEXTS):
        assert torch.equal(pooled(network, encoded(base, [text]), "embeddings")[0], whole[place])
    back = pooled(network, encoded(base, TEXTS[::-1]), "embeddings")
    assert torch.equal(back.flip(0), whole)


def test_a_table_in_half_precision_is_read_into_float32(opened: tuple[Base, nn.Module]) -> None:
    base, network = opened
    rows = encoded(base, TEXTS)
    wanted = pooled(network, rows, "embeddings")
    try:
        found = pooled(network.to(torch.bfloat16), rows, "embeddings")
    finally:
        network.to(torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0.02)


def test_long_prompts_are_cut_and_counted(opened: tuple[Base, nn.Module]) -> None:
    base, network = opened
    v_ND, cut = states_of(network, base, TEXTS, 6, "embeddings")
    rows = encode(Split({"text": TEXTS}), base, TASK, max_length=6)
    assert cut == rows.report["truncated"] == 2
    assert torch.equal(v_ND, pooled(network, rows, "embeddings"))


def test_a_network_without_a_table_is_refused(opened: tuple[Base, nn.Module]) -> None:
    rows = encoded(opened[0], TEXTS)
    for network in (nn.Linear(2, 2), Tableless()):
        with pytest.raises(Refused, match=r"no table of input embeddings .* router=dense"):
            pooled(network, rows, "embeddings")


class Tableless(nn.Module):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_one_task_alone_is_refused_and_what_was_read_is_kept(opened: tuple[Base, nn.Module]) -> None:
    v_ND = pooled(opened[1], encoded(opened[0], TEXTS), "embeddings")
    with pytest.raises(UsageError, match="1 was given"):
        fit_router([v_ND], [v_ND], reads="embeddings")
    router = fit_router([v_ND[:2], v_ND[2:]], [v_ND[:2], v_ND[2:]], reads="embeddings")
    again = read_router(router.tensors(), router.about(), 2, router.reads)
    assert isinstance(again, Router) and again.reads == "embeddings"
    assert np.array_equal(again.routes(v_ND).p_NT, router.routes(v_ND).p_NT)
    assert read_router(router.tensors(), router.about(), 2).reads == "dense"


def test_a_value_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(BrickyardError, match=r"router.*embeddings.*dense.*encoder"):
        registry.config("mediator", {"router": "embedings"})
    assert registry.config("mediator", {}).router == "embeddings"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, text_base: Path) -> dict[str, Any]:
    """Two experts routed by either kind of router."""
    root = tmp_path_factory.mktemp("readers")
    made = [make_brick(root / name, text_base, "full", i, TASK).folder for i, name in enumerate(("films", "rooms"), 1)]
    data = [
        write_data(root / f"d{i}", {k: v for k, v in task_rows(topic, ("bad", "good")).items() if k != "test"})
        for i, topic in enumerate((FILMS, ROOMS))
    ]
    out: dict[str, Any] = {}
    for reads in ("embeddings", "dense"):
        arm = f"mediator:layers=1,router={reads}"
        result = route(arm, base=str(text_base), bricks=made, data=data, out=root / reads, **GIVEN)
        out[reads] = root / reads, result
    return out


def test_no_module_of_the_network_runs_for_embeddings(folders: dict[str, Any]) -> None:
    for reads, (folder, _) in folders.items():
        model, calls = load_routed(folder), []
        for module in model.backbone.modules():
            module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.route(TEXTS)
        assert (len(calls) == 0) == (reads == "embeddings"), reads


def test_a_folder_says_what_its_router_reads_and_routes_alike_when_opened_again(folders: dict[str, Any]) -> None:
    for reads, (folder, result) in folders.items():
        known = json.loads((folder / "route.json").read_text())
        assert known["router"]["reads"] == result["router"]["reads"] == known["config"]["router"] == reads
        assert result["router"]["about"]["report"]["accuracy"] > 0.9
        one, two = (load_routed(folder) for _ in range(2))
        assert one.router is not None and one.router.reads == reads
        a, b = one.route(TEXTS), two.route(TEXTS)
        assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("p_NT", "u_N", "w_NT"))
        for place, text in enumerate(TEXTS):
            assert np.abs(one.route([text]).p_NT[0] - a.p_NT[place]).max() < 1e-6
        v_ND, _ = states_of(one.backbone, one.base, TEXTS, one.router.tokens, reads)
        assert np.array_equal(one.router.probabilities(v_ND), a.p_NT)
        # What one router learned means nothing to what the other reads.
        other = "dense" if reads == "embeddings" else "embeddings"
        v_ND, _ = states_of(one.backbone, one.base, TEXTS, one.router.tokens, other)
        assert np.abs(one.router.probabilities(v_ND) - a.p_NT).max() > 0.01


def changed(folder: Path, out: Path, reads: str | None) -> Path:
    shutil.copytree(folder, out)
    known = json.loads((out / "route.json").read_text())
    del known["router"]["reads"]
    known["router"] |= {} if reads is None else {"reads": reads}
    (out / "route.json").write_text(json.dumps(known))
    return out


def test_a_manifest_that_does_not_say_means_last_states_and_another_word_is_refused(
    folders: dict[str, Any], tmp_path: Path
) -> None:
    folder = folders["dense"][0]
    old = load_routed(changed(folder, tmp_path / "old", None))
    assert old.router is not None and old.router.reads == "dense"
    assert np.array_equal(old.route(TEXTS).p_NT, load_routed(folder).route(TEXTS).p_NT)
    with pytest.raises(BadBrick, match=r"the router reads 'tokens'.*embeddings, dense, encoder"):
        load_routed(changed(folder, tmp_path / "new", "tokens"))


def test_a_router_file_that_was_changed_is_still_refused(folders: dict[str, Any], tmp_path: Path) -> None:
    out = Path(shutil.copytree(folders["embeddings"][0], tmp_path / "flipped"))
    raw = bytearray((out / "router.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "router.safetensors").write_bytes(raw)
    with pytest.raises(UnsafeFile, match="damaged or changed"):
        load_routed(out)
