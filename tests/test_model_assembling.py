"""model-assembling: who owns what, hybrids that are the meta network but for one part, shards, budgets, the command."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from brickyard.core.attached import Attached
from brickyard.core.errors import BadBrick, NoEffect, ParityBroken, Refused, UsageError
from brickyard.core.files import write_tensors
from brickyard.grow._assembling_parts import ends, statistics
from brickyard.grow._assembling_plan import tensors_of
from brickyard.grow.model_assembling import (
    Config,
    Plan,
    Shard,
    Steps,
    assemble,
    block_steps,
    divide,
    hybrid,
    meta,
    meta_shard,
    plan,
    train_part,
)

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 40}


def vit(depth: int = 4, **changes: Any) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(**SIZES, num_hidden_layers=depth, image_size=8, patch_size=4, num_channels=1, **changes)
    )


def bert(depth: int = 4, **changes: Any) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**TEXT, num_hidden_layers=depth, **changes))


def llama(depth: int = 4, tied: bool = False) -> nn.Module:
    config = LlamaConfig(**TEXT, num_hidden_layers=depth, tie_word_embeddings=tied, use_cache=False, pad_token_id=0)
    return LlamaForCausalLM(config)


MODELS = {"vit": vit, "bert": bert, "llama": llama, "tied llama": lambda depth=4: llama(depth, tied=True)}


def inputs(model: nn.Module, rows: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=draw)}
    return {"input_ids": torch.randint(0, 40, (rows, 6), generator=draw)}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def steps_of(attached: Attached, batch: dict[str, Tensor], count: int = 3) -> dict[str, Any]:
    """A training of a few steps, as anybody may write it; leaves gradients and the optimiser to be looked at."""
    optimiser = torch.optim.AdamW(attached.parameters(), lr=1e-2)
    attached.model.train()
    for _ in range(count):
        optimiser.zero_grad()
        attached.model(**batch).logits.float().square().mean().backward()
        optimiser.step()
    attached.optimiser = optimiser  # type: ignore[attr-defined]
    return {"seconds": 0.0, "steps": count}


def of_llama(shared: bool) -> tuple[set[str], set[str], set[str]]:
    embedding, norm = {"model.embed_tokens.weight"}, {"model.norm.weight"}
    return (set(), norm, embedding) if shared else (embedding, norm | {"lm_head.weight"}, set())


@pytest.mark.parametrize(
    ("model", "stem", "head", "shared"),
    [
        (lambda: llama(), *of_llama(False)),
        (lambda: llama(tied=True), *of_llama(True)),
        (lambda: vit(), "vit.embeddings", "vit.layernorm classifier", ""),
        (lambda: bert(), "bert.embeddings", "bert.pooler classifier", ""),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, bos_token_id=0,
                                               eos_token_id=0)),
            "transformer.wpe", "transformer.ln_f", "transformer.wte",
        ),
        (  # registers the norm behind its blocks before them
            lambda: OPTForCausalLM(OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=4,
                                             num_attention_heads=2, word_embed_proj_dim=8)),
            "model.decoder.embed_positions model.decoder.project_in",
            "model.decoder.project_out model.decoder.final_layer_norm",
            "model.decoder.embed_tokens",
        ),
        (  # hands its blocks a bias that all of them share
            lambda: MPNetForSequenceClassification(MPNetConfig(**TEXT, num_hidden_layers=4)),
            "mpnet.embeddings", "classifier", "mpnet.encoder.relative_attention_bias",
        ),
    ],
    ids=["llama", "tied llama", "vit", "bert", "gpt2", "opt", "mpnet"],
)  # fmt: skip
def test_every_tensor_has_one_owner_whatever_the_architecture(model: Any, stem: Any, head: Any, shared: Any) -> None:
    made = model()
    cut = plan(made, 2)
    for found, expected in ((cut.stem, stem), (cut.head, head), (cut.shared, shared)):
        if isinstance(expected, set):
            assert set(found) == expected
        else:
            starts = tuple(f"{start}." for start in expected.split())
            assert set(found) == {name for name in tensors_of(made) if starts and name.startswith(starts)}
    owned = [name for part in (1, 2) for name in cut.names(part)]
    assert sorted(owned) == sorted(tensors_of(made)) and len(set(owned)) == len(owned)
    assert plan(made, 2).digest == cut.digest != plan(made, 4).digest


@pytest.mark.parametrize("kind", MODELS)
def test_a_hybrid_whose_part_is_its_stand_in_is_the_meta_network_bit_for_bit(kind: str) -> None:
    model = MODELS[kind]()
    batch = inputs(model)
    for splits in ((1, 2, 1), (2, 1, 1)):
        cut = plan(model, 3, splits)
        network = meta(cut, seed=1)
        tensors, expected = tensors_of(network), logits(network, batch)
        for part in (part for part in (1, 2, 3) if len(cut.blocks(part)) == 1):
            made = hybrid(cut, part, tensors, seed=2)
            assert not torch.equal(logits(made.model, batch), expected)  # it begins from random weights
            live = tensors_of(made.model)
            for name in made.own:
                live[name].data.copy_(tensors[name])  # block `part` of three, in the hybrid as in the meta network
            assert torch.equal(logits(made.model, batch), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_a_hybrid_is_its_part_between_the_stand_ins_of_the_others(kind: str) -> None:
    model = MODELS[kind](6)
    cut = plan(model, 3, meta_depth=1)
    tensors = {name: t.detach().clone() for name, t in tensors_of(meta(cut)).items()}
    start = [hybrid(cut, part, tensors) for part in (1, 2, 3)]
    for part, made in enumerate(start, 1):
        live = tensors_of(made.model)
        order = [1, 1, 2, 3] if part == 1 else [1, 2, 2, 3] if part == 2 else [1, 2, 3, 3]
        assert len(order) == made.model.config.num_hidden_layers  # type: ignore[union-attr]
        for slot, of in enumerate(order):
            for name in (n for n in live if n.startswith(f"{cut.path}.{slot}.")):
                stand_in = tensors[f"{cut.path}.{of - 1}.{name.removeprefix(f'{cut.path}.{slot}.')}"]
                if of != part:
                    assert torch.equal(live[name], stand_in), name
                elif live[name].ndim > 1:
                    assert not torch.equal(live[name], stand_in), name  # copies would be stacking
        for name in (*cut.stem, *cut.head, *cut.shared):
            mine = name in (cut.stem if part == 1 else cut.head if part == 3 else ())
            assert (name in made.own) == mine and (mine or torch.equal(live[name], tensors[name]))
    # No two parts begin with the same numbers, although all have one seed, nor with those of the meta network.
    drawn = [t for t in tensors.values() if t.ndim > 1 and t.any()]
    for made in start:
        drawn += [t.detach() for n, t in tensors_of(made.model).items() if n in made.own and t.ndim > 1 and t.any()]
    assert len({tuple(t.flatten().tolist()) for t in drawn}) == len(drawn)


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_part_trains_and_the_meta_network_stays_as_it_was(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    cut, batch = plan(model, 2), inputs(model)
    network = meta_shard(cut, meta(cut))
    for part in (1, 2):
        seen: list[Attached] = []

        def trainer(attached: Attached, seen: list[Attached] = seen) -> dict[str, Any]:
            seen.append(attached)
            return steps_of(attached, batch)

        shard = train_part(cut, part, network, trainer, tmp_path / "part", seed=3)
        attached = seen[0]
        named = dict(attached.model.named_parameters())
        trained = {name for name, p in named.items() if p.grad is not None}
        made = hybrid(cut, part, network.tensors, seed=3)
        assert trained == {name for name in made.own if name in named}
        assert {id(p) for p in attached.optimiser.state} == {id(named[name]) for name in trained}  # type: ignore[attr-defined]
        after = tensors_of(attached.model)
        assert all(torch.equal(after[name], network.tensors[source]) for name, source in made.held.items())
        assert sorted(shard.tensors) == sorted(cut.names(part))
        read = Shard.read(tmp_path / "part")
        assert read.plan == cut.digest and read.meta == network.meta and read.report["steps"] == 3
        assert all(torch.equal(read.tensors[name], t) for name, t in shard.tensors.items())
        if part == 1 and cut.shared:  # frozen while parts train, and carried along
            assert all(torch.equal(shard.tensors[name], network.tensors[name]) for name in cut.shared)


def test_gradients_are_those_of_the_composition_written_by_hand() -> None:
    cut = plan(vit(6), 3)
    network = meta(cut, seed=5)
    made = hybrid(cut, 2, tensors_of(network), seed=7)
    batch = inputs(made.model)
    own = [made.model.vit.layers[slot] for slot in cut.own_slots(2)]  # type: ignore[union-attr]
    made.attached().model.train()
    made.model(**batch).logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    made.model.zero_grad()
    plain: Any = network.vit
    with torch.no_grad():
        state = plain.layers[0](plain.embeddings(batch["pixel_values"]))
    for block in own:
        state = block(state)
    state = plain.layernorm(plain.layers[2](state))
    network.classifier(state[:, 0]).square().sum().backward()  # type: ignore[operator]
    assert found and set(found) == {name for name in made.own if name in dict(made.model.named_parameters())}
    for name, p in made.model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-7)


def test_below_the_part_runs_no_backward_pass_and_above_it_no_weight_gradient() -> None:
    cut = plan(vit(8), 4)
    network = tensors_of(meta(cut))
    block = 2 * 3 * 5 * (4 * 16 * 16 + 2 * 16 * 24)  # forward FLOPs of its linear layers: 3 rows of 5 tokens
    head = 2 * 3 * 16 * 2  # of the classifier: one token a row, two classes
    for part in (1, 2, 3, 4):
        made = hybrid(cut, part, network)
        made.attached()
        out = made.model.train()(**inputs(made.model)).logits.sum()
        with FlopCounterMode(display=False) as backward:
            out.backward()
        spent = backward.get_flop_counts()["Global"][torch.ops.aten.mm]
        # A block that trains costs twice its forward pass, one above it once, one below it nothing.
        assert spent == (2 * 2 + (4 - part)) * block + head * (2 if part == 4 else 1)


def test_neighbours_rest_and_the_part_itself_drops_out() -> None:
    cut = plan(bert(6, hidden_dropout_prob=0.5), 3)
    network = tensors_of(meta(cut))
    for part, active in ((1, "bert.embeddings.dropout"), (2, ""), (3, "dropout")):
        made = hybrid(cut, part, network)
        made.model.train()(**inputs(made.model))
        modules = dict(made.model.named_modules())
        slots = cut.own_slots(part)
        for slot in range(4):
            assert modules[f"{cut.path}.{slot}.output.dropout"].training == (slot in slots), (part, slot)
        for name in ("bert.embeddings.dropout", "dropout"):
            assert modules[name].training == (name == active), (part, name)


def trained_parts(cut: Plan, network: Shard, folder: Path, batch: dict[str, Tensor], seed: int = 0) -> list[Path]:
    files = [folder / f"{part}.safetensors" for part in range(1, cut.parts + 1)]
    for part in reversed(range(1, cut.parts + 1)):
        train_part(cut, part, network, lambda a: steps_of(a, batch), files[part - 1], seed=seed)
    return files


@pytest.mark.parametrize("kind", MODELS)
def test_the_assembled_network_is_the_union_of_its_shards(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    cut, batch = plan(model, 2), inputs(model)
    files = trained_parts(cut, meta_shard(cut, meta(cut)), tmp_path, batch)
    whole = assemble(cut, files[::-1])
    assert list(whole.state_dict()) == list(model.state_dict()) and type(whole) is type(model)
    live: dict[str, Tensor] = tensors_of(whole)
    filled: list[str] = []
    for file in files:
        for name, tensor in Shard.read(file).tensors.items():
            assert torch.equal(live[name], tensor)
            filled.append(name)
    assert sorted(filled) == sorted(live)
    shifted = ends(cut)
    assert shifted == [1, 3]
    # The statistics at the interfaces, against transformers' own record of the states.
    with torch.no_grad():
        states = whole.eval()(**batch, output_hidden_states=True).hidden_states
    found = statistics(whole, cut.path, shifted, batch)
    assert found[0]["mean"] == pytest.approx(float(states[2].mean()), abs=1e-6)
    assert found[0]["std"] == pytest.approx(float(states[2].std()), rel=1e-5)


def test_padding_has_no_part_in_the_statistics() -> None:
    model = bert().eval()
    ids = inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 3:] = 0
    found = statistics(model, "bert.encoder.layer", [0], {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        state = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1][:, :3]
    assert found[0]["std"] == pytest.approx(float(state.std()), rel=1e-5)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model = vit()
    cut, batch = plan(model, 2), inputs(model)
    network = meta_shard(cut, meta(cut))
    files = trained_parts(cut, network, tmp_path, batch)
    with pytest.raises(Refused, match="shard of part 2 is missing"):
        assemble(cut, files[:1])
    with pytest.raises(Refused, match="part 1 stands twice"):
        assemble(cut, [files[0], *files])
    with pytest.raises(Refused, match="another plan"):
        assemble(plan(model, 2, (1, 3)), files)
    with pytest.raises(Refused, match="another plan"):
        assemble(plan(vit(layer_norm_eps=1e-3), 2), files)
    with pytest.raises(Refused, match="part 0 is not one"):
        assemble(cut, [network, *files])
    other = meta_shard(cut, meta(cut, seed=1))
    train_part(cut, 2, other, lambda a: steps_of(a, batch), tmp_path / "other")
    with pytest.raises(Refused, match="different meta networks"):
        assemble(cut, [files[0], tmp_path / "other"])
    assert assemble(cut, [files[0], tmp_path / "other"], same_meta=False) is not None
    cropped = Shard.read(files[0])
    cropped.tensors.pop(cut.stem[0])
    with pytest.raises(BadBrick, match="missing"):
        assemble(cut, [cropped, files[1]])
    write_tensors(tmp_path / "else", {"a": torch.zeros(1)})
    with pytest.raises(BadBrick, match="no shard"):
        Shard.read(tmp_path / "else")
    with pytest.raises(Refused, match="meta network of another plan"):
        train_part(plan(vit(6), 2), 1, network, lambda a: steps_of(a, batch), tmp_path / "no")
    with pytest.raises(Refused, match="was given a part"):
        train_part(cut, 1, Shard.read(files[0]), lambda a: steps_of(a, batch), tmp_path / "no")
    with pytest.raises(NoEffect):
        train_part(cut, 1, network, lambda a: {}, tmp_path / "no")

    def meddling(attached: Attached) -> dict[str, Any]:
        with torch.no_grad():
            attached.model.classifier.bias.add_(1e-3)  # type: ignore[union-attr, operator]
        return steps_of(attached, batch)

    with pytest.raises(ParityBroken, match=r"classifier\.bias"):
        train_part(cut, 1, network, meddling, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_cuts_that_make_no_sense_are_refused() -> None:
    for options, words in (
        ({"parts": 3}, r"4 blocks cannot be cut into 3 parts .* splits=\[2,1,1\]"),
        ({"parts": 2, "splits": (1, 2)}, "adds up to 3 blocks"),
        ({"parts": 3, "splits": (2, 2)}, "names 2 parts"),
        ({"parts": 4, "meta_depth": 2}, "deeper than a part of 1"),
        ({"parts": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=words):
            plan(vit(), **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no part 5"):
        plan(vit(), 4).blocks(5)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, num_layers=2, d_ff=16, num_heads=2))
    with pytest.raises(Refused, match="2 lists"):
        plan(t5, 2)
    places = GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)
    places.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(Refused, match="by their place"):
        plan(GPT2LMHeadModel(places), 2)
    for bad in ({"parts": 0}, {"budget": 0.0}, {"pretrain": 0.0}, {"tune": -1.0}, {"budget": float("inf")}):
        with pytest.raises(UsageError, match="above 0"):
            Config(**bad)  # type: ignore[arg-type]


def test_a_stand_in_is_of_the_kind_of_its_parts_first_block() -> None:
    config = Gemma2Config(**TEXT, num_hidden_layers=6, num_key_value_heads=1, head_dim=8)
    assert config.layer_types[:2] == ["sliding_attention", "full_attention"]
    cut = plan(Gemma2ForCausalLM(config), 2)
    assert meta(cut).config.layer_types == ["sliding_attention", "full_attention"]  # type: ignore[union-attr]
    made = hybrid(cut, 2, tensors_of(meta(cut)))
    assert made.model.config.layer_types == ["sliding_attention", *config.layer_types[3:]]  # type: ignore[union-attr]


def test_block_steps_are_the_cards() -> None:
    steps = Steps(30, 10, 10, 100)
    spent = block_steps((3, 3, 3, 3), 1, steps)
    # PT: 4 blocks; MT: 6 blocks, of which 0, 1, 2, 3 lie below the part and count a third; FT: 12 blocks.
    assert spent["pretrain"] == 4 * 30 and spent["tune"] == 12 * 10 and spent["end_to_end"] == 12 * 100
    assert spent["incubate"] == 10 * (6 + (5 + Fraction(1, 3)) + (4 + Fraction(2, 3)) + 4) == 200
    assert spent["total"] == 440
    assert block_steps((2, 4), 2, Steps(1, 1, 0, 1))["incubate"] == (2 + 2) + (4 + Fraction(2, 3))


@settings(deadline=None, derandomize=True)
@given(
    st.integers(200, 5000),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.floats(0.2, 1.5),
    st.tuples(st.floats(0.5, 4), st.floats(0.5, 4), st.just(0.0) | st.floats(0.5, 4)),
)
def test_the_budget_is_kept_and_used(total: int, splits: list[int], budget: float, ratio: tuple) -> None:
    steps = divide(total, splits, 1, budget, ratio)
    spent = block_steps(splits, 1, steps)
    assert spent["total"] <= Fraction(budget) * spent["end_to_end"]
    more = block_steps(splits, 1, Steps(steps.pretrain + 1, steps.incubate + 1, steps.tune + 1, total))
    assert more["total"] > Fraction(budget) * spent["end_to_end"]
    assert (steps.pretrain == 0) == (len(splits) == 1)
    with pytest.raises(Refused, match="give more --steps"):
        divide(1, splits, 1, 1e-3, (1.0, 1.0, 1.0))
