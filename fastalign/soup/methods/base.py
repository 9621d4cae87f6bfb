"""Base classes of merge methods: parameters, checks, and the work for one tensor.

A method is one object (METHODS in this package): its class holds its parameters, its checks and its arithmetic.
`Method.step` says how a tensor is computed: weights for a weighted sum of the inputs, Tasks for a merge of sparse task
vectors, or a function that computes the tensor block by block in torch.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastalign import backend
from fastalign._base.errors import UserError
from fastalign.soup.checkpoint import Checkpoint, in_torch, read_bytes
from fastalign.soup.methods.settings import Places, Setting, Weights, parse
from fastalign.soup.steps import StreamError, Tasks, segment_of
from fastalign.soup.stream import dots, mix_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_INPUTS = 128  # of the kernel
Blocks = Callable[[], Iterator[Sequence["Tensor"]]]  # each K tensors of the next elements, as stored
Step = list[float] | Tasks | Blocks  # weights of the inputs are (K × inputs), row by row


# ---- kinds of parameters ----


@dataclass(frozen=True)
class Number:
    """A number that may vary by tensor, and with `each` by model."""

    default: float | None = None  # None: must be given
    least: float = -math.inf
    most: float = math.inf
    each: bool = False

    def read(self, name: str, value: Any, m: int) -> Setting | list[Setting]:
        bounds = {"least": self.least, "most": self.most}
        if not self.each:
            return parse(name, value, **bounds)
        if not isinstance(value, list | tuple):
            return [parse(name, value, **bounds)] * m
        if len(value) != m:
            raise UserError(f"{name} must be one for all or one for each of {m} models, got {len(value)}")
        return [parse(f"{name} of model {i}", one, **bounds) for i, one in enumerate(value)]


@dataclass(frozen=True)
class Fixed:
    """A value that is the same for all tensors and models. rule: a description of valid values."""

    default: Any
    rule: str
    holds: Callable[[Any], bool]

    def read(self, name: str, value: Any, m: int) -> Any:
        if not self.holds(value):
            raise UserError(f"{name} must be {self.rule}, got {reprlib.repr(value)}")
        return value


def flag(default: bool) -> Fixed:
    return Fixed(default, "true or false", lambda value: type(value) is bool)


def whole_number(default: int, least: int = 0, most: int = 2**63 - 1) -> Fixed:
    rule = f"a whole number within [{least}, {most}]"
    return Fixed(default, rule, lambda value: type(value) is int and least <= value <= most)


def word(default: str, *words: str) -> Fixed:
    return Fixed(default, f"one of {', '.join(words)}", lambda value: value in words)


Parameters = Mapping[str, Number | Fixed]


# ---- methods ----


@dataclass(frozen=True)
class Job:
    """A method's input: the checkpoints, the arguments, and how the outputs are stored."""

    models: Sequence[Checkpoint]
    base: Checkpoint | None
    weights: Weights
    values: Mapping[str, Any]  # the parameters, as Method.read gives them
    normalize: bool | None  # of a linear soup
    names: Sequence[str]  # of the tensors that are mixed
    stored: Mapping[str, str]  # their types in the outputs
    memory: int  # bytes for buffers

    @cached_property
    def places(self) -> Places:
        return Places(self.names)

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """The base, where there is one, then the models."""
        return (*(() if self.base is None else (self.base,)), *self.models)

    def weights_of(self, name: str) -> np.ndarray:
        """(K, m). Raises UserError if a model has none for this tensor."""
        return self.weights.at(name, self.places[name])

    def values_of(self, name: str) -> dict[str, Any]:
        """The parameters of one tensor. Raises UserError if no pattern of a parameter matches its name."""

        def one(argument: str, value: Any) -> Any:
            if isinstance(value, list):
                return [one(f"{argument} of model {i}", x) for i, x in enumerate(value)]
            number = value.at(name, self.places[name]) if isinstance(value, Setting) else value
            if number is None:
                raise UserError(f"{argument}: none of its patterns matches {name}")
            return number

        return {argument: one(argument, value) for argument, value in self.values.items()}

    def gram(self, name: str) -> np.ndarray:
        """Dot products of the models' tensors, or, with a base, of their differences from it: (m, m) float64."""
        paths = list(dict.fromkeys(one.path_of(name) for one in self.inputs))
        with ExitStack() as stack:
            files = {path: stack.enter_context(open(path, "rb")).fileno() for path in paths}
            segment = segment_of(self.inputs, name, files)
            try:
                products = dots(segment, centered=self.base is not None, threads=backend.threads())
            except StreamError as error:
                path = self.inputs[error.file].path_of(name)
                raise OSError(error.errno or 5, error.strerror, str(path)) from None
        return products if self.base is None else products[1:, 1:]


class Method:
    """base: "no", "yes" or "may". least, most: models. weights: "rows" if they must be given, "equal" if they may be
    omitted, "none"."""

    name: str
    base = "no"
    least = 1
    most = MAX_INPUTS
    weights = "rows"
    parameters: ClassVar[Parameters] = {}

    def check_inputs(self, m: int, *, with_base: bool) -> None:
        """Raises UserError if it does not take this number of models, or a base."""
        if self.base == "yes" and not with_base:
            raise UserError(f"{self.name} needs base, the model that the others were trained from")
        if m + with_base > MAX_INPUTS:
            raise UserError(f"at most {MAX_INPUTS} models can be mixed at once (base included), got {m + with_base}")
        if not self.least <= m <= self.most:
            wanted = f"{self.least}" if self.least == self.most else f"at least {self.least}"
            raise UserError(f"{self.name} takes {wanted} models, got {m}")

    def read(self, given: Mapping[str, Any] | None, m: int) -> dict[str, Any]:
        """Every parameter, from the user's values and the defaults.

        A number may be {pattern: number or numbers over the layers}; a per-model one may be a list with one entry per
        model. Raises UserError that names the parameter.
        """
        if given is not None and not isinstance(given, Mapping):
            raise UserError(f"parameters must map names to values, got {reprlib.repr(given)}")
        unknown = [name for name in given or () if name not in self.parameters]
        if unknown:
            takes = f"takes {', '.join(self.parameters)}" if self.parameters else "takes none"
            raise UserError(f"{reprlib.repr(unknown[0])} is no parameter of {self.name}, which {takes}")
        values = {}
        for name, kind in self.parameters.items():
            value = kind.default if given is None or name not in given else given[name]
            if value is None:
                raise UserError(f"{self.name} needs the parameter {name}")
            values[name] = kind.read(name, value, m)
        return values

    def check(self, job: Job) -> None:
        """Raises UserError for invalid numbers of a tensor, as far as this can be known before reading."""
        for name in job.names:
            job.weights_of(name), job.values_of(name)

    def step(self, job: Job, name: str) -> Step:
        """What is done for a tensor."""
        raise NotImplementedError


class WeightedSum(Method):
    """A weighted sum of the models, or of their task vectors and the base, with weights that may vary by tensor."""

    def rows(self, job: Job, name: str) -> np.ndarray:
        """(K, m): of the models, or of their task vectors where there is a base."""
        raise NotImplementedError

    def step(self, job: Job, name: str) -> Step:
        with np.errstate(invalid="ignore", over="ignore"):  # tensors with NaN or infinities give NaN
            rows = self.rows(job, name)
        # Task arithmetic (arXiv 2212.04089) as a sum of models: the base's weight is 1 minus theirs.
        if job.base is not None:
            rows = np.concatenate([1 - rows.sum(1, keepdims=True), rows], 1)
        return rows.ravel().tolist()


class ByTensor(Method):
    """A function of whole tensors: one tensor of every model is in memory."""

    def merge(self, base: Tensor, models: list[Tensor], values: Mapping[str, Any]) -> Tensor:
        """The output, computed in float32, or in float64 if a model or the output is stored so."""
        raise NotImplementedError

    def step(self, job: Job, name: str) -> Step:
        return whole_tensor(job, name, lambda base, models: [self.merge(base, models, job.values_of(name))])


def whole_tensor(job: Job, name: str, merge: Callable[[Any, list[Tensor]], list[Tensor]]) -> Blocks:
    """Computes a whole tensor at once; merge: from the base and the models to K outputs, in float32 or float64."""

    def blocks() -> Iterator[list[Tensor]]:
        if job.models[0][name].numel:
            shape = job.models[0][name].shape
            base, models, dtype = inputs_as(job, name, [b"".join(read_bytes(one, name)) for one in job.inputs])
            made = merge(None if base is None else base.view(shape), [one.view(shape) for one in models])
            yield [x if x.dtype == dtype else mix_tensors([x], [[1.0]], dtype)[0] for x in made]

    return blocks


def inputs_as(job: Job, name: str, data: Sequence[bytes]) -> tuple[Tensor | None, list[Tensor], torch.dtype]:
    """A tensor's values in the inputs, base and models, as flat tensors of the computing type; and its stored type."""
    import torch

    types, dtype = [in_torch(one[name].dtype) for one in job.inputs], in_torch(job.stored[name])
    wide = torch.float64 if torch.float64 in (dtype, *types) else torch.float32
    tensors = [torch.frombuffer(bytearray(x), dtype=of).to(wide) for x, of in zip(data, types, strict=True)]
    return (None, tensors, dtype) if job.base is None else (tensors[0], tensors[1:], dtype)
