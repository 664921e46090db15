"""Adapters against PEFT's LoRA of the same rank on the same layers: steps, what is left of them, and serving many.

    python benchmarks/low_rank.py [--rounds 9] [--batch 32] [--tokens 64] [--parts training many]

A BERT of the shape of all-MiniLM-L6-v2 with random weights (no figure depends on them). Four steps of the project's own
loop, callbacks and AdamW included, alternate in one process; figures are medians, ratios are those of the same rounds.
MoS stands against a LoRA of the rank that it assembles; AdaLoRA against PEFT's own driven by hand, both with all of
their ranks, and once more when the ranks are final. Steps before and after SoRA's compaction are of runs that differ in
it alone. A merged model is the base with other numbers: its modules and shapes are held against the base's one by one,
so the ratio of its forward to the base's shows the noise of a figure. Limits: MoS 1.05 and 1.02 times the saved bytes,
DyLoRA and AdaLoRA 1.05, SoRA 1.10; a batch of 32 rows from 32 of 100 adapters 1.5 times one from a single adapter, and
memory the base plus the bricks within 5 %, with all that serving leaves behind. What is above is listed under "over".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig

from brickyard.core.arm import parse
from brickyard.core.attached import Attached
from brickyard.core.build import resolve
from brickyard.core.inject import BrickyardConfig, BrickyardLinear, register
from brickyard.core.loop import Backprop, Hooks, State, Training, train, train_mode
from brickyard.core.measure import distinct_bytes, environment, interleaved, saved_for_backward_bytes
from brickyard.core.ranks import Ranks
from brickyard.core.registry import load
from brickyard.core.task import Task
from brickyard.core.wrap import ADAPTER, attach_peft

ROLES = "[query,key,value,out,up,down]"
LAYERS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
TASK = Task("text-classification", "accuracy", ("a", "b"), 2, "text")
STEPS = 4
LONG = 10**6
TIME, BYTES = "time", "bytes"
MIXED, HELD = "time of a mixed batch", "bytes held over base and bricks"
LIMITS = {
    "training": {
        "mos": {TIME: 1.05, BYTES: 1.02},
        "sora": {TIME: 1.10},
        "dylora": {TIME: 1.05},
        "dylora, frozen": {TIME: 1.05},
        "adalora": {TIME: 1.05},
        "adalora, ranks final": {TIME: 1.05},
    }
}
SERVING = {MIXED: 1.5, HELD: 1.05}  # of every method


class Rows:
    """Random rows of full length, as the loop takes them."""

    def __init__(self, count: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 1000, (count, tokens), generator=generator)
        self.labels = torch.randint(0, 2, (count,), generator=generator)
        self.lengths = np.full(count, tokens)
        self.digest = "random"

    def __len__(self) -> int:
        return len(self.ids)

    def collate(self, index: np.ndarray) -> dict[str, Tensor]:
        """Return a batch."""
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


def bert() -> nn.Module:
    """Return the base with its head."""
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return AutoModelForSequenceClassification.from_config(shape)


def attached(arm: str) -> Attached:
    """Return an arm on the base."""
    plan = resolve(parse(arm), TASK)
    name = plan.arm.pieces[0].name
    return load(name).attach(bert(), plan.configs[name], TASK)


class Drive:
    """Calls an allocator after every optimiser step, counting steps from 1 over all calls of the loop."""

    def __init__(self, allocate: Callable[[int], object]) -> None:
        self.allocate, self.count = allocate, 0

    def after_step(self, state: Any) -> None:
        """One optimiser step has been taken, gradients are still there."""
        self.count += 1
        self.allocate(self.count)


def our_adalora(rank: int, total: int) -> Attached:
    """Our AdaLoRA on a schedule of `total` steps; a long one leaves all ranks where they are while it is timed."""
    made = attached(f"adalora:init_r={rank},target_r={rank - 2},target={ROLES},tinit=0.0,tfinal=0.0")
    allocation = made.callbacks[0]
    allocation.start(total)
    made.callbacks = (Drive(allocation.step),)
    return made


def pefts_adalora(rank: int, total: int) -> Attached:
    """PEFT's AdaLoRA as its documentation drives it: its allocator after every optimiser step."""
    model = bert()
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(LAYERS) and "pooler" not in n
    ]
    config = peft.AdaLoraConfig(init_r=rank, target_r=rank - 2, tinit=0, tfinal=1, deltaT=10, total_step=total)
    made = attach_peft(model, config, {"all": names})
    made.callbacks = (Drive(made.model.base_model.update_and_allocate),)  # type: ignore[arg-type]

    def regulariser() -> Tensor:
        total, count = torch.zeros(()), 0
        for name, p in made.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                total, count = total + torch.norm(gram - torch.eye(len(gram))), count + 1
        return 0.5 * total / count

    made.extra_loss = regulariser
    return made


def steps_of(made: Attached, rows: Rows, batch: int) -> Callable[[], object]:
    """Return STEPS steps of the loop."""
    training = Training(steps=STEPS, batch=batch, lr=1e-4, precision="float32", evaluate_every=10**9)
    return lambda: train(made, rows, None, TASK, training)


def training_steps(rounds: int, batch: int, tokens: int, rank: int) -> dict[str, Any]:
    """Ratios of time and of the bytes kept for the backward pass."""
    rows = Rows(batch * STEPS, tokens)
    plain = f"r={rank},alpha=16,target={ROLES}"
    arms = {
        "lora": attached(f"lora:{plain}"),
        f"lora r={rank - 1}": attached(f"lora:r={rank - 1},alpha=16,target={ROLES}"),
        "mos": attached(f"mos:r={rank - 1},e=2,p=1,l=4,dropout=0.0"),
        "sora": attached(f"sora:r={rank},k=0.0,target=blocks"),
        "sora, 3/4 of the ranks cut": attached(f"sora:r={rank},k=0.0,target=blocks"),
        "dylora": attached(f"dylora:r={rank},target=blocks"),
        "dylora, frozen": attached(f"dylora:r={rank},frozen=true,target=blocks"),
        "hut": attached(f"hut:r={rank},target=blocks"),
        "adalora": our_adalora(rank, LONG),
        "peft's adalora": pefts_adalora(rank, LONG),
        "adalora, ranks final": our_adalora(rank, STEPS - 1),
        "peft's adalora, ranks final": pefts_adalora(rank, STEPS - 1),
    }
    cut = Ranks(arms["sora, 3/4 of the ranks cut"].model.base_model, ADAPTER)  # type: ignore[arg-type]
    mask = torch.zeros(rank, dtype=torch.bool)
    mask[: rank // 4] = True
    cut.keep(dict.fromkeys(cut.now(), mask), None)
    seconds = interleaved({name: steps_of(made, rows, batch) for name, made in arms.items()}, rounds, warmup=1)
    inputs = rows.collate(np.arange(batch))
    labels = inputs.pop("labels")
    kept = {
        name: saved_for_backward_bytes(made.model, inputs, lambda logits: nn.functional.cross_entropy(logits, labels))
        for name, made in arms.items()
    }
    against = {name: f"peft's {name}" if name.startswith("adalora") else "lora" for name in arms}
    against["mos"] = f"lora r={rank - 1}"
    return {
        name: {
            TIME: round(seconds[name] / seconds[other], 3),
            BYTES: round(kept[name] / kept[other], 4),
            "of": other,
        }
        for name, other in against.items()
        if name != "lora"
    }


def compaction(rounds: int, batch: int, tokens: int, rank: int) -> dict[str, Any]:
    """Steps of SoRA with 3/4 of the gates at zero, dragged along and cut out by its own rule, moments included."""
    inputs = Rows(batch, tokens).collate(np.arange(batch))
    # Gates move by at most lr in a step of Adam: below k the dead stay dead.
    training = Training(steps=LONG, batch=batch, lr=1e-4, warmup=0.0, schedule="constant")
    steps: dict[str, Callable[[], object]] = {}
    held, ranks = {}, {}
    for name, compact in (("before", 0), ("after", 2)):
        made = attached(f"sora:r={rank},k=1e-3,compact={compact},target=blocks")
        train_mode(made.model)
        backprop = Backprop(made, training)
        state = State(made, TASK, training, LONG, Accelerator(cpu=True), hooks=Hooks(made.callbacks))
        state.optimiser = backprop.optimiser

        def step(backprop: Backprop = backprop, state: State = state) -> None:
            backprop(state, [(1.0, inputs)])
            state.step += 1

        step()
        with torch.no_grad():
            for layer in made.model.modules():
                if isinstance(layer, BrickyardLinear):
                    layer.get_parameter(f"brick_gate.{ADAPTER}")[rank // 4 :] = 0.0
        for _ in range(3):
            step()
        steps[name] = step
        moments = [t for kept in backprop.optimiser.state.values() for t in kept.values() if isinstance(t, Tensor)]
        held[name] = distinct_bytes([*made.parameters(), *moments])
        ranks[name] = sum(Ranks(made.model.base_model, ADAPTER).now().values())  # type: ignore[arg-type]
    seconds = interleaved(steps, rounds, warmup=1)
    return {
        "ranks": ranks,
        "time of a step after over before": round(seconds["after"] / seconds["before"], 3),
        "bytes of adapter and moments after over before": round(held["after"] / held["before"], 4),
    }


def built(model: nn.Module) -> list[tuple[str, type, list[tuple[int, ...]]]]:
    """Return every module's name and class, and the shapes of its own parameters: what a forward pass costs."""
    return [
        (name, type(module), [tuple(p.shape) for p in module.parameters(recurse=False)])
        for name, module in model.named_modules()
    ]


def merged(rounds: int, batch: int, tokens: int, rank: int) -> dict[str, Any]:
    """Seconds of a forward pass after merging over those of the bare base, and whether it is built as the base is."""
    inputs = Rows(batch, tokens).collate(np.arange(batch))
    inputs.pop("labels")
    models: dict[str, nn.Module] = {"base": bert()}
    options = {
        **dict.fromkeys(("sora", "dylora", "hut", "ce-ssl"), f"r={rank},target=blocks"),
        "dsee": f"r={rank},target={ROLES}",
        "adalora": f"init_r={rank},target_r={rank},target=blocks",
        "loca": "target=blocks",
        "mos": f"r={rank - 1}",
    }
    for name, given in options.items():
        models[name] = attached(f"{name}:{given}").model.merge_and_unload()  # type: ignore[operator]

    def run(model: nn.Module) -> Callable[[], object]:
        model.eval()

        def forward() -> None:
            with torch.no_grad():
                model(**inputs)

        return forward

    seconds = interleaved({name: run(model) for name, model in models.items()}, rounds, warmup=1)
    return {
        name: {TIME: round(seconds[name] / seconds["base"], 3), "as the base": built(model) == built(models["base"])}
        for name, model in models.items()
        if name != "base"
    }


PAIR = ["query", "value"]
MANY: dict[str, dict[str, Any]] = {
    "dylora": {"r": 8},
    "sora": {"r": 8, "target": PAIR},
    "mos": {"r": 7, "target": PAIR},
    "loca": {"target": PAIR},
    "hut": {"r": 8, "target": PAIR},
    "ce-ssl": {"target": PAIR},
    "lora": {},
}


def many(rounds: int, tokens: int, adapters: int) -> dict[str, Any]:
    """Many adapters on one base: what they hold once all were served, and a batch whose rows belong to 32 of them."""
    found = {}
    for method, options in MANY.items():
        config = (
            LoraConfig(r=8, target_modules=PAIR)
            if method == "lora"
            else BrickyardConfig(method=method, options=options)
        )
        base = bert()
        alone = distinct_bytes(base.parameters())
        model = get_peft_model(base, config, adapter_name="a0")  # type: ignore[arg-type]
        one = sum(t.nbytes for t in peft.get_peft_model_state_dict(model, adapter_name="a0").values())
        for i in range(1, adapters):
            model.add_adapter(f"a{i}", config)
        inputs = Rows(32, tokens).collate(np.arange(32))
        inputs.pop("labels")
        model.eval()

        def forward(names: list[str], model: Any = model, inputs: Any = inputs) -> Callable[[], object]:
            def run() -> None:
                with torch.no_grad():
                    model(**inputs, adapter_names=names)

            return run

        mixed = [f"a{i * adapters // 32}" for i in range(32)]
        seconds = interleaved({"mixed": forward(mixed), "one": forward(["a1"] * 32)}, rounds, warmup=1)
        with torch.no_grad():
            for i in range(adapters):
                model.set_adapter(f"a{i}")
                model(**{name: rows[:1] for name, rows in inputs.items()})
        held = distinct_bytes([*model.parameters(), *model.buffers(), *kept_factors(model)])
        found[method] = {
            MIXED: round(seconds["mixed"] / seconds["one"], 3),
            HELD: round(held / (alone + adapters * one), 4),
        }
    return found


def kept_factors(model: nn.Module) -> list[Tensor]:
    """Return the factors that layers keep between calls, which are no parameters or buffers."""
    layers = [m for m in model.modules() if isinstance(m, BrickyardLinear)]
    return [t for layer in layers for _, made in layer._factors.values() for t in made if isinstance(t, Tensor)]


def over(found: dict[str, Any]) -> list[str]:
    """Return what is above its limit, and which merged models are not built as the base."""
    limits = {**LIMITS, "many": dict.fromkeys(found.get("many", ()), SERVING)}
    out = [
        f"{part}, {name}, {what}: {found[part][name][what]} > {limit}"
        for part, names in limits.items()
        if part in found
        for name, figures in names.items()
        for what, limit in figures.items()
        if found[part][name][what] > limit
    ]
    alike = {name: one["as the base"] for name, one in found.get("merged", {}).items()}
    return out + [f"merged, {name}: not as the base" for name, same in alike.items() if not same]


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "training": lambda args: training_steps(args.rounds, args.batch, args.tokens, args.rank),
    "merged": lambda args: merged(args.rounds, args.batch, args.tokens, args.rank),
    "compaction": lambda args: compaction(args.rounds, args.batch, args.tokens, args.rank),
    "many": lambda args: many(args.rounds, args.tokens, args.adapters),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    register()
    found: dict[str, Any] = {}
    for part in args.parts:
        found[part] = PARTS[part](args)
        print(json.dumps({part: found[part]}), file=sys.stderr, flush=True)  # a run cut short keeps what it has
    print(json.dumps({"over": over(found), **found, "asked": vars(args), "environment": environment()}, indent=2))


if __name__ == "__main__":
    main()
