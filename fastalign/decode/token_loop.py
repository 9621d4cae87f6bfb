"""The one loop over new tokens, which sampling, rejection, particles and rollouts share.

What runs the model is one of two: `shared_prompt.SharedPromptEngine`, or `rows.Batch` for models that cannot run
there. Both have rows in flight, named by their jobs, and give the states from which each row's next token is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fastalign import backend as backends
from fastalign._base.errors import UserError
from fastalign.data.sampling import SamplingSettings
from fastalign.decode.streams import stream_of

if TYPE_CHECKING:
    from fastalign.ops import SampledTokens


class Job(NamedTuple):
    """One candidate to draw."""

    prompt: int
    candidate: int


class Engine(Protocol):
    """What the loop asks of an engine. States are what `sample` takes, one of each row."""

    jobs: list[Job]  # of the rows in flight

    def admit(self, jobs: Sequence[Job]) -> Tensor:
        """Put these in flight behind the others: the states that give their first token."""

    def step(self) -> Tensor:
        """Run the token that each row drew last: the states that give the next."""

    def place(self, first: int, ids: Tensor) -> None:
        """The tokens that the rows from `first` on drew."""

    def drop(self, rows: Sequence[int]) -> None:
        """Take rows out of flight."""

    def sample(self, states: Tensor, settings: SamplingSettings, *, rows: Tensor) -> SampledTokens:
        """`ops.sample_tokens` of the states' logits."""


class TokenLoop:
    """Draws a token at a time for all rows of an engine, and holds what each candidate has drawn.

    stopped(job, ids) -> whether the text that ends there holds a stop string. places: prompt -> its place in the
    whole set, by which its random streams go; by default the prompt's own number. name: of the model, for errors.
    backend: of `sample_tokens`.
    """

    engine: Engine
    settings: SamplingSettings
    ends: set[int]
    stopped: Callable[[Job, list[int]], bool]
    places: Mapping[int, int] | Sequence[int] | None
    name: str
    backend: str

    def __init__(
        self,
        engine: Engine,
        settings: SamplingSettings,
        ends: Sequence[int],
        stopped: Callable[[Job, list[int]], bool],
        *,
        places: Mapping[int, int] | Sequence[int] | None = None,
        name: str = "the model",
        backend: str = "auto",
    ):
        self.engine, self.settings, self.ends, self.stopped = engine, settings, set(ends), stopped
        self.places, self.name, self.backend = places, name, backend
        self.ids: dict[Job, list[int]] = {}
        self.log_probs: dict[Job, list[float]] = {}

    def step(self, new: Sequence[Job] = ()) -> list[Job]:
        """The next token of every row in flight, and the first of `new`, which join them. Those that ended with it
        are returned and in flight no longer."""
        engine, over = self.engine, []
        for job in new:
            self.ids[job], self.log_probs[job] = [], []
        for first, states in self._states(new):
            jobs = engine.jobs[first:]
            with nullcontext() if self.backend == "auto" else backends.use_backend(self.backend):
                drawn = engine.sample(states, self.settings, rows=self._streams(jobs))
            ids = drawn.ids.cpu()
            for row in (ids < 0).nonzero():
                at = len(self.ids[jobs[row]])
                raise UserError(f"{self.name}: the logits of new token {at} are NaN, or all of them -inf")
            engine.place(first, ids)
            over += [
                first + row
                for row, (job, *token) in enumerate(
                    zip(jobs, ids.tolist(), drawn.log_probs.float().tolist(), strict=True)
                )
                if self._take(job, *token)
            ]
        ended = [engine.jobs[row] for row in over]
        engine.drop(over)
        return ended

    def pop(self, job: Job) -> tuple[list[int], list[float]]:
        """Its token ids and their log-probabilities, which are not held any more."""
        return self.ids.pop(job), self.log_probs.pop(job)

    def _states(self, new: Sequence[Job]) -> Iterator[tuple[int, Tensor]]:
        """(first row, states of the rows from there on): those in flight, then the new ones."""
        if self.engine.jobs:
            yield 0, self.engine.step()
        if new:
            yield len(self.engine.jobs), self.engine.admit(new)

    def _streams(self, jobs: Sequence[Job]) -> Tensor:
        """(rows, 2): each row's random stream and the number of its token."""
        first, places = self.settings.first, self.places
        return torch.tensor(
            [
                [
                    stream_of(job.prompt if places is None else places[job.prompt], first + job.candidate),
                    len(self.ids[job]),
                ]
                for job in jobs
            ]
        )

    def _take(self, job: Job, token: int, log_prob: float) -> bool:
        """Hold what a candidate drew; whether it ends with it."""
        ids = self.ids[job]
        ids.append(token)
        self.log_probs[job].append(log_prob)
        return len(ids) == self.settings.max_new_tokens or token in self.ends or self.stopped(job, ids)
