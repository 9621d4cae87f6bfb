"""Resampling half-way: particles that approach p_lambda(y|x), proportional to p0(y|x) exp(lambda . R(x, y)), token by
token.

Sequential Monte Carlo with twisted targets (Doucet & Johansen 2009; for language models Zhao et al., arXiv
2404.17546): at each checkpoint a particle's weight is multiplied by what its text so far promises over what it
promised before, and where weights have become uneven the particles are resampled, so that drawing goes on from the
promising beginnings. The last weight takes all promises back and puts exp(lambda . R) in their place: the weighted
particles are right whatever was promised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.data.sampling import SamplingSettings
from fastalign.data.text import check_prompts, told
from fastalign.decode.best_of import prepared
from fastalign.decode.candidates import Candidates
from fastalign.decode.lockstep import Lockstep, checkpoints_of, groups
from fastalign.decode.sampler import Sampler
from fastalign.decode.streams import places_of
from fastalign.decode.token_loop import Job

# With n p copies of each on average: needed for the weights.
METHODS = ("systematic", "multinomial", "stratified", "residual")


@dataclass
class Particles:
    """n weighted particles per prompt, and one text of each prompt drawn from them: texts (P,), indices (P,), rewards
    (P, m).

    log_weights (P, n) float64: exp of them, averaged over a prompt's particles with any f(y), estimates Z E_lambda f
    without bias; Z = E_p0 exp(lambda . R). effective_sample_size (P,) of the weights; copies of one particle are not
    independent, so that it says less than in `best_of`. values (m,): mean over prompts of the weighted mean rewards.
    candidates: the particles. resampled (P,): how often. tokens: drawn in all.
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
        """(P,) log of the estimate of Z, which is unbiased itself; its logarithm is too small on average."""
        return _log_mean_exp(self.log_weights)


def particles(
    sampler: Sampler | str,
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
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: str | Sequence[str] | None = None,
    seed: int,
    chat: bool | str = "auto",
    batch_size: int | None = None,
    prompt_ids: Sequence[int] | None = None,
    show_progress: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **template: Any,
) -> Particles:
    """Draw from p_lambda with n particles per prompt; p0 is the model's law as temperature, top_p ... make it.

    checkpoints: rising numbers of new tokens at which particles may be resampled. promise(prompts, texts so far) ->
    (B,) the log of the reward-to-go, log E[exp(lambda . R) | text so far] at best; by default lambda . R of the text
    so far. ess:
    resample a prompt's particles where the effective sample size is below this share of n. method: any of
    `ops.resample` that draws with replacement. prompt_ids: rising, the prompts' places in the whole set where these
    are a part of it, which is what their random numbers go by. The other arguments are those of `best_of`. A copy
    shares its ancestor's tokens up to the checkpoint and has a random stream of its own, that of its place. All n of
    a prompt are in flight at once, which is what bounds n.

    Bias: none in Z and Z E_lambda f (see `Particles`), for any promise; a bad promise costs variance. The drawn
    text and the weighted means, which divide one by the other, have a bias of order 1/n as in `select`. Needs a model
    that the shared-prompt engine runs.

    Raises UserError (one line) on bad arguments.
    """
    from fastalign._base import progress

    sampler, rewards, names, lam = prepared(sampler, rewards, lam)
    if not 0 <= ess <= 1:
        raise UserError(f"ess must lie in [0, 1], a share of n, got {ess}")
    if method not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    checkpoints = checkpoints_of(checkpoints, max_new_tokens)
    settings = SamplingSettings(n, max_new_tokens, temperature, top_k, top_p, min_p, stop, seed)
    prompts = check_prompts(prompts, chat)
    template = sampler.text.template_options(chat_template_kwargs, tools, template)
    encoded = sampler.encode(prompts, chat, max_new_tokens, template)
    places = places_of(prompt_ids, len(prompts), rising=True)
    by_place = dict(zip(places, prompts, strict=True))
    record = {
        "model": sampler.name,
        **vars(settings),
        "chat": chat,
        **told(template),
        "checkpoints": checkpoints,
        "ess": ess,
    }
    parts, tokens = [], 0
    log_weights, resampled = np.zeros((len(prompts), n)), np.zeros(len(prompts), dtype=np.int64)
    with progress.bar("sampling", total=len(prompts), unit="prompts", show=show_progress) as advance:
        for group in groups(sampler, encoded, settings, batch_size, None):
            flight = Lockstep(sampler, {places[i]: encoded[i] for i in group}, settings)
            run = _Run(flight, by_place, rewards, lam, promise)
            for age in checkpoints:
                flight.advance(age)
                if not flight.live:
                    break
                run.weigh()
                resampled[group] += run.resample(ess, method)
            flight.advance(max_new_tokens)
            array = run.finish()
            log_weights[group] = run.log_weights
            ids = np.array([places[i] for i in group], dtype=np.int64)
            part = Candidates([prompts[i] for i in group], *flight.rows(), settings=record, prompt_ids=ids)
            parts.append(part.with_rewards(names, array))
            tokens += flight.drawn
            advance(len(group))
    candidates = Candidates.concat(parts)
    array = candidates.reward_array(names)
    indices = np.array(
        [
            _resample(row, 1, "multinomial", (seed, i, max_new_tokens))[0]
            for i, row in zip(places, log_weights, strict=True)
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


class _Run:
    """The weights of particles in lockstep: log_weights (prompts, n) include the estimate of Z so far."""

    def __init__(self, flight: Lockstep, prompts, rewards, lam, promise):
        self.flight, self.prompts, self.rewards, self.lam, self.promise = flight, prompts, rewards, lam, promise
        self.shape = (-1, flight.settings.n)
        self.log_weights = np.zeros(len(flight.jobs)).reshape(self.shape)
        self.promised = np.zeros_like(self.log_weights)

    def weigh(self) -> None:
        """Multiply by what texts promise now over what they promised before."""
        flight = self.flight
        now = self.promised.reshape(-1).copy()
        over = np.array([job in flight.ended for job in flight.jobs])
        asked = np.ones_like(over) if self.promise is None else over
        # A text that has ended promises what it is worth.
        now[asked] = (
            flight.score(self.rewards, self.prompts, [flight.jobs[i] for i in np.flatnonzero(asked)]) @ self.lam
        )
        if not asked.all():
            open_ = [flight.jobs[i] for i in np.flatnonzero(~asked)]
            found = self.promise([self.prompts[job.prompt] for job in open_], [flight.text(job) for job in open_])
            found = np.asarray(found, dtype=np.float64)
            if found.shape != (len(open_),) or not np.isfinite(found).all():
                raise UserError(f"promise must return {len(open_)} finite numbers, got shape {found.shape}")
            now[~asked] = found
        now = now.reshape(self.shape)
        self.log_weights += now - self.promised
        self.promised = now

    def resample(self, ess: float, method: str) -> np.ndarray:
        """Even out the weights of prompts whose effective sample size is below ess n; which those are, (P,) bool."""
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
        """Put exp(lambda . R) in the place of all promises; the rewards (jobs, m)."""
        array = self.flight.score(self.rewards, self.prompts, self.flight.jobs)
        self.log_weights += (array @ self.lam).reshape(self.shape) - self.promised
        return array


def _log_mean_exp(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    most = x.max(-1, keepdims=True)
    return most[..., 0] + np.log(np.exp(x - most).mean(-1))


def _resample(log_weights: np.ndarray, k: int, method: str, seed: tuple[int, ...]) -> np.ndarray:
    """Indices (k,) of one prompt's particles; seed: of this draw alone."""
    from fastalign import ops

    # Hashed, for neighbouring seeds and checkpoints are to have nothing in common.
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return ops.resample(torch.from_numpy(log_weights[None]), k, method=method, seed=mixed)[0].numpy()
