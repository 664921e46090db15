"""Soft labels: their mathematics, the teacher's cache, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import documents, make_text_base, text_data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from brickyard.core import brick as bricks
from brickyard.core import loop, teacher, trial
from brickyard.core.arm import parse
from brickyard.core.base import open_base
from brickyard.core.build import resolve
from brickyard.core.errors import BadBase, BadBrick, Changed, NotFinite, Refused, UsageError
from brickyard.core.objective import PREPARED
from brickyard.core.states import LIMIT_VARIABLE
from brickyard.objective import distil

LENGTH = 32  # positions of a block


def setting(arm: str, base: Path, data: object, **changes: object) -> trial.Setting:
    training = {"precision": "float32", **changes.pop("training", {})}  # type: ignore[dict-item]
    return trial.Setting(arm=arm, base=str(base), data=data, training=training, device="cpu", **changes)  # type: ignore[arg-type]


def texts(arm: str, base: Path, **changes: object) -> trial.Setting:
    training = {"batch": 16, "epochs": 2, **changes.pop("training", {})}  # type: ignore[dict-item]
    return setting(arm, base, text_data(), training=training, **changes)


def blocks(arm: str, base: Path, **changes: object) -> trial.Setting:
    training = {"batch": 4, "epochs": 2, **changes.pop("training", {})}  # type: ignore[dict-item]
    return setting(arm, base, documents(), task="causal-lm", max_length=LENGTH, training=training, **changes)


def run(asked: trial.Setting, folder: Path) -> dict:
    return trial.run({"setting": asdict(asked), "folder": str(folder)})


def with_teacher(path: Path, **options: object) -> str:
    return f'distil:teacher="{path}"' + "".join(f",{k}={v}" for k, v in options.items())


@pytest.fixture(scope="module")
def classifier(text_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows the task."""
    folder = tmp_path_factory.mktemp("classifier")
    found = run(texts("full:lr=3e-3", text_base, training={"epochs": 8}), folder)
    assert found["score"]["mean"] > 0.9
    return folder / "brick"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that knows its language, with one layer more than the student."""
    folder = tmp_path_factory.mktemp("speaker")
    base = make_text_base(folder / "base", causal=True, layers=3, seed=4)
    run(blocks("full:lr=3e-3", base, training={"epochs": 12}), folder)
    return folder / "brick"


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_with_one_certain_class_it_is_the_ordinary_cross_entropy(classes: int, rows: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=g)
    certain = 1e4 * F.one_hot(labels, classes).double()
    soft, entropy = distil.soft_cross_entropy(logits, certain, 1.0)
    torch.testing.assert_close(soft, F.cross_entropy(logits, labels, reduction="none"), atol=1e-7, rtol=0)
    assert entropy.abs().max() < 1e-7


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.floats(0.5, 5), st.integers(0, 10**6))
def test_its_gradient_is_student_minus_teacher_and_its_minimum_the_entropy(k: int, t: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (2 * torch.randn(4, k, generator=g, dtype=torch.float64) for _ in range(2))
    z_s.requires_grad_(True)
    soft, entropy = distil.soft_cross_entropy(z_s, z_t, t)
    (grad,) = torch.autograd.grad(soft.sum(), z_s)
    p_s, p_t = (z_s.detach() / t).softmax(1), (z_t / t).softmax(1)
    torch.testing.assert_close(grad, (p_s - p_t) / t, atol=1e-12, rtol=0)
    torch.testing.assert_close(soft - entropy, F.kl_div(p_s.log(), p_t, reduction="none").sum(1), atol=1e-10, rtol=0)
    assert (soft >= entropy - 1e-12).all()
    same, least = distil.soft_cross_entropy(z_t, z_t, t)
    torch.testing.assert_close(same, least, atol=1e-12, rtol=0)


def dense(u: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Bucketed cross entropy, written down over the whole vocabulary."""
    p = u.softmax(1)
    inside = p.gather(1, tokens)
    buckets = torch.cat([inside, 1 - inside.sum(1, keepdim=True)], 1)
    return -torch.where(q > 0, q * buckets.clamp(min=1e-300).log(), 0.0).sum(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 14), st.floats(0.5, 4), st.booleans(), st.integers(0, 10**6))
def test_tokens_in_chunks_agree_with_the_whole_vocabulary(v: int, k: int, t: float, bias: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, weight, shift = draw(7, 5), draw(v, 5), draw(v) if bias else None
    labels = torch.randint(v, (7,), generator=g)
    log_q, tokens = teacher.truncate(draw(7, v), k, t)
    log_q = log_q.double().clamp(min=-65504)
    assert log_q.exp().sum(1) == pytest.approx(np.ones(7), abs=1e-6)
    leaves = [x.requires_grad_(True) for x in (hidden, weight, *([shift] if bias else []))]
    logits = hidden @ weight.T + (shift if bias else 0)
    expected = (
        dense(logits / t, log_q.softmax(1), tokens) * torch.arange(7)
        + 0.5 * F.cross_entropy(logits, labels, reduction="none")
    ).sum()
    for chunk in (1, 3 * v, 10**6):
        soft, hard = distil.soft_token_terms(hidden, weight, shift, labels, log_q, tokens, t, chunk=chunk)
        found = (soft * torch.arange(7) + 0.5 * hard).sum()
        assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
        for a, b in zip(
            torch.autograd.grad(found, leaves, retain_graph=True),
            torch.autograd.grad(expected, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_tokens_are_least_at_the_teachers_own_entropy_and_stay_finite_far_away() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 20, generator=g)
    log_q, tokens = teacher.truncate(z, 4, 2.0)
    eye, labels = torch.eye(20), torch.zeros(6, dtype=torch.int64)
    at_teacher, _ = distil.soft_token_terms(z, eye, None, labels, log_q, tokens, 2.0)
    torch.testing.assert_close(at_teacher, distil.entropy(log_q), atol=1e-5, rtol=0)
    moved, _ = distil.soft_token_terms(z + 0.3 * torch.randn(6, 20, generator=g), eye, None, labels, log_q, tokens, 2.0)
    assert (moved > at_teacher).all()
    far = torch.zeros(6, 20).scatter(1, tokens, 500.0).requires_grad_(True)
    soft, hard = distil.soft_token_terms(far, eye, None, labels, log_q, tokens, 1.0)
    (grad,) = torch.autograd.grad(soft.sum() + hard.sum(), far)
    assert soft.isfinite().all() and grad.isfinite().all() and grad.abs().max() <= 2.0001


def test_no_logits_of_all_positions_are_kept_for_backward() -> None:
    n, v, d, k = 64, 5000, 8, 4
    hidden = torch.randn(n, d, requires_grad=True)
    weight, labels = torch.randn(v, d, requires_grad=True), torch.zeros(n, dtype=torch.int64)
    log_q, tokens = teacher.truncate(torch.randn(n, v), k, 1.0)
    kept: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        soft, hard = distil.soft_token_terms(hidden, weight, None, labels, log_q, tokens, 1.0)
        (soft.mean() + hard.mean()).backward()
    assert sum(kept) <= v * d + n * (d + 2 * k + 2)


def test_the_weight_mixes_and_the_temperature_keeps_the_size_of_the_gradient() -> None:
    z_s, z_t = torch.randn(8, 5), torch.randn(8, 5)
    batch = {PREPARED: (z_t,), "labels": torch.arange(8) % 5}
    total, logged = distil.loss_of_logits(distil.Config(teacher="x", temperature=2.0, weight=0.25), z_s, batch)
    soft, entropy = distil.soft_cross_entropy(z_s, z_t, 2.0)
    assert total.item() == pytest.approx(
        0.25 * 4 * soft.mean().item() + 0.75 * F.cross_entropy(z_s, batch["labels"]).item()
    )
    assert logged["soft_cross_entropy"].item() == pytest.approx(soft.mean().item())
    assert logged["divergence"].item() == pytest.approx((soft - entropy).mean().item(), abs=1e-6)
    z_s = (0.01 * z_s).requires_grad_(True)
    sizes = [
        torch.autograd.grad(distil.loss_of_logits(distil.Config(teacher="x", temperature=t), z_s, batch)[0], z_s)[
            0
        ].norm()
        for t in (20.0, 80.0)
    ]
    assert sizes[0].item() == pytest.approx(sizes[1].item(), rel=0.05)


def test_a_teacher_is_not_changed_and_its_answers_are_its_logits(classifier: Path, text_base: Path) -> None:
    ready = trial.prepare(texts(f"full + {with_teacher(classifier)}", text_base))
    opened = teacher.open_teacher(str(classifier), ready.task)
    before = {k: v.clone() for k, v in opened.model.state_dict().items()}
    rows = ready.data.splits["train"]
    made = teacher.soft_labels(opened, rows, ready.encoded["train"], ready.base, ready.task, device=torch.device("cpu"))
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())
    assert all(torch.equal(before[k], v) for k, v in opened.model.state_dict().items())
    batch = {k: v for k, v in ready.encoded["train"].collate(np.array([5, 2])).items() if k != "labels"}
    with torch.no_grad():
        expected = opened.model(**batch).logits
    torch.testing.assert_close(made.collate(np.array([5, 2]))[0], expected, atol=1e-5, rtol=1e-5)
    assert made.report["accuracy"] > 0.9 and 0 < made.report["entropy"] < math.log(2)


def test_a_language_models_answers_stand_at_the_tokens_that_are_asked(speaker: Path, causal_base: Path) -> None:
    ready = trial.prepare(blocks(f"full + {with_teacher(speaker)}", causal_base))
    opened, rows = teacher.open_teacher(str(speaker), ready.task), ready.encoded["train"]
    made = teacher.soft_labels(opened, None, rows, ready.base, ready.task, k=5, device=torch.device("cpu"))
    index = np.array([len(rows) - 1, 0])  # the last block has places without a target
    batch = rows.collate(index)
    with torch.no_grad():
        logits = opened.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[batch["labels"] >= 0]
    log_q, tokens = made.collate(index)
    expected, order = logits.log_softmax(1).topk(5)
    torch.testing.assert_close(log_q[:, :5].float(), expected, atol=4e-3, rtol=2e-3)
    assert torch.equal(tokens, order)
    assert 0.5 < made.report["kept_mass"] < 1
    kept = torch.cat([made.collate(np.arange(len(rows)))[0].float().softmax(1)[:, :5].sum(1)])
    assert made.report["kept_mass"] == pytest.approx(kept.mean().item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_cached_answers_train_the_same_weights_as_those_made_on_the_fly(
    kind: str,
    classifier: Path,
    speaker: Path,
    text_base: Path,
    causal_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "classes":
        asked = lambda **o: texts(f"full:lr=1e-3 + {with_teacher(classifier)}", text_base, **o)  # noqa: E731
    else:
        asked = lambda **o: blocks(f"full:lr=1e-3 + {with_teacher(speaker, k=4)}", causal_base, **o)  # noqa: E731
    found = {}
    for name, cache in (("built", True), ("found", True), ("memory", False)):
        result = run(asked(cache=cache), tmp_path / name)
        found[name] = bricks.load(tmp_path / name / "brick").tensors()
        assert result["cost"]["train_seconds"] > result["cost"]["prepare_seconds"] > 0
        assert not result["prepared"]["streamed"]
    accuracy = result["prepared"].get("accuracy")
    assert all(
        torch.equal(v, found["found"][k]) and torch.equal(v, found["memory"][k]) for k, v in found["built"].items()
    )
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    with pytest.warns(UserWarning, match="run for every batch"):
        result = run(asked(), tmp_path / "streamed")
    assert result["prepared"]["streamed"] and result["prepared"].get("accuracy") == accuracy
    assert (accuracy is not None) == (kind == "classes")
    streamed = bricks.load(tmp_path / "streamed" / "brick").tensors()
    for name, tensor in found["built"].items():
        torch.testing.assert_close(tensor, streamed[name], atol=2e-4, rtol=1e-3)


def test_a_damaged_entry_is_made_again(speaker: Path, causal_base: Path) -> None:
    ready = trial.prepare(blocks(f"full + {with_teacher(speaker, k=3)}", causal_base))
    config = ready.plan.configs["distil"]
    first = distil.prepare(config, ready)
    assert first.path is not None
    expected = first.collate(np.arange(3))
    data = bytearray((first.path / "values.bin").read_bytes())
    data[7] ^= 8
    (first.path / "values.bin").write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        again = distil.prepare(config, ready)
    assert all(torch.equal(a, b) for a, b in zip(expected, again.collate(np.arange(3)), strict=True))


def test_a_classifier_reads_raw_text_with_its_own_tokenizer(
    text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(conftest, "WORDS", conftest.WORDS[::-1])
        other = make_text_base(tmp_path / "other", seed=3)
    run(texts("full:lr=3e-3", other, training={"epochs": 8}), tmp_path / "teacher")
    result = run(
        texts(f"full:lr=3e-3 + {with_teacher(tmp_path / 'teacher' / 'brick')}", text_base, training={"epochs": 8}),
        tmp_path / "s",
    )
    assert result["prepared"]["accuracy"] > 0.9 and result["score"]["mean"] > 0.85


def test_an_arm_takes_a_quoted_teacher() -> None:
    arm = parse('full:lr=1e-4 + distil:teacher="embedded:minilm",k=8,temperature=2.0,weight=0.5')
    assert arm.pieces[1].options == {"teacher": "embedded:minilm", "k": 8, "temperature": 2.0, "weight": 0.5}
    assert parse(str(arm)) == arm
    assert resolve(arm).configs["distil"] == distil.Config(teacher="embedded:minilm", k=8, temperature=2.0, weight=0.5)


@pytest.mark.parametrize("arm", ["lora:r=4,lr=2e-2", "linear-probe:lr=2e-2"])
def test_a_student_learns_from_soft_labels_alone(arm: str, classifier: Path, text_base: Path, tmp_path: Path) -> None:
    """The data's labels are shuffled, so only the teacher can tell it; with the teacher's shuffled too, nothing can."""
    scores = [
        run(
            texts(
                f"{arm} + {with_teacher(classifier, shuffle=s)}",
                text_base,
                shuffle_labels=True,
                training={"epochs": 12},
            ),
            tmp_path / s,
        )["score"]["mean"]
        for s in ("false", "true")
    ]
    assert scores[0] > 0.7 and scores[0] - scores[1] > 0.15


def test_both_losses_are_logged_and_differ_by_the_teachers_entropy(
    speaker: Path, causal_base: Path, tmp_path: Path
) -> None:
    result = run(blocks(f"full:lr=3e-3 + {with_teacher(speaker, k=6)}", causal_base, training={"epochs": 3}), tmp_path)
    for point in result["history"]:
        gap = point["soft_cross_entropy"] - point["divergence"]
        assert gap == pytest.approx(result["prepared"]["entropy"], rel=0.02)
        assert point["train_loss"] == pytest.approx(point["soft_cross_entropy"], rel=0.02)
    assert 0 < result["history"][-1]["divergence"] < 0.9 * result["history"][0]["divergence"]


def test_an_interrupted_run_goes_on_bit_for_bit_and_with_no_other_teacher(
    classifier: Path, text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = texts(f"full:lr=1e-3 + {with_teacher(classifier)}", text_base, training={"evaluate_every": 4})

    def tuned(folder: Path, asked: trial.Setting = asked) -> dict:
        return trial.tune(trial.prepare(asked), folder, checkpoint_every=3)

    whole = tuned(tmp_path / "whole")
    _stop_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "cut")
    monkeypatch.undo()
    other = run(texts("full:lr=3e-3", text_base, seed=1, training={"epochs": 9}), tmp_path / "other")
    assert other["score"]["mean"] > 0.8
    link = tmp_path / "link"
    link.symlink_to(classifier)
    swapped = texts(f"full:lr=1e-3 + {with_teacher(link)}", text_base, training={"evaluate_every": 4})
    with pytest.raises(Changed, match="arm"):
        tuned(tmp_path / "cut", swapped)
    found = tuned(tmp_path / "cut")
    assert found["history"] == whole["history"]
    left, right = (bricks.load(tmp_path / n / "brick").tensors() for n in ("whole", "cut"))
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_a_teacher_with_other_weights_gives_other_rows(classifier: Path, text_base: Path, tmp_path: Path) -> None:
    """The digest that a checkpoint is compared by knows the teacher's content, not only its place."""
    run(texts("full:lr=3e-3", text_base, seed=1, training={"epochs": 9}), tmp_path)
    digests = set()
    for path in (classifier, tmp_path / "brick"):
        ready = trial.prepare(texts(f"full + {with_teacher(path)}", text_base))
        digests.add(trial.with_prepared(ready, ready.encoded["train"])[0].digest)
    assert len(digests) == 2


def test_the_plan_knows_what_the_teacher_costs(speaker: Path, causal_base: Path) -> None:
    plain = trial.probe({"setting": asdict(blocks("full", causal_base))})
    taught = trial.probe({"setting": asdict(blocks(f"full + {with_teacher(speaker)}", causal_base))})
    assert plain["prepare_ms_per_row"] == 0 < taught["prepare_ms_per_row"]


@pytest.mark.parametrize(
    "options", ["", "teacher=x,k=0", "teacher=x,temperature=0.0", "teacher=x,weight=0.0", "teacher=x,weight=1.5"]
)
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(UsageError, match="distil"):
        resolve(parse("full + distil" + (f":{options}" if options else "")))


def test_a_teacher_that_is_not_there_or_has_no_head_is_refused(text_base: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "nowhere", "no folder here"), (text_base, "no trained head")):
        with pytest.raises(BadBase, match="teacher cannot be opened") as error:
            run(texts(f"full + {with_teacher(path)}", text_base), tmp_path / "run")
        assert words in str(error.value)


def test_a_teacher_of_another_kind_or_of_other_classes_is_refused(
    classifier: Path, causal_base: Path, text_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="trained for text-classification"):
        run(blocks(f"full + {with_teacher(classifier)}", causal_base), tmp_path)
    data = text_data()
    for columns in data.values():
        columns["label"] = [label.upper() for label in columns["label"]]
    with pytest.raises(Refused, match="other classes"):
        run(setting(f"full + {with_teacher(classifier)}", text_base, data), tmp_path)


@pytest.mark.filterwarnings("ignore:the teacher's answers")
@pytest.mark.parametrize("limit", ["", "64"], ids=["kept", "streamed"])
def test_classes_are_matched_by_name_and_permuted_ones_found_by_accuracy(
    limit: str, classifier: Path, text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, limit)
    assert teacher.class_order(("b", "a", "c"), ("a", "b", "c"), "t") == [1, 0, 2]
    assert teacher.class_order(("LABEL_0", "LABEL_1"), ("no", "yes"), "t") == [0, 1]
    manifest = json.loads((classifier / "brick.json").read_text())
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in classifier.iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    manifest["task"]["labels"] = manifest["task"]["labels"][::-1]
    (wrong / "brick.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused, match="another order than the labels"):
        run(texts(f"full + {with_teacher(wrong)}", text_base), tmp_path / "run")
    (wrong / "brick.json").unlink()
    with pytest.raises((BadBase, BadBrick)):
        run(texts(f"full + {with_teacher(wrong)}", text_base), tmp_path / "run")


def test_a_teacher_with_another_vocabulary_of_the_same_size_is_refused(
    causal_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(conftest, "WORDS", [*conftest.WORDS[1:], conftest.WORDS[0]])
        other = make_text_base(tmp_path / "other", causal=True)
    with pytest.raises(Refused, match=r"another vocabulary \(27 tokens, the base 27\): 23 tokens have other ids"):
        run(blocks(f"full + {with_teacher(other)}", causal_base), tmp_path / "run")


def test_a_teacher_whose_context_is_too_short_is_refused(causal_base: Path, tmp_path: Path) -> None:
    folder = make_text_base(tmp_path / "short", causal=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    with pytest.raises(Refused, match="reads at most 16 tokens"):
        run(blocks(f"full + {with_teacher(folder)}", causal_base), tmp_path / "run")


def test_a_teacher_that_says_nan_is_refused(speaker: Path, causal_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = trial.prepare(blocks(f"full + {with_teacher(speaker)}", causal_base))
    monkeypatch.setattr(teacher, "states", lambda plain, batch: torch.full((*batch["input_ids"].shape, 32), torch.nan))
    with pytest.raises(NotFinite, match="teacher"):
        teacher.soft_labels(
            teacher.open_teacher(str(speaker), ready.task),
            None,
            ready.encoded["train"],
            ready.base,
            ready.task,
            cache=False,
            device=torch.device("cpu"),
        )


def test_instruct_rows_are_taught_at_their_answers(causal_base: Path, tmp_path: Path) -> None:
    words = documents(train=30, test=20)
    data = {
        name: {
            "prompt": [t.split(" ", 2)[0] for t in c["text"]],
            "completion": [" ".join(t.split(" ")[1:]) for t in c["text"]],
        }
        for name, c in words.items()
    }
    big = make_text_base(tmp_path / "big", causal=True, seed=8)
    result = run(
        setting(f"full:lr=1e-3 + {with_teacher(big, k=3)}", causal_base, data, training={"batch": 8, "epochs": 1}),
        tmp_path / "r",
    )
    assert result["prepared"]["positions"] == result["encoding"]["train"]["answer_tokens"]


def test_generic_opening_of_a_checkpoint_with_three_named_classes(tmp_path: Path, text_base: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    names = {0: "x", 1: "y", 2: "z"}
    model = AutoModelForSequenceClassification.from_pretrained(
        text_base, id2label=names, label2id={v: k for k, v in names.items()}
    )
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((text_base / name).read_bytes())
    opened = open_base(str(tmp_path))
    assert opened.own_task.labels == ("x", "y", "z")
    assert opened.model(opened.own_task, seed=0, stored_head=True).config.num_labels == 3


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupt training before its next step, as a user would."""
    inner, done = loop.Backprop.__call__, []

    def step(self: loop.Backprop, state: loop.State, batches: list) -> float:
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return inner(self, state, batches)

    monkeypatch.setattr(loop.Backprop, "__call__", step)
