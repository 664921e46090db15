"""Twelve-lead, ECG-like recordings by formula, in two domains, and a small 1-D ConvNet with a transformer block on top.

A beat is a sum of Gaussian bumps (P, QRS, T) on one time axis; each lead sees it under a gain of its own. Five classes:

    0 regular    1 a beat is missing    2 an early, wide beat    3 irregular and without P    4 T turned over

Domain 0 is the source. In domain 1 every recording has lead gains drawn around other values, an offset for each lead, a
drifting baseline, three times the noise and a heart that beats faster. Nothing here was fitted to recorded ECGs.
Legend: N recordings, L = 12 leads, T = 256 samples, K beats.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLASSES, LEADS, SAMPLES = 5, 12, 256
NAMES = ("regular", "missing beat", "early beat", "irregular", "turned T")
# Position in the beat, width and height of the bumps P, Q, R, S, T; in samples, and in units of the R peak.
BUMPS = ((-10.0, 2.5, 0.15), (-2.5, 1.0, -0.15), (0.0, 1.2, 1.0), (2.5, 1.2, -0.25), (14.0, 4.0, 0.3))
_P, _T = 0, 4
_BEATS = 12


def recordings(count: int, domain: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x [N, L, T] float32 and labels [N] int64, drawn from `seed`."""
    rng = np.random.Generator(np.random.PCG64([seed, domain]))
    labels_N = rng.integers(CLASSES, size=count)
    period_N = rng.uniform(38, 52, count) * (0.8 if domain else 1.0)
    jitter_NK = rng.normal(0, 1.0, (count, _BEATS))
    irregular_NK = rng.uniform(-0.35, 0.35, (count, _BEATS)) * period_N[:, None]
    jitter_NK = np.where((labels_N == 3)[:, None], irregular_NK, jitter_NK)
    time_NK = rng.uniform(-20, 20, count)[:, None] + period_N[:, None] * np.arange(_BEATS) + jitter_NK
    # What happens to one beat happens where it can be seen.
    odd_N = rng.integers(2, 4, count)
    here_NK = np.arange(_BEATS) == odd_N[:, None]
    height_NK = np.where(here_NK & (labels_N == 1)[:, None], 0.0, 1.0)
    early_NK = here_NK & (labels_N == 2)[:, None]
    time_NK = time_NK - early_NK * 0.3 * period_N[:, None]
    wide_NK = np.where(early_NK, 2.5, 1.0)
    clock_T = np.arange(SAMPLES)
    gain_L = np.random.Generator(np.random.PCG64(7)).normal(0.8, 0.5, (2, LEADS))[domain]
    gain_NL = gain_L * np.exp(rng.normal(0, 0.5 if domain else 0.15, (count, LEADS)))
    beat_NT, turned_NT = np.zeros((count, SAMPLES)), np.zeros((count, SAMPLES))
    for i, (place, width, height) in enumerate(BUMPS):
        size_N = np.full(count, height)
        if i == _P:
            size_N[labels_N == 3] = 0.0
        if i == _T:
            size_N[labels_N == 4] *= -1.0
        away_NKT = clock_T - (time_NK + place * wide_NK)[..., None]
        bump_NKT = np.exp(-0.5 * (away_NKT / (width * wide_NK)[..., None]) ** 2)
        (turned_NT if i == _T else beat_NT)[:] += (bump_NKT * height_NK[..., None]).sum(1) * size_N[:, None]
    tilt_NL = 1 + 0.2 * rng.normal(size=(count, LEADS))  # leads see T and the rest from different sides
    x_NLT = gain_NL[..., None] * (beat_NT[:, None] + tilt_NL[..., None] * turned_NT[:, None])
    x_NLT += rng.normal(0, 0.15 if domain else 0.05, x_NLT.shape)
    if domain:
        phase_NL = rng.uniform(0, 2 * np.pi, (count, LEADS, 1))
        x_NLT += 0.5 * np.sin(2 * np.pi * clock_T / 200 + phase_NL) + rng.normal(0, 0.5, (count, LEADS, 1))
    return x_NLT.astype(np.float32), labels_N


class Signals:
    """Recordings as the loop reads them."""

    def __init__(self, x_NLT: np.ndarray, labels_N: np.ndarray) -> None:
        self.x, self.labels = torch.from_numpy(x_NLT), torch.from_numpy(labels_N)
        self.lengths = np.ones(len(labels_N), dtype=np.int64)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.x.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        """Return pixel_values [n, L, T], by the name that image models give their input, and labels [n]."""
        rows = torch.from_numpy(np.asarray(index, dtype=np.int64))
        return {"pixel_values": self.x[rows], "labels": self.labels[rows]}


class Block(nn.Module):
    """Two convolutions with batch norms around a shortcut; the first halves the length."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(n, m, 7, stride=2, padding=3, bias=False)
        self.norm1 = nn.BatchNorm1d(m)
        self.second = nn.Conv1d(m, m, 7, padding=3, bias=False)
        self.norm2 = nn.BatchNorm1d(m)
        self.shortcut = nn.Conv1d(n, m, 1, stride=2, bias=False)

    def forward(self, x_BnT: Tensor) -> Tensor:
        """Return [B, m, T / 2]."""
        y = torch.relu(self.norm1(self.first(x_BnT)))
        return torch.relu(self.norm2(self.second(y)) + self.shortcut(x_BnT))


class SignalNet(nn.Module):
    """ConvNet, one transformer block, mean over time, linear layer: [B, L, T] -> logits [B, classes]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(LEADS, width // 2), Block(width // 2, width), Block(width, width))
        self.transformer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, pixel_values: Tensor) -> Any:
        """Return an object with `logits`."""
        h_BTd = self.transformer(self.encoder(pixel_values).transpose(1, 2))
        return SimpleNamespace(logits=self.head(h_BTd.mean(dim=1)))
