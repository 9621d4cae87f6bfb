"""Estimates for decoders that were not run, from a set of candidates: values, divergence, and how many draws they need.

The candidates are draws from p0, N for each of P prompts; a decoder selects among them by their rewards. Expectations
over its own draw are exact, by weighting all N (Rao–Blackwell); errors come from the variation between prompts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastalign._base.error_bars import standard_error
from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.decode.select import log_weights_of
from fastalign.decode.worth import TRUSTED_ESS, Worth, words, worth


class Estimate(NamedTuple):
    """Estimates for K weights λ, one row per λ, float64."""

    lam: np.ndarray  # (K, m)
    values: np.ndarray  # (K, m) mean rewards of the decoder that resamples one of the N by λ
    stderr: np.ndarray  # (K, m) of those, over prompts; NaN for one prompt
    kl: np.ndarray  # (K,) estimate of the mean over prompts of KL(p_λ, p0), nats; at most log N
    ess: np.ndarray  # (K,) mean effective sample size over prompts, in 1..N
    prompts: int
    n: int  # candidates of each
    worth: tuple[Worth, ...]  # K, what other numbers of candidates would be worth

    def __repr__(self) -> str:
        ess = f"effective sample size {self.ess.min():.1f} to {self.ess.max():.1f} of {self.n}"
        over = f"{counted(self.lam.shape[1], 'value')} over {counted(self.prompts, 'prompt')}"
        return f"Estimate: {len(self.lam):,} λ of {over}, {ess}"

    @property
    def doubt(self) -> str | None:
        """A one-line warning if there are too few candidates, else empty."""
        if not (self.ess < min(TRUSTED_ESS, self.n)).any():
            return None
        worst = int(self.ess.argmin())
        return (
            f"at λ {np.round(self.lam[worst], 4).tolist()} the {self.n} candidates of a prompt are worth "
            f"{self.ess[worst]:.1f}: too few to trust the ideal's values; {TRUSTED_ESS:.0f} need "
            f"{words(*self.worth[worst].needed())}"
        )

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each (K, m): Student's interval for the mean over prompts."""
        from scipy.stats import t

        half = t.ppf(0.5 + level / 2, max(self.prompts - 1, 1)) * self.stderr
        return self.values - half, self.values + half


def estimate(
    rewards: np.ndarray, lam: np.ndarray | Sequence[float] | Sequence[Sequence[float]], *, warn: bool = True
) -> Estimate:
    """Realised values, divergence and effective sample size at every λ of a grid, from one set of candidates.

    rewards (P, N, m) finite; lam (m,) or (K, m). `values` has the same mean as `select(rewards, lam)`, over its draw
    and over candidates, and a smaller variance. Relative to the ideal p_λ (N = infinity) both have a bias of order
    1/ess; unless warn is False, a warning says where the mean ess is below 10 (`Estimate.doubt`).

    Raises UserError on wrong shapes and numbers that are not finite.

    >>> import numpy as np
    >>> from fastalign import decode
    >>> rewards = np.random.default_rng(0).normal(size=(20, 50, 1))
    >>> found = decode.estimate(rewards, [[0.0], [1.0]])
    >>> found.values.round(2).tolist(), found.kl.round(2)
    ([[-0.05], [0.85]], array([0.  , 0.44]))
    >>> found
    Estimate: 2 λ of 1 value over 20 prompts, effective sample size 23.5 to 50.0 of 50
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 3:
        raise UserError(f"rewards must be (prompts, candidates, values), got shape {rewards.shape}")
    grid = np.atleast_2d(np.asarray(lam, dtype=np.float64))
    prompts, n, m = rewards.shape
    values, stderr = np.empty((len(grid), m)), np.empty((len(grid), m))
    kl, ess = np.empty(len(grid)), np.empty(len(grid))
    for i, row in enumerate(grid):
        scores = log_weights_of(rewards, row)
        log_w = scores - scores.max(1, keepdims=True)
        log_w -= np.log(np.exp(log_w).sum(1, keepdims=True))
        w = np.exp(log_w)
        means = np.einsum("pn,pnm->pm", w, rewards)
        values[i] = means.mean(0)
        stderr[i] = standard_error(means)
        kl[i] = max(0.0, (np.where(w > 0, w * (log_w + math.log(n)), 0).sum(1)).mean())
        ess[i] = (1 / (w**2).sum(1)).mean()
    result = Estimate(grid, values, stderr, kl, ess, prompts, n, tuple(worth(rewards, row) for row in grid))
    if warn and result.doubt:
        warnings.warn(result.doubt, stacklevel=2)
    return result


def needed(kl: float, ess: float = TRUSTED_ESS) -> int:
    """The fewest candidates per prompt for `ess` effective ones at a divergence of `kl` nats: ess · e^kl.

    Importance sampling needs at least of order e^KL draws (Chatterjee, Diaconis, arXiv 1511.01437): N draws have an
    effective sample size of at most N e^-KL, and less for heavier-tailed weights. Given candidates, `worth` estimates
    how many are needed.

    >>> from fastalign import decode
    >>> decode.needed(2.0), decode.needed(2.0, ess=1)
    (74, 8)
    """
    if not kl >= 0:
        raise UserError(f"kl must be at least 0, got {kl!r}")
    return math.ceil(ess * math.exp(min(kl, 700.0))) if kl < 700 else 10**300


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n, nats: the KL from p0 of best-of-n, exact without ties and an upper bound with them (arXiv
    2401.01879).

    >>> from fastalign import decode
    >>> round(decode.best_of_n_kl(16), 4)
    1.8351
    """
    if n < 1:
        raise UserError(f"n must be at least 1, got {n!r}")
    return math.log(n) - (n - 1) / n


class BestOfCurve(NamedTuple):
    """Best-of-k for each k: float64."""

    k: np.ndarray  # (K,)
    values: np.ndarray  # (K, m) mean rewards of the best of k by λ
    stderr: np.ndarray  # (K, m) over prompts
    kl: np.ndarray  # (K,) its bound

    def __repr__(self) -> str:
        return f"BestOfCurve: {counted(self.values.shape[1], 'value')} at k = {', '.join(map(str, self.k))}"


def best_of_curve(rewards: np.ndarray, lam: np.ndarray, ks: Sequence[int]) -> BestOfCurve:
    """Unbiased estimates of the mean of best-of-k by λ·R for every k up to N, from the same N candidates.

    The average over all subsets of k of the N: the i-th smallest is the best of C(i-1, k-1) of the C(N, k).
    Candidates of equal score share equally.

    rewards (P, N, m); lam (m,); ks in 1..N.

    >>> import numpy as np
    >>> from fastalign import decode
    >>> rewards = np.array([[[1.0], [2.0], [6.0]]])
    >>> decode.best_of_curve(rewards, np.array([1.0]), [1, 2, 3]).values.round(3).tolist()
    [[3.0], [4.667], [6.0]]
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    scores = np.atleast_2d(log_weights_of(rewards, lam))
    prompts, n, m = rewards.shape
    ks = np.asarray(ks, dtype=np.int64)
    if ks.ndim != 1 or not len(ks) or ks.min() < 1 or ks.max() > n:
        raise UserError(f"ks must be numbers in 1..{n}, the candidates of a prompt, got {ks.tolist()}")
    values, stderr = np.empty((len(ks), m)), np.empty((len(ks), m))
    order = np.argsort(scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, 1)
    sorted_rewards = np.take_along_axis(rewards, order[..., None], 1)
    for i, k in enumerate(ks.tolist()):
        p = _best_of(k, n)
        means = np.stack([_shared(p, ordered[j]) @ sorted_rewards[j] for j in range(prompts)])
        values[i] = means.mean(0)
        stderr[i] = standard_error(means)
    return BestOfCurve(ks, values, stderr, np.array([best_of_n_kl(k) for k in ks.tolist()]))


def _best_of(k: int, n: int) -> np.ndarray:
    """The probability that the i-th smallest of n is the largest of k of them drawn without replacement, i = 1..n."""
    from scipy.special import gammaln

    rank = np.arange(k, n + 1)
    log_choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    p = np.zeros(n)
    p[k - 1 :] = np.exp(gammaln(rank) - gammaln(rank - k + 1) - gammaln(k) - log_choose)
    return p


def _shared(p: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """p with its mass spread evenly over equal scores."""
    _, group, count = np.unique(ordered, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=p) / count)[group]
