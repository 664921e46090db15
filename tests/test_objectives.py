"""DPO and TDPO: the formulas, their closed-form gradients, memory, and how they are bound to a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import asked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from brickyard.core import measure, trial
from brickyard.core.base import open_base
from brickyard.core.build import build, resolve
from brickyard.core.errors import BadData, Refused, UsageError
from brickyard.core.objective import Reference, check_head, language_model, states
from brickyard.objective import dpo, tdpo
from brickyard.objective._pairs import pair_terms
from brickyard.objective._tokens import token_terms

B, T, D, V = 3, 7, 5, 11


def made_up(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, dict[str, Tensor], Reference]:
    """Hidden states [2B, T, D], an output layer, labels with a prompt and padding, and a reference."""
    g = torch.Generator().manual_seed(seed)
    heads = [nn.Linear(D, V, bias=bias, dtype=dtype) for bias in (True, True)]
    with torch.no_grad():
        for head in heads:
            for p in head.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=dtype))
    hidden, other = (torch.randn(2 * B, T, D, generator=g, dtype=dtype) for _ in range(2))
    labels = torch.randint(0, V, (2 * B, T), generator=g)
    for row in range(2 * B):
        labels[row, : 1 + row % 2] = -100
        labels[row, T - row % 3 :] = -100
    return hidden.requires_grad_(True), heads[0], {"labels": labels}, Reference(other, heads[1].requires_grad_(False))


def naive(hidden: Tensor, head: nn.Linear, labels: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
    """m and k [2B] as the card writes them, with whole logits."""
    log_p = F.log_softmax(head(hidden), -1)
    log_q = F.log_softmax(reference.head(reference.hidden), -1)
    mask = (labels >= 0).double()
    index = labels.clamp(min=0)[..., None]
    m = ((log_p.gather(-1, index) - log_q.gather(-1, index))[..., 0] * mask).sum(1)
    return m, ((log_q.exp() * (log_q - log_p)).sum(-1) * mask).sum(1)


def naive_loss(m: Tensor, k: Tensor, config: tdpo.Config) -> Tensor:
    (m_w, m_l), (k_w, k_l) = m.chunk(2), k.chunk(2)
    u = m_w - m_l - (k_l - k_w) if config.variant == 1 else m_w - m_l - config.alpha * (k_l - k_w.detach())
    return -torch.log(torch.sigmoid(config.beta * u)).mean()


CONFIGS = [tdpo.Config(variant=1), tdpo.Config(), tdpo.Config(alpha=0.0), tdpo.Config(alpha=2.0, beta=0.7)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
def test_value_and_gradients_equal_the_whole_logits_ones(config: tdpo.Config, rows: int) -> None:
    hidden, head, batch, reference = made_up(0)
    labels = batch["labels"]
    expected = naive_loss(*naive(hidden, head, labels, reference), config)
    wanted = torch.autograd.grad(expected, [hidden, head.weight, head.bias])
    asked_for = labels >= 0
    known = (reference.hidden[asked_for], reference.head.weight, reference.head.bias)
    m, k = token_terms(
        hidden[asked_for], head.weight, head.bias, labels[asked_for], known, divergence=True, chunk=rows * V
    )
    row = asked_for.nonzero()[:, 0]
    sums = [torch.zeros(2 * B).index_add(0, row, x) for x in (m, k)]
    found = tdpo.tdpo_loss(sums[0], sums[1], config).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found, [hidden, head.weight, head.bias]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    whole = tdpo.loss(config, hidden, head, batch, reference)
    torch.testing.assert_close(whole, found, rtol=1e-6, atol=1e-7)


def test_without_a_reference_it_is_the_log_probability() -> None:
    hidden, head, batch, _ = made_up(1)
    asked_for = batch["labels"] >= 0
    m, k = token_terms(hidden[asked_for], head.weight, head.bias, batch["labels"][asked_for], chunk=3 * V)
    expected = -F.cross_entropy(head(hidden)[asked_for], batch["labels"][asked_for], reduction="none")
    torch.testing.assert_close(m.double(), expected, rtol=1e-5, atol=1e-6)
    assert not k.any()
    wanted = torch.autograd.grad(expected.sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(m.sum(), hidden)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_first_step_is_that_of_dpo(config: tdpo.Config) -> None:
    """Policy = reference: m = k = 0, the loss is ln 2, and the gradient is DPO's, for P - Q = 0."""
    hidden, head, batch, _ = made_up(2)
    twin = Reference(hidden.detach(), nn.Linear(D, V, dtype=torch.float64))
    twin.head.load_state_dict(head.state_dict())
    m, k = pair_terms(hidden, head, batch["labels"], twin, divergence=True)
    assert m.abs().max() < 1e-6 and k.abs().max() < 1e-6
    losses = [
        tdpo.loss(config, hidden, head, batch, twin),
        dpo.loss(dpo.Config(beta=config.beta), hidden, head, batch, twin),
    ]
    assert losses[0].item() == pytest.approx(math.log(2), abs=1e-7)
    ours, theirs = (torch.autograd.grad(loss, hidden)[0] for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_alpha_zero_is_dpo_anywhere() -> None:
    hidden, head, batch, reference = made_up(3)
    ours = tdpo.loss(tdpo.Config(alpha=0.0), hidden, head, batch, reference)
    theirs = dpo.loss(dpo.Config(), hidden, head, batch, reference)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-7)
    torch.testing.assert_close(torch.autograd.grad(ours, hidden), torch.autograd.grad(theirs, hidden))


def test_the_logit_gradient_of_tdpo1_does_not_contain_the_policy() -> None:
    """It is +- g (e_y - Q): with g taken out, two policies have the same one. Masked positions get exactly zero."""
    found = []
    for seed in (4, 5):
        logits = torch.randn(2 * B, T, V, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        _, _, batch, reference = made_up(6, torch.float32)
        identity = nn.Linear(V, V, bias=False)
        with torch.no_grad():
            identity.weight.copy_(torch.eye(V))
        q = Reference(reference.head(reference.hidden).detach(), identity)
        m, k = pair_terms(logits, identity, batch["labels"], q, divergence=True)
        (m_w, m_l), (k_w, k_l) = m.chunk(2), k.chunk(2)
        found.append(torch.autograd.grad(((m_w - m_l) - (k_l - k_w)).sum(), logits)[0])
        assert not found[-1][batch["labels"] < 0].any()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    asked_for = batch["labels"][:B] >= 0
    expected = F.one_hot(batch["labels"][:B][asked_for], V) - q.hidden[:B][asked_for].softmax(-1)
    torch.testing.assert_close(found[0][:B][asked_for], expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_divergence_is_not_negative_and_swapping_turns_the_margin(seed: int) -> None:
    hidden, head, batch, reference = made_up(seed)
    m, k = pair_terms(hidden, head, batch["labels"], reference, divergence=True)
    assert (k >= -1e-6).all()
    turned = torch.arange(2 * B).roll(B)
    other = Reference(reference.hidden[turned], reference.head)
    m2, k2 = pair_terms(hidden[turned], head, batch["labels"][turned], other, divergence=True)
    u = [(a[:B] - a[B:]) - (b[B:] - b[:B]) for a, b in ((m, k), (m2, k2))]
    torch.testing.assert_close(u[0], -u[1], rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    shuffled = tdpo.tdpo_loss(m[order], k[order], tdpo.Config())
    torch.testing.assert_close(shuffled, tdpo.tdpo_loss(m, k, tdpo.Config())[order[:B]])


def test_stop_gradient_lies_on_the_chosen_divergence_alone() -> None:
    k = torch.tensor([0.3, 0.2, 0.1, 0.5, 0.4, 0.6], requires_grad=True)
    m = torch.zeros(6)
    tdpo.tdpo_loss(m, k, tdpo.Config()).sum().backward()
    assert k.grad is not None and not k.grad[:3].any() and (k.grad[3:] > 0).all()
    k.grad = None
    tdpo.tdpo_loss(m, k, tdpo.Config(variant=1)).sum().backward()
    assert k.grad is not None and (k.grad[:3] < 0).all()  # TDPO1 raises the divergence on chosen answers


def test_extreme_logits_stay_finite() -> None:
    hidden, head, batch, reference = made_up(7, torch.float32)
    loss = tdpo.loss(tdpo.Config(), 1e3 * hidden, head, batch, reference)
    assert loss.isfinite() and torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_a_text_without_an_answer_and_bad_options_are_refused() -> None:
    hidden, head, batch, reference = made_up(8)
    batch["labels"][2] = -100
    with pytest.raises(BadData, match="its answer is empty"):
        dpo.loss(dpo.Config(), hidden, head, batch, reference)
    for options in ({"variant": 3}, {"beta": 0.0}, {"alpha": -1.0}):
        with pytest.raises(UsageError, match="expected variant 1 or 2"):
            tdpo.Config(**options)
    with pytest.raises(UsageError, match=r"dpo beta=-0\.1: must be positive"):
        dpo.Config(beta=-0.1)


def ready(arm: str, base: Path) -> trial.Prepared:
    training = {"batch": 8, "precision": "float32"}
    return trial.prepare(
        trial.Setting(arm=arm, base=str(base), data=asked("preference"), training=training, device="cpu"), ("train",)
    )


@pytest.mark.parametrize("arm", ["full + tdpo", "lora:r=4 + tdpo", "mos:r=3,e=2,p=1,l=2 + dpo"])
def test_the_reference_is_the_untouched_base_throughout(arm: str, causal_base: Path) -> None:
    prepared = ready(arm, causal_base)
    attached = build(prepared.plan, prepared.base, prepared.task, seed=0)
    bare = prepared.base.model(prepared.task, seed=0)
    batch = prepared.encoded["train"].collate(np.arange(4))
    objective = attached.objective
    assert objective is not None
    assert objective(attached.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.2 * torch.randn_like(p))
    assert objective(attached.model, batch).item() != pytest.approx(math.log(2), abs=1e-3)
    reference = objective._reference(language_model(attached.model), batch)  # type: ignore[attr-defined]
    torch.testing.assert_close(reference.hidden, states(bare, batch), rtol=1e-5, atol=1e-5)
    copied = objective.copied_bytes  # type: ignore[attr-defined]
    assert copied == (4 * sum(p.numel() for p in bare.parameters()) if arm.startswith("full") else 0)


def test_tdpo_keeps_no_more_than_dpo_and_both_far_less_than_whole_logits() -> None:
    """Counted, on a vocabulary that is wide beside the model, as real ones are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    g = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(0, 4096, (8, 64), generator=g)}
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    with torch.no_grad():
        reference = Reference(states(model, batch), model.get_output_embeddings())

    class Bound(nn.Module):
        def __init__(self, module: object, chosen: object) -> None:
            super().__init__()
            self.model, self.module, self.chosen = model, module, chosen

        def forward(self, batch: dict[str, Tensor]) -> object:
            if self.module is None:
                whole = naive(states(self.model, batch), model.lm_head, batch["labels"], reference)
                loss = naive_loss(*whole, tdpo.Config())
            else:
                head = self.model.get_output_embeddings()
                loss = self.module.loss(self.chosen, states(self.model, batch), head, batch, reference)  # type: ignore[attr-defined]
            return type("Out", (), {"logits": loss})

    count = lambda *args: measure.saved_for_backward(Bound(*args), {"batch": batch}, lambda x: x).bytes  # noqa: E731
    ours, theirs = count(tdpo, tdpo.Config()), count(dpo, dpo.Config())
    logits = 8 * 64 * 4096 * 4
    assert ours <= 1.10 * theirs and ours < logits / 2
    assert count(None, None) > 2 * logits


def test_a_model_that_caps_its_logits_is_refused(causal_base: Path) -> None:
    prepared = ready("lora:r=4", causal_base)
    model = prepared.base.model(prepared.task, seed=0)
    batch = prepared.encoded["train"].collate(np.arange(2))
    check_head(model, batch)
    model.lm_head.register_forward_hook(lambda m, x, y: y)  # harmless
    check_head(model, batch)
    plain = type(model).forward

    def capped(self: nn.Module, **inputs: Tensor) -> object:
        out = plain(self, **inputs)
        out.logits = 30 * torch.tanh(out.logits / 0.3)
        return out

    model.forward = capped.__get__(model)  # type: ignore[method-assign]
    with pytest.raises(Refused, match="behind the output layer"):
        check_head(model, batch)


def test_a_brick_opens_without_a_second_copy(causal_base: Path) -> None:
    prepared = ready("full + dpo", causal_base)
    assert build(prepared.plan, prepared.base, prepared.task, seed=0, objective=False).objective is None
    assert resolve(prepared.plan.arm, prepared.task).objective == "dpo"
    assert open_base(str(causal_base)).generative


GOLDEN_BETAS = (0.1, 0.5)


def golden_batch() -> tuple[list[list[int]], ...]:
    """Prompts, chosen and rejected answers as token ids, of unequal lengths."""
    ids = lambda start, n: [1 + (start + 7 * i) % 22 for i in range(n)]  # noqa: E731
    return (
        [ids(0, 4), ids(3, 6), ids(5, 2)],
        [ids(1, 5), ids(2, 3), ids(9, 7)],
        [ids(4, 2), ids(11, 6), ids(6, 4)],
    )


def golden_model(shift: float) -> nn.Module:
    """A Llama whose weights are a formula: nothing is drawn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.0 + i) + i + shift)
            p.copy_((0.3 * wave if p.ndim > 1 else 1 + 0.1 * wave).reshape(p.shape))
    return model.eval()


@pytest.mark.parametrize("place", range(len(GOLDEN_BETAS)))
def test_losses_and_gradients_are_those_of_trl(place: int) -> None:
    known = json.loads((Path(__file__).parent / "golden" / "trl_dpo.json").read_text(encoding="utf-8"))["found"][place]
    prompts, chosen, rejected = golden_batch()
    rows = [(p, a) for answers in (chosen, rejected) for p, a in zip(prompts, answers, strict=True)]
    longest = max(len(p) + len(a) for p, a in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for row, (p, a) in enumerate(rows):
        ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p) - 1 : len(p) + len(a) - 1] = torch.tensor(a)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    policy, untouched = golden_model(0.0), golden_model(0.5)
    with torch.no_grad():
        reference = Reference(states(untouched, batch), untouched.lm_head)  # type: ignore[arg-type]
    config = dpo.Config(beta=known["beta"])
    loss = dpo.loss(config, states(policy, batch), policy.lm_head, batch, reference)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(known["loss"], rel=1e-5)
    loss.backward()
    norms = {n: float(p.grad.norm()) for n, p in policy.named_parameters() if p.grad is not None}
    assert norms.keys() == known["gradient_norms"].keys()
    assert norms == pytest.approx(known["gradient_norms"], rel=1e-4)
