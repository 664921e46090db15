"""From a base's name to files that are safe to use: find the folder, check its weights, stage its tokenizer.

Nothing in a folder may run code, reach the network or name a file outside of it. So transformers never sees the folder:
it gets a configuration cleaned by `base_config`, tensors checked by `check_safetensors`, and a temporary folder
(`staged`) that holds only the tokenizer's or image processor's own files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from brickyard.core.errors import BadBase, DiskFull, UnsafeFile
from brickyard.core.files import cache_folder, check_safetensors, plain_file, read_json, write_json
from brickyard.core.safetensors_check import PICKLES, TensorInfo, refuse_pickle

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

# What a hub repository is asked for: no pickles, no other formats, no subfolders.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(@[\w./-]{1,96})?")

# Keys of a JSON configuration that choose code, files, repositories or devices instead of describing what it is about.
STEERING = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "name_or_path",
        "base_model_name_or_path",
        "custom_pipelines",
        "custom_generate",
        "transformers_weights",
        "attn_implementation",
        "experts_implementation",
        "fusion_config",
        "distributed_config",
        "kernel_config",
        "use_kernels",
        "adapter_kwargs",
        "gguf_file",
        "cache_dir",
        "proxies",
        "token",
        "use_auth_token",
        "revision",
        "code_revision",
        "subfolder",
        "local_files_only",
        "device_map",
        "device",
        "torchscript",
    }
)
# In the small configuration files of tokenizers and image processors, besides whatever names a file.
_SIDE = STEERING | {"init_inputs", "processor_class", "vocab_files_names", "pretrained_vocab_files_map"}
_SIDE_CONFIGS = frozenset(
    {"tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json", "processor_config.json"}
)
_SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".codes", ".tiktoken"})
_NOT_STAGED = frozenset({CONFIG, INDEX, ADAPTER, "generation_config.json"})


def locate(spec: str, *, trust_remote_code: bool = False) -> Path:
    """Return the folder that `spec` names: a path, `embedded:NAME`, or a hub id (`org/name`, `org/name@revision`).

    Only a hub id touches the network. What looks like a path, or begins with a folder that exists here, is never taken
    for one. Raises BadBase, or UnsafeFile where a pickle is offered.
    """
    if spec.startswith("embedded:"):
        from brickyard.embedded import base_folder

        return base_folder(spec.removeprefix("embedded:"))
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        refuse_pickle(path)
        raise BadBase(f"base {spec!r} is a file; give the folder that holds {CONFIG} and {WEIGHTS}.")
    pieces = Path(spec).parts
    looks_like_path = not pieces or spec[:1] in "./~" or "\\" in spec or not _HUB_ID.fullmatch(spec)
    if looks_like_path or (len(pieces) > 1 and Path(pieces[0]).exists()):
        raise BadBase(
            f"base {spec!r} is no folder here; expected a folder with {CONFIG} and {WEIGHTS}, a hub id such as "
            "org/name, or embedded:NAME (embedded:minilm)."
        )
    return _download(spec, trust_remote_code)


def _download(spec: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name, _, revision = spec.partition("@")
    wanted: list[str] = [*_WANTED, "*.py"] if trust_remote_code else [*_WANTED]
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"], library_name="brickyard"
        )
    except GatedRepoError as error:
        raise BadBase(
            f"base {spec!r} is gated on the hub; ask for access there, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BadBase(f"base {spec!r} is neither a folder here nor a model on the hub; check the spelling.") from error
    except Exception as error:  # every transport has exceptions of its own
        raise BadBase(
            f"base {spec!r} is not a folder here, is not in the hub's cache, and the hub cannot be reached "
            f"({type(error).__name__}); go online, or give a folder or embedded:NAME."
        ) from error
    return Path(folder)


def weight_files(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Return for each tensor of a base, sorted by name, its file and where it lies there; every header is checked.

    Raises UnsafeFile where a file is unsafe or the index and the shards disagree, BadBase where there are no weights.
    """
    if os.path.lexists(folder / WEIGHTS):
        path = plain_file(folder, WEIGHTS)
        found = {name: (path, info) for name, info in check_safetensors(path).items()}
    elif os.path.lexists(folder / INDEX):
        found = _shards(folder, plain_file(folder, INDEX))
    else:
        raise _no_weights(folder)
    wide = next((name for name, (_, info) in found.items() if info.dtype in ("F64", "C64")), None)
    if wide is not None:
        raise BadBase(
            f"{found[wide][0]}: tensor {wide!r} is {found[wide][1].dtype}; models here compute in float32; "
            "convert the base first if that is what you want."
        )
    return dict(sorted(found.items()))


def _shards(folder: Path, index: Path) -> dict[str, tuple[Path, TensorInfo]]:
    known = read_json(index)
    places = known.get("weight_map") if isinstance(known, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UnsafeFile(f"{index}: expected weight_map, from tensor names to files of this folder")
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for name in sorted(set(places.values())):
        refuse_pickle(folder / name)
        path = plain_file(folder, name)
        for tensor, info in check_safetensors(path).items():
            if places.get(tensor) != name:
                where = f"says {places[tensor]}" if tensor in places else "does not name it"
                raise UnsafeFile(f"{path}: holds tensor {tensor!r}, but {index.name} {where}")
            found[tensor] = (path, info)
    missing = sorted(set(places) - set(found))
    if missing:
        raise UnsafeFile(f"{index}: names {len(missing)} tensors that no shard holds, such as {missing[0]!r}")
    return found


def _no_weights(folder: Path) -> BadBase | UnsafeFile:
    names = sorted(os.listdir(folder))
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if pickles:
        try:
            refuse_pickle(folder / pickles[0])
        except UnsafeFile as error:
            return error
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    seen = f" (it has {', '.join(others[:3])})" if others else ""
    return BadBase(f"{folder} has neither {WEIGHTS} nor {INDEX}{seen}; expected a folder written by save_pretrained.")


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder with what a tokenizer or image processor is made of, and nothing else of `folder`.

    Vocabularies are linked; their small configuration files are written anew, without what names code or files.
    """
    with tempfile.TemporaryDirectory(prefix="brickyard-") as name:
        stage = Path(name)
        for entry in sorted(os.listdir(folder)):
            suffix = Path(entry).suffix.lower()
            if suffix not in _SIDE_SUFFIXES or entry in _NOT_STAGED or (folder / entry).is_dir():
                continue
            path = plain_file(folder, entry)
            if entry in _SIDE_CONFIGS:
                known = read_json(path, constants=True)
                if not isinstance(known, dict):
                    raise BadBase(f"{path}: expected a JSON object")
                (stage / entry).write_text(json.dumps(_side_cleaned(known)), encoding="utf-8")
            else:
                (stage / entry).symlink_to(path.resolve())
        yield stage


def _side_cleaned(value: Any) -> Any:
    if isinstance(value, list):
        return [_side_cleaned(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _side_cleaned(inner)
        for key, inner in value.items()
        if key not in _SIDE and not key.endswith(("_file", "_files"))
    }


def fingerprint(weights: dict[str, tuple[Path, TensorInfo]], architecture: dict[str, Any]) -> str:
    """Return the SHA-256, in hex, over `architecture` and the sorted tensors' names, dtypes, shapes and bytes.

    It is the same however the tensors are spread over files and whatever these are called. Remembered in the cache for
    as long as size, times and inode of every file stay the same.
    """
    files = sorted({path for path, _ in weights.values()})
    stats = [(str(path.resolve()), path.stat()) for path in files]
    identity = {
        "architecture": architecture,
        "files": [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats],
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    remembered = cache_folder() / "fingerprints" / f"{key}.json"
    with contextlib.suppress(OSError, UnsafeFile):
        known = read_json(remembered)
        if isinstance(known, dict) and re.fullmatch("[0-9a-f]{64}", str(known.get("fingerprint"))):
            return str(known["fingerprint"])
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, (path, info) in sorted(weights.items()):
        digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
        with open(path, "rb") as file:
            file.seek(info.start)
            left = info.end - info.start
            while left:
                chunk = file.read(min(left, 2**20))
                if not chunk:
                    raise UnsafeFile(f"{path}: cut short while it was read; fetch or write it again")
                digest.update(chunk)
                left -= len(chunk)
    found = digest.hexdigest()
    with contextlib.suppress(OSError, DiskFull):  # only slower next time
        write_json(remembered, {"fingerprint": found})
    return found
