"""The artificial crowd: which rows its students are fitted on, what they answer, and the cache of their answers.

    r_ji = 1 where student j, which was not fitted on item i, gives the label of item i

No student answers an item that it was fitted on, and no test row is ever touched. The answers lie in the cache as bits,
in a folder named after all that decides them, so that arms and seeds share one crowd; each is charged for it in full.

Shapes: I items (rows of train, then of validation), D channels, K classes, J students.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from scipy.special import log_softmax

from brickyard.core import files
from brickyard.core.errors import Refused, UnsafeFile, UsageError
from brickyard.core.locks import waiting
from brickyard.core.states import States
from brickyard.data._responses import Responses
from brickyard.data._students import CROWD, MOST_ROWS, Features, answers, fit_logistic, state_features, token_features

if TYPE_CHECKING:
    from brickyard.core.answers import Examples
    from brickyard.core.trial import Prepared

READS = ("states", "tokens")
_SEED = 0  # one crowd serves every seed of every arm
_FORMAT = 1  # of an entry in the cache; part of its key


@dataclass(frozen=True)
class Design:
    """Who is fitted on what: in each part, every student is fitted on rows `fit` and answers rows `asked`."""

    parts: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def cross_fit(cls, train: int, validation: int, folds: int, seed: int) -> Design:
        """Fit on all folds of train but one and ask that one; each validation row is asked by one of these fits."""
        if not 2 <= folds <= train:
            raise UsageError(f"folds={folds}: expected 2 to {train}, the number of training rows.")
        fold = np.empty(train, dtype=np.int64)
        fold[np.random.Generator(np.random.PCG64(seed)).permutation(train)] = np.arange(train) % folds
        held = train + np.arange(validation)
        return cls(
            tuple(
                (np.flatnonzero(fold != f), np.concatenate([np.flatnonzero(fold == f), held[f::folds]]))
                for f in range(folds)
            )
        )

    @classmethod
    def held_out(cls, train: int, validation: int, seed: int) -> Design:
        """Fit on one half of validation; ask train and the other half (the paper asks what it was fitted on too)."""
        mixed = train + np.random.Generator(np.random.PCG64(seed)).permutation(validation)
        half = validation // 2
        return cls(((np.sort(mixed[:half]), np.concatenate([np.arange(train), np.sort(mixed[half:])])),))

    @property
    def asked(self) -> np.ndarray:
        """The rows that are answered, ascending."""
        return np.sort(np.concatenate([asked for _, asked in self.parts]))


@dataclass(frozen=True)
class Material:
    """What students learn from: the rows of train, then of validation, as the arm will be trained on them.

    `seconds`: what reading them cost, the building of states in full wherever they came from; but not of states that
    the arm reads itself and is charged for already.
    """

    features: dict[str, Features]
    labels_I: np.ndarray
    train: int
    seconds: float
    digest: str

    @classmethod
    def of(
        cls, ready: Prepared, sets: Mapping[str, Examples], device: torch.device, reads: Sequence[str] = READS
    ) -> Material:
        """Run the frozen base over the rows of `ready` (through the cache of states) and read their tokens."""
        splits = [ready.encoded[name] for name in ("train", "validation")]
        features: dict[str, Features] = {}
        started, waited, seconds = time.monotonic(), 0.0, 0.0
        if "states" in reads:
            backbone = ready.base.backbone(ready.setting.attention).to(device)
            asked = time.monotonic()
            made = [
                States.of(
                    backbone,
                    rows,
                    base=ready.base.fingerprint,
                    attention=ready.setting.attention,
                    cache=ready.setting.cache,
                    pool="mean",
                )
                for rows in splits
            ]
            waited = time.monotonic() - asked
            features["states"] = state_features(made)
            paid = {getattr(examples, "path", None) for examples in sets.values()} - {None}
            seconds = sum(states.seconds for states in made if states.path not in paid)
        if "tokens" in reads and (tokens := token_features(splits)) is not None:
            features["tokens"] = tokens
        seconds += time.monotonic() - started - waited
        digest = hashlib.sha256("".join(rows.digest for rows in splits).encode())
        for name, values in features.items():
            digest.update(name.encode() + np.ascontiguousarray(values.data).tobytes())
        labels_I = np.concatenate([rows.labels.numpy() for rows in splits])
        return cls(features, labels_I, len(splits[0]), seconds, digest.hexdigest())

    @property
    def validation(self) -> int:
        """Rows of validation."""
        return len(self.labels_I) - self.train


def ask(
    material: Material, classes: int, design: Design, *, seed: int
) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """Fit every student as `design` says and return (right [J, asked rows], what is known of each student).

    Students who read what the material does not have stay away.
    """
    features, labels_I = material.features, material.labels_I
    crowd = [student for student in CROWD if student.reads in features]
    right_JI = np.zeros((len(crowd), len(labels_I)), dtype=bool)
    known = []
    for j, student in enumerate(crowd):
        x_ID = features[student.reads]
        started, fitted, seeds = time.monotonic(), [], []
        for part, (fit, asked) in enumerate(design.parts):
            seeds.append(int(np.random.SeedSequence([seed, j, part]).generate_state(1)[0]))
            count = max(1, round(student.share * min(len(fit), MOST_ROWS)))
            rows = fit[np.random.Generator(np.random.PCG64(seeds[-1])).permutation(len(fit))[:count]]
            given = answers(student, x_ID[rows], labels_I[rows], x_ID[asked], classes, seeds[-1])
            right_JI[j, asked] = given == labels_I[asked]
            fitted.append(count)
        known.append(
            {
                "name": student.name,
                **asdict(student),
                "fitted_on": fitted,
                "seeds": seeds,
                "accuracy": float(right_JI[j, design.asked].mean()),
                "seconds": time.monotonic() - started,
            }
        )
    return right_JI[:, design.asked], tuple(known)


def cross_fitted_losses(material: Material, classes: int, design: Design, steps: int) -> np.ndarray:
    """Return -log p(y_i) [I] under logistic students on the states, not fitted on row i; NaN where none was asked."""
    x_ID, labels_I = material.features["states"], material.labels_I
    loss_I = np.full(len(labels_I), np.nan)
    for fit, asked in design.parts:
        v_DK, b_K = fit_logistic(x_ID[fit], labels_I[fit], classes, steps)
        log_QK = log_softmax(x_ID[asked] @ v_DK + b_K, axis=1)
        loss_I[asked] = -log_QK[np.arange(len(asked)), labels_I[asked]]
    return loss_I


def ask_crowd(
    ready: Prepared, sets: Mapping[str, Examples], device: torch.device, *, held_out: bool, folds: int
) -> Responses:
    """Return the answers of every student to the rows of train and validation, from the cache or by asking.

    held_out: fit on one half of validation and ask the other, in place of cross-fitting over `folds` of train.
    """
    material = Material.of(ready, sets, device)
    train, validation = material.train, material.validation
    if held_out and validation < 10:
        raise Refused(f"a held-out crowd halves validation, which has {validation} rows; use crowd=cross-fit.")
    design = (
        Design.held_out(train, validation, _SEED) if held_out else Design.cross_fit(train, validation, folds, _SEED)
    )
    key = {
        "format": _FORMAT,
        "material": material.digest,
        "students": [asdict(student) for student in CROWD],
        "design": ["held-out"] if held_out else ["cross-fit", folds],
        "seed": _SEED,
        "threads": torch.get_num_threads(),
        "versions": [np.__version__, scipy.__version__, torch.__version__],
    }

    def made() -> tuple[np.ndarray, tuple[dict[str, Any], ...], float]:
        started = time.monotonic()
        right_JI, students = ask(material, ready.task.width, design, seed=_SEED)
        return right_JI, students, time.monotonic() - started

    right_JI, students, seconds = _cached(key, made, len(design.asked)) if ready.setting.cache else made()
    names = tuple(f"train-{i}" if i < train else f"validation-{i - train}" for i in design.asked.tolist())
    return Responses(students, names, right_JI, {"seconds": material.seconds + seconds, "data": data_digest(ready)})


def data_digest(ready: Prepared) -> str:
    """Return the digest of the rows, with their labels, that items stand for."""
    parts = "".join(ready.encoded[name].digest for name in ("train", "validation"))
    return hashlib.sha256(parts.encode()).hexdigest()


Crowd = tuple[np.ndarray, tuple[dict[str, Any], ...], float]


def _cached(key: dict[str, Any], make: Callable[[], Crowd], items: int) -> Crowd:
    folder = files.cache_folder() / "crowd"
    folder.mkdir(exist_ok=True)
    entry = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    with waiting(entry.with_suffix(".lock")):
        if (found := _opened(entry, items)) is not None:
            return found
        right_JI, students, seconds = make()
        with files.complete_folder(entry) as temporary:
            bits = torch.from_numpy(np.packbits(right_JI, axis=1))
            files.write_tensors(temporary / "right.safetensors", {"right": bits})
            about = {"students": students, "seconds": seconds, "key": key}
            about["sha256"] = files.sha256(temporary / "right.safetensors")
            files.write_json(temporary / "crowd.json", about)
        return right_JI, students, seconds


def _opened(entry: Path, items: int) -> Crowd | None:
    """Read an entry that is there; a damaged one is left to be made again, with a warning."""
    if not (entry / "crowd.json").is_file():
        return None
    try:
        about = files.read_json(files.plain_file(entry, "crowd.json"))
        place = files.plain_file(entry, "right.safetensors")
        bits = files.read_tensors(place, expect_sha256=about["sha256"])["right"].numpy()
        right_JI = np.unpackbits(bits, axis=1, count=items).astype(bool)
        return right_JI, tuple(about["students"]), about["seconds"]
    except (UnsafeFile, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"the cached crowd in {entry} is damaged ({error}); it is asked again.", stacklevel=3)
        return None
