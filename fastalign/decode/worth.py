"""Extrapolates the effective sample size under λ from a few candidates per prompt to N.

ESS = (Σ w)² / Σ w², w = exp(λ·R), per prompt, averaged over prompts. Up to n, the size of the pilot, it is measured on
subsets. Beyond n:

- ESS/N does not rise with N: (mean w)² / mean w² is convex in both means, and those of N candidates are conditional
  expectations of those of n < N (Jensen). N/n · ESS(n) is thus an upper bound in expectation, for any distribution of
  rewards.
- How much smaller it will be depends on tails that n candidates do not show: a plug-in estimate is too large. If w has
  a power-law tail, ESS grows as N^b with b < 1; if its tail is light, b rises to 1 (Chatterjee, Diaconis, arXiv
  1511.01437; compare k̂ of Pareto smoothing, Vehtari et al., arXiv 1507.02646). So the exponent of the last doubling,
  n/2 to n, gives a lower bound. We take the smallest of: that of the mean, that of the mean with its last decrease
  repeated, and that of the prompts' geometric mean, which does not hide prompts in which a rare large w has appeared.

The true value lies between the two bounds. Each is widened by the sampling error over prompts (jackknife on the log
scale).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastalign._base.errors import UserError
from fastalign._base.units import counted
from fastalign.decode.select import log_weights_of

TRUSTED_ESS = 10.0  # effective draws per prompt below which weighted means are mostly the noise of a few candidates
LEAST_CANDIDATES = 8  # for an exponent from halves and quarters
DOUBLINGS = 24  # beyond the pilot's n
SHUFFLES, SHUFFLED = 8, 2**21  # at most this many subsets, with at most this many candidates in all


class Worth(NamedTuple):
    """Mean ESS of n candidates per prompt, for L sizes n: the logs of its lower and upper bound, with standard errors
    over prompts.

    relative_std: of one prompt's ESS, relative to the mean, which enters the error for a few other prompts.
    low is None if the pilot cannot determine it: fewer than two prompts or eight candidates, or all weights equal.
    """

    prompts: int
    candidates: int
    n: np.ndarray  # (L,) rising from 1
    relative_std: np.ndarray  # (L,)
    high: np.ndarray  # (L,)
    high_error: np.ndarray  # (L,)
    low: np.ndarray | None  # (L,)
    low_error: np.ndarray | None  # (L,)

    def __repr__(self) -> str:
        return f"Worth: {self.tell(self.candidates)}"

    def at(self, n: float, *, prompts: int | None = None, level: float = 0.95) -> tuple[float | None, float]:
        """The interval (low, high) of the ESS of n candidates per prompt for `prompts` other prompts; default: as many
        as here."""
        low, high = self._ends(prompts, level)

        def read(end: np.ndarray) -> float:
            return min(float(np.exp(np.interp(math.log(n), np.log(self.n), end))), float(n))

        return None if low is None else read(low), read(high)

    def needed(self, ess: float = TRUSTED_ESS, *, prompts: int | None = None) -> tuple[int, int | None]:
        """(fewest, most) candidates per prompt for `ess` effective ones; None: too many to estimate."""
        low, high = self._ends(prompts, 0.95)
        return self._reaches(high, ess) or int(self.n[-1]), None if low is None else self._reaches(low, ess)

    def more(self, n: int) -> str | None:
        """The command that adds the candidates missing from `needed`, given n per prompt; None if none are missing, or
        too many."""
        fewest, most = self.needed()
        lacking = (most or fewest) - n
        return f"fastalign sample --more {lacking} --out CANDIDATES" if 0 < lacking <= 10**6 else None

    def tell(self, n: int, *, prompts: int | None = None) -> str:
        """One line: the ESS of n candidates, and how many are needed."""
        low, high = self.at(n, prompts=prompts)
        fewest, most = self.needed(prompts=prompts)
        source = f"{counted(self.prompts, 'prompt')} × {self.candidates:,}"
        drawn = f"{counted(n, 'candidate')} a prompt {'is' if n == 1 else 'are'} worth"
        if low is None:
            return (
                f"{drawn} at most {_up(high)} effective ones ({source} are too few for a lower bound); "
                f"{TRUSTED_ESS:.0f} need at least {fewest:,}"
            )
        few = ", too few to say better" if high > 10 * low else ""
        return (
            f"{drawn} {_span(_down(low), _up(high))} effective ones (95 %, from {source}{few}); "
            f"{TRUSTED_ESS:.0f} need {words(fewest, most)}"
        )

    def to_json(self) -> dict[str, Any]:
        def plain(row: np.ndarray | None) -> list[float] | None:
            return None if row is None else [round(float(x), 9) for x in row]

        return {
            "prompts": self.prompts,
            "candidates": self.candidates,
            "n": self.n.tolist(),
            **{name: plain(getattr(self, name)) for name in self._fields[3:]},
        }

    @classmethod
    def from_json(cls, content: Any, where: str) -> Worth:
        """Raises UserError, one line that begins with `where`."""
        try:
            rows: dict[str, Any] = {
                name: None if content[name] is None else np.array(content[name], dtype=np.float64)
                for name in cls._fields[2:]
            }
            made = cls(int(content["prompts"]), int(content["candidates"]), **rows)
            bad = made.n is None or made.n.ndim != 1 or not len(made.n) or (np.diff(made.n) <= 0).any() or made.n[0] < 1
            ends: list[Any] = [made.relative_std, made.high, made.high_error] + (
                [] if made.low is None else [made.low, made.low_error]
            )
            bad = bad or made.prompts < 1 or any(row is None or row.shape != made.n.shape for row in ends)
            bad = bad or not np.isfinite(ends).all()
        except (KeyError, TypeError, ValueError, OverflowError):
            bad = True
        if bad:
            raise UserError(f"{where} is not what `fastalign map` writes; run it again")
        return made

    def _ends(self, prompts: int | None, level: float) -> tuple[np.ndarray | None, np.ndarray]:
        """Logs of both bounds at each n. The mean of `prompts` new prompts has its own error."""
        from scipy.special import stdtrit

        t = stdtrit(max(self.prompts - 1, 1), 0.5 + level / 2)

        def wide(error: np.ndarray) -> np.ndarray:
            # Other prompts are as uncertain as these.
            each = np.maximum(self.relative_std, error * math.sqrt(self.prompts))
            return t * np.hypot(error, each / math.sqrt(prompts or self.prompts))

        high = np.minimum(self.high + wide(self.high_error), np.log(self.n))
        if self.low is None or self.low_error is None:
            return None, high
        return np.maximum(self.low - wide(self.low_error), 0.0), high

    def _reaches(self, end: np.ndarray, ess: float) -> int | None:
        """The first n at which this bound reaches ess."""
        goal = math.log(ess)
        above = np.flatnonzero(end >= goal - 1e-12)
        if not len(above):
            return None
        i = int(above[0])
        if i == 0:
            return int(self.n[0])
        x, y = np.log(self.n[i - 1 : i + 1]), end[i - 1 : i + 1]
        reached = math.exp(x[0] + (x[1] - x[0]) * (goal - y[0]) / (y[1] - y[0]))
        return math.ceil(reached * (1 - 2e-6))  # files have the logs rounded


def worth(rewards: np.ndarray, lam: np.ndarray | Sequence[float]) -> Worth:
    """The effective sample size under λ of any number of candidates of such prompts. rewards (P, n, m), lam (m,).

    Raises UserError on wrong shapes and numbers that are not finite.

    >>> import numpy as np
    >>> from fastalign import decode
    >>> rewards = np.random.default_rng(0).normal(size=(20, 64, 1))
    >>> decode.worth(rewards, [1.0])
    Worth: 64 candidates a prompt are worth 24–32 effective ones (95 %, from 20 prompts × 64); 10 need 17–23
    """
    lam = np.asarray(lam, dtype=np.float64)
    scores = np.atleast_2d(log_weights_of(rewards, lam))
    prompts, n = scores.shape
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    measured, squares = np.moveaxis(np.array([_ess(scores, m) for m in sizes]), 0, -1)  # (P, sizes) each, from n down
    beyond = np.arange(1, DOUBLINGS + 1) * math.log(2)
    grid = np.array([*sizes[::-1], *(n * 2.0 ** np.arange(1, DOUBLINGS + 1))])

    def ends(means: np.ndarray, typical: np.ndarray) -> list[np.ndarray]:
        """The logs of the lower and upper bounds (2, ..., L) from the prompts' log means, arithmetic and geometric
        (..., sizes)."""
        slope = _exponent(means, typical) if n >= LEAST_CANDIDATES else np.ones(means.shape[:-1])
        steps = (slope, np.ones_like(slope))
        return [np.concatenate([means[..., ::-1], means[..., :1] + step[..., None] * beyond], -1) for step in steps]

    logs = np.log(measured)
    low, high = ends(np.log(measured.mean(axis=0)), logs.mean(axis=0))
    if prompts < 2:
        return Worth(prompts, n, grid, np.zeros_like(high), high, np.zeros_like(high), None, None)
    variance = np.maximum(squares.mean(axis=0) - measured.mean(axis=0) ** 2, 0.0) * prompts / (prompts - 1)
    relative_std = (np.sqrt(variance) / measured.mean(axis=0))[::-1]
    relative_std = np.r_[relative_std, np.full(DOUBLINGS, relative_std[-1])]
    without = [(x.sum(axis=0) - x) / (prompts - 1) for x in (measured, logs)]  # each prompt in turn left out
    error = [np.sqrt((prompts - 1) * x.var(axis=0)) for x in ends(np.log(without[0]), without[1])]
    same = not np.ptp(scores, axis=1).any() and lam.any()  # no effect of λ was seen
    if n < LEAST_CANDIDATES or same:
        return Worth(prompts, n, grid, relative_std, high, error[1], None, None)
    return Worth(prompts, n, grid, relative_std, high, error[1], low, error[0])


def words(fewest: int, most: int | None) -> str:
    """The printed form of `needed`."""
    if most is None or most > 10**6:
        return f"{fewest:,} or more" if fewest <= 10**6 else "> 1e6"
    return _span(f"{fewest:,}", f"{most:,}")


def _exponent(means: np.ndarray, typical: np.ndarray) -> np.ndarray:
    """The smallest plausible growth exponent of ESS, from the log means (..., sizes) at n, n/2 and n/4 candidates."""
    doublings = -np.diff(means[..., :3]) / math.log(2)
    last, before = doublings[..., 0], doublings[..., 1]
    growth = (typical[..., 0] - typical[..., 1]) / math.log(2)
    return np.minimum.reduce([np.ones_like(last), last, 2 * last - before, growth])


def _ess(scores: np.ndarray, m: int) -> np.ndarray:
    """(2, P): the mean of ESS and its square, of m of each prompt's n candidates: disjoint subsets of some shuffles."""
    prompts, n = scores.shape
    rng, k = np.random.default_rng(0), n // m
    shuffles = max(1, min(SHUFFLES, SHUFFLED // scores.size)) if 1 < m < n else 1
    total = np.zeros((2, prompts))
    for _ in range(shuffles):
        part = (scores[:, rng.permutation(n)[: k * m]] if m < n else scores).reshape(prompts, k, m)
        w = np.exp(part - part.max(axis=2, keepdims=True))
        ess = w.sum(axis=2) ** 2 / (w * w).sum(axis=2)
        total += ess.mean(axis=1), (ess * ess).mean(axis=1)
    return total / shuffles


def _down(x: float) -> str:
    return f"{math.floor(x * 10 + 1e-6) / 10:.1f}" if x < 10 else f"{math.floor(x + 1e-6):,}"


def _up(x: float) -> str:
    return f"{math.ceil(x * 10 - 1e-6) / 10:.1f}" if x < 10 else f"{math.ceil(x - 1e-6):,}"


def _span(low: str, high: str) -> str:
    return low if low in (high, f"{high}.0") else f"{low}–{high}"
