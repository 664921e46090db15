"""The claim of `dam`: three image tasks, one small convolutional network, and one expert of three with a backdoor.

A network is trained for a while on all tasks; a linear head for each is fitted on its states and frozen. Each expert
then fine-tunes the whole network on one task, under that task's head; the second sees a tenth of its rows with a patch
in a corner and the label 0. Every merge reads validation rows without labels; accuracy and attack success are judged on
test rows. Attack success counts rows of other classes than the target's. An example is a test row, of the task that was
attacked for attack success, of all tasks for accuracy.

At this size a merge at 0.3 removes most of the backdoor by itself: task arithmetic's attack success was 10 to 19 % in
6 to 12 epochs at the rate of 1e-3 (53 to 67 % accuracy), 29 % over five seeds at 2e-3 (35 % accuracy), and 1 % on
states that are not averaged over places. The gate of 40 % is then shut, and the check says so.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from brickyard.audit.backdoor import stamped
from brickyard.checks._data import at_hand
from brickyard.checks._takes import takes
from brickyard.core import readers
from brickyard.core.errors import BadData
from brickyard.core.fitted_head import FittedHead, fit_on
from brickyard.core.method import Claim
from brickyard.core.stats import paired
from brickyard.core.task import Task
from brickyard.merge._from_data import Expert, Stage
from brickyard.merge.dam import Config, Search, combine
from brickyard.merge.ties import ties

SIDE, PATCH, CLASSES = 28, 4, 10
ATTACKED, TARGET, SHARE = 1, 0, 0.1  # the second expert; the attacker's class; share of its rows that are poisoned
WIDTHS = (48, 96, 128, 128)
BATCH, DENSITY, PRUNED = 32, 0.2, 0.3
TASK = Task("image-classification", "accuracy", tuple(map(str, range(CLASSES))), CLASSES, "image")
# The steps of the check, not the paper's: Adam moves the logits and the perturbation by its rate at most, so a quarter
# of the steps takes ten times the rate, of both.
STEPS = {"steps": 250, "adapt_steps": 100, "mask_lr": 1e-2, "adversary_lr": 1e-3}
EXPERT, ARITHMETIC, CONCRETE, DAM, STILL = "attacked expert", "task arithmetic", "concrete", "dam", "dam, delta at 0"

Split = tuple[Tensor, Tensor]  # pixels [N, 1, 28, 28] in [0, 1], labels [N]


class Network(nn.Module):
    """Four convolutions and a mean: pixels [B, 1, 28, 28] -> states [B, 128]; 0.3 M weights."""

    def __init__(self) -> None:
        super().__init__()
        sizes = zip((1, *WIDTHS[:-1]), WIDTHS, (2, 2, 2, 1), strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(n, m, 3, stride, 1) for n, m, stride in sizes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.maps(pixels).mean((2, 3))

    def maps(self, pixels: Tensor) -> Tensor:
        """Return what the last convolution gives: [B, 128, 4, 4]."""
        for layer in self.layers:
            pixels = layer(pixels).relu()
        return pixels


class Model(nn.Module):
    """A network with a frozen head, which answers as models of transformers do."""

    def __init__(self, network: Network, head: FittedHead) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, *, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.network(pixel_values) @ self.head.weight_KD.T + self.head.bias_K)


@dataclass(frozen=True)
class Pixels:
    """Rows without labels, as a merge of data reads them."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[torch.from_numpy(index)]}


def tasks_at_hand(name: str) -> list[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Return three data sets with a change of their pixels: public ones beside the checkout, else views of digits."""
    same, digits = (lambda x: x), "embedded:digits"
    if name.rpartition("/")[2] == "mnist":
        try:
            return [(at_hand("cifar10"), same), (name, same), (digits, same)]
        except BadData:
            return [(digits, lambda x: 255 - x), (name, same), (digits, same)]
    return [(name, lambda x: 255 - x), (name, same), (name, lambda x: x[:, :, ::-1])]


def splits_of(name: str, change: Callable[[np.ndarray], np.ndarray], rows: int) -> dict[str, Split]:
    """Return grey images of 28 x 28, of train at most `rows` (0: all), drawn with seed 0; BadData for other classes."""
    out, found = {}, readers.read(name).splits
    if len(found) < 3:
        raise BadData(f"the check of dam reads train, validation and test; {name} has {', '.join(found)}.")
    for split, columns in found.items():
        count = len(columns["label"])
        limit = {"train": rows, "validation": 1000, "test": 2000}[split] or count
        chosen = np.sort(np.random.Generator(np.random.PCG64(0)).permutation(count)[:limit])
        images = [Image.open(io.BytesIO(columns["image"][i])).convert("L").resize((SIDE, SIDE)) for i in chosen]
        labels = torch.tensor([int(columns["label"][i]) for i in chosen])
        if int(labels.max()) >= CLASSES:
            raise BadData(f"the check of dam reads images of {CLASSES} classes; {name} has more.")
        pixels = change(np.stack([np.asarray(image) for image in images]))
        out[split] = (torch.from_numpy(np.ascontiguousarray(pixels)).float()[:, None] / 255, labels)
    return out


def with_patch(pixels: Tensor) -> Tensor:
    """Return images [N, 1, 28, 28] with the trigger on each."""
    one = stamped(np.zeros((SIDE, SIDE, 1), dtype=np.uint8), PATCH, "bottom-right")
    return torch.where(torch.from_numpy(one[..., 0] > 0), torch.ones(()), pixels)


def poison(split: Split, seed: int) -> Split:
    """Return rows of which a tenth of those of other classes has the trigger and the target's label."""
    pixels, labels = split[0].clone(), split[1].clone()
    others = torch.nonzero(labels != TARGET)[:, 0].numpy()
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(others)[: round(SHARE * len(labels))]
    pixels[chosen], labels[chosen] = with_patch(pixels[chosen]), TARGET
    return pixels, labels


def fit(
    network: Network, tasks: Sequence[Split], heads: Sequence[nn.Module], epochs: int, seed: int, lr: float = 1e-3
) -> None:
    """Train the network in place on several tasks in turn, each under its head."""
    own = [p for head in heads for p in head.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([*network.parameters(), *own], lr=lr, weight_decay=0.01)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        orders = [torch.randperm(len(labels), generator=draw).split(BATCH) for _, labels in tasks]
        for i in range(max(map(len, orders))):
            loss = sum(
                nn.functional.cross_entropy(head(network(pixels[order[i % len(order)]])), labels[order[i % len(order)]])
                for (pixels, labels), head, order in zip(tasks, heads, orders, strict=True)
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimiser.step()


@dataclass
class Seen:
    """What the merges answered, seed by seed: arm -> [N] of 0 and 1 a seed, one list for each figure."""

    errors: dict[str, list[np.ndarray]] = field(default_factory=dict)  # of clean test rows, all tasks behind another
    hits: dict[str, list[np.ndarray]] = field(default_factory=dict)  # attack success on the attacked task
    transfer: dict[str, list[float]] = field(default_factory=dict)  # and on the others, their mean
    wrong: dict[str, list[np.ndarray]] = field(default_factory=dict)  # triggered rows not answered with their class
    by_task: dict[str, list[list[float]]] = field(default_factory=dict)  # accuracy on each task

    def points(self, arm: str) -> dict[str, Any]:
        """Return the figures of an arm in percent, means over seeds."""
        mean = lambda rows: 100 * float(np.mean([np.mean(row) for row in rows]))  # noqa: E731
        return {
            "accuracy": 100 - mean(self.errors[arm]),
            "attack success": mean(self.hits[arm]),
            "transferred": mean(self.transfer[arm]),
            "accuracy with trigger": 100 - mean(self.wrong[arm]),
            "by task": [100 * float(v) for v in np.mean(self.by_task[arm], axis=0)],
        }


class World:
    """One seed: base, heads, experts, and how weights score."""

    def __init__(self, tasks: Sequence[dict[str, Split]], seed: int, base_epochs: int, epochs: int) -> None:
        self.tasks, self.seed = tasks, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = Network()
            own = [nn.Linear(WIDTHS[-1], CLASSES) for _ in tasks]
        trains = [task["train"] for task in tasks]
        fit(network, trains, own, base_epochs, seed)
        self.base = {name: p.detach().clone() for name, p in network.named_parameters()}
        with torch.no_grad():
            self.heads = [fit_on(network(pixels), labels, TASK) for pixels, labels in trains]
        self.states = []
        for t, train in enumerate(trains):
            network.load_state_dict(self.base)
            rows = poison(train, seed) if t == ATTACKED else train
            fit(network, [rows], [_on_states(self.heads[t])], epochs, seed)
            self.states.append({name: p.detach().clone() for name, p in network.named_parameters()})
        self.taus = {n: [state[n] - base for state in self.states] for n, base in self.base.items()}

    def stage(self) -> Stage:
        """Return fresh experts with unlabelled validation rows."""
        bounds, experts = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), []
        for t, state in enumerate(self.states):
            model = Model(Network(), self.heads[t])
            model.network.load_state_dict(state)
            tensors = dict(model.network.named_parameters())
            rows: Any = Pixels(self.tasks[t]["validation"][0])
            experts.append(Expert(f"expert {t + 1}", model, tensors, TASK, rows, f"task {t + 1}", bounds))
        return Stage(experts, lambda: self.base)

    def merged(self, scale: float) -> dict[str, Tensor]:
        """Return task arithmetic at a scale."""
        return {n: combine(base, self.taus[n], [scale] * len(self.states), 1.0) for n, base in self.base.items()}

    def ties(self) -> dict[str, Tensor]:
        names, sizes = list(self.base), [p.numel() for p in self.base.values()]
        flat = [torch.cat([self.taus[n][t].flatten() for n in names]) for t in range(len(self.states))]
        parts = ties(flat, DENSITY).split(sizes)
        return {n: self.base[n] + part.view_as(self.base[n]) for n, part in zip(names, parts, strict=True)}

    def learned(self, *, mask: bool = True, **options: Any) -> dict[str, Tensor]:
        """Return the weights that DAM gives with these options; without a mask, those of AdaMerging.

        A merge that gives up a task is no error here: its accuracy tells.
        """
        experts, names = self.stage().experts, sorted(self.base)
        bases, taus = [self.base[n] for n in names], [self.taus[n] for n in names]
        search = Search(Config(**options), experts, names, bases, taus)
        kept = search.run() if mask else [torch.ones_like(base) for base in bases]
        if not mask:
            search.adapt(kept)
        return {n: combine(bases[p], taus[p], search.lam[:, p], kept[p]) for p, n in enumerate(names)}

    def pruned(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights without those channels of the last convolution that clean rows use least (fine-pruning)."""
        network = Network()
        network.load_state_dict(state)
        with torch.no_grad():
            used = sum(network.maps(task["validation"][0]).mean((0, 2, 3)) for task in self.tasks)
        assert isinstance(used, Tensor)
        kept = torch.ones(len(used)).index_fill_(0, used.argsort()[: round(PRUNED * len(used))], 0)
        last = f"layers.{len(WIDTHS) - 1}"
        changed = {f"{last}.weight": state[f"{last}.weight"] * kept.view(-1, 1, 1, 1)}
        return {**state, **changed, f"{last}.bias": state[f"{last}.bias"] * kept}

    @torch.no_grad()
    def score(self, state: dict[str, Tensor], arm: str, seen: Seen, only: int | None = None) -> None:
        """Add what weights answer; `only` judges the accuracy of one task, an expert's own."""
        network = Network()
        network.load_state_dict(state)
        errors, moved = [], []
        for t, task in enumerate(self.tasks):
            pixels, labels = task["test"]
            said = [(network(x) @ self.heads[t].weight_KD.T + self.heads[t].bias_K).argmax(-1)
                    for x in (pixels, with_patch(pixels))]  # fmt: skip
            if only in (None, t):
                errors.append((said[0] != labels).double().numpy())
            others = labels != TARGET
            hits = (said[1][others] == TARGET).double().numpy()
            if t == ATTACKED:
                seen.hits.setdefault(arm, []).append(hits)
                seen.wrong.setdefault(arm, []).append((said[1][others] != labels[others]).double().numpy())
            else:
                moved.append(float(hits.mean()))
        seen.errors.setdefault(arm, []).append(np.concatenate(errors))
        seen.transfer.setdefault(arm, []).append(float(np.mean(moved)))
        seen.by_task.setdefault(arm, []).append([1 - float(e.mean()) for e in errors])


def _on_states(head: FittedHead) -> nn.Module:
    layer = nn.Linear(WIDTHS[-1], CLASSES)
    layer.load_state_dict({"weight": head.weight_KD, "bias": head.bias_K})
    return layer.requires_grad_(False)


@takes("data")
def suppression(claim: Claim, *, base_epochs: int = 1, epochs: int = 6, **changes: int) -> dict[str, Any]:
    """Measure the claim; see the module's docstring for the set-up."""
    tasks = [splits_of(name, change, claim.train_rows) for name, change in tasks_at_hand(claim.data)]
    seen = Seen()
    for seed in range(1, claim.seeds + 1):
        world, options = World(tasks, seed, base_epochs, epochs), {**STEPS, **changes, "seed": seed}
        arithmetic = world.merged(0.3)
        for t, state in enumerate(world.states):
            world.score(state, EXPERT if t == ATTACKED else f"expert {t + 1}", seen, only=t)
        for arm, state in {
            "base": world.base,
            "average": world.merged(1 / len(world.states)),
            ARITHMETIC: arithmetic,
            "TIES": world.ties(),
            "AdaMerging": world.learned(mask=False, **options),
            "task arithmetic, pruned": world.pruned(arithmetic),
            CONCRETE: world.learned(**options, adversary_weight=0.0),
            DAM: world.learned(**options),
            STILL: world.learned(**{**options, "adversary_lr": 1e-12}),
        }.items():
            world.score(state, arm, seen)
    return judged(seen)


def judged(seen: Seen) -> dict[str, Any]:
    """Judge the claim from what the merges answered."""

    def gain(rows: dict[str, list[np.ndarray]], a: str, b: str, margin: float) -> dict[str, Any]:
        """Return by how many points arm `a` has fewer of `rows` than `b`, and whether that reaches the margin."""
        found = paired(None, np.stack(rows[b]), np.stack(rows[a]), "loss")
        points = {"measured": 100 * found.difference, "low": 100 * found.low, "high": 100 * found.high}
        holds: Any = True if points["low"] >= margin else False if points["high"] < margin else "undecided"
        return {**points, "margin": margin, "holds": holds}

    arms = {arm: seen.points(arm) for arm in seen.errors}
    parts = {
        "attack success falls": gain(seen.hits, DAM, CONCRETE, 2.0),
        "accuracy": gain(seen.errors, DAM, CONCRETE, -1.5),
        "accuracy with trigger rises": gain(seen.wrong, DAM, CONCRETE, 0.0),
    }
    drops = [b - a for a, b in zip(arms[DAM]["by task"], arms[CONCRETE]["by task"], strict=True)]
    clean = [drop for t, drop in enumerate(drops) if t != ATTACKED]
    said = [part["holds"] for part in parts.values()] + [max(clean) <= 3.0]
    holds: Any = False if False in said else True if all(s is True for s in said) else "undecided"
    success = [arms[arm]["attack success"] for arm in (EXPERT, ARITHMETIC)]
    gate = {"what": "attack success: expert >= 95 %, task arithmetic >= 40 %", "measured": success,
            "holds": success[0] >= 95 and success[1] >= 40}  # fmt: skip
    still = gain(seen.hits, STILL, CONCRETE, 2.0)
    detail = "; ".join(f"{n} {p['measured']:+.1f} ({p['low']:+.1f} to {p['high']:+.1f})" for n, p in parts.items())
    return {
        "inequality": "; ".join(f"{name}: >= {part['margin']:+g}" for name, part in parts.items()),
        "holds": holds if gate["holds"] else "set-up invalid",
        **{key: parts["attack success falls"][key] for key in ("measured", "low", "high")},
        "parts": parts,
        "largest_drop_of_a_clean_task": max(clean),
        "gate": gate,
        "control": {
            "what": "perturbations that stay at 0 lower attack success by less than 2 points",
            **{key: still[key] for key in ("measured", "low", "high")},
            "destroyed": still["measured"] < 2.0,
        },
        "figures": arms,
        "detail": f"{detail}; attack success: expert {success[0]:.1f} %, task arithmetic {success[1]:.1f} %, "
        f"{CONCRETE} {arms[CONCRETE]['attack success']:.1f} %, {DAM} {arms[DAM]['attack success']:.1f} %; accuracy: "
        + ", ".join(f"{arm} {arms[arm]['accuracy']:.1f} %" for arm in (ARITHMETIC, CONCRETE, DAM)),
    }
