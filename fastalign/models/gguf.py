"""GGUF model files: check the header, then convert once to a safetensors folder in the user's cache.

Reading a GGUF file through transformers dequantises every tensor, which takes tens of seconds; the folder loads
in one or two.
Layout of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastalign._base import outputs
from fastalign._base.cache import cache_dir
from fastalign._base.errors import UserError
from fastalign._base.files import atomic_write, check_input
from fastalign._base.quiet import one_line_errors, quiet_unless_terminal

# value types of the metadata: fixed sizes in bytes; 8 is a string and 9 an array
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
FORMAT = 1  # of the output of `convert`


def check(path: str | Path) -> None:
    """Walk the header of a GGUF file, every length checked against the file's size.

    Raises FileNotFoundError or UserError (one line): absent, not GGUF, truncated or inconsistent.
    """
    path = Path(path)
    check_input(path)
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).check()
        except _Bad as problem:
            raise UserError(f"{path}: not a GGUF file that can be read ({problem})") from None


def convert(path: str | Path) -> Path:
    """The safetensors folder (float32 weights, tokenizer) of a GGUF file, created on the first call, then reused.

    Its name contains a hash of the file's content and time and of the converter's versions, so a changed file is
    converted again. Raises FileNotFoundError, UserError (one line) or OSError (disk full).
    """
    path = Path(path).resolve()
    check(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:  # all of it: weights may change under the same header and time
        while block := file.read(1 << 20):
            digest.update(block)
    digest.update(f"{path.stat().st_mtime_ns} {FORMAT} {importlib.metadata.version('transformers')}".encode())
    folder = cache_dir() / f"{path.stem}-{digest.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        import accelerate  # noqa: F401  (transformers asks for both when it reads GGUF)
        import gguf  # noqa: F401
    except ImportError as error:
        rule = f"reading GGUF needs the package {error.name!r}: pip install {error.name}"
        raise UserError(f"{path}: {rule}") from None
    outputs.say(f"converting {path.name} once to {folder} (about half a minute)")
    with atomic_write(folder) as beside:
        _convert(path, beside)
    return folder


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_unless_terminal(), _without_bar(), one_line_errors(path):
        options = {"gguf_file": path.name, "dtype": torch.float32, "use_kernels": False}
        source = AutoModelForCausalLM.from_pretrained(path.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # save_pretrained refuses a model marked as quantised: move the weights into a plain one of its class
        config = copy.deepcopy(source.config)
        for mark in ("quantization_config", "_is_quantized"):
            vars(config).pop(mark, None)
        with torch.device("meta"):
            plain = type(source)(config)
        plain.load_state_dict(source.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = source.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers' reader draws one on anything, whatever its logging is told."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = vars(reader).get("tqdm")
    if bar is None:
        yield
        return
    vars(reader)["tqdm"] = lambda tensors, **_: tensors
    try:
        yield
    finally:
        vars(reader)["tqdm"] = bar


class _Bad(Exception):
    pass


class _Header:
    """Reads a header from start to end; `check` raises _Bad at the first inconsistency."""

    def __init__(self, file, size: int):
        self.file, self.size = file, size

    def check(self) -> None:
        if self.take(4) != b"GGUF":
            raise _Bad("the first four bytes are not 'GGUF'")
        version = self.number("<I")
        if version not in (2, 3):
            raise _Bad(f"version {version}; only 2 and 3, little-endian, are read")
        tensors, entries = self.number("<Q"), self.number("<Q")
        if tensors == 0 or tensors * 24 + entries * 13 > self.size:
            raise _Bad(f"it claims {tensors} tensors and {entries} metadata entries in {self.size} bytes")
        alignment = 32
        for _ in range(entries):
            key, kind = self.string(), self.number("<I")
            if key == b"general.alignment" and kind == 4:
                alignment = self.number("<I")
            else:
                self.skip_value(kind)
        ends = [self.tensor_end() for _ in range(tensors)]
        if alignment <= 0:
            raise _Bad(f"alignment {alignment}")
        start = -(-self.file.tell() // alignment) * alignment
        if start + max(ends) > self.size:
            raise _Bad(f"truncated: its tensors end at byte {start + max(ends)}, the file at {self.size}")

    def take(self, count: int) -> bytes:
        if self.file.tell() + count > self.size:
            raise _Bad(f"truncated: the header runs past the file's end at byte {self.size}")
        return self.file.read(count)

    def number(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in _SIZES:
            self.take(_SIZES[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY and depth < 4:
            item, count = self.number("<I"), self.number("<Q")
            if item in _SIZES:
                self.take(_SIZES[item] * count)
            else:
                for _ in range(count):  # each takes bytes, so `take` stops at a bogus count
                    self.skip_value(item, depth + 1)
        else:
            raise _Bad(f"unknown metadata type {kind}")

    def tensor_end(self) -> int:
        """The smallest possible end of this tensor, in bytes from the start of the tensor data."""
        name, dims = self.string(), self.number("<I")
        if not 0 < dims <= 8:
            raise _Bad(f"tensor {name[:40].decode(errors='replace')!r} has {dims} dimensions")
        elements = 1
        for _ in range(dims):
            elements *= self.number("<Q")
        block, size = _block(self.number("<I"))
        return self.number("<Q") + elements * size // block


def _block(kind: int) -> tuple[int, int]:
    """Weights per block and bytes per block of a tensor type."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        return GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ImportError:
        return 8, 1  # a lower bound; `convert` asks for the package anyway
    except (ValueError, KeyError):
        raise _Bad(f"unknown tensor type {kind}") from None
