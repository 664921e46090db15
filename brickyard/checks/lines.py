"""The claims of `lines`: of one model on views of the digits, of merging on sentence tasks; every baseline beside.

A small residual network is trained for a while on four views of the digits; a head for each view is fitted on its
states and frozen. Each expert then fine-tunes the whole network on one view, under that view's head. The test rows are
the same digits in all views, so an example is a digit: its error is the mean over experts and views.

What is merged are experts of a sentence encoder, one a task: on the digits the fitted heads leave experts little to
gain. Scales are chosen on validation rows, over one grid for all, and judged on test rows.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from brickyard.checks._sentence_tasks import Experts, courses_of, task_sets
from brickyard.checks._takes import takes
from brickyard.core import readers
from brickyard.core.base import open_base
from brickyard.core.errors import BadData
from brickyard.core.fitted_head import FittedHead, fit_on
from brickyard.core.method import Claim
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.merge.lines import closed_alpha, scale_by_depth
from brickyard.merge.task_arithmetic import add_up
from brickyard.merge.ties import ties

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "turned": lambda x: x.rot90(1, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "inverted": lambda x: 1 - x,
}
GRID = tuple(round(0.1 * i, 1) for i in range(1, 11))  # of lambda and of beta alike
ALPHAS = (0.1, 0.2, 0.3)
DENSITY = 0.2
TASKS = ("trec", "sst2", "cr", "embedded:stdlib-topics")
WIDTH, BLOCKS, BATCH = 64, 6, 32
JUDGED = ("validation", "test")
TASK = Task("image-classification", "accuracy", tuple(map(str, range(10))), 10, "image")
_TARGET_WEIGHT = 2.0  # the paper's: target counts twice where alpha is chosen

Split = tuple[Tensor, Tensor]  # pixels [N, 8, 8] in [0, 1], labels [N]


class Network(nn.Module):
    """Residual blocks on flattened pixels: [B, 8, 8] -> states [B, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "up": nn.Linear(WIDTH, WIDTH), "down": nn.Linear(WIDTH, WIDTH)})
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        x_BD = self.embed(pixels.flatten(1))
        for block in self.blocks:
            x_BD = x_BD + block["down"](nn.functional.gelu(block["up"](block["norm"](x_BD))))  # type: ignore[index]
        return self.norm(x_BD)


@dataclass
class Scored:
    """Whether each digit is answered wrongly, by view: [N] of 0 and 1, on validation and on test rows."""

    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]

    def accuracy(self, views: Sequence[str]) -> float:
        """The mean over views on the validation rows."""
        return 1 - float(np.mean([self.validation[view].mean() for view in views]))

    def error(self, views: Sequence[str]) -> np.ndarray:
        """Each test digit's error, the mean over views: [N]."""
        return np.mean([self.test[view] for view in views], axis=0)


@dataclass
class Errors:
    """Errors of an arm's test rows by seed: lists of [N]."""

    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, arm: str, error_N: np.ndarray) -> None:
        self.rows.setdefault(arm, []).append(error_N)

    def compare(self, a: str, b: np.ndarray | str, margin: float) -> dict[str, Any]:
        """Return by how many points of accuracy arm `a` is above `b` (an arm, or errors [S, N]) and the judgement."""
        other = np.stack(self.rows[b]) if isinstance(b, str) else b
        found = paired(None, other, np.stack(self.rows[a]), "loss")
        points = {"measured": 100 * found.difference, "low": 100 * found.low, "high": 100 * found.high}
        holds: Any = True if points["low"] >= margin else False if points["high"] < margin else "undecided"
        return {**points, "margin": margin, "holds": holds}

    def means(self) -> dict[str, float]:
        """Accuracy of every arm in percent."""
        return {arm: 100 * (1 - float(np.mean(rows))) for arm, rows in self.rows.items()}


def splits_of(name: str) -> dict[str, Split]:
    """Return the pixels and labels of a data set of grey 8 x 8 images; BadData for others."""
    out = {}
    for split, columns in readers.read(name).splits.items():
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(raw)).convert("L")) for raw in columns["image"]])
        if pixels.shape[1:] != (8, 8):
            raise BadData(f"the check of lines reads images of 8 x 8 pixels; {name} has {pixels.shape[1:]}.")
        labels = torch.tensor([int(label) for label in columns["label"]])
        out[split] = (torch.from_numpy(pixels).float() / 255, labels)
    return out


def fit(
    network: Network, tasks: Sequence[tuple[Tensor, Tensor]], heads: Sequence[nn.Module], epochs: int, seed: int
) -> None:
    """Train the network in place on several tasks in turn, each under its head."""
    parameters = [*network.parameters(), *(p for head in heads for p in head.parameters() if p.requires_grad)]
    optimiser = torch.optim.AdamW(dict.fromkeys(parameters), lr=1e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(tasks[0][1]), generator=draw).split(BATCH):
            loss = sum(
                nn.functional.cross_entropy(head(network(pixels[rows])), labels[rows])
                for (pixels, labels), head in zip(tasks, heads, strict=True)
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimiser.step()


class World:
    """One seed: base, heads and experts, and how a flat vector of weights [P] scores."""

    def __init__(self, data: Mapping[str, Split], seed: int, base_epochs: int, epochs: int) -> None:
        self.data = data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network, shared = Network(), nn.Linear(WIDTH, 10)
        pixels, labels = data["train"]
        seen = {view: (change(pixels), labels) for view, change in VIEWS.items()}
        fit(self.network, list(seen.values()), [shared] * len(seen), base_epochs, seed)
        self.shapes = {name: tuple(p.shape) for name, p in self.network.named_parameters()}
        self.base_P = self.flat()
        with torch.no_grad():
            states = {view: self.network(x) for view, (x, _) in seen.items()}
        self.heads = {view: fit_on(state_ND, labels, TASK) for view, state_ND in states.items()}
        self.judged = torch.cat([change(data[split][0]) for split in JUDGED for change in VIEWS.values()])
        self.taus: dict[str, Tensor] = {}
        for view, task in seen.items():
            self.load(self.base_P)
            fit(self.network, [task], [_on_states(self.heads[view])], epochs, seed)
            self.taus[view] = self.flat() - self.base_P

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])

    def named(self, vector_P: Tensor) -> dict[str, Tensor]:
        parts = vector_P.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def load(self, vector_P: Tensor) -> None:
        self.network.load_state_dict({name: part.clone() for name, part in self.named(vector_P).items()})

    def scale_P(self, alpha: float, beta: float, *, reverse: bool = False) -> Tensor:
        """Every parameter's scale, as `lines` gives it."""
        scales = scale_by_depth(self.shapes, alpha, beta, reverse=reverse)
        return torch.cat([torch.full((torch.Size(s).numel(),), scales[name]) for name, s in self.shapes.items()])

    @torch.no_grad()
    def score(self, tau_P: Tensor) -> Scored:
        """Score the base with a change; all views of both splits go through the network together."""
        states_MD = functional_call(self.network, self.named(self.base_P + tau_P), (self.judged,))
        parts = states_MD.split([len(self.data[split][1]) for split in JUDGED for _ in VIEWS])
        wrong: dict[str, dict[str, np.ndarray]] = {split: {} for split in JUDGED}
        for (split, view), state_ND in zip(itertools.product(JUDGED, VIEWS), parts, strict=True):
            head = self.heads[view]
            guessed = (state_ND @ head.weight_KD.T + head.bias_K).argmax(-1)
            wrong[split][view] = (guessed != self.data[split][1]).double().numpy()
        return Scored(wrong["validation"], wrong["test"])


def _on_states(head: FittedHead) -> nn.Module:
    layer = nn.Linear(WIDTH, 10)
    layer.load_state_dict({"weight": head.weight_KD, "bias": head.bias_K})
    return layer.requires_grad_(False)


def one_model(world: World, target: str, errors: Errors) -> None:
    """Edit one expert in every way, choose on validation, and add its test errors on the target and the controls."""
    controls, tau = [view for view in VIEWS if view != target], world.taus[target]
    base, tuned = world.score(torch.zeros_like(tau)), world.score(tau)
    edited = {a: world.score(world.scale_P(a, 1 - a) * tau) for a in ALPHAS}
    turned = {a: world.score(world.scale_P(a, 1 - a, reverse=True) * tau) for a in ALPHAS}
    constant = {scale: world.score(scale * tau) for scale in GRID}

    def worth(found: Scored) -> float:
        normalised = found.accuracy([target]) / tuned.accuracy([target])
        return _TARGET_WEIGHT * normalised + found.accuracy(controls) / base.accuracy(controls)

    alpha = max(ALPHAS, key=lambda a: worth(edited[a]))
    lines = edited[alpha]
    # The rival at equal control accuracy: of the constants that keep as much of the controls, the best on the target.
    equal = [s for s in GRID if constant[s].accuracy(controls) >= lines.accuracy(controls)] or [GRID[0]]
    rival = max(equal, key=lambda s: constant[s].accuracy([target]))
    free = max(GRID, key=lambda s: worth(constant[s]))
    arms = {
        "base": base,
        "fine-tuned": tuned,
        "lines": lines,
        "reversed": turned[alpha],
        "constant": constant[rival],
        "constant chosen freely": constant[free],
    }
    for arm, found in arms.items():
        errors.add(f"{arm}: target", found.error([target]))
        errors.add(f"{arm}: controls", found.error(controls))


def merging(world: Experts, errors: Errors) -> None:
    """Merge the experts in every way, each at its best scale of the grid, and add the test errors."""
    names = list(world.start)
    taus = [torch.cat([(e[name] - world.start[name]).flatten() for name in names]) for e in world.experts.values()]
    shapes = {name: tuple(world.start[name].shape) for name in names}
    sizes = [world.start[name].numel() for name in names]
    vectors = {"task arithmetic": add_up(taus), "TIES": ties(taus, DENSITY)}
    vectors["average"] = vectors["task arithmetic"] / len(taus)
    norm = float(vectors["task arithmetic"].abs().sum())

    def put(tau_P: Tensor, scales: Mapping[str, float]) -> None:
        parts = zip(names, tau_P.split(sizes), strict=True)
        world.load({n: world.start[n] + scales[n] * part.view(shapes[n]) for n, part in parts})

    def best(tau_P: Tensor, candidates: Sequence[Mapping[str, float]]) -> np.ndarray:
        wrong = []
        for scales in candidates:
            put(tau_P, scales)
            wrong.append(float(world.errors("held").mean()))
        put(tau_P, candidates[int(np.argmin(wrong))])
        return world.errors()

    for name, tau_P in vectors.items():
        alpha = closed_alpha(len(taus), norm, float(tau_P.abs().sum()))
        errors.add(name, best(tau_P, [dict.fromkeys(names, scale) for scale in GRID]))
        errors.add(f"{name} + lines", best(tau_P, [scale_by_depth(shapes, alpha, beta) for beta in GRID]))
        if name == "task arithmetic":
            turned = [scale_by_depth(shapes, alpha, beta, reverse=True) for beta in GRID]
            errors.add(f"{name} + reversed", best(tau_P, turned))
    own = []
    for course in world.seen:
        world.load(world.experts[course.name])
        own.append(world.of(course))
    errors.add("experts, each on its own", np.concatenate(own))
    errors.add("base", world.score(world.start))


@takes("data")
def by_views(claim: Claim, *, base_epochs: int = 3, epochs: int = 6) -> dict[str, Any]:
    """Measure the claim on one model; see the module's docstring for the set-up."""
    data, errors = splits_of(claim.data), Errors()
    for seed in range(1, claim.seeds + 1):
        world, of_seed = World(data, seed, base_epochs, epochs), Errors()
        for view in VIEWS:
            one_model(world, view, of_seed)
        for arm, found in of_seed.rows.items():
            errors.add(arm, np.mean(found, axis=0))
    return judged_one(errors)


@takes("base")
def by_tasks(claim: Claim, *, held: int = 100, test: int = 500) -> dict[str, Any]:
    """Measure the claim on merging; of each task `held` texts choose the scales and `test` texts are judged."""
    sets, base, errors = task_sets(TASKS), open_base(claim.base), Errors()
    for seed in range(1, claim.seeds + 1):
        merging(Experts(base, courses_of(sets, base, claim, seed, held, test), claim, seed), errors)
    return judged_many(errors)


def judged_one(errors: Errors) -> dict[str, Any]:
    """Judge the claim on one model."""
    halfway = 0.5 * (np.stack(errors.rows["base: controls"]) + np.stack(errors.rows["fine-tuned: controls"]))
    parts = {
        "target kept": errors.compare("lines: target", "fine-tuned: target", -1.5),
        "half restored": errors.compare("lines: controls", halfway, 0.0),
        "above constant": errors.compare("lines: target", "constant: target", 0.0),
    }
    gate = errors.compare("base: controls", "fine-tuned: controls", 5.0)
    control = errors.compare("lines: controls", "reversed: controls", 0.0)
    return _report(errors, parts, gate, control, "base >= fine-tuned + 5 on the controls", "above constant")


def judged_many(errors: Errors) -> dict[str, Any]:
    """Judge the claim on merging."""
    part = errors.compare("task arithmetic + lines", "task arithmetic", -0.3)
    seeds = list(zip(errors.rows["task arithmetic + lines"], errors.rows["task arithmetic"], strict=True))
    better = sum(bool(a.mean() < b.mean()) for a, b in seeds)
    if part["holds"] is True and 3 * better < 2 * len(seeds):
        part["holds"] = False
    gate = errors.compare("experts, each on its own", "base", 5.0)
    control = errors.compare("task arithmetic + lines", "task arithmetic + reversed", 0.0)
    out = _report(errors, {"no worse": part}, gate, control, "experts >= base + 5, each on its own task", "no worse")
    gain = "" if 3 * better >= 2 * len(seeds) else "; no gain here"
    return {**out, "better_seeds": better, "detail": f"{out['detail']}; better in {better} of {len(seeds)} seeds{gain}"}


def _report(
    errors: Errors,
    parts: Mapping[str, dict[str, Any]],
    gate: dict[str, Any],
    control: dict[str, Any],
    what: str,
    leading: str,
) -> dict[str, Any]:
    said = [part["holds"] for part in parts.values()]
    holds: Any = False if False in said else True if all(h is True for h in said) else "undecided"
    detail = "; ".join(
        f"{name} {p['measured']:+.1f} ({p['low']:+.1f} to {p['high']:+.1f})" for name, p in parts.items()
    )
    rival = {name: mean for name, mean in errors.means().items() if name.startswith(("constant", "lines"))}
    shown = "; " + ", ".join(f"{name} {mean:.1f} %" for name, mean in rival.items()) if rival else ""
    return {
        "inequality": "; ".join(f"{name}: >= {part['margin']:+g}" for name, part in parts.items()),
        "holds": holds if gate["holds"] is True else "set-up invalid",
        **{key: parts[leading][key] for key in ("measured", "low", "high")},
        "detail": f"{detail} points{shown}",
        "comparisons": dict(parts),
        "gate": {"inequality": what, **gate},
        "control": {
            "what": "the schedule reversed: the first block keeps most",
            "inequality": "lines >= reversed",
            "destroyed": control["holds"] is True,
            **{key: control[key] for key in ("measured", "low", "high")},
        },
        "figures": {"accuracy": errors.means()},
    }
