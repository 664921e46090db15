"""Rows turned into model inputs once, then cut into batches.

Shapes: N rows, T tokens of the longest row of a batch, C x H x W pixels.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from brickyard.core.completions import encode_completions
from brickyard.core.data import Split
from brickyard.core.documents import encode_documents
from brickyard.core.encoded import IGNORED, Encoded, chunks, known_to
from brickyard.core.errors import BadBase, BadData, UsageError
from brickyard.core.points import encode_points
from brickyard.core.task import Task
from brickyard.core.template import Template

if TYPE_CHECKING:
    from brickyard.core.base import Base

MEGABATCH = 50  # batches among which rows are sorted by length
PIXEL_LIMIT = 64_000_000  # of one image
CACHED_BYTES = 2**30  # of decoded images; beyond it they are decoded batch by batch
# Only formats whose decoders run inside Pillow: others start programs of the system.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class EncodedText(Encoded):
    """Token ids of all rows behind one another; padded on the right, batch by batch.

    Right padding gives each token the position and, under causal attention, the past that it has alone.
    """

    def __init__(
        self,
        ids: np.ndarray,
        types: np.ndarray | None,
        lengths: np.ndarray,
        labels: Tensor,
        *,
        labelled: bool,
        pad: int,
        multiple: int,
        report: dict[str, Any],
    ) -> None:
        self.ids, self.types, self.lengths, self.labels = ids, types, lengths, labels
        self.labelled, self.pad, self.multiple, self.report = labelled, pad, multiple, report
        self._starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) if len(lengths) else lengths

    def _inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        lengths = self.lengths[rows]
        width = -(-int(lengths.max(initial=1)) // self.multiple) * self.multiple
        column_T = np.arange(width)
        mask_NT = column_T < lengths[:, None]
        place = (self._starts[rows][:, None] + column_T)[mask_NT]
        ids_NT = np.full(mask_NT.shape, self.pad, dtype=np.int64)
        ids_NT[mask_NT] = self.ids[place]
        inputs = {"input_ids": torch.from_numpy(ids_NT), "attention_mask": torch.from_numpy(mask_NT.astype(np.int64))}
        if self.types is not None:
            types_NT = np.zeros(mask_NT.shape, dtype=np.int64)
            types_NT[mask_NT] = self.types[place]
            inputs["token_type_ids"] = torch.from_numpy(types_NT)
        return inputs

    def take(self, index: ArrayLike) -> EncodedText:
        rows = np.asarray(index, dtype=np.int64)
        lengths = self.lengths[rows]
        starts = np.repeat(self._starts[rows] - np.cumsum(lengths) + lengths, lengths)
        place = starts + np.arange(len(starts))
        types = None if self.types is None else self.types[place]
        return EncodedText(
            self.ids[place],
            types,
            lengths,
            self.labels[torch.from_numpy(rows)],
            labelled=self.labelled,
            pad=self.pad,
            multiple=self.multiple,
            report=self.report,
        )

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256(f"text {self.pad} {self.multiple}".encode())
        for part in (self.lengths.astype(np.int64), self.ids, *(() if self.types is None else (self.types,))):
            digest.update(f" {part.dtype} {part.shape} ".encode() + part.tobytes())
        return digest.hexdigest()


class EncodedImages(Encoded):
    """Images, resized and cropped by the base's processor: kept as bytes, scaled to floats batch by batch.

    `pixels` is [N, C, H, W]; where it would be too large it is None and `files` are decoded for every batch.
    """

    def __init__(
        self,
        pixels: np.ndarray | None,
        files: Sequence[bytes],
        processor: Any,
        labels: Tensor,
        *,
        labelled: bool,
        scaled: Callable[[np.ndarray], np.ndarray],
        report: dict[str, Any],
    ) -> None:
        self.pixels, self.files, self.processor, self.labels = pixels, files, processor, labels
        self.labelled, self.report, self._scaled = labelled, report, scaled
        self.lengths = np.ones(len(labels), dtype=np.int64)

    def _inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        if self.pixels is None:
            values = _processed(self.processor, [_opened(self.files[i])[0] for i in rows])
        else:
            values = self._scaled(self.pixels[rows])
        return {"pixel_values": torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))}

    def take(self, index: ArrayLike) -> EncodedImages:
        rows = np.asarray(index, dtype=np.int64)
        return EncodedImages(
            None if self.pixels is None else self.pixels[rows],
            [self.files[i] for i in rows] if self.files else [],
            self.processor,
            self.labels[torch.from_numpy(rows)],
            labelled=self.labelled,
            scaled=self._scaled,
            report=self.report,
        )

    @cached_property
    def _content(self) -> str:
        settings = self.processor.to_json_string() if hasattr(self.processor, "to_json_string") else ""
        digest = hashlib.sha256(f"image {settings}".encode())
        if self.pixels is not None:
            digest.update(f" {self.pixels.dtype} {self.pixels.shape} ".encode() + self.pixels.tobytes())
        for file in self.files:
            digest.update(hashlib.sha256(file).digest())
        return digest.hexdigest()


def encode(
    split: Split,
    base: Base,
    task: Task,
    *,
    max_length: int | None = None,
    multiple: int = 1,
    template: Template | None = None,
) -> Encoded:
    """Tokenise (or decode and resize) a split once.

    Args:
        split: rows of `data.Data`.
        base: gives the tokenizer or image processor, the context and the vocabulary.
        task: says what the labels are.
        max_length: tokens a row is cut to, the base's context at most; rows cut are counted in `report["truncated"]`.
        multiple: batches are padded to a multiple of so many tokens (the context at most).
        template: put around each text, and never cut.

    Raises:
        BadData: a corrupted image, or a text without any token.
        BadBase: the tokenizer gives ids that the base has no embedding for, or has no token to pad with.
        UsageError: the base reads another kind of input, or the lengths are out of range.
    """
    if base.input != task.reads:
        raise UsageError(
            f"the base reads {base.input}, the data hold {task.input}; choose a base that reads {task.reads}, "
            f"e.g. {'embedded:minilm' if task.reads == 'text' else 'embedded:tiny-vit'}."
        )
    if task.kind == "causal-lm":
        return encode_documents(split["text"], base, task, max_length)
    if task.generative:
        return encode_completions(split, base, task, max_length)
    if multiple < 1 or (max_length is not None and max_length < 4):
        raise UsageError(f"max_length={max_length} or multiple={multiple} is out of range; expected at least 4 and 1.")
    labels = torch.full((len(split),), IGNORED, dtype=torch.float32 if task.regression else torch.int64)
    if labelled := "label" in split.columns:
        labels = torch.tensor(split["label"], dtype=labels.dtype)
    if task.input == "points":
        return encode_points(split["points"], labels, labelled)
    if task.input == "image":
        return _encode_images(split["image"], base.processor, labels, labelled)
    texts = [split["text"], *([split["text_pair"]] if task.input == "pair" else [])]
    if template is None:
        return _encode_texts(texts, base, labels, labelled, max_length, multiple)
    limit = min((length for length in (max_length, base.context) if length is not None), default=None)
    filled, cut = template.fill(split["text"], base.tokenizer, limit)
    made = _encode_texts([filled], base, labels, labelled, max_length, multiple)
    made.report |= {"truncated": cut, "template": template.pattern}
    return made


def _encode_texts(
    texts: list[list[str]], base: Base, labels: Tensor, labelled: bool, max_length: int | None, multiple: int
) -> EncodedText:
    tokenizer = base.tokenizer
    limit = min((length for length in (max_length, base.context) if length is not None), default=None)
    fillers = (tokenizer.pad_token_id, getattr(base.config, "pad_token_id", None), tokenizer.eos_token_id)
    pad = next((token for token in fillers if token is not None), None)
    if pad is None:
        raise BadBase("the base's tokenizer has neither a padding nor an end token; set pad_token in its files.")
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    longest = truncated = 0
    for part in chunks(len(texts[0])):
        rows = [column[part] for column in texts]
        made = tokenizer(*rows, verbose=False, return_attention_mask=False)
        full = np.fromiter(map(len, made["input_ids"]), dtype=np.int64)
        longest = max(longest, int(full.max()))
        for row in np.flatnonzero(full > limit) if limit is not None else ():
            # Cut by the tokenizer itself, which knows the special tokens and which of two texts is longer.
            one = [column[row] for column in rows]
            how = "only_second" if _asks(one, tokenizer, limit) else "longest_first"
            cut = tokenizer(*one, truncation=how, max_length=limit, return_attention_mask=False)
            for name in made:
                made[name][row] = cut[name]
            truncated += 1
        length = np.fromiter(map(len, made["input_ids"]), dtype=np.int64)
        if not length.all():
            row = part.start + int(np.flatnonzero(length == 0)[0]) + 1
            raise BadData(f"row {row} gives no token at all; remove it or write it in the base's language.")
        lengths.append(length)
        count = int(length.sum())
        ids.append(np.fromiter(chain.from_iterable(made["input_ids"]), dtype=np.int32, count=count))
        if "token_type_ids" in made:
            types.append(np.fromiter(chain.from_iterable(made["token_type_ids"]), dtype=np.int8, count=count))
    flat = np.concatenate(ids)
    known_to(int(flat.max()), pad, base)
    report = {
        "rows": len(labels),
        "tokens": len(flat),
        "truncated": truncated,
        "longest": longest,
        "max_length": limit,
    }
    return EncodedText(
        flat,
        np.concatenate(types) if types else None,
        np.concatenate(lengths),
        labels,
        labelled=labelled,
        pad=pad,
        multiple=multiple,
        report=report,
    )


def _asks(texts: Sequence[str], tokenizer: Any, limit: int | None) -> bool:
    """Whether a row is a question and a text, of which the text alone is cut, as long as the question fits."""
    if limit is None or len(texts) < 2 or not texts[0].endswith("?"):
        return False
    return len(tokenizer(texts[0], "", verbose=False)["input_ids"]) < limit


def _encode_images(files: list[bytes], processor: Any, labels: Tensor, labelled: bool) -> EncodedImages:
    exact = _affine(processor)
    probe, _ = _decoded(files[0], 1)
    whole = _processed(processor, [probe])
    bare = _processed(processor, [probe], do_rescale=False, do_normalize=False) if exact is not None else whole
    if exact is None or bare.dtype != np.uint8 or not np.allclose(exact(bare), whole, atol=1e-5):
        # An unusual processor: keep what it gives, for no order of its steps can be assumed.
        exact, steps = None, {}
    else:
        steps = {"do_rescale": False, "do_normalize": False}
    kept = bare if exact is not None else whole
    cached = kept.nbytes * len(files) <= CACHED_BYTES
    pixels = np.empty((len(files), *kept.shape[1:]), dtype=kept.dtype) if cached else None
    modes: Counter[str] = Counter()
    sizes: set[tuple[int, int]] = set()
    for part in chunks(len(files)):
        images = []
        for row, file in enumerate(files[part], part.start + 1):
            image, mode = _decoded(file, row)
            modes[mode] += 1
            sizes.add(image.size)
            images.append(image if cached else None)
        if pixels is not None:
            pixels[part] = _processed(processor, images, **steps)
    report = {
        "rows": len(files),
        "truncated": 0,
        "longest": 1,
        "max_length": None,
        "modes": dict(sorted(modes.items())),
        "smallest": list(min(sizes)),
        "largest": list(max(sizes)),
        "shape": list(kept.shape[1:]),
        "cached": cached,
    }
    return EncodedImages(
        pixels,
        [] if cached else files,
        processor,
        labels,
        labelled=labelled,
        scaled=exact or _unchanged,
        report=report,
    )


def _unchanged(pixels: np.ndarray) -> np.ndarray:
    return pixels


def _affine(processor: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return the processor's last two steps, rescale and normalise, if it has them: uint8 [N, C, H, W] -> float32."""
    if not getattr(processor, "do_rescale", False):
        return None
    scale, shift = np.float32(processor.rescale_factor), np.float32(0.0)
    if getattr(processor, "do_normalize", False):
        deviation = np.asarray(processor.image_std, dtype=np.float32).reshape(-1, 1, 1)
        shift = np.asarray(processor.image_mean, dtype=np.float32).reshape(-1, 1, 1) / deviation
        scale = scale / deviation
    return lambda pixels: pixels.astype(np.float32) * scale - shift


def _processed(processor: Any, images: list[Any], **steps: bool) -> np.ndarray:
    return np.asarray(processor(images=images, return_tensors="np", **steps)["pixel_values"])


def _decoded(file: bytes, row: int) -> tuple[Image.Image, str]:
    try:
        return _opened(file)
    except Exception as cause:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error and others, one per format and damage.
        raise BadData(f"row {row}: the image cannot be decoded ({type(cause).__name__}: {cause!s:.120}).") from cause


def _opened(file: bytes) -> tuple[Image.Image, str]:
    """Return the image in RGB (transparency is dropped, of an animation the first frame is taken) and its own mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
        image = Image.open(io.BytesIO(file), formats=_FORMATS)
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"{image.width} x {image.height} pixels, above the limit of {PIXEL_LIMIT:,}")
    return image.convert("RGB"), image.mode


class Order:
    """The batches of each epoch: a pure function of (seed, epoch), the same on every machine and numpy version.

    Args:
        lengths: [N] lengths of the rows.
        batch: rows of a batch; only the last batch of an epoch may be smaller.
        seed: non-negative.
        bucket: put rows of about equal length together: rows are drawn at random, sorted by length among `MEGABATCH`
            batches, and the batches are shuffled. False: a plain shuffle.
    """

    def __init__(self, lengths: ArrayLike, batch: int, *, seed: int, bucket: bool) -> None:
        if batch < 1 or seed < 0:
            raise UsageError(f"batch={batch} and seed={seed} are out of range; expected at least 1 and 0.")
        self.lengths, self.batch, self.seed, self.bucket = np.asarray(lengths), int(batch), int(seed), bucket

    def epoch(self, k: int) -> list[np.ndarray]:
        """Return the rows of each batch of epoch `k`; every row stands in exactly one."""
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, k]))
        order = _shuffled(bits, len(self.lengths))
        full = len(order) // self.batch * self.batch
        tail = [order[full:]] if full < len(order) else []
        order = order[:full]
        if not self.bucket:
            return [*order.reshape(-1, self.batch), *tail]
        span = MEGABATCH * self.batch
        parts = [order[start : start + span] for start in range(0, full, span)]
        grouped = [part[np.argsort(self.lengths[part], kind="stable")] for part in parts]
        batches = np.concatenate([np.empty(0, dtype=np.int64), *grouped]).reshape(-1, self.batch)
        return [*batches[_shuffled(bits, len(batches))], *tail]


def _shuffled(bits: np.random.PCG64, count: int) -> np.ndarray:
    """Draw a permutation from the raw bits, whose stream numpy fixes for ever (that of `permutation` it does not)."""
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)
