"""What MediPhi's paper claims of its merges, measured on a small code model with four specialities of Python.

One expert is tuned on each speciality from one base. SLERP takes each back towards the base, with the t that is best on
the speciality's validation rows among those that keep at most ALLOWED of what the expert lost on general ones. Then all
are merged under Breadcrumbs' mask: the repaired experts, the experts as they are, and, as the control, the repaired
experts with the entries of every tensor shuffled, which changes as much and knows nothing. The scale of each merge is
the best of one grid on validation rows; nothing is chosen on test rows.

Shapes: S seeds, N held-out documents. All losses are nats of whole documents, [S, N], compared in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brickyard.checks._place import finished, place_of
from brickyard.checks._takes import takes
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.base import Base, open_base
from brickyard.core.batches import Encoded, encode
from brickyard.core.data import read_data
from brickyard.core.jobs import Job
from brickyard.core.loop import Training, train
from brickyard.core.method import Claim
from brickyard.core.split import Split
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.merge.mediphi import breadcrumbs, parts, products_with_change, repair
from brickyard.merge.slerp import cosine_of

TASK = Task("causal-lm", "nats_per_token", None, 1, "text")
SPECIALITIES = {name: f"embedded:python-{name}" for name in ("network", "numeric", "text", "tests")}
GENERAL = "embedded:python-general"
TS = (0.3, 0.5, 0.7, 0.9)
SCALES = (0.3, 0.6, 1.0)
DENSITY, GAMMA = 0.9, 0.01
KEPT, ALLOWED = 0.8, 0.3  # of the gain on the speciality, of the loss on general text

Change = dict[str, Tensor]  # by parameter


@dataclass(frozen=True)
class Scale:
    """How large the measurement is; `documents` of each speciality are trained on (0: all)."""

    base: str
    epochs: float
    block: int
    batch: int
    seeds: int
    documents: int
    lr: float
    held_out: int = 40

    @classmethod
    def of(cls, claim: Claim) -> Scale:
        """Read it off a claim's fields."""
        lr = claim.lrs[0] if claim.lrs else 1e-3
        return cls(claim.base, claim.epochs, claim.max_length, claim.batch or 16, claim.seeds, claim.train_rows, lr)


@dataclass(frozen=True)
class Runs:
    """Nats [S, N] by (model, data), tokens [N] by data, and what was chosen and seen in every seed."""

    tokens: dict[str, np.ndarray]
    nats: dict[tuple[str, str], np.ndarray]
    about: dict[str, Any]

    def both(self, model: str, other: str, data: Sequence[str]) -> dict[str, Any]:
        """Measure that `model` is at most `other`, on several data sets together."""
        return _at_most(
            np.concatenate([self.tokens[name] for name in data]),
            np.concatenate([self.nats[model, name] for name in data], axis=1),
            np.concatenate([self.nats[other, name] for name in data], axis=1),
        )


def _at_most(tokens: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Measure a <= b in nats per token: {"measured": a - b, "low", "high", "holds"}; seed s of both is one world."""
    found = paired(tokens, a, b, "nats_per_token", together=True)
    holds: Any = True if found.high <= 0 else False if found.low > 0 else "undecided"
    return {"measured": found.difference, "low": found.low, "high": found.high, "holds": holds}


@takes("base")
def specialities(claim: Claim) -> dict[str, Any]:
    """Measure the three claims; see the module's docstring for the set-up."""
    runs = measure(Scale.of(claim))
    return {"unified": unified(runs), "repaired": repaired(runs), "repaired first": repaired_first(runs)}


def measure(scale: Scale) -> Runs:
    """Train and merge with every seed, two seeds at a time in processes of their own."""
    jobs = [
        Job(key=f"seed {seed}", function=f"{__name__}:world", argument={"scale": asdict(scale), "seed": seed})
        for seed in range(scale.seeds)
    ]
    with place_of("mediphi", scale) as folder:
        done = finished(jobs, 2, folder)
    values = [done[job.key] for job in jobs]
    nats = {
        (model, data): np.asarray([value["nats"][model][data] for value in values])
        for model, of_data in values[0]["nats"].items()
        for data in of_data
    }
    tokens = {data: np.asarray(found) for data, found in values[0]["tokens"].items()}
    return Runs(tokens, nats, {"seeds": {job.key: value["about"] for job, value in zip(jobs, values, strict=True)}})


def unified(runs: Runs) -> dict[str, Any]:
    """Judge the merge against the base on every speciality."""
    found = {name: runs.both("unified", "base", [name]) for name in SPECIALITIES}
    worst = max(found.values(), key=lambda one: one["high"])
    control = runs.both("base", "shuffled", list(SPECIALITIES))
    return _result(
        runs,
        "unified <= base on every speciality",
        {**worst, "holds": _all(found)},
        f"nats per token against the base: {_listed(found)}",
        {f"expert <= base on {name}": runs.both(f"{name} raw", "base", [name]) for name in SPECIALITIES},
        {"what": "the entries of every tensor's change shuffled", "inequality": "base <= shuffled", **control},
    )


def repaired(runs: Runs) -> dict[str, Any]:
    """Judge how much of an expert's gain and of its damage is left after the repair, over all experts."""
    own, general = _pooled(runs, own=True), _pooled(runs, own=False)
    # gain(repaired) >= KEPT gain(raw), and rise(repaired) <= ALLOWED rise(raw), both linear in the losses.
    kept = _at_most(own.tokens, own.repaired, (1 - KEPT) * own.base + KEPT * own.raw)
    healed = _at_most(general.tokens, general.repaired, (1 - ALLOWED) * general.base + ALLOWED * general.raw)
    found = {f"{KEPT:.0%} of the gain": kept, f"at most {ALLOWED:.0%} of the loss": healed}
    lost = _at_most(own.tokens, own.shuffled, (1 - KEPT) * own.base + KEPT * own.raw)
    shown = f"gain kept {own.share():.0%}, loss left {general.share():.0%}"
    return _result(
        runs,
        f"repaired <= {1 - KEPT:g} base + {KEPT:g} raw on its speciality; "
        f"repaired <= {1 - ALLOWED:g} base + {ALLOWED:g} raw on general text",
        {**max(found.values(), key=lambda one: one["high"]), "holds": _all(found)},
        f"{shown}; distance to the bounds in nats per token: {_listed(found)}",
        {
            "raw <= base on its speciality": _at_most(own.tokens, own.raw, own.base),
            "base <= raw on general text": _at_most(general.tokens, general.base, general.raw),
        },
        {
            "what": "the entries of every tensor's repaired change shuffled",
            "inequality": f"shuffled > {1 - KEPT:g} base + {KEPT:g} raw on its speciality",
            **lost,
            "holds": lost["holds"] is False,
        },
    )


def repaired_first(runs: Runs) -> dict[str, Any]:
    """Compare the merge of repaired experts with that of the experts as they are, on everything together."""
    every = [*SPECIALITIES, "general"]
    found = runs.both("unified", "unrepaired", every)
    control = runs.both("unrepaired", "shuffled", every)
    return _result(
        runs,
        "unified <= merge of unrepaired experts",
        found,
        f"nats per token over all data {_shown(found)}; each merge at its own best scale of {SCALES}",
        {f"expert <= base on {name}": runs.both(f"{name} raw", "base", [name]) for name in SPECIALITIES},
        {"what": "the entries of every tensor's change shuffled", "inequality": "unrepaired <= shuffled", **control},
    )


@dataclass(frozen=True)
class _Pooled:
    """Losses of all experts in a row: [S, experts N]."""

    tokens: np.ndarray
    base: np.ndarray
    raw: np.ndarray
    repaired: np.ndarray
    shuffled: np.ndarray

    def share(self) -> float:
        """The repaired experts' change of loss as a share of the raw ones'."""
        whole = float((self.raw - self.base).sum())
        return float((self.repaired - self.base).sum()) / whole if whole else float("nan")


def _pooled(runs: Runs, *, own: bool) -> _Pooled:
    data = {name: name if own else "general" for name in SPECIALITIES}

    def rows(kind: str) -> np.ndarray:
        return np.concatenate(
            [runs.nats[f"{name} {kind}" if kind != "base" else kind, data[name]] for name in SPECIALITIES], axis=1
        )

    tokens = np.concatenate([runs.tokens[data[name]] for name in SPECIALITIES])
    return _Pooled(tokens, rows("base"), rows("raw"), rows("repaired"), rows("shuffled"))


def _all(found: Mapping[str, dict[str, Any]]) -> Any:
    said = [one["holds"] for one in found.values()]
    return False if False in said else True if all(h is True for h in said) else "undecided"


def _shown(found: Mapping[str, Any]) -> str:
    return f"{found['measured']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _listed(found: Mapping[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name} {_shown(one)}" for name, one in found.items())


def _result(
    runs: Runs,
    inequality: str,
    found: dict[str, Any],
    detail: str,
    gates: dict[str, dict[str, Any]],
    control: dict[str, Any],
) -> dict[str, Any]:
    """Complete a finding; set-up invalid where the experts learned nothing, or there was nothing to repair."""
    closed = [text for text, one in gates.items() if one["holds"] is not True]
    means = {
        f"{model} on {data}": float(nats.mean(axis=0).sum() / runs.tokens[data].sum())
        for (model, data), nats in runs.nats.items()
    }
    straight = [about["straight"] for about in runs.about["seeds"].values()]
    line = f"SLERP was a straight line in {sum(s[0] for s in straight)} of {sum(s[1] for s in straight)} tensors"
    return {
        "inequality": inequality,
        "metric": "nats_per_token",
        **found,
        **({"holds": "set-up invalid"} if closed else {}),
        "figures": {"nats_per_token": means, **runs.about},
        "control": {
            **{key: control[key] for key in ("what", "inequality", "measured", "low", "high")},
            "destroyed": control["holds"] is True,
        },
        "gate": gates,
        "detail": f"{detail}; {line}" + (f"; set-up invalid: {closed[0]} does not hold" if closed else ""),
    }


def world(argument: dict[str, Any]) -> dict[str, Any]:
    """Train, repair and merge with one seed; return {"nats": {model: {data: [N]}}, "tokens", "about"}."""
    scale, seed = Scale(**argument["scale"]), argument["seed"]
    lab = _Lab.of(scale)
    raw = {name: lab.expert(name, scale, seed) for name in SPECIALITIES}
    for name, tau in raw.items():
        lab.keep(f"{name} raw", tau, [name, "general"])
    fixed, chosen, straight = {}, {}, []
    for name, tau in raw.items():
        chosen[name] = lab.choose_t(name, tau)
        fixed[name], lines = lab.repaired(tau, chosen[name])
        straight += lines
        lab.keep(f"{name} repaired", fixed[name], [name, "general"])
    shuffled = {name: _shuffled(tau, seed) for name, tau in fixed.items()}
    for name, tau in shuffled.items():
        lab.keep(f"{name} shuffled", tau, [name, "general"])
    scales = {}
    for label, taus in (("unified", fixed), ("unrepaired", raw), ("shuffled", shuffled)):
        summed = added([_crumbs(tau) for tau in taus.values()])
        scales[label] = min(SCALES, key=lambda s, summed=summed: lab.validation(scaled(summed, s), list(lab.rows)))
        lab.keep(label, scaled(summed, scales[label]), list(lab.rows))
    lab.keep("average", scaled(added(list(fixed.values())), 1 / len(fixed)), list(lab.rows))
    return {
        "nats": lab.nats,
        "tokens": {name: rows["test"].labels.tolist() for name, rows in lab.rows.items()},
        "about": {"t": chosen, "scale": scales, "straight": [sum(straight), len(straight)], "seconds": lab.seconds},
    }


class _Lab:
    """A base with its data: changes of its weights are put on it, scored, and taken off again."""

    def __init__(self, base: Base, rows: dict[str, dict[str, Encoded]]) -> None:
        self.model: Any = base.model(TASK, seed=0)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.rows = rows
        self.nats: dict[str, dict[str, list[float]]] = {"base": {}}
        self.known: dict[str, float] = {}
        self.seconds = 0.0
        for name, of_split in rows.items():
            self.nats["base"][name] = self.losses({}, of_split["test"]).tolist()
            self.known[name] = self.validation({}, [name])

    @classmethod
    def of(cls, scale: Scale) -> _Lab:
        """Open the base and encode the rows: of general text only what is scored."""
        base, rows = open_base(scale.base), {}
        for name, spec in {**SPECIALITIES, "general": GENERAL}.items():
            splits = read_data(spec, task="causal-lm").splits
            counts = {"validation": scale.held_out // 2, "test": scale.held_out}
            if name != "general":
                counts["train"] = scale.documents
            rows[name] = {
                split: encode(
                    Split({"text": splits[split]["text"][: count or None]}), base, TASK, max_length=scale.block
                )
                for split, count in counts.items()
            }
        return cls(base, rows)

    def expert(self, name: str, scale: Scale, seed: int) -> Change:
        """Return the change that tuning all weights on one speciality makes."""
        self._put({})
        flat = [key for key, p in self.model.named_parameters() if p.ndim < 2]
        attached = attach_in_place(self.model, list(self.start), matched={}, no_decay=flat)
        how = Training(lr=scale.lr, wd=0.1, epochs=scale.epochs, batch=scale.batch, seed=seed, evaluate_every=10**9)
        self.seconds += train(attached, self.rows[name]["train"], None, TASK, how, device="cpu").seconds
        return {key: p.detach() - self.start[key] for key, p in self.model.named_parameters()}

    def repaired(self, tau: Change, t: float) -> tuple[Change, list[bool]]:
        """Return an expert's change after SLERP with the base, and for every tensor whether that was a line."""
        out, lines = {}, []
        for key, change in tau.items():
            cosine = cosine_of(products_with_change(self.start[key].flatten(), change.flatten()).tolist())
            found = parts(cosine, t)
            out[key] = repair(self.start[key], change, *found)
            lines.append(found[0] == 0.0)
        return out, lines

    def choose_t(self, name: str, tau: Change) -> float:
        """Return the t that is best on the speciality among those that lose little on general text; else the least."""
        rise = max(0.0, self.validation(tau, ["general"]) - self.known["general"])
        tried = {t: self.repaired(tau, t)[0] for t in TS}
        limit = self.known["general"] + ALLOWED * rise
        fits = [t for t in TS if self.validation(tried[t], ["general"]) <= limit] or [min(TS)]
        return min(fits, key=lambda t: self.validation(tried[t], [name]))

    def validation(self, tau: Change, data: Sequence[str]) -> float:
        """Return the mean over data sets of nats per token on validation rows."""
        found = []
        for name in data:
            rows = self.rows[name]["validation"]
            found.append(float(self.losses(tau, rows).sum() / rows.labels.sum()))
        return float(np.mean(found))

    def keep(self, label: str, tau: Change, data: Sequence[str]) -> None:
        """Score a change on test rows and keep the answers."""
        self.nats[label] = {name: self.losses(tau, self.rows[name]["test"]).tolist() for name in data}

    def losses(self, tau: Change, rows: Encoded) -> np.ndarray:
        """Return the nats of every document: [N]."""
        self._put(tau)
        return answer(self.model, rows, TASK).predictions

    @torch.no_grad()
    def _put(self, tau: Change) -> None:
        for key, p in self.model.named_parameters():
            p.copy_(self.start[key] + tau[key] if key in tau else self.start[key])


def _crumbs(tau: Change) -> Change:
    return {key: breadcrumbs(change.flatten(), DENSITY, GAMMA).view_as(change) for key, change in tau.items()}


def added(taus: Sequence[Change]) -> Change:
    """Return the sum of changes."""
    return {key: torch.stack([tau[key] for tau in taus]).sum(0) for key in taus[0]}


def scaled(tau: Change, scale: float) -> Change:
    """Return a change times a number."""
    return {key: change * scale for key, change in tau.items()}


def _shuffled(tau: Change, seed: int) -> Change:
    """Return a change with the entries of every tensor in another order: as large, and without what was learned."""
    g = torch.Generator().manual_seed(seed)
    return {key: c.flatten()[torch.randperm(c.numel(), generator=g)].view_as(c) for key, c in tau.items()}
