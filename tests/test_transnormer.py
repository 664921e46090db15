"""TransNormer as a base: padding, packing, its cache, generation, files, and the tuners on it."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import WORDS, documents, make_text_base
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from brickyard.core import registry, trial
from brickyard.core.answers import answer
from brickyard.core.base import blocks, open_base
from brickyard.core.batches import encode
from brickyard.core.data import Split
from brickyard.core.errors import BadBase, UsageError
from brickyard.core.generate import Decoding, continuations
from brickyard.core.roles import roles
from brickyard.core.task import Task
from brickyard.models.lightning_attention import layer_slopes, matrix_form
from brickyard.models.transnormer import (
    SimpleRMSNorm,
    TransNormerCache,
    TransNormerConfig,
    TransNormerForCausalLM,
    rotate,
)

pytestmark = pytest.mark.usefixtures("quiet_libraries")
LM = Task("causal-lm", "nats_per_token", None, 1, "text")
END = 3


def make(**options: object) -> TransNormerForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    words = {"vocab_size": len(WORDS) + 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TransNormerConfig(**{**sizes, **words, "max_position_embeddings": 64, **options})  # type: ignore[arg-type]
        model = TransNormerForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # so that the past matters and no two logits are near one another
    return model


@pytest.fixture(scope="module")
def model() -> TransNormerForCausalLM:
    return make()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_text_base(tmp_path_factory.mktemp("transnormer"), causal=True)
    (folder / "generation_config.json").unlink()
    make().save_pretrained(folder)
    return folder


def ids(length: int, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(4, len(WORDS) + 4, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, **inputs: object) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False, **inputs).logits


@torch.no_grad()
def test_the_network_is_its_equations(model: TransNormerForCausalLM) -> None:
    """A second reading of the docstring, with the matrix form and complex numbers."""
    tokens, weights = ids(40), dict(model.named_parameters())
    norm = lambda x: x * math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True)  # noqa: E731
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(3):
        w = {n.split(".", 3)[3]: p.t() for n, p in weights.items() if n.startswith(f"model.layers.{i}.")}
        y = norm(x)
        q, k = (nn.functional.silu(y @ w[f"self_attn.{n}_proj.weight"]) for n in "qk")
        q, k, v = (z.view(2, 40, 2, 16).transpose(1, 2) for z in (q, k, y @ w["self_attn.v_proj.weight"]))
        if i == 0:
            theta = 10000.0 ** (-torch.arange(8) / 8)
            turn = torch.polar(torch.ones(40, 8), torch.arange(40)[:, None] * theta)
            q, k = (torch.view_as_real(torch.complex(*z.chunk(2, -1)) * turn) for z in (q, k))
            q, k = (torch.cat((z[..., 0], z[..., 1]), -1) for z in (q, k))
        o, _ = matrix_form(q, k, v, torch.tensor(layer_slopes(2, i, 3)))
        gate = y @ w["self_attn.gate_proj.weight"]
        x = x + (norm(o.transpose(1, 2).flatten(2)) * gate) @ w["self_attn.o_proj.weight"]
        y = norm(x)
        x = x + ((y @ w["mlp.gate_proj.weight"]) * (y @ w["mlp.up_proj.weight"])) @ w["mlp.down_proj.weight"]
    torch.testing.assert_close(logits(model, tokens), norm(x) @ weights["lm_head.weight"].t(), rtol=1e-3, atol=1e-3)


def test_rotation_leaves_products_to_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float32)
    at = lambda x, p: rotate(x, torch.tensor([[p]]), 100.0)  # noqa: E731
    near = [(at(q, p) * at(k, p - 3)).sum() for p in (3, 10, 40)]
    torch.testing.assert_close(torch.stack(near), near[0].expand(3), rtol=1e-4, atol=1e-4)
    assert abs(float((at(q, 3) * at(k, 1)).sum() - near[0])) > 1e-3
    assert torch.equal(at(q, 0), q)


def test_norm_has_no_weights_and_keeps_the_type() -> None:
    x = torch.randn(3, 5, 16, dtype=torch.bfloat16)
    norm = SimpleRMSNorm(1e-6)
    assert not list(norm.parameters()) and norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float().pow(2).mean(-1), torch.ones(3, 5), rtol=1e-2, atol=1e-2)


def test_padding_on_either_side_changes_nothing(model: TransNormerForCausalLM) -> None:
    tokens = ids(50)
    alone = logits(model, tokens)
    padded, mask = torch.zeros(2, 61, dtype=torch.long), torch.zeros(2, 61, dtype=torch.long)
    padded[0, 11:], padded[1, :50] = tokens
    mask[0, 11:], mask[1, :50] = 1, 1
    padded[mask == 0] = torch.randint(4, 20, (22,))  # whatever stands in the padding
    found = logits(model, padded, attention_mask=mask)
    torch.testing.assert_close(found[0, 11:], alone[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, :50], alone[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the state after right padding, and after a row of nothing but padding
        past = model(input_ids=padded, attention_mask=mask, use_cache=True).past_key_values
        more = torch.cat((mask, torch.tensor([[0, 0], [1, 1]])), 1)
        model(input_ids=ids(2), attention_mask=more, past_key_values=past)
        expected = model(input_ids=tokens[:1], use_cache=True).past_key_values
    for i in range(3):
        torch.testing.assert_close(
            past.get_recurrent_state(i)[0], rotated_back(expected, past, i)[0], rtol=1e-4, atol=1e-3
        )


def rotated_back(expected: TransNormerCache, past: TransNormerCache, layer: int) -> torch.Tensor:
    """The first layer's state depends on where its tokens stood: turn it by the padding in front of them."""
    state = expected.get_recurrent_state(layer)
    if layer:
        return state
    return rotate(state.transpose(2, 3), torch.full((1, 16), 11), 10000.0).transpose(2, 3)


def test_packed_documents_do_not_see_each_other(model: TransNormerForCausalLM) -> None:
    tokens = ids(64)
    position = torch.arange(64).repeat(2, 1)
    position[0, 20:] -= 20
    position[0, 50:] -= 30
    position[1, 63:] -= 63
    found = logits(model, tokens, position_ids=position)
    for row, start, stop in ((0, 0, 20), (0, 20, 50), (0, 50, 64), (1, 0, 63), (1, 63, 64)):
        alone = logits(model, tokens[row : row + 1, start:stop])
        torch.testing.assert_close(found[row : row + 1, start:stop], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0, 20:50], logits(model, tokens)[0, 20:50], atol=0.1)


def test_reading_in_parts_is_reading_at_once_and_the_cache_stays_small(model: TransNormerForCausalLM) -> None:
    tokens, past, found, sizes = ids(300), None, [], []
    with torch.no_grad():
        for part in tokens.split([1, 99, 1, 1, 130, 68], dim=1):
            out = model(input_ids=part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits)
            sizes.append(past.bytes)
    torch.testing.assert_close(torch.cat(found, 1), logits(model, tokens), rtol=1e-3, atol=1e-3)
    assert set(sizes) == {3 * 2 * 2 * 16 * 16 * 4} and past.get_seq_length() == 300
    past.reset()
    with torch.no_grad():
        again = model(input_ids=tokens[:, :9], past_key_values=past).logits
    torch.testing.assert_close(again, found[0].new_tensor(logits(model, tokens[:, :9]).tolist()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_with_the_state_is_generation_without(model: TransNormerForCausalLM, options: dict) -> None:
    tokens = ids(30)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    asked = {"do_sample": False, **options, "max_new_tokens": 40, "min_new_tokens": 40}
    made = []
    for cached in (True, False):
        torch.manual_seed(5)
        made.append(model.generate(input_ids=tokens, attention_mask=mask, use_cache=cached, **asked))
    assert made[0].shape[1] == 70 and torch.equal(*made)
    torch.manual_seed(5)
    alone = model.generate(input_ids=tokens[:1, 7:], attention_mask=mask[:1, 7:], **asked)
    if not asked["do_sample"]:
        assert torch.equal(alone[0, 23:], made[0][0, 30:])


def test_a_saved_model_opens_as_a_base_and_scores_documents_apart(base: Path) -> None:
    opened = open_base(str(base))
    assert opened.generative and opened.context == 64 and opened.width == 32
    texts = documents()["test"]["text"][:30]
    made = encode(Split({"text": texts}), opened, LM)
    fresh = opened.model(LM, seed=0)
    nats = answer(fresh, made, LM).predictions
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    end = opened.tokenizer.eos_token_id
    whole = [i for i in range(30) if (made.columns["units"] == i).any(axis=1).sum() == 1]
    assert len(whole) > 10
    for i in whole:
        given = opened.tokenizer(texts[i], add_special_tokens=False)["input_ids"]
        scored = logits(plain, torch.tensor([[end, *given]]))[0].double()
        expected = nn.functional.cross_entropy(scored, torch.tensor([*given, end]), reduction="sum")
        assert nats[i] == pytest.approx(float(expected), rel=1e-4)
    found = set(roles(fresh).values())
    assert {"query", "key", "value", "out", "gate", "up", "down", "embedding"} <= found and len(blocks(fresh)) == 3
    buffers = dict(fresh.named_buffers())
    for i in range(3):  # no file holds them
        torch.testing.assert_close(buffers[f"model.layers.{i}.self_attn.slopes"], torch.tensor(layer_slopes(2, i, 3)))


def test_opening_needs_no_import_of_the_architecture(base: Path) -> None:
    import subprocess
    import sys

    code = "import sys; from brickyard.core.base import open_base; print(type(open_base(sys.argv[1]).config).__name__)"
    done = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "TransNormerConfig", done.stderr


def test_a_layer_is_no_architecture(base: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(base, tmp_path / "wrong")
    path = tmp_path / "wrong" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "lightning-attention"}))
    with pytest.raises(BadBase, match="unknown architecture"):
        open_base(str(tmp_path / "wrong"))


def test_prompts_of_several_lengths_are_continued_as_if_alone(base: Path) -> None:
    opened = open_base(str(base))
    fresh = opened.model(LM, seed=0)
    prompts = ["good film", "the book was very dull and broken", "it is"]
    together = continuations(fresh, opened, prompts, Decoding(new_tokens=12))
    assert together == [continuations(fresh, opened, [p], Decoding(new_tokens=12))[0] for p in prompts]
    assert len(set(together)) == 3


@pytest.mark.parametrize("arm", ["full:lr=1e-2", "lora:lr=2e-2,target=all-linear", "ia3:lr=5e-2"])
def test_tuners_work_on_it(arm: str, base: Path, tmp_path: Path) -> None:
    opened = open_base(str(base))
    made = encode(Split(documents()["test"]), opened, LM, max_length=32)
    untouched = answer(opened.model(LM, seed=0), made, LM).predictions.sum() / made.tokens.sum()
    asked = trial.Setting(
        arm=arm,
        base=str(base),
        data=documents(),
        task="causal-lm",
        metric="nats_per_token",
        max_length=32,
        training={"epochs": 8, "precision": "float32", "batch": 4},
        cache=False,
        device="cpu",
    )
    done = trial.run({"setting": asdict(asked), "folder": str(tmp_path)})
    assert done["score"]["mean"] < untouched - 0.3


def test_checkpointed_gradients_are_the_gradients(model: TransNormerForCausalLM) -> None:
    tokens, found = ids(40), []
    for checkpointed in (False, True):
        fresh = copy.deepcopy(model).train()
        if checkpointed:
            fresh.gradient_checkpointing_enable()
        fresh(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        found.append([p.grad for p in fresh.parameters()])
    assert all(a is not None and b is not None and torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
    assert all(g is not None and g.any() for g in found[0])


def test_bfloat16_keeps_the_state_in_float32() -> None:
    half = make().to(torch.bfloat16)
    with torch.no_grad():
        out = half(input_ids=ids(70), use_cache=True)
        nxt = half(input_ids=ids(1), past_key_values=out.past_key_values)
    assert out.logits.dtype == nxt.logits.dtype == torch.bfloat16
    assert out.past_key_values.get_recurrent_state(1).dtype == torch.float32


def test_what_makes_no_sense_is_refused(model: TransNormerForCausalLM) -> None:
    for wrong in ({"num_attention_heads": 3}, {"num_attention_heads": 32}, {"num_hidden_layers": 0}):
        with pytest.raises(UsageError, match=r"divided|channels"):
            make(**wrong)
    tokens = ids(5)
    cases = {
        "exactly one": {"input_ids": tokens, "inputs_embeds": torch.zeros(2, 5, 32)},
        "no matrix": {"input_ids": tokens, "output_attentions": True},
        "DynamicCache": {"input_ids": tokens, "past_key_values": DynamicCache()},
        "attention_mask is": {"input_ids": tokens, "attention_mask": torch.ones(2, 7, dtype=torch.long)},
        "no other mask": {"input_ids": tokens, "attention_mask": torch.ones(2, 1, 5, 5)},
    }
    for message, given in cases.items():
        with pytest.raises(UsageError, match=message):
            model(**given)
    assert registry.find("transnormer").record.family == "models"
