"""Weighted sums with given weights: linear soups, moving averages, task arithmetic."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fastalign._base.errors import UserError
from fastalign.soup.methods.base import Job, Number, Parameters, WeightedSum, flag


def linear_rows(rows: np.ndarray, normalize: bool | None) -> np.ndarray:
    """Weights of a linear soup. normalize: True divides by the sum, False keeps them, None requires a sum of 1."""
    sums = rows.sum(1, keepdims=True)
    if normalize:
        if (np.abs(sums) < 1e-12).any():
            raise UserError("weights that sum to 0 cannot be normalised")
        return rows / sums
    if normalize is None and (np.abs(sums - 1) > 1e-6).any():
        off = float(sums[np.abs(sums - 1).argmax()][0])
        raise UserError(
            f"weights of a linear soup must sum to 1, got {off:g} (normalize=True divides by the sum, normalize=False "
            "keeps them)"
        )
    return rows


class Linear(WeightedSum):
    """Σ ρ w."""

    name = "linear"
    weights = "equal"

    def check(self, job: Job) -> None:
        for name in job.names:
            self.rows(job, name)

    def rows(self, job: Job, name: str) -> np.ndarray:
        return linear_rows(job.weights_of(name), job.normalize)


class TaskArithmetic(WeightedSum):
    """base + λ Σ ρ (w - base) (arXiv 2212.04089); normalize divides ρ by its sum."""

    name = "task_arithmetic"
    base = "yes"
    parameters: ClassVar[Parameters] = {"lambda": Number(1.0), "normalize": flag(False)}

    def rows(self, job: Job, name: str) -> np.ndarray:
        rows, values = job.weights_of(name), job.values_of(name)
        if values["normalize"]:
            sums = rows.sum(1, keepdims=True)
            rows = rows / np.where(np.abs(sums) < 1e-8, 1, sums)
        return rows * values["lambda"]


class MovingAverage(WeightedSum):
    """The exponential moving average of checkpoints, oldest first: e_0 = w_0, e_i = decay e_(i-1) + (1 - decay) w_i."""

    name = "ema"
    weights = "none"
    parameters: ClassVar[Parameters] = {"decay": Number(None, 0, 1)}

    def rows(self, job: Job, name: str) -> np.ndarray:
        decay, m = job.values_of(name)["decay"], len(job.models)
        weights = (1 - decay) * np.power(decay, np.arange(m - 1, -1, -1))
        weights[0] = decay ** (m - 1)
        return weights[None]
