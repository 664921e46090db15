"""`brickyard route`: one dense model, sparse experts beside it and a router, as a folder that serves every task."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brickyard.core import base_files, readers, registry
from brickyard.core import brick as bricks
from brickyard.core.arm import Piece, parse
from brickyard.core.base import Base, open_base
from brickyard.core.batches import encode
from brickyard.core.build import resolve as resolve_arm
from brickyard.core.data import read_data
from brickyard.core.errors import BadBase, Changed, Refused, UsageError
from brickyard.core.files import Lock, complete_folder, sha256, write_json, write_tensors
from brickyard.core.fitted_head import fit_head
from brickyard.core.progress import tell
from brickyard.core.task import Task, task_of
from brickyard.merge._inputs import PIECE, Files, Source, Stored, whole
from brickyard.merging.files import REQUEST, file_names, request_of, unscored
from brickyard.merging.inputs import Ground, Input, open_ground, open_inputs
from brickyard.merging.merge import MANIFEST as MERGED
from brickyard.merging.merge import merge
from brickyard.merging.merge import resolve as resolve_merge
from brickyard.route._conflict import block_tensors, conflict
from brickyard.route._residual_store import Packed, write_expert
from brickyard.route._routed_model import ENCODER, MANIFEST, SCHEMA, RoutedModel, load_routed, network_of
from brickyard.route._router import Router, fit_router, states_of
from brickyard.routing.routed import kind_of, texts_of
from brickyard.routing.scores import Course, score

BYTES_PER_KEPT = 1.5  # of a weight's own: what the method's card allows a kept value with its place


class Weights(Mapping[str, Tensor]):
    """One model's floating-point tensors in float32 by the base's names, read from disk when they are asked for."""

    def __init__(self, stored: Stored, names: Sequence[str], source: Source | None = None) -> None:
        self.stored, self.names, self.source = stored, dict.fromkeys(names), source
        self._raw = torch.empty(8 * PIECE, dtype=torch.uint8)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        files = Files()
        try:
            return whole(files, self.stored, self.source, name, self._raw)
        finally:
            files.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Survey:
    """Conflict of every block, which of them are routed, and the tensors outside of blocks."""

    blocks: dict[str, list[str]]
    elements: list[int]
    scores: list[float]
    chosen: list[int]
    outside: list[str]
    outside_elements: int

    @property
    def share(self) -> float:
        """Share of all weights that lie in routed blocks."""
        return sum(self.elements[i] for i in self.chosen) / (sum(self.elements) + self.outside_elements)

    def about(self) -> dict[str, Any]:
        """Return one entry a block, and what is averaged outside of them."""
        rows = [
            {
                "block": block,
                "tensors": len(names),
                "weights": self.elements[i],
                "conflict": self.scores[i],
                "routed": i in self.chosen,
            }
            for i, (block, names) in enumerate(self.blocks.items())
        ]
        mean, std = float(np.mean(self.scores)), float(np.std(self.scores))
        outside = {"tensors": self.outside, "weights": self.outside_elements}
        return {"blocks": rows, "mean": mean, "std": std, "share": self.share, "outside": outside}


def build_routed(
    base: str, experts: Sequence[str | Path], router_data: Sequence[Any], *, out: str | Path, **options: Any
) -> RoutedModel:
    """Route `experts` by mediator, with `options` of its own such as layers and density; return the folder, opened."""
    text = str(Piece("mediator", options))
    route(text, base=base, bricks=experts, data=router_data, out=out)
    return load_routed(out)


def route(
    arm: str,
    *,
    base: str,
    bricks: Sequence[str | Path],
    data: Sequence[Any] = (),
    out: str | Path | None = None,
    inspect: bool = False,
    heads: str = "own",
    dtype: str | None = None,
    force: bool = False,
    threads: int | None = None,
    device: str | None = None,
    task: str | None = None,
    metric: str | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Route experts of one base as the method `arm` says; return its route.json.

    Args:
        arm: one method of the family, such as "mediator:density=0.1,inner=ties".
        base: what all experts were tuned from: a folder, a hub id, or `embedded:NAME`.
        bricks: two or more experts: bricks, plain PEFT adapters (applied as changes of weights) or full checkpoints.
        data: one data set for each, in their order: the router learns from their train prompts and is calibrated on
            validation; on test rows, where there are any, the result is scored.
        out: a new folder. It serves as --brick of evaluate and predict, and for --base is a plain model, the dense one.
        inspect: only measure the conflict of every block; data and out are not used.
        heads: "own": each classification task is read through its brick's head; "base": one fitted on the base.
        dtype: of the dense model's files; None: the base's own.
        force: skip the checks of ancestry, vocabulary and chat template.
        threads, device, task, metric, max_length: as for merge.

    Raises UsageError for one expert alone or data that do not fit, Refused for experts that do not fit together, and
    else as `merging.merge`. A run that was killed leaves no `out`; called again, it begins anew, except that a folder
    that was not scored yet is scored.
    """
    wanted = parse(arm)
    if len(wanted.pieces) != 1 or wanted.training:
        raise UsageError(f"{arm!r}: route takes one method and no training settings, e.g. mediator:density=0.1.")
    piece = wanted.pieces[0]
    method = registry.load(registry.find(piece.name, "route").record.name)
    config = registry.config(piece.name, piece.options)
    inner = resolve_merge(config.inner)
    if len(bricks) < 2:
        raise UsageError(
            f"{len(bricks)} expert is given, and a router chooses among several; give two or more, or use `brickyard "
            "merge average`, whose result for one expert is that expert."
        )
    if heads not in ("own", "base"):
        raise UsageError(f"heads={heads!r}; expected own or base.")
    for part in (inner.rule, *inner.edits):
        part.check(len(bricks))
    begun = None if inspect else _assert_place(data, bricks, out)
    ground = open_ground(base, trust_remote_code=trust_remote_code)
    inputs = open_inputs(list(map(str, bricks)), ground, mixed=dtype is not None, force=force)
    if not force:
        assert_same_language(ground, inputs)
    survey = _survey(method, config, ground, inputs)
    if inspect:
        return {"arm": str(wanted), "inputs": [given.label for given in inputs], **survey.about()}
    assert out is not None
    needs = registry.find(piece.name).record.needs
    reading = {"task": task, "metric": metric, "max_length": max_length}
    courses = [_course(ground, given, spec, heads, needs, **reading) for given, spec in zip(inputs, data, strict=True)]
    folder, scored = Path(out), any("test" in course.data.splits for course in courses)
    prints = [course.data.fingerprint for course in courses]
    said = {"arm": str(wanted), "base": base, "dtype": dtype, "force": force, "heads": heads, "data": prints}
    request = request_of(ground, inputs, {**said, **reading})
    if begun is not None:
        if begun[REQUEST] != request:
            raise Changed(f"{folder} is routed from other experts, data or code, not scored yet; give a new --out.")
        shutil.rmtree(folder.with_name(f"{folder.name}.routing"), ignore_errors=True)
        return _scored(begun, ground, inputs, folder, courses, device, max_length)
    work = folder.with_name(f"{folder.name}.routing")
    with Lock(work / "run.lock"):
        for left in (work / "dense", work / "dense.merging"):
            shutil.rmtree(left, ignore_errors=True)
        made = merge(
            config.inner,
            base=base,
            bricks=bricks,
            out=work / "dense",
            form="model",
            dtype=dtype,
            threads=threads,
            force=force,
            trust_remote_code=trust_remote_code,
        )
        dense = open_base(str(work / "dense"))
        experts = _experts(method, config, ground, inputs, survey, dense)
        tell(f"fitting the router on prompts of {len(courses)} tasks ...")
        router, read = _router(config, dense, courses, device)
        result = {
            "schema": SCHEMA,
            "family": "route",
            "arm": str(wanted),
            "config": asdict(config),
            "base": {"spec": ground.spec, "fingerprint": ground.opened.fingerprint},
            "inputs": made["inputs"],
            "tasks": [given.label for given in inputs],
            "data": [{"name": course.data.name, "fingerprint": course.data.fingerprint} for course in courses],
            "forced": force,
            "dense": {"inner": made["arm"], "fingerprint": dense.fingerprint},
            **survey.about(),
            **({REQUEST: request} if scored else {}),
        }
        _write(folder, work / "dense", dense, experts, router, read, courses, result)
    shutil.rmtree(work)
    return _scored(result, ground, inputs, folder, courses, device, max_length) if scored else result


def _scored(
    begun: Mapping[str, Any],
    ground: Ground,
    inputs: Sequence[Input],
    folder: Path,
    courses: Sequence[Course],
    device: str | None,
    max_length: int | None,
) -> dict[str, Any]:
    """Score a routed folder that is whole, and write its scores into its manifest."""
    found = score(ground, inputs, folder, courses, device=device, max_length=max_length)
    result = {key: value for key, value in begun.items() if key != REQUEST} | {"scores": found}
    write_json(folder / MANIFEST, result)
    return result


def _assert_place(data: Sequence[Any], bricks: Sequence[Any], out: str | Path | None) -> dict[str, Any] | None:
    """Refuse a place where nothing can be written; return what a run left there that was killed before it scored."""
    if out is None:
        raise UsageError("--out is missing; give a new folder (or --inspect, which writes nothing).")
    if len(data) != len(bricks):
        raise UsageError(
            f"{len(data)} data sets are given for {len(bricks)} experts; give one --data for each, in their order: its "
            "prompts tell the router what belongs to that expert."
        )
    folder = Path(out)
    begun = unscored(folder, MANIFEST)
    if begun is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty; give a new folder.")
    return begun


def assert_same_language(ground: Ground, inputs: Sequence[Input]) -> None:
    """Refuse a checkpoint whose tokenizer gives other ids than the base's, or has another chat template."""
    own: tuple[dict[str, int], Any] | None = None
    for given in inputs:
        if given.kind != "checkpoint" or not _has_tokenizer(given.spec) or not _has_tokenizer(ground.spec):
            continue  # bricks and adapters are put on the base with the base's tokenizer
        own = own or _language(ground.opened)
        vocabulary, template = _language(open_base(given.spec))
        if vocabulary != own[0]:
            other = next(word for word, place in sorted(vocabulary.items()) if own[0].get(word) != place)
            raise Refused(
                f"{given.label} has another vocabulary than {ground.spec}: {other!r} is {vocabulary[other]} there "
                f"and {own[0].get(other, 'unknown')} here. One dense model reads all prompts; give experts of one "
                "tokenizer."
            )
        if template != own[1]:
            raise Refused(
                f"{given.label} has another chat template than {ground.spec}, so it learned from prompts that are "
                "written otherwise. Give experts of one template, or --force to use the base's for all."
            )


def _has_tokenizer(spec: str) -> bool:
    folder = base_files.locate(spec)
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"))


def _language(base: Base) -> tuple[dict[str, int], Any]:
    return dict(base.tokenizer.get_vocab()), getattr(base.tokenizer, "chat_template", None)


def _survey(method: Any, config: Any, ground: Ground, inputs: Sequence[Input]) -> Survey:
    opened: Base = ground.opened
    blocks = block_tensors(opened)
    sizes = {name: info.elements for name, (_, info) in opened.weights.items()}
    inside = {name for names in blocks.values() for name in names}
    outside = sorted(sizes.keys() - inside)
    scores = conflict(
        Weights(ground.stored, sorted(inside)),
        [Weights(ground.stored, sorted(inside), given.source) for given in inputs],
        blocks,
        rule=config.conflict,
        trim=config.trim,
    )
    values = [scores[block] for block in blocks]
    elements = [sum(sizes[name] for name in names) for names in blocks.values()]
    if config.budget is None:
        chosen = method.choose(values, config.layers, config.k)
    else:
        stored = sum(info.end - info.start for _, info in opened.weights.values())
        chosen = method.within_budget(values, elements, config, experts=len(inputs), dense_bytes=stored)
    return Survey(blocks, elements, values, chosen, outside, sum(sizes[name] for name in outside))


def _experts(
    method: Any, config: Any, ground: Ground, inputs: Sequence[Input], survey: Survey, dense: Base
) -> dict[str, dict[str, Packed]]:
    names = list(survey.blocks.values())
    routed = [names[i] for i in survey.chosen]
    flat = [name for own in routed for name in own]
    return method.decompose(
        Weights(Stored("the dense model", dense.weights), flat),
        {given.label: Weights(ground.stored, flat, given.source) for given in inputs},
        routed,
        config,
    )


def _course(
    ground: Ground,
    given: Input,
    spec: Any,
    heads: str,
    needs: Sequence[str],
    *,
    task: str | None,
    metric: str | None,
    max_length: int | None,
) -> Course:
    """Read one expert's data, and find or fit the head that reads its answers."""
    source = readers.read(spec)
    kind = kind_of(source, ground.opened.generative, task)
    rows = read_data(source, task=kind, metric=metric, need=("train",))
    asked = task_of(rows, kind=kind, metric=metric)
    if asked.kind not in needs:
        raise Refused(f"mediator works on {', '.join(needs)}, for its router reads text; {rows.name} is {asked.kind}.")
    if asked.generative:
        return Course(given.label, rows, asked)
    if heads == "base":
        backbone = ground.opened.backbone()
        train = encode(rows.splits["train"], ground.opened, asked, max_length=max_length)
        tell(f"{rows.name}: fitting a head on the base's states of {len(train):,} rows ...")
        head = {name: p.data for name, p in fit_head(backbone, train, asked).named_parameters()}
        return Course(given.label, rows, asked, head, {"kind": "fitted", "max_length": max_length})
    known, about = _own_head(given)
    extra = sorted(set(asked.labels or ()) - set(known.labels or ()))
    if extra or known.input != asked.input or (known.labels is None) != (asked.labels is None):
        raise UsageError(
            f"{given.label} was tuned for {known.kind} with the labels {', '.join(known.labels or ('numbers',))[:80]}; "
            f"its data {rows.name} are {asked.kind}{f' with the labels {extra[:5]}' if extra else ''}. Give --data in "
            "the order of --bricks."
        )
    if metric is not None:
        known = replace(known, metric=asked.metric)
    about["max_length"] = max_length or about["max_length"]
    return Course(given.label, rows, known, dict(given.heads), about)


def _own_head(given: Input) -> tuple[Task, dict[str, Any]]:
    """Return what a brick or checkpoint was tuned for, and how its head is built again."""
    if given.kind == "brick":
        made = bricks.load(given.spec)
        arm = parse(made.manifest["arm"])
        name = resolve_arm(arm, made.task).head
        if name is None:
            return made.task, {"kind": "own", "max_length": made.manifest.get("max_length")}
        piece = next((piece for piece in arm.pieces if piece.name == name), Piece(name))
        about = {"kind": "arm", "arm": str(piece), "seed": made.manifest["seed"]}
        return made.task, {**about, "max_length": made.manifest.get("max_length")}
    if given.kind == "checkpoint" and given.heads:
        try:
            return open_base(given.spec).own_task, {"kind": "own", "max_length": None}
        except BadBase as error:
            raise Refused(f"{given.label} has no trained head that could be read: {error}") from error
    raise UsageError(f"{given.label} is a {given.kind} with no head for its labels; --heads base fits one on the base.")


def _router(config: Any, dense: Base, courses: Sequence[Course], device: str | None) -> tuple[Router, dict[str, Any]]:
    """Fit the router on the train prompts of every task and calibrate it on those of validation."""
    reader = open_base(ENCODER) if config.router == "encoder" else dense
    network: nn.Module = reader.backbone() if config.router == "encoder" else network_of(dense)[0]
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    states: dict[str, list[Tensor]] = {"train": [], "validation": []}
    cut = 0
    for course in courses:
        for split, found in states.items():
            texts = _some(texts_of(course.data.splits[split]), config.prompts)
            v_ND, shortened = states_of(network, reader, texts, config.tokens, config.router)
            found.append(v_ND)
            cut += shortened
    router = fit_router(
        states["train"],
        states["validation"],
        smoothing=config.smoothing,
        u0=config.u0,
        mass=config.mass,
        top_k=config.top_k,
        tokens=config.tokens,
        reads=config.router,
    )
    router.report["prompts_cut"] = cut
    read: dict[str, Any] = {"reads": router.reads}
    if router.reads == "encoder":
        size = sum(info.end - info.start for _, info in reader.weights.values())
        read["encoder"] = {"spec": ENCODER, "fingerprint": reader.fingerprint, "bytes": size}
    return router, read


def _some(texts: Sequence[str], most: int) -> list[str]:
    """Return at most so many of the texts, spread over all of them by a fixed draw."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(texts))[:most]
    return [str(texts[int(i)]) for i in order]


def _write(
    folder: Path,
    plain: Path,
    dense: Base,
    experts: Mapping[str, Mapping[str, Packed]],
    router: Router,
    read: dict[str, Any],
    courses: Sequence[Course],
    result: dict[str, Any],
) -> None:
    """Write the routed folder, complete or not at all, and add its files and bytes to `result`."""
    fingerprint = dense.fingerprint
    files = {task: f"{name}.safetensors" for task, name in file_names(experts).items()}
    with complete_folder(folder) as temporary:
        for path in sorted(plain.iterdir()):
            if path.is_file() and path.name != MERGED:
                shutil.move(path, temporary / path.name)
        stored: dict[str, Any] = {}
        for name in ("experts", *(("heads",) if any(course.head for course in courses) else ())):
            (temporary / name).mkdir()
        for task, packed in experts.items():
            path = temporary / "experts" / files[task]
            write_expert(path, packed, fingerprint)
            kept = sum(len(p.codes_K) for p in packed.values())
            stored[task] = {**_stored(path, "experts"), "kept": kept}
        result["experts"] = stored
        write_tensors(temporary / "router.safetensors", router.tensors())
        result["router"] = {**_stored(temporary / "router.safetensors"), "about": router.about(), **read}
        result["heads"] = {}
        for course in courses:
            if course.head:
                path = temporary / "heads" / files[course.label]
                write_tensors(path, course.head)
                entry = {**_stored(path, "heads"), "task": asdict(course.task), "about": course.about}
                result["heads"][course.label] = entry
        result["bytes"] = counted(result, dense, len(experts))
        write_json(temporary / MANIFEST, result)


def _stored(path: Path, parent: str = "") -> dict[str, Any]:
    name = f"{parent}/{path.name}" if parent else path.name
    return {"file": name, "sha256": sha256(path), "bytes": path.stat().st_size}


def counted(result: Mapping[str, Any], dense: Base, experts: int) -> dict[str, Any]:
    """Count what is stored against as many separate models, and against what the method's card allows.

    one_model: bytes of the dense model's tensors; limit: (1 + 1.5 T density (share of routed weights)) times that.
    """
    one = sum(info.end - info.start for _, info in dense.weights.values())
    parts = {
        "dense": one,
        "experts": sum(entry["bytes"] for entry in result["experts"].values()),
        "router": result["router"]["bytes"] + result["router"].get("encoder", {}).get("bytes", 0),
        "heads": sum(entry["bytes"] for entry in result["heads"].values()),
    }
    limit = round((1 + BYTES_PER_KEPT * experts * result["config"]["density"] * result["share"]) * one)
    total = sum(parts.values())
    return {
        **parts,
        "total": total,
        "one_model": one,
        "separate": experts * one,
        "limit": limit,
        "within": total <= limit,
    }
