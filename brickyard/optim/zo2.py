"""ZO2: zeroth-order fine-tuning of all weights, of which two or three blocks at a time are in fast memory.

Plain ZO-SGD on a chain of blocks W_0 .. W_N+1 (embedding, N equal blocks, head), reorganised so that every block comes
to the fast tier once a step, although a step needs two forwards and an update. Step k, block i in order:

    W_i <- c W_i + (c eps - lr p_k-1) z_i(k-1) deferred update of the step before; c = 1 - lr wd (biases, norms: c = 1)
    W_i += eps z_i(k);     h+ <- block_i(h+)   h+, h- [batch, tokens, width]: two streams of activations
    W_i -= 2 eps z_i(k);   h- <- block_i(h-)   W_i goes back to the slow tier while block i+1 computes
    p_k = (L+ - L-) / (2 eps)                  z_i(k) = noise(key(seed, k), parameter): counted, not drawn in order

`flush` carries out the last update. An update that waits until its weight is read next commutes with all that lies
between, so the weights equal those of ZO-SGD in memory bit for bit (same types, same kernels).

Two slow tiers. `full + zo2` on the training loop: host memory for the weights, an accelerator for the blocks under way.
`stream`, for a model larger than memory: two files take turns, so that a crash at any write loses the step under way
and nothing else, and the result is an ordinary safetensors file. The two forwards are one model's own, run in lockstep
by hooks: no model class is written anew. Activations are there twice; so is, within a step, a tied embedding.

Source: Wang et al., "ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with Limited GPU
Memory", COLM 2025. Headline claim: OPT-175B in 18 GB of GPU memory, with the accuracy and nearly the speed of MeZO.
Differences: decay defaults to 0 (released: 0.1, far too strong beside a zeroth-order lr); three passes of noise a step
instead of four. Left out: fp8 storage, momentum, first-order layers; bfloat16 storage is offered for files only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from brickyard.core.files import sha256
from brickyard.core.method import Claim, Record
from brickyard.optim._slow_tier import FileTier, sources_of
from brickyard.optim._streaming import Chain, Pending, Streamed, Trained
from brickyard.optim._zo_guards import check_eps, check_slots

if TYPE_CHECKING:
    from brickyard.core.attached import Attached
    from brickyard.core.loop import Step, Training
    from brickyard.core.task import Task

RECORD = Record(
    name="zo2",
    family="optim",
    title="ZO-SGD of all weights with blocks streamed from host memory or a file",
    paper="ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models, COLM 2025, arXiv 2503.12668",
    slot="step",
    search={"lr": (1e-7, 1e-6, 1e-5, 1e-4)},
    training={"lr": 1e-6, "wd": 0.0, "schedule": "constant", "warmup": 0.0},
    claims=(
        Claim(
            text="After flush every parameter equals that of ZO-SGD in memory, bit for bit.",
            measure="exactness",
            kind="counted",
        ),
        Claim(
            text="At most embedding, head and three blocks are in the fast tier; each block is read and written once.",
            measure="residency",
            kind="counted",
        ),
        Claim(
            text="A step takes at most 1.3 times that of ZO-SGD in memory, with the files in the page cache.",
            measure="speed",
        ),
        Claim(
            text="Half precision in the slow tier halves the bytes moved and changes the final loss by less than 1 %.",
            measure="half_stored",
        ),
        Claim(
            text="A model of 1 GB trains under a memory limit under which the same training in memory dies.",
            measure="under_a_limit",
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the estimate and of the traffic."""

    eps: float = 1e-3
    """smoothing radius: how far the two forwards are from the weights, along a Gaussian of unit variance"""
    slots: int = 2
    """blocks in the fast tier at once; one of them is on its way while another computes"""
    overlap: bool = True
    """copy blocks while others compute; false waits for every copy, and then needs one slot only"""

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_slots(self.slots, self.overlap)

    @property
    def backward(self) -> bool:
        """Nothing trains by backpropagation."""
        return False


def chain_of(model: nn.Module) -> Chain:
    """Cut a model into its repeated blocks and what stands around them; Refused where it has no such blocks."""
    from brickyard.core.roles import blocks  # brings transformers, which models whose blocks are named do without

    names = {id(module): name for name, module in model.named_modules()}  # an adapter may have wrapped the model
    return Chain.of(model, [names[id(block)] for _, block in blocks(model)])


def stream(
    model: nn.Module,
    weights: Path | Sequence[Path],
    folder: Path,
    config: Config,
    *,
    seed: int,
    blocks: Sequence[str] | None = None,
    decay: float = 0.0,
    store: Literal["same", "bfloat16"] = "same",
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    sync: bool = True,
    device: torch.device | str = "cpu",
) -> Streamed:
    """Train all of a model whose blocks stay in files; `step`, `flush` and `steps` of what is returned do it.

    Args:
        model: with parameters on the meta device (buffers not), in evaluation mode; it is changed in place: forwards
            of it read the blocks from the files from now on.
        weights: the safetensors file or files with its values, by the model's own names; they stay as they are.
        folder: holds the run: two files of the model's size and a state. An earlier run in it goes on, where it had the
            same options, trained the same parameters and began with the same bytes of `weights`, which are read for it.
        blocks: names of the repeated blocks; None finds them.
        decay: weight decay of the matrices; biases and norms have none.
        store: "bfloat16" halves the bytes moved. Plain rounding then loses updates below half a unit in the last
            place, which `rounding="stochastic"` keeps on average; either way the result is not that of `store="same"`.
        sync: wait for the disk at every step, so that a machine that loses power, and not only a process that dies,
            loses no more than the step under way.

    `weights` of what is returned is the file that counts: after `flush` an ordinary checkpoint (no buffers).
    Raises Refused for a model that is no chain, and what `FileTier` raises, such as Changed for a folder that holds
    another run.
    """
    place = torch.device(device)
    chain = chain_of(model) if blocks is None else Chain.of(model, blocks)
    trained = {
        name: Trained(i, decay=decay if p.ndim > 1 else 0.0)
        for i, (name, p) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad)
    }
    layout = chain.layout(torch.bfloat16 if store == "bfloat16" else None)
    paths = [weights] if isinstance(weights, Path) else weights
    stored = sources_of(paths)
    stored = {chain.aliases.get(name, name): where for name, where in stored.items()}
    chain.off_meta(model, place)
    identity = {"seed": seed, "eps": config.eps, "decay": decay, "store": store, "rounding": rounding}
    # The noise of a parameter goes by its number among the trained ones, and what is frozen is never written back.
    identity |= {
        "trained": {name: how.decay for name, how in trained.items()},
        "weights": " ".join(sorted(sha256(path) for path in paths)),
    }
    tier = FileTier(folder, layout, chain.ends_block, stored, identity, device=place, rounding=rounding, sync=sync)
    pending = tier.state["pending"]
    made = Streamed(
        chain,
        tier,
        trained=trained,
        seed=seed,
        eps=config.eps,
        device=place,
        slots=config.slots,
        overlap=config.overlap,
        ends=tier.read_ends(),
        done=tier.state["step"],
        pending=None if pending is None else Pending(**pending),
    )
    made.skipped, made.in_a_row = tier.state.get("skipped", 0), tier.state.get("in_a_row", 0)
    return made


def step(config: Config, attached: Attached, training: Training, *, rows: int, task: Task) -> Step:
    """Move the blocks of the attached model to host memory and return the step that trains it from there."""
    from brickyard.optim._streamed_step import StreamedStep  # the loop, which streaming from files does without

    return StreamedStep(chain_of(attached.model), attached, training, task, **asdict(config))
