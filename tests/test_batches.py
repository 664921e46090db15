"""Encoding once, padding batch by batch, and the order of batches."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, ViTImageProcessor

from brickyard.core import batches
from brickyard.core import encoded as encoding
from brickyard.core.batches import EncodedImages, EncodedText, Order, encode
from brickyard.core.data import Split
from brickyard.core.errors import BadBase, BadData, UsageError
from brickyard.core.task import Task
from brickyard.embedded import base_folder

TEXT = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
PAIR = Task("pair-classification", "accuracy", ("a", "b"), 2, "pair")
VALUE = Task("regression", "spearman", None, 1, "text")
IMAGE = Task("image-classification", "accuracy", ("a", "b"), 2, "image")
TEXTS = ["a brick", "one more, much longer brick than the first", "", "wall", "mortar " * 30, "naïve 砖 brick"]


@cache
def minilm() -> dict[str, Any]:
    folder = base_folder("minilm")
    return {"tokenizer": AutoTokenizer.from_pretrained(folder), "config": AutoConfig.from_pretrained(folder)}


def base(**changes: Any) -> Any:
    return SimpleNamespace(**{**minilm(), "context": 512, "input": "text", "processor": None, **changes})


def texts(values: list[str], **columns: list) -> Split:
    return Split({"text": values, **columns, "label": [i % 2 for i in range(len(values))]})


def test_a_batch_equals_the_tokenizer_padding_for_itself() -> None:
    encoded = encode(texts(TEXTS), base(), TEXT)
    for index in ([0, 1, 2, 3, 4, 5], [5, 0], [2], [3, 3, 1]):
        batch = encoded.collate(np.array(index))
        expected = base().tokenizer([TEXTS[i] for i in index], padding=True, return_tensors="pt")
        assert set(batch) == {*expected, "labels"}
        for name, tensor in expected.items():
            torch.testing.assert_close(batch[name], tensor)
        assert batch["labels"].tolist() == [i % 2 for i in index]
    assert encoded.report == {
        "rows": 6,
        "tokens": int(encoded.lengths.sum()),
        "truncated": 0,
        "longest": 32,
        "max_length": 512,
    }
    assert encoded.lengths.tolist() == [len(ids) for ids in base().tokenizer(TEXTS)["input_ids"]]


def test_pairs_carry_token_types_and_are_cut_where_they_are_longest() -> None:
    split = texts(["what is it", "why"], text_pair=["a long answer " * 20, "so"])
    encoded = encode(split, base(), PAIR, max_length=16)
    expected = base().tokenizer(
        split["text"], split["text_pair"], truncation=True, max_length=16, padding=True, return_tensors="pt"
    )
    batch = encoded.collate([0, 1])
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor)
    assert batch["token_type_ids"].max() == 1
    assert (encoded.report["truncated"], encoded.report["longest"]) == (1, 66)


def test_truncation_is_counted_and_keeps_the_special_tokens() -> None:
    encoded = encode(texts(TEXTS), base(), TEXT, max_length=8)
    assert encoded.report["truncated"] == 2
    assert encoded.report["longest"] == 32
    assert encoded.lengths.max() == 8
    row = encoded.collate([4])["input_ids"][0]
    assert (row[0], row[-1]) == (base().tokenizer.cls_token_id, base().tokenizer.sep_token_id)
    assert encode(texts(TEXTS), base(context=16), TEXT, max_length=400).report["max_length"] == 16


def test_rows_are_encoded_alike_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(texts(TEXTS), base(), TEXT, max_length=12)
    monkeypatch.setattr(encoding, "_CHUNK", 2)
    parts = encode(texts(TEXTS), base(), TEXT, max_length=12)
    assert parts.digest == whole.digest
    assert parts.report == whole.report


def test_labels_keep_their_kind_and_may_be_absent() -> None:
    assert encode(texts(TEXTS), base(), TEXT).labels.dtype == torch.int64
    numbers = encode(Split({"text": ["a", "b"], "label": [0.5, 2.0]}), base(), VALUE)
    assert numbers.labels.tolist() == [0.5, 2.0]
    assert numbers.collate([1])["labels"].dtype == torch.float32
    unlabelled = encode(Split({"text": ["a", "b"]}), base(), TEXT)
    assert "labels" not in unlabelled.collate([0])
    assert unlabelled.labels.tolist() == [-100, -100]


def test_the_tokenizer_of_another_model_is_refused() -> None:
    smaller = base(config=SimpleNamespace(vocab_size=5000, pad_token_id=0))
    with pytest.raises(BadBase, match=r"gives the id \d+, but the base has embeddings for 5000 ids only"):
        encode(texts(TEXTS), smaller, TEXT)
    silent = SimpleNamespace(pad_token_id=None, eos_token_id=None)
    with pytest.raises(BadBase, match="neither a padding nor an end token"):
        encode(texts(TEXTS), base(tokenizer=silent, config=SimpleNamespace()), TEXT)


def test_faults_of_usage() -> None:
    with pytest.raises(UsageError, match="reads text, the data hold image"):
        encode(Split({"image": [b""], "label": [0]}), base(), IMAGE)
    with pytest.raises(UsageError, match="max_length=2"):
        encode(texts(TEXTS), base(), TEXT, max_length=2)
    bare = SimpleNamespace(pad_token_id=0, eos_token_id=None, __call__=None)
    nothing: Callable[..., dict] = lambda *_, **__: {"input_ids": [[1], []]}  # noqa: E731
    wordless = type("Wordless", (), {**vars(bare), "__call__": staticmethod(nothing)})()
    with pytest.raises(BadData, match="row 2 gives no token"):
        encode(texts(["a", "b"]), base(tokenizer=wordless), TEXT)


@st.composite
def ragged(draw: st.DrawFn) -> EncodedText:
    lengths = np.array(draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)))
    ids = np.arange(1, lengths.sum() + 1, dtype=np.int32)
    return EncodedText(
        ids,
        (ids % 2).astype(np.int8),
        lengths,
        torch.arange(len(lengths)),
        labelled=True,
        pad=0,
        multiple=draw(st.integers(1, 4)),
        report={},
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(ragged(), st.data())
def test_a_batch_holds_exactly_its_rows(encoded: EncodedText, data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(encoded) - 1), min_size=1, max_size=8))
    batch = encoded.collate(index)
    width = batch["input_ids"].shape[1]
    longest = max(encoded.lengths[index])
    assert width % encoded.multiple == 0
    assert longest <= width < longest + encoded.multiple
    ends = np.cumsum(encoded.lengths)
    for i, row in enumerate(index):
        ids = encoded.ids[ends[row] - encoded.lengths[row] : ends[row]]
        rest = [0] * (width - len(ids))
        assert batch["input_ids"][i].tolist() == [*ids, *rest]
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + rest
        assert batch["token_type_ids"][i].tolist() == [*(ids % 2), *rest]
    taken = encoded.take(index)
    again = taken.collate(np.arange(len(index)))
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    assert taken.collate([0])["input_ids"].shape[1] <= width


def test_the_digest_sees_texts_labels_and_order() -> None:
    made = encode(texts(TEXTS), base(), TEXT)
    assert encode(texts(TEXTS), base(), TEXT).digest == made.digest
    assert made.take(range(6)).digest == made.digest
    others = {
        made.take([1, 0, 2, 3, 4, 5]).digest,
        made.take([0, 1]).digest,
        encode(texts(TEXTS[:-1]), base(), TEXT).digest,
    }
    before = made.digest
    made.labels = made.labels.flip(0)
    assert len(others | {before, made.digest}) == 5


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 50), max_size=300),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.integers(0, 50),
    st.booleans(),
)
def test_every_row_stands_in_exactly_one_batch(lengths: list[int], batch: int, seed: int, k: int, bucket: bool) -> None:
    order = Order(lengths, batch, seed=seed, bucket=bucket)
    made = order.epoch(k)
    assert sorted(np.concatenate([np.empty(0, int), *made]).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == batch for rows in made[:-1])
    assert all(0 < len(rows) <= batch for rows in made)
    again = Order(lengths, batch, seed=seed, bucket=bucket)
    assert [rows.tolist() for rows in again.epoch(k)] == [rows.tolist() for rows in made]


def test_epochs_and_seeds_differ_and_buckets_save_padding() -> None:
    lengths = np.random.Generator(np.random.PCG64(1)).integers(5, 200, 3000)
    drawn = {
        (seed, k, bucket): Order(lengths, 16, seed=seed, bucket=bucket).epoch(k)
        for seed in (0, 1)
        for k in (0, 1)
        for bucket in (False, True)
    }
    assert len({tuple(np.concatenate(made)) for made in drawn.values()}) == 8
    padded = {key: sum(len(rows) * lengths[rows].max() for rows in made) for key, made in drawn.items()}
    assert padded[0, 0, True] < 1.05 * lengths.sum()
    assert padded[0, 0, False] > 1.6 * lengths.sum()
    first = [lengths[rows].mean() for rows in drawn[0, 0, True]]
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.3  # the batches do not grow through the epoch


def test_the_order_is_the_same_on_every_machine() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    plain = [rows.tolist() for rows in Order(lengths, 4, seed=7, bucket=False).epoch(2)]
    assert plain == [[8, 6, 4, 0], [5, 7, 1, 3], [9, 2]]
    together = [rows.tolist() for rows in Order(lengths, 4, seed=7, bucket=True).epoch(2)]
    assert together == [[1, 3, 6, 0], [8, 4, 7, 5], [9, 2]]
    with pytest.raises(UsageError, match="seed=-1"):
        Order(lengths, 4, seed=-1, bucket=True)


def picture(seed: int = 0, mode: str = "RGB", form: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def images(files: list[bytes]) -> Split:
    return Split({"image": files, "label": [i % 2 for i in range(len(files))]})


def viewer(**options: Any) -> Any:
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, **options)
    return base(processor=processor, input="image", context=None)


def seen(processor: Any, files: list[bytes]) -> np.ndarray:
    return processor([Image.open(io.BytesIO(f)).convert("RGB") for f in files], return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("normal", [True, False])
def test_images_equal_what_the_processor_gives(normal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [picture(0), picture(1, "L"), picture(2, form="JPEG", size=(20, 30)), picture(3, "RGBA")]
    look = viewer(do_normalize=normal, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    encoded = encode(images(files), look, IMAGE)
    assert isinstance(encoded, EncodedImages)
    assert encoded.pixels is not None
    assert encoded.pixels.dtype == np.uint8
    batch = encoded.collate([3, 0, 2, 1])
    expected = seen(look.processor, files)[[3, 0, 2, 1]]
    np.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=2e-6)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [1, 0, 0, 1]
    assert encoded.report["modes"] == {"L": 1, "RGB": 2, "RGBA": 1}
    assert encoded.report["largest"] == [20, 30]
    monkeypatch.setattr(batches, "CACHED_BYTES", 100)
    streamed = encode(images(files), look, IMAGE)
    assert streamed.report["cached"] is False
    np.testing.assert_allclose(streamed.collate([3, 0, 2, 1])["pixel_values"].numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(streamed.take([2]).collate([0])["pixel_values"].numpy(), expected[[2]], atol=2e-6)


def test_a_processor_with_steps_of_its_own_is_taken_as_it_is() -> None:
    def odd(images: list[Any], return_tensors: str, **_: Any) -> dict[str, np.ndarray]:
        small = [np.asarray(image.resize((4, 4)), dtype=np.float32).transpose(2, 0, 1) / 255 for image in images]
        return {"pixel_values": np.sqrt(np.stack(small))}

    odd.do_rescale = odd.do_normalize = True  # pyright: ignore[reportFunctionMemberAccess]
    odd.rescale_factor, odd.image_mean, odd.image_std = 1 / 255, [0.0] * 3, [1.0] * 3  # pyright: ignore
    files = [picture(i) for i in range(3)]
    encoded = encode(images(files), base(processor=odd, input="image"), IMAGE)
    expected = odd([Image.open(io.BytesIO(f)) for f in files], "np")["pixel_values"]
    np.testing.assert_array_equal(encoded.collate([0, 1, 2])["pixel_values"].numpy(), expected)


def test_images_that_cannot_be_decoded() -> None:
    good = picture()
    for bad in (b"not an image", good[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(BadData, match="row 2: the image cannot be decoded"):
            encode(images([good, bad]), viewer(), IMAGE)
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    with warnings.catch_warnings(), pytest.raises(BadData, match=r"row 2.*10000 x 10000 pixels, above the limit"):
        warnings.simplefilter("error")
        encode(images([good, buffer.getvalue()]), viewer(), IMAGE)
