"""λ steered by the levels that a policy itself reaches.

The weights of a palette minimise the dual g(λ) = E_x log Z(x, λ) − λ·c (`palette.solve`), whose gradient is the levels
of p_λ less the palette c and whose Hessian is the covariance of the rewards under p_λ, within prompts. A policy trained
on λ·R less its KL to the base approaches p_λ, so its own completions measure both. It lags behind, however, and may
never get there. So after every batch λ is a few Newton steps away from the average λ̄ of the λ before: far beyond it
while the policy lags, and λ̄ follows for as long as a level is missed. That is a controller with a proportional and an
integral part, as Stooke et al. steer constraints by (arXiv 2007.03964); the integral alone overshoots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastalign._base.errors import UserError

STATE = "steering.json"  # of a checkpoint
RIDGE = 1e-3  # of each value's variance


class Rule(NamedTuple):
    """λ = λ̄ + gain · H⁻¹ (c − levels), subject to λ's signs, and λ̄ ← λ̄ + rate · (λ − λ̄) after it; levels and H are
    exponentially averaged over about `memory` batches.

    limit: the largest |λ − λ̄|, in standard deviations of its reward. hold: λ has arrived if every level has kept its
    bound, by more than its standard error, over this many batches; 0: never.
    """

    gain: float = 2.0
    rate: float = 0.02
    memory: float = 6.0
    limit: float = 3.0
    hold: int = 8


DEFAULT = Rule()


class Steering:
    """Moves `lam` (m,) towards a palette.

    palette: (m,) levels; sense: ">=", "<=" or "==" for each; free: (m,) whether a value has no target. lam: where to
    begin. rule: see `Rule`.
    """

    palette: np.ndarray
    side: np.ndarray
    free: np.ndarray
    lam: np.ndarray

    def __init__(
        self,
        palette: Sequence[float],
        sense: Sequence[str],
        lam: Sequence[float],
        *,
        free: Sequence[bool] | None = None,
        rule: Rule = DEFAULT,
    ):
        self.palette = np.asarray(palette, dtype=np.float64)
        self.side = np.array([{">=": 1.0, "<=": -1.0, "==": 0.0}[each] for each in sense])
        self.free = np.zeros(len(self.palette), dtype=bool) if free is None else np.asarray(free, dtype=bool)
        self.lam = np.array(lam, dtype=np.float64)
        if not self.palette.shape == self.side.shape == self.lam.shape == self.free.shape:
            raise UserError(f"lam must have one weight per level, {len(self.palette)}, got {self.lam.shape}")
        self.rule = rule
        self._mean = self.lam  # λ̄
        self._count = 0.0  # of batches in the averages
        self._levels = np.zeros_like(self.lam)
        self._covariance = np.zeros((len(self.lam), len(self.lam)))
        self._recent: list[list[float]] = []  # levels of the last `hold` batches

    @classmethod
    def of(cls, solution: Mapping[str, Any], rule: Rule = DEFAULT) -> Steering:
        """Of a palette's solution, as `jobs.align.steps.solve_palette` gives it, from its λ."""
        return cls(solution["solved_for"], solution["sense"], solution["lambda"], free=solution["free"], rule=rule)

    @property
    def levels(self) -> np.ndarray:
        """(m,) the averaged levels; NaN before the first batch."""
        return self._levels / self._count if self._count else np.full_like(self.lam, np.nan)

    def update(self, levels: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """One step from a batch's levels (m,) and its covariance (m, m) within prompts; returns the new λ."""
        keep = 1.0 - 1.0 / self.rule.memory
        self._count = keep * self._count + 1.0
        self._levels = keep * self._levels + levels
        self._covariance = keep * self._covariance + covariance
        self._recent = [*self._recent, np.asarray(levels, dtype=np.float64).tolist()][-max(self.rule.hold, 1) :]
        hessian = self._covariance / self._count
        step = self._minimum(hessian) - self._mean
        size = float(np.sqrt(max(step @ hessian @ step, 0.0)))
        step *= min(1.0, self.rule.limit / size if size > 0 else 1.0)
        self.lam, self._mean = self._mean + step, self._mean + self.rule.rate * step
        return self.lam

    def _minimum(self, hessian: np.ndarray) -> np.ndarray:
        """Of the dual's quadratic model at λ̄, with its slope times `gain`, over the λ of the right signs: values at
        their bound are fixed at 0, one after the other."""
        gap = self.rule.gain * (self.palette - self.levels)
        ridged = hessian + np.diag(RIDGE * np.diag(hessian) + np.finfo(np.float64).tiny)
        fixed = self.free.copy()
        while not fixed.all():
            lam, moved = np.zeros_like(self.lam), ~fixed
            right = gap[moved] + hessian[np.ix_(moved, fixed)] @ self._mean[fixed]
            lam[moved] = self._mean[moved] + np.linalg.solve(ridged[np.ix_(moved, moved)], right)
            wrong = moved & (lam * self.side < 0.0)
            if not wrong.any():
                return lam
            units = np.abs(lam) * np.sqrt(np.diag(ridged))
            fixed[np.argmax(np.where(wrong, units, -1.0))] = True
        return np.zeros_like(self.lam)

    @property
    def holds(self) -> bool:
        """Whether every level has kept its bound over the last `hold` batches, by more than its standard error."""
        if not 0 < self.rule.hold <= len(self._recent):
            return False
        recent = np.array(self._recent)
        error = recent.std(axis=0, ddof=1) / np.sqrt(len(recent))
        gap = (recent.mean(axis=0) - self.palette) * self.side
        kept = np.where(self.side == 0, np.abs(recent.mean(axis=0) - self.palette) <= error, gap >= error)
        return bool((kept | self.free).all())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {
            "lam": self.lam.tolist(), "mean": self._mean.tolist(), "count": self._count,
            "levels": self._levels.tolist(), "covariance": self._covariance.tolist(), "recent": self._recent,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.lam, self._mean, self._count = np.array(state["lam"]), np.array(state["mean"]), float(state["count"])
        self._levels, self._covariance = np.array(state["levels"]), np.array(state["covariance"])
        self._recent = [list(row) for row in state["recent"]]


def covariance(rewards: np.ndarray) -> np.ndarray:
    """(m, m), within the prompts of rewards (B, G, m); NaN counts as the prompt's mean."""
    apart = np.nan_to_num(rewards - np.nanmean(rewards, axis=1, keepdims=True)).reshape(-1, rewards.shape[-1])
    return apart.T @ apart / max(rewards.shape[0] * (rewards.shape[1] - 1), 1)


def key_of(prompt: Any) -> str:
    """Of a prompt, text or messages, in `Baselines`."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


class Baselines(NamedTuple):
    """Levels of the base model, prompt by prompt: few prompts a batch would else say more of themselves than of the
    policy.

    of: `key_of` a prompt -> (m,), its mean over candidates; mean: (m,), over all prompts.
    """

    of: Mapping[str, np.ndarray]
    mean: np.ndarray

    def levels(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        """(m,): the policy's levels over all prompts, from rewards (B, G, m) of some."""
        own = np.array([self.of.get(prompt, self.mean) for prompt in prompts])
        return self.mean + (np.nanmean(rewards, axis=1) - own).mean(axis=0)
