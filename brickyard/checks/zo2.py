"""The claims of `zo2`: equal to ZO-SGD in memory, few bytes there, blocks moved once, fast enough, under a limit."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import t as student
from torch import Tensor, nn

from brickyard.checks._decoder import Decoder, next_token_loss, random_tokens, write_random
from brickyard.checks._steps import in_turn, mean_ratio
from brickyard.core import noise
from brickyard.core.files import check_safetensors
from brickyard.core.jobs import Job, Local
from brickyard.core.method import Claim
from brickyard.core.safetensors_check import TensorInfo
from brickyard.optim.zo import ZerothOrder
from brickyard.optim.zo2 import Config, Streamed, stream

SIZES = {"vocabulary": 2000, "width": 512, "layers": 8}  # 23 million parameters
BILLION_BYTES = {"vocabulary": 4000, "width": 1024, "layers": 26}  # 1.1 GB in float32
LR, SEED = 1e-6, 3
SLOWER = 1.3
SHIFT = 0.01  # of the final loss that half precision in the slow tier may cost


class Pair:
    """One model twice, with the same weights: in memory with ZO-SGD, and streamed from files in `folder`."""

    def __init__(
        self, folder: Path, sizes: dict[str, Any], *, lr: float = LR, seed: int = SEED, **options: Any
    ) -> None:
        self.lr, self.base = lr, folder / "base.safetensors"
        with torch.device("meta"):
            self.streamed_model, resident = Decoder(**sizes).eval(), Decoder(**sizes).eval()
        if not self.base.exists():
            write_random(self.base, self.streamed_model, seed=seed)
        names = self.streamed_model.block_names
        given = {"slots": options.pop("slots", 2)}
        self.streamed: Streamed = stream(
            self.streamed_model, self.base, folder / "run", Config(**given), seed=seed, blocks=names, **options
        )
        self.resident = resident.to_empty(device="cpu")
        self.resident.load_state_dict(load_file(self.base))
        self.optimiser = ZerothOrder(list(self.resident.parameters()), lr=lr, eps=Config().eps, seed=seed)

    def step_streamed(self, tokens_BT: Tensor) -> None:
        self.streamed.step(lambda: next_token_loss(self.streamed_model, tokens_BT), self.lr)

    def step_resident(self, tokens_BT: Tensor) -> None:
        self.optimiser.step(lambda: next_token_loss(self.resident, tokens_BT))

    def differing(self) -> list[str]:
        """Return the names of the tensors that are not equal bit for bit, as the file and the memory hold them now."""
        stored = load_file(self.streamed.weights)
        return [name for name, p in self.resident.named_parameters() if not torch.equal(stored[name], p)]


def exactness(claim: Claim, *, sizes: dict[str, Any] = SIZES, steps: int = 20, rows: int = 2, length: int = 32) -> Any:
    """Train both for `steps` steps and compare every weight after flush. Control: the same before flush."""
    with tempfile.TemporaryDirectory(prefix="brickyard-zo2-") as place:
        pair = Pair(Path(place), sizes, sync=False)
        for k in range(steps):
            tokens = random_tokens(sizes["vocabulary"], rows, length, seed=k)
            pair.step_streamed(tokens)
            pair.step_resident(tokens)
        before = len(pair.differing())
        pair.streamed.flush()
        differing = pair.differing()
        numbers = sum(p.numel() for p in pair.resident.parameters())
        tensors = len(list(pair.resident.parameters()))
        pair.streamed.tier.close()
    return {
        "inequality": "tensors that differ after flush = 0",
        "holds": not differing,
        "measured": len(differing),
        "low": len(differing),
        "high": len(differing),
        "detail": f"{len(differing)} of {tensors} tensors ({numbers:,} parameters, float32) differ after {steps} steps",
        "gate": None,
        "control": {
            "what": "the last update not carried out: compared before flush",
            "inequality": "every tensor differs",
            "measured": before,
            "low": before,
            "high": before,
            "destroyed": before == tensors,
        },
    }


def residency(claim: Claim, *, sizes: dict[str, Any] = SIZES, steps: int = 3, rows: int = 2, length: int = 32) -> Any:
    """Count the bytes of all weights that live in memory inside every block, and what was read and written.

    Control: as many slots as blocks, the whole model in memory, must exceed the bound.
    """
    found: dict[int, tuple[int, int, list[int], list[int]]] = {}
    for slots in (2, sizes["layers"]):
        noise.table(torch.device("cpu"))
        gc.collect()
        gc.freeze()  # what was there before is not looked at again
        try:
            with tempfile.TemporaryDirectory(prefix="brickyard-zo2-") as place:
                pair = Pair(Path(place), sizes, sync=False, slots=slots)
                known = {p.untyped_storage()._cdata for p in pair.resident.parameters()}
                largest = _watch(pair.streamed_model, known, block_bytes(sizes))
                for k in range(steps):
                    pair.step_streamed(random_tokens(sizes["vocabulary"], rows, length, seed=k))
                tier = pair.streamed.tier
                found[slots] = largest(), pair.streamed.fast_bytes, tier.reads, tier.writes
                tier.close()
        finally:
            gc.unfreeze()
    ends = 4 * (2 * sizes["vocabulary"] + 1) * sizes["width"]
    bound = ends + 3 * block_bytes(sizes)
    seen, said, reads, writes = found[2]
    once = reads == writes == [steps] * sizes["layers"]
    whole = found[sizes["layers"]][0]
    return {
        "inequality": "bytes of weights in memory <= embedding + head + 3 blocks; reads = writes = 1 a block and step",
        "holds": seen <= bound and said <= bound and once,
        "measured": seen,
        "low": seen,
        "high": seen,
        "detail": (
            f"{seen:,} bytes of tensors the size of weights lived inside a block at most ({said:,} by the streaming's "
            f"own count), bound {bound:,}, model {ends + sizes['layers'] * block_bytes(sizes):,}; each of "
            f"{sizes['layers']} blocks read {set(reads)} and written {set(writes)} times in {steps} steps"
        ),
        "gate": None,
        "control": {
            "what": "a slot for every block: the whole model stays in memory",
            "inequality": f"bytes > {bound}",
            "measured": whole,
            "low": whole,
            "high": whole,
            "destroyed": whole > bound,
        },
    }


def speed(
    claim: Claim,
    *,
    sizes: dict[str, Any] = SIZES,
    rounds: int = 10,
    rows: int = 4,
    length: int = 64,
    sync: bool = False,
) -> Any:
    """Time a step of both in turn. `sync` waits for the disk, which is then what is measured."""
    tokens = random_tokens(sizes["vocabulary"], rows, length)
    with tempfile.TemporaryDirectory(prefix="brickyard-zo2-") as place:
        pair = Pair(Path(place), sizes, sync=sync)
        steps: dict[str, Callable[[], Any]] = {
            "streamed": lambda: pair.step_streamed(tokens),
            "resident": lambda: pair.step_resident(tokens),
        }
        taken = in_turn(steps, rounds)
        pair.streamed.tier.close()
    ratio, low, high = mean_ratio(np.array(taken["streamed"]) / np.array(taken["resident"]))
    holds: Any = True if high <= SLOWER else False if low > SLOWER else "undecided"
    return {
        "inequality": f"streamed <= {SLOWER:g} resident",
        "holds": holds,
        "measured": ratio,
        "low": low,
        "high": high,
        "arms": {name: {"median_seconds": float(np.median(seconds))} for name, seconds in taken.items()},
        "detail": (
            f"a step on {rows} x {length} tokens takes {ratio:.2f} ({low:.2f} to {high:.2f}) times that in memory, "
            f"{np.median(taken['streamed']):.2f} s against {np.median(taken['resident']):.2f} s over {rounds} rounds, "
            f"{torch.get_num_threads()} threads, " + ("waiting for the disk" if sync else "files in the page cache")
        ),
        "gate": None,
        "control": None,
    }


def half_stored(
    claim: Claim, *, sizes: dict[str, Any] | None = None, steps: int = 400, seeds: int = 3, lr: float = 1e-3
) -> Any:
    """Train with float32 and with bfloat16 in the slow tier from the same weights on the same batches.

    Gate: training lowers the loss by at least 5 %, so that a change of 1 % could be seen.
    """
    sizes = sizes or {"vocabulary": 32, "width": 32, "layers": 4}
    test = random_tokens(sizes["vocabulary"], 64, 24, seed=10_000)
    losses, moved, start = {"same": [], "bfloat16": []}, {"same": 0, "bfloat16": 0}, []
    for seed in range(1, seeds + 1):
        for store in losses:
            with tempfile.TemporaryDirectory(prefix="brickyard-zo2-") as place:
                pair = Pair(Path(place), sizes, lr=lr, seed=seed, store=store, sync=False)
                if store == "same":
                    start.append(_loss(pair.streamed_model, test))
                tier = pair.streamed.tier
                before = tier.bytes_read + tier.bytes_written
                for k in range(steps):
                    pair.step_streamed(random_tokens(sizes["vocabulary"], 16, 24, seed=seed * 1000 + k))
                moved[store] += tier.bytes_read + tier.bytes_written - before
                losses[store].append(_loss(pair.streamed_model, test))
                tier.close()
    logs = np.log(np.array(losses["bfloat16"]) / np.array(losses["same"]))
    reach = student.ppf(0.975, seeds - 1) * logs.std(ddof=1) / np.sqrt(seeds)
    low, high = float(np.expm1(logs.mean() - reach)), float(np.expm1(logs.mean() + reach))
    fallen = 1 - float(np.mean(losses["same"]) / np.mean(start))
    halved = 2 * moved["bfloat16"] == moved["same"]
    if not halved or low > SHIFT or high < -SHIFT:
        holds: Any = False
    else:
        holds = True if low >= -SHIFT and high <= SHIFT else "undecided"
    if fallen < 0.05:
        holds = "set-up invalid"
    shift = float(np.expm1(logs.mean()))
    return {
        "inequality": f"bytes moved: half; |change of the final loss| <= {100 * SHIFT:g} %",
        "holds": holds,
        "measured": 100 * shift,
        "low": 100 * low,
        "high": 100 * high,
        "detail": (
            f"the final loss changes by {100 * shift:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f}) over {seeds} "
            f"seeds of {steps} steps; bytes moved {moved['bfloat16']:,} against {moved['same']:,} (counted); in "
            f"float32 the loss fell by {100 * fallen:.0f} %"
        ),
        "gate": {"inequality": "loss falls by >= 5 %", "measured": 100 * fallen, "holds": fallen >= 0.05},
        "control": None,
    }


def under_a_limit(claim: Claim, *, sizes: dict[str, Any] = BILLION_BYTES, steps: int = 2) -> Any:
    """Train streamed and in memory in processes that may use half the model's bytes beyond what an idle one uses.

    Control: without the limit, the training in memory does end, with the very same weights.
    """
    ends = 4 * (2 * sizes["vocabulary"] + 1) * sizes["width"]
    size = ends + sizes["layers"] * block_bytes(sizes)
    with tempfile.TemporaryDirectory(prefix="brickyard-zo2-") as place:
        with torch.device("meta"):
            model = Decoder(**sizes)
        write_random(Path(place) / "base.safetensors", model, seed=SEED)
        engine = Local(1)
        argument = {"folder": place, "sizes": sizes, "steps": steps}

        def trained(how: str, memory: int | None) -> Any:
            job = Job(
                key=how, function="brickyard.checks.zo2:trainee", argument={**argument, "how": how}, memory=memory
            )
            [outcome] = engine.run([job])
            return outcome

        idle = trained("idle", None).value["private_bytes"]
        limit = idle + size // 2
        streamed, resident = trained("streamed", limit), trained("resident", limit)
        free = trained("resident", None)
    equal = streamed.status == free.status == "done" and streamed.value["sha256"] == free.value["sha256"]
    survives, dies = streamed.status == "done", resident.status == "out-of-memory"
    return {
        "inequality": "streamed: done; in memory: out of memory",
        "holds": survives and dies,
        "measured": int(survives) - int(not dies),
        "low": int(survives) - int(not dies),
        "high": int(survives) - int(not dies),
        "detail": (
            f"a model of {size:,} bytes under RLIMIT_DATA {limit:,} ({idle:,} used by an idle process): streamed "
            f"{streamed.status} in {streamed.seconds:.0f} s ({steps} steps), in memory {resident.status}; "
            f"{streamed.reason or resident.reason}"
        ),
        "gate": None,
        "control": {
            "what": "no limit: the training in memory ends, with the same weights as the streamed one",
            "inequality": "equal bit for bit",
            "measured": int(equal),
            "low": int(equal),
            "high": int(equal),
            "destroyed": equal,
        },
    }


def trainee(argument: dict[str, Any]) -> dict[str, Any]:
    """Train in a process of its own, in one of the ways of `under_a_limit`, and return the digest of the weights."""
    folder, sizes = Path(argument["folder"]), argument["sizes"]
    if argument["how"] == "idle":
        return {"private_bytes": _private_bytes()}
    with torch.device("meta"):
        model = Decoder(**sizes).eval()
    base = folder / "base.safetensors"
    batches = [random_tokens(sizes["vocabulary"], 1, 9, seed=k) for k in range(argument["steps"])]
    if argument["how"] == "resident":
        model = model.to_empty(device="cpu")
        model.load_state_dict(load_file(base))
        optimiser = ZerothOrder(list(model.parameters()), lr=LR, eps=Config().eps, seed=SEED)
        for tokens in batches:
            optimiser.step(lambda tokens=tokens: next_token_loss(model, tokens))
        return {"sha256": _digest((name, _bytes(p)) for name, p in model.named_parameters())}
    made = stream(model, base, folder / "run", Config(), seed=SEED, blocks=model.block_names, sync=False)
    for tokens in batches:
        made.step(lambda tokens=tokens: next_token_loss(model, tokens), LR)
    made.flush()
    made.tier.close()
    # Not through a map: what torch maps counts against the limit.
    path = made.weights
    places = check_safetensors(path)
    with open(path, "rb") as file:
        stored = ((name, _part(file, places[name])) for name, _ in model.named_parameters())
        return {"sha256": _digest(stored), "fast_bytes": made.fast_bytes}


def block_bytes(sizes: dict[str, Any]) -> int:
    """Return the bytes of one block in float32: ten matrices of width^2 numbers and two norms."""
    return 4 * (10 * sizes["width"] ** 2 + 2 * sizes["width"])


def _loss(model: Decoder, tokens_BT: Tensor) -> float:
    with torch.no_grad():
        return float(next_token_loss(model, tokens_BT))


def _digest(parts: Iterable[tuple[str, bytes | memoryview]]) -> str:
    sha = hashlib.sha256()
    for name, part in parts:
        sha.update(name.encode())
        sha.update(part)
    return sha.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _part(file: BinaryIO, place: TensorInfo) -> bytes:
    file.seek(place.start)
    return file.read(place.end - place.start)


def _private_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1])


def _living() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and not x.is_meta]


def _watch(model: Decoder, known: set[int], block: int) -> Callable[[], int]:
    """Sum, inside every block, the storages that live and are as large as a matrix; return what gives the largest sum.

    Activations of these checks are far smaller than the smallest matrix.
    """
    smallest = block // 10
    seen = [0]

    def look(*_: Any) -> None:
        alive = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _living()}
        seen.append(sum(n for key, n in alive.items() if key not in known and n >= smallest))

    for layer in model.blocks:
        layer.register_forward_hook(look)
    return lambda: max(seen)
