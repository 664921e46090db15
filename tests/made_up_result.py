"""A made-up but complete result.json for the tests of the report: no arm of it was ever run."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

TOPICS = (
    "concurrency",
    "data types",
    "development tools",
    "file access",
    "graphical interfaces and media",
    "internet data",
    "internet protocols",
    "language and runtime",
    "markup",
    "networking",
    "numbers and functions",
    "operating system",
    "persistence and archives",
    "text processing",
)
# arm, accuracy, trainable parameters, MiB saved for backward, ms of a step, brick MiB, trivial
ARMS = (
    ("lora", 0.842, 153_614, 118.0, 41.0, 0.6, False),
    ("mos:r=7,e=2", 0.858, 41_230, 112.0, 44.5, 0.17, False),
    ("full", 0.861, 22_718_606, 171.0, 63.0, 86.7, False),
    ("hira:r=16", 0.847, 301_070, 124.0, 46.2, 1.2, False),
    ("fourierft:n=1000", 0.823, 17_390, 131.0, 71.0, 0.07, False),
    ("lst:r=8", 0.838, 402_118, 21.5, 19.8, 1.6, False),
    ("telly:k=8 + moment-probing", 0.851, 9_460_000, 74.0, 37.1, 36.1, False),
    ("lora:r=8 + zo-adam", 0.766, 153_614, 0.0, 28.4, 0.6, False),
    ("idpt:tokens=12", 0.829, 96_526, 140.0, 48.8, 0.39, False),
    ("linear-probe", 0.794, 5_390, 0.4, 0.6, 0.02, True),
    ("untouched", 0.081, 0, 0.0, 0.0, 0.0, True),
    ("majority-class", 0.203, 0, 0.0, 0.0, 0.0, True),
)
FAILED = (
    (
        "full:lr=0.1",
        "failed",
        "loss was NaN at step 37 (batch 1184..1200, tensor encoder.layer.0.attention.query.weight)",
    ),
    ("rigl:density=0.1", "timeout", "stopped after 600 s; 212 of 1,500 steps were done"),
    ("galore:rank=256", "out-of-memory", "needed 4.3 GiB at step 1, the limit is 4 GiB; the next smaller: batch=8"),
    ("cca-merge", "refused", "fits no classification task on one base: it merges bricks of independent bases"),
)


def made_up(
    *, arms: int = 12, failed: bool = True, labels: tuple[str, ...] = TOPICS, seeds: int = 3, points: int = 40
) -> dict[str, Any]:
    """Return a complete result of `arms` methods (and, with `failed`, four that did not finish)."""
    chance = random.Random(0)
    done = [_method(row, seeds, chance) for row in ARMS[:arms]]
    names = [m["arm"] for m in done]
    lost = [{"arm": arm, "status": status, "reason": reason, "trivial": False} for arm, status, reason in FAILED]
    recommended = "mos:r=7,e=2" if "mos:r=7,e=2" in names else names[0] if names else None
    return {
        "methods": [*done, *(lost if failed else [])],
        "pairs": _pairs(done),
        "verdict": {
            "recommended": recommended,
            "sentence": _sentence(recommended) if recommended else "No arm finished, so there is nothing to recommend.",
            "reasons": [f"{n} against full: difference of some points." for n in names if n != "full"],
            "indistinguishable": [n for n in names if n in ("full", "telly:k=8 + moment-probing")],
        },
        "environment": {
            "python": "3.11.9",
            "system": "Linux x86_64",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "cpu": "AMD EPYC 9654 96-Core Processor",
            "cores": 8,
            "threads": 1,
            "accelerators": [],
            "attention": "sdpa",
        },
        "budget": {
            "minutes": 30,
            "memory_bytes": 4 * 2**30,
            "seeds": seeds,
            "trials_per_arm": 4,
            "steps": 504,
            "side_by_side": 8,
            "search": "random",
            "search_seconds": 812.4,
        },
        "data": {
            "name": "embedded:stdlib-topics",
            "rows": {"train": 5370, "validation": 774, "test": 1532},
            "labels": list(labels),
            "encoding": {
                "train": {"rows": 5370, "truncated": 41, "longest": 311},
                "validation": {"rows": 774, "truncated": 6, "longest": 290},
                "test": {"rows": 1532, "truncated": 13, "longest": 302},
            },
            "report": {
                "origin": "embedded",
                "ignored_files": [],
                "duplicates": {"train": 17, "validation": 0, "test": 3},
                "contradictions": {"train": 2, "validation": 0, "test": 0},
                "overlap": {"test_in_train": 9, "test_in_train_share": 0.0059, "validation_in_train": 0},
                "largest_row_bytes": {"train": 4018, "validation": 3988, "test": 4001},
                "classes": {s: {n: 40 + 3 * i for i, n in enumerate(labels)} for s in ("train", "validation", "test")},
                "warnings": ["9 test rows also stand in train (0.6 %)"],
            },
        },
        "base": {"spec": "embedded:minilm", "fingerprint": "9f2c41d07be3a558" * 4},
        "task": {"kind": "text-classification", "metric": "accuracy"},
        "command": "brickyard compare --base embedded:minilm --data embedded:stdlib-topics --methods lora full "
        "'mos:r=7,e=2' 'hira:r=16' --minutes 30 --memory 4GiB --seeds 3",
        "curves": {m["arm"]: _curves(m, seeds, points, chance) for m in done if not m["trivial"]},
        "confusion": (
            {"arm": recommended, "labels": list(labels), "matrix": _confusion(len(labels), chance)} if names else None
        ),
        "without_overlap": {
            "rows": 1523,
            "removed": 9,
            "pairs": [],
            "verdict": {"recommended": recommended, "sentence": f"{recommended}: 85.7 % accuracy (84.0 to 87.4)."},
        },
    }


def _sentence(arm: str) -> str:
    return (
        f"{arm}: 85.8 % accuracy (84.1 to 87.5), indistinguishable from full on your data (difference −0.3 points, 95 "
        "% interval −2.5 to +1.8; about 3,400 more test examples would be needed to tell), at under 1 % of its "
        "trainable parameters and 65 % of its memory. It is the cheapest of the 3 arms that cannot be told apart, by "
        "trainable parameters (where equal, by size of the brick, then memory saved for the backward pass)."
    )


def _method(row: tuple[Any, ...], seeds: int, chance: random.Random) -> dict[str, Any]:
    arm, mean, parameters, saved, step, brick, trivial = row
    half = 1.96 * math.sqrt(mean * (1 - mean) / 1532)
    trained = step > 0
    per_seed = [round(mean + (chance.gauss(0, 0.006) if trained else 0), 5) for _ in range(seeds)]
    return {
        "arm": arm,
        "status": "done",
        "reason": None,
        "score": {"metric": "accuracy", "mean": mean, "low": mean - half, "high": mean + half, "per_seed": per_seed},
        "retained": {
            "what": "embedded:python-source",
            "metric": "accuracy",
            "before": 0.7121,
            "after": 0.7121 - chance.uniform(-0.01, 0.12),
            "drift": chance.random() / 10,
        }
        if trained
        else None,
        "cost": {
            "trainable_parameters": parameters,
            "saved_for_backward_bytes": int(saved * 2**20) if trained else None,
            "peak_bytes": int((saved * 1.3 + 190) * 2**20) if trained else None,
            "step_ms": step if trained else None,
            "train_seconds": step * 0.504 if trained else 0.0,
            "forward_flops": 2_730_000_000,
            "brick_bytes": int(brick * 2**20),
        },
        "receipt": _receipt(arm, chance) if trained else {},
        "setting": {"lr": 0.001} if trained else {},
        "setting_arm": f"{arm} + lr=0.001" if trained else arm,
        "training": {"lr": 0.001, "epochs": 3.0, "batch": 32, "wd": 0.01, "warmup": 0.06, "schedule": "linear"},
        "tried": {"0": {"share": 1.0, "validation": mean - 0.01, "status": "done", "reason": ""}} if trained else {},
        "trivial": trivial,
    }


def _receipt(arm: str, chance: random.Random) -> dict[str, Any]:
    layers = [f"encoder.layer.{i}.attention.self" for i in range(6)]
    names = [f"{layer}.{role}.lora_{half}" for layer in layers for role in ("query", "value") for half in "AB"]
    moved = [
        {
            "name": name,
            "norm": 1.2,
            "change": change,
            "relative": change / 1.2 if name.endswith("A") else None,
            "largest": change / 3,
            "only_decayed": False,
        }
        for name in names
        for change in [chance.uniform(0.05, 0.6)]
    ]
    return {
        "warnings": ["1 of 25 trainable tensors did not move: classifier.bias"] if arm == "lora" else [],
        "matched": {role: [f"{layer}.{role}" for layer in layers] for role in ("query", "value")},
        "trainable_tensors": 25,
        "trainable_parameters": 153_614,
        "moved": moved,
        "unmoved": ["classifier.bias"],
        "reshaped": [],
        "added": [],
        "removed": [],
        "frozen_moved": [],
        "change": 1.93,
        "not_finite": [],
        "logits": {"max": 3 + 3 * chance.random(), "mean": chance.random(), "kl": 0.8, "rows": 16, "finite": True},
    }


def _pairs(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pairs = []
    for a, b in itertools.combinations(done, 2):
        difference = a["score"]["mean"] - b["score"]["mean"]
        p = math.erfc(abs(difference) / 0.011 / math.sqrt(2))
        pairs.append(
            {
                "a": a["arm"],
                "b": b["arm"],
                "difference": difference,
                "low": difference - 0.0215,
                "high": difference + 0.0215,
                "p": p,
                "p_holm": min(1.0, p * 12),
                "test": "paired bootstrap",
                "note": "",
                "needed": {"sentence": "about 3,400 more test examples would be needed to tell"},
            }
        )
    return pairs


def _curves(method: dict[str, Any], seeds: int, points: int, chance: random.Random) -> list[dict[str, Any]]:
    final, speed = method["score"]["mean"], chance.uniform(2, 6)
    curves = []
    for seed in range(1, seeds + 1):
        rows = []
        for i in range(1, points + 1):
            share = i / points
            loss = 2.6 * math.exp(-speed * share) + 0.35 + chance.gauss(0, 0.06)
            value = final * (1 - math.exp(-speed * share * 1.6)) + chance.gauss(0, 0.006) if i % 4 == 0 else None
            rows.append(
                {
                    "step": round(504 * share),
                    "examples": round(16128 * share),
                    "train_loss": loss,
                    "validation_score": value,
                }
            )
        curves.append({"seed": seed, "points": rows})
    return curves


def _confusion(classes: int, chance: random.Random) -> list[list[int]]:
    return [
        [
            chance.randint(40, 190) if i == j else max(0, chance.randint(-14, 9 if abs(i - j) > 1 else 18))
            for j in range(classes)
        ]
        for i in range(classes)
    ]
