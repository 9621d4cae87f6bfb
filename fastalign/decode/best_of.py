"""Best-of-N and reward-weighted resampling from prompts to texts, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastalign.decode.candidates import Candidates
from fastalign.decode.sampler import Sampler
from fastalign.decode.select import effective_sample_size, select
from fastalign.errors import UserError


@dataclass
class BestOf:
    """One text per prompt: texts (P,), indices (P,) among the N candidates, rewards (P, m) of the picked.

    effective_sample_size (P,); candidates: all the scored ones they were picked from.
    """

    texts: list[str]
    indices: np.ndarray
    rewards: np.ndarray
    effective_sample_size: np.ndarray
    candidates: Candidates


def best_of(
    sampler: Sampler | str,
    prompts: Sequence[str],
    rewards: Any,
    *,
    n: int,
    lam: Sequence[float] | None = None,
    method: str = "best",
    max_new_tokens: int,
    seed: int,
    show_progress: bool = False,
    **sampling: Any,
) -> BestOf:
    """Draw n candidates per prompt, score them, keep one.

    sampler: a Sampler or a model's name. rewards: a reward's name or Reward object, or several.
    lam: (m,) weights, 1 each by default. method: "best" keeps the largest lam . R; "resample" draws from
    p0 exp(lam . R) among the n. sampling: temperature, top_p, stop ... as in `Sampler.sample`.
    Raises UserError (one line) on bad arguments.
    """
    from fastalign.rewards import score

    rewards = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    lam = np.ones(len(rewards)) if lam is None else np.asarray(lam, dtype=np.float64)
    if not rewards or lam.shape != (len(rewards),):
        raise UserError(f"lam must have one weight per reward, {len(rewards)}, got shape {lam.shape}")
    sampler = Sampler.from_pretrained(sampler) if isinstance(sampler, str) else sampler
    candidates = sampler.sample(
        prompts, n=n, max_new_tokens=max_new_tokens, seed=seed, show_progress=show_progress, **sampling
    )
    names = [reward if isinstance(reward, str) else reward.name for reward in rewards]
    values = score(rewards, *candidates.pairs(), show_progress=show_progress)
    candidates = candidates.with_rewards(names, values)
    array = candidates.reward_array(names)
    indices = select(array, lam, method=method, seed=seed)[:, 0]
    return BestOf(
        texts=[row[i] for row, i in zip(candidates.texts, indices, strict=True)],
        indices=indices,
        rewards=array[np.arange(len(indices)), indices],
        effective_sample_size=effective_sample_size(array, lam),
        candidates=candidates,
    )
