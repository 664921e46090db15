"""The claims of `model-assembling`: a deep stack trained in parts beside the same stack trained end to end.

Arms, all with the same learning rate, schedule and batch; budgets are counted in block-steps:
    end-to-end        the target for S steps
    equal-budget      the target for as many block-steps as assembling spends in all three phases
    before            the parts assembled, not yet fine-tuned
    assembled         the same after the fine-tuning
    different-before  parts of which each was trained within another seed's meta network, assembled
    different         the same after the fine-tuning
    stacked           no parts: every block a copy of its stand-in of the meta network, then the same fine-tuning
    scratch           the target for the fine-tuning's steps alone, from random weights (with a warm-up, which it needs)
    meta              the meta network itself

Every seed has its own meta network. For `different` an extra one is trained, so that with four parts no two of them
come from one network. An image's answer is its class; a document's are the nats of its tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTImageProcessorPil, ViTModel

from brickyard.checks._place import finished, place_of
from brickyard.checks._takes import takes
from brickyard.checks.run import Answers, Inequality, judge
from brickyard.core import trial
from brickyard.core.answers import answer
from brickyard.core.attached import attach_in_place
from brickyard.core.base import open_base
from brickyard.core.data import Data, read_data
from brickyard.core.files import complete_folder
from brickyard.core.jobs import Job
from brickyard.core.loop import train
from brickyard.core.method import Claim
from brickyard.core.stats import paired
from brickyard.core.trial import Prepared, Setting
from brickyard.grow._assembling_plan import tensors_of
from brickyard.grow._assembling_run import Assembly
from brickyard.grow.model_assembling import Config, Shard, Steps, assemble, assembly, block_steps

NEVER = 2**31 - 1  # steps between evaluations: every arm's last weights are the ones that count
WARMUP = 0.06
CHANCE = 40.0  # points above the majority class
TOLERANCE = 0.3  # points below training end to end
PARTS = {
    "before": f"before >= majority + {CHANCE}",
    "equal budget": f"assembled >= equal-budget - {TOLERANCE}",
    "full budget": "assembled >= end-to-end + 0.0",
}
CONTROLS = {
    "before": ("every part was trained within another meta network", f"different-before >= majority + {CHANCE}"),
    "equal budget": (
        "the fine-tuning alone, from random weights",
        f"scratch >= equal-budget - {TOLERANCE}",
    ),
    "full budget": ("the fine-tuning alone, from random weights", "scratch >= end-to-end + 0.0"),
}
GATES = (f"end-to-end >= majority + {CHANCE}", f"meta >= majority + {CHANCE}")
ONLY_FULL = "12 layers of width 256 take hours on two cores; run it with --full"


@dataclass(frozen=True)
class Bench:
    """What all jobs of a measurement share: the base, the data, how long end to end trains, how many parts there are.

    Everything is JSON-like, as it travels to jobs.
    """

    base: str
    data: str
    folder: str
    task: str
    metric: str | None
    steps: int
    batch: int
    lr: float
    parts: int
    max_length: int | None = None

    def prepared(self, seed: int) -> Prepared:
        """Open base and data for one seed."""
        given = {"lr": self.lr, "wd": 0.05, "steps": self.steps, "schedule": "cosine", "warmup": WARMUP}
        setting = Setting(
            arm="full",
            base=self.base,
            data=self.data,
            seed=seed,
            task=self.task,
            metric=self.metric,
            batch=self.batch,
            max_length=self.max_length,
            training={**given, "evaluate_every": NEVER},
        )
        return trial.prepare(setting)

    def assembly(self, seed: int) -> tuple[Assembly, Steps]:
        """Return the method itself, as `brickyard grow` runs it, at its default budget."""
        return assembly(self.prepared(seed), Config(parts=self.parts), Path(self.folder) / str(seed), {})


def job(argument: Mapping[str, Any]) -> dict[str, Any]:
    """Train what `argument["what"]` says with one seed; return {"answers": {arm: [N]}, "seconds": {phase: s}, ...}."""
    bench, seed = Bench(**argument["bench"]), argument["seed"]
    return {"alone": _alone, "parts": _parts, "assembling": _assembling, "different": _different}[argument["what"]](
        bench, seed, argument
    )


def _alone(bench: Bench, seed: int, argument: Mapping[str, Any]) -> dict[str, Any]:
    """Train the target end to end for `steps`."""
    made, _ = bench.assembly(seed)
    model, ready = made.plan.target(made.plan.seed(seed)), made.ready
    names = [name for name, _ in model.named_parameters()]
    flat = [name for name, p in model.named_parameters() if p.ndim < 2]
    attached = attach_in_place(model, names, matched={}, no_decay=flat)
    training = replace(ready.training, steps=argument["steps"])
    done = train(attached, ready.encoded["train"], None, ready.task, training, device="cpu")
    return {"answers": {argument["arm"]: _answers(ready, model)}, "seconds": {argument["arm"]: done.seconds}}


def _parts(bench: Bench, seed: int, argument: Mapping[str, Any]) -> dict[str, Any]:
    """Train a meta network and some parts within it, for other seeds to be mixed with."""
    made, _ = bench.assembly(seed)
    made.pretrain()
    for part in argument["parts"]:
        made.incubate(part)
    return {"answers": {}, "seconds": {}}


def _assembling(bench: Bench, seed: int, argument: Mapping[str, Any]) -> dict[str, Any]:
    """All three phases, with what the assembled network answers on the way; and the stacked rival."""
    made, _ = bench.assembly(seed)
    meta = made.pretrain()
    shards = [made.incubate(part) for part in range(1, bench.parts + 1)]
    whole = made.plan.build(made.plan.sources(), seed=0)
    whole.load_state_dict({name: meta.tensors.get(name, t) for name, t in whole.state_dict().items()}, strict=True)
    model = assemble(made.plan, shards)
    out = {"meta": _answers(made.ready, whole), "before": _answers(made.ready, model)}
    states = {"meta": meta.report["interfaces"], "assembled": made.statistics(model)}
    tuned = made.tune(model)
    out["assembled"] = _answers(made.ready, model)
    rival = stacked(made, meta)
    after = made.tune(rival)
    out["stacked"] = _answers(made.ready, rival)
    parts = [shard.report["seconds"] for shard in shards]
    return {
        "answers": out,
        "interfaces": states,
        "seconds": {
            "pretrain": meta.report["seconds"],
            "parts": sum(parts),
            "longest part": max(parts),
            "tune": tuned["seconds"],
            "stacked": meta.report["seconds"] + after["seconds"],
        },
    }


def _different(bench: Bench, seed: int, argument: Mapping[str, Any]) -> dict[str, Any]:
    """Assemble part i of seed `donors[i]`, then fine-tune as ever."""
    made, _ = bench.assembly(seed)
    files = [Path(bench.folder) / str(d) / f"part-{i}.safetensors" for i, d in enumerate(argument["donors"], 1)]
    model = assemble(made.plan, files, same_meta=False)
    out = {"different-before": _answers(made.ready, model)}
    tuned = made.tune(model)
    out["different"] = _answers(made.ready, model)
    return {"answers": out, "seconds": {"different": tuned["seconds"]}}


def stacked(made: Assembly, meta: Shard) -> nn.Module:
    """Return the target with each block a copy of its stand-in in the meta network, and all else the meta network's."""
    cut = made.plan
    model = cut.target(0)
    live = tensors_of(model)
    for part in range(1, cut.parts + 1):
        for offset, block in enumerate(cut.blocks(part)):
            source = (part - 1) * cut.meta_depth + min(offset, cut.meta_depth - 1)
            start = f"{cut.path}.{block}."
            for name in (name for name in live if name.startswith(start)):
                live[name].data.copy_(meta.tensors[f"{cut.path}.{source}.{name.removeprefix(start)}"])
    for name in (*cut.stem, *cut.shared, *cut.head):
        live[name].data.copy_(meta.tensors[name])
    return model


def _answers(ready: Prepared, model: nn.Module) -> list[float]:
    return answer(model, ready.encoded["test"], ready.task).predictions.tolist()


@dataclass(frozen=True)
class Table:
    """What every arm answered: [S, N]; the labels (or tokens of documents) [N]; and what it cost."""

    labels: np.ndarray
    answers: dict[str, np.ndarray]
    about: dict[str, Any]


def measured(bench: Bench, seeds: int, labels: np.ndarray, workers: int) -> Table:
    """Train every arm; the longest jobs first, and those that mix seeds last."""
    made, steps = bench.assembly(1)
    cut = made.plan
    spent = block_steps(cut.splits, cut.meta_depth, steps)
    equal = int(spent["total"] / cut.depth)
    every = list(range(1, seeds + 1))
    ring = [*every, *range(seeds + 1, bench.parts + 1)]  # seeds beyond the last are trained for `different` alone
    donors = {s: [ring[(s - 1 + i) % len(ring)] for i in range(bench.parts)] for s in every}
    jobs: list[Job] = []

    def add(what: str, seed: int, **more: Any) -> None:
        argument = {"bench": asdict(bench), "what": what, "seed": seed, **more}
        key = f"{more.get('arm', what)} {seed}"
        jobs.append(Job(key=key, function=f"{__name__}:job", argument=argument))

    lone = (("end-to-end", steps.end_to_end), ("equal-budget", equal), ("scratch", steps.tune))
    for seed in every:
        add("alone", seed, arm=lone[0][0], steps=lone[0][1])
    for seed in every:
        add("assembling", seed)
    for arm, count in lone[1:]:
        for seed in every:
            add("alone", seed, arm=arm, steps=count)
    for seed in ring[seeds:]:
        wanted = sorted({i + 1 for given in donors.values() for i, donor in enumerate(given) if donor == seed})
        add("parts", seed, parts=wanted)
    started = time.monotonic()
    found = finished(jobs, workers, Path(bench.folder))
    jobs.clear()
    for seed in every:
        add("different", seed, donors=donors[seed])
    found |= finished(jobs, workers, Path(bench.folder))
    answers: dict[str, list[list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in every:
        for value in (value for key, value in found.items() if key.endswith(f" {seed}")):
            for arm, given in value["answers"].items():
                answers.setdefault(arm, []).append(given)
            for phase, took in value["seconds"].items():
                seconds.setdefault(phase, []).append(took)
    about = {
        "steps": {**asdict(steps), "equal-budget": equal},
        "block_steps": {
            **{name: float(value) for name, value in spent.items()},
            "equal-budget": float(equal * cut.depth),
            "stacked": float(spent["pretrain"] + spent["tune"]),
        },
        "seconds": {phase: float(np.median(took)) for phase, took in seconds.items()},
        "interfaces": {f"seed {s}": found[f"assembling {s}"]["interfaces"] for s in every},
        "wall_seconds": time.monotonic() - started,
    }
    return Table(labels, {arm: np.asarray(given) for arm, given in answers.items()}, about)


@takes("data")
def images(
    claim: Claim, *, depth: int = 12, width: int = 64, heads: int = 4, tested: int = 2000, workers: int = 2
) -> dict[str, Any]:
    """Measure the claims on a small vision transformer: 28 x 28 pixels in patches of 7, 4 parts.

    Steps follow from the claim's epochs of `train_rows` rows, also where the data set has fewer. Gate: the target end
    to end and the meta network learn. Controls: parts of different meta networks; the fine-tuning alone.
    """
    with place_of("model-assembling", claim, depth, width, heads, tested) as folder:
        read = read_data(claim.data, task="image-classification")
        labels = _some_images(read, folder / "data", claim.train_rows, tested)
        shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        config = ViTConfig(image_size=28, patch_size=7, intermediate_size=4 * width, **shape)
        processor = ViTImageProcessorPil(size={"height": 28, "width": 28})
        _write_base(folder / "base", lambda: ViTModel(config, add_pooling_layer=False), processor)
        bench = Bench(
            str(folder / "base"),
            str(folder / "data"),
            str(folder / "runs"),
            "image-classification",
            None,
            math.ceil(claim.epochs * math.ceil(claim.train_rows / (claim.batch or 64))),
            claim.batch or 64,
            *(claim.lrs[:1] or (1e-3,)),
            parts=4,
        )
        table = measured(bench, claim.seeds, labels, workers)
    where = f"{read.name}, depth {depth}, {claim.seeds} seeds"
    return {part: of_images(part, table, where) for part in PARTS}


def of_images(part: str, table: Table, where: str) -> dict[str, Any]:
    """Judge one of `PARTS` by what the arms answered."""
    answers = {arm: Answers(table.labels, given.astype(np.int64)) for arm, given in table.answers.items()}
    some = next(iter(answers.values())).predictions
    answers["majority"] = Answers(table.labels, np.full_like(some, np.bincount(table.labels).argmax()))

    def judged(text: str) -> dict[str, Any]:
        return {"inequality": text, **judge(Inequality.read(text), answers, "accuracy")}

    accuracy = {arm: 100 * float((a.predictions == table.labels).mean()) for arm, a in answers.items()}
    found, gates = judged(PARTS[part]), [judged(text) for text in GATES]
    what, text = CONTROLS[part]
    control = judged(text)
    said = ", ".join(f"{arm} {value:.1f}" for arm, value in accuracy.items())
    detail = f"{_points(found)}; accuracy on {where}: {said} %; {_budget(table.about)}"
    return _complete(
        found, gates, {"what": what, **control, "destroyed": control["holds"] is False}, detail, accuracy, table.about
    )


@takes("data")
def language(claim: Claim, *, depth: int = 12, width: int = 256, heads: int = 4, workers: int = 2) -> dict[str, Any]:
    """Measure assembling on a language model of Python code with the tokenizer of `embedded:pylm`; under --full alone.

    Gate: training end to end and the meta network need fewer nats than the fine-tuning alone.
    """
    if not claim.epochs:
        empty = dict.fromkeys(("measured", "low", "high", "gate", "control"))
        return {"inequality": "assembled <= equal-budget", "holds": "skipped", **empty, "detail": ONLY_FULL}
    with place_of("model-assembling-language", claim, depth, width, heads) as folder:
        block = claim.max_length or 128
        tokenizer: Any = open_base("embedded:pylm").tokenizer
        shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            intermediate_size=round(width / 3) * 8,
            max_position_embeddings=block,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **shape,
        )
        _write_base(folder / "base", lambda: LlamaForCausalLM(config), tokenizer)
        read = read_data(claim.data, task="causal-lm")
        _some_documents(read, folder / "data", claim.train_rows)
        bench = Bench(
            str(folder / "base"),
            str(folder / "data"),
            str(folder / "runs"),
            "causal-lm",
            "nats_per_token",
            0,
            claim.batch or 16,
            *(claim.lrs[:1] or (1e-3,)),
            parts=4,
            max_length=block,
        )
        rows = bench.prepared(1).encoded
        steps = math.ceil(claim.epochs * math.ceil(len(rows["train"]) / bench.batch))
        tokens: Any = rows["test"]
        table = measured(replace(bench, steps=steps), claim.seeds, np.asarray(tokens.tokens), workers)
    return of_language(table, f"{read.name}, depth {depth}, {claim.seeds} seeds")


def of_language(table: Table, where: str) -> dict[str, Any]:
    """Judge "assembled <= equal-budget" in nats per token."""

    def judged(a: str, b: str) -> dict[str, Any]:
        found = paired(table.labels, table.answers[a], table.answers[b], "nats_per_token")
        holds: Any = True if found.high <= 0 else False if found.low > 0 else "undecided"
        interval = {"measured": found.difference, "low": found.low, "high": found.high}
        return {"inequality": f"{a} <= {b}", **interval, "holds": holds}

    nats = {arm: float(a.mean(axis=0).sum() / table.labels.sum()) for arm, a in table.answers.items()}
    found, control = judged("assembled", "equal-budget"), judged("scratch", "equal-budget")
    gates = [judged("end-to-end", "scratch"), judged("meta", "scratch")]
    said = ", ".join(f"{arm} {value:.4f}" for arm, value in nats.items())
    interval = f"{found['measured']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
    detail = f"{interval}; nats per token on {where}: {said}; {_budget(table.about)}"
    gone = {"what": CONTROLS["equal budget"][0], **control, "destroyed": control["holds"] is False}
    return _complete(found, gates, gone, detail, nats, table.about)


def _complete(
    found: dict[str, Any],
    gates: Sequence[dict[str, Any]],
    control: dict[str, Any],
    detail: str,
    scores: dict[str, float],
    about: dict[str, Any],
) -> dict[str, Any]:
    closed = [gate["inequality"] for gate in gates if gate["holds"] is not True]
    return {
        **found,
        **({"holds": "set-up invalid"} if closed else {}),
        "gate": {gate["inequality"]: gate for gate in gates},
        "control": control,
        "figures": {"scores": scores, **about},
        "detail": detail + (f"; set-up invalid: {closed[0]} does not hold" if closed else ""),
    }


def _points(found: Mapping[str, Any]) -> str:
    return f"{found['measured']:+.2f} points ({found['low']:+.2f} to {found['high']:+.2f})"


def _budget(about: Mapping[str, Any]) -> str:
    spent, seconds = about["block_steps"], about["seconds"]
    whole = seconds["pretrain"] + seconds["parts"] + seconds["tune"]
    side_by_side = whole - seconds["parts"] + seconds["longest part"]
    return (
        f"{spent['total']:,.0f} block-steps of assembling are {spent['total'] / spent['end_to_end']:.1%} of the "
        f"{spent['end_to_end']:,.0f} end to end; {whole:,.0f} s ({side_by_side:,.0f} s with the parts side by side) "
        f"against {seconds['end-to-end']:,.0f} s"
    )


def _write_base(folder: Path, make: Callable[[], Any], processor: Any) -> None:
    """Write a base with weights of its own once: those of an interrupted check stay."""
    if not folder.is_dir():
        with complete_folder(folder) as unfinished:
            make().save_pretrained(unfinished)
            processor.save_pretrained(unfinished)


def _some_images(read: Data, folder: Path, rows: int, tested: int) -> np.ndarray:
    """Write a part of a data set of images, the same one every time; return the labels of its test rows."""
    assert read.labels is not None
    for split, count in (("train", rows), ("validation", 200), ("test", tested)):
        keep = _drawn(len(read.splits[split]), count)
        columns = {name: [read.splits[split][name][i] for i in keep] for name in ("image", "label")}
        columns["label"] = [read.labels[int(label)] for label in columns["label"]]
        _write(folder / f"{split}.parquet", lambda path, columns=columns: pq.write_table(pa.table(columns), path))
    again = read_data(str(folder), task="image-classification", allow_overlap=True)
    return np.asarray(again.splits["test"]["label"], dtype=np.int64)


def _some_documents(read: Data, folder: Path, rows: int) -> None:
    for split, count in (("train", rows), ("validation", 5), ("test", 40)):
        texts = [read.splits[split]["text"][i] for i in _drawn(len(read.splits[split]), count)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        _write(folder / f"{split}.jsonl", lambda path, lines=lines: path.write_text(lines, encoding="utf-8"))


def _drawn(total: int, count: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(0)).permutation(total)[: count or total].tolist()


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
