"""Checks sampling settings without a model or torch, before anything slow starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypedDict

from fastalign._base.errors import UserError
from fastalign._base.units import parse_bytes

KNOBS = ("batch_size", "memory_limit")  # of speed and memory: what is drawn does not depend on them
_ANY = 2**63 - 1
_INTEGERS = (
    ("n", 1, _ANY),
    ("first", 0, _ANY),
    ("max_new_tokens", 1, _ANY),
    ("top_k", 0, _ANY),
    ("seed", 0, 2**64 - 1),
)


@dataclass(frozen=True)
class SamplingSettings:
    """Checked settings of `Sampler.sample`: all that its candidates depend on besides model and prompts. Raises
    UserError.

    stop: a string, strings or None; stored as a list. first: the index of the first candidate.
    """

    n: int
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: Any = None
    seed: int = field(kw_only=True)
    first: int = 0

    def __post_init__(self) -> None:
        for name, least, most in _INTEGERS:
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole or not least <= int(value) <= most:
                bounded = most != _ANY or (whole and int(value) > most)
                limit = f"in {least}..2^{most.bit_length()}-1" if bounded else f"at least {least}"
                raise UserError(f"{name} must be an integer, {limit}, got {value!r}")
            object.__setattr__(self, name, int(value))
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be at least 0 (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1], got {self.min_p}")
        stop = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        if not isinstance(stop, (list, tuple)) or any(not isinstance(text, str) or not text for text in stop):
            raise UserError(f"stop must be a string or strings, none empty, got {self.stop!r}")
        object.__setattr__(self, "stop", list(stop))

    @property
    def truncates(self) -> bool:
        """Whether some tokens may not be drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    def drawing(self) -> dict[str, Any]:
        """As arguments of `ops.sample_tokens`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> SamplingSettings:
        """The sampling settings among a job's arguments."""
        lacking = [one.name for one in fields(cls) if one.default is MISSING and one.name not in job]
        if lacking:
            raise TypeError(f"missing required keyword arguments: {', '.join(lacking)}")
        return cls(**{one.name: job[one.name] for one in fields(cls) if one.name in job})


class SamplingOptions(TypedDict, total=False):
    """The options that functions pass on to `Sampler.sample`, which describes them."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: str | Sequence[str] | None
    chat: bool | str
    batch_size: int | None
    memory_limit: int | str | None
    tools: Sequence[Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


class _Required(TypedDict):
    n: int
    max_new_tokens: int
    seed: int


class RequestOptions(_Required, SamplingOptions, total=False):
    """All keyword arguments of `Sampler.sample`, without those of the chat template."""

    first: int
    skip: Collection[int]
    prompt_ids: Sequence[int] | None
    show_progress: bool


def check(job: Mapping[str, Any]) -> SamplingSettings:
    """The sampling settings among a job's arguments of `Sampler.iter_batches`; others are ignored. Raises UserError."""
    check_knobs(job)
    return SamplingSettings.of(job)


def check_knobs(job: Mapping[str, Any]) -> None:
    batch_size, limit = (job.get(name) for name in KNOBS)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if limit is not None:
        parse_bytes("memory_limit", limit)


def check_more(more: int) -> None:
    if more < 1:
        raise UserError(f"more must be at least 1, got {more}")


def check_ray(address: str | None, workers: int | None, worker_cpus: float | None, worker_gpus: float | None) -> None:
    """Raise UserError for an invalid cluster address, and for invalid worker settings."""
    given = {"workers": (workers, 1), "worker_cpus": (worker_cpus, 0), "worker_gpus": (worker_gpus, 0)}
    for name, (value, least) in given.items():
        if value is not None and not value >= least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if address is None and any(value is not None for value, _ in given.values()):
        raise UserError("workers are Ray's: give --ray auto or --ray ADDRESS with them")
    if address is not None and not re.fullmatch(r"auto|local|\S+:\d+|\w+://\S+", address):
        raise UserError(f"ray must be 'auto', 'local' or an address, host:port, got {address!r}")
