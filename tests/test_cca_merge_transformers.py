"""CCA Merge of transformers: what keeps the function, from the maps to the command line; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import documents, image_data, make_image_base, make_text_base, text_data
from torch import Tensor, nn

from brickyard.cli import main
from brickyard.core.base import open_base
from brickyard.core.errors import ParityBroken, Refused, UsageError
from brickyard.core.files import read_json, read_tensors, write_tensors
from brickyard.core.task import Task
from brickyard.merge import _align
from brickyard.merge._align_transformer import RESIDUAL, assert_same, transformer, untie
from brickyard.merge.cca_merge import align, average, state_of
from brickyard.merging.merge import merge

TOKENS = {"input_ids": torch.arange(4, 28).reshape(4, 6).remainder(23).add(4)}


def llama(seed: int, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    known: dict[str, Any] = {"vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**known, **heads, tie_word_embeddings=tied))
        return uneven(model)


def uneven(model: Any) -> Any:
    """Give every norm a gain and bias of its own, as training does."""
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def bert(seed: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    known: dict[str, Any] = {"vocab_size": 27, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    known["initializer_range"] = 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return uneven(BertForSequenceClassification(BertConfig(**known, num_attention_heads=2, num_labels=3)))


def vit(seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    known: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    known["initializer_range"] = 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return uneven(ViTForImageClassification(ViTConfig(**known, image_size=8, patch_size=4, num_labels=3)))


PIXELS = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
FAMILIES = {"llama": (llama, TOKENS), "bert": (bert, TOKENS), "vit": (vit, PIXELS)}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def random_maps(layout: Any, only: str = "") -> dict[str, _align.Map]:
    """Any maps that the points can bear, of which those behind an activation are left out."""
    out = {}
    for i, point in enumerate(layout.points):
        n = point.width
        x, y = noise(i, 4 * n, n), noise(100 + i, 4 * n, n)
        found = _align.Covariances(x.T @ x, x.T @ y, y.T @ y, 4 * n)
        if point.heads:
            out[point.name] = _align.by_heads(
                found, point.heads, lambda f: _align.cca(f, _align.ridged(f.xx, 0.1), _align.ridged(f.yy, 0.1))
            )
        elif point.kind == "orthogonal":
            out[point.name] = _align.procrustes(found, keep_mean=point.keep_mean)
        elif point.kind == "permute":
            out[point.name] = _align.permute(found)
    return {name: found for name, found in out.items() if only in name}


@pytest.mark.parametrize("residual", ["auto", "permute", "identity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rewritten_network_answers_as_it_did(family: str, residual: str) -> None:
    """The rotated stream, the norms' moved gains, the mixed values, the moved heads: all keep the logits."""
    make, batch = FAMILIES[family]
    reference, model = make(0), make(1)
    layout = transformer(model, batch, residual=residual)
    kinds = {p.name: p.kind for p in layout.points}
    wanted = "permute" if family == "bert" or residual == "permute" else "orthogonal"
    assert kinds.get(RESIDUAL) == (None if residual == "identity" else wanted)
    before, maps = logits(model, batch), random_maps(layout)
    state = layout.rewrite(reference.state_dict(), model.state_dict(), maps)
    own = state_of(model)
    model.load_state_dict(state)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-4, rtol=0)
    moved = [name for name, tensor in state.items() if not torch.allclose(tensor, own[name], atol=1e-4)]
    assert len(moved) >= (6 if residual == "identity" else 20)
    if wanted == "orthogonal" and residual != "identity":
        norms = [norm.name for norm in layout.norms]
        assert norms and all(torch.equal(state[f"{n}.weight"], reference.state_dict()[f"{n}.weight"]) for n in norms)


def test_a_rotation_that_ignores_the_gains_is_no_rewriting() -> None:
    model = llama(1)
    layout = transformer(model, TOKENS)
    before = logits(model, TOKENS)
    maps = random_maps(layout, RESIDUAL)
    model.load_state_dict(_points_only(model, layout, maps))
    assert not torch.allclose(logits(model, TOKENS), before, atol=1e-2)


def _points_only(model: Any, layout: Any, maps: Any) -> dict[str, Tensor]:
    from brickyard.merge._align_points import rewritten

    return rewritten(model.state_dict(), layout.points, maps)


def test_tied_embeddings_come_apart_under_a_rotation_and_stay_under_a_permutation() -> None:
    reference, model = (llama(s, tied=True) for s in (0, 1))
    model.lm_head.weight = model.model.embed_tokens.weight
    assert not transformer(model, TOKENS, residual="permute").unties
    layout = transformer(model, TOKENS)
    assert layout.unties
    before = logits(model, TOKENS)
    untie(model)
    untie(reference)
    assert not transformer(model, TOKENS).unties
    model.load_state_dict(layout.rewrite(reference.state_dict(), model.state_dict(), random_maps(layout)))
    torch.testing.assert_close(logits(model, TOKENS), before, atol=1e-4, rtol=0)
    assert not torch.allclose(model.lm_head.weight, model.model.embed_tokens.weight, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rewritten_copy_is_brought_back_to_the_reference(family: str) -> None:
    """What alignment is for: a network that is the reference in another basis merges to the reference."""
    make, batch = FAMILIES[family]
    reference = make(0)
    layout = transformer(reference, batch)
    copy = make(0)
    copy.load_state_dict(layout.rewrite(reference.state_dict(), reference.state_dict(), random_maps(layout)))
    if family == "vit":
        inputs = [{"pixel_values": noise(i, 16, 3, 8, 8).float()} for i in range(4)]
    else:
        draw = torch.Generator().manual_seed(0)
        inputs = [{"input_ids": torch.randint(4, 27, (16, 8), generator=draw)} for _ in range(4)]
    done = align([reference, copy], inputs, points=layout, gamma=1e-4, force=True)
    for name, tensor in done.states[1].items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], atol=2e-3, rtol=0, msg=name)
    assert assert_same(copy, layout, done.states[0], done.maps[0], inputs[0]) < 1e-4
    plain = average([reference.state_dict(), copy.state_dict()])
    first = next(name for name in plain if "embed" in name and "weight" in name)
    assert not torch.allclose(plain[first], done.states[0][first], atol=0.05)


def test_padding_is_no_sample() -> None:
    models = [bert(s) for s in (0, 1)]
    ids = torch.randint(4, 27, (32, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    layout = transformer(models[0], {"input_ids": ids, "attention_mask": mask})
    fillers = (ids, ids.masked_fill(mask == 0, 9))
    done, other = (align(models, [{"input_ids": x, "attention_mask": mask}], points=layout, gamma=0.1) for x in fillers)
    assert {f.samples for f in done.found} == {32 * 5, 32 * 5 * 4, 32}
    for name, tensor in done.states[1].items():
        torch.testing.assert_close(tensor, other.states[1][name], atol=1e-4, rtol=1e-4)


def test_a_network_wired_otherwise_than_it_looks_is_found_out() -> None:
    reference, model = llama(0), llama(1)
    layout = transformer(model, TOKENS)
    model.model.norm.register_forward_hook(lambda module, given, out: out + given[0])  # the head reads the stream too
    with pytest.raises(ParityBroken, match="connected otherwise"):
        assert_same(model, layout, reference.state_dict(), random_maps(layout), TOKENS)


def test_what_is_no_such_transformer_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=27, n_positions=16)).eval()
    with pytest.raises(Refused, match=r"c_attn \(Conv1D\)"):
        transformer(model, TOKENS)
    with pytest.raises(Refused, match="stands in the residual stream"):
        transformer(bert(0), TOKENS, residual="orthogonal")
    model, other = llama(0), llama(1)
    with torch.no_grad():
        model.model.norm.weight[3] = 0
    layout = transformer(other, TOKENS)
    with pytest.raises(Refused, match="gain of 0"):
        layout.rewrite(model.state_dict(), other.state_dict(), random_maps(layout))


# The command.


def test_language_models_of_two_seeds_merge_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (make_text_base(tmp_path / name, seed=i, causal=True) for i, name in enumerate("abc"))
    data = tmp_path / "data"
    data.mkdir()
    for split, columns in documents().items():
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in columns["text"]))
    given = ["--base", str(a), "--bricks", str(b), str(c), "--data", str(data), "--device", "cpu"]
    assert main(["merge", "cca-merge", *given, "--max-length", "16", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "aligned" in said and "average, not aligned" in said and "no longer tied" in said
    result = read_json(tmp_path / "out" / "merge.json")
    found = result["alignment"]
    assert found["parity"] < 1e-4 and found["gamma"] in (1.0, 0.1, 0.01, 0.001) and len(found["agreement"]) == 4
    assert {p["map"] for p in found["points"]} == {"orthogonal", "cca", "permute"}
    assert [row["model"] for row in result["scores"]["rows"]] == [
        "the base",
        "b",
        "c",
        "average, not aligned",
        "the merge",
    ]
    made = open_base(str(tmp_path / "out"))
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    assert made.model(made.own_task, seed=0).lm_head.weight.shape == (27, 32)  # type: ignore[union-attr]
    names = read_tensors(tmp_path / "out" / "model.safetensors").keys()
    assert names == {*read_tensors(a / "model.safetensors"), "lm_head.weight"}


def test_the_written_merge_is_the_mean_of_aligned_weights(tmp_path: Path) -> None:
    a, b = (make_text_base(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    options = {"base": str(a), "bricks": [b], "data": [text_data()], "device": "cpu"}
    arm = "cca-merge:method=identity"
    result = merge(arm, out=tmp_path / "plain", **options)
    one, two, out = (read_tensors(folder / "model.safetensors") for folder in (a, b, tmp_path / "plain"))
    for name, tensor in out.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, atol=1e-6, rtol=1e-5)
    assert result["scores"]["tasks"][0]["head"] == "fitted on each network's own states"
    rows = {row["model"]: row["mean"] for row in result["scores"]["rows"]}
    assert rows["the merge"] == rows["average, not aligned"]
    merge("cca-merge:rows=64", out=tmp_path / "cca", **options)
    moved = read_tensors(tmp_path / "cca" / "model.safetensors")
    assert moved.keys() == out.keys() and not torch.allclose(moved["pooler.dense.weight"], out["pooler.dense.weight"])


def test_classifiers_keep_their_classes_and_are_merged_with_their_heads(tmp_path: Path) -> None:
    folders = [make_text_base(tmp_path / name, seed=i) for i, name in enumerate("abc")]
    names = (("bad", "good"), ("bad", "good"), ("good", "bad"))
    for i, (folder, labels) in enumerate(zip(folders, names, strict=True)):
        base = open_base(str(folder))
        tokenizer = base.tokenizer
        model: Any = base.model(Task("text-classification", "accuracy", labels, 2, "text"), seed=i)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    options = {"base": str(folders[0]), "data": [text_data()], "device": "cpu"}
    result = merge("cca-merge", bricks=folders[1:2], out=tmp_path / "out", **options)
    assert result["scores"]["tasks"][0]["head"] == "each network's own"
    assert "bert.pooler.dense: hidden" in {p["point"] for p in result["alignment"]["points"]}
    a, b, out = (read_tensors(folder / "model.safetensors") for folder in (*folders[:2], tmp_path / "out"))
    torch.testing.assert_close(out["classifier.bias"], (a["classifier.bias"] + b["classifier.bias"]) / 2)
    assert not torch.allclose(out["classifier.weight"], (a["classifier.weight"] + b["classifier.weight"]) / 2)
    with pytest.raises(Refused, match="tells the classes good, bad apart"):
        merge("cca-merge", bricks=folders[2:], out=tmp_path / "no", **options)


def test_images_and_stored_names(tmp_path: Path) -> None:
    a, b = (make_image_base(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    merge("cca-merge", base=str(a), bricks=[b], data=[image_data()], out=tmp_path / "out", device="cpu")
    assert read_tensors(tmp_path / "out" / "model.safetensors").keys() == read_tensors(a / "model.safetensors").keys()
    open_base(str(tmp_path / "out")).backbone()


def test_labels_are_not_read(tmp_path: Path) -> None:
    a, b = (make_text_base(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    data = text_data()
    other = {split: {**columns, "label": columns["label"][::-1]} for split, columns in data.items()}
    bare = {split: {"text": columns["text"]} for split, columns in data.items()}
    for name, given in (("one", data), ("two", other), ("three", bare)):
        merge("cca-merge", base=str(a), bricks=[b], data=[given], out=tmp_path / name, device="cpu")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert files[0] == files[1] == files[2]


def test_inputs_that_are_not_for_it_are_refused(tmp_path: Path) -> None:
    a, b = (make_text_base(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    near = tmp_path / "near"
    model = open_base(str(a)).backbone()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.001 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(near)  # type: ignore[operator]
    open_base(str(a)).tokenizer.save_pretrained(near)
    options = {"base": str(a), "data": [text_data()], "device": "cpu"}
    with pytest.raises(Refused, match="task-arithmetic"):
        merge("cca-merge", bricks=[near], out=tmp_path / "out", **options)
    merge("cca-merge", bricks=[near], out=tmp_path / "forced", force=True, **options)
    with pytest.raises(UsageError, match="one data set"):
        merge("cca-merge", bricks=[b], out=tmp_path / "out", base=str(a))
    with pytest.raises(Refused, match="no adapter holds"):
        merge("cca-merge", bricks=[b], out=tmp_path / "out", form="adapter", **options)
    # Other dtypes than the base's are taken where the result is given one, as by every merge.
    half = Path(shutil.copytree(b, tmp_path / "half"))
    write_tensors(
        half / "model.safetensors", {n: t.bfloat16() for n, t in read_tensors(b / "model.safetensors").items()}
    )
    with pytest.raises(Refused, match="BF16"):
        merge("cca-merge", bricks=[half], out=tmp_path / "out", **options)
    merge("cca-merge", bricks=[half], out=tmp_path / "mixed", dtype="float32", **options)
    tokenizer = json.loads((b / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    (b / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Refused, match="another vocabulary"):
        merge("cca-merge", bricks=[b], out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
