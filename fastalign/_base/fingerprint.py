"""Identifies a model by content, not by path, so that results of another model with the same name are not reused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fastalign._base.files import read_json
from fastalign._base.work_folder import sha256

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_REST = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")  # configuration, tokenizer, remote code
_WHOLE = 1 << 20  # bytes of weights that are hashed whole
_PAGES, _PAGE = 256, 4096  # of larger files: so many, evenly spaced


def of_model(name: str | os.PathLike[str]) -> str:
    """A hash of a local folder's or file's content; for a model from the hub, its name and, if known, its commit.

    Weights of more than 1 MB are hashed by size, their first megabyte and 256 pages spread over them, which takes
    milliseconds; all other files of the model are hashed completely. An adapter's base is included. Raises UserError if
    an adapter's configuration is not JSON.
    """
    path = Path(os.fspath(name).removeprefix("vllm:")).expanduser()
    base = base_of(path)
    parts = [_of_one(path, name), *([_of_one(Path(base).expanduser(), base)] if base else [])]
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _of_one(path: Path, name: str | os.PathLike[str]) -> str:
    if not path.exists():
        return f"{name}@{_commit(os.fspath(name))}"
    if path.is_file() and path.suffix not in (*_WEIGHTS, *_REST):
        return sha256(path)
    return of_files(path.iterdir() if path.is_dir() else [path])


def base_of(folder: Path) -> str | None:
    """The model that a folder's adapter is for; None for anything else. Raises UserError if its configuration is not
    JSON."""
    config = folder / "adapter_config.json"
    settings = read_json(config) if config.is_file() else {}
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    return base if isinstance(base, str) and base else None


def of_files(paths: Iterable[Path]) -> str:
    """A hash of the names and contents of those files that a model is loaded from."""
    digests = {}
    for path in paths:
        if path.suffix in (*_WEIGHTS, *_REST) and path.is_file():
            digests[path.name] = of_weights(path) if path.suffix in _WEIGHTS else sha256(path)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def of_weights(path: Path) -> str:
    """A hash of a weights file: complete up to 1 MB, else of its size, first megabyte and evenly spaced pages."""
    size = path.stat().st_size
    if size <= _WHOLE:
        return sha256(path)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb", buffering=0) as file:
        digest.update(os.pread(file.fileno(), _WHOLE, 0))  # a header, most often all of it
        for i in range(_PAGES):
            digest.update(os.pread(file.fileno(), _PAGE, (size - _PAGE) * i // (_PAGES - 1)))
    return digest.hexdigest()


def _commit(name: str) -> str:
    """The commit of the name's snapshot in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid hub name, such as a server's address
        return ""
    return Path(cached).parent.name if isinstance(cached, str) else ""
