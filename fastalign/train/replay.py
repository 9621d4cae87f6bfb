"""Scored candidates of the base model, to train on beside the policy's own completions.

At p_λ, λ·R − log π/π0 is the same for all completions of a prompt, whoever drew them. Its variance within a prompt has,
on the policy's own completions, the policy gradient (arXiv 2010.10436), and may be lowered on any others too (arXiv
2503.18929). A prompt has many candidates, already scored, so the telling ones can be chosen: the best and the worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastalign.decode.candidates import Candidates

SHARE = 0.5  # of a prompt's candidates, among which the best and the worst are taken


class Text(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]  # under the base
    rewards: np.ndarray  # (m,)


class Replay:
    """Training begins with `first` steps on candidates; after them every second step is on candidates.

    keys: `steering.key_of` each of the P prompts. rewards: (P, N, m).
    """

    def __init__(self, scored: Candidates, rewards: np.ndarray, keys: Sequence[str], *, first: int = 12):
        self._scored, self._rewards, self.first = scored, np.asarray(rewards, dtype=np.float64), first
        self._index: Mapping[str, int] = {key: i for i, key in enumerate(keys)}

    def turn(self, step: int) -> bool:
        """Whether a step is on candidates."""
        return step < self.first or (step - self.first) % 2 == 1

    def texts(self, key: str, n: int, lam: np.ndarray, rng: np.random.Generator) -> list[Text]:
        """The n // 2 worst and n - n // 2 best by λ·R of a random half of a prompt's candidates; in turn, if there are
        fewer than n."""
        i, count = self._index[key], self._scored.n
        some = rng.permutation(count)[: max(round(SHARE * count), min(n, count))]
        some = some[np.argsort(self._rewards[i][some] @ lam, kind="stable")]
        worst = n // 2
        chosen = np.resize(some, n) if len(some) < n else np.concatenate([some[:worst], some[len(some) - n + worst :]])
        ids, logprobs = self._scored.token_ids[i], self._scored.logprobs[i]
        return [Text(list(ids[j]), [float(x) for x in logprobs[j]], self._rewards[i, j]) for j in chosen.tolist()]
