"""Gather the corpus of `embedded:pylm`: Python source, split by package, its tokenizer and its tokens.

    python scripts/pylm_corpus.py --out runs/pylm/corpus

Writes tokenizer/, train.bin and heldout.bin (uint16 token ids, documents behind one another, each closed by the end
token), heldout.jsonl (the held-out documents as text) and sources.json (packages, versions, licences, counts).

Tests are left out everywhere, and so are the standard library's files that `embedded:python-source` holds out: tasks
made from those must be new to the model.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from brickyard.embedded import python_source

END = "<|endoftext|>"
# Distribution -> its import packages. Every licence among them allows redistribution of a model trained on the source.
TRAIN = {
    "transformers": ("transformers",),
    "torch": ("torch",),
    "sympy": ("sympy",),
    "pandas": ("pandas",),
    "scipy": ("scipy",),
    "scikit-learn": ("sklearn",),
    "numpy": ("numpy",),
    "matplotlib": ("matplotlib", "mpl_toolkits"),
    "ray": ("ray",),
    "pip": ("pip",),
    "fonttools": ("fontTools",),
    "Pygments": ("pygments",),
    "peft": ("peft",),
    "setuptools": ("setuptools",),
    "huggingface_hub": ("huggingface_hub",),
    "sentence-transformers": ("sentence_transformers",),
    "datasets": ("datasets",),
    "narwhals": ("narwhals",),
    "mpmath": ("mpmath",),
    "pydantic": ("pydantic",),
    "accelerate": ("accelerate",),
    "pytest": ("_pytest",),
    "rich": ("rich",),
    "pillow": ("PIL",),
    "aiohttp": ("aiohttp",),
    "fsspec": ("fsspec",),
}
HELD_OUT = {
    "networkx": ("networkx",),
    "hypothesis": ("hypothesis",),
    "joblib": ("joblib",),
    "Jinja2": ("jinja2",),
    "anyio": ("anyio",),
}
LEFT_OUT = frozenset({"test", "tests", "testing", "_vendor", "third_party", "thirdparty_files", "node_modules"})
SHORTEST, LONGEST = 200, 200_000  # bytes of a file; longer ones are tables or generated
CAP = 20_000_000  # bytes of one package, so that none makes the model
VOCABULARY = 4096
TOKENIZER_BYTES = 30_000_000


def files_of(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (path inside, text) of a package's own source files in an order that is a function of their names."""
    found = [path for path in root.rglob("*.py") if LEFT_OUT.isdisjoint(path.relative_to(root).parts)]
    inside = {path: path.relative_to(root).as_posix() for path in found}
    for path in sorted(found, key=lambda p: hashlib.sha256(inside[p].encode()).digest()):
        if path.name.startswith(("test_", "conftest")) or not SHORTEST <= path.stat().st_size <= LONGEST:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a source of another encoding; a handful, and the counts say so
        yield inside[path], text.replace("\r\n", "\n")


def documents(packages: dict[str, tuple[str, ...]], seen: set[bytes]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the distinct documents of some distributions and what each of these contributed."""
    texts, sources = [], []
    for name, modules in packages.items():
        count = size = 0
        for module in modules:
            spec = importlib.util.find_spec(module)
            if spec is None or not spec.submodule_search_locations:
                raise SystemExit(f"{name} is not installed; the corpus needs it. Run `make setup`.")
            for _, text in files_of(Path(spec.submodule_search_locations[0])):
                key = hashlib.sha256(text.encode()).digest()
                if key in seen or size + len(text.encode()) > CAP:
                    continue
                seen.add(key)
                texts.append(text)
                count, size = count + 1, size + len(text.encode())
        known = importlib.metadata.metadata(name)
        trove = [c.rsplit(" :: ", 1)[1] for c in known.get_all("Classifier") or [] if c.startswith("License ::")]
        sources.append(
            {
                "package": name,
                "version": known["Version"],
                "licence": known.get("License-Expression") or "; ".join(trove) or (known.get("License") or "")[:60],
                "files": count,
                "bytes": size,
            }
        )
    return texts, sources


def library(seen: set[bytes]) -> tuple[list[str], dict[str, Any]]:
    """Return the standard library's files that `embedded:python-source` trains on."""
    texts = [t for t in python_source.splits()["train"]["text"] if SHORTEST <= len(t.encode()) <= LONGEST]
    seen.update(hashlib.sha256(t.encode()).digest() for t in texts)
    return texts, {
        "package": "Python standard library",
        "version": sysconfig.get_python_version(),
        "licence": "PSF-2.0",
        "files": len(texts),
        "bytes": sum(len(t.encode()) for t in texts),
    }


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; digits stand alone, runs of spaces may be one token (indentation)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return the ids of all documents behind one another, uint16, the end token after each."""
    end = np.uint16(tokenizer.eos_token_id)
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), 512):
        made = tokenizer(texts[start : start + 512], verbose=False)["input_ids"]
        parts += [np.append(np.asarray(ids, dtype=np.uint16), end) for ids in made]
    return np.concatenate(parts)


def main() -> None:
    """Gather, train the tokenizer, tokenise, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pylm/corpus"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    # The held-out packages come first: a file that stands in both is held out.
    held, held_sources = documents(HELD_OUT, seen)
    own, own_source = library(seen)
    others, sources = documents(TRAIN, seen)
    texts = own + others
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(texts))
    texts = [texts[i] for i in order]
    sample, size = [], 0
    for text in texts:
        if size > TOKENIZER_BYTES:
            break
        sample.append(text)
        size += len(text.encode())
    tokenizer = train_tokenizer(sample, VOCABULARY)
    tokenizer.save_pretrained(out / "tokenizer")
    counts = {}
    for name, part in (("train", texts), ("heldout", held)):
        ids = tokens(tokenizer, part)
        ids.tofile(out / f"{name}.bin")
        counts[name] = {"documents": len(part), "bytes": sum(len(t.encode()) for t in part), "tokens": len(ids)}
    with (out / "heldout.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in held)
    about = {"train": [own_source, *sources], "heldout": held_sources, "counts": counts, "vocabulary": len(tokenizer)}
    (out / "sources.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
