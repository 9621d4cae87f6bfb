"""Resampling half-way: particles that approach p_λ(y|x), proportional to p0(y|x) exp(λ·R(x, y)), token by
token.

Sequential Monte Carlo with twisted targets (Doucet & Johansen 2009; for language models Zhao et al., arXiv
2404.17546): at each checkpoint a particle's weight is multiplied by the ratio of its current to its previous promise,
the estimated reward-to-go of its text. If weights have become uneven, the particles are resampled, so that drawing
continues from promising beginnings. The last weight replaces all promises with exp(λ·R), so the weighted
particles are correct for any promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.data.sampling import SamplingOptions
from fastalign.decode.best_of import prepared
from fastalign.decode.candidates import Candidates
from fastalign.decode.lockstep import Lockstep, checkpoints_of, flights
from fastalign.decode.samplers.base import BaseSampler
from fastalign.decode.token_loop import Job

if TYPE_CHECKING:
    from typing_extensions import Unpack

# With n p copies of each on average: needed for the weights.
METHODS = ("systematic", "multinomial", "stratified", "residual")


@dataclass
class Particles:
    """n weighted particles per prompt, and one text per prompt drawn from them: texts (P,), indices (P,), rewards (P,
    m).

    log_weights (P, n) float64: exp of them, averaged over a prompt's particles with any f(y), estimates Z E_lambda f
    without bias; Z = E_p0 exp(λ·R). effective_sample_size (P,) of the weights; copies of one particle are not
    independent, so it means less than in `best_of`. values (m,): mean over prompts of the weighted mean rewards.
    candidates: the particles. resampled (P,): how often. tokens: total number drawn.
    """

    texts: list[str]
    indices: np.ndarray
    rewards: np.ndarray
    log_weights: np.ndarray
    effective_sample_size: np.ndarray
    values: np.ndarray
    candidates: Candidates
    resampled: np.ndarray
    tokens: int

    def __repr__(self) -> str:
        worth = f"effective sample size {self.effective_sample_size.mean():.1f} of {self.candidates.n}"
        return f"Particles: {counted(len(self.texts), 'text')}, {worth}, {counted(self.tokens, 'token')}"

    @property
    def log_z(self) -> np.ndarray:
        """(P,) log of the estimate of Z. The estimate is unbiased; its logarithm is too small on average."""
        return _log_mean_exp(self.log_weights)


def particles(
    sampler: BaseSampler | str,
    prompts: Sequence[Any],
    rewards: Any,
    *,
    n: int,
    lam: Sequence[float] | None = None,
    checkpoints: Sequence[int],
    promise: Callable[[list[str], list[str]], np.ndarray] | None = None,
    ess: float = 0.5,
    method: str = "systematic",
    max_new_tokens: int,
    seed: int,
    prompt_ids: Sequence[int] | None = None,
    show_progress: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> Particles:
    """Draw from p_λ with n particles per prompt; p0 is the model's distribution with the given temperature, top_p
    ...

    checkpoints: ascending numbers of new tokens at which particles may be resampled. promise(prompts, texts so far) ->
    (B,) the log of the reward-to-go, log E[exp(λ·R) | text so far] at best; by default λ·R of the text so far. ess:
    resample a prompt's particles if the effective sample size is below this share of n. method: any of
    `ops.resample` that draws with replacement. prompt_ids: ascending indices of the prompts in the full set, if these
    are a part of it; they determine the random numbers. The other arguments are those of `best_of`. A copy shares its
    ancestor's tokens up to the checkpoint and has its own random stream, that of its slot. All n particles of a prompt
    are in flight at once, which limits n.

    Bias: none in Z and Z E_lambda f (see `Particles`), for any promise; a bad promise increases the variance. The drawn
    text and the weighted means, which are ratios of the two, have a bias of order 1/n as in `select`. Needs a model
    that the shared-prompt engine can run.

    Raises UserError (one line) on bad arguments.
    """
    from fastalign._base import progress

    sampler, rewards, names, lam = prepared(sampler, rewards, lam)
    if not 0 <= ess <= 1:
        raise UserError(f"ess must lie in [0, 1], a share of n, got {ess}")
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_memory_limit(sampling.get("memory_limit"))
    request = sampler.request(
        prompts, rising=True, n=n, max_new_tokens=max_new_tokens, seed=seed, prompt_ids=prompt_ids, **sampling
    )
    checkpoints = checkpoints_of(checkpoints, max_new_tokens)
    request.record.update(checkpoints=checkpoints, ess=ess)
    parts, tokens = [], 0
    log_weights, resampled = np.zeros((len(prompts), n)), np.zeros(len(prompts), dtype=np.int64)
    with progress.bar("sampling", total=len(prompts), unit="prompts", show=show_progress) as advance:
        for group, flight in flights(sampler, request):
            run = _Run(flight, rewards, lam, promise)
            for age in checkpoints:
                flight.advance(age)
                if not flight.live:
                    break
                run.weigh()
                resampled[group] += run.resample(ess, method)
            flight.advance(max_new_tokens)
            array = run.finish()
            log_weights[group] = run.log_weights
            part = request.part(group, *flight.rows())
            parts.append(part.with_rewards(names, array))
            tokens += flight.drawn
            advance(len(group))
    candidates = Candidates.concat(parts)
    array = candidates.reward_array(names)
    indices = np.array(
        [
            _resample(row, 1, "multinomial", (seed, i, max_new_tokens))[0]
            for i, row in zip(request.places, log_weights, strict=True)
        ]
    )
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return Particles(
        texts=[row[i] for row, i in zip(candidates.texts, indices, strict=True)],
        indices=indices,
        rewards=array[np.arange(len(indices)), indices],
        log_weights=log_weights,
        effective_sample_size=1 / (weights**2).sum(1),
        values=np.einsum("pn,pnm->m", weights, array) / len(prompts),
        candidates=candidates,
        resampled=resampled,
        tokens=tokens,
    )


def check_memory_limit(limit: Any) -> None:
    if limit is not None:
        raise UserError("memory_limit does not apply to particles, which are all in flight at once: draw fewer")


class _Run:
    """The weights of particles in lockstep: log_weights (prompts, n) include the estimate of Z so far."""

    def __init__(self, flight: Lockstep, rewards, lam, promise):
        self.flight, self.rewards, self.lam, self.promise = flight, rewards, lam, promise
        self.shape = (-1, flight.settings.n)
        self.log_weights = np.zeros(len(flight.jobs)).reshape(self.shape)
        self.promised = np.zeros_like(self.log_weights)

    def weigh(self) -> None:
        """Multiply by the ratio of the texts' current to their previous promises."""
        flight = self.flight
        now = self.promised.reshape(-1).copy()
        over = np.array([job in flight.ended for job in flight.jobs])
        scored = np.ones_like(over) if self.promise is None else over
        # A text that has ended promises what it is worth.
        now[scored] = flight.score(self.rewards, [flight.jobs[i] for i in np.flatnonzero(scored)]) @ self.lam
        if not scored.all():
            open_ = [flight.jobs[i] for i in np.flatnonzero(~scored)]
            promised = self.promise([flight.prompts[job.prompt] for job in open_], [flight.text(job) for job in open_])
            promised = np.asarray(promised, dtype=np.float64)
            if promised.shape != (len(open_),) or not np.isfinite(promised).all():
                raise UserError(f"promise must return {len(open_)} finite numbers, got shape {promised.shape}")
            now[~scored] = promised
        now = now.reshape(self.shape)
        self.log_weights += now - self.promised
        self.promised = now

    def resample(self, ess: float, method: str) -> np.ndarray:
        """Resample the prompts whose effective sample size is below ess n; returns which, (prompts,) bool."""
        flight, n = self.flight, self.shape[1]
        jobs = flight.grid({job: job for job in flight.jobs})
        below = np.zeros(len(jobs), dtype=bool)
        ancestors: dict[Job, Job] = {}
        for p, row in enumerate(jobs):
            log_w = self.log_weights[p] - self.log_weights[p].max()
            below[p] = np.exp(log_w).sum() ** 2 < ess * n * np.exp(2 * log_w).sum()
            if not below[p]:
                continue
            seed = (flight.settings.seed, row[0].prompt, flight.age)
            counts = np.bincount(_resample(self.log_weights[p], n, method, seed), minlength=n)
            # One copy of each survivor stays where it is; the others take the places of those that go.
            spare = np.repeat(np.arange(n), np.maximum(counts - 1, 0))
            gone = np.flatnonzero(counts == 0)
            ancestors |= {row[to]: row[of] for to, of in zip(gone, spare, strict=True)}
            self.promised[p, gone] = self.promised[p, spare]
            self.log_weights[p] = _log_mean_exp(self.log_weights[p])
        flight.replace(ancestors)
        return below

    def finish(self) -> np.ndarray:
        """Replace all promises with exp(λ·R); returns the rewards (jobs, m)."""
        array = self.flight.score(self.rewards, self.flight.jobs)
        self.log_weights += (array @ self.lam).reshape(self.shape) - self.promised
        return array


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    most = x.max(-1, keepdims=True)
    return most[..., 0] + np.log(np.exp(x - most).mean(-1))


def _resample(log_weights: np.ndarray, k: int, method: str, seed: tuple[int, ...]) -> np.ndarray:
    """Indices (k,) of one prompt's particles; seed: for this draw only."""
    from fastalign import ops

    # Hashed, for neighbouring seeds and checkpoints are to have nothing in common.
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return ops.resample(torch.from_numpy(log_weights[None]), k, method=method, seed=mixed)[0].numpy()
