"""The claims of emoe on one set of runs: tuned sparsely it is no worse, run densely it stays so, and it was sparse."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.checks._data import at_hand
from brickyard.checks._place import place_of
from brickyard.checks._runs import answers, arm_row, majority, trained, tuned
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core import brick as bricks
from brickyard.core.answers import answer
from brickyard.core.arm import parse
from brickyard.core.base import Base, open_base
from brickyard.core.batches import Encoded, encode
from brickyard.core.build import resolve
from brickyard.core.data import Data, read_data
from brickyard.core.errors import BadData
from brickyard.core.ffn import ffns
from brickyard.core.method import Claim
from brickyard.core.task import Task, task_of
from brickyard.tune.emoe import Config, restructure, to_dense

ARMS = {
    "full": "full",
    "emoe": "full + emoe:experts=32,topk=16,layers=4",
    "random": "full + emoe:experts=32,topk=16,layers=4,split=random",
    "dropout": "full + emoe:experts=32,topk=16,layers=4,gate=dropout,keep=dense",
}
ELSEWHERE = {"sst2": "cr"}  # another domain with the same labels, on which nothing trains
NEAR, DENSE, GATE, LEARNED = 0.3, 0.5, 10.0, 5.0  # points
VALIDATION = 100  # rows
COUNTED = 64  # rows whose hidden activations are counted
LADDER = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the experts


@takes("base", "data")
def transfer(claim: Claim, *, test_rows: int = 800, workers: int = 2) -> dict[str, dict[str, Any]]:
    """Tune ARMS and those of the claim with every seed; test each where it was tuned and, unseen, in another domain.

    Parts: "kept" (emoe is at most 0.3 points below full in both
    places), "dense" (the same tuned weights with all experts within 0.5 of emoe) and "sparse" (counted: every token has
    k F/N neurons at work, and the fewer experts a tuned dense model is given, the further its logits move). Gate: full
    beats the most frequent class by 10 points. Control: emoe tuned on shuffled labels must lose what it learned.
    """
    base, data = open_base(claim.base), read_data(claim.data)
    task = task_of(data)
    splits = {name: split.columns for name, split in _some(data, claim.train_rows, test_rows).items()}
    asked = {
        "base": claim.base,
        "data": splits,
        "max_length": claim.max_length or None,
        "training": {"epochs": claim.epochs, "batch": claim.batch or 32, "precision": "float32"},
    }
    places = {"at home": encode(read_data(splits).splits["test"], base, task, max_length=claim.max_length or None)}
    if (other := _elsewhere(claim, task)) is not None:
        rows = other.splits["test"].take(range(min(test_rows, len(other.splits["test"]))))
        places[f"in {other.name}"] = encode(rows, base, task, max_length=claim.max_length or None)
    with place_of("emoe", claim, test_rows) as folder:
        arms = tuned(claim, {**ARMS, **claim.arms}, asked, folder, workers)
        runs = trained(arms, asked, claim.seeds, folder, workers)
        trained({"shuffled": arms["emoe"]}, {**asked, "shuffle_labels": True}, 1, folder, workers)
        kept = {name: answers(folder, name, claim.seeds) for name in arms}  # of the test rows the runs left them
        found = {
            where: {
                **(kept if where == "at home" else _answered(base, task, rows, folder, arms, claim.seeds)),
                "to-dense": _to_dense(base, task, rows, folder, claim.seeds),
            }
            for where, rows in places.items()
        }
        found["at home"]["shuffled"] = answers(folder, "shuffled", 1)
        count = counted(bricks.load(folder / "emoe-1" / "brick").apply(base).model, places["at home"], arms["emoe"])
        steps = ladder(bricks.load(folder / "full-1" / "brick").apply(base).model, places["at home"], arms["emoe"])
    rows_ = {name: arm_row(text, runs[name]) for name, text in arms.items()}
    return judged(found, count, steps, task.metric, rows_)


def _some(data: Data, train_rows: int, test_rows: int) -> dict[str, Any]:
    """The rows that are used, drawn the same every time: a check's time goes by them."""
    most = {"train": train_rows, "validation": VALIDATION, "test": test_rows}
    draw = np.random.Generator(np.random.PCG64(0))
    return {
        name: split.take(np.sort(draw.permutation(len(split))[: most[name] or None]).tolist())
        for name, split in data.splits.items()
        if name in most
    }


def _elsewhere(claim: Claim, task: Task) -> Data | None:
    """The other domain's data, where the claim's have one that is here and has the same labels."""
    name = ELSEWHERE.get(Path(str(claim.data)).name)
    if name is None:
        return None
    try:
        other = read_data(at_hand(name))
    except BadData:
        return None
    return other if task_of(other).labels == task.labels else None


def _answered(
    base: Base, task: Task, rows: Encoded, folder: Path, arms: dict[str, str], seeds: int
) -> dict[str, Answers]:
    """What every arm's seeds answer to `rows`, as they are served."""
    found = {}
    for name in arms:
        models = (bricks.load(folder / f"{name}-{seed}" / "brick").apply(base).model for seed in range(1, seeds + 1))
        found[name] = Answers(rows.labels.numpy(), np.stack([answer(m, rows, task).predictions for m in models]))
    return found


def _to_dense(base: Base, task: Task, rows: Encoded, folder: Path, seeds: int) -> Answers:
    """What emoe's seeds answer to `rows` with all experts."""
    given = []
    for seed in range(1, seeds + 1):
        model = bricks.load(folder / f"emoe-{seed}" / "brick").apply(base).model
        to_dense(model)
        given.append(answer(model, rows, task).predictions)
    return Answers(rows.labels.numpy(), np.stack(given))


@torch.no_grad()
def counted(model: nn.Module, rows: Encoded, arm: str) -> dict[str, int]:
    """Count the neurons at work in each token of a few rows, by what enters the values of the split layers.

    Returns {"tokens", "fewest", "most", "allowed", "neurons", "parameters"}; a neuron whose activation is zero by
    itself (ReLU) is not at work either.
    """
    config: Config = resolve(parse(arm)).configs["emoe"]
    counts: list[Tensor] = []
    split = ffns(model, config.places, "emoe")
    count = lambda layer, args, output: counts.append((args[0] != 0).sum(-1).flatten())  # noqa: E731
    hooks = [ffn.value_layer.register_forward_hook(count) for ffn in split]
    batch = rows.collate(np.arange(min(COUNTED, len(rows))))
    model.eval()(**{name: x for name, x in batch.items() if name != "labels"})
    for hook in hooks:
        hook.remove()
    every = torch.cat(counts)
    return {
        "tokens": len(every),
        "fewest": int(every.min()),
        "most": int(every.max()),
        "allowed": config.topk * split[0].neurons // config.experts,
        "neurons": split[0].neurons,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def ladder(model: nn.Module, rows: Encoded, arm: str) -> dict[str, float]:
    """Give a densely tuned model ever more of its experts: share of experts -> mean distance of its logits, of the
    spread of the dense ones.
    """
    config: Config = resolve(parse(arm)).configs["emoe"]
    batch = {k: x for k, x in rows.collate(np.arange(min(COUNTED, len(rows)))).items() if k != "labels"}
    dense = model.eval()(**batch).logits
    found = {}
    for share in LADDER:
        k = max(1, round(share * config.experts))
        structure = restructure(model, Config(experts=config.experts, topk=k, layers=config.layers))
        found[f"{k}/{config.experts}"] = float((model(**batch).logits - dense).abs().mean() / dense.std())
        structure.remove()
    return found


def judged(
    found: dict[str, dict[str, Answers]],
    count: dict[str, int],
    steps: dict[str, float],
    metric: str,
    arms: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Judge the three parts from the answers by place and arm, the counts and the ladder."""
    home = {**found["at home"], "majority": majority(found["at home"]["full"])}
    gate = _compared(f"full >= majority + {GATE:g}", home, metric)
    gone = _compared(f"emoe >= shuffled + {LEARNED:g}", home, metric)
    control = {"what": "training labels shuffled: there is nothing left to learn", **gone}
    control["destroyed"] = gone["holds"] is True
    shared = {"metric": metric, "arms": arms, "gate": gate, "control": control}
    right = lambda a: float((a.predictions == a.labels).mean())  # noqa: E731
    means = {where: {name: right(a) for name, a in by.items()} for where, by in found.items()}
    table = "; ".join(
        f"{where}: " + ", ".join(f"{name} {100 * mean:.1f}" for name, mean in by.items()) for where, by in means.items()
    )
    kept = {where: _compared(f"emoe >= full - {NEAR:g}", by, metric) for where, by in found.items()}
    beside = {
        where: {name: _compared(f"emoe >= {name} - 0", by, metric) for name in by if name not in ("emoe", "shuffled")}
        for where, by in found.items()
    }
    gains = [where for where, by in beside.items() if by["full"]["low"] > 0]
    said = f"a gain over full may be claimed {' and '.join(gains)}" if gains else "no gain over full may be claimed"
    lost = {
        f"{side}, {where}": _compared(text, by, metric, together=True)
        for where, by in found.items()
        for side, text in (
            ("below", f"to-dense >= emoe - {DENSE:g}"),
            ("above", f"emoe >= to-dense - {DENSE:g}"),
        )
    }
    falls = list(steps.values())
    exact = count["fewest"] <= count["most"] <= count["allowed"] and count["allowed"] < count["neurons"]
    monotone = all(a >= b for a, b in itertools.pairwise(falls))
    share = count["most"] / count["neurons"]
    return {
        "kept": {
            **shared,
            **_together(kept, gate),
            "inequality": f"emoe >= full - {NEAR:g}, {' and '.join(found)}",
            "detail": f"{_shown(kept)}; {said}; {table}",
            "comparisons": {"kept": kept, "beside": beside},
        },
        "dense": {
            **shared,
            **_together(lost, gate),
            "inequality": f"|to-dense - emoe| <= {DENSE:g}, {' and '.join(found)}",
            "detail": f"{_shown(lost)}; {table}",
            "comparisons": lost,
        },
        "sparse": {
            **shared,
            "control": None,
            "inequality": "neurons at work = k F/N < F for every token; logits move less with more experts, not at N",
            "measured": share,
            "low": share,
            "high": share,
            "holds": bool(exact and count["most"] == count["allowed"] and monotone and falls[-1] < 1e-4),
            "detail": (
                f"{count['fewest']} to {count['most']} of {count['neurons']} neurons at work in each of "
                f"{count['tokens']} tokens, allowed {count['allowed']} (counted); distance of the logits of a densely "
                "tuned model by experts: " + ", ".join(f"{k} {gap:.3f}" for k, gap in steps.items())
            ),
            "figures": {"count": count, "ladder": steps},
        },
    }


def _compared(text: str, by: dict[str, Answers], metric: str, *, together: bool = False) -> dict[str, Any]:
    return {"inequality": text, **judge(Inequality.read(text), by, metric, together=together)}


def _together(rows: dict[str, dict[str, Any]], gate: dict[str, Any]) -> dict[str, Any]:
    """One verdict on several comparisons, with the figures of the one that is furthest from holding."""
    verdicts = [row["holds"] for row in rows.values()]
    holds: Any = False if False in verdicts else True if all(h is True for h in verdicts) else "undecided"
    worst = min(rows.values(), key=lambda row: row["measured"])
    return {
        "holds": holds if gate["holds"] is True else "set-up invalid",
        **{key: worst[key] for key in ("measured", "low", "high")},
    }


def _shown(rows: dict[str, dict[str, Any]]) -> str:
    return ", ".join(
        f"{where} {r['inequality'].split(' >= ')[0]} - {r['inequality'].split(' >= ')[1].split()[0]} "
        f"{r['measured']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f})"
        for where, r in rows.items()
    )
