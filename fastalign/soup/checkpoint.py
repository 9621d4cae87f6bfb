"""Checkpoints in safetensors files, single and sharded: reading and checking their headers, and layouts of new ones.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, the header (JSON), then the
tensors' bytes without gaps. A sharded checkpoint has an index that says which file holds which tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import reprlib
import resource
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastalign._base.errors import UserError
from fastalign._base.files import check_input

if TYPE_CHECKING:
    import torch

# ---- storage types ----


# The types that can be mixed, in the order of SoupType in csrc/soup.h.
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
WORDS = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SIZES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_NAMES = {word: name for name, word in WORDS.items()}
_SHORT = {
    "fp64": "float64",
    "double": "float64",
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "e4m3": "float8_e4m3fn",
    "fp8": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
}


def parse_dtype(dtype: str | torch.dtype) -> str:
    """The safetensors name of a floating-point type, from a torch.dtype or "bfloat16", "bf16", "fp8", ..."""
    word = str(dtype).removeprefix("torch.")
    name = _NAMES.get(_SHORT.get(word, word))
    if name not in FLOATS:
        raise UserError(f"dtype must be one of {', '.join(WORDS[name] for name in FLOATS)}, got {dtype!r}")
    return name


def in_torch(name: str) -> torch.dtype:
    """The torch dtype for a safetensors name."""
    import torch

    return getattr(torch, WORDS[name])


def of_torch(dtype: torch.dtype) -> str | None:
    """The safetensors name of a torch dtype, None if the format has none."""
    return _NAMES.get(str(dtype).removeprefix("torch."))


def code(name: str) -> int:
    """The native extension's code for a type that can be mixed."""
    return FLOATS.index(name)


# ---- contents of a file ----


MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 64
_BLOCK = 1 << 22  # bytes of a tensor read at once
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


class Tensor(NamedTuple):
    """One tensor in a file: `offset` counts from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class File:
    """One safetensors file. `tensors` in the order of their bytes; `identity` hashes the header and the file's size."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    size: int
    modified: int
    identity: str


class Piece(NamedTuple):
    """Layers first ... last - 1 of a model."""

    model: Checkpoint
    first: int
    last: int


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights. name: as given; folder: with its configuration and tokenizer, None for a single file.

    pieces: of a stack (stacks.py), whose tensors are in other models' files under other names.
    """

    name: str
    folder: Path | None
    files: tuple[File, ...]
    where: Mapping[str, int] = field(repr=False)  # tensor -> its file's number
    pieces: tuple[Piece, ...] = field(default=(), repr=False)

    def __getitem__(self, tensor: str) -> Tensor:
        return self.files[self.where[tensor]].tensors[tensor]

    def path_of(self, tensor: str) -> Path:
        """The file that contains it."""
        return self.files[self.where[tensor]].path

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.where

    @property
    def nbytes(self) -> int:
        return sum(self[name].nbytes for name in self)


def open_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint: a *.safetensors file, a folder of one or of shards, or a hub name.

    Raises FileNotFoundError or UserError, one line each: no weights, or an invalid file.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.suffix == ".safetensors":
        check_input(path)
        return _checkpoint(name, None, [read_header(path)])
    folder = path if path.is_dir() and any(path.glob("*.safetensors*")) else Path(_local(name))
    index = folder / INDEX
    if index.is_file() and not (folder / SINGLE).is_file():  # with both, transformers takes the single file
        return _sharded(name, folder, index)
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        came = f"{len(files)} *.safetensors files and no index" if files else "no safetensors weights"
        raise UserError(f"{name}: a model folder must hold {SINGLE} or {INDEX}, this one has {came}")
    return _checkpoint(name, folder, [read_header(files[0])])


def is_adapter(name: str | os.PathLike[str]) -> bool:
    """Whether this is a folder with a LoRA adapter (lora/) and no model."""
    return (Path(name).expanduser() / ADAPTER_CONFIG).is_file()


def read_header(path: Path) -> File:
    """The contents of a safetensors file, with every number checked against the file."""

    def bad(what: str) -> UserError:
        return UserError(f"{path}: not a valid safetensors file: {what}")

    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: must be a file, is a FIFO or a device")
        size, start = status.st_size, file.read(8)
        if len(start) < 8:
            raise bad(f"it has {size} bytes, the header's length alone takes 8")
        length = struct.unpack("<Q", start)[0]
        if length > MAX_HEADER:
            raise bad(f"its header claims {length:,} bytes, the format allows {MAX_HEADER:,}")
        if length > size - 8:
            raise bad(f"its header claims {length:,} bytes, the file has {size - 8:,}")
        header = file.read(length)
    entries = _parse(header, bad)
    metadata = entries.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise bad("__metadata__ must map strings to strings")
    if len(entries) > MAX_TENSORS:
        raise bad(f"it names {len(entries):,} tensors, at most {MAX_TENSORS:,} are read")
    begin, room = 8 + length, size - 8 - length
    tensors = {name: _tensor(name, entry, begin, room, bad) for name, entry in entries.items()}
    end, last = begin, None
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    for name, tensor in ordered:
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a gap after"
            raise bad(f"tensor {_short(name)!r} {what} {'the header' if last is None else repr(_short(last))}")
        end, last = tensor.offset + tensor.nbytes, name
    if end != size:
        raise bad(f"{size - end:,} bytes follow its last tensor")
    identity = hashlib.sha256(struct.pack("<Q", size) + header).hexdigest()
    return File(path, dict(ordered), metadata, size, status.st_mtime_ns, identity)


def _without_waiting(path: str, flags: int) -> int:
    """For `open`: a FIFO without a writer is opened without blocking."""
    return os.open(path, flags | os.O_NONBLOCK)


def _parse(header: bytes, bad: Callable[[str], UserError]) -> dict[str, Any]:
    """The header's JSON object, without duplicate names or numbers that JSON does not allow."""
    if not header.lstrip(b" \t\n\r").startswith(b"{"):
        raise bad("its header does not begin with '{'")
    if header.count(b"[") > 2 * MAX_TENSORS or header.count(b"{") > 2 * MAX_TENSORS:
        raise bad(f"its header names more than {MAX_TENSORS:,} tensors")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise bad(f"its header names {_short(twice)!r} twice")
        return entries

    def no_constant(text: str):
        raise bad(f"its header holds {text}")

    try:
        text = header.decode("utf-8")
        content = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
        for name in content:
            name.encode("utf-8")  # JSON can contain half a surrogate pair
    except UserError:
        raise
    except RecursionError:
        raise bad("its header is nested too deeply") from None
    except ValueError as error:
        raise bad(f"its header is not JSON in UTF-8 ({_short(str(error))})") from None
    return content


def _tensor(name: str, entry: Any, begin: int, room: int, bad: Callable[[str], UserError]) -> Tensor:
    if not (isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}):
        raise bad(f"tensor {_short(name)!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in SIZES):
        raise bad(
            f"tensor {_short(name)!r} has dtype {reprlib.repr(dtype)}, must be one of {', '.join(SIZES)} to be read "
            "here"
        )
    if not (isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(_is_count(x) for x in shape)):
        raise bad(f"tensor {_short(name)!r} has shape {reprlib.repr(shape)}, must be at most {MAX_DIMENSIONS} counts")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(x) for x in offsets)):
        raise bad(f"tensor {_short(name)!r} has data_offsets {reprlib.repr(offsets)}, must be two byte positions")
    first, last = offsets
    if not first <= last <= room:
        raise bad(f"tensor {_short(name)!r} lies at bytes {first:,} to {last:,} of {room:,}")
    needed = math.prod(shape) * SIZES[dtype]
    if last - first != needed:
        raise bad(f"tensor {_short(name)!r} takes {needed:,} bytes as {dtype} of shape {shape}, has {last - first:,}")
    return Tensor(dtype, tuple(shape), begin + first, last - first)


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**63


def _short(text: str, most: int = 80) -> str:
    """Short and on one line: the quoted text comes from an untrusted file."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _sharded(name: str, folder: Path, index: Path) -> Checkpoint:
    def bad(what: str) -> UserError:
        return UserError(f"{index}: not a valid index: {what}")

    if index.stat().st_size > MAX_HEADER:
        raise bad(f"it has {index.stat().st_size:,} bytes, at most {MAX_HEADER:,} are read")
    weight_map = _parse(index.read_bytes().lstrip(), bad).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values())):
        raise bad("weight_map must map tensors to files")
    names = sorted(set(weight_map.values()))
    for file in names:
        if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            raise bad(f"{_short(file)!r} is not the name of a *.safetensors file beside it")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: no such file, and {INDEX} names it")
    checkpoint = _checkpoint(name, folder, [read_header(folder / file) for file in names])
    lacking = next((tensor for tensor in weight_map if tensor not in checkpoint), None)
    unknown = next((tensor for tensor in checkpoint if tensor not in weight_map), None)
    if lacking is not None:
        raise bad(f"it names {_short(lacking)!r}, which no file holds")
    if unknown is not None:
        raise bad(f"it lacks {_short(unknown)!r}, which a file holds")
    moved = next((tensor for tensor in checkpoint if weight_map[tensor] != names[checkpoint.where[tensor]]), None)
    if moved is not None:
        raise bad(f"it looks for {_short(moved)!r} in {weight_map[moved]}, {names[checkpoint.where[moved]]} holds it")
    return checkpoint


def _checkpoint(name: str, folder: Path | None, files: list[File]) -> Checkpoint:
    where: dict[str, int] = {}
    for number, file in enumerate(files):
        twice = next((tensor for tensor in file.tensors if tensor in where), None)
        if twice is not None:
            raise UserError(
                f"{name}: tensor {_short(twice)!r} is in {files[where[twice]].path.name} and {file.path.name}"
            )
        where.update(dict.fromkeys(file.tensors, number))
    if not where:
        raise UserError(f"{name}: the checkpoint contains no tensors")
    return Checkpoint(name, folder, tuple(files), where)


def _local(name: str) -> str:
    """The local folder of a GGUF file, an alias or a hub name."""
    from fastalign.models.loading import resolve

    resolved = resolve(name)
    if os.path.isdir(resolved):
        return resolved
    from huggingface_hub import snapshot_download

    from fastalign._base.quiet import one_line_errors

    with one_line_errors(name, "no such local folder, and not available from the hub: "):
        return snapshot_download(resolved, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])


# ---- layouts of new checkpoints ----


@dataclass(frozen=True)
class Shard:
    """A file to be written: the tensors' (dtype, shape, offset in the body, bytes), in the order of their bytes."""

    file: str
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Length and header, padded so that the body begins with a page of the file."""
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        for name, tensor in self.tensors.items():
            offsets = [tensor.offset, tensor.offset + tensor.nbytes]
            entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(len(text) + 8) % 4096)
        if len(text) > MAX_HEADER:
            raise UserError(f"{self.file}: its header would take {len(text):,} bytes, the format allows {MAX_HEADER:,}")
        return struct.pack("<Q", len(text)) + text


def lay_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_shard_size: int) -> list[Shard]:
    """Shards for (name, dtype, shape) in order: each filled up to the limit; a larger tensor gets its own.

    Within a shard wide types come first, so that every tensor is aligned to its element size.
    """
    groups: list[list[tuple[str, str, tuple[int, ...], int]]] = []
    used = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * SIZES[dtype]
        if not groups or used + nbytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append((name, dtype, shape, nbytes))
        used += nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors_of_shard, offset = {}, 0
        for name, dtype, shape, nbytes in sorted(group, key=lambda entry: -SIZES[entry[1]]):
            tensors_of_shard[name] = Tensor(dtype, shape, offset, nbytes)
            offset += nbytes
        shards.append(Shard(file, tensors_of_shard))
    return shards


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """The index file's content."""
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in shard.tensors},
    }


# ---- its files, open ----


_OTHER_FILES = 256  # other files that a process has open


@contextmanager
def opened(checkpoints: Sequence[Checkpoint]) -> Iterator[dict[Path, int]]:
    """Every file's descriptor."""
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        for file in files_of(checkpoints):
            if file.path not in files:
                files[file.path] = os.open(file.path, os.O_RDONLY)
                stack.callback(os.close, files[file.path])
        yield files


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files as far as the system allows, if a merge needs it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"this merge has {count:,} files open at once, the system allows {hard:,}: make fewer soups at once"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def files_of(checkpoints: Sequence[Checkpoint]) -> Iterator[File]:
    for one in checkpoints:
        yield from one.files


def unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises UserError if a file has changed since its header was read."""
    for file in files_of(checkpoints):
        status = os.stat(file.path)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
            raise UserError(f"{file.path}: changed while it was read; there is no output")


def read_bytes(checkpoint: Checkpoint, name: str, block: int = _BLOCK) -> Iterator[bytes]:
    """A tensor's bytes, a block at a time."""
    tensor, path = checkpoint[name], checkpoint.path_of(name)
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            data = file.read(min(block, left))
            if not data:
                raise UserError(f"{path}: ended while it was read")
            left -= len(data)
            yield data


def mapped(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors as memory-mapped views of its files."""
    return {name: tensor for file in checkpoint.files for name, tensor in mapped_file(file).items()}


def mapped_file(file: File) -> dict[str, torch.Tensor]:
    """One file's tensors, likewise."""
    import torch

    tensors = {}
    with open(file.path, "rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, tensor in file.tensors.items():
        dtype = in_torch(tensor.dtype)
        if tensor.numel == 0:
            tensors[name] = torch.empty(tensor.shape, dtype=dtype)
        elif tensor.offset % dtype.itemsize:  # the format allows it, torch does not
            data = bytearray(memory[tensor.offset : tensor.offset + tensor.nbytes])
            tensors[name] = torch.frombuffer(data, dtype=dtype).view(tensor.shape)
        else:
            flat = torch.frombuffer(memory, dtype=dtype, count=tensor.numel, offset=tensor.offset)
            tensors[name] = flat.view(tensor.shape)
    return tensors
