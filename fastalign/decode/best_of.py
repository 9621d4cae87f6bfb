"""Best-of-N and reward-weighted resampling from prompts to texts, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.numbers import weights
from fastalign._base.units import counted
from fastalign.data.sampling import SamplingOptions
from fastalign.decode.candidates import Candidates
from fastalign.decode.estimates import best_of_curve, estimate
from fastalign.decode.sampler import Sampler
from fastalign.decode.samplers.base import BaseSampler
from fastalign.decode.select import effective_sample_size, select

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class BestOf:
    """One text per prompt: texts (P,), indices (P,) among the N candidates, rewards (P, m) of the selected texts.

    effective_sample_size (P,); values (m,): the expected mean rewards of the selection; candidates: all scored
    candidates; picked: all k selected texts per prompt, of which the first are above.
    """

    texts: list[str]
    indices: np.ndarray
    rewards: np.ndarray
    effective_sample_size: np.ndarray
    values: np.ndarray
    candidates: Candidates
    picked: Candidates

    def __repr__(self) -> str:
        ess = self.effective_sample_size.mean()
        return f"BestOf: {counted(len(self.texts), 'text')}, effective sample size {ess:.1f} of {self.candidates.n}"


def best_of(
    sampler: BaseSampler | str,
    prompts: Sequence[Any],
    rewards: Any,
    *,
    n: int,
    lam: Sequence[float] | None = None,
    method: str = "best",
    k: int = 1,
    max_new_tokens: int,
    seed: int,
    show_progress: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> BestOf:
    """Draw n candidates per prompt, score them, and select k.

    sampler: a Sampler or a model's name. rewards: one or several references (`rewards.parse`) or Reward objects.
    lam: (m,) weights, 1 each by default. method: "best" takes the largest lam . R; "resample" draws from p0 exp(lam .
    R) among the n (soft best-of-n; for temperature t use lam / t), as does any method of `select`, with or without
    replacement. If n is too small for that, a warning says how many are needed (`estimate`).
    sampling: temperature, top_p, stop ... as in `Sampler.sample`.
    Raises UserError (one line) on bad arguments.
    """
    from fastalign.rewards import score

    sampler, rewards, names, lam = prepared(sampler, rewards, lam)
    candidates = sampler.sample(
        prompts, n=n, max_new_tokens=max_new_tokens, seed=seed, show_progress=show_progress, **sampling
    )
    values = score(rewards, *candidates.pairs(), show_progress=show_progress)
    return chosen(candidates.with_rewards(names, values), names, lam, method=method, k=k, seed=seed)


def prepared(
    sampler: BaseSampler | str, rewards: Any, lam: Sequence[float] | None
) -> tuple[BaseSampler, list[Any], list[str], np.ndarray]:
    """(Sampler, list of rewards, their names, lam (m,) float64) from the arguments of `best_of`."""
    from fastalign.rewards.references import load, reach

    rewards = load(rewards if isinstance(rewards, (list, tuple)) else [rewards])
    lam = np.ones(len(rewards)) if lam is None else weights(lam, len(rewards))
    if not rewards:
        raise UserError("rewards must be one or more, got none")
    names = [reward.name for reward in rewards]
    reach(rewards)
    return Sampler.from_pretrained(sampler) if isinstance(sampler, str) else sampler, rewards, names, lam


def chosen(candidates: Candidates, names: Sequence[str], lam: np.ndarray, *, method: str, k: int, seed: int) -> BestOf:
    """The selection of `best_of` from scored candidates."""
    array = candidates.reward_array(names)
    picks = select(array, lam, k=k, method=method, seed=seed)
    picked, indices = candidates.take(picks), picks[:, 0]
    if method == "best":
        values = best_of_curve(array, lam, [array.shape[1]]).values[0]
    else:
        values = estimate(array, lam).values[0]
    return BestOf(
        texts=[row[0] for row in picked.texts],
        indices=indices,
        rewards=array[np.arange(len(indices)), indices],
        effective_sample_size=effective_sample_size(array, lam),
        values=values,
        candidates=candidates,
        picked=picked,
    )
