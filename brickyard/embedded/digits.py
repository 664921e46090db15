"""`embedded:digits`: scikit-learn's 1,797 handwritten digits of 8x8 pixels, as PNG files in memory.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test part, 16 grey levels).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from brickyard.core.errors import BadData

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def splits() -> dict[str, dict[str, list]]:
    """Return {"train" | "validation" | "test": {"image": [PNG bytes], "label": [0..9]}}, drawn class by class, seed 0.

    Raises:
        BadData: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as cause:
        raise BadData(
            "embedded:digits needs scikit-learn, which is not installed. Run `pip install brickyard[embedded]`."
        ) from cause
    levels_NHW, labels_N = load_digits(return_X_y=True)
    levels_NHW = np.round(levels_NHW.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    draw = np.random.Generator(np.random.PCG64(0))
    rows: dict[str, list[int]] = {split: [] for split in SHARES}
    for label in range(10):
        members = draw.permutation(np.flatnonzero(labels_N == label))
        cuts = np.round(np.cumsum(list(SHARES.values()))[:-1] * len(members)).astype(int)
        for split, part in zip(SHARES, np.split(members, cuts), strict=True):
            rows[split] += part.tolist()
    ordered = {split: sorted(index) for split, index in rows.items()}
    return {
        split: {"image": [_png(levels_NHW[i]) for i in index], "label": labels_N[index].tolist()}
        for split, index in ordered.items()
    }


def _png(pixels_HW: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, "PNG")
    return buffer.getvalue()
