"""As many candidates as each prompt needs, drawn in rounds until they suffice; and a pilot that estimates how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.data.sampling import SamplingOptions
from fastalign.data.text import check_prompts
from fastalign.decode.best_of import prepared
from fastalign.decode.candidates import Candidates
from fastalign.decode.estimates import best_of_curve, estimate
from fastalign.decode.samplers.base import BaseSampler
from fastalign.decode.select import effective_sample_size, select
from fastalign.decode.streams import places_of
from fastalign.decode.worth import TRUSTED_ESS, Worth

if TYPE_CHECKING:
    from typing_extensions import Unpack

PILOT_N, PILOT_PROMPTS = 32, 8


@dataclass
class Adaptive:
    """One text per prompt: texts (P,), indices (P,) among its candidates, rewards (P, m) of the selected texts.

    counts (P,): candidates drawn for each prompt. enough (P,) bool: whether they sufficed before max_n was reached.
    effective_sample_size (P,). candidates: one Candidates per prompt, of counts[p] candidates.
    """

    texts: list[str]
    indices: np.ndarray
    rewards: np.ndarray
    counts: np.ndarray
    enough: np.ndarray
    effective_sample_size: np.ndarray
    candidates: list[Candidates]

    def __repr__(self) -> str:
        drawn = f"{self.counts.min():,} to {self.counts.max():,} candidates each"
        return f"Adaptive: {counted(len(self.texts), 'text')} of {drawn}, enough of {int(self.enough.sum()):,}"


def adaptive(
    sampler: BaseSampler | str,
    prompts: Sequence[Any],
    rewards: Any,
    *,
    lam: Sequence[float] | None = None,
    method: str = "resample",
    ess: float = TRUSTED_ESS,
    gain: float = 0.2,
    each: int = 16,
    max_n: int,
    max_new_tokens: int,
    seed: int,
    prompt_ids: Sequence[int] | None = None,
    show_progress: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> Adaptive:
    """`best_of` with as many candidates as each prompt needs, drawn `each` at a time, max_n at most (a multiple of
    `each`).

    A prompt has enough, for method "best", when its best is at most `gain` standard deviations of lam . R above what
    half as many candidates would give on average (`best_of_curve`): the next doubling gains about as much or less. For
    every other method, when its effective sample size reaches `ess`. prompt_ids: ascending indices of the prompts in
    the full set, if these are a part of it; they determine the random numbers. The other arguments are those of
    `best_of`. For a local model, a prompt's candidates are the first of those that best_of draws with n = max_n and the
    same seed.

    Bias: stopping depends on the rewards, so a prompt whose first candidates score alike stops before a rare good one
    appears. `resample` is then further from p_λ, and means over the candidates are further from those under p0,
    than with a fixed n of the same average size. Use a fixed n for unbiased estimates.

    Raises UserError (one line) on bad arguments.
    """
    from fastalign.rewards import score

    sampler, rewards, names, lam = prepared(sampler, rewards, lam)
    prompts = check_prompts(prompts, sampling.get("chat", "auto"))
    for name, value in (("each", each), ("max_n", max_n)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"{name} must be an integer, got {value!r}")
    if each < 1 or max_n < each or max_n % each:
        raise UserError(f"max_n must be a multiple of each, got max_n={max_n} and each={each}")
    if not ess >= 1 or not gain >= 0:
        raise UserError(f"ess must be at least 1 and gain at least 0, got {ess} and {gain}")
    if method != "best" and ess > max_n:
        raise UserError(f"ess must be at most max_n, {max_n}, got {ess}")
    rounds, places = max_n // each, places_of(prompt_ids, len(prompts), rising=True)
    drawn: list[list[Candidates]] = [[] for _ in prompts]
    enough = np.zeros(len(prompts), dtype=bool)
    for r in range(rounds):
        open_ = np.flatnonzero(~enough).tolist()
        if not open_:
            break
        part = sampler.sample(
            [prompts[p] for p in open_],
            n=each,
            first=r * each,
            prompt_ids=[places[p] for p in open_],
            max_new_tokens=max_new_tokens,
            seed=seed,
            show_progress=show_progress,
            **sampling,
        )
        part = part.with_rewards(names, score(rewards, *part.pairs(), show_progress=show_progress))
        for row, p in enumerate(open_):
            drawn[p].append(_row(part, row))
            array = np.concatenate([one.reward_array(names) for one in drawn[p]], axis=1)
            enough[p] = (
                _gains_little(array, lam, gain) if method == "best" else effective_sample_size(array, lam)[0] >= ess
            )
    candidates = [_joined(parts, p, max_n) for p, parts in zip(places, drawn, strict=True)]
    arrays = [one.reward_array(names) for one in candidates]
    indices = np.array(
        [
            select(array, lam, method=method, seed=(seed + p) % 2**64)[0, 0]
            for p, array in zip(places, arrays, strict=True)
        ]
    )
    return Adaptive(
        texts=[one.texts[0][i] for one, i in zip(candidates, indices, strict=True)],
        indices=indices,
        rewards=np.stack([array[0, i] for array, i in zip(arrays, indices, strict=True)]),
        counts=np.array([one.n for one in candidates]),
        enough=enough,
        effective_sample_size=np.array([effective_sample_size(array, lam)[0] for array in arrays]),
        candidates=candidates,
    )


def _gains_little(array: np.ndarray, lam: np.ndarray, gain: float) -> bool:
    """Whether the last doubling raised the best of these (1, N, m) by at most `gain` standard deviations."""
    scores = array.astype(np.float64) @ lam
    n = scores.shape[1]
    half, whole = best_of_curve(scores[..., None], np.ones(1), [max(1, n // 2), n]).values[:, 0]
    return n > 1 and bool(whole - half <= gain * scores.std())


def _row(part: Candidates, row: int) -> Candidates:
    return Candidates(
        [part.prompts[row]],
        [part.texts[row]],
        [part.token_ids[row]],
        [part.logprobs[row]],
        rewards={name: values[row : row + 1] for name, values in part.rewards.items()},
        settings=part.settings,
    )


def _joined(parts: list[Candidates], prompt: int, max_n: int) -> Candidates:
    """One prompt's rounds joined."""

    def row(name: str) -> list[list[Any]]:
        return [[one for part in parts for one in getattr(part, name)[0]]]

    return Candidates(
        parts[0].prompts,
        row("texts"),
        row("token_ids"),
        row("logprobs"),
        rewards={name: np.concatenate([part.rewards[name] for part in parts], axis=1) for name in parts[0].rewards},
        settings={**parts[0].settings, "n": max_n},
        prompt_ids=np.array([prompt], dtype=np.int64),
    )


class Pilot(NamedTuple):
    """How many candidates are needed, estimated from a few: see `worth`."""

    kl: float  # nats, mean over prompts; too small where ess is near 1
    ess: float  # mean effective sample size of the n
    worth: Worth  # what any number of candidates will be worth
    n: int
    prompts: int


def pilot(
    sampler: BaseSampler | str,
    prompts: Sequence[Any],
    rewards: Any,
    *,
    lam: Sequence[float] | None = None,
    n: int = PILOT_N,
    max_new_tokens: int,
    seed: int,
    **sampling: Unpack[SamplingOptions],
) -> Pilot:
    """Draw n candidates for 8 prompts spread over the set, and estimate how many p_λ needs (`worth`).

    sampling: as in `best_of`. Its random numbers are independent of those of a run with the same seed.
    """
    from fastalign.rewards import score

    sampler, rewards, names, lam = prepared(sampler, rewards, lam)
    some = [prompts[i] for i in np.unique(np.linspace(0, len(prompts) - 1, PILOT_PROMPTS).round().astype(int))]
    apart = int(np.random.SeedSequence((seed, n)).generate_state(1, np.uint64)[0])
    drawn = sampler.sample(some, n=n, max_new_tokens=max_new_tokens, seed=apart, **sampling)
    array = drawn.with_rewards(names, score(rewards, *drawn.pairs())).reward_array(names)
    result = estimate(array, lam, warn=False)
    return Pilot(float(result.kl[0]), float(result.ess[0]), result.worth[0], n, len(some))
