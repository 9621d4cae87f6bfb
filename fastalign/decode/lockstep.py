"""Candidates in lockstep: all candidates of a few prompts are drawn together to a checkpoint, where some are dropped or
copied.

The basis of `decode.rejection` and `decode.particles`. All candidates are in flight at once, so that those of a prompt
can be compared half-way. Each slot has the random stream that `Sampler.sample` gives the candidate of that index, so a
candidate that is never replaced is the same as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign.data.sampling import SamplingSettings
from fastalign.decode.sampler import Sampler
from fastalign.decode.samplers.base import BaseSampler, Request
from fastalign.decode.shared_prompt import GROW, SharedPromptEngine
from fastalign.decode.token_loop import Job, TokenLoop
from fastalign.models.spans import rope_group
from fastalign.rewards import score


class Lockstep:
    """n candidates in flight for each prompt of a group, by its place, all with the same number of tokens."""

    sampler: Sampler
    settings: SamplingSettings

    def __init__(self, sampler: Sampler, request: Request, group: Sequence[int]):
        self.sampler, self.settings = sampler, request.settings
        encoded = {request.places[i]: request.encoded[i] for i in group}
        self.encoded: Mapping[int, Sequence[int]] = encoded
        self.prompts: Mapping[int, Any] = {request.places[i]: request.prompts[i] for i in group}
        self.age: int = 0  # tokens drawn by those that have not ended
        self.drawn: int = 0  # tokens drawn in all
        self.ended: set[Job] = set()
        self.jobs: list[Job] = [Job(prompt, place) for prompt in encoded for place in range(self.settings.n)]
        self.engine: SharedPromptEngine = SharedPromptEngine(
            sampler.model, len(self.jobs), prompts=len(encoded), spare=request.spare
        )
        self.loop: TokenLoop = sampler.token_loop(self.engine, self.settings, encoded)
        self.engine.prefill(encoded)

    @property
    def live(self) -> list[Job]:
        """Candidates that have not ended and were not dropped."""
        return self.engine.jobs if self.age else self.jobs

    def advance(self, age: int) -> None:
        """Draw until each live candidate has that many tokens or has ended."""
        while self.age < age and self.live:
            self.drawn += len(self.live)
            self.ended.update(self.loop.step(() if self.age else self.jobs))
            self.age += 1

    def fitting(self, limit: int, tokens: int) -> int:
        """How many candidates of that many tokens fit in `limit` bytes with their keys and values and those of their
        prompts."""
        model, prefixes = self.sampler.model, self.engine.prefixes.values()
        own, shared = (
            SharedPromptEngine.row_bytes(model, tokens),
            sum(SharedPromptEngine.row_bytes(model, p.length) for p in prefixes),
        )
        return (limit - shared) // own

    def drop(self, jobs: Sequence[Job]) -> None:
        """Stop drawing these, and release the memory of all that are not in flight."""
        gone = set(jobs)
        self.engine.drop([row for row, job in enumerate(self.engine.jobs) if job in gone])
        self.engine.shrink()

    def replace(self, ancestors: Mapping[Job, Job]) -> None:
        """Make each of these a copy of another, which is not itself replaced; the copy continues with its own random
        stream."""
        for job, of in ancestors.items():
            self.loop.ids[job] = list(self.loop.ids[of])
            self.loop.log_probs[job] = list(self.loop.log_probs[of])
            (self.ended.add if of in self.ended else self.ended.discard)(job)
        rows = {job: row for row, job in enumerate(self.engine.jobs)}
        sources = {job: rows[ancestors.get(job, job)] for job in self.jobs if ancestors.get(job, job) in rows}
        # A candidate that stays in flight keeps its row, so that only copies move keys and values.
        places: list[Job | None] = [None] * len(sources)
        others = []
        for job in sources:
            if rows.get(job, len(sources)) < len(sources):
                places[rows[job]] = job
            else:
                others.append(job)
        filled = [others.pop() if job is None else job for job in places]
        self.engine.rearrange([sources[job] for job in filled], filled)

    def text(self, job: Job) -> str:
        return self.sampler.text.continuation(self.encoded[job.prompt], self.loop.ids[job], self.settings.stop)

    def grid(self, values: Mapping[Job, Any]) -> list[list[Any]]:
        """[prompt][candidate] from a mapping of every job."""
        n = self.settings.n
        flat = [values[job] for job in self.jobs]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def rows(self) -> tuple[list[list[str]], list[list[list[int]]], list[list[list[float]]]]:
        """Texts, token ids, log-probabilities: [prompt][candidate] each."""
        return (
            self.grid({job: self.text(job) for job in self.jobs}),
            self.grid(self.loop.ids),
            self.grid(self.loop.log_probs),
        )

    def score(self, rewards: Sequence[Any], jobs: Sequence[Job]) -> np.ndarray:
        """(jobs, m) float64 rewards of their current texts."""
        texts = [self.text(job) for job in jobs]
        return score(rewards, [self.prompts[job.prompt] for job in jobs], texts).astype(np.float64)


def flights(sampler: BaseSampler, request: Request, limit: int | None = None) -> Iterator[tuple[list[int], Lockstep]]:
    """Yield (prompt indices, their Lockstep) by groups of prompts drawn together: as many as stay within request.rows
    candidates, and whose keys and values fit in `limit` bytes, with room for all candidates' first tokens or for one
    candidate's last; at least one.

    Raises UserError if the shared-prompt engine cannot run the model or a prompt of its, or if one does not fit.
    """
    if not isinstance(sampler, Sampler) or sampler.path() is not SharedPromptEngine:
        raise UserError(
            f"{sampler.name}: candidates are dropped and copied half-way on the shared-prompt engine alone, which "
            "cannot run this model; draw whole ones with best_of"
        )
    for name, given in (("first", request.settings.first), ("skip", request.skip)):
        if given:
            raise UserError(f"{name} does not apply here: all candidates of all prompts are drawn together")
    n, model, encoded = request.settings.n, sampler.model, request.encoded
    request.spare = None if limit is None else 0  # the limit is for keys and values
    last = -(-request.settings.max_new_tokens // GROW) * GROW
    own = max(n * SharedPromptEngine.row_bytes(model, GROW), SharedPromptEngine.row_bytes(model, last))
    config = model.config.get_text_config(decoder=True)
    laws = [rope_group(config, len(ids), request.settings.max_new_tokens) for ids in encoded]
    if "crossing" in laws:
        raise UserError(
            f"prompt {laws.index('crossing')}: the model's RoPE changes during its continuation, and half-drawn "
            "candidates need a cache; draw whole ones with best_of"
        )
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    groups: list[list[int]] = []
    size = 0
    for i in order:
        more = own + SharedPromptEngine.row_bytes(model, len(encoded[i]))
        if limit is not None and more > limit:
            rule = f"memory_limit must hold {n} candidates of {GROW} tokens and one of {last}, {more:,} bytes"
            raise UserError(f"{rule}, got {limit:,}")
        fits = (limit is None or size + more <= limit) and groups and (len(groups[-1]) + 1) * n <= request.rows
        if fits and laws[groups[-1][0]] == laws[i]:
            groups[-1].append(i)
            size += more
        else:
            groups.append([i])
            size = more
    for group in groups:
        yield group, Lockstep(sampler, request, group)


def checkpoints_of(checkpoints: Sequence[int], max_new_tokens: int) -> list[int]:
    """Checked checkpoints: ascending numbers of tokens; those from max_new_tokens on are omitted, because they save
    nothing."""
    steps = [int(at) for at in checkpoints]
    if steps != list(checkpoints) or steps != sorted(set(steps)) or (steps and steps[0] < 1):
        raise UserError(f"checkpoints must be rising numbers of tokens, at least 1, got {list(checkpoints)}")
    return [at for at in steps if at < max_new_tokens]
