"""The claims of `semi-bn`: what unlabelled recordings gain under a shift of domain, and what they cost."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.checks._signals import NAMES, SignalNet, Signals, recordings
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.loop import Training, train
from brickyard.core.measure import peak_bytes, saved_for_backward_bytes
from brickyard.core.method import Claim
from brickyard.core.task import Task
from brickyard.data.semi_bn import AUGMENTATIONS, Config, SplitAfter, Unlabelled, norms

TASK = Task("image-classification", "accuracy", NAMES, len(NAMES), "image")
BATCH = 16
CPU = torch.device("cpu")


def under_shift(
    claim: Claim,
    *,
    source_rows: int = 2000,
    labelled: int = 80,
    pool: int = 2000,
    test_rows: int = 2000,
    epochs: int = 40,
    **_: Any,
) -> dict[str, Any]:
    """Train on the source, adapt to the other domain with few labels, and hold the ways to use the rest side by side.

    Arms: labels alone; semi-bn; the same on rows that are not augmented; labelled rows in place of unlabelled ones;
    statistics estimated anew on the pool after training. Control: unlabelled rows of the source, which know nothing of
    the target. Gate: adapting gains 5 points.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)  # else the pre-trained network would be what ran before in this process makes it
        base = SignalNet()
    x, labels = recordings(source_rows, 0, 0)
    _fit(base, Signals(x, labels), epochs=6, seed=0, lr=2e-3)
    test = Signals(*recordings(test_rows, 1, 1))
    other = Signals(*recordings(pool, 1, 2))
    origin = Signals(x, labels)
    found: dict[str, list[np.ndarray]] = {}
    for seed in range(1, claim.seeds + 1):
        few = Signals(*recordings(labelled, 1, 100 + seed))
        for name, rows in (("labels", None), ("semi", other), ("as-is", other), ("again", few), ("source", origin)):
            model = copy.deepcopy(base)
            _fit(model, few, epochs=epochs, seed=seed, lr=1e-3, pool=rows, augment=name != "as-is")
            found.setdefault(name, []).append(answer(model, test, TASK).predictions)
            if name == "labels":
                estimate(model, other)
                found.setdefault("estimated", []).append(answer(model, test, TASK).predictions)
        found.setdefault("unadapted", []).append(answer(base, test, TASK).predictions)
    arms = {name: Answers(test.labels.numpy(), np.stack(rows)) for name, rows in found.items()}

    def compare(text: str) -> dict[str, Any]:
        # The arms of a seed have the same few labelled recordings.
        return {"inequality": text, **judge(Inequality.read(text), arms, TASK.metric, together=True)}

    gain, gate = compare("semi >= labels + 1.0"), compare("labels > unadapted + 5.0")
    gone = compare("source >= labels + 1.0")
    texts = ("semi >= again + 0.0", "semi >= estimated + 0.0", "estimated >= labels + 1.0", "as-is >= labels + 1.0")
    others = [compare(text) for text in texts]
    means = {name: 100 * float(np.mean(a.predictions == a.labels)) for name, a in arms.items()}
    detail = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    valid = gate["holds"] is True
    return {
        "gain": {
            **gain,
            "holds": gain["holds"] if valid else "set-up invalid",
            "detail": f"{gain['measured']:+.2f} points ({gain['low']:+.2f} to {gain['high']:+.2f}); accuracy: {detail}",
            "gate": gate,
            "control": {
                "what": "unlabelled rows of the source domain: they say nothing of the target",
                "destroyed": gone["holds"] is False,
                **gone,
            },
            "comparisons": others,
            "figures": {"means": means},
        },
        "memory": memory(),
    }


def _fit(
    model: nn.Module,
    rows: Signals,
    *,
    epochs: float,
    seed: int,
    lr: float,
    pool: Signals | None = None,
    augment: bool = True,
) -> None:
    attached = attach_in_place(model, [n for n, _ in model.named_parameters()], matched={})
    more = [] if pool is None else [unlabelled(model, pool, seed, augment)]
    training = Training(lr=lr, epochs=epochs, batch=BATCH, warmup=0.01, seed=seed, evaluate_every=10**9)
    train(attached, rows, None, TASK, training, callbacks=more, device="cpu")


def unlabelled(model: nn.Module, pool: Signals, seed: int, augment: bool = True) -> Unlabelled:
    """Return semi-bn as the paper has it, or with rows that stay as they are."""
    return Unlabelled(Config(after="encoder", augment=tuple(AUGMENTATIONS) if augment else ()), pool, model, CPU, seed)


@torch.no_grad()
def estimate(model: nn.Module, rows: Signals) -> None:
    """Replace the running averages of the batch norms by the averages over `rows`."""
    found = norms(model).values()
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
    model.train()
    for part in np.array_split(np.arange(len(rows)), len(rows) // 64):
        model(pixel_values=rows.collate(part)["pixel_values"])
    model.eval()


def memory(batch: int = 64) -> dict[str, Any]:
    """Count a step's peak memory, forward and backward: labels alone, with semi-bn, and with pseudo-labels.

    As many unlabelled rows as labelled ones. The pseudo-labels' own pass needs no gradient and is not counted; their
    strongly augmented rows go through all layers.
    """
    rows = Signals(*recordings(2 * batch, 1, 3))
    given = rows.collate(np.arange(batch))
    labels, x = given["labels"], given["pixel_values"]
    model = SignalNet().train()
    found = {"labels": _bytes(model, x, labels)}
    with SplitAfter(model, "encoder", lambda n: {"pixel_values": rows.x[batch : batch + n]}):
        found["semi"] = _bytes(model, x, labels)
    found["pseudo"] = _bytes(model, rows.x, torch.cat([labels, labels]))
    ratio, control = (found[arm]["peak"] / found["labels"]["peak"] for arm in ("semi", "pseudo"))
    saved = found["semi"]["saved for backward"] / found["labels"]["saved for backward"]
    return {
        "inequality": "peak(semi-bn) <= 1.6 peak(labels)",
        "holds": ratio <= 1.6,
        "measured": ratio,
        "low": ratio,
        "high": ratio,
        "detail": (
            f"{found['semi']['peak'] / 2**20:.1f} MiB at the peak of a step against "
            f"{found['labels']['peak'] / 2**20:.1f} = {ratio:.2f} (saved for backward alone {saved:.2f}); "
            f"pseudo-labels {control:.2f}, at B={batch} and as many unlabelled rows (counted)"
        ),
        "gate": None,
        "control": {
            "what": "pseudo-labels, whose rows go through every layer",
            "inequality": "peak(pseudo-labels) <= 1.6 peak(labels)",
            "measured": control,
            "low": control,
            "high": control,
            "destroyed": control > 1.6,
        },
        "figures": {"bytes": found},
    }


def _bytes(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, int]:
    def step() -> None:
        F.cross_entropy(model(pixel_values=x).logits, labels).backward()

    step()  # from the second step on gradients are freed in time
    model.zero_grad()
    peak = peak_bytes(step).bytes
    model.zero_grad()
    saved = saved_for_backward_bytes(model, {"pixel_values": x}, lambda logits: F.cross_entropy(logits, labels))
    return {"peak": peak, "saved for backward": saved}
