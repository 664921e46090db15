"""Our loop with LoRA against `transformers.Trainer` with the same LoRA and the same batches: interleaved step times."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from brickyard.core import trial
from brickyard.core.build import build
from brickyard.core.loop import Training, train

STEPS, ROUNDS = 12, 3


class Batches(Dataset):
    """Ready batches, one an item."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.batches[i]


class OnBatches(Trainer):
    """Trainer on ready batches, so that both sides do nothing but steps."""

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches as they are."""
        return DataLoader(self.train_dataset, batch_size=None, shuffle=False)  # type: ignore[arg-type]


class Fixed:
    """The rows of a few fixed batches, collated once."""

    def __init__(self, batches: list[dict[str, Any]], size: int) -> None:
        self.batches, self.size = batches, size
        self.labels = torch.cat([b["labels"] for b in batches])
        self.lengths, self.digest = np.zeros(size * len(batches)), "fixed"
        self.turn = -1

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, index: np.ndarray) -> dict[str, Any]:
        """Return the next batch in turn, whatever the rows."""
        self.turn = (self.turn + 1) % len(self.batches)
        return self.batches[self.turn]


def main() -> None:
    """Run both sides in turn and print the ratio of the medians."""
    ready = trial.prepare(trial.Setting(arm="lora", max_length=64), ("train",))
    rows = np.arange(STEPS * 32)
    batches = [ready.encoded["train"].collate(part) for part in np.split(rows, STEPS)]
    ours, theirs = [], []
    for _ in range(ROUNDS):
        attached = build(ready.plan, ready.base, ready.task, seed=0)
        training = Training(lr=1e-3, steps=STEPS, batch=32, warmup=0.0)
        started = time.monotonic()
        train(attached, Fixed(batches, 32), None, ready.task, training, device="cpu")
        ours.append((time.monotonic() - started) / STEPS)

        attached = build(ready.plan, ready.base, ready.task, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=STEPS,
                learning_rate=1e-3,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = OnBatches(attached.model, arguments, train_dataset=Batches(batches))
            started = time.monotonic()
            trainer.train()
            theirs.append((time.monotonic() - started) / STEPS)
    out = {"ours_step_ms": 1000 * statistics.median(ours), "trainer_step_ms": 1000 * statistics.median(theirs)}
    print(
        json.dumps(
            {
                **out,
                "ours_over_trainer": out["ours_step_ms"] / out["trainer_step_ms"],
                "limit": 1.10,
                "kind": "measured",
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
