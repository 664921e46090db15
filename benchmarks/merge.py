"""Wall time and peak memory of merging three checkpoints, as ratios to mergekit and to reading and writing alone.

`python benchmarks/merge.py [--layers 4] [--hidden 1024] [--mergekit PYTHON] [--rounds 3]` writes a base and three
Llama-shaped bfloat16 models of random weights, warms the page cache, and runs each contestant in a process of its own,
in turn. `--mergekit` is the Python of an environment that has mergekit 0.1.5. Start-up of Python is not counted; every
contestant's output is flushed to the disk. 0.9 GB a checkpoint: `--layers 9 --hidden 2048`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

PLAIN = """
import os
buffer = bytearray(2**22)
began()
for path in models:
    with open(path / "model.safetensors", "rb", buffering=0) as file:
        with open(out, "wb", buffering=0) if path == models[0] else open(os.devnull, "wb") as copy:
            while count := file.readinto(buffer):
                copy.write(memoryview(buffer)[:count])
            if path == models[0]:
                os.fsync(copy.fileno())
ended()
"""
OURS = """
from brickyard.core.process import settle
from brickyard.merging.merge import merge, resolve
settle()  # as the command does
resolve(arm)  # imports what reads options
began()
merge(arm, base=str(models[0]), bricks=models[1:], out=out, threads=threads)
ended()
"""
PEER = """
import yaml, os
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
method = {"average": "linear"}.get(arm.split(":")[0], "ties")
chosen = {"weight": 1.0} if method == "linear" else {"weight": 1.0, "density": 0.5}
listed = [{"model": str(model), "parameters": chosen} for model in models[1:]]
recipe = {"merge_method": method, "dtype": "bfloat16", "models": listed}
if method == "ties":
    recipe["base_model"] = str(models[0])
config = MergeConfiguration.model_validate(recipe)
began()
run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))
for shard in out.glob("*.safetensors"):
    handle = os.open(shard, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
ended()
"""
FRAME = """
import json, re, sys, time
from pathlib import Path
folder, arm, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
models, out, times = [folder / name for name in ("base", "a", "b", "c")], folder / "out", []
began = lambda: times.append(time.monotonic())
ended = began
"""
END = """
# Not ru_maxrss, which a process takes over from the one that started it.
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps({"seconds": times[1] - times[0], "peak": peak}))
"""
ARMS = {"linear": "average", "TIES": "ties:density=0.5,trim=tensor"}


def write_models(folder: Path, layers: int, hidden: int, vocabulary: int) -> tuple[int, int]:
    """Write the base and three models near it; return the bytes of one and the elements of the largest tensor."""
    inner = 11 * hidden // 4
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{leaf}_proj.weight": (hidden, hidden) for leaf in "qkvo"}
        shapes |= {f"{at}.mlp.{leaf}_proj.weight": (inner, hidden) for leaf in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}.{leaf}_layernorm.weight": (hidden,) for leaf in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for seed, label in enumerate(("base", "a", "b", "c")):
        (folder / label).mkdir()
        tensors = {}
        for i, (name, shape) in enumerate(shapes.items()):
            weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(i))
            if seed:
                weight += 0.001 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + i))
            tensors[name] = weight.bfloat16()
        save_file(tensors, folder / label / "model.safetensors", metadata={"format": "pt"})
        (folder / label / "config.json").write_text(json.dumps(config))
    elements = [torch.Size(shape).numel() for shape in shapes.values()]
    return 2 * sum(elements), max(elements)


def run(python: str, code: str, folder: Path, arm: str, threads: int) -> dict[str, float]:
    """Run one contestant in a process of its own."""
    command = [python, "-c", FRAME + code + END, str(folder), arm, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    out = folder / "out"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--folder", help="where the checkpoints are written (default: the temporary folder)")
    args = parser.parse_args()
    contestants = {"ours": (sys.executable, OURS), "plain": (sys.executable, PLAIN)}
    if args.mergekit:
        contestants["mergekit"] = (args.mergekit, PEER)
    found: dict[str, dict[str, list[dict[str, float]]]] = {arm: {name: [] for name in contestants} for arm in ARMS}
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        size, largest = write_models(Path(place), args.layers, args.hidden, args.vocabulary)
        run(*contestants["plain"], Path(place), "", args.threads)  # warms the page cache for all
        for _ in range(args.rounds):
            for arm, text in ARMS.items():
                for name, contestant in contestants.items():
                    found[arm][name].append(run(*contestant, Path(place), text, args.threads))
    median = {
        arm: {
            name: {key: statistics.median(row[key] for row in rows) for key in ("seconds", "peak")}
            for name, rows in by.items()
        }
        for arm, by in found.items()
    }
    ratios = {
        arm: {f"ours / {name}": by["ours"]["seconds"] / by[name]["seconds"] for name in contestants if name != "ours"}
        for arm, by in median.items()
    }
    allowed = 3 * 4 * largest + 350 * 2**20
    out = {
        "checkpoint_bytes": size,
        "largest_tensor_elements": largest,
        "median": median,
        "ratios": ratios,
        "peak_allowed": allowed,
        "peak_within": all(by["ours"]["peak"] <= allowed for by in median.values()),
        "kinds": {"seconds": "measured", "peak": "measured", "bytes": "counted"},
    }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
