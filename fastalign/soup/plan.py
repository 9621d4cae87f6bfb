"""A merge's plan, complete before the first byte is written: inputs, weights, the outputs' files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastalign
from fastalign import backend
from fastalign._base.errors import UserError
from fastalign._base.fingerprint import of_files, of_weights
from fastalign._base.units import counted, parse_bytes, size
from fastalign.soup.architecture import same_model
from fastalign.soup.checkpoint import FLOATS, Checkpoint, File, Shard, lay_out, parse_dtype
from fastalign.soup.methods import method_named
from fastalign.soup.methods.base import Job, Step
from fastalign.soup.methods.settings import Weights, to_json
from fastalign.soup.sidecar import Sidecar, sidecar_of
from fastalign.soup.stacks import Model, open_model
from fastalign.soup.steps import Segment, segment_of
from fastalign.soup.vocabulary import Embeddings, in_order_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

DEFAULT_MEMORY = "512MB"


@dataclass(frozen=True)
class Plan:
    """A valid merge. `inputs`: the base, if any, and the models; `weights`: as given, one row per output."""

    models: tuple[Checkpoint, ...]
    inputs: tuple[Checkpoint, ...]
    out: Path
    weights: list[list[Any]]
    single: bool  # weights were (m,): one model at `out` itself
    layout: tuple[Shard, ...]
    recipe: dict[str, Any]
    out_dtype: str | None
    memory_limit: int
    key: str = field(repr=False)
    step_of: Callable[[str], Step] = field(repr=False)  # what is done for a tensor
    sidecar: Sidecar = field(repr=False)
    notes: tuple[str, ...] = ()  # notes for the user
    embeddings: Embeddings | None = None  # if the vocabulary changes: files written first, which the inputs then read

    @property
    def target(self) -> Path:
        """`out`, or its target if it is a link."""
        return _target(self.out)

    @property
    def work(self) -> Path:
        """The work folder beside it."""
        return _work(self.out)

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """The inputs as stored."""
        return self.inputs if self.embeddings is None else self.embeddings.sources

    @property
    def sparse(self) -> bool:
        """Whether the steps are merges of task vectors, rather than weighted sums."""
        return "density" in self.recipe.get("parameters", ())

    @property
    def folders(self) -> list[str]:
        """Of each output, below `out`."""
        return [""] if self.single else [str(k) for k in range(len(self.weights))]

    @property
    def read_bytes(self) -> int:
        return sum(one[name].nbytes for shard in self.layout for name in shard.tensors for one in self.inputs)

    @property
    def written_bytes(self) -> int:
        return len(self.weights) * sum(shard.nbytes for shard in self.layout)

    def files_of(self, shard: Shard) -> list[str]:
        """A shard's file in each output, below `out`."""
        return [(Path(folder) / shard.file).as_posix() for folder in self.folders]

    def segment(
        self, name: str, inputs: Mapping[Path, int], files: Sequence[int], offsets: Sequence[int], weights: list[float]
    ) -> Segment:
        """A whole tensor, from every input's open file to each output's offset."""
        return segment_of(self.inputs, name, inputs)._replace(
            out_files=tuple(files), out_offsets=tuple(offsets), weights=weights
        )

    def metadata(self, k: int) -> dict[str, str]:
        """Of output k, for its files' headers."""
        return metadata_of(self.recipe | {"weights": self.weights[k]})

    def describe(self) -> list[str]:
        """A readable description: one line per input, then the output."""
        lines = [
            f"{one.name}: {counted(len(one.where), 'tensor')}, {size(one.nbytes)} in {counted(len(one.files), 'file')}"
            for one in self.sources
        ]
        tensors = sum(len(shard.tensors) for shard in self.layout)
        count = counted(len(self.weights), "model")
        lines.append(
            f"{self.out}: {count} by {self.recipe['method']}, {counted(tensors, 'tensor')}, "
            f"{counted(len(self.layout), 'file')} each, reads {size(self.read_bytes)}, writes "
            f"{size(self.written_bytes)}"
        )
        return [*lines, *self.notes]


def make(
    models: Sequence[Model],
    weights: ArrayLike | Sequence[float | Mapping[str, Any]] | None,
    out: str | os.PathLike[str],
    *,
    method: str = "linear",
    base: Model | None = None,
    parameters: Mapping[str, Any] | None = None,
    sidecar_from: str = "first",
    tokenizer: str | None = None,
    pad_to_multiple_of: int | None = None,
    chat_template: str | None = None,
    dtype: str | torch.dtype | None = None,
    normalize: bool | None = None,
    max_shard_size: int | str = "5GB",
    memory_limit: int | str | None = None,
    force: bool = False,
) -> Plan:
    """Check all arguments of `merge` and every input's header. Writes nothing."""
    if isinstance(models, str | os.PathLike) or not models:
        raise UserError(f"models must be a list of folders, files or hub names, got {models!r}")
    if Path(os.path.realpath(os.curdir)).is_relative_to(os.path.realpath(out)):
        raise UserError(f"out must be a new folder, got {os.fspath(out)!r}, which contains the current folder")
    kind = method_named(method, len(models), with_base=base is not None)
    values = kind.read(parameters, len(models))
    if weights is None and kind.weights == "rows":
        raise UserError(f"{method} needs weights, one for each model")
    if weights is not None and kind.weights == "none":
        raise UserError(f"{method} takes no weights: it computes them itself")
    if normalize is not None and method != "linear":
        raise UserError(f"normalize is for linear soups, not for {method}")
    rows = Weights([1 / len(models)] * len(models) if weights is None else weights, len(models))
    out_dtype = None if dtype is None else parse_dtype(dtype)
    limit = parse_bytes("memory_limit", DEFAULT_MEMORY if memory_limit is None else memory_limit)
    shard_size = parse_bytes("max_shard_size", max_shard_size)
    if pad_to_multiple_of is not None and not (type(pad_to_multiple_of) is int and pad_to_multiple_of >= 1):
        raise UserError(f"pad_to_multiple_of must be a whole number from 1 on, got {pad_to_multiple_of!r}")
    opened = tuple(open_model(model) for model in models)
    inputs = opened if base is None else (open_model(base), *opened)
    sidecar, vocabulary = sidecar_of(
        opened,
        None if base is None else inputs[0],
        sidecar_from=sidecar_from,
        tokenizer=tokenizer,
        multiple=pad_to_multiple_of,
        chat_template=chat_template,
    )
    names = same_model((*opened, *inputs[: len(inputs) - len(opened)]), force=force, tokens=tokenizer is None)
    sources, first, embeddings = inputs, opened[0], None
    if vocabulary is not None:
        inputs, embeddings = in_order_of(vocabulary, inputs, names, _work(out))
        opened = inputs[len(inputs) - len(opened) :]
    layout = lay_out(((name, out_type(first, name, out_dtype), opened[0][name].shape) for name in names), shard_size)
    stored = {name: shard.tensors[name].dtype for shard in layout for name in shard.tensors}
    mixed = [name for name in names if opened[0][name].dtype in FLOATS]
    job = Job(opened, None if base is None else inputs[0], rows, values, normalize, mixed, stored, limit)
    kind.check(job)
    recipe = {
        "fastalign": fastalign.__version__,
        "method": method,
        "normalize": normalize,
        "dtype": out_dtype,
        "models": [identity_of(one) for one in sources[len(sources) - len(opened) :]],
        "base": None if base is None else identity_of(sources[0]),
        "parameters": to_json(values),
    }
    key = key_of(
        [file for one in sources for file in one.files],
        sidecar,
        recipe=recipe,
        weights=rows.to_json(),
        single=rows.single,
        shard=shard_size,
        along=[sidecar.changes, sidecar.template, sidecar.tokens],
        rows=embeddings and embeddings.key,
    )
    notes = (vocabulary.note,) if vocabulary and vocabulary.note else ()
    return Plan(
        opened, inputs, Path(out), rows.to_json(), rows.single, tuple(layout), recipe, out_dtype, limit, key,
        partial(kind.step, job), sidecar, notes, embeddings,
    )  # fmt: skip


def key_of(files: Sequence[File], sidecar: Sidecar, **basis: Any) -> str:
    """A hash of everything that determines a merge's bytes, independent of paths: `basis`, weights by their files'
    headers and samples, the sidecar files, and the code version."""
    basis |= {
        "files": [[file.modified, file.identity, of_weights(file.path)] for file in files],
        "with": of_files(sidecar.sources()),
        "by": backend.native.active_isa() if backend.native_runs() else "torch",
    }
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


def _target(out: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(out))


def _work(out: str | os.PathLike[str]) -> Path:
    target = _target(out)
    return target.with_name(f".{target.name}.soup")


def metadata_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for a file's header: what was merged from what. `format` is what transformers asks for."""
    recipe = {"fastalign": fastalign.__version__, **recipe}
    return {"format": "pt", "fastalign": json.dumps(recipe, ensure_ascii=False, separators=(",", ":"))}


def out_type(first: Checkpoint, name: str, out_dtype: str | None) -> str:
    own = first[name].dtype
    return out_dtype if out_dtype is not None and own in FLOATS else own


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model's name without its path, and an identifier of its files: a hash of header and size. For a stack, of each
    piece."""
    if checkpoint.pieces:
        return {
            "layers": [
                {**identity_of(piece.model), "first": piece.first, "last": piece.last} for piece in checkpoint.pieces
            ]
        }
    local = os.path.exists(os.path.expanduser(checkpoint.name))
    name = Path(checkpoint.name).expanduser().resolve().name if local else checkpoint.name
    return {"name": name, "files": [file.identity for file in checkpoint.files]}
