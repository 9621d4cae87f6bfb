"""Speculative rejection: best-of-N that stops drawing candidates whose beginnings look unpromising.

As in Sun et al. (arXiv 2410.20290) and in successive halving: at each checkpoint every prompt's unfinished candidates
are scored, and only the best of them continue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.units import counted, parse_bytes
from fastalign.data.sampling import SamplingOptions
from fastalign.decode.best_of import prepared
from fastalign.decode.candidates import Candidates
from fastalign.decode.lockstep import Lockstep, checkpoints_of, flights
from fastalign.decode.samplers.base import BaseSampler
from fastalign.decode.shared_prompt import GROW
from fastalign.decode.token_loop import Job

if TYPE_CHECKING:
    from typing_extensions import Unpack


def usual_checkpoints(max_new_tokens: int) -> list[int]:
    """An eighth, a quarter and half of max_new_tokens."""
    return sorted({max(1, max_new_tokens // part) for part in (8, 4, 2)})


@dataclass
class Rejection:
    """One text per prompt: texts (P,), indices (P,) among the n candidates, rewards (P, m) of the selected texts.

    candidates: all n, the dropped ones incomplete, each with its last rewards. complete (P, n) bool: which were drawn
    to their end. tokens: total number drawn.
    """

    texts: list[str]
    indices: np.ndarray
    rewards: np.ndarray
    candidates: Candidates
    complete: np.ndarray
    tokens: int

    def __repr__(self) -> str:
        drawn = f"{counted(self.candidates.n, 'candidate')} each, {self.complete.mean():.0%} to their end"
        return f"Rejection: {counted(len(self.texts), 'text')} of {drawn}, {counted(self.tokens, 'token')}"


def speculative_rejection(
    sampler: BaseSampler | str,
    prompts: Sequence[Any],
    rewards: Any,
    *,
    n: int,
    lam: Sequence[float] | None = None,
    checkpoints: Sequence[int] | None = None,
    keep: float = 0.5,
    max_new_tokens: int,
    seed: int,
    prompt_ids: Sequence[int] | None = None,
    show_progress: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> Rejection:
    """The best of n candidates by lam . R, most of them drawn only in part.

    checkpoints: ascending numbers of new tokens, by default an eighth, a quarter and half of max_new_tokens. At each, a
    prompt's remaining candidates are scored on their texts so far, and the share `keep` of them with the largest lam .
    R continues (rounded up; ended candidates stay in the race at no cost). All n of a prompt begin together.
    memory_limit: for keys and values, in bytes or as "4GB". It must fit n beginnings; if the remaining candidates
    outgrow it, the worst are dropped at once. prompt_ids: ascending indices of the prompts in the full set, if these
    are a part of it; they determine the random numbers. The other arguments are those of `best_of` and
    `Sampler.sample`; with the same seed the candidates are the same, except that dropped ones are truncated.

    Bias: a text whose beginning scores low is lost even if it would end best. The reward is therefore at most that of
    best-of-n on the same candidates, and the selected texts have no known distribution: do not use them for `resample`
    or for estimates. The loss depends on how well the beginning predicts the whole. `bench/spend_less.py` measures it
    for the rewards of the demo: with the defaults, 94 to 99 % of best-of-64's gain over the mean for a third of its
    tokens. Needs a model that the shared-prompt engine can run.

    Raises UserError (one line) on bad arguments.
    """
    from fastalign._base import progress

    sampler, rewards, names, lam = prepared(sampler, rewards, lam)
    if not 0 < keep <= 1:
        raise UserError(f"keep must lie in (0, 1], got {keep}")
    request = sampler.request(
        prompts, rising=True, n=n, max_new_tokens=max_new_tokens, seed=seed, prompt_ids=prompt_ids, **sampling
    )
    if checkpoints is None:
        checkpoints = usual_checkpoints(max_new_tokens)
    checkpoints = checkpoints_of(checkpoints, max_new_tokens)
    given = sampling.get("memory_limit")
    limit = None if given is None else parse_bytes("memory_limit", given)
    request.record.update(checkpoints=checkpoints, keep=keep)
    parts, complete, tokens = [], {}, 0
    with progress.bar("sampling", total=len(prompts), unit="prompts", show=show_progress) as advance:
        for group, flight in flights(sampler, request, limit):
            scores = _race(flight, rewards, lam, checkpoints, keep, limit)
            part = request.part(group, *flight.rows())
            parts.append(part.with_rewards(names, np.stack([scores[one] for one in flight.jobs])))
            for i, row in zip(group, flight.grid({one: one in flight.ended for one in flight.jobs}), strict=True):
                complete[i] = row
            tokens += flight.drawn
            advance(len(group))
    candidates = Candidates.concat(parts)
    whole = np.array([complete[i] for i in range(len(prompts))])
    array = candidates.reward_array(names)
    indices = np.where(whole, array.astype(np.float64) @ lam, -np.inf).argmax(1)
    return Rejection(
        texts=[row[i] for row, i in zip(candidates.texts, indices, strict=True)],
        indices=indices,
        rewards=array[np.arange(len(indices)), indices],
        candidates=candidates,
        complete=whole,
        tokens=tokens,
    )


def _race(flight: Lockstep, rewards, lam, checkpoints: list[int], keep: float, limit: int | None):
    """Run all candidates to their end; returns each candidate's last rewards (m,)."""
    new = flight.settings.max_new_tokens
    scores: dict[Job, np.ndarray] = {}
    final: set[Job] = set()  # scored since they ended
    racing: dict[int, list[Job]] = {}
    for one in flight.jobs:
        racing.setdefault(one.prompt, []).append(one)

    def rescore() -> None:
        todo = [one for members in racing.values() for one in members if one not in final]
        scores.update(zip(todo, flight.score(rewards, todo), strict=True))
        final.update(flight.ended.intersection(todo))

    # Room for keys and values grows by GROW tokens at a time: what would then outgrow the limit has to go before.
    grows = range(GROW, new, GROW) if limit is not None else range(0)
    for age in sorted({*checkpoints, *grows}):
        flight.advance(age)
        if not flight.live:
            break
        most = len(flight.live) if limit is None else flight.fitting(limit, (age // GROW + 1) * GROW)
        live = set(flight.live)
        lost: list[Job] = []
        if age in checkpoints or len(live) > most:
            rescore()
            for prompt, members in racing.items():
                ranked = sorted(members, key=lambda one: -(scores[one] @ lam))
                if age in checkpoints:
                    ranked = ranked[: math.ceil(keep * len(ranked))]
                if len(live) > most:
                    fitting = set([one for one in ranked if one in live][: most // len(racing)])
                    ranked = [one for one in ranked if one not in live or one in fitting]
                lost += live.intersection(members).difference(ranked)
                racing[prompt] = ranked
        flight.drop(lost)
    flight.advance(new)
    rescore()
    return scores
