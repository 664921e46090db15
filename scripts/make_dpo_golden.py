"""Write what TRL's DPOTrainer makes of one batch: losses and gradients that `brickyard.objective.dpo` must give too.

    pip install trl==1.16.0
    python scripts/make_dpo_golden.py

Nothing is drawn: weights and tokens are formulas, so any machine can build the same model. tests/test_objectives.py
reads the file; TRL is not needed there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_objectives import GOLDEN_BETAS, golden_batch, golden_model  # noqa: E402


def main() -> None:
    """Write tests/golden/trl_dpo.json."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "brickyard/embedded/pylm")
    prompt_BT, chosen_BT, rejected_BT = golden_batch()
    rows = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
        for p, c, r in zip(prompt_BT, chosen_BT, rejected_BT, strict=True)
    ]
    found = []
    for beta in GOLDEN_BETAS:
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder, beta=beta, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False
            )
            model, reference = golden_model(0.0), golden_model(0.5)
            trainer = DPOTrainer(
                model,
                reference,
                config,
                processing_class=tokenizer,
                train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            )
            batch = trainer.data_collator(rows)
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            norms = {n: float(p.grad.norm()) for n, p in trainer.model.named_parameters() if p.grad is not None}
            found.append({"beta": beta, "loss": loss.item(), "gradient_norms": norms})
    import trl

    target = ROOT / "tests" / "golden" / "trl_dpo.json"
    target.write_text(json.dumps({"trl": trl.__version__, "found": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
