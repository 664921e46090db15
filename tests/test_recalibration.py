"""MP+: the recalibration of MLP branches, found in blocks of every shape by what they compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from brickyard.core.errors import BadBrick, Refused
from brickyard.tune import moment_probing as mp
from brickyard.tune._rescale import sites
from brickyard.tune.moment_probing import Config, Recalibration

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 8, "patch_size": 4}
TASK: Any = SimpleNamespace(width=3)


class Headed(nn.Module):
    """What `base.headed` gives, as far as a head method sees it."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.config = backbone, head, backbone.config

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        x = self.backbone(**inputs).last_hidden_state
        return SequenceClassifierOutput(logits=self.head(x, inputs.get("attention_mask")))


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertModel(config, add_pooling_layer=False)


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **IMAGE), add_pooling_layer=False)


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **IMAGE, mlp_ratio=2))


def llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**SMALL, vocab_size=50, num_key_value_heads=2))


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**SMALL, vocab_size=50, num_key_value_heads=2, head_dim=8)
    return transformers.Gemma2Model(config)


def gpt2() -> nn.Module:
    return transformers.GPT2Model(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    )


def distilbert() -> nn.Module:
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50)
    )


FOUND = {
    bert: ("encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"),
    vit: ("layers.1.layernorm_after", "layers.1.mlp.fc2"),
    dinov2: ("norm2", "layer_scale2"),
    llama: ("layers.1.post_attention_layernorm", "layers.1.mlp.down_proj"),
    gemma2: ("layers.1.pre_feedforward_layernorm", "layers.1.post_feedforward_layernorm"),
    gpt2: ("h.1.ln_2", "h.1.mlp.c_proj"),
    distilbert: ("transformer.layer.1.ffn.lin1", "transformer.layer.1.ffn.lin2"),
}


def example(backbone: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if hasattr(backbone.config, "image_size"):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return {"input_ids": torch.randint(1, 50, (2, 6), generator=generator), "attention_mask": mask}


def made(build: Any) -> nn.Module:
    torch.manual_seed(0)
    backbone = build()
    for p in backbone.parameters():  # away from an initialisation at which norms and scales do nothing
        p.data += 0.1 * torch.randn_like(p)
    return backbone.eval()


def headed(build: Any, **options: Any) -> tuple[Headed, Config]:
    config = Config(p=28, plus=True, width=4, **options)
    return Headed(made(build), mp.head(config, TASK, 16)).eval(), config


@pytest.mark.parametrize("build", FOUND, ids=lambda b: b.__name__)
def test_the_branch_is_found_in_every_kind_of_block(build: Any):
    backbone = made(build)
    before = backbone(**example(backbone)).last_hidden_state
    found = sites(backbone)
    assert len(found) == 2 and {site.width for site in found} == {16}
    source, branch = FOUND[build]
    assert found[1].source.endswith(source) and found[1].branch.endswith(branch)
    assert torch.equal(backbone(**example(backbone)).last_hidden_state, before), "looking changes nothing"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


@pytest.mark.parametrize("build", FOUND, ids=lambda b: b.__name__)
def test_at_the_start_it_is_the_base_exactly_and_comes_off_without_trace(build: Any):
    model, config = headed(build)
    inputs = example(model.backbone)
    before = model.backbone(**inputs).last_hidden_state
    attached = mp.attach(model, config, TASK)
    assert torch.equal(model.backbone(**inputs).last_hidden_state, before)
    model(**inputs).logits.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(n.startswith(("head.", "psrp.")) for n in grads)
    assert all(grads[f"psrp.{i}.{u}.weight"].abs().max() > 0 for i in (0, 1) for u in ("scale", "shift"))
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.3)
    assert (model.backbone(**inputs).last_hidden_state - before).abs().max() > 1e-3
    plain = attached.detach()
    assert plain is model and not hasattr(model, "psrp")
    assert torch.equal(model.backbone(**inputs).last_hidden_state, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_post_norm_block_follows_the_equation():
    model, config = headed(bert, init="paper")
    mp.attach(model, config, TASK)
    block, psrp = model.backbone.encoder.layer[0], model.psrp[0]
    x = torch.randn(1, 5, 16)
    after_attention = block.attention(x)[0]
    t = (after_attention @ psrp.down.weight.T).relu()
    w, beta = t @ psrp.scale.weight.T, t @ psrp.shift.weight.T
    hidden = block.intermediate(after_attention)
    weight = block.output.dense
    mlp = hidden @ weight.weight.T + weight.bias
    expected = block.output.LayerNorm(after_attention + (1 + w) * mlp + beta)
    got = block(x)
    torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, expected)


def test_a_pre_norm_block_follows_the_equation():
    model, config = headed(vit, init="paper")
    plain = made(vit)
    mp.attach(model, config, TASK)
    block, psrp, twin = model.backbone.layers[0], model.psrp[0], plain.layers[0]
    x = torch.randn(1, 5, 16)
    attention = twin.attention(twin.layernorm_before(x))
    x1 = x + (attention[0] if isinstance(attention, tuple) else attention)
    t = (x1 @ psrp.down.weight.T).relu()
    w, beta = t @ psrp.scale.weight.T, t @ psrp.shift.weight.T
    expected = x1 + (1 + w) * twin.mlp(twin.layernorm_after(x1)) + beta
    got = block(x)
    torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, expected)


def test_paper_init_is_near_and_zero_is_exact():
    torch.manual_seed(0)
    x, m = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    assert torch.equal(Recalibration(16, 4, "zero")(x, m), m)
    near = Recalibration(16, 4, "paper")(x, m)
    assert 0 < (near - m).abs().max() < 0.1
    assert sum(p.numel() for p in Recalibration(768).parameters()) * 12 == 442_368  # +0.44 M on ViT-B


def test_a_brick_holds_head_and_recalibration_and_loads_strictly():
    model, config = headed(bert)
    attached = mp.attach(model, config, TASK)
    assert not attached.frozen_states, "states move with the recalibration, so they must not be cached"
    assert attached.matched["down"] == [f"backbone.encoder.layer.{i}.output.dense" for i in (0, 1)]
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.1)
    stored = attached.tensors()
    assert {n.split(".")[0] for n in stored} == {"head", "psrp"}
    other, config = headed(bert)
    attached_too = mp.attach(other, config, TASK)
    attached_too.load(stored)
    inputs = example(model.backbone)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    with pytest.raises(BadBrick, match="missing"):
        attached_too.load({k: v for k, v in stored.items() if not k.startswith("psrp.1")})


def test_weight_decay_spares_biases_and_norms():
    model, config = headed(bert)
    groups = mp.attach(model, config, TASK).parameter_groups
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and "weight_decay" not in groups[0]
    assert all(p.ndim < 2 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0


def test_without_plus_only_the_head_trains_on_frozen_states():
    model = Headed(made(bert), mp.head(Config(p=28), TASK, 16))
    attached = mp.attach(model, Config(p=28), TASK)
    assert attached.frozen_states and not any(p.requires_grad for p in model.backbone.parameters())
    assert set(attached.tensors()) == {f"head.{n}" for n in model.head.state_dict()}


def test_blocks_without_a_branch_are_refused():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 1], num_stages=2, image_size=16, patch_size=2)
    backbone = transformers.ConvNextModel(config).eval()
    with pytest.raises(Refused, match=r"does not add|needs one MLP|no repeated block"):
        sites(backbone)
    parallel = transformers.GPTJModel(
        transformers.GPTJConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=50, rotary_dim=4)
    )
    with pytest.raises(Refused, match="does not add the output of its MLP"):
        sites(parallel.eval())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_attaching_twice_is_refused():
    model, config = headed(bert)
    mp.attach(model, config, TASK)
    with pytest.raises(Refused, match="already"):
        mp.attach(model, config, TASK)
