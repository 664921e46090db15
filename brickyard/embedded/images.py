"""Synthetic training images of the embedded image bases: one object on a textured ground, every factor labelled.

An image is `ground -> clutter -> object -> light, colour and focus`. The object is a simple shape or a handwritten
digit; its factors (`FACTORS`) are drawn independently, so that no label can be guessed from another, with three
exceptions: ink and ground never share a colour; digits are never small and carry no texture (their strokes are too thin
to show one); and a part of the images is easy, which a short training needs: `CLEAR` have a flat ground without clutter
and an object that is not small, and among the digits `SCANNED` look like a scanned form (large, white on flat black,
near the middle).

The backdrops follow two statistics of natural images: a power spectrum falling with frequency ("clouds") and occlusion
at all scales ("leaves", the dead-leaves model). Training on such images for features that transfer: Baradad et al.
2021, "Learning to See by Looking at Noise"; the labelled factors are this project's own choice.

Everything is drawn from one `numpy` generator, in an order that depends on the arguments alone: the same arguments give
the same pixels on the same machine.

Shapes: N images, H = W = SIDE pixels, 3 colour channels in [0, 1] until the end, then bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]
Digits = tuple[Array, Labels]

SIDE = 32
NOT_APPLICABLE = -1  # label of a factor that an image does not show

SHAPES = (
    "disc",
    "square",
    "triangle",
    "rhombus",
    "cross",
    "ring",
    "star",
    "crescent",
    "bar",
    "ell",
    "frame",
    "arc",
)
TEXTURES = ("plain", "stripes", "checks", "dots", "rings", "ramp", "grain", "waves")
BACKDROPS = ("flat", "ramp", "clouds", "leaves", "weave")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
SIZES = ("small", "medium", "large")
PALETTE = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.90, 0.50, 0.10),
    "yellow": (0.88, 0.82, 0.15),
    "green": (0.15, 0.65, 0.20),
    "cyan": (0.15, 0.75, 0.80),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.50, 0.15, 0.70),
    "pink": (0.90, 0.55, 0.70),
    "brown": (0.45, 0.27, 0.12),
    "white": (0.90, 0.90, 0.90),
    "grey": (0.50, 0.50, 0.50),
    "black": (0.10, 0.10, 0.10),
}
COLOURS = tuple(PALETTE)

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "texture": TEXTURES,
    "ink": COLOURS,
    "ground": COLOURS,
    "backdrop": BACKDROPS,
    "quadrant": QUADRANTS,
    "size": SIZES,
    "digit": tuple("0123456789"),
}

RADII = ((5.0, 7.0), (8.0, 10.0), (11.0, 13.5))  # half the object's extent in pixels, per entry of SIZES
CLEAR = 0.4  # part of all images
SCANNED = 0.35  # part of the digits
TURN = 0.3  # radians either way; more would confuse a turned square with a rhombus
TEXTURE_DEPTH = (0.14, 0.24)  # amplitude of a texture around its colour, on the [0, 1] scale
MIDDLE = SIDE / 2


@dataclass(frozen=True)
class Images:
    """A batch of generated images.

    pixels: uint8 [N, SIDE, SIDE, 3]. masks: float32 [N, SIDE, SIDE], the object's coverage of each pixel, before blur.
    labels: factor name -> int64 [N], an index into `FACTORS[name]` or `NOT_APPLICABLE`.
    """

    pixels: NDArray[np.uint8]
    masks: Array
    labels: dict[str, Labels]

    def __len__(self) -> int:
        return len(self.pixels)


def draw(
    count: int,
    *,
    seed: int | Sequence[int],
    digits: Digits | None = None,
    digit_share: float = 0.3,
    augment: bool = True,
) -> Images:
    """Generate `count` images.

    Args:
        count: number of images.
        seed: an integer or a sequence of them, for instance (run seed, step).
        digits: handwritten digits to place as objects: strokes [M, h, w] in [0, 1] and labels int64 [M]; None: shapes
            only.
        digit_share: the part of the images, rounded, that shows a digit; they stand at the end of the batch.
        augment: change light, colour, focus and noise, scatter clutter, and turn some images grey (these lose their
            colour labels).

    Raises:
        ValueError: a share outside [0, 1], or digits that are not arrays of these shapes.
    """
    if not 0 <= digit_share <= 1:
        raise ValueError(f"digit_share is {digit_share}; expected a number from 0 to 1")
    if digits is not None and (digits[0].ndim != 3 or len(digits[0]) != len(digits[1]) or not len(digits[0])):
        raise ValueError(f"digits have shapes {digits[0].shape}, {digits[1].shape}; expected [M, h, w], [M] and M > 0")
    rng = np.random.default_rng(seed)
    first_digit = count - (round(count * digit_share) if digits is not None else 0)
    is_digit = np.arange(count) >= first_digit
    scanned = is_digit & (rng.random(count) < SCANNED)
    clear = scanned | (rng.random(count) < CLEAR)

    labels = _factors(rng, is_digit, scanned, clear)
    radius = _between(rng, np.array(RADII, np.float32)[labels["size"]])
    centre = _centres(rng, labels["quadrant"], radius, scanned)
    across, down = _frames(rng, radius, centre, labels["shape"])
    masks = np.empty((count, SIDE, SIDE), np.float32)
    for k, name in enumerate(SHAPES):
        rows = np.flatnonzero(labels["shape"] == k)
        distance = _OUTLINES[name](across[rows], down[rows])
        masks[rows] = np.clip(0.5 - distance * radius[rows, None, None], 0, 1)
    if digits is not None and first_digit < count:
        strokes, values = digits
        chosen = rng.integers(len(strokes), size=count - first_digit)
        labels["digit"][first_digit:] = values[chosen]
        masks[first_digit:] = _place(rng, strokes[chosen], across[first_digit:], down[first_digit:])

    palette = np.array(list(PALETTE.values()), np.float32)
    ink = palette[labels["ink"]] + rng.uniform(-0.05, 0.05, (count, 3)).astype(np.float32)
    ground = palette[labels["ground"]] + rng.uniform(-0.05, 0.05, (count, 3)).astype(np.float32)
    scene = _backdrops(rng, labels["backdrop"], ground)
    if augment:
        _scatter(rng, scene, palette, np.flatnonzero(~clear & (rng.random(count) < 0.35)))
    texture = np.where(is_digit, 0, labels["texture"])
    depth = _between(rng, np.broadcast_to(np.array(TEXTURE_DEPTH, np.float32), (count, 2)))
    relief = _textures(rng, texture, across, down, radius) * depth[:, None, None]
    body = ink[:, None, None, :] + relief[..., None]
    scene += masks[..., None] * (body - scene)
    if augment:
        _light(rng, scene, labels)
    pixels = np.rint(np.clip(scene, 0, 1) * 255).astype(np.uint8)
    return Images(pixels, masks, labels)


def _factors(rng: np.random.Generator, is_digit: Flags, scanned: Flags, clear: Flags) -> dict[str, Labels]:
    """Independent labels for all factors; `digit` is filled in where digits are placed."""
    count = len(is_digit)
    labels = {name: rng.integers(len(values), size=count) for name, values in FACTORS.items()}
    # The ground is one of the colours that are left, so it never equals the ink.
    labels["ground"] = (labels["ink"] + rng.integers(1, len(COLOURS), size=count)) % len(COLOURS)
    large_or_medium = rng.integers(1, len(SIZES), size=count)
    labels["size"] = np.where(clear | is_digit, large_or_medium, labels["size"])
    labels["backdrop"][clear] = BACKDROPS.index("flat")
    for name, value in (("ink", "white"), ("ground", "black"), ("size", "large")):
        labels[name][scanned] = FACTORS[name].index(value)
    labels["shape"][is_digit] = NOT_APPLICABLE
    labels["texture"][is_digit] = NOT_APPLICABLE
    labels["digit"][:] = NOT_APPLICABLE
    return labels


def _between(rng: np.random.Generator, bounds_N2: Array) -> Array:
    """One uniform draw per row of (low, high)."""
    low, high = bounds_N2[:, 0], bounds_N2[:, 1]
    return (low + (high - low) * rng.random(len(bounds_N2))).astype(np.float32)


def _centres(rng: np.random.Generator, quadrant: Labels, radius: Array, scanned: Flags) -> Array:
    """Centres (x, y) in pixels [N, 2], inside the quadrant; the object may leave the image by at most 2 pixels."""
    sign = np.stack([np.where(quadrant % 2 == 0, -1, 1), np.where(quadrant < 2, -1, 1)], axis=1)
    room = np.where(scanned, 0.5, np.maximum(MIDDLE + 2 - radius - 1.5, 0.5))
    offset = 1.5 + room[:, None] * rng.random((len(quadrant), 2))
    return (MIDDLE + sign * offset).astype(np.float32)


def _frames(rng: np.random.Generator, radius: Array, centre: Array, shape: Labels) -> tuple[Array, Array]:
    """The object's own coordinates of every pixel, in units of its radius: (across, down), each [N, H, W]."""
    count = len(radius)
    turn = rng.uniform(-TURN, TURN, count)
    whole = rng.uniform(-np.pi, np.pi, count)
    free = np.isin(shape, [SHAPES.index(name) for name in ("bar", "crescent", "arc")])
    turn = np.where(free, whole, turn).astype(np.float32)[:, None, None]
    slant = np.where(shape == NOT_APPLICABLE, rng.uniform(-0.25, 0.25, count), 0).astype(np.float32)[:, None, None]
    stretch = np.exp(rng.uniform(-0.12, 0.12, count)).astype(np.float32)[:, None, None]
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    scale = radius[:, None, None]
    across = (x * np.cos(turn) + y * np.sin(turn)) / scale
    down = (y * np.cos(turn) - x * np.sin(turn)) / scale
    return ((across + slant * down) * stretch).astype(np.float32), (down / stretch).astype(np.float32)


def _polygon(u: Array, v: Array, sides: int, inner: float) -> Array:
    """Distance to a regular polygon that points upwards; `inner` is the radius of its inscribed circle."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(sides) / sides
    return np.max([u * np.cos(a) + v * np.sin(a) for a in angles], axis=0).astype(np.float32) - inner


def _box(u: Array, v: Array, width: float, height: float) -> Array:
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


# Distances to the outline, in radii, negative inside; exact near straight and round edges, which is where it matters.
_OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "square": lambda u, v: _box(u, v, 0.8, 0.8),
    "triangle": lambda u, v: _polygon(u, v - 0.2, 3, 0.52),
    "rhombus": lambda u, v: (np.abs(u) / 0.62 + np.abs(v) - 1) * 0.53,
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.28), _box(u, v, 0.28, 0.95)),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.22,
    "star": lambda u, v: (np.hypot(u, v) - 0.62 - 0.33 * np.cos(5 * np.arctan2(u, -v))) * 0.6,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.78 - np.hypot(u - 0.5, v)),
    "bar": lambda u, v: _box(u, v, 0.95, 0.3),
    "ell": lambda u, v: np.minimum(_box(u + 0.45, v, 0.3, 0.9), _box(u, v - 0.6, 0.75, 0.3)),
    "frame": lambda u, v: np.abs(_box(u, v, 0.65, 0.65)) - 0.2,
    "arc": lambda u, v: np.maximum(np.abs(np.hypot(u, v + 0.35) - 0.75) - 0.22, -v - 0.35),
}


def _place(rng: np.random.Generator, strokes: Array, across: Array, down: Array) -> Array:
    """Sample each digit [N, h, w] at the object's coordinates, smoothly, with strokes thinned or thickened."""
    count, height, width = strokes.shape
    column = (across + 1) / 2 * width - 0.5
    row = (down + 1) / 2 * height - 0.5
    padded = np.pad(strokes, ((0, 0), (1, 1), (1, 1))).astype(np.float32)
    image = np.arange(count)[:, None, None]
    left, top = np.floor(column), np.floor(row)
    right_part, low_part = column - left, row - top
    blend = np.zeros_like(across)
    for below in (0, 1):
        for beside in (0, 1):
            r = np.clip(top + below + 1, 0, height + 1).astype(np.intp)
            c = np.clip(left + beside + 1, 0, width + 1).astype(np.intp)
            weight = (low_part if below else 1 - low_part) * (right_part if beside else 1 - right_part)
            blend += weight * padded[image, r, c]
    edge = rng.uniform(0.25, 0.6, (count, 1, 1))
    return np.clip((blend - edge) / 0.3 + 0.5, 0, 1).astype(np.float32)


def _textures(rng: np.random.Generator, texture: Labels, across: Array, down: Array, radius: Array) -> Array:
    """Relief in about [-1, 1] with a mean near 0, [N, H, W], turned and moved with the object."""
    count = len(texture)
    angle = rng.uniform(0, np.pi, count).astype(np.float32)[:, None, None]
    period = _between(rng, np.broadcast_to(np.array((3.0, 5.5), np.float32), (count, 2)))
    wave = (2 * np.pi * radius / period)[:, None, None]
    phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1)).astype(np.float32)
    noise = rng.standard_normal((count, SIDE, SIDE)).astype(np.float32)
    along = (across * np.cos(angle) + down * np.sin(angle)) * wave
    beside = (down * np.cos(angle) - across * np.sin(angle)) * wave
    relief = np.zeros((count, SIDE, SIDE), np.float32)

    def fill(name: str, field: Callable[[NDArray[np.intp]], Array]) -> None:
        rows = np.flatnonzero(texture == TEXTURES.index(name))
        relief[rows] = field(rows)

    fill("stripes", lambda n: np.tanh(3 * np.sin(along[n] + phase[0, n])))
    fill("checks", lambda n: np.tanh(6 * np.sin(along[n] + phase[0, n]) * np.sin(beside[n] + phase[1, n])))
    fill("dots", lambda n: np.tanh(3 * (np.cos(along[n] + phase[0, n]) + np.cos(beside[n] + phase[1, n]) - 0.4)))
    fill("rings", lambda n: np.tanh(3 * np.sin(np.hypot(along[n], beside[n]) + phase[0, n])))
    fill("ramp", lambda n: np.clip(along[n] / wave[n], -1, 1) * 1.5)
    fill("grain", lambda n: np.clip(noise[n], -2, 2))
    fill("waves", lambda n: np.tanh(3 * np.sin(along[n] + phase[0, n] + 1.8 * np.sin(beside[n] * 0.5 + phase[1, n]))))
    return relief


def _backdrops(rng: np.random.Generator, backdrop: Labels, ground: Array) -> Array:
    """The scene behind the object, float32 [N, H, W, 3]."""
    count = len(backdrop)
    scene = np.repeat(np.repeat(ground[:, None, None, :], SIDE, axis=1), SIDE, axis=2).astype(np.float32)
    grid = (np.arange(SIDE, dtype=np.float32) + 0.5 - MIDDLE) / MIDDLE
    angle = rng.uniform(0, 2 * np.pi, count).astype(np.float32)[:, None, None]
    along = grid[None, None, :] * np.cos(angle) + grid[None, :, None] * np.sin(angle)
    beside = grid[None, :, None] * np.cos(angle) - grid[None, None, :] * np.sin(angle)

    rows = np.flatnonzero(backdrop == BACKDROPS.index("ramp"))
    tint = rng.uniform(-0.1, 0.1, (len(rows), 1, 1, 3)).astype(np.float32) + np.float32(0.2)
    scene[rows] += along[rows, :, :, None] * tint

    rows = np.flatnonzero(backdrop == BACKDROPS.index("weave"))
    wave = rng.uniform(12, 34, (len(rows), 1, 1)).astype(np.float32)  # radians over half the image: 3 to 8 pixels
    crossed = rng.random((len(rows), 1, 1)) < 0.5
    weave = np.sin(along[rows] * wave) * np.where(crossed, np.sin(beside[rows] * wave), 1)
    scene[rows] += 0.16 * np.tanh(3 * weave)[..., None].astype(np.float32)

    rows = np.flatnonzero(backdrop == BACKDROPS.index("clouds"))
    scene[rows] += 0.13 * _clouds(rng, len(rows), 1) + 0.05 * _clouds(rng, len(rows), 3)

    rows = np.flatnonzero(backdrop == BACKDROPS.index("leaves"))
    scene[rows] = _leaves(rng, ground[rows])
    return scene


def _clouds(rng: np.random.Generator, count: int, channels: int) -> Array:
    """Noise of zero mean and unit variance whose amplitude falls as 1/frequency, [N, H, W, channels]."""
    high = np.fft.fftfreq(SIDE)[:, None]
    wide = np.fft.rfftfreq(SIDE)[None, :]
    frequency = np.hypot(high, wide)
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.rfft2(rng.standard_normal((count, channels, SIDE, SIDE))) / frequency
    field = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
    field /= field.std(axis=(2, 3), keepdims=True)
    return np.moveaxis(field, 1, 3).astype(np.float32)


def _leaves(rng: np.random.Generator, ground: Array, layers: int = 28) -> Array:
    """Opaque discs over each other, radii spread as a power law, all in shades of the ground's colour [N, H, W, 3]."""
    count = len(ground)
    scene = np.repeat(np.repeat(ground[:, None, None, :], SIDE, axis=1), SIDE, axis=2).astype(np.float32)
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    for _ in range(layers):
        # Inverse transform of a density proportional to radius^-3 between 2 and 14 pixels: scale invariance.
        radius = 1 / np.sqrt(rng.uniform(1 / 14**2, 1 / 2**2, (count, 1, 1)))
        centre = rng.uniform(0, SIDE, (2, count, 1, 1))
        shade = ground + rng.uniform(-0.15, 0.15, (count, 1)) + rng.uniform(-0.07, 0.07, (count, 3))
        away = np.hypot(grid[None, None, :] - centre[0], grid[None, :, None] - centre[1])
        cover = np.clip(0.5 + radius - away, 0, 1)[..., None]
        scene += (cover * (shade[:, None, None, :] - scene)).astype(np.float32)
    return scene


def _scatter(rng: np.random.Generator, scene: Array, palette: Array, rows: NDArray[np.intp], pieces: int = 3) -> None:
    """Paint up to `pieces` small ellipses of any colour into scene[rows], in place: clutter that is not the object."""
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    for _ in range(pieces):
        chosen = rows[rng.random(len(rows)) < 0.6]
        centre = rng.uniform(0, SIDE, (2, len(chosen), 1, 1))
        radii = rng.uniform(1.0, 4.0, (2, len(chosen), 1, 1))
        colour = palette[rng.integers(len(palette), size=len(chosen))][:, None, None, :]
        away = np.hypot((grid[None, None, :] - centre[0]) / radii[0], (grid[None, :, None] - centre[1]) / radii[1])
        cover = np.clip(0.5 + (1 - away) * radii.min(axis=0), 0, 1)[..., None].astype(np.float32)
        scene[chosen] += cover * (colour - scene[chosen])


def _light(rng: np.random.Generator, scene: Array, labels: dict[str, Labels]) -> None:
    """Uneven light, contrast and colour cast, blur, sensor noise and loss of colour, in place."""
    count = len(scene)
    grid = (np.arange(SIDE, dtype=np.float32) + 0.5 - MIDDLE) / MIDDLE

    def some(share: float, low: float, high: float, *shape: int) -> Array:
        """A uniform draw per image, or 0 for the rest."""
        on = rng.random(count) < share
        value = rng.uniform(low, high, (count, *shape))
        return (value * on.reshape(count, *[1] * len(shape))).astype(np.float32).reshape(count, *shape)

    slope_x, slope_y = some(0.5, -0.2, 0.2, 1, 1), some(0.5, -0.2, 0.2, 1, 1)
    scene *= (1 + slope_x * grid[None, None, :] + slope_y * grid[None, :, None])[..., None]
    scene *= 1 + some(0.6, -0.12, 0.12, 1, 1, 3)
    contrast, brightness = 1 + some(0.6, -0.35, 0.15, 1, 1, 1), some(0.6, -0.1, 0.1, 1, 1, 1)
    scene[...] = (scene - 0.5) * contrast + 0.5 + brightness

    # Binomial 1-2-1 blur along both axes, mixed in by a random amount: from sharp to about one pixel of blur.
    amount = some(0.5, 0.2, 1.0, 1, 1, 1)
    padded = np.pad(scene, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    soft = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    scene += amount * (soft - scene)

    grey = rng.random(count) < 0.1
    luminance = scene[grey] @ np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601
    scene[grey] = luminance[..., None]
    for name in ("ink", "ground"):
        labels[name][grey] = NOT_APPLICABLE
    scene += some(0.6, 0.0, 0.06, 1, 1, 1) * rng.standard_normal(scene.shape).astype(np.float32)
