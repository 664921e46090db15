"""The engine that streams merges: mergekit's numbers, the same bits on any number of threads, kills and bad inputs."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from brickyard.core.errors import (
    BadBase,
    Changed,
    DiskFull,
    NoEffect,
    NotFinite,
    Refused,
    UnknownName,
    UnsafeFile,
    UsageError,
    WrongBase,
)
from brickyard.merge import _engine, _inputs
from brickyard.merge.lines import closed_alpha
from brickyard.merge.task_arithmetic import add_up
from brickyard.merge.ties import Thresholds, ties
from brickyard.merging.merge import merge, resolve

GOLDEN = Path(__file__).parent / "golden" / "mergekit.safetensors"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "vocab_size": 20}
Tensors = dict[str, Tensor]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_base() -> Tensors:
    names = [f"model.layers.{i}.{leaf}.weight" for i in range(3) for leaf in ("q_proj", "up_proj")]
    tensors = {name: noise(i, 6, 7) for i, name in enumerate(names)}
    tensors |= {f"model.layers.{i}.norm.weight": noise(20 + i, 7) for i in range(3)}
    return tensors | {"model.embed_tokens.weight": noise(9, 20, 7), "model.steps": torch.arange(4)}


def changed(base: Tensors, seed: int, size: float = 0.05) -> Tensors:
    moved = {
        n: t + size * noise(100 * seed + i, *t.shape) for i, (n, t) in enumerate(base.items()) if t.is_floating_point()
    }
    return {**base, **moved}


def write(folder: Path, tensors: Tensors, shards: int = 1, **config: Any) -> Path:
    """Write a checkpoint as other libraries do, in one file or several."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        places = {name: files[i % shards] for i, name in enumerate(names)}
        for file in files:
            save_file({n: tensors[n] for n in names if places[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def read(folder: Path) -> Tensors:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    base = make_base()
    paths = {"base": write(tmp_path / "base", base)}
    for seed, label in enumerate("xyz", 1):
        paths[label] = write(tmp_path / label, changed(base, seed), shards=seed)
    return paths


@pytest.fixture
def run(models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    count = itertools.count()

    def merged(arm: str, labels: str = "xyz", **options: Any) -> Path:
        out = options.pop("out", tmp_path / f"out{next(count)}")
        merge(arm, base=str(models["base"]), bricks=[models[x] for x in labels], out=out, **options)
        return out

    return merged


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small tensors into pieces."""
    monkeypatch.setattr(_engine, "PIECE", 16)
    monkeypatch.setattr(_inputs, "PIECE", 16)


def test_alpha_of_a_plain_sum_is_one_over_the_models(run: Callable[..., Path]) -> None:
    result = json.loads((run("task-arithmetic + lines:beta=0") / "merge.json").read_text())
    assert result["scales"] == {f"{1 / 3:.6g}": 10}
    assert result["edits"] == [{"blocks": {"model.layers": 3}, "outside": ["model.embed_tokens.weight"]}]
    # Of TIES the norms differ; both are those of the whole vectors.
    result = json.loads((run("ties:density=0.5 + lines:beta=0") / "merge.json").read_text())
    base = make_base()
    taus = [
        torch.cat([(changed(base, s)[n] - base[n]).flatten() for n in sorted(base) if n != "model.steps"])
        for s in (1, 2, 3)
    ]
    alpha = float(add_up(taus).abs().sum() / ties(taus, 0.5).abs().sum()) / 3
    assert [float(scale) for scale in result["scales"]] == [pytest.approx(alpha, rel=1e-4)]


def test_lines_at_its_ends_gives_the_model_and_the_base_bit_for_bit(
    run: Callable[..., Path], models: dict[str, Path]
) -> None:
    whole = read(run("lines:alpha=1,beta=0", "y"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in read(models["y"]).items())
    # Far from the base, theta - theta_0 is rounded: adding it to theta_0 again would miss theta.
    far = write(
        models["base"].parent / "far", {n: 1e-3 * t if t.is_floating_point() else t for n, t in make_base().items()}
    )
    merge("lines:alpha=1,beta=0", base=str(models["base"]), bricks=[far], out=far / "out", force=True)
    assert all(torch.equal(read(far / "out")[name], tensor) for name, tensor in read(far).items())
    with pytest.raises(NoEffect, match="every scale is 0"):
        run("lines:alpha=0,beta=0", "y")
    half, base, full = read(run("lines:alpha=0,beta=1", "y")), read(models["base"]), read(models["y"])
    for name, tensor in half.items():
        if name.startswith(("model.layers.0.", "model.embed")):
            assert torch.equal(tensor, base[name])
        elif name.startswith("model.layers.2."):
            assert torch.equal(tensor, full[name])
        elif name.startswith("model.layers.1."):
            torch.testing.assert_close(tensor, (base[name] + full[name]) / 2)


def golden(label: str) -> Tensors:
    return {n.removeprefix(f"{label}/"): t for n, t in load_file(GOLDEN).items() if n.startswith(f"{label}/")}


@pytest.mark.parametrize(
    ("label", "arm", "inputs"),
    [
        ("linear", "average", "abc"),
        ("weighted", "average:weights=[0.5,0.2,0.1]", "abc"),
        ("sum", "task-arithmetic:scale=0.3", "abc"),
        ("ties", "ties:density=0.4,scale=0.7,trim=tensor", "abc"),
        ("slerp", "slerp:t=0.3", ("far-a", "far-b")),
    ],
)
def test_merges_agree_with_mergekit(label: str, arm: str, inputs: Any, tmp_path: Path, small_pieces: None) -> None:
    paths = [write(tmp_path / name, golden(name)) for name in inputs]
    merge(arm, base=str(write(tmp_path / "base", golden("base"))), bricks=paths, out=tmp_path / "out", force=True)
    found, wanted = read(tmp_path / "out"), golden(label)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert found.keys() == golden("base").keys()


def test_ranks_are_taken_over_the_whole_model(run: Callable[..., Path], small_pieces: None) -> None:
    base, found = make_base(), read(run("ties:density=0.3"))
    names = [name for name in sorted(base) if name != "model.steps"]
    taus = [torch.cat([(changed(base, s)[n] - base[n]).flatten() for n in names]) for s in (1, 2, 3)]
    torch.testing.assert_close(torch.cat([(found[n] - base[n]).flatten() for n in names]), ties(taus, 0.3))
    by_tensor = read(run("ties:density=0.3,trim=tensor"))
    assert any(not torch.equal(found[n], by_tensor[n]) for n in names)


@pytest.mark.parametrize("arm", ["average", "ties:density=0.3", "dare:p=0.5,signs=true", "slerp", "ties + lines"])
def test_threads_and_shards_change_no_bit(arm: str, run: Callable[..., Path], small_pieces: None) -> None:
    labels = "xy" if arm == "slerp" else "xyz"
    one = read(run(arm, labels, threads=1))
    many = run(arm, labels, threads=4, shard_bytes=400)
    assert len(list(many.glob("*.safetensors"))) > 3
    index = json.loads((many / "model.safetensors.index.json").read_text())
    found = read(many)
    assert index["weight_map"].keys() == found.keys() == one.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("arm", ["ties:trim=tensor,density=0.4", "slerp", "mediphi"])
def test_tensors_too_large_to_keep_are_read_again_to_the_same_bits(
    arm: str, run: Callable[..., Path], small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, loads, plain = "xy" if arm == "slerp" else "xyz", [], _inputs.Stored.weights
    monkeypatch.setattr(_inputs.Stored, "weights", lambda *args: (loads.append(1), plain(*args))[1])
    kept, once = read(run(arm, labels, threads=1)), len(loads)
    monkeypatch.setattr(_engine.Merge, "may_hold", 0)
    again = read(run(arm, labels, threads=1))
    assert len(loads) - once > once, "every round of the survey reads anew"
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


def test_torch_brings_no_thread_beside_the_workers(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain, before = [], Thresholds.settle, torch.get_num_threads()
    monkeypatch.setattr(Thresholds, "settle", lambda *a: (seen.append(torch.get_num_threads()), plain(*a))[1])
    torch.set_num_threads(2)
    run("ties:density=0.4", "xy", threads=2)
    after, _ = torch.get_num_threads(), torch.set_num_threads(before)
    assert set(seen) == {1} and after == 2


def test_half_precision_is_widened_once_and_rounded_once(tmp_path: Path) -> None:
    base = {name: t.bfloat16() if t.is_floating_point() else t for name, t in make_base().items()}
    others = [
        {n: t.bfloat16() if t.is_floating_point() else t for n, t in changed(make_base(), s).items()} for s in (1, 2)
    ]
    paths = [write(tmp_path / f"m{i}", tensors) for i, tensors in enumerate(others)]
    merge("task-arithmetic:scale=0.37", base=str(write(tmp_path / "base", base)), bricks=paths, out=tmp_path / "out")
    for name, tensor in read(tmp_path / "out").items():
        if name == "model.steps":
            assert torch.equal(tensor, base[name])
            continue
        total = sum(other[name].float() - base[name].float() for other in others)
        wanted = torch.add(base[name].float(), total, alpha=0.37).bfloat16()
        assert torch.equal(tensor, wanted), name
    merge("average", base=str(tmp_path / "base"), bricks=paths, out=tmp_path / "wide", dtype="float32")
    assert {t.dtype for n, t in read(tmp_path / "wide").items() if n != "model.steps"} == {torch.float32}


def test_merged_changes_are_given_before_their_final_scale(models: dict[str, Path]) -> None:
    recipe = resolve("task-arithmetic:scale=0.1")
    stored = {x: _inputs.Stored(x, _places(path)) for x, path in models.items()}
    plan = _engine.Merge(stored["base"], [stored["x"], stored["y"]], recipe.rule)
    base, x, y = (read(models[label]) for label in ("base", "x", "y"))
    found = dict(plan.vectors())
    assert found.keys() == base.keys() - {"model.steps"}
    for name, tau in found.items():
        torch.testing.assert_close(tau, (x[name] - base[name]) + (y[name] - base[name]))


def _places(path: Path) -> dict[str, Any]:
    from brickyard.core.base_files import weight_files

    return {name: place for name, place in weight_files(path).items() if place[1].dtype in _inputs.FLOATS}


def test_a_killed_merge_goes_on_and_keeps_complete_shards(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, shards = "ties:density=0.3,trim=tensor", {"shard_bytes": 400}
    whole = run(arm, **shards)
    real, done = os.replace, []

    def dies(source: Any, target: Any, **rest: Any) -> None:
        if str(target).endswith(".safetensors"):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(Path(target))
        real(source, target, **rest)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        run(arm, out=tmp_path / "cut", **shards)
    monkeypatch.setattr(os, "replace", real)
    assert not (tmp_path / "cut").exists() and len(done) == 2
    with pytest.raises(Changed, match="another unfinished merge"):
        run("average", out=tmp_path / "cut", **shards)
    before = [path.stat().st_ino for path in done]
    run(arm, out=tmp_path / "cut", **shards)
    assert [(tmp_path / "cut" / path.name).stat().st_ino for path in done] == before
    for path in whole.iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "cut.merging").exists()


def test_a_full_disk_leaves_nothing_that_looks_complete(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwrite, [8]

    def full(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull, match="no room to write"):
        run("average", out=tmp_path / "out", shard_bytes=400)
    monkeypatch.setattr(os, "pwrite", real)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.merging" / "model.safetensors.index.json").exists()
    assert all(
        torch.equal(t, read(run("average"))[n])
        for n, t in read(run("average", out=tmp_path / "out", shard_bytes=400)).items()
    )


def spoiled(label: str) -> tuple[Tensors, dict[str, Any]]:
    """Return a model that does not fit the base, and its configuration."""
    tensors = changed(make_base(), 5)
    if label == "vocabulary":
        tensors["model.embed_tokens.weight"] = noise(0, 24, 7)
        return tensors, {"vocab_size": 24}
    if label == "depth":
        more = {n.replace(".2.", ".3."): t.clone() for n, t in tensors.items() if ".layers.2." in n}
        return {**tensors, **more}, {"num_hidden_layers": 4}
    if label == "missing":
        return {n: t for n, t in tensors.items() if ".1." not in n}, {}
    if label == "values":
        return {**tensors, "model.steps": torch.arange(4) + 1}, {}
    if label == "quantised":
        return tensors, {"quantization_config": {"quant_method": "gptq"}}
    if label == "dtype":
        return {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, {}
    return {**tensors, "lm_head.weight": noise(3, 20, 7)}, {}  # untied


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("vocabulary", ["config.json: vocab_size", "model.embed_tokens.weight", "F32 [20, 7]", "F32 [24, 7]"]),
        ("depth", ["num_hidden_layers", "model.layers.3.q_proj.weight", "missing"]),
        ("missing", ["model.layers.1.up_proj.weight", "missing"]),
        ("values", ["model.steps", "I64 [4]", "other values", "dequantise"]),
        ("quantised", ["config.json: quantization_config", "gptq"]),
        ("dtype", ["F16 [6, 7]", "F32 [6, 7]", "--dtype"]),
        ("untied", ["lm_head.weight", "tied to its embeddings"]),
    ],
)
def test_models_that_do_not_fit_are_refused_with_a_table(
    label: str, words: list[str], models: dict[str, Path], tmp_path: Path
) -> None:
    tensors, config = spoiled(label)
    odd = write(tmp_path / "odd", tensors, **config)
    with pytest.raises(Refused) as caught:
        merge("average", base=str(models["base"]), bricks=[models["x"], odd], out=tmp_path / "out")
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "odd" in said and len(said.splitlines()) <= 15
    assert not (tmp_path / "out").exists()


def test_dtypes_may_differ_where_the_result_is_given_one(models: dict[str, Path], tmp_path: Path) -> None:
    odd = write(tmp_path / "odd", spoiled("dtype")[0])
    merge("average", base=str(models["base"]), bricks=[models["x"], odd], out=tmp_path / "out", dtype="float32")
    name = "model.layers.0.q_proj.weight"
    torch.testing.assert_close(read(tmp_path / "out")[name], (read(models["x"])[name] + read(odd)[name].float()) / 2)


def test_strangers_zeros_and_nans_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    def merged(path: Path, arm: str = "average") -> None:
        merge(arm, base=str(models["base"]), bricks=[models["x"], path], out=tmp_path / "out", threads=2)

    with pytest.raises(WrongBase, match="stranger does not look fine-tuned"):
        merged(write(tmp_path / "stranger", changed(make_base(), 7, size=1.0)))
    with pytest.raises(NoEffect, match="same is the base"):
        merged(write(tmp_path / "same", make_base()), "task-arithmetic")
    assert not (tmp_path / "out.merging").exists()  # a merge without that input can begin
    tensors = changed(make_base(), 8)
    tensors["model.layers.1.norm.weight"][3] = torch.nan
    with pytest.raises(NotFinite, match=r"nan: tensor model\.layers\.1\.norm\.weight"):
        merge(
            "ties",
            base=str(models["base"]),
            bricks=[models["x"], write(tmp_path / "nan", tensors)],
            out=tmp_path / "o2",
        )
    huge = {n: 60_000 * torch.ones_like(t).half() if t.is_floating_point() else t for n, t in make_base().items()}
    base = write(tmp_path / "halfbase", {n: 0.9 * t if t.is_floating_point() else t for n, t in huge.items()})
    with pytest.raises(NotFinite, match="exceeds float16"):
        merge(
            "task-arithmetic:scale=4",
            base=str(base),
            bricks=[write(tmp_path / "huge", huge)],
            out=tmp_path / "o3",
            force=True,
        )
    (models["z"] / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UnsafeFile, match="model-00002-of-00003"):
        merged(models["z"])
    assert not any((tmp_path / name).exists() for name in ("out", "o2", "o3"))


@pytest.mark.parametrize("arm", ["average + lines", "ties + lines", "dare:p=0.5 + lines"])
def test_a_nan_is_named_before_norms_are_taken_of_it(arm: str, models: dict[str, Path], tmp_path: Path) -> None:
    tensors = changed(make_base(), 8)
    tensors["model.layers.1.norm.weight"][3] = torch.nan
    bad = write(tmp_path / "bad", tensors)
    with pytest.raises(NotFinite, match=r"bad: tensor model\.layers\.1\.norm\.weight holds NaN"):
        merge(arm, base=str(models["base"]), bricks=[models["x"], bad], out=tmp_path / "out")
    sources = [_inputs.Stored(path.name, _places(path)) for path in (models["base"], models["x"], bad)]
    plan = _engine.Merge(sources[0], sources[1:], resolve("average").rule)
    with pytest.raises(NotFinite, match="bad: tensor"):
        dict(plan.vectors())
    with pytest.raises(NotFinite, match="nan"):
        closed_alpha(2, 1.0, float("nan"))


def test_what_is_not_merged_must_be_as_in_the_base(tmp_path: Path) -> None:
    """Low-bit weights used to come from the base alone, without a word; float64 is refused wherever it is read."""
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        folder = tmp_path / name
        extra = {"model.extra.weight": (10 * noise(3, 6, 7)).to(dtype)}
        base = write(folder / "base", {**make_base(), **extra})
        moved = {"model.extra.weight": (10 * noise(4, 6, 7)).to(dtype)}
        odd = write(folder / "odd", {**changed(make_base(), 1), **moved})
        with pytest.raises(
            Refused, match=rf"odd +model\.extra\.weight +{name} \[6, 7\] +{name} \[6, 7\], other values"
        ):
            merge("average", base=str(base), bricks=[odd], out=folder / "out")
        same = write(folder / "same", {**changed(make_base(), 1), **extra})
        merge("average", base=str(base), bricks=[same], out=folder / "out")
        found = load_file(folder / "out" / "model.safetensors")["model.extra.weight"]
        assert torch.equal(found.view(torch.uint8), extra["model.extra.weight"].view(torch.uint8))
    wide = write(tmp_path / "wide", {name: t.double() for name, t in make_base().items()})
    with pytest.raises(BadBase, match="is F64"):
        merge("average", base=str(tmp_path / "I8" / "base"), bricks=[wide], out=tmp_path / "out")


def test_counters_of_batch_norms_are_the_bases(tmp_path: Path) -> None:
    name = "model.norm.num_batches_tracked"
    base = write(tmp_path / "base", {**make_base(), name: torch.tensor(7)})
    moved = write(tmp_path / "moved", {**changed(make_base(), 1), name: torch.tensor(9)})
    merge("average", base=str(base), bricks=[moved], out=tmp_path / "out")
    assert int(read(tmp_path / "out")[name]) == 7


def test_a_quantised_base_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    base = write(tmp_path / "low", make_base(), quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(Refused, match=r"the base +config\.json: quantization_config +bitsandbytes"):
        merge("average", base=str(base), bricks=[models["x"]], out=tmp_path / "out")


def test_equal_models_are_reported(models: dict[str, Path], tmp_path: Path) -> None:
    twin = write(tmp_path / "twin", read(models["x"]))
    result = merge("average", base=str(models["base"]), bricks=[models["x"], twin, models["y"]], out=tmp_path / "out")
    assert result["identical"] == [["x", "twin"]]


@pytest.mark.parametrize(
    ("arm", "labels", "error", "words"),
    [
        ("tise", "xy", UnknownName, "ties"),
        ("lora", "xy", UnknownName, "merge method"),
        ("ties:density=0", "xy", UsageError, "above 0"),
        ("ties:density=0.2,lr=1e-3", "xy", UsageError, "nothing trains"),
        ("ties + average", "xy", UsageError, "first piece"),
        ("lines + ties", "xy", UsageError, "first piece"),
        ("lines", "x", UsageError, "give alpha"),
        ("slerp", "xyz", UsageError, "two models"),
        ("slerp:t=2", "xy", UsageError, "0 to 1"),
        ("dare:p=1", "xy", UsageError, "below 1"),
        ("average:weights=[1,2]", "xyz", UsageError, "2 weights are given for 3"),
        ("average:weights=[-1,2]", "xy", UsageError, "below 0"),
        ("lines:alpha=inf", "x", UsageError, "valid number"),
        ("average", "xx", UsageError, "given twice"),
    ],
)
def test_bad_arms_are_one_clear_line(
    arm: str, labels: str, error: type[Exception], words: str, run: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=words):
        run(arm, labels)


def test_the_engine_needs_no_transformers_and_no_more_memory_for_larger_models(tmp_path: Path) -> None:
    """One process merges a model of one layer, then one of ten: the peak of its memory stays where it was."""
    code = """
import json, resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from brickyard.merging.merge import merge
folder, sizes = Path(sys.argv[1]), []
for layers in (1, 10):
    paths = []
    for label in ("base", "a", "b"):
        path = folder / f"{label}{layers}"
        path.mkdir()
        g = torch.Generator().manual_seed(0)
        for i in range(layers):
            w = torch.rand(1024, 1024, generator=g).bfloat16()
            if label != "base":
                w += 0.01 * torch.rand(1024, 1024, generator=torch.Generator().manual_seed(ord(label))).bfloat16()
            save_file({f"l.{i}.w": w}, path / f"model-{i}.safetensors")
            del w
        places = {f"l.{i}.w": f"model-{i}.safetensors" for i in range(layers)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        (path / "config.json").write_text("{}")
        paths.append(path)
    merge("ties:density=0.5", base=str(paths[0]), bricks=paths[1:], out=folder / f"out{layers}", threads=2)
    sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps({"sizes": sizes, "loaded": sorted({"transformers", "peft"} & sys.modules.keys())}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["loaded"] == []
    # The nine layers more are 54 MiB as they are stored, and twice that in float32.
    assert found["sizes"][1] - found["sizes"][0] < 16 * 2**20, found
