"""The loop over new tokens, shared by sampling, rejection, particles and rollouts.

The model runs on `shared_prompt.SharedPromptEngine`, or on `rows.Batch` if it cannot run there. Both have rows in
flight, named by their jobs, and return the states from which each row's next token is drawn.
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


class Decoder(Protocol):
    """The interface of a decoder with rows in flight. States are the arguments of `sample`, one per row."""

    jobs: list[Job]  # of the rows in flight

    def admit(self, jobs: Sequence[Job]) -> Tensor:
        """Put these in flight after the others; returns the states for their first token."""

    def step(self) -> Tensor:
        """Run each row's last token; returns the states for the next."""

    def place(self, first: int, ids: Tensor) -> None:
        """Set the tokens drawn by the rows from `first` on."""

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows from flight."""

    def sample(self, states: Tensor, settings: SamplingSettings, *, rows: Tensor) -> SampledTokens:
        """`ops.sample_tokens` of the states' logits."""


class TokenLoop:
    """Draws one token at a time for all rows in flight, and collects each candidate's tokens.

    stopped(job, ids) -> whether the text so far contains a stop string. places: prompt -> its index in the full set,
    which determines its random streams; by default the prompt's own index. name: the model's, for errors. backend: for
    `sample_tokens`.
    """

    decoder: Decoder
    settings: SamplingSettings
    ends: set[int]
    stopped: Callable[[Job, list[int]], bool]
    places: Mapping[int, int] | Sequence[int] | None
    name: str
    backend: str

    def __init__(
        self,
        decoder: Decoder,
        settings: SamplingSettings,
        ends: Sequence[int],
        stopped: Callable[[Job, list[int]], bool],
        *,
        places: Mapping[int, int] | Sequence[int] | None = None,
        name: str = "the model",
        backend: str = "auto",
    ):
        self.decoder, self.settings, self.ends, self.stopped = decoder, settings, set(ends), stopped
        self.places, self.name, self.backend = places, name, backend
        self.ids: dict[Job, list[int]] = {}
        self.log_probs: dict[Job, list[float]] = {}

    def step(self, new: Sequence[Job] = ()) -> list[Job]:
        """Draw the next token of every row in flight, and the first of `new`, which join them. Returns the jobs that
        ended, which are no longer in flight."""
        decoder, over = self.decoder, []
        for job in new:
            self.ids[job], self.log_probs[job] = [], []
        for first, states in self._states(new):
            jobs = decoder.jobs[first:]
            with nullcontext() if self.backend == "auto" else backends.use_backend(self.backend):
                drawn = decoder.sample(states, self.settings, rows=self._streams(jobs))
            ids, log_probs = _read(drawn)
            if min(ids) < 0:
                at = len(self.ids[jobs[ids.index(min(ids))]])
                raise UserError(f"{self.name}: the logits of new token {at} are NaN, or all of them -inf")
            decoder.place(first, drawn.ids)
            over += [
                first + row
                for row, (job, token, log_prob) in enumerate(zip(jobs, ids, log_probs, strict=True))
                if self._take(job, token, log_prob)
            ]
        ended = [decoder.jobs[row] for row in over]
        decoder.drop(over)
        return ended

    def pop(self, job: Job) -> tuple[list[int], list[float]]:
        """Remove and return its token ids and their log-probabilities."""
        return self.ids.pop(job), self.log_probs.pop(job)

    def _states(self, new: Sequence[Job]) -> Iterator[tuple[int, Tensor]]:
        """(first row, states of the rows from it on): first those in flight, then the new ones."""
        if self.decoder.jobs:
            yield 0, self.decoder.step()
        if new:
            yield len(self.decoder.jobs), self.decoder.admit(new)

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
        """Store a candidate's token; returns whether the candidate ends."""
        ids = self.ids[job]
        ids.append(token)
        self.log_probs[job].append(log_prob)
        return len(ids) == self.settings.max_new_tokens or token in self.ends or self.stopped(job, ids)


def _read(drawn: SampledTokens) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities in one copy from the device, since each waits for it."""
    ids, bits = torch.stack([drawn.ids.int(), drawn.log_probs.float().view(torch.int32)]).cpu()
    return ids.tolist(), bits.view(torch.float32).tolist()
